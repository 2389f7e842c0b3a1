"""The inverse of the normal distribution in plain arithmetic, so that it gives the same bits on every machine.

M. J. Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988), PPND16:
rational approximations of degree 7 in three ranges, relative error about 1e-16. The tails need a logarithm, which is ours
too: frexp (exact) and the series of the inverse hyperbolic tangent. Polynomials are evaluated by Horner's rule, one
multiplication and one addition at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

_CENTRE: Final = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL: Final = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR: Final = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip
_LN2: Final = (0.693147180369123816490, 1.90821492927058770002e-10)  # 33 bits and the rest: a multiple of the first is exact
_SERIES: Final = tuple(1.0 / k for k in range(1, 25, 2))  # atanh(s) / s in s^2; |s| <= 0.172, so the rest is below 1e-19


def _horner(coefficients: Sequence[float], x: Array) -> Array:
    y = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        y *= x
        y += c
    return y


def _ratio(pair: tuple[Sequence[float], Sequence[float]], x: Array) -> Array:
    return _horner(pair[0], x) / _horner(pair[1], x)


def _log(x: Array) -> Array:
    """Natural logarithm of positive normal numbers: x = m * 2^e, log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    small = m < 0.70710678118654752
    m = np.where(small, m + m, m)
    e = e.astype(np.float64) - small
    s = (m - 1.0) / (m + 1.0)
    return e * _LN2[0] + ((s + s) * _horner(_SERIES, s * s) + e * _LN2[1])


def normal_quantile(p: Array) -> Array:
    """z with P(N(0, 1) <= z) = p, for f64 p in (0, 1)."""
    p = np.asarray(p, np.float64)
    q = p - 0.5
    z = q * _ratio(_CENTRE, np.maximum(0.180625 - q * q, 0.0))
    outside = np.abs(q) > 0.425
    if outside.any():
        low = np.minimum(p[outside], 1.0 - p[outside])
        r = np.sqrt(-_log(low))
        far = np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR, r - 5.0))
        z[outside] = np.where(q[outside] < 0, -far, far)
    return z


def normal_cdf(z: float) -> float:
    """P(N(0, 1) <= z), by bisection of the quantile: every step is plain arithmetic. 0 below -37, 1 above 8.3."""
    if z > 0:
        return 1.0 - normal_cdf(-z)
    low, high = -1022.0, 0.0  # of log2 p: first the octave, then p itself
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if normal_quantile(np.array([2.0**middle]))[0] <= z else (low, middle)
    p, q = 2.0**low, 2.0**high
    if normal_quantile(np.array([p]))[0] > z:
        return 0.0
    for _ in range(60):
        middle = (p + q) / 2
        if not p < middle < q:
            break
        p, q = (middle, q) if normal_quantile(np.array([middle]))[0] <= z else (p, middle)
    return p
