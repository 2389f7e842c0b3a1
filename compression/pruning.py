"""`tw.prune`: weights that count least become zeros, in a pattern that kernels can use, or whole channels go.

A Module keeps its masks: training steps made of it afterwards leave what is masked at zero, to the bit. A Graph comes back with
its weights masked, and with sparse kernels where these measure faster.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..driver import build
from ..frontend.module import Module
from ..frontend.nn.layers import ConvTranspose1d, ConvTranspose2d, Embedding
from ..frontend.parameter import Parameter
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..passes.layers import find_layers
from .masks import Pattern, Units, View, checked_ratio, pattern_of, scores_of, sparsity, together
from .options import Options, Ratio, names_of
from .report_page import Cell, bars, page
from .sensitivity import ratios_by_sensitivity
from .shrinking import STRUCTURES, shrink_graph, shrink_module
from .source import Array, Source, source_of
from .sparsify import Measure, sparsify

SCOPES = ("layer", "global")


@dataclass
class PrunedLayer:
    """One weight, or one group of channels that go together.

    choice   'masked', 'sparse 1x16', 'channels', 'dense'; reason says why
    zeros    the share that went;  total, kept: weights (or channels)
    dense_ms, sparse_ms  measured on this machine, None where nobody measured
    """

    name: str
    choice: str
    reason: str
    total: int = 0
    kept: int = 0
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def zeros(self) -> float:
        return 1 - self.kept / self.total if self.total else 0.0


@dataclass
class Pruned:
    """What `tw.prune` made.

    model    the Module that was pruned (in place), or None;  graph: the pruned Graph, or None for a Module
    masks    which weights may differ from zero, by name;  layers: what was done to each, and why
    """

    model: Module | None
    graph: Graph | None
    masks: dict[str, Array] = field(default_factory=dict)
    layers: list[PrunedLayer] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that have masks."""
        return sparsity(list(self.masks.values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [{**asdict(x), "zeros": x.zeros} for x in self.layers]
        totals = {"before": self.parameters_before, "after": self.parameters_after}
        return {"layers": layers, "sparsity": self.sparsity, "parameters": totals}

    def save(self, path: str | Path) -> None:
        """Writes the report: JSON, or a page of HTML where the name ends in .html."""
        p = Path(path)
        text = self.html() if p.suffix in (".html", ".htm") else json.dumps(self.as_dict(), indent=1) + "\n"
        p.write_text(text, encoding="utf-8")

    def html(self) -> str:
        """A page that needs nothing else: plots, and a table of the layers."""
        name = self.graph.name if self.graph is not None else type(self.model).__name__
        most = max([x.total for x in self.layers] + [1])
        rows: list[list[Cell]] = []
        for x in self.layers:
            times = "" if x.dense_ms is None or x.sparse_ms is None else f"{x.dense_ms:.3f} / {x.sparse_ms:.3f}"
            rows.append([x.name, x.choice, x.reason, times, (f"{x.total:,} → {x.kept:,}", x.total / most, x.kept / most)])
        timed = [x for x in self.layers if x.dense_ms is not None and x.sparse_ms is not None]
        names = [x.name for x in self.layers]
        plots = [
            bars("What is left of each layer", names, {"kept": [1 - x.zeros for x in self.layers]}, "share"),
            bars("Time of each layer", [x.name for x in timed], {"dense": [x.dense_ms or 0.0 for x in timed],
                 "sparse": [x.sparse_ms or 0.0 for x in timed]}, "ms"),
        ]  # fmt: skip
        said = [f"{self.parameters_before:,} → {self.parameters_after:,} weights that are not zero."]
        heads = ("layer", "choice", "reason", "ms dense / sparse", "weights or channels")
        return page(f"{name}: pruned", said, heads, rows, plots)

    def __str__(self) -> str:
        wide = max([len(x.name) for x in self.layers] + [5])
        lines = [f"{'layer':{wide}}  {'choice':12}  zeros      kept  dense ms  sparse ms  reason"]
        for x in self.layers:
            times = ["" if t is None else f"{t:.3f}" for t in (x.dense_ms, x.sparse_ms)]
            lines.append(
                f"{x.name:{wide}}  {x.choice:12}  {x.zeros:5.1%}  {x.kept:>8,}  {times[0]:>8}  {times[1]:>9}  {x.reason}"
            )
        return "\n".join([*lines, f"{self.parameters_before:,} -> {self.parameters_after:,} weights that are not zero"])


def prune(
    model: Any,
    *specs: Any,
    ratio: Ratio | None = None,
    pattern: str = "unstructured",
    criterion: str = "magnitude",
    scope: str = "layer",
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    gradients: Mapping[str, Array] | None = None,
    metric: Callable[..., float] | None = None,
    kernels: str | None = "auto",
    measure: Measure | None = None,
    seed: int = 0,
) -> Pruned:
    """Prunes a Module (in place), a Graph with weights, a function of Tensors or a tw.onnx.Model, and says what it did.

    specs      types of the arguments, as for tw.compile, where a Module is pruned by channels, or a function is given
    ratio      the share of weights (or channels) that goes, between 0 and 1; or shares by pattern of layer names, where layers
               that no name fits stay as they are. Patterns N:M say it themselves
    pattern    'unstructured'; 'N:M'; 'block AxB' (A inputs by B outputs; 'block 1x16' fills vectors); 'channels', 'heads' or
               'layers', which make the model smaller: its arrays shrink through additions, concatenations, groups and norms
    criterion  'magnitude', 'normalised' (by layer), 'taylor' (takes `gradients`), 'random'
    scope      'layer': the same share of each; 'global': all compete; 'sensitivity': more of those that bear it, by `metric`
    layers, exclude   names of layers, or patterns of names ('blocks.*')
    gradients  dL/dw by the name of the weight, from `gradients_of`
    metric     for scope='sensitivity', higher being better: a function without arguments that judges the Module as it is; for a
               Graph a function of its program, whose weights change between questions
    kernels    for a graph: 'auto' uses sparse kernels where they measure faster, 'always' wherever there are any, None nowhere
    measure    milliseconds of a Graph, in place of a stopwatch on this machine

    Raises InputError for ratios outside (0, 1), names that fit nothing, patterns that do not exist or fit no layer, weights that
    are not finite.
    """
    if scope not in (*SCOPES, "sensitivity"):
        raise InputError(f"scope is 'layer', 'global' or 'sensitivity', not {scope!r}")
    if kernels not in ("auto", "always", None):
        raise InputError(f"kernels is 'auto', 'always' or None, not {kernels!r}")
    options = Options(ratio, criterion, scope, names_of(layers), names_of(exclude) or (), gradients or {}, seed)
    if pattern in STRUCTURES:
        if scope == "sensitivity":
            raise InputError(f"scope='sensitivity' looks at masks; with pattern={pattern!r} scope is 'layer' or 'global'")
        return _shrunk(model, specs, pattern, options)
    kind = pattern_of(pattern)
    if metric is None and scope == "sensitivity":
        raise InputError("scope='sensitivity' needs metric=, a function that judges the model as it is")
    if isinstance(model, Module):
        return _module(model, kind, options, metric)
    return _graph(source_of(model, specs, []), kind, options, metric, kernels, measure)


# --- masks ------------------------------------------------------------------------------------------------------------


def weights_of(module: Module) -> dict[str, tuple[Parameter, View]]:
    """The weights that masks are made for, by path: of two dimensions or more, embeddings excepted."""
    found: dict[str, tuple[Parameter, View]] = {}
    for path, m in module.named_modules():
        if isinstance(m, Embedding):
            continue
        turned = isinstance(m, ConvTranspose1d | ConvTranspose2d)
        for name, p in m.named_children():
            if isinstance(p, Parameter) and not p.is_buffer and p.data.ndim >= 2:
                found[f"{path}.{name}" if path else name] = (p, View(1, 0) if turned else View(0, 1))
    return found


def masks_for(
    weights: Mapping[str, tuple[Array, View]], pattern: Pattern, options: Options
) -> tuple[dict[str, Array], dict[str, str]]:
    """Masks by name, and why others have none."""
    names = options.chosen(list(weights))
    ratios = options.ratios(names, pattern.fixed_ratio)
    why = {n: "left out" if n not in names else "it has no ratio" for n in weights if n not in ratios}
    rng = np.random.default_rng(options.seed)
    units: dict[str, Units] = {}
    for n in ratios:
        w, view = weights[n]
        opened = view.open(w).shape
        misfit = pattern.misfit(opened[0], opened[2])
        if misfit is not None:
            why[n] = f"{pattern.name} does not fit: {misfit}"
            continue
        try:
            units[n] = Units.of(pattern, view, w, scores_of(w, options.criterion, options.gradients.get(n), rng))
        except InputError as error:
            raise InputError(f"{n}: {error}") from None
    if not units:
        raise InputError(
            f"the pattern {pattern.name!r} fits no layer: " + "; ".join(f"{n}: {r}" for n, r in list(why.items())[:5])
        )
    if options.scope == "global" and not pattern.of:
        if isinstance(options.ratio, Mapping):
            raise InputError("scope='global' takes one ratio for all layers together")
        return together(units, checked_ratio(options.ratio)), why
    return {n: u.mask(u.best(ratios[n])) for n, u in units.items()}, why


def _rows(sizes: Mapping[str, int], masks: Mapping[str, Array], why: Mapping[str, str], pattern: Pattern) -> list[PrunedLayer]:
    """What was done to each weight."""
    made: list[PrunedLayer] = []
    for n, size in sizes.items():
        kept = masks.get(n)
        if kept is None:
            made.append(PrunedLayer(n, "dense", why[n], size, size))
        else:
            made.append(PrunedLayer(n, "masked", pattern.name, size, int(kept.sum())))
    return made


def _module(module: Module, pattern: Pattern, options: Options, metric: Callable[[], float] | None) -> Pruned:
    weights = weights_of(module)
    arrays = {n: (p.data, view) for n, (p, view) in weights.items()}
    if metric is not None and options.scope == "sensitivity":

        def put(name: str, values: Array) -> None:
            weights[name][0].data = values

        options = _by_sensitivity(arrays, pattern, options, put, metric)
    before = sum(int(np.count_nonzero(p.data)) for p in module.parameters())
    masks, why = masks_for(arrays, pattern, options)
    for n, m in masks.items():
        weights[n][0].mask = m
    after = sum(int(np.count_nonzero(p.data)) for p in module.parameters())
    made = _rows({n: w.size for n, (w, _) in arrays.items()}, masks, why, pattern)
    return Pruned(module, None, masks, made, before, after)


def _by_sensitivity(
    weights: Mapping[str, tuple[Array, View]],
    pattern: Pattern,
    options: Options,
    put: Callable[[str, Array], None],
    metric: Callable[[], float],
) -> Options:
    """The options with ratios by layer, from what the metric loses where one layer alone is pruned; `put` gives the model other
    numbers of a layer's weights."""
    if pattern.of:
        raise InputError(f"the pattern {pattern.name!r} has one ratio: scope='sensitivity' has nothing to choose")
    names = [n for n in options.chosen(list(weights)) if pattern.misfit(*_sides(*weights[n])) is None]
    good = float(metric())

    def drop(name: str, level: float) -> float:
        w, view = weights[name]
        alone = replace(options, ratio=level, scope="layer", layers=(name,), exclude=())
        try:
            put(name, np.where(masks_for({name: (w, view)}, pattern, alone)[0][name], w, np.zeros((), w.dtype)))
            return good - float(metric())
        finally:
            put(name, w)

    ratios = ratios_by_sensitivity({n: weights[n][0].size for n in names}, drop, checked_ratio(options.ratio))
    return replace(options, scope="layer", ratio=ratios)


def _sides(w: Array, view: View) -> tuple[int, int]:
    opened = view.open(w).shape
    return opened[0], opened[2]


def _graph(
    source: Source,
    pattern: Pattern,
    options: Options,
    metric: Callable[..., float] | None,
    kernels: str | None,
    measure: Measure | None,
) -> Pruned:
    weights: dict[str, tuple[Array, View]] = {}
    where: dict[str, str] = {}
    for layer in find_layers(source.graph):
        name = str(layer.w.attrs.get("name", ""))
        if name in source.values:
            weights[layer.name] = (source.values[name], View(layer.output[1], None if layer.inputs is None else layer.inputs[1]))
            where[layer.name] = name
    if not weights:
        raise InputError(f"{source.graph.name}: there are no layers with weights")
    named = {**options.gradients, **{k: options.gradients[n] for k, n in where.items() if n in options.gradients}}
    options = replace(options, gradients=named)
    if metric is not None and options.scope == "sensitivity":
        exe = build(source.graph, source.values)
        options = _by_sensitivity(
            weights, pattern, options, lambda n, w: exe.set_parameters({where[n]: w}), functools.partial(metric, exe)
        )
    masks, why = masks_for(weights, pattern, options)
    values = dict(source.values)
    before = sum(int(np.count_nonzero(v)) for v in values.values())
    for n, m in masks.items():
        values[where[n]] = np.where(m, values[where[n]], np.zeros((), values[where[n]].dtype))
    after = sum(int(np.count_nonzero(v)) for v in values.values())
    g = source.graph
    graph = Graph(g.inputs, g.outputs, g.output_names, g.name, g.aliases, g.labels, values)
    made = _rows({n: w.size for n, (w, _) in weights.items()}, masks, why, pattern)
    if kernels is not None:
        graph, choices = sparsify(graph, always=kernels == "always", measure=measure)
        for row in made:
            found = choices.get(row.name)
            if found is not None and row.choice == "masked":
                row.choice = f"sparse 1x{found.width}" if found.width else row.choice
                row.reason, row.dense_ms, row.sparse_ms = found.reason, found.dense_ms, found.sparse_ms
    return Pruned(None, graph, {where[n]: m for n, m in masks.items()}, made, before, after)


# --- whole channels -----------------------------------------------------------------------------------------------------


def _shrunk(model: Any, specs: Sequence[Any], structure: str, options: Options) -> Pruned:
    if isinstance(model, Module):
        if not specs:
            raise InputError(f"pattern={structure!r} follows channels through the model: give specs of its arguments as well")
        before = sum(p.data.size for p in model.parameters())
        rows = shrink_module(model, specs, structure, options)
        after = sum(p.data.size for p in model.parameters())
        return Pruned(model, None, {}, [PrunedLayer(*r) for r in rows], before, after)
    source = source_of(model, specs, [])
    before = sum(v.size for v in source.values.values())
    graph, rows = shrink_graph(source.graph, source.values, structure, options)
    after = sum(np.asarray(v).size for v in graph.weights.values())
    return Pruned(None, graph, {}, [PrunedLayer(*r) for r in rows], before, after)
