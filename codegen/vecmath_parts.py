"""What the expansions of vecmath_f32.py and vecmath_f64.py are made of: bits, scaling, tables, and digits of pi."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..ir.dtypes import DType, f32, f64, i32, i64
from ..ir.expr import Expr, bitcast, cast, const, unary


def number(value: float, like: Expr) -> Expr:
    """A constant of the dtype and lanes of another value."""
    return const(value, like.dtype, like.lanes)


def integer_type(d: DType) -> DType:
    """The signed integer as wide as a float."""
    return i64 if d is f64 else i32


def integer(value: int, like: Expr) -> Expr:
    """A constant of the integer type as wide as `like`."""
    return const(value, integer_type(like.dtype) if like.dtype.is_float else like.dtype, like.lanes)


def bits(x: Expr) -> Expr:
    return bitcast(x, integer_type(x.dtype))


def float32(x: Expr) -> Expr:
    return bitcast(x, f32)


def float64(x: Expr) -> Expr:
    return bitcast(x, f64)


def magnitude(x: Expr) -> Expr:
    return unary("abs", x)


def magic(x: Expr) -> Expr:
    """Added to a float under 2^22 (f64: 2^51), it leaves the number rounded to an integer in the lowest bits."""
    return number(1.5 * 2.0 ** (52 if x.dtype is f64 else 23), x)


def with_sign_of(x: Expr, result: Expr) -> Expr:
    """A non-negative result with the sign of x."""
    lowest = -(1 << (x.dtype.bits - 1))
    return bitcast(bits(result) | (bits(x) & integer(lowest, x)), x.dtype)


def scale(x: Expr, n: Expr) -> Expr:
    """x * 2^n, rounded once, for 0.5 <= x < 2 (or NaN) and an integral float n with |n| < 256 (f64: 2048)."""
    return Expr("scale", (x, n), x.dtype, x.lanes)


def scale_steps(e: Expr) -> Expr:
    """`scale` in integer arithmetic, for targets without an instruction: by 2^floor(n/2), exact, then by the rest."""
    x, n = e.args
    mantissa, bias = (52, 1023) if x.dtype is f64 else (23, 127)
    k = bits(n + magic(n))  # n in the low bits
    half = (k << integer(mantissa - 1, n)) & integer(-(1 << mantissa), n)
    one = integer(bias << mantissa, n)
    return x * bitcast(half + one, x.dtype) * bitcast((k << integer(mantissa, n)) - half + one, x.dtype)


def four_bits_steps(e: Expr, *, looked_up: bool) -> Expr:
    """`four_bits` by a look-up among sixteen floats, or by two shifts and a conversion."""
    (x,) = e.args
    if looked_up:
        return table((*map(float, range(8)), *map(float, range(-8, 0))), x)
    return cast((x << integer(28, x)) >> integer(28, x), f32)


def table(entries: Sequence[float | int], index: Expr, dtype: DType = f32) -> Expr:
    """entries[index mod len(entries)], a power of two of constants; sixteen f32 live in registers."""
    return Expr("table", (index,), dtype, index.lanes, tuple(entries))


@lru_cache(maxsize=4)
def pi_digits(count: int) -> int:
    """floor(pi * 2^count), by Machin's formula."""
    guard = 32

    def arctan_inverse(n: int) -> int:
        term = total = (1 << (count + guard)) // n
        k = 3
        while term:
            term //= -n * n
            total += term // k
            k += 2
        return total

    return (16 * arctan_inverse(5) - 4 * arctan_inverse(239)) >> guard


def inverse_pi(halvings: int, count: int) -> int:
    """floor(2^count * 4 / pi / 2^halvings): 1 gives the digits of 2/pi, 3 those of 1/(2 pi)."""
    extra = 64
    return (4 << (2 * count + extra)) // pi_digits(count + extra) >> halvings


def pieces(digits: int, width: int, count: int) -> tuple[float, ...]:
    """A number under 1, given by its first width * count binary digits, cut into `count` floats of `width` bits."""
    total = width * count
    mask = (1 << width) - 1
    return tuple(((digits >> (total - width * (k + 1))) & mask) * 2.0 ** (-width * (k + 1)) for k in range(count))
