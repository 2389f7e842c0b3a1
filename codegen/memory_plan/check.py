"""A plan followed byte by byte, by what knows nothing of how it was made."""

from __future__ import annotations

from .types import ALIGN, Place, Plan, PlanError, PlannedStep, Problem, Task, overlap


def check_plan(plan: Plan, problem: Problem) -> None:
    """Follows the plan step by step, keeping track of which value each byte holds.

    Raises PlanError if a step reads bytes that no longer (or not yet) hold the value it wants, if one step writes what it
    reads without being allowed to, if two of its places overlap, if a place leaves its slot or is not aligned, or if an
    output does not hold its value in the end, or the arena what a task keeps.
    """
    held: dict[int, list[tuple[int, int, int]]] = {}  # slot -> (low, high, value)
    alias = dict(problem.aliases)
    for v, at in (*plan.inputs, *plan.constants):
        held.setdefault(at.slot, []).append((0, at.nbytes, v))
    arena = plan.slots - 1
    writer = {v: t for t, task in enumerate(problem.tasks) for v in task.writes}
    done: set[int] = set()
    kept: list[tuple[str, Place, int]] = []
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
            task = problem.tasks[step.task]
            kept += [(where, at, v) for v, at in step.reads if v in task.keeps and at.slot == arena]
            if step.workspace is not None and task.keeps_workspace:
                kept.append((where, step.workspace, -1 - number))
                held[arena].append((step.workspace.offset, step.workspace.offset + step.workspace.nbytes, -1 - number))
    if done != set(range(len(problem.tasks))):
        raise PlanError(f"tasks {sorted(set(range(len(problem.tasks))) - done)} are not in the plan")
    for where, at, v in kept:
        if at.nbytes and (at.offset, at.offset + at.nbytes, v) not in held[arena]:
            raise PlanError(f"{where} keeps {at} to the end, which is used again")
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
