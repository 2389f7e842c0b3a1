"""What goes into the contraction generator and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir.dtypes import DType
from ...ir.errors import CompileError
from ...ir.expr import Expr
from ...ir.lowering import Load
from ..loop_ir import Kernel


@dataclass(frozen=True, slots=True)
class Operand:
    """How an operand lies in memory: `strides` in elements per dimension, `align` in bytes of the array's first element. The
    element of index 0 is that of number `start`, and `span` the number of elements, where C is the inside of a larger array."""

    dtype: DType
    strides: tuple[int, ...]
    align: int
    start: int = 0
    span: int = 0


EpilogueValue = Callable[[Expr, tuple[Expr, ...], Load], Expr]
GroupedValue = Callable[[tuple[Expr, ...], tuple[Expr, ...], Load], Sequence[Expr]]


@dataclass(frozen=True)
class Epilogue:
    """What is stored instead of the sum: value(sum, index of C, load) as a scalar expression.

    load(k, index, mask=None) is the element of operands[k]. The sum has the dtype `total`, or that of A. An operand may share
    C's memory only if it is read at C's own index, in C's own layout.

    Of columns in groups (`Contraction.groups`) the epilogue may join the sums of one column of all groups: `grouped`, in place of
    `value`, gives the elements of C, which then has one group's columns, and of arrays of the dtypes `more` laid out as C is.
    """

    operands: tuple[Operand, ...]
    value: EpilogueValue | None
    total: DType | None = None
    grouped: GroupedValue | None = None
    more: tuple[Operand, ...] = ()


class NoPartError(CompileError):
    """A contraction whose rows cannot be computed part by part with the same bits."""


@dataclass(frozen=True)
class Part:
    """So many rows of a product in place of all; `narrow`: in tiles of all of these rows and one vector of columns."""

    rows: int
    narrow: bool = False


@dataclass(frozen=True)
class Scheduled:
    """Kernels, callees first; `root` is the one a program calls, with buffers A, B, C, epilogue operands, further outputs,
    workspace.

    The workspace (aligned to 64 bytes) is there only if `workspace` > 0 bytes are needed. Two kernels of one name, from
    whichever schedule, are equal, the root aside. `parallel` says whether the root forks threads. `in_place` are the epilogue
    operands that may lie where C does.
    """

    kernels: tuple[Kernel, ...]
    root: str
    workspace: int
    note: str
    parallel: bool = False
    in_place: frozenset[int] = frozenset()
