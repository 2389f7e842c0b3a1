"""Estimates for CUDA targets: static counts against the interpreter's, registers, occupancy, roofline, how they are shown."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli
from tensorwright.codegen.cuda import accesses
from tensorwright.codegen.cuda.accesses import count
from tensorwright.codegen.cuda.grid import BX, TX, launch
from tensorwright.codegen.cuda.machine import limits
from tensorwright.codegen.loop_ir import Alloc, Buffer, For, Kernel, Let, Store
from tensorwright.codegen.loop_parse import parse_kernel
from tensorwright.cuda.estimate import estimate
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import f32, i64
from tensorwright.ir.errors import InputError
from tensorwright.ir.expr import binary, const, load, var
from tensorwright.ir.target import row
from tensorwright.runtime.cuda import tools
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.liveness import live_values
from tensorwright.runtime.cuda.state import Options

R = np.random.default_rng(0)
CASES = {
    "map": (lambda x, b: tw.relu(x * 2.0 + b), [(37, 64), (64,)]),
    "softmax": (lambda x: tw.softmax(x, axis=-1), [(9, 130)]),
    "transposed": (lambda x: tw.transpose(x, (1, 0)) * 1.5, [(64, 40)]),
    "product": (lambda a, b: a @ b, [(70, 50), (50, 90)]),
    "sum": (lambda x: tw.sum(x, axis=0), [(50, 70)]),
}


def compiled(fn: Any, shapes: list[tuple[int, ...]], target: str = "cuda-sm_80") -> CudaProgram:
    made = tw.compile(fn, *(tw.spec(*s) for s in shapes), target=target).compiled.run
    assert isinstance(made, CudaProgram)
    return made


@pytest.mark.unvalidated("its passes are those of other tests")
@pytest.mark.parametrize("case", CASES)
def test_static_counts_are_those_of_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accesses, "_EVERY", 1 << 20)  # every warp
    monkeypatch.setattr(accesses, "_PASSES", (1 << 20,))  # every pass
    fn, shapes = CASES[case]
    program = compiled(fn, shapes)
    device = Emulator(1 << 24, Options(count=True))
    CudaBinding(program, {}, DeviceStore(device)).run([R.standard_normal(s).astype("f4") for s in shapes])
    for k in program.kernels:
        found, real = count(parse_kernel(k.source)), device.counters[k.name][-1]
        assert found.exact
        assert (found.requests, found.bytes) == (real.requests, real.bytes)
        assert found.sectors == real.sectors
        # LLVM may cut an access to shared memory in two where it is masked
        assert found.shared_phases == pytest.approx(real.shared_phases, rel=0.03)
        assert found.shared_cycles == pytest.approx(real.shared_cycles, rel=0.03)


@pytest.mark.unvalidated("its passes are those of other tests")
def test_a_sample_is_near_the_whole() -> None:
    program = compiled(lambda x: tw.softmax(x, axis=-1), [(500, 130)])
    (k,) = program.kernels
    kernel = parse_kernel(k.source)
    sampled = count(kernel)
    assert not sampled.exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accesses, "_EVERY", 1 << 20)
        patch.setattr(accesses, "_PASSES", (1 << 20,))
        whole = count(kernel)
    assert whole.exact
    assert sampled.sectors == pytest.approx(whole.sectors, rel=0.1)
    assert sampled.flops["f32"] == pytest.approx(whole.flops["f32"], rel=0.1)


X = Buffer("x", f32, (4096,), align=16, writable=False)
I = Buffer("i", i64, (64,), align=16, writable=False)
Y = Buffer("y", f32, (4096,), align=16)
S = Buffer("s", f32, (2048,), scope="shared", align=16)
V = var("v", f32)
PATTERNS = {1: 4.0, 2: 8.0, 8: 32.0, 0: 1.0}  # stride of a float between lanes -> sectors a request


@pytest.mark.parametrize("stride", PATTERNS)
def test_sectors_by_stride(stride: int) -> None:
    body = [Store(Y, (TX,), load(X, (binary("mul", TX, stride) if stride else const(0),), f32))]
    c = count(Kernel("k", (X, Y), (launch(1, 64, body),)))
    assert c.touched["x"] / 32 / 2 == PATTERNS[stride]  # two warps
    assert c.touched["y"] / 32 / 2 == 4.0


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_by_stride(stride: int, conflicts: int) -> None:
    at = binary("mul", TX, stride) if stride else const(0)
    body = [Alloc(S), Store(Y, (TX,), load(S, (at,), f32))]
    c = count(Kernel("k", (Y,), (launch(1, 32, body),)))
    assert c.shared_cycles == conflicts * c.shared_phases


def test_addresses_that_depend_on_data_and_loops() -> None:
    k = var("k")
    inner = For(k, const(0), const(100), (Let(V, load(X, (TX + k,), f32)), Store(Y, (load(I, (TX,), i64),), V + 1.0)))
    c = count(Kernel("k", (X, I, Y), (launch(3, 64, [inner]),)))
    assert c.scattered == 3 * 2 * 100
    assert c.touched["y"] == 3 * 64 * 100 * 32
    assert c.flops == {"f32": 3 * 64 * 100}
    assert not c.exact
    assert BX is not TX


def test_what_limits_occupancy() -> None:
    sm80, sm75 = row("cuda-sm_80"), row("cuda-sm_75")
    assert limits(sm80, 256, 32, 0) == (8, 1.0, "threads")
    assert limits(sm80, 256, 128, 0) == (2, 0.25, "registers")
    assert limits(sm80, 32, 16, 0)[2] == "blocks"
    assert limits(sm80, 256, 32, 48 * 1024) == (3, 3 * 256 / 2048, "shared memory")
    assert limits(sm75, 256, 32, 32 * 1024) == (2, 0.5, "shared memory")  # no kilobyte of the system's before sm_80


@pytest.mark.unvalidated("its passes are those of other tests")
def test_registers_without_ptxas_are_near_those_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(*CASES["product"])
    live, real = live_values(program.ptx), tools.assemble(program.ptx, 80).registers
    assert live.keys() == real.keys()
    for name, n in live.items():
        assert 0.5 * real[name] <= n <= 1.5 * real[name] + 8, (name, n, real[name])
    assert estimate(program).registers_from == "by ptxas"
    monkeypatch.setattr(tools, "find", lambda name: None)
    found = estimate(program)
    assert "no ptxas is installed" in str(found).replace("\n", " ")
    assert {k.name: k.registers for k in found.kernels} == live


@pytest.mark.unvalidated("its passes are those of other tests")
def test_roofline_and_how_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    exe = tw.compile(lambda x, b: tw.relu(x * 2.0 + b), tw.spec(1024, 1024), tw.spec(1024), target="cuda-sm_80")
    found = exe.profile(estimate=True)
    (k,) = found.kernels
    assert k.bound == "memory"
    assert k.microseconds == pytest.approx((2 * 1024 * 1024 + 1024) * 4 / 1555e9 * 1e6, rel=0.01)
    assert (k.sectors_per_request, k.sector_use, k.bank_conflicts) == (16.0, 1.0, None)
    text = " ".join(str(found).split())
    for words in ("ESTIMATES", "nothing was measured", "A100", "A device takes longer", "registers: by ptxas"):
        assert words in text
    found.print()
    assert "ESTIMATES" in capsys.readouterr().out
    kept = json.loads(found.to_json())
    assert kept["estimated"] is True
    assert kept["kernels"][0]["occupancy"] == k.occupancy

    product = tw.compile(lambda a, b: a @ b, tw.spec(256, 256), tw.spec(256, 256), target="cuda-sm_90").profile(estimate=True)
    k = product.kernels[0]  # the sum over parts of the reduction; another launch adds these up
    assert k.bound == "f32 arithmetic"
    # its tiles do not fill the card
    assert k.microseconds >= 2 * 256**3 / product.reference.peaks["f32"] * 1e6
    with pytest.raises(InputError, match="takes no inputs"):
        exe.profile(1, estimate=True)
    with pytest.raises(InputError, match="is for CUDA targets"):
        tw.compile(tw.relu, tw.spec(3)).profile(estimate=True)


@pytest.mark.unvalidated("its passes are those of other tests")
def test_launches_of_loops_are_counted() -> None:
    def cell(h: tw.Tensor, x: tw.Tensor) -> tuple[tw.Tensor, tw.Tensor]:
        h = tw.tanh(h + x)
        return h, h

    exe = tw.compile(lambda h, xs: tw.scan(cell, h, xs), tw.spec(5), tw.spec(7, 5), target="cuda-sm_80")
    program = exe.compiled.run
    assert isinstance(program, CudaProgram)
    assert exe.profile(estimate=True).launches == len(list(program.launches()))


def test_inspect_prints_the_estimates(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.py"
    path.write_text("import tensorwright as tw\nspecs = [tw.spec('N', 8)]\ndef model(x):\n    return tw.softmax(x, axis=-1)\n")
    assert cli.main(["inspect", str(path), "--target", "cuda-sm_80", "--size", "N=4"]) == 0
    out = capsys.readouterr().out
    assert "ESTIMATES" in out
    assert "nothing was measured" in out.replace("\n", " ")
    assert cli.main(["inspect", str(path), "--target", "cuda-sm_80", "--size", "N=4", "--stage", "ptx"]) == 0
    assert ".target sm_80" in capsys.readouterr().out
