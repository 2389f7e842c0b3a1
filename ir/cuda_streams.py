"""Which stream each launch of a CUDA program goes to, and what it waits for.

Two launches depend on each other where one writes bytes that the other touches: results that are read, but also memory of the
arena that is used again, and donated state that is overwritten after its last reader. A launch goes on in the stream of what it
depends on, or opens one of its own where that has gone on with something else; across streams it waits for events. What the order
of streams and earlier waits imply already is not waited for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .cuda_program import CudaProgram, Launch

STREAMS: Final = 4  # most that are used: kernels that fill a device gain nothing from more


@dataclass(frozen=True)
class Turn:
    """A launch on a stream. `waits` are the numbers of earlier turns, on other streams, that must have ended; `is_awaited` says
    whether a later turn waits for this one."""

    launch: Launch
    stream: int
    waits: tuple[int, ...] = ()
    is_awaited: bool = False


class _Bytes:
    """Who touched which bytes of one slot, as far as later launches can depend on it."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []  # first byte, end, number of the launch
        self.reads: list[tuple[int, int, int]] = []

    def read(self, low: int, high: int, number: int) -> set[int]:
        """Notes a read of [low, high); the launches it depends on."""
        found = {n for a, b, n in self.writes if a < high and low < b}
        self.reads.append((low, high, number))
        return found

    def write(self, low: int, high: int, number: int) -> set[int]:
        found = {n for a, b, n in (*self.writes, *self.reads) if a < high and low < b}
        self.writes = [x for x in self.writes if not (low <= x[0] and x[1] <= high)]
        self.reads = [x for x in self.reads if not (low <= x[0] and x[1] <= high)]
        self.writes.append((low, high, number))
        return found


def dependences(program: CudaProgram, launches: Sequence[Launch]) -> list[set[int]]:
    """For each launch, the numbers of those before it that must have ended."""
    home = {program.first_output + output: source for output, source in program.aliases}
    slots: dict[int, _Bytes] = {}
    written = {
        home.get(slot, slot) for x in launches for (slot, _), p in zip(x.pointers, x.kernel.parameters, strict=True) if p.written
    }
    found: list[set[int]] = []
    for number, x in enumerate(launches):
        needs: set[int] = set()
        touched = sorted(zip(x.pointers, x.kernel.parameters, strict=True), key=lambda t: t[1].written)  # reads before writes
        for (slot, offset), p in touched:
            slot = home.get(slot, slot)
            if slot not in written:
                continue
            bytes_ = slots.setdefault(slot, _Bytes())
            needs |= (bytes_.write if p.written else bytes_.read)(offset, offset + p.nbytes, number)
        found.append(needs - {number})
    return found


def schedule(program: CudaProgram, launches: Sequence[Launch], most: int = STREAMS) -> list[Turn]:
    """The launches of a run, in the same order, each with its stream; the first is on stream 0."""
    needs = dependences(program, launches)
    tails: list[int] = []  # the last launch of each stream
    stream: list[int] = []
    known: list[tuple[int, ...]] = []  # for each launch, per stream the last launch of it that has ended when it ends
    waits: list[tuple[int, ...]] = []
    for number in range(len(launches)):
        before = [-1] * most
        for n in needs[number]:
            before = [max(a, b) for a, b in zip(before, known[n], strict=True)]
        chosen = _stream(needs[number], tails, before, most)
        if chosen == len(tails):
            tails.append(number)
        here = list(known[tails[chosen]]) if tails[chosen] != number else [-1] * most
        asked: list[int] = []
        for n in sorted(needs[number], reverse=True):
            if here[stream[n]] < n:
                asked.append(n)
                here = [max(a, b) for a, b in zip(here, known[n], strict=True)]
        here[chosen] = number
        tails[chosen] = number
        stream.append(chosen)
        known.append(tuple(here))
        waits.append(tuple(sorted(asked)))
    awaited = {n for w in waits for n in w}
    return [Turn(x, s, w, k in awaited) for k, (x, s, w) in enumerate(zip(launches, stream, waits, strict=True))]


def _stream(needs: set[int], tails: Sequence[int], before: Sequence[int], most: int) -> int:
    """The stream that ends with what is waited for, the latest of them; else one all of which has ended by then; else a new one,
    and where there are enough, the one whose last launch is the oldest."""
    mine = [s for s, t in enumerate(tails) if t in needs]
    if mine:
        return max(mine, key=lambda s: tails[s])
    ended = [s for s, t in enumerate(tails) if before[s] >= t]
    if ended:
        return ended[0]
    return len(tails) if len(tails) < most else min(range(most), key=lambda s: tails[s])


__all__ = ["STREAMS", "Turn", "dependences", "schedule"]
