"""Loops that run at the same time, each on one thread: the two directions of a recurrent layer, with their projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ir.cost import Cost, node_cost
from ..ir.graph import Node as GraphNode
from .control import BYTES_PER_NS, FLOPS_PER_NS, Control, join
from .control_chain import KernelControl, Source, chain
from .control_weave import WovenControl, weave
from .groups import Lowered
from .loop_ir import Kernel
from .memory_plan import PlannedStep
from .nests import PARALLEL_NS
from .plan import Node, Step

if TYPE_CHECKING:
    from .assembly import Builder, Group

Value = tuple[GraphNode, int]
Bind = Callable[["Group", Lowered, PlannedStep], tuple[Kernel, tuple[tuple[int, int], ...]]]


def sections(b: Builder, groups: list[Group], bind: Bind) -> list[Group]:
    """Loops of like cost that do not depend on each other become one group, whose parts run at the same time."""

    def loop_ns(g: Group) -> float:
        return g.lowered.independent_ns if isinstance(g.lowered, Control) else 0.0

    def long(g: Group) -> bool:
        return loop_ns(g) > 0 and loop_ns(g) >= PARALLEL_NS

    done = list(groups)
    if sum(map(long, groups)) < min(2, b.threads):
        return done
    k = 0
    while k < len(done):
        first = done[k]
        k += 1
        if not long(first):
            continue
        writer = {r: g for g in done for r in g.results}
        chosen, before = [first], {id(first): _before(b, writer, first)}
        for g in done[k:]:
            alike = long(g) and 0.5 * loop_ns(first) <= loop_ns(g) <= 2 * loop_ns(first)
            if not alike or id(g) in before[id(first)]:
                continue
            mine = _before(b, writer, g)
            if all(id(o) not in mine and id(g) not in before[id(o)] for o in chosen):
                chosen.append(g)
                before[id(g)] = mine
        if b.threads <= len(chosen):
            done, chosen = _chained(b, done, chosen, bind)
            first = chosen[0]
            before |= {id(g): set() for g in chosen}
            k = next(n for n, g in enumerate(done) if g is first) + 1
        if len(chosen) > 1:
            parts = [g.lowered for g in chosen if isinstance(g.lowered, Control)]
            operands, results = [g.operands for g in chosen], [g.results for g in chosen]
            joined = join(parts, [len(o) for o in operands], [len(r) for r in results])
            one = replace(first, operands=sum(operands, ()), results=sum(results, ()), lowered=joined)
            done = [one if g is first else g for g in done if id(g) not in before or g is first]
    return done


def _chained(b: Builder, groups: list[Group], loops: list[Group], bind: Bind) -> tuple[list[Group], list[Group]]:
    """The groups, each of the loops one with the kernels whose results it alone reads, if they have about as much of that."""
    writer = {r: g for g in groups for r in g.results}
    users: dict[int, set[int]] = {}
    for g in groups:
        for v in g.operands:
            for needed in (b.root(v), *b.waits(v)):
                if needed in writer:
                    users.setdefault(id(writer[needed]), set()).add(id(g))
    outside = {b.root((o, 0)) for o in b.graph.outputs}

    def own(loop: Group) -> list[Group]:
        found = {id(g): g for v in loop.operands if (g := writer.get(b.root(v))) is not None and users[id(g)] == {id(loop)}}
        return [
            g
            for g in found.values()
            if not isinstance(g.lowered, Control) and outside.isdisjoint(g.results) and not any(b.waits(v) for v in g.operands)
        ]

    chains = [(*own(loop), loop) for loop in loops]
    costs = [sum(max(c.flops / FLOPS_PER_NS, c.bytes / BYTES_PER_NS) for c in map(_cost, x[:-1])) for x in chains]
    if min(costs) == 0 or max(costs) > 1.1 * min(costs):
        return groups, loops
    made = [_chain(b, x, bind) for x in chains]
    if b.threads == 1 and not any(isinstance(g.lowered, WovenControl) for g in made):
        return groups, loops
    inside = {id(g): one for x, one in zip(chains, made, strict=True) for g in x}
    last = {id(x[-1]) for x in chains}
    return [inside.get(id(g), g) for g in groups if id(g) not in inside or id(g) in last], made


def _chain(b: Builder, members: Sequence[Group], bind: Bind) -> Group:
    """Kernels and the loop that they are computed for as one group."""
    results = tuple(r for g in members for r in g.results)
    operands = tuple(dict.fromkeys(v for g in members for v in g.operands if b.root(v) not in results))
    sources: list[list[Source]] = []
    for g in members:
        roots = [b.root(v) for v in g.operands]
        places = zip(g.operands, roots, strict=True)
        sources.append([(True, results.index(r)) if r in results else (False, operands.index(v)) for v, r in places])
    parts = [g.lowered if isinstance(g.lowered, Control) else _as_part(g, g.lowered, bind) for g in members]
    joined = chain(parts, sources, [len(g.results) for g in members], len(operands))
    for k, g in enumerate(members[:-1]):
        joined = weave(b, k, g, members[-1], joined, bind) or joined
    return replace(members[-1], operands=operands, results=results, lowered=joined)


def _as_part(g: Group, low: Lowered, bind: Bind) -> Control:
    cost = _cost(g)

    def binder(step: PlannedStep) -> Node:
        kernel, views = bind(g, low, step)
        return Step(kernel.name, views)

    return KernelControl(
        low.root.name, low.constants, low.workspace, frozenset(), low.parallel, low.note, cost.flops, cost.bytes,
        tuple(n.op.name for n in g.body.nodes() if n.inputs), binder,
    )  # fmt: skip


def _cost(g: Group) -> Cost:
    return node_cost(g.node)


def _before(b: Builder, writer: Mapping[Value, Group], g: Group) -> set[int]:
    """The groups (by id) that g needs, directly or not."""
    seen: set[int] = set()
    stack = [g]
    while stack:
        for v in stack.pop().operands:
            for needed in (b.root(v), *b.waits(v)):
                found = writer.get(needed)
                if found is not None and id(found) not in seen:
                    seen.add(id(found))
                    stack.append(found)
    return seen
