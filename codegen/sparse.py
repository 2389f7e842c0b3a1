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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.expr import Expr, binary, const, load, var
from ..ir.graph import Graph
from ..ir.target import Target
from .groups import Lowered, body_name, lowered
from .loop_ir import Alloc, Buffer, For, Let, Stmt, Store, vector_variable
from .nests import CHUNK_NS, Axis, parallel_nest
from .sparse_common import CHUNKS, COPIES, LEAST_NS, NARROW_COPIES, PACK_NS, SHARED, STACK, VECTORS, Product
from .sparse_windows import Windows
from .transpose import columns

DIRECT: Final = 4  # rows that are read where they lie: more of them, if long, may lie in one set of the cache


def lower_sparse(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of one product with a sparse matrix and the elementwise chain on its result."""
    made: _Rows | Windows = _Rows(graph, target, aligns)
    if made.form.window is not None:
        made = Windows(graph, target, aligns)
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


class _Rows(Product):
    """Rows of x [..., K]."""

    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        super().__init__(graph, target, aligns)
        if self.wide:
            self.tile = min(1 << (self.room.bit_length() - 1), self.lanes)
            self.pitch = self.lanes
        else:
            self.tile_vectors = self._vectors_of_a_panel()
            self.tile = self.pitch = self.tile_vectors * self.lanes
        self.step = self._rows_of_a_panel() if self.wide and self.tile == self.pitch else self.pitch
        near = self.step * self.depth * self.dtype.itemsize <= target.l1 // 2
        self.direct = self.wide and (self.rows <= DIRECT or near)
        self.panels, self.rest = divmod(self.rows, self.step)
        size = self.depth * self.pitch
        count = self.panels + bool(self.rest)
        # A panel is copied by the thread that multiplies it, and stays in its cache: what another core has just written comes
        # slowly.
        copying = 1.0 if self.direct else self.rows * self.depth * PACK_NS
        self.parts = self.parts_of(count, copying, COPIES if self.wide else NARROW_COPIES)
        self.own = count * self.parts >= SHARED // 2 and size * self.dtype.itemsize <= STACK
        self.packed = Buffer("panels", self.dtype, (max(1, count * size),), align=64)
        self.panel = Buffer("panel_of_thread", self.dtype, (max(1, size),), scope="local", align=64)
        self.workspaces = () if self.direct or self.own else (self.packed,)
        kind = f"{self.tile} rows x {self.vectors * self.lanes} columns" if self.wide else f"{self.tile} rows in vectors"
        self.note = f"{self.entries} blocks 1x{self.width}, {kind}"

    def _vectors_of_a_panel(self) -> int:
        """Vectors of rows in a panel that leaves most of the cache to what streams by: of a long one fewer, for an entry
        waits for its lines, not for what is done once for each entry. Few rows make several panels so, a thread each."""
        count = max(1, min(VECTORS, self.room, -(-self.rows // self.lanes)))
        while count > 2 and count * self.lanes * self.depth * self.dtype.itemsize >= self.target.l2 // 8:
            count = (count + 1) // 2
        return count

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

    # -- tiles ---------------------------------------------------------------------------------------------------------------

    def block(self, panel: Expr, source: _Source, block: Expr, count: int) -> list[Stmt]:
        """A block of columns for the rows of a panel, tile by tile."""
        done, first, last = self.bounds(block)
        row = binary("mul", panel, self.step)
        for top in range(0, count, self.tile):
            apart = [r * (self.depth if self.direct else 1) for r in range(top, min(top + self.tile, count))]
            rows = [binary("add", binary("add", row, top), r) for r in range(len(apart))]
            done += self.wide_tile(source.buffer, lambda at: self.element(source, at), apart, rows, block, first, last)
        return done

    def element(self, source: _Source, at: Expr) -> Expr:
        """Where a step of the reduction lies for a panel's first row."""
        return binary("add", source.start, at if self.direct else binary("mul", at, self.pitch))

    def group(self, panel: Expr, source: _Source, group: Expr, count: int, width: int) -> list[Stmt]:
        """`width` columns, from group * lanes on, for `count` rows of a panel."""
        lanes, vectors = self.lanes, -(-count // self.lanes)
        tile, done = self.narrow_sums(source.buffer, lambda at: self.element(source, at), group, width, vectors, self.pitch)
        row, column = binary("mul", panel, self.step), binary("mul", group, lanes)

        def some(top: Expr, count: int) -> list[Stmt]:
            first = binary("add", row, top)
            return self.turned(tile, top, [(r, binary("add", first, r)) for r in range(count)], column, width)

        whole, left = divmod(count, lanes)
        if whole:
            top = var(f"rows{next(self.numbers)}")
            done.append(For(top, const(0), const(whole), tuple(some(binary("mul", top, lanes), lanes))))
        return [*done, *some(const(whole * lanes), left)] if left else done


__all__ = ["lower_sparse"]
