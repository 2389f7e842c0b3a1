"""Layers at their edges: what is refused and how, sizes of one and none, masks, state dicts, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tensorwright as tw
from tensorwright import losses, nn
from tensorwright.frontend import trace_model
from tensorwright.ir.dtypes import f64
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError
from tensorwright.ir.interp import run as interpret

from .checking import check, record
from .support import Array, execute, expand, run

RNG = np.random.default_rng(41)
S = tw.spec


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
    (nn.Conv1d(3, 4, 2), (S(3, 9),), ShapeError, r"\(N, C, L\), 3 dimensions, not 2; x.reshape\(1, 3, 9\) would fit"),
    (nn.Conv1d(3, 4, 2), (S(2, 9, 3),), ShapeError, r"9 channels; .* takes 3; .*x.transpose\(0, 2, 1\) would fit"),
    (nn.Conv2d(3, 4, 2), (S(2, 8, 8, 3),), ShapeError, r"x.transpose\(0, 3, 1, 2\) would fit"),
    (nn.Conv2d(3, 4, 2), (S(2, 3, 8, 8, dtype="bool"),), DTypeError, r"bool Tensor; use .astype\('f32'\)"),
    (nn.Conv2d(3, 4, 9), (S(2, 3, 8, 8),), ShapeError, "smaller than the window of 9"),
    (nn.ConvTranspose2d(3, 4, 2), (S(2, 4, 8, 8),), ShapeError, r"a weight of shape \(3, 4, 2, 2\) .* takes 3"),
    (lambda x: tw.conv_transpose2d(x, np.ones((5, 3, 2, 2), np.float32)), (S(2, 3, 8, 8),), ShapeError, "first two axes"),
    (nn.ConvTranspose1d(3, 4, 2, padding=3), (S(2, 3, 2),), ShapeError, "would have size -3"),
    (nn.ConvTranspose1d(3, 4, 2, output_padding=1), (S(2, 3, 2),), AttributeValueError, "below the stride or the dilation"),
    (nn.MaxPool2d(3), (S(3, 8, 8),), ShapeError, r"x.reshape\(1, 3, 8, 8\) would fit"),
    (nn.MaxPool2d(3, padding=2), (S(1, 3, 8, 8),), AttributeValueError, "more than half of the kernel"),
    (nn.MaxPool2d(2, ceil_mode=True), (S(1, 3, "H", 8),), ShapeError, "ceil_mode needs sizes that are numbers"),
    (nn.MaxPool1d((2, 2)), (S(1, 3, 8),), AttributeValueError, "kernel_size is an int, each at least 1"),
    (nn.AvgPool2d(2, divisor_override=0), (S(1, 3, 8, 8),), AttributeValueError, "divisor_override is a positive int"),
    (nn.AdaptiveAvgPool2d((2, 0)), (S(1, 3, 8, 8),), AttributeValueError, "a positive int or None, or a pair"),
    (nn.AdaptiveMaxPool2d(2), (S(1, 3, 0, 8),), ShapeError, "of an axis of size 0"),
    (nn.BatchNorm2d(3), (S(2, 3, 4),), ShapeError, r"BatchNorm2d takes \(N, C, H, W\), not 3 dimensions"),
    (nn.BatchNorm1d(3), (S(2, 4),), ShapeError, r"BatchNorm1d\(3\) takes 3 channels"),
    (nn.BatchNorm1d(3, track_running_stats=False), (S(1, 3),), ShapeError, "two values per channel"),
    (nn.InstanceNorm1d(3), (S(2, 3, 1),), ShapeError, "two values per channel or more"),
    (nn.LayerNorm(4), (S(2, 5),), ShapeError, r"must end in the normalised shape \(4,\)"),
    (nn.GroupNorm(2, 4), (S(2, 5, 3),), ShapeError, "channels"),
    (nn.PReLU(3), (S(2, 4),), ShapeError, "one number, or one per channel: 4"),
    (nn.GLU(), (S(2, 5),), ShapeError, "does not divide into 2 equal parts"),
    (nn.Dropout2d(), (S(2, 5),), ShapeError, "Dropout2d takes 4 dimensions"),
    (nn.Embedding(5, 2), (S(3),), DTypeError, "integer"),
    (nn.PositionalEncoding(4, max_len=3), (S(2, 5, 4),), ShapeError, "5 positions, and max_len is 3"),
    (nn.PositionalEncoding(4), (S(2, 5, 6),), ShapeError, r"\(N, T, 4\)"),
    (nn.MultiheadAttention(4, 2), (S(2, 5, 6),), ShapeError, "E being 4, 4, 4"),
    (nn.MultiheadAttention(4, 2), (S(2, 5, 4), S(3, 5, 4)), ShapeError, "one batch size"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "specs", "kind", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_does_not_fit_is_refused_and_named(layer: Any, specs: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        tw.trace(layer, *specs)
    if kind is not AttributeValueError:
        assert "test_layer_edges.py" in str(caught.value)  # the user's line


def test_masks_that_do_not_fit_are_refused() -> None:
    m = nn.MultiheadAttention(4, 2)
    with pytest.raises(ShapeError, match=r"attn_mask has shape \(5, 5\) or \(4, 5, 5\)"):
        tw.trace(lambda x, k: m(x, attn_mask=k), S(2, 5, 4), S(2, 5, 5))
    with pytest.raises(ShapeError, match=r"key_padding_mask has shape \(2, 5\)"):
        tw.trace(lambda x, k: m(x, key_padding_mask=k), S(2, 5, 4), S(5, 5, dtype="bool"))
    with pytest.raises(DTypeError, match=r"bool \(true: not allowed\) or float"):
        tw.trace(lambda x, k: m(x, attn_mask=k), S(2, 5, 4), S(5, 5, dtype="i32"))


def test_arguments_of_layers_are_checked_when_they_are_made() -> None:
    for make in (
        lambda: nn.Conv2d(3, 4, 3, padding_mode="reflect"),
        lambda: nn.Conv1d(3, 4, (3, 3)),
        lambda: nn.ConvTranspose2d(3, 4, 3, groups=2),
        lambda: nn.Embedding(5, 2, padding_idx=5),
        lambda: nn.Dropout(-0.1),
        lambda: nn.GELU("exact"),
        lambda: nn.MSELoss("average"),
        lambda: nn.MultiheadAttention(6, 4),
        lambda: nn.TransformerDecoderLayer(8, 2, activation="tanh"),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 0),
    ):
        with pytest.raises(AttributeValueError):
            make()


def test_sizes_of_one_and_none() -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    for layer in (
        nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 3, padding="same"), nn.ConvTranspose2d(1, 2, 2, 3), nn.MaxPool2d(1), nn.AvgPool2d(1),
        nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d((2, 1)), nn.GroupNorm(1, 1), nn.LayerNorm((1, 1)),
    ):  # fmt: skip
        check(layer, one, compiled=False)
    for layer, shape, want in (
        (nn.ConvTranspose2d(2, 3, 2, 2), (0, 2, 3, 3), (0, 3, 6, 6)),
        (nn.AdaptiveMaxPool2d(2), (0, 2, 3, 3), (0, 2, 2, 2)),
        (nn.InstanceNorm2d(2), (0, 2, 3, 3), (0, 2, 3, 3)),
        (nn.BatchNorm2d(2), (0, 2, 3, 3), (0, 2, 3, 3)),
        (nn.TransformerEncoderLayer(4, 2, 8), (0, 5, 4), (0, 5, 4)),
    ):
        exe = tw.compile(layer, tw.spec(*shape))
        assert exe(np.zeros(shape, np.float32)).shape == want


def test_symbolic_sizes() -> None:
    def shape_of(layer: Any, *spec: Any) -> str:
        return str(tw.trace(layer, S(*spec)).outputs[0].type)

    assert shape_of(nn.Conv1d(2, 3, 3), "N", 2, "L") == "f32[N, 3, L - 2]"
    assert shape_of(nn.ConvTranspose1d(2, 3, 4, 2, 1), "N", 2, "L") == "f32[N, 3, 2*L]"
    assert shape_of(nn.AdaptiveAvgPool2d((3, None)), "N", 2, "H", 5) == "f32[N, 2, 3, 5]"
    assert shape_of(nn.AdaptiveMaxPool2d(1), "N", 2, "H", "W") == "f32[N, 2, 1, 1]"
    assert shape_of(nn.PositionalEncoding(4), "N", "T", 4) == "f32[N, T, 4]"
    exe = tw.compile(nn.AdaptiveAvgPool2d(2), S("N", 1, "H", 3))
    x = floats(2, 1, 5, 3)
    rows = [x[:, :, :3], x[:, :, 2:]]
    want = np.stack([np.stack([r[..., :2].mean((2, 3)), r[..., 1:].mean((2, 3))], -1) for r in rows], 2)
    np.testing.assert_allclose(exe(x), want, rtol=1e-5, atol=1e-6)


# -- state --------------------------------------------------------------------------------------------------------------


def test_state_dicts_have_the_names_of_pytorch() -> None:
    names = {
        nn.ConvTranspose2d(4, 6, 3, groups=2): {"weight": (4, 3, 3, 3), "bias": (6,)},
        nn.Conv1d(4, 6, 3, groups=2): {"weight": (6, 2, 3), "bias": (6,)},
        nn.PReLU(3): {"weight": (3,)},
        nn.BatchNorm1d(2): {"weight": (2,), "bias": (2,), "running_mean": (2,), "running_var": (2,)},
        nn.InstanceNorm2d(2): {},
        nn.MultiheadAttention(4, 2, kdim=3): {
            "q_proj_weight": (4, 4), "k_proj_weight": (4, 3), "v_proj_weight": (4, 4), "in_proj_bias": (12,),
            "out_proj.weight": (4, 4), "out_proj.bias": (4,),
        },
    }  # fmt: skip
    for layer, want in names.items():
        assert {k: v.shape for k, v in layer.state_dict().items()} == want
    deep = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2, nn.LayerNorm(4)).state_dict()
    assert {"layers.1.multihead_attn.in_proj_weight", "layers.0.norm3.bias", "layers.0.linear2.weight", "norm.weight"} <= set(
        deep
    )
    # PyTorch's count of batches is taken where it is used, and passed over where it is not.
    counted, plain = nn.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2)
    state = counted.state_dict()
    assert state["num_batches_tracked"].shape == () and state["num_batches_tracked"].dtype == np.int64
    plain.load_state_dict(state)
    with pytest.raises(nn.StateError, match="missing: num_batches_tracked"):
        counted.load_state_dict(plain.state_dict())


def test_copies_of_a_layer_are_apart_and_a_function_gives_each_its_own_weights() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    copies = nn.TransformerEncoder(layer, 2)
    first, second = (m.linear1.weight for m in copies.layers)
    assert first is not second and first is not layer.linear1.weight
    np.testing.assert_array_equal(first.data, second.data)
    made = nn.TransformerEncoder(lambda: nn.TransformerEncoderLayer(4, 2, 8), 2)
    assert (made.layers[0].linear1.weight.data != made.layers[1].linear1.weight.data).any()


def test_batch_norm_by_hand_over_steps() -> None:
    """Running statistics over three batches: the exponential mean, and with momentum None the plain one."""
    batches = [floats(5, 3, 4) * 2 + 1 for _ in range(3)]
    for momentum in (0.25, None):
        layer = nn.BatchNorm1d(3, momentum=momentum)
        mean, var = np.zeros(3), np.ones(3)
        for n, x in enumerate(batches, 1):
            r = record(layer, (x,), training=True)
            new = dict(zip(r.buffers, interpret(r.values, r.arrays)[r.results :], strict=False))
            for name, value in new.items():
                dict(layer.named_buffers())[name].data = value
            share = 1 / n if momentum is None else momentum
            mean = mean * (1 - share) + x.mean((0, 2)) * share
            var = var * (1 - share) + x.var((0, 2), ddof=1) * share
        np.testing.assert_allclose(layer.running_mean.data, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.data, var, rtol=1e-5)
        assert momentum is not None or layer.num_batches_tracked.data == 3


def test_dropout_keeps_the_mean_and_whole_channels() -> None:
    x = np.ones((40, 50, 2, 3), np.float32)
    r = record(nn.Dropout2d(0.25), (x,), training=True)
    y = interpret(r.values, r.arrays)[0]
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == y[:, :, :1, :1]).all()
    assert abs((y == 0).mean() - 0.25) < 0.04  # 2,000 channels: 4 standard deviations
    assert (run(lambda x: tw.dropout(x, 1.0), x) == 0).all()
    np.testing.assert_array_equal(execute(trace_model(nn.Dropout2d(0.5), x), x), x)


def test_embedding_without_a_gradient_for_padding() -> None:
    table = nn.Embedding(4, 3, padding_idx=-2, seed=1)
    assert (table.weight.data[2] == 0).all() and (table.weight.data[[0, 1, 3]] != 0).all()
    r = record(table, (np.array([2, 0, 2, 3, 0]),))
    weights = np.random.default_rng(17).uniform(0.5, 1.5, (5, 3)).astype(np.float32)
    _, slope = interpret(r.slopes, r.arrays)
    np.testing.assert_allclose(slope, [weights[1] + weights[4], [0] * 3, [0] * 3, weights[3]], rtol=1e-6)


def test_positions() -> None:
    found = run(nn.PositionalEncoding(6), np.zeros((1, 4, 6), np.float32))[0]
    for t in range(4):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(found[t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)


def test_masks_together() -> None:
    """Causal, padding and an added mask at once, against softmax by hand."""
    m = nn.MultiheadAttention(4, 1, bias=False, seed=2)
    m.in_proj_weight.data = np.concatenate([np.eye(4)] * 3)
    m.out_proj.weight.data = np.eye(4)
    x, added = floats(2, 3, 4), floats(3, 3)
    padding = np.array([[False, False, True], [False, True, False]])
    found = execute(trace_model(lambda x: m(x, attn_mask=added, key_padding_mask=padding, is_causal=True), x), x)
    scores = x @ x.swapaxes(1, 2) / 2 + added
    scores[:, np.triu(np.ones((3, 3), bool), 1)] = -np.inf
    scores = np.where(padding[:, None, :], -np.inf, scores)
    np.testing.assert_allclose(found, scipy.special.softmax(scores, -1) @ x, rtol=1e-5, atol=1e-6)


# -- second derivatives ---------------------------------------------------------------------------------------------------


def hessian_vector(loss: Callable[..., Any], arrays: list[Array], k: int) -> tuple[Array, Array]:
    """H v by argument k, exactly and as the central difference of gradients, in f64."""
    v = RNG.normal(size=arrays[k].shape)

    def product(v: Any, *a: Any) -> Any:
        return tw.grad(lambda *b: tw.sum(tw.grad(loss, k)(*b) * v), k)(*a)

    wide = [a.astype(np.float64) for a in arrays]
    exact = interpret(expand(tw.trace(product, v.astype(np.float32), *arrays)), [v, *wide], f64)[0]
    slope = expand(tw.trace(tw.grad(loss, k), *arrays))
    ends = [interpret(slope, [a + s * v if i == k else a for i, a in enumerate(wide)], f64)[0] for s in (1e-5, -1e-5)]
    return exact, (ends[0] - ends[1]) / 2e-5


X, W, V = floats(3, 4), floats(4, 5), floats(5, 2)
TWICE: dict[str, tuple[Callable[..., Any], list[Array]]] = {
    **{
        n: (lambda x, n=n: tw.sum(getattr(tw, n)(x) * getattr(tw, n)(x * 0.7)), [X])
        for n in ("tanh", "sigmoid", "gelu", "silu", "mish", "softplus", "elu", "selu", "softmax", "log_softmax", "erf", "exp")
    },
    "elementwise": (lambda x: tw.sum(tw.sin(x) * tw.exp(-x * x) / (1.0 + x**2) + tw.log1p(tw.sqrt(x * x + 1.0))), [X]),
    "matmul": (lambda x, w: tw.sum((x @ w) ** 3), [X, W]),
    "two layers": (lambda x, w, v: tw.mean((tw.tanh(x @ w) @ v) ** 2), [X, W, V]),
    "cross entropy": (lambda x, w: losses.cross_entropy(tw.tanh(x @ w), np.array([0, 4, 2])), [X, W]),
    "layer norm": (lambda x: tw.sum(tw.layer_norm(x, 4) ** 3), [X]),
    "convolution": (lambda x, w: tw.sum(tw.conv1d(x, w, padding=1) ** 3), [floats(2, 3, 5), floats(2, 3, 3)]),
    "adaptive": (lambda x: tw.sum(tw.adaptive_avg_pool2d(x, (3, 2)) ** 3), [floats(1, 2, 4, 5)]),
    "binary": (lambda x: losses.binary_cross_entropy_with_logits(x @ W, np.ones((3, 5), np.float32) * 0.3), [X]),
}


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name: str) -> None:
    loss, arrays = TWICE[name]
    for k in range(len(arrays)):
        exact, found = hessian_vector(loss, arrays, k)
        np.testing.assert_allclose(exact, found, rtol=1e-5, atol=1e-7 * max(1.0, float(np.abs(exact).max())))


@pytest.mark.unvalidated("central differences of a second derivative are above; this is about the compiled code")
def test_a_compiled_second_derivative() -> None:
    loss, arrays = TWICE["two layers"]

    def product(x: Any, w: Any, v: Any) -> Any:
        return tw.grad(lambda x: tw.sum(tw.grad(loss)(x, w, v) ** 2))(x)

    found = tw.compile(product, *map(tw.spec, arrays))(*arrays)
    graph = expand(tw.trace(product, *arrays))
    (want,) = interpret(graph, [a.astype(np.float64) for a in arrays], f64)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))
