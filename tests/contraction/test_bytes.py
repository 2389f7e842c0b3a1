"""Products of i8 and u8 added up in i32 modulo 2^32: to the bit those of numpy, by one instruction where the target has VNNI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwright.codegen.contraction import Epilogue, Operand, preferred_panel, schedule
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_ir import Buffer, Kernel, Module, Store
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.contraction import Contraction
from tensorwright.ir.dtypes import as_dtype, f32, i8, i16, i32, u8
from tensorwright.ir.expr import BYTE_FACTORS, cast, const, fma_integers, load, maximum, minimum, unary
from tensorwright.ir.ops.contract import pack, unpack
from tensorwright.ir.target import Target, row, with_vnni
from tensorwright.runtime.host import host

from ..codegen.helpers import Loaded, aligned, emit_kernel, host_rows
from .cases import NarrowCase, conv, matmul, reference, shape_of, weight_grad

Array = np.ndarray[Any, Any]
VNNI = with_vnni(row("x86-64-v4"))
TARGETS = [row(name) for name in host_rows()] + ([VNNI] if host().vnni else [])
NATIVE = pytest.mark.skipif(not host().vnni, reason="this machine has no VNNI")
EVERY_ROW = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name + "-vnni" * t.vnni)
SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 33)


def octets(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """Bytes of which half are the extremes."""
    low, high = (0, 255) if kind == "u8" else (-128, 127)
    x = rng.integers(low, high + 1, shape)
    return np.where(rng.random(shape) < 0.5, x, rng.choice([low, high], shape)).astype({"u8": np.uint8, "i8": np.int8}[kind])


class Case(NarrowCase):
    """A contraction of bytes, scheduled for a target. `panel` below 0: panels of four steps side by side, of that width."""

    def __init__(
        self, spec: Contraction, target: Target, panel: int = 0, kinds: str = "u8i8", seed: int = 0,
        fill: tuple[int, int] | None = None, epilogue: Any = None, out: Any = np.int32,
    ) -> None:  # fmt: skip
        panel, ways = abs(panel), 4 * (panel < 0)
        rng = np.random.default_rng(seed)
        self.spec, self.target = spec, target
        self.a, self.b = (octets(rng, shape_of(spec, m), k) for m, k in ((spec.a, kinds[:2]), (spec.b, kinds[2:])))
        if fill is not None:
            self.a[...], self.b[...] = fill
        self.c = np.zeros(shape_of(spec, spec.c), out)
        self.operand_b = pack(self.b, spec, panel, ways) if panel else self.b
        asked = spec.packed(panel, self.b.shape, ways) if panel else spec

        def operand(x: Array) -> Operand:
            return Operand(as_dtype(x.dtype), tuple(s // x.itemsize for s in x.strides), x.itemsize)

        extra = None if epilogue is None else Epilogue((), epilogue, i32)
        self.scheduled = schedule(
            asked, operand(self.a), operand(self.operand_b), operand(self.c), extra, target, threads=2, name="root"
        )
        self.module = Module(self.scheduled.kernels)
        self.blank = np.full_like(self.c, 77)

    def expected(self) -> Array:
        return reference(self.spec, self.a.astype(np.int32), self.b.astype(np.int32))


SPECS: list[tuple[Contraction, int]] = [
    *((matmul(m, n, k), 0) for m, n, k in zip(SIZES, SIZES[3:] + SIZES[:3], SIZES[5:] + SIZES[:5], strict=True)),
    *((matmul(m, n, 4 * k), 0) for m, n, k in zip(SIZES, SIZES[3:] + SIZES[:3], SIZES[5:] + SIZES[:5], strict=True)),
    (matmul(33, 9, 68, tb=True), 0),
    (matmul(9, 31, 36, ta=True), 0),
    (matmul(15, 16, 20, ta=True, tb=True), 0),
    (matmul(5, 20, 12, batch=(3,)), 0),
    (matmul(19, 40, 22), 16),
    (conv(2, 6, 5, 17, 3), 0),  # no four side by side
    (conv(1, 3, 6, 9, 4, stride=2), 0),  # four along the columns of the window
    (conv(1, 8, 7, 33, 3, dilation=2, layout="NCHW"), 0),
    (conv(1, 8, 5, 12, 3, groups=2), 0),
    (conv(1, 8, 5, 24, 3), 16),
    (weight_grad(2, 5, 6, 17, 3), 0),
    (matmul(1, 300, 36), -64),
    (matmul(33, 31, 8), -16),
    (matmul(18, 65, 4100), -32),  # a cut reduction
    (matmul(7, 40, 12, ta=True), -16),  # the bytes of A lie apart
    (matmul(3, 33, 16, batch=(3,)), -48),
    (conv(1, 16, 9, 20, 1, stride=2), -32),
    (conv(2, 12, 7, 17, 3), -16),
    (conv(1, 4, 11, 33, 7, stride=2), -16),
    (conv(1, 8, 6, 18, 3, dilation=2, layout="NCHW"), -32),
    (conv(1, 8, 5, 32, 3, groups=2), -16),
]  # fmt: skip


@EVERY_ROW
def test_sums_are_numpys_to_the_bit(target: Target) -> None:
    chosen = SPECS if target is TARGETS[-1] else SPECS[::3]  # all sizes on all rows: tests/passes/test_bytes_by_four.py
    for k, (spec, panel) in enumerate(chosen):
        case = Case(spec, target, panel, BYTE_FACTORS[k % 4], seed=k)
        verify(case.module)
        got = case.run(threads=1 + k % 2, checked=k % 3 == 0)
        assert np.array_equal(got, case.expected()), (k, case.scheduled.note)


@EVERY_ROW
def test_extremes_do_not_saturate_and_wrap(target: Target) -> None:
    """-128 and 255 throughout, also where the sum passes 2^31: 132 * 255 * 128 * 512 is more."""
    for a, b, kinds in ((255, -128, "u8i8"), (255, 255, "u8u8"), (-128, -128, "i8i8"), (-128, 255, "i8u8")):
        for spec, panel in ((matmul(17, 33, 32), 0), (matmul(3, 16, 67584), -16)):
            case = Case(spec, target, panel, kinds, fill=(a, b))
            assert np.array_equal(case.run(threads=2), case.expected()), (kinds, case.scheduled.note)


@NATIVE
def test_panels_and_threads() -> None:
    spec = conv(2, 12, 7, 17, 3)
    case = Case(spec, VNNI, -16)
    assert "B packed" not in case.scheduled.note
    assert unpack(case.operand_b, spec.packed(16, case.b.shape, 4)).tobytes() == case.b.tobytes()
    for spec in (matmul(130, 256, 2048), matmul(20, 16, 160_000, ta=True)):
        case = Case(spec, VNNI)
        assert case.scheduled.parallel
        first = case.run(1)
        assert np.array_equal(first, case.expected())
        assert all(np.array_equal(case.run(n), first) for n in (2, 3))


def test_the_inner_loop_is_dot_products_of_four() -> None:
    """And A, whose bytes lie side by side, is read as it lies. Without VNNI they are multiplied as words: none saturates."""
    for target, wanted in ((VNNI, "vpdpbusd"), (row("x86-64-v4"), "vpmaddwd"), (row("x86-64-v3"), "vpmaddwd")):
        case = Case(matmul(64, 64, 512), target, -preferred_panel(matmul(64, 64, 512), target, i8))
        assert "A packed" not in case.scheduled.note and not case.scheduled.workspace
        text = emit_kernel(case.module, "root", target).asm
        assert text.count(wanted) >= 8 and "vpmaddubsw" not in text and "vpmulld" not in text
    assert preferred_panel(matmul(64, 256, 511), VNNI, i8) == 0
    narrow = Case(matmul(64, 64, 512), with_vnni(row("x86-64-v3")), -16)  # AVX-VNNI: 256 bits
    assert emit_kernel(narrow.module, "root", narrow.target).asm.count("vpdpbusd") >= 8
    arm = Case(matmul(64, 64, 512), row("aarch64-neon"), -16)  # multiplied as i32
    assert emit_kernel(arm.module, "root", arm.target).asm.count("mla") >= 8


def test_the_loop_interpreter_agrees() -> None:
    """Bounds, uninitialised reads and races are errors there."""
    for k, (spec, panel) in enumerate(
        [(matmul(5, 7, 12), 0), (matmul(3, 18, 8, tb=True), 0), (conv(1, 4, 3, 5, 3), -16), (matmul(3, 18, 8, ta=True), -16)]
    ):
        case = Case(spec, VNNI, panel, BYTE_FACTORS[k])
        arrays = case.arrays()
        interpret(case.module, "root", arrays, threads=3)
        assert np.array_equal(arrays[2].reshape(case.c.shape), case.expected()), case.scheduled.note


@EVERY_ROW
def test_the_operation_is_text_and_has_a_meaning(target: Target) -> None:
    lanes = target.lanes(32)
    a, b, c, y = (Buffer(n, i32, (lanes,), align=64, writable=n == "y") for n in "abcy")
    x, z, w = (load(v, (const(0),), i32, None, lanes) for v in (a, b, c))
    rng = np.random.default_rng(2)
    for kinds in BYTE_FACTORS:
        module = Module((Kernel("k", (a, b, c, y), (Store(y, (const(0),), fma_integers(x, z, w, kinds)),)),))
        assert f"fma.{kinds}(a[0]:{lanes}" in print_module(module)
        assert print_module(parse_module(print_module(module))) == print_module(module)
        left, right = octets(rng, (4 * lanes,), kinds[:2]), octets(rng, (4 * lanes,), kinds[2:])
        third = rng.integers(-(2**31), 2**31, lanes).astype(np.int32)
        given = [left.view(np.int32), right.view(np.int32), third, np.zeros(lanes, np.int32)]
        native = [aligned(v) for v in given]
        interpret(module, "k", given)
        products = (left.astype(np.int64) * right.astype(np.int64)).reshape(-1, 4).sum(-1)
        assert np.array_equal(given[3], (third + products).astype(np.int32))
        Loaded(emit_kernel(module, "k", target))([v.ctypes.data for v in native])
        assert np.array_equal(native[3], given[3]), kinds


@EVERY_ROW
def test_sums_requantised_in_the_epilogue(target: Target) -> None:
    """Scaled in f32, rounded half to even, clipped, stored as u8: nothing but bytes leaves the tile."""

    def value(acc: Any, index: Any, load: Any) -> Any:
        whole = unary("round", cast(acc, f32) * 0.001) + 3.0
        return cast(maximum(0.0, minimum(255.0, whole)), u8)

    for spec, panel in ((matmul(17, 33, 64), -16), (conv(1, 8, 5, 9, 3), 0), (matmul(1, 15, 32), 0)):
        case = Case(spec, target, panel, epilogue=value, out=np.uint8)
        wanted = np.clip(np.rint(case.expected().astype(np.float32) * np.float32(0.001)) + 3, 0, 255).astype(np.uint8)
        assert np.array_equal(case.run(threads=2), wanted), case.scheduled.note


@EVERY_ROW
def test_rounding_to_bytes_is_one_conversion(target: Target) -> None:
    """Of ties, limits, NaN and infinity too; and bytes that become floats again never leave the floats."""
    values = [0.5, 1.5, 2.5, -0.5, -0.4, 254.5, 255.5, 256.0, 127.5, 126.5, -128.5, -129.5, 32767.5, 3e9, -3e9, 1e30, -1e30]
    x = np.array([*values, np.nan, np.inf, -np.inf, -0.0, 1e-40, *np.linspace(-300, 300, 42)], np.float32)
    source = Buffer("x", f32, (64,), align=64, writable=False)
    lanes = target.lanes(32)

    def stored(dtype: Any, value: Any) -> tuple[Buffer, list[Store]]:
        y = Buffer(f"y{len(made)}", dtype, (64,), align=64)
        at = range(0, 64, lanes)
        return y, [Store(y, (const(k),), value(load(source, (const(k),), f32, None, lanes))) for k in at]

    made: list[tuple[Buffer, list[Store]]] = []
    for dtype in (u8, i8, i16):
        made.append(stored(dtype, lambda v, d=dtype: cast(unary("round", v), d)))
        made.append(stored(f32, lambda v, d=dtype: cast(cast(unary("round", v), d), f32)))
        made.append(stored(f32, lambda v, d=dtype: cast(cast(v, d), f32)))
    module = Module((Kernel("k", (source, *(b for b, _ in made)), tuple(s for _, stores in made for s in stores)),))
    given = [x, *(np.zeros(64, b.dtype.numpy) for b, _ in made)]
    native = [aligned(v) for v in given]
    interpret(module, "k", given)
    emitted = emit_kernel(module, "k", target)
    Loaded(emitted)([v.ctypes.data for v in native])
    for a, b, (buffer, _) in zip(given[1:], native[1:], made, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=buffer.name)
    assert "cvtps2dq" in emitted.asm and "lrint" not in emitted.asm and "trunc" not in emitted.asm  # no calls


@EVERY_ROW
def test_bytes_of_several_vectors_are_packed(target: Target) -> None:
    """Two, three or four stores side by side are one, of the same bytes; others, and those that a value reads, stay apart."""
    lanes = target.lanes(32)
    size = 10 * lanes
    x = np.random.default_rng(3).normal(0, 200, size).astype(np.float32)
    x[:8] = np.nan, np.inf, -np.inf, 3e9, -3e9, 0.5, 1.5, 255.5
    source, out = Buffer("x", f32, (size,), align=64, writable=False), Buffer("y", u8, (size,), align=64)

    def store(at: int, read: int, more: Any = None) -> Store:
        value = load(source, (const(read),), f32, None, lanes)
        return Store(out, (const(at),), cast(unary("round", value if more is None else value + more), u8))

    whole = [store(k * lanes, k * lanes) for k in range(4)]  # then three, two, and one that reads what was stored just before
    rest = [store((k + 4) * lanes, (9 - k) * lanes) for k in (0, 1, 2)], [store((k + 7) * lanes, k * lanes) for k in (0, 1)]
    last = store(9 * lanes, 0, cast(load(out, (const(8 * lanes),), u8, None, lanes), f32))
    gap = Store(out, (const(0),), cast(const(7, i32), u8))
    body = (*whole, gap, *rest[0], gap, *rest[1], last)
    module = Module((Kernel("k", (source, out), body),))
    given = [x, np.zeros(size, np.uint8)]
    native = [aligned(v) for v in given]
    interpret(module, "k", given)
    emitted = emit_kernel(module, "k", target)
    Loaded(emitted)([v.ctypes.data for v in native])
    np.testing.assert_array_equal(native[1], given[1])
    assert emitted.asm.count("packuswb") == 3
