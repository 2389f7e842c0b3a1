"""The machine we run on, as a target row: its instruction set by LLVM's feature names, its caches from /sys."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Final

from ..ir.errors import CompileError
from ..ir.target import ROWS, Target, row, with_bf16, with_caches, with_vnni

# LLVM feature names that a row's code may use; the x86-64 levels as the System V ABI defines them.
_V2: Final = ("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3: Final = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4: Final = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
BF16: Final = "avx512bf16"
VNNI: Final = {"x86-64-v4": "avx512vnni", "x86-64-v3": "avxvnni"}
NEEDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "x86-64-v2": ("x86_64", _V2),
    "x86-64-v3": ("x86_64", _V3),
    "x86-64-v4": ("x86_64", _V4),
    "aarch64-neon": ("aarch64", ("neon",)),
}


def machine() -> str:
    """The architecture, named as in a target triple."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@functools.cache
def _features() -> tuple[str, frozenset[str]]:
    from .native import host_features

    cpu, features = host_features()
    return cpu, frozenset(name for name, there in features.items() if there)


def cpu_name() -> str:
    """LLVM's name of the processor ('znver4')."""
    return _features()[0]


def missing_features(name: str) -> tuple[str, ...]:
    """What this machine lacks to run code of a target row; empty when it can."""
    architecture, needed = NEEDS[name]
    if architecture != machine():
        return (architecture,)
    if architecture == "aarch64":
        return ()  # every 64-bit ARM core has NEON
    have = _features()[1]
    return tuple(f for f in needed if f not in have)


def runnable_rows() -> tuple[str, ...]:
    """The target rows that this machine can run, the best last."""
    return tuple(name for name in ROWS if name in NEEDS and not missing_features(name))


@functools.cache
def caches() -> dict[str, int]:
    """Bytes of the data caches one core can use: l1, l2, l3, and l1_ways, where the system tells."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
            if kind == "Instruction" or level not in "123":
                continue
            unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(size[-1])
            found[f"l{level}"] = int(size[:-1]) * unit if unit else int(size)
            if level == "1":
                found["l1_ways"] = int((folder / "ways_of_associativity").read_text())
        except (OSError, ValueError):
            continue  # a field this kernel does not have: the row's default stands
    return found


@functools.cache
def host() -> Target:
    """The best row this machine runs, with its cache sizes, and AVX512_BF16 and VNNI if it has them.

    Raises CompileError on a machine that no row fits.
    """
    rows = runnable_rows()
    if not rows:
        raise CompileError(f"no target row runs on this {machine()} machine; the rows are {', '.join(ROWS)}")
    best, sizes = row(rows[-1]), caches()
    if best.name == "x86-64-v4" and BF16 in _features()[1]:
        best = with_bf16(best)
    if VNNI.get(best.name) in _features()[1]:
        best = with_vnni(best)
    return with_caches(best, l1=sizes.get("l1", best.l1), l2=sizes.get("l2", best.l2), l3=sizes.get("l3", best.l3))


def resolve(target: str | Target) -> Target:
    """The Target for 'host', a row's name, or a Target itself. A row of this machine's family gets its cache sizes."""
    if isinstance(target, Target):
        return target
    if target == "host":
        return host()
    chosen, sizes = row(target), caches()
    if chosen.is_cuda or NEEDS[target][0] != machine() or not sizes:
        return chosen
    return with_caches(chosen, l1=sizes.get("l1", chosen.l1), l2=sizes.get("l2", chosen.l2), l3=sizes.get("l3", chosen.l3))


def check_runnable(target: Target) -> None:
    """Raises CompileError when code for `target` would not run here."""
    missing = missing_features(target.name) if target.name in NEEDS else ("an unknown row",)
    if target.bf16 and not missing and BF16 not in _features()[1]:
        missing = (BF16,)
    if target.vnni and not missing and VNNI[target.name] not in _features()[1]:
        missing = (VNNI[target.name],)
    if missing:
        raise CompileError(
            f"code for {target.name} cannot run on this machine ({machine()}, {cpu_name()}): it lacks {', '.join(missing)}; "
            f"targets that run here: {', '.join(runnable_rows())}"
        )
