"""Every function against numpy, scipy, or its formula written out in f64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
import tensorwright as tw
from tensorwright.frontend import functional

from .support import Array, run

RNG = np.random.default_rng(1)
X = RNG.standard_normal((3, 4)).astype(np.float32)
P = RNG.uniform(0.1, 3.0, (3, 4)).astype(np.float32)
N = np.array([[1, -2, 0, 7], [3, 3, -5, 2]])
EDGES = np.array([-np.inf, -1e30, -90.0, -2.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 90.0, 1e30, np.inf, np.nan], np.float32)
# f32 results against f64 formulas: a few roundings of each step.
TOLERANCE = 5e-6


def close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def sigmoid(x: Array) -> Array:
    return scipy.special.expit(x)


ELEMENTWISE: dict[str, tuple[Callable[[Array], Array], Array]] = {
    "exp": (np.exp, X),
    "expm1": (np.expm1, X),
    "log": (np.log, P),
    "log1p": (np.log1p, P),
    "log2": (np.log2, P),
    "log10": (np.log10, P),
    "sqrt": (np.sqrt, P),
    "rsqrt": (lambda x: 1 / np.sqrt(x), P),
    "tanh": (np.tanh, X),
    "sigmoid": (sigmoid, X),
    "erf": (scipy.special.erf, X),
    "sin": (np.sin, X),
    "cos": (np.cos, X),
    "tan": (np.tan, X),
    "floor": (np.floor, X),
    "ceil": (np.ceil, X),
    "round": (np.round, X * 3),
    "trunc": (np.trunc, X * 3),
    "abs": (np.abs, X),
    "negative": (np.negative, X),
    "sign": (np.sign, X),
    "square": (np.square, X),
    "reciprocal": (np.reciprocal, P),
    "isnan": (np.isnan, EDGES),
    "isinf": (np.isinf, EDGES),
    "isfinite": (np.isfinite, EDGES),
    "logical_not": (np.logical_not, N),
    "relu": (lambda x: np.maximum(x, 0), X),
    "relu6": (lambda x: np.clip(x, 0, 6), X * 9),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), X),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), X),
    "selu": (lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))), X),
    "gelu": (lambda x: x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2))), X),
    "silu": (lambda x: x * sigmoid(x), X),
    "softplus": (lambda x: np.logaddexp(x, 0), X * 30),
    "softsign": (lambda x: x / (1 + abs(x)), X),
    "hard_sigmoid": (lambda x: np.clip(x / 6 + 0.5, 0, 1), X * 4),
    "hard_swish": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), X * 4),
    "mish": (lambda x: x * np.tanh(np.logaddexp(x, 0)), X),
    "log_sigmoid": (lambda x: -np.logaddexp(-x, 0), X * 30),
    "glu": (lambda x: x[:, :2] * sigmoid(x[:, 2:]), X),
    "softmax": (lambda x: scipy.special.softmax(x, -1), X),
    "log_softmax": (lambda x: scipy.special.log_softmax(x, -1), X),
    "logsumexp": (scipy.special.logsumexp, X),
    "norm": (np.linalg.norm, X),
    "sum": (np.sum, X),
    "prod": (np.prod, X),
    "mean": (np.mean, X),
    "var": (np.var, X),
    "std": (np.std, X),
    "max": (np.max, X),
    "min": (np.min, X),
    "any": (np.any, N),
    "all": (np.all, N),
    "argmax": (np.argmax, X),
    "argmin": (np.argmin, X),
    "cumsum": (np.cumsum, X),
    "ravel": (np.ravel, X),
    "transpose": (np.transpose, X),
    "flip": (np.flip, X),
    "squeeze": (np.squeeze, X[:, :1]),
    "tril": (np.tril, X),
    "triu": (np.triu, X),
    "zeros_like": (np.zeros_like, X),
    "ones_like": (np.ones_like, X),
    "stop_gradient": (lambda x: x, X),
    "flatten": (np.ravel, X),
    "invert": (np.invert, N),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_one_operand(name: str) -> None:
    reference, x = ELEMENTWISE[name]
    close(run(getattr(tw, name), x), reference(wide(x) if x.dtype.kind == "f" else x))


@pytest.mark.parametrize("name", ["relu", "relu6", "sigmoid", "tanh", "softplus", "leaky_relu", "exp", "log_sigmoid"])
def test_activations_at_infinities_and_nan(name: str) -> None:
    with np.errstate(all="ignore"):
        want = ELEMENTWISE[name][0](wide(EDGES)).astype(np.float32)
    np.testing.assert_allclose(run(getattr(tw, name), EDGES), want, rtol=TOLERANCE, atol=1e-30)


BINARY: dict[str, Callable[..., Array]] = {
    n: getattr(np, n)
    for n in (
        "add",
        "subtract",
        "multiply",
        "true_divide",
        "floor_divide",
        "remainder",
        "power",
        "maximum",
        "minimum",
        "less",
        "less_equal",
        "greater",
        "greater_equal",
        "equal",
        "not_equal",
        "logical_and",
        "logical_or",
        "logical_xor",
    )
}


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_operands(name: str) -> None:
    y = RNG.uniform(0.2, 2.0, (4,)).astype(np.float32)
    close(run(getattr(tw, name), P, y), BINARY[name](P, y))


@pytest.mark.parametrize("name", ["bitwise_and", "bitwise_or", "bitwise_xor"])
def test_bitwise_functions(name: str) -> None:
    close(run(getattr(tw, name), N, np.array([1, 2, 3, 4])), getattr(np, name)(N, np.array([1, 2, 3, 4])))


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.5, -0.5, 2.5, -3])
def test_powers_by_a_number(exponent: float) -> None:
    close(run(lambda x: x**exponent, P), wide(P) ** exponent)


A3 = RNG.standard_normal((2, 3, 4)).astype(np.float32)
MOVEMENT: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("reshape", lambda f, x: f.reshape(x, (4, -1))),
    ("transpose", lambda f, x: f.transpose(x, (2, 0, 1))),
    ("swapaxes", lambda f, x: f.swapaxes(x, 0, -1)),
    ("moveaxis", lambda f, x: f.moveaxis(x, 0, 2)),
    ("moveaxis2", lambda f, x: f.moveaxis(x, (0, 1), (-1, 0))),
    ("expand_dims", lambda f, x: f.expand_dims(x, (0, -1))),
    ("squeeze", lambda f, x: f.squeeze(f.expand_dims(x, 1), 1)),
    ("broadcast_to", lambda f, x: f.broadcast_to(x, (5, 2, 3, 4))),
    ("flip", lambda f, x: f.flip(x, 1)),
    ("concatenate", lambda f, x: f.concatenate([x, x[:1]], 0)),
    ("concatenate last", lambda f, x: f.concatenate([x, x[..., :1], x], -1)),
    ("stack", lambda f, x: f.stack([x, x], 1)),
    ("stack last", lambda f, x: f.stack([x, x], -1)),
    ("roll", lambda f, x: f.roll(x, 1, 2)),
    ("roll back", lambda f, x: f.roll(x, -2, 1)),
    ("tile", lambda f, x: f.tile(x, (2, 1, 2))),
    ("tile2", lambda f, x: f.tile(x, 3)),
    ("tile more", lambda f, x: f.tile(x, (2, 1, 1, 1))),
    ("repeat", lambda f, x: f.repeat(x, 2, 1)),
    ("repeat flat", lambda f, x: f.repeat(x, 2)),
    ("pad", lambda f, x: f.pad(x, ((0, 1), (2, 0), (1, 1)), constant_values=2.5)),
    ("pad all", lambda f, x: f.pad(x, 1)),
    ("take", lambda f, x: f.take(x, np.array([[0, -1], [1, 1]]), 1)),
    ("take flat", lambda f, x: f.take(x, np.array([3, -2]))),
    ("take_along_axis", lambda f, x: f.take_along_axis(x, np.array([[[0, -1, 2, 1]], [[1, 1, 0, 2]]]), 1)),
    ("full_like", lambda f, x: f.full_like(x, 3)),
    ("clip", lambda f, x: f.clip(x, -0.3, 0.6)),
    ("clip open", lambda f, x: f.clip(x, None, 0.6)),
    ("where", lambda f, x: f.where(x > 0, x, 0.0)),
    ("sum", lambda f, x: f.sum(x, axis=(0, 2), keepdims=True)),
    ("mean", lambda f, x: f.mean(x, axis=-1)),
    ("var", lambda f, x: f.var(x, axis=(0, 1), ddof=1)),
    ("max", lambda f, x: f.max(x, axis=1)),
    ("tril", lambda f, x: f.tril(x, 1)),
    ("triu", lambda f, x: f.triu(x, -1)),
]


@pytest.mark.parametrize("make", [m for _, m in MOVEMENT], ids=[n for n, _ in MOVEMENT])
def test_movement_and_reductions_are_numpys(make: Callable[[Any, Any], Any]) -> None:
    close(run(lambda x: make(tw, x), A3), make(np, A3))


@pytest.mark.parametrize("sections", [2, [1, 3]])
def test_split(sections: Any) -> None:
    got = run(lambda x: tw.split(x, sections, 2), A3)
    for g, w in zip(got, np.split(A3, sections, 2), strict=True):
        close(g, w)


def test_cumsum_exclusive_and_reverse() -> None:
    x = np.array([1.0, 2.0, 4.0], np.float32)
    close(run(lambda t: tw.cumsum(t, 0, exclusive=True), x), [0, 1, 3])
    close(run(lambda t: tw.cumsum(t, 0, reverse=True), x), [7, 6, 4])


MAKERS: list[tuple[str, Callable[[Any], Any]]] = [
    ("arange", lambda f: f.arange(5)),
    ("arange2", lambda f: f.arange(2, 9, 3)),
    ("arange3", lambda f: f.arange(5, 0, -2)),
    ("arange float", lambda f: f.arange(0.0, 1.0, 0.25)),
    ("zeros", lambda f: f.zeros((2, 3))),
    ("ones", lambda f: f.ones(4)),
    ("full", lambda f: f.full((2, 2), 7.5)),
    ("eye", lambda f: f.eye(3)),
    ("eye2", lambda f: f.eye(2, 4)),
    ("linspace", lambda f: f.linspace(0, 1, 5)),
]


@pytest.mark.parametrize("make", [m for _, m in MAKERS], ids=[n for n, _ in MAKERS])
def test_makers(make: Callable[[Any], Any]) -> None:
    close(run(lambda x: make(tw), X), make(np))


def test_iota_meshgrid_one_hot_and_scatter() -> None:
    close(run(lambda x: tw.iota((2, 3), 1), X), np.indices((2, 3))[1])
    for indexing in ("xy", "ij"):
        got = run(lambda a, b, how=indexing: tw.meshgrid(a, b, indexing=how), np.arange(3), np.arange(2))
        for g, w in zip(got, np.meshgrid(np.arange(3), np.arange(2), indexing=indexing), strict=True):  # type: ignore[call-overload]
            close(g, w)
    close(run(lambda i: tw.one_hot(i, 3), np.array([2, 0, 5, -1])), np.array([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]))
    want = np.zeros((4, 2))
    np.add.at(want, [1, 3, 1], np.arange(6.0).reshape(3, 2))
    close(
        run(
            tw.scatter_add,
            np.zeros((4, 2), np.float32),
            np.array([1, 3, 1]),
            np.arange(6.0, dtype=np.float32).reshape(3, 2),
        ),
        want,
    )


@pytest.mark.parametrize(
    ("a", "b"), [((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 1, 3, 4), (5, 4, 2)), ((2, 3, 4), (4,))]
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = RNG.standard_normal(a).astype(np.float32), RNG.standard_normal(b).astype(np.float32)
    close(run(tw.matmul, x, y), wide(x) @ wide(y))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij->ji", [(2, 3)]),
        ("ij->j", [(2, 3)]),
        ("i,j->ij", [(2,), (3,)]),
        ("ij,ij->", [(2, 3), (2, 3)]),
        ("bhqd,bhkd->bhqk", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]),
        ("ij,k->jk", [(2, 3), (4,)]),
        ("bi,bi->b", [(2, 3), (2, 3)]),
        ("ij,jk", [(2, 3), (3, 4)]),
    ],
)
def test_einsum(text: str, shapes: list[tuple[int, ...]]) -> None:
    arrays = [RNG.standard_normal(s).astype(np.float32) for s in shapes]
    close(run(lambda *xs: tw.einsum(text, *xs), *arrays), np.einsum(text, *map(wide, arrays)))


def test_outer_and_linear() -> None:
    x, w, b = X, RNG.standard_normal((5, 4)).astype(np.float32), RNG.standard_normal(5).astype(np.float32)
    close(run(tw.outer, x[0], b), np.outer(x[0], b))
    close(run(tw.linear, x, w, b), wide(x) @ w.T + b)


def convolve(x: Array, w: Array, stride: int, padding: int, dilation: int, groups: int) -> Array:
    """Convolution by its definition, one pixel at a time."""
    x = np.pad(wide(x), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    n, _, h, wd = x.shape
    o, ci, kh, kw = w.shape
    oh, ow = (h - dilation * (kh - 1) - 1) // stride + 1, (wd - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((n, o, oh, ow))
    for k in range(o):
        g = k // (o // groups)
        for i in range(oh):
            for j in range(ow):
                window = x[:, g * ci : (g + 1) * ci, i * stride :: dilation, j * stride :: dilation][:, :, :kh, :kw]
                y[:, k, i, j] = (window * w[k]).sum((1, 2, 3))
    return y


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, 0, 1, 1), (3, 2, 1, 1, 1), (1, 1, 0, 1, 1), (3, 1, 2, 2, 1), (3, 1, 1, 1, 2), (3, 1, 1, 1, 4), (5, 3, 2, 1, 1)],
)
def test_conv2d(kernel: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    x = RNG.standard_normal((2, 4, 7, 6)).astype(np.float32)
    w = RNG.standard_normal((8, 4 // groups, kernel, kernel)).astype(np.float32)
    b = RNG.standard_normal(8).astype(np.float32)
    got = run(lambda x, w, b: tw.conv2d(x, w, b, stride, padding, dilation, groups), x, w, b)
    close(got, convolve(x, w, stride, padding, dilation, groups) + b[:, None, None], 2e-5)


def test_conv2d_paddings() -> None:
    x, w = RNG.standard_normal((1, 1, 5, 6)).astype(np.float32), RNG.standard_normal((1, 1, 3, 4)).astype(np.float32)
    got = run(lambda x, w: tw.conv2d(x, w, padding="same"), x, w)
    full = scipy.signal.correlate2d(np.pad(wide(x[0, 0]), ((1, 1), (1, 2))), w[0, 0], "valid")
    close(got[0, 0], full)
    uneven = run(lambda x, w: tw.conv2d(x, w, padding=((0, 1), (2, 0))), x, w)
    close(uneven[0, 0], scipy.signal.correlate2d(np.pad(wide(x[0, 0]), ((0, 1), (2, 0))), w[0, 0], "valid"))
    assert run(lambda x, w: tw.conv2d(x, w, padding="valid"), x, w).shape == (1, 1, 3, 3)


def pool(x: Array, k: int, s: int, p: int, how: Callable[..., Any], fill: float) -> Array:
    x = np.pad(wide(x), ((0, 0), (0, 0), (p, p), (p, p)), constant_values=fill)
    oh, ow = (x.shape[2] - k) // s + 1, (x.shape[3] - k) // s + 1
    return np.array(
        [[how(x[:, :, i * s : i * s + k, j * s : j * s + k], axis=(2, 3)) for j in range(ow)] for i in range(oh)]
    ).transpose(2, 3, 0, 1)


@pytest.mark.parametrize(("k", "s", "p"), [(2, None, 0), (3, 2, 1), (3, 1, 1)])
def test_pooling(k: int, s: int | None, p: int) -> None:
    x = RNG.standard_normal((2, 3, 7, 8)).astype(np.float32)
    close(run(lambda x: tw.max_pool2d(x, k, s, p), x), pool(x, k, s or k, p, np.max, -np.inf))
    close(run(lambda x: tw.avg_pool2d(x, k, s, p), x), pool(x, k, s or k, p, np.mean, 0.0))
    counts = pool(np.ones_like(x), k, s or k, p, np.sum, 0.0)
    close(run(lambda x: tw.avg_pool2d(x, k, s, p, count_include_pad=False), x), pool(x, k, s or k, p, np.sum, 0.0) / counts)


@pytest.mark.parametrize("size", [1, 2, (3, 4), (5, 7)])
def test_adaptive_avg_pool(size: Any) -> None:
    x = RNG.standard_normal((2, 3, 6, 8)).astype(np.float32)
    out = (size, size) if isinstance(size, int) else size
    rows = [(i * 6 // out[0], -(-(i + 1) * 6 // out[0])) for i in range(out[0])]
    columns = [(j * 8 // out[1], -(-(j + 1) * 8 // out[1])) for j in range(out[1])]
    want = np.array([[wide(x)[:, :, a:b, c:d].mean((2, 3)) for c, d in columns] for a, b in rows]).transpose(2, 3, 0, 1)
    close(run(lambda x: tw.adaptive_avg_pool2d(x, size), x), want)


def standardised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    x = wide(x)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def test_normalisations() -> None:
    x = RNG.standard_normal((4, 6, 3, 2)).astype(np.float32) * 3 + 1
    w, b = RNG.standard_normal(6).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
    m, v = RNG.standard_normal(6).astype(np.float32), RNG.uniform(0.5, 2, 6).astype(np.float32)
    column = (slice(None), None, None)
    close(
        run(tw.batch_norm, x, m, v, w, b), (wide(x) - m[column]) / np.sqrt(wide(v)[column] + 1e-5) * w[column] + b[column], 2e-5
    )
    y, new_m, new_v = run(tw.batch_norm_training, x, m, v, w, b)
    close(y, standardised(x, (0, 2, 3), 1e-5) * w[column] + b[column], 2e-5)
    close(new_m, 0.9 * m + 0.1 * wide(x).mean((0, 2, 3)))
    close(new_v, 0.9 * v + 0.1 * wide(x).var((0, 2, 3), ddof=1))
    close(
        run(lambda x, w, b: tw.group_norm(x, 3, w, b), x, w, b),
        standardised(x.reshape(4, 3, 2, 3, 2), (2, 3, 4), 1e-5).reshape(x.shape) * w[column] + b[column],
        2e-5,
    )
    z, lw, lb = X, w[:4], b[:4]
    close(run(lambda x, w, b: tw.layer_norm(x, 4, w, b), z, lw, lb), standardised(z, (1,), 1e-5) * lw + lb, 2e-5)
    close(
        run(lambda x, w: tw.rms_norm(x, (4,), w), z, lw),
        wide(z) / np.sqrt((wide(z) ** 2).mean(-1, keepdims=True) + 1e-6) * lw,
        2e-5,
    )


def attention(q: Array, k: Array, v: Array, bias: Any = 0.0) -> Array:
    scores = wide(q) @ np.swapaxes(wide(k), -1, -2) / math.sqrt(q.shape[-1]) + bias
    return scipy.special.softmax(scores, -1) @ wide(v)


def test_attention() -> None:
    q, k, v = (RNG.standard_normal((2, 3, n, 8)).astype(np.float32) for n in (5, 6, 6))
    close(run(tw.scaled_dot_product_attention, q, k, v), attention(q, k, v), 2e-5)
    mask = RNG.random((5, 6)) > 0.4
    mask[:, 0] = True
    bias = np.where(mask, 0.0, -np.inf)
    close(run(tw.scaled_dot_product_attention, q, k, v, mask), attention(q, k, v, bias), 2e-5)
    numbers = RNG.standard_normal((5, 6)).astype(np.float32)
    close(run(tw.scaled_dot_product_attention, q, k, v, numbers), attention(q, k, v, numbers), 2e-5)
    causal = np.where(np.tril(np.ones((6, 6))) > 0, 0.0, -np.inf)
    close(run(lambda k, v: tw.scaled_dot_product_attention(k, k, v, is_causal=True), k, v), attention(k, k, v, causal), 2e-5)
    close(
        run(lambda k, v: tw.scaled_dot_product_attention(k, k, v, scale=0.5), k, v), attention(k * 0.5 * math.sqrt(8), k, v), 2e-5
    )


def test_embedding_and_gelu_tanh() -> None:
    table = RNG.standard_normal((5, 3)).astype(np.float32)
    close(run(tw.embedding, np.array([[0, 4], [2, 2]]), table), table[[[0, 4], [2, 2]]])
    want = wide(X) * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide(X) + 0.044715 * wide(X) ** 3)))
    close(run(lambda x: tw.gelu(x, "tanh"), X), want)
    close(run(lambda x: tw.softplus(x, 3.0), X), np.logaddexp(3 * wide(X), 0) / 3)


def test_softmax_of_extreme_rows() -> None:
    x = np.array([[1e30, -1e30, 0.0], [-np.inf, 0.0, -np.inf], [88.0, 89.0, 90.0]], np.float32)
    got = run(tw.softmax, x)
    np.testing.assert_allclose(got, scipy.special.softmax(wide(x), -1), rtol=1e-6, atol=0)
    assert got[1, 0] == 0.0
    close(run(lambda x: tw.logsumexp(x, -1), np.full((2, 3), -np.inf, np.float32)), [-np.inf, -np.inf])
    close(run(lambda x: tw.logsumexp(x, 1, keepdims=True), X), scipy.special.logsumexp(wide(X), 1, keepdims=True))


def test_random_draws() -> None:
    key = np.uint64(7)
    u = run(lambda k: tw.random.uniform((300, 300), key=k), key)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005  # the mean has standard deviation 0.001
    n = run(lambda k: tw.random.normal((300, 300), 2.0, 3.0, key=k), key)
    assert abs(n.mean() - 2) < 0.05  # 0.01
    assert abs(n.std() - 3) < 0.05  # 0.007
    a, b = run(lambda k: (tw.random.uniform((8,), key=k), tw.random.uniform((8,), key=k)), key)
    assert (a != b).all(), "two draws in one trace must differ"
    np.testing.assert_array_equal(run(lambda k: tw.random.uniform((8,), key=k), key), a)
    assert (run(lambda k: tw.random.uniform((8,), key=k), np.uint64(8)) != a).all()
    kept = run(lambda k, x: tw.dropout(x, 0.25, key=k), key, np.ones(10000, np.float32))
    assert set(np.unique(kept)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert abs((kept == 0).mean() - 0.25) < 0.02  # sd 0.004
    coin = run(lambda k: tw.random.bernoulli(0.75, (10000,), key=k), key)
    assert abs(coin.mean() - 0.75) < 0.02


def test_random_without_a_key_says_where_keys_come_from() -> None:
    with pytest.raises(tw.errors.TraceError, match="key="):
        tw.trace(lambda x: tw.dropout(x, 0.5), tw.spec(4))


def test_mean_and_shapes_over_a_symbolic_dimension() -> None:
    g = tw.trace(lambda x: (x - x.mean(axis=0), x.reshape(x.shape[0] * 2, -1), x[1:], tw.arange(x.shape[0])), tw.spec("N", 4))
    assert [str(o.type) for o in g.outputs] == ["f32[N, 4]", "f32[2*N, 2]", "f32[N - 1, 4]", "i64[N]"]


def test_every_public_function_is_exported_at_the_root_and_documented() -> None:
    for name in functional.__all__:
        assert getattr(tw, name) is getattr(functional, name)
        assert getattr(functional, name).__doc__, name
    assert set(functional.__all__) <= set(dir(tw))
