"""Contractions on tensor cores: bf16, f16, tf32, and bytes with sums in i32.

Copies to shared memory run while the products of steps before are taken (matrix_operands.py); products are `mma.sync`
(matrix_units.py) with sums in registers.

    a block: 128 x 128 of C in steps of 64 bytes; 8 warps, each 64 x 32 of it, as 4 x 4 products of 16x8 (Shape below)
      begin the first S - 1 steps
      for steps: wait for this one; barrier; begin the one S - 1 further on, in the buffer that the step before had; products

With S buffers a barrier a step is enough: what is begun after it goes where nobody reads any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...ir.dtypes import f32, i32, i64
from ...ir.expr import Expr, binary, const, eq, load, select, var
from ...ir.target import Target
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store, Warp
from .contraction import Group, Tile, Tiled
from .grid import TX
from .machine import STATIC_SHARED, WARP, sm_of
from .matrix_operands import STEP, Block, Operand, Way, way_of
from .matrix_units import Unit, unit_for
from .thread import ZERO

MOST_STAGES: Final = 4
ENOUGH_WARPS: Final = 8  # of a multiprocessor that buffers should leave room for: two for each of its four schedulers


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows and columns of a block and of one of its warps."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int

    @property
    def threads(self) -> int:
        return (self.rows // self.warp_rows) * (self.columns // self.warp_columns) * WARP

    def padded(self, m: int, n: int) -> int:
        return -(-m // self.rows) * self.rows * -(-n // self.columns) * self.columns


LARGE: Final = Shape(128, 128, 64, 32)
MANY_WARPS: Final = Shape(128, 128, 32, 32)  # for 8x8 sums: those of LARGE, with all fragments, take more than 128 registers
SMALL: Final = Shape(64, 64, 32, 32)
NARROW: Final = Shape(128, 32, 64, 32)
NARROW_WARPS: Final = Shape(128, 32, 32, 32)  # likewise
FLAT: Final = Shape(32, 128, 32, 32)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a contraction is done: the unit, the operands' ways, the block, buffers, and parts of the reduction."""

    unit: Unit
    a: Way
    b: Way
    shape: Shape
    stages: int
    splits: int

    def __str__(self) -> str:
        s = self.shape
        word = f"tensor cores, tile {s.rows}x{s.columns}, {self.unit.op}, {self.stages} buffers"
        return word + (f", {self.splits} parts" if self.splits > 1 else "")


def plan_for(g: Group, target: Target) -> Plan | None:
    """The plan of a contraction; None where the SM has no unit for it, or the reduction is shorter than one product."""
    unit = unit_for(g.a.dtype, g.b.dtype, target, g.tf32)
    size = g.a.dtype.itemsize
    if unit is None or g.held not in (f32, i32) or g.size["k"] * size < 16 * unit.chunks:
        return None
    sm = sm_of(target)
    m, n, k, b = (g.size[x] for x in "mnkb")
    shapes = (LARGE, SMALL, NARROW, FLAT) if unit.m == 16 else (MANY_WARPS, SMALL, NARROW_WARPS, FLAT)
    least = min(s.padded(m, n) for s in shapes)
    blocks = {s: -(-m // s.rows) * -(-n // s.columns) * b for s in shapes}
    fitting = [s for s in shapes if 4 * s.padded(m, n) <= 5 * least and (s is not shapes[0] or blocks[s] >= sm.multiprocessors)]
    shape = fitting[0] if fitting else SMALL
    a, right = way_of(g, g.a, "m", target), way_of(g, g.b, "n", target)
    stages = 2
    if a.by_async or right.by_async:
        bytes_ = (shape.rows + shape.columns) * STEP
        room = min(STATIC_SHARED, sm.shared * shape.threads // (ENOUGH_WARPS * WARP))
        stages = max(2, min(MOST_STAGES, room // bytes_))
    splits = max(1, min(32, 2 * sm.multiprocessors // blocks[shape], k * size // (4 * STEP)))
    return Plan(unit, a, right, shape, stages, splits)


class TensorTiled(Tiled):
    """The statements of a contraction on tensor cores; the grid, parts and epilogue are those of every tile."""

    def __init__(self, g: Group, plan: Plan) -> None:
        shape = plan.shape
        super().__init__(g, Tile(shape.rows, shape.columns, STEP // g.a.dtype.itemsize, 1, 1), plan.splits)
        self.plan, self.unit = plan, plan.unit
        self.down, self.across = shape.warp_rows // plan.unit.m, shape.warp_columns // 8
        narrow = min(o.dtype.itemsize for o in g.graph.outputs) if plan.splits == 1 else 4
        # neighbouring columns of a lane: 4 lanes write 32 bytes of a row at once
        self.together = 1 if not plan.b.along_k else 4 if narrow == 1 else 2

    def launch(self) -> Stmt:
        g, t, plan = self.g, self.tile, self.plan
        batch, part, row0, col0, first, last, lets = self.places()
        block = Block(plan.shape.threads, plan.stages)
        a = Operand(g, "a", "m", row0, t.rows, plan.a, block)
        b = Operand(g, "b", "n", col0, t.columns, plan.b, block, self.together)
        sums = self.down * self.across * self.unit.sums
        acc = Buffer("acc", g.held, (sums,), scope="register", align=16)
        warp, lane, row, column = var("warp"), var("lane"), var("warp_row"), var("warp_column")
        ways = plan.shape.columns // plan.shape.warp_columns
        body: list[Stmt] = [*lets, *a.declare(batch), *b.declare(batch), Alloc(acc)]
        body += [Store(acc, (const(i),), const(0, g.held)) for i in range(sums)]
        body += [Let(warp, binary("floordiv", TX, WARP)), Let(lane, binary("mod", TX, WARP))]
        body += [
            Let(row, binary("mul", binary("floordiv", warp, ways), plan.shape.warp_rows)),
            Let(column, binary("mul", binary("mod", warp, ways), plan.shape.warp_columns)),
        ]
        waits = plan.a.by_async or plan.b.by_async
        ahead = plan.stages - 1
        commit: list[Stmt] = [Warp("commit_async")] if waits else []
        for s in range(ahead):
            at = binary("add", first, s * t.steps)
            body += [x for o in (a, b) for x in o.begin(at, last, const(s))] + commit
            body += [x for o in (a, b) for x in o.end(at, last, const(s))]
        turn = Buffer("turn", i64, (1,), scope="register", align=8)  # the buffer of this step: counted, a remainder of 3 is long
        body += [Alloc(turn), Store(turn, ZERO, const(0))]
        k0, stage, free, following = (var(x) for x in ("k0", "stage", "free", "following"))
        step: list[Stmt] = [
            Let(stage, load(turn, ZERO, i64)),
            Let(free, select(eq(stage, const(0)), const(ahead), binary("sub", stage, 1))),
            Let(following, binary("add", k0, ahead * t.steps)),
        ]
        step += [Warp("wait_async", (), (const(ahead - 1),)), Barrier()] if waits else [Barrier()]
        step += [x for o in (a, b) for x in o.begin(following, last, free)] + commit
        step += self.steps(acc, a, b, stage, row, column, lane)
        step += [x for o in (a, b) for x in o.end(following, last, free)]
        step.append(Store(turn, ZERO, select(eq(stage, const(ahead)), const(0), binary("add", stage, 1))))
        body.append(For(k0, first, last, tuple(step), "serial", t.steps))
        if waits:
            body.append(Warp("wait_async", (), (const(0),)))
        body += self.results(acc, binary("add", row0, row), binary("add", col0, column), lane, batch, part)
        return self.gridded(plan.shape.threads, body)

    def steps(self, acc: Buffer, a: Operand, b: Operand, stage: Expr, row: Expr, column: Expr, lane: Expr) -> list[Stmt]:
        """The products of one step."""
        unit = self.unit
        length = unit.chunks * a.per
        done: list[Stmt] = []
        for k in range(0, self.tile.steps, length):
            left = Buffer(f"left{k}", i32, (unit.a * self.down,), scope="register", align=16)
            right = Buffer(f"right{k}", i32, (unit.b * self.across,), scope="register", align=16)
            done += [Alloc(left), Alloc(right)]
            done += a.fragments(left, unit, self.down, stage, row, k, lane)
            done += b.fragments(right, unit, self.across, stage, column, k, lane)
            for i in range(self.down):
                for j in range(self.across):
                    at = (acc, (const(unit.sums * (i * self.across + j)),))
                    done.append(Warp(unit.op, (at, (left, (const(unit.a * i),)), (right, (const(unit.b * j),)))))
        return done

    def results(self, acc: Buffer, row: Expr, column: Expr, lane: Expr, batch: Expr, part: Expr) -> list[Stmt]:
        """The epilogue: of a tile of sums lane l holds columns 2 (l % 4) and the next one of row l // 4, and 8 further down."""
        g, size = self.g, self.g.size
        n = self.together
        down, right = var("down"), var("right")
        done: list[Stmt] = [
            Let(down, binary("add", row, binary("floordiv", lane, 4))),
            Let(right, binary("add", column, binary("mul", binary("mod", lane, 4), 2 * n))),
        ]
        slots = [(j, e) for j in range(self.across) for e in range(2)]  # the order of columns: tiles, then the pair of each
        ns = [var(f"n{j}") for j in range(len(slots))]
        done += [Let(v, binary("add", right, 8 * n * (j // n) + 2 * (j % n) + e)) for v, (j, e) in zip(ns, slots, strict=True)]
        n_whole, m_whole = size["n"] % self.tile.columns == 0, size["m"] % self.tile.rows == 0
        width = next(w for w in (2 * n, 4, 2, 1) if w <= 2 * n and size["n"] % w == 0)
        halves = self.unit.m // 8
        for i in range(halves * self.down):
            m = var(f"m{i}")
            done.append(Let(m, binary("add", down, 8 * i)))
            inner: list[Stmt] = []
            for c in range(0, len(ns), width):
                some: list[Stmt] = []
                for v, (j, e) in list(zip(ns, slots, strict=True))[c : c + width]:
                    slot = self.unit.sums * ((i // halves) * self.across + j) + 2 * (i % halves) + e
                    some += self.element(load(acc, (const(slot),), g.held), m, v, batch, part)
                inner += some if n_whole else [If(binary("lt", ns[c], const(size["n"])), tuple(some))]
            done += inner if m_whole else [If(binary("lt", m, const(size["m"])), tuple(inner))]
        return done


__all__ = ["LARGE", "SMALL", "Plan", "Shape", "TensorTiled", "plan_for"]
