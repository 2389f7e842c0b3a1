"""What the check of a loop or branch runs on: which value the bytes of a task's places hold, pass after pass.

It knows what each pass should find (the carries, the slices of the sequences, the invariants) and nothing of how places were
chosen: it reads every operand where the plan says it is, and raises PlanError where that holds another value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.places import View
from .control import Assembly, Id, Value
from .memory_plan import Place, PlanError, PlannedStep, overlap


class Memory:
    """Which value the bytes of a task's places hold, while its bodies run on them."""

    def __init__(self, name: str, step: PlannedStep) -> None:
        self.name = name
        self.held: dict[int, list[tuple[int, int, Id, int]]] = {}  # slot -> (low, high, value, position in the value)
        self.mine = [at for _, at in step.writes] + ([step.workspace] if step.workspace else [])
        self.others = [at for _, at in step.reads]
        for v, at in step.reads:
            self.put(at, (("given", v), 0))

    def put(self, at: Place, value: Value | None) -> None:
        if not at.nbytes:
            return
        low, high = at.offset, at.offset + at.nbytes
        rows: list[tuple[int, int, Id, int]] = []
        for a, b, v, p in self.held.get(at.slot, ()):
            if b <= low or high <= a:
                rows.append((a, b, v, p))
                continue
            if a < low:
                rows.append((a, low, v, p))
            if high < b:
                rows.append((high, b, v, p + high - a))
        if value is not None:
            rows.append((low, high, *value))
        self.held[at.slot] = sorted(rows, key=lambda r: r[0])

    def expect(self, at: Place, value: Value, who: str) -> None:
        """Raises PlanError unless the bytes hold the value."""
        reached, end = at.offset, at.offset + at.nbytes
        for a, b, v, p in self.held.get(at.slot, ()):
            if a <= reached < b and v == value[0] and p - a == value[1] - at.offset:
                reached = b
        if reached < end:
            raise PlanError(f"{who}: {at} does not hold {value[0]} (from byte {value[1]} on) then")

    def copy(self, source: View, to: View, nbytes: int, value: Value) -> None:
        who = f"{self.name}: a copy of a carry"
        self.expect(Place(source[0], source[1], nbytes), value, who)
        self.write(Place(to[0], to[1], nbytes), value, who)

    def write(self, at: Place, value: Value | None, who: str) -> None:
        if at.slot >= 0:  # private memory of a thread is nobody else's
            self._within(at, self.mine, f"{who} writes {at}, which is not its own")
        self.put(at, value)

    def _within(self, at: Place, places: Sequence[Place], message: str) -> None:
        fits = any(p.slot == at.slot and p.offset <= at.offset and at.offset + at.nbytes <= p.offset + p.nbytes for p in places)
        if at.nbytes and not fits:
            raise PlanError(message)

    def _moved(self, at: Place, slots: Mapping[int, View]) -> Place:
        return Place(slots[at.slot][0], slots[at.slot][1] + at.offset, at.nbytes) if at.nbytes else at

    def inside(self, body: Assembly, slots: Mapping[int, View]) -> None:
        """Raises PlanError where a pass would leave the places of the task."""
        for s in body.plan.steps:
            who = f"{self.name}: {s.name}"
            for _, at in s.reads:
                moved = self._moved(at, slots)
                if moved.slot >= 0:
                    self._within(moved, [*self.mine, *self.others], f"{who} reads {moved}, outside the task's places")
            for at in [w for _, w in s.writes] + ([s.workspace] if s.workspace else []):
                moved = self._moved(at, slots)
                if moved.slot >= 0:
                    self._within(moved, self.mine, f"{who} writes {moved}, outside the task's places")

    def run(
        self, body: Assembly, slots: Mapping[int, View], given: Sequence[Value], constants: Sequence[Value], turn: int
    ) -> list[Value]:
        """One pass on inputs that are the values `given`; its outputs' values, which are found in their places."""
        known: dict[int, Value] = dict(enumerate([*given, *constants]))

        def of(v: int) -> Value:
            return known.get(v, (("made", turn, v), 0))

        for s in body.plan.steps:
            who = f"{self.name}, pass {turn}: {s.name}"
            for v, at in s.reads:
                self.expect(self._moved(at, slots), of(v), who)
            reads = [self._moved(at, slots) for _, at in s.reads]
            writes = [(a, of(v), self._moved(at, slots)) for a, (v, at) in enumerate(s.writes)]
            for a, _, to in writes:
                for b, r in enumerate(reads):
                    if overlap(to, r) and not ((a, b) in s.shared and to == r):
                        raise PlanError(f"{who} writes {to} over its operand {b}")
            if s.workspace is not None:
                space = self._moved(s.workspace, slots)
                if any(overlap(space, other) for other in (*reads, *(to for _, _, to in writes))):
                    raise PlanError(f"{who} works on {space}, where it reads or writes too")
                self.write(space, None, who)
            for _, value, to in writes:
                self.write(to, value, who)
        results = [of(v) for v in body.problem.outputs]
        for q, (value, (_, at)) in enumerate(zip(results, body.plan.outputs, strict=True)):
            self.expect(self._moved(at, slots), value, f"{self.name}, pass {turn}: output {q}")
        return results
