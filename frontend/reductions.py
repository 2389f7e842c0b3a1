"""Sums, means, extremes and positions over axes. numpy's names and keywords."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dims import product
from ..ir.dtypes import DType, bool_, f32, i32, i64, u64
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor, broadcast, cast, normalize_axes, normalize_axis
from .elementwise import (
    exp,
    isfinite,
    log,
    maximum,
    multiply,
    not_equal,
    rsqrt,
    sqrt,
    stop_gradient,
    subtract,
    true_divide,
    where,
)
from .movement import reshape, squeeze

if TYPE_CHECKING:
    from .tensor import Tensor

Axes = int | tuple[int, ...] | list[int] | None


def _reduce(op: str, x: TensorLike, axis: Axes, keepdims: bool, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    axes = normalize_axes(axis, t.ndim, what)
    return t if not axes else apply(op, t, axes=axes, keepdims=keepdims)


def _accumulator(dtype: DType) -> DType:
    # numpy: sums and products of small integers and bools are kept in 64 bits.
    if dtype.is_float:
        return dtype
    return u64 if dtype.kind == "uint" else i64


def sum(x: TensorLike, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
    """The sum over axes (None: all). Integers and bools are summed in 64 bits, as in numpy."""
    t = as_tensor(x, what="sum")
    return _reduce("sum", cast(t, dtype or _accumulator(t.dtype)), axis, keepdims, "sum")


def prod(x: TensorLike, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
    """The product over axes (None: all). Integers and bools are multiplied in 64 bits, as in numpy."""
    t = as_tensor(x, what="prod")
    return _reduce("prod", cast(t, dtype or _accumulator(t.dtype)), axis, keepdims, "prod")


def mean(x: TensorLike, axis: Axes = None, *, dtype: object = None, keepdims: bool = False) -> Tensor:
    """The average over axes (None: all), which may have symbolic sizes. Integers and bools become f32."""
    t = as_tensor(x, what="mean")
    return _reduce("mean", cast(t, dtype or (t.dtype if t.dtype.is_float else f32)), axis, keepdims, "mean")


def var(x: TensorLike, axis: Axes = None, *, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The variance over axes: the mean square of deviations, times n / (n - ddof)."""
    t = as_tensor(x, what="var")
    t = t if t.dtype.is_float else cast(t, f32)
    centred = subtract(t, mean(t, axis, keepdims=True))
    result = mean(multiply(centred, centred), axis, keepdims=keepdims)
    if ddof == 0:
        return result
    count = product([t.shape[a] for a in normalize_axes(axis, t.ndim, "var")])
    if isinstance(count, int) and count <= ddof:
        raise error(ShapeError, f"var with ddof={ddof} of {count} elements is undefined; it needs more than {ddof}", operand=t)
    return multiply(
        result, count / (count - ddof) if isinstance(count, int) else true_divide(as_tensor(count, f32), count - ddof)
    )


def std(x: TensorLike, axis: Axes = None, *, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """The standard deviation over axes: the square root of `var`."""
    return sqrt(var(x, axis, ddof=ddof, keepdims=keepdims))


def _extreme(op: str, x: TensorLike, axis: Axes, keepdims: bool) -> Tensor:
    t = as_tensor(x, what=op)
    if t.dtype is bool_:
        return not_equal(_reduce(op, cast(t, i32), axis, keepdims, op), 0)
    return _reduce(op, t, axis, keepdims, op)


def max(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """The largest over axes (None: all); NaN if one is NaN."""
    return _extreme("max", x, axis, keepdims)


def min(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """The smallest over axes (None: all); NaN if one is NaN."""
    return _extreme("min", x, axis, keepdims)


amax, amin = max, min


def any(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """Whether one element or more is non-zero."""
    return max(_truth(x, "any"), axis, keepdims=keepdims)


def all(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """Whether every element is non-zero."""
    return min(_truth(x, "all"), axis, keepdims=keepdims)


def _truth(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    return t if t.dtype is bool_ else not_equal(t, 0)


def _position(op: str, x: TensorLike, axis: int | None, keepdims: bool) -> Tensor:
    t = as_tensor(x, what=op)
    if t.dtype is bool_:
        t = cast(t, i32)
    if axis is None:
        flat = apply(op, reshape(t, (-1,)), axis=0, keepdims=False)
        return reshape(flat, (1,) * t.ndim) if keepdims else flat
    return apply(op, t, axis=normalize_axis(axis, t.ndim, op), keepdims=keepdims)


def argmax(x: TensorLike, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """The position (i64) of the first largest element along an axis, or in the flattened Tensor (None)."""
    return _position("argmax", x, axis, keepdims)


def argmin(x: TensorLike, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """The position (i64) of the first smallest element along an axis, or in the flattened Tensor (None)."""
    return _position("argmin", x, axis, keepdims)


def cumsum(x: TensorLike, axis: int | None = None, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Running sums along an axis (None: of the flattened Tensor); `exclusive` leaves out the element itself."""
    t = as_tensor(x, what="cumsum")
    t = cast(t, _accumulator(t.dtype))
    if axis is None:
        t, axis = reshape(t, (-1,)), 0
    return apply("cumsum", t, axis=normalize_axis(axis, t.ndim, "cumsum"), exclusive=exclusive, reverse=reverse)


def cumprod(x: TensorLike, axis: int | None = None, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Running products along an axis (None: of the flattened Tensor); `exclusive` leaves out the element itself."""
    t = as_tensor(x, what="cumprod")
    t = cast(t, _accumulator(t.dtype))
    if axis is None:
        t, axis = reshape(t, (-1,)), 0
    return apply("cumprod", t, axis=normalize_axis(axis, t.ndim, "cumprod"), exclusive=exclusive, reverse=reverse)


def logsumexp(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) without overflow; rows of -inf give -inf."""
    t = as_tensor(x, what="logsumexp")
    if not t.dtype.is_float:
        raise error(DTypeError, "logsumexp takes floats", operand=t)
    top = stop_gradient(max(t, axis, keepdims=True))
    top = where(isfinite(top), top, 0.0)
    result = log(sum(exp(t - top), axis, keepdims=True)) + top
    if keepdims:
        return result
    return squeeze(result, normalize_axes(axis, t.ndim, "logsumexp"))


def softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis, computed after subtracting the maximum (through which no gradient flows)."""
    t = as_tensor(x, what="softmax")
    t = t if t.dtype.is_float else cast(t, f32)
    e = exp(subtract(t, stop_gradient(max(t, axis, keepdims=True))))
    return true_divide(e, sum(e, axis, keepdims=True))


def log_softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """The logarithm of softmax(x), without cancellation."""
    t = as_tensor(x, what="log_softmax")
    t = t if t.dtype.is_float else cast(t, f32)
    shifted = subtract(t, stop_gradient(max(t, axis, keepdims=True)))
    return subtract(shifted, log(sum(exp(shifted), axis, keepdims=True)))


def norm(x: TensorLike, axis: Axes = None, *, keepdims: bool = False) -> Tensor:
    """The Euclidean norm over axes: sqrt(sum(x * x))."""
    t = as_tensor(x, what="norm")
    return sqrt(sum(multiply(t, t), axis, keepdims=keepdims))


def cosine_similarity(x1: TensorLike, x2: TensorLike, axis: int = -1, eps: float = 1e-8) -> Tensor:
    """x1 . x2 / (|x1| |x2|) along an axis, each norm taken as eps at least, so that a zero vector gives 0 and no NaN.

    The operands broadcast together.
    """
    a, b = broadcast("cosine_similarity", x1, x2, names=("x1", "x2"))
    a, b = (t if t.dtype.is_float else cast(t, f32) for t in (a, b))
    least = eps * eps
    squares = (maximum(sum(multiply(t, t), axis), least) for t in (a, b))
    return multiply(sum(multiply(a, b), axis), multiply(*(rsqrt(s) for s in squares)))


def reduced(values: Tensor, reduction: str) -> Tensor:
    """The mean, the sum, or (reduction='none') the values themselves. Raises AttributeValueError for another reduction."""
    if reduction == "mean":
        return mean(values)
    if reduction == "sum":
        return sum(values)
    if reduction != "none":
        raise error(AttributeValueError, f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    return values
