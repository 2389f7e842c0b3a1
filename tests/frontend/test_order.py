"""Sorting, scatter and shifts as a user calls them, against numpy."""

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import ShapeError

X = np.random.default_rng(0).integers(0, 9, (4, 33)).astype(np.float32)


def test_sort_and_argsort_are_stable_in_both_directions():
    exe = tw.compile(
        lambda x: (tw.sort(x), tw.argsort(x), tw.argsort(x, axis=0, descending=True), tw.sort(x, None)), tw.spec(4, 33)
    )
    up, at, down, flat = exe(X)
    assert np.array_equal(up, np.sort(X))
    assert np.array_equal(at, np.argsort(X, kind="stable"))
    assert np.array_equal(down, np.argsort(-X, axis=0, kind="stable"))
    assert np.array_equal(flat, np.sort(X, None))


@pytest.mark.parametrize("largest", [True, False])
def test_top_k(largest):
    values, at = tw.compile(lambda x: tw.top_k(x, 5, largest=largest), tw.spec(4, 33))(X)
    order = np.argsort(-X if largest else X, kind="stable")[:, :5]
    assert np.array_equal(at, order)
    assert np.array_equal(values, np.take_along_axis(X, order, 1))


def test_nan_is_larger_than_every_number():
    x = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    up, down = tw.compile(lambda x: (tw.argsort(x), tw.argsort(x, descending=True)), tw.spec(4))(x)
    assert up.tolist() == [3, 0, 2, 1] and down.tolist() == [1, 2, 0, 3]


def test_more_than_there_are():
    with pytest.raises(ShapeError, match="k is 34, of 33"):
        tw.trace(lambda x: tw.top_k(x, 34), tw.spec(4, 33))


def test_the_gradient_of_a_sort_goes_where_the_elements_came_from():
    weights = np.arange(33, dtype=np.float32)
    x = np.random.default_rng(1).normal(size=33).astype(np.float32)
    grad = tw.compile(tw.grad(lambda x: (tw.sort(x) * weights).sum()), tw.spec(33))(x)
    assert np.array_equal(grad, np.argsort(np.argsort(x)).astype(np.float32))


def test_scatter_keeps_the_last_and_its_gradient_knows():
    at = np.array([1, 3, 1, 9], np.int64)  # 9 is dropped, the first update of 1 is written over

    def put(x, u):
        return tw.scatter(x, at, u)

    x, u = np.zeros(5, np.float32), np.arange(1, 5, dtype=np.float32)
    assert tw.compile(put, tw.spec(5), tw.spec(4))(x, u).tolist() == [0, 3, 0, 2, 0]
    dx, du = tw.compile(tw.grad(lambda x, u: put(x, u).sum(), argnums=(0, 1)), tw.spec(5), tw.spec(4))(x, u)
    assert dx.tolist() == [1, 0, 1, 0, 1] and du.tolist() == [0, 1, 1, 0]


def test_shifts():
    a, b = np.array([-8, 8, 1, -1], np.int32), np.array([1, 40, 31, 40], np.int32)
    left, right = tw.compile(lambda a, b: (a << b, a >> b), tw.spec(4, dtype="i32"), tw.spec(4, dtype="i32"))(a, b)
    assert left.tolist() == [-16, 0, -(2**31), 0] and right.tolist() == [-4, 0, 0, -1]


def test_cumprod():
    got = tw.compile(lambda x: tw.cumprod(x, 1, exclusive=True), tw.spec(2, 4))(np.full((2, 4), 2, np.float32))
    assert got.tolist() == [[1, 2, 4, 8]] * 2
