"""Which stream each launch and each copy of a CUDA program goes to, and what it waits for.

Two of them depend on each other where one writes bytes that the other touches: results that are read, but also memory of the
arena that is used again, and donated state that is overwritten after its last reader. A launch goes on in the stream of what it
depends on, or opens one of its own where that has gone on with something else; across streams it waits for events. What the order
of streams and earlier waits imply already is not waited for again.

Copies between host and device have a stream for each direction, as devices have an engine for each. Uploads come in the order in
which launches ask for them, so that a launch waits for its own inputs only; a download begins when the last launch that writes
its bytes has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from .cuda_program import CudaProgram, Launch

STREAMS: Final = 4  # most that launches use: kernels that fill a device gain nothing from more
UPLOADS: Final = STREAMS  # the stream of copies to the device
DOWNLOADS: Final = STREAMS + 1  # and of those from it
ALL: Final = STREAMS + 2


@dataclass(frozen=True)
class Transfer:
    """A copy of a whole slot from the host (`up`), or to it."""

    slot: int
    nbytes: int
    up: bool


Work = Launch | Transfer


@dataclass(frozen=True)
class Turn:
    """A launch or a copy on a stream. `waits` are the numbers of earlier turns, on other streams, that must have ended;
    `is_awaited` says whether a later turn waits for this one."""

    work: Work
    stream: int
    waits: tuple[int, ...] = ()
    is_awaited: bool = False


class _Bytes:
    """Who touched which bytes of one slot, as far as later work can depend on it."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []  # first byte, end, number of the work
        self.reads: list[tuple[int, int, int]] = []

    def read(self, low: int, high: int, number: int) -> set[int]:
        """Notes a read of [low, high); the work it depends on."""
        found = {n for a, b, n in self.writes if a < high and low < b}
        self.reads.append((low, high, number))
        return found

    def write(self, low: int, high: int, number: int) -> set[int]:
        found = {n for a, b, n in (*self.writes, *self.reads) if a < high and low < b}
        self.writes = [x for x in self.writes if not (low <= x[0] and x[1] <= high)]
        self.reads = [x for x in self.reads if not (low <= x[0] and x[1] <= high)]
        self.writes.append((low, high, number))
        return found


def homes(program: CudaProgram) -> dict[int, int]:
    """Outputs that share an input's memory: their slots, and the input's."""
    return {program.first_output + output: source for output, source in program.aliases}


def _touched(work: Work, home: dict[int, int]) -> list[tuple[int, int, int, bool]]:
    """(slot, first byte, end, whether it is written) of what a launch or a copy touches; reads before writes."""
    if isinstance(work, Transfer):
        return [(home.get(work.slot, work.slot), 0, work.nbytes, work.up)]
    pairs = sorted(zip(work.pointers, work.kernel.parameters, strict=True), key=lambda t: t[1].written)
    return [(home.get(slot, slot), offset, offset + p.nbytes, p.written) for (slot, offset), p in pairs]


def beside(program: CudaProgram, launches: Sequence[Launch], up: Collection[int], down: Collection[int]) -> list[Work]:
    """The launches with copies: slots `up` from the host, first those that launches ask for first, and slots `down` to it, each
    after the last launch that writes it. Slots without bytes are left out."""
    arguments = [*program.inputs, *program.outputs]
    home = homes(program)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, x in enumerate(launches):
        for slot, _, _, written in _touched(x, home):
            first.setdefault(slot, number)
            if written:
                last[slot] = number
    done: list[Work] = [
        Transfer(slot, arguments[slot].type.nbytes, True)
        for slot in sorted(up, key=lambda s: (first.get(s, len(launches)), s))
        if arguments[slot].type.nbytes
    ]
    after: dict[int, list[Work]] = {}
    for slot in sorted(down):
        if arguments[slot].type.nbytes:
            copy = Transfer(slot, arguments[slot].type.nbytes, False)
            after.setdefault(last.get(home.get(slot, slot), -1), []).append(copy)
    done += after.get(-1, [])
    for number, x in enumerate(launches):
        done += [x, *after.get(number, [])]
    return done


def dependences(program: CudaProgram, works: Sequence[Work]) -> list[set[int]]:
    """For each launch or copy, the numbers of those before it that must have ended."""
    home = homes(program)
    slots: dict[int, _Bytes] = {}
    touched = [_touched(x, home) for x in works]
    written = {slot for parts in touched for slot, _, _, is_written in parts if is_written}
    found: list[set[int]] = []
    for number, parts in enumerate(touched):
        needs: set[int] = set()
        for slot, low, high, is_written in parts:
            if slot not in written:
                continue
            bytes_ = slots.setdefault(slot, _Bytes())
            needs |= (bytes_.write if is_written else bytes_.read)(low, high, number)
        found.append(needs - {number})
    return found


def schedule(program: CudaProgram, works: Sequence[Work], most: int = STREAMS) -> list[Turn]:
    """The launches and copies of a run, in the same order, each with its stream; the first launch is on stream 0. At most `most`
    streams have launches."""
    needs = dependences(program, works)
    tails: list[int] = []  # the last launch of each stream of launches
    ends: dict[int, int] = {}  # the last turn of any stream
    stream: list[int] = []
    known: list[tuple[int, ...]] = []  # for each turn, per stream the last turn of it that has ended when it ends
    waits: list[tuple[int, ...]] = []
    for number, work in enumerate(works):
        if isinstance(work, Transfer):
            chosen = UPLOADS if work.up else DOWNLOADS
        else:
            before = [-1] * ALL
            for n in needs[number]:
                before = [max(a, b) for a, b in zip(before, known[n], strict=True)]
            chosen = _stream(needs[number], tails, before, most)
            if chosen == len(tails):
                tails.append(number)
            tails[chosen] = number
        here = list(known[ends[chosen]]) if chosen in ends else [-1] * ALL
        asked: list[int] = []
        for n in sorted(needs[number], reverse=True):
            if here[stream[n]] < n:
                asked.append(n)
                here = [max(a, b) for a, b in zip(here, known[n], strict=True)]
        here[chosen] = ends[chosen] = number
        stream.append(chosen)
        known.append(tuple(here))
        waits.append(tuple(sorted(asked)))
    awaited = {n for w in waits for n in w}
    return [Turn(x, s, w, k in awaited) for k, (x, s, w) in enumerate(zip(works, stream, waits, strict=True))]


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


__all__ = ["ALL", "DOWNLOADS", "STREAMS", "UPLOADS", "Transfer", "Turn", "Work", "beside", "dependences", "homes", "schedule"]
