"""Which register tile, which operand to pack, where to cut the reduction: the cheapest plan of a cost model.

The model counts cycles of one core. A step of a tile with r rows and v vectors costs the longest of: its multiply-adds,
its loads, its instructions, and the latency of a chain of additions; a column panel that does not stay in L1 or rows
that fall on each other in L1's sets cost more. To that come a tile's prologue and epilogue and the copies of packing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...ir.dtypes import DType, bf16, f16, f32
from ...ir.errors import CompileError
from ...ir.target import Target
from .canonical import A, B, C, Loop, Nest, merge

LATENCY: Final = 4.0  # cycles from one multiply-add to the next on the same accumulator
PARALLEL_FROM: Final = 150_000  # modelled cycles from which threads are worth waking: about 50 microseconds
FEW_TILES: Final = 8  # fewer tiles of C than this cannot feed the threads: the reduction is split instead
SPLIT: Final = 16  # parts of a split reduction, whatever the number of threads
CALL: Final = 24.0  # cycles to enter and leave a tile
SLICE: Final = 0.4  # share of L2 that a tile's slice of both operands may take
L2_BYTES: Final = 12.0  # bytes a cycle that a column panel streams at from L2 without being felt
UNROLLED: Final = 48  # multiply-adds in one iteration of the innermost loop, about


@dataclass(frozen=True)
class Plan:
    """How a contraction is computed.

    row, col      streams of the operand that is read per row and of the one that is read per column (A = 0, B = 1)
    along_k       lanes run along the innermost reduction loop, not along the columns
    lane          the C loop that columns run along; panels of `columns` of it
    rows          the C loops (outer, inner; or fewer) that rows run along, and how many of each make a tile
    row_others, col_others, both     the other C loops: those that move only the row operand, only the column operand, both
    reduce        reduction loops in order, strides (row operand, column operand) as the tile sees them
    reduce_from   the same loops as they lie in memory before packing, in the order of the packed copy
    pack_row      '' or 'k' (packed with the reduction contiguous) or 'm' (rows contiguous);  pack_col: packed in panels
    pitch         elements from one row (of 'k') or one step (of 'm') to the next in the packed rows
    split         the blocks of the cut reduction are computed apart, in parallel, and added in order
    cut, block    reduction loops before `cut` run outside the tiles, loop `cut` in blocks of `block`; cut < 0: not cut
    """

    row: int
    col: int
    along_k: bool
    lane: Loop
    columns: int
    rows: tuple[tuple[Loop, int], ...]
    row_others: tuple[Loop, ...]
    col_others: tuple[Loop, ...]
    both: tuple[Loop, ...]
    reduce: tuple[Loop, ...]
    reduce_from: tuple[Loop, ...]
    pack_row: str
    pitch: int
    pack_col: bool
    cut: int
    block: int
    split: bool
    parts: int
    unroll: int
    cycles: float
    ideal: float
    strained: bool  # the row operand is read in a way that packing might mend
    memory: float  # cycles to fetch the operands once from beyond L2
    why: str

    @property
    def parallel(self) -> bool:
        """Whether the work is worth waking threads for."""
        return max(self.cycles, self.memory) >= PARALLEL_FROM

    @property
    def row_tiles(self) -> int:
        """Tiles along all loops of the row operand."""
        return math.prod(x.extent for x in self.row_others) * math.prod(-(-x.extent // n) for x, n in self.rows)

    @property
    def panels(self) -> int:
        """Panels along all loops of the column operand."""
        return math.prod(x.extent for x in self.col_others) * -(-self.lane.extent // self.columns)

    @property
    def tile_rows(self) -> int:
        """Rows of the largest tile."""
        return math.prod(n for _, n in self.rows)

    def describe(self) -> str:
        """One line: what was chosen and what the model expects."""
        names = "AB"
        sides = " x ".join(str(n) for _, n in self.rows) or "1"
        lanes = "the reduction" if self.along_k else f"columns ({names[self.col]})"
        text = f"tile {sides} rows x {self.columns} columns, lanes along {lanes}"
        if self.pack_row:
            text += f", {names[self.row]} packed by {'steps' if self.pack_row == 'k' else 'rows'}"
        if self.pack_col:
            text += f", {names[self.col]} packed in panels"
        if self.cut >= 0:
            inside = self.block * math.prod(x.extent for x in self.reduce[self.cut + 1 :])
            text += f", reduction {'split' if self.split else 'cut'} in blocks of {inside}"
        return f"{text}; model: {100 * self.ideal / self.cycles:.0f}% of peak{'; ' + self.why if self.why else ''}"


def accumulator(dtype: DType) -> DType:
    """What sums of products of a dtype are held in. Raises CompileError for what cannot be multiplied."""
    if dtype in (f16, bf16):
        return f32
    if dtype.name in ("f32", "f64", "i32", "i64", "u32", "u64"):
        return dtype
    raise CompileError(f"a contraction of {dtype} is not supported; expected f32, f64, f16, bf16, i32, i64, u32 or u64")


def pieces(extent: int, size: int) -> tuple[int, int, int]:
    """(count, length, longer): `extent` in `count` pieces as equal as can be, the first `longer` of them one longer."""
    count = -(-extent // size)
    return count, extent // count, extent % count


@dataclass(frozen=True)
class _Side:
    """One way to give roles to the loops."""

    row: int
    col: int
    along_k: bool
    lane: Loop
    rows: tuple[Loop, ...]
    cols: tuple[Loop, ...]
    both: tuple[Loop, ...]


class Model:
    """Costs on one target for one element size."""

    def __init__(self, target: Target, dtype: DType) -> None:
        self.target = target
        self.size = dtype.itemsize
        self.lanes = target.lanes(dtype.bits)
        self.wide = target.vector_bits >= 512
        self.rate = 1.0 if self.wide else 2.0  # multiply-adds per cycle
        self.spare = 1 if target.fma else 2  # registers besides accumulators and columns
        self.sets = target.l1 // (target.line * target.l1_ways)

    def most_rows(self, vectors: int, along_k: bool) -> int:
        """Rows that registers hold beside `vectors` columns."""
        spare = self.spare
        if vectors == 1 and self.wide and not along_k:
            return self.target.registers - 2  # broadcasts are memory operands
        return (self.target.registers - vectors - spare) // vectors

    def step(self, rows: int, vectors: int, parts: int, row_vectors: int) -> float:
        """Cycles of one step of a tile whose operands are in L1; row_vectors: vector loads per row (0: one broadcast)."""
        fmas = rows * vectors / self.rate
        vector_loads = vectors + rows * row_vectors
        loads = vector_loads / (1.0 if self.wide else 2.0) + (0.0 if row_vectors else rows / 2.0)
        instructions = (rows * vectors * (1 if self.target.fma else 2) + rows + vectors + 2) / 5.0
        chain = LATENCY / parts
        return max(fmas, loads, instructions, chain)

    def conflicts(self, offsets: Sequence[int]) -> int:
        """The most rows whose lines fall in one set of L1."""
        counts: dict[int, int] = {}
        for line in {o * self.size // self.target.line for o in offsets}:
            counts[line % self.sets] = counts.get(line % self.sets, 0) + 1
        return max(counts.values(), default=0)


def _sides(nest: Nest) -> Iterator[_Side]:
    """Every sensible assignment of roles."""
    unit = Loop(1, (0,) * len(nest.base))
    free = nest.free

    def split(row: int, col: int, rest: Sequence[Loop]) -> tuple[tuple[Loop, ...], tuple[Loop, ...], tuple[Loop, ...]]:
        rows = tuple(x for x in rest if x.strides[col] == 0)
        cols = tuple(x for x in rest if x.strides[row] == 0 and x.strides[col] != 0)
        both = tuple(x for x in rest if x.strides[row] != 0 and x.strides[col] != 0)
        return rows, cols, both

    if nest.panel:
        columns = [x for x in free if x.strides[A] == 0 and x.strides[B] != 0]
        if len(columns) > 1:
            raise CompileError(
                "B is packed in panels over several column axes that do not follow each other in C: leave it unpacked"
            )
        lane = columns[0] if columns else unit
        yield _Side(A, B, False, lane, *split(A, B, [x for x in free if x is not lane]))
        return
    for row, col in ((A, B), (B, A)):
        own = [x for x in free if x.strides[row] == 0 and x.strides[col] != 0]
        best = min((abs(x.strides[C]) for x in own), default=0)
        near = min((abs(x.strides[col]) for x in own), default=0)
        for lane in own:
            # lanes where C or the operand is contiguous; others only if nothing is
            if abs(lane.strides[C]) == best or abs(lane.strides[col]) == near:
                yield _Side(row, col, False, lane, *split(row, col, [x for x in free if x is not lane]))
    for row, col in ((A, B), (B, A)):
        for lane in free:
            # both operands are vectors: channels of a depthwise convolution; the column operand may be packed
            if lane.strides[row] == 1 and lane.strides[col] != 0 and lane.strides[C] == 1:
                yield _Side(row, col, False, lane, *split(row, col, [x for x in free if x is not lane]))
    for row, col in ((A, B), (B, A)):
        if any(x.strides[col] == 1 for x in nest.reduce):
            own = [x for x in free if x.strides[row] == 0 and x.strides[col] != 0]
            lane = min(own, key=lambda x: (abs(x.strides[C]), -x.extent)) if own else unit
            yield _Side(row, col, True, lane, *split(row, col, [x for x in free if x is not lane]))
    if not any((x.strides[A] == 0) != (x.strides[B] == 0) for x in free):
        yield _Side(A, B, False, unit, *split(A, B, free))


def _row_choices(rows: Sequence[Loop], most: int) -> Iterator[tuple[tuple[Loop, int], ...]]:
    """Tiles over one or two of the row loops, at most `most` rows, as even as can be."""
    if not rows or most < 1:
        yield ()
        return
    seen: set[tuple[tuple[Loop, int], ...]] = set()
    for inner in rows:
        top = min(most, inner.extent)
        even = {-(-inner.extent // -(-inner.extent // t)) for t in range(top, max(0, top // 2 - 1), -1)} - {0}
        # the largest few, and those that leave no remainder
        sizes = sorted(even, reverse=True)
        for size in sorted({*sizes[:2], *[x for x in sizes if inner.extent % x == 0][:2]}, reverse=True):
            choice: tuple[tuple[Loop, int], ...] = ((inner, size),)
            if choice not in seen:
                seen.add(choice)
                yield choice
        if inner.extent * 2 <= most:
            for outer in rows:
                if outer is inner:
                    continue
                top = min(most // inner.extent, outer.extent)
                for size in {-(-outer.extent // -(-outer.extent // t)) for t in range(top, max(0, top // 2), -1)}:
                    if size > 1:
                        choice = ((outer, size), (inner, inner.extent))
                        if choice not in seen:
                            seen.add(choice)
                            yield choice


def _pair(loops: Sequence[Loop], row: int, col: int) -> tuple[Loop, ...]:
    return tuple(Loop(x.extent, (x.strides[row], x.strides[col])) for x in loops)


def _order(loops: Sequence[Loop], along_k: bool) -> tuple[Loop, ...]:
    """Outer to inner: the row operand's larger strides outside; lanes along the reduction: the column operand's."""
    first = 1 if along_k else 0
    return tuple(sorted(loops, key=lambda x: (abs(x.strides[first]), abs(x.strides[1 - first])), reverse=True))


def _cut(loops: Sequence[Loop], limit: int) -> tuple[int, int]:
    """(level, block) such that what runs inside the tile has at most about `limit` steps; (-1, 0) if all of it fits."""
    inside = 1
    for level in range(len(loops) - 1, -1, -1):
        extent = loops[level].extent
        if inside * extent > limit:
            block = max(1, limit // inside)
            if level == 0 and inside * extent <= limit * 1.3:
                return -1, 0
            if block == 1 and level + 1 < len(loops) and inside > 1:
                return (level, 1)
            return level, -(-extent // -(-extent // block))
        inside *= extent
    return -1, 0


def plans(nest: Nest, target: Target, row_dtype: DType, col_dtype: DType) -> Iterator[Plan]:
    """Every plan the model considers. `row_dtype`, `col_dtype` here are those of A and B."""
    dtype = accumulator(nest.dtype)
    model = Model(target, dtype)
    widen = {A: row_dtype is not dtype, B: col_dtype is not dtype}
    total = nest.steps
    for side in _sides(nest):
        loops = _order(_pair(nest.reduce, side.row, side.col), side.along_k)
        lane_stride = side.lane.strides[side.col]
        if side.along_k:
            # the column operand as it lies; the row operand, if its steps do not lie side by side, packed
            if widen[side.col] or not loops or loops[-1].strides[1] != 1:
                continue
            form = "" if loops[-1].strides[0] == 1 and not widen[side.row] else "k"
            for columns in sorted({min(n, side.lane.extent) for n in (1, 2, 3, 4, 6)}):
                for rows in _row_choices(side.rows, model.most_rows(columns, True)):
                    yield _plan(nest, model, side, loops, rows, columns, form, False, total)
            continue
        if nest.panel:
            counts = [n for n in range(1, 9) if n * model.lanes <= nest.panel and nest.panel % (n * model.lanes) == 0]
            if not counts:
                raise CompileError(f"B is packed in panels of {nest.panel}, which vectors of {model.lanes} do not divide")
        else:
            need = -(-side.lane.extent // model.lanes)
            few_rows = math.prod(x.extent for x in side.rows) <= 4
            counts = sorted({-(-need // -(-need // n)) for n in range(1, min(8 if few_rows else 4, need) + 1)})
        direct_ok = lane_stride >= 0 and (lane_stride <= 1 or side.lane.extent == 1)
        col_options = [False] if nest.panel else [False, True]
        if widen[side.col]:
            col_options = [True]
        both_vectors = side.lane.strides[side.row] != 0
        for vectors in counts:
            for rows in _row_choices(side.rows, model.most_rows(vectors, False)):
                for pack_col in col_options:
                    if not pack_col and not nest.panel and not direct_ok:
                        continue
                    direct = None
                    if not widen[side.row]:
                        direct = _plan(nest, model, side, loops, rows, vectors * model.lanes, "", pack_col, total)
                        yield direct
                    if both_vectors or (direct is not None and not direct.strained):
                        continue
                    by_steps = bool(loops) and loops[-1].strides[0] == 1
                    by_rows = bool(rows) and rows[-1][0].strides[side.row] == 1
                    for form in ("k",) if by_steps or not rows else ("m",) if by_rows else ("k", "m"):
                        yield _plan(nest, model, side, loops, rows, vectors * model.lanes, form, pack_col, total)


def _row_offsets(rows: Sequence[tuple[Loop, int]], stream: int) -> list[int]:
    offsets = [0]
    for x, n in rows:
        offsets = [o + i * x.strides[stream] for o in offsets for i in range(n)]
    return offsets


def _footprint(reduce: Sequence[Loop], rows: Sequence[tuple[Loop, int]], row: int, packed: str, inside: int) -> int:
    """Elements of the row operand that a tile reads, overlaps counted once where a loop's stride tells."""
    tile_rows = math.prod(n for _, n in rows)
    total = tile_rows * inside
    if packed or not reduce or not rows:
        return total
    reach = 1 + sum(abs(x.strides[0]) * (x.extent - 1) for x in reduce[-1:]) + sum(abs(x.strides[row]) * (n - 1) for x, n in rows)
    return min(total, reach * max(1, inside // reduce[-1].extent))


def _plan(
    nest: Nest,
    model: Model,
    side: _Side,
    loops: tuple[Loop, ...],
    rows: tuple[tuple[Loop, int], ...],
    columns: int,
    pack_row: str,
    pack_col: bool,
    steps: int,
) -> Plan:
    lanes, size, target = model.lanes, model.size, model.target
    chosen = [x for x, _ in rows]
    row_others = tuple(x for x in side.rows if not any(x is y for y in chosen))
    tile_rows = math.prod(n for _, n in rows)
    why: list[str] = []
    # the reduction as the tile sees it
    source = loops
    row_k, col_k = [x.strides[0] for x in loops], [x.strides[1] for x in loops]
    pitch = 0
    if pack_col:
        inner = columns
        for i in range(len(loops) - 1, -1, -1):
            col_k[i] = inner
            inner *= loops[i].extent
    if pack_row:
        # rows whose pitch is a multiple of L1's set span would evict each other
        pitch = steps + 16 * (steps * size % 2048 == 0) if pack_row == "k" else tile_rows
        inner = 1 if pack_row == "k" else tile_rows
        for i in range(len(loops) - 1, -1, -1):
            row_k[i] = inner
            inner *= loops[i].extent
    seen = tuple(Loop(x.extent, (r, c)) for x, r, c in zip(loops, row_k, col_k, strict=True))
    reduce = _order(merge(seen), side.along_k) if not (pack_row or pack_col) else merge(seen)
    # where to cut it
    unit_k = any(x.strides[0] in (1, -1) for x in reduce[-1:])
    reused = any(x.extent > 1 for x in row_others) or any(x.extent > n for x, n in rows)
    split = False
    tiles = math.prod(x.extent for x in (*row_others, *side.cols, *side.both)) * -(-side.lane.extent // columns)
    tiles *= math.prod(-(-x.extent // n) for x, n in rows)
    if tiles < FEW_TILES and not side.along_k and nest.cells * steps / lanes / model.rate >= PARALLEL_FROM and steps >= 2 * SPLIT:
        cut, block = _cut(reduce, -(-steps // SPLIT))
        split = cut >= 0
    elif side.along_k or not reused:
        cut, block = -1, 0
    else:
        per_row = (
            size
            if unit_k
            else size
            if pack_row
            else min(target.line, max([size, *(abs(x.strides[0]) * size for x in reduce[-1:])]))
        )
        contiguous_rows = bool(rows) and rows[-1][0].strides[side.row] == 1
        row_bytes = max(tile_rows * size, target.line) if contiguous_rows and not pack_row else tile_rows * per_row
        per_step = columns * size + row_bytes
        cut, block = _cut(reduce, int(target.l2 * SLICE / per_step))
    inside = steps
    if cut >= 0:
        inside = block * math.prod(x.extent for x in reduce[cut + 1 :])
    # cost
    lane = side.lane
    both = math.prod(x.extent for x in side.both)
    col_tiles = math.prod(x.extent for x in side.cols)
    row_vectors_per = 1 if side.along_k else 0
    vectors_full = columns if side.along_k else columns // lanes
    full, rest = divmod(lane.extent, columns)
    col_variants = [(full, vectors_full, columns)] if full else []
    if rest:
        col_variants.append((1, rest if side.along_k else -(-rest // lanes), rest))
    row_variants: list[tuple[int, int]] = [(math.prod(x.extent for x in row_others), 1)]
    for x, n in rows:
        count, length, longer = pieces(x.extent, n)
        parts_of = [(longer, length + 1), (count - longer, length)]
        row_variants = [(a * p, b * q) for a, b in row_variants for p, q in parts_of if p]
    multiply_adds = tile_rows * vectors_full
    parts = 1
    room = target.registers - vectors_full - model.spare
    while multiply_adds * parts < LATENCY * model.rate and parts < 8 and multiply_adds * parts * 2 <= room:
        parts *= 2
    inner_extent = reduce[-1].extent if reduce else 1
    k_steps = inside // inner_extent * -(-inner_extent // lanes) if side.along_k else inside
    if side.along_k:
        unroll = 1
    else:
        unroll = max(parts, min(8, UNROLLED // max(1, multiply_adds), inner_extent))
        if inner_extent <= 4 and inner_extent * multiply_adds <= 4 * UNROLLED:
            unroll = max(unroll, inner_extent)
        unroll = max(1, min(unroll, inner_extent))
        if unroll < parts:
            parts = 1 << (unroll.bit_length() - 1)
    # a column slice that leaves L1 between two row tiles comes from L2: its lines cost more the fewer adds hide them
    slice_bytes = inside * columns * size
    many_rows = sum(c for c, _ in row_variants) > 1
    penalty = 0.0
    base_step = model.step(tile_rows, vectors_full, parts, 0)
    if slice_bytes > 0.5 * target.l1 and many_rows and not side.along_k:
        penalty = max(0.0, columns * size / L2_BYTES - base_step)
        if penalty > 0.05 * base_step:
            why.append("column panel beyond L1")
    if not side.along_k and _footprint(reduce, rows, side.row, pack_row, inside) * size > 0.5 * target.l1:
        penalty += 0.5 * max(0, tile_rows - 12)  # more streams than are prefetched
    if side.along_k and (tile_rows + columns) * inside * size > 0.5 * target.l1:
        # nothing is reused from registers but rows x columns: the vectors themselves come from L2
        moved = tile_rows + (columns if columns * inside * size > 0.5 * target.l1 else 0)
        penalty = max(0.0, moved * lanes * size / (2 * L2_BYTES) - model.step(tile_rows, columns, parts, 1))
        penalty += 0.5 * max(0, tile_rows + columns - 8)
    pitch_col = min((abs(x.strides[1]) for x in reduce[-1:]), default=0) * size
    if not side.along_k and not nest.panel and not pack_col and pitch_col > columns * size and inside > 16:
        footprint = inside * target.line * -(-columns * size // target.line)
        if pitch_col >= 4096 or pitch_col % 2048 == 0:
            penalty += 3.0 * columns * size / target.line
            why.append("column steps a page apart")
        elif footprint > 0.5 * target.l1:
            penalty += 0.5 * columns * size / target.line
    lane_row = lane.strides[side.row] != 0
    strained = not unit_k and side.lane.strides[side.row] == 0 and steps > 16
    if rows and not pack_row and not side.along_k:
        crowd = model.conflicts(_row_offsets(rows, side.row))
        if crowd > target.l1_ways:
            strained = True
            penalty += 0.011 * tile_rows * (crowd - target.l1_ways) ** 2 * (1.0 if unit_k else 4.0)
            why.append(f"{crowd} rows in one set of L1")
        elif not unit_k and not lane_row and reduce and abs(reduce[-1].strides[0]) * size >= 2048 and inside > 64:
            penalty += 0.15 * tile_rows + 2.0
            why.append("row steps a page apart")
    scatter = 0.0
    if abs(lane.strides[C]) != 1 and lane.extent > 1 and not side.along_k:
        scatter = 6.0 if abs(lane.strides[C]) * size >= 1024 else 2.0
    cycles = 0.0
    blocks = math.ceil(steps / max(1, inside))
    for p_count, v, width in col_variants or [(1, 1, 1)]:
        for r_count, r in row_variants:
            tiles = p_count * r_count * col_tiles * both
            loads = v if lane_row else row_vectors_per
            work = blocks * k_steps * (model.step(r, v, parts, loads) + penalty)
            ends = blocks * (CALL + r * v * (1.5 if blocks == 1 else 3.0)) + r * v * 2.0
            ends += r * width * scatter
            if side.along_k:
                ends += r * v * 8.0
            if len(reduce) > 1:
                ends += 4.0 * blocks * inside / max(1, inner_extent if cut < len(reduce) - 1 else inside)
            tiles_cost = work + ends
            cycles += tiles * tiles_cost
    cycles += 0.01 * cycles * (len(col_variants) * len(row_variants) - 1)  # code is not free either
    if pack_col:
        unit = lane.strides[side.col] == 1
        amount = lane.extent * col_tiles * both * steps
        cycles += amount * (0.4 if unit else 1.2) + 400
    if pack_row:
        amount = math.prod(x.extent for x in side.rows) * both * steps
        unit_from = (
            any(x.strides[0] == 1 for x in source[-1:])
            if pack_row == "k"
            else (bool(rows) and rows[-1][0].strides[side.row] == 1)
        )
        cycles += amount * (0.5 if unit_from else 1.5) + 400
    traffic = sum(nest.spans) * size
    memory = traffic / 20.0 if traffic > target.l2 // 2 else 0.0
    ideal = nest.cells * steps / lanes / model.rate
    return Plan(
        row=side.row,
        col=side.col,
        along_k=side.along_k,
        lane=lane,
        columns=columns,
        rows=rows,
        row_others=row_others,
        col_others=side.cols,
        both=side.both,
        reduce=reduce,
        reduce_from=source,
        pack_row=pack_row,
        pitch=pitch,
        pack_col=pack_col,
        cut=cut,
        block=block,
        split=split,
        parts=parts,
        unroll=unroll,
        cycles=max(cycles, 1.0),
        ideal=ideal,
        strained=strained,
        memory=memory,
        why=", ".join(why),
    )


def choose(nest: Nest, target: Target, a: DType, b: DType) -> Plan:
    """The plan with the fewest modelled cycles."""
    return min(plans(nest, target, a, b), key=lambda p: p.cycles)
