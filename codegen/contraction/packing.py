"""Copies of an operand in the order in which tiles read it: columns in panels, rows tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.expr import Expr, binary, broadcast, cast, const, load, minimum, ramp, substitute, var
from ..loop_ir import For, Let, Stmt, Store
from .canonical import Loop
from .layout import Layout, decode

RUN = 64  # steps copied of one item before the next when packing transposes


def pack_columns(layout: Layout) -> list[Stmt]:
    """ws[both, panel, k..., column] = column operand, zero beyond its last column."""
    p, region = layout.plan, layout.packed_col
    assert region is not None
    stream = p.col
    source = layout.parameters[stream]
    i = var("pc")
    where = decode(i, [x.extent for x in p.both] + [x.extent for x in p.col_others] + [layout.lane_tiles])
    loops = [*p.both, *p.col_others]
    offset: Expr = const(layout.nest.base[stream])
    for x, at in zip(loops, where[:-1], strict=True):
        offset = offset + at * x.strides[stream]
    first = var("first_column")
    step = p.lane.strides[stream]
    offset = offset + first * step
    target = i * (layout.steps * layout.width) + region.start
    body: list[Stmt] = [Let(first, where[-1] * p.columns)]
    src, dst = var("src"), var("dst")
    body += [Let(src, offset), Let(dst, target)]
    ragged = p.lane.extent % p.columns != 0
    ks = [var(f"q{n}") for n in range(len(p.reduce_from))]
    from_k, to_k = src, dst
    inner = layout.width
    strides: list[int] = []
    for x in reversed(p.reduce_from):
        strides.insert(0, inner)
        inner *= x.extent

    def element(at: Expr, lanes: int, mask: Expr | None) -> Expr:
        return cast(load(source, (at,), source.dtype, mask, lanes), layout.dtype)

    if step == 1:
        for k, x, s in zip(ks, p.reduce_from, strides, strict=True):
            from_k, to_k = from_k + k * x.strides[1], to_k + k * s
        copies: list[Stmt] = []
        for j in range(0, layout.width, layout.lanes):
            mask = None
            if ragged or p.columns % layout.lanes:
                last = minimum(const(p.lane.extent) - first, const(p.columns))
                mask = binary("lt", ramp(j, layout.lanes), broadcast(last, layout.lanes))
            copies.append(Store(layout.work, (to_k + j,), element(from_k + j, layout.lanes, mask)))
        nest: tuple[Stmt, ...] = tuple(copies)
        for k, x in reversed(list(zip(ks, p.reduce_from, strict=True))):
            nest = (For(k, const(0), const(x.extent), nest),)
        body += nest
    else:
        # transposes: a run of steps of one column at a time, so that lines read are used up
        column = var("column")
        last = minimum(const(p.lane.extent) - first, const(p.columns)) if ragged else const(p.columns)
        body += _gather(
            layout,
            ks,
            p.reduce_from,
            1,
            src + column * step,
            dst + column,
            strides,
            column,
            last,
            lambda at: element(at, 1, None),
        )
        if ragged or layout.width != p.columns:
            z = var("z")
            clear = Store(layout.work, (dst + z * layout.width + column,), const(0, layout.dtype))
            body.append(For(z, const(0), const(layout.steps), (For(column, last, const(layout.width), (clear,)),)))
    return [For(i, const(0), const(layout.both * p.panels), tuple(body), layout.kind)]


def _gather(
    layout: Layout,
    ks: Sequence[Expr],
    loops: Sequence[Loop],
    which: int,
    src: Expr,
    dst: Expr,
    strides: Sequence[int],
    item: Expr,
    count: Expr,
    element: Callable[[Expr], Expr],
) -> list[Stmt]:
    """for outer k, runs of the innermost k { for item { for k in the run: ws[dst] = source[src] } }."""
    for k, x, s in zip(ks, loops, strides, strict=True):
        src, dst = src + k * x.strides[which], dst + k * s

    def copies(n: int) -> tuple[Stmt, ...]:
        shifted = [{item: item + j} for j in range(n)]
        return tuple(Store(layout.work, (substitute(dst, m),), element(substitute(src, m))) for m in shifted)

    # eight items at a time: their stores lie side by side
    whole = count - count % 8

    def items(inner: Callable[[tuple[Stmt, ...]], tuple[Stmt, ...]]) -> tuple[Stmt, ...]:
        return (For(item, const(0), whole, inner(copies(8)), step=8), For(item, whole, count, inner(copies(1))))

    if not loops:
        return list(items(lambda b: b))
    k, x = ks[-1], loops[-1]
    if x.extent <= RUN:
        body = items(lambda b: (For(k, const(0), const(x.extent), b),))
    else:
        start = var(f"{k.attr}_block")
        stop = minimum(start + RUN, const(x.extent))
        body = (For(start, const(0), const(x.extent), items(lambda b: (For(k, start, stop, b),)), step=RUN),)
    for k, x in reversed(list(zip(ks[:-1], loops[:-1], strict=True))):
        body = (For(k, const(0), const(x.extent), body),)
    return list(body)


def pack_rows(layout: Layout) -> list[Stmt]:
    """ws[both, tile, row, k...] or ws[both, tile, k..., row] = row operand."""
    p, region = layout.plan, layout.packed_row
    assert region is not None
    stream = p.row
    source = layout.parameters[stream]
    i = var("pr")
    tiles = p.row_tiles
    where = decode(i, [x.extent for x in p.both] + [tiles])
    offset: Expr = const(layout.nest.base[stream])
    for x, at in zip(p.both, where[:-1], strict=True):
        offset = offset + at * x.strides[stream]
    origin, sizes, lets = layout.row_origin(where[-1], "pack")
    offset = offset + origin[stream]
    src, dst = var("src"), var("dst")
    body: list[Stmt] = [*lets, Let(src, offset), Let(dst, i * layout.row_size + region.start)]
    ks = [var(f"q{n}") for n in range(len(p.reduce_from))]
    inner = 1 if p.pack_row == "k" else p.pitch
    strides: list[int] = []
    for x in reversed(p.reduce_from):
        strides.insert(0, inner)
        inner *= x.extent
    row_stride = p.pitch if p.pack_row == "k" else 1

    def element(at: Expr, lanes: int = 1, mask: Expr | None = None) -> Expr:
        return cast(load(source, (at,), source.dtype, mask, lanes), layout.dtype)

    rows = [x for x, _ in p.rows]
    inner_row = rows[-1] if rows else Loop(1, (0,) * len(layout.nest.base))
    inner_size = sizes[-1] if sizes else const(1)
    outer_size = sizes[0] if len(sizes) == 2 else const(1)
    ro, ri = var("row_outer"), var("row_inner")
    inner_count = p.rows[-1][1] if p.rows else 1
    src = src + ri * inner_row.strides[stream]
    # rows of a tile are numbered by the tile's own sizes: an outer row skips as many as the inner loop has
    dst = dst + (ro * inner_size + ri) * row_stride
    if len(rows) == 2:
        src = src + ro * rows[0].strides[stream]
    if p.pack_row == "k" and p.reduce_from and p.reduce_from[-1].strides[0] == 1:
        # rows are copied in vectors along the reduction
        for k, x, s in zip(ks[:-1], p.reduce_from[:-1], strides[:-1], strict=True):
            src, dst = src + k * x.strides[0], dst + k * s
        k, x = ks[-1], p.reduce_from[-1]
        lanes = layout.lanes
        whole = x.extent // lanes * lanes
        copies: list[Stmt] = []
        if whole:
            copies.append(For(k, const(0), const(whole), (Store(layout.work, (dst + k,), element(src + k, lanes)),), step=lanes))
        if whole < x.extent:
            mask = binary("lt", ramp(0, lanes), const(x.extent - whole, lanes=lanes))
            copies.append(Store(layout.work, (dst + whole,), element(src + whole, lanes, mask), mask))
        nest: tuple[Stmt, ...] = tuple(copies)
        for k, x in reversed(list(zip(ks[:-1], p.reduce_from[:-1], strict=True))):
            nest = (For(k, const(0), const(x.extent), nest),)
        nest = (For(ri, const(0), inner_size, nest),)
    elif p.pack_row == "m" and inner_row.strides[stream] == 1:
        for k, x, s in zip(ks, p.reduce_from, strides, strict=True):
            src, dst = src + k * x.strides[0], dst + k * s
        copies = []
        for j in range(0, inner_count, layout.lanes):
            lanes = layout.lanes
            mask = binary("lt", ramp(j, lanes), broadcast(inner_size, lanes))
            at_src, at_dst = (substitute(e, {ri: const(j)}) for e in (src, dst))
            copies.append(Store(layout.work, (at_dst,), element(at_src, lanes, mask), mask))
        nest = tuple(copies)
        for k, x in reversed(list(zip(ks, p.reduce_from, strict=True))):
            nest = (For(k, const(0), const(x.extent), nest),)
    else:
        nest = tuple(_gather(layout, ks, p.reduce_from, 0, src, dst, strides, ri, inner_size, element))
    body.append(For(ro, const(0), outer_size, nest))
    return [For(i, const(0), const(layout.both * tiles), tuple(body), layout.kind)]
