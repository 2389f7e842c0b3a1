"""Which register tile, which operand to pack, where to cut the reduction: the plans there are, and the cheapest of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from ...ir.dtypes import DType
from ...ir.errors import CompileError
from ...ir.expr import const
from ...ir.target import Target
from . import plan as limits
from .canonical import A, B, C, Loop, Nest, merge
from .cost import L3_BYTES, Model
from .plan import Plan, accumulator

FEW_TILES: Final = 8  # fewer tiles of C than this cannot feed the threads: the reduction is split instead
SPLIT: Final = 16  # parts of a split reduction, whatever the number of threads
SHARED: Final = 0.6  # share of L2 that a block of the reduction may take which all tiles do together
FEWEST: Final = 128  # steps of such a block at least: the partial sums are loaded and stored for each
MOST_TRAFFIC: Final = 0.25  # bytes a cycle from beyond L2 that chunks may read each for itself
SLICE: Final = 0.4  # share of L2 that a tile's slice of both operands may take
COPIES: Final = 32 << 20  # bytes of packed copies that are always allowed, beyond that twice the operands
RANKED: Final = 1.5  # times the best plan's modelled cycles up to which a plan is worth measuring
UNROLLED: Final = 48  # multiply-adds in one iteration of the innermost loop, about
MOST_SCATTERED: Final = 8  # rows of a tile whose addresses general registers hold
SHORT: Final = 8  # iterations of the innermost loop below which it should have no remainder
STRAIGHT: Final = 64  # multiply-adds of a tile of one row that stand without a loop, where there are registers enough


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
    source: tuple[Loop, ...] = ()  # the loops that one loop of rows was merged from, for a packed row operand


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
        columns = sorted((x for x in free if x.strides[A] == 0 and x.strides[B] != 0), key=lambda x: x.strides[B])
        lane = columns[0] if columns else unit
        if not panels_follow(columns, nest.panel):
            raise CompileError(
                "B is packed in panels over several column axes that do not follow each other in C: leave it unpacked"
            )
        whole = [_of_panels(x, nest.panel_k) if x in columns else x for x in free if x is not lane]
        yield _Side(A, B, False, lane, *split(A, B, whole))
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


def panels_follow(columns: Sequence[Loop], panel: int) -> bool:
    """Whether panels over these column loops (innermost first, strides of B in columns) start anew with each outer loop."""
    return not columns or (columns[0].strides[B] == 1 and all(x.strides[B] % panel == 0 for x in columns[1:]))


def _of_panels(outer: Loop, steps: int) -> Loop:
    """An outer column loop over whole panels: a column more is `steps` elements more of B."""
    return Loop(outer.extent, tuple(s * steps if n == B else s for n, s in enumerate(outer.strides)))


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


def emulated(nest: Nest, target: Target) -> bool:
    """Whether products of bytes take several instructions: VNNI has one for those of unsigned and signed ones."""
    return nest.ways == 4 and not (target.vnni and nest.factors[:2] != nest.factors[2:])


def plans(nest: Nest, target: Target, row_dtype: DType, col_dtype: DType, *, whole: bool = False) -> Iterator[Plan]:
    """Every plan the model considers. `row_dtype`, `col_dtype` here are those of A and B.

    With `whole`, of a packed B, only plans whose tiles are as wide as a panel.
    """
    dtype = accumulator(nest.dtype)
    model = Model(target, dtype, nest.pairs is not None, emulated(nest, target))
    widen = {A: row_dtype is not dtype, B: col_dtype is not dtype}
    if nest.pairs is not None:
        widen = {A: nest.pairs[A] != 0, B: nest.pairs[B] != 0}
    for side in _sides(nest):
        loops = _order(_pair(nest.reduce, side.row, side.col), side.along_k)
        lane_stride = side.lane.strides[side.col]
        if side.along_k:
            # the column operand as it lies; the row operand, if its steps do not lie side by side, packed
            if widen[side.col] or all(x.extent == 1 for x in loops) or loops[-1].strides[1] != 1:
                continue
            form = "" if loops[-1].strides[0] == 1 and not widen[side.row] else "k"
            for columns in sorted({min(n, side.lane.extent) for n in (1, 2, 3, 4, 6)}):
                for rows in _row_choices(side.rows, model.most_rows(columns, True)):
                    yield _plan(nest, model, side, loops, rows, columns, form, False)
            continue
        if nest.panel:
            counts = [n for n in range(1, 9) if n * model.lanes <= nest.panel and nest.panel % (n * model.lanes) == 0]
            if nest.group is not None:  # a tile has a whole panel
                counts = [side.lane.extent // model.lanes] if side.lane.extent % model.lanes == 0 else []
            if not counts:
                raise CompileError(f"B is packed in panels of {nest.panel}, which vectors of {model.lanes} do not divide")
            if whole and nest.group is None:
                counts = [n for n in counts if n * model.lanes == nest.panel]
        else:
            need = -(-side.lane.extent // model.lanes)
            few_rows = math.prod(x.extent for x in side.rows) <= 4
            counts = sorted({-(-need // -(-need // n)) for n in range(1, min(8 if few_rows else 4, need) + 1)})
        direct_ok = lane_stride >= 0 and (lane_stride <= 1 or side.lane.extent == 1)
        col_options = [False] if nest.panel else [False, True]
        if widen[side.col]:
            col_options = [True]
        both_vectors = side.lane.strides[side.row] != 0
        groups = 1 if nest.group is None else nest.group.extent
        for vectors in counts:
            for rows in _row_choices(side.rows, model.most_rows(vectors * groups, False)):
                for pack_col in col_options:
                    if not pack_col and not nest.panel and not direct_ok:
                        continue
                    direct = None
                    if not widen[side.row]:
                        direct = _plan(nest, model, side, loops, rows, vectors * model.lanes, "", pack_col)
                        yield direct
                    if both_vectors or (direct is not None and not direct.strained):
                        continue
                    by_steps = bool(loops) and loops[-1].strides[0] == 1
                    by_rows = bool(rows) and rows[-1][0].strides[side.row] == 1
                    for form in ("k",) if by_steps or not rows else ("m",) if by_rows else ("k", "m"):
                        yield _plan(nest, model, side, loops, rows, vectors * model.lanes, form, pack_col)
        merged = None if both_vectors or not loops or loops[-1].strides[0] != 1 else _merged_rows(side)
        if merged is not None:
            scattered = not widen[side.row] and all(x.strides[side.row] >= 0 for x in merged.source)
            for vectors in counts:
                for rows in _row_choices(merged.rows, model.most_rows(vectors * groups, False)):
                    for pack_col in col_options:
                        if not (pack_col or nest.panel or direct_ok):
                            continue
                        yield _plan(nest, model, merged, loops, rows, vectors * model.lanes, "k", pack_col)
                        if scattered and 1 < math.prod(n for _, n in rows) <= MOST_SCATTERED:
                            yield _plan(nest, model, merged, loops, rows, vectors * model.lanes, "", pack_col)


def _merged_rows(side: _Side) -> _Side | None:
    """The rows as one loop, if they are one in every stream but the row operand's: of that a tile may then have rows that follow
    each other once packed, or rows that lie anywhere. The 49 pixels of a 7x7 image are nine tiles of 5 and 6 rows."""
    if len(side.rows) < 2:
        return None
    ordered = tuple(sorted(side.rows, key=lambda x: abs(x.strides[C]), reverse=True))
    found = merge(ordered, [s for s in range(len(ordered[0].strides)) if s != side.row])
    if len(found) != 1:
        return None
    strides = tuple(0 if s == side.row else x for s, x in enumerate(found[0].strides))
    return replace(side, rows=(Loop(found[0].extent, strides),), source=ordered)


def _plan(
    nest: Nest,
    model: Model,
    side: _Side,
    loops: tuple[Loop, ...],
    rows: tuple[tuple[Loop, int], ...],
    columns: int,
    pack_row: str,
    pack_col: bool,
) -> Plan:
    """The plan of these choices: the reduction as the tile sees it, where it is cut, how it is unrolled; priced."""
    steps, tile_rows = nest.steps, math.prod(n for _, n in rows)
    pitch = 0
    if pack_row:
        # rows whose pitch is a multiple of L1's set span would evict each other
        pitch = steps + 16 * (steps * model.size % 2048 == 0) if pack_row == "k" else tile_rows
    chosen = [x for x, _ in rows]
    found = Plan(
        row=side.row,
        col=side.col,
        along_k=side.along_k,
        lanes=model.lanes,
        lane=side.lane,
        columns=columns,
        rows=rows,
        row_others=tuple(x for x in side.rows if not any(x is y for y in chosen)),
        col_others=side.cols,
        both=side.both,
        reduce=_reduction(
            loops, 0 if not pack_row else 1 if pack_row == "k" else pitch, columns if pack_col else 0, side.along_k
        ),
        reduce_from=loops,
        row_source=side.source,
        scattered=bool(side.source) and not pack_row,
        pack_row=pack_row,
        pitch=pitch,
        pack_col=pack_col,
        cut=-1,
        block=0,
        split=False,
        parts=1,
        unroll=1,
        groups=1 if nest.group is None else nest.group.extent,
    )
    cut, block, how = _blocking(nest, model, found)
    parts, unroll = _unrolling(model, found)
    priced = model.price(nest, found.decided(cut=cut, block=block, parts=parts, unroll=unroll, **how))
    if priced.together or not priced.parallel or not _strided(model, priced):
        return priced
    if sum(_bytes(nest, model, priced)) <= model.target.l2:
        return priced
    return priced.decided(cycles=priced.cycles + _traffic(nest, model, priced) / L3_BYTES)


@lru_cache(maxsize=4096)
def _reduction(loops: tuple[Loop, ...], row_inner: int, col_inner: int, along_k: bool) -> tuple[Loop, ...]:
    """The reduction loops as the tile sees them; `row_inner`, `col_inner`: elements of a step of a packed copy, or 0."""
    seen = _packed(loops, 0, row_inner) if row_inner else loops
    seen = _packed(seen, 1, col_inner) if col_inner else seen
    return merge(seen) if row_inner or col_inner else _order(merge(seen), along_k)


def _packed(loops: tuple[Loop, ...], which: int, inner: int) -> tuple[Loop, ...]:
    """Reduction loops with the strides of a packed copy in operand `which`."""
    out: list[Loop] = []
    for x in reversed(loops):
        strides = (inner, x.strides[1]) if which == 0 else (x.strides[0], inner)
        out.insert(0, Loop(x.extent, strides))
        inner *= x.extent
    return tuple(out)


def _blocking(nest: Nest, model: Model, p: Plan) -> tuple[int, int, dict[str, bool]]:
    """(cut, block, whether split or done together) of a plan's reduction."""
    whole: tuple[int, int, dict[str, bool]] = (-1, 0, {})
    tiles = p.row_tiles * p.panels * math.prod(x.extent for x in p.both)
    if p.along_k or not p.reduce or nest.joined:
        return whole
    if tiles < FEW_TILES and model.ideal(nest) >= limits.PARALLEL_FROM and nest.steps >= 2 * SPLIT:
        cut, block = _cut(p.reduce, -(-nest.steps // SPLIT))
        return cut, block, {"split": cut >= 0}
    if p.row_tiles == 1:
        return whole  # no panel is read twice
    limit = _together(nest, model, p)
    if limit:
        cut, block = _cut(p.reduce, limit)
        return cut, block, {"together": cut >= 0}
    line, size = model.target.line, model.size
    row_bytes = p.tile_rows * size
    if not p.pack_row:
        step = abs(p.reduce[-1].strides[0]) * size
        if p.rows and p.rows[-1][0].strides[p.row] == 1:
            row_bytes = max(row_bytes, line)
        elif step > size:
            row_bytes = p.tile_rows * min(line, step)
    return (*_cut(p.reduce, int(model.target.l2 * SLICE / (p.columns * size + row_bytes))), {})


def _together(nest: Nest, model: Model, p: Plan) -> int:
    """Steps of the reduction for which L2 holds all rows and columns, if the chunks would otherwise read too much from beyond
    it; 0 if not. So it is for weight gradients: a small C, and a reduction over all pixels of a batch. Rows that are read along
    their memory stay as they are: the hardware fetches those ahead, and partial sums cost more."""
    if p.pack_row or not _strided(model, p):
        return 0
    rows, columns = _bytes(nest, model, p)
    limit = int(model.target.l2 * SHARED * nest.steps / (rows + columns))
    ideal = model.ideal(nest)
    if ideal < limits.PARALLEL_FROM or not FEWEST <= limit < nest.steps:
        return 0
    return limit if _traffic(nest, model, p) > MOST_TRAFFIC * ideal else 0


def _strided(model: Model, p: Plan) -> bool:
    """Whether one step of the rows lies lines apart from the next, in the operand itself: no stream that hardware fetches."""
    return bool(p.reduce_from) and abs(p.reduce_from[-1].strides[0]) * model.size >= model.target.line


def _bytes(nest: Nest, model: Model, p: Plan) -> tuple[int, int]:
    """Of the row and of the column operand, as the tiles read them."""
    rows, columns = p.copied(nest.steps)
    return (rows or nest.spans[p.row]) * model.size, (columns or nest.spans[p.col]) * model.size


def _traffic(nest: Nest, model: Model, p: Plan) -> float:
    """Bytes from beyond L2 if each of the chunks reads its rows and columns for itself."""
    rows, columns = _bytes(nest, model, p)
    counts = {min(p.panels, n) for n in (1, 2, 4, 8, 16, 32)}
    return min(n * rows + min(p.row_tiles, -(-limits.CHUNKS // n)) * columns for n in counts)


def _unrolling(model: Model, p: Plan) -> tuple[int, int]:
    """(parts, unroll) of a plan's innermost loop."""
    cells, inner = p.tile_rows * p.vectors, p.reduce[-1].extent if p.reduce else 1
    parts = model.parts(p.tile_rows, p.vectors)
    if p.along_k:
        return parts, 1
    unroll = max(parts, min(8, UNROLLED // max(1, cells), inner))
    if inner <= 4 and inner * cells <= 4 * UNROLLED:
        unroll = max(unroll, inner)
    if model.wide and len(p.reduce) == 1 and p.tile_rows == 1 and inner * cells <= STRAIGHT:
        unroll = inner
    unroll = max(1, min(unroll, inner))
    if parts == 1 and inner < SHORT * unroll:  # a remainder of a short loop is felt
        unroll = next((n for n in range(unroll, unroll // 2, -1) if inner % n == 0), unroll)
    return (parts if unroll >= parts else 1 << (unroll.bit_length() - 1)), unroll


def choose(nest: Nest, target: Target, a: DType, b: DType, rank: int = 0) -> Plan:
    """The plan with the fewest modelled cycles whose copies are of reasonable size, if there is one; or the one of a later
    rank (the last, if there are not that many)."""
    # a plan depends on the loops, not on what the epilogue computes or where the operands start: equal layers share one
    plain = replace(nest, base=(0,) * len(nest.base), value=const(0), reads=(), dims=(), read_spans=(), more=())
    if rank:
        found = _ranked(plain, target, a, b)
        return found[min(rank, len(found) - 1)]
    return _choose(plain, target, a, b)


@lru_cache(maxsize=256)
def _ranked(nest: Nest, target: Target, a: DType, b: DType) -> tuple[Plan, ...]:
    """The plans to choose from, by modelled cycles: the one that is chosen first, then those not much worse."""
    best = _choose(nest, target, a, b)
    others = sorted((p for p in _reasonable(nest, target, a, b) if p != best), key=lambda p: p.cycles)
    return (best, *(p for p in others if p.cycles <= RANKED * best.cycles))


@lru_cache(maxsize=1024)
def _choose(nest: Nest, target: Target, a: DType, b: DType) -> Plan:
    found = _reasonable(nest, target, a, b)
    return min(found, key=lambda p: (p.cycles, -p.columns))  # of equals the widest: it stores longer runs


def _reasonable(nest: Nest, target: Target, a: DType, b: DType) -> list[Plan]:
    found = list(plans(nest, target, a, b))
    most = max(COPIES, 2 * sum(nest.spans) * accumulator(nest.dtype).itemsize)
    small = [p for p in found if sum(p.copied(nest.steps)) * accumulator(nest.dtype).itemsize <= most]
    return small or found
