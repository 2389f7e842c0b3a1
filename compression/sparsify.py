"""Layers whose weights are mostly zeros, on sparse kernels where these measure faster.

A matrix product or 1x1 convolution y = x w becomes `sparse_matmul` of x and three parameters: the blocks of w that are not all
zero, their offsets, and where each block of columns starts. A convolution with taps or a stride becomes `sparse_conv2d` of the
same, w being the matrix [channels x taps, outputs]. How wide the blocks are is read off the zeros themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..driver import compile as compile_graph
from ..ir.build import input_node
from ..ir.dims import DimExpr
from ..ir.dtypes import f32, f64
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from ..ir.graphs import rebuild
from ..ir.op import make
from ..ir.ops.conv import conv2d
from ..ir.types import TensorType, tensor
from ..passes.layers import Layer, find_layers

Array = np.ndarray[Any, Any]
Measure = Callable[[Graph], float]
WIDTHS: Final = (16, 8, 4, 1)
WORTH: Final = 0.9  # share of blocks present beyond which no sparse kernel is tried
_MOST: Final = 1 << 31  # entries that offsets of 32 bits count
_ROUNDS: Final = 15


@dataclass(frozen=True)
class Choice:
    """What a layer runs on: blocks of `width` columns, 0 for dense; why, and what was measured."""

    width: int
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None


@dataclass(frozen=True)
class Blocks:
    """A sparse matrix [K, N] in blocks of 1 x width: `values` [E, width], `offsets` [E], `starts` [N / width + 1]."""

    values: Array
    offsets: Array
    starts: Array

    @staticmethod
    def of(w: Array, width: int) -> Blocks:
        """The blocks of w [K, N] that hold a number other than zero; N is a multiple of `width`."""
        depth, columns = w.shape
        tiles = w.reshape(depth, columns // width, width).transpose(1, 0, 2)
        kept = (tiles != 0).any(2)
        if int(kept.sum()) >= _MOST:
            raise InputError(f"a sparse matrix holds fewer than 2**31 blocks; this one has {int(kept.sum()):,}")
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        return Blocks(np.ascontiguousarray(tiles[kept]), np.nonzero(kept)[1].astype(np.int32), starts)

    def arrays(self) -> dict[str, Array]:
        return {"values": self.values, "offsets": self.offsets, "starts": self.starts}


@dataclass(frozen=True)
class Product:
    """A layer as a product with a matrix [K, N], of the rows that a window reads where it is no plain one."""

    layer: Layer
    matrix: Array
    window: dict[str, Any] | None = None


def density(w: Array, width: int) -> float:
    """The share of 1 x width blocks of w [K, N] that hold something."""
    return float((w.reshape(w.shape[0], -1, width) != 0).any(2).mean()) if w.size else 1.0


def sparsify(
    graph: Graph,
    *,
    always: bool = False,
    measure: Measure | None = None,
    layers: Iterable[str] | None = None,
    widths: Sequence[int] = WIDTHS,
) -> tuple[Graph, dict[str, Choice]]:
    """The graph with sparse kernels for layers that are faster on them, and what was chosen for each layer, and why.

    `measure` gives the milliseconds of a Graph that is one layer, weights included (default: a stopwatch, best of interleaved
    runs). With `always`, nothing is measured: every layer that can be sparse is, in the widest blocks that hold no more than
    twice the numbers that are not zero. `widths` are the blocks that may be used. The graph's weights are its own
    (`Graph.weights`).
    """
    choices: dict[str, Choice] = {}
    table: dict[Node, tuple[Product, list[Node]]] = {}
    made: dict[str, Array] = {}
    wanted = None if layers is None else set(layers)
    for layer in find_layers(graph):
        if wanted is not None and layer.name not in wanted:
            continue
        found = _product_of(graph, layer)
        if isinstance(found, str):
            choices[layer.name] = Choice(0, found)
            continue
        choice = _always(found.matrix, widths) if always else _fastest(found, graph, measure, widths)
        choices[layer.name] = choice
        if choice.width:
            weights = _weights(layer, Blocks.of(found.matrix, choice.width))
            table[layer.node] = found, _inputs(weights)
            made |= weights
    if not table:
        return graph, choices
    new = graph.map_nodes(lambda n, ins: _product(*table[n], ins[0]) if n in table else n.replace(ins))
    nodes = set(new.nodes()) - set(new.inputs)
    read = {i for n in nodes for i in n.inputs} | set(new.outputs)
    parameters = {n for n in read if n.attrs.get("role") == "parameter"} - set(new.inputs)
    ordered = sorted(parameters, key=lambda n: list(made).index(str(n.attrs["name"])))
    kept = tuple(i for i in new.inputs if i.attrs["role"] == "data" or i in read)
    inputs = (*kept, *ordered)
    held = {str(i.attrs["name"]) for i in inputs}
    values = {n: v for n, v in {**graph.weights, **made}.items() if n in held}
    return Graph(inputs, new.outputs, new.output_names, new.name, (), new.labels, values), choices


def _product_of(graph: Graph, layer: Layer) -> Product | str:
    """The layer as a product with a matrix; or why it is none."""
    name = str(layer.w.attrs.get("name", ""))
    if name not in graph.weights or layer.w.attrs.get("role") != "parameter":
        return "its weights are computed from others"
    w = np.asarray(graph.weights[name])
    if layer.inputs is None:
        return "its channels go apart in groups"
    if layer.w.dtype not in (f32, f64):
        return f"its weights are {layer.w.dtype}"
    x, y = layer.x.shape, layer.node.shape
    (i, d), (e, o) = layer.inputs, layer.output
    plain = w.size == w.shape[d] * w.shape[o] and layer.terms == w.shape[d]
    if plain and (*x[:i], *x[i + 1 :]) == (*y[:e], *y[e + 1 :]) and x[i] == w.shape[d] and y[e] == w.shape[o]:
        return Product(layer, np.ascontiguousarray(np.moveaxis(w, (d, o), (0, 1)).reshape(w.shape[d], w.shape[o])))
    if layer.node.op is not conv2d:
        return f"it is a {layer.node.op.name} whose sums run over more than its channels"
    attrs = layer.node.attrs
    if attrs["dilation"] != (1, 1):
        return f"its taps lie {attrs['dilation']} apart: dilated convolutions stay dense"
    window = {"kernel": w.shape[2:], "stride": attrs["stride"], "padding": attrs["padding"]}
    return Product(layer, np.ascontiguousarray(w.reshape(w.shape[0], -1).T), window)


def _always(w: Array, widths: Sequence[int]) -> Choice:
    exact = density(w, 1)
    fits = [v for v in widths if w.shape[1] % v == 0 and density(w, v) <= 2 * exact] or [1]
    return Choice(fits[0], f"{1 - exact:.1%} zeros; sparse kernels were asked for")


def _fastest(product: Product, graph: Graph, measure: Measure | None, widths: Sequence[int]) -> Choice:
    layer, w = product.layer, product.matrix
    zeros = 1 - density(w, 1)
    fits = [(v, d) for v in widths if w.shape[1] % v == 0 and (d := density(w, v)) <= WORTH]
    if not fits:
        return Choice(0, f"{zeros:.1%} zeros: too few, or too scattered, for a sparse kernel")
    if any(isinstance(n, DimExpr) for n in layer.x.shape):
        return Choice(0, "its sizes are not known: nothing can be measured (give specs with numbers)")
    # wider blocks first; a narrower one is tried only if it holds much less
    tried = [(v, d) for k, (v, d) in enumerate(fits) if k == 0 or d < 0.7 * fits[0][1]]
    name = str(layer.w.attrs["name"])
    dense = _alone(layer, layer.node, {name: np.asarray(graph.weights[name])})
    graphs = {0: dense}
    for v, _ in tried:
        weights = _weights(layer, Blocks.of(w, v))
        graphs[v] = _alone(layer, _product(product, _inputs(weights), layer.x), weights)
    times = {v: measure(g) for v, g in graphs.items()} if measure is not None else stopwatch(graphs)
    best = min((v for v in times if v), key=lambda v: times[v])
    ratio = times[0] / times[best]
    if ratio <= 1:
        return Choice(0, f"{zeros:.1%} zeros, but dense measures {1 / ratio:.2f}x as fast", times[0], times[best])
    return Choice(best, f"{zeros:.1%} zeros, {ratio:.2f}x as fast as dense", times[0], times[best])


def _weights(layer: Layer, blocks: Blocks) -> dict[str, Array]:
    """The arrays of a sparse layer by the names of its parameters."""
    return {f"{layer.w.attrs['name']}.{k}": v for k, v in blocks.arrays().items()}


def _inputs(weights: dict[str, Array]) -> list[Node]:
    return [input_node(n, tensor(v.dtype, v.shape), "parameter") for n, v in weights.items()]


def _product(product: Product, weights: Sequence[Node], x: Node) -> Node:
    """The layer's result on sparse weights."""
    layer = product.layer
    assert layer.inputs is not None
    rows = _moved(x, layer.inputs[0], len(x.shape) - 1)
    if product.window is None:
        y = make("sparse_matmul", rows, *weights)
    else:
        y = make("sparse_conv2d", rows, *weights, **product.window)
    return _moved(y, len(y.shape) - 1, layer.output[0])


def _moved(x: Node, source: int, target: int) -> Node:
    """The node with one dimension moved to another place."""
    order = [k for k in range(len(x.shape)) if k != source]
    order.insert(target, source)
    return x if order == sorted(order) else make("transpose", x, perm=tuple(order))


def _alone(layer: Layer, node: Node, weights: dict[str, Array]) -> Graph:
    """One layer as a graph of its own, channels last, as they lie between layers of a compiled graph."""
    assert layer.inputs is not None
    last = len(layer.x.shape) - 1
    shape = [n for d, n in enumerate(layer.x.shape) if d != layer.inputs[0]]
    x = input_node("layer input", TensorType(layer.x.dtype, (*shape, layer.x.shape[layer.inputs[0]])))
    (y,) = rebuild((node,), {layer.x: _moved(x, last, layer.inputs[0])})
    y = _moved(y, layer.output[0], len(y.shape) - 1)
    parameters = [n for n in Graph((), (y,)).nodes() if n.attrs.get("role") == "parameter"]
    return Graph((x, *parameters), (y,), weights=weights)


def stopwatch(graphs: dict[int, Graph], rounds: int = _ROUNDS) -> dict[int, float]:
    """Milliseconds of each graph on random inputs, the median of rounds in which they take turns."""
    rng = np.random.default_rng(0)
    runs: dict[int, Any] = {}
    for k, g in graphs.items():
        exe = compile_graph(g)
        arguments = [
            rng.uniform(-1, 1, i.tensor.static_shape).astype(i.dtype.numpy) for i in g.inputs if i.attrs["role"] == "data"
        ]
        exe(*arguments)
        runs[k] = (exe, arguments)
    times: dict[int, list[float]] = {k: [] for k in graphs}
    for _ in range(rounds):
        for k, (exe, arguments) in runs.items():
            exe(*arguments)  # caches and threads as a network leaves them: warm
            start = time.perf_counter()
            exe(*arguments)
            times[k].append(1e3 * (time.perf_counter() - start))
    return {k: float(np.median(v)) for k, v in times.items()}
