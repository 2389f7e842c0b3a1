"""Inputs that find wrong rewrites, and what counts as the same result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.dtypes import bool_
from ..ir.graph import Graph, Node
from ..ir.op import Trait
from .bodies import nodes_with_runs

Array = np.ndarray[Any, Any]

DRAWS: Final = ("normal", "positive", "special", "ties")
SPECIAL: Final = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1e-20, 1.0, -1.0)
TIES: Final = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0)
INTEGERS: Final = 8  # indices and labels are drawn below this
BUDGET: Final = 2e-6  # of one op, relative to the largest result: the default of the op records' samples


def draw(graph: Graph, kind: str, seed: int) -> list[Array]:
    """One array per input. 'normal' has both signs; 'positive' is in [0.25, 1.75), for logarithms and roots; 'special' mixes
    in NaN, infinities, both zeros, denormals and numbers that overflow; 'ties' has few values, both zeros among them."""
    rng = np.random.default_rng([seed, DRAWS.index(kind)])
    return [_draw(i, kind, rng) for i in graph.inputs]


def _draw(node: Node, kind: str, rng: np.random.Generator) -> Array:
    shape, dtype = node.tensor.static_shape, node.dtype
    if dtype is bool_:
        return rng.random(shape) < 0.5
    if dtype.is_integer:
        low = 0 if dtype.kind == "uint" or kind != "special" else -INTEGERS
        return rng.integers(low, INTEGERS, shape).astype(dtype.numpy)
    if kind == "positive":
        return rng.uniform(0.25, 1.75, shape).astype(dtype.numpy)
    if kind == "ties":
        return rng.choice(np.array(TIES), shape).astype(dtype.numpy)
    values = rng.normal(size=shape)
    if kind == "special":
        values = np.where(rng.random(shape) < 0.2, rng.choice(np.array(SPECIAL), shape), values)
    with np.errstate(all="ignore"):
        return values.astype(dtype.numpy)


@dataclass(frozen=True)
class Difference:
    """Where two results part: the output, and in words what was found there."""

    output: int
    what: str


def exact_difference(before: Sequence[Array], after: Sequence[Array]) -> Difference | None:
    """The first output that differs in a bit; any NaN equals any NaN."""
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        if x.dtype != y.dtype or x.shape != y.shape:
            return Difference(k, f"{x.dtype}{x.shape} became {y.dtype}{y.shape}")
        same = np.ascontiguousarray(x).reshape(-1).view(np.uint8) == np.ascontiguousarray(y).reshape(-1).view(np.uint8)
        equal = same.reshape(x.size, -1).all(axis=1) if x.size else np.ones(0, bool)
        if x.dtype.kind not in "biu":
            equal |= np.isnan(x.reshape(-1).astype(np.float64)) & np.isnan(y.reshape(-1).astype(np.float64))
        if not equal.all():
            at = int(np.flatnonzero(~equal)[0])
            index = tuple(map(int, np.unravel_index(at, x.shape)))
            return Difference(
                k, f"{int((~equal).sum())} of {x.size} elements differ; at {index} {x[index]!r} became {y[index]!r}"
            )
    return None


def close_difference(
    before: Sequence[Array], after: Sequence[Array], oracle: Sequence[Array], budget: float
) -> Difference | None:
    """The first output whose error against the f64 `oracle` is beyond the budget, and beyond eight times the error that it
    had before; error is max|y - ref| / max|ref| over the elements that are finite in all three. Integers and booleans must
    be equal."""
    for k, (x, y, ref) in enumerate(zip(before, after, oracle, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return Difference(k, f"{x.dtype}{x.shape} became {y.dtype}{y.shape}")
        if x.dtype.kind in "biu":
            if not np.array_equal(x, y):
                return Difference(k, f"{int((x != y).sum())} of {x.size} elements differ")
            continue
        a, b, r = (v.astype(np.float64) for v in (x, y, ref))
        lost = np.isfinite(a) & np.isfinite(r) & ~np.isfinite(b)
        gained = ~np.isfinite(a) & ~np.isfinite(r) & np.isfinite(b)
        if lost.any() or gained.any():
            return Difference(k, f"{int(lost.sum())} finite elements became NaN or infinite, {int(gained.sum())} became finite")
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(r)
        if not finite.any():
            continue
        scale = float(np.abs(r[finite]).max()) or 1.0
        error = float(np.abs(b[finite] - r[finite]).max()) / scale
        was = float(np.abs(a[finite] - r[finite]).max()) / scale
        if error > budget and error > 8 * was:
            return Difference(
                k, f"relative error {error:.2g} against the f64 oracle; before it was {was:.2g}, allowed is {budget:.2g}"
            )
    return None


def budget_of(graph: Graph) -> float:
    """What rounding in another order may cost a graph: the budget of one op for each op that rounds, each time it runs."""
    return BUDGET * max(1, sum(runs for n, runs in nodes_with_runs(graph) if n.inputs and not n.op.has(Trait.MOVEMENT)))
