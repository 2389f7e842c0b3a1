"""The 3x3 layers of stride 1 as a program computes them, by Winograd's method: effective rates, above the multiply-add peak.

The layer is compiled whole, from an image with channels last to another, so that padding and both transforms count; the rate is
that of the direct sum's operations. `tensorwright bench kernels` shows these rows below those of the direct sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks.harness import Array, interleaved, median
from tensorwright.benchmarks.peak import peak_run
from tensorwright.ir.target import Target

LAYERS = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))  # channels in and out, size: ResNet-50's


class Layer(tw.nn.Module):
    """A convolution of an image [n, h, w, c] with zeros around it; its transposes cancel those that channels last make."""

    def __init__(self, c: int, o: int) -> None:
        self.conv = tw.nn.Conv2d(c, o, 3, padding=1, bias=False)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        return tw.transpose(self.conv(tw.transpose(x, (0, 3, 1, 2))), (0, 2, 3, 1))


def reference(x: Array, k: Array) -> Array:
    """The convolution in f64: x [n, h, w, c] with zeros around it, k [o, c, 3, 3]."""
    n, h, w, c = x.shape
    wide = np.zeros((n, h + 2, w + 2, c))
    wide[:, 1:-1, 1:-1] = x
    taps = k.astype(np.float64)
    total = np.zeros((n, h, w, k.shape[0]))
    for i in range(3):
        for j in range(3):
            total += wide[:, i : i + h, j : j + w] @ taps[:, :, i, j].T
    return total


def run(threads: Sequence[int], target: Target, *, seconds: float = 0.4, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per layer and thread count, in the form of `kernels.run`; layers that stay direct sums have none."""
    rows: list[dict[str, Any]] = []
    for c, o, size in LAYERS:
        name = f"winograd 3x3 {c}-{o}@{size}"
        if names and not any(part in name for part in names):
            continue
        layer = Layer(c, o)
        x = np.random.default_rng(1).standard_normal((1, size, size, c), dtype=np.float32)
        found = {n: tw.compile(layer, tw.spec(*x.shape), threads=n, target=target.name) for n in threads}
        if not any("winograd" in k.name for e in found.values() for k in e.profile(x, repeats=1).kernels):
            continue
        (weights,) = layer.state_dict().values()
        expected = reference(x, np.asarray(weights))
        error = max(float(np.abs(e(x) - expected).max()) for e in found.values()) / float(np.abs(expected).max())
        out = np.empty(expected.shape, np.float32)
        calls = [functools.partial(e, x, out=out) for e in found.values()]
        flops = 2 * 9 * size * size * c * o
        limit, operations = peak_run(target)
        bare, *measured = interleaved([limit, *calls], seconds, settled=True)
        for n, times in zip(threads, measured, strict=True):
            took = median(times)
            rows.append({
                "name": name, "target": target.name, "threads": n, "ours_ms": took * 1e3, "fastest_ms": min(times) * 1e3,
                "gflops": flops / took / 1e9, "fraction_of_peak": flops / took / (operations / median(bare) * n),
                "max_rel_error": error,
            })  # fmt: skip
    return rows
