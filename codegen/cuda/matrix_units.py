"""The products of tensor cores: which instruction an SM has for which operands.

A unit adds to a tile of sums, m x 8, the product of a tile of A and one of B, 16 or 32 bytes long along the reduction. Counted
in bytes all of them are alike: `ldmatrix` brings matrices of 8 rows of 16 bytes, of which lane l gets bytes 4 (l % 4) to
4 (l % 4) + 3 of row l // 4, and registers of A hold, chunk of 16 bytes by chunk, the rows 0 to 7 and 8 to 15 (PTX ISA, "Matrix
Fragments for mma").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...ir.dtypes import DType, bf16, f16, f32, i8, u8
from ...ir.target import Target
from ..loop_ir import MMA

CHUNK: Final = 16  # bytes of a row of an 8x8 matrix, and of the widest access


@dataclass(frozen=True, slots=True)
class Unit:
    """One instruction. op: its Warp statement; m: rows of its sums; chunks: 16 bytes along the reduction, how many of them;
    sums, a, b: registers of a lane; least: the first SM that has it; halves: whether LLVM takes A and B as pairs of f16."""

    op: str
    intrinsic: str
    m: int
    chunks: int
    least: int
    halves: bool = False

    @property
    def sums(self) -> int:
        return MMA[self.op][1]

    @property
    def a(self) -> int:
        return MMA[self.op][2]

    @property
    def b(self) -> int:
        return MMA[self.op][3]


_SIGN: Final = {"i8": "s8", "u8": "u8"}


def _of_bytes(pair: str) -> tuple[Unit, Unit]:
    """m16n8k32 for sm_80 and newer, m8n8k16 before it."""
    left, right = (_SIGN[x] for x in pair.split("_"))
    kinds = left if left == right else f"{left}.{right}"
    large = Unit(f"mma_{pair}", f"llvm.nvvm.mma.m16n8k32.row.col.{kinds}", 16, 2, 80)
    return large, Unit(f"mma_{pair}_half", f"llvm.nvvm.mma.m8n8k16.row.col.{kinds}", 8, 1, 75)


UNITS: Final[dict[str, Unit]] = {
    u.op: u
    for u in (
        Unit("mma_bf16", "llvm.nvvm.mma.m16n8k16.row.col.bf16", 16, 2, 80),
        Unit("mma_f16", "llvm.nvvm.mma.m16n8k16.row.col.f32.f32", 16, 2, 80, halves=True),
        Unit("mma_f16_half", "llvm.nvvm.mma.m16n8k8.row.col.f32.f32", 16, 1, 75, halves=True),
        Unit("mma_tf32", "llvm.nvvm.mma.m16n8k8.row.col.tf32", 16, 2, 80),
        *(u for pair in ("i8_i8", "i8_u8", "u8_i8", "u8_u8") for u in _of_bytes(pair)),
    )
}


def unit_for(a: DType, b: DType, target: Target, tf32: bool) -> Unit | None:
    """The widest unit that an SM has for operands of these dtypes, of f32 only where they are tf32 numbers; or None."""
    if a in (i8, u8) and b in (i8, u8):
        names = [f"mma_{a}_{b}", f"mma_{a}_{b}_half"]
    elif a is not b:
        return None
    elif a is f32:
        names = ["mma_tf32"] if tf32 else []
    elif a in (bf16, f16):
        names = [f"mma_{a}", f"mma_{a}_half"]
    else:
        names = []
    return next((u for name in names if (u := UNITS.get(name)) is not None and u.least <= target.sm), None)


__all__ = ["CHUNK", "UNITS", "Unit", "unit_for"]
