"""Whether an op treats the images of a batch each for itself, and the same op on fewer of them. Images are the leading dimension.

What an op does is read from its lowering: image i of its result must be made from image i of every operand that has images,
and from all of the others (weights), whatever i is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final

from ..ir.contraction import Contraction
from ..ir.errors import ShapeError
from ..ir.expr import Expr, ExprLike, lift, postorder, var
from ..ir.graph import Node
from ..ir.lowering import Map, Reduce, View
from ..ir.op import Trait, make
from ..ir.types import TupleType
from .contract_form import spec_of
from .facts import Facts, index_variables, linear
from .winograd_parts import plain


def image_axis(spec: Contraction, moving: Collection[int]) -> str | None:
    """The axis of images of a contraction whose operands `moving` have them in front; None where there is no such axis."""
    if spec.panel or spec.groups or not (spec.a and spec.b and spec.c) or 0 not in moving:
        return None
    name = plain(spec.c[0])
    indices = [*spec.a, *spec.b, *spec.c]
    fronts = [spec.c[0], spec.a[0], *([spec.b[0]] if 1 in moving else [])]
    used = sum(any(t == name for t, _ in index.terms) for index in indices)
    return name if name is not None and all(plain(f) == name for f in fronts) and used == len(fronts) else None


def separate(node: Node, moving: Collection[int], facts: Facts) -> bool:
    """Whether image i of the node comes from image i of the operands `moving` and from the others as they are."""
    if isinstance(node.type, TupleType) or not node.shape or node.op.has(Trait.RANDOM) or node.op.has(Trait.CONTROL):
        return False
    count = node.shape[0]
    if any(not node.inputs[k].shape or node.inputs[k].shape[0] != count for k in moving):
        return False
    spec = spec_of(node, facts)
    if spec is not None:
        return "spec" in node.attrs and image_axis(spec, moving) is not None
    low = facts.lowering(node)
    if isinstance(low, View):
        return len(node.inputs) == 1
    if isinstance(low, Map) and low.elementwise:
        return True
    return isinstance(low, Map | Reduce) and _own_image(node, low, moving)


def _own_image(node: Node, low: Map | Reduce, moving: Collection[int]) -> bool:
    idx = index_variables(len(node.shape))
    found: list[bool] = []

    def free(e: ExprLike | None) -> bool:
        return e is None or idx[0] not in set(postorder([lift(e)]))

    def read(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
        own = linear(lift(index[0]), {idx[0]: 0}) == ({0: 1}, 0) if k in moving else all(free(e) for e in index[:1])
        found.append(own and free(mask) and all(free(e) for e in index[1:]))
        return var(f"x{len(found)}", node.inputs[k].dtype)

    if isinstance(low, Map):
        return free(low.value(idx, read)) and all(found)
    steps = tuple(var(f"r{k}") for k in range(len(low.extents)))
    return free(low.value(idx, steps, read)) and all(found)


def spread(node: Node, count: int, facts: Facts) -> Node | None:
    """A value that is the same for every image, for `count` images; None where it may differ between them."""
    read = facts.read(node)
    if node.attrs.keys() != {"shape"} or read is None or any(t.axis == 0 for t in read.index):
        return None
    return node.replace(node.inputs, shape=(count, *node.shape[1:]))


def fewer(node: Node, operands: Sequence[Node], moving: Collection[int], count: int, facts: Facts) -> Node | None:
    """A node that is `separate`, on operands with `count` images in the place of all; None where it has no such form."""
    spec = spec_of(node, facts)
    attrs: dict[str, Any] = {}
    if spec is not None:
        name = image_axis(spec, moving)
        axes = tuple(replace(a, extent=count) if a.name == name else a for a in spec.axes)
        return make(node.op, *operands, **{**node.attrs, "spec": replace(spec, axes=axes)})
    if node.attrs.keys() == {"shape"}:
        attrs = {"shape": (count, *node.shape[1:])}
    elif node.attrs.keys() == _SLICE:
        attrs = {"stops": (count, *node.attrs["stops"][1:])}
    try:
        new = node.replace(tuple(operands), **attrs)
    except ShapeError:  # a shape among its attributes that is not known here
        return None
    return new if new.type == replace(node.tensor, shape=(count, *node.shape[1:])) else None


_SLICE: Final = {"starts", "stops", "steps"}
