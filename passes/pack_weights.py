"""Weights of contractions in panels, as the register tile reads them: a panel holds `width` columns of B, k after k.

    B -> [batch..., N, K] -> padded with zeros to whole panels -> [batch..., N / width, K, width]

N and K are the products of the n and k axes in the order of the spec. The movement is made of ordinary nodes that depend on
weights alone, so the prepare graph does it once. How wide (or whether at all) is for the code generator to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.graph import Graph, Node
from ..ir.op import make
from .contract import Context, Pass, PreferredPanel
from .contract_form import generic, spec_of
from .facts import Facts, derived, weights
from .rewrite import Miss, Outcome, Rule, apply_rules, rule


def axes_of(index: Affine, spec: Contraction, extent: object) -> list[Axis] | None:
    """The axes that one dimension splits into, outermost first, if its index runs over all of it once; None otherwise."""
    terms = sorted(index.terms, key=lambda t: -t[1])
    axes = [spec.axis(name) for name, _ in terms]
    step: object = 1
    for (_, coefficient), x in zip(reversed(terms), reversed(axes), strict=True):
        if coefficient != step:
            return None
        step = coefficient * x.extent
    return axes if index.constant == 0 and step == extent else None


def matrix(b: Node, spec: Contraction) -> Node | None:
    """B as [batch..., N, K]; None where its index maps are not plain."""
    order: list[Axis] = []
    for index, extent in zip(spec.b, b.shape, strict=True):
        axes = axes_of(index, spec, extent)
        if axes is None:
            return None
        order += axes
    wanted = [*spec.of_kind("batch"), *spec.of_kind("n"), *spec.of_kind("k")]
    if sorted(x.name for x in order) != sorted(x.name for x in wanted):
        return None
    # an axis of extent 1 may stand anywhere: to move it is no movement
    order, wanted = [a for a in order if a.extent != 1], [a for a in wanted if a.extent != 1]
    x = _reshape(b, [a.extent for a in order])
    perm = tuple(order.index(a) for a in wanted)
    if perm != tuple(range(len(perm))):
        x = make("transpose", x, perm=perm)
    batch = [a.extent for a in spec.of_kind("batch")]
    return _reshape(x, [*batch, spec.size("n"), spec.size("k")])


def pack(b: Node, spec: Contraction, width: int) -> Node | None:
    """B in panels of `width` columns; None where its index maps are not plain."""
    x = matrix(b, spec)
    if x is None or not isinstance(x.shape[-2], int):
        return None
    rank, n = len(x.shape), x.shape[-2]
    missing = -n % width
    zeros = (0,) * rank
    if missing:
        high = (0,) * (rank - 2) + (missing, 0)
        x = make("pad", x, low=zeros, high=high, interior=zeros, value=0.0)
    x = _reshape(x, [*x.shape[:-2], (n + missing) // width, width, x.shape[-1]])
    return make("transpose", x, perm=(*range(rank - 1), rank, rank - 1))


def _reshape(x: Node, shape: Sequence[object]) -> Node:
    return x if x.shape == tuple(shape) else make("reshape", x, shape=tuple(shape))


def _rule(fixed: Mapping[Node, bool], ctx: Context, preferred: PreferredPanel) -> Rule:
    """The rule for a graph whose weights are `fixed`."""

    @rule
    def pack_operand(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(a, panels(b)) where b comes from weights alone and the target wants panels."""
        spec = spec_of(node, facts)
        if spec is None or spec.panel or "spec" not in node.attrs:
            return Miss("not an unpacked contract node", node)
        b = node.inputs[1]
        if fixed.get(b) is not True:
            return Miss("B does not come from weights alone", b)
        if ctx.target is None:
            return Miss("no target is given", node)
        width = preferred(spec, ctx.target)
        if width <= 0:
            return Miss("the code generator reads B as it is", b)
        packed = pack(b, spec, width)
        if packed is None:
            return Miss("B is indexed in a way that has no panels", b)
        return generic(node.inputs[0], packed, spec.packed(width, b.shape))

    return pack_operand


def _packed_once(before: Node, after: Node, facts: Facts) -> bool:
    """The order: contractions with an unpacked B."""
    old, new = spec_of(before, facts), spec_of(after, facts)
    return old is not None and new is not None and not old.panel and new.panel > 0


@dataclass(frozen=True)
class PackWeights(Pass):
    """Packs every B that comes from weights; nothing without a target and a `preferred_panel` in the context."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})
    ensures: ClassVar[frozenset[str]] = frozenset({"packed"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with packed weights."""
        given = weights(graph)
        if ctx.preferred_panel is None or ctx.target is None or not given:
            return graph
        return apply_rules(graph, [_rule(derived(graph.nodes(), given), ctx, ctx.preferred_panel)], ctx, _packed_once)
