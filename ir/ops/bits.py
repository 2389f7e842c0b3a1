"""Bits: shifts of integers, and the same bits as another dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..dtypes import DType, as_dtype, bool_, f8e4m3fn, f16, f32, f64, i8, i16, i32, i64, u8, u32
from ..errors import DTypeError
from ..expr import Expr, binary, bitcast, const, select
from ..graph import Attrs
from ..lowering import Map
from ..op import REQUIRED, Array, Op, Sample, register
from ..types import TensorType, Type
from . import common as c
from .binary import infer_pair


def _inside(count: Expr) -> Expr:
    return (const(0, count.dtype) <= count) & (count < const(count.dtype.bits, count.dtype))


def _right(a: Expr, count: Expr) -> Expr:
    """Beyond the width only copies of the sign are left."""
    zero = const(0, a.dtype)
    rest = zero if a.dtype.kind == "uint" else select(a < zero, const(-1, a.dtype), zero)
    return select(_inside(count), binary("shr", a, count), rest)


def _samples() -> list[Sample]:
    def pair(shape: tuple[int, ...]) -> c.Draw:
        return c.together(c.integers(shape, low=-(2**40), high=2**40), c.integers(shape, low=0, high=64))

    edge = np.array([-(2**31), 2**31 - 1, 0, 1, -1, 7], np.int32)
    counts = np.array([-1, 0, 1, 5, 31, 32, 100, -(2**31)], np.int32)
    a, b = (m.reshape(-1) for m in np.meshgrid(edge, counts))
    narrow = c.together(c.integers((33,), low=-128, high=128, dtype=i8), c.integers((33,), low=0, high=8, dtype=i8))
    unsigned = c.together(c.integers((33,), low=0, high=256, dtype=u8), c.integers((33,), low=0, high=12, dtype=u8))
    word = c.together(c.integers((17,), low=0, high=2**32, dtype=u32), c.integers((17,), low=0, high=40, dtype=u32))
    return [
        *(Sample(pair(s), gradient=False) for s in c.some_shapes("shift")),
        Sample(c.fixed(a, b), gradient=False, label="edges"),
        Sample(narrow, gradient=False, label="i8"),
        Sample(unsigned, gradient=False, label="u8"),
        Sample(word, gradient=False, label="u32"),
    ]


shift_left = register(
    Op(
        name="shift_left",
        infer=infer_pair("shift_left", c.is_integer),
        reference=c.total(np.left_shift),
        lower=c.elementwise(lambda a, b: binary("shl", a, b)),
        grad=c.no_flow,
        doc="a << b of integers, modulo the width; 0 where the count b is outside [0, width).",
        arity=2,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        samples=_samples,
    )
)
shift_right = register(
    Op(
        name="shift_right",
        infer=infer_pair("shift_right", c.is_integer),
        reference=c.total(np.right_shift),
        lower=c.elementwise(_right),
        grad=c.no_flow,
        doc="a >> b of integers, which keeps the sign; 0, or -1 of a negative a, where the count b is outside [0, width).",
        arity=2,
        traits=c.CHEAP,
        transpose=c.elementwise_transpose,
        samples=_samples,
    )
)


# --- bit_cast -------------------------------------------------------------------------------------------------------


def _infer_bit_cast(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, source, dtype = types[0].dtype, as_dtype(attrs["source"]), as_dtype(attrs["to"])
    if x is not source:
        raise DTypeError(f"operand 0 of bit_cast has dtype {x}, the attribute 'source' says {source}")
    if bool_ in (x, dtype) or x.itemsize != dtype.itemsize:
        raise DTypeError(f"bit_cast from {x} to {dtype}: both have the same number of bytes, and neither is bool (cast that)")
    return TensorType(dtype, types[0].shape)


def _bit_cast_reference(arrays: Sequence[Array], attrs: Attrs) -> Array:
    """In the dtypes that are named, also where everything else is evaluated in f64: bits of an f64 would be other bits."""
    x = arrays[0].astype(as_dtype(attrs["source"]).numpy)
    return x.view(as_dtype(attrs["to"]).numpy).copy()


def _bit_cast_samples() -> list[Sample]:
    pairs = ((i32, f32), (f32, i32), (i64, f64), (u8, i8), (f16, i16), (i16, f16), (u8, f8e4m3fn))

    def sample(source: DType, to: DType) -> Sample:
        draw = c.uniform((33,), dtype=source) if source.is_float else c.integers((33,), low=0, high=100, dtype=source)
        return Sample(draw, {"source": source.name, "to": to.name}, gradient=False, label=f"{source} to {to}")

    return [sample(a, b) for a, b in pairs]


bit_cast = register(
    Op(
        name="bit_cast",
        infer=_infer_bit_cast,
        reference=_bit_cast_reference,
        lower=lambda node: Map(lambda idx, load: bitcast(load(0, idx), node.dtype), elementwise=True),
        grad=c.no_flow,
        doc="The bits of the operand, of the dtype named `source`, as those of the dtype named `to`, of the same size.",
        arity=1,
        traits=c.CHEAP,
        attrs={"source": REQUIRED, "to": REQUIRED},
        transpose=c.elementwise_transpose,
        samples=_bit_cast_samples,
    )
)
