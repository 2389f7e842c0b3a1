"""a * b + c of f32 arrays with a single rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def fma32(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in f64; the sum is rounded to odd there, so that the rounding to f32 is the only one (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums")."""
    x, y, z = (np.asarray(v, np.float64) for v in (a, b, c))
    p = x * y
    s = np.asarray(p + z)
    t = s - p
    error = (p - (s - t)) + (z - t)
    inexact = np.isfinite(error) & (error != 0)
    bits = s.view(np.int64)
    step = np.where(np.signbit(error) == np.signbit(s), 1, -1)
    bits = np.where(inexact & ((bits & 1) == 0), bits + step, bits)
    return np.asarray(bits.view(np.float64).astype(np.float32))
