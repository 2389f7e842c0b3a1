"""What happens to the sums before they are stored: loads of any form, positions, masks, dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tensorwright.codegen.contraction import Epilogue, Operand, schedule, tile
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import CompileError
from tensorwright.ir.expr import Expr, cast, const, maximum, select
from tensorwright.ir.lowering import Load
from tensorwright.ir.target import row

from ..codegen.helpers import host_rows
from .cases import Case, conv, error, matmul, reference

ROWS = host_rows()
Index = tuple[Expr, ...]


def rng(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def bias_residual_relu(acc: Expr, index: Index, load: Load) -> Expr:
    return maximum(acc + load(0, (index[-1],)) + load(1, index), const(0.0, f32))


@pytest.mark.parametrize("target", ROWS)
def test_bias_residual_relu(target: str) -> None:
    for spec, panel in (
        (matmul(13, 37, 20), 0),
        (conv(2, 5, 6, 20, 3), 0),
        (conv(1, 8, 7, 33, 1), 48),
        (matmul(30, 1, 50), 0),
        (matmul(1, 70, 9), 0),
    ):
        shape = tuple(int(spec.axis(m.terms[0][0]).extent) for m in spec.c)
        bias, residual = rng(shape[-1]), rng(*shape)
        case = Case(spec, row(target), panel=panel, epilogue=bias_residual_relu, extra=(bias, residual))
        verify(case.module)
        ref = np.maximum(case.expected() + bias + residual, 0)
        assert error(case.run(checked=True), ref) < 1e-5, case.scheduled.note


def test_operands_of_other_layouts() -> None:
    """A transposed residual, a bias per row, a scalar, and one that is read at a stride."""
    spec = matmul(19, 21, 10)
    transposed, per_row, scalar, wide = rng(21, 19), rng(19), rng(1), rng(19, 42)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        m, n = index
        return acc * load(2, (const(0),)) + load(0, (n, m)) + load(1, (m,)) - load(3, (m, n * 2 + 1))

    case = Case(spec, row(ROWS[0]), epilogue=value, extra=(transposed, per_row, scalar, wide))
    verify(case.module)
    ref = case.expected() * scalar + transposed.T + per_row[:, None] - wide[:, 1::2]
    assert error(case.run(checked=True), ref) < 1e-5


def test_positions_and_indices_that_are_not_affine() -> None:
    """The index of C used as a value, a load at a quotient, and one behind a mask."""
    spec = matmul(10, 37, 10, batch=(2,))
    groups, edge = rng(10), rng(2, 10, 30)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        b, m, n = index
        inside = n < 30
        causal = select(n <= m, acc, const(0.0, f32))
        return causal + load(0, (n // 4,)) + load(1, (b, m, n), inside) + cast(n, f32)

    case = Case(spec, row(ROWS[0]), epilogue=value, extra=(groups, edge))
    verify(case.module)
    n, m = np.arange(37), np.arange(10)
    padded = np.zeros((2, 10, 37), np.float32)
    padded[..., :30] = edge
    ref = np.where(n <= m[:, None], case.expected(), 0) + groups[n // 4] + padded + n
    assert error(case.run(checked=True), ref) < 1e-5


def test_a_merged_loop_keeps_its_operands_apart() -> None:
    """A residual broadcast over rows: the pixels of a 1x1 convolution may not be merged with respect to it."""
    spec = conv(2, 4, 5, 18, 1)
    per_column = rng(5, 18)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        return acc + load(0, (index[2], index[3]))

    case = Case(spec, row(ROWS[0]), epilogue=value, extra=(per_column,))
    assert error(case.run(checked=True), case.expected() + per_column) < 1e-5


def test_a_cut_reduction_applies_the_epilogue_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "SLICE", 0.0007)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        return maximum(acc + load(0, index), const(0.0, f32))

    for m, n, k, ta in ((40, 21, 12, False), (40, 43, 13, True)):
        spec, residual = matmul(m, n, k, ta=ta), rng(m, n)
        case = Case(spec, row(ROWS[0]), epilogue=value, extra=(residual,))
        assert "cut" in case.scheduled.note
        assert error(case.run(checked=True), np.maximum(case.expected() + residual, 0)) < 1e-5
        arrays = case.arrays()
        interpret(case.module, "root", arrays)
        assert arrays[2].tobytes() == case.run().tobytes()


def test_an_operand_may_be_updated_in_place() -> None:
    spec = matmul(9, 21, 12)
    residual = rng(9, 21)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        return acc + load(0, index)

    case = Case(spec, row(ROWS[0]), epilogue=value, extra=(residual,))
    arrays = case.arrays()
    arrays[2][...] = residual
    arrays[3] = arrays[2]
    case.loaded()([x.ctypes.data for x in arrays])
    assert error(arrays[2], case.expected() + residual) < 1e-5


def test_another_result_dtype() -> None:
    spec = matmul(9, 21, 12)

    def value(acc: Expr, _index: Index, _load: Load) -> Expr:
        return cast(acc * 100.0, "i32")

    a = Operand(f32, (12, 1), 64)
    c = Operand(np_dtype("i32"), (21, 1), 64)
    scheduled = schedule(spec, a, Operand(f32, (21, 1), 64), c, Epilogue((), value), row(ROWS[0]), threads=1, name="root")
    case = Case(spec, row(ROWS[0]))
    from tensorwright.codegen.loop_ir import Module

    case.scheduled, case.module = scheduled, Module(scheduled.kernels)
    arrays = case.arrays()
    arrays[2] = np.zeros((9, 21), np.int32)
    case.loaded()([x.ctypes.data for x in arrays])
    ref = np.trunc(reference(spec, case.a, case.b) * 100)
    assert np.abs(arrays[2] - ref).max() <= 1  # a sum next to an integer may round to either side


def np_dtype(name: str) -> Any:
    from tensorwright.ir.dtypes import as_dtype

    return as_dtype(name)


def test_epilogue_on_empty_sums() -> None:
    bias = rng(7)

    def value(acc: Expr, index: Index, load: Load) -> Expr:
        return acc + load(0, (index[-1],))

    case = Case(matmul(3, 7, 0), row(ROWS[0]), epilogue=value, extra=(bias,))
    assert np.array_equal(case.run(), np.broadcast_to(bias, (3, 7)))


@pytest.mark.parametrize(("index", "message"), [((0, 0), "2 indices"), ("gather", "another")])
def test_what_an_epilogue_cannot_be(index: Sequence[int] | str, message: str) -> None:
    def value(acc: Expr, c: Index, load: Load) -> Expr:
        at = (cast(load(0, (c[0],)), "i64"),) if index == "gather" else (c[0], c[1])
        return acc + load(0, at)

    with pytest.raises(CompileError, match=message):
        Case(matmul(3, 7, 5), row(ROWS[0]), epilogue=value, extra=(rng(9),))
