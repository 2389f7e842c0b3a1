"""Cross-layer equalisation: channels of consecutive layers are scaled so that both layers' weights use their 8 bits evenly.

    op2(relu(op1(x, w1) + b), w2)  =  op2(relu(op1(x, w1 / s) + b / s), w2 * s)        s > 0 along the channels between the two

holds because relu(y / s) = relu(y) / s. With s = sqrt(r1 / r2), r1 and r2 the largest weight of each channel in w1 and w2, both
are as large afterwards. (Nagel et al., "Data-free quantization through weight equalization and bias correction",
2019, section 4.1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..ir.graph import Graph, Node
from ..ir.op import Trait
from ..passes.facts import Facts, derived, weights
from ..passes.fold_affine import Vector, vector_of
from ..passes.insert_quantize import passes_bytes
from ..passes.layers import Layer, find_layers
from ..passes.rewrite import use_counts
from .source import Array, Source

_ROUNDS = 8
_MOST = 1e3  # a channel is scaled by no more


@dataclass(frozen=True)
class _Pair:
    first: Layer
    second: Layer
    shifts: tuple[str, ...]  # weights added to the first one's result


def equalized(source: Source) -> tuple[Source, list[str]]:
    """The source with evened weights, and a line for the report."""
    pairs = _pairs(source.graph)
    values = {n: v.copy() for n, v in source.values.items()}
    for _ in range(_ROUNDS):
        for p in pairs:
            _even(p, values)
    graph = source.graph
    made = Source(Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, (), graph.labels, values), values)
    return made, [f"equalised {len(pairs)} pairs of layers: " + ", ".join(f"{p.first.name}-{p.second.name}" for p in pairs)]


def _along(s: Array, dimension: int, rank: int) -> Array:
    return s.reshape([-1 if k == dimension else 1 for k in range(rank)])


def _even(p: _Pair, values: dict[str, Array]) -> None:
    assert p.second.inputs is not None
    one, two = str(p.first.w.attrs["name"]), str(p.second.w.attrs["name"])
    d, j = p.first.output[1], p.second.inputs[1]
    w1, w2 = values[one], values[two]
    r1 = np.abs(w1).max(axis=tuple(k for k in range(w1.ndim) if k != d))
    r2 = np.abs(w2).max(axis=tuple(k for k in range(w2.ndim) if k != j))
    with np.errstate(all="ignore"):
        s = np.clip(np.sqrt(r1 / r2), 1 / _MOST, _MOST)
    s = np.where((r1 > 0) & (r2 > 0), s, 1.0).astype(np.float32)
    values[one] = w1 / _along(s, d, w1.ndim)
    values[two] = w2 * _along(s, j, w2.ndim)
    for name in p.shifts:
        values[name] = (values[name].reshape(-1) / s).reshape(values[name].shape)


def _pairs(graph: Graph) -> list[_Pair]:
    """Layers that read the relu of one other layer alone, all weights being inputs of the graph that nothing else reads."""
    facts = Facts()
    uses = use_counts(graph)
    fixed = derived(graph.nodes(), weights(graph))
    layers = {layer.node: layer for layer in find_layers(graph, facts) if "role" in layer.w.attrs and uses[layer.w] == 1}
    found: list[_Pair] = []
    for second in layers.values():
        if second.inputs is None:
            continue
        x, shifts = second.x, list[str]()
        channel = second.inputs[0]
        below = _through(x, uses, facts)
        if below is None:
            continue
        x = below
        x = _relu_of(x, uses, facts) or x
        while x.inputs and facts.form(x) == "add" and x.inputs[1] in fixed:
            name = _bias(x.inputs[1], fixed, facts, channel, uses)
            if name is None:
                break
            shifts.append(name)
            x = x.inputs[0]
        first = layers.get(x)
        if first is None or first.output[0] != channel or uses[x] != 1:
            continue
        size = first.w.shape[first.output[1]]
        if size == second.w.shape[second.inputs[1]]:
            found.append(_Pair(first, second, tuple(shifts)))
    return found


def _through(x: Node, uses: Mapping[Node, int], facts: Facts) -> Node | None:
    """Past poolings of the largest, which keep channels as they are; None where something else reads the value too."""
    while x.op.has(Trait.ORDER) and passes_bytes(x, facts):
        if uses[x] != 1:
            return None
        x = x.inputs[0]
    return x


def _relu_of(x: Node, uses: Mapping[Node, int], facts: Facts) -> Node | None:
    """y where x = relu(y), and nothing else reads either; None where x is no relu."""
    if not x.inputs or uses[x] != 1:
        return None
    form = facts.form(x)
    if form == "max" and facts.value(x.inputs[1]) == 0:
        return x.inputs[0] if uses[x.inputs[0]] == 1 else None
    if form == "select":
        test, low, y = x.inputs
        if facts.value(low) == 0 and facts.form(test) in ("le", "lt") and test.inputs == (y, low) and uses[y] == 2:
            return y
    return None


def _bias(t: Node, fixed: Mapping[Node, bool], facts: Facts, channel: int, uses: Mapping[Node, int]) -> str | None:
    """The input that a broadcast vector of weights is, where it runs along the channels and only this reads it."""
    v: Vector | None = vector_of(t, fixed, facts)
    if v is None or v.dimension != channel:
        return None
    node = v.node
    while node.inputs and facts.kind(node) == "view":
        node = node.inputs[0]
    readers = t
    while readers.inputs and "role" not in readers.attrs:
        if uses[readers] != 1:
            return None
        readers = readers.inputs[0]
    return str(node.attrs["name"]) if "role" in node.attrs and readers is node and uses[node] == 1 else None
