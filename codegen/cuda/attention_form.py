"""What kernels of attention have in common: sizes, operands as matrices, the grid, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ...ir.dtypes import DType, bool_, f32
from ...ir.expr import Expr, binary, const, load, minimum, var
from ...ir.graph import Node
from ...ir.lowering import Attention
from ..groups import Body, static_shape
from ..loop_ir import Buffer, Let, Stmt
from ..nests import Axis
from .contraction import merged
from .grid import Names, launch, places

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

    def upto(self, first: Expr, rows: int) -> Expr:
        """Where a block of queries that begins at `first` stops among the keys."""
        end = const(self.keys)
        return minimum(binary("add", first, rows), end) if self.form.causal else end


__all__ = ["TILE", "Matrix", "Problem", "Z"]
