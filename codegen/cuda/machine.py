"""What each SM has and what a kernel may ask of it: a table, asked before LLVM is, because LLVM ends the process where an
instruction is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...ir.errors import CompileError
from ...ir.target import Target

WARP: Final = 32
STATIC_SHARED: Final = 48 * 1024  # bytes of shared memory that a block may declare
MOST_THREADS: Final = 1024  # of a block


@dataclass(frozen=True, slots=True)
class SM:
    """A streaming multiprocessor: registers (32 bits each) and shared bytes, and most threads and blocks resident at once."""

    registers: int
    shared: int
    threads: int
    blocks: int
    multiprocessors: int  # of the usual card of its kind: what a grid should fill


SMS: Final[dict[int, SM]] = {
    75: SM(65536, 64 * 1024, 1024, 16, 40),
    80: SM(65536, 164 * 1024, 2048, 32, 108),
    90: SM(65536, 228 * 1024, 2048, 32, 132),
}

# The least SM that has an instruction, by the prefix of LLVM's name for it.
NEEDS: Final[dict[str, int]] = {
    "llvm.nvvm.cp.async": 80,
    "llvm.nvvm.redux.sync": 80,
    "llvm.nvvm.ldmatrix": 75,
    "llvm.nvvm.mma.m16n8k16": 80,
    "llvm.nvvm.mma.m16n8k8.row.col.tf32": 80,
    "llvm.nvvm.mma.m16n8k8.row.col.bf16": 80,
    "llvm.nvvm.mma.m16n8k8.row.col.f32.f32": 75,
    "llvm.nvvm.mma.m16n8k8.row.col.f16.f16": 75,
    "llvm.nvvm.mma.m16n8k32": 80,
    "llvm.nvvm.mma.m8n8k16": 75,
    "llvm.nvvm.idp4a": 75,
    "llvm.nvvm.idp2a": 75,
    "llvm.nvvm.ex2.approx.ftz.f": 75,
    "llvm.nvvm.ff2bf16x2.rn": 80,
    "llvm.nvvm.ff2f16x2.rn": 80,
    "llvm.nvvm.read.ptx.sreg": 75,
    "llvm.nvvm.shfl.sync": 75,
    "llvm.nvvm.barrier": 75,
    "llvm.nvvm.vote": 75,
}


def sm_of(target: Target) -> SM:
    """The row of a target. Raises CompileError for one that is no CUDA device of the table."""
    found = SMS.get(target.sm)
    if found is None:
        raise CompileError(f"{target.name} is no CUDA device that code is generated for: {', '.join(f'sm_{k}' for k in SMS)}")
    return found


def check(intrinsic: str, target: Target) -> None:
    """Raises CompileError where the SM lacks an instruction, or nothing is known of it."""
    if not intrinsic.startswith("llvm.nvvm."):
        return
    fits = [p for p in NEEDS if intrinsic.startswith(p)]
    if not fits:
        raise CompileError(f"{intrinsic} is not in the table of what SMs have (codegen/cuda/machine.py): add it there first")
    least = NEEDS[max(fits, key=len)]
    if target.sm < least:
        raise CompileError(f"{intrinsic} needs sm_{least}; {target.name} does not have it")


def limits(target: Target, threads: int, registers: int, shared: int) -> tuple[int, float, str]:
    """Blocks resident on a multiprocessor, the share of its threads that these are, and what limits them, all estimated:
    registers (allocated to a warp in units of 256), shared memory (1 KB more a block from sm_80 on), threads or blocks."""
    sm = sm_of(target)
    warps = -(-threads // WARP)
    most = {"threads": sm.threads // (warps * WARP), "blocks": sm.blocks}
    if registers:
        most["registers"] = sm.registers // (-(-registers * WARP // 256) * 256 * warps)
    if shared:
        most["shared memory"] = sm.shared // (shared + (1024 if target.sm >= 80 else 0))
    limited = min(most, key=lambda r: most[r])
    return most[limited], most[limited] * warps * WARP / sm.threads, limited


def occupancy(target: Target, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that are resident: see `limits`."""
    return limits(target, threads, registers, shared)[1]
