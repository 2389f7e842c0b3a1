"""Random shapes, indices and expressions against numpy; graphs of a size that would meet the recursion limit."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import tensorwright as tw
from hypothesis import given, settings
from hypothesis import strategies as st

from .support import run

FEW = settings(max_examples=60, deadline=None)


def numbers(shape: tuple[int, ...]) -> Any:
    return np.arange(1.0, 1.0 + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@FEW
@given(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, max_side=4))
def test_any_shapes_that_numpy_broadcasts(shapes: Any) -> None:
    a, b, c = (numbers(s) for s in shapes.input_shapes)
    got = run(lambda a, b, c: (a + b * c, tw.where(a > b, b, c)), a, b, c)
    for g, w in zip(got, (a + b * c, np.where(a > b, b, c)), strict=True):
        assert g.shape == shapes.result_shape
        np.testing.assert_array_equal(g, w)


@FEW
@given(st.data())
def test_any_basic_index(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
    key = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    x = numbers(shape)
    got, want = run(lambda x: x[key], x), x[key]
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


@FEW
@given(st.data())
def test_any_integer_array_index(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4))
    index = data.draw(hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=3)))
    x = numbers(shape)
    np.testing.assert_array_equal(run(lambda x: x[index], x), x[index])


@FEW
@given(st.data())
def test_any_reduction(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    axes = data.draw(st.none() | hnp.valid_tuple_axes(len(shape), min_size=1))
    keepdims = data.draw(st.booleans())
    x = numbers(shape)
    for name in ("sum", "mean", "max", "min"):
        got = run(lambda x, n=name: getattr(tw, n)(x, axes, keepdims=keepdims), x)
        np.testing.assert_allclose(got, getattr(np, name)(x, axis=axes, keepdims=keepdims), rtol=1e-5)


def test_a_long_chain_is_no_trouble() -> None:
    count = 5_000  # five times Python's recursion limit

    def chain(x: Any) -> Any:
        for i in range(count):
            x = x + (i % 7)
        return tw.sum(x)

    assert run(chain, np.zeros(2, np.float32)) == 2 * sum(i % 7 for i in range(count))
