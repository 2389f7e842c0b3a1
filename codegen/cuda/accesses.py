"""What one launch does to memory and arithmetic, counted from its loop IR: sectors, bank conflicts, operations.

The index expressions are evaluated for the lanes of some warps (all of them where there are few), with long loops sampled at a
few passes. Nothing runs: an index that depends on data counts as a sector for each lane (`scattered`), a branch that does as
taken on both sides, a loop that does as one pass. The rules are the hardware's, as in runtime/cuda/counters.py: a request is
one access of a warp, at most 16 bytes a lane; a sector has 32 bytes; shared memory serves 128 bytes at a time from 32 banks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ...ir.dtypes import bool_, f64, i64
from ...ir.expr import Expr, postorder
from ..loop_ir import WARP_OPS, Barrier, Buffer, For, If, Kernel, Let, Stmt, Store, Warp, expressions
from ..loop_values import apply
from ..vecmath import expand
from ..vectorize import vectorize_loop
from .machine import WARP
from .shape import shape_of

Array = np.ndarray[Any, Any]
WIDEST: Final = 16  # bytes a lane may access at once
SECTOR: Final = 32
BANKS: Final = 32
_EVERY: Final = 24  # warps of a launch that are all looked at; of more, as many, spread out
_PASSES: Final = (4, 2, 2)  # passes of a loop that are looked at, by how many loops are around it
_UNKNOWN_OPS: Final = ("load", "lane_xor", "to_line", "shuffle", "bitcast", "four_bits", "table", "scale")
_FREE: Final = ("const", "var", "load", "ramp", "broadcast", "shuffle", "bitcast", "lane_xor", "to_line", "select")


@dataclass
class Counts:
    """Sums over a whole launch. `flops` by arithmetic: 'f32' (and narrower), 'f64', or the operands' dtype on tensor cores."""

    flops: dict[str, float] = field(default_factory=dict)
    requests: float = 0.0
    sectors: float = 0.0
    bytes: float = 0.0
    scattered: float = 0.0
    shared_phases: float = 0.0
    shared_cycles: float = 0.0
    touched: dict[str, float] = field(default_factory=dict)  # bytes of the sectors of each buffer
    exact: bool = True  # no sample, no guess

    def work(self, kind: str, amount: float) -> None:
        if amount:
            self.flops[kind] = self.flops.get(kind, 0.0) + amount


def count(kernel: Kernel) -> Counts:
    """The counts of a kernel that is one launch."""
    return _Walk(kernel).counts


@dataclass(frozen=True, eq=False)
class _Known:
    """A statement, its arithmetic (of one thread) and its loads from memory."""

    statement: Stmt
    flops: dict[str, float]
    loads: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class _Piece:
    """One access of `width` bytes a lane at the byte offsets `place` (warps x 32)."""

    place: Array
    width: int
    active: Array
    weight: float

    def joined(self, other: _Piece) -> _Piece | None:
        """Both as one access, where `other` is as wide, follows it, and the two are aligned."""
        both = 2 * self.width
        if other.width != self.width or both > WIDEST or other.weight != self.weight:
            return None
        if not np.array_equal(self.active, other.active):
            return None
        first = self.place[self.active]
        if (other.place[self.active] - first != self.width).any() or (first % both).any():
            return None
        return _Piece(self.place, both, self.active, self.weight)


class _Walk:
    """Follows the statements with the lanes of the chosen warps side by side: values are arrays of warps x 32 lanes x vector."""

    def __init__(self, kernel: Kernel) -> None:
        self.counts = Counts()
        self.grid, self.threads = shape_of(kernel)
        per_block = -(-self.threads // WARP)
        total = self.grid[0] * self.grid[1] * self.grid[2] * per_block
        if total <= _EVERY:
            chosen: Array = np.arange(total)
        else:  # fractions of the golden ratio: spread evenly, and no multiple of the warps of a block
            chosen = np.unique((np.arange(_EVERY) * 0.6180339887498949 % 1.0 * total).astype(np.int64))
            self.counts.exact = False
        self.weight = total / len(chosen)
        block, warp = chosen // per_block, chosen % per_block
        x, y, _ = self.grid
        self.blocks = [block % x, block // x % y, block // (x * y)]
        self.lanes = (warp[:, None] * WARP + np.arange(WARP))[:, :, None]
        self.values: dict[Expr, Array | None] = {}
        self.registers: dict[tuple[str, tuple[Expr, ...]], Array | None] = {}
        self.expanded: dict[Expr, Expr] = {}
        self.known: dict[int, _Known] = {}  # by id of a statement, which it keeps alive
        self.outer = sum(1 for _ in self._blocks(kernel.body))
        self.depth = 0
        self.pieces: dict[tuple[Buffer, bool], list[_Piece]] = {}
        self.block(kernel.body, self.lanes[:, :, 0] < self.threads, self.weight)
        self.flush()

    @staticmethod
    def _blocks(body: Sequence[Stmt]) -> list[For]:
        found: list[For] = []
        while body and isinstance(body[0], For) and body[0].kind == "block":
            found.append(body[0])
            body = body[0].body
        return found

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self, root: Expr, memo: dict[Expr, Array | None]) -> Array | None:
        """The values of an integer or bool expression; None where it depends on data."""
        for e in postorder([root], memo):
            args = [memo[a] for a in e.args]
            if e.op == "var":
                memo[e] = self.values.get(e)
            elif e.op == "const":
                memo[e] = np.array(e.attr, e.dtype.numpy).reshape(1, 1, 1)
            elif e.op == "load" and e.dtype is i64 and e.attr[0].scope == "register":
                memo[e] = self.registers.get((e.attr[0].name, e.args))
            elif e.op in _UNKNOWN_OPS or e.dtype.is_float or any(a is None for a in args):
                memo[e] = None
            elif e.op == "ramp":
                assert args[0] is not None
                memo[e] = args[0] + np.arange(e.lanes)
            elif e.op == "broadcast":
                memo[e] = args[0]
            else:
                memo[e] = apply(e, [a for a in args if a is not None])
        return memo[root]

    def flag(self, e: Expr | None, memo: dict[Expr, Array | None], active: Array) -> Array:
        """The lanes for which a condition holds, as warps x 32 (any lane of a vector); all where that depends on data."""
        if e is None:
            return active
        found = self.value(e, memo)
        if found is None:
            self.counts.exact = False
            return active
        return active & np.broadcast_to(found, (*active.shape, found.shape[-1])).any(-1)

    # -- statements ---------------------------------------------------------------------------------------------------

    def block(self, body: Sequence[Stmt], active: Array, weight: float) -> None:
        for s in body:
            if isinstance(s, For) and s.kind in ("block", "thread"):
                self._place(s, active, weight)
                continue
            memo: dict[Expr, Array | None] = {}
            known = self.known.get(id(s)) or self._learn(s)
            if known.flops:
                lanes = int(active.sum()) * weight
                for kind, amount in known.flops.items():
                    self.counts.work(kind, amount * lanes)
            for e in known.loads:
                b, rank = e.attr
                self.access(b, e.args[:rank], e.lanes, e.args[rank] if len(e.args) > rank else None, memo, active, weight)
            match s:
                case Let():
                    plain = s.value.dtype is i64 or s.value.dtype is bool_
                    self.values[s.var] = self.value(s.value, memo) if plain else None
                case Store():
                    if s.buffer.scope == "register" and s.buffer.dtype is i64:  # a count that goes from step to step
                        self.registers[s.buffer.name, s.index] = self.value(s.value, memo)
                    self.access(s.buffer, s.index, s.value.lanes, s.mask, memo, active, weight, write=True)
                case If():
                    held = self.value(s.condition, memo)
                    taken = self.flag(s.condition, memo, active)
                    if taken.any():
                        self.block(s.then, taken, weight)
                    rest = active if held is None else active & ~taken
                    if s.otherwise and rest.any():
                        self.block(s.otherwise, rest, weight)
                case For():
                    self.loop(s, memo, active, weight)
                case Warp():
                    self._warp(s, memo, active, weight)
                case Barrier():
                    self.flush()
                case _:
                    pass  # hints move no data; local arrays are the thread's own

    def _place(self, s: For, active: Array, weight: float) -> None:
        if s.kind == "thread":
            self.values[s.var] = self.lanes
        else:
            self.outer -= 1
            self.values[s.var] = self.blocks[self.outer][:, None, None]
        self.block(s.body, active, weight)

    def loop(self, s: For, memo: dict[Expr, Array | None], active: Array, weight: float) -> None:
        if s.kind == "vector":
            self.block(vectorize_loop(s, 4), active, weight)
            return
        start, stop = self.value(s.start, memo), self.value(s.stop, memo)
        if start is None or stop is None:
            self.counts.exact = False
            self.values[s.var] = None
            self.block(s.body, active, weight)
            return
        passes = int(np.max((stop - start + s.step - 1) // s.step, initial=0))
        most = _PASSES[min(self.depth, len(_PASSES) - 1)]
        if passes <= most or (s.kind == "unrolled" and passes <= _PASSES[0]):
            chosen: Sequence[int] = range(passes)
        elif s.kind == "unrolled":
            chosen = range(_PASSES[0])  # neighbours, whose accesses may be joined
            self.counts.exact = False
        else:  # the last one may be ragged: it stands for itself
            chosen = [*(k * (passes - 1) // (most - 1) for k in range(most - 1)), passes - 1]
            self.counts.exact = False
        if s.kind != "unrolled":
            self.flush()
        self.depth += s.kind != "unrolled"
        whole = passes == len(chosen) or s.kind == "unrolled"
        for k in chosen:
            at = start + k * s.step
            running = active & np.broadcast_to(at < stop, (*active.shape, 1))[:, :, 0]
            if running.any():
                self.values[s.var] = at
                stands = passes / len(chosen) if whole else 1 if k == passes - 1 else (passes - 1) / (len(chosen) - 1)
                self.block(s.body, running, weight * stands)
                if s.kind != "unrolled":
                    self.flush()
        self.depth -= s.kind != "unrolled"

    def _warp(self, s: Warp, memo: dict[Expr, Array | None], active: Array, weight: float) -> None:
        if s.op.startswith("mma_"):
            sizes = [WARP * n for _, _, n in WARP_OPS[s.op][0]]  # registers of 32 bits: of the sums, of A and of B
            operand = "i8" if "8" in s.op else s.op.removeprefix("mma_").removesuffix("_half")
            per = {"i8": 4, "tf32": 1}.get(operand, 2)
            steps = float(np.sqrt(sizes[0] * sizes[1] * per * sizes[2] * per))  # of (M N) (M K) (K N): M N K
            self.counts.work(operand, 2 * steps * float(active.any(1).sum()) * weight)
            return
        reading = active
        if s.op == "copy_async":  # lanes that copy no byte write zeros, and read nothing
            nbytes = self.value(s.values[0], memo)
            if nbytes is not None:
                reading = active & np.broadcast_to(nbytes > 0, (*active.shape, 1))[:, :, 0]
        size = int(s.op.removeprefix("load_bits_")) if s.op.startswith("load_bits_") else WIDEST
        for k, (b, index) in enumerate(s.places):
            if b.scope in ("shared", "global"):
                lanes = max(1, size // b.dtype.itemsize)
                held = reading if b.scope == "global" else active
                self.access(b, index, lanes, None, memo, held, weight, write=k == 0)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _learn(self, s: Stmt) -> _Known:
        """What is the same each time a statement is met."""
        flops: dict[str, float] = {}
        for e in postorder([expand(e, self.expanded) for e in expressions(s)]):
            if e.dtype.is_float and e.op not in _FREE and e.op != "cast":
                kind = "f64" if e.dtype is f64 else "f32"
                flops[kind] = flops.get(kind, 0.0) + e.lanes * (2 if e.op == "fma" else 1)
        loads = tuple(e for e in postorder(expressions(s)) if e.op == "load" and e.attr[0].scope in ("global", "shared"))
        found = self.known[id(s)] = _Known(s, flops, loads)
        return found

    def access(
        self,
        b: Buffer,
        index: Sequence[Expr],
        lanes: int,
        mask: Expr | None,
        memo: dict[Expr, Array | None],
        active: Array,
        weight: float,
        *,
        write: bool = False,
    ) -> None:
        """One access of each lane, cut into what an instruction can do: 16 bytes where they lie side by side."""
        if b.scope not in ("global", "shared"):
            return
        active = self.flag(mask, memo, active)
        size = b.dtype.itemsize
        offset: Array = np.zeros((1, 1, 1), np.int64)
        for e, stride in zip(index, b.strides, strict=True):
            at = self.value(e, memo)
            if at is None:
                self._scattered(b, lanes, active, weight)
                return
            offset = offset + at * stride
        if lanes > 1 and all(e.lanes == 1 for e in index):
            offset = offset + np.arange(lanes) * b.strides[-1]
        place = np.broadcast_to(offset, (*active.shape, offset.shape[-1])) * size
        width = size
        if place.shape[-1] > 1 and (np.diff(place, axis=-1) == size).all():
            first = place[:, :, 0][active]
            low = int(np.bitwise_or.reduce(first, initial=WIDEST | max(b.align, size)))
            width = min(low & -low, WIDEST, size * place.shape[-1])
            place = place[:, :, :: width // size]
        for k in range(place.shape[-1]):
            self._wait(b, write, _Piece(place[:, :, k], width, active, weight))

    def _wait(self, b: Buffer, write: bool, piece: _Piece) -> None:
        """Holds a piece back: LLVM makes one access of neighbouring ones that nothing stands between."""
        held = self.pieces.setdefault((b, write), [])
        while held and (joined := held[-1].joined(piece)) is not None:
            held.pop()
            piece = joined
        held.append(piece)

    def flush(self) -> None:
        """Counts what was held back: loops and barriers end what can be joined."""
        for (b, _), held in self.pieces.items():
            for p in held:
                if b.scope == "shared":
                    self._shared(p.place, p.width, p.active, p.weight)
                else:
                    self._global(b, p.place, p.width, p.active, p.weight)
        self.pieces.clear()

    def _scattered(self, b: Buffer, lanes: int, active: Array, weight: float) -> None:
        self.counts.exact = False
        if b.scope == "shared":
            return  # which banks is not known; nothing is assumed
        n, warps = int(active.sum()) * lanes, int(active.any(1).sum()) * lanes
        self.counts.scattered += warps * weight
        self._add(b, warps * weight, n * weight, n * b.dtype.itemsize * weight)

    def _add(self, b: Buffer, requests: float, sectors: float, nbytes: float) -> None:
        c = self.counts
        c.requests += requests
        c.sectors += sectors
        c.bytes += nbytes
        c.touched[b.name] = c.touched.get(b.name, 0.0) + sectors * SECTOR

    def _global(self, b: Buffer, place: Array, width: int, active: Array, weight: float) -> None:
        sectors = np.concatenate([np.where(active, place // SECTOR, -1), np.where(active, (place + width - 1) // SECTOR, -1)], 1)
        sectors.sort(1)
        fresh = np.diff(sectors, axis=1, prepend=-1) > 0
        self._add(b, int(active.any(1).sum()) * weight, int(fresh.sum()) * weight, int(active.sum()) * width * weight)

    def _shared(self, place: Array, width: int, active: Array, weight: float) -> None:
        lanes = WARP if width <= 4 else 128 // width
        words = max(1, width // 4)
        phase = (np.arange(active.size) // lanes).reshape(active.shape)
        word = (place[:, :, None] // 4 + np.arange(words))[active].reshape(-1)
        if not len(word):
            return
        key = np.unique((np.repeat(phase[active], words) << 32) | word)  # a bank gives one word to any number of lanes
        bank, times = np.unique((key >> 32 << 5) | (key & (BANKS - 1)), return_counts=True)
        phases, first = np.unique(bank >> 5, return_index=True)
        self.counts.shared_phases += len(phases) * weight
        self.counts.shared_cycles += int(np.maximum.reduceat(times, first).sum()) * weight


__all__ = ["Counts", "count"]
