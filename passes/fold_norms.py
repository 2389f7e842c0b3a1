"""Scales and shifts by weights after a layer move into its weights, while ops are whole: batch norm folds into convolution.

    op(x, w) * S          ->  op(x, w * S)                 S a vector along the output channels
    (op(x, w) + T) * S    ->  op(x, w * S) + T * S
    (op(x, w) + T) + U    ->  op(x, w) + (T + U)

As fold_affine does for contractions in their one form; here convolutions stay what they are, to be quantised, read and exported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import constant
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from .contract import Context, Pass
from .facts import Facts, derived, weights
from .fold_affine import Fixed, Vector, combine, spread, vector_of
from .layers import channels
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on, use_counts


def _core(u: Node, fixed: Mapping[Node, bool], facts: Facts) -> tuple[Node, Vector | None] | None:
    """u as (layer, shift or None), if it is a layer or one plus or minus a vector."""
    if _is_layer(u, fixed):
        return u, None
    kind = facts.form(u) if u.inputs else ""
    if kind not in ("add", "sub") or not _is_layer(u.inputs[0], fixed):
        return None
    v = vector_of(u.inputs[1], fixed, facts)
    if v is None:
        return None
    return u.inputs[0], Vector(make("neg", v.node), v.dimension) if kind == "sub" else v


def _is_layer(node: Node, fixed: Mapping[Node, bool]) -> bool:
    return (
        node.op.has(Trait.QUANTISABLE) and len(node.inputs) == 2 and node.inputs[0] not in fixed
        and node.inputs[1] in fixed and fixed[node.inputs[1]]
    )  # fmt: skip


def _rules(fixed: Mapping[Node, bool], uses: Counter[Node]) -> tuple[Rule, ...]:
    @rule_on("mul", "div")
    def fold_norm(node: Node, facts: Facts) -> Outcome:
        """(op(x, w) + T) * S -> op(x, w * S) + T * S; likewise without T, with a minus, and divided by S."""
        kind = facts.form(node)
        if kind not in ("mul", "div") or not node.dtype.is_float:
            return Miss("not a product or quotient", node)
        found = _core(node.inputs[0], fixed, facts)
        scale = None if found is None else vector_of(node.inputs[1], fixed, facts)
        if found is None or scale is None:
            return Miss("no layer times a vector of weights", node)
        core, shift = found
        where = channels(core, facts)
        if uses[node.inputs[0]] != 1 or uses[core] != 1:
            return Miss("the unscaled value is used elsewhere too", core)
        if where is None or scale.dimension not in (None, where[0][0]):
            return Miss("the scale does not run along the output channels", node)
        if kind == "div":
            inverse = combine("div", Vector(constant(1.0, node.dtype), None), scale)
            assert inverse is not None
            scale = inverse
        w = core.inputs[1]
        on_w = scale if scale.dimension is None else Vector(scale.node, where[0][1])
        new = core.replace((core.inputs[0], make("mul", w, spread(on_w, w))))
        if shift is None:
            return new
        total = combine("mul", shift, scale)
        return Miss("shift and scale differ", node) if total is None else make("add", new, spread(total, node))

    @rule_on("add", "sub")
    def fold_shifts(node: Node, facts: Facts) -> Outcome:
        """(op(x, w) + T) + U -> op(x, w) + (T + U); likewise with minus."""
        kind = facts.form(node)
        if kind not in ("add", "sub") or not node.dtype.is_float:
            return Miss("not a sum or difference", node)
        found = _core(node.inputs[0], fixed, facts)
        second = None if found is None or found[1] is None else vector_of(node.inputs[1], fixed, facts)
        if found is None or found[1] is None or second is None or uses[node.inputs[0]] != 1:
            return Miss("no shifted layer plus a vector of weights", node)
        total = combine(kind, found[1], second)
        return Miss("shifts differ", node) if total is None else make("add", found[0], spread(total, node))

    return (fold_norm, fold_shifts)


def _nearer(before: Node, after: Node, facts: Facts) -> bool:
    """The order: fewer elementwise ops between the root and the layer."""

    def distance(node: Node) -> int:
        steps = 0
        while not node.op.has(Trait.QUANTISABLE) and node.inputs:
            node, steps = node.inputs[0], steps + 1
        return steps

    return distance(after) < distance(before)


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Folds what stands between a layer and its activation, leaving the layer's op."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with scales and shifts by weights folded into the weights of layers."""
        given = weights(graph)
        if not given:
            return graph
        nodes = graph.nodes()
        uses = use_counts(graph)
        return apply_rules(graph, _rules(Fixed(derived(nodes, given), nodes), uses), ctx, _nearer, uses)
