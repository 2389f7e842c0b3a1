"""What is to be placed, and where it was placed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from ...ir.errors import CompileError

ALIGN: Final = 64


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
    there is nothing to do where it lies there already. Memory of `keeps`, values that it reads, and with `keeps_workspace` its
    workspace are not used again: a part of it may run at the end of the program.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    workspace: int = 0
    in_place: frozenset[tuple[int, int]] = frozenset()
    after: tuple[int, ...] = ()
    inside: Inside | None = None
    joins: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    keeps_workspace: bool = False


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


class PlanError(CompileError):
    """A memory plan that would let one value overwrite another that is still needed."""


def overlap(a: Place, b: Place) -> bool:
    """Whether two places have a byte in common."""
    return a.slot == b.slot and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def live_bytes(plan: Plan, values: Iterable[int]) -> int:
    """Bytes of the arena that some of the given values occupy, counted once each."""
    wanted = set(values)
    found = {v: at for step in plan.steps for v, at in step.writes if v in wanted and at.slot == plan.slots - 1}
    return sum(at.nbytes for at in found.values())
