"""Splits a graph into what depends on weights alone, computed once per set of weights, and what runs on every call.

The *prepare* graph takes parameters and gives prepared values; the run graph takes those as inputs with the role
'prepared'. The cut is put where it pays: a broadcast or a reshape of a weight is no work, so the weight itself (or what
was computed before the movement) crosses the cut, and values that take no input at all (masks, index ranges) stay in the
run graph unless computing them is real work.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.build import input_node
from ..ir.graph import Graph, Label, Node, postorder
from ..ir.graphs import rebuild
from ..ir.op import Trait
from ..ir.ops.structural import GET, INPUT
from ..ir.types import TupleType
from .facts import Facts, derived, weights


@dataclass(frozen=True)
class Split:
    """The two graphs. `prepare` is None if nothing is worth preparing."""

    prepare: Graph | None
    run: Graph


def cut_points(graph: Graph, facts: Facts | None = None, sources: frozenset[Node] | None = None) -> list[Node]:
    """The nodes that the prepare graph computes for the run graph, in topological order: those worth it that depend on
    `sources` alone, the weights of the graph unless others are given."""
    facts = facts or Facts()
    order = graph.nodes()
    fixed = derived(order, weights(graph) if sources is None else sources)
    needed = [i for n in order if n not in fixed for i in n.inputs if i in fixed]
    needed += [o for o in graph.outputs if o in fixed]
    cuts: set[Node] = set()
    seen: set[Node] = set()
    stack = list(dict.fromkeys(needed))
    while stack:
        n = stack.pop()
        if n in seen or not n.inputs:
            continue
        seen.add(n)
        if facts.kind(n) == "view" or facts.replicates(n):
            stack += n.inputs  # no work, or more bytes than before it: prepare what it moves
        elif isinstance(n.type, TupleType):
            raise AssertionError(f"{n!r} is used as a value")
        elif fixed[n] or _is_work(n, facts):
            cuts.add(n)
    return [n for n in order if n in cuts]


def _is_work(node: Node, facts: Facts) -> bool:
    """Whether a value made of constants alone costs more than computing it where it is used."""
    return any(n.inputs and not (n.op.has(Trait.CHEAP) or n.op.has(Trait.MOVEMENT) or n.op is GET) for n in postorder([node]))


def split(graph: Graph) -> tuple[Graph | None, Graph]:
    """(prepare graph or None, run graph). The prepare graph's outputs are named as the inputs that take them.

    The run graph's inputs: those of `graph` that it still needs, data and state always, in order; then the prepared ones.
    """
    result = split_graph(graph)
    return result.prepare, result.run


def split_graph(graph: Graph, facts: Facts | None = None) -> Split:
    """`split`, as a record."""
    cuts = cut_points(graph, facts)
    if not cuts:
        return Split(None, graph)
    taken = {i.attrs["name"] for i in graph.inputs}
    prepared: dict[Node, Node] = {}
    for n in cuts:
        name = _name(n, len(prepared), taken)
        taken.add(name)
        prepared[n] = input_node(name, n.tensor, "prepared")
    outputs = rebuild(graph.outputs, prepared)
    used = {n for n in postorder(outputs) if not n.inputs}
    updated = {i for _, i in graph.aliases}
    kept = [i for k, i in enumerate(graph.inputs) if i in used or i.attrs["role"] in ("data", "state") or k in updated]
    position = {i: k for k, i in enumerate(kept)}
    aliases = tuple((o, position[graph.inputs[i]]) for o, i in graph.aliases)
    labels = _labels(graph, outputs, prepared)
    run = Graph((*kept, *prepared.values()), outputs, graph.output_names, graph.name, aliases, labels)
    reached = set(postorder(cuts))
    sources = tuple(i for i in graph.inputs if i in reached)
    names = tuple(p.attrs["name"] for p in prepared.values())
    prepare = Graph(sources, tuple(cuts), names, f"{graph.name}_prepare", (), graph.labels)
    return Split(prepare, run)


def _labels(graph: Graph, outputs: tuple[Node, ...], prepared: dict[Node, Node]) -> dict[Node, Label]:
    """Labels of nodes that were rebuilt: both graphs are walked side by side, down to what was prepared."""
    labels = dict(graph.labels)
    stack = list(zip(graph.outputs, outputs, strict=True))
    seen: set[Node] = set()
    while stack:
        old, new = stack.pop()
        if new in seen:
            continue
        seen.add(new)
        if old in graph.labels:
            labels.setdefault(new, graph.labels[old])
        if old is not new and old not in prepared:
            stack += zip(old.inputs, new.inputs, strict=True)
    return labels


def _name(node: Node, number: int, taken: set[str]) -> str:
    """A name after the largest weight that the value comes from."""
    sources = [n for n in postorder([node]) if n.op is INPUT]
    largest = max(sources, key=lambda n: n.tensor.nbytes, default=None)
    base = f"{'constant' if largest is None else largest.attrs['name']}.prepared"
    return base if base not in taken else f"{base}{number}"
