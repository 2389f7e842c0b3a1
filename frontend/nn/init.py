"""Initial values of parameters: numpy arrays from a seeded Philox generator, the same on every machine.

`seed(n)` sets the generator that layers draw from (it starts at 0); a layer's `seed=` gives it one of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.errors import AttributeValueError, ShapeError

Array = np.ndarray[Any, Any]
Seed = int | np.random.Generator | None
_lock = threading.Lock()
_global = np.random.Generator(np.random.Philox(0))


def seed(value: int) -> None:
    """Starts the generator of initial values anew: models built after equal seeds are equal."""
    global _global  # noqa: PLW0603
    with _lock:
        _global = np.random.Generator(np.random.Philox(value))


def generator(source: Seed = None) -> np.random.Generator:
    """The generator for a seed, a generator as it is, or (None) the common one."""
    if isinstance(source, np.random.Generator):
        return source
    if source is None:
        return _global
    if isinstance(source, bool) or not isinstance(source, (int, np.integer)) or source < 0:
        raise AttributeValueError(f"a seed is a non-negative int, not {source!r}")
    return np.random.Generator(np.random.Philox(int(source)))


def zeros(shape: Sequence[int]) -> Array:
    """All zeros."""
    return np.zeros(shape, np.float32)


def ones(shape: Sequence[int]) -> Array:
    """All ones."""
    return np.ones(shape, np.float32)


def uniform(shape: Sequence[int], low: float = -1.0, high: float = 1.0, seed: Seed = None) -> Array:
    """Evenly distributed over [low, high)."""
    draws = generator(seed).random(tuple(shape), np.float32)
    return (draws * np.float32(high - low) + np.float32(low)).astype(np.float32)


def normal(shape: Sequence[int], mean: float = 0.0, std: float = 1.0, seed: Seed = None) -> Array:
    """Normally distributed."""
    draws = generator(seed).standard_normal(tuple(shape), np.float32)
    return (draws * np.float32(std) + np.float32(mean)).astype(np.float32)


def truncated_normal(
    shape: Sequence[int], mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0, seed: Seed = None
) -> Array:
    """Normally distributed, drawn again where outside [mean + low * std, mean + high * std]."""
    if low >= high:
        raise AttributeValueError(f"truncated_normal: low {low} must be below high {high}")
    source = generator(seed)
    draws = source.standard_normal(tuple(shape), np.float32)
    while (bad := (draws < low) | (draws > high)).any():
        draws[bad] = source.standard_normal(int(bad.sum()), np.float32)
    return (draws * np.float32(std) + np.float32(mean)).astype(np.float32)


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(inputs, outputs) of one output element for a weight (out, in, kernel...). Raises ShapeError below two dimensions."""
    if len(shape) < 2:
        raise ShapeError(f"fan-in and fan-out need a weight of two dimensions or more, not {tuple(shape)}")
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def gain(nonlinearity: str, a: float = 0.0) -> float:
    """The factor that keeps variance through a nonlinearity: 'linear', 'sigmoid', 'tanh', 'relu', 'leaky_relu', 'selu'."""
    leaky = math.sqrt(2 / (1 + a * a))
    table = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "leaky_relu": leaky, "selu": 0.75}
    if nonlinearity not in table:
        raise AttributeValueError(f"unknown nonlinearity {nonlinearity!r}; expected one of {', '.join(table)}")
    return table[nonlinearity]


def xavier_uniform(shape: Sequence[int], gain: float = 1.0, seed: Seed = None) -> Array:
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out) (Glorot and Bengio 2010)."""
    bound = gain * math.sqrt(6 / sum(fans(shape)))
    return uniform(shape, -bound, bound, seed)


def xavier_normal(shape: Sequence[int], gain: float = 1.0, seed: Seed = None) -> Array:
    """Normal with variance gain^2 * 2 / (fan_in + fan_out) (Glorot and Bengio 2010)."""
    return normal(shape, 0.0, gain * math.sqrt(2 / sum(fans(shape))), seed)


def _fan(shape: Sequence[int], mode: str) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise AttributeValueError(f"mode is 'fan_in' or 'fan_out', not {mode!r}")
    return fans(shape)[mode == "fan_out"]


def kaiming_uniform(
    shape: Sequence[int], a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", seed: Seed = None
) -> Array:
    """Uniform with variance gain^2 / fan (He et al. 2015)."""
    bound = gain(nonlinearity, a) * math.sqrt(3 / _fan(shape, mode))
    return uniform(shape, -bound, bound, seed)


def kaiming_normal(
    shape: Sequence[int], a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", seed: Seed = None
) -> Array:
    """Normal with variance gain^2 / fan (He et al. 2015)."""
    return normal(shape, 0.0, gain(nonlinearity, a) / math.sqrt(_fan(shape, mode)), seed)


he_uniform, he_normal = kaiming_uniform, kaiming_normal


def lecun_uniform(shape: Sequence[int], seed: Seed = None) -> Array:
    """Uniform with variance 1 / fan_in (LeCun et al. 1998)."""
    bound = math.sqrt(3 / fans(shape)[0])
    return uniform(shape, -bound, bound, seed)


def lecun_normal(shape: Sequence[int], seed: Seed = None) -> Array:
    """Normal with variance 1 / fan_in (LeCun et al. 1998)."""
    return normal(shape, 0.0, math.sqrt(1 / fans(shape)[0]), seed)


def orthogonal(shape: Sequence[int], gain: float = 1.0, seed: Seed = None) -> Array:
    """Rows (or columns, whichever are fewer) orthonormal, times gain (Saxe et al. 2013). Later axes are flattened."""
    if len(shape) < 2:
        raise ShapeError(f"orthogonal needs two dimensions or more, not {tuple(shape)}")
    rows, columns = shape[0], math.prod(shape[1:])
    draws = generator(seed).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(draws)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return (gain * (q if rows >= columns else q.T)).reshape(tuple(shape)).astype(np.float32)


def linear_bias(shape: Sequence[int], fan_in: int, seed: Seed = None) -> Array:
    """PyTorch's default bias: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return uniform(shape, -bound, bound, seed)
