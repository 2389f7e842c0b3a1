"""Metrics computed in the graph: (prediction, target) -> a scalar, averaged over the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..ir.dtypes import f32
from ..ir.errors import AttributeValueError
from .core import TensorLike, as_tensor, cast
from .elementwise import equal, greater_equal
from .losses import mae, mse
from .reductions import argmax, mean

if TYPE_CHECKING:
    from .tensor import Tensor

Metric = Callable[["Tensor", "Tensor"], "Tensor"]


def accuracy(prediction: TensorLike, target: TensorLike) -> Tensor:
    """The share of examples whose largest score (last axis) is at the target: class numbers, or the largest of dense ones."""
    p, t = as_tensor(prediction, what="accuracy"), as_tensor(target, what="accuracy")
    labels = argmax(t, -1) if t.shape == p.shape else t
    return mean(cast(equal(argmax(p, -1), labels.astype("i64")), f32))


def binary_accuracy(logits: TensorLike, target: TensorLike) -> Tensor:
    """The share of logits whose sign agrees with targets 0 and 1."""
    x, t = as_tensor(logits, what="binary_accuracy"), as_tensor(target, what="binary_accuracy")
    return mean(cast(equal(greater_equal(x, 0), greater_equal(t, 0.5)), f32))


METRICS: Final[dict[str, Metric]] = {"accuracy": accuracy, "binary_accuracy": binary_accuracy, "mse": mse, "mae": mae}


def metric(which: str | Metric) -> tuple[str, Metric]:
    """(name, function) of a metric given by name or as a function. Raises AttributeValueError for an unknown name."""
    if callable(which):
        return getattr(which, "__name__", "metric"), which
    if which not in METRICS:
        raise AttributeValueError(f"unknown metric {which!r}; expected a function or one of {', '.join(METRICS)}")
    return which, METRICS[which]
