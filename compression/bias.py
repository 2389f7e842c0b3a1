"""Bias correction: what rounding a layer's weights does to its mean result is taken out again.

With E the weights less what their integers stand for, the mean of op(x, w - E) misses the mean of op(x, w) by that of op(x, E),
in each output channel; x is what the layer reads in calibration. As op is linear in x, a layer in a loop needs but the mean of x
over all steps. (Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, section 4.2, with
means that are measured.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..ir.build import input_node
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..passes.layers import Layer
from ..passes.loop_layers import stacked
from .observe import values_of
from .source import Array, Source


def corrections(
    source: Source, layers: Sequence[Layer], errors: Mapping[Layer, Array], batches: Sequence[tuple[Array, ...]]
) -> dict[Layer, Array]:
    """For each layer the mean of op(x, error of its weights) in each output channel."""
    inputs = list(source.graph.inputs)
    values = dict(source.values)
    watched: list[Node] = []
    for k, layer in enumerate(layers):
        name = f"error.{k}"
        w = input_node(name, layer.w.tensor, "parameter")
        inputs.append(w)
        values[name] = errors[layer].astype(np.float32)
        x = layer.x if layer.loop is None else make("mean", stacked(layer.loop, layer.x), axes=(0,), keepdims=False)
        y = layer.node.replace((x, w))
        axes = tuple(d for d in range(len(y.shape)) if d != layer.output[0])
        watched.append(make("mean", y, axes=axes, keepdims=False) if axes else y)
    graph = Graph(tuple(inputs), source.graph.outputs, source.graph.output_names, source.graph.name)
    total: list[Array] = [np.zeros((), np.float64)] * len(layers)
    for found in values_of(graph, values, watched, batches):
        total = [t + f.astype(np.float64) for t, f in zip(total, found, strict=True)]
    return {x: (t / len(batches)).astype(np.float32) for x, t in zip(layers, total, strict=True)}
