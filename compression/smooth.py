"""Smoothing: channels of what matrix products read are scaled so that a few large ones do not take the 8 bits of all others.

    op(x, w)  =  op(x / s, w * s)        s > 0 along the input channels,  s = max|x| ** a / max|w| ** (1 - a)  in each

x / s is computed where x is, in the kernel of the layer norm or activation that makes it; whoever else reads x still reads x.
(Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023, equation 4.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ir.build import input_node
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.types import TensorType
from ..passes.facts import Facts, derived, weights
from ..passes.insert_quantize import sources
from ..passes.layers import Layer, along, find_layers
from ..passes.rewrite import use_counts
from .observe import values_of
from .source import Array, Source

_LEAST = 1e-5  # of the largest channel: smaller ones count as that


def smoothed(source: Source, batches: Sequence[tuple[Array, ...]], a: float = 0.5) -> tuple[Source, list[str]]:
    """The source with evened inputs of layers, and a line for the report. Results of layers and inputs of the graph are left as
    they are: scales of those would stand between two products of integers, or at the door."""
    groups = _groups(source.graph)
    if not groups:
        return source, ["smoothed nothing: no layer reads what a norm or an activation computes"]
    bounds = _largest(source, [g[0] for g in groups], batches)
    values = dict(source.values)
    inputs = list(source.graph.inputs)
    table: dict[Node, Node] = {}
    for k, (group, most) in enumerate(zip(groups, bounds, strict=True)):
        assert group[0].inputs is not None
        of_w = np.max([_bound(values[str(g.w.attrs["name"])], g.inputs[1]) for g in group if g.inputs], axis=0)
        most, of_w = (np.maximum(v, max(float(v.max()), 1e-30) * _LEAST) for v in (most, of_w))
        s = (most**a / of_w ** (1 - a)).astype(np.float32)
        name = f"smooth.{k}"
        inverse = input_node(name, TensorType(group[0].x.dtype, (s.size,)), "parameter")
        inputs.append(inverse)
        values[name] = (1 / s).astype(np.float32)
        x = make("mul", group[0].x, along(inverse, group[0].inputs[0], group[0].x))
        for g in group:
            assert g.inputs is not None
            table[g.node] = x
            w = values[str(g.w.attrs["name"])]
            values[str(g.w.attrs["name"])] = w * s.reshape([-1 if d == g.inputs[1] else 1 for d in range(w.ndim)])
    made = _with(source.graph, table)
    graph = Graph(tuple(inputs), made.outputs, made.output_names, made.name, (), made.labels, values)
    said = ", ".join("/".join(g.name for g in group) for group in groups)
    return Source(graph, values), [f"smoothed what {len(groups)} groups of layers read: {said}"]


def _with(graph: Graph, table: dict[Node, Node]) -> Graph:
    """The graph with layers reading what the table says in the place of their own input; values may depend on one another."""

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node in table:
            scale = table[node].inputs[1]
            inputs = (make("mul", inputs[0], scale), *inputs[1:])
        return node.replace(inputs)

    return graph.map_nodes(rule)


def _groups(graph: Graph) -> list[list[Layer]]:
    """Layers that read one value which floats compute: neither a layer's result with at most a shift, nor an input."""
    facts = Facts()
    uses = use_counts(graph)
    fixed = derived(graph.nodes(), weights(graph))
    layers = find_layers(graph, facts)
    nodes = {x.node for x in layers}
    found: dict[Node, list[Layer]] = {}
    for layer in layers:
        plain = "role" in layer.w.attrs and uses[layer.w] == 1 and layer.inputs is not None
        made = sources(layer.x, facts, fixed)
        if plain and made == [layer.x] and layer.x.inputs and not _product(layer.x, nodes, facts):
            found.setdefault(layer.x, []).append(layer)
    readers = graph.users()
    whole = [g for x, g in found.items() if sum(r in nodes for r in readers[x]) == len(g)]
    return [g for g in whole if len({x.inputs[0] for x in g if x.inputs}) == 1]


def _product(x: Node, layers: set[Node], facts: Facts) -> bool:
    """Whether elementwise work with numbers and weights alone is between x and a layer: one epilogue computes it in integers."""
    for _ in range(8):
        if x in layers:
            return True
        if not x.inputs or facts.form(x) not in ("add", "sub", "max", "min", "select"):
            return False
        x = x.inputs[2] if facts.form(x) == "select" else x.inputs[0]
    return False


def _bound(w: Array, axis: int) -> Array:
    return np.asarray(np.abs(w).max(axis=tuple(k for k in range(w.ndim) if k != axis)))


def _largest(source: Source, layers: Sequence[Layer], batches: Sequence[tuple[Array, ...]]) -> list[Array]:
    """The largest absolute value in each input channel that each layer reads."""
    watched = []
    for x in layers:
        assert x.inputs is not None
        axes = tuple(d for d in range(len(x.x.shape)) if d != x.inputs[0])
        watched.append(make("max", make("abs", x.x), axes=axes, keepdims=False))
    found = [np.stack(v).max(0) for v in zip(*values_of(source.graph, source.values, watched, batches), strict=True)]
    return [np.asarray(v, np.float64) for v in found]
