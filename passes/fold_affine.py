"""Scales and shifts by weights move into the weights of the contraction before them; batch norm folds into convolution.

With S and T vectors along a dimension of the result that B has as well (output channels), all of weights and constants:

    contract(A, B) * S          ->  contract(A, B * S)
    (contract(A, B) + T) * S    ->  contract(A, B * S) + T * S
    (contract(A, B) + T) + U    ->  contract(A, B) + (T + U)

The products on the right depend on weights alone: they are computed once, in the prepare graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.build import constant
from ..ir.contraction import Contraction
from ..ir.graph import Graph, Node
from ..ir.op import make
from .contract import Context, Pass
from .contract_form import generic, spec_of
from .facts import Facts, IndexMap, compose, derived, weights
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on, use_counts


@dataclass(frozen=True)
class Vector:
    """A value that is constant but along one dimension of the result (None: along all): `node` is 1-d, or 0-d."""

    node: Node
    dimension: int | None


def vector_of(t: Node, fixed: Mapping[Node, bool], facts: Facts) -> Vector | None:
    """t as a vector along one of its dimensions, if it is a broadcast of weights or constants that is one."""
    scalar = facts.uniform(t)
    if scalar is not None:
        return Vector(scalar, None)
    if t not in fixed:
        return None
    index: IndexMap | None = None
    x = t
    while x.inputs and (read := facts.read(x)) is not None:
        index = read.index if index is None else compose(index, read.index)
        x = x.inputs[read.operand]
    if index is None:
        return None
    used = [(d, i) for d, i in enumerate(index) if x.shape[d] != 1]
    if not used:
        return Vector(x if not x.shape else make("reshape", x, shape=()), None)
    (d, term), *others = used
    if others or term.axis is None or term.coefficient != 1 or term.constant or t.shape[term.axis] != x.shape[d]:
        return None
    return Vector(x if len(x.shape) == 1 else make("reshape", x, shape=(x.shape[d],)), term.axis)


def combine(op: str, a: Vector, b: Vector) -> Vector | None:
    """a op b, elementwise; None where they run along different dimensions."""
    if a.dimension is not None and b.dimension is not None and a.dimension != b.dimension:
        return None
    dimension = b.dimension if a.dimension is None else a.dimension
    shape = next((v.node.shape for v in (a, b) if v.dimension is not None), ())
    x, y = (v.node if v.node.shape == shape else make("broadcast_to", v.node, shape=shape) for v in (a, b))
    return Vector(make(op, x, y), dimension)


def spread(v: Vector, like: Node) -> Node:
    """The vector broadcast to the shape of a node, along its dimension."""
    if v.dimension is None:
        return make("broadcast_to", v.node, shape=like.shape) if like.shape else v.node
    shape = (like.shape[v.dimension],) + (1,) * (len(like.shape) - v.dimension - 1)
    x = v.node if v.node.shape == shape else make("reshape", v.node, shape=shape)
    return make("broadcast_to", x, shape=like.shape)


def _scaled_weights(b: Node, spec: Contraction, v: Vector) -> Node | None:
    """B times the vector along the dimension of B that corresponds; None where there is none."""
    if v.dimension is None:
        return make("mul", b, spread(v, b))
    index = spec.c[v.dimension]
    if index.constant or not index.terms or any(spec.axis(name).kind not in ("n", "batch") for name, _ in index.terms):
        return None
    matching = [e for e, other in enumerate(spec.b) if other == index]
    if len(matching) != 1 or b.shape[matching[0]] != v.node.shape[0]:
        return None
    return make("mul", b, spread(replace(v, dimension=matching[0]), b))


def _shifted(u: Node, fixed: Mapping[Node, bool], facts: Facts) -> tuple[Node, Vector | None] | None:
    """u as (contraction, shift or None), if it is a contraction or one plus or minus a vector."""
    if spec_of(u, facts) is not None:
        return u, None
    kind = facts.form(u)
    if kind not in ("add", "sub") or spec_of(u.inputs[0], facts) is None:
        return None
    v = vector_of(u.inputs[1], fixed, facts)
    if v is None:
        return None
    return u.inputs[0], Vector(make("neg", v.node), v.dimension) if kind == "sub" else v


def _rules(fixed: Mapping[Node, bool], uses: Counter[Node]) -> tuple[Rule, ...]:
    """The rules, for a graph whose weights and constants are `fixed` and whose nodes are used `uses` times."""

    @rule_on("mul", "div")
    def fold_scale(node: Node, facts: Facts) -> Outcome:
        """(contract(A, B) + T) * S -> contract(A, B * S) + T * S; likewise without T, with a minus, and divided by S."""
        kind = facts.form(node)
        if kind not in ("mul", "div") or not node.dtype.is_float:
            return Miss("not a product or quotient", node)
        u, t = node.inputs
        if kind == "mul" and t not in fixed:
            return Miss("the right operand depends on data", t)
        found = _shifted(u, fixed, facts)
        if found is None:
            return Miss("the left operand is no contraction, shifted or not", u)
        core, shift = found
        spec = spec_of(core, facts)
        if spec is None or spec.panel or core.inputs[1] not in fixed or not fixed[core.inputs[1]]:
            return Miss("B does not come from weights alone, or is packed", core)
        if uses[u] != 1 or uses[core] != 1:
            return Miss("the unscaled value is used elsewhere too", u)
        scale = vector_of(t, fixed, facts)
        if scale is None:
            return Miss("the scale is no vector of weights along one dimension", t)
        if kind == "div":
            one = Vector(constant(1.0, node.dtype), None)
            scale = combine("div", one, scale)
        b = None if scale is None else _scaled_weights(core.inputs[1], spec, scale)
        if scale is None or b is None:
            return Miss("the scale does not run along a dimension of B", t)
        new = generic(core, core.inputs[0], b, spec)
        if shift is None:
            return new
        total = combine("mul", shift, scale)
        return (
            Miss("shift and scale run along different dimensions", node)
            if total is None
            else make("add", new, spread(total, node))
        )

    @rule_on("add", "sub")
    def fold_shift(node: Node, facts: Facts) -> Outcome:
        """(contract(A, B) + T) + U -> contract(A, B) + (T + U); likewise with minus."""
        kind = facts.form(node)
        if kind not in ("add", "sub") or not node.dtype.is_float:
            return Miss("not a sum or difference", node)
        u, t = node.inputs
        found = _shifted(u, fixed, facts)
        if found is None or found[1] is None:
            return Miss("the left operand is no shifted contraction", u)
        if uses[u] != 1:
            return Miss("the sum before it is used elsewhere too", u)
        second = vector_of(t, fixed, facts)
        total = None if second is None else combine(kind, found[1], second)
        if total is None:
            return Miss("the shift is no vector of weights along the same dimension", t)
        return make("add", found[0], spread(total, node))

    return (fold_scale, fold_shift)


def _nearer(before: Node, after: Node, facts: Facts) -> bool:
    """The order: fewer elementwise ops between the root and the contraction."""

    def distance(node: Node) -> int:
        steps = 0
        while spec_of(node, facts) is None and node.inputs:
            node, steps = node.inputs[0], steps + 1
        return steps

    return distance(after) < distance(before)


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Folds what stands between a contraction with weights and its activation."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with scales and shifts by weights folded into weights. Weights that a step updates are none."""
        given = weights(graph)
        if not given:
            return graph
        nodes = graph.nodes()
        fixed = Fixed(derived(nodes, given), nodes)
        uses = use_counts(graph)
        return apply_rules(graph, _rules(fixed, uses), ctx, _nearer, uses)


class Fixed(dict[Node, bool]):
    """`derived`, extended on demand to nodes that the rules make. What depends on data is remembered too: otherwise each
    question would walk up to the inputs again."""

    def __init__(self, found: dict[Node, bool], nodes: Iterable[Node]) -> None:
        super().__init__(found)
        self._other = {n for n in nodes if n not in found}

    def __contains__(self, node: object) -> bool:
        if dict.__contains__(self, node):
            return True
        if not isinstance(node, Node) or not node.inputs or node in self._other:
            return False
        stack = [node]
        while stack:
            n = stack[-1]
            unknown = [i for i in n.inputs if i.inputs and i not in self._other and not dict.__contains__(self, i)]
            if unknown:
                stack += unknown
                continue
            stack.pop()
            if n in self._other or dict.__contains__(self, n):
                continue
            if all(dict.__contains__(self, i) for i in n.inputs):
                self[n] = any(dict.__getitem__(self, i) for i in n.inputs)
            else:
                self._other.add(n)
        return dict.__contains__(self, node)
