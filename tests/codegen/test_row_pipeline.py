"""Rows in a pipeline give what each row gives alone, whatever its neighbours are."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.nests import has_masks
from tensorwright.ir.dtypes import f32
from tensorwright.ir.target import row as target_row

from .helpers import Array, host_rows
from .test_row_maximum import definition, rows


def scaled(x: tw.Tensor, divisor: tw.Tensor) -> tw.Tensor:
    """A softmax whose sum is multiplied by a number for each row."""
    e = tw.exp(x - tw.max(x, -1, keepdims=True))
    return e / (tw.sum(e, -1, keepdims=True) * divisor)


def compiled(x: Array, row: str) -> tw.Executable:
    return tw.compile(scaled, tw.spec(*x.shape), tw.spec(len(x), 1), target=row, cache=False)


@pytest.mark.parametrize("row", host_rows())
@pytest.mark.parametrize("columns", [16, 203, 512])
def test_every_row_is_as_if_it_were_alone(columns: int, row: str) -> None:
    """NaN and infinity beside others; sums too large for a reciprocal in the first row, in others, in the last."""
    x = np.resize(rows(), (24, columns))
    x[13:] = np.random.default_rng(1).normal(0, 3, x[13:].shape)
    divisor = np.ones((24, 1), np.float32)
    divisor[[0, 14, 15, 18, 23]] = [[1e-30], [1e30], [1e-38], [1e25], [1e-25]]
    exe = compiled(x, row)
    assert ("waiting" in exe.text("loops")) == has_masks(target_row(row), [f32])
    alone = compiled(x[:1], row)
    assert "waiting" not in alone.text("loops")
    y = exe(x, divisor)
    for k in range(24):
        np.testing.assert_array_equal(y[k : k + 1], alone(x[k : k + 1], divisor[k : k + 1]), err_msg=f"row {k}")


@pytest.mark.parametrize("count", [2, 3])
def test_few_rows(count: int) -> None:
    x = np.random.default_rng(2).normal(0, 5, (count, 100)).astype(np.float32)
    exe = tw.compile(lambda x: tw.softmax(x, -1), tw.spec(count, 100), cache=False)
    np.testing.assert_allclose(exe(x), definition(x), rtol=1e-5)


def test_rows_beyond_the_cache_are_walked_one_by_one() -> None:
    text = tw.compile(lambda x: tw.softmax(x, -1), tw.spec(1024, 512), cache=False).text("loops")
    assert "waiting" not in text and "parallel" in text
