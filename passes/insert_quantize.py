"""Puts quantize and dequantize nodes into a graph of floats: on values that layers read, and on layers' weights.

    op(x, w)  ->  op(dequantize(quantize(x, s, z), s, z), dequantize(wq, sw, 0))

Which values: what a layer reads, followed back through movements and maxima to where it was computed, so that these handle bytes;
what all operands of a concatenation read, with one scale; and of a sum of two layers' results the second, so that one of the two
is stored in bytes and the other is never stored. All readers of such a value read the bytes, but the caller of the graph, layers
that stay float, and what is compared with statistics of its own before it is quantised again: the sum before a layer norm, what
a softmax reads. A step of 255 in the largest of such a row would be felt by all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from ..ir.build import constant, full
from ..ir.dtypes import DType, f32, i8, u8
from ..ir.graph import Graph, Node
from ..ir.lowering import Reduce
from ..ir.op import Trait, make
from ..ir.types import TensorType
from .facts import Facts, derived, weights
from .layers import Layer, along
from .loop_layers import Change, changed_loop
from .rewrite import use_counts


@dataclass(frozen=True)
class Points:
    """Values to quantise, in groups that share a scale, and the group of each."""

    groups: tuple[tuple[Node, ...], ...]

    @property
    def group(self) -> dict[Node, int]:
        """The number of each value's group."""
        return {n: k for k, g in enumerate(self.groups) for n in g}


def _data(node: Node) -> list[Node]:
    return [i for i in node.inputs if i.dtype is node.dtype]


def passes_bytes(node: Node, facts: Facts) -> bool:
    """Whether an op may as well move or compare the integers that its operands stand for."""
    if not node.inputs or facts.replicates(node) or node.attrs.get("value", 0) != 0:
        return False
    if node.op.has(Trait.ORDER):
        low = facts.lowering(node)
        return isinstance(low, Reduce) and low.kind == "max"
    return node.op.has(Trait.MOVEMENT) and not node.op.has(Trait.BARRIER)


def sources(x: Node, facts: Facts, fixed: Mapping[Node, bool]) -> list[Node]:
    """Where a value was computed: through movements and maxima, to several where it is put together of several."""
    found: list[Node] = []
    stack, seen = [x], set[Node]()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        data = _data(n) if passes_bytes(n, facts) else []
        if not data or any(i in fixed for i in data):
            found.append(n)
        else:
            stack += data
    return found


def find_points(graph: Graph, layers: Sequence[Layer], facts: Facts | None = None, also: Sequence[Node] = ()) -> Points:
    """The values to quantise so that `layers` read bytes, and whoever reads the values in `also`."""
    facts = facts or Facts()
    fixed = derived(graph.nodes(), weights(graph))
    groups: list[set[Node]] = []

    def join(nodes: Sequence[Node]) -> None:
        merged = set(nodes)
        for g in [g for g in groups if not merged.isdisjoint(g)]:
            merged |= g
            groups.remove(g)
        groups.append(merged)

    for layer in layers:
        join(sources(layer.x, facts, fixed))
    for x in also:
        join(sources(x, facts, fixed))
    chosen = set().union(*groups) if groups else set[Node]()
    uses = use_counts(graph)
    quantised = {layer.node for layer in layers}
    for n in graph.nodes():
        if not n.inputs or facts.form(n) != "add" or any(i in fixed for i in n.inputs):
            continue
        pending = [i for i in n.inputs if i not in chosen and _of_layer(i, quantised, uses, facts, fixed)]
        if len(pending) == 2:
            join([pending[1]])
            chosen.add(pending[1])
    order = {n: k for k, n in enumerate(graph.nodes())}
    ordered = [tuple(sorted(g, key=order.__getitem__)) for g in groups]
    return Points(tuple(sorted(ordered, key=lambda g: order[g[0]])))


def _of_layer(x: Node, layers: set[Node], uses: Mapping[Node, int], facts: Facts, fixed: Mapping[Node, bool]) -> bool:
    """Whether x is the result of a layer, shifted or not, that nothing else uses."""
    for _ in range(4):
        if uses[x] != 1:
            return False
        if x in layers:
            return True
        if not x.inputs or facts.form(x) not in ("add", "sub") or x.inputs[1] not in fixed:
            return False
        x = x.inputs[0]
    return False


def exact_readers(graph: Graph, layers: set[Node], quantised: set[Node], facts: Facts) -> set[Node]:
    """The nodes that are to read floats: results of the graph, and what comes to a broadcast of data (of a row's mean, say)
    before it is quantised or a layer reads it."""
    fixed = derived(graph.nodes(), weights(graph))
    outputs, users = set(graph.outputs), graph.users()
    exact: set[Node] = set()
    for n in reversed(graph.nodes()):
        if not n.inputs or n in layers or n in fixed:
            continue
        if facts.replicates(n) and facts.uniform(n) is None:
            exact.add(n)
        elif n not in quantised:
            after = [u in exact for u in users[n]]
            some = all(after) and bool(after) if passes_bytes(n, facts) else any(after)
            if n in outputs or some:
                exact.add(n)
    return exact


@dataclass(frozen=True)
class Quantization:
    """How a value's integers stand for it."""

    scale: float
    zero: int
    dtype: DType


def fake_quantized(x: Node, q: Quantization) -> Node:
    """dequantize(quantize(x))."""
    scale, zero = constant(np.float32(q.scale)), constant(q.zero, q.dtype)
    return make("dequantize", make("quantize", x, scale, zero, axis=None, dtype=q.dtype), scale, zero, axis=None)


def dynamically_quantized(x: Node) -> Node:
    """x in i8 around 0 over the range that it has in this run."""
    axes = tuple(range(len(x.shape)))
    bound = make("max", make("abs", x), axes=axes, keepdims=False)
    tiny = full(1e-30, bound.tensor)
    scale = make("mul", make("maximum", bound, tiny), full(1.0 / 127.0, bound.tensor))
    zero = constant(0, i8)
    return make("dequantize", make("quantize", x, scale, zero, axis=None, dtype=i8), scale, zero, axis=None)


def dequantized_weights(q: Node, scale: Node, axis: int | None) -> Node:
    """The numbers that weights in i8 around 0 stand for."""
    zero = full(0, TensorType(q.dtype, () if axis is None else (q.shape[axis],)))
    return make("dequantize", q, scale, zero, axis=axis)


def insert_quantize(
    graph: Graph,
    layers: Sequence[Layer],
    scales: Mapping[Node, Quantization],
    new_weights: Mapping[Node, Node],
    floats: Set[Node] = frozenset(),
    shifts: Mapping[Node, Node] | None = None,
    dynamic: bool = False,
    loops: Mapping[Node, Mapping[Node, Change]] | None = None,
) -> Graph:
    """The graph with the values in `scales` in integers for all who read them but `floats`, and with `new_weights` (of a layer's
    node) in the place of weights. `shifts` are vectors that are added along a layer's output channels. With `dynamic`
    each layer quantises what it reads by its range in the run. `loops` says what becomes of the layers in their bodies."""
    chosen = {layer.node for layer in layers}
    channel = {layer.node: layer.output[0] for layer in layers}
    offsets, inside = shifts or {}, loops or {}
    given: dict[Node, Node] = {}  # of the new graph's values their fake-quantised ones

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node not in floats:
            inputs = tuple(given.get(i, i) for i in inputs)
        if node in chosen:
            x, w = inputs
            if dynamic and x.dtype is f32:
                x = dynamically_quantized(x)
            inputs = (x, new_weights.get(node, w))
        new = node.replace(inputs)
        if node in inside:
            new = changed_loop(new, inside[node])
        if node in offsets:
            new = make("add", new, along(offsets[node], channel[node], new))
        q = scales.get(node)
        if q is not None:
            given[new] = fake_quantized(new, q)
        return new

    for i in graph.inputs:
        if i in scales:
            given[i] = fake_quantized(i, scales[i])
    return graph.map_nodes(rule)


DTYPES = {"uint8": u8, "int8": i8}
