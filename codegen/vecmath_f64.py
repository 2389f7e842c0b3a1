"""exp, log, log1p, expm1, sin, cos, tanh, erf, sigmoid and pow of f64 values.

Without fused multiply-adds: a row without them could not emulate f64's, and results must not depend on the row. Where a
product must be exact it is split (Dekker, "A floating-point technique for extending the available precision", 1971).
Polynomials are Taylor series long enough for their interval; the far part of erf is fitted by vecmath_fit.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from ..ir.dtypes import f64, i32, i64, u32, u64
from ..ir.expr import Expr, cast, const, eq, maximum, minimum, ne, select, unary
from .vecmath_parts import bits, float64, integer, inverse_pi, magic, magnitude, number, pi_digits, scale, table, with_sign_of

_EXP: Final = tuple(1 / math.factorial(k) for k in range(2, 15))  # (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2
_ATANH: Final = tuple(2 / (2 * k + 3) for k in range(11))  # (2 atanh(s) - 2 s) / s^3 in s^2, on |s| <= 0.172
_SIN: Final = tuple((-1) ** (k + 1) / math.factorial(2 * k + 3) for k in range(9))  # (sin(r) - r) / r^3 in r^2
_COS: Final = tuple((-1) ** k / math.factorial(2 * k + 4) for k in range(9))  # (cos(r) - 1 + r^2 / 2) / r^4 in r^2
_ERF: Final = tuple(
    (-1) ** k * 2 / math.sqrt(math.pi) / (math.factorial(k) * (2 * k + 1)) for k in range(20)
)  # erf(x) / x in x^2

_LN2_HIGH: Final = math.floor(math.log(2) * 2.0**32) / 2.0**32  # 32 bits: a product with an exponent is exact
_LN2_LOW: Final = 1.9082149292705877e-10
_TURNS: Final = inverse_pi(3, 1280)  # the digits of 1 / (2 pi)
_WORDS: Final = tuple([0] + [(_TURNS >> (1280 - 32 * (k + 1))) & 0xFFFFFFFF for k in range(40)] + [0] * 23)
_BIG_ANGLE: Final = 2.0**20


def _half_pi(widths: tuple[int, ...]) -> tuple[float, ...]:
    """pi / 2 as a sum of floats with so many bits each."""
    count = 300
    out: list[float] = []
    rest = pi_digits(count)
    for width in widths:
        drop = max(rest.bit_length() - width, 0)
        top = rest >> drop << drop
        out.append(top / (1 << (count + 1)))
        rest -= top
    return tuple(out)


_HALF_PI: Final = _half_pi((33, 33, 33, 53))  # a product of the first three with n < 2^20 is exact


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    total = number(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        total = total * x + number(c, x)
    return total


def _exp_reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """n, r, q with x = n ln2 + r and exp(r) = 1 + r + r^2 q."""
    n = (x * number(1 / math.log(2), x) + magic(x)) - magic(x)
    r = (x - n * number(_LN2_HIGH, x)) - n * number(_LN2_LOW, x)
    return n, r, _horner(r, _EXP)


def exp(x: Expr) -> Expr:
    return exp_below(minimum(number(710.0, x), x))


def exp_below(x: Expr) -> Expr:
    """exp of an x that is not above 710."""
    n, r, q = _exp_reduced(maximum(number(-750.0, x), x))
    return scale(number(1.0, x) + (r + r * r * q), n)


def _expm1_core(x: Expr) -> Expr:
    """For -50 <= x <= 710, -0 and denormals included."""
    n, r, q = _exp_reduced(x)
    small = r * (r * q + number(1.0, x))
    power = float64((bits(n + magic(x)) << integer(52, x)) + integer(1022 << 52, x))  # 2^(n-1)
    large = (power * small + (power - number(0.5, x))) * number(2.0, x)
    return select(eq(n, number(0.0, x)), small, large)


def expm1(x: Expr) -> Expr:
    return _expm1_core(minimum(number(710.0, x), maximum(number(-50.0, x), x)))


def _log_split(x: Expr) -> tuple[Expr, Expr]:
    """Exponent (an i64) and mantissa in [sqrt(1/2), sqrt(2)) of a positive normal number."""
    e = (bits(x) - integer(0x3FE6A09E667F3BCD, x)) >> integer(52, x)
    return e, float64(bits(x) - (e << integer(52, x)))


def _log_sum(f: Expr, e: Expr) -> Expr:
    """log(1 + f) + e ln2. With s = f / (2 + f): log(1 + f) = 2 atanh(s) = f - (f^2/2 - s (f^2/2 + R)), R = 2 atanh(s)/s - 2."""
    s = f / (f + number(2.0, f))
    z = s * s
    square = f * f * number(0.5, f)
    low = s * (square + z * _horner(z, _ATANH)) + e * number(_LN2_LOW, f)
    return e * number(_LN2_HIGH, f) - ((square - low) - f)


def _log_special(x: Expr, result: Expr) -> Expr:
    zero = number(0.0, x)
    special = select(eq(x, zero), number(-math.inf, x), select(x < zero, number(math.nan, x), x))
    return select((zero < x) & (x < number(math.inf, x)), result, special)


def log(x: Expr) -> Expr:
    tiny = x < number(2.0**-1022, x)
    e, m = _log_split(select(tiny, x * number(2.0**54, x), x))
    exponent = cast(cast(e, i32), f64) + select(tiny, number(-54.0, x), number(0.0, x))
    return _log_special(x, _log_sum(m - number(1.0, x), exponent))


def log1p(x: Expr) -> Expr:
    one = number(1.0, x)
    u = x + one
    t = u - one
    lost = (one - (u - t)) + (x - t)  # 1 + x = u + lost, exactly
    e, m = _log_split(u)
    back = float64((integer(1023, x) - minimum(e, integer(1000, x))) << integer(52, x))
    result = _log_special(u, _log_sum((m - one) + lost * back, cast(cast(e, i32), f64)))
    return select(eq(x, number(0.0, x)), x, result)


def tanh(x: Expr) -> Expr:
    t = _expm1_core(minimum(number(25.0, x), magnitude(x)) * number(2.0, x))
    return with_sign_of(x, t / (t + number(2.0, x)))


def sigmoid(x: Expr) -> Expr:
    e = exp(unary("neg", magnitude(x)))
    return select(x < number(0.0, x), e, number(1.0, x)) / (e + number(1.0, x))


def _quadrant(r: Expr, q: Expr, cosine: bool) -> Expr:
    """sin(r + q pi/2), or the cosine, for |r| <= pi/4 and an i64 q."""
    z = r * r
    s = r + r * z * _horner(z, _SIN)
    half = z * number(0.5, r)
    w = number(1.0, r) - half
    c = w + (((number(1.0, r) - w) - half) + z * z * _horner(z, _COS))
    if cosine:
        q = q + integer(1, q)
    odd = ne(q & integer(1, q), integer(0, q))
    return float64(bits(select(odd, c, s)) ^ ((q & integer(2, q)) << integer(62, q)))


def _reduce_big(x: Expr) -> tuple[Expr, Expr]:
    """|x| = r + q pi/2 (q modulo 4) for |x| >= 2^-33 of any size (Payne and Hanek, 1983).

    |x| = m 2^s with a 53-bit m. The digits of 1/(2 pi) whose weight times 2^s is a whole turn are left out; five words of
    32 bits that follow, times m, give the turn's fraction to 2^-128.
    """

    def word(value: int) -> Expr:
        return const(value, u64, x.lanes)

    raw = bits(x) & integer((1 << 63) - 1, x)
    position = (raw >> integer(52, x)) - integer(1075 - 32, x)  # s + 32, where the table starts with 32 zeros
    first = cast(position >> integer(5, x), i32)
    shift = cast(position & integer(31, x), u64)
    words = [cast(table(_WORDS, first + const(k, i32, x.lanes), u32), u64) for k in range(6)]
    low = word(0xFFFFFFFF)
    window = [(((a << word(32)) | b) >> (word(32) - shift)) & low for a, b in pairwise(words)]
    m = cast((raw & integer((1 << 52) - 1, x)) | integer(1 << 52, x), u64)
    m0, m1 = m & low, m >> word(32)
    c = [window[k] * m0 for k in range(5)]
    d = [window[k] * m1 for k in range(5)]
    column = [(c[k] & low) + (d[k + 1] & low) + (c[k + 1] >> word(32)) for k in range(4)]
    column = [column[k] + (d[k + 2] >> word(32)) if k < 3 else column[k] for k in range(4)]
    for k in (3, 2, 1):
        column[k - 1] = column[k - 1] + (column[k] >> word(32))
    turn = cast(((column[0] & low) << word(32)) | (column[1] & low), i64)
    q = cast(cast(turn + integer(1 << 61, turn), u64) >> word(62), i64)  # quarters, rounded
    rest = turn - (q << integer(62, turn))

    def part(value: Expr, weight: int) -> Expr:
        return cast(value, f64) * number(2.0**-weight, x)

    high = part(rest >> integer(32, turn), 32) + part(rest & integer(0xFFFFFFFF, turn), 64)
    tail = part(cast(column[2] & low, i64), 96) + part(cast(column[3] & low, i64), 128)
    # infinity and NaN have no angle: x - x is NaN for them, and 0 otherwise
    return (high + tail) * number(2 * math.pi, x) + (x - x), q


def _circular(x: Expr, cosine: bool) -> Expr:
    shifted = x * number(2 / math.pi, x) + magic(x)
    n = shifted - magic(x)
    r = x
    for part in _HALF_PI:
        r = r - n * number(part, x)
    usual = _quadrant(r, bits(shifted), cosine)
    r, q = _reduce_big(x)
    rare = _quadrant(r, q, cosine)
    if not cosine:
        rare = float64(bits(rare) ^ (bits(x) & integer(-(1 << 63), x)))
    big = number(_BIG_ANGLE, x) <= magnitude(x)
    result = Expr("select", (big, rare, usual), f64, x.lanes, "rare")
    return result if cosine else select(eq(x, number(0.0, x)), x, result)


def sin(x: Expr) -> Expr:
    return _circular(x, cosine=False)


def cos(x: Expr) -> Expr:
    return _circular(x, cosine=True)


# -- pairs: a number as an unevaluated sum of two, which hold about 106 bits ---------------------------------------------

_Pair = tuple[Expr, Expr]


def _two_sum(a: Expr, b: Expr) -> _Pair:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Expr, b: Expr) -> _Pair:
    """a * b exactly, for products and factors between about 2^-900 and 2^900."""

    def halves(x: Expr) -> _Pair:
        t = x * number(134217729.0, x)  # 2^27 + 1
        high = t - (t - x)
        return high, x - high

    p = a * b
    (a1, a0), (b1, b0) = halves(a), halves(b)
    return p, ((a1 * b1 - p) + a1 * b0 + a0 * b1) + a0 * b0


def _times(a: _Pair, b: _Pair) -> _Pair:
    p, e = _two_product(a[0], b[0])
    return _quick_sum(p, e + (a[0] * b[1] + a[1] * b[0]))


def _quick_sum(a: Expr, b: Expr) -> _Pair:
    """a + b as a pair, for |a| >= |b|."""
    s = a + b
    return s, b - (s - a)


def _constant_pair(value: tuple[float, float], like: Expr) -> _Pair:
    return number(value[0], like), number(value[1], like)


_TWO_OVER_LN2: Final = (2.8853900817779268, 4.0710547481862066e-17)
_THIRD: Final = (0.3333333333333333, 1.850371707708594e-17)


def power(x: Expr, y: Expr) -> Expr:
    """2^(y log2 |x|), the logarithm and the product in pairs; the special cases are those of C and numpy."""
    one, zero, infinity = number(1.0, x), number(0.0, x), number(math.inf, x)
    a = magnitude(x)
    tiny = a < number(2.0**-1022, x)
    e, m = _log_split(select(tiny, a * number(2.0**54, x), a))
    exponent = cast(cast(e, i32), f64) + select(tiny, number(-54.0, x), zero)
    # log2 m = 2 / ln2 (s + s^3 / 3 + s^5 (1/5 + ...)), s = (m - 1) / (m + 1) as a pair
    top = m - one
    below, below_low = _two_sum(m, one)
    s = top / below
    product, product_low = _two_product(s, below)
    s_low = (((top - product) - product_low) - s * below_low) / below
    z, z_low = _two_product(s, s)
    square = (z, z_low + number(2.0, x) * s * s_low)
    cubic = _times(_times((s, s_low), square), _constant_pair(_THIRD, x))
    # _ATANH holds 2/(2k + 3): the terms from s^5 on are s z^2 (1/5 + z/7 + ...)
    fifth = s * z * z * _horner(z, [c / 2 for c in _ATANH[1:]])
    high, low = _quick_sum(s, cubic[0])
    series = _quick_sum(high, low + (s_low + (cubic[1] + fifth)))
    log2 = _times(series, _constant_pair(_TWO_OVER_LN2, x))
    high, low = _two_sum(exponent, log2[0])
    log2 = _quick_sum(high, low + log2[1])
    # Beyond 2^80 an exponent only says overflow, underflow or 1; the splitting of factors must not overflow.
    limit = number(2.0**80, x)
    bounded = minimum(limit, maximum(unary("neg", limit), y))
    p, p_low = _times(log2, (bounded, zero))
    rough = y * select(eq(a, zero), unary("neg", infinity), infinity)
    p = select(eq(a, zero) | eq(a, infinity), rough, select(eq(a, one), zero, p))
    p_low = select((a < infinity) & ne(a, zero) & ne(a, one) & (magnitude(p) < number(1100.0, x)), p_low, zero)
    p = minimum(number(1100.0, x), maximum(number(-1200.0, x), p))
    n = (p + magic(x)) - magic(x)
    r = ((p - n) + p_low) * number(math.log(2), x)
    size = scale(one + (r + r * r * _horner(r, _EXP)), n)

    whole = eq(unary("floor", y), y)
    half = y * number(0.5, x)
    odd = whole & ne(unary("floor", half), half)
    size = select((bits(x) < integer(0, x)) & odd, unary("neg", size), size)
    size = select((x < zero) & (a < infinity) & unary("not", whole), number(math.nan, x), size)
    size = select(ne(x, x) | ne(y, y), x + y, size)
    return select(eq(x, one) | eq(y, zero), one, size)


# erfc(a) exp(a^2) (1 + 2a) on 1 <= a <= 6 in u = 2.2 - 9.6 / (a + 2), fitted relative to what erf can show of it
_ERFC: Final = (
    1.2681873667714256, -0.04881044084349701, -0.022103617094624356, 0.010526822289572923, -0.0017071240547115354,
    -4.4420416066157274e-05, 4.7938699263452766e-05, 4.429322470247772e-07, -1.5605898834704918e-06, -8.228462498843182e-08,
    5.826007970006762e-08, 1.2685315852709013e-08, 8.388192109155971e-10,
)  # fmt: skip


def erf(x: Expr) -> Expr:
    a = maximum(number(1.0, x), minimum(number(6.0, x), magnitude(x)))
    near = x * _horner(x * x, _ERF)
    u = number(2.2, x) - number(9.6, x) / (a + number(2.0, x))
    size = exp(unary("neg", a * a)) * _horner(u, _ERFC) / (number(2.0, x) * a + number(1.0, x))
    return select(magnitude(x) < number(1.0, x), near, with_sign_of(x, number(1.0, x) - size))
