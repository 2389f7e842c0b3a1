"""Sparse kernels and smaller models against our own dense ones, in one run: products, convolutions, break-even, ResNet-18.

    tensorwright bench sparse [--threads N] [--quick] [--json FILE]

Layers go the way a user's do: `tw.prune` masks their weights at random, `sparsify` puts them on sparse kernels; both graphs are
compiled and take turns, in bursts of calls on warm caches. `break-even` is the share of zeros from which on the sparse kernel is
the faster one. Convolutions of 3x3 stand beside our dense one with Winograd's tiles (`faster`, as without pruning) and
beside the one that multiplies every tap (`plain`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks.harness import Array, interleaved, median, quiet
from tensorwright.benchmarks.kernels import machine
from tensorwright.benchmarks.models import ResNet18
from tensorwright.compression import sparsify
from tensorwright.ir.graph import Graph

BURST: Final = 8  # calls of one contestant in a row
PATTERNS: Final = (("block 1x16", 0.75), ("block 1x16", 0.9), ("unstructured", 0.9))
# rows, inputs, outputs: a square product, and the 1x1 convolutions of ResNet-50 with stride 1
LAYERS: Final = (
    ("gemm 1024", 1024, 1024, 1024),
    ("1x1 64-256@56", 56, 64, 256),
    ("1x1 256-64@56", 56, 256, 64),
    ("1x1 512-128@28", 28, 512, 128),
    ("1x1 128-512@28", 28, 128, 512),
    ("1x1 1024-256@14", 14, 1024, 256),
    ("1x1 256-1024@14", 14, 256, 1024),
    ("1x1 2048-512@7", 7, 2048, 512),
    ("1x1 512-2048@7", 7, 512, 2048),
)
# size of the image, inputs, outputs, kernel, stride: the convolutions of ResNet-18 and ResNet-50 that are no plain products
CONVOLUTIONS: Final = (
    ("3x3 64-64@56", 56, 64, 64, 3, 1),
    ("3x3 128-128@28", 28, 128, 128, 3, 1),
    ("3x3 256-256@14", 14, 256, 256, 3, 1),
    ("3x3 512-512@7", 7, 512, 512, 3, 1),
    ("3x3/2 64-128@56", 56, 64, 128, 3, 2),
    ("3x3/2 256-512@14", 14, 256, 512, 3, 2),
    ("1x1/2 256-512@56", 56, 256, 512, 1, 2),
    ("1x1/2 1024-2048@14", 14, 1024, 2048, 1, 2),
)
RATIOS: Final = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
EVEN: Final = ("gemm 1024", "3x3 128-128@28", "3x3/2 64-128@56")  # whose break-even is looked for


class Pixels(tw.nn.Module):
    """A convolution of an image [n, h, w, c]; its transposes cancel those that channels last make."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        self.conv = tw.nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        return tw.transpose(self.conv(tw.transpose(x, (0, 3, 1, 2))), (0, 2, 3, 1))


def layer(name: str, size: int, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> tuple[Graph, Array]:
    """A layer's graph with weights, and an input."""
    tw.seed(1)
    model: tw.nn.Module
    shape: tuple[int, ...]
    if name.startswith("gemm"):
        model, shape = tw.nn.Linear(inputs, outputs, bias=False), (size, inputs)
    else:
        model, shape = Pixels(inputs, outputs, kernel, stride), (1, size, size, inputs)
    return with_weights(model, shape), np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def with_weights(model: tw.nn.Module, shape: tuple[int, ...]) -> Graph:
    """A Module's graph with its weights."""
    g = tw.trace(model, tw.spec(*shape))
    return Graph(g.inputs, g.outputs, g.output_names, g.name, (), g.labels, model.state_dict())


def ratio_of(
    dense: Graph, other: Graph, x: Array, threads: int, seconds: float, plain: bool = False
) -> tuple[float, float, float, float]:
    """(ms of the first graph, of the second, how much faster that is, largest difference over the largest result or NaN).
    `plain` says that the first one is to do without Winograd's tiles."""
    runs = [tw.compile(dense, threads=threads, winograd=False if plain else None), tw.compile(other, threads=threads)]
    results = [r(x) for r in runs]
    error = float("nan")
    if results[0].shape == results[1].shape:
        error = float(np.abs(results[0] - results[1]).max() / max(float(np.abs(results[0]).max()), 1e-30))
    del results  # their memory is what calls return
    bursts = [functools.partial(_burst, functools.partial(r, x)) for r in runs]
    one, two = (median(t) / BURST * 1e3 for t in interleaved(bursts, seconds))
    return one, two, one / two, error


def _burst(call: Callable[[], object]) -> None:
    for _ in range(BURST):
        call()


def layers(threads: int, seconds: float, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row for each layer and pattern: the sparse kernel beside the dense one, on the same masked weights."""
    rows: list[dict[str, Any]] = []
    for name, *sizes in (*LAYERS, *CONVOLUTIONS):
        if names and not any(n in name for n in names):
            continue
        graph, x = layer(name, *sizes)
        for pattern, ratio in PATTERNS:
            rows.append({"name": name, **_row(graph, x, pattern, ratio, threads, seconds)})
    return rows


def _row(graph: Graph, x: Array, pattern: str, ratio: float, threads: int, seconds: float) -> dict[str, Any]:
    options: dict[str, Any] = {"ratio": ratio, "pattern": pattern, "criterion": "random"}
    dense = tw.prune(graph, kernels=None, **options).graph
    assert dense is not None
    sparse, _ = sparsify(dense, always=True, widths=(16,) if "16" in pattern else (1,))
    dense_ms, sparse_ms, faster, error = ratio_of(dense, sparse, x, threads, seconds)
    row = {
        "pattern": pattern, "zeros": ratio, "threads": threads, "dense_ms": dense_ms, "ours_ms": sparse_ms, "ratio": faster,
        "max_rel_error": error,
    }  # fmt: skip
    if any(w.shape[2:] == (3, 3) for w in graph.weights.values()):
        plain_ms, _, beside, _ = ratio_of(dense, sparse, x, threads, seconds, plain=True)
        row |= {"plain_ms": plain_ms, "ratio_plain": beside}
    return row


def break_even(threads: int, seconds: float, name: str = "gemm 1024") -> dict[str, float]:
    """For each pattern, the share of zeros from which on the sparse kernel is faster, between measured shares as on a line."""
    graph, x = layer(*next(row for row in (*LAYERS, *CONVOLUTIONS) if row[0] == name))
    found: dict[str, float] = {}
    for pattern in dict.fromkeys(p for p, _ in PATTERNS):
        faster = [_row(graph, x, pattern, r, threads, seconds)["ratio"] for r in RATIOS]
        above = next((k for k, f in enumerate(faster) if f >= 1), None)
        if above is None:
            found[pattern] = float("nan")
        elif above == 0:
            found[pattern] = RATIOS[0]
        else:
            (a, b), (low, high) = (RATIOS[above - 1], RATIOS[above]), (faster[above - 1], faster[above])
            found[pattern] = a + (b - a) * (1 - low) / (high - low)
    return found


def channels(threads: int, seconds: float) -> dict[str, Any]:
    """ResNet-18 (images of 32x32) with half its channels, beside the whole one."""
    tw.seed(1)
    shape = (1, 3, 32, 32)
    graph = with_weights(ResNet18(), shape)
    pruned = tw.prune(graph, ratio=0.5, pattern="channels")
    assert pruned.graph is not None
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    dense_ms, ours_ms, faster, _ = ratio_of(graph, pruned.graph, x, threads, seconds)
    return {
        "name": "ResNet-18", "pattern": "channels", "zeros": 0.5, "threads": threads, "dense_ms": dense_ms, "ours_ms": ours_ms,
        "ratio": faster, "parameters": pruned.parameters_after / pruned.parameters_before,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Figures as text: ratios first."""
    lines = [f"{'layer':18} {'pattern':13} zeros  threads  faster  dense ms  sparse ms  error"]  # then `plain`, where it is
    for r in found["rows"]:
        lines.append(
            f"{r['name']:18} {r['pattern']:13} {r['zeros']:5.0%}  {r['threads']:7d}  {r['ratio']:5.2f}x  {r['dense_ms']:8.3f}  "
            f"{r['ours_ms']:9.3f}  "
            + (f"{r['max_rel_error']:.0e}" if "max_rel_error" in r else f"{r['parameters']:.0%} of weights")
            + (f"  plain {r['ratio_plain']:.2f}x" if "ratio_plain" in r else "")
        )
    for name, even in found["break_even"].items():
        lines += [f"break-even, {p} ({name}): {z:.0%} zeros" for p, z in even.items()]
    return "\n".join(lines)


def run(threads: int, quick: bool = False, names: Sequence[str] = ()) -> dict[str, Any]:
    """All figures on this many threads."""
    seconds = 0.05 if quick else 0.3
    quiet()
    rows = layers(threads, seconds, names)
    rows.append(channels(threads, seconds))
    even = {n: break_even(threads, seconds / 2, n) for n in EVEN if not names or any(m in n for m in names)}
    return {"machine": machine(), "rows": rows, "break_even": even}
