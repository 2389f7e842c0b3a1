from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
from tensorwright.ir.errors import CompileError
from tensorwright.runtime import elf, host, native
from tensorwright.runtime.native import NativeProgram

SCALE = """
target triple = "x86_64-unknown-linux-gnu"
define i32 @main_run(ptr %b, ptr %d, ptr %ctx) {
  %p = load ptr, ptr %b
  %v = load float, ptr %p
  %w = fmul float %v, FACTOR
  store float %w, ptr %p
  ret i32 0
}
"""
CALLS = """
target triple = "x86_64-unknown-linux-gnu"
declare float @NAME(float, float, float)
define i32 @main_run(ptr %b, ptr %d, ptr %ctx) {
  %p = load ptr, ptr %b
  %v = load float, ptr %p
  %w = call float @NAME(float %v, float %v, float 1.0)
  store float %w, ptr %p
  ret i32 0
}
"""


def run(program: NativeProgram, value: float) -> float:
    x = np.array([value], np.float32)
    table = (ctypes.c_void_p * 1)(x.ctypes.data)
    assert program.run(ctypes.addressof(table), None, None) == 0
    return float(x[0])


def test_programs_with_equal_names_live_side_by_side(assemble):
    two = NativeProgram(assemble(SCALE.replace("FACTOR", "2.0")), "main_run")
    three = NativeProgram(assemble(SCALE.replace("FACTOR", "3.0")), "main_run")
    assert (run(two, 5), run(three, 5)) == (10, 15)
    del two
    assert run(three, 5) == 15


def test_an_allowed_symbol_is_found(assemble):
    assert run(NativeProgram(assemble(CALLS.replace("NAME", "fmaf")), "main_run"), 3) == 10


def test_a_symbol_that_is_not_allowed_is_an_error_that_names_it(assemble):
    with pytest.raises(CompileError, match="calls \\['system'\\], but may call only"):
        NativeProgram(assemble(CALLS.replace("NAME", "system")), "main_run")


def test_a_missing_entry_is_an_error(assemble):
    with pytest.raises(CompileError, match=r"no function 'other_run'; it defines \['main_run'\]"):
        NativeProgram(assemble(SCALE.replace("FACTOR", "2.0")), "other_run")


def test_an_object_for_another_machine_is_an_error(assemble):
    code = assemble(SCALE.replace("FACTOR", "2.0"), "aarch64-unknown-linux-gnu")
    assert elf.symbols(code).machine == "aarch64"
    with pytest.raises(CompileError, match="object code for aarch64 cannot run"):
        NativeProgram(code, "main_run")


def test_reading_damaged_objects_ends_in_our_error_or_in_the_same_symbols(assemble):
    code = assemble(CALLS.replace("NAME", "fmaf"))
    whole = elf.symbols(code)
    assert whole.undefined == {"fmaf"} and whole.defined == {"main_run"}
    rng = random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(code)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            elf.symbols(bytes(damaged))
        except CompileError:
            refused += 1
    assert refused > 80


def test_the_host_is_a_row_that_it_can_run():
    found = host.host()
    assert found.name == host.runnable_rows()[-1]
    assert found.l1 >= 8 * 1024 and found.l2 >= found.l1
    host.check_runnable(found)


def test_a_row_of_another_family_cannot_run_and_the_error_says_what_is_lacking():
    other = "aarch64-neon" if host.machine() == "x86_64" else "x86-64-v3"
    with pytest.raises(CompileError, match=f"code for {other} cannot run on this machine.*it lacks"):
        host.check_runnable(host.resolve(other))


def test_versions_are_part_of_what_the_cache_key_gets():
    assert "llvmlite 0." in native.llvm_version() and "LLVM" in native.llvm_version()
