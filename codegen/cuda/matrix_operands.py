"""How an operand of tensor cores comes to shared memory, and from there to registers.

A step of a block's tile is 64 bytes along the reduction. In shared memory an operand is in rows of chunks of 16 bytes:

    along k      a row of the tile is a row there, of four chunks; matrices by `ldmatrix`
    along rows   a step is a row there; matrices of 16 bits by `ldmatrix.trans`, elements of 32 bits one by one

Chunk c of row r lies at c xor a function of r, so that the eight rows of a matrix are in different banks, and so is what eight
threads write at once. Bytes are never along rows: what transposes matrices takes 16 bits.

There are three ways there. By `cp.async`, where 16 bytes lie side by side and the SM has it: nothing passes through registers.
By registers, 4 to 16 bytes at a time, fetched before the products of a step and written after them. And elements of fewer bytes
one by one, after the products: for what lies otherwise.

The columns of a product's result that a lane holds, two of each tile, are side by side in memory over `together` tiles: rows of
B along k are read in that order (`column`).

What is multiplied along the other way of an operand, as the keys of attention along their features, is read `across`: then the
steps of a tile are rows of its products, or columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ...ir.dtypes import i32
from ...ir.expr import Expr, binary, bitcast, const, load, select, var
from ...ir.target import Target
from ..loop_ir import Alloc, Buffer, If, Let, Stmt, Store, Warp
from .contraction import Stream
from .grid import TX
from .matrix_units import CHUNK, Unit

STEP: Final = 64  # bytes of a step along the reduction
ASYNC_SM: Final = 80  # the first SM with cp.async


@dataclass(frozen=True, slots=True)
class Way:
    """along_k: how it lies in shared memory; width: elements side by side that are one access; by_async: whether by cp.async;
    rows_first: whether neighbouring threads take neighbouring rows, not neighbours along k."""

    along_k: bool
    width: int
    by_async: bool
    rows_first: bool = False


def way_of(g: Product, s: Stream, kind: str, target: Target) -> Way:
    """The way of an operand whose rows are of a kind: the widest accesses."""
    size = s.dtype.itemsize
    widths = {}
    for way, other in (("k", kind), (kind, "k")):
        w = CHUNK // size
        while w > 1 and not (g.size[way] % w == 0 and s.runs(way, ("b", other), w)):
            w //= 2
        widths[way] = w
    rows_better = widths[kind] > widths["k"] or (widths[kind] == widths["k"] and s.step(kind)[1] == 1 != s.step("k")[1])
    if size == 1 and rows_better:
        return Way(True, 1, False, rows_first=True)
    width = widths[kind if rows_better else "k"]
    return Way(not rows_better, width, width * size == CHUNK and target.sm >= ASYNC_SM)


@dataclass(frozen=True, slots=True)
class Block:
    """What a block of threads is to an operand: its threads and how many buffers it takes turns with."""

    threads: int
    stages: int


def divided(e: Expr, n: int) -> Expr:
    return e if n == 1 else binary("floordiv", e, n)


class Product(Protocol):
    """What an operand knows of its product: how many b, m, n and k there are, and where A and B lie."""

    size: dict[str, int]
    a: Stream
    b: Stream


class Operand:
    """One operand's way: `begin` a step before the products of another, `end` it after them; and fragments of a step. It has
    shared memory of its own, or another's of the same shape."""

    def __init__(
        self,
        g: Product,
        name: str,
        kind: str,
        origin: Expr,
        size: int,
        way: Way,
        block: Block,
        together: int = 1,
        shared: Buffer | None = None,
    ) -> None:
        s = g.a if kind == "m" else g.b
        self.g, self.s, self.name, self.kind, self.origin, self.way, self.block = g, s, name, kind, origin, way, block
        self.size, self.together = size, together
        self.per = CHUNK // s.dtype.itemsize  # elements of a chunk
        self.steps = STEP // s.dtype.itemsize
        self.rows, self.chunks = (size, STEP // CHUNK) if way.along_k else (self.steps, size // self.per)
        self.shared = shared or Buffer(
            f"{name}_shared", s.dtype, (block.stages, self.rows, self.chunks * self.per), scope="shared", align=16
        )
        self.count = self.rows * self.chunks // block.threads
        self.whole_steps = g.size["k"] % self.steps == 0
        self.subs = self.per // way.width
        self.small = way.width * s.dtype.itemsize < 4
        # fetched after the products where few bytes come at once: what is on its way would take many registers
        self.late = way.width * s.dtype.itemsize < 8
        self.held = Buffer(f"{name}_held", i32, (4 * self.count,), scope="register", align=16)
        self.bits = Buffer(f"{name}_bits", i32, (self.per,), scope="register", align=16)
        self.parts: list[tuple[Expr, Expr, list[Expr], list[Expr | None]]] = []  # row, element in it; per access: offset, inside

    # -- to shared memory ---------------------------------------------------------------------------------------------

    def declare(self, batch: Expr) -> list[Stmt]:
        """What does not change from step to step: where the thread's chunks begin."""
        g, s, w = self.g, self.s, self.way.width
        base = var(f"{self.name}_base")
        start = binary("add", s.offset("b", batch if g.size["b"] > 1 else const(0)), s.base)
        done: list[Stmt] = [Alloc(self.shared), Let(base, start)]
        if not self.way.by_async:
            done.append(Alloc(self.held))
        if self.small:
            done.append(Alloc(self.bits))
        whole = g.size[self.kind] % self.size == 0
        inner = self.rows if self.way.rows_first else self.chunks
        distance = s.distance(self.kind) if self.block.threads % inner == 0 and not self.way.rows_first else None
        even = distance is not None  # the thread's chunks are at equal distances: one address, and the others from it
        for j in range(self.count):
            e = TX if even else binary("add", TX, j * self.block.threads)
            fast, slow = binary("mod", e, inner), binary("floordiv", e, inner)
            row, column = (var(f"{self.name}_{word}{0 if even else j}") for word in ("row", "column"))
            # rows in the order of columns of sums: what eight threads write is in different banks, as what a matrix reads is
            r, c = (self.column(divided(fast, 8), binary("mod", fast, 8)), slow) if self.way.rows_first else (slow, fast)
            first = j == 0 or not even
            if first:
                done += [Let(row, r), Let(column, binary("mul", c, self.per))]
            further = j * (self.block.threads // inner) if even else 0
            offsets: list[Expr] = []
            insides: list[Expr | None] = []
            for x in range(1 if self.way.along_k else self.subs):
                at, off = (var(f"{self.name}_{word}{0 if even else j}_{x}") for word in ("at", "off"))
                place = row if self.way.along_k else binary("add", column, x * w)
                if first:
                    done += [Let(at, binary("add", self.origin, place)), Let(off, binary("add", base, s.offset(self.kind, at)))]
                if self.way.along_k and further:
                    at, off = binary("add", at, further), binary("add", off, further * (distance or 0))
                offsets.append(off)
                insides.append(None if whole else binary("lt", at, const(g.size[self.kind])))
            row = binary("add", row, further)
            self.parts.append((row, column, offsets, insides))
        return done

    def begin(self, k0: Expr, last: Expr, stage: Expr) -> list[Stmt]:
        """Before the products: copies of the step from k0 on, or what is fetched for `end`; zeros beyond the ends."""
        done: list[Stmt] = []
        if not self.way.by_async:
            return [] if self.late else self._fetched(range(self.count), k0, last)
        for j in range(self.count):
            place, there = self._access(j, 0, k0, last)
            if self.whole_steps:  # a step is there, or it is not
                whole = binary("lt", k0, last)
                there = whole if there is None else binary("and", there, whole)
            assert there is not None
            size = select(there, const(CHUNK), const(0))
            done.append(Warp("copy_async", (self._place(j, stage), (self.s.buffer, (place,))), (size,)))
        return done

    def end(self, k0: Expr, last: Expr, stage: Expr) -> list[Stmt]:
        """After the products: what was fetched goes to shared memory."""
        done: list[Stmt] = []
        for j in range(0 if self.way.by_async else self.count):
            if self.late:
                done += self._fetched([j], k0, last)
            done.append(Warp("store_bits_16", (self._place(j, stage), (self.held, (const(4 * j),)))))
        return done

    def _place(self, j: int, stage: Expr) -> tuple[Buffer, tuple[Expr, ...]]:
        row, column, _, _ = self.parts[j]
        return self.shared, (stage, row, binary("mul", self._turned(divided(column, self.per), row), self.per))

    def _fetched(self, chunks: Sequence[int], k0: Expr, last: Expr) -> list[Stmt]:
        """Chunks to registers. Of a step that is not there nobody looks at what they hold."""
        done = [x for j in chunks for x in self._fetch(j, k0, last)]
        return [If(binary("lt", k0, last), tuple(done))] if self.whole_steps else done

    def _access(self, j: int, x: int, k0: Expr, last: Expr) -> tuple[Expr, Expr | None]:
        """Where the thread's access x to its chunk j begins, and whether there is something: else it is anywhere. Whole steps are
        asked for by whoever calls."""
        row, column, offsets, insides = self.parts[j]
        if self.way.along_k:
            off, inside, k = offsets[0], insides[0], binary("add", k0, binary("add", column, x * self.way.width))
        else:
            off, inside, k = offsets[x], insides[x], binary("add", k0, row)
        if not self.whole_steps:
            there = binary("lt", k, last)
            inside = there if inside is None else binary("and", inside, there)
        return binary("add", off, self.s.offset("k", k)), inside

    def _fetch(self, j: int, k0: Expr, last: Expr) -> list[Stmt]:
        """A chunk to registers, 4 to 16 bytes at a time, or its elements, which are put together."""
        done: list[Stmt] = []
        size = self.way.width * self.s.dtype.itemsize
        to, first, step = (self.bits, 0, 1) if self.small else (self.held, 4 * j, size // 4)
        for x in range(self.subs):
            place, there = self._access(j, x, k0, last)
            valid = const(1)
            if there is not None:
                valid, place = select(there, const(1), const(0)), select(there, place, const(0))
            slot = const(first + step * x)
            done.append(Warp(f"load_bits_{size}", ((to, (slot,)), (self.s.buffer, (place,))), (valid,)))
        if self.small:
            each = 4 // size
            for word in range(4):
                total: Expr = load(self.bits, (const(each * word),), i32)
                for x in range(1, each):
                    more = load(self.bits, (const(each * word + x),), i32)
                    total = binary("or", total, binary("shl", more, const(8 * size * x, i32)))
                done.append(Store(self.held, (const(4 * j + word),), total))
        return done

    def _turned(self, chunk: Expr, row: Expr) -> Expr:
        """Where a chunk of a row lies."""
        if not self.way.along_k and self.s.dtype.itemsize == 4:  # lanes read four steps of eight elements
            return binary("xor", chunk, binary("mul", binary("mod", row, 4), 2))
        line = max(1, 128 // (self.chunks * CHUNK)) * (self.together if self.way.along_k else 1)  # rows in the same banks' turn
        return binary("xor", chunk, binary("mod", divided(row, line), min(8, self.chunks)))

    # -- to registers -------------------------------------------------------------------------------------------------

    def column(self, tile: Expr, place: Expr) -> Expr:
        """The row of B that is column `place` of 8 of a tile of sums: lane l has columns 2 (l % 4) and the next of each tile."""
        n = self.together
        if n == 1:
            return binary("add", binary("mul", tile, 8), place)
        group = binary("mul", divided(tile, n), 8 * n)
        pair = binary("add", binary("mul", binary("floordiv", place, 2), 2 * n), binary("mod", place, 2))
        return binary("add", group, binary("add", pair, binary("mul", binary("mod", tile, n), 2)))

    def fragments(
        self, to: Buffer, unit: Unit, tiles: int, stage: Expr, first: Expr, k: int, lane: Expr, across: bool = False
    ) -> list[Stmt]:
        """The registers of `tiles` tiles from row `first` on, the unit's length from step k on; `across`: of tiles from step
        `first` on, the unit's length from row k on."""
        along_k = self.way.along_k is not across
        halves = unit.m // 8 if self.kind == "m" else 1
        each = halves * unit.chunks  # registers of a tile: rows first
        per = self.per
        done: list[Stmt] = []
        if not along_k and self.s.dtype.itemsize == 4:
            g, t = binary("floordiv", lane, 4), binary("mod", lane, 4)
            for p in range(tiles * each):
                row = binary("add", first, binary("add", g, 8 * halves * (p // each) + 8 * (p % halves)))
                column = binary("xor", row, binary("mul", t, 8))
                one = load(self.shared, (stage, binary("add", t, k + per * (p % each // halves)), column), self.s.dtype)
                done.append(Store(to, (const(p),), bitcast(one, i32)))
            return done
        r, quarter = binary("mod", lane, 8), binary("floordiv", lane, 8)
        for p in range(0, tiles * each, 4):
            rest = binary("mod", quarter, each) if each < 4 else quarter
            half = binary("mod", rest, halves) if halves > 1 else const(0)
            chunk = divided(rest, halves) if unit.chunks > 1 else const(0)
            tile = binary("add", binary("floordiv", quarter, each) if each < 4 else const(0), p // each)
            if self.kind == "m":
                rows, place = binary("add", binary("mul", tile, 8 * halves), binary("mul", half, 8)), r
            else:
                rows, place = const(0), self.column(tile, r)
            if along_k:
                at = binary("add", first, binary("add", rows, place))
                number = binary("add", chunk, k // per)
                index = (stage, at, binary("mul", self._turned(number, at), per))
            else:
                step = binary("add", binary("mul", chunk, per), binary("add", r, k))
                if self.kind == "n":
                    rows = binary("mul", tile, 8)
                number = divided(binary("add", first, rows), per)
                index = (stage, step, binary("mul", self._turned(number, step), per))
            name = "load_matrix" if along_k else "load_matrix_trans"
            done.append(Warp(name, ((to, (const(p),)), (self.shared, index))))
        return done


__all__ = ["STEP", "Block", "Operand", "Way", "way_of"]
