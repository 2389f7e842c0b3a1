"""One training step of the training workloads in JAX: `jit` over forward, loss, gradient and Adam, parameters donated.

Weights are those of the PyTorch definitions, by name. Images are NHWC and kernels HWIO, the layout that XLA's CPU backend
prefers; they are converted once, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Weights = dict[str, Any]
Model = Callable[[Weights, Any], Any]
BETAS, EPSILON = (0.9, 0.999), 1e-8


def linear(p: Weights, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def convolution(x: Any, weight: Any, stride: int = 1, padding: int = 0) -> Any:
    sides = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, weight, (stride, stride), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def max_pool(x: Any, size: int) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")


def layer_norm(p: Weights, name: str, x: Any, eps: float) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(p: Weights, x: Any) -> Any:
    return linear(p, "b", jax.nn.relu(linear(p, "a", x)))


def cifar(p: Weights, x: Any) -> Any:
    def layer(name: str, x: Any) -> Any:
        return jax.nn.relu(convolution(x, p[f"{name}.weight"]) + p[f"{name}.bias"])

    x = max_pool(layer("c2", max_pool(layer("c1", x), 2)), 2)
    x = layer("c3", x).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    return linear(p, "f2", jax.nn.relu(linear(p, "f1", x)))


def demo(p: Weights, x: Any) -> Any:
    def layer(name: str, x: Any) -> Any:
        return jax.nn.relu(convolution(x, p[f"{name}.weight"], padding=1) + p[f"{name}.bias"])

    x = max_pool(layer("c2", layer("c1", x)), 2).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    return linear(p, "f2", jax.nn.relu(linear(p, "f1", x)))


def resnet18(p: Weights, x: Any) -> Any:
    """Batch norm by the batch's own statistics; the running ones, which do not reach the loss, are left to `step`'s peers."""

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean((0, 1, 2))
        scale = p[f"{name}.weight"] * lax.rsqrt((centred**2).mean((0, 1, 2)) + 1e-5)
        return centred * scale + p[f"{name}.bias"]

    def layer(name: str, x: Any, kernel: int, stride: int = 1) -> Any:
        return norm(f"{name}.bn", convolution(x, p[f"{name}.conv.weight"], stride, kernel // 2))

    x = jax.nn.relu(layer("stem", x, 3))
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"layers.{i}"
        y = layer(f"{block}.b", jax.nn.relu(layer(f"{block}.a", x, 3, stride)), 3)
        x = jax.nn.relu(y + (layer(f"{block}.d", x, 1, stride) if f"{block}.d.conv.weight" in p else x))
    return linear(p, "fc", x.mean((1, 2)))


def lstm(p: Weights, name: str, x: Any, reverse: bool) -> Any:
    """One direction over [batch, time, features]; the input projection is one product before the loop."""
    end = "_l0_reverse" if reverse else "_l0"
    recurrent = p[f"{name}.weight_hh{end}"].T
    projected = x @ p[f"{name}.weight_ih{end}"].T + (p[f"{name}.bias_ih{end}"] + p[f"{name}.bias_hh{end}"])

    def cell(carry: Any, z: Any) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(z + h @ recurrent, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], recurrent.shape[0]), x.dtype)
    return lax.scan(cell, (zero, zero), projected.transpose(1, 0, 2), reverse=reverse)[1].transpose(1, 0, 2)


def bilstm(p: Weights, x: Any) -> Any:
    for name in ("l1", "l2"):
        x = jnp.concatenate([lstm(p, name, x, False), lstm(p, name, x, True)], -1)
    return linear(p, "f", x)


def transformer(p: Weights, ids: Any, heads: int = 8) -> Any:
    x = p["emb.weight"][ids] + p["pos"]
    batch, time, width = x.shape
    mask = jnp.tril(jnp.ones((time, time), bool))

    def split(x: Any) -> Any:
        return x.reshape(batch, time, heads, -1).transpose(0, 2, 1, 3)

    for i in range(4):
        n = f"layers.{i}."
        q, k, v = (split(linear(p, n + name, x)) for name in "qkv")
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(width // heads)
        attended = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)
        x = layer_norm(p, n + "n1", x + linear(p, n + "o", attended.transpose(0, 2, 1, 3).reshape(x.shape)), 1e-12)
        hidden = jax.nn.gelu(linear(p, n + "f1", x), approximate=False)
        x = layer_norm(p, n + "n2", x + linear(p, n + "f2", hidden), 1e-12)
    return linear(p, "f", x)


MODELS: dict[str, Model] = {
    "mlp": mlp,
    "demo": demo,
    "cifar": cifar,
    "resnet18": resnet18,
    "bilstm": bilstm,
    "transformer": transformer,
}


def images_last(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """NCHW arrays as NHWC; others as they are."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def kernels_last(weights: Mapping[str, Any]) -> Weights:
    """Trainable weights only, convolution kernels OIHW as HWIO."""
    kept = {k: np.asarray(v) for k, v in weights.items() if "running_" not in k}
    return {k: np.ascontiguousarray(v.transpose(2, 3, 1, 0)) if v.ndim == 4 else v for k, v in kept.items()}


def cross_entropy(y: Any, target: Any) -> Any:
    """The mean over all positions."""
    logp = jax.nn.log_softmax(y.reshape(-1, y.shape[-1]))
    return -jnp.take_along_axis(logp, target.reshape(-1, 1), 1).mean()


def step(name: str, weights: Mapping[str, Any], x: Any, target: Any, rate: float) -> Callable[[], Any]:
    """One call: forward, loss, backward, Adam. It gives the loss, once everything is done."""
    model = MODELS[name.partition("_")[0]]
    p = {k: jnp.asarray(v) for k, v in kernels_last(weights).items()}
    state = {"p": p, "m": jax.tree.map(jnp.zeros_like, p), "v": jax.tree.map(jnp.zeros_like, p), "n": jnp.zeros((), jnp.int32)}
    x, target = jnp.asarray(images_last(x)), jnp.asarray(target)

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, x: Any, target: Any) -> Any:
        loss, g = jax.value_and_grad(lambda p: cross_entropy(model(p, x), target))(state["p"])
        n, (b1, b2) = state["n"] + 1, BETAS
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["m"], g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state["v"], g)
        c1, c2 = 1 - b1**n, 1 - b2**n
        p = jax.tree.map(lambda p, m, v: p - rate * (m / c1) / (jnp.sqrt(v / c2) + EPSILON), state["p"], m, v)
        return {"p": p, "m": m, "v": v, "n": n}, loss

    def run() -> Any:
        nonlocal state
        state, loss = update(state, x, target)
        jax.block_until_ready(state)
        return np.asarray(loss)

    return run


def recurrence(weight: Any, xs: Any, h: Any) -> Callable[[], Any]:
    """The gradient of a sum over a tanh recurrence with respect to its weight: h <- tanh(h W + x_t)."""

    @jax.jit
    def gradient(weight: Any, xs: Any, h: Any) -> Any:
        def total(weight: Any) -> Any:
            def cell(h: Any, x: Any) -> Any:
                h = jnp.tanh(h @ weight + x)
                return h, None

            return lax.scan(cell, h, xs)[0].sum()

        return jax.grad(total)(weight)

    weight, xs, h = jnp.asarray(weight), jnp.asarray(xs), jnp.asarray(h)
    return lambda: np.asarray(jax.block_until_ready(gradient(weight, xs, h)))
