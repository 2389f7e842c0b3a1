"""Initial values of parameters: numpy arrays, seeded, the same bits on every machine.

`seed(n)` sets the generator that layers draw from (it starts at 0); a layer's `seed=` gives it one of its own.

What makes the bits the same: the raw 64-bit words of numpy's Philox are integers, fixed by numpy's promise for bit
generators; everything after them is +, -, *, / and sqrt of f64, which IEEE 754 rounds correctly, one numpy call each, so
that nothing is fused or reordered. No exp, log or erf of a C library, no BLAS and no `np.sum` takes part: normal numbers go
through our own inverse of the normal distribution (`quantiles`), orthogonal matrices through our own Gram-Schmidt.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.errors import AttributeValueError, ShapeError
from .quantiles import normal_cdf, normal_quantile

Array = np.ndarray[Any, Any]
Seed = int | np.random.Generator | None
_CHUNK = 1 << 16  # elements that stay in the cache while they are transformed
_lock = threading.Lock()
_global = np.random.Generator(np.random.Philox(0))


def seed(value: int) -> None:
    """Starts the generator of initial values anew: models built after equal seeds are equal."""
    global _global  # noqa: PLW0603
    with _lock:
        _global = generator(value)


def generator(source: Seed = None) -> np.random.Generator:
    """The generator for a seed, a generator as it is, or (None) the common one. Raises AttributeValueError for others."""
    if isinstance(source, np.random.Generator):
        if isinstance(source.bit_generator, np.random.MT19937):
            raise AttributeValueError("initial values take 64-bit words: give a Generator over Philox or PCG64, not MT19937")
        return source
    if source is None:
        return _global
    if isinstance(source, bool) or not isinstance(source, (int, np.integer)) or source < 0:
        raise AttributeValueError(f"a seed is a non-negative int, not {source!r}")
    return np.random.Generator(np.random.Philox(int(source)))


# -- draws --------------------------------------------------------------------------------------------------------------
def _words(count: int, source: Seed) -> Array:
    return np.asarray(generator(source).bit_generator.random_raw(count), np.uint64)


def _unit_f32(count: int, source: Seed) -> Array:
    """f64 multiples of 2^-24 in [0, 1): the top 24 bits of each half of a word, the low half first."""
    words = _words((count + 1) // 2, source)
    halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], -1).reshape(-1)[:count]
    return (halves >> np.uint64(8)).astype(np.float64) * 2.0**-24


def _unit_f64(count: int, source: Seed) -> Array:
    """f64 in (0, 1), symmetric about 1/2: odd multiples of 2^-54."""
    return ((_words(count, source) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _shaped(shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    sizes = tuple(int(d) for d in shape)
    if any(d < 0 for d in sizes):
        raise ShapeError(f"a shape has no negative dimensions: {sizes}")
    return sizes, math.prod(sizes)


def _transformed(shape: Sequence[int], source: Seed, draw: Callable[[int, Seed], Array], fn: Callable[[Array], Array]) -> Array:
    """fn of the draws, in f32. In pieces: a chunk's temporaries stay in the cache. The pieces have even sizes."""
    sizes, count = _shaped(shape)
    drawn = generator(source)
    out = np.empty(count, np.float32)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        out[start:stop] = fn(draw(stop - start, drawn))
    return out.reshape(sizes)


# -- distributions ------------------------------------------------------------------------------------------------------
def zeros(shape: Sequence[int]) -> Array:
    """All zeros."""
    return np.zeros(shape, np.float32)


def ones(shape: Sequence[int]) -> Array:
    """All ones."""
    return np.ones(shape, np.float32)


def constant(shape: Sequence[int], value: float) -> Array:
    """One value everywhere."""
    return np.full(shape, value, np.float32)


def eye(shape: Sequence[int]) -> Array:
    """The identity matrix, also of a shape (rows, columns) that is not square. Raises ShapeError for other shapes."""
    if len(shape) != 2:
        raise ShapeError(f"eye needs two dimensions, not {tuple(shape)}")
    return np.eye(shape[0], shape[1], dtype=np.float32)


def uniform(shape: Sequence[int], low: float = -1.0, high: float = 1.0, seed: Seed = None) -> Array:
    """Evenly distributed over [low, high), in 2^24 steps."""
    if not low <= high:
        raise AttributeValueError(f"uniform: low {low} must not be above high {high}")
    top = np.nextafter(np.float32(high), np.float32(low))  # rounding to f32 must not reach `high`
    return _transformed(shape, seed, _unit_f32, lambda u: np.minimum((u * (high - low) + low).astype(np.float32), top))


def normal(shape: Sequence[int], mean: float = 0.0, std: float = 1.0, seed: Seed = None) -> Array:
    """Normally distributed."""
    return _transformed(shape, seed, _unit_f64, lambda u: normal_quantile(u) * std + mean)


def truncated_normal(
    shape: Sequence[int], mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0, seed: Seed = None
) -> Array:
    """Normally distributed within [mean + low * std, mean + high * std]: the quantiles of an even draw between the limits'
    own probabilities, so that distant limits cost nothing."""
    if not low < high:
        raise AttributeValueError(f"truncated_normal: low {low} must be below high {high}")
    if low > 0:  # probabilities near 1 have no digits left: work in the other tail
        return truncated_normal(shape, mean, -std, -high, -low, seed)
    first, last = normal_cdf(low), normal_cdf(high)

    def of(u: Array) -> Array:
        z = normal_quantile(np.maximum(u * (last - first) + first, 2.0**-1022))
        return np.minimum(np.maximum(z, low), high) * std + mean

    return _transformed(shape, seed, _unit_f64, of)


# -- by the shape of a weight -------------------------------------------------------------------------------------------
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
    """Rows (or columns, whichever are fewer) orthonormal, times gain (Saxe et al. 2013). Later axes are flattened.

    The Q of a normal matrix's QR decomposition with a positive diagonal of R, which is uniform over the orthogonal matrices
    (Mezzadri 2007). The work is cubic and not LAPACK's (see the head of this file): a quarter of a second for 512 by 512.
    """
    if len(shape) < 2:
        raise ShapeError(f"orthogonal needs two dimensions or more, not {tuple(shape)}")
    sizes, count = _shaped(shape)
    rows, columns = sizes[0], math.prod(sizes[1:])
    vectors = normal_quantile(_unit_f64(count, seed)).reshape(min(rows, columns), max(rows, columns))
    q = orthonormal_rows(vectors) * gain
    return (q if rows <= columns else q.T).reshape(sizes).astype(np.float32)


def orthonormal_rows(vectors: Array) -> Array:
    """Gram-Schmidt on the rows, modified: each vector is taken out of all later ones at once.

    In f64 the error is 2e-16 times the condition number, which for n normal vectors is some n: nothing, rounded to f32.
    """
    v = np.array(vectors, np.float64)
    for k in range(len(v)):
        v[k] /= np.sqrt(_row_sums(v[k : k + 1] * v[k : k + 1]))[0]
        rest = v[k + 1 :]
        rest -= _row_sums(rest * v[k])[:, None] * v[k]
    return v


def _row_sums(x: Array) -> Array:
    """Sums over the last axis by halving: an order of additions that depends on nothing but the length."""
    while (n := x.shape[1]) > 1:
        half = n // 2
        pairs = x[:, :half] + x[:, half : 2 * half]
        x = pairs if n % 2 == 0 else np.concatenate([pairs, x[:, -1:]], 1)
    return x[:, 0]


def linear_bias(shape: Sequence[int], fan_in: int, seed: Seed = None) -> Array:
    """PyTorch's default bias: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return uniform(shape, -bound, bound, seed)
