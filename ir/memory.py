"""What a program needs of memory, known before it runs: the planner's account, and the reports that users read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .graph import Graph, Node


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A value in the arena: result `index` of the kernel `node`, from the step that writes it to the last that needs it.

    `in_place` says that it takes the memory of an operand that its step is the last to read.
    """

    node: Node
    index: int
    nbytes: int
    first: int
    last: int
    in_place: bool = False


@dataclass(frozen=True)
class MemoryUse:
    """How a graph would use memory if it became a program as it stands.

    order      the nodes that are kernels, in the order in which they would run
    values     what lives in the arena
    workspace  bytes of scratch of each step
    arena      the arena's size, packing included
    fixed      bytes of inputs, outputs that take no input's memory, and constants
    """

    order: tuple[Node, ...]
    values: tuple[Lifetime, ...]
    workspace: tuple[int, ...]
    arena: int
    fixed: int

    @property
    def peak(self) -> int:
        """All bytes that one run needs."""
        return self.arena + self.fixed


class MemoryModel(Protocol):
    """The memory that a graph of fused regions would need; the code generator's, handed to passes from outside."""

    def __call__(self, graph: Graph, /) -> MemoryUse: ...


@dataclass(frozen=True, slots=True)
class Recomputation:
    """One value that is computed again instead of being kept.

    value      what it is, and the source line if known       nbytes   how much it would have kept
    before     the kernel that it is computed again for        kernels  how many kernels that takes
    flops      arithmetic done again                           moved    bytes read and written again
    """

    value: str
    nbytes: int
    before: str
    kernels: int
    flops: int
    moved: int


@dataclass(frozen=True)
class Rematerialisation:
    """What a memory budget led to: peak bytes of a run before and after, and the chosen points in the order of the choice."""

    budget: int
    peak_before: int
    peak_after: int
    points: tuple[Recomputation, ...]

    def __str__(self) -> str:
        kernels = sum(p.kernels for p in self.points)
        head = (
            f"memory budget {show_bytes(self.budget)}: peak {show_bytes(self.peak_before)} without recomputation, "
            f"{show_bytes(self.peak_after)} with {len(self.points)} values recomputed by {kernels} kernels "
            f"({sum(p.flops for p in self.points) / 1e6:,.1f} MFLOP, {show_bytes(sum(p.moved for p in self.points))} moved)"
        )
        rows = [f"  {show_bytes(p.nbytes):>10}  {p.value}  (again before {p.before}, {p.kernels} kernels)" for p in self.points]
        return "\n".join([head, *rows])

    def as_dict(self) -> dict[str, Any]:
        """For a file; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(row: Mapping[str, Any]) -> Rematerialisation:
        """What `as_dict` gave. Raises KeyError, TypeError for anything else."""
        points = tuple(Recomputation(**p) for p in row["points"])
        return Rematerialisation(int(row["budget"]), int(row["peak_before"]), int(row["peak_after"]), points)


@dataclass(frozen=True)
class ArenaUse:
    """What is in the arena at its fullest step, in bytes, and what the program keeps for its backward half.

    activations    values that the results of the program (loss, metrics, predictions) are computed from
    gradients      other values that are read by what updates state
    intermediates  all else: cotangents on their way
    workspace      scratch of the kernel that runs then (packed panels, partial sums)
    gaps           what packing loses, the rest of the arena
    kept           all activations that something other than the results reads, at any time: what a forward pass leaves behind
    step, kernel   which step it is
    """

    activations: int = 0
    gradients: int = 0
    intermediates: int = 0
    workspace: int = 0
    gaps: int = 0
    kept: int = 0
    step: int = 0
    kernel: str = ""

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.intermediates + self.workspace + self.gaps


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that one call needs, by purpose, known before the first one; `str` prints it as a table.

    state      parameters and what else the program updates in place or reads from run to run
    prepared   weights as the program wants them (folded, packed), made once per set of weights
    inputs, outputs, constants
    arena      everything between, in one block whose memory is used again and again; `at_peak` says what fills it
    """

    state: int
    prepared: int
    inputs: int
    outputs: int
    constants: int
    arena: int
    at_peak: ArenaUse = field(default_factory=ArenaUse)

    @property
    def total(self) -> int:
        """The peak of one call, its arguments and results included."""
        return self.state + self.prepared + self.inputs + self.outputs + self.constants + self.arena

    @property
    def activations(self) -> int:
        """What the forward half keeps for the backward half; all values of the arena where there is no such half."""
        return self.at_peak.kept or self.at_peak.activations

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for --json."""
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        at, n = self.at_peak, show_bytes
        rows: Sequence[tuple[str, int, str]] = (
            ("state", self.state, "parameters, optimiser state, running statistics"),
            ("prepared weights", self.prepared, "made once per set of weights"),
            ("constants", self.constants, ""),
            ("inputs", self.inputs, ""),
            ("outputs", self.outputs, ""),
            ("arena", self.arena, f"at its fullest in step {at.step} ({at.kernel}):" if at.total else ""),
            ("  activations", at.activations, f"{n(at.kept)} in all are kept for the backward half" if at.kept else ""),
            ("  gradients", at.gradients, "read by the updates"),
            ("  intermediates", at.intermediates, ""),
            ("  workspace", at.workspace, "of that step's kernel"),
            ("  gaps", at.gaps, "lost to packing"),
        )
        lines = [f"peak memory of one call: {n(self.total)}"]
        lines += [f"  {name:<18}{n(size):>11}{'  ' + note if note else ''}" for name, size, note in rows if size]
        return "\n".join(lines)


def show_bytes(count: int) -> str:
    """'12.34 MB', in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
