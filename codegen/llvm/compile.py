"""LLVM text to machine code, through llvmlite."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm

from ...ir.errors import CompileError
from ...ir.target import Target

_ready = threading.Event()
_lock = threading.Lock()


def _initialize() -> None:
    with _lock:
        if not _ready.is_set():
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            _ready.set()


@lru_cache(maxsize=16)
def target_machine(target: Target) -> Any:
    """llvmlite's TargetMachine for a row. Raises CompileError if this LLVM was built without the architecture."""
    _initialize()
    try:
        found = llvm.Target.from_triple(target.triple)
    except RuntimeError as error:
        raise CompileError(f"this LLVM cannot generate code for {target.triple}: {error}") from None
    return found.create_target_machine(cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="small")


@lru_cache(maxsize=16)
def data_layout(target: Target) -> str:
    return str(target_machine(target).target_data)


# The emitter's text is in SSA form with common subexpressions shared, registers promoted and loops rotated: of LLVM's
# pipelines, inlining and local simplification are all that changes its machine code. The full O1 gave the same loops
# at eight times the cost of these passes; contraction, vectorising and unrolling must not happen here.
_PASSES = ("always_inliner", "instruction_combine", "simplify_cfg", "global_dead_code_eliminate")


def optimised(text: str, target: Target) -> Any:
    """The parsed module after LLVM's own passes. Raises CompileError for text that LLVM refuses."""
    machine = target_machine(target)
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise CompileError(f"LLVM refused the generated text (a bug in the emitter): {error}") from None
    passes = llvm.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1)))
    return module


def object_code(text: str, target: Target) -> bytes:
    return bytes(target_machine(target).emit_object(optimised(text, target)))


def assembly(text: str, target: Target) -> str:
    return str(target_machine(target).emit_assembly(optimised(text, target)))
