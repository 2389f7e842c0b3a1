"""What the code generator hands to a CUDA device: PTX, the buffers it works on, and the launches in the order of one stream.

`slot` numbers are as in `Program`: every input, every output, every constant, then the arena. A place is (slot, byte offset);
the runtime gives each slot device memory whose address is a multiple of `ALIGN`. A kernel's PTX entry takes its pointers first
(one 64-bit global address each, in the order of `Launch.pointers`), then its scalars (64-bit integers).

The plan is a tree because a loop of a scan or a `while` is one: `CudaProgram.launches(read)` walks it and yields plain launches
with everything resolved, asking `read(place)` for a byte only where a branch or a `while` depends on it (the stream must be
synchronised there). Where `is_static`, nothing is ever asked and the whole sequence may be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from .memory import ArenaUse
from .places import Pointer, View
from .program import Argument, KernelInfo
from .target import Target

ALIGN: Final = 256  # bytes: of every slot's address, as cuMemAlloc gives them

Place = tuple[int, int]  # slot, byte offset
Read = Callable[[Place], int]


@dataclass(frozen=True)
class Parameter:
    """A pointer parameter of a kernel: `nbytes` from its address on may be touched, and written only where `written`."""

    name: str
    dtype: str
    nbytes: int
    written: bool


@dataclass(frozen=True)
class CudaKernel:
    """One PTX entry. `grid` and `block` are (x, y, z); `shared` counts static shared bytes, which the PTX declares itself;
    `dynamic_shared` is what a launch must give. `source` is its loop IR: a `.loc` in the PTX counts its lines from 1 on."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: tuple[Parameter, ...]
    shared: int = 0
    dynamic_shared: int = 0
    source: str = ""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel with its places resolved; `info` is the row of `CudaProgram.infos` that it belongs to."""

    kernel: CudaKernel
    pointers: tuple[Place, ...]
    scalars: tuple[int, ...] = ()
    info: int = -1


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One launch; `views` are its pointers."""

    kernel: str
    views: tuple[View, ...]
    info: int = -1


@dataclass(frozen=True)
class Loop:
    """`count` passes of `nodes`; the counter runs up from 0, with `reverse` down to 0."""

    count: int
    nodes: tuple[Node, ...]
    reverse: bool = False
    pointers: tuple[Pointer, ...] = ()


@dataclass(frozen=True)
class Branch:
    """`then` if the byte at `predicate` is not 0, else `orelse`."""

    predicate: View
    then: tuple[Node, ...]
    orelse: tuple[Node, ...]


@dataclass(frozen=True)
class While:
    """Runs `test`, and as long as it leaves a byte other than 0 at `predicate`, `nodes` and `test` again."""

    test: tuple[Node, ...]
    predicate: View
    nodes: tuple[Node, ...]


Node = Step | Loop | Branch | While


@dataclass(frozen=True)
class CudaProgram:
    """One compiled graph for a CUDA target.

    `aliases` are (output, input) pairs that share memory: the runtime passes the input's address for the output, or, where the
    caller keeps the input, a copy of it. `arena_bytes` is the memory a run needs besides arguments and constants.
    """

    name: str
    target: Target
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    constants: tuple[np.ndarray[Any, Any], ...]
    arena_bytes: int
    ptx: str
    kernels: tuple[CudaKernel, ...]
    plan: tuple[Node, ...]
    infos: tuple[KernelInfo, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    align: int = ALIGN
    use: ArenaUse = field(default_factory=ArenaUse)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_output(self) -> int:
        return len(self.inputs)

    @property
    def first_constant(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def arena(self) -> int:
        """The arena's slot."""
        return self.first_constant + len(self.constants)

    @property
    def output_align(self) -> tuple[tuple[int, int], ...]:
        """As `Program.output_align`: the caller's arrays may lie anywhere, since they are copied."""
        return ()

    @property
    def is_static(self) -> bool:
        """Whether the launches are the same in every run."""
        return not any(isinstance(n, Branch | While) for n in walk(self.plan))

    def launches(self, read: Read | None = None) -> Iterator[Launch]:
        """The launches of one run, in order. `read` gives the byte at a place once everything before is done.

        Raises ValueError where a byte is needed and there is no `read`.
        """
        kernels = {k.name: k for k in self.kernels}

        def ask(place: Place) -> int:
            if read is None:
                raise ValueError(f"{self.name}: a branch depends on the byte at {place}; launches() needs `read`")
            return read(place)

        yield from _run(self.plan, (), {}, kernels, ask)


def walk(nodes: Sequence[Node]) -> Iterator[Node]:
    """Every node of a plan, outer ones first."""
    stack = list(reversed(nodes))
    while stack:
        n = stack.pop()
        yield n
        if isinstance(n, Loop):
            stack += reversed(n.nodes)
        elif isinstance(n, Branch):
            stack += reversed((*n.then, *n.orelse))
        elif isinstance(n, While):
            stack += reversed((*n.test, *n.nodes))


def _run(
    nodes: Sequence[Node], counters: tuple[int, ...], pointers: dict[int, Place], kernels: Mapping[str, CudaKernel], read: Read
) -> Iterator[Launch]:
    """The launches of nodes; recursion is as deep as loops are nested."""

    def place(v: View) -> Place:
        slot, offset = (v[0], 0) if v[0] >= 0 else pointers[v[0]]
        return slot, offset + v[1] + sum(c * s for c, s in zip(counters, v[2:], strict=False))

    for n in nodes:
        match n:
            case Step():
                yield Launch(kernels[n.kernel], tuple(place(v) for v in n.views), info=n.info)
            case Loop():
                around = counters
                for k in range(n.count):
                    counters = (*around, n.count - 1 - k if n.reverse else k)
                    for p in n.pointers:
                        pointers[p.slot] = place(p.at(k, n.count))
                    yield from _run(n.nodes, counters, pointers, kernels, read)
                counters = around
            case Branch():
                yield from _run(n.then if read(place(n.predicate)) else n.orelse, counters, pointers, kernels, read)
            case While():
                yield from _run(n.test, counters, pointers, kernels, read)
                while read(place(n.predicate)):
                    yield from _run(n.nodes, counters, pointers, kernels, read)
                    yield from _run(n.test, counters, pointers, kernels, read)
