"""Layers, activations and losses against PyTorch, an extra: values, gradients, state dicts, training and inference mode.

Their numpy counterparts are tests/frontend/test_layers.py and test_losses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import losses, nn
from tensorwright.ir.interp import run as interpret

from ..frontend.checking import record

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: it is the peer of these comparisons (pip install 'tensorwright[bench]')"
)
F = torch.nn.functional
tnn = torch.nn
RNG = np.random.default_rng(31)
Array = np.ndarray[Any, Any]
# Both sides compute in f32 in different orders.
TOLERANCE = 5e-5
# PyTorch says where its own settings are slow or unwise; they are compared all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
]


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def near(found: Any, expected: Any, what: str = "") -> None:
    e = expected.detach().numpy()
    assert found.shape == e.shape, what
    assert found.dtype == e.dtype, what
    if e.size:
        assert np.abs(found - e).max() <= TOLERANCE * max(float(np.abs(e).max()), 1e-3), what


def compare(layer: nn.Module, peer: Any, *arrays: Array, training: bool = False, call: Callable[..., Any] | None = None) -> None:
    """Loads the peer's state into the layer; results, gradients by arguments and parameters, and new buffers agree."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (*peer.parameters(), *peer.buffers()):
            if p.dtype.is_floating_point:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.2)
    layer.load_state_dict({k: v.numpy() for k, v in peer.state_dict().items()})
    assert set(layer.state_dict()) <= set(peer.state_dict())
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    peer.train(training)
    peer.zero_grad()
    apply = call or (lambda m, *a: m(*a))
    both(lambda *a: apply(layer, *a), lambda *a: apply(peer, *a), arrays, training, layer, peer)


def both(
    ours: Callable[..., Any], theirs: Callable[..., Any], arrays: tuple[Array, ...], training: bool = False,
    layer: nn.Module | None = None, peer: Any = None,
) -> None:  # fmt: skip
    r = record(ours, arrays, training, layer)
    values, (_, *slopes) = interpret(r.values, r.arrays), interpret(r.slopes, r.arrays)
    given = [torch.from_numpy(a.copy()).requires_grad_(a.dtype.kind == "f") for a in arrays]
    y = theirs(*given)
    y = y[0] if isinstance(y, tuple) else y
    near(values[0], y, "result")
    weights = np.random.default_rng(17).uniform(0.5, 1.5, tuple(y.shape)).astype(np.float32)
    (y * torch.from_numpy(weights)).sum().backward()
    own = dict(peer.named_parameters()) if peer is not None else {}
    for k, slope in zip(r.wrt, slopes, strict=True):
        name = r.names[k]
        t = own[name] if name in own else given[int(name[1:])]
        near(slope, t.grad if t.grad is not None else torch.zeros_like(t), f"gradient by {name}")
    for name, value in zip(r.buffers, values[r.results :], strict=False):
        near(value, dict(peer.named_buffers())[name], name)


IMAGE, SIGNAL, ROWS, WORDS = floats(2, 4, 7, 6), floats(2, 4, 11), floats(5, 8), floats(3, 5, 8)
# Arguments are the same on both sides: layer(*arguments, **keywords).
SAME: list[tuple[str, tuple[Any, ...], dict[str, Any], Array]] = [
    ("Linear", (8, 3), {}, WORDS),
    ("Conv2d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, IMAGE),
    ("Conv2d", (4, 3, (4, 3)), {"padding": "same", "dilation": 2, "bias": False}, IMAGE),
    ("Conv2d", (4, 8, 3), {"groups": 4, "padding": (2, 0)}, IMAGE),
    ("Conv1d", (4, 6, 4), {"padding": "same"}, SIGNAL),
    ("Conv1d", (4, 6, 3, 2, 1, 2, 2), {}, SIGNAL),
    ("ConvTranspose2d", (4, 6, 3), {}, IMAGE),
    ("ConvTranspose2d", (4, 6, 3, 2, 1, 1, 2), {}, IMAGE),
    ("ConvTranspose2d", (4, 3, (2, 3), (3, 1), (0, 2)), {"output_padding": (2, 1), "dilation": (1, 2), "bias": False}, IMAGE),
    ("ConvTranspose2d", (4, 2, 2), {"output_padding": 2, "dilation": 3}, IMAGE),
    ("ConvTranspose1d", (4, 6, 5), {"stride": 3, "padding": 2, "output_padding": 1, "groups": 2}, SIGNAL),
    ("MaxPool2d", (3, 2, 1), {}, IMAGE),
    ("MaxPool2d", ((3, 2),), {"stride": (1, 3), "dilation": (2, 1), "ceil_mode": True}, IMAGE),
    ("MaxPool2d", (2, 3, 1), {"ceil_mode": True}, IMAGE),
    ("MaxPool1d", (3, 2), {"padding": 1, "dilation": 2, "ceil_mode": True}, SIGNAL),
    ("AvgPool2d", (3, 2, 1), {}, IMAGE),
    ("AvgPool2d", (3, 2, 1, True), {}, IMAGE),
    ("AvgPool2d", ((2, 3), 2, (1, 0), True, False), {}, IMAGE),
    ("AvgPool2d", (2, 3, 1, True), {"divisor_override": 3}, IMAGE),
    ("AvgPool1d", (4, 3, 2), {"ceil_mode": True}, SIGNAL),
    ("AvgPool1d", (3,), {"count_include_pad": False, "padding": 1}, SIGNAL),
    ("AdaptiveAvgPool2d", (1,), {}, IMAGE),
    ("AdaptiveAvgPool2d", ((3, 4),), {}, IMAGE),
    ("AdaptiveAvgPool2d", ((None, 9),), {}, IMAGE),
    ("AdaptiveAvgPool1d", (4,), {}, SIGNAL),
    ("AdaptiveMaxPool2d", (1,), {}, IMAGE),
    ("AdaptiveMaxPool2d", ((5, 4),), {}, IMAGE),
    ("AdaptiveMaxPool1d", (3,), {}, SIGNAL),
    ("BatchNorm2d", (4,), {}, IMAGE),
    ("BatchNorm2d", (4, 1e-3, 0.3), {"affine": False}, IMAGE),
    ("BatchNorm1d", (8,), {}, ROWS),
    ("BatchNorm1d", (4,), {"momentum": None}, SIGNAL),
    ("BatchNorm1d", (4,), {"track_running_stats": False}, SIGNAL),
    ("InstanceNorm2d", (4,), {}, IMAGE),
    ("InstanceNorm2d", (4,), {"affine": True, "track_running_stats": True}, IMAGE),
    ("InstanceNorm1d", (4,), {"affine": True}, SIGNAL),
    ("LayerNorm", (8,), {}, WORDS),
    ("LayerNorm", ((5, 8),), {"bias": False}, WORDS),
    ("RMSNorm", (8,), {}, WORDS),
    ("GroupNorm", (2, 4), {}, IMAGE),
    ("PReLU", (), {}, WORDS),
    ("PReLU", (4,), {}, IMAGE),
    ("GLU", (), {}, WORDS),
    ("Embedding", (7, 3), {"padding_idx": 2}, np.array([[0, 2, 6], [2, 5, 5]])),
    ("Flatten", (), {}, IMAGE),
    ("Unflatten", (1, (2, -1)), {}, IMAGE),
    ("Softmax", (1,), {}, IMAGE),
    ("LogSoftmax", (1,), {}, IMAGE),
    ("CosineSimilarity", (), {}, IMAGE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "keywords", "x"), SAME, ids=[f"{i}-{s[0]}" for i, s in enumerate(SAME)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layers(name: str, arguments: Any, keywords: Any, x: Array, training: bool) -> None:
    arrays = (x, x[::-1].copy()) if name == "CosineSimilarity" else (x,)
    compare(getattr(nn, name)(*arguments, **keywords), getattr(tnn, name)(*arguments, **keywords), *arrays, training=training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layers_without_examples(training: bool) -> None:
    for name, arguments, shape in (
        ("Linear", (8, 3), (0, 8)),
        ("Conv2d", (4, 2, 3), (0, 4, 7, 6)),
        ("MaxPool2d", (2,), (0, 4, 6, 6)),
        ("AvgPool2d", (2,), (0, 4, 6, 6)),
        ("AdaptiveAvgPool2d", ((3, 4),), (0, 4, 7, 6)),
        ("LayerNorm", (8,), (0, 8)),
        ("GroupNorm", (2, 4), (0, 4, 3, 3)),
        ("Dropout", (0.0,), (0, 8)),
    ):
        compare(getattr(nn, name)(*arguments), getattr(tnn, name)(*arguments), floats(*shape), training=training)


KINKS = np.array([-6, -3.5, -3, -2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2.5, 3, 4, 6, 7, 30, -30, np.nan, 88, -105], np.float32)
ACTIVATIONS = [
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Softplus", "Hardswish", "Hardsigmoid", "Hardtanh",
    "Mish", "Tanh", "Sigmoid", "Softsign", "LogSigmoid", "PReLU",
]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes_also_at_kinks(name: str) -> None:
    layer, peer = getattr(nn, name)(), getattr(tnn, name)()
    t = torch.from_numpy(KINKS.copy()).requires_grad_()
    y = peer(t)
    (g,) = torch.autograd.grad(y.sum(), t)
    r = record(lambda x: (layer(x), tw.grad(lambda x: tw.sum(layer(x)))(x)), (KINKS,))
    value, slope, *_ = interpret(r.values, r.arrays)
    # PyTorch's gelu(-3) is off by 5e-7.
    np.testing.assert_allclose(value, y.detach().numpy(), rtol=1e-5, atol=1e-6)
    number = ~np.isnan(KINKS)  # a slope at NaN has no meaning: PyTorch's are 0, 1 and NaN
    np.testing.assert_allclose(slope[number], g.numpy()[number], rtol=1e-5, atol=2e-7)


def test_activations_with_settings() -> None:
    for layer, peer in (
        (nn.LeakyReLU(0.3), tnn.LeakyReLU(0.3)),
        (nn.ELU(0.4), tnn.ELU(0.4)),
        (nn.CELU(0.4), tnn.CELU(0.4)),
        (nn.GELU("tanh"), tnn.GELU("tanh")),
        (nn.Softplus(2.5), tnn.Softplus(2.5)),
        (nn.Hardtanh(-0.2, 0.7), tnn.Hardtanh(-0.2, 0.7)),
        (nn.PReLU(init=0.1), tnn.PReLU(init=0.1)),
    ):
        compare(layer, peer, ROWS)


# -- attention ------------------------------------------------------------------------------------------------------------

MEMORY = floats(3, 4, 8)
CAUSAL = np.triu(np.ones((5, 5), bool), 1)
PADDING = np.array([[False] * 5, [False, False, False, True, True], [False, False, True, False, True]])


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool) -> None:
    q, memory = (WORDS, MEMORY) if batch_first else (WORDS.swapaxes(0, 1).copy(), MEMORY.swapaxes(0, 1).copy())

    def pair(**more: Any) -> tuple[nn.Module, Any]:
        more |= {"batch_first": batch_first}
        return nn.MultiheadAttention(8, 2, **more), tnn.MultiheadAttention(8, 2, **more)

    def attend(**masks: Any) -> Callable[..., Any]:
        def call(m: Any, *a: Any) -> Any:
            given = {k: torch.from_numpy(v) if isinstance(m, tnn.Module) else v for k, v in masks.items()}
            return m(*a, **given)

        return call

    compare(*pair(), q, call=lambda m, x: m(x, x, x))
    compare(*pair(bias=False), q, memory, call=lambda m, x, k: m(x, k, k))
    compare(*pair(), q, memory, memory[..., ::-1].copy())
    narrow = [memory[..., :6].copy(), memory[..., :3].copy()]
    compare(*pair(kdim=6, vdim=3), q, *narrow)
    compare(*pair(), q, call=lambda m, x: attend(attn_mask=CAUSAL)(m, x, x, x))
    compare(*pair(), q, call=lambda m, x: attend(key_padding_mask=PADDING)(m, x, x, x))
    compare(*pair(), q, call=lambda m, x: attend(attn_mask=CAUSAL, key_padding_mask=PADDING)(m, x, x, x))
    added = floats(5, 5)
    compare(*pair(), q, call=lambda m, x: attend(attn_mask=added)(m, x, x, x))
    per_head = RNG.random((6, 5, 5)) < 0.4
    per_head[:, :, 0] = False  # a row in which nothing is allowed is NaN
    compare(*pair(), q, call=lambda m, x: attend(attn_mask=per_head)(m, x, x, x))

    def causal(m: Any, x: Any) -> Any:
        return m(x, x, x, attn_mask=torch.from_numpy(CAUSAL)) if isinstance(m, tnn.Module) else m(x, is_causal=True)

    compare(*pair(), q, call=causal)

    def causal_padded(m: Any, x: Any) -> Any:
        if isinstance(m, tnn.Module):
            return m(x, x, x, attn_mask=torch.from_numpy(CAUSAL), key_padding_mask=torch.from_numpy(PADDING))
        return m(x, is_causal=True, key_padding_mask=PADDING)

    compare(*pair(), q, call=causal_padded)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_transformer(norm_first: bool, training: bool) -> None:
    options = {"dim_feedforward": 12, "dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    encoder = [kind.TransformerEncoderLayer(8, 2, **options) for kind in (nn, tnn)]
    compare(*encoder, WORDS, training=training)

    def padded(m: Any, x: Any) -> Any:
        mask, padding = (torch.from_numpy(CAUSAL), torch.from_numpy(PADDING)) if isinstance(m, tnn.Module) else (CAUSAL, PADDING)
        return m(x, mask, padding)

    compare(*encoder, WORDS, training=training, call=padded)
    deep = (
        nn.TransformerEncoder(encoder[0], 2, nn.LayerNorm(8)),
        tnn.TransformerEncoder(encoder[1], 2, tnn.LayerNorm(8), enable_nested_tensor=False),
    )
    compare(*deep, WORDS, training=training, call=padded)
    decoder = [kind.TransformerDecoderLayer(8, 2, **(options | {"activation": "relu"}), bias=False) for kind in (nn, tnn)]
    stacks = nn.TransformerDecoder(decoder[0], 2), tnn.TransformerDecoder(decoder[1], 2)

    def masked(m: Any, x: Any, memory: Any) -> Any:
        mask, padding = CAUSAL, PADDING[:, :4]
        if isinstance(m, tnn.Module):
            mask, padding = torch.from_numpy(mask), torch.from_numpy(padding)
        return m(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)

    compare(*decoder, WORDS, MEMORY, training=training)
    compare(*stacks, WORDS, MEMORY, training=training, call=masked)


# -- losses ---------------------------------------------------------------------------------------------------------------

X, Y = floats(6, 4), floats(6, 4)
LABELS = np.array([0, 3, 1, -100, 2, 3])
CLEAN = np.abs(LABELS) % 4
BITS = (RNG.random((6, 4)) < 0.5).astype(np.float32)
P = 1 / (1 + np.exp(-X))
LOGP = X - np.log(np.exp(X).sum(-1, keepdims=True))
SOFT = np.exp(LOGP)[::-1].copy()
W = np.array([0.3, 1.0, 2.0, 0.7], np.float32)
MAPS, MAP_LABELS = floats(2, 4, 3, 5), RNG.integers(0, 4, (2, 3, 5))
LOSSES: list[tuple[str, dict[str, Any], tuple[Array, ...]]] = [
    ("MSELoss", {}, (X, Y)),
    ("L1Loss", {}, (X, Y)),
    ("SmoothL1Loss", {"beta": 0.4}, (X, Y)),
    ("SmoothL1Loss", {"beta": 0.0}, (X, Y)),
    ("HuberLoss", {"delta": 0.4}, (X, Y)),
    ("CrossEntropyLoss", {}, (X, LABELS)),
    ("CrossEntropyLoss", {"weight": W, "label_smoothing": 0.2}, (X, LABELS)),
    ("CrossEntropyLoss", {"weight": W, "ignore_index": 3}, (X, CLEAN)),
    ("CrossEntropyLoss", {"label_smoothing": 0.1}, (X, SOFT)),
    ("CrossEntropyLoss", {"weight": W}, (X, SOFT)),
    ("CrossEntropyLoss", {"weight": W}, (MAPS, MAP_LABELS)),
    ("NLLLoss", {"weight": W}, (LOGP, LABELS)),
    ("NLLLoss", {}, (MAPS, MAP_LABELS)),
    ("BCELoss", {"weight": W}, (P, BITS)),
    ("BCELoss", {}, (np.array([0, 0, 1, 1], np.float32), np.array([0, 1, 0, 1], np.float32))),
    ("BCEWithLogitsLoss", {"weight": W, "pos_weight": W[::-1].copy()}, (X * 9, SOFT)),
    ("KLDivLoss", {}, (LOGP, SOFT)),
    ("KLDivLoss", {"log_target": True}, (LOGP, np.log(SOFT))),
    ("CosineEmbeddingLoss", {"margin": 0.1}, (X, Y, np.array([1, -1, 1, -1, -1, 1]))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "arrays"), LOSSES, ids=[f"{i}-{s[0]}" for i, s in enumerate(LOSSES)])
def test_losses(name: str, options: dict[str, Any], arrays: tuple[Array, ...]) -> None:
    theirs = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    known = ("mean", "sum", "none", "batchmean") if name == "KLDivLoss" else ("mean", "sum", "none")
    for reduction in known:
        both(getattr(nn, name)(reduction=reduction, **options), getattr(tnn, name)(reduction=reduction, **theirs), arrays)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("blank", [0, 3])
def test_ctc(reduction: str, blank: int) -> None:
    x = floats(20, 5, 7)
    targets = RNG.integers(0, 6, (5, 6))
    targets += targets >= blank
    targets[2, 1] = targets[2, 0]  # a repeat needs a blank between
    times, sizes = np.array([20, 18, 20, 7, 4]), np.array([6, 5, 4, 0, 5])  # the last is impossible
    lengths = torch.from_numpy(times), torch.from_numpy(sizes)
    both(
        lambda x, t: losses.ctc(tw.log_softmax(x), t, times, sizes, blank, reduction, True),
        lambda x, t: F.ctc_loss(F.log_softmax(x, -1), t, *lengths, blank, reduction, zero_infinity=True),
        (x, targets),
    )
    # Without zero_infinity its loss is inf; the gradient is NaN in PyTorch, 0 here.
    plain = F.ctc_loss(torch.log_softmax(torch.from_numpy(x), -1), torch.from_numpy(targets), *lengths, blank, reduction)
    r = record(lambda x, t: losses.ctc(tw.log_softmax(x), t, times, sizes, blank, reduction), (x, targets))
    np.testing.assert_allclose(interpret(r.values, r.arrays)[0], plain.numpy(), rtol=1e-5)


def test_functions() -> None:
    q, k, v = floats(2, 2, 5, 4), floats(2, 2, 5, 4), floats(2, 2, 5, 3)
    both(
        lambda *a: tw.scaled_dot_product_attention(*a, is_causal=True),
        lambda *a: F.scaled_dot_product_attention(*a, is_causal=True),
        (q, k, v),
    )
    both(
        lambda *a: tw.scaled_dot_product_attention(*a, ~CAUSAL, scale=0.3),
        lambda *a: F.scaled_dot_product_attention(*a, torch.from_numpy(~CAUSAL), scale=0.3),
        (q, k, v),
    )
    both(
        lambda x: tw.cosine_similarity(x, x[::-1] * 2.0),
        lambda x: F.cosine_similarity(x, x.flip(0) * 2.0, -1),
        (ROWS,),
    )
