"""Which values are written straight to where the caller wants them, and what that says about the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .types import Problem


@dataclass
class Copy:
    """A value that is copied to an output; `early` before anything is written where it lies."""

    source: int
    output: int
    early: bool = False


@dataclass
class State:
    """A problem with what has been decided of it."""

    problem: Problem
    writer: dict[int, int] = field(default_factory=dict)  # value -> task
    readers: dict[int, list[int]] = field(default_factory=dict)
    edges: dict[int, set[int]] = field(default_factory=dict)  # task -> tasks that must come later
    direct: dict[int, int] = field(default_factory=dict)  # value -> output it is written to
    copies: list[Copy] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)  # tasks whose operands are written into their result
    inside: dict[int, int] = field(default_factory=dict)  # value -> the byte of that output at which it begins

    def kept(self) -> set[int]:
        """The values whose memory is not used again."""
        return {c.source for c in self.copies}.union(*(task.keeps for task in self.problem.tasks))


def dependencies(problem: Problem) -> State:
    """Who writes and reads each value, and which tasks follow which."""
    s = State(problem)
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
    return s


def assign_outputs(s: State) -> None:
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
            s.copies.append(Copy(v, k))
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


def _may_be_inside(s: State, v: int) -> bool:
    """Whether a value may be written into an output of which it is a part: by one kernel, and to nowhere else."""
    return v in s.writer and v not in s.direct and s.problem.sizes[v] > 0 and s.problem.tasks[s.writer[v]].inside is None


def _may_overwrite(s: State, t: int, v: int, donated: int) -> bool:
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


def last_use(s: State, order: Sequence[int]) -> dict[int, int]:
    """For each value, the step that reads it last (its own step if none does, past the end if a late copy does
    or a task keeps it)."""
    last: dict[int, int] = {}
    for at, t in enumerate(order):
        task = s.problem.tasks[t]
        for v in (*task.writes, *task.reads):
            last[v] = at
    for v in s.kept():
        last[v] = len(order) + 1
    return last
