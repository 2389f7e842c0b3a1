"""The order in which a program's kernels run, and which bytes each of their buffers stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One call of a root kernel. `views[i]` is (slot, byte offset) for its i-th buffer parameter.

    `slot` indexes the `buffers` array that a run is given (inputs, outputs, constants, arena: see ir/program.py).
    """

    kernel: str
    views: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EntryPlan:
    """The entry point `NAME_run` and the kernels it calls, in order."""

    name: str
    steps: tuple[Step, ...]
