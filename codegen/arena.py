"""What a planned arena holds at its fullest moment, by purpose: the account behind `Executable.memory`.

Purposes follow from what reads what, not from names. In a program that updates state (outputs that take an input's memory)
the *forward* half is all that its other outputs are computed from: loss, metrics, predictions.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.memory import ArenaUse
from .memory_plan import Plan, Problem, aligned


def arena_use(problem: Problem, plan: Plan) -> ArenaUse:
    """The bytes of each purpose at the fullest step; see ArenaUse for the purposes."""
    arena = plan.slots - 1
    writer = {v: t for t, task in enumerate(problem.tasks) for v in task.writes}
    taken = {k for k, _ in problem.aliases}
    forward = _ancestors(problem, writer, (v for k, v in enumerate(problem.outputs) if k not in taken))
    updates = {writer[v] for k, v in enumerate(problem.outputs) if k in taken and v in writer} - forward
    gradients = {v for t in updates for v in problem.tasks[t].reads}
    read = {v for t, task in enumerate(problem.tasks) if t not in forward for v in task.reads}

    def purpose(v: int) -> str:
        t = writer.get(v)
        return "activations" if t is None or t in forward else "gradients" if v in gradients else "intermediates"

    places = {v: at for s in plan.steps for v, at in s.writes if at.slot == arena and at.nbytes}
    last = {v: number for number, s in enumerate(plan.steps) for v, _ in s.reads}
    live: dict[int, int] = {}  # value -> bytes, at the step that is looked at
    best, full = -1, ArenaUse(gaps=plan.arena_bytes)
    kept = sum(aligned(at.nbytes) for v, at in places.items() if writer.get(v) in forward and v in read)
    for number, s in enumerate(plan.steps):
        for _, b in s.shared:
            live.pop(s.reads[b][0], None)  # its memory is the result's now
        live |= {v: aligned(at.nbytes) for v, at in s.writes if at.slot == arena and at.nbytes}
        space = aligned(s.workspace.nbytes) if s.workspace else 0
        total = sum(live.values()) + space
        if total > best:
            best = total
            sums = {"activations": 0, "gradients": 0, "intermediates": 0}
            for v, n in live.items():
                sums[purpose(v)] += n
            full = ArenaUse(**sums, workspace=space, gaps=plan.arena_bytes - total, kept=kept, step=number, kernel=s.name)
        for v in [v for v in live if last.get(v, number) <= number]:
            del live[v]
    return full


def _ancestors(problem: Problem, writer: dict[int, int], values: Iterable[int]) -> set[int]:
    """The tasks that the values are computed by, directly or not."""
    found: set[int] = set()
    stack = [writer[v] for v in values if v in writer]
    while stack:
        t = stack.pop()
        if t not in found:
            found.add(t)
            stack += [writer[v] for v in problem.tasks[t].reads if v in writer]
    return found
