"""Cast, CastLike and BitCast, with the narrow floats and integers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ....ir.dtypes import DType, as_dtype, bool_, f8e8m0, f32, i32, u8, u32
from ... import elementwise as ew
from ...core import apply, as_tensor
from ...tensor import Tensor
from ..call import Call
from ..registry import op


@op("Cast")
@op("CastLike")
def cast(n: Call) -> Any:
    if n.node.op == "CastLike":
        to = n.value(1).dtype
    else:
        found = n.attribute("to")
        if isinstance(found, str):  # opset 1 names the type
            to = n.value(0).dtype if not found else _named(n, found)
        else:
            wanted = n.dtype("to")
            if wanted is None:
                n.fail("the attribute 'to' is missing")
            to = wanted
    saturate, mode = n.flag("saturate", True), n.choice("round_mode", "up", "down", "nearest")
    if n.value(0).dtype is to:
        return n.value(0)
    return narrowed(n.tensor(0), to, saturate, mode)


def narrowed(x: Tensor, to: DType, saturate: bool = True, mode: str = "up") -> Tensor:
    """x as `to`; of an 8-bit float, `saturate` holds it within the finite numbers, and `mode` rounds to powers of two."""
    if to is f8e8m0:
        return _power(ew.astype(x, f32), saturate, mode)
    if saturate and to.is_float and to.bits == 8 and x.dtype.is_float:
        largest = float(ml_dtypes.finfo(to.numpy).max)
        x = ew.clip(x, -largest, largest)
    if to.is_integer and to.bits < 8:  # what is out of range is left open by the standard; its reference wraps around
        x = ew.astype(x, i32)
    return ew.astype(x, to)


def _power(x: Tensor, saturate: bool, mode: str) -> Tensor:
    """The exponent of |x| as f8e8m0: rounded up, down, or to nearest with ties up; NaN and Inf give NaN."""
    bits = _bits(x, u32)
    exponent, rest = ew.bitwise_and(ew.right_shift(bits, _u32(23)), _u32(255)), ew.bitwise_and(bits, _u32(0x7FFFFF))
    if mode == "down":
        more = ew.equal(rest, _u32(0x800000))  # never
    elif mode == "up":
        more = ew.not_equal(rest, _u32(0))
    else:  # half way goes up, but not from 2^-127
        more = ew.less(_u32(0x400000), rest)
        more = ew.logical_or(more, ew.logical_and(ew.equal(rest, _u32(0x400000)), ew.less(_u32(0), exponent)))
    most = 254 if saturate else 255
    up = ew.logical_and(more, ew.less(exponent, _u32(most)))
    return _bits((exponent + up.astype(u32)).astype(u8), f8e8m0)


def _bits(x: Tensor, to: DType) -> Tensor:
    return apply("bit_cast", x, source=x.dtype.name, to=to.name)


def _u32(value: int) -> Tensor:
    return as_tensor(np.asarray(value, np.uint32))


@op("BitCast", 26)
def bit_cast(n: Call) -> Any:
    to = n.dtype("to")
    if to is None:
        n.fail("the attribute 'to' is missing")
    x = n.tensor(0)
    if x.dtype is to:
        return x
    if bool_ in (x.dtype, to):  # stored as the bytes 0 and 1
        return ew.astype(x, to) if x.dtype is bool_ else ew.not_equal(x, 0)
    return _bits(x, to)


def _named(n: Call, name: str) -> Any:
    try:
        return as_dtype({"FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16"}.get(name, name.lower()))
    except TypeError:
        n.unsupported(f"to={name!r}")
