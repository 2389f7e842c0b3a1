"""The loop IR: one grammar for every kernel, from schedules to microkernels. LLVM text exists only in the emitters.

    program  := kernel*                                   functions; later ones may call earlier ones
    kernel   := kernel NAME(buffer*, NAME: i64 *) { stmt* }
    stmt     := for NAME in expr .. expr [step N] KIND { stmt* }     KIND: serial parallel unrolled vector block thread
              | store buffer[expr*] = expr [if mask] [nontemporal]
              | let NAME = expr                           visible to the statements that follow in the same block
              | if expr { stmt* } [else { stmt* }]
              | alloc buffer                              a `register` or `local` array that lives in this block
              | call NAME(view*, expr*)                   buffers are passed as (buffer, offset): a view from there on
              | prefetch buffer[expr*] LEVEL              a hint: this element is wanted soon in L1 (1) or L2 (2)
              | barrier                                   all threads of a block (GPU)
              | warp OP view* [expr*]                     what a warp, or a thread for it, does in one instruction (GPU)

Expressions are those of `ir.expr`; `load` has a Buffer as its source, and `to_line(buffer)` is how many elements of a global
buffer lie before the first whose address is a multiple of a line: known when the kernel runs, and results must not depend on it.
An index has one expression per dimension of the buffer; lanes run along the last dimension, so a vector access is contiguous
where that stride is 1, else strided.

Scopes: `global` memory a kernel gets as an argument; `local` an array on the thread's stack; `register` a small array
whose indices are constants once unrolled loops are unrolled, kept in registers; `shared` (GPU) per block.

A `parallel` loop stands in a kernel that is called from the program (never in a callee), at its top level or under serial
loops and ifs, never inside another parallel loop; what its body reads from outside it is captured, registers excepted. Its
iterations are independent and each runs on one thread. The variable `tid` (i64, 0 <= tid < threads) may be read in it
to select a thread's own slice of a scratch buffer; a result must not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ..ir.dtypes import DType
from ..ir.expr import Expr

LINE: Final = 64  # bytes; `to_line(buffer)`, an i64, is how many elements lie before the first at a multiple of it, in the run
KINDS: Final = ("serial", "parallel", "unrolled", "vector", "block", "thread")
SCOPES: Final = ("global", "local", "register", "shared")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A typed array: `shape` in elements; `strides` in elements, row-major by default; `align` in bytes, of element 0."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    scope: str = "global"
    strides: tuple[int, ...] = ()
    align: int = 4
    writable: bool = True

    def __post_init__(self) -> None:
        if not self.strides and self.shape:
            strides = [1]
            for n in reversed(self.shape[1:]):
                strides.insert(0, strides[0] * n)
            object.__setattr__(self, "strides", tuple(strides))

    @property
    def span(self) -> int:
        """Elements from the first to the last one addressed, inclusive; 0 for an empty buffer."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


class Stmt:
    """A statement of the loop IR."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class For(Stmt):
    """Runs `body` with `var` = start, start + step, ... while var < stop."""

    var: Expr
    start: Expr
    stop: Expr
    body: tuple[Stmt, ...]
    kind: str = "serial"
    step: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Store(Stmt):
    """Writes `value` (its lanes along the last dimension); where `mask` is given, only lanes that are true."""

    buffer: Buffer
    index: tuple[Expr, ...]
    value: Expr
    mask: Expr | None = None
    nontemporal: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Let(Stmt):
    """Binds `var` to a value for the rest of the block."""

    var: Expr
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class If(Stmt):
    condition: Expr
    then: tuple[Stmt, ...]
    otherwise: tuple[Stmt, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Alloc(Stmt):
    """Declares a register or local buffer; its contents are undefined until written."""

    buffer: Buffer


@dataclass(frozen=True, slots=True, eq=False)
class Call(Stmt):
    """Calls a kernel. `views[i]` is (buffer, element offset) for its i-th buffer parameter; `scalars` are i64 values."""

    kernel: str
    views: tuple[tuple[Buffer, Expr], ...]
    scalars: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Prefetch(Stmt):
    """Asks for the line of an element of global memory in cache `level` (1 or 2). A hint: the index may lie anywhere."""

    buffer: Buffer
    index: tuple[Expr, ...]
    level: int


@dataclass(frozen=True, slots=True, eq=False)
class Barrier(Stmt):
    pass


@dataclass(frozen=True, slots=True, eq=False)
class Warp(Stmt):
    """An instruction of a GPU that is no arithmetic of one thread. `places` are elements of buffers, `values` i64 scalars.

    copy_async [shared, global] (bytes)
        16 bytes to shared memory, zeros after the first `bytes` of them; done once waited for
    commit_async, wait_async (n)
        a group of copies ends here; wait until at most n groups are not done
    load_matrix, load_matrix_trans [4 registers i32, shared]
        four 8x8 matrices of 16 bits (rows of 16 bytes, whatever they hold); lane l names row l % 8 of matrix l // 8
    load_bits_1, load_bits_2, load_bits_4, load_bits_8, load_bits_16 [registers i32, global] (valid)
        so many bytes, as they are, to 1, 1, 1, 2 or 4 registers; zeros where `valid` is 0
    store_bits_16 [shared, 4 registers i32]
        16 bytes from registers
    mma_... [sums, registers i32 of A, of B]
        a tile of sums += a tile of A times one of B, each lane its part: see `MMA`
    exp2_near [f32, f32], larger [f32, f32]
        to the first: 2^x of the second, within 2 units in the last place, denormals taken for zero; the larger of the two, of a
        NaN and a number the number
    pack_bf16, pack_f16 [i32, 2 registers f32]
        both rounded to nearest, the first in the lower half
    """

    op: str
    places: tuple[tuple[Buffer, tuple[Expr, ...]], ...] = ()
    values: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A function over global buffers and i64 scalars. `noinline` keeps a shared microkernel one copy.

    `noalias` is the promise of every caller that no written buffer overlaps another one (an in-place update breaks it).
    """

    name: str
    buffers: tuple[Buffer, ...]
    body: tuple[Stmt, ...]
    scalars: tuple[Expr, ...] = ()
    doc: str = ""
    noinline: bool = False
    noalias: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """Kernels in an order in which callees come before callers; names are unique."""

    kernels: tuple[Kernel, ...] = field(default=())

    def __getitem__(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)


_BYTES: Final = ("i8_i8", "i8_u8", "u8_i8", "u8_u8")
# Products of a warp: dtype of the sums, and how many registers of sums, of A and of B a lane has. Of 16x8 sums, 32 bytes along
# the reduction; `_half`: 16 bytes, of bytes 8x8 sums.
MMA: Final[dict[str, tuple[str, int, int, int]]] = {
    "mma_bf16": ("f32", 4, 4, 2),
    "mma_f16": ("f32", 4, 4, 2),
    "mma_tf32": ("f32", 4, 4, 2),
    "mma_f16_half": ("f32", 4, 2, 1),
    **{f"mma_{pair}": ("i32", 4, 4, 2) for pair in _BYTES},
    **{f"mma_{pair}_half": ("i32", 2, 1, 1) for pair in _BYTES},
}

# What a Warp statement takes: per place the scope, dtypes and elements, and the number of values; the first place is written.
WARP_OPS: Final[dict[str, tuple[tuple[tuple[str, tuple[str, ...], int], ...], int]]] = {
    "copy_async": ((("shared", (), 1), ("global", (), 1)), 1),
    "commit_async": ((), 0),
    "wait_async": ((), 1),
    "load_matrix": ((("register", ("i32",), 4), ("shared", (), 1)), 0),
    "load_matrix_trans": ((("register", ("i32",), 4), ("shared", ("bf16", "f16"), 1)), 0),
    **{f"load_bits_{n}": ((("register", ("i32",), max(1, n // 4)), ("global", (), 1)), 1) for n in (1, 2, 4, 8, 16)},
    "store_bits_16": ((("shared", (), 1), ("register", ("i32",), 4)), 0),
    **dict.fromkeys(("exp2_near", "larger"), ((("register", ("f32",), 1), ("register", ("f32",), 1)), 0)),
    **dict.fromkeys(("pack_bf16", "pack_f16"), ((("register", ("i32",), 1), ("register", ("f32",), 2)), 0)),
    **{
        name: ((("register", (sums,), c), ("register", ("i32",), a), ("register", ("i32",), b)), 0)
        for name, (sums, c, a, b) in MMA.items()
    },
}


def vector_variable(name: str, dtype: DType, lanes: int) -> Expr:
    """A variable that a Let binds to a value with `lanes` lanes."""
    return Expr("var", (), dtype, lanes, name)


def statements(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement under a block, outer ones first."""
    stack = list(reversed(body))
    while stack:
        s = stack.pop()
        yield s
        if isinstance(s, For):
            stack += reversed(s.body)
        elif isinstance(s, If):
            stack += reversed(s.then + s.otherwise)


def expressions(s: Stmt) -> tuple[Expr, ...]:
    """The expressions a statement itself evaluates (not those of statements inside it)."""
    match s:
        case For():
            return (s.start, s.stop)
        case Store():
            return (*s.index, s.value) + (() if s.mask is None else (s.mask,))
        case Let():
            return (s.value,)
        case Prefetch():
            return s.index
        case If():
            return (s.condition,)
        case Warp():
            return (*(i for _, index in s.places for i in index), *s.values)
        case Call():
            return tuple(offset for _, offset in s.views) + s.scalars
    return ()
