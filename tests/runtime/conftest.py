"""Programs made by hand from LLVM text, so that the runtime is tested without the compiler in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import pytest
from tensorwright.ir.program import Argument, KernelInfo, Program
from tensorwright.ir.types import tensor
from tensorwright.runtime import host

# y[i] = x[i] + 1 for all i; the arena's first float counts the runs of a frame
ADD_ONE = """
target triple = "x86_64-unknown-linux-gnu"
define i32 @NAME_run(ptr %b, ptr %d, ptr %ctx) {
entry:
  %x = load ptr, ptr %b
  %yp = getelementptr ptr, ptr %b, i64 1
  %y = load ptr, ptr %yp
  %none = icmp eq i64 COUNT, 0
  br i1 %none, label %done, label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %xi = getelementptr float, ptr %x, i64 %i
  %yi = getelementptr float, ptr %y, i64 %i
  %v = load float, ptr %xi, align 4
  %w = fadd float %v, 1.0
  store float %w, ptr %yi, align 4
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, COUNT
  br i1 %more, label %loop, label %done
done:
  ret i32 0
}
"""


@pytest.fixture(scope="session")
def assemble() -> Callable[[str], bytes]:
    """LLVM text -> object code for this machine (or another triple)."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()

    def run(text: str, triple: str = "x86_64-unknown-linux-gnu", cpu: str = "") -> bytes:
        module = llvm.parse_assembly(text.replace("x86_64-unknown-linux-gnu", triple))
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=1)
        return bytes(machine.emit_object(module))

    return run


@pytest.fixture
def add_one(assemble: Callable[[str], bytes]) -> Callable[..., Program]:
    """A Program that adds 1 to an f32 array of a shape."""

    def make(shape: tuple[int, ...] = (2, 3), name: str = "main", **more: Any) -> Program:
        count = 1
        for n in shape:
            count *= n
        code = assemble(ADD_ONE.replace("NAME", name).replace("COUNT", str(count)))
        kernels = (KernelInfo("add_one", count, 8 * count, ("add",)),)
        x, y = Argument("x", tensor("f32", shape)), Argument("y", tensor("f32", shape))
        return Program(name, host.host(), (x,), (y,), (), 64, kernels, code, **more)

    return make
