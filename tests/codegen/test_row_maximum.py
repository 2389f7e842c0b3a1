"""What a row's maximum tells later passes: exponents without an upper limit, and maxima that may forget a NaN."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw

from .helpers import host_rows


def rows(dtype: str = "float32") -> np.ndarray:
    """Ordinary rows, and rows with NaN of either sign and infinities at their ends and inside."""
    x = np.random.default_rng(0).normal(0, 20, (24, 203)).astype(dtype)
    x[1, 0], x[2, 100], x[3, -1], x[4, :] = np.nan, -np.nan, np.nan, np.nan
    x[5, 7], x[6, 202], x[7, :] = np.inf, -np.inf, -np.inf
    x[8, 3], x[8, 150] = np.inf, -np.inf
    x[9, 20], x[9, 21] = np.nan, np.inf
    x[10, :5], x[11, :] = -3e38, 3e38
    x[12, :], x[12, 9] = -np.inf, 0
    return x


def definition(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True).astype(np.float64))
        return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("row", host_rows())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_softmax_is_not_a_number_where_numpys_is_not(row: str, dtype: str) -> None:
    x = rows(dtype)
    exe = tw.compile(lambda x: tw.softmax(x, -1), tw.spec(*x.shape, dtype=x.dtype.name), target=row, cache=False)
    assert "exp.nonpositive" in exe.text("loops") and "reduce_max.forgets" in exe.text("loops")
    np.testing.assert_allclose(exe(x), definition(x), rtol=1e-5, atol=1e-37, equal_nan=True)
    log = tw.compile(lambda x: tw.log_softmax(x, -1), tw.spec(*x.shape, dtype=x.dtype.name), target=row, cache=False)
    with np.errstate(all="ignore"):
        y = np.log(definition(x))
    got = log(x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(y))
    usual = np.isfinite(y)
    np.testing.assert_allclose(got[usual], y[usual], rtol=1e-4, atol=1e-5)


def test_a_maximum_that_something_else_needs_keeps_a_nan() -> None:
    """Without a sum that each result contains, a row with a NaN is NaN only if its maximum is."""
    x = rows()
    with np.errstate(all="ignore"):
        shifted = x - x.max(-1, keepdims=True)
    wanted = [shifted, shifted]
    functions = [lambda x: tw.exp(x - tw.max(x, -1, keepdims=True)), lambda x: x - tw.max(x, -1, keepdims=True)]
    for fn, want in zip(functions, wanted, strict=True):
        exe = tw.compile(fn, tw.spec(*x.shape), cache=False)
        assert "forgets" not in exe.text("loops")
        np.testing.assert_array_equal(np.isnan(exe(x)), np.isnan(want))


def test_two_results_of_which_one_has_no_sum() -> None:
    """The exponentials are a result of their own: the maximum must be NaN for them to be."""
    x = rows()

    def both(x):
        e = tw.exp(x - tw.max(x, -1, keepdims=True))
        return e, e / tw.sum(e, -1, keepdims=True)

    e, y = tw.compile(both, tw.spec(*x.shape), cache=False)(x)
    bad = np.isnan(x.max(-1))
    assert np.isnan(e[bad]).all() and np.isnan(y[bad]).all()
    np.testing.assert_allclose(y, definition(x), rtol=1e-5, atol=1e-37, equal_nan=True)
