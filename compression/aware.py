"""Quantisation-aware training: the model with rounding in it, as a Module whose gradients pass through the rounding.

    x  ->  c + stop_gradient(dequantize(quantize(c)) - c),  c = x limited to the range that the integers cover
    w  ->  w + stop_gradient(dequantize(quantize(w)) - w),  over the range of the weights as they are in this step

(Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013; Jacob et al., "Quantization and training
of neural networks for efficient integer-arithmetic-only inference", 2018, whose batch norm is folded as here.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..frontend.core import as_tensor, wrap
from ..frontend.module import Module
from ..frontend.parameter import Parameter
from ..ir.build import full
from ..ir.dims import Dim, evaluate
from ..ir.dtypes import i8
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from ..ir.graphs import specialize
from ..ir.op import make
from ..ir.ops.quantize import limits
from ..ir.types import TensorType, TupleType
from ..passes.insert_quantize import Quantization, dequantized_weights, fake_quantized
from ..passes.loop_layers import Change, changed_loop

if TYPE_CHECKING:
    from .plan import Plan


def _through(x: Node, rounded: Node) -> Node:
    """`rounded`, with the gradient of x."""
    return make("add", x, make("stop_gradient", make("sub", rounded, x)))


def trained_through(x: Node, q: Quantization) -> Node:
    """x in integers and back, with a straight-through gradient inside the range of the integers."""
    low, high = ((v - q.zero) * np.float32(q.scale) for v in limits(q.dtype))
    c = make("minimum", make("maximum", x, full(float(low), x.tensor)), full(float(high), x.tensor))
    return _through(c, fake_quantized(c, q))


def weights_through(w: Node, axis: int | None) -> Node:
    """Weights in i8 around 0 and back, with a straight-through gradient; scales follow the weights."""
    axes = tuple(k for k in range(len(w.shape)) if k != axis)
    bound = make("stop_gradient", make("max", make("abs", w), axes=axes, keepdims=False))
    scale = make("mul", make("maximum", bound, full(1e-30, bound.tensor)), full(1.0 / 127.0, bound.tensor))
    zero = full(0, TensorType(i8, scale.shape))
    q = make("quantize", w, scale, zero, axis=axis, dtype=i8)
    return _through(w, dequantized_weights(q, scale, axis))


class QuantAware(Module):
    """A model with quantisation in it, to be trained. Its weights are those of the model with norms folded in, by their names."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._nodes = _with_loops(plan)
        self.weights = {n: Parameter(v) for n, v in plan.source.values.items()}

    def __call__(self, *arguments: Any) -> Any:
        """What the quantised model computes, as nodes of the graph that is being traced."""
        plan = self._plan
        given = [as_tensor(a).node for a in arguments]
        wanted = [i for i in plan.source.graph.inputs if i.attrs["role"] == "data"]
        if len(given) != len(wanted):
            raise InputError(f"{plan.source.graph.name} takes {len(wanted)} arguments, got {len(given)}")
        graph, table = self._sized([n.tensor for n in given])
        done: dict[Node, Node] = dict(zip((i for i in graph.inputs if i.attrs["role"] == "data"), given, strict=True))
        for i in graph.inputs:
            if i.attrs["role"] != "data":
                done[i] = self.weights[str(i.attrs["name"])].node
        quantised: dict[Node, Node] = {}
        kept = {table[n] for n in plan.readers_of_floats()}
        layers = {table[layer.node]: layer for layer in plan.chosen}
        scales = {table[n]: q for n, q in plan.scales.items()}
        for n in graph.nodes():
            if n not in done:
                inputs = tuple(done[i] if n in kept else quantised.get(i, done[i]) for i in n.inputs)
                layer = layers.get(n)
                if layer is not None:
                    axis = layer.output[1] if plan.options.per_channel else None
                    inputs = (inputs[0], weights_through(inputs[1], axis))
                done[n] = n.replace(inputs)
            if n in scales:
                quantised[n] = trained_through(done[n], scales[n])
        outputs = [wrap(done[o]) for o in graph.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _sized(self, types: list[TensorType]) -> tuple[Graph, dict[Node, Node]]:
        """The graph for arguments of these types, and for each node of the plan's graph the node of this one."""
        source = self._plan.source.graph
        graph = Graph(source.inputs, tuple(self._nodes[o] for o in source.outputs), source.output_names, source.name)
        data = [i for i in graph.inputs if i.attrs["role"] == "data"]
        if all(i.tensor.shape == t.shape for i, t in zip(data, types, strict=True)):
            return graph, self._nodes
        sizes: dict[str, Dim] = {}
        for i, t in zip(data, types, strict=True):
            for d, given in zip(i.shape, t.shape, strict=False):
                if str(d) in i.tensor.symbols:  # a size by its name alone
                    sizes.setdefault(str(d), given)
            wanted = tuple(evaluate(d, sizes) for d in i.shape)
            if wanted != t.shape:
                raise InputError(f"{graph.name}: argument {i.attrs['name']!r} is {i.type}, got {t}")
        # every node as an output but loops, of which there are results: specialise keeps their order
        nodes = [n for n in source.nodes() if not isinstance(n.type, TupleType)]
        watched = Graph(graph.inputs, tuple(self._nodes[n] for n in nodes), tuple(f"v{k}" for k in range(len(nodes))), graph.name)
        found = specialize(watched, sizes)
        table = dict(zip(nodes, found.outputs, strict=True))
        table |= {n.inputs[0]: table[n].inputs[0] for n in nodes if n.inputs and isinstance(n.inputs[0].type, TupleType)}
        return Graph(found.inputs, tuple(table[o] for o in source.outputs), graph.output_names, graph.name), table

    def quantized(self) -> Graph:
        """The Graph in integers for the weights as they are now, as `tw.quantize` gives it."""
        return self._plan.graph({n: p.data.copy() for n, p in self.weights.items()})


def _with_loops(plan: Plan) -> dict[Node, Node]:
    """For each node of the plan's graph the same with rounding in the bodies of loops."""
    done: dict[Node, Node] = {}
    for n in plan.source.graph.nodes():
        new = n if not n.inputs else n.replace(tuple(done[i] for i in n.inputs))
        inside = {x.node: (x, read) for x, read in plan.inside.items() if x.loop is n}
        if inside:
            changes = {}
            for node, (layer, read) in inside.items():
                assert read is not None
                w = weights_through(layer.w, layer.output[1] if plan.options.per_channel else None)
                changes[node] = Change(_trained(read), w, (w,))
            new = changed_loop(new, changes)
        done[n] = new
    return done


def _trained(q: Quantization) -> Callable[[Node], Node]:
    return lambda x: trained_through(x, q)
