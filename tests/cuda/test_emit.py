"""Emission for CUDA targets: the rules of launches, the table of SMs, static figures, and what ptxas says. No GPU is needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.benchmarks.models import DemoCNN
from tensorwright.codegen.cuda.grid import BX, TX, launch, over
from tensorwright.codegen.cuda.machine import check, occupancy
from tensorwright.codegen.cuda.shape import launches_of, shape_of
from tensorwright.codegen.cuda.verify import verify_launch
from tensorwright.codegen.loop_ir import Alloc, Barrier, Buffer, If, Kernel, Let, Store
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.codegen.nests import Axis
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import CompileError, InputError, VerifyError
from tensorwright.ir.expr import binary, lane_xor, load, var
from tensorwright.ir.target import CUDA_ROWS, row
from tensorwright.runtime.cuda.tools import assemble

X = Buffer("x", f32, (64,), align=16, writable=False)
Y = Buffer("y", f32, (64,), align=16)


def one(body: list, threads: int = 64) -> Kernel:
    return Kernel("k", (X, Y), (launch(1, threads, body),))


STORE = Store(Y, (TX,), load(X, (TX,), f32))
BROKEN = {
    "not the whole block's": [If(TX < 32, (Barrier(),)), STORE],
    "exchanged where not all": [If(TX < 3, (Let(var("v", f32), lane_xor(load(X, (TX,), f32), 1)),)), STORE],
    "bytes of shared memory": [Alloc(Buffer("s", f32, (12289,), scope="shared")), STORE],
}


@pytest.mark.parametrize("message", BROKEN)
def test_verifier_refuses(message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_launch(one(BROKEN[message]))


def test_verifier_takes_what_a_warp_does_together() -> None:
    row_of_warp = binary("floordiv", TX, 32)
    v = var("v", f32)
    verify_launch(one([If(row_of_warp < 1, (Let(v, lane_xor(load(X, (TX,), f32), 16)), Store(Y, (TX,), v)))]))


def test_verifier_finds_an_index_out_of_range() -> None:
    with pytest.raises(VerifyError, match="runs from 0 to 64"):
        verify(parse_module(print_module_of(one([Store(Y, (TX,), load(X, (TX,), f32))], threads=65))))


def print_module_of(kernel: Kernel) -> str:
    from tensorwright.codegen.loop_ir import Module

    return print_module(Module((kernel,)))


def test_a_launch_reads_back() -> None:
    text = print_module_of(
        one(
            [
                Alloc(Buffer("s", f32, (64,), scope="shared", align=16)),
                Barrier(),
                Let(var("v", f32), lane_xor(load(X, (TX,), f32), 8)),
                STORE,
            ]
        )
    )
    assert print_module(parse_module(text)) == text
    assert "lane_xor.8" in text


def test_shapes() -> None:
    kernel = Kernel("k", (X, Y), (over([Axis(var("i"), 300)], [STORE]), over([Axis(var("i"), 3)], [STORE])))
    assert [shape_of(k) for k, _ in launches_of(kernel)] == [((2, 1, 1), 256), ((1, 1, 1), 32)]
    with pytest.raises(CompileError, match="one loop over blocks"):
        shape_of(Kernel("k", (X, Y), (STORE,)))
    assert BX is not TX


def test_table_refuses_what_an_sm_lacks() -> None:
    check("llvm.nvvm.cp.async.cg.shared.global.16", row("cuda-sm_80"))
    with pytest.raises(CompileError, match="needs sm_80; cuda-sm_75"):
        check("llvm.nvvm.cp.async.cg.shared.global.16", row("cuda-sm_75"))
    with pytest.raises(CompileError, match="not in the table"):
        check("llvm.nvvm.tcgen05.alloc", row("cuda-sm_90"))


def test_occupancy_is_limited_by_each_resource() -> None:
    sm = row("cuda-sm_80")
    assert occupancy(sm, 256, 32, 0) == 1.0
    assert occupancy(sm, 256, 128, 0) == 0.25
    assert occupancy(sm, 256, 32, 48 * 1024) == pytest.approx(3 * 256 / 2048)


def program(fn: object, *specs: object, target: str = "cuda-sm_80") -> CudaProgram:
    found = tw.compile(fn, *specs, target=target).compiled.run  # type: ignore[arg-type]
    assert isinstance(found, CudaProgram)
    return found


@pytest.mark.parametrize("target", CUDA_ROWS)
def test_elementwise_kernels_access_16_bytes(target: str) -> None:
    made = program(lambda x, b: tw.relu(x * 2.0 + b), tw.spec(64, 1028), tw.spec(1028), target=target)
    accesses = re.findall(r"(?:ld|st)\.global\S*", made.ptx)
    assert len(accesses) == 3
    assert all(".v4.b32" in a for a in accesses), accesses
    assert not assemble(made.ptx, row(target).sm).wrong


def test_ragged_rows_and_lengths_take_single_elements_at_the_end() -> None:
    made = program(tw.relu, tw.spec(1027))
    (k,) = made.kernels
    assert "v4" in made.ptx
    assert k.grid[0] * k.block[0] >= 1027 // 4 + 3


def test_text_needs_no_device() -> None:
    exe = tw.compile(DemoCNN(), tw.spec(2, 1, 8, 8), target="cuda-sm_90")
    assert ".target sm_90" in exe.text("ptx")
    assert "block {" in exe.text("loops")
    assert "---- prepare: once per set of weights" in exe.text("llvm")
    assert not assemble(exe.compiled.run.ptx, 90).wrong  # type: ignore[attr-defined]


def test_options_of_processors_are_refused() -> None:
    with pytest.raises(InputError, match="memory_budget=1000"):
        tw.compile(lambda x: x, tw.spec(3), target="cuda-sm_80", memory_budget=1000)


def test_fan_in_of_launches_follows_a_scan() -> None:
    """A scan is one loop in the plan; its launches are resolved pass by pass, with carries swapped."""

    def cell(h: tw.Tensor, x: tw.Tensor) -> tuple[tw.Tensor, tw.Tensor]:
        h = tw.tanh(h + x)
        return h, h

    with tw.config(cuda_loops="launches"):
        made = program(lambda h, xs: tw.scan(cell, h, xs), tw.spec(5), tw.spec(7, 5))
    assert made.is_static
    launches = list(made.launches())
    assert len(launches) >= 7
    assert len({x.pointers for x in launches}) >= 7


@pytest.mark.parametrize("target", ["cuda-emulator"])
def test_models_run_like_the_processors(target: str) -> None:
    """Ragged sizes through tiles, rows by warps, sums in parts, updates: results of the interpreter against f64."""

    def model(x: tw.Tensor, w: tw.Tensor, b: tw.Tensor) -> tuple[tw.Tensor, ...]:
        y = tw.relu(x @ w + b)
        return tw.softmax(y, axis=-1), tw.sum(y, axis=0), tw.cumsum(y, axis=1), tw.max(y)

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((37, 19), (19, 45), (45,))]
    found = tw.compile(model, *(tw.spec(*a.shape) for a in arrays), target=target)(*arrays)
    x, w, b = (a.astype(np.float64) for a in arrays)
    y = np.maximum(x @ w + b, 0)
    e = np.exp(y - y.max(-1, keepdims=True))
    expected = (e / e.sum(-1, keepdims=True), y.sum(0), y.cumsum(1), y.max())
    for f, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, wanted, rtol=2e-5, atol=2e-6)  # f32 sums of up to 45 terms
