"""Fits the polynomials of vecmath_f32.py and vecmath_f64.py. Run as a script to print their coefficients; nothing imports it.

Each fit minimises the greatest weighted error on Chebyshev nodes by iteratively reweighted least squares (Lawson). f32
coefficients are rounded one by one, lowest power first, the others being fitted again after each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]


def nodes(low: float, high: float, count: int = 2000) -> Array:
    return np.asarray(np.cos((np.arange(count) + 0.5) * np.pi / count) * (high - low) / 2 + (high + low) / 2)


def lawson(x: Array, target: Array, weight: Array, powers: list[int]) -> Array:
    """Coefficients of the given powers of x that minimise max |weight * (p(x) - target)|."""
    scale = np.max(np.abs(x))
    basis = np.stack([(x / scale) ** p for p in powers], axis=1)
    u = np.ones_like(x)
    best, error = np.zeros(len(powers)), np.inf
    for _ in range(200):
        s = np.sqrt(u) * weight
        c = np.linalg.lstsq(basis * s[:, None], target * s, rcond=None)[0]
        e = np.abs((basis @ c - target) * weight)
        if e.max() < error:
            best, error = c, e.max()
        u *= e / e.max() + 1e-6
        u /= u.sum()
    return np.asarray(best / np.array([float(scale) ** p for p in powers]))


def fit(f: Function, weight: Function, low: float, high: float, degree: int, *, single: bool = True) -> tuple[list[float], float]:
    """Coefficients (lowest power first) of a polynomial for f, and its greatest weighted error."""
    x = nodes(low, high)
    w, rest, powers, out = weight(x), f(x), list(range(degree + 1)), []
    if not single:
        out = [float(c) for c in lawson(x, rest, w, powers)]
    while powers and single:
        c = float(np.float32(lawson(x, rest, w, powers)[0]))
        out.append(c)
        rest = rest - c * x ** powers.pop(0)
    return out, float(np.max(np.abs(w * (np.polynomial.polynomial.polyval(x, out) - f(x)))))


def main() -> None:
    half = math.log(2) / 2 * 1.001
    low, high = math.sqrt(0.5) - 1.0001, math.sqrt(2) - 0.9999
    quarter = math.pi / 4 * 1.001

    def positive(g: Function) -> Function:
        return lambda z: g(np.sqrt(z))

    def log2_series(z: Array) -> Array:
        s = np.sqrt(z)
        return np.asarray(2 * np.arctanh(s) / s / math.log(2))

    edge = (math.sqrt(2) - 1) / (math.sqrt(2) + 1) * 1.001
    cases = {
        "EXP": (
            lambda r: (np.expm1(r) - r) / r**2,
            lambda r: r**2 / np.minimum(np.exp(r), np.abs(np.expm1(r))),
            -half,
            half,
            4,
            True,
        ),
        "POWER": (
            lambda f: np.expm1(f * math.log(2)) / f,
            lambda f: np.abs(f) / np.exp2(f),
            -0.5001,
            0.5001,
            4,
            True,
        ),
        "LOG": (lambda f: (np.log1p(f) - f + f * f / 2) / f**3, lambda f: f**3 / np.log1p(f), low, high, 8, True),
        "SIN": (positive(lambda r: (np.sin(r) - r) / r**3), positive(lambda r: r**3 / np.sin(r)), 1e-6, quarter**2, 3, True),
        "COS": (
            positive(lambda r: (np.cos(r) - 1 + r * r / 2) / r**4),
            positive(lambda r: r**4 / np.cos(r)),
            1e-2,
            quarter**2,
            3,
            True,
        ),
        "LOG2": (log2_series, lambda z: 1 / log2_series(z), 1e-9, edge**2, 7, False),
        "EXP2": (np.exp2, lambda f: np.exp2(-f), -0.5001, 0.5001, 8, False),
    }
    for name, case in cases.items():
        *arguments, single = case
        c, error = fit(*arguments, single=single)  # type: ignore[arg-type]
        print(f"_{name} = ({', '.join(map(repr, c))})  # error {error:.1e}")
    segments(np.vectorize(math.erf), 17 / 64)
    tanh_segments(1.64, 9.05)
    complement(np.vectorize(math.erfc), 12)


def segments(erf: Function, width: float) -> None:
    """Sixteen polynomials of degree 5 for erf(k * width + r), |r| <= width / 2; the first is 0 at 0."""
    half, worst, rows = width / 2 * 1.001, 0.0, []
    for k in range(16):
        if k == 0:
            c, error = fit(lambda r: erf(r) / r, lambda r: r / erf(r), 1e-9, half, 4)
            c = [0.0, *c]
        else:
            c, error = fit(lambda r, at=k * width: erf(at + r), lambda r, at=k * width: 1 / erf(at + r), -half, half, 5)  # type: ignore[misc]
        rows.append(c)
        worst = max(worst, error)
    print(f"_ERF = (  # error {worst:.1e}")
    for column in zip(*rows, strict=True):
        print(f"    ({', '.join(map(repr, column))}),")
    print(")")


def tanh_segments(slope: float, top: float) -> None:
    """Sixteen polynomials of degree 5 for tanh(centre + r), four for each octave of 1 + slope * |x|.

    The first is 0 at 0 and has slope 1. In the others tanh(centre) is all but a float, and the coefficient of r is the
    float next to 1 - tanh(centre)^2, so that code may derive it; the fit is that of the coefficients from r^2 on.
    """
    edges = [(2.0**k * (1 + j / 4) - 1) / slope for k in range(4) for j in range(4)] + [top]
    c, worst = fit(lambda r: (np.tanh(r) / r - 1) / r, lambda r: r * r / np.tanh(r), 1e-4, edges[1] * 1.0001, 3)
    centres, rows = [0.0], [[0.0, *c]]
    for low, high in pairwise(edges[1:]):
        middle = np.float32((low + high) / 2)
        near = (middle.view(np.int32) + np.arange(-200, 201, dtype=np.int32)).view(np.float32).astype(np.float64)
        at = float(near[np.argmin(np.abs(np.tanh(near) - np.tanh(near).astype(np.float32)))])
        value = float(np.float32(np.tanh(at)))
        slope_there = float(np.float32(1 - value * value))

        def rest(r: Array, at: float = at, linear: float = slope_there) -> Array:
            r = np.where(np.abs(r) < 1e-3, 1e-3, r)
            return np.asarray((np.sinh(r) / (np.cosh(at + r) * np.cosh(at)) - linear * r) / r**2)

        reach = max(high - at, at - low) * 1.0001
        c, error = fit(rest, lambda r, at=at: r * r / np.tanh(at + r), -reach, reach, 3)  # type: ignore[misc]
        worst = max(worst, error)
        centres.append(at)
        rows.append([value, *c])
    print(f"_TANH_CENTRES = ({', '.join(map(repr, centres))})")
    print(f"_TANH = (  # of r^0, r^2, r^3, r^4, r^5; error {worst:.1e}")
    for column in zip(*rows, strict=True):
        print(f"    ({', '.join(map(repr, column))}),")
    print(")")


def complement(erfc: Function, degree: int) -> None:
    """erfc(a) exp(a^2) (1 + 2a) on 1 <= a <= 6 by least squares in u = 2.2 - 9.6 / (a + 2), weighted with erfc."""

    def target(u: Array) -> Array:
        a = 9.6 / (2.2 - u.astype(np.longdouble)) - 2
        near = a.astype(np.float64)
        # erfc at the f64 neighbour, moved to a by its derivative
        value = erfc(near) - (a - near) * np.exp(-a * a) * 2 / np.sqrt(np.pi)
        return np.asarray(value * np.exp(a * a) * (1 + 2 * a))

    u = nodes(-1, 1)
    basis, weight, exact = np.vander(u, degree + 1, increasing=True), erfc(9.6 / (2.2 - u) - 2), target(u)
    c = np.zeros(degree + 1)
    for _ in range(4):  # least squares, refined by residuals in longdouble
        rest = exact - np.polynomial.polynomial.polyval(u.astype(np.longdouble), c.astype(np.longdouble))
        c = c + np.linalg.lstsq(basis * weight[:, None], (rest * weight).astype(np.float64), rcond=None)[0]
    error = np.max(np.abs(rest / exact * weight))
    print(f"_ERFC = ({', '.join(map(repr, map(float, c)))})  # error {error:.1e}")


if __name__ == "__main__":
    main()
