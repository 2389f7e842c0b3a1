"""A plan: everything that is decided about a contraction before code is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ...ir.dtypes import DType, bf16, f16, f32, i8, i16, i32, u8
from ...ir.errors import CompileError
from .canonical import Loop

PARALLEL_FROM: Final = 150_000  # modelled cycles from which threads are worth waking: about 50 microseconds
CHUNKS: Final = 32  # chunks aimed at: even shares for 1 to 8 threads, with one of them disturbed


@dataclass(frozen=True)
class Plan:
    """How a contraction is computed.

    row, col      streams of the operand that is read per row and of the one that is read per column (A = 0, B = 1)
    along_k       lanes run along the innermost reduction loop, not along the columns;  lanes: elements of a vector
    lane          the C loop that columns run along; panels of `columns` of it
    groups        how many such panels, of as many groups of columns, a tile has side by side
    rows          the C loops (outer, inner; or fewer) that rows run along, and how many of each make a tile
    row_others, col_others, both     the other C loops: those that move only the row operand, only the column operand, both
    reduce        reduction loops in order, strides (row operand, column operand) as the tile sees them
    reduce_from   the same loops as they lie in memory before packing, in the order of the packed copy
    row_source    if not empty: the loops, outer first, that the one loop of `rows` stands for in the row operand: either that is
                  packed, or its rows are `scattered`
    pack_row      '' or 'k' (packed with the reduction contiguous) or 'm' (rows contiguous);  pack_col: packed in panels
    scattered     rows follow no single stride in the row operand: a tile is passed the offset of each of its rows
    pitch         elements from one row (of 'k') or one step (of 'm') to the next in the packed rows
    parts, unroll independent accumulators per cell; steps of the innermost loop per iteration
    cycles, ideal what the model expects of one core, and what its multiply-adds alone would take
    memory        cycles to fetch the operands once from beyond L2
    strained      the row operand is read in a way that packing might mend;  why: what costs, in words
    together      all chunks do one block of the cut reduction before any does the next, so that L2 holds what they share
    split         the blocks of the cut reduction are computed apart, in parallel, and added in order
    cut, block    reduction loops before `cut` run outside the tiles, loop `cut` in blocks of `block`; cut < 0: not cut
    """

    row: int
    col: int
    along_k: bool
    lanes: int
    lane: Loop
    columns: int
    rows: tuple[tuple[Loop, int], ...]
    row_others: tuple[Loop, ...]
    col_others: tuple[Loop, ...]
    both: tuple[Loop, ...]
    reduce: tuple[Loop, ...]
    reduce_from: tuple[Loop, ...]
    row_source: tuple[Loop, ...]
    pack_row: str
    pitch: int
    pack_col: bool
    cut: int
    block: int
    split: bool
    parts: int
    unroll: int
    groups: int = 1
    scattered: bool = False
    together: bool = False
    cycles: float = 0.0
    ideal: float = 0.0
    memory: float = 0.0
    strained: bool = False
    why: str = ""

    def decided(self, **changes: object) -> Plan:
        """The plan with what is decided after the tile: where the reduction is cut, how it is unrolled, what it costs.

        What is known of the tile is kept: thousands of plans are made for a network, and `replace` would be half their price.
        """
        new = object.__new__(Plan)
        new.__dict__.update(self.__dict__, **changes)
        new.__dict__.pop("inside", None)
        return new

    @property
    def parallel(self) -> bool:
        """Whether the work is worth waking threads for."""
        return max(self.cycles, self.memory) >= PARALLEL_FROM

    @cached_property
    def row_tiles(self) -> int:
        """Tiles along all loops of the row operand."""
        return math.prod(x.extent for x in self.row_others) * math.prod(-(-x.extent // n) for x, n in self.rows)

    @cached_property
    def panels(self) -> int:
        """Panels along all loops of the column operand."""
        return math.prod(x.extent for x in self.col_others) * -(-self.lane.extent // self.columns)

    @cached_property
    def tile_rows(self) -> int:
        """Rows of the largest tile."""
        return math.prod(n for _, n in self.rows)

    def copied(self, steps: int) -> tuple[int, int]:
        """Elements of the packed copies of the row and of the column operand, for a reduction of `steps`."""
        both = math.prod(x.extent for x in self.both) * steps
        rows = math.prod(x.extent for x, _ in self.rows) * math.prod(x.extent for x in self.row_others)
        cols = self.lane.extent * math.prod(x.extent for x in self.col_others)
        return (both * rows if self.pack_row else 0), (both * cols if self.pack_col else 0)

    def describe(self) -> str:
        """One line: what was chosen and what the model expects."""
        names = "AB"
        sides = " x ".join(str(n) for _, n in self.rows) or "1"
        lanes = "the reduction" if self.along_k else f"columns ({names[self.col]})"
        text = f"tile {sides} rows x {f'{self.groups} x ' if self.groups > 1 else ''}{self.columns} columns, lanes along {lanes}"
        if self.scattered:
            text += f", rows of {names[self.row]} by their offsets"
        if self.pack_row:
            text += f", {names[self.row]} packed by {'steps' if self.pack_row == 'k' else 'rows'}"
        if self.pack_col:
            text += f", {names[self.col]} packed in panels"
        if self.cut >= 0:
            how = "split" if self.split else "cut for all tiles together" if self.together else "cut"
            text += f", reduction {how} in blocks of {self.inside}"
        return f"{text}; model: {100 * self.ideal / self.cycles:.0f}% of peak{'; ' + self.why if self.why else ''}"

    @cached_property
    def vectors(self) -> int:
        """Accumulators of a row of a whole panel, `lanes` elements each."""
        return -(-self.columns // self.lanes) * self.groups if not self.along_k else self.columns

    @cached_property
    def breadth(self) -> int:
        """Elements of the column operand that a step of a whole tile reads."""
        return self.columns * self.groups

    @cached_property
    def inside(self) -> int:
        """Steps of the reduction in one call of a tile (of a whole block)."""
        loops = self.reduce if self.cut < 0 else self.reduce[self.cut + 1 :]
        return math.prod(x.extent for x in loops) * (self.block if self.cut >= 0 else 1)


def accumulator(dtype: DType) -> DType:
    """What sums of products of a dtype are held in. Raises CompileError for what cannot be multiplied."""
    if dtype in (f16, bf16):
        return f32
    if dtype in (i8, u8, i16):
        return i32
    if dtype.name in ("f32", "f64", "i32", "i64", "u32", "u64"):
        return dtype
    raise CompileError(
        f"a contraction of {dtype} is not supported; expected f32, f64, f16, bf16, i8, u8, i16, i32, i64, u32 or u64"
    )


def pieces(extent: int, size: int) -> tuple[int, int, int]:
    """(count, length, longer): `extent` in `count` pieces as equal as can be, the first `longer` of them one longer."""
    count = -(-extent // size)
    return count, extent // count, extent % count
