"""LLVM text to PTX by llvmlite. The table of machine.py has been asked by then: nothing here makes LLVM end the process."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from ...ir.errors import CompileError
from ...ir.target import Target

# labels and a section that debuggers read, which `.loc` does not need
_DEBUG: Final = re.compile(r"^(\$L__(tmp|func_begin|func_end)\d+:|\t\.section\t\.debug_macinfo\t\{\t\})\n", re.M)


@lru_cache(maxsize=8)
def _machine(triple: str, cpu: str, features: str) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        found = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        raise CompileError(f"this LLVM cannot generate code for {triple}: {error}") from None
    return found.create_target_machine(cpu=cpu, features=features, opt=3)


def data_layout(target: Target) -> str:
    return str(_machine(target.triple, target.cpu, target.features).target_data)


def ptx(text: str, target: Target) -> str:
    """The PTX of a module's text. Raises CompileError for text that LLVM refuses."""
    import llvmlite.binding as llvm

    machine = _machine(target.triple, target.cpu, target.features)
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise CompileError(f"LLVM refused the generated text (a bug in the emitter): {error}") from None
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return _DEBUG.sub("", str(machine.emit_assembly(module)))
