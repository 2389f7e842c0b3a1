"""B of contractions, weights above all, as one matrix [batch..., K, N], or [batch..., N, K], that can be copied in wide pieces.

    B -> [batch..., N, K] -> [batch..., K, N]

K and N are the products of the k and n axes in the order of the spec, so that a kernel of a GPU, which copies tiles of B as it
lies, finds neighbours side by side. f32 has N last if that makes pieces of 32 bytes; what tensor cores read has K last, since
their matrices are rows along K, and of bytes nothing transposes them.

The movement depends on weights alone: the prepare graph does it once. Of other operands only those are moved that no kernel
could copy in wide pieces, such as the weights of a convolution in a training step, where many rows read what is moved once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import as_int
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract
from ..ir.op import make
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, derived
from .pack_weights import matrix
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on

CHUNK: Final = 16  # bytes
MANY: Final = 64  # rows of A: a tile or more, so that every element that is moved is read often


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


def _for_tensor_cores(node: Node, facts: Facts) -> bool:
    form = facts.lowering(node)
    return node.inputs[1].dtype.itemsize < 4 or (isinstance(form, Contract) and form.tf32)


def _columns_last(node: Node, spec: Contraction, facts: Facts) -> bool:
    """Whether B is best as [K, N]."""
    size = node.inputs[1].dtype.itemsize
    n, k = as_int(spec.size("n")), as_int(spec.size("k"))
    if _for_tensor_cores(node, facts):
        return size > 1 and k % (CHUNK // size) != 0 and n % (CHUNK // size) == 0
    return n % 8 == 0 or k % 8 != 0


def _scattered(node: Node, spec: Contraction) -> bool:
    """Whether neither neighbours along k nor, if they are more than bytes, along n lie side by side in B."""
    inner = spec.b[-1].terms if spec.b else ()
    kinds = ("k",) if node.inputs[1].dtype.itemsize == 1 else ("k", "n")
    last = [next((x.name for x in reversed(spec.of_kind(kind)) if x.extent != 1), "") for kind in kinds]
    return all(inner != ((name, 1),) for name in last)


def _ordered(node: Node, spec: Contraction, facts: Facts) -> bool:
    """Whether B is as good as it can be: for tensor cores in the better order, for others in either."""
    last = _columns_last(node, spec, facts)
    return spec.b == _maps(spec, last) or (not _for_tensor_cores(node, facts) and spec.b == _maps(spec, not last))


def _rule(fixed: Mapping[Node, bool]) -> Rule:
    @rule_on("contract")
    def order_weights(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(a, b as one matrix) where b comes from weights alone."""
        spec = spec_of(node, facts)
        if spec is None or spec.panel or "spec" not in node.attrs or not all(isinstance(x.extent, int) for x in spec.axes):
            return Miss("not an unpacked contract node of static sizes", node)
        b = node.inputs[1]
        if fixed.get(b) is not True and not (_scattered(node, spec) and as_int(spec.size("m")) >= MANY):
            return Miss("B does not come from weights alone, and has neighbours side by side or few readers", b)
        if _ordered(node, spec, facts) or 0 in node.shape or 0 in b.shape:
            return Miss("B lies in order", b)
        x = matrix(b, spec)
        if x is None:
            return Miss("B is indexed in a way that is no matrix", b)
        last = _columns_last(node, spec, facts)
        if last:
            rank = len(x.shape)
            x = make("transpose", x, perm=(*range(rank - 2), rank - 1, rank - 2))
        return make(node.op, node.inputs[0], x, spec=replace(spec, b=_maps(spec, last), groups=0))

    return order_weights


def _ordered_once(before: Node, after: Node, facts: Facts) -> bool:
    """The order: contractions whose B is not in order yet."""
    old, new = spec_of(before, facts), spec_of(after, facts)
    return old is not None and new is not None and not _ordered(before, old, facts) and _ordered(after, new, facts)


@dataclass(frozen=True)
class WeightOrder(Pass):
    """Every B that comes from weights, and others that lie badly, as a matrix.

    Where it is transposed, numpy may add up the products in another order.
    """

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with weights in order."""
        return apply_rules(graph, [_rule(derived(graph.nodes(), ctx.weights(graph)))], ctx, _ordered_once)
