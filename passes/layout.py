"""Channels last inside: convolutions and pooling in NHWC, the transposes around them moved together and cancelled.

    conv_nchw(x)            -> T'(conv_nhwc(T(x)))          T: NCHW -> NHWC, T' its inverse
    f(T'(x), T'(y))         -> T'(f(x, y))                  f elementwise, pad, ...: ops whose record says how
    f(T'(x), broadcast(v))  -> T'(f(x, broadcast'(v)))      a broadcast, a constant or a weight is moved for nothing
    sum(T'(x), axes)        -> sum(x, axes')                no order of the kept dimensions is lost
    T(T'(x))                -> x
    shuffle(T'(x))          -> T'(shuffle'(x))          channels split, exchanged and merged again

Transposes so sink towards the outputs until they meet their inverse; those at the inputs and outputs of the graph stay,
and with them its signature. Types carry no layout: a permuted tensor is a tensor of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.dims import product
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from . import movement
from .contract import Context, Pass
from .contract_form import permutation
from .facts import Facts, derived, weights
from .rewrite import Miss, Outcome, Rule, apply_rules, rule, rule_on, smaller

TO_NHWC: Final = (0, 2, 3, 1)
TO_NCHW: Final = (0, 3, 1, 2)


def perm_of(node: Node, facts: Facts) -> tuple[int, ...] | None:
    """perm where node = transpose(x, perm) moves data; None for everything else."""
    if not node.inputs or not node.op.has(Trait.MOVEMENT):
        return None
    return None if facts.kind(node) == "view" else permutation(node, facts)


@rule
def channels_last(node: Node, facts: Facts) -> Outcome:
    """op_nchw(x) -> T'(op_nhwc(T(x))) for every op whose record can compute in another layout; of pooling and the like, which
    gain nothing by it, those of which an operand is transposed from channels last."""
    if node.op.to_layout is None:
        return Miss("its record knows no other layout", node)
    if not node.op.has(Trait.CONTRACTION) and not any(perm_of(i, facts) == TO_NCHW for i in node.inputs):
        return Miss("no operand is transposed from channels last", node)
    new = node.op.to_layout(node, "NHWC")
    return Miss("it has channels last already", node) if new is node else new


def _sink(fixed: Mapping[Node, bool]) -> Rule:
    """The rule that moves transposes past an op, free for what is `fixed` (weights and constants)."""

    @rule
    def sink_transpose(node: Node, facts: Facts) -> Outcome:
        """f(T'(x), ...) -> T'(f(x, ...)) where every other operand is transposed for nothing."""
        if node.op.transpose is None or not node.inputs or perm_of(node, facts) is not None:
            return Miss("its record does not say how to transpose it", node)
        if not any(perm_of(i, facts) == TO_NCHW for i in node.inputs):
            return Miss("no operand is transposed from channels last", node)
        if len(node.shape) != 4:
            return Miss("its result is no image", node)
        new = node.op.transpose(node, TO_NHWC)
        if new is None:
            return Miss("its record cannot transpose it here", node)
        for i in new.inputs:
            if perm_of(i, facts) is not None and i not in node.inputs:
                moved = i.inputs[0]
                if not (facts.uniform(moved) is not None or facts.replicates(moved) or moved in fixed):
                    return Miss("another operand would have to be transposed", moved)
        return make("transpose", new, perm=TO_NCHW)

    return sink_transpose


@rule
def reduce_transposed(node: Node, facts: Facts) -> Outcome:
    """reduce(T'(x), axes) -> reduce(x, axes') where the kept dimensions stay in order, else T' after it with keepdims."""
    axes = node.attrs.get("axes")
    if not node.op.has(Trait.REDUCTION) or axes is None or "keepdims" not in node.attrs:
        return Miss("not a reduction over axes", node)
    perm = perm_of(node.inputs[0], facts)
    if perm is None:
        return Miss("the operand is not transposed", node.inputs[0])
    x = node.inputs[0].inputs[0]
    moved = tuple(sorted(perm[a] for a in axes))
    if node.attrs["keepdims"]:
        return make("transpose", node.replace((x,), axes=moved), perm=perm)
    kept = [perm[d] for d in range(len(perm)) if d not in axes]
    if kept != sorted(kept):
        return Miss("the kept dimensions would change places", node)
    return node.replace((x,), axes=moved)


def _reshapes(node: Node, facts: Facts) -> bool:
    return bool(node.inputs) and facts.kind(node) == "view" and not node.op.has(Trait.BARRIER)


@rule_on("movement")
def shuffle_channels(node: Node, facts: Facts) -> Outcome:
    """merge(P(split(T'(x)))) -> T'(merge'(P'(split'(x)))) where only channels split, change places among themselves and merge."""
    if not _reshapes(node, facts) or len(node.shape) != 4:
        return Miss("not a reshape to an image", node)
    inner = node.inputs[0]
    split = inner.inputs[0] if inner.inputs else inner
    order = perm_of(inner, facts)
    if order is None or not _reshapes(split, facts) or perm_of(split.inputs[0], facts) != TO_NCHW:
        return Miss("not a reshape of a transpose of a reshape of what is transposed from channels last", node)
    x, rank = split.inputs[0].inputs[0], len(split.shape)
    parts = split.shape[1 : rank - 2]
    if x.shape[0] != split.shape[0] or x.shape[1:3] != split.shape[rank - 2 :] or product(parts) != x.shape[3]:
        return Miss("more than channels is split", split)
    if order[0] != 0 or order[rank - 2 :] != (rank - 2, rank - 1) or node.shape[2:] != x.shape[1:3]:
        return Miss("more than channels changes places", inner)
    apart = make("reshape", x, shape=(*x.shape[:3], *parts))
    moved = make("transpose", apart, perm=(0, 1, 2, *(k + 2 for k in order[1 : rank - 2])))
    return make("transpose", make("reshape", moved, shape=x.shape), perm=TO_NCHW)


def _progress(before: Node, after: Node, facts: Facts) -> bool:
    """The order: fewer ops with channels first; then transposes nearer to the outputs; then Knuth-Bendix."""
    if before.op.to_layout is not None:
        stack = [after]
        for n in stack:
            if n.op is before.op:
                return n.op.to_layout is not None and n.op.to_layout(n, "NHWC") is n
            if len(stack) < 64:
                stack += n.inputs
        return False
    if perm_of(after, facts) is not None and perm_of(before, facts) is None:
        return after.inputs[0].op is before.op or smaller(before, after, facts)
    return smaller(before, after, facts)


@dataclass(frozen=True)
class Layout(Pass):
    """NHWC inside the graph, inputs and outputs as they were."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    ensures: ClassVar[frozenset[str]] = frozenset({"nhwc"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with channels last inside."""
        if not any(n.op.to_layout is not None for n in graph.nodes()):
            return graph
        fixed = derived(graph.nodes(), weights(graph))
        rules = (*movement.RULES, channels_last, _sink(fixed), reduce_transposed, shuffle_channels)
        return apply_rules(graph, rules, ctx, _progress)
