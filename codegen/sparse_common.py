"""What products with sparse matrices have in common: the entries of a block, their sums in registers, and what follows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from ..ir.dtypes import i32, i64
from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, fma, load, maximum, minimum, postorder, substitute, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Sparse
from ..ir.target import Target
from .groups import Body, body_name, flat_index, lanes_for, static_shape, unflatten
from .loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store, vector_variable
from .maps import CYCLE_NS
from .nests import Axis, first_lanes, has_masks, nest
from .simplify_index import Simplifier
from .transpose import columns
from .vectorize import vectorize

VECTORS: Final = 4  # of columns of a block at once, or of rows of narrow blocks
SHARED: Final = 8  # panels, or parts of them, that threads share
COPIES: Final = 0.2  # of the time that products take may go into copying panels again
NARROW_COPIES: Final = 0.45  # where values stand alone, whose entries read whole lines: another core's are slow to come
STACK: Final = 512 * 1024  # bytes of a panel on a thread's stack
CHUNKS: Final = 32  # at least, where there is work for them
PACK_NS: Final = 0.2  # an element of a panel
LEAST_NS: Final = 10_000.0  # kernels of a network follow each other: the workers are awake


class Product:
    """One product with a sparse matrix and the elementwise chain on its result.

    rows, columns   of the result; `lead` is the shape of the rows
    depth           steps of the reduction: an offset is held below it
    wide            whether the columns of a block fill vectors: rows then are the registers, else the lanes
    step, panels, rest   rows of a panel, panels of so many rows, and the rows that are left for one more: the subclass's
    """

    step: int
    panels: int
    rest: int

    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        self.target = target
        self.body = body = Body(graph, aligns)
        cores = [n for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), Sparse)]
        if len(cores) != 1 or len(graph.outputs) != 1 or any(i not in body.operand for i in cores[0].inputs):
            raise CompileError(f"{body_name(graph)}: one sparse product with its operands in memory and one output is expected")
        (self.core,), self.result = cores, graph.outputs[0]
        form = body.lowering(self.core)
        assert isinstance(form, Sparse)
        self.form = form
        x, values, offsets, starts = self.core.inputs
        self.x, self.values, self.offsets, self.starts = (body.buffers[body.operand[n]] for n in (x, values, offsets, starts))
        self.dtype, self.width = x.dtype, form.block
        *self.lead, self.columns = static_shape(self.core)
        self.rows = math.prod(self.lead)
        self.depth = static_shape(x)[-1] * form.taps
        self.entries = static_shape(values)[0]
        dtypes = [self.dtype, self.result.dtype, *(b.dtype for b in body.buffers if b.dtype.is_float)]
        self.lanes, self.masked = lanes_for(target, dtypes), has_masks(target, dtypes)
        self.numbers = itertools.count()
        self.wide = self.width % self.lanes == 0
        if self.wide:
            self.vectors = min(self.width // self.lanes, VECTORS if target.registers >= 32 else VECTORS // 2)
            self.room = (target.registers - self.vectors - 1) // self.vectors  # rows whose sums registers hold
        else:
            self.room = (target.registers - 2) // (self.width + 1)  # vectors of rows
        self.nanoseconds = self.rows * self.entries * self.width / self.lanes * CYCLE_NS * 1.3
        self.parts = 1

    def either(self, panel: Expr, code: Callable[[int], list[Stmt]]) -> list[Stmt]:
        """The code for a panel's rows: all panels but the last (of an image) have as many as a step."""
        if not self.rest:
            return code(self.step)
        if not self.panels:
            return code(self.rest)
        return [If(binary("lt", panel, self.panels), tuple(code(self.step)), tuple(code(self.rest)))]

    def parts_of(self, panels: int, copying: float, copies: float = COPIES) -> int:
        """Where there are few panels, parts of the columns are shared as well, and each part's thread makes a copy."""
        most = max(1, min(self.columns // max(self.width, self.lanes), int(copies * self.nanoseconds / copying)))
        return min(-(-SHARED // max(1, panels)), most)

    def share_of(self, part: Expr, g: Expr, whole: int, body: list[Stmt]) -> list[Stmt]:
        """The groups of one part of the columns; a single group belongs to the last part."""
        if self.parts == 1:
            return nest([Axis(g, whole)], body)
        if whole < self.parts:
            return [If(binary("eq", part, self.parts - 1), tuple(nest([Axis(g, whole)], body)))]
        first = binary("floordiv", binary("mul", part, whole), self.parts)
        end = binary("floordiv", binary("mul", binary("add", part, 1), whole), self.parts)
        return [For(g, first, end, tuple(body))]

    # -- entries -----------------------------------------------------------------------------------------------------------

    def bounds(self, block: Expr) -> tuple[list[Stmt], Expr, Expr]:
        """Lets for the first and last entry of a block, held inside what there is."""
        first, last = var(f"first{next(self.numbers)}"), var(f"last{next(self.numbers)}")

        def start(at: Expr) -> Expr:
            return minimum(maximum(cast(load(self.starts, (at,), i32), i64), const(0)), const(self.entries))

        return [Let(first, start(block)), Let(last, start(binary("add", block, 1)))], first, last

    def offset(self, entry: Expr) -> tuple[Let, Expr]:
        """A let for an entry's step of the reduction, held inside what there is."""
        at = var(f"at{next(self.numbers)}")
        step = cast(load(self.offsets, (entry,), i32), i64)
        return Let(at, minimum(maximum(step, const(0)), const(max(self.depth - 1, 0)))), at

    def multiply_add(self, acc: Buffer, slot: int, a: Expr, b: Expr) -> Stmt:
        place = (const(slot), const(0))
        old = load(acc, place, self.dtype, lanes=self.lanes)
        new = fma(a, b, old) if self.target.fma else binary("add", old, binary("mul", a, b))
        return Store(acc, place, new)

    def cleared(self, slots: int) -> tuple[Buffer, list[Stmt]]:
        acc = Buffer(f"acc{next(self.numbers)}", self.dtype, (slots, self.lanes), scope="register", align=64)
        zero = const(0, self.dtype, self.lanes)
        return acc, [Alloc(acc), *(Store(acc, (const(s), const(0)), zero) for s in range(slots))]

    # -- columns in vectors --------------------------------------------------------------------------------------------------

    def wide_tile(
        self, buffer: Buffer, base: Callable[[Expr], Expr], apart: Sequence[int], rows: Sequence[Expr], block: Expr,
        first: Expr, last: Expr,
    ) -> list[Stmt]:  # fmt: skip
        """The columns of a block for some rows. `base` says where the element of an offset lies in the buffer for the first of
        them, `apart` how far from there it lies for each; `rows` are their places in the result."""
        done: list[Stmt] = []
        across = self.width // self.lanes
        for left in range(0, across, self.vectors):
            part = range(left, min(left + self.vectors, across))
            done += self._wide_part(buffer, base, apart, rows, block, first, last, part)
        return done

    def _wide_part(
        self, buffer: Buffer, base: Callable[[Expr], Expr], apart: Sequence[int], rows: Sequence[Expr], block: Expr,
        first: Expr, last: Expr, across: range,
    ) -> list[Stmt]:  # fmt: skip
        lanes = self.lanes
        acc, done = self.cleared(len(rows) * len(across))
        entry = var(f"entry{next(self.numbers)}")
        let, at = self.offset(entry)
        steps: list[Stmt] = [let]
        weights: list[Expr] = []
        for v in across:
            weights.append(vector_variable(f"w{next(self.numbers)}", self.dtype, lanes))
            place = binary("add", binary("mul", entry, self.width), v * lanes)
            steps.append(Let(weights[-1], load(self.values, (place,), self.dtype, None, lanes)))
        where = base(at)
        for r, distance in enumerate(apart):
            x = load(buffer, (binary("add", where, distance),), self.dtype)
            name = vector_variable(f"x{next(self.numbers)}", self.dtype, lanes)
            steps.append(Let(name, broadcast(x, lanes)))
            steps += [self.multiply_add(acc, r * len(across) + v, name, w) for v, w in enumerate(weights)]
        done.append(For(entry, first, last, tuple(steps)))
        stores: list[tuple[Expr, Expr, Expr]] = []
        for r, row in enumerate(rows):
            for v, k in enumerate(across):
                column = binary("add", binary("mul", block, self.width), k * lanes)
                value = load(acc, (const(r * len(across) + v), const(0)), self.dtype, lanes=lanes)
                stores.append((row, column, value))
        return done + self.finish(stores, lanes)

    # -- rows in vectors -----------------------------------------------------------------------------------------------------

    def narrow_sums(
        self, buffer: Buffer, base: Callable[[Expr], Expr], group: Expr, width: int, vectors: int, pitch: int
    ) -> tuple[Buffer, list[Stmt]]:
        """A tile [column, row] of the sums of `width` columns from group * lanes on, `vectors` vectors of rows."""
        lanes = self.lanes
        tile = Buffer(f"tile{next(self.numbers)}", self.dtype, (lanes, pitch), scope="local", align=64)
        j = var(f"block{next(self.numbers)}")
        block = binary("add", binary("mul", group, lanes // self.width), j)
        body, first, last = self.bounds(block)
        acc, cleared = self.cleared(self.width * vectors)
        entry = var(f"entry{next(self.numbers)}")
        let, at = self.offset(entry)
        steps: list[Stmt] = [let]
        where = base(at)
        weights: list[Expr] = []
        for w in range(self.width):
            weights.append(vector_variable(f"w{next(self.numbers)}", self.dtype, lanes))
            value = load(self.values, (binary("add", binary("mul", entry, self.width), w),), self.dtype)
            steps.append(Let(weights[-1], broadcast(value, lanes)))
        for v in range(vectors):
            x = vector_variable(f"x{next(self.numbers)}", self.dtype, lanes)
            steps.append(Let(x, load(buffer, (binary("add", where, v * lanes),), self.dtype, None, lanes)))
            steps += [self.multiply_add(acc, w * vectors + v, x, weight) for w, weight in enumerate(weights)]
        body += [*cleared, For(entry, first, last, tuple(steps))]
        for w in range(self.width):
            for v in range(vectors):
                held = load(acc, (const(w * vectors + v), const(0)), self.dtype, lanes=lanes)
                body.append(Store(tile, (binary("add", binary("mul", j, self.width), w), const(v * lanes)), held))
        return tile, [Alloc(tile), For(j, const(0), const(width // self.width), tuple(body))]

    def turned(self, tile: Buffer, top: Expr, rows: Sequence[tuple[int, Expr]], column: Expr, width: int) -> list[Stmt]:
        """The results of rows that lie in the tile from `top` on, at most as many as there are lanes: (which, its place in the
        result) of each. `width` columns of a tile that holds column after column."""
        lanes = self.lanes
        if width < lanes and not self.masked:  # less than a vector of a target of narrow vectors without masks
            ones = [(row, binary("add", column, c), load(tile, (const(c), binary("add", top, r)), self.dtype))
                    for r, row in rows for c in range(width)]  # fmt: skip
            return self.finish(ones, 1)
        done: list[Stmt] = []
        held: list[Expr] = []
        for c in range(lanes):
            held.append(vector_variable(f"c{next(self.numbers)}", self.dtype, lanes))
            value = load(tile, (const(c), top), self.dtype, None, lanes) if c < width else const(0, self.dtype, lanes)
            done.append(Let(held[-1], value))
        lets, turned = columns(held, self.numbers) if lanes > 1 else ([], held)
        mask = first_lanes(width, lanes) if width < lanes else None
        return [*done, *lets, *self.finish([(row, column, turned[r]) for r, row in rows], lanes, mask)]

    # -- what follows --------------------------------------------------------------------------------------------------------

    def finish(self, stores: Sequence[tuple[Expr, Expr, Expr]], lanes: int, mask: Expr | None = None) -> list[Stmt]:
        """Stores of (row, first column, sums): what follows the product, `lanes` columns at a time."""
        body, out = self.body, self.body.outputs[0]
        column, row, total = var("column"), var("row"), var("sparse.sum", self.dtype)
        simplifier = Simplifier({column: (0, self.columns - 1), row: (0, self.rows - 1)})
        body.normal = simplifier.simplify
        index = (*(simplifier.simplify(i) for i in unflatten(row, self.lead)), column)

        def bound(n: Node, at: tuple[Expr, ...]) -> Expr | None:
            if n is not self.core:
                return None
            if at != index:
                raise CompileError(f"{self.core.op.name}: what follows reads the result at another index than it writes")
            return total

        body.bound = bound
        body.forget()
        value = simplifier.simplify(body.value(self.result, index))
        body.bound = None
        place = simplifier.simplify(flat_index(index, static_shape(self.core)))
        done: list[Stmt] = []
        ready: list[tuple[Expr, Expr]] = []
        uses: dict[Expr, int] = {}
        for at, first, sums in stores:
            moved = {row: at, column: first}
            wide = vectorize(value, column, lanes, mask, {total: sums}) if lanes > 1 else substitute(value, {total: sums})
            ready.append((substitute(place, moved), broadcast(substitute(wide, moved), lanes)))
            for e in set(postorder([ready[-1][1]])):
                if e.op == "load" and e.attr[0].scope == "global":
                    uses[e] = uses.get(e, 0) + 1
        names: dict[Expr, Expr] = {}
        for where, wide in ready:
            for e in postorder([wide]):
                if uses.get(e, 0) > 1 and e not in names:
                    names[e] = vector_variable(f"f{next(self.numbers)}", e.dtype, e.lanes)
                    done.append(Let(names[e], e))
            done.append(Store(out, (where,), substitute(wide, names), mask))
        return done


__all__ = ["CHUNKS", "COPIES", "LEAST_NS", "NARROW_COPIES", "PACK_NS", "SHARED", "STACK", "VECTORS", "Product"]
