"""What users hand to `quantize`: a Module, a function, a Graph or an ONNX model, as a graph of whole ops with folded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..frontend.specs import Spec, spec
from ..frontend.tracing import trace_model
from ..ir.build import input_node
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from ..ir.graphs import rebuild
from ..ir.interp import run
from ..passes.contract import Context
from ..passes.control import Control
from ..passes.drop_marks import DropMarks
from ..passes.fold_norms import FoldNorms
from ..passes.gradient import Gradient
from ..passes.manager import run_pipeline
from ..passes.prepare import split_graph
from ..passes.simplify import Simplify

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Source:
    """A graph whose weights are inputs with values."""

    graph: Graph
    values: dict[str, Array]

    def value(self, node: Node) -> Array:
        """The numbers of a node that depends on weights alone."""
        inputs = tuple(i for i in self.graph.inputs if i.attrs["name"] in self.values)
        return run(Graph(inputs, (node,)), {str(i.attrs["name"]): self.values[str(i.attrs["name"])] for i in inputs})[0]


def as_batches(calibration: Any, what: str = "calibration") -> list[tuple[Array, ...]]:
    """Batches as tuples of arrays, one for each argument. Raises InputError where there is none, or one is no array."""
    if isinstance(calibration, np.ndarray):
        raise InputError(f"{what} is an iterable of batches, not one array: give [array], or several slices of it")
    try:
        given = list(calibration)
    except TypeError:
        raise InputError(f"{what} is an iterable of batches, not {type(calibration).__name__}") from None
    batches = [tuple(map(np.asarray, b)) if isinstance(b, tuple | list) else (np.asarray(b),) for b in given]
    if not batches or all(a.size == 0 for b in batches for a in b):
        raise InputError(f"{what} is empty: give at least one batch of typical inputs")
    return batches


def source_of(model: Any, specs: Sequence[Any], batches: Sequence[tuple[Array, ...]]) -> Source:
    """The graph of a model for arguments like `specs` (if not given, of a batch of any size), norms folded into layers."""
    graph, values = _traced(model, specs, batches)
    missing = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] != "data" and i.attrs["name"] not in values]
    if missing:
        raise InputError(f"{graph.name}: no values for the weights {missing[:5]}; quantisation needs the numbers of all")
    return evaluated(graph, values)


def evaluated(graph: Graph, values: Mapping[str, Array]) -> Source:
    """The graph with norms folded, and what depends on weights alone computed."""
    folded = run_pipeline(graph, (Gradient(), Control(), DropMarks(), Simplify(), FoldNorms(), Simplify()), Context())
    split = split_graph(folded)
    numbers = {n: np.asarray(v) for n, v in values.items()}
    if split.prepare is not None:
        made = run(split.prepare, {str(i.attrs["name"]): numbers[str(i.attrs["name"])] for i in split.prepare.inputs})
        numbers |= dict(zip(split.prepare.output_names, made, strict=True))
    return _named(split.run, numbers)


def _named(graph: Graph, numbers: Mapping[str, Array]) -> Source:
    """Prepared values as parameters, under the names of the weights that they come from where these are free."""
    names = {str(i.attrs["name"]) for i in graph.inputs}
    table: dict[Node, Node] = {}
    values: dict[str, Array] = {}
    for i in graph.inputs:
        name = str(i.attrs["name"])
        if i.attrs["role"] == "data":
            continue
        short = name.partition(".prepared")[0]
        if i.attrs["role"] == "prepared" and short not in names:
            names.add(short)
            values[short] = numbers[name]
            table[i] = input_node(short, i.tensor, "parameter")
        else:
            values[name] = numbers[name]
            table[i] = input_node(name, i.tensor, "parameter") if i.attrs["role"] == "prepared" else i
    inputs = tuple(table.get(i, i) for i in graph.inputs)
    outputs = rebuild(graph.outputs, table)
    labels = dict(graph.labels)
    stack, seen = list(zip(graph.outputs, outputs, strict=True)), set[Node]()
    while stack:
        old, new = stack.pop()
        if new not in seen:
            seen.add(new)
            if old in graph.labels:
                labels.setdefault(new, graph.labels[old])
            stack += zip(old.inputs, new.inputs, strict=True)
    return Source(Graph(inputs, outputs, graph.output_names, graph.name, (), labels, values), values)


def _traced(model: Any, specs: Sequence[Any], batches: Sequence[tuple[Array, ...]]) -> tuple[Graph, dict[str, Array]]:
    if isinstance(model, Graph):
        if specs:
            raise InputError("a Graph has its input types in it: quantize(graph, calibration) takes no specs")
        return model, {n: np.asarray(v) for n, v in model.weights.items()}
    if hasattr(model, "description") and hasattr(model, "graph"):
        graph: Graph = model.graph()
        return graph, {n: np.asarray(v) for n, v in graph.weights.items()}
    given = specs or [_spec(a, batches) for a in zip(*batches, strict=False)]
    traced = trace_model(model, *given)
    return traced.graph, traced.values()


def _spec(arrays: Sequence[Array], batches: Sequence[tuple[Array, ...]]) -> Spec:
    """The type of an argument from its batches: a first dimension that all arguments share is that of the batch, of any size."""
    first = arrays[0]
    common = first.ndim > 0 and all(a.ndim and a.shape[0] == b[0].shape[0] for b in batches for a in b)
    return spec(*(("N", *first.shape[1:]) if common else first.shape), dtype=first.dtype)
