"""Tracing a function and running its graph in the interpreter, gradients expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tensorwright.frontend import Traced, trace_model, tree
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.verify import verify
from tensorwright.passes.contract import Context
from tensorwright.passes.gradient import Gradient

Array = np.ndarray[Any, Any]


def expand(graph: Graph) -> Graph:
    """The graph without gradient nodes, in bodies of loops neither, verified."""
    done = Gradient().apply(graph, Context())
    verify(done)
    return done


def execute(traced: Traced, *arrays: Any) -> Any:
    """What the traced function gives for arrays (leaves in order), put together as it was returned."""
    outputs = interpret(expand(traced.graph), [*map(np.asarray, arrays), *traced.values().values()])
    return tree.unflatten(traced.structure, outputs)


def run(fn: Callable[..., Any], *arrays: Any) -> Any:
    """fn on arrays, by tracing and interpreting. Arguments may be nested; numbers and strings are passed as they are."""
    leaves = [leaf for leaf in tree.flatten(arrays)[0] if isinstance(leaf, (np.ndarray, np.generic))]
    return execute(trace_model(fn, *arrays), *leaves)


def numeric_gradient(fn: Callable[[Array], float], x: Array, step: float = 1e-4) -> Array:
    """Central differences in f64."""
    x = x.astype(np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        out[i] = (fn(high) - fn(low)) / (2 * step)
    return out
