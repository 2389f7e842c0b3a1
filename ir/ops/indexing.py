"""Ops that read at computed positions: gather; and those that make positions: one_hot, iota."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..dims import Shape
from ..dtypes import DType, f32, f64, i32, i64, u8, u64
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..expr import Expr, cast, eq, lift, maximum, minimum
from ..graph import Attrs, Node
from ..lowering import Load, Map
from ..op import REQUIRED, Array, Op, Sample, Trait, make, register
from ..types import TensorType, Type
from . import common as c
from .compare import cast_array


def check_indices(op: str, t: TensorType, k: int) -> None:
    if not c.is_integer(t.dtype) or t.dtype is u64:
        raise DTypeError(
            f"operand {k} of {op} (the indices) has dtype {t.dtype}, expected an integer that fits i64; cast it first"
        )


def taken(x: Shape, indices: Shape, axis: int) -> Shape:
    return x[:axis] + indices + x[axis + 1 :]


# --- gather ---------------------------------------------------------------------------------------------------------


def _infer_gather(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, indices = types
    axis = c.check_axis("gather", attrs["axis"], x.rank)
    check_indices("gather", indices, 1)
    if x.shape[axis] == 0 and indices.size != 0:
        raise ShapeError(f"operand 0 of gather has shape {c.show(x.shape)}, with nothing to take along axis {axis}")
    return TensorType(x.dtype, taken(x.shape, indices.shape, axis))


def _gather_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, indices = arrays
    if x.shape[attrs["axis"]] == 0:
        return np.zeros(taken(x.shape, indices.shape, attrs["axis"]), x.dtype)
    return np.asarray(np.take(x, indices.astype(np.int64), axis=attrs["axis"], mode="clip"))


def _lower_gather(node: Node) -> Map:
    axis, count = node.attrs["axis"], len(node.inputs[1].shape)

    def value(idx: tuple[Expr, ...], load: Load) -> Expr:
        n = node.inputs[0].shape[axis]
        position = cast(load(1, idx[axis : axis + count]), i64)
        position = minimum(maximum(position, 0), max(0, n - 1) if isinstance(n, int) else maximum(lift(n - 1), 0))
        return load(0, (*idx[:axis], position, *idx[axis + count :]))

    return Map(value)


def _gather_grad(node: Node, dy: Node) -> Sequence[Node | None]:
    """Scattered back to where the values came from: indices out of range were clipped."""
    x, indices = node.inputs
    axis = node.attrs["axis"]
    n = x.shape[axis]
    if isinstance(n, int):
        limits = [c.full(v, indices) for v in (0, min(max(n - 1, 0), 2 ** (indices.dtype.bits - 1) - 1))]
        indices = make("minimum", make("maximum", indices, limits[0]), limits[1])
    return make("scatter_add", c.full(0.0, x), indices, dy, axis=axis), None


def positions(shape: tuple[int, ...], n: int, dtype: DType = i64) -> c.Draw:
    return c.integers(shape, low=0, high=n, dtype=dtype)


GATHERS: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((7,), (9,), 0), ((5, 16), (4,), 0), ((5, 17), (3, 2), 0), ((3, 9), (5,), 1), ((2, 3, 4), (), 1), ((2, 5, 8), (2, 3), 1),
    ((4, 33), (1,), 0), ((3, 4), (0,), 0), ((2, 3, 4, 5), (6,), 3), ((0, 3), (2,), 1),
]  # fmt: skip


def _gather_samples() -> list[Sample]:
    made = [Sample(c.together(c.uniform(x), positions(i, x[a])), {"axis": a}) for x, i, a in GATHERS]
    wild = np.array([-5, -1, 0, 6, 7, 100, 2**40], np.int64)
    return [
        *made,
        Sample(c.together(c.uniform((7, 3)), c.fixed(wild)), {"axis": 0}, label="clipped"),
        Sample(c.together(c.uniform((7, 3)), positions((8,), 7, i32)), {"axis": 0}, label="i32 indices"),
        Sample(c.together(c.integers((5,)), positions((8,), 5, u8)), {"axis": 0}, gradient=False, label="i64 values"),
    ]


gather = register(
    Op(
        name="gather",
        infer=_infer_gather,
        reference=_gather_reference,
        lower=_lower_gather,
        grad=c.rule(_gather_grad),
        doc="Entries of operand 0 along an axis at the positions of operand 1 (numpy's take), clipped into range.",
        arity=2,
        traits=frozenset({Trait.MOVEMENT}),
        attrs={"axis": 0},
        onnx=("Gather", 13),
        samples=_gather_samples,
    )
)


# --- one_hot --------------------------------------------------------------------------------------------------------


def _infer_one_hot(types: Sequence[TensorType], attrs: Attrs) -> Type:
    check_indices("one_hot", types[0], 0)
    depth = attrs["depth"]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise AttributeValueError(f"depth of one_hot is an int >= 0, not {depth!r}")
    return TensorType(c.check_dtype_attr("one_hot", attrs["dtype"]), (*types[0].shape, depth))


def _one_hot_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    hot = arrays[0].astype(np.int64)[..., None] == np.arange(attrs["depth"], dtype=np.int64)
    return cast_array(np.asarray(hot), attrs["dtype"])


def _from_bool(x: Expr, dtype: DType) -> Expr:
    return x if dtype is x.dtype else cast(x, dtype)


def _lower_one_hot(node: Node) -> Map:
    return Map(lambda idx, load: _from_bool(eq(cast(load(0, idx[:-1]), i64), idx[-1]), node.dtype))


def _one_hot_samples() -> list[Sample]:
    made = [
        Sample(positions(s, n), {"depth": n, "dtype": f32}, gradient=False)
        for s, n in (((7,), 9), ((), 5), ((3, 5), 16), ((2, 3, 4), 3), ((0,), 4), ((33,), 1), ((2,), 31), ((0,), 0))
    ]
    wild = np.array([-1, 0, 4, 5, 2**40], np.int64)
    return [
        *made,
        Sample(c.fixed(wild), {"depth": 5, "dtype": f32}, gradient=False, label="out of range"),
        Sample(positions((8,), 5, u8), {"depth": 5, "dtype": i64}, gradient=False, label="u8 to i64"),
    ]


one_hot = register(
    Op(
        name="one_hot",
        infer=_infer_one_hot,
        reference=_one_hot_reference,
        lower=_lower_one_hot,
        grad=c.no_flow,
        doc="1 where the index equals the position along a new last axis of size `depth`, else 0: all 0 if it is out of range.",
        arity=1,
        traits=frozenset({Trait.CHEAP}),
        attrs={"depth": REQUIRED, "dtype": f32},
        samples=_one_hot_samples,
    )
)


# --- iota -----------------------------------------------------------------------------------------------------------


def _infer_iota(types: Sequence[TensorType], attrs: Attrs) -> Type:
    shape = c.check_shape("iota", attrs["shape"])
    c.check_axis("iota", attrs["axis"], len(shape))
    dtype = c.check_dtype_attr("iota", attrs["dtype"])
    if not c.is_arithmetic(dtype):
        raise DTypeError(f"dtype of iota is f32, f64, f16, bf16 or an integer of 8 bits or more, not {dtype}")
    return TensorType(dtype, shape)


def _iota_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    shape, axis = c.static(attrs["shape"]), attrs["axis"]
    line = cast_array(np.arange(shape[axis], dtype=np.int64), attrs["dtype"])
    return np.array(np.broadcast_to(line.reshape([-1 if d == axis else 1 for d in range(len(shape))]), shape), order="C")


def _iota_transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, shape=tuple(node.shape[p] for p in perm), axis=perm.index(node.attrs["axis"]), dtype=node.dtype)


def _iota_samples() -> list[Sample]:
    cases: list[tuple[tuple[int, ...], int, DType]] = [
        ((7,), 0, i64),
        ((33,), 0, f32),
        ((3, 16), 0, f32),
        ((3, 17), 1, i32),
        ((2, 3, 5), 1, i64),
        ((300,), 0, u8),
        ((0, 3), 1, f32),
        ((2, 3, 4, 5), 3, f64),
    ]
    return [Sample(c.fixed(), {"shape": s, "axis": a, "dtype": t}, gradient=False) for s, a, t in cases]


iota = register(
    Op(
        name="iota",
        infer=_infer_iota,
        reference=_iota_reference,
        lower=lambda node: Map(lambda idx, load: cast(idx[node.attrs["axis"]], node.dtype)),
        grad=c.no_flow,
        doc="0, 1, 2, ... along an axis of a shape, the same in every other.",
        arity=0,
        traits=frozenset({Trait.CHEAP}),
        attrs={"shape": REQUIRED, "axis": 0, "dtype": i64},
        transpose=_iota_transpose,
        samples=_iota_samples,
    )
)
