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
# 2^f = 1 + f p(f) on |f| <= 1/2
_POWER: Final = (0.6931470036506653, 0.24022246897220612, 0.0555071160197258, 0.009671300649642944, 0.001326927449554205)
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
# tanh(centre + r) in sixteen segments of 1 + _TANH_SLOPE |x|, four an octave: rows of the coefficients of r^0, r^2 ... r^5
_TANH_SLOPE: Final = 1.64
_TANH_TOP: Final = 9.05  # from 9.02 on the nearest float is 1
# fmt: off
_TANH_CENTRES: Final = (
    0.0, 0.22866077721118927, 0.38109737634658813, 0.5335285067558289, 0.7621917128562927,
    1.0670948028564453, 1.3719329833984375, 1.676829218864441, 2.134192705154419, 2.743913173675537,
    3.3536267280578613, 3.9634311199188232, 4.878059387207031, 6.097465515136719, 7.3169779777526855,
    8.488605499267578,
)
_TANH: Final = (
    (
        0.0, 0.22475716471672058, 0.3636600971221924, 0.4880736768245697, 0.6423661112785339,
        0.7883641719818115, 0.8791319727897644, 0.9324488639831543, 0.9723780751228333, 0.9917604327201843,
        0.9975589513778687, 0.9992784261703491, 0.9998841285705566, 0.9999898672103882, 0.9999991059303284,
        0.9999999403953552,
    ),
    (
        8.354690521628072e-07, -0.21340247988700867, -0.3155657947063446, -0.371806263923645, -0.37730395793914795,
        -0.29838597774505615, -0.19967710971832275, -0.12172172963619232, -0.05297406390309334, -0.01627401076257229,
        -0.004863501526415348, -0.001441356260329485, -0.00023109813628252596, -2.0209721697028726e-05, -1.7637220253163832e-06,
        -1.691727078423355e-07,
    ),
    (
        -0.3333823084831238, -0.26853838562965393, -0.17450493574142456, -0.07245640456676483, 0.0465691015124321,
        0.10907526314258575, 0.09983396530151367, 0.06998632848262787, 0.033354196697473526, 0.010670790448784828,
        0.003226647386327386, 0.0009595584124326706, 0.00015412936045322567, 1.3122216842020862e-05, 9.293225957662798e-07,
        7.487171842512907e-07,
    ),
    (
        0.0008518944378010929, 0.13096299767494202, 0.1681380420923233, 0.15897640585899353, 0.0958637222647667,
        0.0140882832929492, -0.020850973203778267, -0.024585437029600143, -0.014843731187283993, -0.005228974390774965,
        -0.0016235753428190947, -0.00048654843703843653, -8.25573006295599e-05, -7.080028808559291e-06, -6.112647383815784e-07,
        -5.951382675561945e-08,
    ),
    (
        0.12838217616081238, 0.08195449411869049, 0.017789142206311226, -0.03663315996527672, -0.06321092694997787,
        -0.03868629038333893, -0.009807014837861061, 0.0024943531025201082, 0.004410592373460531, 0.0019406387582421303,
        0.0006349965697154403, 0.00019310467178002, 3.2767191441962495e-05, 3.4606241570145357e-06, 7.568994533357909e-07,
        -1.5875838244028273e-06,
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
_LN2: Final = 0.693147182464599609375  # as a float
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


def exp_below(x: Expr) -> Expr:
    """exp of a rounded difference x <= 0, or of its product with a positive constant; 1 at 0.

    It is 2^n 2^f with log2(e) and the constant in one factor, which makes an error of |x| 2^-25; the rounding of the difference
    has changed it by up to |x| 2^-24 before. The polynomial adds up to three units of the last place.
    """
    c = 1.0
    if x.op == "mul" and x.args[1].is_const and 2.0**-60 < x.args[1].attr < 2.0**60:
        x, c = x.args[0], float(x.args[1].attr)
    limited = maximum(number(-105.0 / c, x), x)
    rate = number(c / math.log(2), x)
    n = fma(limited, rate, magic(x)) - magic(x)
    f = fma(limited, rate, -n)
    return scale(fma(_horner(f, _POWER), f, number(1.0, x)), n)


def expm1(x: Expr) -> Expr:
    n, r, q = _exp_reduced(minimum(number(89.0, x), maximum(number(-30.0, x), x)))
    small = r * fma(q, r, number(1.0, x))  # a product, so that -0 and denormals stay
    power = float32((bits(n + magic(x)) << integer(23, x)) + integer(126 << 23, x))  # 2^(n-1)
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
    """By tables, without a division: shorter than an exponential's chain, and nearer."""
    one = number(1.0, x)
    a = minimum(number(_TANH_TOP, x), magnitude(x))
    octave = bits(fma(a, number(_TANH_SLOPE, x), one)) >> integer(21, x)  # the exponent and two bits; those of 1.0 end in 12

    def entry(row: Sequence[float]) -> Expr:
        return table((*row[4:], *row[:4]), octave)

    r = a - entry(_TANH_CENTRES)
    value, *c = (entry(row) for row in _TANH)
    slope = fma(unary("neg", value), value, one)  # 1 - tanh^2
    square = r * r
    high = fma(c[3], square, fma(c[2], r, c[1]))
    return with_sign_of(x, fma(fma(high, square, fma(c[0], r, slope)), r, value))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e) or e / (1 + e) with e = exp(-|x|) = 2^n (1 + t).

    Both parts of the fraction are made 2^63 times as large, so that e is a normal number and only the quotient is rounded to a
    denormal. n + 63 as an exponent comes out of the addend that rounds x / ln2. x - n float(ln2) is exact; the error of
    float(ln2) is put right where r stands alone, to within 1.4 ulp of e where |x| is greatest.
    """
    a = maximum(number(-105.0, x), unary("neg", magnitude(x)))
    addend = number(1.5 * 2.0**23 + 127 + 63, x)
    shifted = fma(a, number(1 / math.log(2), x), addend)
    power = float32(bits(shifted) << integer(23, x))  # 2^(n + 63)
    n = shifted - addend
    near = fma(n, number(-_LN2, x), a)
    r = fma(n, number(_LN2 - math.log(2), x), near)
    square = near * near
    high = fma(fma(number(_EXP[4], x), near, number(_EXP[3], x)), near, number(_EXP[2], x))
    t = fma(fma(high, square, fma(number(_EXP[1], x), near, number(_EXP[0], x))), square, r)
    e, one = fma(t, power, power), number(2.0**63, x)
    return select(x < number(0.0, x), e, one) / (e + one)


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
