"""Ops whose output elements are elements of an operand: reshape, transpose, broadcast, slice, pad, concat, reverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..dims import Dim, Shape, as_int, has_division, product
from ..dtypes import f64, i32
from ..errors import AttributeValueError, ShapeError
from ..expr import Expr, const, eq, lift, select
from ..graph import Attrs, Node
from ..lowering import Load, Map, View
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c

_MOVES: Final = frozenset({Trait.MOVEMENT})


def _extra(draw_shape: tuple[int, ...], attrs: dict[str, Any]) -> list[Sample]:
    """The same movement of other dtypes."""
    return [
        Sample(c.uniform(draw_shape, dtype=f64), attrs, label="f64"),
        Sample(c.integers(draw_shape), attrs, gradient=False, label="i64"),
        Sample(c.booleans(draw_shape), attrs, gradient=False, label="bool"),
    ]


# --- reshape --------------------------------------------------------------------------------------------------------


def _infer_reshape(types: Sequence[TensorType], attrs: Attrs) -> Type:
    shape = c.check_shape("reshape", attrs["shape"])
    before, after = types[0].size, product(shape)
    # N//4*4 equals N or not: that is known, and checked, when N is
    if before != after and not (has_division(before) or has_division(after)):
        raise ShapeError(
            f"operand 0 of reshape has shape {c.show(types[0].shape)} with {before} elements, "
            f"which does not fit {c.show(shape)} with {after}"
        )
    return TensorType(types[0].dtype, shape)


def _reshape_samples() -> list[Sample]:
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((6,), (2, 3)),
        ((2, 3, 4), (4, 6)),
        ((1,), ()),
        ((), (1, 1)),
        ((33, 1), (3, 11)),
        ((2, 3, 4, 5), (6, 20)),
        ((0, 3), (0,)),
        ((16,), (16,)),
    ]
    return [*(Sample(c.uniform(a), {"shape": b}) for a, b in pairs), *_extra((3, 4), {"shape": (2, 6)})]


reshape = register(
    Op(
        name="reshape",
        infer=_infer_reshape,
        reference=lambda arrays, attrs: arrays[0].reshape(c.static(attrs["shape"])),
        lower=lambda node: View(),
        grad=c.rule(lambda node, dy: (c.reshaped(dy, node.inputs[0].shape),)),
        doc="The same elements in row-major order under another shape.",
        arity=1,
        traits=_MOVES | {Trait.VIEW, Trait.CHEAP},
        attrs={"shape": REQUIRED},
        onnx=None,
        samples=_reshape_samples,
    )
)


# --- transpose ------------------------------------------------------------------------------------------------------


def _infer_transpose(types: Sequence[TensorType], attrs: Attrs) -> Type:
    perm, rank = attrs["perm"], types[0].rank
    if not isinstance(perm, tuple) or sorted(map(repr, perm)) != sorted(map(repr, range(rank))):
        raise AttributeValueError(f"perm of transpose is a permutation of 0..{rank - 1} as a tuple, not {perm!r}")
    return TensorType(types[0].dtype, tuple(types[0].shape[p] for p in perm))


def _lower_transpose(node: Node) -> Map:
    back = c.inverse(node.attrs["perm"])
    return Map(lambda idx, load: load(0, [idx[d] for d in back]))


def _transpose_samples() -> list[Sample]:
    cases: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((7,), (0,)), ((), ()), ((8, 9), (1, 0)), ((16, 33), (1, 0)), ((2, 3, 5), (2, 0, 1)), ((2, 3, 5), (0, 2, 1)),
        ((2, 3, 4, 5), (0, 2, 3, 1)), ((2, 4, 5, 17), (0, 3, 1, 2)), ((0, 3), (1, 0)), ((3, 4), (0, 1)),
    ]  # fmt: skip
    return [*(Sample(c.uniform(s), {"perm": p}) for s, p in cases), *_extra((3, 5), {"perm": (1, 0)})]


transpose = register(
    Op(
        name="transpose",
        infer=_infer_transpose,
        reference=lambda arrays, attrs: np.ascontiguousarray(arrays[0].transpose(attrs["perm"])).reshape(
            [arrays[0].shape[p] for p in attrs["perm"]]
        ),
        lower=_lower_transpose,
        grad=c.rule(lambda node, dy: (make("transpose", dy, perm=c.inverse(node.attrs["perm"])),)),
        doc="Dimensions in another order: dimension d of the result is dimension perm[d] of the operand.",
        arity=1,
        traits=_MOVES,
        attrs={"perm": REQUIRED},
        transpose=c.transposed,
        onnx=("Transpose", 13),
        samples=_transpose_samples,
    )
)


# --- broadcast_to ---------------------------------------------------------------------------------------------------


def _infer_broadcast(types: Sequence[TensorType], attrs: Attrs) -> Type:
    shape, given = c.check_shape("broadcast_to", attrs["shape"]), types[0].shape
    lead = len(shape) - len(given)
    if lead < 0 or any(n not in (1, m) for n, m in zip(given, shape[lead:], strict=True)):
        raise ShapeError(
            f"operand 0 of broadcast_to has shape {c.show(given)}, which does not broadcast to {c.show(shape)}: "
            "aligned at the right, each dimension must be equal or 1"
        )
    return TensorType(types[0].dtype, shape)


def _lower_broadcast(node: Node) -> Map:
    shape = node.inputs[0].shape
    lead = len(node.shape) - len(shape)
    return Map(lambda idx, load: load(0, [const(0) if n == 1 else idx[lead + d] for d, n in enumerate(shape)]))


def _broadcast_grad(node: Node, dy: Node) -> Sequence[Node]:
    shape = node.inputs[0].shape
    lead = len(node.shape) - len(shape)
    axes = tuple(range(lead)) + tuple(lead + d for d, n in enumerate(shape) if n == 1 and node.shape[lead + d] != 1)
    total = make("sum", dy, axes=axes, keepdims=False) if axes else dy
    return (c.reshaped(total, shape),)


def _broadcast_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    x = node.inputs[0]
    shape = tuple(node.shape[p] for p in perm)
    aligned: Shape = (1,) * (len(shape) - len(x.shape)) + x.shape
    moved = tuple(aligned[p] for p in perm)
    long = [p for p in perm if aligned[p] != 1]
    if long == sorted(long):  # only dimensions of size 1 change places
        while moved and moved[0] == 1:
            moved = moved[1:]
        return c.broadcast(c.reshaped(x, moved), shape)
    return c.broadcast(c.transposed(c.reshaped(x, aligned), perm), shape)


def _broadcast_samples() -> list[Sample]:
    cases: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), (7,)), ((), ()), ((1,), (33,)), ((9,), (3, 9)), ((4, 1), (4, 17)), ((2, 1, 5), (2, 3, 5)), ((3, 1, 1), (2, 3, 4, 5)),
        ((16,), (2, 2, 3, 16)), ((), (0, 3)), ((1, 3), (0, 3)), ((0, 3), (2, 0, 3)), ((5,), (5,)),
    ]  # fmt: skip
    return [*(Sample(c.uniform(a), {"shape": b}) for a, b in cases), *_extra((3, 1), {"shape": (2, 3, 5)})]


broadcast_to = register(
    Op(
        name="broadcast_to",
        infer=_infer_broadcast,
        reference=lambda arrays, attrs: np.array(np.broadcast_to(arrays[0], c.static(attrs["shape"])), order="C"),
        lower=_lower_broadcast,
        grad=c.rule(_broadcast_grad),
        doc="The operand repeated to a larger shape, by numpy's rules: aligned at the right, dimensions of size 1 repeat.",
        arity=1,
        traits=_MOVES | {Trait.CHEAP},
        attrs={"shape": REQUIRED},
        transpose=_broadcast_transpose,
        onnx=None,
        samples=_broadcast_samples,
    )
)


# --- slice ----------------------------------------------------------------------------------------------------------


def _infer_slice(types: Sequence[TensorType], attrs: Attrs) -> Type:
    rank, shape = types[0].rank, types[0].shape
    starts, stops = (c.check_shape(f"slice ({name})", attrs[name]) for name in ("starts", "stops"))
    steps = c.check_ints("slice", "steps", attrs["steps"], rank, 1)
    if len(starts) != rank or len(stops) != rank:
        raise AttributeValueError(
            f"starts {starts} and stops {stops} of slice need {rank} entries, one per dimension of {c.show(shape)}"
        )
    out: list[Dim] = []
    for d, (start, stop, step, n) in enumerate(zip(starts, stops, steps, shape, strict=True)):
        length, room = stop - start, n - stop
        if (isinstance(length, int) and length < 0) or (isinstance(room, int) and room < 0):
            raise ShapeError(f"slice {start}:{stop}:{step} of dimension {d} does not lie in operand 0 of shape {c.show(shape)}")
        out.append(-((-length) // step))
    return TensorType(types[0].dtype, tuple(out))


def _slice_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    index = tuple(slice(as_int(a), as_int(b), s) for a, b, s in zip(attrs["starts"], attrs["stops"], attrs["steps"], strict=True))
    return np.array(arrays[0][index], order="C")


def _lower_slice(node: Node) -> Map:
    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        return load(0, [i * s + a for i, a, s in zip(idx, node.attrs["starts"], node.attrs["steps"], strict=True)])

    return Map(value)


def _slice_grad(node: Node, dy: Node) -> Sequence[Node]:
    starts, steps, shape = node.attrs["starts"], node.attrs["steps"], node.inputs[0].shape
    low: list[Dim] = []
    high: list[Dim] = []
    for start, step, n, m in zip(starts, steps, shape, node.shape, strict=True):
        low.append(0 if m == 0 else start)
        high.append(n if m == 0 else n - (start + (m - 1) * step + 1))
    return (make("pad", dy, low=tuple(low), high=tuple(high), interior=tuple(s - 1 for s in steps), value=0.0),)


def _permute_attrs(*names: str) -> Any:
    """The `transpose` rule of an op of one operand whose attributes have one entry per dimension."""

    def rule(node: Node, perm: tuple[int, ...]) -> Node:
        moved = {name: tuple(node.attrs[name][p] for p in perm) for name in names}
        return make(node.op, c.transposed(node.inputs[0], perm), **{**node.attrs, **moved})

    return rule


def _slice_samples() -> list[Sample]:
    def attrs(*dims: tuple[int, int, int]) -> dict[str, Any]:
        return dict(zip(("starts", "stops", "steps"), map(tuple, zip(*dims, strict=True)), strict=True)) if dims else {
            "starts": (), "stops": (), "steps": (),
        }  # fmt: skip

    cases: list[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]] = [
        ((), ()),
        ((33,), ((1, 32, 1),)),
        ((17,), ((0, 17, 2),)),
        ((9, 16), ((2, 9, 3), (0, 16, 1))),
        ((9, 16), ((0, 9, 1), (1, 16, 5))),
        ((2, 3, 8), ((1, 2, 1), (0, 3, 2), (7, 8, 1))),
        ((2, 3, 4, 5), ((0, 2, 1), (1, 3, 1), (0, 4, 2), (0, 5, 4))),
        ((5, 3), ((2, 2, 1), (0, 3, 1))),
        ((0, 3), ((0, 0, 1), (1, 3, 1))),
    ]
    return [*(Sample(c.uniform(s), attrs(*d)) for s, d in cases), *_extra((4, 9), attrs((1, 4, 2), (0, 8, 1)))]


slice_ = register(
    Op(
        name="slice",
        infer=_infer_slice,
        reference=_slice_reference,
        lower=_lower_slice,
        grad=c.rule(_slice_grad),
        doc="Elements starts, starts + steps, ... below stops of each dimension; 0 <= start <= stop <= size and step >= 1.",
        arity=1,
        traits=_MOVES,
        attrs={"starts": REQUIRED, "stops": REQUIRED, "steps": REQUIRED},
        transpose=_permute_attrs("starts", "stops", "steps"),
        onnx=None,
        samples=_slice_samples,
    )
)


# --- pad ------------------------------------------------------------------------------------------------------------


def _infer_pad(types: Sequence[TensorType], attrs: Attrs) -> Type:
    rank = types[0].rank
    low, high = (c.check_shape(f"pad ({name})", attrs[name]) for name in ("low", "high"))
    interior = c.check_ints("pad", "interior", attrs["interior"], rank, 0)
    if len(low) != rank or len(high) != rank:
        raise AttributeValueError(
            f"low {low} and high {high} of pad need {rank} entries, one per dimension of {c.show(types[0].shape)}"
        )
    if isinstance(attrs["value"], bool) or not isinstance(attrs["value"], (int, float)):
        raise AttributeValueError(f"value of pad is a number, not {attrs['value']!r}")
    if types[0].dtype.is_integer and attrs["value"] % 1 != 0:
        raise AttributeValueError(f"value of pad is {attrs['value']}, which operand 0 of dtype {types[0].dtype} cannot hold")
    return TensorType(
        types[0].dtype, tuple(a + _spread(n, g) + b for n, a, b, g in zip(types[0].shape, low, high, interior, strict=True))
    )


def _spread(n: Dim, gap: int) -> Dim:
    """The extent of n elements with `gap` more between each two."""
    return n if gap == 0 or n == 0 else (n - 1) * (gap + 1) + 1


def _pad_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, low, high, interior = arrays[0], c.static(attrs["low"]), c.static(attrs["high"]), attrs["interior"]
    shape = [a + as_int(_spread(n, g)) + b for n, a, b, g in zip(x.shape, low, high, interior, strict=True)]
    y = np.full(shape, attrs["value"]).astype(x.dtype)
    y[tuple(slice(a, a + as_int(_spread(n, g)), g + 1) for n, a, g in zip(x.shape, low, interior, strict=True))] = x
    return y


def _lower_pad(node: Node) -> Map:
    low, high, interior, value = (node.attrs[k] for k in ("low", "high", "interior", "value"))

    def element(idx: tuple[Expr, ...], load: Load) -> Expr:
        index: list[Expr] = []
        inside: list[Expr] = []
        for i, n, a, b, g in zip(idx, node.inputs[0].shape, low, high, interior, strict=True):
            at = i - a
            if a:
                inside.append(const(0) <= at)
            if b:
                inside.append(at < _spread(n, g))
            if g:
                inside.append(eq(at % (g + 1), 0))
            index.append(at // (g + 1))
        mask = c.all_of(inside)
        loaded = c.at(load, 0, index, mask)
        if mask is None or (value == 0 and math.copysign(1.0, value) > 0):
            return loaded
        return select(mask, loaded, const(value, loaded.dtype))

    return Map(element)


def _pad_grad(node: Node, dy: Node) -> Sequence[Node]:
    shape, low, interior = node.inputs[0].shape, node.attrs["low"], node.attrs["interior"]
    stops = tuple(a + _spread(n, g) for n, a, g in zip(shape, low, interior, strict=True))
    return (make("slice", dy, starts=low, stops=stops, steps=tuple(g + 1 for g in interior)),)


def _pad_samples() -> list[Sample]:
    def attrs(*dims: tuple[int, int, int], value: float = 0.0) -> dict[str, Any]:
        low, high, interior = (tuple(d[k] for d in dims) for k in range(3))
        return {"low": low, "high": high, "interior": interior, "value": value}

    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((), attrs()),
        ((7,), attrs((1, 1, 0))),
        ((16,), attrs((0, 17, 0), value=1.5)),
        ((9,), attrs((2, 0, 1))),
        ((3, 8), attrs((1, 0, 0), (0, 1, 0))),
        ((3, 5), attrs((0, 0, 2), (1, 2, 1), value=-1.0)),
        ((2, 3, 5), attrs((0, 0, 0), (1, 1, 0), (2, 2, 0))),
        ((2, 4, 5, 3), attrs((0, 0, 0), (1, 1, 0), (1, 2, 0), (0, 0, 0))),
        ((2, 4, 5, 3), attrs((0, 0, 0), (1, 1, 1), (1, 2, 1), (0, 0, 0))),
        ((0, 3), attrs((2, 1, 1), (0, 0, 0))),
        ((1, 33), attrs((0, 0, 0), (0, 0, 0))),
    ]
    made = [Sample(c.uniform(s), a) for s, a in cases]
    made.append(Sample(c.uniform((5,)), attrs((1, 1, 0), value=-math.inf), gradient=False, label="special"))
    return [
        *made,
        *_extra((3, 4), attrs((1, 0, 0), (0, 2, 1))),
        Sample(c.integers((9,)), attrs((3, 3, 0), value=7), gradient=False),
    ]


pad = register(
    Op(
        name="pad",
        infer=_infer_pad,
        reference=_pad_reference,
        lower=_lower_pad,
        grad=c.rule(_pad_grad),
        doc="The operand with `low` and `high` elements around it and `interior` between each two, per dimension, of a value.",
        arity=1,
        traits=_MOVES,
        attrs={"low": REQUIRED, "high": REQUIRED, "interior": REQUIRED, "value": 0.0},
        transpose=_permute_attrs("low", "high", "interior"),
        onnx=None,
        samples=_pad_samples,
    )
)


# --- concat ---------------------------------------------------------------------------------------------------------


def _infer_concat(types: Sequence[TensorType], attrs: Attrs) -> Type:
    if not types:
        raise ShapeError("concat takes at least one operand, got none")
    first = types[0]
    axis = c.check_axis("concat", attrs["axis"], first.rank)
    total: Dim = 0
    for k, t in enumerate(types):
        expected = (*first.shape[:axis], t.shape[axis] if axis < t.rank else "*", *first.shape[axis + 1 :])
        if t.shape != expected:
            shown = ", ".join(map(str, (*first.shape[:axis], "*", *first.shape[axis + 1 :])))
            raise ShapeError(
                f"operand {k} of concat has shape {c.show(t.shape)}, expected [{shown}] as operand 0 (axis {axis} is free)"
            )
        total = total + t.shape[axis]
    c.check_same("concat", [TensorType(t.dtype, ()) for t in types])
    return TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _offsets(node: Node) -> list[Dim]:
    found: list[Dim] = [0]
    for x in node.inputs:
        found.append(found[-1] + x.shape[node.attrs["axis"]])
    return found


def _lower_concat(node: Node) -> Map:
    axis = node.attrs["axis"]

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        offsets = _offsets(node)
        result: Expr | None = None
        for k in reversed(range(len(node.inputs))):
            if offsets[k] == offsets[k + 1]:
                continue
            i, low, high = idx[axis], lift(offsets[k]), lift(offsets[k + 1])
            conditions = ([low <= i] if offsets[k] != 0 else []) + ([i < high] if offsets[k + 1] != offsets[-1] else [])
            part = c.at(load, k, (*idx[:axis], i - low, *idx[axis + 1 :]), c.all_of(conditions))
            result = part if result is None else select(i < high, part, result)
        return const(0, node.dtype) if result is None else result

    return Map(value, joins=node.attrs["axis"])


def _concat_grad(node: Node, dy: Node) -> Sequence[Node]:
    axis, offsets = node.attrs["axis"], _offsets(node)
    zeros, ones = (0,) * len(node.shape), (1,) * len(node.shape)

    def part(k: int) -> Node:
        starts = (*zeros[:axis], offsets[k], *zeros[axis + 1 :])
        stops = (*node.shape[:axis], offsets[k + 1], *node.shape[axis + 1 :])
        return make("slice", dy, starts=starts, stops=stops, steps=ones)

    return [part(k) for k in range(len(node.inputs))]


def _concat_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, *(c.transposed(x, perm) for x in node.inputs), axis=perm.index(node.attrs["axis"]))


def _concat_samples() -> list[Sample]:
    cases: list[tuple[tuple[tuple[int, ...], ...], int]] = [
        (((7,),), 0),
        (((7,), (9,)), 0),
        (((1,), (16,), (15,)), 0),
        (((3, 8), (3, 1)), 1),
        (((2, 33), (5, 33)), 0),
        (((2, 3, 4), (2, 1, 4), (2, 2, 4)), 1),
        (((2, 3, 4, 5), (2, 3, 4, 3)), 3),
        (((0, 3), (2, 3)), 0),
        (((3, 0), (3, 0)), 1),
        (((0, 2), (0, 3)), 1),
    ]
    return [
        *(Sample(c.uniform(*s), {"axis": a}) for s, a in cases),
        Sample(c.uniform((3, 4), (3, 5), dtype=f64), {"axis": 1}, label="f64"),
        Sample(c.integers((9,), (8,), dtype=i32), {"axis": 0}, gradient=False, label="i32"),
        Sample(c.booleans((2, 7), (2, 1)), {"axis": 1}, gradient=False, label="bool"),
    ]


concat = register(
    Op(
        name="concat",
        infer=_infer_concat,
        reference=lambda arrays, attrs: np.concatenate(arrays, axis=attrs["axis"]),
        lower=_lower_concat,
        grad=c.rule(_concat_grad),
        doc="The operands one after the other along an axis.",
        arity=None,
        traits=_MOVES,
        attrs={"axis": REQUIRED},
        transpose=_concat_transpose,
        onnx=("Concat", 13),
        samples=_concat_samples,
    )
)


# --- reverse --------------------------------------------------------------------------------------------------------


def _infer_reverse(types: Sequence[TensorType], attrs: Attrs) -> Type:
    c.check_axes("reverse", attrs["axes"], types[0].rank)
    return types[0]


def _lower_reverse(node: Node) -> Map:
    axes = node.attrs["axes"]

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        return load(0, [lift(n - 1) - i if d in axes else i for d, (i, n) in enumerate(zip(idx, node.shape, strict=True))])

    return Map(value)


def _reverse_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, c.transposed(node.inputs[0], perm), axes=tuple(sorted(perm.index(a) for a in node.attrs["axes"])))


def _reverse_samples() -> list[Sample]:
    cases: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), ()),
        ((7,), (0,)),
        ((33,), (0,)),
        ((3, 16), (1,)),
        ((3, 8), (0,)),
        ((2, 3, 9), (0, 2)),
        ((2, 3, 4, 5), (1, 2)),
        ((0, 3), (0, 1)),
    ]
    return [*(Sample(c.uniform(s), {"axes": a}) for s, a in cases), *_extra((3, 5), {"axes": (1,)})]


reverse = register(
    Op(
        name="reverse",
        infer=_infer_reverse,
        reference=lambda arrays, attrs: np.array(np.flip(arrays[0], attrs["axes"]), order="C"),
        lower=_lower_reverse,
        grad=c.rule(lambda node, dy: (make("reverse", dy, axes=node.attrs["axes"]),)),
        doc="The elements along some axes in reverse order.",
        arity=1,
        traits=_MOVES,
        attrs={"axes": REQUIRED},
        transpose=_reverse_transpose,
        samples=_reverse_samples,
    )
)
