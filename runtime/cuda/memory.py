"""The emulator's memories, byte by byte: what may be accessed, what has been written, and who touched what since when.

Every byte has a state (OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT). For races, every cell of `grain` bytes remembers its last
writer and its readers in one 64-bit word each (`pack`): thread, block, time. Time is a clock per block that every barrier
advances; two accesses of different threads are ordered if a barrier of their block (or of their warp, within one) lies between
them. Different blocks are never ordered within a launch; atomic accesses do not race with each other.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...ir.errors import DeviceError, DeviceMemoryError

if TYPE_CHECKING:
    from .state import Batch

Array = np.ndarray[Any, Any]

OUTSIDE: Final = 0
UNWRITTEN: Final = 1
WRITTEN: Final = 2
IN_FLIGHT: Final = 3  # the target of a cp.async nobody has waited for

GLOBAL_BASE: Final = 0x7F0000000000
SHARED_BASE: Final = 1 << 40  # where shared and local memory lie among generic addresses
LOCAL_BASE: Final = 1 << 41
WINDOW: Final = 1 << 40
RED_ZONE: Final = 256  # bytes nobody may touch between two variables
ALIGN: Final = 256
POISON: Final = 0xFF  # unwritten bytes: NaN as a float, -1 as an integer

# A word of the shadow: time << 40 | many << 39 | others << 38 | atomic << 37 | block << 11 | thread + 1. `many`: another thread
# read since the last barrier too; `others`: another block did, at any time.
_THREAD: Final = 11
_BLOCK: Final = 26
_ATOMIC: Final = np.int64(1 << 37)
_OTHERS: Final = np.int64(1 << 38)
_MANY: Final = np.int64(1 << 39)
_TIME: Final = 40
_WHO: Final = np.int64((1 << 37) - 1)
MAX_BLOCKS: Final = (1 << _BLOCK) - 2
MAX_TIME: Final = (1 << 23) - 2
_MOST_LATER: Final = 512  # reads that wait to be noted


def pack(block: Array, thread: Array) -> Array:
    """Who: the block's number and the thread's number in it, as one word that is never 0."""
    return (block.astype(np.int64) << _THREAD) | (thread.astype(np.int64) + 1)


def unpack(word: int) -> tuple[int, int]:
    """(block, thread) of a word of the shadow."""
    who = int(word) & int(_WHO)
    return who >> _THREAD, (who & ((1 << _THREAD) - 1)) - 1


class Shadow:
    """Who last wrote and read each cell of a memory."""

    def __init__(self, nbytes: int, grain: int) -> None:
        self.grain = grain
        self.shift = grain.bit_length() - 1
        cells = (nbytes >> self.shift) + 1
        self.writes = np.zeros(cells, np.int64)
        self.reads = np.zeros(cells, np.int64)
        self._later: list[tuple[Array, Array]] = []  # reads not yet noted: only a write before the next barrier asks for them

    def read_later(self, b: Batch, cells: Array, act: Array) -> tuple[int, int] | None:
        """As `read` of a block's own memory, but noted only once a write asks: most are behind a barrier by then."""
        w = self.writes[cells]
        top = w.max(initial=0)
        if top and (top >> _TIME) >= b.oldest_time:
            hit = self._unordered(b, w, act, False)
            if hit.any():
                j = int(np.flatnonzero(hit)[0])
                return j, int(w[j])
        self._later.append((cells, act))
        if len(self._later) > _MOST_LATER:
            self.settle(b)
        return None

    def settle(self, b: Batch) -> None:
        """Notes the reads that wait; before the clock of some threads moves on."""
        waiting, self._later = self._later, []
        for cells, act in waiting:
            self._note_read(b, cells, act, False)

    def drop(self) -> None:
        """Forgets the reads that wait: every thread has passed a barrier since."""
        self._later = []

    def _unordered(self, b: Batch, word: Array, act: Array, across: bool) -> Array:
        """Where an earlier access is by another thread and nothing orders it before now."""
        me = b.who[act]
        other = (word != 0) & ((word & _WHO) != me)
        if not other.any():
            return other
        time = word >> _TIME
        block = b.block_of[act]
        done = time < b.block_time[block]
        same_warp = ((word & _WHO) - 1) >> 5 == (me - 1) >> 5
        done |= same_warp & (time < b.warp_time[b.warp_of[act]])
        if across:
            done &= ((word & _WHO) >> _THREAD) == (me >> _THREAD)
        return other & ~done

    def read(self, b: Batch, cells: Array, act: Array, across: bool) -> tuple[int, int] | None:
        """Notes a read. Returns (index into cells, word) of a race with an earlier write."""
        w = self.writes[cells]
        top = w.max(initial=0)
        if top and (across or (top >> _TIME) >= b.oldest_time):
            hit = self._unordered(b, w, act, across)
            if hit.any():
                j = int(np.flatnonzero(hit)[0])
                return j, int(w[j])
        self._note_read(b, cells, act, across)
        return None

    def _note_read(self, b: Batch, cells: Array, act: Array, across: bool) -> None:
        me = b.stamp[act]
        old = self.reads[cells]
        live = old >= b.floor[act]
        if live.any():
            live &= (((old ^ me) & _WHO) != 0) | ((old & _MANY) != 0)
            me = me | live * _MANY
        if across and old.any():
            differs = (old != 0) & (((old ^ me) & _WHO) >> _THREAD != 0)
            me = me | (old & _OTHERS) | differs * _OTHERS
        self.reads[cells] = me
        now = self.reads[cells]
        lost = ((now ^ me) & _WHO) != 0  # several threads of this instruction read one cell
        if lost.any():
            at = cells[lost]
            if across:
                mine, last = me[lost], now[lost]
                mark = _MANY | (((last ^ mine) & _WHO) >> _THREAD != 0) * _OTHERS | (mine & _OTHERS)
                np.bitwise_or.at(self.reads, at, mark)
            else:
                self.reads[at] = now[lost] | _MANY

    def write(self, b: Batch, cells: Array, act: Array, across: bool, atomic: bool) -> tuple[int, int, str] | None:
        """Notes a write. Returns (index into cells, word, what it races with)."""
        if self._later:
            self.settle(b)
        w = self.writes[cells]
        top = w.max(initial=0)
        if top and (across or (top >> _TIME) >= b.oldest_time):
            hit = self._unordered(b, w, act, across)
            if atomic:
                hit &= (w & _ATOMIC) == 0
            if hit.any():
                j = int(np.flatnonzero(hit)[0])
                return j, int(w[j]), "write"
        r = self.reads[cells]
        if r.any():
            me = b.who[act]
            hit = self._unordered(b, r, act, across)
            live = (r >> _TIME) >= b.block_time[b.block_of[act]]
            many = ((r & _MANY) != 0) & live & (((r & _WHO) >> _THREAD == me >> _THREAD) | across)
            hit |= many
            if across:
                hit |= (r & _OTHERS) != 0
            if hit.any():
                j = int(np.flatnonzero(hit)[0])
                return j, int(r[j]), "read"
        me = b.stamp[act]
        if atomic:
            me = me | _ATOMIC
        self.writes[cells] = me
        if not atomic:
            now = self.writes[cells]
            lost = now != me
            if lost.any():
                j = int(np.flatnonzero(lost)[0])
                return j, int(now[j]), "write"
        return None


@dataclass
class Allocation:
    """A piece of global memory: `start` counts from the memory's first byte."""

    start: int
    nbytes: int
    name: str
    constant: bool = False
    module: bool = False  # a variable of a PTX module
    freed: bool = False


class GlobalMemory:
    """A device's memory of `capacity` bytes, of which the machine commits what is touched."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = np.zeros(capacity, np.uint8)
        self.state = np.zeros(capacity, np.uint8)
        self.allocations: list[Allocation] = []  # by start; freed ones too, until their place is taken
        self.variables: list[Allocation] = []  # those of modules
        self.used = 0

    def allocate(self, nbytes: int, name: str = "", constant: bool = False, module: bool = False) -> int:
        """The address of `nbytes` unwritten bytes. Raises DeviceMemoryError where no gap is large enough."""
        at = RED_ZONE
        place = len(self.allocations)
        live = [a for a in self.allocations if not a.freed]
        for a in live:
            if a.start - at >= nbytes + RED_ZONE:
                break
            at = -(-(a.start + a.nbytes + RED_ZONE) // ALIGN) * ALIGN
        if at + nbytes + RED_ZONE > self.capacity:
            raise DeviceMemoryError(
                f"out of device memory: {nbytes:,} bytes asked for, {self.used:,} of {self.capacity:,} in use. "
                "Use smaller batches, or free what is not needed"
            )
        self.allocations = [a for a in self.allocations if not a.freed or a.start + a.nbytes <= at or a.start >= at + nbytes]
        place = bisect.bisect_left([a.start for a in self.allocations], at)
        made = Allocation(at, nbytes, name, constant, module)
        self.allocations.insert(place, made)
        if module:
            self.variables.append(made)
        self.state[at : at + nbytes] = UNWRITTEN
        self.data[at : at + nbytes] = POISON
        self.used += nbytes
        return GLOBAL_BASE + at

    def find(self, address: int) -> Allocation | None:
        """The living allocation that starts at an address."""
        at = address - GLOBAL_BASE
        return next((a for a in self.allocations if a.start == at and not a.freed), None)

    @property
    def top(self) -> int:
        """The end of the last allocation."""
        return max((a.start + a.nbytes for a in self.allocations), default=0)

    def free(self, address: int) -> None:
        """Raises DeviceError where nothing living starts at the address."""
        a = self.find(address)
        if a is None:
            raise DeviceError(f"nothing is allocated at {address:#x}: it was freed before, or never allocated")
        a.freed = True
        if a.module:
            self.variables.remove(a)
        self.state[a.start : a.start + a.nbytes] = OUTSIDE
        self.used -= a.nbytes

    def range(self, address: int, nbytes: int) -> slice:
        """The bytes of a copy from or to the host. Raises DeviceError where they are not all allocated."""
        at = address - GLOBAL_BASE
        if at < 0 or at + nbytes > self.capacity or (nbytes and not self.state[at : at + nbytes].all()):
            raise DeviceError(f"a copy of {nbytes:,} bytes at {address:#x} leaves what is allocated: {self.describe(at)}")
        return slice(at, at + nbytes)

    def describe(self, at: int) -> str:
        """Where a byte lies, in words: the nearest allocation and the offset in it."""
        if not self.allocations:
            return "no memory is allocated"

        def distance(a: Allocation) -> int:
            return 0 if a.start <= at < a.start + a.nbytes else min(abs(at - a.start), abs(at - a.start - a.nbytes + 1))

        a = min(self.allocations, key=distance)
        freed = " (freed)" if a.freed else ""
        offset = at - a.start
        end = f", {offset - a.nbytes} bytes past its end" if offset >= a.nbytes else ""
        return f"byte {offset} of {a.name or 'an allocation'} [{a.nbytes} bytes]{freed}{end}"
