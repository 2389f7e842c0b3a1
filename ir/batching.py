"""One op for all steps of a loop: the same computation on operands that have the steps as a leading axis.

    for every t: y[t] = op(x[t], w)   ->   y = op'(x, w)

`batched` knows elementwise ops, contractions, sums, lookups in a table and the plain movements; what it does not know stays in
the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .contraction import Affine, Axis, Contraction
from .dims import Dim
from .graph import Node
from .lowering import Contract, Map, Reduce
from .op import Trait, make
from .types import TupleType

Operand = tuple[Node, bool]
"""A node, and whether it has the leading axis of steps."""


def step_axis(spec: Contraction, in_a: bool, in_b: bool, in_c: bool, length: Dim) -> Contraction:
    """The contraction with the steps as a leading axis of A, B and C, where they have it: summed where C has not."""
    name = "t"
    while any(x.name == name for x in spec.axes):
        name += "t"
    kind = "k" if not in_c else "batch" if in_a and in_b else "m" if in_a else "n"
    lead = (Affine(((name, 1),)),)
    return replace(
        spec,
        axes=(Axis(name, length, kind), *spec.axes),
        a=lead + spec.a if in_a else spec.a,
        b=lead + spec.b if in_b else spec.b,
        c=lead + spec.c if in_c else spec.c,
    )


def contraction_of(node: Node) -> Contraction | None:
    """The contraction that a node lowers to, unless its operands are packed; None for any other node."""
    if not node.inputs or not node.op.has(Trait.CONTRACTION):
        return None
    low = node.op.lower(node)
    return low.spec if isinstance(low, Contract) and not low.spec.panel and len(node.inputs) == 2 else None


def batched(node: Node, operands: Sequence[Operand], length: Dim) -> Node | None:
    """The node for all steps, with a leading axis of `length`; at least one operand has it already. None where no rule is
    known. Operands without it are the same in every step."""
    if isinstance(node.type, TupleType) or node.op.has(Trait.RANDOM):
        return None
    spec = contraction_of(node)
    if spec is not None:
        (a, in_a), (b, in_b) = operands
        return make("contract", a, b, spec=step_axis(spec, in_a, in_b, True, length))
    if not node.op.has(Trait.STRUCTURAL):
        low = node.op.lower(node)
        if isinstance(low, Map) and low.elementwise:
            return node.replace(tuple(_spread(x, has, length) for x, has in operands))
        if isinstance(low, Reduce) and low.kind == "sum" and low.axes is not None and "axes" in node.attrs:
            return node.replace((operands[0][0],), axes=tuple(a + 1 for a in low.axes))
    if len(operands) == 2 and node.op.name == "gather":  # from one table, by indices that differ
        (table, moves), (index, _) = operands
        return None if moves or node.attrs["axis"] != 0 else node.replace((table, index))
    return _moved(node, operands[0][0], length) if len(operands) == 1 else None


def _spread(x: Node, has: bool, length: Dim) -> Node:
    return x if has else make("broadcast_to", x, shape=(length, *x.shape))


_SHAPES: Final = ("reshape", "broadcast_to")


def _moved(node: Node, x: Node, length: Dim) -> Node | None:
    attrs = node.attrs
    if attrs.keys() == {"perm"}:
        return node.replace((x,), perm=(0, *(p + 1 for p in attrs["perm"])))
    if attrs.keys() == {"starts", "stops", "steps"}:
        return node.replace((x,), starts=(0, *attrs["starts"]), stops=(length, *attrs["stops"]), steps=(1, *attrs["steps"]))
    if node.op.name not in _SHAPES:
        return None
    missing = len(node.shape) - len(x.shape) + 1
    if node.op.name == "broadcast_to" and missing:
        x = make("reshape", x, shape=(length, *(1,) * missing, *x.shape[1:]))
    return node.replace((x,), shape=(length, *node.shape))
