"""Losses as layers, with PyTorch's names, arguments and defaults: loss = nn.CrossEntropyLoss(); loss(prediction, target).

They hold no parameters; a class weight is a constant of the compiled step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ...ir.errors import AttributeValueError
from .. import losses
from ..core import TensorLike, as_tensor
from ..module import Module
from ..tensor import Tensor


def _array(value: Any) -> Any:
    """A weight as an f32 array; None stays."""
    return None if value is None else np.asarray(value, np.float32)


class _Loss(Module):
    reductions: ClassVar[tuple[str, ...]] = ("mean", "sum", "none")
    reduction: str

    def _reduce(self, reduction: str) -> None:
        if reduction not in self.reductions:
            known = ", ".join(map(repr, self.reductions))
            raise AttributeValueError(f"{type(self).__name__}: reduction is one of {known}, not {reduction!r}")
        self.reduction = reduction


class _Plain(_Loss):
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, reduction: str = "mean") -> None:
        self._reduce(reduction)

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return type(self).function(prediction, target, reduction=self.reduction)


class MSELoss(_Plain):
    """(prediction - target)^2."""

    function = staticmethod(losses.mse)


class L1Loss(_Plain):
    """|prediction - target|."""

    function = staticmethod(losses.mae)


class SmoothL1Loss(_Loss):
    """e^2 / (2 beta) where |e| < beta, |e| - beta / 2 beyond."""

    def __init__(self, reduction: str = "mean", beta: float = 1.0) -> None:
        self._reduce(reduction)
        self.beta = beta

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.smooth_l1(prediction, target, self.beta, self.reduction)


class HuberLoss(_Loss):
    """e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond."""

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        self._reduce(reduction)
        self.delta = delta

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.huber(prediction, target, self.delta, self.reduction)


def _class_axis(prediction: TensorLike) -> int:
    """PyTorch's: axis 1 of (N, C, ...), or the one axis of (C,)."""
    return 1 if as_tensor(prediction, what="the prediction").ndim > 1 else 0


class CrossEntropyLoss(_Loss):
    """-log softmax(prediction)[target] with classes on axis 1 (`tw.losses.cross_entropy` has them on the last)."""

    def __init__(
        self, weight: Any = None, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> None:
        self._reduce(reduction)
        self.weight, self.ignore_index, self.label_smoothing = _array(weight), ignore_index, label_smoothing

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.cross_entropy(
            prediction,
            target,
            self.reduction,
            axis=_class_axis(prediction),
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )


class NLLLoss(_Loss):
    """-prediction[target], the prediction being log-probabilities with classes on axis 1."""

    def __init__(self, weight: Any = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        self._reduce(reduction)
        self.weight, self.ignore_index = _array(weight), ignore_index

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.nll(
            prediction,
            target,
            self.reduction,
            axis=_class_axis(prediction),
            weight=self.weight,
            ignore_index=self.ignore_index,
        )


class BCELoss(_Loss):
    """-(t log p + (1 - t) log(1 - p)) of probabilities."""

    def __init__(self, weight: Any = None, reduction: str = "mean") -> None:
        self._reduce(reduction)
        self.weight = _array(weight)

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.binary_cross_entropy(prediction, target, self.reduction, weight=self.weight)


class BCEWithLogitsLoss(_Loss):
    """The binary cross-entropy of sigmoid(prediction)."""

    def __init__(self, weight: Any = None, reduction: str = "mean", pos_weight: Any = None) -> None:
        self._reduce(reduction)
        self.weight, self.pos_weight = _array(weight), _array(pos_weight)

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.binary_cross_entropy_with_logits(
            prediction, target, self.reduction, weight=self.weight, pos_weight=self.pos_weight
        )


class KLDivLoss(_Loss):
    """target (log target - prediction), the prediction being log-probabilities. Use reduction='batchmean': see `kl_div`."""

    reductions = ("mean", "sum", "none", "batchmean")

    def __init__(self, reduction: str = "mean", log_target: bool = False) -> None:
        self._reduce(reduction)
        self.log_target = log_target

    def forward(self, prediction: TensorLike, target: TensorLike) -> Tensor:
        return losses.kl_div(prediction, target, self.reduction, self.log_target)


class CosineEmbeddingLoss(_Loss):
    """1 - cos(x1, x2) where the target is 1, max(0, cos(x1, x2) - margin) where it is -1."""

    def __init__(self, margin: float = 0.0, reduction: str = "mean") -> None:
        self._reduce(reduction)
        self.margin = margin

    def forward(self, x1: TensorLike, x2: TensorLike, target: TensorLike) -> Tensor:
        return losses.cosine_embedding(x1, x2, target, self.margin, self.reduction)


class CTCLoss(_Loss):
    """Connectionist temporal classification: see `tw.losses.ctc`. Called with (log_probs, targets, lengths of both)."""

    def __init__(self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False) -> None:
        self._reduce(reduction)
        self.blank, self.zero_infinity = blank, zero_infinity

    def forward(
        self, log_probs: TensorLike, targets: TensorLike, input_lengths: TensorLike, target_lengths: TensorLike
    ) -> Tensor:
        return losses.ctc(log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity)
