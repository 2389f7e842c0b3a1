"""Metrics in the graph against numpy, accumulated ones against scikit-learn over all examples at once."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import tensorwright as tw
from tensorwright import metrics
from tensorwright.ir.errors import AttributeValueError, InputError, RuntimeUnavailableError, ShapeError

from .support import Array, run

RNG = np.random.default_rng(8)
SCORES = RNG.standard_normal((60, 5)).astype(np.float32)
LABELS = RNG.integers(0, 5, 60)
LOGITS = RNG.standard_normal(80).astype(np.float32)
BITS = ((LOGITS + RNG.standard_normal(80)) > 0).astype(np.int64)


def in_batches(metric: metrics.Accumulator, prediction: Array, target: Array) -> Any:
    metric.reset()
    for start in range(0, len(target), 17):
        metric.update(prediction[start : start + 17], target[start : start + 17])
    return metric.result()


def test_accuracy() -> None:
    want = (SCORES.argmax(-1) == LABELS).mean()
    onehot = np.eye(5, dtype=np.float32)[LABELS]
    for target in (LABELS, LABELS.astype(np.uint8), onehot, onehot.astype(np.int32)):
        np.testing.assert_allclose(run(metrics.accuracy, SCORES, target), want)
    maps, at = RNG.standard_normal((2, 3, 5)).astype(np.float32), RNG.integers(0, 5, (2, 3))
    np.testing.assert_allclose(run(metrics.accuracy, maps, at), (maps.argmax(-1) == at).mean())
    np.testing.assert_allclose(run(metrics.binary_accuracy, LOGITS, BITS), ((LOGITS >= 0) == BITS).mean())
    with pytest.raises(ShapeError, match=r"class numbers of shape \(60,\)"):
        tw.trace(metrics.accuracy, SCORES, LABELS[:, None])
    with pytest.raises(ShapeError, match=r"squeeze\(-1\)"):
        tw.trace(metrics.binary_accuracy, LOGITS[:, None], BITS)


def test_top_k() -> None:
    for k in (1, 2, 3, 5):
        want = sk.top_k_accuracy_score(LABELS, SCORES, k=k, labels=range(5)) if k < 5 else 1.0
        for metric in (metrics.top_k(k), metrics.resolve(f"top_{k}")[1]):
            np.testing.assert_allclose(run(metric, SCORES, LABELS), want, rtol=1e-6)
        np.testing.assert_allclose(run(metrics.top_k(k), SCORES, np.eye(5, dtype=np.float32)[LABELS]), want, rtol=1e-6)
    assert metrics.top_k(3).__name__ == "top_3"
    # Ties go to the first; NaN and labels outside the classes are no hits.
    ties = np.zeros((5, 4), np.float32)
    ties[4, 3] = np.nan
    assert run(lambda p, t: metrics.top_k_accuracy(p, t, 2), ties, np.array([0, 1, 2, -1, 3])) == pytest.approx(2 / 5)
    exe = tw.compile(metrics.top_k(2), tw.spec(60, 5), tw.spec(60, dtype="i64"))
    np.testing.assert_allclose(exe(SCORES, LABELS), run(metrics.top_k(2), SCORES, LABELS))
    with pytest.raises(AttributeValueError, match="positive int"):
        tw.trace(metrics.top_k(0), SCORES, LABELS)


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_averaged_metrics(name: str) -> None:
    kind = {"precision": metrics.Precision, "recall": metrics.Recall, "f1": metrics.F1}[name]
    score = getattr(sk, f"{name}_score")
    predicted = SCORES.argmax(-1)
    assert in_batches(kind(), SCORES, LABELS) == pytest.approx(score(LABELS, predicted, average="macro"))
    for average in ("micro", "weighted"):
        assert in_batches(kind(average), SCORES, LABELS) == pytest.approx(score(LABELS, predicted, average=average))
    assert in_batches(kind(), SCORES, np.eye(5)[LABELS]) == pytest.approx(score(LABELS, predicted, average="macro"))
    for logits, threshold in ((LOGITS, 0.0), (LOGITS[:, None], 0.0), (1 / (1 + np.exp(-LOGITS)), 0.5)):
        assert in_batches(kind(threshold=threshold), logits, BITS) == pytest.approx(score(BITS, LOGITS >= 0))
    assert in_batches(kind(), np.stack([-LOGITS, LOGITS], 1), BITS) == pytest.approx(score(BITS, LOGITS >= 0))
    assert in_batches(kind(), np.full(4, -1.0), np.array([0, 0, 0, 0])) == 0
    with pytest.raises(AttributeValueError, match="average is one of"):
        kind("samples")


def test_confusion_matrix() -> None:
    want = sk.confusion_matrix(LABELS, SCORES.argmax(-1))
    np.testing.assert_array_equal(in_batches(metrics.ConfusionMatrix(), SCORES, LABELS), want)
    few = metrics.ConfusionMatrix(classes=4)
    np.testing.assert_array_equal(
        in_batches(few, np.eye(4)[[0, 1, 1]], np.array([0, 1, 0])), np.diag([1, 1, 0, 0]) + np.eye(4, k=1) * [0, 1, 0, 0]
    )
    with pytest.raises(InputError, match=r"outside \[0, 4\)"):
        in_batches(few, SCORES, LABELS)


def test_area_under_the_curve() -> None:
    want = sk.roc_auc_score(BITS, LOGITS)
    for scores in (LOGITS, LOGITS[:, None], np.stack([-LOGITS, LOGITS], 1)):
        assert in_batches(metrics.AUC(), scores, BITS) == pytest.approx(want)
    p = np.exp(SCORES.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    for how in ("ovr", "ovo"):
        want = sk.roc_auc_score(LABELS, p, multi_class=how)
        assert in_batches(metrics.AUC(how), SCORES, LABELS) == pytest.approx(want)
        assert in_batches(metrics.AUC(how, from_logits=False), p, LABELS) == pytest.approx(want)
    with pytest.raises(InputError, match=r"every class of 2.*without any: \[1\]"):
        in_batches(metrics.AUC(), LOGITS, np.zeros(80, int))


def test_by_name_and_apart() -> None:
    functions, objects = metrics.separate(["accuracy", "top_2", "f1", metrics.AUC(), tw.losses.mae])
    assert list(functions) == ["accuracy", "top_2", "mae"] and list(objects) == ["f1", "auc"]

    class Count:
        name = "count"

        def __init__(self) -> None:
            self.seen = 0

        def update(self, prediction: Any, target: Any) -> None:
            self.seen += len(target)

        def result(self) -> float:
            return float(self.seen)

        def reset(self) -> None:
            self.seen = 0

    assert isinstance(Count(), metrics.Accumulator)
    assert metrics.separate([Count()])[1]["count"].name == "count"
    assert in_batches(Count(), SCORES, LABELS) == 60
    with pytest.raises(AttributeValueError, match="two metrics have the name 'f1'"):
        metrics.separate(["f1", metrics.F1()])
    with pytest.raises(AttributeValueError, match=r"not a class: write AUC\(\)"):
        metrics.resolve(metrics.AUC)  # type: ignore[arg-type]
    with pytest.raises(AttributeValueError, match=r"accuracy.*top_5.*auc"):
        metrics.resolve("top_none")
    with pytest.raises(AttributeValueError, match="cannot be part of a graph"):
        metrics.metric("auc")
    with pytest.raises(AttributeValueError, match="a metric is a name, a function"):
        metrics.resolve(3)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="no example to judge"):
        metrics.F1().result()
    with pytest.raises(InputError, match=r"prediction of shape \(60, 5\) does not go with a target of shape \(59,\)"):
        metrics.F1().update(SCORES, LABELS[:-1])
    with pytest.raises(InputError, match="no class numbers"):
        metrics.F1().update(SCORES, LABELS + 0.5)
    with pytest.raises(InputError, match="scalar"):
        metrics.AUC().update(1.0, 1)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(RuntimeUnavailableError, match=r"'f1' is computed by scikit-learn.*tensorwright\[train\]"):
        metrics.resolve("f1")
    assert metrics.resolve("accuracy")[0] == "accuracy"
