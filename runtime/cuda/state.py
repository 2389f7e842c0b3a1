"""The state of a batch of blocks that run in lock-step: registers, who is active, barriers' clocks, shared and local memory.

A register is one numpy array over all threads of the batch in an unsigned dtype of its size, or a numpy scalar where all
threads are known to agree. `ix` are the threads an instruction runs for (None: every living one); values that operations see
have the length of `ix`, or of the batch where it is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ...ir.errors import KernelFaultError
from .memory import (
    _TIME,
    GLOBAL_BASE,
    IN_FLIGHT,
    OUTSIDE,
    RED_ZONE,
    UNWRITTEN,
    WRITTEN,
    GlobalMemory,
    Shadow,
    pack,
    unpack,
)
from .ptx_parse import Instruction, Kernel, Variable
from .ptx_types import WARP

Array = np.ndarray[Any, Any]
Value = Any


@dataclass
class Counters:
    """What a launch did, where counting was asked for. Shared memory: `shared_cycles` / `shared_phases` is 1 without bank
    conflicts. Global memory: `sectors` of 32 bytes per `requests` of a warp; `bytes` of those sectors were asked for."""

    steps: int = 0  # instructions issued, each for a group of threads of a batch
    instructions: int = 0  # instructions executed, summed over threads
    opcodes: dict[str, int] = field(default_factory=dict)  # per warp
    shared_phases: int = 0
    shared_cycles: int = 0
    requests: int = 0
    sectors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Extent:
    """Bytes that a launch may touch: from `address` on; `written` if it may write there."""

    address: int
    nbytes: int
    written: bool = True
    name: str = ""


@dataclass
class Options:
    """How to run: `check` turns memory and race checks on, `count` fills Counters beyond the first two, `budget` bounds the
    instructions issued per batch of blocks, `batch` the threads that run in lock-step."""

    check: bool = True
    count: bool = False
    budget: int = 20_000_000
    batch: int = 1 << 15


def layout(variables: list[Variable], dynamic: int) -> tuple[dict[str, tuple[int, int]], int]:
    """(offset, bytes) of each shared or local variable, with red zones between, and the bytes of all. External ones, whose
    size is the launch's, share one place at the end."""
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for v in (v for v in variables if not v.extern):
        align = max(v.align, 16)
        at = -(-at // align) * align
        places[v.name] = at, v.size
        at += v.size + RED_ZONE
    at = -(-at // RED_ZONE) * RED_ZONE
    for v in (v for v in variables if v.extern):
        places[v.name] = at, dynamic
    return places, at + (dynamic + RED_ZONE if any(v.extern for v in variables) else 0)


class Region:
    """Shared or local memory of a batch: one stretch of `stride` bytes per block or thread."""

    def __init__(self, name: str, owners: int, places: dict[str, tuple[int, int]], nbytes: int, grain: int, check: bool) -> None:
        self.name = name
        self.places = places
        self.stride = max(-(-nbytes // 256) * 256, 256)
        self.data = np.full(owners * self.stride, 0xFF, np.uint8)
        self.state = np.zeros(owners * self.stride, np.uint8)
        view = self.state.reshape(owners, self.stride)
        for at, size in places.values():
            view[:, at : at + size] = UNWRITTEN
        self.shadow = Shadow(len(self.data), grain) if check else None

    def describe(self, at: int) -> str:
        if not self.places:
            return f"the kernel has no {self.name} variables"

        def distance(place: tuple[str, tuple[int, int]]) -> int:
            start, size = place[1]
            return 0 if start <= at < start + size else min(abs(at - start), abs(at - start - size + 1))

        name, (start, size) = min(self.places.items(), key=distance)
        return f"byte {at - start} of {name} [{size} bytes]"


class Batch:
    """Some blocks of a launch, in lock-step."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: Array,
        options: Options,
        counters: Counters,
        regions: tuple[tuple[dict[str, tuple[int, int]], int], tuple[dict[str, tuple[int, int]], int]],
        grains: tuple[int, int],
        global_shadow: Shadow | None,
        extents: tuple[Extent, ...] | None,
        params: bytes,
        clock: int,
    ) -> None:
        self.kernel, self.memory, self.options, self.counters = kernel, memory, options, counters
        self.grid, self.block, self.blocks, self.params = grid, block, blocks, params
        self.check, self.count = options.check, options.count
        size = block[0] * block[1] * block[2]
        self.size = size
        n = len(blocks)
        self.n_blocks, self.threads = n, n * size
        lane = np.arange(size, dtype=np.int64)
        self.in_block = np.tile(lane, n)
        self.block_of = np.repeat(np.arange(n), size)
        warps = -(-size // WARP)
        self.warps_per_block = warps
        self.warp_of = self.block_of * warps + self.in_block // WARP
        self.lane = self.in_block % WARP
        self.who = pack(np.repeat(blocks, size), self.in_block)
        self.block_time = np.full(n, clock, np.int64)
        self.warp_time = np.full(n * warps, clock, np.int64)
        self.clock = clock
        self._restamp()
        self.shared = Region("shared", n, *regions[0], grains[1], options.check)
        self.local = Region("local", self.threads if regions[1][1] else 1, *regions[1], 1, False)
        self.shadow = global_shadow
        self.extents = extents
        if extents is not None:
            order = sorted(extents, key=lambda e: e.address)
            self.starts = np.array([e.address for e in order], np.int64)
            self.ends = np.array([e.address + e.nbytes for e in order], np.int64)
            self.may_write = np.array([e.written for e in order], np.bool_)
            self.writable = [(e.address, e.address + e.nbytes) for e in order if e.written]
            self.overlap = bool((self.starts[1:] < self.ends[:-1]).any())
        self.regs: list[Any] = [None] * len(kernel.registers)
        self.partial: dict[int, Array] = {}  # registers that not every thread has written: which have
        self.all = np.arange(self.threads)
        self.alive = np.ones(self.threads, np.bool_)
        self.living = self.all
        self.ix: Array | None = None
        self.act: Array = self.all
        self.instruction: Instruction | None = None
        self.carry: Array = np.zeros(self.threads, np.bool_)
        self.groups = np.zeros(self.threads, np.int64)  # cp.async groups committed by each thread
        self.copies: list[Any] = []  # cp.async not yet waited for

    # ------------------------------------------------------------------ who runs

    def select(self, act: Array) -> None:
        """The threads that what follows runs for: `act` ascending."""
        self.act = act
        self.ix = None if len(act) == len(self.living) else act

    def active(self, v: Value) -> Value:
        """A value seen by operations, as one of the length of `act`."""
        if np.ndim(v) == 0 or len(v) == len(self.act):
            return v
        return v[self.act]

    def advance(self, blocks: Array) -> None:
        """A barrier of whole blocks (numbers in the batch) has been passed."""
        if self.shared.shadow is not None:
            if len(blocks) == self.n_blocks:
                self.shared.shadow.drop()
            else:
                self.shared.shadow.settle(self)
        self.clock += 1
        self.block_time[blocks] = self.clock
        self._restamp()

    def advance_warps(self, warps: Array) -> None:
        """A barrier of whole warps has been passed."""
        if self.shared.shadow is not None:
            self.shared.shadow.settle(self)
        self.clock += 1
        self.warp_time[warps] = self.clock
        self._restamp()

    def _restamp(self) -> None:
        self.stamp = self.who | (np.int64(self.clock) << _TIME)
        self.oldest_time = int(self.block_time.min())
        self.floor = self.block_time[self.block_of] << _TIME  # earlier words of a thread's own block are ordered before now

    # ------------------------------------------------------------------ naming what went wrong

    def name(self, thread: int) -> str:
        """`block (0,0,0) thread (37,0,0)` for a thread of the batch."""
        return self._name(int(self.blocks[self.block_of[thread]]), int(self.in_block[thread]))

    def _name(self, block: int, thread: int) -> str:
        (gx, gy, _), (bx, by, _) = self.grid, self.block
        return (
            f"block ({block % gx},{block // gx % gy},{block // (gx * gy)}) "
            f"thread ({thread % bx},{thread // bx % by},{thread // (bx * by)})"
        )

    def name_word(self, word: int) -> str:
        return self._name(*unpack(word))

    def fault(self, kind: str, what: str, threads: Array | None = None) -> NoReturn:
        """Raises KernelFaultError: kernel, threads (the first and how many), what, instruction."""
        names = ""
        if threads is not None and len(threads):
            more = f" and {len(threads) - 1} more" if len(threads) > 1 else ""
            names = f"{self.name(int(threads[0]))}{more}: "
        at = f", at {self.instruction.where}" if self.instruction is not None else ""
        raise KernelFaultError(kind, f"kernel {self.kernel.name}: {names}{what}{at}")

    # ------------------------------------------------------------------ memory

    def touch(self, space: str, address: Array, size: int, kind: str, act: Array | None = None) -> Array:
        """The bytes' places in the memory's data, after every check. `kind`: r read, w write, a atomic, n read-only load,
        i (the write of a cp.async is issued), d (it is done)."""
        act = self.act if act is None else act
        if space == "global":
            return self._touch_global(address, size, kind, act)
        region = self.shared if space == "shared" else self.local
        owner = self.block_of[act] if space == "shared" else act
        bad = (address < 0) | (address + size > region.stride)
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            where = f"{space} address {int(address[j]):#x}, {size} bytes: {region.describe(int(address[j]))}"
            self.fault("out of bounds", where, act[bad])
        place = address + owner * region.stride
        self._judge(space, region.state, place, size, kind, act, lambda at: region.describe(at % region.stride))
        if self.check and region.shadow is not None:
            self._race(space, region.shadow, place, size, kind, act, lambda at: region.describe(at % region.stride))
        return place

    def _touch_global(self, address: Array, size: int, kind: str, act: Array) -> Array:
        memory = self.memory
        place = address - GLOBAL_BASE
        bad = (place < 0) | (place + size > memory.capacity)
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            near = "a null pointer" if 0 <= address[j] < 65536 else memory.describe(int(place[j]))
            self.fault("out of bounds", f"global address {int(address[j]):#x}, {size} bytes: {near}", act[bad])
        if self.extents is not None and self.check:
            self._within(address, size, kind, act)
        self._judge("global", memory.state, place, size, kind, act, memory.describe)
        for v in self.memory.variables if kind in "wa" and self.check else ():
            bad = (place >= v.start) & (place < v.start + v.nbytes)
            if v.constant and bad.any():
                self.fault("write to constant memory", memory.describe(int(place[np.flatnonzero(bad)[0]])), act[bad])
        if self.check and self.shadow is not None:
            if kind == "n":
                cells = place >> self.shadow.shift
                bad = self.shadow.writes[cells] != 0
                if bad.any():
                    j = int(np.flatnonzero(bad)[0])
                    writer = self.name_word(int(self.shadow.writes[cells[j]]))
                    what = f"{memory.describe(int(place[j]))} was written in this launch by {writer}"
                    self.fault("read-only load of written data", what, act[bad])
            if kind not in "rn" or self._may_be_written(address, size):
                self._race("global", self.shadow, place, size, kind, act, memory.describe)
        return place

    def _may_be_written(self, address: Array, size: int) -> bool:
        """Whether this launch may write near what is read: reads of other memory cannot race."""
        if self.extents is None:
            return True
        low, high = address.min(initial=0), address.max(initial=0) + size
        if any(low < end and high > start for start, end in self.writable):
            return True
        low, high = low - GLOBAL_BASE, high - GLOBAL_BASE
        return any(not v.constant and low < v.start + v.nbytes and high > v.start for v in self.memory.variables)

    def _within(self, address: Array, size: int, kind: str, act: Array) -> None:
        """Checks that a launch touches what its pointers stand for, and writes only where it may."""
        if self.overlap:
            ok = np.zeros(len(address), np.bool_)
            for s, e, w in zip(self.starts, self.ends, self.may_write, strict=True):
                if w or kind in "rn":
                    ok |= (address >= s) & (address + size <= e)
        else:
            k = np.searchsorted(self.starts, address, "right") - 1
            ok = (k >= 0) & (address + size <= self.ends[k])
            if kind not in "rn":
                ok &= self.may_write[k]
        if ok.all():
            return
        for v in self.memory.variables:  # a module's own variables are the kernel's, too
            ok |= (address - GLOBAL_BASE >= v.start) & (address - GLOBAL_BASE + size <= v.start + v.nbytes)
        if not ok.all():
            j = int(np.flatnonzero(~ok)[0])
            parts = [f"{e.name or 'pointer'}[{e.nbytes}]{'' if e.written else ' (read only)'}" for e in self.extents or ()]
            spans = ", ".join(parts)
            near = max((e for e in self.extents or () if e.address <= address[j]), key=lambda e: e.address, default=None)
            where = f"byte {int(address[j]) - near.address} from {near.name or 'a pointer'}" if near else f"{int(address[j]):#x}"
            what = "a read of" if kind in "rn" else "a write to"
            self.fault("out of bounds", f"{what} {size} bytes at {where}, outside what the launch may touch: {spans}", act[~ok])

    def _judge(self, space: str, state: Array, place: Array, size: int, kind: str, act: Array, describe: Any) -> None:
        if size > 1:
            bad = (place & (size - 1)) != 0
            if bad.any():
                j = int(np.flatnonzero(bad)[0])
                rest = int(place[j]) % size
                self.fault(
                    "misaligned", f"{size} bytes at a {space} address with remainder {rest}: {describe(int(place[j]))}", act[bad]
                )
        wide = min(size, 8)
        seen = state.view(f"u{wide}")
        first = place // wide
        one = seen.dtype.type(int.from_bytes(b"\1" * wide, "little"))
        parts = [first + k for k in range(size // wide)]
        if self.check:
            for at in parts:
                s = seen[at]
                # what is read must be WRITTEN (2); what is written UNWRITTEN or WRITTEN (1, 2): one of two bits set
                ok = s == one * seen.dtype.type(WRITTEN) if kind in "rna" else ((s ^ (s >> seen.dtype.type(1))) & one) == one
                if not ok.all():
                    self._explain(space, state, place, size, kind, act, describe)
                    break
        if kind not in "rn":
            mark = one * seen.dtype.type(IN_FLIGHT if kind == "i" else WRITTEN)
            for at in parts:
                seen[at] = mark

    def _explain(self, space: str, state: Array, place: Array, size: int, kind: str, act: Array, describe: Any) -> None:
        per_byte = state[place[:, None] + np.arange(size)]
        bad = (per_byte == OUTSIDE).any(1)
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            self.fault("out of bounds", f"{space} memory, {size} bytes: {describe(int(place[j]))}", act[bad])
        if kind == "d":
            return
        bad = (per_byte == IN_FLIGHT).any(1)
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            where = describe(int(place[j]))
            self.fault("cp.async not waited for", f"{space} memory that an asynchronous copy may still write: {where}", act[bad])
        if kind in "rna":
            bad = (per_byte == UNWRITTEN).any(1)
            if bad.any():
                j = int(np.flatnonzero(bad)[0])
                self.fault("uninitialised read", f"{space} memory nobody has written: {describe(int(place[j]))}", act[bad])

    def _race(self, space: str, shadow: Shadow, place: Array, size: int, kind: str, act: Array, describe: Any) -> None:
        cells = place >> shadow.shift
        per = max(1, size >> shadow.shift)
        who = act
        if kind in "rn" and space == "shared":
            for k in range(per):
                these = cells + k if k else cells
                early = shadow.read_later(self, these, act)
                if early is not None:
                    at = int(these[early[0]]) << shadow.shift
                    self._raced(space, "reads", early[1], "writes", at, act[early[0]], describe)
            return
        if per > 1:
            cells = (cells[:, None] + np.arange(per)).reshape(-1)
            who = np.repeat(act, per)
        across = space == "global"
        if kind in "rn":
            seen = shadow.read(self, cells, who, across)
            found = (*seen, "write") if seen else None
        else:
            found = shadow.write(self, cells, who, across, kind == "a")
        if found is not None:
            j, word, other = found
            mine = {"r": "reads", "n": "reads", "a": "updates"}.get(kind, "writes")
            theirs = "reads" if other == "read" else "writes"
            self._raced(space, mine, word, theirs, int(cells[j]) << shadow.shift, who[j], describe)

    def _raced(self, space: str, mine: str, word: int, theirs: str, at: int, thread: int, describe: Any) -> NoReturn:
        what = f"{mine} {space} memory that {self.name_word(word)} {theirs} without a barrier between: {describe(at)}"
        self.fault("race", what, np.array([thread]))
