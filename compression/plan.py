"""What is to be quantised of a model and how: chosen once by calibration, then made a graph for any values of its weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..ir.build import input_node
from ..ir.dtypes import as_dtype, bf16, f16, f32, i8, u8
from ..ir.errors import InputError
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import bind_sizes
from ..ir.op import make
from ..ir.types import TensorType
from ..passes.facts import Facts, derived
from ..passes.insert_quantize import (
    DTYPES,
    Points,
    Quantization,
    dequantized_weights,
    dynamically_quantized,
    exact_readers,
    fake_quantized,
    find_points,
    insert_quantize,
    sources,
)
from ..passes.layers import Layer, find_layers, find_loop_layers
from ..passes.loop_layers import Change, stacked
from ..passes.products import Product, find_products
from ..passes.weight_only import fits
from .bias import corrections
from .blocks import block_nodes, block_weights, codebook_nodes, codebook_weights
from .observe import observe
from .ranges import Histogram, Range, quantized_weights, scale_of
from .report import LayerReport, Report
from .source import Array, Source
from .timing import Measure, Timer

Pair = tuple[Quantization | None, Quantization | None]
HALVES = {"bfloat16": bf16, "float16": f16}
CODEBOOKS = {"codebook8": 8, "codebook4": 4}  # bits of a place
Keep = str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True)
class Options:
    """As the arguments of `quantize`."""

    weights: str | None = "int8"
    activations: str | None = "uint8"
    per_channel: bool = True
    method: str = "minmax"
    percentile: float = 99.99
    bias_correction: bool = False
    group: int = 32
    products: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether what layers read is quantised over ranges that were seen."""
        return self.activations in DTYPES


@dataclass
class Plan:
    """Layers to quantise and to keep, and the scales of the values between them.

    points   values that are quantised, in groups with one scale
    seen     how these were distributed in calibration
    inside   those of the layers to quantise that are in bodies of loops, and how what they read there is quantised
    products products of two activations to quantise, and how their operands are that a loop's body computes
    """

    source: Source
    options: Options
    report: Report
    batches: Sequence[tuple[Array, ...]]
    chosen: list[Layer] = field(default_factory=list)
    kept: list[Layer] = field(default_factory=list)
    points: Points = field(default_factory=lambda: Points(()))
    seen: dict[Node, Histogram] = field(default_factory=dict)
    scales: dict[Node, Quantization] = field(default_factory=dict)
    inside: dict[Layer, Quantization | None] = field(default_factory=dict)
    products: dict[Product, Pair] = field(default_factory=dict)

    def make(self, keep: Keep, measure: Measure | None) -> Plan:
        """Chooses layers, calibrates, and keeps those in floats that are no faster in integers."""
        chosen, kept = _choose(self.source, keep, self.report, self.options.products)
        self.chosen, self.kept = ([x for x in some if x.loop is None] for some in (chosen, kept))
        self.inside = {x: None for x in chosen if x.loop is not None}
        if self.options.products:
            self.products = dict.fromkeys(_products(self.source, keep, self.report), (None, None))
        self._calibrate()
        if measure is not None and self.options.calibrated and self.options.weights is not None:
            timer = Timer(measure, _sizes(self.source.graph, self.batches))
            for layer in list(self.chosen):
                line = self._line(layer)
                reason = timer.slower(layer, self.source.value(layer.w), self.reads(layer), line)
                if reason:
                    line.choice, line.reason = "float", reason
                    self.chosen.remove(layer)
                    self.kept.append(layer)
            for layer, read in list(self.inside.items()):
                line = self._line(layer)
                reason = timer.slower_in_loop(layer, self.source, read, line)
                if reason:
                    line.choice, line.reason = "float", reason
                    del self.inside[layer]
            self._time_products(timer)
            self._calibrate()
        return self

    def _time_products(self, timer: Timer) -> None:
        """Keeps products in floats that are no faster in integers: those of a loop together."""
        for loop in dict.fromkeys(p.loop or p.node for p in self.products):
            together = [p for p in self.products if loop in (p.loop, p.node)]
            of_outer = {o.around: self._outer(o.around) for p in together for o in (p.left, p.right) if o.around is not None}
            changes = {p.node: self._change(p) for p in together} if together[0].loop is not None else {}
            lines = [self._line(p) for p in together]
            reason = timer.slower_product(loop, of_outer, changes, self.source, lines)
            for p, line in zip(together, lines, strict=True):
                if reason:
                    line.choice, line.reason = "float", reason
                    del self.products[p]

    def _outer(self, x: Node) -> Quantization:
        """How a value is quantised that comes to a product from around."""
        fixed = derived([x], frozenset())
        return self.scales[sources(x, Facts(), fixed)[0]]

    def _change(self, product: Product) -> Change:
        """The operands of a product in a loop that its body computes, quantised."""
        of_x, of_w = ((lambda x: x) if q is None else self.quantizer(q) for q in self.products[product])
        return Change(of_x, of_w)

    def _line(self, layer: Layer | Product) -> LayerReport:
        return next(x for x in self.report.layers if x.name == layer.name)

    def _calibrate(self) -> None:
        """The scale of each value: that of the widest range of its group."""
        if not self.options.calibrated:
            return
        outer = [o.around for p in self.products for o in (p.left, p.right) if o.around is not None]
        self.points = find_points(self.source.graph, self.chosen, also=outer)
        steps: dict[Layer | tuple[Product, int], Node] = {x: _in_all_steps(x) for x in self.inside}
        for p in self.products:
            for side, o in enumerate((p.left, p.right)):
                if o.inside is not None and p.loop is not None:
                    steps[p, side] = stacked(p.loop, o.inside)
        missing = [n for n in (*(n for g in self.points.groups for n in g), *steps.values()) if n not in self.seen]
        if missing:
            of_loops = {n: f"what {(x if isinstance(x, Layer) else x[0]).name} reads in the loop" for x, n in steps.items()}
            names = [of_loops.get(n) or _said(self.source.graph, n) for n in missing]
            found = observe(self.source.graph, self.source.values, missing, names, self.batches)
            self.seen |= dict(zip(missing, found, strict=True))
        self.scales = {}
        right_sides = [p.right.around for p in self.products if p.right.around is not None]
        around_zero = {s for x in right_sides for s in sources(x, Facts(), derived([x], frozenset()))}
        for g in self.points.groups:
            self.scales |= dict.fromkeys(g, self._over(g, not around_zero.isdisjoint(g)))
        self.inside = {x: self._over([steps[x]]) for x in self.inside}
        for p in self.products:
            left, right = (self._over([steps[p, k]], k == 1) if (p, k) in steps else None for k in (0, 1))
            self.products[p] = (left, right)

    def _over(self, nodes: Sequence[Node], around_zero: bool = False) -> Quantization:
        """How values that share a scale are quantised: in i8 around 0 if they must be."""
        o = self.options
        signed = o.activations == "int8" or around_zero
        ranges = [self.seen[n].range(o.method, o.percentile, signed) for n in nodes]
        s = scale_of(Range(min(r.low for r in ranges), max(r.high for r in ranges)), "i8" if signed else "u8")
        return Quantization(s.scale, s.zero, i8 if signed else u8)

    def quantizer(self, read: Quantization | None) -> Callable[[Node], Node]:
        """What a layer in a loop reads, quantised as `read` says, or in each run, or as it is."""
        if read is not None:
            return lambda x: fake_quantized(x, read)
        return dynamically_quantized if self.options.activations == "dynamic" else lambda x: x

    def _coded(self, layer: Layer, w: Array, inputs: list[Node], numbers: dict[str, Array]) -> tuple[Node, Array]:
        """The integers of a layer's weights: the numbers that these stand for, as a node and as an array."""
        line, o = self._line(layer), self.options
        if o.weights in HALVES:
            dtype = HALVES[o.weights]
            with np.errstate(over="ignore"):  # said below
                half = w.astype(dtype.numpy)
            near = half.astype(np.float32)
            if not np.isfinite(near).all():
                raise InputError(f"{layer.name}: weights beyond {dtype}, or NaN or infinite; keep it, or take another dtype")
            node = _added(f"{layer.name}.weight_half", half, inputs, numbers)
            line.bytes_after, line.choice = w.size * dtype.itemsize, str(o.weights)
            return make("cast", node, dtype=f32), near
        if o.weights in CODEBOOKS and fits(layer):
            node, near, line.bytes_after = _in_codebook(layer, w, CODEBOOKS[o.weights], o.group, inputs, numbers)
            line.choice = o.weights
            return node, near
        if o.weights == "int4" and fits(layer):
            node, near, line.bytes_after = _in_blocks(layer, w, o.group, inputs, numbers)
            line.choice = "int4"
            return node, near
        axis = layer.output[1] if o.per_channel else None
        q, scale = quantized_weights(w, axis)
        line.bytes_after = q.nbytes + scale.nbytes
        if o.weights != "int8":
            line.reason = f"weights only, of 8 bits: those of {o.weights} are for matrix products"
        near = q * (scale if axis is None else scale.reshape([-1 if k == axis else 1 for k in range(w.ndim)]))
        return _weight_nodes(layer.name, q, scale, axis, inputs, numbers), near

    def read(self, layer: Layer) -> tuple[Node, ...]:
        """The group of values that a layer reads."""
        if layer.loop is not None:
            return (_in_all_steps(layer),)
        group = self.points.group
        found = [n for n in sources(layer.x, Facts(), derived([layer.x], frozenset())) if n in group]
        return self.points.groups[group[found[0]]] if found else ()

    def reads(self, layer: Layer) -> Quantization | None:
        """How what a layer reads is quantised, None where it is not, or in each run."""
        if layer.loop is not None:
            return self.inside[layer]
        return next((self.scales[n] for n in self.read(layer) if n in self.scales), None)

    def readers_of_floats(self) -> set[Node]:
        """The nodes that read values as they were before quantisation."""
        integers = {x.node for x in self.chosen} | {p.loop or p.node for p in self.products}
        exact = exact_readers(self.source.graph, integers, set(self.scales), Facts())
        return {x.node for x in self.kept} | exact

    def graph(self, values: Mapping[str, Array]) -> Graph:
        """The quantised graph for these values of the weights; the report's lines on weights are theirs."""
        source, o = Source(self.source.graph, dict(values)), self.options
        new_weights: dict[Node, Node] = {}
        errors: dict[Layer, Array] = {}
        numbers = dict(values)
        inputs = list(source.graph.inputs)
        loops: dict[Node, dict[Node, Change]] = {}
        for layer in (*self.chosen, *self.inside):
            line = self._line(layer)
            line.reason = "reads bytes" if o.activations else "weights only"
            if o.activations and o.weights:
                line.reason = "reads and multiplies bytes"
            read = self.reads(layer)
            if read is not None:
                seen = self.seen[self.read(layer)[0]]
                line.scale, line.zero, line.low, line.high = read.scale, read.zero, seen.low, seen.high
            new = layer.w
            if o.weights is not None:
                w = source.value(layer.w)
                if not np.isfinite(w).all():
                    raise InputError(f"{layer.name}: its weights hold NaN or infinite numbers")
                new, near = self._coded(layer, w, inputs, numbers)
                line.weight_error = float(np.sqrt(np.mean((w - near) ** 2) / max(float(np.mean(w * w)), 1e-30)))
                errors[layer] = w - near
                if layer.loop is None:
                    new_weights[layer.node] = new
            if layer.loop is not None:
                held = (
                    (new,) if new is layer.w else tuple(i for i in new.inputs if any("role" in n.attrs for n in postorder([i])))
                )
                loops.setdefault(layer.loop, {})[layer.node] = Change(self.quantizer(read), new, held)
        for p in self.products:
            if p.loop is not None:
                loops.setdefault(p.loop, {})[p.node] = self._change(p)
        shifts: dict[Node, Node] = {}
        if o.bias_correction and errors:
            for layer, mean in corrections(source, [*self.chosen, *self.inside], errors, self.batches).items():
                name = f"{layer.name}.correction"
                if layer.loop is None:
                    shifts[layer.node] = _added(name, mean, inputs, numbers)
                    continue
                thin = [mean.size if d == layer.output[0] else 1 for d in range(len(layer.node.shape))]
                inner = loops[layer.loop]
                inner[layer.node] = replace(inner[layer.node], shift=_added(name, mean.reshape(thin), inputs, numbers))
        dynamic = o.activations == "dynamic"
        floats = self.readers_of_floats()
        made = insert_quantize(source.graph, self.chosen, self.scales, new_weights, floats, shifts, dynamic, loops)
        return used(Graph(tuple(inputs), made.outputs, made.output_names, made.name, (), made.labels, numbers))


def _products(source: Source, keep: Keep, report: Report) -> list[Product]:
    """The products of two activations to quantise, each with a line in the report."""
    wanted, chosen = kept_by(keep), []
    for p in find_products(source.graph, (x.name for x in report.layers)):
        kept = wanted(p.name)
        reason = "asked to be kept" if kept else "multiplies bytes of two activations"
        report.layers.append(LayerReport(p.name, p.node.op.name, "float" if kept else "int8", reason))
        if not kept:
            chosen.append(p)
    return chosen


def _in_all_steps(layer: Layer) -> Node:
    """What a layer in a loop reads in all steps, as a node of the graph around."""
    assert layer.loop is not None
    return stacked(layer.loop, layer.x)


def kept_by(keep: Keep) -> Callable[[str], bool]:
    """Whether a layer's name is one of those to be kept."""
    if callable(keep):
        return keep
    patterns = [keep] if isinstance(keep, str) else list(keep) if isinstance(keep, Iterable) else [None]
    if not all(isinstance(p, str) for p in patterns):
        raise InputError(f"keep is a pattern of names, several of them, or a function of a name, not {keep!r}")
    return lambda name: any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _choose(source: Source, keep: Keep, report: Report, products: bool) -> tuple[list[Layer], list[Layer]]:
    """(layers to quantise, layers that stay float), each with a line in the report."""
    wanted = kept_by(keep)
    chosen: list[Layer] = []
    kept: list[Layer] = []
    layers = find_layers(source.graph)
    layers += find_loop_layers(source.graph, (x.name for x in layers))
    for layer in layers:
        w = layer.w.tensor
        line = LayerReport(layer.name, layer.node.op.name, "int8", "", bytes_before=_bytes(w), bytes_after=_bytes(w))
        if wanted(layer.name):
            line.reason = "asked to be kept"
        elif layer.node.dtype is not f32 or w.dtype is not f32:
            line.reason = f"computes in {layer.node.dtype}"
        elif not np.any(source.value(layer.w)):
            line.reason = "its weights are all zero"
        (kept if line.reason else chosen).append(layer)
        line.choice = "float" if line.reason else "int8"
        report.layers.append(line)
    if not layers:
        report.notes.append("no layer: no contraction of data with weights")
    names = [x.name for x in layers]
    names += [p.name for p in find_products(source.graph, names)] if products else []
    patterns = [] if callable(keep) else [keep] if isinstance(keep, str) else keep
    unknown = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in names)]
    if unknown:
        raise InputError(f"keep: no layer is named {unknown}; there are {names[:20]}")
    return chosen, kept


def _bytes(t: TensorType) -> int:
    return math.prod(t.static_shape) * t.dtype.itemsize


def _sizes(graph: Graph, batches: Sequence[tuple[Array, ...]]) -> dict[str, int]:
    """The sizes of named dimensions in the largest batch."""
    arguments = [i for i in graph.inputs if i.attrs["role"] == "data"]
    largest = max(batches, key=lambda b: sum(a.size for a in b))
    shapes = dict(zip((str(i.attrs["name"]) for i in arguments), (a.shape for a in largest), strict=False))
    return bind_sizes(Graph(tuple(arguments), (), ("",)), shapes) if any(i.tensor.symbols for i in arguments) else {}


def used(graph: Graph) -> Graph:
    """The graph without weights that nothing reads any more."""
    used = {i for n in graph.nodes() for i in n.inputs} | set(graph.outputs)
    inputs = tuple(i for i in graph.inputs if i.attrs["role"] == "data" or i in used)
    names = {str(i.attrs["name"]) for i in inputs}
    kept = {n: v for n, v in graph.weights.items() if n in names}
    return Graph(inputs, graph.outputs, graph.output_names, graph.name, (), graph.labels, kept)


def _weight_nodes(name: str, q: Array, scale: Array, axis: int | None, inputs: list[Node], values: dict[str, Array]) -> Node:
    """Inputs for quantised weights and their scales, and the numbers that these stand for."""
    made: list[Node] = []
    for suffix, array in (("weight_q", q), ("weight_scale", scale)):
        key = _free(f"{name}.{suffix}", inputs)
        node = input_node(key, TensorType(i8 if array is q else f32, array.shape), "parameter")
        inputs.append(node)
        values[key] = array
        made.append(node)
    return dequantized_weights(made[0], made[1], axis)


def _added(name: str, array: Array, inputs: list[Node], values: dict[str, Array]) -> Node:
    """A new parameter with its numbers, under this name or one like it."""
    key = _free(name, inputs)
    node = input_node(key, TensorType(as_dtype(array.dtype), array.shape), "parameter")
    inputs.append(node)
    values[key] = array
    return node


def _in_codebook(
    layer: Layer, w: Array, bits: int, group: int, inputs: list[Node], values: dict[str, Array]
) -> tuple[Node, Array, int]:
    """Weights as places in a table, with a scale for each `group` inputs, or for all with 256 entries: as `_in_blocks`."""
    assert layer.inputs is not None  # `fits` says so
    axis = layer.inputs[1]
    step = group if bits == 4 else w.shape[axis]
    q, table, scale = codebook_weights(w, axis, bits, step)
    node, nbytes = codebook_nodes(layer.name, q, table, scale, axis, step, lambda n, a: _added(n, a, inputs, values))
    spread = np.repeat(scale.astype(np.float32), step, axis).take(range(w.shape[axis]), axis)
    return node, table.astype(np.float32)[q] * spread, nbytes


def _in_blocks(layer: Layer, w: Array, group: int, inputs: list[Node], values: dict[str, Array]) -> tuple[Node, Array, int]:
    """Weights of four bits: their node, the numbers that they stand for, and their bytes."""
    assert layer.inputs is not None  # `fits` says so
    axis = layer.inputs[1]
    q, scale = block_weights(w, axis, 4, group)
    node, nbytes = block_nodes(layer.name, q, scale, axis, 4, group, lambda n, a: _added(n, a, inputs, values))
    spread = np.repeat(scale.astype(np.float32), group, axis).take(range(w.shape[axis]), axis)
    return node, q * spread, nbytes


def _free(name: str, inputs: Sequence[Node]) -> str:
    """A name that no input has yet."""
    taken = {str(i.attrs["name"]) for i in inputs}
    while name in taken:
        name += "_"
    return name


def _said(graph: Graph, node: Node) -> str:
    """A value in words, for messages."""
    if "role" in node.attrs:
        return f"the input {node.attrs['name']!r}"
    label = graph.labels.get(node)
    return f"the result of {label.name} ({node.op.name})" if label is not None and label.name else f"a result of {node.op.name}"
