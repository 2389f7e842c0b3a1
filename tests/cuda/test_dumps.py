"""Texts of CUDA programs: lines of the loop IR in the PTX and in the interpreter's messages, SASS, folders of dumps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.loop_parse import parse_kernel
from tensorwright.codegen.loop_text import numbered_kernel, print_kernel
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.errors import KernelFaultError, RuntimeUnavailableError
from tensorwright.runtime.cuda import tools
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator

pytestmark = pytest.mark.unvalidated("the passes are those of other tests: this is about text")


def program(fn: Any, *shapes: tuple[int, ...]) -> CudaProgram:
    made = tw.compile(fn, *(tw.spec(*s) for s in shapes), target="cuda-sm_80").compiled.run
    assert isinstance(made, CudaProgram)
    return made


def fault(broken: CudaProgram, *shapes: tuple[int, ...]) -> str:
    """The message of the fault that a broken program runs into."""
    binding = CudaBinding(broken, {}, DeviceStore(Emulator(1 << 22)))
    with pytest.raises(KernelFaultError) as caught:
        binding.run([np.ones(s, np.float32) for s in shapes])
    return str(caught.value)


def line_of(made: CudaProgram, message: str) -> str:
    """The line of the kernel's loop IR that a message names."""
    found = re.search(r"\((\w+)\.loops:(\d+)\)", message)
    assert found, message
    (kernel,) = (k for k in made.kernels if k.name == found[1])
    return kernel.source.splitlines()[int(found[2]) - 1].strip()


def test_a_store_out_of_bounds_names_its_line_of_loop_ir() -> None:
    made = program(tw.relu, (512,))
    broken = re.sub(r"(st\.global\S*\s+\[%rd\d+)\]", r"\1+16]", made.ptx, count=1)
    assert broken != made.ptx
    message = fault(replace(made, ptx=broken), (512,))
    assert message.startswith("out of bounds: kernel ")
    line = line_of(made, message)
    assert line.startswith("store y0[")
    assert message.endswith(line)


def test_a_barrier_that_is_missing_names_the_lines_that_race() -> None:
    made = program(lambda a, b: a @ b, (40, 40), (40, 40))
    barriers = [m.span() for m in re.finditer(r"\tbar\.sync\s+0;\n|\tbarrier\.\S+\s+0;\n", made.ptx)]
    assert barriers
    start, end = barriers[0]
    message = fault(replace(made, ptx=made.ptx[:start] + made.ptx[end:]), (40, 40), (40, 40))
    assert message.startswith(("race", "uninitialised read")), message
    assert "_shared[" in line_of(made, message)


def test_an_instruction_of_no_line_claims_none() -> None:
    from tensorwright.runtime.cuda.ptx_parse import parse_ptx

    made = program(lambda a, b: a @ b, (40, 40), (40, 40))
    code = next(iter(parse_ptx(made.ptx).kernels.values())).code
    lines = made.ptx.splitlines()
    for i in code:
        before = next(x for x in reversed(lines[: i.line]) if ".loc" in x)
        number = before.split()[2]
        assert i.source == ("" if number == "0" else f"{made.kernels[0].name}.loops:{number}")
    assert sum(bool(i.source) for i in code) > 0.7 * len(code)


def test_line_numbers_are_those_of_the_text() -> None:
    made = program(lambda x: tw.softmax(x, axis=-1), (5, 300))
    kernel = parse_kernel(made.kernels[0].source)
    text, numbers = numbered_kernel(kernel)
    assert text == print_kernel(kernel) == made.kernels[0].source
    from tensorwright.codegen.loop_ir import For, Store, statements

    lines = text.splitlines()
    for s in statements(kernel.body):
        line = lines[numbers[id(s)] - 1].strip()
        if isinstance(s, For):
            assert line.startswith(f"for {s.var.attr} in ")
        elif isinstance(s, Store):
            assert line.startswith(f"store {s.buffer.name}[")


def test_a_branch_after_a_store_reads_back() -> None:
    text = (
        "kernel k(x: f32[4], y: f32[4]) {\n  for t in 0 .. 4 serial {\n    store y[t] = x[t]\n"
        "    if t < 2 {\n      store y[t] = 1.0:f32\n    }\n    store y[t] = x[t] if t < 3\n  }\n}"
    )
    assert print_kernel(parse_kernel(text)) == text


def test_sass_is_shown_where_the_tools_are_and_else_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exe = tw.compile(tw.relu, tw.spec(64), target="cuda-sm_80")
    assert exe.stages[-4:] == ("loops", "llvm", "ptx", "sass")
    real = tools.find
    monkeypatch.setattr(tools, "find", lambda name: None if name == "nvdisasm" else real(name))
    with pytest.raises(
        RuntimeUnavailableError, match=r"nvdisasm is not installed: pip install nvidia-cuda-nvdisasm, or set CUDA_HOME"
    ):
        exe.text("sass")
    # a disassembler that only says what it was given
    stand_in = tmp_path / "nvdisasm"
    stand_in.write_text('#!/bin/sh\nhead -c 4 "$2" | tail -c 3\necho " $1"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(tools, "find", lambda name: stand_in if name == "nvdisasm" else real(name))
    assert exe.text("sass") == "ELF -c\n"  # the cubin that ptxas made
    monkeypatch.setattr(tools, "find", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match="pip install nvidia-cuda-nvdisasm"):
        exe.text("sass")


def test_the_real_disassembler_shows_tensor_cores_and_copies() -> None:
    exe = tw.compile(lambda a, b: a @ b, tw.spec(128, 64), tw.spec(64, 128), target="cuda-sm_80", precision="bf16")
    text = exe.text("sass")
    assert "HMMA" in text
    assert "LDGSTS" in text
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"


def test_dumps_are_written(tmp_path: Path) -> None:
    tw.compile(tw.relu, tw.spec(64), target="cuda-sm_90", dump=tmp_path, name="net")
    names = [p.name for p in sorted((tmp_path / "net").iterdir())]
    assert [n.split("_", 1)[1] for n in names[-3:]] == ["loops.txt", "llvm.txt", "ptx.txt"]
    assert ".target sm_90" in (tmp_path / "net" / names[-1]).read_text()


def test_programs_come_from_the_cache_with_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWRIGHT_CACHE", str(tmp_path / "cache"))
    layer = tw.nn.Linear(9, 4)
    first, again = (tw.compile(layer, tw.spec(3, 9), target="cuda-emulator") for _ in range(2))
    assert not first.compiled.from_cache
    assert again.compiled.from_cache
    assert again.stages == first.stages
    for stage in ("graph", "fuse", "loops", "llvm", "ptx"):
        assert again.text(stage) == first.text(stage)
    x = np.random.default_rng(0).standard_normal((3, 9)).astype("f4")
    np.testing.assert_array_equal(again(x), first(x))
    assert again.memory.total == first.memory.total
    other = tw.compile(layer, tw.spec(3, 9), target="cuda-sm_75")
    assert not other.compiled.from_cache
    for path in (tmp_path / "cache").glob("??/*.twc"):  # damaged: a miss
        path.write_bytes(path.read_bytes()[:-3])
    assert not tw.compile(layer, tw.spec(3, 9), target="cuda-emulator").compiled.from_cache
