"""Bodies of control nodes (loops, branches): which graphs they are, what stays the same in them, and how passes reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..ir.graph import Graph, Label, Node, postorder
from ..ir.lowering import Loop, While
from ..ir.op import Trait
from .labels import finish

BodyRule = Callable[[Graph, frozenset[Node]], Graph]


def has_control(graph: Graph) -> bool:
    """Whether the graph has loops or branches."""
    return any(op.has(Trait.CONTROL) for op in graph.ops)


def bodies(node: Node) -> dict[str, Graph]:
    """The graphs that a control node runs, by attribute name; none for any other node (a fused region is one kernel)."""
    return {k: v for k, v in node.attrs.items() if isinstance(v, Graph)} if node.op.has(Trait.CONTROL) else {}


def invariants(node: Node, body: Graph) -> frozenset[Node]:
    """The inputs of a loop's body that have the same value in every step. A branch runs once: it has none."""
    low = node.op.lower(node)
    if isinstance(low, Loop):
        return frozenset(body.inputs[low.carries + low.sequences :])
    return frozenset(body.inputs[low.carries :]) if isinstance(low, While) else frozenset()


def map_bodies(graph: Graph, rule: BodyRule) -> Graph:
    """The graph with `rule(body, its invariants)` in place of each body; the graph itself if that changes none. Bodies of
    bodies are for the rule."""
    if not has_control(graph):
        return graph
    done: dict[Node, Node] = {i: i for i in graph.inputs}
    seen: dict[tuple[Graph, frozenset[Node]], Graph] = {}
    labels: dict[Node, Label] = dict(graph.labels)
    for node in postorder(graph.outputs):
        if node in done:
            continue
        changed: dict[str, Graph] = {}
        for key, body in bodies(node).items():
            case = (body, invariants(node, body))
            if case not in seen:
                seen[case] = rule(*case)
            if seen[case] is not body:
                changed[key] = seen[case]
        done[node] = new = node.replace(tuple(done[i] for i in node.inputs), **changed)
        if new is not node and node in labels:
            labels.setdefault(new, labels[node])
    return finish(graph, [done[o] for o in graph.outputs], labels)


def nodes_with_runs(graph: Graph, runs: int = 1) -> Iterator[tuple[Node, int]]:
    """Every node of a graph and of the bodies in it, with how often it runs (a loop until a test fails counts as one run)."""
    pending = [(graph, runs)]
    while pending:
        current, times = pending.pop()
        for n in current.nodes():
            yield n, times
            inside = bodies(n)
            if not inside:
                continue
            low = n.op.lower(n)
            length = low.length if isinstance(low, Loop) else 1
            pending += [(body, times * (length if isinstance(length, int) else 1)) for body in inside.values()]


def all_graphs(graph: Graph) -> Iterator[Graph]:
    """The graph, and every body in it."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        if has_control(current):
            pending += [body for n in postorder(current.outputs) for body in bodies(n).values()]
