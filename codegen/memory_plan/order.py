"""The order of tasks, for little memory."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from ...ir.errors import CompileError
from .outputs import State, last_use
from .types import Task, aligned

LONG: Final = 4000  # tasks from which only the order as given is looked at
CLUSTER: Final = 8  # tasks that may be brought forward together
DEEPEST: Final = 64  # tasks put before one another


def best_order(s: State) -> list[int]:
    """The best of four orders by peak memory, then by how long memory is held: as given, the one that frees most at each step,
    and each of them with tasks first put off and then brought forward."""
    first = _topological(s, None)
    if len(s.problem.tasks) > LONG:
        return first
    found = [first, _topological(s, s.problem.tasks)]
    found += [_brought_forward(s, _put_off(s, order)) for order in found]
    return min(found, key=lambda order: _peak(s, order))


def _topological(s: State, tasks: Sequence[Task] | None) -> list[int]:
    waiting = dict.fromkeys(s.edges, 0)
    for later in s.edges.values():
        for n in later:
            waiting[n] += 1
    uses = {v: len(r) for v, r in s.readers.items()}
    sizes, inputs = s.problem.sizes, s.problem.inputs + s.problem.constants

    def price(t: int) -> int:
        if tasks is None:
            return 0
        made = sum(sizes[v] for v in tasks[t].writes if v not in s.direct)
        freed = sum(sizes[v] for v in set(tasks[t].reads) if v >= inputs and uses.get(v) == 1 and v not in s.direct)
        return made - freed

    ready = [(price(t), t) for t, n in waiting.items() if n == 0]
    heapq.heapify(ready)
    order: list[int] = []
    done: set[int] = set()
    while ready:
        _, t = heapq.heappop(ready)
        if t in done:
            continue  # it was queued again when its price fell
        order.append(t)
        done.add(t)
        for v in set(s.problem.tasks[t].reads):
            uses[v] -= 1
            if uses[v] == 1 and tasks is not None:  # its last reader will free it
                for r in s.readers[v]:
                    if r not in done and waiting[r] == 0:
                        heapq.heappush(ready, (price(r), r))
        for n in sorted(s.edges[t]):
            waiting[n] -= 1
            if waiting[n] == 0:
                heapq.heappush(ready, (price(n), n))
    if len(order) < len(waiting):
        raise CompileError("the steps of the program depend on each other in a circle")
    return order


def _put_off(s: State, order: Sequence[int]) -> list[int]:
    """The order with every task just before the first that needs it, where it makes more than its operands then take for longer.

    So a transform of weights waits for its product, and what is computed a second time for its late reader.
    """
    tasks, held = s.problem.tasks, _held(s)
    kept = s.kept()
    n = len(order)
    # A place is where a task was; or the place of the task that it was put before, and a number below 0. The 0 behind makes a
    # task come after those that were put before it.
    at = {t: k for k, t in enumerate(order)}
    place: dict[int, tuple[int, ...]] = {t: (k,) for t, k in at.items()}

    def when(t: int) -> tuple[int, ...]:
        return (*place[t], 0)

    for t in reversed(order):
        if not s.edges[t]:
            continue
        reader = min(s.edges[t], key=when)
        if place[reader] == (at[t] + 1,) or len(place[reader]) > DEEPEST:
            continue
        longer = 0
        for v in dict.fromkeys(tasks[t].reads):
            if held.get(v) and v not in kept and all(r == t or when(r) < when(reader) for r in s.readers[v]):
                longer += held[v]
        if sum(held[v] for v in tasks[t].writes) > longer:
            place[t] = (*place[reader], at[t] - n)
    return sorted(order, key=when)


def _brought_forward(s: State, order: Sequence[int]) -> list[int]:
    """The order with every task run as soon as it frees more than it makes, together with what must be run for that.

    A weight gradient is the last to read an activation and the gradient that came to it, and a gradient's update is the last to
    read that; but what it needs may have to be made first (a padded copy), so single steps do not show that it pays: up to
    CLUSTER tasks are looked at together.
    """
    tasks, held = s.problem.tasks, _held(s)
    before: dict[int, list[int]] = {t: [] for t in s.edges}
    for t, later in s.edges.items():
        for n in later:
            before[n].append(t)
    at = {t: k for k, t in enumerate(order)}
    left = {v: len(r) for v, r in s.readers.items()}  # readers that have not run
    kept = s.kept()
    done: set[int] = set()
    result: list[int] = []

    def run(t: int) -> None:
        for v in set(tasks[t].reads):
            left[v] -= 1
        done.add(t)
        result.append(t)

    def cluster(t: int) -> list[int] | None:
        """A task and what must run before it, in order; None if that is too much."""
        found, stack = {t}, [t]
        while stack:
            for n in before[stack.pop()]:
                if n not in done and n not in found:
                    found.add(n)
                    if len(found) > CLUSTER:
                        return None
                    stack.append(n)
        return sorted(found, key=at.__getitem__)

    def gain(cluster: Sequence[int]) -> int:
        """Bytes that are free after these tasks and were not before, less those that they leave behind."""
        reads: dict[int, int] = {}
        for t in cluster:
            for v in set(tasks[t].reads):
                reads[v] = reads.get(v, 0) + 1
        made = {v for t in cluster for v in tasks[t].writes}
        freed = sum(held.get(v, 0) for v, n in reads.items() if n == left[v] and v not in kept and v not in made)
        return freed - sum(held[v] for v in made if v in kept or reads.get(v, 0) < left.get(v, 0))

    for t in order:
        if t in done:
            continue
        run(t)
        todo = [t]
        while todo:
            touched = tasks[todo[-1]]
            near = {r for v in (*touched.reads, *touched.writes) for r in s.readers.get(v, ())} | s.edges[todo[-1]]
            chosen: tuple[int, int, list[int]] | None = None
            for n in near - done:
                needed = cluster(n)
                worth = 0 if needed is None else gain(needed)
                if needed is not None and worth > 0 and (chosen is None or (-worth, at[n]) < chosen[:2]):
                    chosen = (-worth, at[n], needed)
            if chosen is None:
                todo.pop()
                continue
            for n in chosen[2]:
                run(n)
            todo += chosen[2]
    return result


def _held(s: State) -> dict[int, int]:
    """Bytes of the arena that each written value takes."""
    return {v: 0 if v in s.direct else aligned(s.problem.sizes[v]) for v in s.writer}


def _peak(s: State, order: Sequence[int]) -> tuple[int, int]:
    """The most bytes live at once, without regard to packing, and the sum of them over all steps, each as long as what it reads
    and writes: updates of parameters are many steps in which nothing happens to activations."""
    last = last_use(s, order)
    sizes = s.problem.sizes
    ends: dict[int, list[int]] = {}
    for v, at in last.items():
        ends.setdefault(at, []).append(v)
    live = peak = area = 0
    for at, t in enumerate(order):
        task = s.problem.tasks[t]
        live += sum(aligned(sizes[v]) for v in task.writes if v not in s.direct)
        peak = max(peak, live + aligned(task.workspace))
        area += live * sum(sizes[v] for v in (*task.reads, *task.writes))
        live -= sum(aligned(sizes[v]) for v in ends.get(at, ()) if v in s.writer and v not in s.direct)
    return peak, area
