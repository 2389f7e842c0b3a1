"""Functions of one element, or of corresponding elements after broadcasting. numpy's names, dtypes and NaN behaviour."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..ir.dtypes import DType, as_dtype, bool_, f32
from ..ir.errors import DTypeError
from .context import error
from .core import TensorLike, apply, as_tensor, broadcast, broadcast_shapes, broadcast_to, cast, is_weak, promote

if TYPE_CHECKING:
    from .tensor import Tensor


# -- one operand --------------------------------------------------------------------------------------------------------
def _float(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    return t if t.dtype.is_float else cast(t, f32)


def exp(x: TensorLike) -> Tensor:
    """e to the x. Integers become f32, here and in every function whose result is not an integer."""
    return apply("exp", _float(x, "exp"))


def expm1(x: TensorLike) -> Tensor:
    """exp(x) - 1, precise near 0."""
    return apply("expm1", _float(x, "expm1"))


def log(x: TensorLike) -> Tensor:
    """Natural logarithm; -inf at 0, NaN below."""
    return apply("log", _float(x, "log"))


def log1p(x: TensorLike) -> Tensor:
    """log(1 + x), precise near 0."""
    return apply("log1p", _float(x, "log1p"))


def log2(x: TensorLike) -> Tensor:
    """Logarithm to base 2, as log(x) / log(2)."""
    return log(x) * float(1 / np.log(2.0))


def log10(x: TensorLike) -> Tensor:
    """Logarithm to base 10, as log(x) / log(10)."""
    return log(x) * float(1 / np.log(10.0))


def sqrt(x: TensorLike) -> Tensor:
    """Square root; NaN below 0."""
    return apply("sqrt", _float(x, "sqrt"))


def rsqrt(x: TensorLike) -> Tensor:
    """1 / sqrt(x)."""
    return apply("rsqrt", _float(x, "rsqrt"))


def tanh(x: TensorLike) -> Tensor:
    """Hyperbolic tangent."""
    return apply("tanh", _float(x, "tanh"))


def sigmoid(x: TensorLike) -> Tensor:
    """1 / (1 + exp(-x)), without overflow."""
    return apply("sigmoid", _float(x, "sigmoid"))


def erf(x: TensorLike) -> Tensor:
    """The error function."""
    return apply("erf", _float(x, "erf"))


def sin(x: TensorLike) -> Tensor:
    """Sine of radians."""
    return apply("sin", _float(x, "sin"))


def cos(x: TensorLike) -> Tensor:
    """Cosine of radians."""
    return apply("cos", _float(x, "cos"))


def tan(x: TensorLike) -> Tensor:
    """Tangent of radians, as sin / cos."""
    return sin(x) / cos(x)


def _rounding(op: str, x: TensorLike) -> Tensor:
    t = as_tensor(x, what=op)
    return apply(op, t) if t.dtype.is_float else t


def floor(x: TensorLike) -> Tensor:
    """The greatest integer not above x, in x's dtype."""
    return _rounding("floor", x)


def ceil(x: TensorLike) -> Tensor:
    """The least integer not below x, in x's dtype."""
    return _rounding("ceil", x)


def round(x: TensorLike) -> Tensor:
    """The nearest integer, halves to even, in x's dtype."""
    return _rounding("round", x)


def trunc(x: TensorLike) -> Tensor:
    """x without its fraction: towards zero."""
    t = as_tensor(x, what="trunc")
    return sign(t) * floor(abs(t)) if t.dtype.is_float else t


def _numeric(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    if t.dtype is bool_:
        raise error(DTypeError, f"{what} of a bool Tensor; use ~ for logical not, or .astype() first", operand=t)
    return t


def abs(x: TensorLike) -> Tensor:
    """Absolute value."""
    t = as_tensor(x, what="abs")
    return t if t.dtype.kind in ("bool", "uint") else apply("abs", t)


absolute = abs


def negative(x: TensorLike) -> Tensor:
    """-x."""
    return apply("neg", _numeric(x, "negative"))


def sign(x: TensorLike) -> Tensor:
    """-1, 0 or 1 with the sign of x; NaN stays."""
    return apply("sign", _numeric(x, "sign"))


def square(x: TensorLike) -> Tensor:
    """x * x."""
    t = as_tensor(x, what="square")
    return multiply(t, t)


def reciprocal(x: TensorLike) -> Tensor:
    """1 / x."""
    return true_divide(1.0, _float(x, "reciprocal"))


def logical_not(x: TensorLike) -> Tensor:
    """Whether x is zero."""
    return apply("not", _boolean(x, "logical_not"))


def isnan(x: TensorLike) -> Tensor:
    """Whether x is not a number."""
    t = _float(x, "isnan")
    return apply("not_equal", t, t)


def isinf(x: TensorLike) -> Tensor:
    """Whether x is an infinity."""
    return equal(abs(_float(x, "isinf")), float("inf"))


def isfinite(x: TensorLike) -> Tensor:
    """Whether x is neither NaN nor an infinity."""
    return less(abs(_float(x, "isfinite")), float("inf"))


# -- two operands -------------------------------------------------------------------------------------------------------
def _binary(op: str, what: str, a: TensorLike, b: TensorLike, dtype: DType | None = None) -> Tensor:
    x, y = broadcast(what, a, b, dtype=dtype, names=("left", "right"))
    return apply(op, x, y)


def _arithmetic(op: str, what: str, a: TensorLike, b: TensorLike, of_bools: Callable[..., Tensor] | None = None) -> Tensor:
    x, y = _strong(a, what), _strong(b, what)
    common = promote(x, y)
    if common is bool_:
        if of_bools is not None:
            return of_bools(x, y)
        raise error(DTypeError, f"{what} of two bool operands; use &, |, ^, or .astype() first", left=a, right=b)
    return _binary(op, what, x, y, common)


def _strong(x: TensorLike, what: str) -> TensorLike:
    return x if is_weak(x) else as_tensor(x, what=f"an operand of {what}")


def add(a: TensorLike, b: TensorLike) -> Tensor:
    """a + b; of two bools, their or (as numpy)."""
    return _arithmetic("add", "add", a, b, logical_or)


def subtract(a: TensorLike, b: TensorLike) -> Tensor:
    """a - b."""
    return _arithmetic("sub", "subtract", a, b)


def multiply(a: TensorLike, b: TensorLike) -> Tensor:
    """a * b; of two bools, their and (as numpy)."""
    return _arithmetic("mul", "multiply", a, b, logical_and)


def true_divide(a: TensorLike, b: TensorLike) -> Tensor:
    """a / b; integers become f32."""
    common = promote(_strong(a, "divide"), _strong(b, "divide"))
    return _binary("div", "divide", a, b, common if common.is_float else f32)


divide = true_divide


def floor_divide(a: TensorLike, b: TensorLike) -> Tensor:
    """floor(a / b). Integers divided by zero give 0."""
    return _arithmetic("floordiv", "floor_divide", a, b)


def remainder(a: TensorLike, b: TensorLike) -> Tensor:
    """a - floor(a / b) * b: the sign of b. Integers modulo zero give 0."""
    return _arithmetic("mod", "remainder", a, b)


mod = remainder


def power(a: TensorLike, b: TensorLike) -> Tensor:
    """a to the b. Small constant exponents become products and roots, which are faster and more precise."""
    if is_weak(b):
        base = as_tensor(a, what="power")
        if base.dtype is bool_:
            raise error(DTypeError, "power of a bool Tensor; use .astype() first", operand=base)
        if b == 1 and (isinstance(b, int) or base.dtype.is_float):
            return base
        if b == 2 and (isinstance(b, int) or base.dtype.is_float):
            return multiply(base, base)
        if b == 3 and (isinstance(b, int) or base.dtype.is_float):
            return multiply(multiply(base, base), base)
        if b == 0.5:
            return sqrt(base)
        if b == -0.5:
            return rsqrt(base)
        if b == -1 and base.dtype.is_float:
            return reciprocal(base)
        if base.dtype.is_integer and isinstance(b, int) and b < 0:
            raise error(
                DTypeError, "integers to negative integer powers are not integers; make the base a float first", base=base
            )
    return _arithmetic("pow", "power", a, b)


pow = power


def maximum(a: TensorLike, b: TensorLike) -> Tensor:
    """The larger of the two; NaN if either is NaN."""
    return _binary("maximum", "maximum", a, b)


def minimum(a: TensorLike, b: TensorLike) -> Tensor:
    """The smaller of the two; NaN if either is NaN."""
    return _binary("minimum", "minimum", a, b)


def clip(x: TensorLike, a_min: TensorLike | None = None, a_max: TensorLike | None = None) -> Tensor:
    """x limited to [a_min, a_max]; None leaves that side open."""
    result = as_tensor(x, what="clip")
    if a_min is not None:
        result = maximum(result, a_min)
    return result if a_max is None else minimum(result, a_max)


def less(a: TensorLike, b: TensorLike) -> Tensor:
    """a < b."""
    return _binary("less", "less", a, b)


def less_equal(a: TensorLike, b: TensorLike) -> Tensor:
    """a <= b."""
    return _binary("less_equal", "less_equal", a, b)


def greater(a: TensorLike, b: TensorLike) -> Tensor:
    """a > b."""
    return _binary("less", "greater", b, a)


def greater_equal(a: TensorLike, b: TensorLike) -> Tensor:
    """a >= b."""
    return _binary("less_equal", "greater_equal", b, a)


def equal(a: TensorLike, b: TensorLike) -> Tensor:
    """a == b."""
    return _binary("equal", "equal", a, b)


def not_equal(a: TensorLike, b: TensorLike) -> Tensor:
    """a != b."""
    return _binary("not_equal", "not_equal", a, b)


def _boolean(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    return t if t.dtype is bool_ else not_equal(t, 0)


def logical_and(a: TensorLike, b: TensorLike) -> Tensor:
    """Whether both are non-zero."""
    return _binary("and", "logical_and", _boolean(a, "logical_and"), _boolean(b, "logical_and"))


def logical_or(a: TensorLike, b: TensorLike) -> Tensor:
    """Whether either is non-zero."""
    return _binary("or", "logical_or", _boolean(a, "logical_or"), _boolean(b, "logical_or"))


def logical_xor(a: TensorLike, b: TensorLike) -> Tensor:
    """Whether exactly one is non-zero."""
    return _binary("xor", "logical_xor", _boolean(a, "logical_xor"), _boolean(b, "logical_xor"))


def _bits(op: str, what: str, a: TensorLike, b: TensorLike) -> Tensor:
    common = promote(_strong(a, what), _strong(b, what))
    if common.is_float:
        raise error(
            DTypeError, f"{what} of floats; it takes bools or integers (compare first: (x > 0) & (y > 0))", left=a, right=b
        )
    return _binary(op, what, a, b, common)


def bitwise_and(a: TensorLike, b: TensorLike) -> Tensor:
    """a & b, of bools or integers."""
    return _bits("and", "bitwise_and", a, b)


def bitwise_or(a: TensorLike, b: TensorLike) -> Tensor:
    """a | b, of bools or integers."""
    return _bits("or", "bitwise_or", a, b)


def left_shift(a: TensorLike, b: TensorLike) -> Tensor:
    """a << b, of integers; 0 where b is negative or not below the width."""
    return _bits("shift_left", "left_shift", a, b)


def right_shift(a: TensorLike, b: TensorLike) -> Tensor:
    """a >> b, of integers, keeping the sign; 0 (or -1 of a negative a) where b is negative or not below the width."""
    return _bits("shift_right", "right_shift", a, b)


def bitwise_xor(a: TensorLike, b: TensorLike) -> Tensor:
    """a ^ b, of bools or integers."""
    return _bits("xor", "bitwise_xor", a, b)


def invert(x: TensorLike) -> Tensor:
    """~x: logical not of bools, bitwise not of integers."""
    t = as_tensor(x, what="invert")
    if t.dtype.is_float:
        raise error(DTypeError, "~ of a float Tensor; it takes bools or integers", operand=t)
    return apply("not", t)


bitwise_not = invert


def where(condition: TensorLike, x: TensorLike, y: TensorLike) -> Tensor:
    """x where the condition is true (non-zero), y elsewhere; the three broadcast together."""
    test = _boolean(condition, "where")
    common = promote(_strong(x, "where"), _strong(y, "where"))
    a, b = as_tensor(x, common), as_tensor(y, common)
    shape = broadcast_shapes("where", test, a, b, names=("condition", "x", "y"))
    return apply("where", *(broadcast_to(t, shape) for t in (test, a, b)))


def astype(x: TensorLike, dtype: object) -> Tensor:
    """x converted: floats to integers truncate (saturating, NaN becomes 0), integers to narrower ones wrap."""
    return cast(as_tensor(x, what="astype"), as_dtype(dtype))


def stop_gradient(x: TensorLike) -> Tensor:
    """x, through which no gradient flows."""
    return apply("stop_gradient", as_tensor(x, what="stop_gradient"))
