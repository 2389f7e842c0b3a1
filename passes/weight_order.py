"""Weights of contractions as one matrix [batch..., K, N], or [batch..., N, K], whichever can be copied 16 bytes at a time.

    B -> [batch..., N, K] -> [batch..., K, N]

K and N are the products of the k and n axes in the order of the spec, so that a kernel of a GPU, which copies tiles of B as it
lies, finds neighbours side by side. The movement depends on weights alone: the prepare graph does it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int
from ..ir.graph import Graph, Node
from ..ir.op import make
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, derived
from .pack_weights import matrix
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on

CHUNK: Final = 8


def _flat(axes: Sequence[Axis]) -> Affine:
    """The position in the row-major product of axes."""
    terms: list[tuple[str, int]] = []
    stride = 1
    for x in reversed(axes):
        terms.insert(0, (x.name, stride))
        stride *= as_int(x.extent)
    return Affine(tuple(terms))


def _maps(spec: Contraction, columns_last: bool) -> tuple[Affine, ...]:
    batch = tuple(Affine(((x.name, 1),)) for x in spec.of_kind("batch"))
    k, n = _flat(spec.of_kind("k")), _flat(spec.of_kind("n"))
    return (*batch, k, n) if columns_last else (*batch, n, k)


def _ordered(spec: Contraction) -> bool:
    return spec.b in (_maps(spec, True), _maps(spec, False))


def _rule(fixed: Mapping[Node, bool]) -> Rule:
    @rule_on("contract")
    def order_weights(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(a, b as one matrix) where b comes from weights alone."""
        spec = spec_of(node, facts)
        if spec is None or spec.panel or "spec" not in node.attrs or not all(isinstance(x.extent, int) for x in spec.axes):
            return Miss("not an unpacked contract node of static sizes", node)
        b = node.inputs[1]
        if fixed.get(b) is not True:
            return Miss("B does not come from weights alone", b)
        if _ordered(spec) or 0 in node.shape or 0 in b.shape:
            return Miss("B lies in order", b)
        x = matrix(b, spec)
        if x is None:
            return Miss("B is indexed in a way that is no matrix", b)
        last = as_int(spec.size("n")) % CHUNK == 0 or as_int(spec.size("k")) % CHUNK != 0
        if last:
            rank = len(x.shape)
            x = make("transpose", x, perm=(*range(rank - 2), rank - 1, rank - 2))
        return make(node.op, node.inputs[0], x, spec=replace(spec, b=_maps(spec, last), groups=0))

    return order_weights


def _ordered_once(before: Node, after: Node, facts: Facts) -> bool:
    """The order: contractions whose B is no matrix yet."""
    old, new = spec_of(before, facts), spec_of(after, facts)
    return old is not None and new is not None and not _ordered(old) and _ordered(new)


@dataclass(frozen=True)
class WeightOrder(Pass):
    """Every B that comes from weights as a matrix."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with weights in order."""
        given = ctx.weights(graph)
        return apply_rules(graph, [_rule(derived(graph.nodes(), given))], ctx, _ordered_once) if given else graph
