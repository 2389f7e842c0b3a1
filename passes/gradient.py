"""Reverse-mode differentiation: each `gradient(y, x1, ..., xn)` node becomes the nodes that compute dy/dx1, ..., dy/dxn.

For every node v between the xs and y, in reverse topological order, the record's rule turns the cotangent dy/dv into
cotangents of v's operands; those that meet at one node are added:

    dy/du = sum over users v of u:  (dv/du)^T dy/dv

The rules build ordinary nodes, so a gradient of a gradient needs nothing more: inner gradients are expanded first.
The xs are variables of their own: what one x contributes to y through another x is not counted for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import constant, full
from ..ir.errors import GradientError, ShapeError
from ..ir.graph import Graph, Label, Node, postorder
from ..ir.op import NotDifferentiable, make
from ..ir.ops.structural import GET
from ..ir.types import TensorType, TupleType
from .contract import Context, Pass
from .labels import finish


@dataclass(frozen=True)
class Gradient(Pass):
    """Expands every `gradient` node; one unit of fuel for each."""

    kind: ClassVar[str] = "derivative"
    ensures: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    keeps: ClassVar[frozenset[str]] = frozenset({"no_marks"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """Raises GradientError, with the node, its op and its line, where a gradient is asked for through an op that has none."""
        facts = ctx.facts
        if not any(facts.kind(n) == "other" for n in postorder(graph.outputs)):
            return graph
        done: dict[Node, Node] = {i: i for i in graph.inputs}
        parts: dict[Node, tuple[Node, ...]] = {}
        labels = dict(graph.labels)
        for node in postorder(graph.outputs):
            if node in done:
                continue
            if node.op is GET and node.inputs[0] in parts:
                done[node] = new = parts[node.inputs[0]][node.attrs["index"]]
            else:
                new = node.replace(tuple(done[i] for i in node.inputs))
                if facts.kind(node) == "other" and ctx.spend("gradient", node):
                    parts[node] = expand(new, labels)
                done[node] = new
            if node in graph.labels:
                labels.setdefault(new, graph.labels[node])
        return finish(graph, [done[o] for o in graph.outputs], labels)


def expand(node: Node, labels: dict[Node, Label] | None = None) -> tuple[Node, ...]:
    """The gradients that a `gradient` node stands for, one per x. Raises GradientError."""
    y, xs = node.inputs[0], node.inputs[1:]
    if y.shape != () or not y.dtype.is_float:
        raise GradientError(f"a gradient is taken of a floating-point scalar, not of {y.type}; sum or average it first")
    return vjp(y, xs, constant(1.0, y.dtype), labels)


def vjp(y: Node, xs: Sequence[Node], seed: Node, labels: dict[Node, Label] | None = None) -> tuple[Node, ...]:
    """The cotangents of the xs when that of y is `seed`; zeros for an x that y does not depend on."""
    names = labels if labels is not None else {}
    sources = set(xs)
    order = list(postorder([y]))
    matters: set[Node] = set()
    for n in order:
        if n in sources or any(i in matters for i in n.inputs):
            matters.add(n)
    cotangent: dict[Node, list[Node | None]] = {y: [seed]}
    for n in reversed(order):
        given = cotangent.get(n)
        if given is None or n not in matters or n in sources:
            continue
        if n.op is GET:
            slots = cotangent.setdefault(n.inputs[0], [None] * _outputs(n.inputs[0]))
            _accumulate(slots, n.attrs["index"], given[0])
            continue
        if isinstance(n.op.grad, NotDifferentiable):
            where = names[n].location if n in names else None
            raise GradientError(
                f"{n.op.name} {n.type} has no gradient ({n.op.grad.reason}), and one is needed through it"
                f"{f', at {where}' if where else ''}; use stop_gradient on its result if none should flow"
            )
        for operand, part in zip(n.inputs, _checked(n, n.op.grad(n, tuple(given))), strict=True):
            if part is not None and operand in matters:
                _accumulate(cotangent.setdefault(operand, [None] * _outputs(operand)), 0, part)
                _inherit(names, n, part)
    result: list[Node] = []
    for x in xs:
        found = cotangent.get(x, [None])[0]
        result.append(found if found is not None else full(0, x.tensor))
    return tuple(result)


def _outputs(node: Node) -> int:
    return len(node.type.items) if isinstance(node.type, TupleType) else 1


def _accumulate(slots: list[Node | None], index: int, part: Node | None) -> None:
    old = slots[index]
    slots[index] = part if old is None or part is None else make("add", old, part)


def _checked(node: Node, parts: Sequence[Node | None]) -> Sequence[Node | None]:
    if len(parts) != len(node.inputs):
        raise GradientError(f"the gradient rule of {node.op.name} gave {len(parts)} cotangents for {len(node.inputs)} operands")
    for k, (i, part) in enumerate(zip(node.inputs, parts, strict=True)):
        if part is not None and part.type != i.type:
            given: TensorType | TupleType = part.type
            raise ShapeError(f"the gradient rule of {node.op.name} gave a cotangent {given} for operand {k}, which is {i.type}")
    return parts


def _inherit(labels: dict[Node, Label], source: Node, root: Node, limit: int = 64) -> None:
    """Gives the new nodes of a rule the location of the node that it differentiates."""
    label = labels.get(source)
    if label is None:
        return
    gradient = Label(None, label.location)
    stack, seen = [root], 0
    while stack and seen < limit:
        n = stack.pop()
        seen += 1
        if n in labels or not n.inputs or n is source:
            continue
        labels[n] = gradient
        stack += n.inputs
