"""IEEE arithmetic that numpy has no function for: fused multiply-add, directed rounding, bf16, saturating conversions.

Everything is exact in the sense of IEEE 754: one rounding of the exact result. fp32, fp16 and bf16 go through fp64 rounded *to
odd* (Boldo and Melquiond 2008: when the wide format has at least two bits more than twice the narrow one's, rounding the sum
to odd first and to nearest afterwards is one correct rounding).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import numpy as np

Value = Any  # a numpy array, or a numpy scalar where all threads agree

_QUIET32: Final = np.uint32(0x7FFFFFFF)
_SPLIT: Final = 134217729.0  # 2**27 + 1: Veltkamp's constant


def two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """a + b rounded, and what rounding lost (Knuth)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def odd_sum(a: Value, b: Value) -> Value:
    """a + b in fp64 rounded to odd: where inexact, the neighbour whose last bit is 1."""
    s, e = two_sum(a, b)
    s = np.asarray(s, np.float64)
    e = np.asarray(e, np.float64)
    bits = s.view(np.int64)
    fix = (e != 0) & np.isfinite(s) & ((bits & 1) == 0)
    if not fix.any():
        return s
    # towards the exact value: away from 0 where the error has the sign of s
    step = np.where((e > 0) == (s > 0), 1, -1)
    return np.where(fix, bits + step, bits).view(np.float64)


def fma32(a: Value, b: Value, c: Value) -> Value:
    """a * b + c for fp32 with one rounding. The product is exact in fp64; only sums that end on a tie need care."""
    p = np.multiply(a, b, dtype=np.float64)
    s = np.add(p, c, dtype=np.float64)
    r = s.astype(np.float32)
    bits = np.asarray(s).view(np.int64)
    low = bits & 0x0FFFFFFF  # every midpoint of two fp32 values, subnormal ones too, ends in 28 zeros
    if not low.all():
        tie = low == 0
        if r.ndim == 0:
            return odd_sum(p, np.float64(c)).astype(np.float32)[()]
        at = np.flatnonzero(tie)
        found = bits[at]
        small = ((found >> 52) & 0x7FF) < 1023 - 126  # subnormal fp32 numbers have their midpoints further up
        at = at[((found & 0x1FFFFFFF) == 0x10000000) | (small & (found << 1 != 0))]
        if len(at):
            c = np.broadcast_to(c, r.shape)[at].astype(np.float64)
            r[at] = odd_sum(np.broadcast_to(p, r.shape)[at], c).astype(np.float32)
    return r


def _two_product(a: Value, b: Value) -> tuple[Value, Value]:
    p = a * b
    t = _SPLIT * a
    ah = t - (t - a)
    t = _SPLIT * b
    bh = t - (t - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a: Value, b: Value, c: Value) -> Value:
    """a * b + c for fp64 with one rounding: Boldo-Melquiond where exponents allow it, rational numbers elsewhere."""
    a, b, c = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (a, b, c)))
    p, low = _two_product(a, b)
    uh, th = p, c
    tl_h, tl_l = two_sum(th, low)
    vh, vl = two_sum(uh, tl_h)
    r = vh + odd_sum(tl_l, vl)
    plain = p + c
    special = ~np.isfinite(plain) & ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    r = np.where(special, plain, r)
    size = [np.abs(v) for v in (a, b, p, c)]
    hard = ~special & (
        (size[0] > 1e150) | (size[1] > 1e150) | (size[3] > 1e300) | (size[2] > 1e300) | ((size[2] < 1e-250) & (a != 0) & (b != 0))
    )
    zero = (p == 0) & ((a == 0) | (b == 0))
    r = np.where(zero & ~special, plain, r)
    if hard.any():
        r = np.array(r)
        for i in zip(*np.nonzero(hard), strict=True) if r.ndim else [()]:
            r[i] = _exact(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])), plain[i])
    return r if r.ndim else r[()]


def _exact(value: Fraction, sign_of_zero: float) -> float:
    if not value:
        return 0.0 * (-1.0 if np.signbit(sign_of_zero) else 1.0)
    try:
        return value.numerator / value.denominator  # Python's int division rounds once, to nearest even
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def directed32(s: Value, mode: str) -> Value:
    """An fp64 value that is exact, or rounded to odd, as fp32 in a rounding mode (rn, rz, rm, rp)."""
    s = np.asarray(s, np.float64)
    r = s.astype(np.float32)
    if mode == "rn":
        return r
    wide = r.astype(np.float64)
    if mode == "rm":
        wrong, to = wide > s, np.float32(-np.inf)
    elif mode == "rp":
        wrong, to = wide < s, np.float32(np.inf)
    else:
        wrong, to = np.abs(wide) > np.abs(s), np.float32(0)
    return np.where(wrong, np.nextafter(r, to), r)


def flush(v: Value) -> Value:
    """Subnormal fp32 values as zeros of their sign (`.ftz`)."""
    return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)


def bf16_to_f32(bits: Value) -> Value:
    """bf16 bits as fp32 values."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(v: Value, mode: str = "rn") -> Value:
    """fp32 values as bf16 bits, to nearest even or towards zero; NaN becomes 0x7fff."""
    v = np.asarray(v, np.float32)
    bits = v.view(np.uint32)
    if mode == "rn":
        r = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif mode == "rz":
        r = bits >> np.uint32(16)
    elif mode == "rna":
        r = (bits + np.uint32(0x8000)) >> np.uint32(16)
    else:
        raise ValueError(mode)
    return np.where(np.isnan(v), np.uint16(0x7FFF), r.astype(np.uint16))


def f64_to_bf16(v: Value) -> Value:
    """An fp64 value that is exact, or rounded to odd, as bf16 bits with one rounding."""
    v = np.asarray(v, np.float64)
    r = v.astype(np.float32)
    wide = r.astype(np.float64)
    bits = r.view(np.int32)
    up = np.abs(wide) > np.abs(v)
    # to odd in fp32: truncate, then set the last bit where anything was lost
    bits = np.where(up & np.isfinite(v), bits - 1, bits)
    bits = np.where((wide != v) & np.isfinite(v), bits | 1, bits)
    return f32_to_bf16(bits.astype(np.int32).view(np.float32))


def tf32(v: Value) -> Value:
    """fp32 values as the tensor core reads them in tf32: the last 13 bits dropped."""
    return (np.asarray(v, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_tf32(v: Value) -> Value:
    """cvt.rna.tf32.f32: to nearest, ties away from zero, as fp32 values."""
    v = np.asarray(v, np.float32)
    bits = (v.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(v), bits.view(np.float32), v)


def minimum(a: Value, b: Value, propagate: bool = False) -> Value:
    """PTX min: the other operand where one is NaN (`propagate`: NaN); -0 lies below +0."""
    r = np.minimum(a, b) if propagate else np.fmin(a, b)
    return _zeros(a, b, r, np.logical_or)


def maximum(a: Value, b: Value, propagate: bool = False) -> Value:
    """PTX max: the other operand where one is NaN (`propagate`: NaN); +0 lies above -0."""
    r = np.maximum(a, b) if propagate else np.fmax(a, b)
    return _zeros(a, b, r, np.logical_and)


def _zeros(a: Value, b: Value, r: Value, join: Any) -> Value:
    zero = np.equal(r, 0)
    if not zero.any():
        return r
    negative = np.where(np.equal(a, b), join(np.signbit(a), np.signbit(b)), np.signbit(r))
    return np.where(zero, np.copysign(r, np.where(negative, -1, 1).astype(r.dtype)), r)


def to_integer(v: Value, dtype: np.dtype[Any], mode: str) -> Value:
    """Float to integer as PTX has it: rounded by `mode`, clamped to the integer's range, NaN to 0."""
    v = np.asarray(v)
    w = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](v.astype(np.float64))
    info = np.iinfo(dtype)
    low, high = float(info.min), float(info.max)
    inside = (w >= low) & (w < high) if high > 2**53 else (w >= low) & (w <= high)
    r = np.where(inside, w, 0).astype(dtype)
    return np.where(np.isnan(w), dtype.type(0), np.where(inside, r, np.where(w < low, info.min, info.max).astype(dtype)))
