"""The order of elements: argsort, whole or of the first few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..dims import as_int
from ..dtypes import DType, bf16, f16, f64, i32, i64, u8
from ..errors import AttributeValueError, DTypeError, ShapeError
from ..graph import Attrs, Node
from ..lowering import Sort
from ..op import REQUIRED, Array, Op, Sample, make, register
from ..types import TensorType, Type
from . import common as c


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x = types[0]
    axis = c.check_axis("argsort", attrs["axis"], x.rank)
    if not (c.is_arithmetic(x.dtype) or c.is_logical(x.dtype)):
        raise DTypeError(f"operand 0 of argsort has dtype {x.dtype}, which has no order; cast it first")
    if not isinstance(attrs["descending"], bool):
        raise AttributeValueError(f"descending of argsort is a bool, not {attrs['descending']!r}")
    (count,) = c.check_shape("argsort", (attrs["count"],))
    size = x.shape[axis]
    if isinstance(count, int) and isinstance(size, int) and count > size:
        raise ShapeError(f"argsort is asked for the first {count} of the {size} elements along axis {axis} of {c.show(x.shape)}")
    return TensorType(i64, (*x.shape[:axis], count, *x.shape[axis + 1 :]))


def _reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    x, axis, count = arrays[0], attrs["axis"], as_int(attrs["count"])
    if x.dtype.kind == "V":  # ml_dtypes: numpy does not know their NaN
        x = x.astype(np.float32)
    if attrs["descending"]:  # from the end: of equal elements the last comes first, then positions are counted from the front
        order = x.shape[axis] - 1 - np.argsort(np.flip(x, axis), axis=axis, kind="stable")
        order = np.flip(order, axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    return np.ascontiguousarray(np.take(order, np.arange(count), axis=axis).astype(np.int64))


def _transpose(node: Node, perm: tuple[int, ...]) -> Node:
    return make(node.op, c.transposed(node.inputs[0], perm), **{**node.attrs, "axis": perm.index(node.attrs["axis"])})


def _samples() -> list[Sample]:
    def sample(draw: c.Draw, axis: int, count: int, descending: bool = False, label: str = "") -> Sample:
        return Sample(draw, {"axis": axis, "count": count, "descending": descending}, gradient=False, label=label)

    def few(shape: tuple[int, ...], dtype: DType = i64) -> c.Draw:
        return c.integers(shape, low=0, high=4, dtype=dtype)

    special = np.array([[1, np.inf, np.nan, -np.inf, 3, np.nan, -0.0, 0.0, 1e-40], [2, 1, 2, 1, 2, 1, 2, 1, 2]], np.float32)
    made = [sample(c.uniform((3, n)), 1, n, down) for n in (1, 7, 8, 9, 15, 16, 17, 31, 33) for down in (False, True)]
    return [
        *made,
        sample(few((4, 100)), 1, 100, label="equal elements"),
        sample(few((4, 100)), 1, 7, True, label="equal elements"),
        sample(c.uniform((33, 5)), 0, 10),
        sample(c.uniform((2, 19, 3)), 1, 1, True),
        sample(c.uniform((2, 19, 3), dtype=f64), 1, 4, label="f64"),
        sample(c.uniform((50,), dtype=f16), 0, 50, True, "f16"),
        sample(c.uniform((50,), dtype=bf16), 0, 20, label="bf16"),
        sample(few((2, 30), i32), 1, 9, label="i32"),
        sample(few((2, 30), u8), 1, 9, True, "u8"),
        sample(c.booleans((3, 20)), 1, 20, label="bool"),
        sample(c.booleans((3, 20)), 1, 5, True, "bool"),
        sample(c.fixed(special), 1, 9, label="special"),
        sample(c.fixed(special), 1, 9, True, "special"),
        sample(c.uniform((0, 4)), 1, 4),
        sample(c.uniform((3, 4)), 1, 0),
        sample(c.uniform((3, 0)), 1, 0),
    ]


argsort = register(
    Op(
        name="argsort",
        infer=_infer,
        reference=_reference,
        lower=lambda node: Sort(node.attrs["axis"], node.attrs["count"], node.attrs["descending"]),
        grad=c.no_flow,
        doc="The positions of the first `count` elements along an axis in ascending or descending order, as i64; NaN counts as "
        "larger than every number, and of equal elements the one before comes first.",
        arity=1,
        attrs={"axis": REQUIRED, "count": REQUIRED, "descending": False},
        transpose=_transpose,
        samples=_samples,
    )
)
