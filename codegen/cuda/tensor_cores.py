"""Contractions of 16-bit floats on tensor cores (sm_80 and newer).

Copies to shared memory run while the products of the step before are taken; matrices come from there by `ldmatrix`, products by
`mma.sync` with sums in f32.

    a block: 128 x 128 of C in steps of 32; 8 warps, each 64 x 32 of it, as 4 x 4 products of 16x8 (Tile below)
      copy step 0
      for steps: copy the next step into the other half of the arrays; wait for this one; barrier; products; barrier

The eight rows of an 8x8 matrix must lie in different banks, and so must what eight threads copy at once. Where an operand runs
along the reduction, a row in shared memory is four chunks of 16 bytes, and chunk c of row r lies at c xor (r / 2 % 4); where it
runs along its rows (`.trans`), a row is 8 elements longer than the tile.
"""

from __future__ import annotations

from typing import Final

from ...ir.dtypes import bf16, f16, f32, i32
from ...ir.expr import Expr, binary, const, load, minimum, select, var
from ...ir.target import Target
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store, Warp
from .contraction import Group, Stream, Tile, Tiled
from .grid import TX
from .machine import WARP, sm_of

CHUNK: Final = 8  # elements of 16 bytes
LEAST_SM: Final = 80
WARP_ROWS: Final = 64
WARP_COLUMNS: Final = 32
LARGE: Final = Tile(128, 128, 32, 16, 4)  # 256 threads: 8 warps
SMALL: Final = Tile(64, 64, 32, 16, 4)  # 64 threads: 2 warps


def fits(g: Group, target: Target) -> bool:
    """Whether tensor cores can take a contraction: 16-bit operands that can be copied 16 bytes at a time."""
    same = g.a.dtype is g.b.dtype and g.a.dtype in (bf16, f16) and g.held is f32
    if target.sm < LEAST_SM or not same or g.size["k"] < 16:
        return False
    return _way(g, g.a, "m") != "" and _way(g, g.b, "n") != ""


def _way(g: Group, s: Stream, kind: str) -> str:
    """Along what an operand is copied: 'k', its rows, or '' where neither runs in whole chunks."""
    for way, other in (("k", kind), (kind, "k")):
        if g.size[way] % CHUNK == 0 and s.runs(way, ("b", other), CHUNK):
            return way
    return ""


def choose(g: Group, target: Target) -> tuple[Tile, int]:
    """The tile, and in how many parts the reduction is cut."""
    sms = sm_of(target).multiprocessors
    m, n, k, b = (g.size[x] for x in "mnkb")
    blocks = {t: -(-m // t.rows) * -(-n // t.columns) * b for t in (LARGE, SMALL)}
    tile = LARGE if blocks[LARGE] >= sms else SMALL
    return tile, max(1, min(32, 2 * sms // blocks[tile], k // (4 * tile.steps)))


class _Operand:
    """One operand's way: copies into two stages in shared memory, and fragments of it."""

    def __init__(self, owner: TensorTiled, name: str, s: Stream, kind: str, origin: Expr, size: int) -> None:
        self.owner, self.name, self.s, self.kind, self.origin, self.size = owner, name, s, kind, origin, size
        t = owner.tile
        self.along_k = _way(owner.g, s, kind) == "k"
        self.rows, self.length = (size, t.steps) if self.along_k else (t.steps, size)
        pitch = self.length + (0 if self.along_k else CHUNK)
        self.shared = Buffer(f"{name}_shared", s.dtype, (2, self.rows, pitch), scope="shared", align=16)
        self.count = self.rows * self.length // (CHUNK * owner.threads)
        self.parts: list[tuple[Expr, Expr, Expr, Expr | None]] = []

    def declare(self, batch: Expr) -> list[Stmt]:
        g, s, t = self.owner.g, self.s, self.owner
        base = var(f"{self.name}_base")
        start = binary("add", s.offset("b", batch if g.size["b"] > 1 else const(0)), s.base)
        done: list[Stmt] = [Alloc(self.shared), Let(base, start)]
        chunks = self.length // CHUNK
        for j in range(self.count):
            e = binary("add", TX, j * t.threads)
            row, column = var(f"{self.name}_row{j}"), var(f"{self.name}_column{j}")
            done += [Let(row, binary("floordiv", e, chunks)), Let(column, binary("mul", binary("mod", e, chunks), CHUNK))]
            r = row if self.along_k else column
            at, off = var(f"{self.name}_at{j}"), var(f"{self.name}_off{j}")
            done += [Let(at, binary("add", self.origin, r)), Let(off, binary("add", base, s.offset(self.kind, at)))]
            whole = g.size[self.kind] % self.size == 0
            self.parts.append((row, column, off, None if whole else binary("lt", at, const(g.size[self.kind]))))
        return done

    def copy(self, k0: Expr, last: Expr, stage: Expr) -> list[Stmt]:
        """What the thread copies of the step from k0 on; zeros beyond the ends."""
        done: list[Stmt] = []
        for row, column, off, inside in self.parts:
            k = binary("add", k0, column if self.along_k else row)
            there = binary("lt", k, last)
            test = there if inside is None else binary("and", inside, there)
            place = select(test, binary("add", off, self.s.offset("k", minimum(k, const(self.owner.g.size["k"] - 1)))), const(0))
            to = (self.shared, (stage, row, self.chunk(binary("floordiv", column, CHUNK), row)))
            done.append(Warp("copy_async", (to, (self.s.buffer, (place,))), (select(test, const(16), const(0)),)))
        return done

    def chunk(self, number: Expr, row: Expr) -> Expr:
        """The column where a chunk of a row lies: rows of the reduction are of four, which change places from row to row."""
        if self.along_k:
            number = binary("xor", number, binary("mod", binary("floordiv", row, 2), 4))
        return binary("mul", number, CHUNK)

    def matrices(self, to: Buffer, slot: int, stage: Expr, first: Expr, k: int, lane: Expr, pairs: bool) -> Stmt:
        """Four 8x8 matrices: of A 16 rows and 16 steps; of B (`pairs`) two groups of 8 columns, each 16 steps."""
        row, group = binary("mod", lane, 8), binary("floordiv", lane, 8)
        low, high = binary("mul", binary("mod", group, 2), 8), binary("mul", binary("floordiv", group, 2), 8)
        of_rows, of_steps = (high, low) if pairs else (low, high)
        r, step = binary("add", first, of_rows), binary("add", of_steps, k)
        if self.along_k:
            index = (stage, binary("add", r, row), self.chunk(binary("floordiv", step, CHUNK), row))
        else:
            index = (stage, binary("add", step, row), r)
        name = "load_matrix" if self.along_k else "load_matrix_trans"
        return Warp(name, ((to, (const(slot),)), (self.shared, index)))


class TensorTiled(Tiled):
    """The statements of a contraction on tensor cores; the grid, parts and epilogue are those of every tile."""

    def __init__(self, g: Group, tile: Tile, splits: int) -> None:
        super().__init__(g, tile, splits)
        self.threads = (tile.rows // WARP_ROWS) * (tile.columns // WARP_COLUMNS) * WARP
        self.down, self.across = WARP_ROWS // 16, WARP_COLUMNS // 8

    def launch(self) -> Stmt:
        g, t = self.g, self.tile
        batch, part, row0, col0, first, last, lets = self.places()
        a = _Operand(self, "a", g.a, "m", row0, t.rows)
        b = _Operand(self, "b", g.b, "n", col0, t.columns)
        sums = self.down * self.across * 4
        acc = Buffer("acc", f32, (sums,), scope="register", align=16)
        warp, lane, row, column = var("warp"), var("lane"), var("warp_row"), var("warp_column")
        ways = t.columns // WARP_COLUMNS
        body: list[Stmt] = [*lets, *a.declare(batch), *b.declare(batch), Alloc(acc)]
        body += [Store(acc, (const(i),), const(0, f32)) for i in range(sums)]
        body += [Let(warp, binary("floordiv", TX, WARP)), Let(lane, binary("mod", TX, WARP))]
        body += [
            Let(row, binary("mul", binary("floordiv", warp, ways), WARP_ROWS)),
            Let(column, binary("mul", binary("mod", warp, ways), WARP_COLUMNS)),
        ]
        body += [*a.copy(first, last, const(0)), *b.copy(first, last, const(0)), Warp("commit_async")]
        k0, stage = var("k0"), var("stage")
        following, other = binary("add", k0, t.steps), binary("sub", 1, stage)
        step: list[Stmt] = [Let(stage, binary("mod", binary("floordiv", binary("sub", k0, first), t.steps), 2))]
        step += [*a.copy(following, last, other), *b.copy(following, last, other), Warp("commit_async")]
        step += [Warp("wait_async", (), (const(1),)), Barrier()]
        step += [*self.steps(acc, a, b, stage, row, column, lane), Barrier()]
        body.append(For(k0, first, last, tuple(step), "serial", t.steps))
        body.append(Warp("wait_async", (), (const(0),)))
        body += self.results(acc, binary("add", row0, row), binary("add", col0, column), lane, batch, part)
        return self.gridded(self.threads, body)

    def steps(self, acc: Buffer, a: _Operand, b: _Operand, stage: Expr, row: Expr, column: Expr, lane: Expr) -> list[Stmt]:
        """The products of one step, 16 of the reduction at a time."""
        kind = "mma_bf16" if a.s.dtype is bf16 else "mma_f16"
        done: list[Stmt] = []
        for k in range(0, self.tile.steps, 16):
            left = Buffer(f"left{k}", i32, (4 * self.down,), scope="register", align=16)
            right = Buffer(f"right{k}", i32, (2 * self.across,), scope="register", align=16)
            done += [Alloc(left), Alloc(right)]
            done += [a.matrices(left, 4 * i, stage, binary("add", row, 16 * i), k, lane, False) for i in range(self.down)]
            done += [
                b.matrices(right, 2 * j, stage, binary("add", column, 8 * j), k, lane, True) for j in range(0, self.across, 2)
            ]
            for i in range(self.down):
                for j in range(self.across):
                    at = (acc, (const(4 * (i * self.across + j)),))
                    done.append(Warp(kind, (at, (left, (const(4 * i),)), (right, (const(2 * j),)))))
        return done

    def results(self, acc: Buffer, row: Expr, column: Expr, lane: Expr, batch: Expr, part: Expr) -> list[Stmt]:
        """The epilogue: of a 16x8 product lane l holds columns 2 (l % 4) and the next one of rows l // 4 and 8 further down."""
        g = self.g
        down, right = var("down"), var("right")
        done: list[Stmt] = [
            Let(down, binary("add", row, binary("floordiv", lane, 4))),
            Let(right, binary("add", column, binary("mul", binary("mod", lane, 4), 2))),
        ]
        ns = [var(f"n{j}") for j in range(2 * self.across)]
        done += [Let(v, binary("add", right, 8 * (j // 2) + j % 2)) for j, v in enumerate(ns)]
        n_whole, m_whole = g.size["n"] % self.tile.columns == 0, g.size["m"] % self.tile.rows == 0
        width = 2 if g.size["n"] % 2 == 0 else 1
        for i in range(2 * self.down):
            m = var(f"m{i}")
            done.append(Let(m, binary("add", down, 8 * i)))
            inner: list[Stmt] = []
            for j in range(0, len(ns), width):
                some: list[Stmt] = []
                for c in range(j, j + width):
                    slot = 4 * ((i // 2) * self.across + c // 2) + 2 * (i % 2) + c % 2
                    some += self.element(load(acc, (const(slot),), f32), m, ns[c], batch, part)
                inner += some if n_whole else [If(binary("lt", ns[j], const(g.size["n"])), tuple(some))]
            done += inner if m_whole else [If(binary("lt", m, const(g.size["m"])), tuple(inner))]
        return done


def make(g: Group, target: Target) -> tuple[Tiled, str]:
    """The statements' owner, and a note."""
    tile, splits = choose(g, target)
    made = TensorTiled(g, tile, splits)
    note = f"tensor cores, tile {tile.rows}x{tile.columns}x{tile.steps}" + (f", {splits} parts" if splits > 1 else "")
    return made, note


__all__ = ["TensorTiled", "fits", "make"]
