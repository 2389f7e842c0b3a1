"""grad and value_and_grad: of compositions against central differences, nested, over trees and Modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import functional_call, trace_model
from tensorwright.ir.dtypes import f64
from tensorwright.ir.errors import DTypeError, GradientError, ShapeError
from tensorwright.ir.interp import run as interpret

from .support import Array, execute, expand, numeric_gradient, run

RNG = np.random.default_rng(2)
# Away from the kinks of relu and from ties of maxima.
X = (RNG.permutation(24).reshape(2, 3, 4) / 8 - 1.4).astype(np.float32)
IMAGE = (RNG.permutation(72).reshape(1, 2, 6, 6) / 20 - 1.9).astype(np.float32)
W = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
COMPOSITIONS: dict[str, tuple[Callable[[Any], Any], Array]] = {
    **{
        n: (getattr(tw, n), X)
        for n in (
            "relu",
            "relu6",
            "leaky_relu",
            "elu",
            "selu",
            "gelu",
            "silu",
            "softplus",
            "softsign",
            "mish",
            "hard_swish",
            "log_sigmoid",
            "softmax",
            "log_softmax",
            "tanh",
            "sigmoid",
            "erf",
            "exp",
            "sin",
            "square",
        )
    },
    "gelu tanh": (lambda x: tw.gelu(x, "tanh"), X),
    "logsumexp": (lambda x: tw.logsumexp(x, 1), X),
    "glu": (lambda x: tw.glu(x, -1), X),
    "log": (lambda x: tw.log(x * x + 1), X),
    "rsqrt": (lambda x: tw.rsqrt(x * x + 1), X),
    "pow": (lambda x: (x * x + 1) ** 1.7, X),
    "layer_norm": (lambda x: tw.layer_norm(x, 4, np.arange(1, 5, dtype=np.float32)), X),
    "rms_norm": (lambda x: tw.rms_norm(x, 4), X),
    "group_norm": (lambda x: tw.group_norm(x, 3), X),
    "batch_norm": (lambda x: tw.batch_norm_training(x, np.zeros(3), np.ones(3))[0], X),
    "var": (lambda x: tw.var(x, (0, 2)), X),
    "std": (lambda x: tw.std(x, 1), X),
    "mean": (lambda x: tw.mean(x, 0), X),
    "max": (lambda x: tw.max(x, 1), X),
    "min": (tw.min, X),
    "prod": (lambda x: tw.prod(x, 2), X),
    "cumsum": (lambda x: tw.cumsum(x, 1), X),
    "norm": (tw.norm, X),
    "clip": (lambda x: tw.clip(x, -1.01, 0.99), X),
    "where": (lambda x: tw.where(x > 0, x * x, -x), X),
    "take": (lambda x: tw.take(x, np.array([0, 2, 0]), 1), X),
    "index": (lambda x: x[np.array([1, 1, 0]), :, np.array([3, 3, 0])], X),
    "slice": (lambda x: x[:, ::-2, 1:3] * 3, X),
    "concatenate": (lambda x: tw.concatenate([x, x * 2], 1), X),
    "pad": (lambda x: tw.pad(x, 1), X),
    "transpose": (lambda x: x.transpose(2, 0, 1).reshape(4, 6) @ np.ones((6, 2), np.float32), X),
    "tile": (lambda x: tw.tile(x, (1, 2, 1)), X),
    "matmul": (lambda x: x @ x.swapaxes(1, 2), X),
    "einsum": (lambda x: tw.einsum("bij,bkj->ik", x, x), X),
    "attention": (lambda x: tw.scaled_dot_product_attention(x, x, x, is_causal=True), X),
    "conv2d": (lambda x: tw.conv2d(x, W, stride=2, padding=1), IMAGE),
    "conv2d dilated": (lambda x: tw.conv2d(x, W, dilation=2), IMAGE),
    "conv2d grouped": (lambda x: tw.conv2d(x, W[:, :1], groups=2), IMAGE),
    "max_pool2d": (lambda x: tw.max_pool2d(x, 3, 2, 1), IMAGE),
    "avg_pool2d": (lambda x: tw.avg_pool2d(x, 2), IMAGE),
    "adaptive": (lambda x: tw.adaptive_avg_pool2d(x, (4, 5)), IMAGE),
    "cross_entropy": (lambda x: tw.losses.cross_entropy(x.reshape(6, 4), np.array([0, 3, 1, 2, 0, 0])), X),
    "smoothed": (lambda x: tw.losses.cross_entropy(x.reshape(6, 4), np.array([0, 3, 1, 2, 0, 0]), label_smoothing=0.1), X),
    "ignore": (lambda x: tw.losses.cross_entropy(x.reshape(6, 4), np.array([0, 3, -1, 2, 0, 0]), ignore_index=-1), X),
    "bce": (lambda x: tw.losses.binary_cross_entropy_with_logits(x, (X > 0.2).astype(np.float32)), X),
    "huber": (lambda x: tw.losses.huber(x, np.zeros_like(X)), X),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_gradients_of_compositions_are_central_differences(name: str) -> None:
    fn, x = COMPOSITIONS[name]
    mask = np.random.default_rng(3)
    weights: list[Array] = []

    def scalar(t: Any) -> Any:
        y = fn(t)
        if not weights:
            weights.append(mask.standard_normal(y.shape).astype(np.float32))
        return tw.sum(y * weights[0])

    value = tw.trace(scalar, x)
    gradient = expand(tw.trace(tw.grad(scalar), x))

    def wide(at: Array) -> float:
        return float(interpret(value, [at], dtype=f64)[0])

    (got,) = interpret(gradient, [x.astype(np.float64)], dtype=f64)
    # Central differences with step 1e-4 in f64: the truncation error is about 1e-8 times the third derivative.
    np.testing.assert_allclose(got, numeric_gradient(wide, x), rtol=1e-5, atol=1e-6)


def test_value_and_grad_over_trees_and_several_arguments() -> None:
    def loss(p: dict[str, Any], x: Any, scale: Any) -> Any:
        return tw.sum(p["w"][0] * x * scale) + tw.sum(p["b"] ** 2)

    p = {"w": [np.ones(3, np.float32)], "b": np.full(2, 3.0, np.float32)}
    x = np.arange(3.0, dtype=np.float32)
    value, (dp, dscale) = run(tw.value_and_grad(loss, argnums=(0, 2)), p, x, np.float32(2.0))
    assert value == 6 + 18
    np.testing.assert_array_equal(dp["w"][0], 2 * x)
    np.testing.assert_array_equal(dp["b"], [6, 6])
    assert dscale == 3
    np.testing.assert_array_equal(run(tw.grad(loss, argnums=-2), p, x, np.float32(2.0)), [2, 2, 2])


def test_has_aux() -> None:
    def loss(x: Any) -> Any:
        return tw.sum(x * x), {"twice": x * 2}

    x = np.arange(3.0, dtype=np.float32)
    (value, aux), dx = run(tw.value_and_grad(loss, has_aux=True), x)
    assert value == 5
    np.testing.assert_array_equal(aux["twice"], x * 2)
    np.testing.assert_array_equal(dx, x * 2)
    dx, aux = run(tw.grad(loss, has_aux=True), x)
    np.testing.assert_array_equal(dx, x * 2)


def test_gradients_nest() -> None:
    def f(x: Any) -> Any:
        return tw.sum(tw.sin(x) * x)

    x = np.array([0.1, 0.5, 2.0], np.float32)
    second = run(tw.grad(lambda x: tw.sum(tw.grad(f)(x))), x)
    np.testing.assert_allclose(second, 2 * np.cos(x) - x * np.sin(x), rtol=1e-5)
    third = run(tw.grad(tw.grad(tw.grad(lambda x: x**5.0))), np.float32(2.0))
    np.testing.assert_allclose(third, 60 * 4, rtol=1e-5)


def test_an_inner_gradient_of_a_function_of_the_outer_variable() -> None:
    def outer(a: Any) -> Any:
        return tw.grad(lambda b: a * b * b)(a)  # 2 a b at b = a: 2 a^2

    assert run(tw.grad(outer), np.float32(3.0)) == 12


def test_gradients_by_a_module_are_named_by_path() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[2].bias.requires_grad = False
    x = RNG.standard_normal((5, 3)).astype(np.float32)

    def loss(m: Any, x: Any) -> Any:
        return tw.mean(m(x) ** 2)

    traced = trace_model(lambda x: tw.value_and_grad(loss)(net, x), x)
    _, grads = execute(traced, x)
    assert list(grads) == ["0.weight", "0.bias", "2.weight"]
    w = net[0].weight.data.astype(np.float64)

    def by_weight(v: Array) -> float:
        hidden = np.tanh(x @ v.T + net[0].bias.data)
        return float(np.mean((hidden @ net[2].weight.data.T + net[2].bias.data) ** 2))

    np.testing.assert_allclose(grads["0.weight"], numeric_gradient(by_weight, w), rtol=1e-3, atol=1e-5)


def test_functional_call_puts_values_in_place_of_parameters() -> None:
    net = nn.Linear(2, 1, bias=False)
    x = np.array([[1.0, 2.0]], np.float32)
    params = {"weight": np.array([[3.0, 4.0]], np.float32)}
    got = run(lambda p, x: (functional_call(net, p, x), tw.grad(lambda p: functional_call(net, p, x).sum())(p)), params, x)
    assert got[0] == 11
    np.testing.assert_array_equal(got[1]["weight"], x)
    with pytest.raises(GradientError, match="no parameter 'bias'"):
        tw.trace(lambda x: functional_call(net, {"bias": x}, x), x)
    with pytest.raises(ShapeError, match="f32\\[1, 2\\]"):
        tw.trace(lambda x: functional_call(net, {"weight": x[0]}, x), x)


def test_no_gradient_flows_through_stop_gradient() -> None:
    x = np.array([2.0, 3.0], np.float32)
    np.testing.assert_array_equal(run(tw.grad(lambda x: tw.sum(tw.stop_gradient(x) * x)), x), x)
    np.testing.assert_array_equal(run(tw.grad(lambda x: tw.sum(tw.stop_gradient(x))), x), [0, 0])


def test_relu_has_gradient_zero_at_zero() -> None:
    np.testing.assert_array_equal(run(tw.grad(lambda x: tw.sum(tw.relu(x))), np.array([-1.0, 0.0, 1.0], np.float32)), [0, 0, 1])


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\.sum\(\)"):
        tw.trace(tw.grad(lambda x: x * 2), tw.spec(3))
    with pytest.raises(DTypeError, match="argnums"):
        tw.trace(tw.grad(lambda i, x: tw.sum(x)), tw.spec(3, dtype="i64"), tw.spec(3))
    with pytest.raises(DTypeError, match="i64"):
        tw.trace(tw.grad(tw.argmax), tw.spec(3))
    with pytest.raises(GradientError, match="argument 2"):
        tw.trace(tw.grad(tw.sum, argnums=2), tw.spec(3))
    with pytest.raises(GradientError, match="pair"):
        tw.trace(tw.grad(tw.sum, has_aux=True), tw.spec(3))
    with pytest.raises(GradientError, match="nothing to differentiate"):
        tw.trace(lambda x: tw.grad(lambda p, x: tw.sum(x))({}, x), tw.spec(3))
    with pytest.raises(tw.errors.TraceError, match="outside a trace"):
        tw.grad(lambda x: x)(np.float32(1.0))
