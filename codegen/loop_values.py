"""What each operation of an expression computes, in numpy: the definition that emitted code is tested against.

A value is an array with one element per lane. f16 and bf16 are computed in f32 and rounded after each operation. Apart
from which NaN comes out, the emitters give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np

from ..ir.dtypes import DType, bf16, bool_, f16, f32, f64
from ..ir.errors import CompileError
from ..ir.expr import COMPARE, INTEGER_FACTORS, REDUCE, Expr, picks
from ..ir.fma import fma32

Array = np.ndarray[Any, Any]

_FLOAT_BINARY: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "max": lambda a, b: np.where(np.isnan(a), a, np.where(a > b, a, b)),
    "min": lambda a, b: np.where(np.isnan(a), a, np.where(a < b, a, b)),
}  # fmt: skip
_COMPARE: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_FLOAT_UNARY: Final[dict[str, Callable[[Array], Array]]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round": np.rint, "trunc": np.trunc,
}  # fmt: skip


def constant(e: Expr) -> Array:
    return np.full(e.lanes, e.attr).astype(e.dtype.numpy)


def _integer_binary(op: str, d: DType, a: Array, b: Array) -> Array:
    zero = b == 0
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "max":
            return np.maximum(a, b)
        case "min":
            return np.minimum(a, b)
        case "and":
            return a & b
        case "or":
            return a | b
        case "xor":
            return a ^ b
        case "floordiv":
            return np.where(zero, 0, a // np.where(zero, 1, b)).astype(a.dtype)
        case "mod":
            return np.where(zero, 0, a % np.where(zero, 1, b)).astype(a.dtype)
        case "shl" | "shr":
            inside = (b >= 0) & (b < d.bits)
            count = np.where(inside, b, 0).astype(a.dtype)
            return np.where(inside, a << count if op == "shl" else a >> count, 0).astype(a.dtype)
    raise CompileError(f"{op} is not defined on {d} values")


def _fma64(a: Array, b: Array, c: Array) -> Array:
    out = a * b + c
    for k in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(float(c[k]))
        if exact:
            try:
                out[k] = float(exact)
            except OverflowError:
                out[k] = np.inf if exact > 0 else -np.inf
    return out


def convert(source: DType, to: DType, a: Array) -> Array:
    """A cast: float to integer saturates and NaN gives 0, integers wrap, floats are rounded once."""
    if to is bool_:
        return np.asarray(a != 0)
    if not source.is_float or to.is_float:
        return a.astype(to.numpy)
    wide = a.astype(np.float64)
    info = np.iinfo(to.numpy)
    low, high = float(info.min), float(info.max)
    inside = (wide > low) & (wide < high)
    whole = np.where(inside, wide, 0).astype(to.numpy)
    return np.where(inside, whole, np.where(np.isnan(wide), 0, np.where(wide > 0, info.max, info.min))).astype(to.numpy)


def reduce_lanes(op: str, d: DType, a: Array) -> Array:
    """Lane i with lane i + n/2, until one is left."""
    while len(a) > 1:
        half = len(a) // 2
        a = binary(op, d, a[:half], a[half:])
    return a


def binary(op: str, d: DType, a: Array, b: Array) -> Array:
    if d.is_float:
        if op not in _FLOAT_BINARY:
            raise CompileError(f"{op} is not defined on {d} values")
        if d in (f16, bf16):
            return np.asarray(_FLOAT_BINARY[op](a.astype(np.float32), b.astype(np.float32)).astype(d.numpy))
        return _FLOAT_BINARY[op](a, b)
    if d is bool_ and op not in ("and", "or", "xor", "max", "min"):
        raise CompileError(f"{op} is not defined on {d} values")
    return _integer_binary(op, d, a, b)


def unary(op: str, d: DType, a: Array) -> Array:
    if op == "not" and not d.is_float:
        return ~a
    if d.is_float and op in _FLOAT_UNARY:
        if d in (f16, bf16):
            return np.asarray(_FLOAT_UNARY[op](a.astype(np.float32)).astype(d.numpy))
        return _FLOAT_UNARY[op](a)
    if d.is_integer and op in ("neg", "abs", "floor", "ceil", "round", "trunc"):
        return -a if op == "neg" else np.abs(a) if op == "abs" else a
    if d is bool_ and op == "abs":
        return a
    raise CompileError(f"{op} is not defined on {d} values")


def _dot_bf16(a: Array, b: Array, c: Array) -> Array:
    """c + a1 * b1 + a0 * b0 of lanes that hold two bf16 each, every step rounded, denormals zero."""

    def flushed(x: Array) -> Array:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(np.float32)

    total = flushed(c)
    for half in (1, 0):
        x, y = (
            flushed(((v.view(np.uint32) & 0xFFFF0000) if half else (v.view(np.uint32) << 16)).astype(np.uint32).view(np.float32))
            for v in (a, b)
        )
        total = flushed(fma32(x, y, total))
    return total


def _dot_integers(factors: str, a: Array, b: Array, c: Array) -> Array:
    """c and the products of the four bytes, or two i16, in each i32 of a and b, modulo 2^32."""
    kinds = [np.int16, np.int16] if factors == "i16" else [np.int8 if factors[k : k + 2] == "i8" else np.uint8 for k in (0, 2)]
    parts = (np.ascontiguousarray(v).view(kind).astype(np.int64) for v, kind in zip((a, b), kinds, strict=True))
    x, y = (v.reshape(*c.shape, -1) for v in parts)
    return np.asarray((c.astype(np.int64) + (x * y).sum(-1)).astype(np.int32))


def apply(e: Expr, args: Sequence[Array]) -> Array:
    """The value of one operation (not var, load, or a math function) from the values of its args."""
    d, op = e.dtype, e.op
    if op == "const":
        return constant(e)
    first = e.args[0].dtype
    with np.errstate(all="ignore"):
        if op in COMPARE:
            return _COMPARE[op](args[0], args[1])
        if op == "fma" and e.attr == "bf16":
            return _dot_bf16(*args)
        if op == "fma" and e.attr in INTEGER_FACTORS:
            return _dot_integers(e.attr, *args)
        if op == "fma":
            if d is f64:
                return _fma64(*args)
            return fma32(*args) if d is f32 else np.asarray(fma32(*args).astype(d.numpy))
        if op == "select":
            return np.where(args[0], args[1], args[2])
        if op == "cast":
            return convert(first, d, args[0])
        if op == "bitcast":
            return args[0].view(d.numpy)
        if op == "ramp":
            return np.asarray((args[0] + np.arange(e.lanes).astype(d.numpy)).astype(d.numpy))
        if op == "broadcast":
            return np.repeat(args[0], e.lanes)
        if op == "shuffle":
            return np.concatenate(args)[list(picks(e.attr, e.lanes))]
        if op == "four_bits":
            return np.asarray(((args[0] & 15 ^ 8) - 8).astype(np.float32))
        if op == "lookup":
            return np.asarray(args[0][args[1] & 15])
        if op == "scale":
            return np.ldexp(args[0].astype(np.longdouble), np.nan_to_num(args[1]).astype(np.int32)).astype(d.numpy)
        if op == "table":
            return np.asarray(np.array(e.attr, d.numpy)[args[0] & (len(e.attr) - 1)])
        if op in REDUCE:
            return reduce_lanes(op.removeprefix("reduce_"), d, args[0])
        if len(args) == 1:
            return unary(op, d, args[0])
        return binary(op, d, args[0], args[1])
