"""Gradients of a loss by a model's weights, for criteria that weigh by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..driver import compile as compile_function
from ..frontend.core import as_tensor, wrap
from ..frontend.gradients import grad
from ..frontend.module import Module
from ..frontend.parameter import Parameter
from ..frontend.tracing import spec
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..ir.graphs import bind_sizes, rebuild, specialize
from .source import Source, source_of

Array = np.ndarray[Any, Any]


class _Played(Module):
    """A graph as a Module: its weights are parameters, of which floats are trained."""

    def __init__(self, source: Source) -> None:
        self._source = source
        floats = {str(i.attrs["name"]) for i in source.graph.inputs if i.dtype.is_float}
        self.weights = {n: Parameter(v, requires_grad=n in floats) for n, v in source.values.items()}

    def __call__(self, x: Any) -> Any:
        """The first result, as a Tensor of the graph that is being traced."""
        given = as_tensor(x).node
        graph = self._source.graph
        (data,) = (i for i in graph.inputs if i.attrs["role"] == "data")
        if data.tensor.symbols:
            graph = specialize(graph, bind_sizes(Graph((data,), (), ("",)), {str(data.attrs["name"]): given.tensor.static_shape}))
        table = {i: self.weights[n].node if (n := str(i.attrs["name"])) in self.weights else given for i in graph.inputs}
        return wrap(rebuild(graph.outputs[:1], table)[0])


def gradients_of(model: Module | Graph, loss: Callable[..., Any], batches: Iterable[tuple[Any, Any]]) -> dict[str, Array]:
    """dL/dw by path, the mean over batches (x, y) of loss(model(x), y), with the model in inference mode.

    Of a Graph with weights the names are those of its inputs once norms are folded into layers, as `prune` sees them; it takes
    one argument, and the loss looks at its first result.

    Raises InputError where there are no batches, or a graph takes several arguments.
    """
    if isinstance(model, Graph):
        if sum(i.attrs["role"] == "data" for i in model.inputs) != 1:
            raise InputError(f"{model.name}: gradients are taken of graphs with one argument")
        found = gradients_of(_Played(source_of(model, (), ())), loss, batches)
        return {n.removeprefix("weights."): g for n, g in found.items()}

    def value(m: Module, x: Any, y: Any) -> Any:
        return loss(m(x), y)

    def slopes(x: Any, y: Any) -> Any:
        return grad(value)(model, x, y)

    total: dict[str, Array] = {}
    count = 0
    programs: dict[Any, Any] = {}
    for x, y in batches:
        x, y = np.asarray(x), np.asarray(y)
        key = (x.shape, x.dtype, y.shape, y.dtype)
        if key not in programs:
            programs[key] = compile_function(slopes, spec(*x.shape, dtype=x.dtype), spec(*y.shape, dtype=y.dtype))
        for name, g in programs[key](x, y).items():
            total[name] = total.get(name, 0) + g.astype(np.float64)
        count += 1
    if not count:
        raise InputError("there are no batches to take gradients of")
    return {name: g / count for name, g in total.items()}
