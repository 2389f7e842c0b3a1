"""Where every value of a program lives: inputs, outputs, constants, or a byte range of one arena known before the run.

`plan_memory` orders the steps, writes outputs where the caller wants them, reuses memory in place where a step allows
it, and packs the rest by lifetime. Donated inputs (an output aliased to an input) are overwritten only after their last
read: readers are ordered before the writer, and where that is impossible the result is kept in the arena and copied in
at the end. `check_plan` follows a plan byte by byte and knows nothing of how it was made.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from ..ir.errors import CompileError

ALIGN: Final = 64
MANY: Final = 3000  # items from which packing must be nearly linear
CLUSTER: Final = 8  # tasks that may be brought forward together
DEEPEST: Final = 64  # tasks put before one another
SPARE: Final = 1.25  # how much larger an arena may be for tasks to run at the same time ...
FEW: Final = 1 << 20  # ... or how many bytes


def aligned(nbytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-nbytes // ALIGN) * ALIGN


class Inside(Protocol):
    """Steps inside a task."""

    def check(self, step: PlannedStep) -> None:
        """Raises PlanError where these steps would read what is not there, or write what they must not."""


@dataclass(frozen=True, slots=True)
class Task:
    """One call of a kernel, before it is placed. Values are numbers; `in_place` holds (position in writes, position in reads).

    `after` are values that must have been written before it runs, though it does not read them. `inside` is what a task that
    is a loop or branch does with its places. A task with `joins` only puts what it reads into what it writes, each at a byte:
    there is nothing to do where it lies there already.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    workspace: int = 0
    in_place: frozenset[tuple[int, int]] = frozenset()
    after: tuple[int, ...] = ()
    inside: Inside | None = None
    joins: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is to be planned. Values 0 .. inputs - 1 are the inputs, then the constants, then what tasks write.

    `sizes` are in bytes; `outputs` are values (views are resolved to the value whose bytes they are); `aliases` are
    (output, input) pairs of numbers.
    """

    sizes: tuple[int, ...]
    inputs: int
    constants: int
    outputs: tuple[int, ...]
    tasks: tuple[Task, ...]
    aliases: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes `offset` to `offset + nbytes` of a slot (a number in the `buffers` array of a run)."""

    slot: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A task with its places. `task` is its number, -1 for a copy. `shared` are the in-place pairs that are used. Where `joined`,
    what it reads lies inside what it writes, and there is nothing to run."""

    task: int
    name: str
    reads: tuple[tuple[int, Place], ...]
    writes: tuple[tuple[int, Place], ...]
    workspace: Place | None = None
    shared: frozenset[tuple[int, int]] = frozenset()
    joined: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps in order, the arena's size, and where each output's value ends up."""

    steps: tuple[PlannedStep, ...]
    arena_bytes: int
    outputs: tuple[tuple[int, Place], ...]
    inputs: tuple[tuple[int, Place], ...]
    constants: tuple[tuple[int, Place], ...]
    slots: int


@dataclass
class _Copy:
    source: int
    output: int
    early: bool = False


@dataclass
class _State:
    problem: Problem
    writer: dict[int, int] = field(default_factory=dict)  # value -> task
    readers: dict[int, list[int]] = field(default_factory=dict)
    edges: dict[int, set[int]] = field(default_factory=dict)  # task -> tasks that must come later
    direct: dict[int, int] = field(default_factory=dict)  # value -> output it is written to
    copies: list[_Copy] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)  # tasks whose operands are written into their result
    inside: dict[int, int] = field(default_factory=dict)  # value -> the byte of that output at which it begins


def plan_memory(problem: Problem, *, beside: bool = False) -> Plan:
    """Places and order. Raises CompileError if the tasks depend on each other in a circle.

    With `beside`, tasks that do not depend on each other may run at the same time: memory is used again only by those that come
    after all its users, as long as the arena grows by little (SPARE, FEW).
    """
    s = _State(problem)
    for t, task in enumerate(problem.tasks):
        s.edges[t] = set()
        for v in task.writes:
            s.writer[v] = t
        for v in dict.fromkeys(task.reads):
            s.readers.setdefault(v, []).append(t)
    for v, t in s.writer.items():
        s.edges[t].update(s.readers.get(v, ()))
    for t, task in enumerate(problem.tasks):
        for v in task.after:
            if v in s.writer:
                s.edges[s.writer[v]].add(t)
    _assign_outputs(s)
    order = _order(s)
    return _place(s, order, beside)


def _assign_outputs(s: _State) -> None:
    """Which values are written straight to an output, and which outputs are copied to."""
    p = s.problem
    alias = dict(p.aliases)
    for k, v in enumerate(p.outputs):
        donated = alias.get(k)
        if donated == v or p.sizes[v] == 0:
            continue  # the input itself: it is there already
        t = s.writer.get(v)
        if t is not None and v not in s.direct and (donated is None or _may_overwrite(s, t, v, donated)):
            s.direct[v] = k
        else:
            s.copies.append(_Copy(v, k))
    overwritten = {i for k, i in p.aliases if p.outputs[k] != i}
    for c in s.copies:
        # What is copied from a donated input must be read before anything else is written there.
        c.early = c.source in overwritten
    for t, task in enumerate(p.tasks):
        if not task.joins or task.writes[0] not in s.direct or s.direct[task.writes[0]] in alias:
            continue
        pieces = task.reads[: len(task.joins)]
        if len(set(pieces)) == len(pieces) and all(_may_be_inside(s, v) for v in pieces):
            s.joined.add(t)
            s.direct |= dict.fromkeys(pieces, s.direct[task.writes[0]])
            s.inside |= dict(zip(pieces, task.joins, strict=True))


def _may_be_inside(s: _State, v: int) -> bool:
    """Whether a value may be written into an output of which it is a part: by one kernel, and to nowhere else."""
    return v in s.writer and v not in s.direct and s.problem.sizes[v] > 0 and s.problem.tasks[s.writer[v]].inside is None


def _may_overwrite(s: _State, t: int, v: int, donated: int) -> bool:
    """Whether task t may write value v over an input; if so, all other readers of that input are ordered before t."""
    task = s.problem.tasks[t]
    at = task.writes.index(v)
    for position, u in enumerate(task.reads):
        if u == donated and not ((at, position) in task.in_place and task.reads.count(u) == 1):
            return False
    others = [r for r in s.readers.get(donated, ()) if r != t]
    later = _reachable(s.edges, t)
    if any(r in later for r in others):
        return False
    for r in others:
        s.edges[r].add(t)
    return True


def _reachable(edges: dict[int, set[int]], start: int) -> set[int]:
    seen: set[int] = set()
    stack = [start]
    while stack:
        for n in edges[stack.pop()]:
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return seen


def _order(s: _State) -> list[int]:
    """The best of four orders by peak memory, then by how long memory is held: as given, the one that frees most at each step,
    and each of them with tasks first put off and then brought forward."""
    first = _topological(s, None)
    if len(s.problem.tasks) > 4000:
        return first
    found = [first, _topological(s, s.problem.tasks)]
    found += [_brought_forward(s, _put_off(s, order)) for order in found]
    return min(found, key=lambda order: _peak(s, order))


def _held(s: _State) -> dict[int, int]:
    """Bytes of the arena that each written value takes."""
    return {v: 0 if v in s.direct else aligned(s.problem.sizes[v]) for v in s.writer}


def _put_off(s: _State, order: Sequence[int]) -> list[int]:
    """The order with every task just before the first that needs it, where it makes more than its operands then take for longer.

    So a transform of weights waits for its product, and what is computed a second time for its late reader.
    """
    tasks, held = s.problem.tasks, _held(s)
    kept = {c.source for c in s.copies}
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


def _brought_forward(s: _State, order: Sequence[int]) -> list[int]:
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
    kept = {c.source for c in s.copies}
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


def _topological(s: _State, tasks: Sequence[Task] | None) -> list[int]:
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


def _peak(s: _State, order: Sequence[int]) -> tuple[int, int]:
    """The most bytes live at once, without regard to packing, and the sum of them over all steps, each as long as what it reads
    and writes: updates of parameters are many steps in which nothing happens to activations."""
    last = _last_use(s, order)
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


def _last_use(s: _State, order: Sequence[int]) -> dict[int, int]:
    """For each value, the step that reads it last (its own step if none does, past the end if a late copy does)."""
    last: dict[int, int] = {}
    for at, t in enumerate(order):
        task = s.problem.tasks[t]
        for v in (*task.writes, *task.reads):
            last[v] = at
    for c in s.copies:
        last[c.source] = len(order) + 1
    return last


@dataclass
class _Item:
    """A byte range of the arena that is needed from step `first` to step `last`."""

    nbytes: int
    first: int
    last: int
    offset: int = -1


def _place(s: _State, order: list[int], beside: bool) -> Plan:
    p = s.problem
    n_out = len(p.outputs)
    alias = dict(p.aliases)
    arena = p.inputs + n_out + p.constants
    last = _last_use(s, order)
    fixed: dict[int, Place] = {}
    for i in range(p.inputs):
        fixed[i] = Place(i, 0, p.sizes[i])
    for j in range(p.constants):
        fixed[p.inputs + j] = Place(p.inputs + n_out + j, 0, p.sizes[p.inputs + j])

    def output_place(k: int) -> Place:
        return Place(alias[k] if k in alias else p.inputs + k, 0, p.sizes[p.outputs[k]])

    for v, k in s.direct.items():
        fixed[v] = output_place(k) if v not in s.inside else Place(p.inputs + k, s.inside[v], p.sizes[v])
    item_of: dict[int, _Item] = {}
    items: list[_Item] = []
    early: dict[int, _Item] = {}
    for c in s.copies:
        if c.early and c.source not in early:
            early[c.source] = _Item(aligned(p.sizes[c.source]), -1, len(order) + 1)
            items.append(early[c.source])
    shared: dict[int, set[tuple[int, int]]] = {}
    spaces: dict[int, _Item] = {}
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
                item_of[v] = _Item(aligned(p.sizes[v]), at, last[v])
                items.append(item_of[v])
        if task.workspace:
            spaces[t] = _Item(aligned(task.workspace), at, at)
            items.append(spaces[t])
    total = _pack(items)
    if beside and len(order) <= MANY:
        ends = [item.last for item in items]
        _keep_apart(s, order, item_of, spaces)
        wide = _pack(items)
        if wide > max(SPARE * total, total + FEW):
            for item, end in zip(items, ends, strict=True):
                item.last = end
            wide = _pack(items)
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


def _keep_apart(s: _State, order: Sequence[int], item_of: dict[int, _Item], spaces: dict[int, _Item]) -> None:
    """Keeps memory until the last task that does not come after all its users by what it reads."""
    at = {t: k for k, t in enumerate(order)}
    before = [0] * len(order)  # for each place in the order, a bit for each place that it comes after
    for k, t in enumerate(order):
        for later in s.edges[t]:
            before[at[later]] |= before[k] | 1 << k
    users: dict[int, set[int]] = {}
    items: dict[int, _Item] = {}
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


def _pack(items: Sequence[_Item]) -> int:
    """Gives every item an offset, the largest first, each in the smallest gap that fits; the total size."""
    if len(items) > MANY:
        return _sweep(items)
    total = 0
    placed: list[_Item] = []
    for item in sorted(items, key=lambda i: (-i.nbytes, i.first, i.last)):
        if item.nbytes == 0:
            item.offset = 0
            continue
        busy = sorted((o.offset, o.offset + o.nbytes) for o in placed if o.first <= item.last and item.first <= o.last)
        best, at, gap = None, 0, 1 << 62
        for low, high in busy:
            if low - at >= item.nbytes and low - at < gap:
                best, gap = at, low - at
            at = max(at, high)
        item.offset = at if best is None else best
        placed.append(item)
        total = max(total, item.offset + item.nbytes)
    return total


def _sweep(items: Sequence[_Item]) -> int:
    """As `_pack` for very many items, in the order of the steps: the best gap that is free at that time."""
    total = 0
    free: list[tuple[int, int]] = []  # (offset, size), by offset
    live: list[tuple[int, int, int]] = []  # (last, offset, size), a heap
    for item in sorted(items, key=lambda i: (i.first, -i.nbytes)):
        while live and live[0][0] < item.first:
            _, offset, size = heapq.heappop(live)
            free = _released(free, offset, size)
        fitting = [(size, offset) for offset, size in free if size >= item.nbytes]
        if fitting:
            size, item.offset = min(fitting)
            free.remove((item.offset, size))
            if size > item.nbytes:
                free = _released(free, item.offset + item.nbytes, size - item.nbytes)
        else:
            item.offset = total
            total += item.nbytes
        heapq.heappush(live, (item.last, item.offset, item.nbytes))
    return total


def _released(free: list[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """The free ranges with one more, neighbours joined."""
    if size == 0:
        return free
    merged: list[tuple[int, int]] = []
    for at, n in sorted([*free, (offset, size)]):
        if merged and merged[-1][0] + merged[-1][1] == at:
            merged[-1] = (merged[-1][0], merged[-1][1] + n)
        else:
            merged.append((at, n))
    return merged


class PlanError(CompileError):
    """A memory plan that would let one value overwrite another that is still needed."""


def check_plan(plan: Plan, problem: Problem) -> None:
    """Follows the plan step by step, keeping track of which value each byte holds.

    Raises PlanError if a step reads bytes that no longer (or not yet) hold the value it wants, if one step writes what it
    reads without being allowed to, if two of its places overlap, if a place leaves its slot or is not aligned, or if an
    output does not hold its value in the end.
    """
    held: dict[int, list[tuple[int, int, int]]] = {}  # slot -> (low, high, value)
    alias = dict(problem.aliases)
    for v, at in (*plan.inputs, *plan.constants):
        held.setdefault(at.slot, []).append((0, at.nbytes, v))
    arena = plan.slots - 1
    writer = {v: t for t, task in enumerate(problem.tasks) for v in task.writes}
    done: set[int] = set()
    for number, step in enumerate(plan.steps):
        where = f"step {number} ({step.name})"
        for v, at in step.reads:
            if at.nbytes and (at.offset, at.offset + at.nbytes, v) not in held.get(at.slot, ()):
                raise PlanError(f"{where} reads value {v} at {at}, which does not hold it then")
        waits = problem.tasks[step.task].after if step.task >= 0 else ()
        if early := [v for v in waits if v in writer and writer[v] not in done]:
            raise PlanError(f"{where} runs before the values {early}, which it waits for")
        allowed = problem.tasks[step.task].in_place if step.task >= 0 else frozenset()
        if not step.shared <= allowed:
            raise PlanError(f"{where} shares {set(step.shared - allowed)} in place, which its kernel does not allow")
        _check_places(step, where, arena, plan.arena_bytes)
        inside = problem.tasks[step.task].inside if step.task >= 0 else None
        if inside is not None:
            inside.check(step)
        writes = [at for _, at in step.writes] + ([step.workspace] if step.workspace else [])
        for at in writes:
            rows = held.setdefault(at.slot, [])
            if step.joined:
                _check_joined(step, problem.tasks[step.task], where)
                continue  # nothing is written, and what lay there still does
            rows[:] = [r for r in rows if r[1] <= at.offset or r[0] >= at.offset + at.nbytes]
        for v, at in step.writes:
            held[at.slot].append((at.offset, at.offset + at.nbytes, v))
        if step.task >= 0:
            done.add(step.task)
    if done != set(range(len(problem.tasks))):
        raise PlanError(f"tasks {sorted(set(range(len(problem.tasks))) - done)} are not in the plan")
    for k, (v, at) in enumerate(plan.outputs):
        wanted = alias[k] if k in alias else problem.inputs + k
        if at.slot != wanted:
            raise PlanError(f"output {k} is in slot {at.slot} instead of {wanted}")
        if v != problem.outputs[k] or (at.nbytes and (0, at.nbytes, v) not in held.get(at.slot, ())):
            raise PlanError(f"output {k} does not hold value {problem.outputs[k]} at the end")


def _check_places(step: PlannedStep, where: str, arena: int, size: int) -> None:
    writes: list[tuple[int | None, Place]] = [(a, at) for a, (_, at) in enumerate(step.writes)]
    if step.workspace is not None:
        writes.append((None, step.workspace))
    reads = [at for _, at in step.reads]
    for at in [w for _, w in writes] + reads:
        if at.slot == arena and (at.offset % ALIGN or at.offset < 0 or at.offset + at.nbytes > size):
            raise PlanError(f"{where} uses {at}, outside the arena of {size} bytes or not aligned to {ALIGN}")
    for k, (a, at) in enumerate(writes):
        for _, other in writes[:k]:
            if overlap(at, other):
                raise PlanError(f"{where} writes two values to the same bytes: {at}, {other}")
        for b, read in enumerate(reads):
            if not step.joined and overlap(at, read) and not ((a, b) in step.shared and at == read):
                raise PlanError(f"{where} overwrites its operand {b} at {read}")


def _check_joined(step: PlannedStep, task: Task, where: str) -> None:
    """Every operand lies at its byte of the result, and they fill it."""
    (_, whole), *others = step.writes
    pieces = [at for _, at in step.reads[: len(task.joins)]]
    right = all(at.slot == whole.slot and at.offset == whole.offset + n for at, n in zip(pieces, task.joins, strict=True))
    if others or not task.joins or not right or sum(at.nbytes for at in pieces) != whole.nbytes:
        raise PlanError(f"{where} is left out, but its operands do not lie in its result")


def overlap(a: Place, b: Place) -> bool:
    """Whether two places have a byte in common."""
    return a.slot == b.slot and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def live_bytes(plan: Plan, values: Iterable[int]) -> int:
    """Bytes of the arena that some of the given values occupy, counted once each."""
    wanted = set(values)
    found = {v: at for step in plan.steps for v, at in step.writes if v in wanted and at.slot == plan.slots - 1}
    return sum(at.nbytes for at in found.values())
