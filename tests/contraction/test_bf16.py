"""Products of bf16 added up in f32: in pairs by one instruction where the target has it, widened to f32 elsewhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tensorwright.codegen.contraction import Operand, preferred_panel, schedule
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_ir import Buffer, Kernel, Module, Store
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.contraction import Contraction
from tensorwright.ir.dtypes import bf16, f32
from tensorwright.ir.errors import CompileError
from tensorwright.ir.expr import const, fma_bf16, load
from tensorwright.ir.ops.contract import pack, unpack
from tensorwright.ir.target import Target, row, with_bf16
from tensorwright.runtime.host import host

from ..codegen.helpers import Loaded, aligned, emit_kernel, host_rows
from .cases import NarrowCase, conv, error, matmul, reference, shape_of, weight_grad

ROWS = host_rows()
PAIRS = with_bf16(row("x86-64-v4"))
TARGETS = [row(name) for name in ROWS] + ([PAIRS] if host().bf16 else [])
NATIVE = pytest.mark.skipif(not host().bf16, reason="this machine has no AVX512_BF16")
Array = np.ndarray


class Case(NarrowCase):
    """A contraction of bf16 with an f32 result, scheduled for a target. `panel` below 0: panels of pairs, of that width."""

    def __init__(self, spec: Contraction, target: Target, panel: int = 0, seed: int = 0) -> None:
        panel, pairs = abs(panel), 2 * (panel < 0)
        rng = np.random.default_rng(seed)
        self.spec, self.target = spec, target
        self.a, self.b = (
            rng.standard_normal(shape_of(spec, m)).astype(np.float32).astype(ml_dtypes.bfloat16) for m in (spec.a, spec.b)
        )
        self.c_shape = shape_of(spec, spec.c)
        self.operand_b = pack(self.b, spec, panel, pairs) if panel else self.b
        asked = spec.packed(panel, self.b.shape, pairs) if panel else spec

        def operand(x: Array, dtype: object) -> Operand:
            return Operand(dtype, tuple(s // x.itemsize for s in x.strides), 2)  # type: ignore[arg-type]

        c = np.zeros(self.c_shape, np.float32)
        operands = operand(self.a, bf16), operand(self.operand_b, bf16), operand(c, f32)
        self.scheduled = schedule(asked, *operands, None, target, threads=2, name="root")
        self.module = Module(self.scheduled.kernels)
        self.blank = np.full(self.c_shape, np.nan, np.float32)

    def expected(self) -> Array:
        return reference(self.spec, self.a.astype(np.float32), self.b.astype(np.float32))


SPECS = [
    (matmul(1, 1, 1), 0),
    (matmul(1, 17, 2), 0),
    (matmul(7, 33, 8), 0),
    (matmul(16, 16, 31), 0),  # no pairs: an odd reduction
    (matmul(17, 15, 64), 0),
    (matmul(33, 9, 66, tb=True), 0),
    (matmul(9, 31, 34, ta=True), 0),
    (matmul(15, 16, 18, ta=True, tb=True), 0),
    (matmul(5, 20, 12, batch=(3,)), 0),
    (matmul(19, 40, 22), 16),
    (conv(2, 6, 5, 17, 3), 0),
    (conv(1, 3, 6, 9, 2, stride=2), 0),  # pairs along the columns of the window
    (conv(1, 3, 6, 9, 3), 0),  # an odd window
    (conv(1, 8, 7, 33, 3, dilation=2, layout="NCHW"), 0),
    (conv(1, 8, 5, 12, 3, groups=2), 0),
    (conv(1, 8, 5, 24, 3), 16),
    (weight_grad(2, 5, 6, 17, 3), 0),
    (weight_grad(1, 4, 7, 9, 3), 0),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name + "-bf16" * t.bf16)
def test_sums_of_bf16(target: Target) -> None:
    for k, (spec, panel) in enumerate(SPECS):
        case = Case(spec, target, panel, seed=k)
        verify(case.module)
        got = case.run(checked=k % 3 == 0)
        assert error(got, case.expected()) <= 1e-5, case.scheduled.note  # products are exact, sums those of f32


PACKED = [
    (matmul(1, 1, 2), -16),
    (matmul(1, 300, 34), -64),
    (matmul(33, 31, 6), -16),
    (matmul(18, 65, 1030), -32),  # a cut reduction
    (matmul(7, 40, 10, ta=True), -16),  # the pairs of A lie apart
    (matmul(3, 33, 16, batch=(3,)), -48),
    (conv(1, 16, 9, 20, 1, stride=2), -32),
    (conv(2, 6, 7, 17, 3), -16),
    (conv(1, 4, 11, 33, 7, stride=2), -16),  # pixels of four channels, all merged with the columns of the window
    (conv(1, 8, 6, 18, 3, dilation=2, layout="NCHW"), -32),
    (conv(1, 8, 5, 32, 3, groups=2), -16),
]


@NATIVE
def test_panels_of_pairs() -> None:
    for k, (spec, panel) in enumerate(PACKED):
        case = Case(spec, PAIRS, panel, seed=k)
        verify(case.module)
        got = case.run(threads=1 + k % 2, checked=k % 3 == 0)
        assert error(got, case.expected()) <= 1e-5, case.scheduled.note
        assert "B packed" not in case.scheduled.note
        assert unpack(case.operand_b, spec.packed(-panel, case.b.shape, 2)).tobytes() == case.b.tobytes()


def test_panels_of_pairs_are_for_targets_that_multiply_pairs() -> None:
    spec = matmul(64, 256, 512)
    assert preferred_panel(spec, PAIRS, bf16) in (16, 32, 48, 64) and preferred_panel(spec, row("x86-64-v4"), bf16) == 0
    assert preferred_panel(matmul(64, 256, 511), PAIRS, bf16) == 0 < preferred_panel(matmul(64, 256, 511), PAIRS)
    with pytest.raises(CompileError, match="without AVX512_BF16"):
        Case(spec, row("x86-64-v4"), -32)


@NATIVE
def test_threads_do_not_change_a_bit() -> None:
    for spec in (matmul(130, 256, 512), weight_grad(8, 32, 32, 32, 3), matmul(20, 16, 40_000, ta=True)):
        case = Case(spec, PAIRS)
        assert case.scheduled.parallel
        first = case.run(1)
        assert error(first, case.expected()) <= 1e-5
        assert all(case.run(n).tobytes() == first.tobytes() for n in (2, 3))


def test_the_loop_interpreter_agrees() -> None:
    """Bounds, uninitialised reads and races are errors there; the order of a pair's two products is the hardware's."""
    for spec, panel in (
        (matmul(5, 7, 10), 0),
        (matmul(3, 18, 6, tb=True), 0),
        (conv(1, 4, 3, 5, 3), 16),
        (conv(1, 4, 3, 5, 3), -16),
        (matmul(3, 18, 6, ta=True), -16),
        (weight_grad(1, 2, 4, 3, 2), 0),
    ):
        case = Case(spec, PAIRS, panel)
        arrays = case.arrays()
        interpret(case.module, "root", arrays, threads=3)
        assert error(arrays[2].reshape(case.c_shape), case.expected()) < 1e-6, case.scheduled.note
        if host().bf16:
            assert error(case.run(threads=2, checked=True), arrays[2].reshape(case.c_shape)) < 1e-6


def test_the_inner_loop_is_dot_products_of_pairs() -> None:
    """And A, whose pairs lie side by side, is read as it lies."""
    case = Case(matmul(64, 64, 512), PAIRS, -32)
    assert "A packed" not in case.scheduled.note and not case.scheduled.workspace
    text = emit_kernel(case.module, "root", PAIRS).asm
    assert text.count("vdpbf16ps") >= 16
    assert "vfmadd" not in text


def test_the_operation_is_text_and_has_a_meaning() -> None:
    a, b, c, y = (Buffer(n, f32, (16,), align=64, writable=n == "y") for n in "abcy")
    x, z, w = (load(v, (const(0),), f32, None, 16) for v in (a, b, c))
    module = Module((Kernel("k", (a, b, c, y), (Store(y, (const(0),), fma_bf16(x, z, w)),)),))
    assert "fma.bf16(a[0]:16, b[0]:16, c[0]:16)" in print_module(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal(32).astype(np.float32).astype(ml_dtypes.bfloat16) for _ in "ab")
    left[0], left[1] = 1e-39, 3.0  # a denormal counts as zero
    third, out = rng.standard_normal(16).astype(np.float32), np.zeros(16, np.float32)
    interpret(module, "k", [left.view(np.float32), right.view(np.float32), third, out])
    p = left.astype(np.float64) * right.astype(np.float64)
    assert np.abs(out - (third + p[::2] + p[1::2])).max() <= 1e-6
    if host().bf16:
        native = [aligned(v) for v in (left.view(np.float32), right.view(np.float32), third, np.zeros(16, np.float32))]
        Loaded(emit_kernel(module, "k", PAIRS))([v.ctypes.data for v in native])
        assert native[3].tobytes() == out.tobytes()
    with pytest.raises(CompileError, match="needs AVX512_BF16"):
        emit_kernel(module, "k", "x86-64-v4")
