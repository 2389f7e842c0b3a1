"""Moves out of loops what need not be done in every step.

invariant_motion    what depends on invariants alone is computed once, before the loop (packed weights, a transposed matrix)
batch_products      a contraction of what is known before the loop, such as the input projection x[t] @ w of a recurrent layer,
                    becomes one contraction over all steps: for every t: y[t] = x[t] @ w  ->  y = x @ w
batch_results       a contraction that only stacked results need becomes one contraction after the loop, likewise

Only loops with carries are batched: one without may run its steps at once, and is there to keep what they compute small, as
a loop is that says so (save='inputs').
Every rule leaves fewer contractions, or as many and fewer nodes, in bodies of loops; that is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.batching import batched, contraction_of
from ..ir.build import get
from ..ir.graph import Graph, Label, Node, postorder
from ..ir.graphs import closed, rebuild
from ..ir.lowering import Loop, While
from ..ir.op import Trait, make
from ..ir.types import TupleType
from .bodies import has_control, invariants
from .contract import Context, Pass
from .facts import Facts, derived
from .labels import finish
from .prepare import cut_points
from .rewrite import Miss, RewriteError

Apply = Callable[[Node, Facts], "Sequence[Node] | Miss"]


@dataclass(frozen=True)
class Hoist(Pass):
    """Applies the rules until none applies; `motion` and `batch` say which: what does not change, what does."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    motion: bool = True
    batch: bool = True

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with less in its loops; the graph itself if nothing could be moved."""
        if not has_control(graph):
            return graph
        rules = [*(MOTION if self.motion else ()), *(BATCH if self.batch else ())]
        while (after := _round(graph, rules, ctx)) is not graph:
            if not measure(after, ctx.facts) < measure(graph, ctx.facts):
                raise RewriteError("a rule of the hoist pass left as much in the loops, which would never come to an end")
            graph = after
        return graph


def measure(graph: Graph, facts: Facts) -> tuple[int, int]:
    """Contractions in bodies, then nodes in bodies that compute; each counted once for every level of loops around it."""
    products = nodes = 0
    pending = [(graph, 0)]
    while pending:
        current, depth = pending.pop()
        for n in postorder(current.outputs):
            products += depth * (contraction_of(n) is not None)
            nodes += depth * bool(n.inputs)
            if n.op.has(Trait.CONTROL):
                loop = isinstance(n.op.lower(n), Loop | While)
                pending += [(v, depth + loop) for v in n.attrs.values() if isinstance(v, Graph)]
    return products, nodes


def _round(graph: Graph, rules: Sequence[Apply], ctx: Context) -> Graph:
    """One walk: at most one rule for each loop."""
    done: dict[Node, Node] = {i: i for i in graph.inputs}
    parts: dict[Node, Sequence[Node]] = {}
    labels: dict[Node, Label] = dict(graph.labels)
    for node in postorder(graph.outputs):
        if node in done:
            continue
        if node.inputs and node.inputs[0] in parts:
            done[node] = parts[node.inputs[0]][node.attrs["index"]]
        else:
            done[node] = new = node.replace(tuple(done[i] for i in node.inputs))
            if new.op.has(Trait.CONTROL) and (found := _apply(new, rules, ctx)) is not None:
                parts[node] = found
                loops = {p.inputs[0] for p in found if p.inputs and p.inputs[0].op is node.op}
                for loop in loops & ({*loops} if node in labels else set()):
                    labels.setdefault(loop, labels[node])
        if node in labels:
            labels.setdefault(done[node], labels[node])
    return finish(graph, [done[o] for o in graph.outputs], labels)


def _apply(node: Node, rules: Sequence[Apply], ctx: Context) -> Sequence[Node] | None:
    for rule in rules:
        found = rule(node, ctx.facts)
        if not isinstance(found, Miss):
            return found if ctx.spend(rule.__name__, node) else None
    return None


def _parts(node: Node) -> list[Node]:
    assert isinstance(node.type, TupleType)
    return [get(node, k) for k in range(len(node.type.items))]


def invariant_motion(node: Node, facts: Facts) -> Sequence[Node] | Miss:
    """loop(..., w; f(w)) -> loop(..., v; v) with v = f(w): nodes of the body that depend on invariants alone are operands."""
    low = node.op.lower(node)
    if not isinstance(low, Loop | While):
        return Miss("not a loop", node)
    graphs = {k: v for k, v in node.attrs.items() if isinstance(v, Graph)}
    given = dict(zip(low.body.inputs, node.inputs, strict=True))
    cuts: dict[Node, None] = {}
    for body in graphs.values():
        cuts |= dict.fromkeys(cut_points(body, facts, invariants(node, body)))
    if not cuts:
        return Miss("nothing in the body depends on invariants alone", node)
    outside = rebuild(cuts, given)
    inside = [make("input", name=f"moved{k}", role="data", dtype=c.dtype, shape=c.shape) for k, c in enumerate(cuts)]
    moved = dict(zip(cuts, inside, strict=True))
    outputs = {k: rebuild(body.outputs, moved) for k, body in graphs.items()}
    reached = set(postorder([o for new in outputs.values() for o in new]))
    first = low.carries + (low.sequences if isinstance(low, Loop) else 0)
    keep = [k for k, i in enumerate(low.body.inputs) if k < first or i in reached]
    inputs = [*(low.body.inputs[k] for k in keep), *inside]
    attrs = {k: closed(inputs, outputs[k], body.name, _carried(body, moved)) for k, body in graphs.items()}
    return _parts(make(node.op, *(node.inputs[k] for k in keep), *outside, **{**node.attrs, **attrs}))


def _carried(body: Graph, moved: Mapping[Node, Node]) -> dict[Node, Label]:
    """The labels of a body, also for the nodes above what was moved out of it."""
    labels = dict(body.labels)
    done: dict[Node, Node] = dict(moved)
    for n in postorder(body.outputs):
        if n not in done:
            done[n] = n.replace(tuple(done[i] for i in n.inputs))
            if n in labels:
                labels.setdefault(done[n], labels[n])
    return labels


class _Lift:
    """Values of the body for all steps at once, computed around the loop from `leaves`."""

    def __init__(self, node: Node, low: Loop, leaves: Mapping[Node, Node]) -> None:
        self.low = low
        self.leaves = leaves  # nodes of the body -> their stacks
        self.given = dict(zip(low.body.inputs, node.inputs, strict=True))
        self.same = derived(postorder(low.body.outputs), invariants(node, low.body))
        self.done: dict[Node, tuple[Node, bool] | None] = {}

    def __call__(self, root: Node) -> Node | None:
        """The stack of a node's values; None where a node on the way has no rule or is no leaf."""
        found = self._value(root)
        return found[0] if found is not None and found[1] else None

    def _value(self, root: Node) -> tuple[Node, bool] | None:
        stack = [root]
        while stack:
            n = stack[-1]
            if n in self.done:
                stack.pop()
            elif n in self.leaves:
                self.done[n] = (self.leaves[n], True)
            elif n in self.same or not n.inputs:
                self.done[n] = (rebuild([n], self.given)[0], False) if n in self.same else None
            elif missing := [i for i in n.inputs if i not in self.done]:
                stack += missing
            else:
                operands = [o for i in n.inputs if (o := self.done[i]) is not None]
                made = batched(n, operands, self.low.length) if len(operands) == len(n.inputs) else None
                self.done[n] = None if made is None else (made, True)
        return self.done[root]


def batch_products(node: Node, facts: Facts) -> Sequence[Node] | Miss:
    """scan(xs; f(x @ w)) -> scan(xs @ w; f(y)): one contraction over all steps, for what depends on no carry."""
    low = node.op.lower(node)
    if not isinstance(low, Loop) or not low.carries or low.small:
        return Miss("not a loop with carries, or one that is to keep memory small", node)
    body = low.body
    sequences = body.inputs[low.carries : low.carries + low.sequences]
    lift = _Lift(node, low, {i: node.inputs[low.carries + k] for k, i in enumerate(sequences)})
    order = list(postorder(body.outputs))
    free = {n for n in order if contraction_of(n) is not None and lift(n) is not None}
    if not free:
        return Miss("every contraction needs a carry, or something that has no rule for all steps at once", node)
    inside: set[Node] = set()  # what the contractions need
    for n in reversed(order):
        if n in free or n in inside:
            inside |= set(n.inputs)
    users: dict[Node, list[Node]] = {n: [] for n in free}
    for n in order:
        for i in n.inputs:
            if i in users:
                users[i].append(n)
    tops = [n for n in order if n in free and (n in body.outputs or any(u not in inside and u not in free for u in users[n]))]
    tops = tops or [n for n in order if n in free]
    stacks = [s for n in tops if (s := lift(n)) is not None]
    fresh = [make("input", name=f"lifted{k}", role="data", dtype=n.dtype, shape=n.shape) for k, n in enumerate(tops)]
    moved = dict(zip(tops, fresh, strict=True))
    outputs = rebuild(body.outputs, moved)
    reached = set(postorder(outputs))
    last = low.carries + low.sequences
    xs = [k for k in range(low.carries, last) if body.inputs[k] in reached]
    fixed = [k for k in range(last, len(body.inputs)) if body.inputs[k] in reached]
    head = range(low.carries)
    inputs = [*(body.inputs[k] for k in (*head, *xs)), *fresh, *(body.inputs[k] for k in fixed)]
    operands = [*(node.inputs[k] for k in (*head, *xs)), *stacks, *(node.inputs[k] for k in fixed)]
    made = closed(inputs, outputs, body.name, _carried(body, moved))
    return _parts(make(node.op, *operands, **{**node.attrs, "body": made, "sequences": len(xs) + len(fresh)}))


def batch_results(node: Node, facts: Facts) -> Sequence[Node] | Miss:
    """scan(; stack(h @ w)) -> stack(h) @ w with scan(; stack(h)): one contraction after the loop, for what no carry needs."""
    low = node.op.lower(node)
    if not isinstance(low, Loop) or not low.carries or low.small:
        return Miss("not a loop with carries, or one that is to keep memory small", node)
    body = low.body
    kept = set(postorder(body.outputs[: low.carries])) | set(body.inputs)
    stacks = body.outputs[low.carries :]
    moving = {j: o for j, o in enumerate(stacks) if o not in kept and _has_product(o, kept)}
    if not moving:
        return Miss("no stacked result is a contraction that no carry needs", node)
    same = derived(postorder(body.outputs), invariants(node, body))
    xs = dict(zip(body.inputs[low.carries :], node.inputs[low.carries :][: low.sequences], strict=False))
    places = {n: xs.get(n, _stand_in(k, n, low)) for k, n in enumerate(sorted_by(body.outputs, kept)) if n not in same}
    lift = _Lift(node, low, places)
    values = {j: v for j, o in moving.items() if (v := lift(o)) is not None}
    if not values:
        return Miss("something on the way has no rule for all steps at once", node)
    wanted = {s: n for n, s in places.items()}
    leaves = [wanted[s] for s in postorder(values.values()) if s in wanted and wanted[s] not in xs]
    rest = [o for j, o in enumerate(stacks) if j not in values]
    if _bytes(leaves) > 4 * _bytes([stacks[j] for j in values]):
        return Miss("what would be stacked is much larger than the result", node)
    new = list(dict.fromkeys([*rest, *leaves]))
    made = closed(body.inputs, [*body.outputs[: low.carries], *new], body.name, body.labels)
    loop = node.replace(body=made)
    position = {n: low.carries + k for k, n in enumerate(new)}
    after = rebuild(values.values(), {places[n]: get(loop, position[n]) for n in leaves})
    result = [get(loop, k) for k in range(low.carries)]
    found = dict(zip(values, after, strict=True))
    result += [found[j] if j in found else get(loop, position[o]) for j, o in enumerate(stacks)]
    return result


def sorted_by(roots: Iterable[Node], kept: set[Node]) -> list[Node]:
    """The nodes of `kept` with one output that the roots need, in order."""
    return [n for n in postorder(roots) if n in kept and not isinstance(n.type, TupleType)]


def _stand_in(number: int, n: Node, low: Loop) -> Node:
    return make("input", name=f"stack{number}", role="data", dtype=n.dtype, shape=(low.length, *n.shape))


def _has_product(root: Node, kept: set[Node]) -> bool:
    stack, seen = [root], {root}
    while stack:
        n = stack.pop()
        if contraction_of(n) is not None:
            return True
        for i in n.inputs:
            if i not in kept and i not in seen:
                seen.add(i)
                stack.append(i)
    return False


def _bytes(nodes: Iterable[Node]) -> int:
    return sum(n.tensor.nbytes for n in nodes if not n.tensor.symbols)


MOTION: Final[tuple[Apply, ...]] = (invariant_motion,)
BATCH: Final[tuple[Apply, ...]] = (batch_products, batch_results)
