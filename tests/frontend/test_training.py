"""Losses against formulas, optimisers against hand-written numpy, and the training step as one graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tensorwright as tw
from tensorwright import losses, nn, optim
from tensorwright.frontend import evaluation_step, metrics, training_step
from tensorwright.ir.errors import AttributeValueError, ShapeError, TraceError
from tensorwright.ir.interp import run as interpret

from .support import Array, expand, run

RNG = np.random.default_rng(5)
P, T = RNG.standard_normal((6, 4)).astype(np.float32), RNG.standard_normal((6, 4)).astype(np.float32)
LABELS = np.array([0, 3, 1, 2, 2, 0])
PROBABILITY = RNG.uniform(0.01, 0.99, (6, 4)).astype(np.float32)
BITS = (RNG.random((6, 4)) > 0.5).astype(np.float32)
DENSE = scipy.special.softmax(RNG.standard_normal((6, 4)), -1).astype(np.float32)
LOGP = scipy.special.log_softmax(P.astype(np.float64), -1)
E = P.astype(np.float64) - T
CASES: list[tuple[str, Callable[..., Any], Any, Any, Array]] = [
    ("mse", losses.mse, P, T, E**2),
    ("mae", losses.mae, P, T, abs(E)),
    ("huber", lambda p, t, **k: losses.huber(p, t, 0.7, **k), P, T, np.where(abs(E) <= 0.7, E * E / 2, 0.7 * (abs(E) - 0.35))),
    ("cross_entropy", losses.cross_entropy, P, LABELS, -LOGP[np.arange(6), LABELS]),
    ("cross_entropy dense", losses.cross_entropy, P, DENSE, -(LOGP * DENSE).sum(-1)),
    ("nll", losses.nll, LOGP.astype(np.float32), LABELS, -LOGP[np.arange(6), LABELS]),
    (
        "binary",
        losses.binary_cross_entropy,
        PROBABILITY,
        BITS,
        -(BITS * np.log(PROBABILITY) + (1 - BITS) * np.log(1 - PROBABILITY)),
    ),
    ("binary logits", losses.binary_cross_entropy_with_logits, P, BITS, np.logaddexp(0, P.astype(np.float64)) - P * BITS),
    ("hinge", losses.hinge, P, 2 * BITS - 1, np.maximum(0, 1 - P * (2 * BITS - 1))),
    ("kl", losses.kl_divergence, LOGP.astype(np.float32), DENSE, (DENSE * (np.log(DENSE) - LOGP)).sum(-1)),
]


@pytest.mark.parametrize(("loss", "p", "t", "each"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_losses_are_their_formulas(loss: Callable[..., Any], p: Array, t: Array, each: Array) -> None:
    for reduction, want in (("none", each), ("sum", each.sum()), ("mean", each.mean())):
        np.testing.assert_allclose(run(lambda p, t, how=reduction: loss(p, t, reduction=how), p, t), want, rtol=2e-5, atol=1e-6)
    with pytest.raises(AttributeValueError, match="'mean', 'sum' or 'none'"):
        tw.trace(lambda p, t: loss(p, t, reduction="avg"), p, t)


def test_cross_entropy_options() -> None:
    smooth = -0.9 * LOGP[np.arange(6), LABELS] - 0.1 * LOGP.mean(-1)
    np.testing.assert_allclose(
        run(lambda p, t: losses.cross_entropy(p, t, label_smoothing=0.1), P, LABELS), smooth.mean(), rtol=1e-5
    )
    counted = LABELS != 2
    want = -LOGP[np.arange(6), LABELS][counted].mean()
    np.testing.assert_allclose(run(lambda p, t: losses.cross_entropy(p, t, ignore_index=2), P, LABELS), want, rtol=1e-5)
    images = RNG.standard_normal((2, 4, 3)).astype(np.float32)
    classes = RNG.integers(0, 4, (2, 3))
    each = -np.take_along_axis(scipy.special.log_softmax(images.astype(np.float64), 1), classes[:, None], 1)
    np.testing.assert_allclose(run(lambda p, t: losses.cross_entropy(p, t, axis=1), images, classes), each.mean(), rtol=1e-5)
    with pytest.raises(ShapeError, match="class numbers of shape"):
        tw.trace(losses.cross_entropy, P, DENSE[:3])


def test_losses_at_extremes() -> None:
    x = np.array([[1e4, -1e4], [-np.inf, 0.0]], np.float32)
    np.testing.assert_array_equal(run(lambda p, t: losses.cross_entropy(p, t, reduction="none"), x, np.array([1, 1])), [2e4, 0])
    big = run(
        lambda p, t: losses.binary_cross_entropy_with_logits(p, t, reduction="none"),
        np.array([1e4, -1e4], np.float32),
        np.zeros(2, np.float32),
    )
    np.testing.assert_array_equal(big, [1e4, 0])
    np.testing.assert_array_equal(
        run(lambda p, t: losses.binary_cross_entropy(p, t, reduction="none"), np.zeros(1, np.float32), np.ones(1, np.float32)),
        [100],
    )


def test_metrics() -> None:
    want = (P.argmax(-1) == LABELS).mean()
    np.testing.assert_allclose(run(metrics.accuracy, P, LABELS), want)
    np.testing.assert_allclose(run(metrics.accuracy, P, np.eye(4, dtype=np.float32)[LABELS]), want)
    np.testing.assert_allclose(run(metrics.binary_accuracy, P, BITS), ((P >= 0) == (BITS > 0.5)).mean())
    with pytest.raises(AttributeValueError, match="accuracy"):
        metrics.metric("unheard_of")


# -- optimisers: several steps on the same gradients, by hand in f64 ------------------------------------------------------
def sgd(p: Array, gs: list[Array], lr: float, momentum: float = 0, nesterov: bool = False, decay: float = 0) -> Array:
    v = np.zeros_like(p)
    for g in gs:
        d = g + decay * p
        v = momentum * v + d
        p = p - lr * (d + momentum * v if nesterov else v)
    return p


def adam(p: Array, gs: list[Array], lr: float, decay: float = 0, decoupled: float = 0) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gs, 1):
        p = p * (1 - lr * decoupled)
        d = g + decay * p
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


OPTIMIZERS: list[tuple[optim.Optimizer, Callable[..., Array], dict[str, Any]]] = [
    (optim.SGD(0.1), sgd, {}),
    (optim.SGD(0.1, momentum=0.9), sgd, {"momentum": 0.9}),
    (optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01), sgd, {"momentum": 0.9, "nesterov": True, "decay": 0.01}),
    (optim.Adam(0.1), adam, {}),
    (optim.Adam(0.1, weight_decay=0.01), adam, {"decay": 0.01}),
    (optim.AdamW(0.1, weight_decay=0.05), adam, {"decoupled": 0.05}),
]


@pytest.mark.parametrize(("optimizer", "reference", "options"), OPTIMIZERS, ids=[repr(o[0]) for o in OPTIMIZERS])
def test_optimisers_are_their_formulas(optimizer: optim.Optimizer, reference: Any, options: dict[str, Any]) -> None:
    params: Any = {"w": RNG.standard_normal((3, 2)).astype(np.float32), "b": [RNG.standard_normal(4).astype(np.float32)]}
    grads = [
        {"w": RNG.standard_normal((3, 2)).astype(np.float32), "b": [RNG.standard_normal(4).astype(np.float32)]} for _ in range(6)
    ]
    start, state = params, optimizer.init(params)
    for g in grads:
        params, state = run(optimizer.update, params, g, state, np.float32(0.05))
    want = reference(start["w"].astype(np.float64), [g["w"].astype(np.float64) for g in grads], 0.05, **options)
    np.testing.assert_allclose(params["w"], want, rtol=1e-5, atol=1e-6)
    want = reference(start["b"][0].astype(np.float64), [g["b"][0].astype(np.float64) for g in grads], 0.05, **options)
    np.testing.assert_allclose(params["b"][0], want, rtol=1e-5, atol=1e-6)


def test_the_optimisers_own_rate_is_used_without_one() -> None:
    p = {"w": np.ones(2, np.float32)}
    new, _ = run(lambda p, s: optim.SGD(0.25).update(p, p, s), p, {})
    np.testing.assert_array_equal(new["w"], [0.75, 0.75])


def test_wrong_hyperparameters_are_refused() -> None:
    for make in (
        lambda: optim.SGD(-1.0),
        lambda: optim.Adam(betas=(1.0, 0.9)),
        lambda: optim.SGD(0.1, nesterov=True),
        lambda: optim.AdamW(weight_decay=-1),
    ):
        with pytest.raises(AttributeValueError):
            make()


def test_clipping_by_global_norm() -> None:
    g = {"a": np.full(4, 3.0, np.float32), "b": np.full(9, 4.0, np.float32)}
    norm = math.sqrt(4 * 9 + 9 * 16)
    assert run(optim.global_norm, g) == pytest.approx(norm)
    clipped = run(lambda g: optim.clip_by_global_norm(g, 1.5), g)
    np.testing.assert_allclose(clipped["b"], g["b"] * 1.5 / norm, rtol=1e-5)
    np.testing.assert_array_equal(run(lambda g: optim.clip_by_global_norm(g, 100.0), g)["a"], g["a"])


# -- the step -------------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self) -> None:
        self.conv = nn.Conv2d(1, 4, 3, padding=1, seed=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(64, 10, seed=2)

    def __call__(self, image: Any) -> Any:
        y = tw.max_pool2d(tw.relu(self.bn(self.conv(image))), 2)
        return self.head(self.drop(y.reshape(y.shape[0], -1)))


X, Y = RNG.standard_normal((16, 1, 8, 8)).astype(np.float32), RNG.integers(0, 10, 16)
SPECS = (tw.spec(16, 1, 8, 8), tw.spec(16, dtype="i64"))


def steps(step: Any, batches: list[tuple[Array, Array]], lr: float = 1e-2) -> tuple[dict[str, Array], list[list[Array]]]:
    """What a trainer does, in the interpreter: the state, and the results of each step."""
    graph = expand(step.graph)
    state, results = list(step.initial_state().values()), []
    for x, y in batches:
        out = interpret(graph, [*state, np.float32(lr), x, y])
        state[: step.updated] = out[: step.updated]
        results.append(out[step.updated :])
    return dict(zip(step.state, state, strict=True)), results


def test_inputs_outputs_and_aliases_are_as_documented() -> None:
    step = training_step(Net(), losses.cross_entropy, optim.Adam(1e-2), *SPECS, metrics=["accuracy"], predictions=True)
    own = ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "head.weight", "head.bias"]
    states = [
        *own,
        "optimizer.step",
        *(f"optimizer.m.{n}" for n in own),
        *(f"optimizer.v.{n}" for n in own),
        "bn.running_mean",
        "bn.running_var",
        "rng",
    ]
    g = step.graph
    assert [i.attrs["name"] for i in g.inputs] == [*states, "learning_rate", "image", "target"]
    assert [i.attrs["role"] for i in g.inputs] == ["state"] * len(states) + ["data"] * 3
    assert list(step.state) == states
    assert step.updated == len(states)
    assert g.output_names == (*states, "loss", "accuracy", "prediction")
    assert step.results == ("loss", "accuracy", "prediction")
    assert step.batch == ("image", "target")
    assert g.aliases == tuple((i, i) for i in range(len(states)))
    assert all(o.type == i.type for o, i in zip(g.outputs, g.inputs[: len(states)], strict=False))
    assert tw.Graph.parse(str(g)) == g


def test_training_learns_and_is_stored_back() -> None:
    net = Net()
    before = net.state_dict()
    step = training_step(net, losses.cross_entropy, optim.Adam(), *SPECS, metrics=["accuracy"])
    state, results = steps(step, [(X, Y)] * 20)
    assert results[-1][0] < 0.4 * results[0][0]
    assert results[-1][1] > 0.8
    assert state["rng"] == step.state["rng"] + np.uint64(20)
    assert state["optimizer.step"] == 20
    assert net.state_dict().keys() == before.keys()
    np.testing.assert_array_equal(net.conv.weight.data, before["conv.weight"])  # nothing until it is stored
    step.store(state)
    np.testing.assert_array_equal(net.conv.weight.data, state["conv.weight"])
    np.testing.assert_array_equal(net.bn.running_mean.data, state["bn.running_mean"])
    evaluation = evaluation_step(net, losses.cross_entropy, *SPECS, metrics=["accuracy"])
    assert evaluation.arguments == ("image", "target")
    loss, accuracy = interpret(evaluation.graph, [X, Y, *evaluation.values().values()])
    assert loss < 1
    assert accuracy > 0.8


def test_one_sgd_step_is_the_gradient_step_by_hand() -> None:
    net = nn.Linear(3, 2, seed=5)
    x, y = RNG.standard_normal((4, 3)).astype(np.float32), RNG.standard_normal((4, 2)).astype(np.float32)
    step = training_step(net, losses.mse, optim.SGD(1.0), tw.spec(4, 3), tw.spec(4, 2))
    state, ((loss,),) = steps(step, [(x, y)], lr=0.5)
    w, b = net.weight.data.astype(np.float64), net.bias.data.astype(np.float64)
    e = x @ w.T + b - y
    np.testing.assert_allclose(loss, (e**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(state["weight"], w - 0.5 * (2 * e.T @ x / 8), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["bias"], b - 0.5 * (2 * e.sum(0) / 8), rtol=1e-5, atol=1e-6)
    assert list(step.state) == ["weight", "bias"]  # no optimiser state, nothing random


def test_running_statistics_follow_the_batches() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            self.bn = nn.BatchNorm1d(3)

        def __call__(self, x: Any) -> Any:
            return self.bn(self.bn(x))  # the second call sees what the first one wrote

    x = (RNG.standard_normal((8, 3)) * 2 + 5).astype(np.float32)
    step = training_step(Norm(), losses.mse, optim.SGD(0.1), tw.spec(8, 3), tw.spec(8, 3))
    state, _ = steps(step, [(x, x)])
    first = 0.1 * x.astype(np.float64).mean(0)
    np.testing.assert_allclose(state["bn.running_mean"], 0.9 * first, rtol=1e-5, atol=1e-6)  # the second batch has mean 0


def test_random_draws_differ_from_step_to_step_and_repeat_with_the_seed() -> None:
    net = nn.Sequential(nn.Linear(8, 64, seed=1), nn.Dropout(0.5))
    args = (net, losses.mse, optim.SGD(1e-9), tw.spec(2, 8), tw.spec(2, 64))
    x, y = np.ones((2, 8), np.float32), np.zeros((2, 64), np.float32)
    a = [float(r[0]) for r in steps(training_step(*args, seed=3), [(x, y)] * 3, lr=0.0)[1]]
    b = [float(r[0]) for r in steps(training_step(*args, seed=3), [(x, y)] * 3, lr=0.0)[1]]
    c = [float(r[0]) for r in steps(training_step(*args, seed=4), [(x, y)] * 3, lr=0.0)[1]]
    assert a == b
    assert len(set(a)) == 3
    assert not set(a) & set(c)


def test_frozen_parameters_and_frozen_norms_stay() -> None:
    net = Net()
    net.conv.weight.requires_grad = False
    net.bn.eval()
    step = training_step(net, losses.cross_entropy, optim.SGD(0.1), *SPECS)
    names = list(step.state)
    assert set(names[step.updated :]) == {"conv.weight", "bn.running_mean", "bn.running_var"}
    state, _ = steps(step, [(X, Y)] * 2)
    np.testing.assert_array_equal(state["conv.weight"], net.conv.weight.data)
    assert (state["head.weight"] != net.head.weight.data).any()


def test_clipping_limits_the_step() -> None:
    net = nn.Linear(3, 2, seed=5)
    x, y = np.full((4, 3), 100.0, np.float32), np.zeros((4, 2), np.float32)
    step = training_step(net, losses.mse, optim.SGD(1.0), tw.spec(4, 3), tw.spec(4, 2), clip_global_norm=1.0)
    state, _ = steps(step, [(x, y)], lr=1.0)
    moved = math.sqrt(sum(float(((state[n] - p.data) ** 2).sum()) for n, p in net.named_parameters()))
    assert moved == pytest.approx(1.0, rel=1e-3)


def test_wrong_steps_are_refused() -> None:
    with pytest.raises(TraceError, match="and, last, for the target"):
        training_step(Net(), losses.cross_entropy, optim.SGD(0.1), tw.spec(16, 1, 8, 8))
    with pytest.raises(TraceError, match="no trainable parameter"):
        training_step(nn.ReLU(), losses.mse, optim.SGD(0.1), tw.spec(2), tw.spec(2))
    with pytest.raises(ShapeError, match="scalar"):
        training_step(
            nn.Linear(2, 2), lambda p, t: losses.mse(p, t, reduction="none"), optim.SGD(0.1), tw.spec(2, 2), tw.spec(2, 2)
        )
    with pytest.raises(ShapeError, match="two values per channel"):
        training_step(nn.Sequential(nn.BatchNorm1d(2)), losses.mse, optim.SGD(0.1), tw.spec(1, 2), tw.spec(1, 2))
