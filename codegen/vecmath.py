"""Our own vector math: exp, log, log1p, expm1, sin, cos, tanh, erf, sigmoid and pow as primitive expressions.

The same expressions serve every lane count and every target row, so a result does not depend on either: a row without FMA
emulates it to the bit. f16 and bf16 are computed in f32 and rounded. The coefficients come from vecmath_fit.py.

Greatest errors in units of the last place over all floats, NaN, infinities, denormals and -0 included, are in BOUNDS;
tests/codegen/test_vecmath.py sweeps every exponent, benchmarks/vecmath_sweep.py every float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from ..ir.dtypes import DType, bf16, f16, f32, f64, i32
from ..ir.errors import CompileError
from ..ir.expr import MATH, Expr, bitcast, cast, const, eq, fma, maximum, minimum, ne, rebuild, select, unary

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
_TWO_OVER_PI_BITS: Final = 0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C439041FE5163ABDEBBC561
_PIECES: Final = tuple(((_TWO_OVER_PI_BITS >> (256 - 28 * (k + 1))) & ((1 << 28) - 1)) * 2.0 ** (-28 * (k + 1)) for k in range(7))

# Greatest error in units of the last place over all f32 (benchmarks/vecmath_sweep.py); pow over random pairs.
BOUNDS: Final = {
    "exp": 1.0, "log": 1.0, "log1p": 1.5, "expm1": 2.2, "sin": 1.7, "cos": 1.7, "tanh": 3.2, "erf": 2.4,
    "sigmoid": 2.5, "pow": 0.6,
}  # fmt: skip

_MAGIC: Final = 1.5 * 2.0**23  # added to |x| < 2^22, leaves x rounded to an integer at the bottom of the mantissa
_BIG_ANGLE: Final = 32768.0  # from here on sin and cos reduce their argument in f64


_LN2_HIGH: Final = 0.693145751953125  # 17 bits: a product with an exponent is exact
_LN2_LOW: Final = 1.42860682030941723212e-6
_HALF_PI: Final = (1.57079637050628662109375, -4.37113900018624283e-8, -1.71512451442690e-15)


def _c(value: float, like: Expr) -> Expr:
    return const(value, like.dtype, like.lanes)


def _i(value: int, like: Expr) -> Expr:
    return const(value, i32, like.lanes)


def _bits(x: Expr) -> Expr:
    return bitcast(x, i32)


def _float(x: Expr) -> Expr:
    return bitcast(x, f32)


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    total = _c(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        total = fma(total, x, _c(c, x))
    return total


def _sign_of(x: Expr, result: Expr) -> Expr:
    """A non-negative result with x's sign."""
    return _float(_bits(result) | (_bits(x) & _i(-0x80000000, x)))


def _abs(x: Expr) -> Expr:
    return unary("abs", x)


def scale(x: Expr, n: Expr) -> Expr:
    """x * 2^n, rounded once, for 0.5 <= x < 2 (or NaN) and an integral float n with |n| < 256."""
    return Expr("scale", (x, n), x.dtype, x.lanes)


def scale_steps(e: Expr) -> Expr:
    """`scale` in integer arithmetic, for targets without an instruction: by 2^floor(n/2), exact, then by the rest."""
    x, n = e.args
    k = _bits(n + _c(_MAGIC, n))  # n in the low bits
    half = (k << _i(22, n)) & _i(-0x800000, n)
    one = _i(127 << 23, n)
    return x * _float(half + one) * _float((k << _i(23, n)) - half + one)


def _exp_reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """n, r, q with x = n ln2 + r and exp(r) = 1 + r + r^2 q."""
    n = fma(x, _c(1 / math.log(2), x), _c(_MAGIC, x)) - _c(_MAGIC, x)
    r = fma(n, _c(-_LN2_LOW, x), fma(n, _c(-_LN2_HIGH, x), x))
    return n, r, _horner(r, _EXP)


def exp(x: Expr) -> Expr:
    n, r, q = _exp_reduced(minimum(_c(89.0, x), maximum(_c(-105.0, x), x)))
    return scale(fma(fma(q, r, _c(1.0, x)), r, _c(1.0, x)), n)


def _expm1_reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """For -30 <= x <= 89: n, expm1(r), and 2^(n-1)."""
    n, r, q = _exp_reduced(x)
    small = r * fma(q, r, _c(1.0, x))  # a product, so that -0 and denormals stay
    power = _float((_bits(n + _c(_MAGIC, x)) << _i(23, x)) + _i(126 << 23, x))
    return n, small, power


def expm1(x: Expr) -> Expr:
    n, small, power = _expm1_reduced(minimum(_c(89.0, x), maximum(_c(-30.0, x), x)))
    # 2^n expm1(r) + 2^n - 1, halved because 2^128 is not a float
    large = fma(power, small, power - _c(0.5, x)) * _c(2.0, x)
    return select(eq(n, _c(0.0, x)), small, large)


def _log_split(x: Expr) -> tuple[Expr, Expr]:
    """Exponent (an i32) and mantissa bits in [sqrt(1/2), sqrt(2)) of a positive normal float."""
    shifted = _bits(x) - _i(0x3F3504F3, x)
    e = shifted >> _i(23, x)
    return e, _float(_bits(x) - (e << _i(23, x)))


def _log_sum(f: Expr, e: Expr) -> Expr:
    """log(1 + f) + e ln2, e a float."""
    square = f * f
    low = fma(square * f, _horner(f, _LOG), e * _c(_LN2_LOW, f))
    low = fma(_c(-0.5, f), square, low)
    return fma(e, _c(_LN2_HIGH, f), f + low)


def _log_special(x: Expr, result: Expr) -> Expr:
    """Where x is not positive and finite: -inf at 0, NaN below, x itself for infinity and NaN."""
    special = select(eq(x, _c(0.0, x)), _c(-math.inf, x), select(x < _c(0.0, x), _c(math.nan, x), x))
    return select((_c(0.0, x) < x) & (x < _c(math.inf, x)), result, special)


def log(x: Expr) -> Expr:
    tiny = x < _c(2.0**-126, x)
    e, m = _log_split(select(tiny, x * _c(2.0**23, x), x))
    number = cast(e, f32) + select(tiny, _c(-23.0, x), _c(0.0, x))
    return _log_special(x, _log_sum(m - _c(1.0, x), number))


def log1p(x: Expr) -> Expr:
    one = _c(1.0, x)
    u = x + one
    t = u - one
    lost = (one - (u - t)) + (x - t)  # 1 + x = u + lost, exactly
    e, m = _log_split(u)
    back = _float((_i(127, x) - minimum(e, _i(100, x))) << _i(23, x))  # beyond 2^100 what was lost does not count
    result = _log_special(u, _log_sum(fma(lost, back, m - one), cast(e, f32)))
    return select(eq(x, _c(0.0, x)), x, result)


def tanh(x: Expr) -> Expr:
    n, small, power = _expm1_reduced(minimum(_c(20.0, x), _abs(x)) * _c(2.0, x))
    t = select(eq(n, _c(0.0, x)), small, fma(power, small, power - _c(0.5, x)) * _c(2.0, x))
    return _sign_of(x, t / (t + _c(2.0, x)))


def sigmoid(x: Expr) -> Expr:
    e = exp(unary("neg", _abs(x)))
    return select(x < _c(0.0, x), e, _c(1.0, x)) / (e + _c(1.0, x))


def table(entries: Sequence[float], index: Expr) -> Expr:
    """entries[index mod 16], sixteen f32 constants that live in registers; the index is an i32."""
    return Expr("table", (index,), f32, index.lanes, tuple(entries))


def erf(x: Expr) -> Expr:
    a = minimum(_c(4.0, x), _abs(x))
    magic = fma(a, _c(1 / _ERF_WIDTH, x), _c(_MAGIC, x))
    r = fma(magic - _c(_MAGIC, x), _c(-_ERF_WIDTH, x), a)
    total = table(_ERF[-1], _bits(magic))
    for row in reversed(_ERF[:-1]):
        total = fma(total, r, table(row, _bits(magic)))
    return _sign_of(x, total)


def _quadrant(r: Expr, q: Expr, cosine: bool, x: Expr) -> Expr:
    """sin(r + q pi/2), or the cosine, for |r| <= pi/4 and an i32 q."""
    z = r * r
    s = fma(r * z, _horner(z, _SIN), r)
    c = fma(z * z, _horner(z, _COS), fma(_c(-0.5, x), z, _c(1.0, x)))
    if cosine:
        q = q + _i(1, x)
    odd = ne(q & _i(1, x), _i(0, x))
    flip = (q & _i(2, x)) << _i(30, x)
    return _float(_bits(select(odd, c, s)) ^ flip)


def _reduce_big(x: Expr) -> tuple[Expr, Expr]:
    """x = r + q pi/2 (q modulo 4) for any float: each product with a piece of 2/pi is exact, whole turns are dropped."""
    wide = cast(x, f64)
    rest = turns = _c(0.0, wide)
    for piece in _PIECES:
        t = wide * _c(piece, wide)
        n = unary("round", t)
        rest = rest + (t - n)
        carry = unary("round", rest)
        rest = rest - carry
        turns = turns + (n - _c(4.0, wide) * unary("floor", n * _c(0.25, wide))) + carry
    return cast(rest * _c(math.pi / 2, wide), f32), cast(turns, i32)


def _circular(x: Expr, cosine: bool) -> Expr:
    magic = fma(x, _c(2 / math.pi, x), _c(_MAGIC, x))
    n = magic - _c(_MAGIC, x)
    r = x
    for part in _HALF_PI:
        r = fma(n, _c(-part, x), r)
    usual = _quadrant(r, _bits(magic), cosine, x)
    r, q = _reduce_big(x)
    big = _c(_BIG_ANGLE, x) <= _abs(x)
    result = Expr("select", (big, _quadrant(r, q, cosine, x), usual), f32, x.lanes, "rare")
    return result if cosine else select(eq(x, _c(0.0, x)), x, result)


def sin(x: Expr) -> Expr:
    return _circular(x, cosine=False)


def cos(x: Expr) -> Expr:
    return _circular(x, cosine=True)


def _horner64(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Without fma: f64 has bits to spare here, and no row must emulate it."""
    total = _c(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        total = total * x + _c(c, x)
    return total


def power(x: Expr, y: Expr) -> Expr:
    """2^(y log2 |x|) in f64, rounded once; the special cases are those of C and numpy."""
    one, zero, infinity = _c(1.0, x), _c(0.0, x), _c(math.inf, x)
    a = _abs(x)
    tiny = a < _c(2.0**-126, x)
    e, m = _log_split(select(tiny, a * _c(2.0**23, x), a))
    exponent = cast(e + select(tiny, _i(-23, x), _i(0, x)), f64)
    wide = cast(m, f64)
    s = (wide - _c(1.0, wide)) / (wide + _c(1.0, wide))
    log2 = exponent + s * _horner64(s * s, _LOG2)
    log2 = select(eq(a, zero), _c(-math.inf, wide), select(eq(a, infinity), _c(math.inf, wide), log2))
    p = cast(y, f64) * log2
    p = select(eq(a, one), _c(0.0, wide), p)  # also where y is infinite
    p = minimum(_c(300.0, wide), maximum(_c(-300.0, wide), p))
    n = unary("round", p)
    i64_bits = cast(cast(n, i32), "i64") << const(52, "i64", x.lanes)
    size = cast(_horner64(p - n, _EXP2) * bitcast(i64_bits + const(1023 << 52, "i64", x.lanes), f64), f32)

    whole = eq(unary("floor", y), y)
    half = y * _c(0.5, y)
    odd = whole & ne(unary("floor", half), half)
    negative = _bits(x) < _i(0, x)
    size = select(negative & odd, unary("neg", size), size)
    undefined = (x < zero) & (a < infinity) & unary("not", whole)
    size = select(undefined, _c(math.nan, x), size)
    size = select(ne(x, x) | ne(y, y), x + y, size)
    return select(eq(x, one) | eq(y, zero), one, size)


_UNARY: Final[dict[str, Callable[[Expr], Expr]]] = {
    "exp": exp, "log": log, "log1p": log1p, "expm1": expm1, "sin": sin, "cos": cos, "tanh": tanh, "erf": erf, "sigmoid": sigmoid,
}  # fmt: skip


def expand(e: Expr, memo: dict[Expr, Expr] | None = None) -> Expr:
    """The expression with every math function written in primitive operations (and `scale`).

    Raises CompileError for a function of a dtype that has no expansion (f64, integers).
    """
    done = {} if memo is None else memo
    found = done.get(e)
    if found is not None:
        return found
    stack = [e]
    while stack:
        x = stack[-1]
        if x in done:
            stack.pop()
            continue
        waiting = [a for a in x.args if a not in done]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        args = tuple(done[a] for a in x.args)
        if x.op in MATH or x.op == "pow":
            done[x] = _expanded(x.op, x.dtype, args)
        elif all(a is b for a, b in zip(args, x.args, strict=True)):
            done[x] = x
        else:
            done[x] = Expr(x.op, args, x.dtype, x.lanes, x.attr) if x.attr is not None else rebuild(x, args)
    return done[e]


def _expanded(op: str, dtype: DType, args: tuple[Expr, ...]) -> Expr:
    if dtype in (f16, bf16):
        return cast(_expanded(op, f32, tuple(cast(a, f32) for a in args)), dtype)
    if dtype is not f32:
        raise CompileError(f"{op} of {dtype} has no compiled form; cast to f32 (or f16, bf16) around it")
    return power(*args) if op == "pow" else _UNARY[op](args[0])
