"""LLVM text to machine code for a target row, through llvmlite."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ...ir.errors import CompileError
from ...ir.target import Target
from . import machine


def target_machine(target: Target) -> Any:
    """llvmlite's TargetMachine for a row. Raises CompileError if this LLVM was built without the architecture."""
    try:
        return machine.machine(target.triple, target.cpu, target.features)
    except RuntimeError as error:
        raise CompileError(f"this LLVM cannot generate code for {target.triple}: {error}") from None


@lru_cache(maxsize=16)
def data_layout(target: Target) -> str:
    return str(target_machine(target).target_data)


def optimised(text: str, target: Target) -> Any:
    """The parsed module after LLVM's own passes. Raises CompileError for text that LLVM refuses."""
    found = target_machine(target)
    try:
        return machine.optimised(text, found)
    except RuntimeError as error:
        raise CompileError(f"LLVM refused the generated text (a bug in the emitter): {error}") from None


def object_code(text: str, target: Target) -> bytes:
    return bytes(target_machine(target).emit_object(optimised(text, target)))


def assembly(text: str, target: Target) -> str:
    return str(target_machine(target).emit_assembly(optimised(text, target)))
