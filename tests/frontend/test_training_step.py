"""What a training step can hold besides loss and optimiser: penalties, clipping, weights, the guard, averages, accumulation."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import losses, nn, optim, regularizers
from tensorwright.driver import build
from tensorwright.frontend import training_step
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError, TraceError
from tensorwright.ir.interp import run as interpret
from tensorwright.settings import flags

from .support import Array, expand, numeric_gradient, run

RNG = np.random.default_rng(21)
X, Y = RNG.standard_normal((12, 6)).astype(np.float32), RNG.integers(0, 3, 12)
SPECS = (tw.spec(12, 6), tw.spec(12, dtype="i64"))
WEIGHT = RNG.uniform(0.1, 2.0, 12).astype(np.float32)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, seed=1), nn.Tanh(), nn.Linear(8, 3, seed=2))


class Step:
    """A traced step in the interpreter, with its state."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.traced = training_step(*args, **options)
        self.graph = expand(self.traced.graph)
        self.state = self.traced.initial_state()

    def __call__(self, *batch: Any, lr: float = 0.1) -> dict[str, Any]:
        out = interpret(self.graph, [*self.state.values(), np.float32(lr), *batch])
        self.state.update(zip(self.traced.state, out[: self.traced.updated], strict=False))
        return dict(zip(self.traced.results, out[self.traced.updated :], strict=True))


def gradients(*args: Any, batch: Any = (X, Y), **options: Any) -> dict[str, Array]:
    """The gradients of a step: what plain descent at rate 1 subtracts."""
    step = Step(args[0] if args else net(), losses.cross_entropy, optim.GradientDescent(1.0), *SPECS, **options)
    before = {n: a.copy() for n, a in step.state.items()}
    step(*batch, lr=1.0)
    return {n: before[n] - step.state[n] for n in before}


def close(a: dict[str, Array], b: dict[str, Array], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    # sums of a dozen f32 products in another order
    assert a.keys() == b.keys()
    for n, value in a.items():
        np.testing.assert_allclose(value, b[n], rtol=rtol, atol=atol, err_msg=n)


# Penalties


def test_penalties_are_minimised_with_the_loss_and_reported_beside_it() -> None:
    chosen = {"*.weight": regularizers.L2(0.3), "0.*": regularizers.L1(0.2)}
    plain, penalised = gradients(), gradients(regularizers=chosen)
    p = net().state_dict()
    close(penalised, {
        "0.weight": plain["0.weight"] + 0.6 * p["0.weight"] + 0.2 * np.sign(p["0.weight"]),
        "0.bias": plain["0.bias"] + 0.2 * np.sign(p["0.bias"]),
        "2.weight": plain["2.weight"] + 0.6 * p["2.weight"],
        "2.bias": plain["2.bias"],
    })  # fmt: skip
    step = Step(net(), losses.cross_entropy, optim.SGD(0.1), *SPECS, metrics=["accuracy"], regularizers=chosen)
    found = step(X, Y)
    assert list(found) == ["loss", "accuracy", "penalty"]
    squares = sum((p[n].astype(np.float64) ** 2).sum() for n in ("0.weight", "2.weight"))
    want = 0.3 * squares + 0.2 * sum(abs(p[n]).sum() for n in ("0.weight", "0.bias"))
    assert found["penalty"] == pytest.approx(want, rel=1e-5)
    assert found["loss"] == Step(net(), losses.cross_entropy, optim.SGD(0.1), *SPECS)(X, Y)["loss"]


def test_one_regulariser_is_for_all_parameters_and_may_be_any_function() -> None:
    step = Step(net(), losses.cross_entropy, optim.SGD(0.1), *SPECS, regularizers=lambda w: tw.exp(w).sum())
    want = sum(np.exp(a.astype(np.float64)).sum() for a in net().state_dict().values())
    assert step(X, Y)["penalty"] == pytest.approx(want, rel=1e-5)
    assert run(regularizers.L1L2(0.5, 2.0), np.float32([1, -2])) == 0.5 * 3 + 2 * 5
    assert run(regularizers.L1L2(), np.float32([1, -2])) == 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"regularizers": {"*.gamma": regularizers.L2()}},
            AttributeValueError,
            r"fits '\*\.gamma'; the paths are 0\.weight, 0\.bias",
        ),
        ({"regularizers": {}}, AttributeValueError, "no pattern"),
        ({"regularizers": {"*": 0.1}}, AttributeValueError, "takes a function"),
        ({"regularizers": tw.square}, ShapeError, r"penalty on parameter '0\.weight' is a scalar"),
        ({"clip_value": -1.0}, AttributeValueError, "clip_value is a number above 0"),
        ({"clip_norm": 0.0}, AttributeValueError, "clip_norm is"),
        ({"clip_global_norm": float("nan")}, AttributeValueError, "clip_global_norm is"),
        ({"ema": 1.5}, AttributeValueError, "decay lies in"),
        ({"precision": "f16"}, AttributeValueError, "precision is one of f32, bf16"),
        ({"accumulate": 0}, AttributeValueError, "at least 1"),
        ({"accumulate": 5}, ShapeError, "5 equal parts"),
        ({"metrics": [lambda p, t: p]}, ShapeError, "the metric .* is a scalar"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        training_step(net(), losses.cross_entropy, optim.SGD(0.1), *SPECS, **options)


# Clipping


def test_clipping_by_value_by_norm_and_by_global_norm() -> None:
    plain = gradients()
    close(gradients(clip_value=0.05), {n: g.clip(-0.05, 0.05) for n, g in plain.items()})
    norms = {n: np.linalg.norm(g) for n, g in plain.items()}
    limit = float(np.median(list(norms.values())))
    close(gradients(clip_norm=limit), {n: g * min(1.0, limit / norms[n]) for n, g in plain.items()})
    whole = np.linalg.norm(list(norms.values()))
    close(gradients(clip_global_norm=0.5 * float(whole)), {n: 0.5 * g for n, g in plain.items()})
    cut = {n: g.clip(-0.05, 0.05) for n, g in plain.items()}
    cut = {n: g * min(1.0, 0.1 / np.linalg.norm(g)) for n, g in cut.items()}
    after = np.linalg.norm([np.linalg.norm(g) for g in cut.values()])
    both = gradients(clip_value=0.05, clip_norm=0.1, clip_global_norm=0.08)
    close(both, {n: g * min(1.0, 0.08 / after) for n, g in cut.items()})


# Weights of examples


def test_weights_of_examples() -> None:
    kept = np.array([0, 3, 4, 7])
    weight = np.zeros(12, np.float32)
    weight[kept] = 2.0
    step = Step(net(), losses.cross_entropy, optim.SGD(0.1), *SPECS, sample_weight=True)
    assert step.traced.batch == ("input", "target", "sample_weight") or step.traced.batch[-1] == "sample_weight"
    few = Step(net(), losses.cross_entropy, optim.SGD(0.1), tw.spec(4, 6), tw.spec(4, dtype="i64"))
    assert step(X, Y, weight)["loss"] == pytest.approx(few(X[kept], Y[kept])["loss"], rel=1e-6)
    close(step.state, few.state)
    before = {n: a.copy() for n, a in step.state.items()}
    assert step(X, Y, np.zeros(12, np.float32))["loss"] == 0
    assert all((before[n] == a).all() for n, a in step.state.items())


def test_weights_are_for_examples_not_for_elements() -> None:
    x, y = RNG.standard_normal((5, 4, 2)).astype(np.float32), RNG.standard_normal((5, 4, 3)).astype(np.float32)
    w = np.float32([1, 2, 0, 4, 1])
    layer = nn.Linear(2, 3, seed=3)
    found = Step(layer, losses.mse, optim.SGD(0.1), tw.spec(x), tw.spec(y), sample_weight=True)(x, y, w)
    each = ((x @ layer.weight.data.T + layer.bias.data - y) ** 2).mean((1, 2))
    assert found["loss"] == pytest.approx((w * each).sum() / 8, rel=1e-5)


def test_weights_need_a_loss_per_example() -> None:
    with pytest.raises(TraceError, match="takes no reduction='none'"):
        training_step(net(), lambda p, t: tw.square(p).mean(), optim.SGD(0.1), *SPECS, sample_weight=True)
    with pytest.raises(ShapeError, match="a value per example"):
        training_step(net(), lambda p, t, reduction: tw.square(p).mean(), optim.SGD(0.1), *SPECS, sample_weight=True)
    smooth = functools.partial(losses.cross_entropy, label_smoothing=0.1)
    assert training_step(net(), smooth, optim.SGD(0.1), *SPECS, sample_weight=True).batch[-1] == "sample_weight"


# The guard


class Noisy(nn.Module):
    """Every kind of state: weights, running statistics, random draws."""

    def __init__(self, dropout: float = 0.3) -> None:
        self.inner = nn.Linear(6, 8, bias=False, seed=1)  # before the norm a bias has the gradient 0, and Adam steps along noise
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3, seed=2)

    def __call__(self, x: Any) -> Any:
        return self.head(self.drop(tw.tanh(self.norm(self.inner(x)))))


@pytest.mark.parametrize("where", ["data", "penalty"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    options: dict[str, Any] = {"ema": 0.9, "guard": True, "regularizers": {"head.weight": lambda w: tw.log(w.sum() + 4.0)}}
    step = Step(Noisy(), losses.cross_entropy, optim.Adam(), *SPECS, **options)
    assert step(X, Y)["finite"]
    before = {n: a.copy() for n, a in step.state.items()}
    bad = X.copy()
    if where == "data":
        bad[3, 2] = np.nan
    else:
        step.state["head.weight"] = before["head.weight"] = np.full((3, 8), -1.0, np.float32)  # log of a negative number
    found = step(bad, Y)
    assert np.isfinite(found["loss"]) == (where == "penalty")
    assert not found["finite"]
    assert [n for n in before if not np.array_equal(before[n], step.state[n])] == []
    assert {"rng", "optimizer.step", "ema.weights.head.bias", "norm.running_mean"} <= before.keys()


def test_a_norm_that_overflows_is_not_clipped_but_skipped() -> None:
    x, y = np.full((2, 3), 1e10, np.float32), np.zeros((2, 1), np.float32)
    layer = nn.Linear(3, 1, seed=1)
    layer.weight.data = np.full((1, 3), 1e8, np.float32)
    for clip, finite in ((1.0, False), (None, True)):
        step = Step(layer, losses.mse, optim.SGD(0.1), tw.spec(x), tw.spec(y), guard=True, clip_global_norm=clip)
        found = step(x, y)
        assert np.isfinite(found["loss"])
        assert found["finite"] == finite
        assert np.array_equal(step.state["weight"], layer.weight.data) == (not finite)


def test_a_skipped_batch_leaves_no_trace() -> None:
    a, b = (Step(Noisy(), losses.cross_entropy, optim.Adam(), *SPECS, guard=g, seed=4) for g in (True, False))
    bad = np.full_like(X, np.inf)
    first = [a(x, Y)["loss"] for x in (X, bad, X, bad, X)][::2]
    assert first == [b(X, Y)["loss"] for _ in range(3)]
    assert all(np.array_equal(v, b.state[n]) for n, v in a.state.items())


# Averages


def test_averages_follow_the_weights_and_are_stored_on_demand() -> None:
    model = Noisy()
    step = Step(model, losses.cross_entropy, optim.SGD(0.1), *SPECS, ema=0.75)
    want = {n: p.data.astype(np.float64) for n, p in model.named_parameters()}
    for _ in range(4):
        step(X, Y)
        want = {n: 0.75 * a + 0.25 * step.state[n] for n, a in want.items()}
    assert step.traced.averages == {n: f"ema.weights.{n}" for n in want}
    close({n: step.state[f"ema.weights.{n}"] for n in want}, want)
    step.traced.store(step.state)
    np.testing.assert_array_equal(model.head.weight.data, step.state["head.weight"])
    step.traced.store(step.state, average=True)
    np.testing.assert_array_equal(model.head.weight.data, step.state["ema.weights.head.weight"])
    np.testing.assert_array_equal(model.norm.running_mean.data, step.state["norm.running_mean"])
    assert (
        "ema.step"
        in training_step(net(), losses.mse, optim.SGD(0.1), *SPECS[:1], tw.spec(12, 3), ema=optim.EMA(0.9, warmup=True)).state
    )


# Groups


def test_frozen_groups_are_only_read() -> None:
    groups = optim.Groups(optim.Adam(0.1), {"0.*": optim.FROZEN, "*.bias": {"lr_scale": 2.0}})
    step = Step(net(), losses.cross_entropy, groups, *SPECS)
    assert list(step.state)[step.traced.updated :] == ["0.weight"]
    assert "optimizer.m.0.weight" not in step.state
    before = {n: a.copy() for n, a in step.state.items()}
    step(X, Y, lr=0.1)
    np.testing.assert_array_equal(step.state["0.weight"], before["0.weight"])
    moved = {n: abs(step.state[n] - before[n]).max() for n in ("0.bias", "2.bias", "2.weight")}
    assert moved == pytest.approx({"0.bias": 0.2, "2.bias": 0.2, "2.weight": 0.1}, rel=1e-3)  # the first step of Adam: the rate
    with pytest.raises(TraceError, match="all frozen by the optimiser's patterns"):
        training_step(net(), losses.cross_entropy, optim.Groups(optim.Adam(), {"*": optim.FROZEN}), *SPECS)


def test_an_integer_parameter_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            self.table = tw.nn.Parameter(np.arange(3))

        def __call__(self, x: Any) -> Any:
            return x * self.table

    with pytest.raises(DTypeError, match=r"parameter 'table' is i64\[3\]"):
        training_step(Odd(), losses.mse, optim.SGD(0.1), tw.spec(2, 3), tw.spec(2, 3))


# Accumulation


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_add_up_to_the_whole_batch(parts: int, weighted: bool) -> None:
    options: dict[str, Any] = {
        "metrics": ["accuracy"],
        "sample_weight": weighted,
        "regularizers": {"*.weight": regularizers.L2(0.01)},
        "clip_global_norm": 0.5,
        "ema": 0.9,
        "guard": True,
        "predictions": True,
    }
    whole, cut = (Step(net(), losses.cross_entropy, optim.AdamW(0.1), *SPECS, accumulate=k, **options) for k in (1, parts))
    assert list(cut.state) == list(whole.state)
    assert cut.traced.results == whole.traced.results
    batch = (X, Y, WEIGHT) if weighted else (X, Y)
    for _ in range(3):
        a, b = whole(*batch), cut(*batch)
        close(dict(a), dict(b), rtol=1e-4)
    # Adam's first steps are the sign of the gradient: where that is nearly 0, roundings show
    close(cut.state, whole.state, rtol=2e-3, atol=2e-4)


def test_statistics_and_draws_go_from_part_to_part() -> None:
    step = Step(Noisy(), losses.cross_entropy, optim.SGD(0.0 + 1e-30), *SPECS, accumulate=3, predictions=True)
    inner = {n: a.copy() for n, a in step.state.items()}
    found = step(X, Y, lr=0.0)
    mean = np.zeros(8)
    for part in X.astype(np.float64).reshape(3, 4, 6):
        mean = 0.9 * mean + 0.1 * (part @ inner["inner.weight"].T).mean(0)
    np.testing.assert_allclose(step.state["norm.running_mean"], mean, rtol=1e-4, atol=1e-6)
    assert step.state["rng"] == inner["rng"] + np.uint64(3)
    assert found["prediction"].shape == (12, 3)
    same = Step(Noisy(), losses.cross_entropy, optim.SGD(1e-30), *SPECS, accumulate=3, predictions=True)
    same_rows = same(np.concatenate([X[:4]] * 3), np.concatenate([Y[:4]] * 3), lr=0.0)["prediction"].reshape(3, 4, 3)
    assert not np.array_equal(same_rows[0], same_rows[1])  # the same rows, other draws
    assert not np.array_equal(same_rows[1], same_rows[2])


def test_frozen_statistics_and_inputs_in_containers() -> None:
    model = Noisy(dropout=0.0)
    model.norm.eval()

    def compare(parts: int) -> Step:
        return Step(model, losses.cross_entropy, optim.SGD(0.1), *SPECS, accumulate=parts)

    one, three = compare(1), compare(3)
    one(X, Y), three(X, Y)
    close(one.state, three.state)
    assert list(one.state) == list(three.state)

    class Two(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(6, 3, seed=1)

        def __call__(self, pair: Any, scale: float) -> Any:
            return {"y": self.layer(pair["a"] + pair["b"]) * scale}

    specs = ({"a": SPECS[0], "b": SPECS[0]}, 2.0, SPECS[1])
    results = [
        Step(Two(), lambda p, t: losses.cross_entropy(p["y"], t), optim.SGD(0.1), *specs, accumulate=k)(X, X, Y) for k in (1, 4)
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)


# Compiled


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"guard": True, "ema": 0.9, "clip_global_norm": 1.0}], ids=str)
def test_compiled_steps_are_those_of_the_interpreter_bit_for_bit_at_any_number_of_threads(options: dict[str, Any]) -> None:
    args = (Noisy(), losses.cross_entropy, optim.Adam(1e-2), *SPECS)
    step = Step(*args, **options)
    states = []
    for threads in (1, 2, 2):
        traced = training_step(*args, **options)
        now = replace(
            flags(), threads=threads, cache="off", validate=flags().validate and threads == 1
        )  # one graph: once will do
        exe = build(traced.graph, traced.state, purpose="training", now=now)
        for _ in range(4):
            exe(np.float32(0.01), X, Y)
        states.append(exe.parameters)
    for n, a in states[0].items():
        assert np.array_equal(a, states[1][n]), n
        assert np.array_equal(a, states[2][n]), n
    for _ in range(4):
        step(X, Y, lr=0.01)
    close(states[0], step.state, rtol=1e-3, atol=1e-4)


@pytest.mark.unvalidated("a thousand rows in the interpreter take long; smaller steps with parts are validated above")
def test_only_one_part_has_its_activations_in_memory() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    arena = {}
    for parts in (1, 16):
        step = training_step(
            model, losses.cross_entropy, optim.Adam(), tw.spec(2048, 32), tw.spec(2048, dtype="i64"), accumulate=parts
        )
        exe = build(step.graph, step.state, purpose="training", now=flags())
        arena[parts] = exe.compiled.run.arena_bytes
    weights = 4 * sum(p.size for p in model.state_dict().values())
    # two activations of 64 columns, and a gradient; for the parts also the sums before and after and two forms of weights
    assert arena[1] > 2 * 2048 * 64 * 4
    assert arena[16] < arena[1] / 16 + 6 * weights


# Derivatives through an update


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.GradientDescent(0.1, weight_decay=0.1),
        optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        optim.Adam(0.1, eps=1e-3, weight_decay=0.1),
        optim.AdamW(0.1, eps=1e-3),
        optim.LAMB(0.1, eps=1e-3),
        optim.RMSprop(0.1, eps=1e-3, momentum=0.5),
        optim.AdaGrad(0.1, lr_decay=0.1, initial_accumulator_value=0.1),
        optim.Adadelta(1.0, eps=1e-2),
    ],
    ids=repr,
)
def test_a_step_can_be_differentiated(optimizer: Any) -> None:
    """d <c, p'> / dp, dg, d lr, against central differences in f64. (Lion's step is a sign: its derivative is 0 or none.)"""
    rng = np.random.default_rng(3)
    p, g, c = (rng.uniform(0.5, 1.5, 5) for _ in range(3))
    lr = np.array(0.3)
    state = optimizer.init({"w": p})
    for n in state.keys() - {"step"}:
        state[n]["w"] = state[n]["w"] + 0.5

    def after(p: Any, g: Any, lr: Any) -> Any:
        return (optimizer.update({"w": p}, {"w": g}, state, lr)[0]["w"] * c).sum()

    found = run(tw.grad(after, argnums=(0, 1, 2)), p, g, lr)
    for k, value in enumerate((p, g, lr)):
        given = [p, g, lr]

        def one(x: Array, k: int = k, given: list[Array] = given) -> float:
            return float(run(after, *[x if j == k else v for j, v in enumerate(given)]))

        want = numeric_gradient(one, value, step=1e-5)
        np.testing.assert_allclose(found[k], want, rtol=1e-6, atol=1e-8)
