"""Where every value lies, given the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .outputs import State, last_use
from .packing import MANY, Item, pack
from .types import Place, Plan, PlannedStep, aligned

SPARE: Final = 1.25  # how much larger an arena may be for tasks to run at the same time ...
FEW: Final = 1 << 20  # ... or how many bytes


def place_all(s: State, order: list[int], beside: bool) -> Plan:
    """The plan of an order: memory reused in place where a step allows it, the rest packed by lifetime."""
    p = s.problem
    n_out = len(p.outputs)
    alias = dict(p.aliases)
    arena = p.inputs + n_out + p.constants
    last = last_use(s, order)
    fixed: dict[int, Place] = {}
    for i in range(p.inputs):
        fixed[i] = Place(i, 0, p.sizes[i])
    for j in range(p.constants):
        fixed[p.inputs + j] = Place(p.inputs + n_out + j, 0, p.sizes[p.inputs + j])

    def output_place(k: int) -> Place:
        return Place(alias[k] if k in alias else p.inputs + k, 0, p.sizes[p.outputs[k]])

    for v, k in s.direct.items():
        fixed[v] = output_place(k) if v not in s.inside else Place(p.inputs + k, s.inside[v], p.sizes[v])
    item_of: dict[int, Item] = {}
    items: list[Item] = []
    early: dict[int, Item] = {}
    for c in s.copies:
        if c.early and c.source not in early:
            early[c.source] = Item(aligned(p.sizes[c.source]), -1, len(order) + 1)
            items.append(early[c.source])
    shared: dict[int, set[tuple[int, int]]] = {}
    spaces: dict[int, Item] = {}
    for at, t in enumerate(order):
        task = p.tasks[t]
        shared[t] = set()
        taken: set[int] = set()
        for a, b in sorted(task.in_place):
            v, u = task.writes[a], task.reads[b]
            if p.sizes[v] == 0:
                continue
            if v in fixed:
                if u < p.inputs and alias.get(s.direct.get(v, -1), -1) == u:
                    shared[t].add((a, b))
                continue
            dies = u in item_of and last[u] == at and task.reads.count(u) == 1 and u not in taken
            if dies and v not in item_of and aligned(p.sizes[u]) == aligned(p.sizes[v]):
                item_of[v] = item_of[u]
                item_of[v].last = max(item_of[v].last, last[v])
                taken.add(u)
                shared[t].add((a, b))
        for v in task.writes:
            if v not in fixed and v not in item_of and p.sizes[v]:
                item_of[v] = Item(aligned(p.sizes[v]), at, last[v])
                items.append(item_of[v])
        if task.workspace:
            spaces[t] = Item(aligned(task.workspace), at, len(order) + 1 if task.keeps_workspace else at)
            items.append(spaces[t])
    total = pack(items)
    if beside and len(order) <= MANY:
        ends = [item.last for item in items]
        _keep_apart(s, order, item_of, spaces)
        wide = pack(items)
        if wide > max(SPARE * total, total + FEW):
            for item, end in zip(items, ends, strict=True):
                item.last = end
            wide = pack(items)
        total = wide

    def place(v: int) -> Place:
        if p.sizes[v] == 0 and v not in fixed:
            return Place(arena, 0, 0)
        return fixed[v] if v in fixed else Place(arena, item_of[v].offset, p.sizes[v])

    steps: list[PlannedStep] = []
    for source, item in early.items():
        steps.append(_copy_step(source, place(source), Place(arena, item.offset, p.sizes[source])))
    for t in order:
        task = p.tasks[t]
        space = Place(arena, spaces[t].offset, task.workspace) if t in spaces else None
        reads = tuple((v, place(v)) for v in task.reads)
        writes = tuple((v, place(v)) for v in task.writes)
        steps.append(PlannedStep(t, task.name, reads, writes, space, frozenset(shared[t]), t in s.joined))
    for c in s.copies:
        origin = Place(arena, early[c.source].offset, p.sizes[c.source]) if c.early else place(c.source)
        steps.append(_copy_step(c.source, origin, output_place(c.output)))
    return Plan(
        tuple(steps),
        total,
        tuple((v, output_place(k)) for k, v in enumerate(p.outputs)),
        tuple((i, fixed[i]) for i in range(p.inputs)),
        tuple((p.inputs + j, fixed[p.inputs + j]) for j in range(p.constants)),
        arena + 1,
    )


def _keep_apart(s: State, order: Sequence[int], item_of: dict[int, Item], spaces: dict[int, Item]) -> None:
    """Keeps memory until the last task that does not come after all its users by what it reads."""
    at = {t: k for k, t in enumerate(order)}
    before = [0] * len(order)  # for each place in the order, a bit for each place that it comes after
    for k, t in enumerate(order):
        for later in s.edges[t]:
            before[at[later]] |= before[k] | 1 << k
    users: dict[int, set[int]] = {}
    items: dict[int, Item] = {}
    for t, item in spaces.items():
        items[id(item)] = item
        users.setdefault(id(item), set()).add(at[t])
    for v, item in item_of.items():
        items[id(item)] = item
        found = users.setdefault(id(item), set())
        found.update(at[t] for t in s.readers.get(v, ()))
        if v in s.writer:
            found.add(at[s.writer[v]])
    whole = [sum(1 << k for k in users[key]) for key in items]
    for item, mask in zip(items.values(), whole, strict=True):
        if item.last > len(order):
            continue
        for k in range(len(order) - 1, item.last, -1):
            if before[k] & mask != mask:
                item.last = k
                break


def _copy_step(value: int, source: Place, to: Place) -> PlannedStep:
    return PlannedStep(-1, "copy", ((value, source),), ((value, to),))
