"""Shrinks a failing graph: delta debugging on nodes (Zeller, Hildebrandt 2002).

drop outputs      keep the output that fails, or make an inner node the only output
cut               a node becomes a fresh input of its type, and what it was computed from is gone
bypass            a node becomes one of its operands of the same type, or the constant one
enter             the body of a loop or branch takes the place of the whole graph
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..ir.build import full, input_node
from ..ir.errors import TensorwrightError
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import rebuild
from ..ir.types import TupleType
from .bodies import all_graphs, bodies
from .contract import Predicate
from .facts import derived, weights


def reduce(graph: Graph, predicate: Predicate, *, hint: Node | None = None, tries: int = 400, seconds: float = 20.0) -> Graph:
    """A small graph for which `predicate` still holds; `graph` itself if it cannot be made smaller.

    `hint` is a node near which the failure is; it saves tries. The predicate is not called more than `tries` times, nor after
    `seconds`; an exception of ours inside it counts as not failing.
    """
    return _Reducer(predicate, tries, seconds).run(graph, hint)


class _Reducer:
    def __init__(self, predicate: Predicate, tries: int, seconds: float) -> None:
        self.predicate, self.tries = predicate, tries
        self.deadline = time.monotonic() + seconds

    def run(self, graph: Graph, hint: Node | None) -> Graph:
        best = graph
        if hint is not None:
            for near in (hint, *_users(graph, hint)):
                smaller = _with_outputs(graph, [near])
                if smaller is not None and self.fails(smaller):
                    best = smaller
                    break
        progress = True
        while progress and self.tries > 0 and time.monotonic() < self.deadline:
            progress = False
            for candidate in self.candidates(best):
                if _size(candidate) < _size(best) and self.fails(candidate):
                    best, progress = candidate, True
                    break
        return best

    def fails(self, graph: Graph) -> bool:
        if self.tries <= 0 or time.monotonic() > self.deadline:
            return False
        self.tries -= 1
        try:
            return self.predicate(graph)
        except (TensorwrightError, ArithmeticError):
            return False

    def candidates(self, graph: Graph) -> Iterator[Graph]:
        """Smaller graphs, the boldest first."""
        if len(graph.outputs) > 1:
            for o in graph.outputs:
                if (g := _with_outputs(graph, [o])) is not None:
                    yield g
        for n in graph.nodes():
            yield from bodies(n).values()
        work = [n for n in graph.nodes() if n.inputs]
        step = len(work) // 2
        while step >= 1:
            for start in range(0, len(work), step):
                if (g := _cut(graph, set(work[start : start + step]))) is not None:
                    yield g
            step //= 2
        for n in work[:-1]:
            if (g := _with_outputs(graph, [n])) is not None:
                yield g
        for n in reversed(work):
            if isinstance(n.type, TupleType):
                continue
            for i in (*n.inputs, full(1, n.tensor)):
                if i.type == n.type and (g := _replace(graph, {n: i})) is not None:
                    yield g


def _size(graph: Graph) -> tuple[int, int, int]:
    """What is made smaller: nodes that compute, in bodies too, then outputs, then all nodes."""
    nodes = [n for g in all_graphs(graph) for n in g.nodes()]
    return sum(1 for n in nodes if n.inputs), len(graph.outputs), len(nodes)


def _users(graph: Graph, node: Node) -> list[Node]:
    return [n for n in graph.nodes() if node in n.inputs]


def _with_outputs(graph: Graph, outputs: list[Node]) -> Graph | None:
    """The graph of some of its nodes, with the inputs that they need and no aliases."""
    if any(isinstance(o.type, TupleType) for o in outputs):
        return None
    used = set(postorder(outputs))
    labels = {n: label for n, label in graph.labels.items() if n in used}
    inputs = [i for i in graph.inputs if i in used]
    inputs += [n for n in postorder(outputs) if n.attrs.get("role") and n not in inputs]
    return Graph(tuple(inputs), tuple(outputs), (), graph.name, (), labels)


def _replace(graph: Graph, replacements: dict[Node, Node]) -> Graph | None:
    outputs = rebuild(graph.outputs, replacements)
    return None if outputs == graph.outputs else _with_outputs(graph, list(outputs))


def _cut(graph: Graph, nodes: set[Node]) -> Graph | None:
    """The graph with fresh inputs for nodes; weights stay weights, so that what a pass may do with them stays the same."""
    fixed = derived(graph.nodes(), weights(graph))
    taken = {i.attrs["name"] for i in graph.inputs}
    replacements: dict[Node, Node] = {}
    for n in graph.nodes():
        if n in nodes and not isinstance(n.type, TupleType):
            name = f"cut{len(replacements)}"
            while name in taken:
                name += "_"
            taken.add(name)
            replacements[n] = input_node(name, n.tensor, "parameter" if fixed.get(n) else "data")
    return _replace(graph, replacements)
