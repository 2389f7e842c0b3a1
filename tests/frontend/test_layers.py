"""Every layer: its gradients against central differences in f64, its compiled code (forward and backward) against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn

from .checking import check

pytestmark = pytest.mark.unvalidated("each compiled result is compared with the interpreter here, as validation would")

RNG = np.random.default_rng(11)
Array = np.ndarray[Any, Any]


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def distinct(*shape: int) -> Array:
    """No two values closer than 0.03, so that a step changes no maximum; none within a step of 0."""
    size = int(np.prod(shape))
    return ((RNG.permutation(size) - size / 2 + 0.3) * 0.05).reshape(shape).astype(np.float32)


IMAGE, SIGNAL, ROWS = floats(2, 4, 6, 7), floats(2, 4, 9), floats(3, 8)
APART, APART1 = distinct(2, 3, 7, 6), distinct(2, 3, 10)
# name -> (layer, input); modules are made when used, with equal seeds
LAYERS: dict[str, tuple[Callable[[], nn.Module], Array]] = {
    "Linear": (lambda: nn.Linear(8, 3), ROWS),
    "Linear without bias": (lambda: nn.Linear(9, 2, bias=False), SIGNAL),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), IMAGE),
    "Conv2d same, dilated": (lambda: nn.Conv2d(4, 2, (3, 2), padding="same", dilation=2), IMAGE),
    "Conv2d strided groups": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), groups=2), IMAGE),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="valid", groups=4, bias=False), IMAGE),
    "Conv1d": (lambda: nn.Conv1d(4, 5, 3), SIGNAL),
    "Conv1d strided, dilated": (lambda: nn.Conv1d(4, 2, 3, stride=2, padding=2, dilation=2), SIGNAL),
    "Conv1d depthwise same": (lambda: nn.Conv1d(4, 4, 4, padding="same", groups=4), SIGNAL),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3), IMAGE),
    "ConvTranspose2d strided": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), IMAGE),
    "ConvTranspose2d all": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (3, 2), (2, 0), (2, 1), groups=2, dilation=(1, 3)),
        IMAGE,
    ),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1), SIGNAL),
    "ConvTranspose1d far": (lambda: nn.ConvTranspose1d(4, 2, 2, 1, output_padding=2, dilation=3), SIGNAL),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), APART),
    "MaxPool2d overlapping": (lambda: nn.MaxPool2d(3, 2, 1), APART),
    "MaxPool2d ceil, dilated": (lambda: nn.MaxPool2d((2, 3), (3, 2), (1, 1), (2, 1), ceil_mode=True), APART),
    "MaxPool1d": (lambda: nn.MaxPool1d(3, 2, dilation=2, ceil_mode=True), APART1),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), IMAGE),
    "AvgPool2d ceil, padded": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "AvgPool2d without padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "AvgPool2d divisor": (lambda: nn.AvgPool2d(2, 1, divisor_override=3), IMAGE),
    "AvgPool1d": (lambda: nn.AvgPool1d(4, 3, 2), SIGNAL),
    "AdaptiveAvgPool2d global": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "AdaptiveAvgPool2d even": (lambda: nn.AdaptiveAvgPool2d((3, 7)), IMAGE),
    "AdaptiveAvgPool2d uneven": (lambda: nn.AdaptiveAvgPool2d((4, 5)), IMAGE),
    "AdaptiveAvgPool2d larger": (lambda: nn.AdaptiveAvgPool2d((None, 11)), IMAGE),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(4), SIGNAL),
    "AdaptiveMaxPool2d global": (lambda: nn.AdaptiveMaxPool2d(1), APART),
    "AdaptiveMaxPool2d uneven": (lambda: nn.AdaptiveMaxPool2d((3, 4)), APART),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(4), APART1),
    "LayerNorm": (lambda: nn.LayerNorm(8), ROWS),
    "LayerNorm of two axes": (lambda: nn.LayerNorm((6, 7), bias=False), IMAGE),
    "RMSNorm": (lambda: nn.RMSNorm(8), ROWS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), SIGNAL),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), ROWS),
    "PReLU": (nn.PReLU, distinct(3, 8)),
    "PReLU per channel": (lambda: nn.PReLU(3), APART),
    "GLU": (nn.GLU, ROWS),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), floats(2, 5, 8)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, activation="gelu"), floats(2, 5, 8)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(lambda: nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", norm_first=True), 2),
        floats(2, 3, 4),
    ),
    "PositionalEncoding": (lambda: nn.PositionalEncoding(8), floats(2, 5, 8)),
}


def shaken(module: nn.Module) -> nn.Module:
    """Parameters that are all equal at first (norms, biases) get values that show a mistake."""
    rng = np.random.default_rng(7)
    for p in (*module.parameters(), *module.buffers()):
        if p.dtype.is_float and p.data.size and (p.data == p.data.reshape(-1)[0]).all():
            p.data = p.data + rng.uniform(0.1, 0.6, p.shape)
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_and_compiled_code(name: str) -> None:
    make, x = LAYERS[name]
    tw.seed(1)
    check(shaken(make()), x)


TRAINED = ["BatchNorm2d", "BatchNorm1d", "TransformerEncoderLayer"]
TRAINED_ONLY: dict[str, tuple[Callable[[], nn.Module], Array]] = {
    "Dropout": (lambda: nn.Dropout(0.3), ROWS),
    "Dropout2d": (lambda: nn.Dropout2d(0.5), IMAGE),
    "Dropout1d": (lambda: nn.Dropout1d(0.5), SIGNAL),
    "BatchNorm1d cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), SIGNAL),
    "BatchNorm2d untracked": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), IMAGE),
    "InstanceNorm2d tracked": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
}


@pytest.mark.parametrize("name", [*TRAINED, *TRAINED_ONLY])
def test_gradients_and_compiled_code_in_training(name: str) -> None:
    make, x = TRAINED_ONLY.get(name) or LAYERS[name]
    tw.seed(1)
    check(shaken(make()), x, training=True)


def test_layers_of_several_arguments() -> None:
    tw.seed(2)
    q, memory = floats(2, 3, 8), floats(2, 4, 6)
    check(shaken(nn.MultiheadAttention(8, 2, kdim=6, vdim=6)), q, memory, memory)
    padding = np.array([[False, False, True, True], [False, False, False, False]])
    layer = shaken(nn.TransformerDecoderLayer(8, 2, 12, activation="gelu"))

    def decode(tgt: Any, m: Any, p: Any) -> Any:
        return layer(tgt, m, tgt_is_causal=True, memory_key_padding_mask=p)

    check(decode, q, floats(2, 4, 8), padding, module=layer)
    check(nn.CosineSimilarity(), floats(3, 5), floats(3, 5))
    table = shaken(nn.Embedding(5, 3, padding_idx=3))
    check(table, np.array([[0, 4, 4], [2, 1, 0]]))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    **{
        n: getattr(tw, n)
        for n in (
            "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "softplus", "softsign", "mish", "hard_swish",
            "hard_sigmoid", "hardtanh", "log_sigmoid", "softmax", "log_softmax", "tanh", "sigmoid",
        )
    },
    "gelu tanh": lambda x: tw.gelu(x, "tanh"),
    "softplus 2": lambda x: tw.softplus(x, 2.0),
    "elu 0.5": lambda x: tw.elu(x, 0.5),
    "leaky_relu 0.3": lambda x: tw.leaky_relu(x, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = (RNG.permutation(40).reshape(5, 8) / 5 - 4.05).astype(np.float32)  # -4.05 to 3.75: no kink within a step
    check(ACTIVATIONS[name], x)


def test_a_small_constant_after_a_product() -> None:
    """Constant arrays of a few elements stand inside fused regions, also in the epilogue of a contraction."""
    table = RNG.uniform(0.5, 1.5, (3, 4)).astype(np.float32)
    layer = nn.Linear(8, 4, seed=1)
    check(lambda x: tw.relu(layer(x) * table) + table[1], ROWS, module=layer)
