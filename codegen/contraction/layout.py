"""Where a plan puts things: the workspace's regions, and the positions of panels, row tiles and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.dtypes import DType, u8, u16
from ...ir.expr import Expr, binary, const, minimum, select, var
from ...ir.target import Target
from ..loop_ir import Buffer, Let, Stmt
from .canonical import Loop, Nest
from .plan import Plan, pieces
from .types import Operand

ALIGN = 16  # elements to which regions of the workspace are rounded


def parameters(nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand]) -> tuple[Buffer, ...]:
    """The buffers of a root kernel: A, B, C, then what the epilogue reads, then further outputs (`abc` from 3 on).

    bf16 whose pairs are read is bits (see `paired`), and so are bytes.
    """
    dtypes = [x.dtype for x in abc]
    if nest.pairs is not None:
        element, whole = u16 if nest.ways == 2 else u8, nest.dtype
        dtypes[:2] = (element if apart else whole for apart in nest.pairs)
    out = [
        Buffer(n, d, (span,), align=max(x.align, x.dtype.itemsize), writable=n == "C")
        for n, x, d, span in zip("ABC", abc[:3], dtypes[:3], nest.spans, strict=True)
    ]
    out += [
        Buffer(f"E{k}", x.dtype, (span,), align=max(x.align, x.dtype.itemsize), writable=False)
        for k, (x, span) in enumerate(zip(extra, nest.read_spans, strict=True))
    ]
    out += [Buffer(f"C{k}", x.dtype, (nest.spans[2],), align=max(x.align, x.dtype.itemsize)) for k, x in enumerate(abc[3:], 1)]
    return tuple(out)


def decode(index: Expr, extents: Sequence[int]) -> list[Expr]:
    """The positions along dimensions of these extents of a row-major index."""
    out: list[Expr] = []
    inner = math.prod(extents)
    for k, n in enumerate(extents):
        inner //= n
        x = index // inner if n > 1 else const(0)
        out.append(x % n if k and n > 1 and math.prod(extents[:k]) > 1 else x)
    return out


@dataclass(frozen=True)
class Region:
    """A part of the workspace: first element and number of elements."""

    start: int
    size: int


class Layout:
    """The root kernel's buffers and how a plan divides them. `work` is the workspace, `size` its elements."""

    def __init__(
        self, nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand], target: Target, dtype: DType, plan: Plan
    ) -> None:
        self.nest, self.plan, self.target, self.dtype = nest, plan, target, dtype
        self.abc = abc
        self.parameters = parameters(nest, abc, extra)
        self.lanes = target.lanes(dtype.bits)
        p = plan
        self.both = math.prod(x.extent for x in p.both)
        self.steps = nest.steps
        self.lane_tiles = -(-p.lane.extent // p.columns)
        self.width = p.columns if p.along_k else -(-p.columns // self.lanes) * self.lanes * p.groups
        self.size = 0
        self.packed_col = self._region(self.both * p.panels * self.steps * self.width) if p.pack_col else None
        self.row_size = 0
        if p.pack_row:
            self.row_size = p.pitch * p.tile_rows if p.pack_row == "k" else p.pitch * self.steps
            self.row_size = -(-self.row_size // ALIGN) * ALIGN
        self.packed_row = self._region(self.both * p.row_tiles * self.row_size) if p.pack_row else None
        self.partial_size = -(-p.tile_rows * self.width // ALIGN) * ALIGN
        self.cells = self.both * p.panels * p.row_tiles
        self.blocks = 1  # blocks of the cut reduction
        for n, x in enumerate(p.reduce[: p.cut + 1]):
            self.blocks *= -(-x.extent // p.block) if n == p.cut else x.extent
        copies = self.blocks if p.split else 1
        self.partial = self._region(copies * self.cells * self.partial_size) if p.cut >= 0 else None
        self.work = Buffer("work", dtype, (self.size,), align=64)
        self.kind = "parallel" if plan.parallel else "serial"
        self.row_counts = [pieces(x.extent, n) for x, n in p.rows]

    def _region(self, size: int) -> Region:
        found = Region(self.size, size)
        self.size += -(-size // ALIGN) * ALIGN
        return found

    def panel_offset(self, first: Expr) -> Expr:
        """Where column `first` starts in B packed in panels."""
        n = self.nest.panel
        return first // n * (self.nest.panel_k * n) + first % n

    def row_origin(self, tile: Expr, tag: str) -> tuple[list[Expr], list[Expr], list[Stmt]]:
        """Offsets of a row tile per stream, its size along each row loop, and the lets they need."""
        p = self.plan
        counts = [count for count, _, _ in self.row_counts]
        where = decode(tile, [x.extent for x in p.row_others] + counts)
        lets: list[Stmt] = []
        offsets: list[Expr] = [const(0)] * len(self.nest.base)
        sizes: list[Expr] = []
        n = len(p.row_others)
        positions: list[tuple[Loop, Expr]] = []
        for k, (x, at) in enumerate(zip(p.row_others, where[:n], strict=True)):
            v = var(f"{tag}_r{k}")
            lets.append(Let(v, at))
            positions.append((x, v))
        for k, ((x, _), (_, length, longer), at) in enumerate(zip(p.rows, self.row_counts, where[n:], strict=True)):
            t = var(f"{tag}_t{k}")
            lets.append(Let(t, at))
            start = t * length + (minimum(t, const(longer)) if longer else 0)
            v = var(f"{tag}_i{k}")
            lets.append(Let(v, start))
            positions.append((x, v))
            sizes.append(select(binary("lt", t, longer), const(length + 1), const(length)) if longer else const(length))
        for x, v in positions:
            offsets = [o + v * s for o, s in zip(offsets, x.strides, strict=True)]
        return offsets, sizes, lets
