"""Products with a sparse matrix: y[m, n] = sum over the entries of n's block of x[m, offset] * value, then what follows.

The rows of x are copied in panels first, k after k: panel[k] holds R rows side by side, so that an offset is a place in it.

Blocks that fill vectors (1x16): the columns of a block are the lanes, a tile of rows the registers

    for panels, shared between threads: for blocks of columns: for tiles of T rows
      acc[r] = 0
      for entries of the block                           bounds and offsets are read from memory
        w = values[entry]                                a vector, or several
        acc[r] += panel[offset][r] * w                   x broadcast
      y[r] = what follows (bias, activation, residual)

Narrower blocks, single values among them: the rows are the lanes, and the results are transposed in registers

    for panels, shared between threads: for groups of as many columns as there are lanes
      for blocks of the group
        for entries of the block:  acc[v] += panel[offset][v] * value          the value broadcast, v vectors of rows
        tile[column] = acc
      y[row] = what follows of the tile's columns

A sum runs over its entries in their order: it depends neither on threads nor on the panel that a row lies in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.dtypes import i32, i64
from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, fma, load, maximum, minimum, postorder, substitute, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Sparse
from ..ir.target import Target
from .groups import Body, Lowered, body_name, flat_index, lanes_for, lowered, static_shape, unflatten
from .loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store, vector_variable
from .maps import CYCLE_NS
from .nests import CHUNK_NS, Axis, first_lanes, has_masks, nest, parallel_nest
from .simplify_index import Simplifier
from .transpose import columns
from .vectorize import vectorize

DIRECT: Final = 4  # rows that are read where they lie: more of them, if long, may lie in one set of the cache
VECTORS: Final = 4  # of columns of a block at once, or of rows of narrow blocks
SHARED: Final = 8  # panels, or parts of them, that threads share
COPIES: Final = 0.2  # of the time that products take may go into copying panels again
STACK: Final = 512 * 1024  # bytes of a panel on a thread's stack
CHUNKS: Final = 32  # at least, where there is work for them
PACK_NS: Final = 0.2  # an element of a panel
LEAST_NS: Final = 10_000.0  # kernels of a network follow each other: the workers are awake


def lower_sparse(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of one product with a sparse matrix and the elementwise chain on its result."""
    made = _Product(graph, target, aligns)
    if made.body.outputs[0].span == 0:
        return lowered(made.body, name, [], doc="product of nothing")
    statements, parallel = made.emit()
    doc = f"sparse product: {body_name(graph)}"
    return lowered(made.body, name, statements, doc=doc, workspaces=made.workspaces, parallel=parallel, note=made.note)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a panel begins."""

    buffer: Buffer
    start: Expr


class _Product:
    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        self.target = target
        self.body = body = Body(graph, aligns)
        cores = [n for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), Sparse)]
        if len(cores) != 1 or len(graph.outputs) != 1 or any(i not in body.operand for i in cores[0].inputs):
            raise CompileError(f"{body_name(graph)}: one sparse product with its operands in memory and one output is expected")
        (self.core,), self.result = cores, graph.outputs[0]
        form = body.lowering(self.core)
        assert isinstance(form, Sparse)
        x, values, offsets, starts = self.core.inputs
        self.x, self.values, self.offsets, self.starts = (body.buffers[body.operand[n]] for n in (x, values, offsets, starts))
        self.dtype, self.width = x.dtype, form.block
        *self.lead, self.depth = static_shape(x)
        self.rows, self.columns = math.prod(self.lead), static_shape(self.core)[-1]
        self.entries = static_shape(values)[0]
        dtypes = [self.dtype, self.result.dtype, *(b.dtype for b in body.buffers if b.dtype.is_float)]
        self.lanes, self.masked = lanes_for(target, dtypes), has_masks(target, dtypes)
        self.numbers = itertools.count()
        self.wide = self.width % self.lanes == 0
        if self.wide:
            self.vectors = min(self.width // self.lanes, VECTORS if target.registers >= 32 else VECTORS // 2)
            room = (target.registers - self.vectors - 1) // self.vectors
            self.tile = min(1 << (room.bit_length() - 1), self.lanes)
            self.pitch = self.lanes
        else:
            room = (target.registers - 2) // (self.width + 1)
            self.vectors = max(1, min(VECTORS, room, -(-self.rows // self.lanes)))
            self.tile = self.pitch = self.vectors * self.lanes
        self.step = self._rows_of_a_panel() if self.wide and self.tile == self.pitch else self.pitch
        near = self.step * self.depth * self.dtype.itemsize <= target.l1 // 2
        self.direct = self.wide and (self.rows <= DIRECT or near)
        self.panels, self.rest = divmod(self.rows, self.step)
        size = self.depth * self.pitch
        count = self.panels + bool(self.rest)
        # A panel is copied by the thread that multiplies it, and stays in its cache: what another core has just written comes
        # slowly. Where there are few panels, parts of the columns are shared as well, and each part's thread makes a copy.
        self.nanoseconds = self.rows * self.entries * self.width / self.lanes * CYCLE_NS * 1.3
        copying = 1.0 if self.direct else self.rows * self.depth * PACK_NS
        most = max(1, min(self.columns // max(self.width, self.lanes), int(COPIES * self.nanoseconds / copying)))
        self.parts = min(-(-SHARED // max(1, count)), most)
        self.own = count * self.parts >= SHARED // 2 and size * self.dtype.itemsize <= STACK
        self.packed = Buffer("panels", self.dtype, (max(1, count * size),), align=64)
        self.panel = Buffer("panel_of_thread", self.dtype, (max(1, size),), scope="local", align=64)
        self.workspaces = () if self.direct or self.own else (self.packed,)
        kind = f"{self.tile} rows x {self.vectors * self.lanes} columns" if self.wide else f"{self.tile} rows in vectors"
        self.note = f"{self.entries} blocks 1x{self.width}, {kind}"

    def _rows_of_a_panel(self) -> int:
        """As many rows as the tile has, or fewer if that leaves no small rest: a tile costs about four rows besides its own,
        for what it reads, and one of few rows waits for its sums."""

        def cost(step: int) -> tuple[int, int]:
            whole, rest = divmod(self.rows, step)
            return whole * (step + 4) + (max(rest, 4) + 4 if rest else 0), -step

        return min(range(max(1, self.tile // 2), self.tile + 1), key=cost)

    def emit(self) -> tuple[list[Stmt], bool]:
        """Panel by panel; one that holds fewer rows than the others has code of its own."""
        p, part, count = var("panel"), var("part"), self.panels + bool(self.rest)
        total = self.nanoseconds + (0 if self.direct else self.rows * self.depth * PACK_NS)
        chunk = max(LEAST_NS / 8, min(CHUNK_NS, total / CHUNKS))
        if self.own:

            def panel(rows: int) -> list[Stmt]:
                source = self.place(p)
                done: list[Stmt] = [] if self.direct else [Alloc(self.panel), *self.pack(p, source, rows)]
                for g, whole, body in self.groups(p, source, rows):
                    done += self.share_of(part, g, whole, body)
                return done

            axes = [Axis(p, count), *([Axis(part, self.parts)] if self.parts > 1 else [])]
            return parallel_nest(axes, self.either(p, panel), total, least=LEAST_NS, chunk=chunk)
        done: list[Stmt] = []
        shared = False
        if not self.direct:
            copying = self.rows * self.depth * PACK_NS
            copy = self.either(p, lambda rows: self.pack(p, self.place(p), rows))
            done, shared = parallel_nest([Axis(p, count)], copy, copying, least=LEAST_NS, chunk=chunk)
        full = self.groups(p, self.place(p), self.step) if self.panels else []
        left = self.groups(p, self.place(p), self.rest) if self.rest else []
        for k, (g, whole, _) in enumerate(full or left):

            def group(rows: int, k: int = k) -> list[Stmt]:
                return (left if rows == self.rest else full)[k][2]

            body = self.either(p, group)
            made, threads = parallel_nest([Axis(g, whole), Axis(p, count)], body, self.nanoseconds, least=LEAST_NS, chunk=chunk)
            done, shared = done + made, shared or threads
        return done, shared

    def share_of(self, part: Expr, g: Expr, whole: int, body: list[Stmt]) -> list[Stmt]:
        """The groups of one part of the columns; a single group belongs to the last part."""
        if self.parts == 1:
            return nest([Axis(g, whole)], body)
        if whole < self.parts:
            return [If(binary("eq", part, self.parts - 1), tuple(nest([Axis(g, whole)], body)))]
        first = binary("floordiv", binary("mul", part, whole), self.parts)
        end = binary("floordiv", binary("mul", binary("add", part, 1), whole), self.parts)
        return [For(g, first, end, tuple(body))]

    def either(self, panel: Expr, code: Callable[[int], list[Stmt]]) -> list[Stmt]:
        """The code for a panel's rows: all panels but the last have as many as a step."""
        if not self.rest:
            return code(self.step)
        if not self.panels:
            return code(self.rest)
        return [If(binary("lt", panel, self.panels), tuple(code(self.step)), tuple(code(self.rest)))]

    def place(self, panel: Expr) -> _Source:
        """Where a panel begins: among all of them, in the thread's own, or in the operand itself."""
        if self.direct:
            return _Source(self.x, binary("mul", panel, self.step * self.depth))
        return _Source(self.panel, const(0)) if self.own else _Source(self.packed, binary("mul", panel, self.depth * self.pitch))

    def groups(self, panel: Expr, source: _Source, count: int) -> list[tuple[Expr, int, list[Stmt]]]:
        """(variable, how many, code of one): blocks of columns, or groups of narrow ones, for `count` rows of a panel."""
        g = var("group")
        if self.wide:
            return [(g, self.columns // self.width, self.block(panel, source, g, count))]
        whole, left = divmod(self.columns, self.lanes)
        made = [(g, whole, self.group(panel, source, g, count, self.lanes))] if whole else []
        last = var("last_group")
        return [*made, (last, 1, self.group(panel, source, binary("add", last, whole), count, left))] if left else made

    # -- the operand's rows in panels ------------------------------------------------------------------------------------

    def pack(self, panel: Expr, into: _Source, count: int) -> list[Stmt]:
        """panel[k, r] = x[panel * step + r, k] for `count` rows, and zeros up to a whole vector of rows."""
        lanes, depth = self.lanes, self.depth
        source = binary("mul", panel, self.step * depth)
        done: list[Stmt] = []
        for first in range(0, -(-count // lanes) * lanes, lanes):
            live = min(lanes, count - first)
            if depth < lanes or lanes < 2:
                k = var(f"k{next(self.numbers)}")
                place = binary("add", into.start, binary("add", binary("mul", k, self.pitch), first))
                stores = []
                for r in range(lanes):
                    at = binary("add", source, binary("add", k, (first + r) * depth))
                    value = load(self.x, (at,), self.dtype) if r < live else const(0, self.dtype)
                    stores.append(Store(into.buffer, (binary("add", place, r),), value))
                done.append(For(k, const(0), const(depth), tuple(stores)))
                continue
            k = var(f"k{next(self.numbers)}")
            done.append(
                For(k, const(0), const(depth // lanes * lanes), tuple(self._square(source, into, first, live, k)), step=lanes)
            )
            if depth % lanes:  # the last columns once more, whole
                done += self._square(source, into, first, live, const(depth - lanes))
        return done

    def _square(self, source: Expr, into: _Source, first: int, live: int, k: Expr) -> list[Stmt]:
        """`lanes` steps of `lanes` rows, transposed."""
        lanes, done, rows = self.lanes, list[Stmt](), list[Expr]()
        for r in range(lanes):
            at = binary("add", source, binary("add", k, (first + r) * self.depth))
            rows.append(vector_variable(f"x{next(self.numbers)}", self.dtype, lanes))
            value = load(self.x, (at,), self.dtype, None, lanes) if r < live else const(0, self.dtype, lanes)
            done.append(Let(rows[-1], value))
        lets, steps = columns(rows, self.numbers)
        done += lets
        place = binary("add", into.start, binary("add", binary("mul", k, self.pitch), first))
        return [*done, *(Store(into.buffer, (binary("add", place, j * self.pitch),), v) for j, v in enumerate(steps))]

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

    def block(self, panel: Expr, source: _Source, block: Expr, count: int) -> list[Stmt]:
        """A block of columns for the rows of a panel, tile by tile."""
        done, first, last = self.bounds(block)
        across = self.width // self.lanes
        for top in range(0, count, self.tile):
            rows = min(self.tile, count - top)
            for left in range(0, across, self.vectors):
                done += self._tile(panel, source, block, top, rows, range(left, min(left + self.vectors, across)), first, last)
        return done

    def _tile(
        self, panel: Expr, source: _Source, block: Expr, top: int, rows: int, across: range, first: Expr, last: Expr
    ) -> list[Stmt]:
        lanes = self.lanes
        acc, done = self.cleared(rows * len(across))
        entry = var(f"entry{next(self.numbers)}")
        let, at = self.offset(entry)
        steps: list[Stmt] = [let]
        weights: list[Expr] = []
        for v in across:
            weights.append(vector_variable(f"w{next(self.numbers)}", self.dtype, lanes))
            place = binary("add", binary("mul", entry, self.width), v * lanes)
            steps.append(Let(weights[-1], load(self.values, (place,), self.dtype, None, lanes)))
        base = binary("add", source.start, at if self.direct else binary("mul", at, self.pitch))
        for r in range(rows):
            apart = (top + r) * (self.depth if self.direct else 1)
            x = load(source.buffer, (binary("add", base, apart),), self.dtype)
            name = vector_variable(f"x{next(self.numbers)}", self.dtype, lanes)
            steps.append(Let(name, broadcast(x, lanes)))
            steps += [self.multiply_add(acc, r * len(across) + v, name, w) for v, w in enumerate(weights)]
        done.append(For(entry, first, last, tuple(steps)))
        row = binary("add", binary("mul", panel, self.step), top)
        stores: list[tuple[Expr, Expr, Expr]] = []
        for r in range(rows):
            for v, k in enumerate(across):
                column = binary("add", binary("mul", block, self.width), k * lanes)
                value = load(acc, (const(r * len(across) + v), const(0)), self.dtype, lanes=lanes)
                stores.append((binary("add", row, r), column, value))
        return done + self.finish(stores, lanes)

    # -- rows in vectors -----------------------------------------------------------------------------------------------------

    def group(self, panel: Expr, source: _Source, group: Expr, count: int, width: int) -> list[Stmt]:
        """`width` columns, from group * lanes on, for `count` rows of a panel."""
        lanes, vectors = self.lanes, -(-count // self.lanes)
        tile = Buffer(f"tile{next(self.numbers)}", self.dtype, (lanes, self.pitch), scope="local", align=64)
        j = var(f"block{next(self.numbers)}")
        block = binary("add", binary("mul", group, lanes // self.width), j)
        body, first, last = self.bounds(block)
        acc, cleared = self.cleared(self.width * vectors)
        entry = var(f"entry{next(self.numbers)}")
        let, at = self.offset(entry)
        steps: list[Stmt] = [let]
        base = binary("add", source.start, binary("mul", at, self.pitch))
        weights: list[Expr] = []
        for w in range(self.width):
            weights.append(vector_variable(f"w{next(self.numbers)}", self.dtype, lanes))
            value = load(self.values, (binary("add", binary("mul", entry, self.width), w),), self.dtype)
            steps.append(Let(weights[-1], broadcast(value, lanes)))
        for v in range(vectors):
            x = vector_variable(f"x{next(self.numbers)}", self.dtype, lanes)
            steps.append(Let(x, load(source.buffer, (binary("add", base, v * lanes),), self.dtype, None, lanes)))
            steps += [self.multiply_add(acc, w * vectors + v, x, weight) for w, weight in enumerate(weights)]
        body += [*cleared, For(entry, first, last, tuple(steps))]
        for w in range(self.width):
            for v in range(vectors):
                held = load(acc, (const(w * vectors + v), const(0)), self.dtype, lanes=lanes)
                body.append(Store(tile, (binary("add", binary("mul", j, self.width), w), const(v * lanes)), held))
        done: list[Stmt] = [Alloc(tile), For(j, const(0), const(width // self.width), tuple(body))]
        row, column = binary("mul", panel, self.step), binary("mul", group, lanes)
        whole, left = divmod(count, lanes)
        if whole:
            top = var(f"rows{next(self.numbers)}")
            stores = self._turned(tile, binary("mul", top, lanes), row, column, lanes, width)
            done.append(For(top, const(0), const(whole), tuple(stores)))
        if left:
            done += self._turned(tile, const(whole * lanes), row, column, left, width)
        return done

    def _turned(self, tile: Buffer, top: Expr, row: Expr, column: Expr, rows: int, width: int) -> list[Stmt]:
        """The results of `rows` rows from `top` on: `width` columns of a tile that holds column after column."""
        lanes, first = self.lanes, binary("add", row, top)
        if width < lanes and not self.masked:  # less than a vector of a target of narrow vectors without masks
            ones = [(binary("add", first, r), binary("add", column, c), load(tile, (const(c), binary("add", top, r)), self.dtype))
                    for r in range(rows) for c in range(width)]  # fmt: skip
            return self.finish(ones, 1)
        done: list[Stmt] = []
        held: list[Expr] = []
        for c in range(lanes):
            held.append(vector_variable(f"c{next(self.numbers)}", self.dtype, lanes))
            value = load(tile, (const(c), top), self.dtype, None, lanes) if c < width else const(0, self.dtype, lanes)
            done.append(Let(held[-1], value))
        lets, turned = columns(held, self.numbers) if lanes > 1 else ([], held)
        mask = first_lanes(width, lanes) if width < lanes else None
        stores = [(binary("add", first, r), column, turned[r]) for r in range(rows)]
        return [*done, *lets, *self.finish(stores, lanes, mask)]

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


__all__ = ["lower_sparse"]
