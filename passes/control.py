"""Loops and branches with nothing superfluous: results nobody uses, operands nobody reads, the same loop twice, known branches.

The gradient pass leaves a forward loop and the same loop with more results (what the backward loop needs): here they become one.
Every rule makes (loops and branches, then their operands and results) fewer, which is checked, so that this comes to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.build import full, get
from ..ir.graph import Graph, Label, Node, postorder
from ..ir.graphs import closed, inline, rebuild
from ..ir.lowering import Branch, Loop, While
from ..ir.op import Trait, make
from ..ir.ops.structural import GET
from ..ir.types import TupleType
from .bodies import all_graphs, has_control, invariants
from .contract import Context, Pass
from .facts import Facts, derived
from .labels import finish
from .rewrite import Miss, RewriteError

Parts = Sequence[Node | None]
"""What stands in for each result of a node; None for one that nobody uses."""
Apply = Callable[[Node, frozenset[int], Facts], Parts | Miss]


@dataclass(frozen=True)
class Control(Pass):
    """Applies every rule until none applies; one unit of fuel for each application."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with tidy loops and branches; the graph itself if they are so already."""
        if not has_control(graph):
            return graph
        changed = False
        while (after := _round(graph, ctx)) is not graph:
            if not measure(after) < measure(graph):
                raise RewriteError("a rule of the control pass made loops no smaller, which would never come to an end")
            graph, changed = after, True
        # A body that lost results may hold loops that now have results without use.
        nested = changed and any(has_control(g) for g in all_graphs(graph) if g is not graph)
        return self.apply(graph, ctx) if nested else graph


def measure(graph: Graph) -> tuple[int, int]:
    """What the rules make smaller: loops and branches at all levels, then their operands and results."""
    found = [n for g in all_graphs(graph) for n in g.nodes() if n.op.has(Trait.CONTROL)]
    return len(found), sum(len(n.inputs) + _results(n) for n in found)


def _results(node: Node) -> int:
    return len(node.type.items) if isinstance(node.type, TupleType) else 1


def _round(graph: Graph, ctx: Context) -> Graph:
    """One walk: at most one rule for each loop and branch."""
    order = list(postorder(graph.outputs))
    used: dict[Node, set[int]] = {n: set() for n in order if n.op.has(Trait.CONTROL)}
    for n in order:
        if n.op is GET and n.inputs[0] in used:
            used[n.inputs[0]].add(n.attrs["index"])
    merged = _merges(used, ctx)
    done: dict[Node, Node] = {i: i for i in graph.inputs}
    parts: dict[Node, Parts] = {}
    labels: dict[Node, Label] = dict(graph.labels)
    for node in order:
        if node in done:
            continue
        if node.op is GET and node.inputs[0] in parts:
            part = parts[node.inputs[0]][node.attrs["index"]]
            if part is None:
                raise RewriteError(f"a rule of the control pass dropped a result of {node.inputs[0]!r} that is used")
            done[node] = part
        elif node in merged:
            whole, indices = merged[node]
            whole = whole.replace(tuple(done[i] for i in whole.inputs))
            parts[node] = [get(whole, k) for k in indices]
            done[node] = whole
        else:
            done[node] = new = node.replace(tuple(done[i] for i in node.inputs))
            if node in used and (found := _apply(new, frozenset(used[node]), ctx)) is not None:
                parts[node] = found
                for stand_in in found:
                    if stand_in is not None and stand_in.op is GET and node in labels:
                        labels.setdefault(stand_in.inputs[0], labels[node])
        if node in labels:
            labels.setdefault(done[node], labels[node])
    return finish(graph, [done[o] for o in graph.outputs], labels)


def _apply(node: Node, used: frozenset[int], ctx: Context) -> Parts | None:
    for rule in RULES:
        found = rule(node, used, ctx.facts)
        if isinstance(found, Miss):
            continue
        return found if ctx.spend(rule.__name__, node) else None
    return None


def _merges(nodes: Iterable[Node], ctx: Context) -> dict[Node, tuple[Node, list[int]]]:
    """Loops over the same operands whose carries are updated alike -> one loop with the stacked results of all."""
    groups: dict[object, list[Node]] = {}
    for n in nodes:
        low = n.op.lower(n)
        if isinstance(low, Loop):
            groups.setdefault(_alike(n, low), []).append(n)
    result: dict[Node, tuple[Node, list[int]]] = {}
    for alike in groups.values():
        if len(alike) < 2 or not ctx.spend("merge_loops", alike[0]):
            continue
        first = alike[0].op.lower(alike[0])
        assert isinstance(first, Loop)
        stacked: dict[Node, int] = {}
        labels: dict[Node, Label] = {}
        for n in alike:
            body: Graph = n.attrs["body"]
            labels |= body.labels
            for o in body.outputs[first.carries :]:
                stacked.setdefault(o, first.carries + len(stacked))
        whole = closed(first.body.inputs, [*first.body.outputs[: first.carries], *stacked], first.body.name, labels)
        node = alike[0].replace(body=whole)
        for n in alike:
            outputs = n.attrs["body"].outputs[first.carries :]
            result[n] = (node, [*range(first.carries), *(stacked[o] for o in outputs)])
    return result


def _alike(node: Node, low: Loop) -> object:
    """What two loops have in common that can be one."""
    updates = low.body.outputs[: low.carries]
    return (node.op, node.inputs, low.body.inputs, updates, low.length, low.carries, low.sequences, low.reverse)


# Taking loops apart and making them again


@dataclass
class _Parts:
    """A loop as lists. `outside` is what was handed in, `inside` the body's input for it, `update` the new carry."""

    outside: list[Node]
    inside: list[Node]
    update: list[Node]
    stacks: list[Node]
    carries: int
    sequences: int

    @staticmethod
    def of(node: Node, low: Loop) -> _Parts:
        outputs = low.body.outputs
        return _Parts(
            list(node.inputs),
            list(low.body.inputs),
            list(outputs[: low.carries]),
            list(outputs[low.carries :]),
            low.carries,
            low.sequences,
        )

    def make(self, node: Node) -> Node:
        """The loop that these lists make, with the other attributes of `node`."""
        body: Graph = node.attrs["body"]
        made = closed(self.inside, [*self.update, *self.stacks], body.name, body.labels)
        return make(node.op, *self.outside, **{**node.attrs, "body": made, "carries": self.carries, "sequences": self.sequences})

    def drop(self, keep: Sequence[bool]) -> None:
        """Leaves out operands; carries among them go with their updates."""
        carries = sum(keep[: self.carries])
        self.sequences = sum(keep[self.carries : self.carries + self.sequences])
        self.update = [u for u, k in zip(self.update, keep, strict=False) if k]
        self.outside = [x for x, k in zip(self.outside, keep, strict=True) if k]
        self.inside = [x for x, k in zip(self.inside, keep, strict=True) if k]
        self.carries = carries

    def put(self, values: dict[Node, Node]) -> None:
        """Puts other nodes in the place of inputs of the body."""
        new = rebuild([*self.update, *self.stacks], values)
        self.update, self.stacks = list(new[: len(self.update)]), list(new[len(self.update) :])


def _reached(roots: Iterable[Node]) -> set[Node]:
    return set(postorder(list(roots)))


def _live_carries(inputs: Sequence[Node], updates: Sequence[Node], roots: Iterable[Node], wanted: Iterable[int]) -> set[int]:
    """The carries that are wanted, or that what is needed reads, step after step."""
    live = set(wanted)
    while True:
        reached = _reached([*roots, *(updates[k] for k in live)])
        grown = live | {k for k in range(len(updates)) if inputs[k] in reached}
        if grown == live:
            return live
        live = grown


# The rules


def dead_results(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A loop or branch with results nobody uses -> one without them. A carry stays as long as another result needs it."""
    low = node.op.lower(node)
    count = _results(node)
    match low:
        case Loop(body, _, carries):
            stacks = [k for k in range(carries, count) if k in used]
            live = _live_carries(
                body.inputs, body.outputs[:carries], [body.outputs[k] for k in stacks], (k for k in used if k < carries)
            )
            keep = [*sorted(live), *stacks]
            if len(keep) == count:
                return Miss("every result is used", node)
            parts = _Parts.of(node, low)
            parts.stacks = [body.outputs[k] for k in stacks]
            parts.drop([k in live or k >= carries for k in range(len(node.inputs))])
            new = parts.make(node)
        case While(test, body, carries):
            keep = sorted(_live_carries(body.inputs, body.outputs, [*test.outputs], used))
            if len(keep) == count:
                return Miss("every result is used", node)
            operands = [k for k in range(len(node.inputs)) if k in keep or k >= carries]
            inside = [body.inputs[k] for k in operands]
            new = make(
                node.op,
                *(node.inputs[k] for k in operands),
                test=closed(inside, test.outputs, test.name, test.labels),
                body=closed(inside, [body.outputs[k] for k in keep], body.name, body.labels),
                carries=len(keep),
            )
        case Branch(then, orelse):
            keep = sorted(used)
            if len(keep) == count:
                return Miss("every result is used", node)
            new = node.replace(
                then=closed(then.inputs, [then.outputs[k] for k in keep], then.name, then.labels),
                orelse=closed(orelse.inputs, [orelse.outputs[k] for k in keep], orelse.name, orelse.labels),
            )
        case _:
            return Miss("neither loop nor branch", node)
    result: list[Node | None] = [None] * count
    for position, k in enumerate(keep):
        result[k] = get(new, position)
    return result


def _all(node: Node) -> list[Node]:
    return [get(node, k) for k in range(_results(node))]


def unused_operands(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A loop or branch that does not read an operand (not a carry) -> one without it; an operand given twice -> given once."""
    low = node.op.lower(node)
    match low:
        case Loop(body, _, carries):
            return _loop_operands(node, low)
        case While(test, body, carries):
            graphs, first = [test, body], carries
        case Branch(then, orelse):
            graphs, first = [then, orelse], 0
        case _:
            return Miss("neither loop nor branch", node)
    lead = len(node.inputs) - len(graphs[0].inputs)  # a predicate
    reached = [_reached(g.outputs) for g in graphs]
    keep: list[int] = []
    same: list[dict[Node, Node]] = [{} for _ in graphs]
    position: dict[Node, int] = {}
    for k in range(len(graphs[0].inputs)):
        operand = node.inputs[lead + k]
        if k >= first and operand in position:
            for g, replaced in zip(graphs, same, strict=True):
                replaced[g.inputs[k]] = g.inputs[position[operand]]
        elif k < first or any(g.inputs[k] in r for g, r in zip(graphs, reached, strict=True)):
            keep.append(k)
            if k >= first:
                position[operand] = k
    if len(keep) == len(graphs[0].inputs):
        return Miss("every operand is read", node)
    names = [k for k, v in node.attrs.items() if isinstance(v, Graph)]
    attrs = {
        name: closed([g.inputs[k] for k in keep], rebuild(g.outputs, replaced), g.name, g.labels)
        for g, replaced in zip(graphs, same, strict=True)
        for name in names
        if node.attrs[name] is g
    }
    return _all(node.replace((*node.inputs[:lead], *(node.inputs[lead + k] for k in keep)), **attrs))


def _loop_operands(node: Node, low: Loop) -> Parts | Miss:
    reached = _reached(low.body.outputs)
    first: dict[tuple[bool, Node], Node] = {}
    same: dict[Node, Node] = {}
    keep: list[bool] = []
    for k, (operand, inner) in enumerate(zip(node.inputs, low.body.inputs, strict=True)):
        if k < low.carries:
            keep.append(True)
            continue
        key = (k < low.carries + low.sequences, operand)
        known = first.get(key)
        if known is not None:
            same[inner] = known
        elif inner in reached:
            first[key] = inner
        keep.append(known is None and inner in reached)
    if all(keep):
        return Miss("every operand is read", node)
    parts = _Parts.of(node, low)
    parts.put(same)
    parts.drop(keep)
    return _all(parts.make(node))


def unchanged_carries(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A carry that every step hands on as it is -> an invariant; its last value is the first."""
    low = node.op.lower(node)
    if not isinstance(low, Loop | While):
        return Miss("not a loop", node)
    body = low.body
    fixed = [k for k in range(low.carries) if body.outputs[k] is body.inputs[k]]
    if not fixed or (isinstance(low, While) and len(fixed) == low.carries):
        return Miss("every carry changes", node)
    moving = [k for k in range(low.carries) if k not in fixed]
    order = [*moving, *range(low.carries, len(node.inputs)), *fixed]
    inside, outside = [body.inputs[k] for k in order], [node.inputs[k] for k in order]
    outputs = [body.outputs[k] for k in (*moving, *range(low.carries, len(body.outputs)))]
    attrs = {**node.attrs, "body": closed(inside, outputs, body.name, body.labels), "carries": len(moving)}
    if isinstance(low, While):
        attrs["test"] = closed(inside, low.test.outputs, low.test.name, low.test.labels)
    result: list[Node | None] = [None] * _results(node)
    for k in fixed:
        result[k] = node.inputs[k]
    if outputs:
        new = make(node.op, *outside, **attrs)
        for position, k in enumerate((*moving, *range(low.carries, len(body.outputs)))):
            result[k] = get(new, position)
    return result


def plain_stacks(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A stacked result that is a sequence as it came in -> that sequence; one that is the same in every step -> its broadcast;
    one that another result is too -> that one."""
    low = node.op.lower(node)
    if not isinstance(low, Loop):
        return Miss("not a loop over sequences", node)
    places = {i: k for k, i in enumerate(low.body.inputs)}
    given = dict(zip(low.body.inputs, node.inputs, strict=True))
    same = derived(postorder(low.body.outputs), invariants(node, low.body))
    parts = _Parts.of(node, low)
    result: list[Node | None] = [None] * _results(node)
    kept: dict[Node, int] = {}
    aliases: dict[int, int] = {}
    for j, o in enumerate(parts.stacks):
        k = places.get(o, -1)
        if o in same:
            (x,) = rebuild([o], given)
            result[low.carries + j] = make("broadcast_to", x, shape=(low.length, *x.shape))
        elif low.carries <= k:
            result[low.carries + j] = node.inputs[k]
        else:
            aliases[j] = kept.setdefault(o, len(kept))
    if len(kept) == len(parts.stacks):
        return Miss("every stacked result is computed in the loop", node)
    parts.stacks = list(kept)
    if parts.carries or parts.stacks:
        new = parts.make(node)
        for k in range(low.carries):
            result[k] = get(new, k)
        for j, position in aliases.items():
            result[low.carries + j] = get(new, low.carries + position)
    return result


def constant_operands(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """An operand of a loop (not a carry) of which every element is one constant -> that constant in the body."""
    low = node.op.lower(node)
    if not isinstance(low, Loop):
        return Miss("not a loop over sequences", node)
    values: dict[Node, Node] = {}
    for k in range(low.carries, len(node.inputs)):
        scalar, inner = facts.uniform(node.inputs[k]), low.body.inputs[k]
        if scalar is not None:
            values[inner] = make("broadcast_to", scalar, shape=inner.shape) if inner.shape else scalar
    if not values:
        return Miss("no operand is a constant", node)
    parts = _Parts.of(node, low)
    parts.put(values)
    parts.drop([i not in values for i in low.body.inputs])
    return _all(parts.make(node))


def few_steps(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A loop of one step -> its body; of none -> the first values of its carries, and empty stacks."""
    low = node.op.lower(node)
    if not isinstance(low, Loop) or low.length not in (0, 1) or not isinstance(low.length, int):
        return Miss("not a loop of at most one step", node)
    assert isinstance(node.type, TupleType)
    if low.length == 0:
        return [*node.inputs[: low.carries], *(full(0, t) for t in node.type.items[low.carries :])]
    last = low.carries + low.sequences
    operands = [make("reshape", x, shape=x.shape[1:]) if low.carries <= k < last else x for k, x in enumerate(node.inputs)]
    results = inline(low.body, operands)
    stacks = [make("reshape", y, shape=(1, *y.shape)) for y in results[low.carries :]]
    return [*results[: low.carries], *stacks]


def known_branch(node: Node, used: frozenset[int], facts: Facts) -> Parts | Miss:
    """A branch on a constant -> the body that it takes."""
    low = node.op.lower(node)
    if not isinstance(low, Branch):
        return Miss("not a branch", node)
    value = facts.value(node.inputs[0])
    if value is None:
        return Miss("the predicate is not known", node.inputs[0])
    return list(inline(low.then if value else low.orelse, node.inputs[1:]))


RULES: Final[tuple[Apply, ...]] = (
    known_branch,
    few_steps,
    dead_results,
    unused_operands,
    unchanged_carries,
    plain_stacks,
    constant_operands,
)
