"""Discrete Fourier transforms as matrix products: a length is split into factors, each small enough for one matrix.

Complex numbers are pairs of Tensors. Lengths up to `DIRECT` are one product with the matrix of the transform, which runs at
the speed of a contraction; a longer one is split as n = a * b (Cooley and Tukey 1965), and a large prime becomes a
convolution of a length that is a power of two (Bluestein 1970).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..ir.dtypes import DType, f32
from ..ir.errors import DTypeError, ShapeError
from .context import error
from .core import TensorLike, as_tensor
from .elementwise import astype
from .linalg import matmul
from .movement import concatenate, flip, moveaxis, pad, reshape, slice_axis, swapaxes

if TYPE_CHECKING:
    from .tensor import Tensor

Array = np.ndarray[Any, Any]
Complex = tuple["Tensor", "Tensor | None"]  # the imaginary part is None where it is zero
DIRECT: Final = 256


def dft(
    real: TensorLike, imaginary: TensorLike | None = None, *, axis: int = -1, length: int | None = None, inverse: bool = False,
    onesided: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The real and imaginary part of the discrete Fourier transform along an axis, as numpy's fft.fft (ifft) has it.

    The axis is cut, or filled with zeros, to `length`. `onesided` gives the first length // 2 + 1 frequencies only, which say
    all of a real signal. Raises ShapeError for a symbolic length or for none, DTypeError for other than f32 and f64.
    """
    re = as_tensor(real, what="dft")
    im = None if imaginary is None else as_tensor(imaginary, re.dtype, "dft")
    if re.dtype.name not in ("f32", "f64"):
        raise error(DTypeError, f"dft takes f32 or f64, not {re.dtype}; cast first", operand=re)
    parts = [_resized(moveaxis(t, axis, -1), length) for t in (re, im) if t is not None]
    n = parts[0].shape[-1]
    if not isinstance(n, int) or n < 1:
        raise error(ShapeError, f"dft along an axis of size {n}; a length is known when tracing and at least 1", operand=re)
    made = _transform((parts[0], parts[1] if im is not None else None), n, inverse)
    out = [made[0], made[0] * 0.0 if made[1] is None else made[1]]
    if inverse:
        out = [t * (1.0 / n) for t in out]
    if onesided:
        out = [slice_axis(t, -1, 0, n // 2 + 1) for t in out]
    return moveaxis(out[0], -1, axis), moveaxis(out[1], -1, axis)


def irdft(real: TensorLike, imaginary: TensorLike, *, axis: int = -1, length: int | None = None) -> Tensor:
    """The real signal of one-sided frequencies along an axis, as numpy's fft.irfft has it; 2 * (count - 1) long by default.

    Raises as dft.
    """
    re, im = as_tensor(real, what="irdft"), as_tensor(imaginary, what="irdft")
    re, im = moveaxis(re, axis, -1), moveaxis(im, axis, -1)
    count = re.shape[-1]
    if not isinstance(count, int) or count < 1:
        raise error(ShapeError, f"irdft along an axis of size {count}; it is known when tracing and at least 1", operand=re)
    n = 2 * (count - 1) if length is None else length
    if n < 1:
        raise error(ShapeError, f"irdft: the length of the signal is at least 1, not {n}", operand=re)
    re, im = _resized(re, n // 2 + 1), _resized(im, n // 2 + 1)
    # x[n - k] is the conjugate of x[k]; the imaginary parts of x[0] and, for even n, x[n / 2] do not count
    inner = (n - 1) // 2
    ends = np.ones(n // 2 + 1)
    ends[0] = 0
    if n % 2 == 0:
        ends[-1] = 0
    im = im * as_tensor(ends.astype(im.dtype.numpy))
    mirrored = [flip(slice_axis(t, -1, 1, inner + 1), (-1,)) for t in (re, im)]
    whole = concatenate([re, mirrored[0]], -1), concatenate([im, mirrored[1] * -1.0], -1)
    made, _ = _transform(whole, n, True)
    return moveaxis(made * (1.0 / n), -1, axis)


def _resized(x: Tensor, length: int | None) -> Tensor:
    n = x.shape[-1]
    if length is None or length == n:
        return x
    if not isinstance(n, int):
        raise error(ShapeError, f"dft: a symbolic axis ({n}) cannot be made {length} long", operand=x)
    return slice_axis(x, -1, 0, length) if length < n else pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - n)])


def _transform(x: Complex, n: int, inverse: bool) -> Complex:
    """Along the last axis, without the inverse's 1 / n."""
    if n == 1:
        return x
    if n <= DIRECT:
        return _product(x, n, inverse)
    a = next((d for d in range(math.isqrt(n), 1, -1) if n % d == 0), 1)
    if a == 1:
        return _prime(x, n, inverse)
    b = n // a
    # j = j1 b + j2 and k = k1 + a k2:  X[k] = sum_j2 W_b^(j2 k2) W_n^(j2 k1) sum_j1 W_a^(j1 k1) x[j]
    y = _each(x, lambda t: swapaxes(reshape(t, (*t.shape[:-1], a, b)), -1, -2))
    y = _transform(y, a, inverse)
    y = _multiply(y, _unit(np.outer(np.arange(b), np.arange(a)), n, inverse))
    y = _transform(_each(y, lambda t: swapaxes(t, -1, -2)), b, inverse)
    return _each(y, lambda t: reshape(swapaxes(t, -1, -2), (*t.shape[:-2], n)))


def _unit(exponent: Array, n: int, inverse: bool) -> Array:
    """exp(-+ 2 pi i exponent / n), the exponent reduced first: it is exact then."""
    return np.exp((2j if inverse else -2j) * np.pi * (exponent % n) / n)


def _product(x: Complex, n: int, inverse: bool) -> Complex:
    w = _unit(np.outer(np.arange(n), np.arange(n)), n, inverse)
    re, im = x
    if im is None:
        both = matmul(re, _constant(np.concatenate([w.real, w.imag], 1), re.dtype))
    else:
        whole = np.block([[w.real, w.imag], [-w.imag, w.real]])
        both = matmul(concatenate([re, im], -1), _constant(whole, re.dtype))
    return slice_axis(both, -1, 0, n), slice_axis(both, -1, n, 2 * n)


def _prime(x: Complex, n: int, inverse: bool) -> Complex:
    """j k = (j^2 + k^2 - (k - j)^2) / 2 makes the transform a convolution with a chirp, done by longer transforms."""
    m = 1 << (2 * n - 2).bit_length()
    square = np.arange(n, dtype=object) ** 2 % (2 * n)
    chirp = _unit(square.astype(np.int64), 2 * n, inverse)
    kernel = np.zeros(m, complex)
    kernel[:n] = chirp.conj()
    kernel[m - n + 1 :] = chirp.conj()[1:][::-1]
    y = _each(_multiply(x, chirp), lambda t: pad(t, [(0, 0)] * (t.ndim - 1) + [(0, m - n)]))
    y = _multiply(_transform(y, m, False), np.fft.fft(kernel) / m)
    y = _each(_transform(y, m, True), lambda t: slice_axis(t, -1, 0, n))
    return _multiply(y, chirp)


def _each(x: Complex, fn: Callable[[Tensor], Tensor]) -> Complex:
    return fn(x[0]), None if x[1] is None else fn(x[1])


def _multiply(x: Complex, by: Array) -> Complex:
    re, im = x
    c, s = _constant(by.real, re.dtype), _constant(by.imag, re.dtype)
    return (re * c, re * s) if im is None else (re * c - im * s, re * s + im * c)


def _constant(array: Array, dtype: DType) -> Tensor:
    return as_tensor(np.ascontiguousarray(array).astype(dtype.numpy))


def as_float(x: TensorLike) -> Tensor:
    """x, or its f32 where dft would not take it."""
    t = as_tensor(x, what="dft")
    return t if t.dtype.name in ("f32", "f64") else astype(t, f32)
