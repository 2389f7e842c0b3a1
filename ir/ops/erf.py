"""The error function in double precision, vectorised.

Rational approximations of W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of
Computation 23 (1969), 631-637: one for erf on [0, 0.46875], two for erfc beyond, each good to about 1e-16 relative.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

_Array = np.ndarray[Any, Any]

# Numerators and denominators in descending powers; of x^2 on [0, 0.46875], x on [0.46875, 4], 1 / x^2 beyond.
_SMALL: Final = (
    (1.85777706184603153e-1, 3.16112374387056560e00, 1.13864154151050156e02, 3.77485237685302021e02, 3.20937758913846947e03),
    (1.0, 2.36012909523441209e01, 2.44024637934444173e02, 1.28261652607737228e03, 2.84423683343917062e03),
)
_MIDDLE: Final = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e00, 6.61191906371416295e01, 2.98635138197400131e02,
     8.81952221241769090e02, 1.71204761263407058e03, 2.05107837782607147e03, 1.23033935479799725e03),
    (1.0, 1.57449261107098347e01, 1.17693950891312499e02, 5.37181101862009858e02, 1.62138957456669019e03,
     3.29079923573345963e03, 4.36261909014324716e03, 3.43936767414372164e03, 1.23033935480374942e03),
)  # fmt: skip
_LARGE: Final = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1, 1.60837851487422766e-2,
     6.58749161529837803e-4),
    (1.0, 2.56852019228982242e00, 1.87295284992346725e00, 5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
)  # fmt: skip
_INVERSE_SQRT_PI: Final = 5.6418958354775628695e-1


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], t: _Array) -> _Array:
    return np.asarray(np.polyval(coefficients[0], t) / np.polyval(coefficients[1], t))


def erf(x: _Array) -> _Array:
    """erf of each element, in the dtype of x (computed in f64)."""
    x = np.asarray(x)
    y = np.abs(x.astype(np.float64)).reshape(-1)
    result = y.copy()  # NaN stays NaN
    small = y <= 0.46875
    result[small] = y[small] * _ratio(_SMALL, y[small] ** 2)
    middle = (y > 0.46875) & (y <= 4.0)
    m = y[middle]
    result[middle] = 1.0 - np.exp(-m * m) * _ratio(_MIDDLE, m)
    large = y > 4.0
    m = np.minimum(y[large], 30.0)  # erfc(30) < 1e-300: 1 either way
    t = 1.0 / (m * m)
    result[large] = 1.0 - np.exp(-m * m) * (_INVERSE_SQRT_PI - t * _ratio(_LARGE, t)) / m
    return np.asarray(np.copysign(result.reshape(x.shape), x).astype(x.dtype))
