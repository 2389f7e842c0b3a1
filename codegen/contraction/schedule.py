"""From a plan to kernels: packing, the loops over chunks, panels and tiles, and the calls of the microkernels.

    root(A, B, C, epilogue operands..., workspace):
      parallel over panels:      copy the column operand into panels          (if it is packed here)
      parallel over row tiles:   copy the row operand tile by tile            (if it is packed)
      parallel over chunks:      a block of panels x a block of row tiles
        for blocks of the reduction, panels, row tiles:   microkernel

A chunk's result does not depend on who computes it, and a cell's sum is added in an order that the plan fixes, so that
results are the same to the bit for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir.contraction import Affine, Contraction
from ...ir.dims import as_int
from ...ir.dtypes import DType, f32
from ...ir.expr import Expr, binary, broadcast, cast, const, eq, load, minimum, ramp, select, substitute, var
from ...ir.target import Target
from ..loop_ir import Alloc, Buffer, Call, For, If, Kernel, Let, Stmt, Store
from .canonical import ACC, A, B, C, Loop, Nest, canonical
from .microkernel import Tile, Ukernel, build
from .tile import PARALLEL_FROM, Plan, accumulator, choose, pieces, plans
from .types import Epilogue, Operand, Scheduled

CHUNKS = 32  # chunks aimed at: even shares for 1 to 8 threads, with one of them disturbed
RUN = 64  # steps copied of one item before the next when packing transposes
ALIGN = 16  # elements to which regions of the workspace are rounded


def schedule(
    spec: Contraction,
    a: Operand,
    b: Operand,
    c: Operand,
    epilogue: Epilogue | None,
    target: Target,
    *,
    threads: int,
    name: str,
) -> Scheduled:
    """The kernels that compute a contraction of operands that lie in memory as given.

    `threads` is a hint; neither the result nor the workspace depends on it. Raises CompileError for dtypes that are
    not supported, index maps that leave an operand, or a packing that does not fit the target's vectors.
    """
    del threads  # chunks are cut for any number of them
    nest = canonical(spec, a, b, c, epilogue)
    return schedule_nest(nest, (a, b, c), () if epilogue is None else epilogue.operands, target, name)


def schedule_nest(nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand], target: Target, name: str, plan: Plan | None = None) -> Scheduled:
    """`schedule` for a normal form, with a plan of the caller's own if given."""
    dtype = accumulator(nest.dtype)
    if 0 in (x.extent for x in nest.free):
        buffers = _parameters(nest, abc, extra)
        return Scheduled((Kernel(name, buffers, (), doc="no elements"),), name, 0, "no elements")
    if 0 in (x.extent for x in nest.reduce):
        return _empty_sums(nest, _parameters(nest, abc, extra), dtype, name)
    return _Root(nest, abc, extra, target, name, dtype, plan or choose(nest, target, abc[A].dtype, abc[B].dtype)).build()


def preferred_panel(spec: Contraction, target: Target, dtype: DType = f32) -> int:
    """The panel width B is best packed with beforehand, or 0 to leave it as it is.

    B must have every batch axis and a single column axis. Dense operands are assumed (the layout that follows from the
    index maps); the width is a multiple of the target's vector.
    """
    if spec.panel or any(not _moves(spec.b, x.name) for x in spec.of_kind("batch")):
        return 0
    columns = [x for x in spec.of_kind("n") if as_int(x.extent) != 1]
    if len(columns) != 1 or as_int(spec.size("k")) == 0 or as_int(spec.size("m")) == 0 or as_int(columns[0].extent) == 0:
        return 0
    lanes = target.lanes(dtype.bits)

    def dense(maps: Sequence[Affine]) -> Operand:
        strides: list[int] = []
        inner = 1
        for index in reversed(maps):
            strides.insert(0, inner)
            inner *= 1 + index.constant + sum(abs(c) * (as_int(spec.axis(n).extent) - 1) for n, c in index.terms)
        return Operand(dtype, tuple(strides), 64)

    a, b, c = dense(spec.a), dense(spec.b), dense(spec.c)
    unpacked = choose(canonical(spec, a, b, c, None), target, dtype, dtype)
    best: tuple[float, int] = (math.inf, 0)
    need = -(-as_int(columns[0].extent) // lanes)
    most = 8 if as_int(spec.size("m")) <= 4 else 4
    for vectors in sorted({-(-need // -(-need // n)) for n in range(1, min(most, need) + 1)}):
        panel = vectors * lanes
        packed = canonical(spec.packed(panel, ()), a, b, c, None)
        found = min((x.cycles for x in plans(packed, target, dtype, dtype) if x.columns == panel), default=math.inf)
        best = min(best, (found, panel))
    # a transposing or strided copy of B is what packing beforehand saves
    return best[1] if best[0] < unpacked.cycles * 1.02 else 0


def _moves(maps: Sequence[Affine], axis: str) -> bool:
    return any(n == axis for m in maps for n, _ in m.terms)


def _empty_sums(nest: Nest, buffers: tuple[Buffer, ...], dtype: DType, name: str) -> Scheduled:
    """C = epilogue(0): there is nothing to sum."""
    loops = [var(f"i{n}") for n in range(len(nest.free))]

    def at(stream: int) -> Expr:
        total: Expr = const(nest.base[stream])
        for v, x in zip(loops, nest.free, strict=True):
            total = total + v * x.strides[stream]
        return total

    values = {v: at(stream) for v, stream in nest.dims}
    markers = {var(ACC, nest.dtype): cast(const(0, dtype), nest.dtype)}
    for r in nest.reads:
        index = at(r.stream) if r.flat is None else substitute(r.flat, values)
        mask = None if r.mask is None else substitute(r.mask, values)
        markers[r.marker] = load(buffers[3 + r.operand], (index,), r.dtype, mask)
    body: tuple[Stmt, ...] = (Store(buffers[C], (at(C),), substitute(nest.value, values | markers)),)
    for v, x in reversed(list(zip(loops, nest.free, strict=True))):
        body = (For(v, const(0), const(x.extent), body),)
    return Scheduled((Kernel(name, buffers, body, doc="empty sums"),), name, 0, "the reduction is empty: C = epilogue(0)")


def _parameters(nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand]) -> tuple[Buffer, ...]:
    out = [
        Buffer(n, x.dtype, (span,), align=max(x.align, x.dtype.itemsize), writable=n == "C")
        for n, x, span in zip("ABC", abc, nest.spans, strict=True)
    ]
    out += [
        Buffer(f"E{k}", x.dtype, (span,), align=max(x.align, x.dtype.itemsize), writable=False)
        for k, (x, span) in enumerate(zip(extra, nest.read_spans, strict=True))
    ]
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
class _Region:
    """A part of the workspace: first element and number of elements."""

    start: int
    size: int


class _Root:
    def __init__(
        self, nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand], target: Target, name: str, dtype: DType, plan: Plan
    ) -> None:
        self.nest, self.plan, self.target, self.name, self.dtype = nest, plan, target, name, dtype
        self.abc = abc
        self.parameters = _parameters(nest, abc, extra)
        self.lanes = target.lanes(dtype.bits)
        p = plan
        self.both = math.prod(x.extent for x in p.both)
        self.steps = nest.steps
        self.lane_tiles = -(-p.lane.extent // p.columns)
        self.width = p.columns if p.along_k else -(-p.columns // self.lanes) * self.lanes
        self.used = 0
        self.packed_col = self._region(self.both * p.panels * self.steps * self.width) if p.pack_col else None
        self.row_size = 0
        if p.pack_row:
            self.row_size = p.pitch * p.tile_rows if p.pack_row == "k" else p.pitch * self.steps
            self.row_size = -(-self.row_size // ALIGN) * ALIGN
        self.packed_row = self._region(self.both * p.row_tiles * self.row_size) if p.pack_row else None
        self.partial_size = p.tile_rows * self.width
        self.cells = self.both * p.panels * p.row_tiles
        self.blocks = 1  # blocks of the cut reduction
        for n, x in enumerate(p.reduce[: p.cut + 1]):
            self.blocks *= -(-x.extent // p.block) if n == p.cut else x.extent
        copies = self.blocks if p.split else 1
        self.partial = self._region(copies * self.cells * self.partial_size) if p.cut >= 0 else None
        self.work = Buffer("work", dtype, (self.used,), align=64)
        self.fork = max(plan.cycles, plan.memory) >= PARALLEL_FROM
        self.kind = "parallel" if self.fork else "serial"
        self.ukernels: dict[tuple[tuple[int, ...], int], Ukernel] = {}
        self.row_counts = [pieces(x.extent, n) for x, n in p.rows]

    def _region(self, size: int) -> _Region:
        found = _Region(self.used, size)
        self.used += -(-size // ALIGN) * ALIGN
        return found

    # -- packing ------------------------------------------------------------------------------------------------------

    def _pack_col(self) -> list[Stmt]:
        """ws[both, panel, k..., column] = column operand, zero beyond its last column."""
        p, assert_region = self.plan, self.packed_col
        assert assert_region is not None
        stream = p.col
        source = self.parameters[stream]
        i = var("pc")
        where = decode(i, [x.extent for x in p.both] + [x.extent for x in p.col_others] + [self.lane_tiles])
        loops = [*p.both, *p.col_others]
        offset: Expr = const(self.nest.base[stream])
        for x, at in zip(loops, where[:-1], strict=True):
            offset = offset + at * x.strides[stream]
        first = var("first_column")
        step = p.lane.strides[stream]
        offset = offset + first * step
        target = i * (self.steps * self.width) + assert_region.start
        body: list[Stmt] = [Let(first, where[-1] * p.columns)]
        src, dst = var("src"), var("dst")
        body += [Let(src, offset), Let(dst, target)]
        ragged = p.lane.extent % p.columns != 0
        ks = [var(f"q{n}") for n in range(len(p.reduce_from))]
        from_k, to_k = src, dst
        inner = self.width
        strides = []
        for x in reversed(p.reduce_from):
            strides.insert(0, inner)
            inner *= x.extent

        def element(at: Expr, lanes: int, mask: Expr | None) -> Expr:
            return cast(load(source, (at,), source.dtype, mask, lanes), self.dtype)

        if step == 1:
            for k, x, s in zip(ks, p.reduce_from, strides, strict=True):
                from_k, to_k = from_k + k * x.strides[1], to_k + k * s
            copies: list[Stmt] = []
            for j in range(0, self.width, self.lanes):
                mask = None
                if ragged or p.columns % self.lanes:
                    last = minimum(const(p.lane.extent) - first, const(p.columns))
                    mask = binary("lt", ramp(j, self.lanes), broadcast(last, self.lanes))
                copies.append(Store(self.work, (to_k + j,), element(from_k + j, self.lanes, mask)))
            nest: tuple[Stmt, ...] = tuple(copies)
            for k, x in reversed(list(zip(ks, p.reduce_from, strict=True))):
                nest = (For(k, const(0), const(x.extent), nest),)
            body += nest
        else:
            # transposes: a run of steps of one column at a time, so that lines read are used up
            column = var("column")
            last = minimum(const(p.lane.extent) - first, const(p.columns)) if ragged else const(p.columns)
            body += self._gather(
                ks, p.reduce_from, 1, src + column * step, dst + column, strides, column, last, lambda at: element(at, 1, None)
            )
            if ragged or self.width != p.columns:
                z = var("z")
                clear = Store(self.work, (dst + z * self.width + column,), const(0, self.dtype))
                body.append(For(z, const(0), const(self.steps), (For(column, last, const(self.width), (clear,)),)))
        return [For(i, const(0), const(self.both * p.panels), tuple(body), self.kind)]

    def _gather(
        self,
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
            return tuple(Store(self.work, (substitute(dst, m),), element(substitute(src, m))) for m in shifted)

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

    def _pack_row(self) -> list[Stmt]:
        """ws[both, tile, row, k...] or ws[both, tile, k..., row] = row operand."""
        p, region = self.plan, self.packed_row
        assert region is not None
        stream = p.row
        source = self.parameters[stream]
        i = var("pr")
        tiles = p.row_tiles
        where = decode(i, [x.extent for x in p.both] + [tiles])
        offset: Expr = const(self.nest.base[stream])
        for x, at in zip(p.both, where[:-1], strict=True):
            offset = offset + at * x.strides[stream]
        origin, sizes, lets = self._row_origin(where[-1], "pack")
        offset = offset + origin[stream]
        src, dst = var("src"), var("dst")
        body: list[Stmt] = [*lets, Let(src, offset), Let(dst, i * self.row_size + region.start)]
        ks = [var(f"q{n}") for n in range(len(p.reduce_from))]
        inner = 1 if p.pack_row == "k" else p.pitch
        strides: list[int] = []
        for x in reversed(p.reduce_from):
            strides.insert(0, inner)
            inner *= x.extent
        row_stride = p.pitch if p.pack_row == "k" else 1

        def element(at: Expr, lanes: int = 1, mask: Expr | None = None) -> Expr:
            return cast(load(source, (at,), source.dtype, mask, lanes), self.dtype)

        rows = [x for x, _ in p.rows]
        inner_row = rows[-1] if rows else Loop(1, (0,) * len(self.nest.base))
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
            whole = x.extent // self.lanes * self.lanes
            copies: list[Stmt] = []
            if whole:
                copies.append(For(k, const(0), const(whole), (Store(self.work, (dst + k,), element(src + k, self.lanes)),), step=self.lanes))
            if whole < x.extent:
                mask = binary("lt", ramp(0, self.lanes), const(x.extent - whole, lanes=self.lanes))
                copies.append(Store(self.work, (dst + whole,), element(src + whole, self.lanes, mask), mask))
            nest: tuple[Stmt, ...] = tuple(copies)
            for k, x in reversed(list(zip(ks[:-1], p.reduce_from[:-1], strict=True))):
                nest = (For(k, const(0), const(x.extent), nest),)
            nest = (For(ri, const(0), inner_size, nest),)
        elif p.pack_row == "m" and inner_row.strides[stream] == 1:
            for k, x, s in zip(ks, p.reduce_from, strides, strict=True):
                src, dst = src + k * x.strides[0], dst + k * s
            copies = []
            for j in range(0, inner_count, self.lanes):
                lanes = self.lanes
                mask = binary("lt", ramp(j, lanes), broadcast(inner_size, lanes))
                at_src, at_dst = (substitute(e, {ri: const(j)}) for e in (src, dst))
                copies.append(Store(self.work, (at_dst,), element(at_src, lanes, mask), mask))
            nest = tuple(copies)
            for k, x in reversed(list(zip(ks, p.reduce_from, strict=True))):
                nest = (For(k, const(0), const(x.extent), nest),)
        else:
            nest = tuple(self._gather(ks, p.reduce_from, 0, src, dst, strides, ri, inner_size, element))
        body.append(For(ro, const(0), outer_size, nest))
        return [For(i, const(0), const(self.both * tiles), tuple(body), self.kind)]

    # -- positions ----------------------------------------------------------------------------------------------------

    def _row_origin(self, tile: Expr, tag: str) -> tuple[list[Expr], list[Expr], list[Stmt]]:
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

    def _variants(self) -> list[tuple[tuple[int, ...], int]]:
        """Every (size along each row loop, columns) that occurs."""
        p = self.plan
        sizes: list[tuple[int, ...]] = [()]
        for count, length, longer in self.row_counts:
            options = [length + 1] * (longer > 0) + [length] * (longer < count)
            sizes = [s + (o,) for s in sizes for o in options]
        full, rest = divmod(p.lane.extent, p.columns)
        widths = [p.columns] * (full > 0) + [rest] * (rest > 0)
        return [(s, w) for s in sizes for w in widths]

    def _ukernel(self, sizes: tuple[int, ...], columns: int) -> Ukernel:
        found = self.ukernels.get((sizes, columns))
        if found is not None:
            return found
        p, nest = self.plan, self.nest
        rows: list[tuple[int, ...]] = [(0,) * len(nest.base)]
        for (x, _), n in zip(p.rows, sizes, strict=True):
            rows = [tuple(o + i * s for o, s in zip(row, x.strides, strict=True)) for row in rows for i in range(n)]
        if p.pack_row:
            pitch = p.pitch if p.pack_row == "k" else 1
            rows = [tuple(i * pitch if s == p.row else o for s, o in enumerate(row)) for i, row in enumerate(rows)]
        step = list(p.lane.strides)
        if p.pack_col:
            step[p.col] = 1
        loops = list(p.reduce)
        if p.cut >= 0:
            loops = [Loop(p.block, p.reduce[p.cut].strides), *p.reduce[p.cut + 1 :]]
        found = build(
            nest,
            Tile(
                row=p.row,
                col=p.col,
                rows=tuple(rows),
                columns=columns,
                step=tuple(step),
                lanes=self.lanes,
                along_k=p.along_k,
                loops=tuple(loops),
                variable=p.cut >= 0,
                partial=p.cut >= 0,
                parts=p.parts,
                unroll=p.unroll,
                fused=self.target.fma,
                padded=p.pack_col or nest.panel > 0,
                dtype=self.dtype,
                row_dtype=self.dtype if p.pack_row else self.abc[p.row].dtype,
                col_dtype=self.dtype if p.pack_col else self.abc[p.col].dtype,
            ),
        )
        self.ukernels[sizes, columns] = found
        return found

    # -- the loops ----------------------------------------------------------------------------------------------------

    def _chunks(self) -> tuple[int, int]:
        """Blocks of row tiles and of panels that a chunk is made of: as little traffic as possible for enough chunks."""
        p = self.plan
        tiles, panels = p.row_tiles, p.panels
        size = self.dtype.itemsize
        row_bytes = p.tile_rows * self.steps * size
        col_bytes = p.columns * self.steps * size
        inside = self.steps if p.cut < 0 else p.block * math.prod(x.extent for x in p.reduce[p.cut + 1 :])
        fit = max(1, int(self.target.l2 * 0.5 / max(1, p.tile_rows * inside * size)))
        wanted = max(1, -(-CHUNKS // self.both)) if self.fork else 1
        best: tuple[float, int, int] | None = None
        for col_blocks in sorted({min(panels, n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)}):
            row_blocks = min(tiles, max(-(-wanted // col_blocks), -(-tiles // fit) if -(-panels // col_blocks) > 1 else 1))
            if row_blocks * col_blocks < min(wanted, tiles * panels) and col_blocks < panels:
                continue
            traffic = col_blocks * tiles * row_bytes + row_blocks * panels * col_bytes
            if best is None or traffic < best[0]:
                best = (traffic, -(-tiles // row_blocks), -(-panels // col_blocks))
        assert best is not None
        return best[1], best[2]

    def build(self) -> Scheduled:
        """The root kernel and what it calls."""
        p, nest = self.plan, self.nest
        body: list[Stmt] = []
        if p.pack_col:
            body += self._pack_col()
        if p.pack_row:
            body += self._pack_row()
        row_block, col_block = self._chunks()
        row_blocks, col_blocks = -(-p.row_tiles // row_block), -(-p.panels // col_block)
        chunk = var("chunk")
        where = decode(chunk, [x.extent for x in p.both] + [col_blocks, row_blocks])
        both = var("both")
        inner: list[Stmt] = [Let(both, chunk // (col_blocks * row_blocks))]
        origin: list[Expr] = [const(b) for b in nest.base]
        for k, (x, at) in enumerate(zip(p.both, where[: len(p.both)], strict=True)):
            v = var(f"b{k}")
            inner.append(Let(v, at))
            origin = [o + v * s for o, s in zip(origin, x.strides, strict=True)]
        first_panel, first_tile = var("first_panel"), var("first_tile")
        inner.append(Let(first_panel, where[-2] * col_block))
        inner.append(Let(first_tile, where[-1] * row_block))
        panel, tile = var("panel"), var("tile")
        last_panel = minimum(first_panel + col_block, const(p.panels)) if p.panels % col_block else first_panel + col_block
        last_tile = minimum(first_tile + row_block, const(p.row_tiles)) if p.row_tiles % row_block else first_tile + row_block
        # a panel
        at_panel = decode(panel, [x.extent for x in p.col_others] + [self.lane_tiles])
        in_panel: list[Stmt] = []
        for k, (x, at) in enumerate(zip(p.col_others, at_panel[:-1], strict=True)):
            v = var(f"c{k}")
            in_panel.append(Let(v, at))
            origin = [o + v * s for o, s in zip(origin, x.strides, strict=True)]
        lane_tile = var("lane_tile")
        in_panel.append(Let(lane_tile, at_panel[-1]))
        first = lane_tile * p.columns
        origin = [o + (first * s if not (nest.panel and n == B) else self._panel_offset(first)) for n, (o, s) in enumerate(zip(origin, p.lane.strides, strict=True))]
        # a row tile
        offsets, _, in_tile = self._row_origin(tile, "tile")
        origin = [o + x for o, x in zip(origin, offsets, strict=True)]
        # the reduction outside the tile
        outside: list[tuple[Expr, int, int]] = []  # variable, extent, step
        scalars: list[Expr] = []
        if p.cut >= 0:
            start_all: Expr = const(0)
            rest_all: Expr = const(0)
            for n, x in enumerate(p.reduce[: p.cut + 1]):
                v = var(f"k{n}")
                step = p.block if n == p.cut else 1
                outside.append((v, x.extent, step))
                origin[p.row] = origin[p.row] + v * x.strides[0]
                origin[p.col] = origin[p.col] + v * x.strides[1]
                start_all = start_all + v
                rest_all = rest_all + (const((x.extent - 1) // step * step) - v)
            cut_var, cut_extent, step = outside[-1]
            scalars = [minimum(const(step), const(cut_extent) - cut_var) if cut_extent % step else const(step)]
            scalars += [
                select(eq(start_all, 0), const(1), const(0)),
                select(eq(rest_all, 0), const(1), const(0)),
            ]
        cell = both * (p.panels * p.row_tiles) + panel * p.row_tiles + tile
        block = var("block")
        if p.split:
            cell = block * self.cells + cell
            scalars = [scalars[0], const(1), const(0)]
        bases: dict[int, tuple[Buffer, Expr]] = {n: (self.parameters[n], origin[n]) for n in (A, B, C)}
        k_row: Expr = const(0)
        k_col: Expr = const(0)
        for v, x in zip([o[0] for o in outside], p.reduce, strict=False):
            k_row, k_col = k_row + v * x.strides[0], k_col + v * x.strides[1]
        if self.packed_row is not None:
            bases[p.row] = (self.work, (both * p.row_tiles + tile) * self.row_size + self.packed_row.start + k_row)
        if self.packed_col is not None:
            bases[p.col] = (self.work, (both * p.panels + panel) * (self.steps * self.width) + self.packed_col.start + k_col)

        def call(u: Ukernel) -> Call:
            views: list[tuple[Buffer, Expr]] = []
            for stream, shift in u.views:
                if stream < 0:
                    views.append((self.parameters[2 - stream], const(0)))
                elif stream > C:
                    operand = next(r.operand for r in nest.reads if r.stream == stream)
                    views.append((self.parameters[3 + operand], origin[stream] + shift))
                else:
                    buffer, at = bases[stream]
                    views.append((buffer, at + shift))
            if self.partial is not None:
                views.append((self.work, cell * self.partial_size + self.partial.start))
            return Call(u.kernel.name, tuple(views), (*scalars, *(origin[s] for s in u.dims)))

        count = self.both * col_blocks * row_blocks

        def sweep(at_tile: Sequence[Stmt], kind: str) -> For:
            loops: tuple[Stmt, ...] = (For(tile, first_tile, last_tile, (*in_tile, *at_tile)),)
            loops = (For(panel, first_panel, last_panel, (*in_panel, *loops)),)
            if not p.split:
                for v, extent, step in reversed(outside):
                    loops = (For(v, const(0), const(extent), loops, step=step),)
            return For(chunk, const(0), const(count), (*inner, *loops), kind)

        if p.split:
            which = decode(block, [-(-extent // step) for _, extent, step in outside])
            lets = [Let(v, at * step) for (v, _, step), at in zip(outside, which, strict=True)]
            body.append(For(block, const(0), const(self.blocks), (*lets, sweep(self._dispatch(call), "serial")), self.kind))
            zeros = {v: const(0) for v in (*(v for v, _, _ in outside), block)}

            def finish(u: Ukernel) -> Stmt:
                whole = call(u)
                views = tuple((b, substitute(at, zeros)) for b, at in whole.views)
                return Call(whole.kernel, views, (const(0), const(0), const(1), *whole.scalars[3:]))

            add = self._add_blocks(substitute(cell, zeros))
            body.append(sweep([*add, *self._dispatch(finish)], self.kind))
            count = self.blocks
        else:
            body.append(sweep(self._dispatch(call), self.kind))
        buffers = self.parameters + ((self.work,) if self.used else ())
        note = f"{p.describe()}; {count} chunk{'s' if count > 1 else ''}{' on all threads' if self.fork else ', serial'}"
        root = Kernel(self.name, buffers, tuple(body), doc=note)
        kernels = {u.kernel.name: u.kernel for u in self.ukernels.values()}
        return Scheduled((*kernels.values(), root), self.name, self.used * self.dtype.itemsize, note, self.fork)

    def _add_blocks(self, cell: Expr) -> list[Stmt]:
        """Adds the partial sums of all blocks of the reduction, in order, to those of the first."""
        assert self.partial is not None
        i, k = var("i"), var("k")
        total = Buffer("total", self.dtype, (self.lanes,), scope="register", align=64)
        at = cell * self.partial_size + self.partial.start + i
        step = self.cells * self.partial_size

        def part(offset: Expr) -> Expr:
            return load(self.work, (offset,), self.dtype, None, self.lanes)

        so_far = load(total, (const(0),), self.dtype, None, self.lanes)
        body: tuple[Stmt, ...] = (
            Alloc(total),
            Store(total, (const(0),), part(at)),
            For(k, const(1), const(self.blocks), (Store(total, (const(0),), so_far + part(at + k * step)),)),
            Store(self.work, (at,), so_far),
        )
        return [For(i, const(0), const(self.partial_size), body, step=self.lanes)]

    def _panel_offset(self, first: Expr) -> Expr:
        """Where column `first` starts in B packed in panels."""
        n = self.nest.panel
        return first // n * (self.nest.panel_k * n) + first % n

    def _dispatch(self, call: Callable[[Ukernel], Stmt]) -> list[Stmt]:
        """The call of the microkernel of the tile's size."""
        p = self.plan
        full, rest = divmod(p.lane.extent, p.columns)
        tests: list[tuple[Expr | None, Callable[[bool], int]]] = []
        for k, (count, length, longer) in enumerate(self.row_counts):
            test = binary("lt", var(f"tile_t{k}"), longer) if 0 < longer < count else None
            sizes = (length + 1, length) if longer else (length, length)
            tests.append((test, lambda yes, s=sizes: s[0] if yes else s[1]))  # type: ignore[misc]
        both_widths = full > 0 and rest > 0
        test = binary("lt", var("lane_tile"), full) if both_widths else None
        tests.append((test, lambda yes: p.columns if (yes and full) else rest))

        def level(n: int, chosen: tuple[int, ...]) -> list[Stmt]:
            if n == len(tests):
                return [call(self._ukernel(chosen[:-1], chosen[-1]))]
            condition, size = tests[n]
            if condition is None:
                return level(n + 1, (*chosen, size(True)))
            return [If(condition, tuple(level(n + 1, (*chosen, size(True)))), tuple(level(n + 1, (*chosen, size(False)))))]

        return level(0, ())


