"""Every form of contraction against an f64 reference: sizes around vector widths, layouts, dtypes, target rows, threads."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from tensorwright.codegen.contraction import Operand, plan, preferred_panel, root, schedule, tile
from tensorwright.codegen.contraction import schedule as schedule_function
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.contraction import Affine, Contraction, affine
from tensorwright.ir.dtypes import f8e5m2, f32
from tensorwright.ir.errors import CompileError
from tensorwright.ir.target import row

from ..codegen.helpers import host_rows
from .cases import Case, conv, error, matmul, weight_grad

ROWS = host_rows()
# Rounding of a sum of K products: at most K units in the last place, in practice sqrt(K); 1e-5 covers K to 10,000 in f32.
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-13}

SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 33)


def straddling() -> list[tuple[int, int, int]]:
    """Each size in each place, with partners that move through the others."""
    found = []
    for k, n in enumerate(SIZES):
        others = SIZES[(k * 4 + 3) % 9], SIZES[(k * 7 + 5) % 9]
        found += [(n, *others), (others[0], n, others[1]), (*others, n)]
    return sorted(set(found))


def check(case: Case, tolerance: float | None = None, threads: tuple[int, ...] = (1,)) -> None:
    verify(case.module)
    first = case.run(threads=threads[0])
    limit = TOLERANCE.get(case.dtype, 0.0) if tolerance is None else tolerance
    assert error(first, case.expected()) <= limit, case.scheduled.note
    for n in threads[1:]:
        assert case.run(threads=n).tobytes() == first.tobytes()


@pytest.mark.parametrize("target", ROWS)
def test_products_at_sizes_around_the_vector_width(target: str) -> None:
    t = row(target)
    sizes = straddling()
    # every size on the widest row; a third of them, other ones each, on the narrower rows
    for k, (m, n, kk) in enumerate(sizes if target == ROWS[0] else sizes[ROWS.index(target) - 1 :: 3]):
        ta, tb = bool(k & 1), bool(k & 2)
        check(Case(matmul(m, n, kk, ta=ta, tb=tb), t, seed=k))


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolutions(target: str, layout: str) -> None:
    t = row(target)
    for k, spec in enumerate(
        (
            conv(2, 3, 7, 10, 3, layout=layout),
            conv(1, 16, 5, 17, 3, stride=2, layout=layout, width=9),
            conv(1, 8, 6, 33, 1, layout=layout),
            conv(1, 5, 4, 9, 3, dilation=2, layout=layout),
            conv(1, 12, 5, 8, 3, groups=4, layout=layout),
            conv(1, 20, 6, 20, 3, groups=20, layout=layout),
            conv(1, 9, 8, 1, 3, layout=layout),
        )
    ):
        panel = preferred_panel(spec, t) if k % 2 else 0
        check(Case(spec, t, panel=panel, seed=k))


@pytest.mark.parametrize("target", ROWS)
def test_weight_gradients(target: str) -> None:
    for k, spec in enumerate(
        (weight_grad(2, 5, 9, 8, 3), weight_grad(1, 16, 7, 10, 3, stride=2), weight_grad(2, 3, 8, 5, 1, layout="NCHW"))
    ):
        check(Case(spec, row(target), seed=k))


def test_batches_and_broadcasting() -> None:
    t = row(ROWS[0])
    check(Case(matmul(7, 9, 17, batch=(3, 2)), t))
    check(Case(matmul(5, 33, 8, batch=(4,), broadcast_b=True), t))
    check(Case(matmul(1, 20, 30, batch=(5,), tb=True), t))
    spec = matmul(6, 18, 10, batch=(3,))
    check(Case(spec, t, panel=32))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64])
def test_other_dtypes(dtype: type) -> None:
    for k, (target, spec) in enumerate(itertools.product(ROWS, (matmul(9, 17, 33), conv(1, 5, 4, 9, 3)))):
        check(Case(spec, row(target), dtype=dtype, seed=k))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_sums_in_f32(dtype: type) -> None:
    case = Case(matmul(9, 17, 200), row(ROWS[0]), dtype=dtype)
    # only the result is rounded to 8 (bf16) or 11 (f16) bits: half a unit in the last place
    check(case, tolerance=2.0**-8 if dtype is ml_dtypes.bfloat16 else 2.0**-11)


def test_an_unsupported_dtype_is_refused() -> None:
    a = Operand(f8e5m2, (4, 1), 64)
    with pytest.raises(CompileError, match="contraction of f8e5m2 is not supported"):
        schedule(matmul(4, 4, 4), a, a, Operand(f32, (4, 1), 64), None, row(ROWS[0]), threads=1, name="x")


def test_matrix_times_vector_and_dot_product() -> None:
    t = row(ROWS[0])
    for k, spec in enumerate(
        (matmul(1, 40, 300), matmul(1, 40, 300, tb=True), matmul(50, 1, 77), matmul(1, 1, 1000), matmul(1, 1, 1))
    ):
        check(Case(spec, t, seed=k))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (5, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_zero_extents(m: int, n: int, k: int) -> None:
    case = Case(matmul(m, n, k), row(ROWS[0]))
    arrays = case.arrays()
    interpret(case.module, "root", arrays)
    assert np.array_equal(arrays[2], np.zeros((m, n)))


def test_threads_do_not_change_a_bit() -> None:
    t = row(ROWS[0])
    cases = [
        Case(matmul(130, 200, 150), t),
        Case(matmul(200, 130, 180, ta=True, tb=True), t),
        Case(conv(1, 32, 20, 48, 3), t, panel=32),
        Case(weight_grad(20, 1, 40, 16, 3), t),
        Case(weight_grad(4, 16, 30, 24, 3), t),
    ]
    for case in cases:
        assert case.scheduled.parallel, case.scheduled.note
        check(case, threads=(1, 2, 3))
    assert "reduction split" in cases[3].scheduled.note


@pytest.mark.parametrize("target", ROWS)
def test_the_loop_interpreter_finds_no_fault_and_the_same_bits(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes, forced to be parallel: bounds, uninitialised reads and races are errors there."""
    monkeypatch.setattr(plan, "PARALLEL_FROM", 0)
    monkeypatch.setattr(tile, "SPLIT", 2)
    t = row(target)
    specs = (
        (matmul(5, 7, 9), 0),
        (matmul(3, 20, 5, tb=True), 0),
        (matmul(4, 5, 3, batch=(2,)), 16),
        (conv(1, 3, 3, 5, 3, stride=2), 0),
        (weight_grad(1, 2, 4, 3, 2), 0),
        (conv(1, 6, 3, 6, 2, groups=6), 0),
        (matmul(9, 1, 35), 0),
    )
    for spec, panel in specs:
        case = Case(spec, t, panel=panel)
        assert case.scheduled.parallel
        arrays = case.arrays()
        interpret(case.module, "root", arrays, threads=3)
        assert error(arrays[2], case.expected()) < 1e-6, case.scheduled.note
        assert case.run(threads=2, checked=True).tobytes() == arrays[2].tobytes(), case.scheduled.note


def test_chunks_in_shares_give_every_cell_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even and uneven shares, of even and uneven chunks: the same bits as without them."""
    t = row(ROWS[0])
    specs = ((matmul(90, 40, 9), 16), (matmul(90, 90, 9), 32), (conv(1, 3, 9, 40, 3), 16))
    whole = [Case(spec, t, panel=panel).run() for spec, panel in specs]
    monkeypatch.setattr(plan, "PARALLEL_FROM", 0)
    monkeypatch.setattr(root, "CHUNKS", 12)
    monkeypatch.setattr(root, "LEAST_SHARE", 1)
    monkeypatch.setattr(root, "SHARES", 40)
    for (spec, panel), expected in zip(specs, whole, strict=True):
        case = Case(spec, t, panel=panel)
        chunks = int(case.scheduled.note.split("; ")[-1].split()[0])
        assert chunks > 12, case.scheduled.note
        assert case.run(threads=2, checked=True).tobytes() == case.run(threads=3).tobytes() == expected.tobytes()


def test_index_maps_with_offsets_and_reversed_axes() -> None:
    """A kernel read backwards, as the gradient of a convolution reads it, and a slice that starts inside an operand."""
    spec = conv(1, 4, 5, 6, 3)
    flipped = (spec.b[0], spec.b[1], Affine((("h", -1),), 2), Affine((("w", -1),), 2))
    check(Case(Contraction(spec.axes, spec.a, flipped, spec.c), row(ROWS[0])))
    inner = matmul(6, 9, 7)
    a = (affine("m", constant=2), Affine((("k", -1),), 9))
    check(Case(Contraction(inner.axes, a, inner.b, inner.c), row(ROWS[0])))


def test_an_index_before_the_operand_is_refused() -> None:
    spec = matmul(4, 4, 4)
    bad = Contraction(spec.axes, (affine("m", constant=-1), affine("k")), spec.b, spec.c)
    o = Operand(f32, (4, 1), 64)
    with pytest.raises(CompileError, match="before the start"):
        schedule_function(bad, o, o, o, None, row(ROWS[0]), threads=1, name="x")


def test_a_panel_that_vectors_do_not_divide_is_refused() -> None:
    spec = matmul(4, 20, 4).packed(20, (4, 20))
    o = Operand(f32, (4, 1), 64)
    with pytest.raises(CompileError, match="panels of 20"):
        schedule(spec, o, Operand(f32, (80, 20, 1), 64), Operand(f32, (20, 1), 64), None, row("x86-64-v4"), threads=1, name="x")
