"""Numbers of 8 bits and fewer, stored and cast only: their bits to f32, and back, rounded to nearest, ties to even.

A float of E exponent and M mantissa bits with exponent bias B is (-1)^s 2^(e - B) (1 + m 2^-M), or (-1)^s 2^(1 - B) m 2^-M
where e = 0. Micikevicius et al. 2022 (fp8), Noune et al. 2022 (its fnuz forms), Rouhani et al. 2023 (microscaling: f4, f6, and
e8m0, where ties go to the larger power of two).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..dtypes import DType, f32, i32, u8, u32
from ..expr import Expr, bitcast, cast, const, eq, ne, select, unary


@dataclass(frozen=True)
class Mini:
    """A small float. `overflow` is what a finite number beyond the largest becomes: 'nan', 'inf' or 'max'.

    `nan` is the bits of NaN without the sign (with it where `fnuz`: the bits of -0 are the only NaN), None where there is none.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: int  # bits of the largest finite number
    overflow: str
    nan: int | None = None
    fnuz: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FLOATS: Final[dict[str, Mini]] = {
    "f8e4m3fn": Mini(4, 3, 7, 0x7E, "nan", 0x7F),
    "f8e5m2": Mini(5, 2, 15, 0x7B, "inf", 0x7E),
    "f8e4m3fnuz": Mini(4, 3, 8, 0x7F, "nan", 0x80, fnuz=True),
    "f8e5m2fnuz": Mini(5, 2, 16, 0x7F, "nan", 0x80, fnuz=True),
    "f6e2m3": Mini(2, 3, 1, 0x1F, "max"),
    "f6e3m2": Mini(3, 2, 3, 0x1F, "max"),
    "f4e2m1": Mini(2, 1, 1, 0x7, "max"),
}
EXPONENT: Final = "f8e8m0"  # 2^(bits - 127), unsigned; 255 is NaN


def is_narrow(dtype: DType) -> bool:
    """Whether a dtype is stored in bytes that no arithmetic takes as they are."""
    return dtype.name in FLOATS or dtype.name == EXPONENT or (dtype.is_integer and dtype.bits < 8)


def widened(x: Expr) -> Expr:
    """The f32 (of a float) or i32 (of an integer) that a narrow value is. Exact."""
    bits = cast(bitcast(x, u8), u32)
    if x.dtype.is_integer:
        whole = cast(bits & _u(mask(x.dtype.bits)), i32)
        top = 1 << (x.dtype.bits - 1)
        return (whole ^ const(top, i32)) - const(top, i32) if x.dtype.kind == "int" else whole
    if x.dtype.name == EXPONENT:
        least = bitcast(_u(0x00400000), f32)  # 2^-127 is a denormal
        usual = select(eq(bits, _u(0)), least, bitcast(bits << _u(23), f32))
        return select(eq(bits, _u(255)), const(float("nan"), f32), usual)
    m = FLOATS[x.dtype.name]
    rest = bits & _u(mask(m.bits - 1))
    # the exponent field taken as f32's is 2^(127 - bias) too small, of denormals as of others
    value = bitcast(rest << _u(23 - m.mantissa), f32) * const(2.0 ** (127 - m.bias), f32)
    sign = (bits >> _u(m.bits - 1)) << _u(31)
    if m.bits < 8:
        sign = sign & _u(1 << 31)
    value = bitcast(bitcast(value, u32) | sign, f32)
    if m.overflow == "inf":
        infinity = bitcast(sign | _u(0x7F800000), f32)
        value = select(eq(rest, _u(0x7C)), infinity, value)
        return select(_u(0x7C) < rest, const(float("nan"), f32), value)
    if m.fnuz:
        return select(eq(bits, _u(0x80)), const(float("nan"), f32), value)
    return value if m.nan is None else select(eq(rest, _u(m.nan)), const(float("nan"), f32), value)


def narrowed(x: Expr, dtype: DType) -> Expr:
    """A float or an integer as a narrow value: floats round to nearest even, f64 through f32; integers keep their low bits."""
    if dtype.is_integer:
        low, high = (0, mask(dtype.bits)) if dtype.kind == "uint" else (-(1 << (dtype.bits - 1)), mask(dtype.bits - 1))
        if x.dtype.is_float:  # truncated, held within the range, NaN to 0
            whole = cast(x, i32)
            whole = select(whole < const(low, i32), const(low, i32), whole)
            whole = select(const(high, i32) < whole, const(high, i32), whole)
        else:
            whole = cast(x, i32)
        return bitcast(cast(whole & const(mask(dtype.bits), i32), u8), dtype)
    x = cast(x, f32)
    if dtype.name == EXPONENT:
        return bitcast(cast(_exponent_bits(x), u8), dtype)
    m = FLOATS[dtype.name]
    bits = bitcast(x, u32)
    size = bits & _u(0x7FFFFFFF)
    shift = 23 - m.mantissa
    odd = (size >> _u(shift)) & _u(1)
    usual = ((size + _u((1 << (shift - 1)) - 1) + odd) >> _u(shift)) - _u((127 - m.bias) << m.mantissa)
    # below the least normal number all are multiples of 2^(1 - bias - M): rounded as integers
    small = cast(unary("round", unary("abs", x) * const(2.0 ** (m.bias - 1 + m.mantissa), f32)), u32)
    code = select(size < _u((128 - m.bias) << 23), small, usual)
    beyond = {"nan": m.nan or 0, "inf": 0x7C, "max": m.largest}[m.overflow]
    over = _u(m.largest) < code
    sign = (bits >> _u(31)) << _u(m.bits - 1)
    if m.fnuz:  # -0 would be NaN, and NaN has no sign
        signed = select(eq(code, _u(0)), _u(0), code | sign)
        code = select(over, _u(beyond), signed)
    else:
        code = select(over, _u(beyond), code) | sign
    # NaN: its code, with the sign where NaN has one; where there is none, -0 as ml_dtypes has it
    not_a_number = _u(1 << (m.bits - 1)) if m.nan is None else _u(m.nan) if m.fnuz else _u(m.nan) | sign
    return bitcast(cast(select(ne(x, x), not_a_number, code), u8), dtype)


def _exponent_bits(x: Expr) -> Expr:
    """Of the power of two nearest to x, ties up; 2^-127 for less than that, 2^-126 for the denormals above. There is no zero:
    it gives NaN, as negative numbers do."""
    bits = bitcast(x, u32)
    denormal = select(eq(bits, _u(0)), _u(255), select(bits <= _u(0x00400000), _u(0), _u(1)))
    code = select(bits < _u(0x00800000), denormal, (bits + _u(1 << 22)) >> _u(23))
    return select(_u(0x7F7FFFFF) < bits, _u(255), code)


def mask(bits: int) -> int:
    """That many ones."""
    return (1 << bits) - 1


def _u(value: int) -> Expr:
    return const(value, u32)
