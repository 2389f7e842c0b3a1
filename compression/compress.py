"""`tw.compress`: for each layer of a model the fastest, or smallest, kind of arithmetic and of weights that the metric allows.

    the original's metric and time
    -> times of all layers in each kind, in the model (search_times)
    -> what each kind of each layer does to the metric alone (search_metric)
    -> the cheapest mixture that the metric allows (search)
    -> the model of it, measured against the original: its metric, and its time in turns; back where either fails

Nothing here times or judges: `search_times` and `search_metric` do, and can be given other clocks and metrics.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ..driver import build
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..ir.graphs import bind_sizes
from .plan import Keep, kept_by
from .ranges import METHODS
from .report_compress import Choice, CompressReport, Option
from .search import WORTH, Candidate, Search
from .search_kinds import FAMILIES, FLOATS, LEVELS, PATTERNS, Builder, Kind, kinds_of
from .search_metric import METRICS, Judge, Probe
from .search_prune import pruned_source
from .search_times import WHOLE, Clock, Given, Measure, Race
from .source import Array, Source, as_batches, source_of

Table = Mapping[Kind, Mapping[str, float]]  # milliseconds by kind and layer
OBJECTIVES: Final = ("latency", "size")
EVEN: Final = 1.05  # of the floats' time, that a layer may take where size is what counts; the whole may take none of it
_TRIES: Final = 12  # mixtures that are tried after the search, to give back what it took
_ROWS: Final = 128  # rows of the data by which single layers are judged; mixtures are judged by all


@dataclass
class Compressed:
    """What `tw.compress` made: the graph (the original where nothing held), and the report."""

    graph: Graph
    report: CompressReport

    def __str__(self) -> str:
        return str(self.report)


def compress(
    model: Any,
    data: Any,
    metric: str | Callable[..., Any] | None = None,
    *specs: Any,
    max_drop: float = 0.01,
    objective: str = "latency",
    kinds: str | Iterable[str] | None = None,
    keep: Keep = (),
    batch: int | None = None,
    method: str = "mse",
    patterns: Sequence[str] = PATTERNS[:1],
    sparsities: Sequence[float] = LEVELS,
    measure: Measure | None = None,
    validation: Any = None,
) -> Compressed:
    """The model with the cheapest kind of each layer that the metric allows, by measured times and the measured metric.

    model      a Module, a function of Tensors, a Graph with weights, or a tw.onnx.Model
    data       an iterable of batches: arrays, or tuples of the model's arguments and then targets. Ranges are calibrated on it,
               and the metric is taken over all of it
    metric     a function of the results over all data (a tuple of them, if there are several) and of the targets, if there are
               any, that gives a number, higher being better; or 'accuracy' (targets are class numbers), 'agreement' (the share of
               rows whose largest result is where the original's is), 'cosine' (mean cosine of rows with the original's).
               Default: 'accuracy' with class numbers, else 'agreement' for [N, classes], else 'cosine'
    specs      types of the arguments, as for tw.compile (default: those of the batches, in batches of any size)
    max_drop   how much of the metric may go, as a difference
    objective  'latency', or 'size': bytes of weights, in no more time than the original takes
    kinds      what may be used, of 'bf16', 'int8', 'int8 weights', 'int4 weights', 'sparse', 'pruned' (whole channels go, before
               the rest is searched; not trained again); default: all. Floats always may
    keep       layers that stay float: names, patterns of names ('head*'), or a function of the name
    batch      the size for which time is measured (default: that of the largest batch)
    method     how ranges of integers are chosen, as for `tw.quantize`
    patterns, sparsities   what 'sparse' tries besides the zeros that are there: patterns of `tw.prune`, shares of zeros
    measure    in place of this machine's clock: a function of a Graph that gives the milliseconds of its layers by name, and
               of the whole call under ''
    validation what the result is judged on, in place of the data that the search sees: batches as in `data`, or the share of the
               batches of `data` that is held out for it, between 0 and 1. `max_drop` holds there then

    Of the mixture that is found the metric and the time are measured against the original's, in turns; layers go back to floats
    until both hold. At worst the original comes back, and the report says why.

    Raises InputError for empty data, numbers that are not finite, a metric that gives none, options that do not exist.
    """
    families = _checked(metric, max_drop, objective, kinds, batch, method, measure)
    batches, unseen = _held_out(as_batches(data, "data"), validation)
    own = _arguments(model, batches, specs)
    source = source_of(model, specs, [b[:own] if own else b for b in batches])
    count = sum(i.attrs["role"] == "data" for i in source.graph.inputs)
    _check_batches(source.graph, batches, count)
    _check_batches(source.graph, unseen, count, len(batches[0]), "validation")
    layers_kept = _keeps(keep, source)
    builder = Builder(source, [b[:count] for b in batches], method, layers_kept)
    judge = Judge(batches, count, metric)
    original = build(source.graph, source.graph.weights)
    judge.start(original)
    last = Judge(unseen, count, metric) if unseen else judge
    last.start(original)
    arguments, sizes = _timed(source.graph, batches, count, batch)
    clock = Clock(source.graph, builder.layers, arguments, sizes) if measure is None else Given(measure)
    tried = kinds_of(families, patterns, sparsities)
    settings = {
        "objective": objective, "max_drop": float(max_drop), "metric": judge.name,
        "kinds": [*(k.name for k in tried), *(["pruned"] if "pruned" in families else [])],
        "timed": {n: list(a.shape) for n, a in zip(_names(source.graph), arguments, strict=True)},
        "judged on": f"{last.rows} rows held out, searched on {judge.rows}" if unseen else f"the {judge.rows} rows of the search",
    }  # fmt: skip
    run = _Run(builder, builder, judge, last, clock, objective, float(max_drop), settings)
    made = run.go(tried)
    return run.or_pruned(made, tried) if "pruned" in families else made


def _checked(metric: Any, max_drop: Any, objective: str, kinds: Any, batch: Any, method: str, measure: Any) -> tuple[str, ...]:
    """The families of kinds that may be used. Raises InputError for options that make no sense."""
    if metric is not None and not callable(metric) and metric not in METRICS:
        names = ", ".join(map(repr, METRICS))
        raise InputError(f"metric is a function of results and targets, or one of {names}, not {metric!r}")
    number = isinstance(max_drop, int | float | np.floating) and not isinstance(max_drop, bool)
    if not number or not math.isfinite(max_drop) or max_drop < 0:
        raise InputError(f"max_drop is how much of the metric may go, a number of at least 0, not {max_drop!r}")
    if objective not in OBJECTIVES:
        raise InputError(f"objective is {' or '.join(map(repr, OBJECTIVES))}, not {objective!r}")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise InputError(f"batch is a number of at least 1, not {batch!r}")
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(map(repr, METHODS))}, not {method!r}")
    if measure is not None and not callable(measure):
        raise InputError(f"measure is a function of a Graph that gives milliseconds by layer, not {measure!r}")
    families = FAMILIES if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    kinds_of(families)
    return families


def _arguments(model: Any, batches: Sequence[tuple[Array, ...]], specs: Sequence[Any]) -> int:
    """How many arrays of a batch are arguments, where that has to be known before the model is traced; else 0."""
    if specs or isinstance(model, Graph) or (hasattr(model, "description") and hasattr(model, "graph")):
        return 0
    return min(_parameters(model), len(batches[0]))


def _parameters(model: Any) -> int:
    """How many positional arguments a model has to be given."""
    call = model if inspect.isfunction(model) or inspect.ismethod(model) else model.__call__
    found = list(inspect.signature(call).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in found) and hasattr(model, "forward"):  # a Module that has no __call__ of its own
        found = list(inspect.signature(model.forward).parameters.values())
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in found)


def _held_out(batches: list[tuple[Array, ...]], validation: Any) -> tuple[list[tuple[Array, ...]], list[tuple[Array, ...]]]:
    """Batches for the search, and those that it does not see: a share of them, evenly spread, or others that are given."""
    if validation is None:
        return batches, []
    if isinstance(validation, bool) or not isinstance(validation, int | float | np.floating):
        return batches, as_batches(validation, "validation")
    if not 0 < validation < 1:
        raise InputError(f"validation is batches, or the share of them that is held out, between 0 and 1, not {validation!r}")
    if len(batches) < 2:
        raise InputError(f"validation={validation!r} holds out whole batches, and data is one: give several")
    count = min(max(round(validation * len(batches)), 1), len(batches) - 1)
    held = {int((k + 0.5) * len(batches) / count) for k in range(count)}
    return [b for k, b in enumerate(batches) if k not in held], [b for k, b in enumerate(batches) if k in held]


def _check_batches(
    graph: Graph, batches: Sequence[tuple[Array, ...]], count: int, arrays: int | None = None, what: str = "data"
) -> None:
    """Raises InputError for batches that lack arguments, do not hold as many arrays, or numbers that are not finite."""
    for k, b in enumerate(batches):
        if len(b) < count:
            raise InputError(f"{what}: batch {k} has {len(b)} arrays; {graph.name} takes {count}")
        wanted = len(batches[0]) if arrays is None else arrays
        if len(b) != wanted:
            raise InputError(f"{what}: batch {k} has {len(b)} arrays, batch 0{' of data' if arrays else ''} has {wanted}")
        for a in b[:count]:
            if a.dtype.kind in "fc" and not np.isfinite(a).all():
                raise InputError(f"{what}: batch {k} holds NaN or infinite numbers")


def _keeps(keep: Keep, source: Source) -> Callable[[str], bool]:
    """Whether a layer is to be kept. Raises InputError for a pattern that names none."""
    if not callable(keep):
        patterns = [keep] if isinstance(keep, str) else list(keep)
        names = [x.name for x in Builder(source, [], "minmax", lambda _: False).layers]
        unknown = [p for p in patterns if not fnmatch.filter(names, p)]
        if unknown:
            raise InputError(f"keep: no layer is named {unknown}; there are {names[:20]}")
    return kept_by(keep)


@dataclass(frozen=True)
class _Made:
    """A model of a mixture, as measured: the times of its layers, of the original's and of those of models of one kind each, that
    took turns; its race with the original, its metric, and how far its results are off."""

    graph: Graph
    mixture: Mapping[str, Candidate]
    times: Mapping[object, Mapping[str, float]]
    race: Race
    score: float
    distance: float


@dataclass
class _Run:
    """One search.

    whole    the original;  builder: the same, or what is left of it without some channels
    judge    over the data of the search;  last: over what the result is judged on, the same or data that was held out
    """

    whole: Builder
    builder: Builder
    judge: Judge
    last: Judge
    clock: Clock | Given
    objective: str
    max_drop: float
    settings: dict[str, Any]
    report: CompressReport = field(init=False)

    @property
    def original(self) -> Graph:
        """The model as it was given."""
        return self.whole.source.graph

    def go(self, kinds: Sequence[Kind]) -> Compressed:
        """Searches, and measures what was found."""
        self.report = report = CompressReport(self.original.name, dict(self.settings))
        report.metric_before = report.metric_after = self.last.good
        report.bytes_before = report.bytes_after = _bytes(self.original)
        self.table = dict(self._times(kinds))
        candidates = self._candidates(kinds, self.table)
        floor = self.judge.good - self.max_drop
        search = Search(candidates, lambda m: self.probe({n: c.kind for n, c in m.items()})[0] >= floor)
        mixture, back = search.cheapest()
        mixture = search.improved(mixture, _TRIES)
        return self._settle(search, mixture, back)

    def or_pruned(self, made: Compressed, kinds: Sequence[Kind]) -> Compressed:
        """What was made, or the same search on the model without some channels where that gives a better one."""
        b = self.builder
        cost = self.table[FLOATS] if self.objective == "latency" else _stored(b, b.source.graph)
        found = pruned_source(b, self.probe, self.few, self.judge.good - self.max_drop / 2, cost)
        if found is None:
            made.report.notes.append("no channels can go: the metric misses those of every layer that count least")
            return made
        source, shares = found
        smaller = Builder(source, b.batches, b.method, b.keep)
        other = replace(self, builder=smaller).go(kinds)
        ratio = self.clock.race(made.graph, other.graph).ratio
        if self.objective == "size":
            better = other.report.bytes_after < made.report.bytes_after
        else:
            better = other.report.ratio < 1 and ratio < 1
        said = ", ".join(f"{share:.1%} of {n}" for n, share in shares.items())
        chosen = other if better else made
        chosen.report.notes.append(
            f"a model without some channels ({said}) takes {ratio:.3f} of the time of one with all, and "
            f"{other.report.bytes_after:,} bytes for {made.report.bytes_after:,}"
        )
        return chosen

    # ------------------------------------------------------------------------------------------------ tables

    def _times(self, kinds: Sequence[Kind]) -> dict[Kind, dict[str, float]]:
        """Milliseconds of each layer in each kind that it can be of, all other layers being of that kind too."""
        b = self.builder
        self.why: dict[str, dict[Kind, str]] = {x.name: {} for x in b.layers}
        self.graphs = graphs = {FLOATS: b.source.graph}
        for k in kinds[1:]:
            chosen: dict[str, Kind] = {}
            for x in b.layers:
                reason = b.refuses(x, k)
                if reason:
                    self.why[x.name][k] = reason
                else:
                    chosen[x.name] = k
            if not chosen:
                continue
            graph, why = b.graph(chosen)
            for n, reason in why.items():
                self.why[n][k] = reason
            if len(why) < len(chosen):
                graphs[k] = graph
        table = self.clock.layers(graphs)
        self.units = _units(b, table[FLOATS])
        return table

    def _candidates(self, kinds: Sequence[Kind], table: Table) -> dict[str, list[Candidate]]:
        """What each unit can be, with its cost and its harm."""
        b, report = self.builder, self.report
        self.probe = Probe(b, self.judge)
        by = {x.name: x for x in b.layers}
        self.few = few = self.judge.few(_ROWS)
        few.start(self.probe.exe)
        base, _ = self.probe({}, few)
        found: dict[str, list[Candidate]] = {}
        stored = {k: _stored(b, g) for k, g in self.graphs.items()}
        self.lines: dict[str, Choice] = {}
        for unit, names in self.units.items():
            options: list[Option] = []
            candidates: list[Candidate] = []
            for k in kinds:
                why = "; ".join(dict.fromkeys(self.why[n][k] for n in names if k in self.why[n]))
                if why or k not in table:
                    options.append(Option(k.name, why=why or "no layer can be"))
                    continue
                ms = sum(table[k].get(n, 0.0) for n in names)
                size = sum(stored[k][n] for n in names)
                option = Option(k.name, ms, size)
                options.append(option)
                cost = ms if self.objective == "latency" else float(size)
                if not candidates:
                    candidates.append(Candidate(k, cost, ms, size, 0.0, 0.0))
                    option.drop = option.error = 0.0
                    continue
                slow = ms > candidates[0].ms * (WORTH if self.objective == "latency" else EVEN)
                if slow or any(c.cost <= cost for c in candidates):
                    continue  # no cheaper than what is expected to do less harm
                score, distance = self.probe(dict.fromkeys(names, k), few)
                option.drop, option.error = base - score, distance
                candidates.append(Candidate(k, cost, ms, size, base - score, distance))
            found[unit] = candidates
            for n in names:
                self.lines[n] = Choice(n, by[n].node.op.name, list(by[n].w.tensor.static_shape), options=options)
        report.layers = list(self.lines.values())
        return found

    # ------------------------------------------------------------------------------------------------ the end

    def _settle(self, search: Search, mixture: dict[str, Candidate], back: int) -> Compressed:
        """Makes the model of a mixture and measures it; goes back where it fails, and where a layer is slower than it was if that
        makes the model faster."""
        report, floor = self.report, self.last.good - self.max_drop
        stride = 1
        held: _Made | None = None  # good enough, but for layers that are slower than they were
        while True:
            bare = all(c.kind == FLOATS for c in mixture.values())
            if bare and self.builder is self.whole:
                return self._done(held) if held else self._original("no mixture of kinds was " + self._better())
            graph, _ = self.builder.graph(self._kinds(mixture))
            outputs = self.last.outputs(build(graph, graph.weights))
            score = self.last.score(outputs)
            if score < floor and held is None:
                report.notes.append(
                    f"a model of {_counted(mixture)} had a metric of {score:.6g}, below {floor:.6g}: layers went back to floats"
                )
                if bare:
                    return self._original("without some channels its metric is too low")
                back = min(back + stride, len(search.way))
                stride *= 2
                mixture = {n: max(c, search.after(back)[n], key=lambda x: x.cost) for n, c in mixture.items()}
                continue
            made = self._measured(graph, mixture, score, self.last.distance(outputs))
            told = max(made.race.noise, 0.01)  # what two measurements tell apart
            held_up = score >= floor and made.race.ratio <= (1 - told if self.objective == "latency" else 1 + told)
            if held is not None:
                better = held_up and self.clock.race(held.graph, graph).ratio < 1
                report.notes.append("which made it faster" if better else "which made it no faster: they stayed as they were")
                return self._done(made if better else held)
            slower = self._slower(made, EVEN if held_up else 1.0)
            if held_up and (not slower or self.objective == "size"):
                return self._done(made)
            report.notes.append(
                f"a model of {_counted(mixture)} took {made.race.ratio:.3f} of the original's time: "
                + (f"{', '.join(slower)} went back to floats" if slower else "no layer of it was slower by itself")
            )
            if not slower:
                return self._original(f"compressed, it took {made.race.ratio:.3f} of the original's time", made.race)
            held = made if held_up else None
            mixture = {n: search.fronts[n][-1] if n in slower else c for n, c in mixture.items()}

    def _measured(self, graph: Graph, mixture: Mapping[str, Candidate], score: float, distance: float) -> _Made:
        # the pace of a machine changes: what was predicted is timed once more beside what came of it
        used = {c.kind: self.graphs[c.kind] for c in mixture.values()}
        times = self.clock.layers({"before": self.original, "after": graph, **used})
        self.table |= {k: times[k] for k in used}
        return _Made(graph, mixture, times, self.clock.race(self.original, graph), score, distance)

    def _slower(self, made: _Made, limit: float) -> list[str]:
        """The units that take more than so many times their time in the original."""

        def ms(which: str, unit: str) -> float:
            return sum(made.times[which].get(x, 0.0) for x in self.units[unit])

        return [n for n, c in made.mixture.items() if c.kind != FLOATS and ms("after", n) > limit * ms("before", n)]

    def _better(self) -> str:
        return "faster, and good enough" if self.objective == "latency" else "smaller, as fast, and good enough"

    def _kinds(self, mixture: Mapping[str, Candidate]) -> dict[str, Kind]:
        return {n: c.kind for unit, c in mixture.items() if c.kind != FLOATS for n in self.units[unit]}

    def _done(self, made: _Made) -> Compressed:
        report, graph, mixture, measured, race = self.report, made.graph, made.mixture, made.times, made.race
        stored, before = _stored(self.builder, graph), _stored(self.whole, self.original)
        shapes = {x.name: list(x.w.tensor.static_shape) for x in self.whole.layers}
        for unit, c in mixture.items():
            for n in self.units[unit]:
                line = self.lines[n]
                line.choice, line.reason = c.kind.name, self._reason(line, c)
                if line.shape != shapes[n]:
                    line.choice = "pruned" if c.kind == FLOATS else f"pruned, {c.kind.name}"
                    line.reason = f"{line.shape} of {shapes[n]} weights; {line.reason}"
                line.predicted_ms, line.measured_ms = measured[c.kind].get(n, 0.0), measured["after"].get(n, 0.0)
                line.original_ms = measured["before"].get(n, 0.0)
                line.bytes_before, line.bytes_after = before[n], stored[n]
                line.drop, line.error = c.drop, c.distance
        report.original_ms, report.measured_ms, report.ratio, report.noise = race.first_ms, race.second_ms, race.ratio, race.noise
        rest = measured["before"][WHOLE] - sum(t for n, t in measured["before"].items() if n != WHOLE)
        pace = race.first_ms / measured["before"][WHOLE]  # of the race, beside that of the kernels' times
        report.predicted_ms = (sum(x.predicted_ms for x in report.layers) + rest) * pace
        report.metric_after, report.error, report.bytes_after = made.score, made.distance, _bytes(graph)
        report.break_even = _break_even(self.units, self.table, self.why)
        return Compressed(graph, report)

    def _original(self, why: str, race: Race | None = None) -> Compressed:
        report, stored, floats = self.report, _stored(self.whole, self.original), self.table[FLOATS]
        for n, line in self.lines.items():
            line.choice, line.reason = FLOATS.name, self._reason(line, None)
            line.predicted_ms = line.measured_ms = line.original_ms = floats.get(n, 0.0)
            line.bytes_before = line.bytes_after = stored[n]
        ms = floats[WHOLE] if race is None else race.first_ms
        report.original_ms = report.measured_ms = report.predicted_ms = ms
        report.noise = 0.0 if race is None else race.noise
        report.notes.append(f"the original is the best: {why}")
        report.break_even = _break_even(self.units, self.table, self.why)
        return Compressed(self.original, report)

    def _reason(self, line: Choice, chosen: Candidate | None) -> str:
        """Why a layer is what it is."""
        floats = line.options[0]
        others = [o for o in line.options[1:] if o.ms is not None]
        if chosen is not None and chosen.kind != FLOATS:
            others = [o for o in others if o.name != chosen.kind.name and o.drop is not None]
            worse = [o for o in others if _cost(o, self.objective) < chosen.cost]
            said = f"{chosen.ms:.4f} ms against {floats.ms:.4f}, {chosen.bytes:,} bytes against {floats.bytes:,}"
            if worse:
                o = min(worse, key=lambda o: _cost(o, self.objective))
                said += f"; {o.name} costs {o.drop:.4g} of the metric alone"
            return said
        able = [o for o in others if o.drop is not None]
        if able:
            o = min(able, key=lambda o: _cost(o, self.objective))
            said = f"costs {o.drop:.4g} of the metric alone" if (o.drop or 0) > 0 else "it did not hold among the others"
            return f"{o.name} takes {o.ms:.4f} ms against {floats.ms:.4f}, but {said}"
        if others:
            o = min(others, key=lambda o: o.ms or 0.0)
            better = "faster" if self.objective == "latency" else "smaller and as fast"
            return f"nothing is {better}: {o.name} takes {o.ms:.4f} ms against {floats.ms:.4f}"
        return next((o.why for o in line.options[1:] if o.why), "nothing else was allowed")


def _cost(option: Option, objective: str) -> float:
    return float((option.ms if objective == "latency" else option.bytes) or 0.0)


def _counted(mixture: Mapping[str, Candidate]) -> str:
    names = [c.kind.name for c in mixture.values()]
    return ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names))


def _names(graph: Graph) -> list[str]:
    return [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] == "data"]


def _bytes(graph: Graph) -> int:
    return sum(np.asarray(v).nbytes for v in graph.weights.values())


def _stored(builder: Builder, graph: Graph) -> dict[str, int]:
    """Bytes of the weights of each layer in a graph."""
    sizes = {n: np.asarray(v).nbytes for n, v in graph.weights.items()}
    found = {}
    for x in builder.layers:
        base = x.name
        name = builder.owned(x)
        found[x.name] = sum(s for n, s in sizes.items() if n == name or n.startswith((f"{name}.", f"{base}.weight_")))
    return found


def _timed(
    graph: Graph, batches: Sequence[tuple[Array, ...]], count: int, batch: int | None
) -> tuple[list[Array], dict[str, int]]:
    """Arguments for which time is measured, and the sizes of the named dimensions that these have."""
    largest = max(batches, key=lambda b: sum(a.size for a in b[:count]))
    given = list(largest[:count])
    inputs = [i for i in graph.inputs if i.attrs["role"] == "data"]
    if batch is not None:
        first = {i.shape[0] for i in inputs if i.shape and not isinstance(i.shape[0], int)}
        fixed = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)}
        if not first and fixed != {batch}:
            raise InputError(f"batch={batch}: {graph.name} is for batches of {sorted(fixed)}")
        if len(first) > 1:
            raise InputError(f"batch={batch}: the arguments of {graph.name} have the first dimensions {sorted(map(str, first))}")
        sized = [i.shape and i.shape[0] in first for i in inputs]
        given = [np.resize(a, (batch, *a.shape[1:])) if s else a for a, s in zip(given, sized, strict=True)]
    given = [np.ascontiguousarray(a, i.dtype.numpy) for a, i in zip(given, inputs, strict=True)]
    if not any(i.tensor.symbols for i in inputs):
        return given, {}
    shapes = {str(i.attrs["name"]): a.shape for i, a in zip(inputs, given, strict=True)}
    return given, bind_sizes(Graph(tuple(inputs), (), ("",)), shapes)


def _units(builder: Builder, floats: Mapping[str, float]) -> dict[str, list[str]]:
    """Layers that take one choice together, by the name of the first: those without kernels of their own in the original run in
    the kernels of one before them that reads the same, or else of the one before them."""
    found: dict[str, list[str]] = {}
    reads: dict[Any, str] = {}
    last = ""
    for x in builder.layers:
        owner = x.name if x.name in floats or not last else reads.get(x.x, last)
        found.setdefault(owner, []).append(x.name)
        if owner == x.name:
            reads[x.x] = last = x.name
    return found


def _break_even(
    units: Mapping[str, Sequence[str]], table: Table, why: Mapping[str, Mapping[Kind, str]]
) -> dict[str, dict[str, float | None]]:
    """For each pattern and layer the share of zeros from which on its sparse kernel is as fast as the dense one."""
    found: dict[str, dict[str, float | None]] = {}
    for pattern in dict.fromkeys(k.pattern for k in table if k.family == "sparse" and k.ratio):
        tried = sorted((k for k in table if k.pattern == pattern and k.ratio), key=lambda k: k.ratio)
        for unit in units:
            points = [(k.ratio, table[k][unit]) for k in tried if unit in table[k] and k not in why[unit]]
            if unit in table[FLOATS] and len(points) > 1:
                found.setdefault(pattern, {})[unit] = crossing(points, table[FLOATS][unit])
    return found


def crossing(points: Sequence[tuple[float, float]], dense: float) -> float | None:
    """Where (share of zeros, milliseconds) falls to `dense`: between two points as on a line, before the first on that of the
    first two; None where all are above."""
    at = next((k for k, (_, ms) in enumerate(points) if ms <= dense), None)
    if at is None:
        return None
    (a, slow), (b, fast) = points[max(at, 1) - 1], points[max(at, 1)]
    if slow <= fast:
        return points[at][0]
    return max(0.0, a + (b - a) * (slow - dense) / (slow - fast))
