"""Metrics of two kinds: functions in the graph, averaged over batches, and accumulators over all examples.

In graph   (prediction, target) -> a scalar Tensor: accuracy, top-k, errors. Part of the compiled step; the mean over a
           data set is the mean of the batches' values weighted by their sizes, which is exact for these.
Accumulated  an object that sees every batch as numpy arrays and gives its value at the end: precision, recall, F1, AUC and
           the confusion matrix are no means over batches. scikit-learn computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np

from ..ir.dtypes import bool_, f32, i32
from ..ir.errors import AttributeValueError, InputError, RuntimeUnavailableError, ShapeError
from .context import error
from .core import TensorLike, as_tensor, cast, show
from .elementwise import equal, greater_equal, less, logical_and, logical_not, logical_or, where
from .losses import mae, mse
from .movement import expand_dims, iota
from .reductions import argmax, mean, sum

if TYPE_CHECKING:
    from .tensor import Tensor

Array = np.ndarray[Any, Any]
Metric = Callable[["Tensor", "Tensor"], "Tensor"]


@runtime_checkable
class Accumulator(Protocol):
    """A metric over all examples. A user's own class needs no base class, only these four members.

    `update` takes the predictions and targets of one batch, as the model and the data gave them (for several outputs or
    targets, in their nesting); `result` gives a float or an array of all since the last `reset`.
    """

    name: str

    def update(self, prediction: Any, target: Any) -> None:
        """Takes in one batch."""

    def result(self) -> float | Array:
        """The metric of everything taken in. Raises InputError where nothing was."""

    def reset(self) -> None:
        """Forgets everything."""


# -- in the graph -------------------------------------------------------------------------------------------------------
def _labels(p: Tensor, t: Tensor, what: str) -> Tensor:
    """Class numbers of a target that holds them, or that holds one score per class as the prediction does."""
    if p.ndim and t.shape == p.shape and (t.dtype.is_float or p.ndim > 1):
        return argmax(t, -1)
    if not p.ndim or t.shape != p.shape[:-1] or t.dtype.is_float or t.dtype is bool_:
        want = f"class numbers of shape {show(p.shape[:-1])} (integers) or one score per class, shape {show(p.shape)}"
        raise error(ShapeError, f"{what}: the target holds {want}", prediction=p, target=t)
    return t


def accuracy(prediction: TensorLike, target: TensorLike) -> Tensor:
    """The share of examples whose largest score (last axis) is at the target: class numbers, or the largest of dense ones."""
    p, t = as_tensor(prediction, what="accuracy"), as_tensor(target, what="accuracy")
    return mean(cast(equal(argmax(p, -1), _labels(p, t, "accuracy").astype("i64")), f32))


def binary_accuracy(logits: TensorLike, target: TensorLike) -> Tensor:
    """The share of logits whose sign agrees with targets 0 and 1."""
    x, t = as_tensor(logits, what="binary_accuracy"), as_tensor(target, what="binary_accuracy")
    if x.shape != t.shape:
        fits = "; add .squeeze(-1) to the prediction" if x.shape == (*t.shape, 1) else ""
        raise error(ShapeError, f"binary_accuracy: logits and target need one shape{fits}", logits=x, target=t)
    return mean(cast(equal(greater_equal(x, 0), greater_equal(t, 0.5)), f32))


def top_k_accuracy(prediction: TensorLike, target: TensorLike, k: int = 5) -> Tensor:
    """The share of examples whose target is among the k largest scores (last axis); of equal scores the first counts more.

    A target outside the classes, and a score that is NaN, is no hit. No sorting: the target's rank is the number of scores
    above its own.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise error(AttributeValueError, f"top_k_accuracy: k is a positive int, not {k!r}")
    p, t = as_tensor(prediction, what="top_k_accuracy"), as_tensor(target, what="top_k_accuracy")
    labels = expand_dims(cast(_labels(p, t, "top_k_accuracy"), i32), -1)
    classes = iota(p.shape, p.ndim - 1, i32)
    own = sum(where(equal(classes, labels), p, 0), -1, keepdims=True)
    above = logical_or(logical_not(p <= own), logical_and(equal(p, own), less(classes, labels)))
    inside = logical_and(labels >= 0, less(labels, p.shape[-1]))
    rank = sum(cast(above, i32), -1, keepdims=True)
    return mean(cast(logical_and(inside, less(rank, k)), f32))


def top_k(k: int) -> Metric:
    """`top_k_accuracy` for one k, as a metric of the name 'top_5' (and so on)."""

    def of_k(prediction: TensorLike, target: TensorLike) -> Tensor:
        return top_k_accuracy(prediction, target, k)

    of_k.__name__ = f"top_{k}"
    return of_k


# -- accumulated --------------------------------------------------------------------------------------------------------
def _sklearn(name: str) -> Any:
    try:
        import sklearn.metrics
    except ImportError:
        raise RuntimeUnavailableError(
            f"the metric {name!r} is computed by scikit-learn, which is not installed: pip install 'tensorwright[train]'"
        ) from None
    return sklearn.metrics


class _Accumulated:
    """Keeps what each batch leaves behind, until the result is asked for."""

    name = "metric"

    def __init__(self) -> None:
        _sklearn(self.name)
        self._targets: list[Array] = []
        self._predictions: list[Array] = []

    def reset(self) -> None:
        """Forgets everything."""
        self._targets, self._predictions = [], []

    def _keep(self, prediction: Array, target: Array) -> None:
        if prediction.shape[:1] != target.shape[:1]:
            raise InputError(f"{self.name}: {len(prediction)} predictions for {len(target)} targets")
        self._predictions.append(prediction)
        self._targets.append(target)

    def _all(self) -> tuple[Array, Array]:
        if not self._targets or not any(map(len, self._targets)):
            raise InputError(f"{self.name}: there is no example to judge; call update first")
        return np.concatenate(self._targets), np.concatenate(self._predictions)


def _scores(prediction: Any, name: str) -> Array:
    p = np.asarray(prediction)
    if p.ndim == 0:
        raise InputError(f"{name}: the prediction has no axis of examples: it is a scalar")
    return p.reshape(-1) if p.ndim == 2 and p.shape[1] == 1 else p


def _class_numbers(target: Any, scores: Array, name: str) -> Array:
    """Class numbers of a target of numbers or of one score per class."""
    t = np.asarray(target)
    if t.ndim and t.shape == scores.shape and t.ndim > 1:
        return t.argmax(-1).reshape(-1)
    t = t.reshape(-1)
    count = scores.size if scores.ndim == 1 else scores.size // scores.shape[-1] if scores.shape[-1] else 0
    if t.size != count:
        raise InputError(f"{name}: a prediction of shape {scores.shape} does not go with a target of shape {np.shape(target)}")
    if t.dtype.kind == "f" and not (t == np.trunc(t)).all():
        raise InputError(f"{name}: the target holds numbers that are no class numbers")
    return t.astype(np.int64)


class _OfClasses(_Accumulated):
    """Works on class numbers: the position of the largest score, or score >= threshold where there is one score."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def update(self, prediction: Any, target: Any) -> None:
        """Takes in scores (N, C), or logits (N) or (N, 1) of the positive class, and targets: class numbers or one-hot."""
        p = _scores(prediction, self.name)
        t = _class_numbers(target, p, self.name)
        chosen = (p >= self.threshold).astype(np.int64) if p.ndim == 1 else p.argmax(-1).reshape(-1)
        self._keep(chosen, t)


class _Averaged(_OfClasses):
    """precision, recall, F1: averaged over classes unless there are two."""

    def __init__(self, average: str | None = None, threshold: float = 0.0) -> None:
        super().__init__(threshold)
        known = ("binary", "micro", "macro", "weighted")
        if average is not None and average not in known:
            raise AttributeValueError(f"{self.name}: average is one of {', '.join(known)} or None, not {average!r}")
        self.average = average

    def _score(self) -> float:
        t, p = self._all()
        average = self.average or ("binary" if max(t.max(), p.max()) <= 1 else "macro")
        score = getattr(_sklearn(self.name), f"{self.name}_score")
        return float(score(t, p, average=average, zero_division=0))


class Precision(_Averaged):
    """True positives / predicted positives. Of more than two classes the mean over classes (average='macro').

    average    'binary', 'micro', 'macro', 'weighted' as in scikit-learn; None: 'binary' for classes 0 and 1, else 'macro'
    threshold  for models with one score: what counts as positive; 0 for logits, 0.5 for probabilities
    """

    name = "precision"

    def result(self) -> float:
        """The precision; 0 where nothing was predicted positive. Raises InputError without examples."""
        return self._score()


class Recall(_Averaged):
    """True positives / positives. Arguments as `Precision`."""

    name = "recall"

    def result(self) -> float:
        """The recall; 0 where there is no positive. Raises InputError without examples."""
        return self._score()


class F1(_Averaged):
    """The harmonic mean of precision and recall. Arguments as `Precision`."""

    name = "f1"

    def result(self) -> float:
        """The F1 score; 0 where precision and recall are. Raises InputError without examples."""
        return self._score()


class ConfusionMatrix(_OfClasses):
    """Counts, an array [true class, predicted class]. `classes` fixes its size; else it is the largest class seen + 1."""

    name = "confusion_matrix"

    def __init__(self, classes: int | None = None, threshold: float = 0.0) -> None:
        super().__init__(threshold)
        self.classes = classes

    def result(self) -> Array:
        """The matrix, i64. Raises InputError without examples, or for a class outside `classes`."""
        t, p = self._all()
        largest = int(max(t.max(), p.max()))
        count = self.classes or largest + 1
        if min(t.min(), p.min()) < 0 or largest >= count:
            raise InputError(f"confusion_matrix: a class number lies outside [0, {count})")
        return np.asarray(_sklearn(self.name).confusion_matrix(t, p, labels=np.arange(count)))


class AUC(_Accumulated):
    """The area under the ROC curve: the chance that a positive example scores above a negative one.

    Two classes: scores (N), (N, 1), or (N, 2) of which the difference counts; any monotonic score will do. More: the mean
    over classes of each against the rest (Hand and Till 2001 for multi_class='ovo'), on softmax(prediction), or on the
    prediction as it is with from_logits=False.
    """

    name = "auc"

    def __init__(self, multi_class: str = "ovr", average: str = "macro", from_logits: bool = True) -> None:
        super().__init__()
        if multi_class not in ("ovr", "ovo"):
            raise AttributeValueError(f"auc: multi_class is 'ovr' or 'ovo', not {multi_class!r}")
        self.multi_class, self.average, self.from_logits = multi_class, average, from_logits

    def update(self, prediction: Any, target: Any) -> None:
        """Takes in scores and targets: class numbers, or one-hot."""
        p = _scores(prediction, self.name).astype(np.float64)
        t = _class_numbers(target, p, self.name)
        self._keep(p if p.ndim == 1 else p.reshape(-1, p.shape[-1]), t)

    def result(self) -> float:
        """The area. Raises InputError where a class has no example: the area is then undefined."""
        t, p = self._all()
        score = _sklearn(self.name).roc_auc_score
        if p.ndim == 2 and p.shape[1] == 2:
            p = p[:, 1] - p[:, 0]
        classes = 2 if p.ndim == 1 else p.shape[1]
        missing = sorted(set(range(classes)) - set(t.tolist()))
        if missing or t.min() < 0 or t.max() >= classes:
            raise InputError(f"auc needs examples of every class of {classes}, and of no other; without any: {missing}")
        if p.ndim == 1:
            return float(score(t, p))
        if self.from_logits:
            e = np.exp(p - p.max(-1, keepdims=True))
            p = e / e.sum(-1, keepdims=True)
        return float(score(t, p, multi_class=self.multi_class, average=self.average))


# -- by name ------------------------------------------------------------------------------------------------------------
METRICS: Final[dict[str, Metric]] = {"accuracy": accuracy, "binary_accuracy": binary_accuracy, "mse": mse, "mae": mae}
ACCUMULATORS: Final[dict[str, Callable[[], Accumulator]]] = {
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "auc": AUC,
    "confusion_matrix": ConfusionMatrix,
}


def resolve(which: str | Metric | Accumulator) -> tuple[str, Metric | Accumulator]:
    """(name, function or accumulator) of a metric given by name or as itself; 'top_3' is `top_k(3)`.

    Raises AttributeValueError for an unknown name or another object, RuntimeUnavailableError for a metric whose library is
    not installed.
    """
    if isinstance(which, str):
        if which in METRICS:
            return which, METRICS[which]
        if which in ACCUMULATORS:
            return which, ACCUMULATORS[which]()
        if which.startswith("top_") and which[4:].isdecimal() and int(which[4:]) > 0:
            return which, top_k(int(which[4:]))
        known = ", ".join([*METRICS, "top_5", *ACCUMULATORS])
        raise AttributeValueError(f"unknown metric {which!r}; expected a function, an accumulator, or one of {known}")
    if isinstance(which, type):
        raise AttributeValueError(f"a metric is a function or an object, not a class: write {which.__name__}()")
    if isinstance(which, Accumulator):
        return which.name, which
    if callable(which):
        return getattr(which, "__name__", "metric"), which
    raise AttributeValueError(
        f"a metric is a name, a function (prediction, target) -> scalar, or an object with name, update, result and reset; "
        f"not {which!r}"
    )


def metric(which: str | Metric) -> tuple[str, Metric]:
    """(name, function) of a metric in the graph. Raises AttributeValueError for an unknown name, and for an accumulator."""
    name, found = resolve(which)
    if isinstance(found, Accumulator):
        raise AttributeValueError(f"the metric {name!r} is accumulated over all examples and cannot be part of a graph")
    return name, found


def separate(which: Iterable[str | Metric | Accumulator]) -> tuple[dict[str, Metric], dict[str, Accumulator]]:
    """Metrics in the graph and accumulators, each by name. Raises AttributeValueError as `resolve`, and for equal names."""
    functions: dict[str, Metric] = {}
    objects: dict[str, Accumulator] = {}
    for w in which:
        name, found = resolve(w)
        if name in functions or name in objects:
            raise AttributeValueError(f"two metrics have the name {name!r}")
        if isinstance(found, Accumulator):
            objects[name] = found
        else:
            functions[name] = found
    return functions, objects
