"""Which range of a value its integers are to cover: from the extremes and a histogram of what calibration saw.

    minmax       all that was seen
    percentile   all but the outermost share
    mse          the range that quantises with the least squared error
    entropy      the range whose quantised distribution is nearest to the one seen (Kullback-Leibler), as TensorRT calibrates
                 (Migacz, "8-bit inference with TensorRT", 2017)

A range always holds 0, so that padding and relu are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError

Array = np.ndarray[Any, Any]
METHODS: Final = ("minmax", "percentile", "mse", "entropy")
BINS: Final = 2048
_STEPS: Final = 80  # ranges that mse and entropy try


@dataclass(frozen=True)
class Range:
    """Numbers from low <= 0 to high >= 0."""

    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """How integers stand for numbers: (q - zero) * scale. `dtype` is 'u8' or 'i8'."""

    scale: float
    zero: int
    dtype: str

    @property
    def numpy(self) -> np.dtype[Any]:
        """The integers' dtype."""
        return np.dtype(np.uint8 if self.dtype == "u8" else np.int8)


class Histogram:
    """What was seen of one value: extremes, how many, and counts in equal bins over the extremes.

    The bins grow with the extremes: counts then move to the bins where their centres lie.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high, self.count = 0.0, 0.0, 0
        self.bins = np.zeros(BINS, np.int64)

    def add(self, values: Array) -> None:
        """Raises InputError for NaN and infinities: no range holds them."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = int(values.size - np.isfinite(values).sum())
            raise InputError(
                f"calibration: {bad} of {values.size} numbers of {self.name} are NaN or infinite; "
                "look for such in the calibration data and in the weights"
            )
        low, high = min(low, self.low), max(high, self.high)
        if (low, high) != (self.low, self.high):
            old = self._centres()
            kept = self.bins
            self.low, self.high = low, high
            self.bins = np.zeros(BINS, np.int64)
            if self.count:
                np.add.at(self.bins, self._bin(old), kept)
        self.count += values.size
        if self.high > self.low:
            self.bins += np.bincount(self._bin(values.reshape(-1)), minlength=BINS)
        else:
            self.bins[0] += values.size

    def _bin(self, values: Array) -> Array:
        span = (self.high - self.low) or 1.0
        return np.clip(((values.astype(np.float64) - self.low) * (BINS / span)).astype(np.int64), 0, BINS - 1)

    def _centres(self) -> Array:
        return self.low + (np.arange(BINS) + 0.5) * ((self.high - self.low) / BINS)

    def range(self, method: str, percentile: float = 99.99, signed: bool = False) -> Range:
        """The range to cover. `signed` says that integers are signed around 0: the range then is symmetric."""
        low, high = self.low, self.high
        if signed:
            low, high = -max(-low, high), max(-low, high)
        if method == "minmax" or not self.count or self.low == self.high:
            return Range(low, high)
        if method == "percentile":
            return self._percentile(percentile, signed)
        cost = self._squared if method == "mse" else self._divergence
        best, least = (low, high), np.inf
        for k in range(_STEPS):
            share = 1.0 - k * (0.95 / _STEPS)
            for a, b in {(low * share, high * share), (low, high * share), (low * share, high)} if not signed else {
                (low * share, high * share)
            }:  # fmt: skip
                found = cost(a, b)
                if found < least:
                    best, least = (a, b), found
        return Range(*best)

    def _percentile(self, percentile: float, signed: bool) -> Range:
        centres, total = self._centres(), np.cumsum(self.bins)
        if signed:
            order = np.argsort(np.abs(centres), kind="stable")
            at = int(np.searchsorted(np.cumsum(self.bins[order]), self.count * percentile / 100.0))
            bound = float(np.abs(centres[order[min(at, BINS - 1)]]))
            return Range(-bound, bound)
        tail = self.count * (100.0 - percentile) / 100.0
        low = float(centres[int(np.searchsorted(total, tail))]) if self.low < 0 else 0.0
        high = float(centres[min(int(np.searchsorted(total, self.count - tail)), BINS - 1)]) if self.high > 0 else 0.0
        return Range(min(low, 0.0), max(high, 0.0)) if high > 0 or low < 0 else Range(self.low, self.high)

    def _levels(self, low: float, high: float) -> tuple[Array, Array]:
        """The centres of the bins and what they are after quantisation over a range."""
        centres = self._centres()
        step = (high - low) / 255.0 or 1.0
        return centres, np.clip(np.rint((centres - low) / step), 0, 255) * step + low

    def _squared(self, low: float, high: float) -> float:
        centres, levels = self._levels(low, high)
        return float(np.sum(self.bins * (centres - levels) ** 2))

    def _divergence(self, low: float, high: float) -> float:
        """KL(seen, quantised); what lies outside counts at the edge of the range."""
        centres, _ = self._levels(low, high)
        step = (high - low) / 255.0 or 1.0
        level = np.clip(np.rint((centres - low) / step), 0, 255).astype(np.int64)
        inside = (centres >= low) & (centres <= high)
        p = self.bins.astype(np.float64)
        p[int(self._bin(np.zeros(1))[0])] = 0.0  # zeros, of which relu makes many, are exact in any range
        clipped = p * inside
        where = np.flatnonzero(inside)
        if not where.size:
            return float("inf")
        clipped[where[0]] += p[: where[0]].sum()
        clipped[where[-1]] += p[where[-1] + 1 :].sum()
        filled = inside & (p > 0)
        totals = np.bincount(level[inside], weights=p[inside], minlength=256)
        members = np.bincount(level[filled], minlength=256)
        q = np.where(filled, totals[level] / np.maximum(members[level], 1), 0.0)
        chosen = clipped > 0
        if not chosen.any():
            return float("inf")
        if np.any(q[chosen] <= 0):
            q = np.maximum(q, 1e-9 * self.count)
        a, b = clipped[chosen] / clipped.sum(), q[chosen] / max(q.sum(), 1e-30)
        return float(np.sum(a * np.log(a / b)))


def scale_of(range_: Range, dtype: str) -> Scale:
    """Scale and zero point: u8 over the range, i8 symmetric around 0. A range of 0 alone has scale 1."""
    low, high = min(range_.low, 0.0), max(range_.high, 0.0)
    if dtype == "i8":
        bound = max(-low, high)
        return Scale(_representable(bound / 127.0), 0, dtype)
    scale = _representable((high - low) / 255.0)
    return Scale(scale, int(np.clip(np.rint(-low / scale), 0, 255)), dtype)


def _representable(scale: float) -> float:
    """A scale as an f32 that is neither 0 nor so small that its reciprocal overflows."""
    found = float(np.float32(scale))
    return found if found > 2.0**-100 else 1.0


def quantized_weights(w: Array, axis: int | None, bits: int = 8) -> tuple[Array, Array]:
    """(i8 numbers in [-127, 127], f32 scales): symmetric, a scale for each entry of an axis, or one for all. Zeros have scale 1.

    Raises InputError for NaN and infinities.
    """
    if not np.isfinite(w).all():
        raise InputError("weights hold NaN or infinite numbers")
    most = 2 ** (bits - 1) - 1
    others = tuple(k for k in range(w.ndim) if k != axis)
    bound = np.abs(w).max(axis=others) if w.size else np.zeros(() if axis is None else (w.shape[axis],))
    scale = np.asarray(bound, np.float32) / np.float32(most)
    scale = np.where(scale > 2.0**-100, scale, 1.0).astype(np.float32)
    spread = scale if axis is None else scale.reshape([-1 if k == axis else 1 for k in range(w.ndim)])
    return np.clip(np.rint(w / spread), -most, most).astype(np.int8), scale
