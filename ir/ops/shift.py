"""Shifts of the bits of integers."""

from __future__ import annotations

import numpy as np

from ..dtypes import i8, u8, u32
from ..expr import Expr, binary, const, select
from ..op import Op, Sample, register
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
