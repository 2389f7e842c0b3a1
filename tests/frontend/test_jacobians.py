"""vjp and jvp: products with the Jacobian, against central differences and against each other; nested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import DTypeError, GradientError, ShapeError

from .support import Array, run

RNG = np.random.default_rng(31)
W = RNG.standard_normal((5, 3))
X, T, U = RNG.standard_normal(5), RNG.standard_normal(5), RNG.standard_normal(3)


def layer(x: Any) -> Any:
    return tw.tanh(x @ W) * x.sum()


def jacobian(x: Array) -> Array:
    """d layer / dx, [3, 5], by hand."""
    h = np.tanh(x @ W)
    return ((1 - h**2) * x.sum())[:, None] * W.T + h[:, None]


def pulled(x: Any, u: Any) -> Any:
    y, pullback = tw.vjp(layer, x)
    return y, pullback(u)


def test_products_with_the_jacobian() -> None:
    y, (back,) = run(pulled, X, U)
    np.testing.assert_allclose(y, np.tanh(X @ W) * X.sum(), rtol=1e-12)
    np.testing.assert_allclose(back, U @ jacobian(X), rtol=1e-12)
    y, along = run(lambda x, t: tw.jvp(layer, [x], [t]), X, T)
    np.testing.assert_allclose(y, np.tanh(X @ W) * X.sum(), rtol=1e-12)
    np.testing.assert_allclose(along, jacobian(X) @ T, rtol=1e-12)


def test_several_arguments_and_results_in_containers() -> None:
    def fn(p: Any, b: Any) -> Any:
        return {"s": p["a"] * b, "m": (tw.sin(p["a"]) @ b, p["c"][0] ** 2)}

    p, b = {"a": X, "c": [T]}, RNG.standard_normal(5)
    cot = {"s": RNG.standard_normal(5), "m": (np.array(0.7), RNG.standard_normal(5))}
    dp, db = run(lambda p, b, c: tw.vjp(fn, p, b)[1](c), p, b, cot)
    np.testing.assert_allclose(dp["a"], cot["s"] * b + 0.7 * np.cos(X) * b, rtol=1e-12)
    np.testing.assert_allclose(dp["c"][0], 2 * T * cot["m"][1], rtol=1e-12)
    np.testing.assert_allclose(db, cot["s"] * X + 0.7 * np.sin(X), rtol=1e-12)
    tp, tb = {"a": T, "c": [U[0] * T]}, RNG.standard_normal(5)
    _, along = run(lambda p, b, tp, tb: tw.jvp(fn, [p, b], [tp, tb]), p, b, tp, tb)
    np.testing.assert_allclose(along["s"], T * b + X * tb, rtol=1e-12)
    np.testing.assert_allclose(along["m"][0], (np.cos(X) * T) @ b + np.sin(X) @ tb, rtol=1e-12)
    np.testing.assert_allclose(along["m"][1], 2 * T * tp["c"][0], rtol=1e-12)


def test_a_cotangent_computed_from_the_primals_is_no_part_of_the_derivative() -> None:
    found = run(lambda x: tw.vjp(layer, x)[1](layer(x))[0], X)
    np.testing.assert_allclose(found, (np.tanh(X @ W) * X.sum()) @ jacobian(X), rtol=1e-12)


def test_second_derivatives_by_every_nesting() -> None:
    """A Hessian-vector product of a scalar: forward over reverse, reverse over reverse, reverse over forward."""

    def scalar(x: Any) -> Any:
        return (layer(x) ** 2).sum()

    forward = run(lambda x, t: tw.jvp(tw.grad(scalar), [x], [t])[1], X, T)
    reverse = run(lambda x, t: tw.grad(lambda x: (tw.grad(scalar)(x) * t).sum())(x), X, T)
    mixed = run(lambda x, t: tw.grad(lambda x: tw.jvp(scalar, [x], [t])[1])(x), X, T)

    def slope(x: Array) -> Array:
        return 2 * (np.tanh(x @ W) * x.sum()) @ jacobian(x)

    want = (slope(X + 1e-5 * T) - slope(X - 1e-5 * T)) / 2e-5
    for found in (forward, reverse, mixed):
        np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-7)
    again = run(lambda x, t: tw.jvp(lambda x: tw.jvp(layer, [x], [t])[1], [x], [t])[1], X, T)
    want = (jacobian(X + 1e-5 * T) @ T - jacobian(X - 1e-5 * T) @ T) / 2e-5
    np.testing.assert_allclose(again, want, rtol=1e-7, atol=1e-7)


def test_wrong_products_are_refused() -> None:
    with pytest.raises(ShapeError, match="a cotangent has the shape of its value"):
        run(lambda x: tw.vjp(layer, x)[1](x), X)
    with pytest.raises(ShapeError, match="a tangent is needed for each of 1"):
        run(lambda x: tw.jvp(layer, [x], [x, x]), X)
    with pytest.raises(DTypeError, match="only floats"):
        run(lambda x: tw.vjp(layer, x), np.arange(5))
    with pytest.raises(DTypeError, match="only floats have derivatives"):
        run(lambda x: tw.vjp(lambda x: x > 0, x)[1](x), X)
    with pytest.raises(GradientError, match="nothing to differentiate"):
        run(lambda x: tw.vjp(lambda x: (), x)[1](()), X)
