"""What a layer can be made of, and the graph for a choice for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from ..ir.build import input_node
from ..ir.dtypes import bf16, f32
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.types import TensorType
from ..passes.layers import Layer, find_layers, find_loop_layers
from ..passes.weight_only import fits
from .blocks import block_weights
from .masks import Units, View, checked_ratio, pattern_of, scores_of
from .plan import Options, Plan, used
from .ranges import Histogram, quantized_weights
from .report import Report
from .smooth import Smoothing, applied, smoothings, times
from .source import Array, Source
from .sparsify import WIDTHS, WORTH, density, sparsify

# what is expected to do more harm comes later; whole channels go before the rest is looked at
FAMILIES: Final = ("bf16", "int8 weights", "int8", "int4 weights", "sparse", "pruned")
LEVELS: Final = (0.5, 0.75, 0.9)  # shares of zeros that are tried
PATTERNS: Final = ("block 1x16", "unstructured")
GROUP: Final = 32


@dataclass(frozen=True)
class Kind:
    """One way to compute a layer: its family, and for 'sparse' the pattern and the share of zeros (0: those that are there)."""

    family: str
    pattern: str = ""
    ratio: float = 0.0

    @property
    def name(self) -> str:
        """As reports call it."""
        if self.family != "sparse":
            return self.family
        return f"sparse {self.pattern} {self.ratio:.0%}" if self.ratio else "sparse"


FLOATS: Final = Kind("fp32")


def kinds_of(
    families: Iterable[str], patterns: Sequence[str] = PATTERNS[:1], levels: Iterable[float] = LEVELS
) -> tuple[Kind, ...]:
    """The kinds of families, floats first, then as they are expected to do more harm.

    Raises InputError for a family or a pattern that does not exist, and shares of zeros outside (0, 1).
    """
    wanted = set(families) - {FLOATS.family}
    unknown = sorted(wanted - set(FAMILIES), key=str)
    if unknown:
        raise InputError(f"kinds are {', '.join(map(repr, (FLOATS.family, *FAMILIES)))}; there is no {unknown[0]!r}")
    shares = sorted(checked_ratio(r, "a share in sparsities") for r in levels)
    sparse = [Kind("sparse", pattern_of(p).name, r) for p in patterns for r in shares]
    own = [Kind("sparse")] if "sparse" in wanted else []
    return (FLOATS, *own, *(Kind(f) for f in FAMILIES[:-2] if f in wanted), *(sparse if own else ()))


@dataclass
class Builder:
    """Graphs of one model with a kind for each layer.

    source   the model in floats, with the values of its weights
    batches  typical inputs
    method   how ranges are chosen from what was seen of values
    keep     layers that stay as they are
    """

    source: Source
    batches: Sequence[tuple[Array, ...]]
    method: str
    keep: Callable[[str], bool]
    layers: list[Layer] = field(init=False)
    seen: dict[Node, Histogram] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = find_layers(self.source.graph)
        self.layers = found + find_loop_layers(self.source.graph, (x.name for x in found))

    @functools.cached_property
    def smoothings(self) -> list[Smoothing]:
        """What layers in int8 read scaled, as `quantize` does it by itself (smooth.py)."""
        return smoothings(self.source, self.batches) if self.batches else []

    def scales(self, layer: Layer) -> Array | None:
        """The scales of the channels that a layer reads in int8."""
        return next((f.scales for f in self.smoothings if any(x.name == layer.name for x in f.layers)), None)

    def weights(self, layer: Layer) -> Array:
        """The numbers of a layer's weights."""
        return self.source.value(layer.w)

    def owned(self, layer: Layer) -> str:
        """The name of the parameter that a layer's weights are."""
        return str(layer.w.attrs.get("name", ""))

    # ------------------------------------------------------------------------------------------------ one layer

    def refuses(self, layer: Layer, kind: Kind) -> str:
        """Why a layer cannot be of a kind; '' where it can."""
        w = layer.w
        if self.keep(layer.name):
            return "asked to be kept"
        if w.attrs.get("role") != "parameter" or self.owned(layer) not in self.source.values:
            return "its weights are computed from others"
        if layer.node.dtype is not f32 or w.dtype is not f32:
            return f"it computes in {layer.node.dtype}"
        values = self.weights(layer)
        if not np.any(values):
            return "its weights are all zero"
        if kind.family == "int4 weights" and not fits(layer):
            return "weights of 4 bits are for matrix products"
        if kind.family == "bf16" and layer.loop is not None:
            return "it is in a loop"
        if kind.family != "sparse":
            return ""
        if layer.loop is not None:
            return "it is in a loop"
        if layer.inputs is None:
            return "its channels go apart in groups"
        if not kind.ratio:
            matrix = _matrix(layer, values)
            return "" if density(matrix, 1) <= WORTH else f"{1 - density(matrix, 1):.0%} zeros: too few for a sparse kernel"
        misfit = pattern_of(kind.pattern).misfit(w.tensor.static_shape[layer.output[1]], w.tensor.static_shape[layer.inputs[1]])
        return f"{kind.pattern} does not fit: {misfit}" if misfit else ""

    def stored(self, layer: Layer, kind: Kind) -> Array:
        """The numbers that a layer's weights stand for in a kind."""
        w = self.weights(layer)
        if kind.family == "bf16":
            return w.astype(bf16.numpy).astype(w.dtype)
        if kind.family == "int4 weights":
            assert layer.inputs is not None
            axis = layer.inputs[1]
            q, scale = block_weights(w, axis, 4, GROUP)
            return np.asarray(q * np.repeat(scale.astype(np.float32), GROUP, axis).take(range(w.shape[axis]), axis))
        if kind.family in ("int8", "int8 weights"):
            axis = layer.output[1]
            s = self.scales(layer) if kind.family == "int8" else None
            q, scale = quantized_weights(w if s is None else times(w, s, layer), axis)
            near = np.asarray(q * scale.reshape([-1 if k == axis else 1 for k in range(w.ndim)]))
            return near if s is None else times(near, 1 / s, layer)
        if kind.ratio:
            return np.where(self.mask(layer, kind), w, np.zeros((), w.dtype))
        return w

    def mask(self, layer: Layer, kind: Kind) -> Array:
        """Which weights stay."""
        w, view = self.weights(layer), View(layer.output[1], None if layer.inputs is None else layer.inputs[1])
        units = Units.of(pattern_of(kind.pattern), view, w, scores_of(w, "magnitude"))
        return units.mask(units.best(kind.ratio))

    # ------------------------------------------------------------------------------------------------ a graph

    def graph(self, chosen: Mapping[str, Kind]) -> tuple[Graph, dict[str, str]]:
        """The graph where each layer has its kind (floats, where none is given); and the layers that stayed otherwise, with the
        reason."""
        by = {x.name: x for x in self.layers}
        values = dict(self.source.values)
        sparse = {n: k for n, k in chosen.items() if k.family == "sparse"}
        for n, k in sparse.items():
            values[self.owned(by[n])] = self.stored(by[n], k)
        why: dict[str, str] = {}
        g = self.source.graph
        graph = Graph(g.inputs, g.outputs, g.output_names, g.name, (), g.labels, values)
        for family, options in _CODES.items():
            names = {n for n, k in chosen.items() if k.family == family}
            if not names:
                continue
            report = Report()
            own = self.seen if options.calibrated else {}
            batches = self.batches if options.calibrated else ()
            source = Source(graph, dict(graph.weights))
            if options.calibrated:
                source = applied(source, self.smoothings, names)
            plan = Plan(source, replace(options, method=self.method), report, batches, seen=own)
            graph = plan.make(_all_but(names), None).graph(plan.source.values)
            why |= {x.name: x.reason for x in report.layers if x.name in names and x.choice == "float"}
        graph = _bf16(graph, {n for n, k in chosen.items() if k.family == "bf16"})
        for width in sorted({_width(k) for k in sparse.values()}):
            names = {n for n, k in sparse.items() if _width(k) == width}
            graph, choices = sparsify(graph, always=True, layers=names, widths=(width,) if width else WIDTHS)
            why |= {n: choices[n].reason for n in names if n in choices and not choices[n].width}
        return graph, why


def _all_but(names: Collection[str]) -> Callable[[str], bool]:
    return lambda name: name not in names


_CODES: Final[dict[str, Options]] = {
    "int8": Options("int8", "uint8"),
    "int8 weights": Options("int8", None),
    "int4 weights": Options("int4", None, group=GROUP),
}


def _width(kind: Kind) -> int:
    """Columns of the blocks of a kind, 0 where the zeros themselves say."""
    return pattern_of(kind.pattern).outputs if kind.pattern else 0


def _matrix(layer: Layer, w: Array) -> Array:
    assert layer.inputs is not None
    return np.moveaxis(w, layer.output[1], -1).reshape(-1, w.shape[layer.output[1]])


def _bf16(graph: Graph, names: set[str]) -> Graph:
    """The graph where what layers read is rounded to bf16, and their weights are stored so."""
    chosen = {x.node: x for x in find_layers(graph) if x.name in names}
    if not chosen:
        return graph
    values = dict(graph.weights)
    stored: dict[Node, Node] = {}
    for layer in chosen.values():
        name = f"{layer.w.attrs['name']}.bf16"
        values[name] = np.asarray(values[str(layer.w.attrs["name"])]).astype(bf16.numpy)
        stored[layer.node] = input_node(name, TensorType(bf16, layer.w.shape), "parameter")

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node not in chosen:
            return node.replace(inputs)
        return node.replace((rounded(inputs[0]), make("cast", stored[node], dtype=node.dtype)))

    made = graph.map_nodes(rule)
    inputs = tuple(dict.fromkeys((*graph.inputs, *stored.values())))
    return used(Graph(inputs, made.outputs, made.output_names, made.name, (), made.labels, values))


def rounded(x: Node) -> Node:
    """The nearest bf16 of each element, as f32."""
    return make("cast", make("cast", x, dtype=bf16), dtype=x.dtype)
