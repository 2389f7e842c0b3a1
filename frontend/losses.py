"""Losses: (prediction, target) -> a scalar; with reduction='none' one value per example (or element), 'sum' their sum.

A weight given to a loss multiplies; which mean 'mean' is, each says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dtypes import bool_, f32, i32
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .activations import softplus
from .context import current, error
from .core import TensorLike, as_tensor, broadcast_to, cast, normalize_axis, show
from .ctc import ctc
from .elementwise import abs, exp, log, maximum, not_equal, rsqrt, square, stop_gradient, where
from .movement import expand_dims, iota, reshape
from .reductions import cosine_similarity, log_softmax, mean, reduced, sum

if TYPE_CHECKING:
    from .tensor import Tensor

__all__ = [
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine", "cosine_embedding", "cross_entropy", "ctc", "hinge",
    "huber", "kl_div", "kl_divergence", "mae", "mse", "nll", "smooth_l1",
]  # fmt: skip


def _pair(prediction: TensorLike, target: TensorLike, what: str) -> tuple[Tensor, Tensor]:
    p, t = as_tensor(prediction, what=what), as_tensor(target, what=what)
    if p.shape != t.shape:
        fits = "; add .squeeze(-1) to the prediction" if p.shape == (*t.shape, 1) else ""
        raise error(ShapeError, f"{what}: prediction and target need one shape{fits}", prediction=p, target=t)
    p = p if p.dtype.is_float else cast(p, f32)
    return p, cast(t, p.dtype)


def _weighted(values: Tensor, weight: TensorLike | None) -> Tensor:
    return values if weight is None else values * broadcast_to(as_tensor(weight, values.dtype, "weight"), values.shape)


# -- distances ----------------------------------------------------------------------------------------------------------
def mse(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """(prediction - target)^2."""
    p, t = _pair(prediction, target, "mse")
    return reduced(square(p - t), reduction)


def mae(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """|prediction - target|; its gradient is 0 where they are equal."""
    p, t = _pair(prediction, target, "mae")
    return reduced(abs(p - t), reduction)


def huber(prediction: TensorLike, target: TensorLike, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Half the square of the error e where |e| <= delta, delta * (|e| - delta / 2) beyond (Huber 1964)."""
    if delta <= 0:
        raise error(AttributeValueError, f"huber: delta is positive, not {delta!r}")
    p, t = _pair(prediction, target, "huber")
    e = p - t  # squared as it is, not as |e|: the second derivative at 0 is then 1
    return reduced(where(abs(e) <= delta, 0.5 * e * e, delta * (abs(e) - 0.5 * delta)), reduction)


def smooth_l1(prediction: TensorLike, target: TensorLike, beta: float = 1.0, reduction: str = "mean") -> Tensor:
    """huber / beta: e^2 / (2 beta) where |e| < beta, |e| - beta / 2 beyond (Girshick 2015). With beta 0 it is mae."""
    if beta == 0:
        return mae(prediction, target, reduction)
    if beta < 0:
        raise error(AttributeValueError, f"smooth_l1: beta is not negative, {beta!r} is")
    p, t = _pair(prediction, target, "smooth_l1")
    e = p - t
    return reduced(where(abs(e) < beta, (0.5 / beta) * e * e, abs(e) - 0.5 * beta), reduction)


def cosine(prediction: TensorLike, target: TensorLike, reduction: str = "mean", *, axis: int = -1) -> Tensor:
    """1 - cosine similarity along an axis: 0 for one direction, 2 for opposite ones."""
    p, t = _pair(prediction, target, "cosine")
    return reduced(1.0 - cosine_similarity(p, t, axis), reduction)


def cosine_embedding(x1: TensorLike, x2: TensorLike, target: TensorLike, margin: float = 0.0, reduction: str = "mean") -> Tensor:
    """1 - cos(x1, x2) where the target is 1, max(0, cos(x1, x2) - margin) where it is -1; vectors on the last axis.

    x1 and x2 are (N, D), the target (N); or (D) and a scalar.
    """
    a, b = _pair(x1, x2, "cosine_embedding")
    t = as_tensor(target, what="cosine_embedding")
    if a.ndim == 0 or t.shape != a.shape[:-1]:
        raise error(ShapeError, f"cosine_embedding: the target holds 1 and -1, shape {show(a.shape[:-1])}", x1=a, target=t)
    norms = (sum(square(v), -1) + 1e-12 for v in (a, b))
    first, second = (rsqrt(n) for n in norms)
    c = sum(a * b, -1) * (first * second)
    apart = where(c > margin, c - margin, 0.0)
    return reduced(where(t > 0, 1.0 - c, apart), reduction)


# -- classes ------------------------------------------------------------------------------------------------------------
def _per_class(weight: TensorLike | None, x: Tensor, axis: int, what: str) -> Tensor | None:
    """One weight per class, shaped to broadcast over x."""
    if weight is None:
        return None
    w = as_tensor(weight, x.dtype, "weight")
    if w.shape != (x.shape[axis],):
        raise error(ShapeError, f"{what}: weight holds one number per class, shape {show((x.shape[axis],))}", scores=x, weight=w)
    return reshape(w, tuple(x.shape[axis] if a == axis else 1 for a in range(x.ndim)))


def _mean_over(values: Tensor, total: Tensor) -> Tensor:
    """sum / total, and 0 where nothing counts."""
    return sum(values) / where(total > 0, total, 1.0)


def _of_class_numbers(
    logp: Tensor,
    t: Tensor,
    axis: int,
    weight: Tensor | None,
    smoothing: float,
    ignore_index: int | None,
    reduction: str,
    what: str,
) -> Tensor:
    """-weight[t] * logp[t], smoothed; the mean is over the weights of the examples that count."""
    if ignore_index is not None and t.dtype.kind == "uint" and ignore_index < 0:
        ignore_index = None
    current(what).note_class_numbers(t.node, logp.shape[axis], ignore_index)
    hit = iota(logp.shape, axis, i32) == expand_dims(cast(t, i32), axis)
    weighted = logp if weight is None else logp * weight
    values = -sum(where(hit, weighted, 0.0), axis)
    if smoothing:
        values = values * (1.0 - smoothing) - mean(weighted, axis) * smoothing
    counted = None if ignore_index is None else not_equal(t, ignore_index)
    if counted is not None:
        values = where(counted, values, 0.0)
    if reduction != "mean" or (counted is None and weight is None):
        return reduced(values, reduction)
    if weight is None:
        assert counted is not None
        return _mean_over(values, sum(cast(counted, logp.dtype)))
    shares = sum(where(hit, broadcast_to(weight, logp.shape), 0.0), axis)
    return _mean_over(values, sum(shares if counted is None else where(counted, shares, 0.0)))


def cross_entropy(
    logits: TensorLike,
    target: TensorLike,
    reduction: str = "mean",
    *,
    axis: int = -1,
    weight: TensorLike | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
) -> Tensor:
    """-log softmax(logits)[target], with classes along `axis`.

    The target holds class numbers (integers, the shape of logits without the axis) or probabilities (floats, the shape of
    logits). `weight` has one number per class. `label_smoothing` mixes in that share of a uniform distribution. Examples
    whose class number is `ignore_index` count neither in the sum nor in the mean. A class number outside the classes gives a
    loss of 0 (with smoothing, its uniform share) and counts; whoever feeds the step can check labels before.

    'mean' of class numbers divides by the weights of the examples' classes; of probabilities, by the number of examples. All
    as in PyTorch, but that a batch in which nothing counts has loss 0 and not NaN.
    """
    x, t = as_tensor(logits, what="cross_entropy"), as_tensor(target, what="cross_entropy")
    x = x if x.dtype.is_float else cast(x, f32)
    if x.ndim == 0:
        raise error(ShapeError, "cross_entropy: logits need an axis of classes", logits=x)
    if not 0.0 <= label_smoothing <= 1.0:
        raise error(AttributeValueError, f"cross_entropy: label_smoothing lies in [0, 1], not {label_smoothing!r}")
    a = normalize_axis(axis, x.ndim, "cross_entropy")
    rest = (*x.shape[:a], *x.shape[a + 1 :])
    dense = t.dtype.is_float
    if t.dtype is bool_:
        raise error(DTypeError, "cross_entropy: the target is bool; .astype('i32') makes class numbers of it", target=t)
    if t.shape != (x.shape if dense else rest):
        want = f"class numbers of shape {show(rest)} (integers) or probabilities of shape {show(x.shape)} (floats)"
        if not dense and t.shape == x.shape:
            want += "; .astype('f32') makes probabilities of one-hot integers"
        raise error(
            ShapeError, f"cross_entropy: the target holds {want}, classes being axis {a} of the logits", logits=x, target=t
        )
    w = _per_class(weight, x, a, "cross_entropy")
    logp = log_softmax(x, a)
    if not dense:
        return _of_class_numbers(logp, t, a, w, label_smoothing, ignore_index, reduction, "cross_entropy")
    if ignore_index not in (None, -100):
        raise error(AttributeValueError, "cross_entropy: ignore_index goes with class numbers, not with probabilities", target=t)
    p = cast(t, x.dtype)
    if label_smoothing:
        p = p * (1.0 - label_smoothing) + label_smoothing / as_tensor(x.shape[a], x.dtype)
    return reduced(-sum(logp * p if w is None else logp * p * w, a), reduction)


def nll(
    log_probabilities: TensorLike,
    target: TensorLike,
    reduction: str = "mean",
    *,
    axis: int = -1,
    weight: TensorLike | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """-log_probabilities[target], the log loss, with classes along `axis`: cross-entropy after a log-softmax.

    `weight`, `ignore_index` and 'mean' as in `cross_entropy`.
    """
    x, t = as_tensor(log_probabilities, what="nll"), as_tensor(target, what="nll")
    if x.ndim == 0:
        raise error(ShapeError, "nll: log-probabilities need an axis of classes", log_probabilities=x)
    a = normalize_axis(axis, x.ndim, "nll")
    rest = (*x.shape[:a], *x.shape[a + 1 :])
    if t.dtype.is_float or t.dtype is bool_ or t.shape != rest:
        raise error(ShapeError, f"nll: the target holds class numbers of shape {show(rest)}", log_probabilities=x, target=t)
    return _of_class_numbers(x, t, a, _per_class(weight, x, a, "nll"), 0.0, ignore_index, reduction, "nll")


# -- probabilities ------------------------------------------------------------------------------------------------------
def _log_of(p: Tensor) -> Tensor:
    """log p, no less than -100; below 1e-12 the slope stays 1e12, and at 0 no gradient is NaN."""
    small = p < 1e-12
    value = maximum(log(maximum(stop_gradient(p), 0.0)), -100.0)
    return where(small, value + (p - stop_gradient(p)) * 1e12, log(where(small, 1.0, p)))


def binary_cross_entropy(
    probability: TensorLike, target: TensorLike, reduction: str = "mean", *, weight: TensorLike | None = None
) -> Tensor:
    """-(t log p + (1 - t) log(1 - p)), each logarithm no less than -100, as in PyTorch. Prefer the form with logits."""
    p, t = _pair(probability, target, "binary_cross_entropy")
    return reduced(_weighted(-(t * _log_of(p) + (1.0 - t) * _log_of(1.0 - p)), weight), reduction)


def binary_cross_entropy_with_logits(
    logits: TensorLike,
    target: TensorLike,
    reduction: str = "mean",
    *,
    weight: TensorLike | None = None,
    pos_weight: TensorLike | None = None,
) -> Tensor:
    """binary_cross_entropy(sigmoid(x), t) without overflow and without cancellation: (1 - t) softplus(x) + t softplus(-x).

    `weight` multiplies every value, `pos_weight` the second term: above 1 it favours recall. Both broadcast to the logits.
    """
    x, t = _pair(logits, target, "binary_cross_entropy_with_logits")
    return reduced(_weighted((1.0 - t) * softplus(x) + _weighted(t * softplus(-x), pos_weight), weight), reduction)


def hinge(prediction: TensorLike, target: TensorLike, reduction: str = "mean") -> Tensor:
    """max(0, 1 - target * prediction), targets being -1 and 1."""
    p, t = _pair(prediction, target, "hinge")
    return reduced(maximum(1.0 - p * t, 0.0), reduction)


def _kl(log_prediction: TensorLike, target: TensorLike, log_target: bool, what: str) -> Tensor:
    p, t = _pair(log_prediction, target, what)
    if log_target:
        return exp(t) * (t - p)
    positive = t > 0
    return where(positive, t * (log(where(positive, t, 1.0)) - p), 0.0)


def kl_divergence(
    log_prediction: TensorLike, target: TensorLike, reduction: str = "mean", *, axis: int = -1, log_target: bool = False
) -> Tensor:
    """target * (log target - log_prediction) summed over an axis; 0 where the target is 0. The target may be given as log.

    The mean is over distributions: PyTorch's 'batchmean', where its own 'mean' is over elements (`kl_div`).
    """
    return reduced(sum(_kl(log_prediction, target, log_target, "kl_divergence"), axis), reduction)


def kl_div(log_prediction: TensorLike, target: TensorLike, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """target * (log target - log_prediction) element by element, as PyTorch's: 'mean' divides by the number of elements,
    which is no divergence; 'batchmean' divides by the first axis. `kl_divergence` sums over an axis first.
    """
    values = _kl(log_prediction, target, log_target, "kl_div")
    if reduction != "batchmean":
        return reduced(values, reduction)
    if values.ndim == 0:
        raise error(ShapeError, "kl_div: reduction='batchmean' needs an axis of examples", log_prediction=values)
    return sum(values) / values.shape[0]
