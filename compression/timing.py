"""How long one layer takes alone, in floats and in integers: the reason why a layer stays float."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..driver import build
from ..ir.build import constant, input_node
from ..ir.dtypes import f32, i8
from ..ir.graph import Graph, Node
from ..ir.graphs import specialize
from ..ir.op import make
from ..ir.types import TensorType
from ..passes.facts import derived, weights
from ..passes.insert_quantize import Quantization, dequantized_weights, fake_quantized
from ..passes.layers import Layer, along
from ..passes.loop_layers import Change, changed_loop, results
from .ranges import quantized_weights
from .report import LayerReport
from .source import Array, Source

Measure = Callable[[Graph], float]


def milliseconds(graph: Graph, seconds: float = 0.1) -> float:
    """The median time of a call of a compiled graph on numbers like those of its weights, in about so many seconds."""
    rng = np.random.default_rng(0)
    given = [_numbers(rng, i) for i in graph.inputs if i.attrs["role"] == "data"]
    exe = build(graph, graph.weights)
    exe(*given)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or (time.perf_counter() < end and len(found) < 1000):
        start = time.perf_counter()
        exe(*given)
        found.append(time.perf_counter() - start)
    return float(np.median(found)) * 1e3


class Timer:
    """Measures layers in floats and in integers; layers alike are measured once."""

    def __init__(self, measure: Measure, sizes: Mapping[str, int]) -> None:
        self.measure, self.sizes = measure, sizes
        self._found: dict[str, float] = {}

    def slower(self, layer: Layer, weights: Array, read: Quantization | None, line: LayerReport) -> str:
        """Why the layer had better stay float, or '' where it is faster in integers; the times go into the report."""
        line.float_ms, line.int8_ms = (self._time(alone(layer, weights, self.sizes, r)) for r in (None, read))
        return _said(line.float_ms, line.int8_ms)

    def slower_in_loop(self, layer: Layer, source: Source, read: Quantization | None, line: LayerReport) -> str:
        """As `slower`, for a layer in a loop: the times are those of the whole loop."""
        line.float_ms, line.int8_ms = (self._time(loop_alone(layer, source, self.sizes, r)) for r in (None, read))
        return _said(line.float_ms, line.int8_ms)

    def slower_product(
        self,
        node: Node,
        outer: Mapping[Node, Quantization],
        changes: Mapping[Node, Change],
        source: Source,
        lines: Sequence[LayerReport],
    ) -> str:
        """As `slower`, for a product of two activations that read those in `outer`, or a loop with such in its body."""
        graphs = [product_alone(node, outer, changes, source, self.sizes, integers) for integers in (False, True)]
        floats, integers = (self._time(g) for g in graphs)
        for line in lines:
            line.float_ms, line.int8_ms = floats, integers
        return _said(floats, integers)

    def _time(self, graph: Graph) -> float:
        key = graph.fingerprint()
        if key not in self._found:
            self._found[key] = self.measure(graph)
        return self._found[key]


def _said(floats: float, integers: float) -> str:
    return "" if integers < floats else f"no faster in integers: {integers:.3f} ms against {floats:.3f} in floats"


def _numbers(rng: np.random.Generator, node: Node) -> Array:
    shape, dtype = node.tensor.static_shape, node.dtype
    return (rng.integers(0, 100, shape) if dtype.is_integer else rng.normal(size=shape)).astype(dtype.numpy)


def alone(layer: Layer, weights: Array, sizes: Mapping[str, int], read: Quantization | None) -> Graph:
    """One layer with relu: in floats, or from integers to integers where it is said how it reads them. Its result is given the
    scale of what it reads: no time depends on it."""
    x = input_node("x", TensorType(layer.x.dtype if read is None else read.dtype, layer.x.shape))
    values: dict[str, Array] = {"w": weights}
    if read is None:
        w = input_node("w", layer.w.tensor, "parameter")
        inputs = [x, w]
        y = layer.node.replace((x, w))
    else:
        q, scale = quantized_weights(weights, layer.output[1])
        values = {"w": q, "scale": scale}
        w = input_node("w", TensorType(i8, q.shape), "parameter")
        s = input_node("scale", TensorType(layer.w.dtype, scale.shape), "parameter")
        inputs = [x, w, s]
        of_x, zero = constant(np.float32(read.scale)), constant(read.zero, read.dtype)
        y = layer.node.replace((make("dequantize", x, of_x, zero, axis=None), dequantized_weights(w, s, layer.output[1])))
    bias = input_node("bias", TensorType(y.dtype, (weights.shape[layer.output[1]],)), "parameter")
    values["bias"] = np.zeros(weights.shape[layer.output[1]], np.float32)
    y = make("add", y, along(bias, layer.output[0], y))
    y = make("maximum", y, make("broadcast_to", constant(np.float32(0)), shape=y.shape))
    if read is not None:
        y = make("quantize", y, of_x, zero, axis=None, dtype=read.dtype)
    graph = Graph((*inputs, bias), (y,), name="layer")
    found = specialize(graph, sizes) if sizes else graph
    return Graph(found.inputs, found.outputs, found.output_names, found.name, (), {}, values)


def loop_alone(layer: Layer, source: Source, sizes: Mapping[str, int], read: Quantization | None) -> Graph:
    """The loop that a layer is in, in floats, or with this layer in integers where it is said how it reads."""
    loop = layer.loop
    assert loop is not None
    fixed = derived(source.graph.nodes(), weights(source.graph))
    held = {o for o in loop.inputs if fixed.get(o)}
    roles = {o: "parameter" if o in held else "data" for o in loop.inputs}
    table = {o: input_node(f"x{k}", o.tensor, role) for k, (o, role) in enumerate(roles.items())}
    values = {str(table[o].attrs["name"]): source.value(o) for o in held}
    new, inputs = loop.replace(tuple(table[o] for o in loop.inputs)), list(table.values())
    if read is not None:
        q, scale = quantized_weights(source.value(layer.w), layer.output[1])
        values |= {"w": q, "scale": scale}
        w, s = (
            input_node("w", TensorType(i8, q.shape), "parameter"),
            input_node("scale", TensorType(f32, scale.shape), "parameter"),
        )
        inputs += [w, s]
        numbers = dequantized_weights(w, s, layer.output[1])
        new = changed_loop(new, {layer.node: Change(lambda x: fake_quantized(x, read), numbers, (w, s))})
    used = set(new.inputs)
    graph = Graph(tuple(i for i in inputs if i in used), tuple(results(new)), name="loop")
    found = specialize(graph, sizes) if sizes else graph
    kept = {n: v for n, v in values.items() if n in {str(i.attrs["name"]) for i in found.inputs}}
    return Graph(found.inputs, found.outputs, found.output_names, found.name, (), {}, kept)


def product_alone(
    node: Node,
    outer: Mapping[Node, Quantization],
    changes: Mapping[Node, Change],
    source: Source,
    sizes: Mapping[str, int],
    integers: bool,
) -> Graph:
    """A product of two activations, or a loop with such products, in floats or of bytes."""
    fixed = derived(source.graph.nodes(), weights(source.graph))
    given: dict[Node, Node] = {}
    inputs: list[Node] = []
    values: dict[str, Array] = {}
    for k, o in enumerate(dict.fromkeys(node.inputs)):
        q = outer.get(o) if integers else None
        tensor = o.tensor if q is None else TensorType(q.dtype, o.shape)
        made = input_node(f"x{k}", tensor, "parameter" if fixed.get(o) else "data")
        inputs.append(made)
        if fixed.get(o):
            values[f"x{k}"] = source.value(o)
        given[o] = made
        if q is not None:
            given[o] = make("dequantize", made, constant(np.float32(q.scale)), constant(q.zero, q.dtype), axis=None)
    new = node.replace(tuple(given[i] for i in node.inputs))
    new = changed_loop(new, changes) if integers and changes else new
    outputs = tuple(results(new)) if changes else (new,)
    graph = Graph(tuple(inputs), outputs, name="product")
    found = specialize(graph, sizes) if sizes else graph
    return Graph(found.inputs, found.outputs, found.output_names, found.name, (), {}, values)
