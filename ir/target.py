"""What code is generated for: an ISA row of registers and caches. Rows are data; the host is one of them, detected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from .errors import CompileError


@dataclass(frozen=True, slots=True)
class Target:
    """One machine: `name` is the row, `triple`, `cpu` and `features` are LLVM's, sizes are in bytes.

    vector_bits    widest vector register used          registers     how many of them
    fma            whether a fused multiply-add is one instruction (else it is emulated: slow but to the bit)
    bf16           whether products of bf16 are added to an f32 in one instruction (AVX512_BF16, tensor cores)
    vnni           whether four products of u8 and i8 are added to an i32 in one instruction (AVX512_VNNI, or AVX-VNNI)
    l1, l2, l3     data cache a core can use            l1_ways       associativity of L1
    sm             compute capability of a CUDA device (80 for 8.0), 0 for a processor
    """

    name: str
    triple: str
    cpu: str
    features: str
    vector_bits: int
    registers: int
    fma: bool
    l1: int = 32 * 1024
    l1_ways: int = 8
    l2: int = 1024 * 1024
    l3: int = 32 * 1024 * 1024
    line: int = 64
    bf16: bool = False
    vnni: bool = False
    sm: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether code is PTX for a CUDA device, and not for a processor."""
        return self.sm > 0

    def lanes(self, bits: int) -> int:
        """Elements of `bits` bits in one register."""
        return self.vector_bits // bits


_X86: Final = "x86_64-unknown-linux-gnu"
ROWS: Final[dict[str, Target]] = {
    t.name: t
    for t in (
        Target("x86-64-v2", _X86, "x86-64-v2", "", 128, 16, fma=False),
        Target("x86-64-v3", _X86, "x86-64-v3", "", 256, 16, fma=True),
        Target("x86-64-v4", _X86, "x86-64-v4", "-prefer-256-bit", 512, 32, fma=True),
        Target("aarch64-neon", "aarch64-unknown-linux-gnu", "generic", "+neon", 128, 32, fma=True),
    )
}


_NVPTX: Final = "nvptx64-nvidia-cuda"
# PTX 6.5 has the matrix instructions of sm_75 (a driver of CUDA 10.2 takes it); newer rows begin at a newer PTX by themselves.
# A thread's widest access is 16 bytes; `registers` are those a thread may have before it spills.
CUDA_ROWS: Final[dict[str, Target]] = {
    t.name: t
    for t in (
        Target("cuda-sm_75", _NVPTX, "sm_75", "+ptx65", 128, 255, fma=True, l2=4 << 20, l3=4 << 20, line=128, sm=75),
        Target("cuda-sm_80", _NVPTX, "sm_80", "", 128, 255, fma=True, l2=40 << 20, l3=40 << 20, line=128, bf16=True, sm=80),
        Target("cuda-sm_90", _NVPTX, "sm_90", "", 128, 255, fma=True, l2=50 << 20, l3=50 << 20, line=128, bf16=True, sm=90),
    )
}


def row(name: str) -> Target:
    """The target row called `name`, of processors or CUDA devices. Raises CompileError with the names there are."""
    found = ROWS.get(name) or CUDA_ROWS.get(name)
    if found is None:
        raise CompileError(f"unknown target {name!r}; expected 'host' or one of {', '.join([*ROWS, *CUDA_ROWS])}")
    return found


def with_bf16(target: Target) -> Target:
    """The row x86-64-v4 of a machine that has AVX512_BF16 besides."""
    return replace(target, features=f"{target.features},+avx512bf16", bf16=True)


def with_vnni(target: Target) -> Target:
    """The row x86-64-v4 of a machine that has AVX512_VNNI besides, or x86-64-v3 of one that has AVX-VNNI."""
    more = "+avx512vnni" if target.vector_bits == 512 else "+avxvnni"
    return replace(target, features=",".join(filter(None, (target.features, more))), vnni=True)


def with_caches(target: Target, *, l1: int, l2: int, l3: int) -> Target:
    """The row with cache sizes measured or detected on a machine."""
    return replace(target, l1=l1, l2=l2, l3=l3)
