"""From a plan to kernels: packing, the loops over chunks, panels and tiles, and the calls of the microkernels.

    root(A, B, C, epilogue operands..., workspace):
      parallel over panels:      copy the column operand into panels          (if it is packed here)
      parallel over row tiles:   copy the row operand tile by tile            (if it is packed)
      parallel over shares:      of chunks, each a block of panels x a block of row tiles
        for blocks of the reduction, panels, row tiles:   microkernel

A chunk's result does not depend on who computes it, and a cell's sum is added in an order that the plan fixes, so that
results are the same to the bit for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...ir.dtypes import DType
from ...ir.expr import Expr, binary, const, eq, load, minimum, select, substitute, var
from ...ir.target import Target
from ..loop_ir import Alloc, Buffer, Call, For, If, Kernel, Let, Stmt, Store
from .canonical import A, B, C, Loop, Nest
from .layout import Layout, decode
from .microkernel import Tile, Ukernel, build
from .packing import pack_columns, pack_rows
from .plan import CHUNKS, Plan
from .types import Operand, Scheduled

FEW_ROW_TILES = 16  # of a chunk, up to which its panels are prefetched
TWICE = 2  # times that each line of the next panel is asked for: measured 2 to 6% faster where weights come from memory
STREAM_AHEAD = 16 << 10  # bytes that the only tile of a panel asks ahead of itself
FEW_ROWS = 4  # of the only tile of a panel, up to which memory is all it waits for
PAGE = 4096
PAGES_AHEAD = 64 * PAGE  # bytes that such a tile asks for pages ahead of itself
PAGE_STEPS = 128  # multiply-adds in an iteration that has a page's steps
SHARES = 128  # that all chunks together are cut into, about, so that threads end together
LEAST_SHARE = 20_000  # modelled cycles of a share at least: about 5 microseconds
PANEL = "panel"  # the variable of the loop over panels


class Root:
    """Builds the root kernel of a plan and its microkernels."""

    def __init__(
        self, nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand], target: Target, name: str, dtype: DType, plan: Plan
    ) -> None:
        self.nest, self.plan, self.target, self.name, self.dtype = nest, plan, target, name, dtype
        self.abc = abc
        self.at = Layout(nest, abc, extra, target, dtype, plan)
        self.ukernels: dict[tuple[tuple[int, ...], int, int], Ukernel] = {}
        self.row_block, self.col_block = self._chunks()
        self.share = self._share()
        self.line = target.line // dtype.itemsize
        self.ahead = self._ahead()
        self.page = PAGE // dtype.itemsize if self.ahead and self.row_block == 1 and plan.tile_rows <= FEW_ROWS else 0

    def _ukernel(self, sizes: tuple[int, ...], columns: int, block: int) -> Ukernel:
        found = self.ukernels.get((sizes, columns, block))
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
            loops = [Loop(block, p.reduce[p.cut].strides), *p.reduce[p.cut + 1 :]]
        found = build(
            nest,
            Tile(
                row=p.row,
                col=p.col,
                rows=tuple(rows),
                columns=columns,
                step=tuple(step),
                groups=p.groups,
                apart=nest.group.strides if nest.group is not None else (0,) * len(nest.base),
                lanes=self.at.lanes,
                along_k=p.along_k,
                loops=tuple(loops),
                variable=p.split,
                partial=p.cut >= 0,
                parts=p.parts,
                unroll=self._unroll(),
                fused=self.target.fma,
                padded=p.pack_col or nest.panel > 0,
                ahead=self.ahead,
                line=self.line,
                page=self.page,
                dtype=self.dtype,
                row_dtype=self.dtype if p.pack_row else self.at.parameters[p.row].dtype,
                col_dtype=self.dtype if p.pack_col else self.at.parameters[p.col].dtype,
                reach=sum(x.strides[p.row] * (x.extent - 1) for x in p.row_source) if p.scattered else -1,
                pairs=nest.pairs is not None,
                factors=nest.factors if p.row == A or nest.ways != 4 else nest.factors[2:] + nest.factors[:2],
                aligns=(
                    self.dtype.itemsize if p.pack_row else self.abc[p.row].dtype.itemsize,
                    self.dtype.itemsize if p.pack_col else self.abc[p.col].dtype.itemsize,
                ),
            ),
        )
        self.ukernels[sizes, columns, block] = found
        return found

    # -- the loops ----------------------------------------------------------------------------------------------------

    def _chunks(self) -> tuple[int, int]:
        """Blocks of row tiles and of panels that a chunk is made of: as little traffic as possible for enough chunks."""
        p = self.plan
        tiles, panels = p.row_tiles, p.panels
        size = self.dtype.itemsize
        row_bytes = p.tile_rows * self.at.steps * size * self._distance(tiles * p.tile_rows)
        col_bytes = p.breadth * self.at.steps * size * self._distance(panels * p.breadth)
        inside = self.at.steps if p.cut < 0 else p.block * math.prod(x.extent for x in p.reduce[p.cut + 1 :])
        fit = max(1, int(self.target.l2 * 0.5 / max(1, p.tile_rows * inside * size)))
        wanted = max(1, -(-CHUNKS // self.at.both)) if self.plan.parallel else 1
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

    def _share(self) -> int:
        """Row tiles of a chunk that a thread takes at a time, to wait little for the others' last.

        A chunk's shares follow each other as its tiles do, so that caches notice nothing. Chunks of several panels stay whole;
        so do those of a cut reduction, whose panel would come from beyond L2 once for every share.
        """
        p, rows = self.plan, self.row_block
        if not p.parallel or p.cut >= 0 or self.col_block > 1:
            return rows
        chunks = self.at.both * p.panels * -(-p.row_tiles // rows)
        wanted = min(-(-SHARES // chunks), int(p.cycles / chunks / LEAST_SHARE))
        return -(-rows // max(1, min(rows, wanted)))

    def _distance(self, vectors: int) -> float:
        """What it costs to read an operand of so many rows or columns again: less if L2 holds most of it."""
        return 0.25 if vectors * self.at.steps * self.dtype.itemsize <= self.target.l2 else 1.0

    def _ahead(self) -> int:
        """Lines of the panel to come that an iteration of the innermost loop asks for, so that a chunk's tiles share its reading.

        A panel that comes from beyond L2 is otherwise waited for by the first tile alone. With many tiles that is nothing;
        a single tile asks for its own panel a little ahead. With so few rows that memory is all it waits for, it asks for one
        line of each page, early: the hardware, which fetches the lines, does not look for the addresses of pages to come.
        """
        p, size = self.plan, self.dtype.itemsize
        streamed = self.at.both * p.panels * p.breadth * self.at.steps * size > self.target.l2
        whole = p.pack_col or self.nest.panel == p.breadth
        few = self.row_block <= FEW_ROW_TILES
        if not (streamed and whole and p.reduce and few) or p.split or p.along_k:
            return 0
        times = TWICE if self.row_block > 1 else 1
        return -(-times * p.unroll * self.at.width * size // (self.target.line * self.row_block))

    def _unroll(self) -> int:
        """Steps of an iteration: a page's, where one line of each is asked for."""
        p = self.plan
        steps = self.page // self.at.width
        return steps if p.unroll < steps <= PAGE_STEPS // (p.tile_rows * p.vectors) else p.unroll

    def build(self) -> Scheduled:
        """The root kernel and what it calls."""
        p, nest = self.plan, self.nest
        body: list[Stmt] = []
        if p.pack_col:
            body.append(pack_columns(self.at))
        if p.pack_row:
            body.append(pack_rows(self.at))
        row_block, col_block = self.row_block, self.col_block
        row_blocks, col_blocks = -(-p.row_tiles // row_block), -(-p.panels // col_block)
        shares = -(-row_block // self.share)
        chunk = var("chunk")
        *where, share = decode(chunk, [x.extent for x in p.both] + [col_blocks, row_blocks, shares])
        both = var("both")
        inner: list[Stmt] = [Let(both, chunk // (col_blocks * row_blocks * shares))]
        origin: list[Expr] = [const(b) for b in nest.base]
        for k, (x, at) in enumerate(zip(p.both, where[: len(p.both)], strict=True)):
            v = var(f"b{k}")
            inner.append(Let(v, at))
            origin = [o + v * s for o, s in zip(origin, x.strides, strict=True)]
        first_panel, first_tile = var("first_panel"), var("first_tile")
        inner.append(Let(first_panel, where[-2] * col_block))
        inner.append(Let(first_tile, where[-1] * row_block))
        panel, tile = var(PANEL), var("tile")
        last_panel = minimum(first_panel + col_block, const(p.panels)) if p.panels % col_block else first_panel + col_block
        last_tile = minimum(first_tile + row_block, const(p.row_tiles)) if p.row_tiles % row_block else first_tile + row_block
        tiles = (first_tile, last_tile)
        if shares > 1:
            start = first_tile + share * self.share
            tiles = (start, minimum(start + self.share, last_tile))
        # a panel
        at_panel = decode(panel, [x.extent for x in p.col_others] + [self.at.lane_tiles])
        in_panel: list[Stmt] = []
        for k, (x, at) in enumerate(zip(p.col_others, at_panel[:-1], strict=True)):
            v = var(f"c{k}")
            in_panel.append(Let(v, at))
            origin = [o + v * s for o, s in zip(origin, x.strides, strict=True)]
        lane_tile = var("lane_tile")
        in_panel.append(Let(lane_tile, at_panel[-1]))
        first = lane_tile * p.columns
        origin = [
            o + (first * s if not (nest.panel and n == B) else self.at.panel_offset(first))
            for n, (o, s) in enumerate(zip(origin, p.lane.strides, strict=True))
        ]
        # a row tile
        offsets, _, in_tile = self.at.row_origin(tile, "tile")
        origin = [o + x for o, x in zip(origin, offsets, strict=True)]
        # the reduction outside the tile
        outside: list[tuple[Expr, int, int]] = []  # variable, extent, step
        flags: list[Expr] = []  # first block, last block
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
            flags = [select(eq(start_all, 0), const(1), const(0)), select(eq(rest_all, 0), const(1), const(0))]
        cell = both * (p.panels * p.row_tiles) + panel * p.row_tiles + tile
        block = var("block")
        if p.split:
            cell = block * self.at.cells + cell
            flags = [const(1), const(0)]
        bases: dict[int, tuple[Buffer, Expr]] = {n: (self.at.parameters[n], origin[n]) for n in (A, B, C)}
        k_row: Expr = const(0)
        k_col: Expr = const(0)
        for v, x in zip([o[0] for o in outside], p.reduce, strict=False):
            k_row, k_col = k_row + v * x.strides[0], k_col + v * x.strides[1]
        if self.at.packed_row is not None:
            bases[p.row] = (self.at.work, (both * p.row_tiles + tile) * self.at.row_size + self.at.packed_row.start + k_row)
        if self.at.packed_col is not None:
            bases[p.col] = (
                self.at.work,
                (both * p.panels + panel) * (self.at.steps * self.at.width) + self.at.packed_col.start + k_col,
            )

        if self.ahead:
            buffer, at_column = bases[p.col]
            panel_size = p.inside * self.at.width
            share = (tile - first_tile) * (p.inside // p.unroll * self.ahead * self.line) % panel_size
            again = binary("lt", where[-1] + 1, row_blocks) if row_blocks > 1 else None
            to_come = self._to_come(panel, first_panel, last_panel, again)
            ahead = (buffer, minimum(at_column + to_come + share, const(buffer.span - 1)))

        further = {s: 3 + len(nest.read_spans) + k for k, (s, _) in enumerate(nest.more)}

        def call(u: Ukernel, steps: int, rows: int) -> Call:
            views: list[tuple[Buffer, Expr]] = []
            for stream, shift in u.views:
                if stream < 0:
                    views.append((self.at.parameters[2 - stream], const(0)))
                elif stream in further:
                    views.append((self.at.parameters[further[stream]], origin[stream] + shift))
                elif stream > C:
                    operand = next(r.operand for r in nest.reads if r.stream == stream)
                    views.append((self.at.parameters[3 + operand], origin[stream] + shift))
                else:
                    buffer, at = bases[stream]
                    views.append((buffer, at + shift))
            if self.ahead:
                views.append(ahead)
            if self.at.partial is not None:
                views.append((self.at.work, cell * self.at.partial_size + self.at.partial.start))
            counts = [const(steps)] if p.split else []
            places = self._places(rows) if p.scattered else ()
            return Call(u.kernel.name, tuple(views), (*counts, *flags, *(origin[s] for s in u.dims), *places))

        count = self.at.both * col_blocks * row_blocks * shares

        def sweep(at_tile: Sequence[Stmt], kind: str) -> For:
            loops: tuple[Stmt, ...] = (For(tile, *tiles, (*in_tile, *at_tile)),)
            loops = (For(panel, first_panel, last_panel, (*in_panel, *loops)),)
            if not p.split and not p.together:
                loops = blocks(loops)
            return For(chunk, const(0), const(count), (*inner, *loops), kind)

        def blocks(body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
            for v, extent, step in reversed(outside):
                body = (For(v, const(0), const(extent), body, step=step),)
            return body

        if p.split:
            which = decode(block, [-(-extent // step) for _, extent, step in outside])
            lets = [Let(v, at * step) for (v, _, step), at in zip(outside, which, strict=True)]
            body.append(For(block, const(0), const(self.at.blocks), (*lets, sweep(self._dispatch(call), "serial")), self.at.kind))
            zeros = {v: const(0) for v in (*(v for v, _, _ in outside), block)}

            def finish(u: Ukernel, _steps: int, rows: int) -> Stmt:
                whole = call(u, 0, rows)
                views = tuple((b, substitute(at, zeros)) for b, at in whole.views)
                return Call(whole.kernel, views, (const(0), const(0), const(1), *whole.scalars[3:]))

            add = self._add_blocks(substitute(cell, zeros))
            body.append(sweep([*add, *self._dispatch(finish, ends=False)], self.at.kind))
            count = self.at.blocks
        else:
            chunks = sweep(self._dispatch(call), self.at.kind)
            body += blocks((chunks,)) if p.together else [chunks]
        buffers = self.at.parameters + ((self.at.work,) if self.at.size else ())
        note = f"{p.describe()}; {count} chunk{'s' if count > 1 else ''}{' on all threads' if self.plan.parallel else ', serial'}"
        root = Kernel(self.name, buffers, tuple(body), doc=note)
        kernels = {u.kernel.name: u.kernel for u in self.ukernels.values()}
        size = self.at.size * self.dtype.itemsize
        return Scheduled((*kernels.values(), root), self.name, size, note, self.plan.parallel, nest.in_place)

    def _to_come(self, panel: Expr, first: Expr, last: Expr, again: Expr | None) -> Expr:
        """From a panel to the one that is read next: its neighbour; after the last one, in a cut reduction, the next block,
        or where other rows follow (`again`) the first one. Only a guess at the end of a chunk."""
        step = self.at.steps * self.at.width
        if self.page:
            return const(PAGES_AHEAD // self.dtype.itemsize)
        if self.row_block == 1:
            return const(min(step, STREAM_AHEAD // self.dtype.itemsize))
        back = (first - panel) * step
        if self.plan.cut >= 0:
            after: Expr = back + self.plan.inside * self.at.width
        else:
            after = const(step) if again is None else select(again, back, const(step))
        return select(binary("lt", panel + 1, last), const(step), after)

    def _add_blocks(self, cell: Expr) -> list[Stmt]:
        """Adds the partial sums of all blocks of the reduction, in order, to those of the first."""
        assert self.at.partial is not None
        i, k = var("i"), var("k")
        total = Buffer("total", self.dtype, (self.at.lanes,), scope="register", align=64)
        at = cell * self.at.partial_size + self.at.partial.start + i
        step = self.at.cells * self.at.partial_size

        def part(offset: Expr) -> Expr:
            return load(self.at.work, (offset,), self.dtype, None, self.at.lanes)

        so_far = load(total, (const(0),), self.dtype, None, self.at.lanes)
        body: tuple[Stmt, ...] = (
            Alloc(total),
            Store(total, (const(0),), part(at)),
            For(k, const(1), const(self.at.blocks), (Store(total, (const(0),), so_far + part(at + k * step)),)),
            Store(self.at.work, (at,), so_far),
        )
        return [For(i, const(0), const(self.plan.tile_rows * self.at.width), body, step=self.at.lanes)]

    def _places(self, rows: int) -> tuple[Expr, ...]:
        """The offset in the row operand of each row of a tile."""
        source, stream = self.plan.row_source, self.plan.row
        found: list[Expr] = []
        for i in range(rows):
            at: Expr = const(0)
            for x, n in zip(source, decode(var("tile_i0") + i, [x.extent for x in source]), strict=True):
                at = at + n * x.strides[stream]
            found.append(at)
        return tuple(found)

    def _dispatch(self, call: Callable[[Ukernel, int, int], Stmt], ends: bool = True) -> list[Stmt]:
        """The call of the microkernel of the tile's size. `ends`: the last block of a cut reduction may be a shorter one."""
        p = self.plan
        choices: list[tuple[Expr | None, int, int]] = []  # condition, value if true (or always), value if false
        for k, (count, length, longer) in enumerate(self.at.row_counts):
            test = binary("lt", var(f"tile_t{k}"), longer) if 0 < longer < count else None
            choices.append((test, length + (longer > 0), length))
        full, rest = divmod(p.lane.extent, p.columns)
        choices.append((binary("lt", var("lane_tile"), full) if full and rest else None, p.columns if full else rest, rest))
        block = short = 0
        if p.cut >= 0:
            block, short = p.block, p.reduce[p.cut].extent % p.block if ends else 0
        test = binary("le", var(f"k{p.cut}") + block, p.reduce[p.cut].extent) if short else None
        choices.append((test, block, short))

        def level(chosen: tuple[int, ...]) -> list[Stmt]:
            if len(chosen) == len(choices):
                *sizes, columns, steps = chosen
                return [call(self._ukernel(tuple(sizes), columns, steps), steps, math.prod(sizes))]
            condition, yes, no = choices[len(chosen)]
            if condition is None:
                return level((*chosen, yes))
            return [If(condition, tuple(level((*chosen, yes))), tuple(level((*chosen, no))))]

        return level(())
