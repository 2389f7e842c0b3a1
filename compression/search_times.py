"""How long each layer of a model takes, in the model: its kernels are told by the weights that they read.

A layer alone, run again and again, has its weights in the caches and writes what nobody reads. In the model it finds what the
layer before it left, and its epilogue is what the model makes of it; so whole models are timed here, kernel by kernel, each with
all layers of one kind, taking turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from ..driver import build
from ..ir.errors import InputError
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import specialize
from ..passes.facts import derived, weights
from ..passes.layers import Layer
from .source import Array

K = TypeVar("K", bound=Hashable)
Measure = Callable[[Graph], Mapping[str, float]]
ROUNDS: Final = 24  # in which models take turns: many short ones, for a machine changes its pace
USUAL: Final = 0.25  # of the rounds are at most as fast: neighbours only take time
REPEATS: Final = 2  # profiled calls of a model in a round
RACE: Final = 40  # rounds that decide which of two models is the faster one
BURST: Final = 1e-2  # seconds that a model runs in one of them, at least: long enough to find its weights in the caches
WHOLE: Final = ""  # the name of the time of the whole call


@dataclass(frozen=True)
class Race:
    """Milliseconds of two models that took turns, and the median of the ratios of neighbouring rounds.

    ratio   the second's time over the first's
    noise   by how much the first differs from itself, measured in the same rounds
    """

    first_ms: float
    second_ms: float
    ratio: float
    noise: float = 0.0


class Clock:
    """Times models on this machine.

    layers     those whose times are wanted
    arguments  arrays for the models' arguments;  sizes: of the named dimensions
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], arguments: Sequence[Array], sizes: Mapping[str, int]) -> None:
        self.arguments, self.sizes = arguments, sizes
        self.owners = Owners(graph, layers)
        self._made: dict[int, tuple[Graph, Any]] = {}

    def compiled(self, graph: Graph) -> Any:
        """The program of a graph for the sizes that are timed; made once."""
        if id(graph) not in self._made:
            found = specialize(graph, self.sizes) if self.sizes else graph
            exe = build(found, graph.weights)
            exe.profile(*self.arguments, repeats=1)  # its pages are settled: a new program and an old one are equals
            self._made[id(graph)] = graph, exe
        return self._made[id(graph)][1]

    def layers(self, graphs: Mapping[K, Graph], rounds: int = ROUNDS) -> dict[K, dict[str, float]]:
        """Milliseconds of each layer by name, and of all kernels, of each graph: of rounds in which they take turns, at the
        pace that is usual in them, the first quartile."""
        programs = {k: self.compiled(g) for k, g in graphs.items()}
        found: dict[K, list[list[float]]] = {k: [] for k in graphs}
        names: dict[K, list[str]] = {}
        for _ in range(rounds):
            for k, exe in programs.items():
                kernels = exe.profile(*self.arguments, repeats=REPEATS).kernels
                names.setdefault(k, self.owners.of_kernels(kernels, exe.compiled.run.inputs))
                found[k].append([x.milliseconds for x in kernels])
        rows = {k: np.array(v) for k, v in found.items()}
        pace = paces([v.sum(axis=1) for v in rows.values()])
        result: dict[K, dict[str, float]] = {}
        for k in graphs:
            each = np.quantile(rows[k] / pace[:, None], USUAL, axis=0).tolist()
            times = {WHOLE: float(sum(each))}
            for name, ms in zip(names[k], each, strict=True):
                if name != WHOLE:
                    times[name] = times.get(name, 0.0) + ms
            result[k] = times
        return result

    def race(self, first: Graph, second: Graph, rounds: int = RACE) -> Race:
        """Two models, and the first once more, take turns in bursts of calls."""
        calls = [self.compiled(first), self.compiled(second), self.compiled(first)]
        counts = []
        for exe in calls:
            exe(*self.arguments)
            start = time.perf_counter()
            exe(*self.arguments)
            counts.append(max(1, round(BURST / max(time.perf_counter() - start, 1e-7))))
        times: list[list[float]] = [[], [], []]
        for k in range(rounds):
            order = (0, 1, 2) if k % 2 else (2, 1, 0)
            for which in order:
                start = time.perf_counter()
                for _ in range(counts[which]):
                    calls[which](*self.arguments)
                times[which].append((time.perf_counter() - start) / counts[which])
        one, two, again = np.array(times) * 1e3
        noise = abs(float(np.median(again / one)) - 1)
        base = (one + again) / 2
        return Race(float(np.median(base)), float(np.median(two)), float(np.median(two / base)), noise)


def paces(totals: Sequence[Array]) -> Array:
    """How slow the machine was in each round, 1 being usual: from the times of several models in it, [rounds] each.

    Where it is fast in half of the rounds and slow in the others, a median is of one half for one layer and of the other for the
    next; what a round has for all models is taken out first.
    """
    return np.asarray(np.exp(np.mean([np.log(t / np.median(t)) for t in totals], axis=0)))


class Given:
    """Times that a function of the user's gives: milliseconds of the layers of a Graph by name, and of the whole under ''."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def layers(self, graphs: Mapping[K, Graph], rounds: int = 0) -> dict[K, dict[str, float]]:
        """As `Clock.layers`."""
        return {k: self._of(g) for k, g in graphs.items()}

    def race(self, first: Graph, second: Graph, rounds: int = 0) -> Race:
        """As `Clock.race`."""
        one, two = (self._of(g)[WHOLE] for g in (first, second))
        return Race(one, two, two / one)

    def _of(self, graph: Graph) -> dict[str, float]:
        found = dict(self.measure(graph))
        if WHOLE not in found or not all(np.isfinite(t) and t >= 0 for t in found.values()) or not found[WHOLE] > 0:
            raise InputError(f"measure gives the milliseconds of layers by name, and of the whole call under '', not {found}")
        return {n: float(t) for n, t in found.items()}


class Owners:
    """Which layer a kernel belongs to."""

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        self.weights: dict[str, list[str]] = {}
        for x in layers:
            self.weights.setdefault(str(x.w.attrs.get("name", x.name)), []).append(x.name)
        self.others = _in_epilogues(graph, layers)

    def of_kernels(self, kernels: Sequence[Any], inputs: Sequence[Any]) -> list[str]:
        """The layer's name for each kernel ('' where there is none): that of the largest weight that it reads, else that whose
        bias it adds; what reads none comes before the next kernel that does, but the end of Winograd's method."""
        size = {i.name: i.type.nbytes for i in inputs}
        turns: dict[str, int] = {}
        found: list[str | None] = []
        for k in kernels:
            name = None
            for w in sorted(k.weights, key=lambda w: -size.get(w, 0)):
                base = self._parameter(w)
                if base is not None:
                    names = self.weights[base]
                    turn = turns[base] = turns.get(base, -1) + 1
                    name = names[turn % len(names)]
                    break
            if name is None:
                name = next((self.others[b] for w in k.weights if (b := w.partition(".prepared")[0]) in self.others), None)
            found.append(name)
        for at, k in enumerate(kernels):  # "winograd_output": the sums of the contraction before it
            if found[at] is None and at and any("winograd_output" in n for n in k.nodes):
                found[at] = found[at - 1]
        after: str | None = None
        for at in range(len(found) - 1, -1, -1):
            after = found[at] = found[at] or after
        return [n or WHOLE for n in found]

    def _parameter(self, name: str) -> str | None:
        """The parameter of a layer that a parameter of a compressed model was made of."""
        name = name.partition(".prepared")[0]
        while name:
            if name in self.weights:
                return name
            if f"{name}.weight" in self.weights:  # NAME.weight_q of NAME.weight
                return f"{name}.weight"
            name = name.rpartition(".")[0]
        return None


def _in_epilogues(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """The vectors that are added to layers' results, or scale them, with the layers' names."""
    fixed, users = derived(graph.nodes(), weights(graph)), graph.users()
    found: dict[str, str] = {}
    for layer in layers:
        node: Node | None = layer.node
        while node is not None:
            after = [u for u in users.get(node, []) if len(u.inputs) == 2 and any(i in fixed for i in u.inputs)]
            node = after[0] if len(after) == 1 and len(users[node]) == 1 and after[0] is not layer.node else None
            if node is not None:
                others = [i for i in node.inputs if i in fixed]
                named = [n for n in postorder(others) if n.attrs.get("role") == "parameter"]
                found |= {str(n.attrs["name"]): layer.name for n in named if str(n.attrs["name"]) not in found}
    return found
