"""What a metric says of a model over data, and of models that differ from it in single layers.

One program, the probe, stands for all mixtures of kinds: each layer reads its weights from an input of its own, and what it reads
is rounded or not as another input says. So a question to the metric costs a run over the data, and no compilation. Weights are
those of the compressed model; what the probe leaves out is how the compiled integers round sums and residuals. Its answers
order the choices; the model that is made of them is judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..driver import build
from ..ir.build import constant, input_node
from ..ir.dtypes import i32
from ..ir.errors import InputError
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.types import TensorType
from ..passes.insert_quantize import fake_quantized
from ..passes.layers import Layer, along
from .plan import Options, Plan
from .report import Report
from .search_kinds import FLOATS, Builder, Kind, rounded
from .smooth import applied
from .source import Array

Outputs = tuple[Array, ...]
METRICS: Final = ("accuracy", "agreement", "cosine")
_ROUNDING: Final = {"int8": 1, "bf16": 2}  # what becomes of what a layer reads


@dataclass
class Judge:
    """A metric over data. `score` is the metric of a program, `distance` how far its results are from the original's; `good` is
    the original's metric.

    batches  tuples of arrays: the model's arguments, then what the metric is given besides results
    count    how many of them are arguments
    metric   a function of results and targets, or a name
    """

    batches: Sequence[tuple[Array, ...]]
    count: int
    metric: str | Callable[..., Any] | None
    original: Outputs = field(init=False, default=())
    name: str = field(init=False, default="")
    good: float = field(init=False, default=0.0)

    @property
    def rows(self) -> int:
        """How many rows the batches have."""
        return sum(_rows(b) for b in self.batches)

    def outputs(self, exe: Callable[..., Any]) -> Outputs:
        """The results of a program over all batches, joined along their first dimension."""
        found: list[list[Array]] = []
        for b in self.batches:
            y = exe(*b[: self.count])
            found.append([np.array(a) for a in (y if isinstance(y, tuple) else (y,))])
        try:
            return tuple(np.concatenate([np.atleast_1d(a) for a in each]) for each in zip(*found, strict=True))
        except ValueError as error:
            raise InputError(f"results of the batches cannot be joined ({error}): give batches of one shape") from None

    @property
    def targets(self) -> Outputs:
        """What batches hold besides arguments."""
        rest = [b[self.count :] for b in self.batches]
        return tuple(np.concatenate([np.atleast_1d(a) for a in each]) for each in zip(*rest, strict=True)) if rest[0] else ()

    def few(self, rows: int) -> Judge:
        """One over the first batches, of so many rows at least; it has to be started."""
        counts = np.cumsum([_rows(b) for b in self.batches])
        return Judge(self.batches[: int(np.searchsorted(counts, rows)) + 1], self.count, self.metric)

    def start(self, exe: Callable[..., Any]) -> float:
        """Takes a program as the original; its metric."""
        self.original = self.outputs(exe)
        if not any(y.dtype.kind in "fV" and y.size for y in self.original):
            raise InputError("the model gives no floats: there is nothing to compare")
        self.name = self._named()
        self.good = self.score(self.original)
        return self.good

    def _named(self) -> str:
        if callable(self.metric):
            return str(getattr(self.metric, "__name__", type(self.metric).__name__))
        y = self.original[0]
        if self.metric is not None:
            if self.metric == "accuracy" and not self.targets:
                raise InputError("metric='accuracy' compares with labels: batches are (inputs, labels)")
            return self.metric
        labels = self.targets[0] if self.targets else None
        scores = y.ndim == 2 and y.shape[1] > 1
        if labels is not None and scores and labels.ndim == 1 and labels.dtype.kind in "iu":
            return "accuracy"
        return "agreement" if scores else "cosine"

    def score(self, outputs: Outputs) -> float:
        """The metric of results; higher is better. Raises InputError where it is no finite number."""
        if callable(self.metric):
            targets = self.targets
            given = (outputs[0] if len(outputs) == 1 else outputs, *targets)
            found = self.metric(*given)
        elif self.name == "accuracy":
            found = np.mean(outputs[0].argmax(-1) == self.targets[0])
        elif self.name == "agreement":
            found = np.mean(outputs[0].argmax(-1) == self.original[0].argmax(-1))
        else:
            found = min(_cosine(a, b) for a, b in zip(outputs, self.original, strict=True))
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise InputError(f"metric {self.name!r} gave {found!r}: a number is expected, higher being better") from None
        if not math.isfinite(value):
            raise InputError(f"metric {self.name!r} gave {value}: a finite number is expected, higher being better")
        return value

    def distance(self, outputs: Outputs) -> float:
        """Root mean square difference from the original's results, relative to these: of the output where it is largest."""
        worst = 0.0
        for a, b in zip(outputs, self.original, strict=True):
            if b.dtype.kind in "fV":
                wide = b.astype(np.float64)
                scale = math.sqrt(float(np.mean(wide * wide))) if b.size else 0.0
                off = math.sqrt(float(np.mean((a.astype(np.float64) - wide) ** 2))) if b.size else 0.0
                worst = max(worst, off / scale if scale > 0 else off)
        return worst


def _rows(batch: tuple[Array, ...]) -> int:
    return len(batch[0]) if batch[0].ndim else 1


def _cosine(a: Array, b: Array) -> float:
    """The mean of the cosines between rows."""
    if a.dtype.kind not in "fV":
        return float(np.mean(a == b)) if a.size else 1.0
    x, y = (v.astype(np.float64).reshape(len(v), -1) for v in (a, b))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    same = np.where(norms > 0, (x * y).sum(1) / np.where(norms > 0, norms, 1), (x == y).all(1))
    return float(same.mean())


class Probe:
    """The program that stands for all mixtures: call it with kinds by layer for the results over the data."""

    def __init__(self, builder: Builder, judge: Judge) -> None:
        self.builder, self.judge = builder, judge
        self.layers = {x.name: x for x in builder.layers if not builder.refuses(x, FLOATS)}
        graph = self._graph()
        self.exe = build(graph, graph.weights)
        self.now = dict.fromkeys(self.layers, FLOATS)
        self.known: dict[tuple[object, ...], tuple[float, float]] = {}

    def __call__(self, chosen: Mapping[str, Kind], judge: Judge | None = None) -> tuple[float, float]:
        """(metric, distance) of a mixture, by the judge or another one."""
        judge = judge or self.judge
        wanted = {n: chosen.get(n, FLOATS) for n in self.layers}
        key = (len(judge.batches), *wanted.items())
        if key not in self.known:
            self._set(wanted)
            outputs = judge.outputs(self.exe)
            self.known[key] = judge.score(outputs), judge.distance(outputs)
        return self.known[key]

    def _set(self, wanted: dict[str, Kind]) -> None:
        """Gives the program the weights and roundings of a mixture."""
        values: dict[str, Array] = {}
        for n in [n for n, k in wanted.items() if k != self.now[n]]:
            layer, k = self.layers[n], wanted[n]
            values[f"{n}.probe"] = self.builder.stored(layer, k) if k != FLOATS else self.builder.weights(layer)
            values[f"{n}.rounding"] = np.array(_ROUNDING.get(k.family, 0), np.int32)
        if values:
            self.exe.set_parameters({n: v for n, v in values.items() if n in self.exe.parameters})
            self.now = wanted

    def with_weights(self, values: Mapping[str, Array], judge: Judge | None = None) -> tuple[float, float]:
        """(metric, distance) of floats with other values of some parameters."""
        judge = judge or self.judge
        self._set(dict.fromkeys(self.layers, FLOATS))
        own = {f"{n}.probe": values[self.builder.owned(x)] for n, x in self.layers.items() if self.builder.owned(x) in values}
        there = self.exe.parameters
        given = {n: v for n, v in {**values, **own}.items() if n in there}
        before = {n: there[n].copy() for n in given}
        try:
            self.exe.set_parameters(given)
            outputs = judge.outputs(self.exe)
        finally:
            self.exe.set_parameters(before)
        return judge.score(outputs), judge.distance(outputs)

    def _graph(self) -> Graph:
        source = self.builder.source
        options = Options("int8", "uint8", method=self.builder.method)
        names = self.layers
        smooth = applied(source, self.builder.smoothings, names)
        plan = Plan(smooth, options, Report(), self.builder.batches, seen=self.builder.seen)
        plan.make(lambda n: n not in names, None)
        reads = {x.name: plan.reads(x) for x in plan.chosen}
        values = dict(source.values)
        inputs = list(source.graph.inputs)
        own: dict[Node, tuple[Layer, Node, Node, Node | None]] = {}
        for n, layer in self.layers.items():
            if layer.loop is not None:
                continue
            w = input_node(f"{n}.probe", layer.w.tensor, "parameter")
            how = input_node(f"{n}.rounding", TensorType(i32, ()), "parameter")
            inputs += [w, how]
            values |= {f"{n}.probe": self.builder.weights(layer), f"{n}.rounding": np.zeros((), np.int32)}
            scales, s = self.builder.scales(layer), None
            if scales is not None:
                s = input_node(f"{n}.scales", TensorType(layer.x.dtype, scales.shape), "parameter")
                inputs.append(s)
                values[f"{n}.scales"] = scales
            own[layer.node] = layer, w, how, s

        def rule(node: Node, given: tuple[Node, ...]) -> Node:
            if node not in own:
                return node.replace(given)
            layer, w, how, s = own[node]
            x = _chosen(given[0], rounded(given[0]), how, _ROUNDING["bf16"])
            read = reads.get(layer.name)
            if read is not None and s is not None and layer.inputs is not None:
                wide = along(s, layer.inputs[0], given[0])
                near = make("mul", fake_quantized(make("div", given[0], wide), read), wide)
                x = _chosen(x, near, how, _ROUNDING["int8"])
            elif read is not None:
                x = _chosen(x, fake_quantized(given[0], read), how, _ROUNDING["int8"])
            return node.replace((x, w))

        g = source.graph.map_nodes(rule)
        return Graph(tuple(inputs), g.outputs, g.output_names, f"{g.name}_probe", (), g.labels, values)


def _chosen(x: Node, other: Node, how: Node, number: int) -> Node:
    """`other` where `how` is a number, else x."""
    asked = make("broadcast_to", make("equal", how, constant(number, i32)), shape=x.shape)
    return make("where", asked, other, x)
