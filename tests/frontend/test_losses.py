"""Every loss: values by hand in f64, gradients against central differences, compiled code, and edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tensorwright as tw
from tensorwright import losses, nn
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError

from .checking import check
from .support import run

pytestmark = pytest.mark.unvalidated("each compiled result is compared with the interpreter here, as validation would")

RNG = np.random.default_rng(23)
Array = np.ndarray[Any, Any]


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


X, Y = floats(5, 4), floats(5, 4)
LABELS = np.array([1, 0, 3, 2, 1])
DENSE = scipy.special.softmax(floats(5, 4), -1).astype(np.float32)
LOGP = scipy.special.log_softmax(X.astype(np.float64), -1)
P = scipy.special.expit(X).astype(np.float32)
BITS = (RNG.random((5, 4)) < 0.5).astype(np.float32)
WEIGHT = np.array([0.5, 2.0, 1.0, 0.25], np.float32)
E = (X - Y).astype(np.float64)
HIT = np.eye(4)[LABELS]
SOFT = HIT * 0.9 + 0.1 / 4
BCE = -(BITS * np.log(P.astype(np.float64)) + (1 - BITS) * np.log(1 - P.astype(np.float64)))
COS = (X * Y).sum(-1) / np.linalg.norm(X, axis=-1) / np.linalg.norm(Y, axis=-1)
SIGNS = np.array([1, -1, 1, -1, -1])
# name -> (loss, arguments, one value per example or element)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Array]] = {
    "mse": (losses.mse, (X, Y), E**2),
    "mae": (losses.mae, (X, Y), abs(E)),
    "huber": (
        lambda p, t, **k: losses.huber(p, t, 0.7, **k),
        (X, Y),
        np.where(abs(E) <= 0.7, E**2 / 2, 0.7 * (abs(E) - 0.35)),
    ),
    "smooth_l1": (
        lambda p, t, **k: losses.smooth_l1(p, t, 0.5, **k),
        (X, Y),
        np.where(abs(E) < 0.5, E**2, abs(E) - 0.25),
    ),
    "cosine": (losses.cosine, (X, Y), 1 - COS),
    "cosine_embedding": (
        lambda a, b, t, **k: losses.cosine_embedding(a, b, t, 0.1, **k),
        (X, Y, SIGNS),
        np.where(SIGNS > 0, 1 - COS, np.maximum(COS - 0.1, 0)),
    ),
    "cross_entropy": (losses.cross_entropy, (X, LABELS), -(LOGP * HIT).sum(-1)),
    "cross_entropy dense": (losses.cross_entropy, (X, DENSE), -(LOGP * DENSE).sum(-1)),
    "cross_entropy smooth": (
        lambda p, t, **k: losses.cross_entropy(p, t, label_smoothing=0.1, **k),
        (X, LABELS),
        -(LOGP * SOFT).sum(-1),
    ),
    "cross_entropy dense, smooth, weighted": (
        lambda p, t, **k: losses.cross_entropy(p, t, label_smoothing=0.1, weight=WEIGHT, **k),
        (X, DENSE),
        -(LOGP * WEIGHT * (DENSE * 0.9 + 0.025)).sum(-1),
    ),
    "nll": (losses.nll, (LOGP.astype(np.float32), LABELS), -(LOGP * HIT).sum(-1)),
    "binary_cross_entropy": (losses.binary_cross_entropy, (P, BITS), BCE),
    "binary_cross_entropy_with_logits": (losses.binary_cross_entropy_with_logits, (X, BITS), BCE),
    "binary_cross_entropy_with_logits weighted": (
        lambda p, t, **k: losses.binary_cross_entropy_with_logits(p, t, weight=P[:, :1], pos_weight=WEIGHT, **k),
        (X, BITS),
        BCE * P[:, :1] * np.where(BITS > 0, WEIGHT, 1),
    ),
    "hinge": (losses.hinge, (X, BITS * 2 - 1), np.maximum(1 - X * (BITS * 2 - 1), 0)),
    "kl_divergence": (losses.kl_divergence, (LOGP.astype(np.float32), DENSE), (DENSE * (np.log(DENSE) - LOGP)).sum(-1)),
    "kl_div": (losses.kl_div, (LOGP.astype(np.float32), DENSE), DENSE * (np.log(DENSE) - LOGP)),
    "kl_div of logarithms": (
        lambda p, t, **k: losses.kl_div(p, t, log_target=True, **k),
        (LOGP.astype(np.float32), np.log(DENSE)),
        DENSE * (np.log(DENSE) - LOGP),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    loss, arguments, each = CASES[name]
    # The expected values are in f64 of f32 data; weights given to a loss are f32.
    for reduction, want in (("none", each), ("sum", each.sum()), ("mean", each.mean())):
        (found,) = check(lambda *a, r=reduction: loss(*a, reduction=r), *arguments, compiled=reduction != "sum")
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeValueError, match="'mean', 'sum' or 'none'"):
        run(lambda *a: loss(*a, reduction="average"), *arguments)


def test_class_weights_and_ignored_labels() -> None:
    labels = np.array([1, -100, 3, 2, 1])
    counted = labels >= 0
    w = WEIGHT[np.maximum(labels, 0)] * counted
    nll = -(LOGP * HIT).sum(-1)
    cases: list[tuple[dict[str, Any], Array, float]] = [
        ({"weight": WEIGHT}, nll * w, w.sum()),
        ({}, nll * counted, counted.sum()),
        ({"ignore_index": 1}, nll * (LABELS != 1), (LABELS != 1).sum()),
    ]
    for options, each, total in cases:
        target = LABELS if "ignore_index" in options else labels
        for loss, scores in ((losses.cross_entropy, X), (losses.nll, LOGP.astype(np.float32))):
            for reduction, want in (("none", each), ("sum", each.sum()), ("mean", each.sum() / total)):
                (found,) = check(
                    lambda p, t, f=loss, r=reduction, o=options: f(p, t, r, **o), scores, target, compiled=reduction == "mean"
                )
                np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)
    # Nothing counts: 0, not 0 / 0. A label outside the classes: nothing is picked.
    assert run(losses.cross_entropy, X, np.full(5, -100)) == 0
    found = run(lambda p, t: losses.cross_entropy(p, t, "none"), X, np.array([0, 4, 2, -1, 3]))
    assert found[1] == found[3] == 0 and (found[[0, 2, 4]] > 0).all()
    # Unsigned labels cannot be -100: the plain mean.
    np.testing.assert_allclose(run(losses.cross_entropy, X, LABELS.astype(np.uint8)), nll.mean(), rtol=1e-6)


def test_classes_on_another_axis() -> None:
    x, t = floats(2, 4, 3), RNG.integers(0, 4, (2, 3))
    want = -np.take_along_axis(scipy.special.log_softmax(x.astype(np.float64), 1), t[:, None], 1).mean()
    for loss in (lambda p, t: losses.cross_entropy(p, t, axis=1), nn.CrossEntropyLoss()):
        (found,) = check(loss, x, t)
        np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(run(lambda p, t: nn.NLLLoss()(tw.log_softmax(p, 1), t), x, t), want, rtol=1e-6)
    np.testing.assert_allclose(run(nn.CrossEntropyLoss(), X[0], np.array(1)), -LOGP[0, 1], rtol=1e-6)


LAYERS: list[tuple[nn.Module, Callable[..., Any], tuple[Any, ...]]] = [
    (nn.MSELoss("sum"), lambda p, t: losses.mse(p, t, "sum"), (X, Y)),
    (nn.L1Loss(), losses.mae, (X, Y)),
    (nn.SmoothL1Loss(beta=0.3), lambda p, t: losses.smooth_l1(p, t, 0.3), (X, Y)),
    (nn.HuberLoss(delta=0.3), lambda p, t: losses.huber(p, t, 0.3), (X, Y)),
    (nn.CrossEntropyLoss(WEIGHT), lambda p, t: losses.cross_entropy(p, t, weight=WEIGHT), (X, LABELS)),
    (nn.NLLLoss(ignore_index=2), lambda p, t: losses.nll(p, t, ignore_index=2), (X, LABELS)),
    (nn.BCELoss(), losses.binary_cross_entropy, (P, BITS)),
    (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        lambda p, t: losses.binary_cross_entropy_with_logits(p, t, pos_weight=WEIGHT),
        (X, BITS),
    ),
    (nn.KLDivLoss("batchmean"), losses.kl_divergence, (LOGP.astype(np.float32), DENSE)),
    (nn.CosineEmbeddingLoss(0.2), lambda a, b, t: losses.cosine_embedding(a, b, t, 0.2), (X, Y, SIGNS)),
]


@pytest.mark.parametrize(("layer", "function", "arguments"), LAYERS, ids=[type(m).__name__ for m, _, _ in LAYERS])
def test_layers_are_their_functions(layer: nn.Module, function: Callable[..., Any], arguments: Any) -> None:
    np.testing.assert_allclose(run(layer, *arguments), run(function, *arguments), rtol=1e-6)
    with pytest.raises(AttributeValueError, match="reduction is one of"):
        type(layer)(reduction="all")


# -- edges ----------------------------------------------------------------------------------------------------------------


def slope(loss: Callable[..., Any], *arguments: Any) -> Any:
    return run(tw.grad(lambda *a: tw.sum(loss(*a, reduction="none"))), *arguments)


def test_logits_of_any_size() -> None:
    x = np.array([-1e4, -50, -20, 0, 20, 50, 1e4], np.float32)
    for bit in (0.0, 1.0):
        t = np.full(7, bit, np.float32)
        want = np.logaddexp(0, (1 - 2 * bit) * x.astype(np.float64))
        found = run(lambda p, t: losses.binary_cross_entropy_with_logits(p, t, "none"), x, t)
        np.testing.assert_allclose(found, want, rtol=3e-7)  # no cancellation, also where the loss is tiny
        found = slope(losses.binary_cross_entropy_with_logits, x, t)
        np.testing.assert_allclose(found, scipy.special.expit(x.astype(np.float64)) - bit, rtol=1e-5, atol=1e-7)


def test_probabilities_of_zero_and_one() -> None:
    p, t = np.array([0, 0, 1, 1], np.float32), np.array([0, 1, 0, 1], np.float32)
    found = run(lambda p, t: losses.binary_cross_entropy(p, t, "none"), p, t)
    np.testing.assert_array_equal(found, [0, 100, 100, 0])
    np.testing.assert_allclose(slope(losses.binary_cross_entropy, p, t), [1, -1e12, 1e12, -1], rtol=1e-6)


def test_kinks_have_the_gradient_of_pytorch() -> None:
    zero = np.zeros(3, np.float32)
    assert (slope(losses.mae, zero, zero) == 0).all()
    assert (
        slope(lambda p, t, reduction: losses.huber(p, t, 1.0, reduction), np.array([1, -1], np.float32), zero[:2]) == [1, -1]
    ).all()
    assert (slope(losses.kl_div, zero, zero) == 0).all()
    assert np.isfinite(slope(losses.cosine, np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))).all()


def test_second_derivatives_at_zero() -> None:
    """Curvatures where a loss written with |e| would give 0."""
    zero = np.zeros(2, np.float32)

    def curvature(loss: Callable[[Any], Any]) -> Any:
        return run(tw.grad(lambda x: tw.sum(tw.grad(lambda x: tw.sum(loss(x)))(x))), zero)

    assert (curvature(lambda x: losses.huber(x, zero, reduction="none")) == 1).all()
    assert (curvature(lambda x: losses.smooth_l1(x, zero, 0.5, reduction="none")) == 2).all()
    assert (curvature(tw.softplus) == 0.25).all()
    assert (curvature(lambda x: losses.binary_cross_entropy_with_logits(x, zero, reduction="none")) == 0.25).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"squeeze\(-1\).*\n(.*\n)*.*test_losses"):
        tw.trace(losses.mse, tw.spec(5, 1), tw.spec(5))
    with pytest.raises(ShapeError, match=r"one-hot integers"):
        tw.trace(losses.cross_entropy, tw.spec(5, 4), tw.spec(5, 4, dtype="i32"))
    with pytest.raises(DTypeError, match="astype"):
        tw.trace(losses.cross_entropy, tw.spec(5, 4), tw.spec(5, dtype="bool"))
    with pytest.raises(ShapeError, match=r"one number per class, shape \(4,\)"):
        tw.trace(lambda p, t: losses.cross_entropy(p, t, weight=np.ones(3)), tw.spec(5, 4), tw.spec(5, dtype="i32"))
    with pytest.raises(AttributeValueError, match="label_smoothing"):
        tw.trace(lambda p, t: losses.cross_entropy(p, t, label_smoothing=2.0), tw.spec(5, 4), tw.spec(5, dtype="i32"))
    with pytest.raises(AttributeValueError, match="ignore_index goes with class numbers"):
        tw.trace(lambda p, t: losses.cross_entropy(p, t, ignore_index=1), tw.spec(5, 4), tw.spec(5, 4))
    with pytest.raises(ShapeError, match="class numbers of shape"):
        tw.trace(losses.nll, tw.spec(5, 4), tw.spec(5))
    with pytest.raises(ShapeError, match="1 and -1"):
        tw.trace(losses.cosine_embedding, tw.spec(5, 4), tw.spec(5, 4), tw.spec(4))
    with pytest.raises(AttributeValueError, match="delta"):
        tw.trace(lambda p, t: losses.huber(p, t, 0.0), tw.spec(5), tw.spec(5))


# -- CTC ------------------------------------------------------------------------------------------------------------------


def ctc_by_enumeration(logp: Array, labels: list[int], blank: int) -> float:
    """-log of the sum over every string of classes that collapses to the labels."""
    total = 0.0
    for string in itertools.product(range(logp.shape[1]), repeat=len(logp)):
        merged = [c for i, c in enumerate(string) if i == 0 or c != string[i - 1]]
        if [c for c in merged if c != blank] == labels:
            total += float(np.exp(sum(logp[t, c] for t, c in enumerate(string))))
    return -np.log(total) if total else np.inf


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc(blank: int) -> None:
    others = [c for c in range(3) if c != blank]
    texts = [[others[0], others[1]], [others[1], others[1]], [], [others[0]]]
    targets = np.array([(t + [-7, -7])[:2] for t in texts])  # what follows the length does not count
    sizes, times = np.array([len(t) for t in texts]), np.array([5, 4, 5, 2])
    x = floats(5, 4, 3)

    def loss(x: Any, t: Any, a: Any, b: Any, reduction: str = "none") -> Any:
        return losses.ctc(tw.log_softmax(x), t, a, b, blank, reduction)

    logp = scipy.special.log_softmax(x.astype(np.float64), -1)
    want = np.array([ctc_by_enumeration(logp[: times[i], i], texts[i], blank) for i in range(4)])
    (found,) = check(loss, x, targets, times, sizes)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    mean = run(lambda *a: loss(*a, reduction="mean"), x, targets, times, sizes)
    np.testing.assert_allclose(mean, (want / np.maximum(sizes, 1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        run(nn.CTCLoss(blank, "sum"), logp.astype(np.float32), targets, times, sizes), want.sum(), rtol=1e-5
    )


def test_ctc_that_cannot_be() -> None:
    x = scipy.special.log_softmax(floats(2, 4, 3), -1)
    targets, times, sizes = np.array([[1, 1], [1, 2], [1, 2], [1, 2]]), np.array([2, 2, 0, 0]), np.array([2, 2, 2, 0])
    for zero in (False, True):
        out = 0 if zero else np.inf
        found = run(lambda *a, z=zero: losses.ctc(*a, reduction="none", zero_infinity=z), x, targets, times, sizes)
        assert found[0] == out and np.isfinite(found[1]) and found[2] == out and found[3] == 0
        g = run(tw.grad(lambda *a, z=zero: tw.sum(losses.ctc(*a, reduction="none", zero_infinity=z))), x, targets, times, sizes)
        assert np.isfinite(g).all() and (g[:, [0, 2]] == 0).all() and (g[:, 1] != 0).any()
    with pytest.raises(ShapeError, match=r"\(T, N, C\)"):
        tw.trace(losses.ctc, tw.spec(4, 3), tw.spec(4, 2, dtype="i32"), tw.spec(4, dtype="i32"), tw.spec(4, dtype="i32"))
    with pytest.raises(DTypeError, match="input_lengths holds integers"):
        tw.trace(losses.ctc, tw.spec(5, 4, 3), tw.spec(4, 2, dtype="i32"), tw.spec(4), tw.spec(4, dtype="i32"))
    with pytest.raises(ShapeError, match="one number per example"):
        tw.trace(losses.ctc, tw.spec(5, 4, 3), tw.spec(4, 2, dtype="i32"), tw.spec(4, dtype="i32"), tw.spec(3, dtype="i32"))
    with pytest.raises(AttributeValueError, match="blank"):
        tw.trace(
            lambda *a: losses.ctc(*a, blank=3),
            tw.spec(5, 4, 3), tw.spec(4, 2, dtype="i32"), tw.spec(4, dtype="i32"), tw.spec(4, dtype="i32"),
        )  # fmt: skip


def test_ctc_of_impossible_classes_and_long_sequences() -> None:
    x = scipy.special.log_softmax(floats(400, 1, 5), -1)
    x[:, :, 4] = -np.inf
    a = (np.array([[1, 2, 3]]), np.array([400]), np.array([3]))
    found = run(losses.ctc, x, *a)
    assert np.isfinite(found) and np.isfinite(run(tw.grad(losses.ctc), x, *a)).all()
