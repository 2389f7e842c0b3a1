"""Weights alone in four bits: what `tw.quantize` stores, and that a saved model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.blocks import block_weights, codebook_weights, two_to_a_byte
from tensorwright.ir.dtypes import bf16
from tensorwright.ir.errors import InputError


class _Net(nn.Module):
    def __init__(self) -> None:
        self.c, self.f, self.g = nn.Conv2d(1, 3, 3), nn.Linear(3 * 16, 37), nn.Linear(37, 5)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        y = tw.relu(self.c(x))
        return self.g(tw.tanh(self.f(y.reshape(y.shape[0], -1))))


def test_four_bits_of_a_model(tmp_path: Path) -> None:
    net, x = _Net(), np.random.default_rng(0).standard_normal((2, 1, 6, 6)).astype(np.float32)
    report = tw.compression.Report()
    graph = tw.quantize(net, None, tw.spec(2, 1, 6, 6), weights="int4", activations=None, group=16, report=report)
    assert [line.choice for line in report.layers] == ["int8", "int4", "int4"]
    assert graph.weights["f.weight_q"].dtype == np.uint8 and graph.weights["f.weight_q"].shape == (24, 37)
    assert graph.weights["g.weight_q"].shape == (19, 5)  # 37 of four bits
    exe = tw.compile(graph)
    y, exact = exe(x), tw.compile(net, tw.spec(2, 1, 6, 6))(x)
    assert 1e-4 < np.abs(y - exact).max() <= 0.2 * np.abs(exact).max()  # a step is a seventh of the largest weight
    exe.save(tmp_path / "net.tw")
    assert tw.load(tmp_path / "net.tw")(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_hold_the_nearest_integers(axis: int) -> None:
    w = np.random.default_rng(1).standard_normal((11, 13)).astype(np.float32)
    w[3] = w[:, 5] = 0.0
    q, scale = block_weights(w, axis, 4, 8)
    assert scale.dtype == bf16.numpy and scale.shape[axis] == 2 and np.abs(q).max() <= 7
    wide = np.repeat(scale.astype(np.float32), 8, axis).take(range(w.shape[axis]), axis)
    within = np.abs(w - q * wide) <= wide * np.float32(0.5001)
    assert (within | (np.abs(q) == 7)).all() and (q[w == 0] == 0).all()
    packed = np.moveaxis(two_to_a_byte(q, axis), axis, -1)
    rows = np.moveaxis(q, axis, -1)
    assert ((packed & 15 ^ 8).astype(np.int8) - 8 == rows[:, ::2]).all()
    assert ((packed >> 4 ^ 8).astype(np.int8)[:, : rows.shape[1] // 2] - 8 == rows[:, 1::2]).all()


@pytest.mark.parametrize(
    ("weights", "wanted", "error", "bytes_of"),
    [
        ("bfloat16", ["bfloat16"] * 3, 0.004, 2),
        ("float16", ["float16"] * 3, 5e-4, 2),
        ("codebook8", ["int8", "codebook8", "codebook8"], 0.012, 1.4),  # a table of 256 is much for so small a layer
        ("codebook4", ["int8", "codebook4", "codebook4"], 0.12, 0.9),
    ],
)
def test_halves_and_codebooks_of_a_model(weights: str, wanted: list[str], error: float, bytes_of: float, tmp_path: Path) -> None:
    net, x = _Net(), np.random.default_rng(0).standard_normal((2, 1, 6, 6)).astype(np.float32)
    report = tw.compression.Report()
    graph = tw.quantize(net, None, tw.spec(2, 1, 6, 6), weights=weights, activations=None, group=16, report=report)
    assert [line.choice for line in report.layers] == wanted
    assert all(0 < line.weight_error < error for line in report.layers)
    assert report.layers[1].bytes_after <= bytes_of * net.f.weight.data.size
    exe = tw.compile(graph)
    y, exact = exe(x), tw.compile(net, tw.spec(2, 1, 6, 6))(x)
    assert 0 < np.abs(y - exact).max() <= 2 * error * np.abs(exact).max()
    kernels = exe.text("fuse")
    assert kernels.count("codebook_matmul(") == (weights == "codebook4")  # the other reads channels last
    assert kernels.count("coded_matmul(") == (weights != "codebook4")
    exe.save(tmp_path / "net.tw")
    assert tw.load(tmp_path / "net.tw")(x).tobytes() == y.tobytes()


def test_centroids_beat_even_steps_where_weights_are_no_uniform_numbers() -> None:
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((64, 256)) ** 3).astype(np.float32)
    w[5] = 0.0
    q, table, scale = codebook_weights(w, 1, 4, 32)
    near = table[q] * np.repeat(scale.astype(np.float32), 32, 1)
    even, steps = block_weights(w, 1, 4, 32)
    apart = [np.square(w - v).sum() for v in (near, even * np.repeat(steps.astype(np.float32), 32, 1))]
    assert apart[0] < 0.5 * apart[1]
    assert (near[5] == 0).all() and (np.diff(table) > 0).all()
    few = np.repeat(np.float32([-1, 0, 0.5, 1]), 16).reshape(1, 64)  # fewer values than entries: each is its own
    q, table, scale = codebook_weights(few, 1, 4, 64)
    np.testing.assert_allclose(table[q] * scale.astype(np.float32), few, atol=1e-4)


def test_weights_that_16_bits_cannot_hold_are_refused() -> None:
    net = nn.Linear(4, 3)
    net.weight.data[1, 2] = 1e6
    with pytest.raises(InputError, match="weights beyond f16"):
        tw.quantize(net, None, tw.spec(1, 4), weights="float16", activations=None)
    net.weight.data[1, 2] = np.nan
    for weights in ("bfloat16", "codebook4", "codebook8", "int4", "int8"):
        with pytest.raises(InputError, match="NaN"):
            tw.quantize(net, None, tw.spec(1, 4), weights=weights, activations=None)


def test_options_that_do_not_go_together_are_refused() -> None:
    net, spec = _Net(), tw.spec(2, 1, 6, 6)
    with pytest.raises(InputError, match="activations=None"):
        tw.quantize(net, [np.zeros((2, 1, 6, 6), np.float32)], weights="int4")
    with pytest.raises(InputError, match="multiple of 8"):
        tw.quantize(net, None, spec, weights="int4", activations=None, group=12)
