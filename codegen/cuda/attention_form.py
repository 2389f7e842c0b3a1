"""What kernels of attention have in common: sizes, operands as matrices, the grid, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ...ir.dtypes import DType, bool_, f32
from ...ir.expr import Expr, binary, cast, const, eq, load, minimum, select, var
from ...ir.graph import Node
from ...ir.lowering import Attention
from ..groups import Body, flat_index, static_shape
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..nests import Axis
from .contraction import merged
from .grid import TX, Names, launch, places, warp_tree
from .machine import WARP
from .reduces import group_launch
from .thread import ZERO

MOST_OUTER: Final = 65535
Z, TILE = var("z"), var("tile")


@dataclass(frozen=True)
class Matrix:
    """An operand as one matrix for each slice: element (r, c) of slice z is `buffer[offset(z) + r * stride + c]`."""

    buffer: Buffer
    rows: int
    columns: int
    loops: tuple[tuple[int, int], ...]  # the slices: (extent, elements) of each dimension, 0 where it is the same for all

    @property
    def stride(self) -> int:
        return self.columns

    def offset(self) -> Expr:
        total: Expr = const(0)
        inside = prod(n for n, _ in self.loops)
        for k, (n, step) in enumerate(self.loops):
            inside //= n
            place = binary("floordiv", Z, inside)
            total = binary("add", total, binary("mul", binary("mod", place, n) if k else place, step))
        return total

    def width(self) -> int:
        """How many elements of a row are one access."""
        whole = self.columns % 4 == 0 and not any(s % 4 for _, s in self.loops) and self.buffer.align % 16 == 0
        return 4 if whole else 1


def matrix_of(node: Node, buffer: Buffer, lead: Sequence[int]) -> Matrix:
    shape = static_shape(node)
    own = (*(1,) * (len(lead) + 2 - len(shape)), *shape[:-2])
    loops: list[tuple[int, int]] = []
    step = shape[-1] * shape[-2]
    for n, whole in zip(reversed(own), reversed(lead), strict=True):
        loops.insert(0, (whole, step if n != 1 else 0))
        step *= n
    return Matrix(buffer, shape[-2], shape[-1], tuple(merged(loops)))


class Problem:
    """Attention, or the way back of one side of it: its sizes and operands."""

    def __init__(self, body: Body, node: Node, form: Attention) -> None:
        self.form, self.node = form, node
        self.lead = static_shape(node)[:-2]
        self.slices = prod(self.lead)
        self.names = Names()
        backward = bool(form.side)
        count = 5 if backward else 3
        sources = [body.buffers[body.operand[i]] for i in node.inputs]
        found = [matrix_of(i, b, self.lead) for i, b in zip(node.inputs, sources, strict=True)]
        self.q, self.k, self.v = found[:3]
        self.y, self.dy = found[3:5] if backward else (found[0], found[0])
        self.mask = found[count] if len(found) > count else None
        self.queries, self.keys = self.q.rows, self.k.rows
        self.d, self.e = self.q.columns, self.v.columns
        self.out = body.outputs[0]

    def register(self, stem: str, *shape: int, dtype: DType = f32) -> Buffer:
        return Buffer(self.names(stem), dtype, shape, scope="register", align=16)

    def masked(self, value: Expr, query: Expr, key: Expr, allowed: list[Expr]) -> tuple[list[Stmt], Expr]:
        """A score with the mask's number, or with the mask's bool among what is `allowed`; queries and keys that do not exist
        read the last one's."""
        m = self.mask
        if m is None:
            return [], value
        row = minimum(query, const(self.queries - 1)) if m.rows != 1 else const(0)
        column = minimum(key, const(self.keys - 1)) if m.columns != 1 else const(0)
        at = binary("add", m.offset(), binary("add", binary("mul", row, m.stride), column))
        given = var(self.names("mask"), m.buffer.dtype)
        if m.buffer.dtype is bool_:
            allowed.append(given)
        else:
            value = binary("add", value, given)
        return [Let(given, load(m.buffer, (at,), m.buffer.dtype))], value

    def blocks(self, tiles: int, threads: int, body: Sequence[Stmt]) -> Stmt:
        """A launch of a block for each slice and tile."""
        if self.slices <= MOST_OUTER:
            return launch((self.slices, tiles), threads, body, (Z, TILE))
        both = var("both")
        axes = [Axis(Z, self.slices), Axis(TILE, tiles)]
        return launch((self.slices * tiles,), threads, [*places(both, axes), *body], (both,))

    def deltas(
        self,
        keep: Callable[[Expr, Expr, Expr], list[Stmt]],
        also: Callable[[Expr, Expr, Expr], list[Stmt]] | None = None,
        rounded: DType = f32,
    ) -> Stmt:
        """D = sum dy y - dl of each query, of dy `rounded`: a warp for each. `keep` gets the query's number among all, its row
        sum and D; `also` gets that number, a column and dy."""
        axes = [Axis(Z, self.slices), Axis(var("row"), self.queries)]
        acc = self.register("sum", 1)
        c, at, lane = var("c"), var("at"), binary("mod", TX, WARP)
        dy, y = var("dy", f32), var("y", f32)
        row = binary("mul", axes[1].var, self.y.stride)
        place = binary("add", row, c)
        given = cast(load(self.dy.buffer, (binary("add", self.dy.offset(), place),), self.dy.buffer.dtype), f32)
        # the last column is the row sum's
        term = select(eq(c, const(self.e)), binary("sub", const(0.0, f32), dy), binary("mul", y, cast(cast(dy, rounded), f32)))
        step: list[Stmt] = [
            Let(dy, given),
            Let(y, load(self.y.buffer, (binary("add", self.y.offset(), place),), f32)),
            Store(acc, ZERO, binary("add", load(acc, ZERO, f32), term)),
        ]
        if also is not None:
            step += also(at, c, dy)
        body: list[Stmt] = [Let(at, flat_index((Z, axes[1].var), (self.slices, self.queries)))]
        body += [Alloc(acc), Store(acc, ZERO, const(0.0, f32))]
        body.append(For(c, lane, const(self.e + 1), tuple(step), "serial", WARP))
        lets, whole = warp_tree("sum", load(acc, ZERO, f32), self.names)
        rows = load(self.y.buffer, (binary("add", self.y.offset(), binary("add", row, self.e)),), f32)
        body += [*lets, If(eq(lane, const(0)), tuple(keep(at, rows, whole)))]
        return group_launch(axes, body, WARP)

    def upto(self, first: Expr, rows: int) -> Expr:
        """Where a block of queries that begins at `first` stops among the keys."""
        end = const(self.keys)
        return minimum(binary("add", first, rows), end) if self.form.causal else end


__all__ = ["TILE", "Matrix", "Problem", "Z"]
