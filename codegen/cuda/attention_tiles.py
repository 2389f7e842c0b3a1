"""What kernels of attention on tensor cores have in common: the block's own rows in registers, tiles that are walked over.

Rows that are walked over come to shared memory while the products of the tile before are taken (matrix_operands.py). They are
read in two ways: across, as columns of the scores, and along, as steps of the second product, whose A are numbers made of the
scores: a lane has the same rows and columns of a tile of sums as of a tile of A half as wide, so that they stay in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ...ir.dtypes import DType, f32, i32, i64
from ...ir.expr import Expr, binary, const, load, select, var
from ...ir.graph import Node
from ...ir.lowering import Attention
from ...ir.target import Target
from ..groups import Body
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store, Warp
from .attention_form import Matrix, Problem, Z
from .contraction import Stream, merged
from .grid import TX
from .machine import WARP
from .matrix_operands import STEP, Block, Operand, Way, way_of
from .matrix_units import CHUNK, Unit
from .thread import ZERO

MOST_WARPS: Final = 4
LANES: Final = 4  # of a row
LOG2E: Final = 1.0 / math.log(2.0)
WARP_OF, LANE = var("warp"), var("lane")


class _Rows(Stream):
    """A matrix for each slice that is walked along its rows ("k"); its columns are of the other kind."""

    def __init__(self, m: Matrix, kind: str) -> None:
        self.dtype, self.buffer, self.base = m.buffer.dtype, m.buffer, 0
        self.loops = {"b": list(m.loops), kind: merged([(m.columns, 1)]), "k": merged([(m.rows, m.stride)])}


@dataclass
class _Walked:
    """What an operand knows of its product: see `matrix_operands.Product`."""

    size: dict[str, int]
    a: Stream
    b: Stream


def padded(columns: int) -> int:
    """Columns of a tile in shared memory: a power of two, so that turned chunks stay in their row."""
    return max(32, 1 << (columns - 1).bit_length())


def slots(row: int, tiles: int) -> list[int]:
    """The registers of a lane's row, in the order of columns, of sums `tiles` tiles wide; rows are counted 8 down at a time."""
    return [4 * ((row // 2) * tiles + t) + 2 * (row % 2) + e for t in range(tiles) for e in range(2)]


def registers(name: str, count: int, dtype: DType = f32) -> Buffer:
    return Buffer(name, dtype, (count,), scope="register", align=16)


class Tensor(Problem):
    """A kernel whose blocks have rows of their own, 16 or 32 a warp, and walk over tiles of other rows."""

    def __init__(self, body: Body, node: Node, form: Attention, unit: Unit, target: Target) -> None:
        super().__init__(body, node, form)
        self.unit, self.target = unit, target
        self.dtype = self.q.buffer.dtype
        self.per = CHUNK // self.dtype.itemsize
        self.step = STEP // self.dtype.itemsize  # rows of a step
        self.wide = max(padded(self.d), padded(self.e))
        # a positive scale is left to the exponent, where no numbers are added
        self.raw = form.scale > 0 and (self.mask is None or self.mask.buffer.dtype is not f32)
        self.factor = form.scale * LOG2E if self.raw else LOG2E

    def sizes(self, own: int, steps: int, down: int) -> None:
        """Rows of a block, of `own` there are, and of a tile."""
        warps = 1
        while warps < MOST_WARPS and 16 * warps < own:
            warps *= 2
        self.steps, self.down = steps, down if warps == MOST_WARPS else 1
        self.threads, self.rows, self.tile = warps * WARP, 16 * warps * self.down, steps * self.step

    def __str__(self) -> str:
        return f"tensor cores, a block for {self.rows} rows, {self.tile} columns at a time, {self.unit.op}"

    # ------------------------------------------------------------------ operands

    def _product(self, m: Matrix, kind: str) -> _Walked:
        rows = _Rows(m, kind)
        return _Walked({"b": self.slices, "m": m.columns, "n": m.columns, "k": m.rows}, rows, rows)

    def way(self, m: Matrix, kind: str = "n") -> Way:
        return way_of(self._product(m, kind), _Rows(m, kind), kind, self.target)

    def walk(self, m: Matrix, name: str) -> Operand:
        """A matrix that is walked over, in two buffers."""
        block = Block(self.threads, 2 * self.steps)
        made = Operand(self._product(m, "n"), name, "n", const(0), padded(m.columns), self.way(m), block)
        made.whole_steps = m.rows % self.tile == 0  # rows of a tile that do not exist are zeros, not what was there
        return made

    def own(self, m: Matrix, name: str, turns: Operand) -> Operand:
        """The block's own rows, which take turns with a walked matrix's memory where both lie alike."""
        way = self.way(m, "m")
        same = way.along_k == turns.way.along_k and self.rows <= 2 * self.tile
        block = Block(self.threads, 2 * self.steps if same else -(-self.rows // self.step))
        space = turns.shared if same else None
        made = Operand(self._product(m, "m"), name, "m", const(0), padded(m.columns), way, block, shared=space)
        made.whole_steps = m.rows % self.rows == 0
        return made

    def lengths(self, columns: int) -> int:
        """Products along so many columns."""
        return -(-columns // (self.unit.chunks * self.per))

    def across(self, columns: int) -> int:
        """Tiles of so many columns of results: `ldmatrix` brings some at once."""
        more = 4 // self.unit.b
        return -(-columns // (8 * more)) * more

    def resident(self, m: Matrix, name: str) -> Buffer:
        """Registers for the block's own rows as A."""
        return registers(name, 4 * self.down * -(-self.lengths(m.columns) * self.unit.chunks // 2), i32)

    # ------------------------------------------------------------------ the walk

    def declared(self, operands: Sequence[Operand]) -> list[Stmt]:
        """What does not change; memory that two operands have is allocated once."""
        done: list[Stmt] = [Let(WARP_OF, binary("floordiv", TX, WARP)), Let(LANE, binary("mod", TX, WARP))]
        known: set[str] = set()
        for s in (s for x in operands for s in x.declare(Z)):
            if isinstance(s, Alloc):
                if s.buffer.name in known:
                    continue
                known.add(s.buffer.name)
            done.append(s)
        return done

    def walked(
        self,
        mine: Sequence[tuple[Operand, Buffer, int]],
        others: Sequence[Operand],
        first: Expr,
        begin: Expr,
        stop: Expr,
        step: Callable[[Expr, Expr], list[Stmt]],
    ) -> list[Stmt]:
        """The block's own rows, from `first` on of so many, to registers; then the tiles of others from `begin` to `stop`, one on
        its way while `step` (the tile's first row, its buffer) uses the one before."""
        by_async = any(x.way.by_async for x, _, _ in mine) or any(x.way.by_async for x in others)
        commit: list[Stmt] = [Warp("commit_async")] if by_async else []
        wait: list[Stmt] = [Warp("wait_async", (), (const(0),))] if by_async else []
        done: list[Stmt] = []
        for x, _, count in mine:
            for j in range(-(-self.rows // self.step)):
                at = binary("add", first, j * self.step), const(count), const(j)
                done += x.begin(*at) + x.end(*at)
        taken = {x.shared.name for x, _, _ in mine}

        def places(at: Expr, buffer: Expr) -> list[tuple[Expr, Expr, Expr]]:
            return [(binary("add", at, j * self.step), stop, binary("add", buffer, j)) for j in range(self.steps)]

        late = [x for x in others if x.shared.name in taken]
        for x in others:
            if x not in late:
                done += [s for p in places(begin, const(0)) for s in x.begin(*p) + x.end(*p)]
        done += [*commit, *wait, Barrier()]
        for x, to, _ in mine:
            done += self._fragments(x, to)
        done += [Barrier()] if late else []
        for x in late:
            done += [s for p in places(begin, const(0)) for s in x.begin(*p) + x.end(*p)]
        done += commit
        c0, half, following, other = var("col0"), var("half"), var("following"), var("other")
        turn = Buffer("turn", i64, (1,), scope="register", align=8)
        done += [Alloc(turn), Store(turn, ZERO, const(0))]
        inner: list[Stmt] = [
            Let(half, load(turn, ZERO, i64)),
            Let(other, binary("sub", self.steps, half)),
            Let(following, binary("add", c0, self.tile)),
            *wait,
            Barrier(),
        ]
        inner += [s for x in others for p in places(following, other) for s in x.begin(*p)] + commit
        inner += step(c0, half)
        inner += [s for x in others for p in places(following, other) for s in x.end(*p)]
        inner.append(Store(turn, ZERO, other))
        done.append(For(c0, begin, stop, tuple(inner), "serial", self.tile))
        return done + wait

    def _fragments(self, x: Operand, to: Buffer) -> list[Stmt]:
        own = binary("mul", WARP_OF, 16 * self.down)
        stage, inside = binary("floordiv", own, self.step), binary("mod", own, self.step)
        both = replace(self.unit, chunks=2)  # `ldmatrix` brings a tile of 16 rows and two chunks
        done: list[Stmt] = []
        for pair in range(to.shape[0] // (4 * self.down)):
            part = self.register("part", 4 * self.down, dtype=i32)
            done += [Alloc(part), *x.fragments(part, both, self.down, stage, inside, 2 * pair * self.per, LANE, across=True)]
            for r in range(4 * self.down):
                done.append(Store(to, (const(4 * pair * self.down + r),), load(part, (const(r),), i32)))
        return done

    # ------------------------------------------------------------------ products

    def product_across(self, s: Buffer, left: Buffer, x: Operand, columns: int, half: Expr) -> list[Stmt]:
        """s = the block's own rows, of so many columns, times those of a tile: one of s for each row of the tile."""
        unit = self.unit
        each = self.step // 8
        done: list[Stmt] = [Alloc(s), *(Store(s, (const(i),), const(0.0, f32)) for i in range(s.shape[0]))]
        for j in range(self.steps):
            for kk in range(self.lengths(columns)):
                right = self.register("right", each * unit.b, dtype=i32)
                chunk, stage = kk * unit.chunks, binary("add", half, j)
                done.append(Alloc(right))
                done += x.fragments(right, unit, each, stage, const(0), chunk * self.per, LANE, across=True)
                for i in range(self.down):
                    for t in range(each):
                        at = (s, (const(4 * (i * self.steps * each + j * each + t)),))
                        a = (left, (const(4 * (chunk // 2 * self.down + i) + chunk % 2 * 2),))
                        done.append(Warp(unit.op, (at, a, (right, (const(t * unit.b),)))))
        return done

    def product_along(self, o: Buffer, p: Buffer, x: Operand, columns: int, half: Expr) -> list[Stmt]:
        """o += p, rounded, times a tile of so many columns, whose rows are p's columns."""
        unit = self.unit
        length, across = unit.chunks * self.per, self.across(columns)
        done: list[Stmt] = []
        for j in range(self.steps):
            for kk in range(0, self.step, length):
                left = self.register("left", self.down * unit.a, dtype=i32)
                right = self.register("right", across * unit.b, dtype=i32)
                done += [Alloc(left), Alloc(right)]
                for i in range(self.down):
                    for r in range(unit.a):  # chunk by chunk the rows 0 to 7, 8 to 15
                        tile = (j * self.step + kk) // 8 + r // 2
                        at = 4 * (i * self.tile // 8 + tile) + 2 * (r % 2)
                        done.append(Warp(f"pack_{self.dtype}", ((left, (const(i * unit.a + r),)), (p, (const(at),)))))
                done += x.fragments(right, unit, across, binary("add", half, j), const(0), kk, LANE)
                for i in range(self.down):
                    for t in range(across):
                        sums = (o, (const(4 * (i * across + t)),))
                        done.append(Warp(unit.op, (sums, (left, (const(i * unit.a),)), (right, (const(t * unit.b),)))))
        return done

    # ------------------------------------------------------------------ scores

    def row(self, first: Expr, row: int) -> Expr:
        """A lane's row of the block, which begins at `first`: counted 8 down at a time."""
        own = binary("add", binary("mul", WARP_OF, 16 * self.down), 8 * row)
        return binary("add", first, binary("add", own, binary("floordiv", LANE, LANES)))

    def column(self, first: Expr, n: int) -> Expr:
        """The column of a lane's n-th element of a row."""
        return binary("add", first, binary("add", binary("mul", binary("mod", LANE, LANES), 2), 8 * (n // 2) + n % 2))

    def allowed(self, s: Buffer, first: Expr, c0: Expr, turned: bool = False) -> list[Stmt]:
        """Scores in units of `factor`, -inf where forbidden or where a column does not exist; nothing in tiles in which there is
        nothing to do. `turned`: rows are keys, and columns queries."""
        columns = self.queries if turned else self.keys
        edges: list[Expr] = []
        if columns % self.tile:
            edges.append(binary("lt", const(columns), binary("add", c0, self.tile)))
        if self.form.causal:
            last_key, query = (binary("add", first, self.rows - 1), c0) if turned else (binary("add", c0, self.tile - 1), first)
            edges.append(binary("lt", query, last_key))
        done: list[Stmt] = []
        for row in range(2 * self.down):
            for n, slot in enumerate(slots(row, self.tile // 8)):
                own, other = self.row(first, row), self.column(c0, n)
                query, key = (other, own) if turned else (own, other)
                value = load(s, (const(slot),), f32)
                if not self.raw:
                    value = binary("mul", value, const(self.form.scale, f32))
                tests: list[Expr] = [binary("lt", other, const(columns))] if columns % self.tile else []
                if self.form.causal:
                    tests.append(binary("le", key, query))
                lets, value = self.masked(value, query, key, tests)
                for a in tests:
                    value = select(a, value, const(-math.inf, f32))
                done += [*lets, Store(s, (const(slot),), value)]
        if self.mask is not None or not self.raw:
            return done
        if not edges:
            return []
        test = edges[0]
        for e in edges[1:]:
            test = binary("or", test, e)
        return [If(test, tuple(done))]

    # ------------------------------------------------------------------ results

    def columns_of(self, o: Buffer, row: int, place: Expr, columns: int, factor: Expr) -> list[Stmt]:
        """A row's sums times a factor, to the result from `place` on."""
        done: list[Stmt] = []
        for n, slot in enumerate(slots(row, self.across(columns))):
            column = self.column(const(0), n)
            value = binary("mul", load(o, (const(slot),), f32), factor)
            one = Store(self.out, (binary("add", place, column),), value)
            done.append(one if 8 * (n // 2 + 1) <= columns else If(binary("lt", column, const(columns)), (one,)))
        return done


__all__ = ["LANE", "LANES", "LOG2E", "MOST_WARPS", "Tensor", "registers", "slots"]
