"""Ops of one element, and arithmetic of corresponding elements. Shapes broadcast as in numpy; dtypes are equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from ....ir.dims import Dim
from ....ir.dtypes import bool_, f32, f64, i32, i64
from ... import activations as act
from ... import elementwise as ew
from ...movement import full, reshape
from ...tensor import Tensor
from ..call import Call
from ..description import Array
from ..registry import fold, op
from ..values import Value


def _unary(name: str, fn: Callable[[Tensor], Tensor], *since: int) -> None:
    def convert(n: Call) -> Tensor:
        n.ignore("consumed_inputs")  # a hint of opset 1 for memory
        return fn(n.tensor(0))

    op(name, *since)(convert)


def _wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Computed in f32 where the operand is narrower: the steps between would lose digits."""

    def convert(x: Tensor) -> Tensor:
        return fn(x) if x.dtype in (f32, f64) else fn(x.astype(f32)).astype(x.dtype)

    return convert


def half_log(a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (ew.log(a) - ew.log(b))


def sinh(x: Tensor) -> Tensor:
    """(exp(x) - exp(-x)) / 2 by expm1, precise near 0."""
    e = ew.expm1(ew.abs(x))
    return ew.sign(x) * 0.5 * (e + e / (e + 1.0))


def cosh(x: Tensor) -> Tensor:
    e = ew.exp(ew.abs(x) - math.log(2.0))
    return e + 0.25 / e


def asinh(x: Tensor) -> Tensor:
    """sign(x) log(|x| + sqrt(x^2 + 1)), by log1p near 0."""
    a = ew.abs(x)
    return ew.sign(x) * ew.log1p(a + a * a / (1.0 + ew.sqrt(a * a + 1.0)))


def acosh(x: Tensor) -> Tensor:
    return ew.log(x + ew.sqrt((x - 1.0) * (x + 1.0)))


def atanh(x: Tensor) -> Tensor:
    return 0.5 * (ew.log1p(x) - ew.log1p(-x))


def atan(x: Tensor) -> Tensor:
    """Arc tangent. Beyond tan(pi/8) the argument is turned by pi/4 or pi/2; in between a polynomial (Cephes' coefficients)."""
    a = ew.abs(x)
    big, middle = a > 2.414213562373095, a > 0.4142135623730950
    z = ew.where(big, -1.0 / a, ew.where(middle, (a - 1.0) / (a + 1.0), a))
    base = ew.where(big, math.pi / 2, ew.where(middle, math.pi / 4, 0.0))
    s = z * z
    if x.dtype is f64:
        p = (((-8.750608600031904122785e-1 * s - 1.615753718733365076637e1) * s - 7.500855792314704667340e1) * s
             - 1.228866684490136173410e2) * s - 6.485021904942025371773e1  # fmt: skip
        q = ((((s + 2.485846490142306297962e1) * s + 1.650270098316988542046e2) * s + 4.328810604912902668951e2) * s
             + 4.853903996359136964868e2) * s + 1.945506571482613964425e2  # fmt: skip
        y = base + (z + z * (s * p / q))
    else:
        y = base + (((8.05374449538e-2 * s - 1.38776856032e-1) * s + 1.99777106478e-1) * s - 3.33329491539e-1) * s * z + z
    return ew.where(x < 0, -y, y)


def asin(x: Tensor) -> Tensor:
    """2 atan(x / (1 + sqrt(1 - x^2)))."""
    return 2.0 * atan(x / (1.0 + ew.sqrt((1.0 - x) * (1.0 + x))))


def acos(x: Tensor) -> Tensor:
    """2 atan2(sqrt(1 - x), sqrt(1 + x)), without cancellation near 1."""
    return 2.0 * atan(ew.sqrt(1.0 - x) / ew.sqrt(1.0 + x))


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": ew.abs, "Neg": ew.negative, "Exp": ew.exp, "Log": ew.log, "Sqrt": ew.sqrt, "Ceil": ew.ceil, "Floor": ew.floor,
    "Round": ew.round, "Sign": ew.sign, "Erf": ew.erf, "Sin": ew.sin, "Cos": ew.cos, "Reciprocal": ew.reciprocal,
    "Tanh": ew.tanh, "Sigmoid": ew.sigmoid, "Relu": act.relu, "IsNaN": ew.isnan, "Not": ew.logical_not,
    "BitwiseNot": ew.invert,
}  # fmt: skip
_WIDE: dict[str, Callable[..., Tensor]] = {
    "Tan": ew.tan, "Sinh": sinh, "Cosh": cosh, "Asinh": asinh, "Acosh": acosh, "Atanh": atanh, "Atan": atan, "Asin": asin,
    "Acos": acos, "Softplus": act.softplus, "Softsign": act.softsign, "HardSwish": act.hard_swish, "Mish": act.mish,
}  # fmt: skip
for _name, _fn in _PLAIN.items():
    _unary(_name, _fn)
for _name, _fn in _WIDE.items():
    _unary(_name, _wide(_fn))


@op("Identity")
def identity(n: Call) -> Any:
    return n.value(0)


@op("IsInf")
def isinf(n: Call) -> Tensor:
    x, low, high = n.tensor(0), n.flag("detect_negative", True), n.flag("detect_positive", True)
    if low and high:
        return ew.isinf(x)
    if not low and not high:
        return full(x.shape, False, bool_)
    return ew.equal(x, float("inf") if high else -float("inf"))


def numeric(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _wide(fn)(x)


@op("Elu")
def elu(n: Call) -> Tensor:
    alpha = n.number("alpha", 1.0)
    n.ignore("consumed_inputs")
    return numeric(lambda x: act.elu(x, alpha), n.tensor(0))


@op("Celu")
def celu(n: Call) -> Tensor:
    alpha = n.number("alpha", 1.0)
    return numeric(lambda x: act.celu(x, alpha), n.tensor(0))


@op("Selu")
def selu(n: Call) -> Tensor:
    alpha, gamma = n.number("alpha", 1.6732631921768188), n.number("gamma", 1.0507009873554805)
    n.ignore("consumed_inputs")
    return numeric(lambda x: gamma * ew.where(x > 0, x, alpha * ew.expm1(x)), n.tensor(0))


@op("LeakyRelu")
def leaky_relu(n: Call) -> Tensor:
    alpha = n.number("alpha", 0.01)
    n.ignore("consumed_inputs")
    return act.leaky_relu(n.tensor(0), alpha)


@op("ThresholdedRelu")
def thresholded_relu(n: Call) -> Tensor:
    x = n.tensor(0)
    return ew.where(x > n.number("alpha", 1.0), x, 0.0)


@op("HardSigmoid")
def hard_sigmoid(n: Call) -> Tensor:
    alpha, beta = n.number("alpha", 0.2), n.number("beta", 0.5)
    n.ignore("consumed_inputs")
    return ew.clip(n.tensor(0) * alpha + beta, 0.0, 1.0)


@op("Shrink")
def shrink(n: Call) -> Tensor:
    x, bias, lambd = n.tensor(0), n.number("bias", 0.0), n.number("lambd", 0.5)
    if x.dtype.is_integer:
        x = x.astype(f32)
        return ew.where(x < -lambd, x + bias, ew.where(x > lambd, x - bias, 0.0)).astype(n.value(0).dtype)
    return ew.where(x < -lambd, x + bias, ew.where(x > lambd, x - bias, 0.0))


@op("PRelu")
def prelu(n: Call) -> Tensor:
    x, slope = n.tensor(0), n.tensor(1)
    n.ignore("consumed_inputs")
    if n.opset < 7 and slope.ndim == 1 and x.ndim > 1 and slope.shape[0] != 1:
        slope = reshape(slope, (slope.shape[0], *(1,) * (x.ndim - 2)))
    return ew.where(x < 0, x * slope, x)


@op("Gelu")
def gelu(n: Call) -> Tensor:
    approximate = n.choice("approximate", "none", "tanh")
    return numeric(lambda x: act.gelu(x, approximate), n.tensor(0))


@op("Swish")
def swish(n: Call) -> Tensor:
    alpha = n.number("alpha", 1.0)
    return numeric(lambda x: x * ew.sigmoid(x * alpha), n.tensor(0))


# -- two operands -------------------------------------------------------------------------------------------------------
def pair(n: Call) -> tuple[Tensor, Tensor]:
    """Inputs 0 and 1; before opset 7 the second is lined up with the axis that an attribute names."""
    a, b = n.tensor(0), n.tensor(1)
    n.ignore("consumed_inputs")
    if n.opset < 7:
        if n.flag("broadcast") and "axis" in n.node.attributes:
            axis = n.integer("axis") % max(a.ndim, 1)
            b = reshape(b, (*b.shape, *(1,) * (a.ndim - axis - b.ndim)))
        n.ignore("axis")
    if a.dtype is not b.dtype:
        n.fail(f"its inputs have dtypes {a.dtype} and {b.dtype}; they must be equal")
    return a, b


def integer_divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient rounded towards zero."""
    q = ew.floor_divide(a, b)
    if a.dtype.kind == "uint":
        return q
    inexact = ew.not_equal(q * b, a)
    return q + ew.logical_and(inexact, ew.less(q, 0)).astype(a.dtype)


def _binary(name: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    op(name)(lambda n: fn(*pair(n)))


_binary("Add", ew.add)
_binary("Sub", ew.subtract)
_binary("Mul", ew.multiply)
_binary("Div", lambda a, b: ew.true_divide(a, b) if a.dtype.is_float else integer_divide(a, b))
_binary("And", ew.logical_and)
_binary("Or", ew.logical_or)
_binary("Xor", ew.logical_xor)
_binary("BitwiseAnd", ew.bitwise_and)
_binary("BitwiseOr", ew.bitwise_or)
_binary("BitwiseXor", ew.bitwise_xor)
_binary("Equal", ew.equal)
_binary("Less", ew.less)
_binary("LessOrEqual", ew.less_equal)
_binary("Greater", ew.greater)
_binary("GreaterOrEqual", ew.greater_equal)


@op("Mod")
def mod(n: Call) -> Tensor:
    a, b = pair(n)
    if not n.flag("fmod"):
        return ew.remainder(a, b)
    if not a.dtype.is_float:
        return a - integer_divide(a, b) * b
    # the sign of the dividend; exact as long as the quotient is an integer of the float type
    r = ew.remainder(ew.abs(a), ew.abs(b))
    return ew.where(a < 0, -r, r)


@op("Pow")
def power(n: Call) -> Tensor:
    n.ignore("broadcast", "axis")
    base, known = n.tensor(0), n.known(1)
    if known is not None and known.size == 1 and base.dtype.is_float:
        y = ew.power(base, float(known.reshape(())))
        return y if known.ndim <= y.ndim else reshape(y, (1,) * (known.ndim - y.ndim) + y.shape)
    exponent = n.tensor(1)
    if base.dtype.is_integer and exponent.dtype.is_float:
        return ew.power(base.astype(f64), exponent.astype(f64)).astype(base.dtype)
    return ew.power(base, exponent.astype(base.dtype))


def _chain(name: str, fn: Callable[[Any, Any], Tensor]) -> None:
    def convert(n: Call) -> Any:
        n.ignore("consumed_inputs")
        if not n.inputs:
            n.fail("needs an input or more")
        return reduce(fn, n.tensors())

    op(name)(convert)


_chain("Max", ew.maximum)
_chain("Min", ew.minimum)
_chain("Sum", ew.add)


@op("Mean")
def mean(n: Call) -> Tensor:
    n.ignore("consumed_inputs")
    return reduce(ew.add, n.tensors()) * (1.0 / len(n.inputs))


@op("Clip", 1)
def clip_attributes(n: Call) -> Tensor:
    n.ignore("consumed_inputs")
    low, high = n.attribute("min"), n.attribute("max")
    return ew.clip(n.tensor(0), low, high)


@op("Clip", 11)
def clip(n: Call) -> Tensor:
    return ew.clip(n.tensor(0), n.optional(1), n.optional(2))


@op("Where")
def where(n: Call) -> Tensor:
    return ew.where(n.tensor(0), n.tensor(1), n.tensor(2))


@op("BitShift")
def bit_shift(n: Call) -> Tensor:
    shift = ew.left_shift if n.choice("direction", "LEFT", "RIGHT") == "LEFT" else ew.right_shift
    return shift(n.tensor(0), n.tensor(1))


# -- on sizes -----------------------------------------------------------------------------------------------------------
def _is_object(a: Array) -> bool:
    return a.dtype.kind == "O"


def _object(a: Array) -> Array:
    return a if a.dtype.kind == "b" else a.astype(object)


def _arithmetic(name: str, fn: Callable[[Any, Any], Any]) -> None:
    @fold(name)
    def rule(n: Call, arrays: list[Array | None]) -> Array | Value | None:
        if len(arrays) != 2 or any(a is None or a.dtype.kind == "b" for a in arrays) or n.opset < 7:
            return None
        a, b = arrays
        assert a is not None and b is not None
        try:
            found = np.asarray(fn(_object(a), _object(b)), object)
        except (TypeError, ValueError, ZeroDivisionError):
            return None
        limits = np.iinfo(n.value(0).dtype.numpy)
        if any(isinstance(d, int) and not limits.min <= d <= limits.max for d in found.ravel()):
            return None  # the op's own conversion wraps around
        return found


def _quotient(a: Array, b: Array) -> Array:
    def one(x: Dim, y: Dim) -> Dim:
        # sizes are positive, where truncation and floor agree; of a negative number they may not
        if isinstance(x, int) and isinstance(y, int):
            return (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)
        return x // y

    return np.asarray(np.frompyfunc(one, 2, 1)(a, b), object)


_arithmetic("Add", lambda a, b: a + b)
_arithmetic("Sub", lambda a, b: a - b)
_arithmetic("Mul", lambda a, b: a * b)
_arithmetic("Div", _quotient)
_arithmetic("Mod", lambda a, b: a % b)


@fold("Cast")
def _fold_cast(n: Call, arrays: list[Array | None]) -> Array | Value | None:
    a, to = arrays[0], n.attribute("to")
    if a is None or to not in (6, 7) or not (a.dtype == object or a.dtype.kind in "iu"):
        return None
    n.ignore("saturate", "round_mode")
    return n.importer.sizes_of(a, i64 if to == 7 else i32) if a.dtype == object else a.astype(np.int64 if to == 7 else np.int32)


@fold("Equal")
def _fold_equal(n: Call, arrays: list[Array | None]) -> Array | Value | None:
    """Sizes are positive: one equals itself, and never 0 or less. What else it equals is not known."""
    a, b = arrays
    if a is None or b is None or not (_is_object(a) or _is_object(b)):
        return None

    def one(x: Dim, y: Dim) -> bool | None:
        if isinstance(x, int) and isinstance(y, int):
            return x == y
        if x == y:
            return True
        other = x if isinstance(x, int) else y
        return False if isinstance(other, int) and other <= 0 else None

    found = np.asarray(np.frompyfunc(one, 2, 1)(a, b), object)
    return None if any(v is None for v in found.ravel()) else found.astype(bool)


@fold("Where")
def _fold_where(n: Call, arrays: list[Array | None]) -> Array | Value | None:
    c, a, b = arrays
    if c is None or a is None or b is None or c.dtype.kind != "b" or not (_is_object(a) or _is_object(b)):
        return None
    return np.asarray(np.where(c, _object(a), _object(b)), object)


@fold("Identity")
def _fold_identity(n: Call, arrays: list[Array | None]) -> Array | Value | None:
    return arrays[0]
