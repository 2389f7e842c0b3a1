"""exp, log, log1p, expm1, sin, cos, tanh, erf, sigmoid and pow of f32 values. Coefficients come from vecmath_fit.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ..ir.dtypes import f32, f64, i32
from ..ir.expr import Expr, bitcast, cast, const, eq, fma, maximum, minimum, ne, select, unary
from .vecmath_parts import bits, float32, integer, inverse_pi, magic, magnitude, number, pieces, scale, table, with_sign_of

# exp(r) = 1 + r + r^2 q(r) on |r| <= ln2 / 2; the relative error of r + r^2 q(r) against expm1 is small too
_EXP: Final = (0.4999999701976776, 0.1666654646396637, 0.04166743531823158, 0.00836627185344696, 0.0013870695838704705)
# log(1 + f) = f - f^2 / 2 + f^3 p(f) on sqrt(1/2) <= 1 + f <= sqrt(2)
_LOG: Final = (
    0.3333331346511841, -0.25000008940696716, 0.20002073049545288, -0.16667991876602173, 0.14220310747623444,
    -0.12406115233898163, 0.11883874982595444, -0.11671166867017746, 0.06749837100505829,
)  # fmt: skip
# erf(k w + r) for k = 0..15 and |r| <= w / 2: row j holds the sixteen coefficients of r^j
_ERF_WIDTH: Final = 17 / 64
# fmt: off
_ERF: Final = (
    (
        0.0, 0.2928232252597809, 0.5475284457206726, 0.7402369976043701, 0.867058277130127,
        0.9396533370018005, 0.975797712802887, 0.991450309753418, 0.9973459839820862, 0.9992774128913879,
        0.9998276829719543, 0.9999640583992004, 0.9999934434890747, 0.9999989867210388, 0.9999998807907104,
        1.0,
    ),
    (
        1.128379225730896, 1.0515081882476807, 0.8509140014648438, 0.5979623198509216, 0.36490288376808167,
        0.19337309896945953, 0.08898772299289703, 0.0355614498257637, 0.012340820394456387, 0.003718980820849538,
        0.0009732380858622491, 0.0002211716928286478, 4.364708729553968e-05, 7.479908617824549e-06, 1.1131471637781942e-06,
        1.438547201360052e-07,
    ),
    (
        -1.3881156519346405e-05, -0.2792947590351105, -0.4520418047904968, -0.4765036404132843, -0.3877142369747162,
        -0.25682011246681213, -0.14182353019714355, -0.06613248586654663, -0.0262299794703722, -0.00889984704554081,
        -0.0025785041507333517, -0.000644350831862539, -0.00013620102254208177, -3.896298221661709e-05, -1.5662704754504375e-05,
        -8.48207673698198e-06,
    ),
    (
        -0.3756135106086731, -0.301000714302063, -0.12355979532003403, 0.05381403863430023, 0.15299220383167267,
        0.16293995082378387, 0.12102757394313812, 0.07011020183563232, 0.0330376960337162, 0.012929800897836685,
        0.004253378603607416, 0.0011850178707391024, 0.0002810582227539271, 5.695574145647697e-05, 9.88841293292353e-06,
        1.473867314416566e-06,
    ),
    (
        -0.0060301367193460464, 0.1316758245229721, 0.18232393264770508, 0.1371593475341797, 0.048422448337078094,
        -0.022399405017495155, -0.04892628267407417, -0.04246919974684715, -0.026069091632962227, -0.012029632925987244,
        -0.005200309678912163, -0.0016395840793848038, -0.0005728071555495262, 0.0006497457507066429, 0.0006329239113256335,
        0.0004435381852090359,
    ),
    (
        0.13460306823253632, 0.07355858385562897, -0.000794757332187146, -0.059186842292547226, -0.06597324460744858,
        -0.03696684166789055, -0.005170220043510199, 0.010950732044875622, 0.012447441928088665, 0.008073578588664532,
        0.003828027518466115, 0.0014284666394814849, 0.00043332233326509595, 0.00010877890599658713, 2.284634865645785e-05,
        4.045058631163556e-06,
    ),
)
# fmt: on
# sin(r) = r + r^3 p(r^2), cos(r) = 1 - r^2 / 2 + r^4 p(r^2) on |r| <= pi / 4
_SIN: Final = (-0.1666666716337204, 0.008333379402756691, -0.0001985307171707973, 2.832680138453725e-06)
_COS: Final = (0.0416666679084301, -0.0013888980029150844, 2.482200761733111e-05, -2.8878449143121543e-07)
# log2(m) = s p(s^2), s = (m - 1) / (m + 1), on sqrt(1/2) <= m <= sqrt(2), in f64
_LOG2: Final = (
    2.8853900817779268, 0.961796693926969, 0.5770780158022797, 0.4121986908668057, 0.320589023378398, 0.2627743927938841,
    0.21085245458545954, 0.30367887755827144,
)  # fmt: skip
# 2^f on |f| <= 1/2, in f64
_EXP2: Final = (
    0.9999999999997619, 0.6931471805464929, 0.2402265069888731, 0.05550410939426425, 0.00961812854174774, 0.0013333451979410911,
    0.00015403852281428221, 1.5309759881560607e-05, 1.3175787272601284e-06,
)  # fmt: skip

# 2 / pi in pieces of 28 bits: piece k is a multiple of 2^-28(k+1). The product with a float's 24 bits is exact in f64.
_PIECES: Final = pieces(inverse_pi(1, 196), 28, 7)

_BIG_ANGLE: Final = 32768.0  # from here on sin and cos reduce their argument in f64


_LN2_HIGH: Final = 0.693145751953125  # 17 bits: a product with an exponent is exact
_LN2_LOW: Final = 1.42860682030941723212e-6
_HALF_PI: Final = (1.57079637050628662109375, -4.37113900018624283e-8, -1.71512451442690e-15)


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    total = number(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        total = fma(total, x, number(c, x))
    return total


def _exp_reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """n, r, q with x = n ln2 + r and exp(r) = 1 + r + r^2 q."""
    n = fma(x, number(1 / math.log(2), x), magic(x)) - magic(x)
    r = fma(n, number(-_LN2_LOW, x), fma(n, number(-_LN2_HIGH, x), x))
    return n, r, _horner(r, _EXP)


def exp(x: Expr) -> Expr:
    n, r, q = _exp_reduced(minimum(number(89.0, x), maximum(number(-105.0, x), x)))
    return scale(fma(fma(q, r, number(1.0, x)), r, number(1.0, x)), n)


def _expm1_reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """For -30 <= x <= 89: n, expm1(r), and 2^(n-1)."""
    n, r, q = _exp_reduced(x)
    small = r * fma(q, r, number(1.0, x))  # a product, so that -0 and denormals stay
    power = float32((bits(n + magic(x)) << integer(23, x)) + integer(126 << 23, x))
    return n, small, power


def expm1(x: Expr) -> Expr:
    n, small, power = _expm1_reduced(minimum(number(89.0, x), maximum(number(-30.0, x), x)))
    # 2^n expm1(r) + 2^n - 1, halved because 2^128 is not a float
    large = fma(power, small, power - number(0.5, x)) * number(2.0, x)
    return select(eq(n, number(0.0, x)), small, large)


def _log_split(x: Expr) -> tuple[Expr, Expr]:
    """Exponent (an i32) and mantissa bits in [sqrt(1/2), sqrt(2)) of a positive normal float."""
    shifted = bits(x) - integer(0x3F3504F3, x)
    e = shifted >> integer(23, x)
    return e, float32(bits(x) - (e << integer(23, x)))


def _log_sum(f: Expr, e: Expr) -> Expr:
    """log(1 + f) + e ln2, e a float."""
    square = f * f
    low = fma(square * f, _horner(f, _LOG), e * number(_LN2_LOW, f))
    low = fma(number(-0.5, f), square, low)
    return fma(e, number(_LN2_HIGH, f), f + low)


def _log_special(x: Expr, result: Expr) -> Expr:
    """Where x is not positive and finite: -inf at 0, NaN below, x itself for infinity and NaN."""
    special = select(eq(x, number(0.0, x)), number(-math.inf, x), select(x < number(0.0, x), number(math.nan, x), x))
    return select((number(0.0, x) < x) & (x < number(math.inf, x)), result, special)


def log(x: Expr) -> Expr:
    tiny = x < number(2.0**-126, x)
    e, m = _log_split(select(tiny, x * number(2.0**23, x), x))
    exponent = cast(e, f32) + select(tiny, number(-23.0, x), number(0.0, x))
    return _log_special(x, _log_sum(m - number(1.0, x), exponent))


def log1p(x: Expr) -> Expr:
    one = number(1.0, x)
    u = x + one
    t = u - one
    lost = (one - (u - t)) + (x - t)  # 1 + x = u + lost, exactly
    e, m = _log_split(u)
    back = float32((integer(127, x) - minimum(e, integer(100, x))) << integer(23, x))  # beyond 2^100 what was lost does not count
    result = _log_special(u, _log_sum(fma(lost, back, m - one), cast(e, f32)))
    return select(eq(x, number(0.0, x)), x, result)


def tanh(x: Expr) -> Expr:
    n, small, power = _expm1_reduced(minimum(number(20.0, x), magnitude(x)) * number(2.0, x))
    t = select(eq(n, number(0.0, x)), small, fma(power, small, power - number(0.5, x)) * number(2.0, x))
    return with_sign_of(x, t / (t + number(2.0, x)))


def sigmoid(x: Expr) -> Expr:
    e = exp(unary("neg", magnitude(x)))
    return select(x < number(0.0, x), e, number(1.0, x)) / (e + number(1.0, x))


def erf(x: Expr) -> Expr:
    a = minimum(number(4.0, x), magnitude(x))
    shifted = fma(a, number(1 / _ERF_WIDTH, x), magic(x))
    r = fma(shifted - magic(x), number(-_ERF_WIDTH, x), a)
    total = table(_ERF[-1], bits(shifted))
    for row in reversed(_ERF[:-1]):
        total = fma(total, r, table(row, bits(shifted)))
    return with_sign_of(x, total)


def _quadrant(r: Expr, q: Expr, cosine: bool, x: Expr) -> Expr:
    """sin(r + q pi/2), or the cosine, for |r| <= pi/4 and an i32 q."""
    z = r * r
    s = fma(r * z, _horner(z, _SIN), r)
    c = fma(z * z, _horner(z, _COS), fma(number(-0.5, x), z, number(1.0, x)))
    if cosine:
        q = q + integer(1, x)
    odd = ne(q & integer(1, x), integer(0, x))
    flip = (q & integer(2, x)) << integer(30, x)
    return float32(bits(select(odd, c, s)) ^ flip)


def _reduce_big(x: Expr) -> tuple[Expr, Expr]:
    """x = r + q pi/2 (q modulo 4) for any float: each product with a piece of 2/pi is exact, whole turns are dropped."""
    wide = cast(x, f64)
    rest = turns = number(0.0, wide)
    for piece in _PIECES:
        t = wide * number(piece, wide)
        n = unary("round", t)
        rest = rest + (t - n)
        carry = unary("round", rest)
        rest = rest - carry
        turns = turns + (n - number(4.0, wide) * unary("floor", n * number(0.25, wide))) + carry
    return cast(rest * number(math.pi / 2, wide), f32), cast(turns, i32)


def _circular(x: Expr, cosine: bool) -> Expr:
    shifted = fma(x, number(2 / math.pi, x), magic(x))
    n = shifted - magic(x)
    r = x
    for part in _HALF_PI:
        r = fma(n, number(-part, x), r)
    usual = _quadrant(r, bits(shifted), cosine, x)
    r, q = _reduce_big(x)
    big = number(_BIG_ANGLE, x) <= magnitude(x)
    result = Expr("select", (big, _quadrant(r, q, cosine, x), usual), f32, x.lanes, "rare")
    return result if cosine else select(eq(x, number(0.0, x)), x, result)


def sin(x: Expr) -> Expr:
    return _circular(x, cosine=False)


def cos(x: Expr) -> Expr:
    return _circular(x, cosine=True)


def _horner64(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Without fma: f64 has bits to spare here, and no row must emulate it."""
    total = number(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        total = total * x + number(c, x)
    return total


def power(x: Expr, y: Expr) -> Expr:
    """2^(y log2 |x|) in f64, rounded once; the special cases are those of C and numpy."""
    one, zero, infinity = number(1.0, x), number(0.0, x), number(math.inf, x)
    a = magnitude(x)
    tiny = a < number(2.0**-126, x)
    e, m = _log_split(select(tiny, a * number(2.0**23, x), a))
    exponent = cast(e + select(tiny, integer(-23, x), integer(0, x)), f64)
    wide = cast(m, f64)
    s = (wide - number(1.0, wide)) / (wide + number(1.0, wide))
    log2 = exponent + s * _horner64(s * s, _LOG2)
    log2 = select(eq(a, zero), number(-math.inf, wide), select(eq(a, infinity), number(math.inf, wide), log2))
    p = cast(y, f64) * log2
    p = select(eq(a, one), number(0.0, wide), p)  # also where y is infinite
    p = minimum(number(300.0, wide), maximum(number(-300.0, wide), p))
    n = unary("round", p)
    i64_bits = cast(cast(n, i32), "i64") << const(52, "i64", x.lanes)
    size = cast(_horner64(p - n, _EXP2) * bitcast(i64_bits + const(1023 << 52, "i64", x.lanes), f64), f32)

    whole = eq(unary("floor", y), y)
    half = y * number(0.5, y)
    odd = whole & ne(unary("floor", half), half)
    negative = bits(x) < integer(0, x)
    size = select(negative & odd, unary("neg", size), size)
    undefined = (x < zero) & (a < infinity) & unary("not", whole)
    size = select(undefined, number(math.nan, x), size)
    size = select(ne(x, x) | ne(y, y), x + y, size)
    return select(eq(x, one) | eq(y, zero), one, size)
