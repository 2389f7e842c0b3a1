"""What the code generator hands to the runtime: machine code and the table of buffers it works on.

Entry point:  int32_t NAME_run(void *const *buffers, const int64_t *dims, Context *context)

`buffers` holds the addresses of, in this order: every input, every output, every constant, the arena. The entry runs
the kernels in order and returns 0 (in a bounds-checked program: 1 + the number of the first access found out of range).
`Context` is (all fields 64 bits):

    0  threads       how many threads a parallel region may use (>= 1)
    1  ticks         address of int64[len(kernels) + 1] to write nanosecond timestamps to, or 0
    2  fork          address of  void fork(void (*body)(void *), void *data, int threads, int flags)  (GOMP_parallel) that
                     runs body(data) once on each of `threads` threads, the caller among them, and returns when all are
                     done; flags is 0. Never called where threads is 1
    3  clock         address of libc's  int clock_gettime(int id, struct timespec *); called only where ticks is not 0
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from .memory import ArenaUse
from .target import Target
from .types import TensorType


@dataclass(frozen=True)
class Argument:
    """An input or output: its name, type and (inputs) role."""

    name: str
    type: TensorType
    role: str = "data"


@dataclass(frozen=True)
class KernelInfo:
    """What one kernel of the program costs. `flops` counts arithmetic, `bytes` counts what must be read and written once.

    `nodes` are the graph ops it stands for; `parallel` says whether it has a parallel region; `note` why it looks as it does.
    `weights` are the inputs that it reads which are no data: parameters, state, and what was prepared from them.
    """

    name: str
    flops: int
    bytes: int
    nodes: tuple[str, ...] = ()
    parallel: bool = False
    note: str = ""
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """One compiled graph. `texts` maps stage names ('loops', 'llvm', 'asm') to their text.

    `aliases` are (output, input) pairs that share a buffer: the runtime passes the input's address for the output.
    `output_align` are (output, bytes): what the address of an output must be a multiple of (an element's size, for others).
    `places` are offsets in the arena whose addresses follow the arena's own in `buffers` (a program for every size has them).
    `arena_bytes` is all the memory a run needs besides arguments and constants; `align` its alignment; `use` says what fills it.
    """

    name: str
    target: Target
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    constants: tuple[np.ndarray[Any, Any], ...]
    arena_bytes: int
    kernels: tuple[KernelInfo, ...]
    object_code: bytes
    aliases: tuple[tuple[int, int], ...] = ()
    align: int = 64
    output_align: tuple[tuple[int, int], ...] = ()
    use: ArenaUse = field(default_factory=ArenaUse)
    places: tuple[int, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def entry(self) -> str:
        return f"{self.name}_run"


_SEVERAL: Final = b"TWOBJS01"


def joined(objects: Sequence[bytes]) -> bytes:
    """Several object files as one string of bytes; a single one as it is."""
    if len(objects) == 1:
        return objects[0]
    return _SEVERAL + struct.pack(f"<I{len(objects)}Q", len(objects), *map(len, objects)) + b"".join(objects)


def objects_of(code: bytes) -> list[bytes]:
    """The object files in `object_code`. Raises ValueError where their sizes contradict it."""
    if not code.startswith(_SEVERAL):
        return [code]
    try:
        (count,) = struct.unpack_from("<I", code, len(_SEVERAL))
        sizes = struct.unpack_from(f"<{count}Q", code, len(_SEVERAL) + 4) if count < 256 else ()
    except struct.error as error:
        raise ValueError(f"the table of objects is cut off: {error}") from error
    at = len(_SEVERAL) + 4 + 8 * count
    if not sizes or at + sum(sizes) != len(code):
        raise ValueError(f"{count} objects of {sum(sizes)} bytes do not make {len(code)}")
    found = []
    for size in sizes:
        found.append(code[at : at + size])
        at += size
    return found


CALL_PATH: Final = "tw_call"  # the function of the direct call path
DIGEST: Final = "tw_digest"  # the function that makes a keyed digest of memory (codegen/llvm/digest.py)
DIGEST_BLOCK: Final = 4096  # bytes of which it makes one result
DIGEST_PASSES: Final = 4  # words of 64 bits in a result
DIGEST_STEP: Final = 64  # bytes by which the key moves on from one word to the next
PLACEMENT: Final = "tw_placement"  # the function that gives the fork which keeps workers off the caller's core
PLACEMENT_CALLS: Final = (
    "GOMP_parallel",
    "omp_get_thread_num",
    "sched_getcpu",
    "sched_setaffinity",
    "sched_getaffinity",
    "gettid",
)


class CallTable:
    """The words (64 bits each) that the direct call path reads of one program: see `codegen/llvm/callpath.py`.

    `WORDS` come first: whether a call is running, the number of arguments, what the address of an output must be a multiple
    of less one, and addresses (of the ndarray type, None, what marks a given output, functions, buffers, Context). At RING
    follow our own outputs as pairs of object and address, 0 where there are no more; at ARGUMENTS, STRIDE words each, the
    arguments and the output: dtype object, rank, place in `buffers`, bytes, dimensions.
    """

    WORDS: Final = (
        *("busy", "n", "alignment", "ndarray", "nothing", "sentinel"),
        *("incref", "decref", "save", "restore", "run", "frame", "context"),
    )
    RING: Final = 16
    RING_SIZE: Final = 4
    ARGUMENTS: Final = 24
    STRIDE: Final = 12
    MAX_RANK: Final = STRIDE - 4
