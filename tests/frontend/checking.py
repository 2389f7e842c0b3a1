"""Layers and losses against their definition: gradients against central differences in f64, compiled code against numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.driver import build
from tensorwright.frontend import tree
from tensorwright.frontend.context import Trace
from tensorwright.frontend.core import as_tensor, wrap
from tensorwright.frontend.gradients import value_and_grad
from tensorwright.frontend.tracing import declare_parameters, finish
from tensorwright.ir.dtypes import as_dtype, f64
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.types import TensorType

from .support import Array, expand

STEP = 1e-5
KEY = np.uint64(1234567)


@dataclass(frozen=True)
class Recorded:
    """Graphs of one call, over the same inputs: `values` gives its results and the new buffers, `slopes` the gradients.

    arrays   the inputs' arrays: arguments, then parameters and buffers, then the random key
    names    of the inputs
    wrt      which inputs `slopes` differentiates the weighted sum of the results by
    results  how many of the outputs of `values` are results; the rest are new buffers
    """

    values: Graph
    slopes: Graph
    arrays: list[Array]
    names: list[str]
    wrt: list[int]
    results: int
    buffers: list[str]


def record(fn: Callable[..., Any], arrays: Sequence[Array], training: bool = False, module: nn.Module | None = None) -> Recorded:
    """Traces fn(*arrays), with state and random draws allowed. Parameters are those of `module`, or of fn if it is one."""
    if module is None:
        module = fn if isinstance(fn, nn.Module) else nn.Sequential()
    rng = np.random.default_rng(17)
    with Trace("checked", training=training, stateful=True) as t:
        declare_parameters(t, module)
        key = t.input("rng", TensorType(as_dtype(KEY.dtype), ()), "data")
        t.key = key
        given = [wrap(t.input(f"x{i}", TensorType(as_dtype(a.dtype), a.shape), "data")) for i, a in enumerate(arrays)]
        floats = [i for i, g in enumerate(given) if g.dtype.is_float]

        def objective(m: Any, chosen: list[Any]) -> tuple[Any, Any]:
            arguments = list(given)
            for i, v in zip(floats, chosen, strict=True):
                arguments[i] = v
            outputs = tree.flatten(fn(*arguments))[0]
            total: Any = None
            for y in outputs:
                weights = rng.uniform(0.5, 1.5, y.shape).astype(np.float32)
                part = tw.sum(y * weights) if y.dtype.is_float else None
                total = part if total is None else total if part is None else total + part
            return total, outputs

        learnt = any(p.requires_grad for p in module.parameters())
        numbers = [*([0] if learnt else []), *([1] if floats else [])]
        both = value_and_grad(objective, numbers, has_aux=True)
        (total, results), gradients = both(module, [given[i] for i in floats])
        by_path = gradients[0] if learnt else {}
        by_argument = gradients[-1] if floats else []
        trained = {path: p for path, p in module.named_parameters() if p.requires_grad}
        inputs = list(t.inputs.values())
        names = [str(n.attrs["name"]) for n in inputs]
        wrt = [names.index(f"x{i}") for i in floats] + [names.index(t.name_of(trained[path])) for path in by_path]
        slopes = [*by_argument, *by_path.values()]
        values = [*(as_tensor(y).node for y in results), *t.updates.values()]
        buffers = list(t.updates)
        # Both over all inputs, also those that one of them does not use.
        forward = finish(t, [*values, total.node], [f"v{i}" for i in range(len(values) + 1)])
        backward = finish(t, [total.node, *(s.node for s in slopes)], ["total", *(f"s{i}" for i in range(len(slopes)))])
        held = {n: p.data for n, p in t.parameters.items()}
    own = {"rng": np.asarray(KEY), **{f"x{i}": a for i, a in enumerate(arrays)}, **held}
    return Recorded(expand(forward), expand(backward), [own[n] for n in names], names, wrt, len(results), buffers)


def check(
    fn: Callable[..., Any],
    *arrays: Array,
    training: bool = False,
    compiled: bool = True,
    tolerance: float = 1e-5,
    slope_tolerance: float = 1e-6,
    module: nn.Module | None = None,
) -> list[Array]:
    """Checks a call and returns its results in f64.

    Gradients by every float argument and parameter: elements (up to six each) and one random direction against central
    differences in f64. Truncation and rounding of these are 1e-10 times curvatures of order 1 to 1000. Compiled f32 results
    and gradients against f64, relative to the largest: sums of tens of f32 terms, gradients of them.
    """
    r = record(fn, arrays, training, module)
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in r.arrays]
    _, *slopes = interpret(r.slopes, wide, f64)
    rng = np.random.default_rng(5)

    def total(k: int, direction: Array, step: float) -> float:
        moved = list(wide)
        moved[k] = wide[k] + step * direction
        return float(interpret(r.values, moved, f64)[-1])

    for k, slope in zip(r.wrt, slopes, strict=True):
        assert slope.shape == wide[k].shape
        size = float(np.abs(slope).max()) if slope.size else 0.0
        directions = [rng.normal(size=slope.shape)]
        for place in rng.permutation(slope.size)[:6]:
            unit = np.zeros(slope.size)
            unit[place] = 1
            directions.append(unit.reshape(slope.shape))
        for d in directions if slope.size else []:
            found = float((slope * d).sum())
            expected = (total(k, d, STEP) - total(k, d, -STEP)) / (2 * STEP)
            scale = max(1.0, size * float(np.abs(d).sum()))
            assert abs(found - expected) < slope_tolerance * scale, f"by {r.names[k]}: {found} and {expected}"
    exact = interpret(r.values, wide, f64)
    if compiled:
        near(_compiled(r.values, r.arrays), exact, tolerance)
        near(_compiled(r.slopes, r.arrays)[1:], slopes, 4 * tolerance)
    return exact[: r.results]


def _compiled(graph: Graph, arrays: Sequence[Array]) -> list[Array]:
    by_name = dict(zip((str(i.attrs["name"]) for i in graph.inputs), arrays, strict=True))
    state = {n: a for n, a in by_name.items() if n != "rng" and not n.startswith("x")}
    exe = build(graph, state, purpose="training")
    found = exe(*(by_name[n] for n, _ in exe.arguments))
    return list(found) if isinstance(found, tuple) else [found]


def near(found: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """max|found - expected| / max|expected| per array; exact where there are no floats."""
    assert len(found) == len(expected)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape
        if e.dtype.kind != "f":
            assert np.array_equal(f, e), f"output {i}"
        elif e.size:
            error = float(np.abs(f - e).max()) / max(float(np.abs(e).max()), 1e-3)
            assert error < tolerance, f"output {i}: {error}"
