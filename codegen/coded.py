"""Products of a few rows with weights in few bits, which become floats in registers on their way from memory.

    for panels of W columns, shared between threads: for tiles of rows and of vectors of columns
      total = 0
      for blocks of steps that share a scale
        acc = 0
        for steps:  acc[m] += x[m, k] * float(q[k])         i8, bf16 and f16 by conversion; four bits by a look-up, or by shifts
        total[m] += acc[m] * scale
      y[m] = total[m]

So a weight costs memory its bits, and registers a conversion for all rows of the tile. A sum's order depends on sizes alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

from ..ir.dtypes import f32
from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, fma, four_bits, load, lookup, var
from ..ir.graph import Graph
from ..ir.lowering import Coded
from ..ir.target import Target
from .groups import Body, Lowered, body_name, lowered, static_shape
from .loop_ir import Alloc, Buffer, For, Let, Prefetch, Stmt, Store, vector_variable
from .maps import CYCLE_NS
from .nests import Axis, parallel_nest

NIBBLES: Final = 8  # in an i32
ENTRIES: Final = 16  # of a table
LEAST_NS: Final = 10_000.0  # kernels of a network follow each other: the workers are awake
READ_BYTES_NS: Final = 25.0  # of one thread, from memory
PAGE: Final = 4096
PAGES_AHEAD: Final = 64
STRAIGHT: Final = 32  # steps of a block without a loop


def lower_coded(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of one product with coded weights."""
    made = _Product(graph, target, aligns)
    if made.body.outputs[0].span == 0:
        return lowered(made.body, name, [], doc="product of nothing")
    statements, parallel = made.emit()
    return lowered(made.body, name, statements, doc=f"coded weights: {body_name(graph)}", parallel=parallel, note=made.note)


class _Product:
    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        self.target, self.body = target, Body(graph, aligns)
        core = graph.outputs[0]
        form = self.body.lowering(core) if core.inputs else None
        if not isinstance(form, Coded) or any(i not in self.body.operand for i in core.inputs):
            raise CompileError(f"{body_name(graph)}: one product with coded weights and its operands in memory is expected")
        x, panels, scales, *tables = core.inputs
        self.x, self.panels, self.scales = (self.body.buffers[self.body.operand[n]] for n in (x, panels, scales))
        self.tables = [self.body.buffers[self.body.operand[n]] for n in tables]
        self.table: Expr | None = None  # of sixteen, in a register
        self.out = self.body.outputs[0]
        *lead, self.depth = static_shape(x)
        self.rows, self.columns = math.prod(lead), static_shape(core)[-1]
        _, self.stored, self.width = static_shape(panels)
        _, self.blocks, _ = static_shape(scales)
        self.bits, self.block = form.bits, min(form.block, self.depth)
        self.lanes = math.gcd(max(1, target.vector_bits // 32), self.width)
        self.step = NIBBLES if self.bits == 4 else 1  # steps of the reduction in a row of a panel
        self.numbers = itertools.count()
        room = target.registers // 2  # accumulators; as many again are what they are made of, or totals
        vectors = self.width // self.lanes
        self.tile = min(self.rows, room)
        self.across = max(n for n in range(1, vectors + 1) if vectors % n == 0 and n * self.tile <= room)
        # sums of even and of odd steps, where few chains of additions would wait for each other
        self.parts = 2 if 2 * self.tile * self.across <= room else 1
        self.note = f"{self.bits} bits, a scale for {self.block}, {self.tile} rows x {self.across * self.lanes} columns"

    def emit(self) -> tuple[list[Stmt], bool]:
        """Whole panels, then the columns that are left."""
        whole, left = divmod(self.columns, self.width)
        done: list[Stmt] = []
        parallel = False
        if whole:
            p = var("panel")
            work = self.depth * self.width / self.lanes * (2 + self.rows) * CYCLE_NS * 0.7
            bytes_of = self.stored * self.width * self.panels.dtype.itemsize
            each = max(work, bytes_of / READ_BYTES_NS)
            done, parallel = parallel_nest([Axis(p, whole)], self.panel(p, self.width), each * whole, least=LEAST_NS)
        if left:
            done += self.panel(const(whole), left)
        return done, parallel

    def panel(self, panel: Expr, count: int) -> list[Stmt]:
        """The first `count` columns of a panel for all rows."""
        done: list[Stmt] = []
        for b in self.tables:
            self.table = self.let(done, "table", load(b, (const(0),), f32, None, ENTRIES))
        for top in range(0, self.rows, self.tile):
            for first in range(0, -(-count // self.lanes), self.across):
                vectors = min(self.across, -(-count // self.lanes) - first)
                done += self.tile_of(panel, top, min(self.tile, self.rows - top), first, vectors, count - first * self.lanes)
        return done

    # -- a tile --------------------------------------------------------------------------------------------------------

    def tile_of(self, panel: Expr, top: int, rows: int, first: int, vectors: int, count: int) -> list[Stmt]:
        """`rows` rows from `top` on and `vectors` vectors of columns, of which `count` columns are there."""
        total, done = self.cleared("total", rows * vectors)
        at_panel = binary("mul", panel, self.stored * self.width)
        at_scale = binary("mul", panel, self.blocks * self.width)
        whole, rest = divmod(self.depth, self.block)

        def one(g: Expr, steps: int) -> list[Stmt]:
            acc, body = self.cleared("acc", rows * vectors * self.parts)
            start = binary("mul", g, self.block)
            body += self.steps(acc, at_panel, start, steps, top, rows, first, vectors)
            for j in range(vectors):
                place = binary("add", at_scale, binary("add", binary("mul", g, self.width), (first + j) * self.lanes))
                name = self.let(body, "s", cast(load(self.scales, (place,), self.scales.dtype, None, self.lanes), f32))
                for m in range(rows):
                    slot = m * vectors + j
                    value = self.get(acc, slot * self.parts)
                    if self.parts == 2:
                        value = binary("add", value, self.get(acc, slot * 2 + 1))
                    body.append(self.multiply_add(total, slot, value, name))
            return body

        if whole == 1:
            done += one(const(0), self.block)
        elif whole:
            g = var(f"block{next(self.numbers)}")
            done.append(For(g, const(0), const(whole), tuple(one(g, self.block))))
        if rest:
            done += one(const(whole), rest)
        for m in range(rows):
            row = (top + m) * self.columns
            at = binary("add", binary("mul", panel, self.width), row + first * self.lanes)
            full = min(count // self.lanes, vectors)
            for j in range(full):
                done.append(Store(self.out, (binary("add", at, j * self.lanes),), self.get(total, m * vectors + j)))
            if full < vectors:
                done += self.remainder(at, full * self.lanes, count - full * self.lanes, self.get(total, m * vectors + full))
        return done

    def remainder(self, at: Expr, first: int, count: int, value: Expr) -> list[Stmt]:
        """Stores of the first `count` lanes, fewer than all, in ever narrower vectors."""
        held = Buffer(f"last{next(self.numbers)}", f32, (self.lanes,), scope="local", align=64)
        done: list[Stmt] = [Alloc(held), Store(held, (const(0),), value)]
        lanes, done_to = self.lanes, 0
        while done_to < count:
            while lanes > count - done_to:
                lanes //= 2
            part = load(held, (const(done_to),), f32, None, lanes)
            done.append(Store(self.out, (binary("add", at, first + done_to),), part))
            done_to += lanes
        return done

    def steps(
        self, acc: Buffer, at_panel: Expr, start: Expr, count: int, top: int, rows: int, first: int, vectors: int
    ) -> list[Stmt]:
        """acc += x * weights for `count` steps from `start` on, in pieces of one length and a last one."""
        bytes_of = self.width * self.panels.dtype.itemsize // self.step  # of a step
        piece = max(self.step, STRAIGHT // max(1, rows // 2) // self.step * self.step)
        if self.ahead and top == first == 0:
            piece = max(piece, min(count, PAGE // bytes_of)) if rows == 1 else piece
        done: list[Stmt] = []
        whole, rest = divmod(count, piece)
        k = var(f"k{next(self.numbers)}")

        def body(k: Expr, n: int) -> list[Stmt]:
            made: list[Stmt] = []
            for i in range(0, n, self.step):
                made += self.row(acc, at_panel, k, i, min(self.step, n - i), top, rows, first, vectors)
            if self.ahead and top == first == 0:
                there = binary("add", self.place(at_panel, k, 0), PAGES_AHEAD * PAGE // self.panels.dtype.itemsize)
                made.append(Prefetch(self.panels, (there,), 1))
            return made

        if whole > 1:
            loop = For(k, start, binary("add", start, whole * piece), tuple(body(k, piece)), "serial", piece)
            done.append(loop)
        elif whole:
            done += body(start, piece)
        if rest:
            done += body(binary("add", start, whole * piece), rest)
        return done

    @property
    def ahead(self) -> bool:
        """Whether panels come from beyond L2, so that pages to come are asked for."""
        return self.panels.span * self.panels.dtype.itemsize > self.target.l2

    def place(self, at_panel: Expr, k: Expr, column: int) -> Expr:
        """Where the row of a panel with step k begins, and so many elements on."""
        row = binary("floordiv", k, self.step) if self.step > 1 else k
        return binary("add", at_panel, binary("add", binary("mul", row, self.width), column))

    def row(
        self, acc: Buffer, at_panel: Expr, k: Expr, offset: int, steps: int, top: int, rows: int, first: int, vectors: int
    ) -> list[Stmt]:
        """One row of a panel: a step of the reduction, or eight of four bits (the last row of a panel may have fewer)."""
        done: list[Stmt] = []
        held = []
        for j in range(vectors):
            column = offset // self.step * self.width + (first + j) * self.lanes
            place = self.place(at_panel, k, column)
            held.append(self.let(done, "q", load(self.panels, (place,), self.panels.dtype, None, self.lanes)))
        for t in range(steps):
            weights = [self.let(done, "w", self.number(q, t)) for q in held]
            for m in range(rows):
                at = binary("add", k, (top + m) * self.depth + offset + t)
                x = self.let(done, "x", broadcast(load(self.x, (at,), f32), self.lanes))
                for j, w in enumerate(weights):
                    slot = (m * vectors + j) * self.parts + (offset + t) % self.parts
                    done.append(self.multiply_add(acc, slot, x, w))
        return done

    def number(self, q: Expr, t: int) -> Expr:
        """The floats that step t of a row stands for."""
        if self.bits >= 8:
            return cast(q, f32)
        low = binary("shr", q, const(4 * t, q.dtype, q.lanes)) if t else q
        return four_bits(low) if self.table is None else lookup(self.table, low)

    # -- registers -----------------------------------------------------------------------------------------------------

    def let(self, into: list[Stmt], letter: str, value: Expr) -> Expr:
        name = vector_variable(f"{letter}{next(self.numbers)}", value.dtype, value.lanes)
        into.append(Let(name, value))
        return name

    def cleared(self, word: str, slots: int) -> tuple[Buffer, list[Stmt]]:
        made = Buffer(f"{word}{next(self.numbers)}", f32, (slots, self.lanes), scope="register", align=64)
        zero = const(0, f32, self.lanes)
        return made, [Alloc(made), *(Store(made, (const(s), const(0)), zero) for s in range(slots))]

    def get(self, buffer: Buffer, slot: int) -> Expr:
        return load(buffer, (const(slot), const(0)), f32, lanes=self.lanes)

    def multiply_add(self, into: Buffer, slot: int, a: Expr, b: Expr) -> Stmt:
        old = self.get(into, slot)
        new = fma(a, b, old) if self.target.fma else binary("add", old, binary("mul", a, b))
        return Store(into, (const(slot), const(0)), new)


__all__ = ["lower_coded"]
