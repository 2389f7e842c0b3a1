"""Copies of an operand in the order in which tiles read it: columns in panels, rows tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...ir.dtypes import i32
from ...ir.expr import Expr, binary, bitcast, broadcast, cast, const, load, minimum, ramp, substitute, var
from ..loop_ir import Buffer, For, Let, Stmt, Store
from .canonical import B, Loop
from .layout import Layout, decode

RUN = 64  # steps copied of one item before the next when packing transposes
TOGETHER = 8  # steps copied of one panel before the next where lines lie along the columns: these lines are read from end to end
SHARES = 32  # parallel pieces that a copy is cut in, if its reduction allows
SRC, DST = var("src"), var("dst")


class _Copy:
    """The loops of a copy into the workspace, one tile (or panel) after the other.

    which   0: the row operand, 1: the column operand;  inner: elements between two steps of the copy
    A tile's steps are shared out, along their outermost loop, where there are few tiles.
    """

    def __init__(self, layout: Layout, which: int, tiles: int, inner: int) -> None:
        p = layout.plan
        self.layout, self.which, self.tiles, self.inner = layout, which, tiles, inner
        self.stream = (p.row, p.col)[which]
        self.source: Buffer = layout.parameters[self.stream]
        self.loops = p.reduce_from
        self.ks = [var(f"q{n}") for n in range(len(self.loops))]
        self.strides = [inner * math.prod(x.extent for x in self.loops[n + 1 :]) for n in range(len(self.loops))]
        outer = self.loops[0].extent if self.loops else 1
        self.block = outer if layout.kind == "serial" else max(1, outer // max(1, SHARES // tiles))
        self.shares = -(-outer // self.block)
        self.index = var("share")
        self.tile = self.index // self.shares
        self.first = self.index % self.shares * self.block if self.shares > 1 else const(0)
        self.last = minimum(self.first + self.block, const(outer)) if self.shares > 1 else const(outer)

    def element(self, at: Expr, lanes: int = 1, mask: Expr | None = None) -> Expr:
        """Of the operand, in the accumulator's dtype; or a pair of them, or four bytes, as their bits."""
        first = load(self.source, (at,), self.source.dtype, mask, lanes)
        apart = None if self.layout.nest.pairs is None else self.layout.nest.pairs[self.stream]
        if not apart:
            return cast(first, self.layout.dtype)
        whole, ways = cast(first, i32), self.layout.nest.ways
        for k in range(1, ways):
            part = cast(load(self.source, (at + k * apart,), self.source.dtype, mask, lanes), i32)
            whole = binary("or", whole, binary("shl", part, const(32 // ways * k, i32, lanes)))
        return bitcast(whole, self.layout.dtype)

    def places(self, src: Expr, dst: Expr, depth: int) -> tuple[Expr, Expr]:
        """Both offsets moved by the first `depth` reduction loops."""
        for k, x, s in zip(self.ks[:depth], self.loops, self.strides, strict=False):
            src, dst = src + k * x.strides[self.which], dst + k * s
        return src, dst

    def around(self, body: tuple[Stmt, ...], depth: int) -> tuple[Stmt, ...]:
        """The body inside the first `depth` reduction loops."""
        for n in range(depth - 1, -1, -1):
            body = (For(self.ks[n], *self.bounds(n), body),)
        return body

    def bounds(self, n: int) -> tuple[Expr, Expr]:
        """Of reduction loop n, in this share."""
        return (self.first, self.last) if n == 0 else (const(0), const(self.loops[n].extent))

    def steps(self) -> tuple[Expr, Expr]:
        """First and last step of this share, counted over all loops."""
        inside = math.prod(x.extent for x in self.loops[1:])
        return self.first * inside, self.last * inside

    def transposed(self, src: Expr, dst: Expr, item: Expr, count: Expr) -> list[Stmt]:
        """for outer k, runs of the innermost k { for item { for k in the run: work[dst] = operand[src] } }.

        Lines of the operand that hold many steps of one item are used up before they leave L1; eight items at a time,
        so that stores lie side by side.
        """
        depth = len(self.loops)
        src, dst = self.places(src, dst, depth)
        whole = count - count % 8

        def copies(n: int) -> tuple[Stmt, ...]:
            moved = [{item: item + j} for j in range(n)]
            return tuple(Store(self.layout.work, (substitute(dst, m),), self.element(substitute(src, m))) for m in moved)

        def items(inner: Callable[[tuple[Stmt, ...]], tuple[Stmt, ...]]) -> tuple[Stmt, ...]:
            return (For(item, const(0), whole, inner(copies(8)), step=8), For(item, whole, count, inner(copies(1))))

        if not self.loops:
            return list(items(lambda b: b))
        k, (low, high) = self.ks[-1], self.bounds(depth - 1)
        if self.loops[-1].extent <= RUN:
            body = items(lambda b: (For(k, low, high, b),))
        else:
            start = var("run")
            stop = minimum(start + RUN, high)
            body = (For(start, low, high, items(lambda b: (For(k, start, stop, b),)), step=RUN),)
        return list(self.around(body, depth - 1))

    def loop(self, body: list[Stmt]) -> For:
        """Over all tiles and their shares."""
        return For(self.index, const(0), const(self.tiles * self.shares), tuple(body), self.layout.kind)


def pack_columns(layout: Layout) -> Stmt:
    """work[both, panel, k..., column] = column operand, zero beyond its last column."""
    p, region, lanes, width = layout.plan, layout.packed_col, layout.lanes, layout.width
    assert region is not None
    step = p.lane.strides[p.col]
    together = step == 1 and layout.lane_tiles > 1 and bool(p.reduce_from) and not layout.nest.panel
    copy = _Copy(layout, 1, layout.both * p.panels // (layout.lane_tiles if together else 1), width)
    loops = [*p.both, *p.col_others]
    *where, panel = decode(copy.tile, [*(x.extent for x in loops), 1 if together else layout.lane_tiles])
    panel = var("panel") if together else panel
    number = copy.tile * layout.lane_tiles + panel if together else copy.tile
    first, column = var("first_column"), var("column")
    src: Expr = const(layout.nest.base[p.col])
    for x, at in zip(loops, where, strict=True):
        src = src + at * x.strides[p.col]
    body: list[Stmt] = [
        Let(first, panel * p.columns),
        Let(SRC, src + (layout.panel_offset(first) if layout.nest.panel and p.col == B else first * step)),
        Let(DST, number * (layout.steps * width) + region.start),
    ]
    ragged = p.lane.extent % p.columns != 0
    count = minimum(const(p.lane.extent) - first, const(p.columns)) if ragged else const(p.columns)
    if step == 1:
        src, dst = copy.places(SRC, DST, len(copy.loops))
        stores = []
        for j in range(0, width, lanes):
            mask = binary("lt", ramp(j, lanes), broadcast(count, lanes)) if ragged or p.columns % lanes else None
            stores.append(Store(layout.work, (dst + j,), copy.element(src + j, lanes, mask)))
        if together:
            k, run, (low, high) = copy.ks[-1], var("run"), copy.bounds(len(copy.loops) - 1)
            body.append(For(k, run, minimum(run + TOGETHER, high), tuple(stores)))
            panels = For(panel, const(0), const(layout.lane_tiles), tuple(body))
            return copy.loop(list(copy.around((For(run, low, high, (panels,), step=TOGETHER),), len(copy.loops) - 1)))
        body += copy.around(tuple(stores), len(copy.loops))
    else:
        body += copy.transposed(SRC + column * step, DST + column, column, count)
        if ragged or width != p.columns:
            z = var("step")
            clear = Store(layout.work, (DST + z * width + column,), const(0, layout.dtype))
            body.append(For(z, *copy.steps(), (For(column, count, const(width), (clear,)),)))
    return copy.loop(body)


def pack_rows(layout: Layout) -> Stmt:
    """work[both, tile, row, k...] or work[both, tile, k..., row] = row operand."""
    p, region, lanes = layout.plan, layout.packed_row, layout.lanes
    assert region is not None
    by_steps = p.pack_row == "k"
    copy = _Copy(layout, 0, layout.both * p.row_tiles, 1 if by_steps else p.pitch)
    *where, tile = decode(copy.tile, [*(x.extent for x in p.both), p.row_tiles])
    origin, sizes, lets = layout.row_origin(tile, "pack")
    src: Expr = const(layout.nest.base[p.row]) + origin[p.row]
    for x, at in zip(p.both, where, strict=True):
        src = src + at * x.strides[p.row]
    body: list[Stmt] = [*lets, Let(SRC, src), Let(DST, copy.tile * layout.row_size + region.start)]
    unit = Loop(1, (0,) * len(layout.nest.base))
    outer, inner = ([unit, unit] + [x for x, _ in p.rows])[-2:]
    outer_size, inner_size = ([const(1), const(1)] + sizes)[-2:]
    ro, ri = var("row_outer"), var("row_inner")
    src = SRC + ri * inner.strides[p.row] + ro * outer.strides[p.row]
    # rows of a tile are numbered by the tile's own sizes: an outer row skips as many as the inner loop has
    dst = DST + (ro * inner_size + ri) * (p.pitch if by_steps else 1)
    for x, at in zip(p.row_source, decode(var("pack_i0") + ri, [x.extent for x in p.row_source]), strict=True):
        src = src + at * x.strides[p.row]
    depth = len(copy.loops)
    if by_steps and copy.loops and copy.loops[-1].strides[0] == 1:
        src, dst = copy.places(src, dst, depth - 1)
        rows = copy.around(_run(copy, src, dst), depth - 1)
        body += [For(ro, const(0), outer_size, (For(ri, const(0), inner_size, rows),))]
    elif not by_steps and inner.strides[p.row] == 1:
        src, dst = copy.places(src, dst, depth)
        stores = []
        for j in range(0, p.rows[-1][1], lanes):
            mask = binary("lt", ramp(j, lanes), broadcast(inner_size, lanes))
            at_src, at_dst = (substitute(e, {ri: const(j)}) for e in (src, dst))
            stores.append(Store(layout.work, (at_dst,), copy.element(at_src, lanes, mask), mask))
        body.append(For(ro, const(0), outer_size, copy.around(tuple(stores), depth)))
    else:
        body.append(For(ro, const(0), outer_size, tuple(copy.transposed(src, dst, ri, inner_size))))
    return copy.loop(body)


def _run(copy: _Copy, src: Expr, dst: Expr) -> tuple[Stmt, ...]:
    """The innermost reduction loop copied in vectors."""
    lanes, work, k = copy.layout.lanes, copy.layout.work, copy.ks[-1]
    low, high = copy.bounds(len(copy.loops) - 1)
    whole = low + (high - low) // lanes * lanes
    main = For(k, low, whole, (Store(work, (dst + k,), copy.element(src + k, lanes)),), step=lanes)
    mask = binary("lt", ramp(k, lanes), broadcast(high, lanes))
    tail = For(k, whole, high, (Store(work, (dst + k,), copy.element(src + k, lanes, mask), mask),), step=lanes)
    return (main, tail)
