"""Ranges of calibration against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.compression.ranges import Histogram, Range, quantized_weights, scale_of
from tensorwright.ir.errors import InputError


def seen(*parts: np.ndarray) -> Histogram:
    h = Histogram("x")
    for p in parts:
        h.add(p.astype(np.float32))
    return h


def test_minmax_holds_zero_and_all_that_was_seen() -> None:
    assert seen(np.array([1.0, 3.0])).range("minmax") == Range(0.0, 3.0)
    assert seen(np.array([-1.0]), np.array([2.0])).range("minmax") == Range(-1.0, 2.0)
    assert seen(np.array([-1.0]), np.array([2.0])).range("minmax", signed=True) == Range(-2.0, 2.0)


def test_outliers_are_cut_off_by_all_others() -> None:
    x = np.concatenate([np.random.default_rng(0).normal(size=100_000), [400.0, -300.0]])
    for signed in (False, True):
        found = seen(x).range("percentile", 99.9, signed)
        assert 2.5 < found.high < 4.5
        assert -4.5 < found.low < -2.5
    for method, most in (("mse", 39), ("entropy", 20)):
        found = seen(np.random.default_rng(0).normal(size=100_000), np.array([40.0, -30.0])).range(method)
        assert 3 < found.high < most
        assert -most < found.low < -2


@pytest.mark.parametrize("signed", [False, True])
def test_mse_is_the_best_of_scaled_ranges(signed: bool) -> None:
    x = np.random.default_rng(1).laplace(size=20_000)

    def squared(r: Range) -> float:
        step = (r.high - r.low) / 255
        return float(np.mean((np.clip(np.rint((x - r.low) / step), 0, 255) * step + r.low - x) ** 2))

    h = seen(x)
    chosen, whole = h.range("mse", signed=signed), h.range("minmax", signed=signed)
    assert squared(chosen) < squared(whole)
    shares = [squared(Range(whole.low * s, whole.high * s)) for s in np.linspace(0.1, 1, 40)]
    assert squared(chosen) < 1.05 * min(shares)


def test_batches_in_any_order_and_growing_ranges() -> None:
    parts = [np.random.default_rng(k).normal(size=500) * (k + 1) for k in range(6)]
    forward, backward = seen(*parts), seen(*parts[::-1])
    assert (forward.low, forward.high, forward.count) == (backward.low, backward.high, backward.count)
    assert forward.bins.sum() == backward.bins.sum() == 3000
    a, b = forward.range("percentile", 99.0), backward.range("percentile", 99.0)
    assert abs(a.high - b.high) < 0.02 * a.high


def test_scales_and_zero_points() -> None:
    assert scale_of(Range(0, 2.55), "u8").zero == 0
    assert scale_of(Range(-2.55, 0), "u8").zero == 255
    assert scale_of(Range(-1.28, 1.27), "u8").zero == 128
    assert scale_of(Range(-1, 0.5), "i8") == scale_of(Range(-1, 1), "i8")
    for nothing in (Range(0, 0), Range(0, 1e-42)):
        assert (scale_of(nothing, "u8").scale, scale_of(nothing, "i8").scale) == (1.0, 1.0)


def test_weights_per_channel() -> None:
    w = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32) * np.array([1e-3, 1, 10, 1e4, 0]).reshape(-1, 1, 1)
    q, scale = quantized_weights(w.astype(np.float32), 0)
    assert np.abs(q).max(axis=(1, 2)).tolist() == [127, 127, 127, 127, 0]
    assert scale[4] == 1.0
    assert np.abs(q * scale.reshape(-1, 1, 1) - w).max(axis=(1, 2)) == pytest.approx(scale / 2, rel=0.5, abs=1.0)
    assert (np.abs(q * scale.reshape(-1, 1, 1) - w) <= scale.reshape(-1, 1, 1) * 0.5001).all()
    with pytest.raises(InputError, match="NaN"):
        quantized_weights(np.array([np.nan]), None)
