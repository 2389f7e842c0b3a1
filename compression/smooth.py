"""Smoothing: channels of what matrix products read are scaled so that a few large ones do not take the 8 bits of all others.

    op(x, w)  =  op(x / s, w * s)        s > 0 along the input channels,  s = max|x| ** a / max|w| ** (1 - a)  in each

x / s is computed where x is, in the kernel of the layer norm or activation that makes it; whoever else reads x still reads x.
(Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023, equation 4.)

Which a is best differs from layer to layer, and most layers need none. With 'auto' each group of layers takes the one for which
rounding is expected to err least: steps of x and of w, each uniformly distributed, against the squares of what they multiply,

    error of y[o]  =  step(x)^2 / 12 * sum_j w[j, o]^2  +  step(w[:, o])^2 / 12 * sum_j mean(x[j]^2)

over sum_j mean(x[j]^2) w[j, o]^2; it stays as it is where no a takes at least `_GAIN` off that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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

_LEAST: Final = 1e-5  # of the largest channel: smaller ones count as that
_GAIN: Final = 0.2  # of the expected error: less is not worth a scale
STRENGTHS: Final = (0.5, 0.6, 0.7, 0.8, 0.9)  # that 'auto' tries


@dataclass(frozen=True)
class Seen:
    """Of each channel that a layer reads: the least and the largest number, and the mean square."""

    low: Array
    high: Array
    square: Array


@dataclass(frozen=True)
class Smoothing:
    """Layers that read one value, whose channels are divided by `scales`, and how far that goes (`a` above)."""

    layers: tuple[Layer, ...]
    scales: Array
    strength: float


def smoothed(
    source: Source, batches: Sequence[tuple[Array, ...]], a: float | None = None, signed: bool = False
) -> tuple[Source, list[str]]:
    """The source with evened inputs of layers, and a line for the report: by a, or each group by the one that suits it, or none.
    `signed` says that what layers read becomes signed integers around 0.

    Results of layers and inputs of the graph are left as they are: scales of those would stand between two products of integers,
    or at the door."""
    found = smoothings(source, batches, a, signed)
    if not found:
        return source, [] if a is None else ["smoothed nothing: no layer reads what a norm or an activation computes"]
    done = ["/".join(x.name for x in f.layers) + (f" ({f.strength})" if a is None else "") for f in found]
    return applied(source, found), [f"smoothed what {len(done)} groups of layers read: {', '.join(done)}"]


def smoothings(
    source: Source, batches: Sequence[tuple[Array, ...]], a: float | None = None, signed: bool = False
) -> list[Smoothing]:
    """What `smoothed` does to which layers."""
    groups = _groups(source.graph)
    found: list[Smoothing] = []
    for group, seen in zip(groups, _seen(source, [g[0] for g in groups], batches) if groups else [], strict=True):
        matrices = [_matrix(g, source.values) for g in group]
        strength = suited(seen, matrices, signed) if a is None else a
        if strength is not None:
            found.append(Smoothing(tuple(group), _scales(seen, matrices, strength).astype(np.float32), strength))
    return found


def applied(source: Source, found: Sequence[Smoothing], names: Collection[str] | None = None) -> Source:
    """The source where those of the layers with these names (default: all) read scaled channels, with weights against it."""
    values = dict(source.values)
    inputs = list(source.graph.inputs)
    table: dict[Node, Node] = {}
    for k, f in enumerate(found):
        group = [x for x in f.layers if names is None or x.name in names]
        if not group:
            continue
        name = f"smooth.{k}"
        x, along_x = group[0].x, group[0].inputs
        assert along_x is not None
        inverse = input_node(name, TensorType(x.dtype, (f.scales.size,)), "parameter")
        inputs.append(inverse)
        values[name] = (1 / f.scales).astype(np.float32)
        scaled = make("mul", x, along(inverse, along_x[0], x))
        for g in group:
            table[g.node] = scaled
            owner = str(g.w.attrs["name"])
            values[owner] = times(values[owner], f.scales, g)
    if not table:
        return source
    made = _with(source.graph, table)
    return Source(Graph(tuple(inputs), made.outputs, made.output_names, made.name, (), made.labels, values), values)


def times(w: Array, scales: Array, layer: Layer) -> Array:
    """A layer's weights times a number for each channel that it reads."""
    assert layer.inputs is not None
    return np.asarray(w * scales.reshape([-1 if d == layer.inputs[1] else 1 for d in range(w.ndim)]))


def _matrix(layer: Layer, values: Mapping[str, Array]) -> Array:
    """A layer's weights as [inputs, outputs and what else there is]."""
    assert layer.inputs is not None
    w = np.moveaxis(values[str(layer.w.attrs["name"])], layer.inputs[1], 0)
    return w.reshape(len(w), -1).astype(np.float64)


def _scales(seen: Seen, matrices: Sequence[Array], a: float) -> Array:
    most = np.maximum(-seen.low, seen.high)
    of_w = np.max([np.abs(w).max(1) for w in matrices], axis=0)
    most, of_w = (np.maximum(v, max(float(v.max()), 1e-30) * _LEAST) for v in (most, of_w))
    return np.asarray(most**a / of_w ** (1 - a))


def suited(seen: Seen, matrices: Sequence[Array], signed: bool) -> float | None:
    """The a for which rounding is expected to err least; None where that is hardly less than without."""
    least = (1 - _GAIN) * _expected(seen, matrices, np.ones(len(seen.low)), signed)
    found = None
    for a in STRENGTHS:
        error = _expected(seen, matrices, _scales(seen, matrices, a), signed)
        if error < least:
            found, least = a, error
    return found


def _expected(seen: Seen, matrices: Sequence[Array], s: Array, signed: bool) -> float:
    """The expected square of the rounding error over the square of the result, with x / s and w * s in eight bits."""
    low, high, square = min(float((seen.low / s).min()), 0.0), max(float((seen.high / s).max()), 0.0), seen.square / s**2
    step = max(-low, high) / 127 if signed else (high - low) / 255
    total = 0.0
    for w in matrices:
        scaled = w * s[:, None]
        of_w = np.abs(scaled).max(0) / 127
        errors = step**2 * (scaled**2).sum(0) + of_w**2 * square.sum()
        total += float(errors.sum() / max(float((seen.square @ w**2).sum()), 1e-30))
    return total


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


def _seen(source: Source, layers: Sequence[Layer], batches: Sequence[tuple[Array, ...]]) -> list[Seen]:
    """What each layer reads, channel by channel."""
    watched = []
    for x in layers:
        assert x.inputs is not None
        axes = tuple(d for d in range(len(x.x.shape)) if d != x.inputs[0])
        square = make("mul", x.x, x.x)
        watched += [make(op, v, axes=axes, keepdims=False) for op, v in (("min", x.x), ("max", x.x), ("mean", square))]
    found = [np.stack(v).astype(np.float64) for v in zip(*values_of(source.graph, source.values, watched, batches), strict=True)]
    return [Seen(found[k].min(0), found[k + 1].max(0), found[k + 2].mean(0)) for k in range(0, len(found), 3)]
