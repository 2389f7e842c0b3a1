"""What a plan costs, in cycles of one core.

A step of a tile with r rows and v vectors takes the longest of: its multiply-adds, its loads, its instructions, and the
latency of a chain of additions; a column panel that does not stay in L1, or rows that fall on each other in L1's sets,
cost more. To that come a tile's prologue and epilogue and the copies of packing. The constants were fitted to measurements
of several hundred plans on a Zen 4 core; what matters is the order in which they put plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...ir.dtypes import DType, i32
from ...ir.target import Target
from .canonical import C, Nest
from .plan import Plan, pieces

LATENCY: Final = 4.4  # cycles (and some slack) from one multiply-add to the next on the same accumulator
PAIRS_FROM_MEMORY: Final = 1.33  # what a product of pairs takes longer whose operand is broadcast from memory
CALL: Final = 24.0  # cycles to enter and leave a tile
ROW_END: Final = 10.0  # ... for each row of C that it writes: lines side by side are there sooner than those of another row
PLACE: Final = 4.0  # ... for each row of which it is passed the offset in the row operand
BYTES_END: Final = 3.0  # ... and, of bytes, for each accumulator beyond OVERLAPPED: requantising waits for the products
OVERLAPPED: Final = 16  # accumulators whose epilogue runs beside the next tile's products
ROW_LINE: Final = 1.2  # cycles for a line of the row operand that a tile finds in L2: short streams, one for each row
COL_LINE: Final = 0.15  # ... of the column operand: one long stream
CROWDED: Final = 0.005  # of a step's time, where accumulators and columns leave fewer than FREE of 32 registers
FREE: Final = 6
SCATTERED: Final = 0.02  # of a step's time, where a tile of 512-bit vectors is passed the offsets of its rows
L2_BYTES: Final = 26.0  # bytes a cycle that a column panel streams at from L2
L3_BYTES: Final = 20.0  # bytes a cycle from beyond L2
FAR_BYTES: Final = 12.0  # ... where it is not known from where: one core has 8 from memory and 25 from L3


class Model:
    """Costs on one target for one element type."""

    def __init__(self, target: Target, dtype: DType, pairs: bool = False, emulated: bool = False) -> None:
        self.target = target
        self.from_memory = PAIRS_FROM_MEMORY if pairs else 1.0
        self.size = dtype.itemsize
        self.lanes = target.lanes(dtype.bits)
        self.wide = target.vector_bits >= 512
        self.rate = (1.0 if self.wide else 2.0) / (1 + emulated)  # multiply-adds per cycle
        self.octets = pairs and dtype is i32
        self.emulated = emulated  # bytes are multiplied as words: two products, and the halves of each operand in registers
        self.spare = 1 if target.fma else 2  # registers besides accumulators and columns
        self.sets = target.l1 // (target.line * target.l1_ways)

    def most_rows(self, vectors: int, along_k: bool) -> int:
        """Rows that registers hold beside `vectors` columns."""
        if vectors == 1 and self.wide and not along_k:
            return self.target.registers - 2  # broadcasts are memory operands
        return (self.target.registers - vectors * (1 + self.emulated) - self.spare - self.emulated) // vectors

    def parts(self, rows: int, vectors: int) -> int:
        """Independent accumulators per cell that a small tile needs to hide latency, as far as registers go."""
        cells, parts = rows * vectors, 1
        room = self.target.registers - vectors - self.spare - 1
        while cells * parts < LATENCY * self.rate and parts < 8 and cells * parts * 2 <= room:
            parts *= 2
        return parts

    def ideal(self, nest: Nest) -> float:
        """Cycles of the multiply-adds alone."""
        return nest.cells * nest.steps / self.lanes / self.rate

    def step(self, rows: int, vectors: int, parts: int, row_vectors: int) -> float:
        """Cycles of one step of a tile whose operands are in L1; row_vectors: vector loads per row (0: one broadcast)."""
        fmas = rows * vectors / self.rate
        if vectors == 1 and self.wide and not row_vectors:
            fmas *= self.from_memory
        vector_loads = vectors + rows * row_vectors
        loads = vector_loads / (1.0 if self.wide else 2.0) + (0.0 if row_vectors else rows / 2.0)
        instructions = (rows * vectors * (1 if self.target.fma else 2) + rows + vectors + 2) / 5.0
        return max(fmas, loads, instructions, LATENCY / parts)

    def conflicts(self, offsets: Sequence[int]) -> int:
        """The most rows whose lines fall in one set of L1."""
        counts: dict[int, int] = {}
        for line in {o * self.size // self.target.line for o in offsets}:
            counts[line % self.sets] = counts.get(line % self.sets, 0) + 1
        return max(counts.values(), default=0)

    def price(self, nest: Nest, p: Plan) -> Plan:
        """The plan with its costs."""
        stall, strained, why = self._stall(nest, p)
        cycles = self._tiles(p, stall) + self._packing(nest, p)
        traffic = sum(nest.spans) * self.size
        memory = traffic / FAR_BYTES if traffic > self.target.l2 // 2 else 0.0
        found = max(cycles, 1.0)
        return p.decided(cycles=found, ideal=self.ideal(nest), memory=memory, strained=strained, why=", ".join(why))

    def _stall(self, nest: Nest, p: Plan) -> tuple[float, bool, list[str]]:
        """Cycles that a step waits for memory, whether the row operand is to blame, and why."""
        l1, line, inside, rows = self.target.l1, self.target.line, p.inside, p.tile_rows
        col_bytes = p.breadth * self.size  # a step's
        if p.along_k:
            # nothing is reused from registers but rows x columns: the vectors themselves come from L2
            if (rows + p.columns) * inside * self.size <= 0.5 * l1:
                return 0.0, False, []
            moved = rows + (p.columns if col_bytes * inside > 0.5 * l1 else 0)
            late = moved * self.lanes * self.size / L2_BYTES - self.step(rows, p.columns, p.parts, 1)
            return max(0.0, late) + 0.5 * max(0, rows + p.columns - 8), False, []
        stall = 0.0
        why: list[str] = []
        busy = self.step(rows, p.vectors, p.parts, 0)
        reach = self._footprint(p) * self.size
        far = reach > 0.5 * l1
        if p.row_tiles > 1 or far:
            stall += ROW_LINE * reach / line / inside
        if self.wide and self.target.registers - (rows + 1) * p.vectors < FREE:
            stall += CROWDED * busy
        if self.wide and p.scattered:
            stall += SCATTERED * busy
        if inside * col_bytes > 0.5 * l1 and p.row_tiles > 1:
            # the panel leaves L1 between two row tiles: its lines are felt where few multiply-adds hide them
            fetched = col_bytes + (self._new_lines(p) * line if far else 0)
            late = max(0.0, fetched / L2_BYTES - busy)
            stall += late + COL_LINE * col_bytes / line
            if late > 0.05 * busy:
                why.append("column panel beyond L1")
        stall += (0.5 if far else 0.3) * max(0, rows - 12)  # more streams than are prefetched
        row_step, col_step = (abs(s) for s in p.reduce[-1].strides) if p.reduce else (0, 0)
        if not nest.panel and not p.pack_col and col_step * self.size > col_bytes and inside > 16:
            if col_step * self.size >= 4096 or col_step * self.size % 2048 == 0:
                stall += 3.0 * col_bytes / line
                why.append("column steps a page apart")
            elif inside * line * -(-col_bytes // line) > 0.5 * l1:
                stall += 0.5 * col_bytes / line
        both_vectors = p.lane.strides[p.row] != 0
        strained = row_step != 1 and not both_vectors and nest.steps > 16
        if p.rows and not p.pack_row:
            crowd = self.conflicts(_row_offsets(p))
            if crowd >= self.target.l1_ways:  # the columns want a place too
                strained = True
                stall += 0.011 * rows * (crowd - self.target.l1_ways + 1) ** 2 * (1.0 if row_step == 1 else 4.0)
                why.append(f"{crowd} rows in one set of L1")
            elif row_step * self.size >= 2048 and not both_vectors and inside > 64:
                stall += 0.15 * rows + 2.0
                why.append("row steps a page apart")
        return stall, strained, why

    def _new_lines(self, p: Plan) -> int:
        """Lines of rows that a step touches and the step before it did not, where steps are lines apart."""
        step = p.reduce[-1].strides[0] * self.size if p.reduce else 0
        if p.pack_row or abs(step) < self.target.line:
            return 0
        now = {o * self.size // self.target.line for o in _row_offsets(p)}
        return len({(o * self.size + step) // self.target.line for o in _row_offsets(p)} - now)

    def _footprint(self, p: Plan) -> int:
        """Elements of the row operand that a tile reads, overlaps counted once where a loop's stride tells."""
        total = p.tile_rows * p.inside
        if p.pack_row or not p.reduce or not p.rows:
            return total
        last = p.reduce[-1]
        rows = p.rows if not p.scattered else ((p.row_source[-1], p.tile_rows),)
        reach = 1 + abs(last.strides[0]) * (last.extent - 1) + sum(abs(x.strides[p.row]) * (n - 1) for x, n in rows)
        return min(total, reach * max(1, p.inside // last.extent))

    def _tiles(self, p: Plan, stall: float) -> float:
        """All tiles: the sizes that occur, how often, and what one costs."""
        full, rest = divmod(p.lane.extent, p.columns)
        widths = [(full, p.columns)] * (full > 0) + [(1, rest)] * (rest > 0)
        heights = [(math.prod(x.extent for x in (*p.row_others, *p.col_others, *p.both)), 1)]
        for x, n in p.rows:
            count, length, longer = pieces(x.extent, n)
            sizes = [(longer, length + 1), (count - longer, length)]
            heights = [(a * times, b * size) for a, b in heights for times, size in sizes if times]
        inner = p.reduce[-1].extent if p.reduce else 1
        blocks = -(-math.prod(x.extent for x in p.reduce) // p.inside)
        k_steps = p.inside // inner * -(-inner // p.lanes) if p.along_k else p.inside
        scatter = 0.0
        if abs(p.lane.strides[C]) != 1 and p.lane.extent > 1 and not p.along_k:
            scatter = 9.0 if abs(p.lane.strides[C]) * self.size >= 1024 else 2.0
        # turns of the loops around the innermost one
        turns = 4.0 * blocks * p.inside / (inner if p.cut < len(p.reduce) - 1 else p.inside) if len(p.reduce) > 1 else 0.0
        total = 0.0
        for across, width in widths:
            v = width if p.along_k else -(-width // p.lanes) * p.groups
            row_vectors = 1 if p.along_k else v if p.lane.strides[p.row] != 0 else 0
            for times, r in heights:
                work = blocks * k_steps * (self.step(r, v, p.parts, row_vectors) + stall)
                ends = blocks * (CALL + r * v * (1.5 if blocks == 1 else 3.0)) + r * v * (3.5 if p.along_k else 2.0)
                ends += ROW_END * r if self.wide else 0.0
                ends += PLACE * r if p.scattered else 0.0
                ends += BYTES_END * max(0, r * v - OVERLAPPED) if self.octets and self.wide else 0.0
                total += across * times * (work + ends + r * width * scatter + turns)
        return total * (1 + 0.004 * (len(widths) * len(heights) - 1))  # code is not free either

    def _packing(self, nest: Nest, p: Plan) -> float:
        rows, columns = p.copied(nest.steps)
        total = 0.0
        if columns:
            total += self._copy(columns, 0.4 if p.lane.strides[p.col] == 1 else 1.2)
        if rows:
            unit = bool(p.reduce_from) and p.reduce_from[-1].strides[0] == 1
            if p.pack_row == "m":
                unit = bool(p.rows) and p.rows[-1][0].strides[p.row] == 1
            total += self._copy(rows, 0.5 if unit else 1.5)
        return total

    def _copy(self, amount: int, cycles: float) -> float:
        """Copies of `amount` elements; what does not fit L2 is written out and read back."""
        far = amount * self.size > self.target.l2
        return 400 + amount * (cycles + (2.0 * self.size / L3_BYTES if far else 0.0))


def _row_offsets(p: Plan) -> list[int]:
    offsets = [0]
    for x, n in p.rows:
        offsets = [o + i * x.strides[p.row] for o in offsets for i in range(n)]
    return offsets
