"""The inference workloads in JAX, on the PyTorch definitions' weights with batch norm folded.

Images are NHWC and filters HWIO, matrices (in, out): the layouts that XLA's CPU backend prefers, converted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tensorwright.benchmarks.jax_training import Model, Weights, layer_norm, lstm, max_pool

relu = jax.nn.relu
IMAGES = ("lenet", "cifar", "resnet50", "mobilenetv2", "op_conv")
MOBILENET = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))  # blocks, and the stride of the first
TABLES = ("emb.", "pos.", "typ.")  # looked up by row: not transposed


def prepared(name: str, weights: Weights) -> Weights:
    """The weights in the layouts of this file."""
    found = {}
    for key, value in weights.items():
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2 and key.endswith(".weight") and not key.startswith(TABLES):
            value = value.T
        found[key] = np.ascontiguousarray(value)
    flat = {"lenet": (20, 4), "cifar": (64, 4)}.get(name.rpartition("_")[0])
    if flat:  # PyTorch flattens channels first
        channels, side = flat
        matrix = found["f1.weight"].reshape(channels, side, side, -1).transpose(1, 2, 0, 3)
        found["f1.weight"] = np.ascontiguousarray(matrix.reshape(channels * side * side, -1))
    return found


def linear(p: Weights, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def conv(p: Weights, name: str, x: Any, stride: int = 1, padding: int = 0, groups: int = 1) -> Any:
    sides, order = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, p[f"{name}.weight"], (stride, stride), sides, dimension_numbers=order, feature_group_count=groups
    )
    return y + p[f"{name}.bias"]


def mlp(p: Weights, x: Any) -> Any:
    return jax.nn.softmax(linear(p, "b", relu(linear(p, "a", x))))


def lenet(p: Weights, x: Any) -> Any:
    x = relu(max_pool(conv(p, "c2", relu(max_pool(conv(p, "c1", x), 2))), 2))
    return linear(p, "f2", relu(linear(p, "f1", x.reshape(x.shape[0], -1))))


def cifar(p: Weights, x: Any) -> Any:
    x = max_pool(relu(conv(p, "c2", max_pool(relu(conv(p, "c1", x)), 2))), 2)
    x = relu(conv(p, "c3", x))
    return linear(p, "f2", relu(linear(p, "f1", x.reshape(x.shape[0], -1))))


def resnet50(p: Weights, x: Any) -> Any:
    x = relu(conv(p, "stem.conv", x, 2, 3))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(16):
        block, stride = f"layers.{i}", 2 if i in (3, 7, 13) else 1
        y = relu(conv(p, f"{block}.b.conv", relu(conv(p, f"{block}.a.conv", x)), stride, 1))
        shortcut = conv(p, f"{block}.d.conv", x, stride) if f"{block}.d.conv.weight" in p else x
        x = relu(conv(p, f"{block}.c.conv", y) + shortcut)
    return linear(p, "fc", x.mean((1, 2)))


def mobilenetv2(p: Weights, x: Any) -> Any:
    x, k = jax.nn.relu6(conv(p, "stem.conv", x, 2, 1)), 0
    for count, first in MOBILENET:
        for j in range(count):
            block, stride = f"layers.{k}", first if j == 0 else 1
            y = jax.nn.relu6(conv(p, f"{block}.e.conv", x)) if f"{block}.e.conv.weight" in p else x
            y = jax.nn.relu6(conv(p, f"{block}.d.conv", y, stride, 1, y.shape[-1]))
            y = conv(p, f"{block}.p.conv", y)
            x, k = (x + y if stride == 1 and x.shape == y.shape else y), k + 1
    return linear(p, "fc", jax.nn.relu6(conv(p, "head.conv", x)).mean((1, 2)))


def attention(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * np.float32(q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v)


def _split(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _merge(x: Any) -> Any:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def bert(p: Weights, ids: Any) -> Any:
    x = p["emb.weight"][ids] + p["pos.weight"][: ids.shape[1]] + p["typ.weight"][0]
    x, layers, heads = layer_norm(p, "n", x, 1e-12), 12, 12
    for i in range(layers):
        n = f"layers.{i}."
        q, k, v = (_split(linear(p, n + name, x), heads) for name in "qkv")
        x = layer_norm(p, n + "n1", x + linear(p, n + "o", _merge(attention(q, k, v))), 1e-12)
        hidden = jax.nn.gelu(linear(p, n + "f1", x), approximate=False)
        x = layer_norm(p, n + "n2", x + linear(p, n + "f2", hidden), 1e-12)
    return x


def gpt2dec(p: Weights, ids: Any, past: Any) -> Any:
    x, new = p["emb.weight"][ids] + p["pos.weight"][past.shape[4]], []
    for i in range(past.shape[0]):
        n = f"layers.{i}."
        parts = jnp.split(linear(p, n + "qkv", layer_norm(p, n + "n1", x, 1e-5)), 3, -1)
        q, k, v = (_split(t, past.shape[3]) for t in parts)
        k, v = jnp.concatenate([past[i, 0], k], 2), jnp.concatenate([past[i, 1], v], 2)
        x = x + linear(p, n + "o", _merge(attention(q, k, v)))
        x = x + linear(p, n + "f2", jax.nn.gelu(linear(p, n + "f1", layer_norm(p, n + "n2", x, 1e-5)), approximate=True))
        new.append(jnp.stack([k, v]))
    return layer_norm(p, "n", x, 1e-5) @ p["emb.weight"].T, jnp.stack(new)


def bilstm(p: Weights, x: Any) -> Any:
    for name in ("l1", "l2"):
        x = jnp.concatenate([lstm(p, name, x, False), lstm(p, name, x, True)], -1)
    return jax.nn.softmax(linear(p, "f", x))


MODELS: dict[str, Any] = {
    "mlp": mlp,
    "lenet": lenet,
    "cifar": cifar,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "bert": bert,
    "gpt2dec": gpt2dec,
    "bilstm": bilstm,
    "op_gemm1024": lambda p, a, b: a @ b,
    "op_conv3x3_64_56": lambda p, x: conv(p, "conv", x, 1, 1),
    "op_softmax4096x1024": lambda p, x: jax.nn.softmax(x),
    "op_layernorm4096x1024": lambda p, x: layer_norm(p, "n", x, 1e-5),
    "op_gelu16M": lambda p, x: jax.nn.gelu(x, approximate=False),
    "op_attention12x512x64": lambda p, q, k, v: attention(q, k, v),
    "op_gemv4096": lambda p, x: lax.dot_general(x, p["f.weight"], (((1,), (1,)), ((), ()))),
}


def inference(name: str, weights: Weights, inputs: Sequence[Any]) -> tuple[Model, Weights, list[Any]]:
    """The model's function of weights and inputs, and both as it takes them."""
    model = MODELS.get(name) or MODELS[name.rpartition("_")[0]]
    arrays = [x.astype(np.int32) if x.dtype == np.int64 else x for x in inputs]
    if name.startswith(IMAGES):
        arrays = [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x for x in arrays]
    return model, weights if name.startswith("op_gemv") else prepared(name, weights), arrays
