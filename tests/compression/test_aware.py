"""Quantisation-aware training: what the module computes, what gradients it has, and that training it helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import losses, nn, optim
from tensorwright.ir.errors import InputError

pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")


class Net(nn.Module):
    def __init__(self) -> None:
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 9, 4)

    def __call__(self, x: Any) -> Any:
        return self.head(tw.max_pool2d(tw.relu(self.norm(self.conv(x))), 2).reshape(x.shape[0], -1))


def net() -> Net:
    tw.seed(0)
    made = Net()
    made.norm.running_mean.data = np.linspace(-1, 1, 6, dtype=np.float32)
    return made


def images(count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_it_computes_what_the_quantised_graph_computes(activations: str) -> None:
    x = images()
    model = tw.quantize_aware(net(), [x], activations=activations)
    mine, theirs = tw.compile(model, x)(x), tw.compile(model.quantized())(x)
    np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())
    assert np.abs(mine - tw.compile(net(), x)(x)).max() > 1e-3  # and not what the floats do
    assert {n for n, _ in model.named_parameters()} >= {"weights.conv.weight", "weights.head.weight", "weights.head.bias"}


def test_gradients_pass_through_rounding_and_stop_beyond_the_range() -> None:
    tw.seed(0)
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = np.array([[0.5, -1.0, 0.25]], np.float32)
    model = tw.quantize_aware(layer, [np.array([[0.0, 1.0, 2.0]], np.float32)])  # 0 to 2

    def loss(x: Any) -> Any:
        return tw.sum(model(x))

    x = np.array([[0.513, -0.4, 2.9]], np.float32)
    slope = tw.compile(tw.grad(loss), x)(x)
    rounded = np.array([64, -127, 32]) / 127
    np.testing.assert_allclose(slope, [[rounded[0], 0.0, 0.0]], atol=1e-6)


def test_training_it_helps_and_is_kept() -> None:
    """Weights of very unlike channels with one scale for all of them: rounding alone ruins what training brings back."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 16)).astype(np.float32)
    y = (x[:, :8].sum(1) * 0.02 + (x[:, 8] > 0) > 0.5).astype(np.int64)
    tw.seed(1)
    floats = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    first: Any = floats[0]
    first.weight.data[0] *= 60.0
    aware = tw.quantize_aware(floats, [x], per_channel=False)
    trainer = tw.Trainer(aware, loss=losses.cross_entropy, optimizer=optim.Adam(5e-3), seed=0)
    before = trainer.evaluate(x, y)["loss"]
    trainer.fit(x, y, epochs=8, batch_size=64, verbose=False)
    after = trainer.evaluate(x, y)["loss"]
    assert after < 0.5 * before
    logits = tw.compile(aware.quantized())(x)
    log = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    assert -log[np.arange(512), y].mean() == pytest.approx(after, rel=1e-3)


def test_ranges_are_needed() -> None:
    with pytest.raises(InputError, match="'uint8' or 'int8'"):
        tw.quantize_aware(net(), [images()], activations="dynamic")
    model = tw.quantize_aware(net(), [images()])
    with pytest.raises(InputError, match="takes 1 arguments, got 2"):
        tw.compile(model, images(), images())
    with pytest.raises(InputError, match="argument 'x' is f32"):
        tw.compile(model, tw.spec(4, 1, 9, 9))
