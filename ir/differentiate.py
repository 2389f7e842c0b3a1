"""The reverse walk of differentiation: cotangents of results become cotangents of what they were computed from.

For every node v between the xs and the ys, in reverse topological order, the record's rule turns the cotangent of v into
cotangents of v's operands; those that meet at one node are added:

    du = sum over users v of u:  (dv/du)^T dv

The rules build ordinary nodes, so a gradient of a gradient needs nothing more. The xs are variables of their own: what one x
contributes through another x is not counted for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from .dims import Dim
from .errors import GradientError, ShapeError
from .graph import Label, Node, postorder
from .op import NotDifferentiable, Trait, make
from .types import TensorType, TupleType


def vjp(
    ys: Sequence[Node], xs: Sequence[Node], seeds: Sequence[Node | None], labels: dict[Node, Label] | None = None
) -> tuple[Node | None, ...]:
    """The cotangents of the xs when those of the ys are `seeds` (None: zero); None for an x that gets none.

    `labels` gets the location of the node that it came from for every node made. Raises GradientError, with the node and its
    line, where a cotangent would have to flow through an op that has no gradient.
    """
    names = labels if labels is not None else {}
    sources = set(xs)
    order = list(postorder(ys))
    matters: set[Node] = set()
    for n in order:
        if n in sources or any(i in matters for i in n.inputs):
            matters.add(n)
    cotangent: dict[Node, list[list[Node]]] = {}  # for each output of a node: what its users hand back
    for y, seed in zip(ys, seeds, strict=True):
        if seed is not None:
            cotangent.setdefault(y, [[]])[0].append(seed)
    for n in reversed(order):
        if n not in cotangent or n not in matters or n in sources:
            continue
        given = tuple(map(_total, cotangent[n]))
        if n.op.has(Trait.STRUCTURAL) and n.inputs and isinstance(n.inputs[0].type, TupleType):  # a part of a tuple
            if given[0] is not None:
                _slots(cotangent, n.inputs[0])[n.attrs["index"]].append(given[0])
            continue
        if isinstance(n.op.grad, NotDifferentiable):
            where = names[n].location if n in names else None
            raise GradientError(
                f"{n.op.name} {n.type} has no gradient ({n.op.grad.reason}), and one is needed through it"
                f"{f', at {where}' if where else ''}; use stop_gradient on its result if none should flow"
            )
        for operand, part in zip(n.inputs, _checked(n, n.op.grad(n, given)), strict=True):
            if part is not None and operand in matters:
                _slots(cotangent, operand)[0].append(part)
                _inherit(names, n, part)
    return tuple(_total(cotangent[x][0]) if x in cotangent else None for x in xs)


def _slots(cotangent: dict[Node, list[list[Node]]], node: Node) -> list[list[Node]]:
    outputs = len(node.type.items) if isinstance(node.type, TupleType) else 1
    return cotangent.setdefault(node, [[] for _ in range(outputs)])


def _total(parts: Sequence[Node]) -> Node | None:
    """The sum of what the users of a value hand back; where they used slices that make up the whole, the parts side by side."""
    if len(parts) > 1 and (whole := _side_by_side(parts)) is not None:
        return whole
    total: Node | None = None
    for part in parts:
        total = part if total is None else make("add", total, part)
    return total


def _side_by_side(parts: Sequence[Node]) -> Node | None:
    """pad(a) + pad(b) + ... -> concat(a, b, ...) if the pads are zeros and every element lies in just one of the parts."""
    shape = parts[0].shape
    pads = [p.attrs for p in parts if p.attrs.keys() == {"low", "high", "interior", "value"} and p.attrs["value"] == 0]
    if len(pads) < len(parts) or any(any(p["interior"]) for p in pads):
        return None
    axes = [d for d in range(len(shape)) if any(p["low"][d] != 0 or p["high"][d] != 0 for p in pads)]
    if len(axes) != 1:
        return None
    (axis,) = axes
    position: Dim = 0
    rest = list(parts)
    inside: list[Node] = []
    while rest:
        found = next((p for p in rest if p.attrs["low"][axis] == position), None)
        if found is None:
            return None
        rest.remove(found)
        inside.append(found.inputs[0])
        position = position + found.inputs[0].shape[axis]
    return make("concat", *inside, axis=axis) if position == shape[axis] else None


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
