"""Optimisers against their papers' formulas in f64 and against torch, groups, clipping, averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tensorwright import optim
from tensorwright.frontend import trace_model, tree
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError

from .support import Array, execute, run

STEPS = 10
RNG = np.random.default_rng(11)
RATES = [0.05 * 0.9**t for t in range(STEPS)]  # a rate that changes, as a schedule makes it
START = {"w": RNG.standard_normal((3, 5)), "b": RNG.standard_normal(4)}
# gradients of very different size, and an element without any: what the adaptive rules differ in
GRADS = [{n: RNG.standard_normal(p.shape) * 10.0 ** RNG.integers(-3, 2, p.shape) for n, p in START.items()} for _ in range(STEPS)]
for _g in GRADS:
    _g["b"][2] = 0.0


# The formulas as published, one parameter, f64: (p, gradients, rates, options) -> p


def gradient_descent(p: Array, gs: list[Array], rates: list[float], weight_decay: float = 0.0) -> Array:
    for g, lr in zip(gs, rates, strict=True):
        p = p - lr * (g + weight_decay * p)
    return p


def sgd(p: Array, gs: list[Array], rates: list[float], **o: Any) -> Array:
    momentum, dampening, v = o.get("momentum", 0.0), o.get("dampening", 0.0), None
    for g, lr in zip(gs, rates, strict=True):
        d = g + o.get("weight_decay", 0.0) * p
        v = d if v is None else momentum * v + (1 - dampening) * d
        step = d if not momentum else d + momentum * v if o.get("nesterov") else v
        p = p - lr * step
    return p


def adam(p: Array, gs: list[Array], rates: list[float], **o: Any) -> Array:
    (b1, b2), eps = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8)
    m, v, largest = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gs, rates, strict=True), 1):
        p = p * (1 - lr * o.get("decoupled", 0.0))
        d = g + o.get("weight_decay", 0.0) * p
        m, v = b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d * d
        largest = np.maximum(largest, v)
        root = np.sqrt((largest if o.get("amsgrad") else v) / (1 - b2**t))
        p = p - lr * (m / (1 - b1**t)) / (root + eps)
    return p


def adamw(p: Array, gs: list[Array], rates: list[float], weight_decay: float = 1e-2, **o: Any) -> Array:
    return adam(p, gs, rates, decoupled=weight_decay, **o)


def lamb(p: Array, gs: list[Array], rates: list[float], weight_decay: float = 1e-2) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gs, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + weight_decay * p
        p = p - lr * np.linalg.norm(p) / np.linalg.norm(r) * r
    return p


def rmsprop(p: Array, gs: list[Array], rates: list[float], **o: Any) -> Array:
    alpha, eps = o.get("alpha", 0.99), o.get("eps", 1e-8)
    v, a, b = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for g, lr in zip(gs, rates, strict=True):
        g = g + o.get("weight_decay", 0.0) * p
        v, a = alpha * v + (1 - alpha) * g * g, alpha * a + (1 - alpha) * g
        step = g / (np.sqrt(v - a * a if o.get("centered") else v) + eps)
        b = o.get("momentum", 0.0) * b + step
        p = p - lr * b
    return p


def adagrad(p: Array, gs: list[Array], rates: list[float], **o: Any) -> Array:
    v = np.full_like(p, o.get("initial_accumulator_value", 0.0))
    for t, (g, lr) in enumerate(zip(gs, rates, strict=True), 1):
        g = g + o.get("weight_decay", 0.0) * p
        v = v + g * g
        p = p - lr / (1 + (t - 1) * o.get("lr_decay", 0.0)) * g / (np.sqrt(v) + 1e-10)
    return p


def adadelta(
    p: Array, gs: list[Array], rates: list[float], rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
) -> Array:
    v, u = np.zeros_like(p), np.zeros_like(p)
    for g, lr in zip(gs, rates, strict=True):
        g = g + weight_decay * p
        v = rho * v + (1 - rho) * g * g
        d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d * d
        p = p - lr * d
    return p


def lion(p: Array, gs: list[Array], rates: list[float], betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> Array:
    m = np.zeros_like(p)
    for g, lr in zip(gs, rates, strict=True):
        p = p - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * p)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


CASES: list[tuple[Any, Callable[..., Array], str | None, dict[str, Any]]] = [
    (optim.GradientDescent, gradient_descent, "SGD", {}),
    (optim.GradientDescent, gradient_descent, "SGD", {"weight_decay": 0.02}),
    (optim.SGD, sgd, "SGD", {}),
    (optim.SGD, sgd, "SGD", {"momentum": 0.9}),
    (optim.SGD, sgd, "SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (optim.SGD, sgd, "SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    (optim.Adam, adam, "Adam", {}),
    (optim.Adam, adam, "Adam", {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.01}),
    (optim.Adam, adam, "Adam", {"amsgrad": True, "betas": (0.9, 0.8)}),
    (optim.AdamW, adamw, "AdamW", {}),
    (optim.AdamW, adamw, "AdamW", {"weight_decay": 0.1, "amsgrad": True}),
    (optim.LAMB, lamb, None, {}),
    (optim.LAMB, lamb, None, {"weight_decay": 0.0}),
    (optim.RMSprop, rmsprop, "RMSprop", {}),
    (optim.RMSprop, rmsprop, "RMSprop", {"alpha": 0.9, "eps": 1e-5, "weight_decay": 0.01}),
    (optim.RMSprop, rmsprop, "RMSprop", {"centered": True, "momentum": 0.9, "eps": 1e-3}),
    (optim.AdaGrad, adagrad, "Adagrad", {}),
    (optim.AdaGrad, adagrad, "Adagrad", {"lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.5}),
    (optim.Adadelta, adadelta, "Adadelta", {}),
    (optim.Adadelta, adadelta, "Adadelta", {"rho": 0.8, "eps": 1e-4, "weight_decay": 0.01}),
    (optim.Lion, lion, None, {}),
    (optim.Lion, lion, None, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
]
IDS = [f"{c[0].__name__} {', '.join(f'{k}={v}' for k, v in c[3].items())}" for c in CASES]


def f32(values: dict[str, Array]) -> dict[str, Array]:
    return {n: v.astype(np.float32) for n, v in values.items()}


def ours(optimizer: Any) -> dict[str, Array]:
    params: Any = f32(START)
    state = optimizer.init(params)
    traced = trace_model(optimizer.update, params, f32(GRADS[0]), state, np.float32(0))
    for g, lr in zip(GRADS, RATES, strict=True):
        params, state = execute(traced, *tree.flatten((params, f32(g), state, np.float32(lr)))[0])
    return params


# Ten steps in f32 against f64: an f32 rounding (6e-8) in each of some ten operations per step; division by sqrt(v) near
# eps, and v - a^2 of `centered`, which cancels, enlarge it.
TOLERANCE: dict[str, float] = {"rtol": 3e-5, "atol": 3e-6}


@pytest.mark.parametrize(("kind", "formula", "peer", "options"), CASES, ids=IDS)
def test_ten_steps_are_the_published_formulas(kind: Any, formula: Any, peer: Any, options: dict[str, Any]) -> None:
    found = ours(kind(0.1, **options))
    for n, p in START.items():
        want = formula(p, [g[n] for g in GRADS], RATES, **options)
        np.testing.assert_allclose(found[n], want, **TOLERANCE)
        assert np.abs(want - p).max() > 1e-4  # it moved


@pytest.mark.parametrize(
    ("kind", "formula", "peer", "options"), [c for c in CASES if c[2]], ids=[i for c, i in zip(CASES, IDS, strict=True) if c[2]]
)
def test_ten_steps_are_those_of_torch(kind: Any, formula: Any, peer: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in START.items()}  # f64
    theirs = getattr(torch.optim, peer)(params.values(), lr=0.1, **options)
    for g, lr in zip(GRADS, RATES, strict=True):
        theirs.param_groups[0]["lr"] = lr
        for n, p in params.items():
            p.grad = torch.tensor(g[n])
        theirs.step()
    found = ours(kind(0.1, **options))
    for n, p in params.items():
        np.testing.assert_allclose(found[n], p.detach().numpy(), **TOLERANCE)


def test_defaults_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    own = {"betas", "eps", "lr", "alpha", "rho", "lr_decay", "momentum", "weight_decay", "dampening", "initial_accumulator_value"}
    for kind, peer in {(c[0], c[2]) for c in CASES if c[2]}:
        theirs = getattr(torch.optim, peer)([torch.nn.Parameter(torch.zeros(1))]).defaults
        mine = vars(kind())
        assert {n: mine[n] for n in own & mine.keys()} == {n: theirs[n] for n in own & mine.keys()}, kind


def test_lamb_takes_the_plain_step_where_a_norm_is_zero() -> None:
    p, g = {"w": np.zeros(3, np.float32)}, {"w": np.float32([1, -2, 3])}
    new, _ = run(optim.LAMB(0.5).update, p, g, optim.LAMB().init(p), np.float32(0.5))
    np.testing.assert_allclose(new["w"], [-0.5, 0.5, -0.5], rtol=1e-5)  # the first step of Adam is the sign
    still, _ = run(optim.LAMB(weight_decay=0.0).update, {"w": np.ones(3, np.float32)}, p, optim.LAMB().init(p), np.float32(0.5))
    np.testing.assert_array_equal(still["w"], np.ones(3))


def test_states_have_the_form_and_the_names_that_are_promised() -> None:
    params = f32(START)
    assert list(optim.SGD(0.1).init(params)) == []
    assert list(optim.Adam(amsgrad=True).init(params)) == ["step", "m", "v", "v_max"]
    assert optim.AdaGrad(initial_accumulator_value=0.5).init(params)["v"]["b"].tolist() == [0.5] * 4
    assert list(optim.RMSprop(momentum=0.9, centered=True).init(params)) == ["v", "average", "momentum"]
    nested = [np.zeros(2, np.float32), (np.zeros(3, np.float32),)]
    new, state = run(optim.Lion().update, nested, nested, optim.Lion().init(nested))
    assert isinstance(new[1], tuple)
    assert state["m"][1][0].shape == (3,)


def test_rates_are_an_operand_or_the_optimisers_own() -> None:
    p = {"w": np.ones(2, np.float32)}
    new, _ = run(lambda p: optim.SGD(0.25).update(p, p, {}), p)
    np.testing.assert_array_equal(new["w"], [0.75, 0.75])
    with pytest.raises(AttributeValueError, match="is a schedule"):
        run(lambda p: optim.SGD(lambda step: 0.1).update(p, p, {}), p)
    with pytest.raises(AttributeValueError, match="is a schedule"):
        run(lambda p: optim.Groups(optim.SGD(lambda step: 0.1), {}).update(p, p, {}), p)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.SGD(-1.0), "learning rate is a positive number or a schedule, not -1.0"),
        (lambda: optim.Adam("fast"), "learning rate is a positive number or a schedule, not 'fast'"),  # type: ignore[arg-type]
        (lambda: optim.Adam(betas=(1.0, 0.9)), "betas are two numbers"),
        (lambda: optim.Adam(betas=0.9), "betas are two numbers"),  # type: ignore[arg-type]
        (lambda: optim.SGD(0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda: optim.AdamW(weight_decay=-1), "AdamW: weight_decay is at least 0, not -1"),
        (lambda: optim.RMSprop(alpha=1.0), r"alpha lies in \[0, 1\)"),
        (lambda: optim.Adadelta(eps=0.0), "eps is above 0"),
        (lambda: optim.Lion(betas=(0.9, math.nan)), "betas"),
        (lambda: optim.EMA(1.0), "decay lies in"),
        (lambda: optim.clip_by_norm({}, 0.0), "clip_norm is a number above 0, not 0.0"),
    ],
)
def test_options_outside_their_domain_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AttributeValueError, match=message):
        make()


def test_a_gradient_that_does_not_fit_names_its_parameter() -> None:
    p = {"layer": {"w": np.ones(2, np.float32)}}
    with pytest.raises(ShapeError, match=r"parameter 'layer\.w' has another shape"):
        run(lambda p, g: optim.SGD(0.1).update(p, g, {}), p, {"layer": {"w": np.ones(3, np.float32)}})
    with pytest.raises(DTypeError, match=r"parameter 'layer\.w' has another dtype"):
        run(lambda p, g: optim.SGD(0.1).update(p, g, {}), p, {"layer": {"w": np.ones(2, np.float64)}})
    with pytest.raises(DTypeError, match=r"parameter 'w' is i32\[2\]"):
        run(lambda p, g: optim.SGD(0.1).update(p, g, {}), {"w": np.ones(2, np.int32)}, {"w": np.ones(2, np.int32)})


# Groups


PATHS = ["embed.weight", "body.0.weight", "body.0.bias", "head.weight", "head.bias"]


def test_patterns_apply_in_order_each_on_top_of_those_before() -> None:
    g = optim.Groups(
        optim.AdamW(1e-3),
        {"*.bias": {"weight_decay": 0.0}, "head.*": {"lr_scale": 10}, "embed.*": optim.SGD(2e-3), "body.*": optim.FROZEN},
    )
    found = g.assign(PATHS)
    assert found["embed.weight"] == optim.Group(optim.SGD(2e-3), 2.0)
    assert found["body.0.weight"] is None
    assert found["head.weight"] == optim.Group(optim.AdamW(1e-3), 10.0)
    assert found["head.bias"] == optim.Group(optim.AdamW(1e-3, weight_decay=0.0), 10.0)
    assert g.frozen(PATHS) == ["body.0.weight", "body.0.bias"]
    thawed = optim.Groups(optim.Adam(1e-3), {"*": optim.FROZEN, "*.bias": {"lr": 1e-2}}).assign(PATHS)
    assert [n for n, v in thawed.items() if v] == ["body.0.bias", "head.bias"]
    assert thawed["head.bias"] == optim.Group(optim.Adam(1e-2), 10.0)
    assert (
        optim.Groups(optim.SGD(0.1), {"*.bias": {"momentum": 0.5}}).assign(["weight", "bias"])["bias"].optimizer.momentum == 0.5
    )


def test_each_group_steps_by_its_own_rule() -> None:
    rule = optim.Groups(optim.Adam(0.1), {"b": optim.SGD(0.2, momentum=0.9)})
    params: Any = f32(START)
    state = rule.init(params)
    assert {n: list(v) if isinstance(v, dict) else v.shape for n, v in state.items()} == {
        "step": (),
        "m": ["w"],
        "v": ["w"],
        "momentum": ["b"],
    }
    for g, lr in zip(GRADS, RATES, strict=True):
        params, state = run(rule.update, params, f32(g), state, np.float32(lr))
    assert state["step"] == STEPS
    np.testing.assert_allclose(params["w"], adam(START["w"], [g["w"] for g in GRADS], RATES), **TOLERANCE)
    want = sgd(START["b"], [g["b"] for g in GRADS], [2 * lr for lr in RATES], momentum=0.9)
    np.testing.assert_allclose(params["b"], want, **TOLERANCE)


def test_a_checkpoint_outlives_a_change_of_patterns() -> None:
    params = f32(START)
    plain = optim.AdamW(0.1).init(params)
    grouped = optim.Groups(optim.AdamW(0.1), {"b": {"weight_decay": 0.0}, "w": {"lr_scale": 2}}).init(params)
    assert list(grouped) == list(plain)
    assert all(list(grouped[n]) == list(plain[n]) for n in ("m", "v"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optim.Groups(optim.Adam(), {"*.gamma": {}}).assign(PATHS),
            r"fits '\*\.gamma'; the paths are embed\.weight, body",
        ),
        (
            lambda: optim.Groups(optim.Adam(), {"*": {"momentum": 0.9}}),
            "'\\*' has options that Adam does not: momentum; it has lr_scale, lr",
        ),
        (lambda: optim.Groups(optim.Adam(), {"*": {"lr_scale": 0}}), "lr_scale is a number above 0"),
        (lambda: optim.Groups(optim.Adam(), {"*": {"weight_decay": -1.0}}), "weight_decay is at least 0"),
        (lambda: optim.Groups(optim.Adam(), {"*": 3}), "takes a dict of options"),  # type: ignore[dict-item]
        (lambda: optim.Groups(optim.Adam(lambda s: 0.1), {"*": {"lr": 0.1}}), "lr_scale for a multiple"),
        (lambda: optim.Groups("adam", {}), "the default is one of tw.optim's"),  # type: ignore[arg-type]
    ],
)
def test_wrong_groups_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AttributeValueError, match=message):
        make()


# Clipping and averages


def test_clipping() -> None:
    g = {"a": np.full(4, 3.0, np.float32), "b": np.full(9, -4.0, np.float32)}
    norm = math.sqrt(4 * 9 + 9 * 16)
    assert run(optim.global_norm, g) == pytest.approx(norm)
    whole = run(lambda g: optim.clip_by_global_norm(g, 1.5), g)
    np.testing.assert_allclose(whole["b"], g["b"] * 1.5 / norm, rtol=1e-5)
    np.testing.assert_array_equal(run(lambda g: optim.clip_by_global_norm(g, 100.0), g)["a"], g["a"])
    each = run(lambda g: optim.clip_by_norm(g, 6.5), g)
    np.testing.assert_array_equal(each["a"], g["a"])  # its norm is 6
    np.testing.assert_allclose(np.linalg.norm(each["b"]), 6.5, rtol=1e-5)
    cut = run(lambda g: optim.clip_by_value(g, 3.5), g)
    np.testing.assert_array_equal(cut["a"], g["a"])
    np.testing.assert_array_equal(cut["b"], np.full(9, -3.5))


def test_clipping_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    params = [torch.nn.Parameter(torch.tensor(p)) for p in START.values()]
    for n, p in zip(START, params, strict=True):
        p.grad = torch.tensor(GRADS[0][n])
    torch.nn.utils.clip_grad_norm_(params, 0.7)
    found = run(lambda g: optim.clip_by_global_norm(g, 0.7), f32(GRADS[0]))
    for n, p in zip(START, params, strict=True):
        np.testing.assert_allclose(found[n], p.grad.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("warmup", [False, True])
def test_moving_averages(warmup: bool) -> None:
    ema = optim.EMA(0.6, warmup=warmup)
    state: Any = ema.init(f32(START))
    want = START["w"]
    for t, g in enumerate(GRADS, 1):
        state = run(ema.update, f32(g), state)
        keep = min(0.6, (1 + t) / (10 + t)) if warmup else 0.6
        want = keep * want + (1 - keep) * g["w"]
    np.testing.assert_allclose(state["weights"]["w"], want, rtol=1e-5, atol=1e-6)
