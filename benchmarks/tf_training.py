"""One training step of the training workloads in TensorFlow: a `tf.function` over forward, loss, gradient and Adam.

Weights are those of the PyTorch definitions, by name; images are NHWC, as TensorFlow's CPU kernels want them. The LSTM is
Keras' layer, the fastest one there: it has one bias where PyTorch has two, so that its losses part after the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

Weights = dict[str, Any]


def linear(p: Weights, name: str, x: Any) -> Any:
    return tf.tensordot(x, p[f"{name}.weight"], [[-1], [1]]) + p[f"{name}.bias"]


def mlp(p: Weights, x: Any) -> Any:
    hidden = tf.nn.relu(tf.matmul(x, p["a.weight"], transpose_b=True) + p["a.bias"])
    return tf.matmul(hidden, p["b.weight"], transpose_b=True) + p["b.bias"]


def layer(p: Weights, name: str, x: Any, padding: str) -> Any:
    return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, p[f"{name}.weight"], 1, padding), p[f"{name}.bias"]))


def flat(x: Any) -> Any:
    return tf.reshape(tf.transpose(x, (0, 3, 1, 2)), (x.shape[0], -1))


def cifar(p: Weights, x: Any) -> Any:
    x = tf.nn.max_pool2d(layer(p, "c1", x, "VALID"), 2, 2, "VALID")
    x = tf.nn.max_pool2d(layer(p, "c2", x, "VALID"), 2, 2, "VALID")
    return linear(p, "f2", tf.nn.relu(linear(p, "f1", flat(layer(p, "c3", x, "VALID")))))


def demo(p: Weights, x: Any) -> Any:
    x = tf.nn.max_pool2d(layer(p, "c2", layer(p, "c1", x, "SAME"), "SAME"), 2, 2, "VALID")
    return linear(p, "f2", tf.nn.relu(linear(p, "f1", flat(x))))


def resnet18(p: Weights, x: Any) -> Any:
    def convolve(name: str, x: Any, kernel: int, stride: int = 1) -> Any:
        side = kernel // 2
        y = tf.nn.conv2d(x, p[f"{name}.conv.weight"], stride, [[0, 0], [side, side], [side, side], [0, 0]])
        scale, shift = p[f"{name}.bn.weight"], p[f"{name}.bn.bias"]
        return tf.compat.v1.nn.fused_batch_norm(y, scale, shift, epsilon=1e-5, is_training=True)[0]

    x = tf.nn.relu(convolve("stem", x, 3))
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"layers.{i}"
        y = convolve(f"{block}.b", tf.nn.relu(convolve(f"{block}.a", x, 3, stride)), 3)
        x = tf.nn.relu(y + (convolve(f"{block}.d", x, 1, stride) if f"{block}.d.conv.weight" in p else x))
    return linear(p, "fc", tf.reduce_mean(x, (1, 2)))


def transformer(p: Weights, ids: Any, heads: int = 8) -> Any:
    x = tf.gather(p["emb.weight"], ids) + p["pos"]
    batch, time, width = x.shape
    mask = tf.constant(np.where(np.tril(np.ones((time, time), bool)), 0, -np.inf).astype(np.float32))

    def split(x: Any) -> Any:
        return tf.transpose(tf.reshape(x, (batch, time, heads, -1)), (0, 2, 1, 3))

    def norm(name: str, x: Any) -> Any:
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + 1e-12) * p[f"{name}.weight"] + p[f"{name}.bias"]

    for i in range(4):
        n = f"layers.{i}."
        q, k, v = (split(linear(p, n + name, x)) for name in "qkv")
        scores = tf.matmul(q, k, transpose_b=True) * (width // heads) ** -0.5 + mask
        attended = tf.reshape(tf.transpose(tf.matmul(tf.nn.softmax(scores), v), (0, 2, 1, 3)), (batch, time, width))
        x = norm(n + "n1", x + linear(p, n + "o", attended))
        x = norm(n + "n2", x + linear(p, n + "f2", tf.nn.gelu(linear(p, n + "f1", x))))
    return linear(p, "f", x)


MODELS: dict[str, Callable[[Weights, Any], Any]] = {
    "mlp": mlp,
    "demo": demo,
    "cifar": cifar,
    "resnet18": resnet18,
    "transformer": transformer,
}


def bilstm(weights: Mapping[str, Any]) -> tuple[Callable[[Any], Any], list[Any]]:
    """The recurrent model of Keras layers with these weights, and its variables. Both have the gate order i, f, g, o."""
    import keras

    features = weights["l1.weight_ih_l0"].shape[1]
    width = weights["l1.weight_hh_l0"].shape[1]
    layers = [keras.layers.Bidirectional(keras.layers.LSTM(width, return_sequences=True)) for _ in range(2)]
    head = keras.layers.Dense(weights["f.weight"].shape[0])
    model = keras.Sequential([keras.Input((None, features)), *layers, head])
    for name, made in zip(("l1", "l2"), layers, strict=True):
        values = []
        for end in ("_l0", "_l0_reverse"):
            values += [weights[f"{name}.weight_ih{end}"].T, weights[f"{name}.weight_hh{end}"].T]
            values.append(weights[f"{name}.bias_ih{end}"] + weights[f"{name}.bias_hh{end}"])
        made.set_weights(values)
    head.set_weights([weights["f.weight"].T, weights["f.bias"]])
    return lambda x: model(x, training=True), [v.value for v in model.trainable_variables]


def step(name: str, weights: Mapping[str, Any], x: Any, target: Any, rate: float) -> Callable[[], Any]:
    """One call: forward, loss, backward, Adam. It gives the loss."""
    kind = name.partition("_")[0]
    if kind == "bilstm":
        forward, variables = bilstm(weights)
    else:
        kept = {k: np.asarray(v) for k, v in weights.items() if "running_" not in k}
        p = {k: tf.Variable(v.transpose(2, 3, 1, 0) if v.ndim == 4 else v) for k, v in kept.items()}
        model, variables = MODELS[kind], list(p.values())

        def forward(x: Any) -> Any:
            return model(p, x)

    x = tf.constant(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
    target = tf.constant(np.asarray(target).reshape(-1))
    means, squares = ([tf.Variable(tf.zeros_like(v)) for v in variables] for _ in range(2))
    count = tf.Variable(0.0)

    @tf.function
    def update() -> Any:
        with tf.GradientTape() as tape:
            y = forward(x)
            y = tf.reshape(y, (-1, y.shape[-1]))
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(target, y))
        gradients = tape.gradient(loss, variables)
        count.assign_add(1.0)
        c1, c2 = 1 - tf.pow(0.9, count), 1 - tf.pow(0.999, count)
        for variable, g, m, v in zip(variables, gradients, means, squares, strict=True):
            if isinstance(g, tf.IndexedSlices):
                g = tf.convert_to_tensor(g)
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=m.handle, v=v.handle, beta1_power=1 - c1, beta2_power=1 - c2, lr=rate,
                beta1=0.9, beta2=0.999, epsilon=1e-8, grad=g,
            )  # fmt: skip
        return loss

    return lambda: update().numpy()
