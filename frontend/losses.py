"""Losses: (prediction, target) -> a scalar, or one value per example with reduction='none'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dtypes import bool_, f32, i32
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .core import TensorLike, as_tensor, cast, normalize_axis, show
from .elementwise import abs, exp, log, log1p, maximum, not_equal, square, where
from .movement import expand_dims, iota
from .reductions import log_softmax, mean, sum

if TYPE_CHECKING:
    from .tensor import Tensor


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean(values)
    if reduction == "sum":
        return sum(values)
    if reduction != "none":
        raise error(AttributeValueError, f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    return values


def _pair(prediction: TensorLike, target: TensorLike, what: str) -> tuple[Tensor, Tensor]:
    p, t = as_tensor(prediction, what=what), as_tensor(target, what=what)
    if p.shape != t.shape:
        fits = "; add .squeeze(-1) to the prediction" if p.shape == (*t.shape, 1) else ""
        raise error(ShapeError, f"{what}: prediction and target need one shape{fits}", prediction=p, target=t)
    p = p if p.dtype.is_float else cast(p, f32)
    return p, cast(t, p.dtype)


def mse(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """(prediction - target)^2."""
    p, t = _pair(prediction, target, "mse")
    return _reduced(square(p - t), reduction)


def mae(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """|prediction - target|."""
    p, t = _pair(prediction, target, "mae")
    return _reduced(abs(p - t), reduction)


def huber(prediction: TensorLike, target: TensorLike, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Half the square of the error e where |e| <= delta, delta * (|e| - delta / 2) beyond."""
    p, t = _pair(prediction, target, "huber")
    e = abs(p - t)
    return _reduced(where(e <= delta, 0.5 * e * e, delta * (e - 0.5 * delta)), reduction)


def cross_entropy(
    logits: TensorLike,
    target: TensorLike,
    reduction: str = "mean",
    *,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """-log softmax(logits)[target], with classes along `axis`.

    The target holds class numbers (integers, the shape of logits without the axis) or probabilities (floats, the shape of
    logits). `label_smoothing` mixes in that share of a uniform distribution. Examples whose class number is
    `ignore_index` count neither in the sum nor in the mean. A class number outside the classes gives a loss of 0 there.
    """
    x, t = as_tensor(logits, what="cross_entropy"), as_tensor(target, what="cross_entropy")
    x = x if x.dtype.is_float else cast(x, f32)
    if x.ndim == 0:
        raise error(ShapeError, "cross_entropy: logits need an axis of classes", logits=x)
    a = normalize_axis(axis, x.ndim, "cross_entropy")
    rest = (*x.shape[:a], *x.shape[a + 1 :])
    logp = log_softmax(x, a)
    dense = t.dtype.is_float
    if t.shape != (x.shape if dense else rest):
        want = f"class numbers of shape {show(rest)} (integers) or probabilities of shape {show(x.shape)} (floats)"
        raise error(
            ShapeError, f"cross_entropy: the target holds {want}, classes being axis {a} of the logits", logits=x, target=t
        )
    if dense:
        values = -sum(logp * cast(t, x.dtype), a)
    else:
        classes = cast(t, i32)
        values = -sum(where(iota(x.shape, a, i32) == expand_dims(classes, a), logp, 0.0), a)
    if label_smoothing:
        values = values * (1.0 - label_smoothing) - mean(logp, a) * label_smoothing
    if ignore_index is None:
        return _reduced(values, reduction)
    if dense:
        raise error(AttributeValueError, "cross_entropy: ignore_index goes with class numbers, not with probabilities", target=t)
    counted = not_equal(t, ignore_index)
    values = where(counted, values, 0.0)
    if reduction != "mean":
        return _reduced(values, reduction)
    return sum(values) / maximum(sum(cast(counted, x.dtype)), 1.0)


def nll(log_probabilities: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """-log_probabilities[target] with classes on the last axis: cross-entropy after a log-softmax."""
    x, t = as_tensor(log_probabilities, what="nll"), as_tensor(target, what="nll")
    if t.dtype.is_float or t.dtype is bool_ or t.shape != x.shape[:-1]:
        raise error(
            ShapeError, f"nll: the target holds class numbers of shape {show(x.shape[:-1])}", log_probabilities=x, target=t
        )
    hit = iota(x.shape, x.ndim - 1, i32) == expand_dims(cast(t, i32), -1)
    return _reduced(-sum(where(hit, x, 0.0), -1), reduction)


def binary_cross_entropy(probability: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """-(t log p + (1 - t) log(1 - p)), each logarithm no less than -100, as in PyTorch."""
    p, t = _pair(probability, target, "binary_cross_entropy")
    return _reduced(-(t * maximum(log(p), -100.0) + (1.0 - t) * maximum(log(1.0 - p), -100.0)), reduction)


def binary_cross_entropy_with_logits(logits: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """binary_cross_entropy(sigmoid(x), t) without overflow: max(x, 0) - x t + log(1 + exp(-|x|))."""
    x, t = _pair(logits, target, "binary_cross_entropy_with_logits")
    return _reduced(maximum(x, 0.0) - x * t + log1p(exp(-abs(x))), reduction)


def hinge(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """max(0, 1 - target * prediction), targets being -1 and 1."""
    p, t = _pair(prediction, target, "hinge")
    return _reduced(maximum(1.0 - p * t, 0.0), reduction)


def kl_divergence(log_prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """target * (log target - log_prediction) summed over the last axis; 0 where the target is 0."""
    p, t = _pair(log_prediction, target, "kl_divergence")
    return _reduced(sum(where(t > 0, t * (log(maximum(t, 1e-37)) - p), 0.0), -1), reduction)
