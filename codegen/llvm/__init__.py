"""The LLVM emitter for CPU targets: loop IR in, machine code out. The only place where LLVM text exists."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ...ir.program import joined
from ...ir.target import Target
from ..loop_ir import Module
from ..plan import EntryPlan
from .compile import assembly, data_layout, object_code
from .entry import module_text
from .workers import Workers

__all__ = ["Emitted", "Workers", "begin_emit", "emit"]


@dataclass(frozen=True)
class Emitted:
    """`llvm` is the text before LLVM's passes. A checked program that returns n > 0 broke `checks[n - 1]`."""

    llvm: str
    object_code: bytes
    checks: tuple[str, ...]
    target: Target

    @cached_property
    def asm(self) -> str:
        """The assembly, generated anew when it is first asked for."""
        return assembly(self.llvm, self.target)


def emit(module: Module, entry: EntryPlan, target: Target, *, checked: bool = False) -> Emitted:
    """Machine code for a module and its entry point `NAME_run` (see ir/program.py for how to call it).

    With `checked`, each load and store compares its index with the buffer's shape; one that is out of range does not touch
    memory (a load gives 0) and makes the run return its number. Raises CompileError for loop IR that breaks its rules.
    """
    text, checks = module_text(module, entry, target, data_layout(target), checked)
    return Emitted(text, object_code(text, target), checks, target)


def begin_emit(
    module: Module, entry: EntryPlan, target: Target, *, checked: bool = False, workers: Workers | None = None, most: int = 1
) -> Callable[[], Emitted]:
    """As `emit`, with LLVM at work in a thread of its own (it needs no interpreter lock), or in `workers`, in `most` pieces at
    most; the result waits for it."""
    text, checks = module_text(module, entry, target, data_layout(target), checked)
    if workers is not None:
        objects = workers.begin(text, f"{entry.name}_run", target, most)
        return lambda: Emitted(text, joined(objects()), checks, target)
    result: list[Emitted | BaseException] = []

    def work() -> None:
        try:
            result.append(Emitted(text, object_code(text, target), checks, target))
        except BaseException as error:  # raised where the result is waited for
            result.append(error)

    thread = threading.Thread(target=work, name="tensorwright-llvm", daemon=True)
    thread.start()

    def wait() -> Emitted:
        thread.join()
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    return wait
