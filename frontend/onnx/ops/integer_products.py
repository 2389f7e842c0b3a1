"""Sums of products of 8-bit integers less their zero points, in i32.

    sum_k (a - za)(b - zb)  =  sum_k a b  -  za sum_k (b - zb)  -  zb sum_k a

The first sum is a contraction of bytes; those of b follow from the weights alone, and those of a are there only where zb is not
zero. u8 weights around 128 are i8 weights around 0 with another sign bit. All of it is modulo 2^32, as the sums of ONNX's integer
operators are: exact wherever the whole sum fits i32, which sums of up to MOST products of any bytes do. Longer ones are computed
in f64 where what they are rounded to would show an overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ....ir.dims import Dim, as_int, product
from ....ir.dtypes import f32, f64, i8, i32, u8
from ... import elementwise as ew
from ...core import apply, as_tensor, broadcast_to
from ...linalg import matmul
from ...movement import full, pad, repeat, reshape
from ...reductions import sum as total
from ...tensor import Tensor
from ..call import Call
from .convolution import Pads, convolve

MOST: Final = (2**31 - 1) // (255 * 255)  # products of two bytes whose sum fits i32, whatever they are: 33,025
_EXACT: Final = 1 << 24  # integers below it are all numbers of f32
_FEW: Final = 4  # channels in a group below which bytes have nothing to gain: four are multiplied at once


def _known(n: Call, zero: Tensor | None) -> np.ndarray | None:
    """A zero point's numbers where the import knows them; 0 where there is none."""
    return np.zeros(1, np.int32) if zero is None else n.importer.evaluate(zero)


def _flipped(x: Tensor) -> Tensor:
    """u8 less 128, as i8."""
    return apply("bit_cast", ew.bitwise_xor(x, np.uint8(128)), source="u8", to="i8")


def _weights(n: Call, b: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and their zero point, the latter None where it is 0; of u8 around 128 those of i8 around 0."""
    known = _known(n, zero)
    if known is None:
        return b, zero
    if not known.any():
        return b, None
    if b.dtype is u8 and (known == 128).all():
        return _flipped(b), None
    return b, zero


def _wide(n: Call, x: Tensor, zero: Tensor | None) -> int:
    """A bound of |x - zero|."""
    known = _known(n, zero)
    return 128 if known is not None and not known.any() and x.dtype is i8 else 255


def _centred(x: Tensor, zero: Tensor | None, dtype: object) -> Tensor:
    return x.astype(dtype) if zero is None else x.astype(dtype) - zero.astype(dtype)


def rows_of(t: Tensor, a: Tensor) -> Tensor:
    """A zero point or scale of the rows of a: a number, or one for each row."""
    return t if t.ndim != 1 or t.shape[0] == 1 or a.ndim < 2 else reshape(t, (-1, 1))


def _bytes(*operands: Tensor) -> bool:
    return all(t.dtype in (i8, u8) for t in operands)


def integer_matmul(n: Call, a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None, wrap: bool = False) -> Tensor:
    """(a - a_zero) @ (b - b_zero) exactly: in i32, or in f64 where i32 might overflow. With `wrap` always modulo 2^32, in i32.

    A zero point is a number; or there is one for each row of a, or column of b.
    """
    terms, a_zero = a.shape[-1], None if a_zero is None else rows_of(a_zero, a)
    if not _bytes(a, b) or not (wrap or (isinstance(terms, int) and terms <= MOST)):
        wide = f32 if isinstance(terms, int) and _wide(n, a, a_zero) * _wide(n, b, b_zero) * terms <= _EXACT else f64
        return matmul(_centred(a, a_zero, wide), _centred(b, b_zero, wide))
    vector = b.ndim == 1
    b, b_zero = _weights(n, b, b_zero)
    known = _known(n, a_zero)
    y = matmul(a, b)
    if known is None or known.any():
        assert a_zero is not None
        sums = _sum(_centred(b, b_zero, i32), -2 if not vector else 0, not vector and a.ndim > 1)
        y = y - a_zero.astype(i32) * sums
    if b_zero is not None:
        y = y - b_zero.astype(i32) * _sum(a.astype(i32), -1, not vector)
    return y


def _sum(x: Tensor, axes: int | tuple[int, ...], keepdims: bool = False) -> Tensor:
    """Of i32, modulo 2^32."""
    return total(x, axes, keepdims=keepdims).astype(i32)


def _channels(t: Tensor, rank: int) -> Tensor:
    """A number, or one for each output channel, over [batch, channels, pixels...]."""
    return t if t.ndim == 0 or t.shape[0] == 1 else reshape(t, (1, -1, *(1,) * (rank - 2)))


def _surrounded(n: Call, x: Tensor, zero: Tensor | None, pads: Pads) -> Tensor:
    """x with its zero point around it, which stands for 0."""
    widths = [(0, 0), (0, 0), *pads]
    if not any(p for pair in pads for p in pair):
        return x
    known = _known(n, zero)
    if known is not None:
        return pad(x, widths, float(known.reshape(-1)[0]))
    assert zero is not None
    inside = pad(full((1, 1, *x.shape[2:]), as_tensor(np.uint8(1))), widths)
    around = pad(x, widths)
    return ew.where(broadcast_to(ew.equal(inside, np.uint8(1)), around.shape), around, reshape(zero, (1,) * x.ndim))


def _convolved(x: Tensor, w: Tensor, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Tensor:
    """The contraction of bytes, over one or two axes, without padding."""
    signal = x.ndim == 3
    if signal:
        x, w = reshape(x, (*x.shape[:2], 1, x.shape[2])), reshape(w, (*w.shape[:2], 1, w.shape[2]))
        strides, dilations = (1, *strides), (1, *dilations)
    none = ((0, 0), (0, 0))
    y = apply("conv2d", x, w, stride=tuple(strides), padding=none, dilation=tuple(dilations), groups=groups, layout="NCHW")
    return reshape(y, (*y.shape[:2], y.shape[3])) if signal else y


def integer_conv(
    n: Call, x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None, strides: Sequence[int], dilations: Sequence[int],
    pads: Pads, groups: int, bias: Tensor | None = None, wrap: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution of x - x_zero with w - w_zero exactly: in i32, or in a float where that is as fast, or i32 might overflow.

    x_zero is a number; w_zero is a number or one for each output channel, as an i32 bias is, which is added as the accumulator of
    ONNX adds it. With `wrap` an i32 is modulo 2^32.
    """
    terms: Dim = product(w.shape[1:])
    few = groups > 1 and isinstance(w.shape[1], int) and w.shape[1] < _FEW
    fits = wrap or (isinstance(terms, int) and terms <= MOST)
    if few or not fits or x.ndim > 4 or not _bytes(x, w) or not isinstance(terms, int):
        bound = _wide(n, x, x_zero) * _wide(n, w, w_zero)
        wide = f32 if isinstance(terms, int) and bound * terms <= _EXACT else f64
        if w_zero is not None and w_zero.ndim == 1 and w_zero.shape[0] != 1:
            w_zero = reshape(w_zero, (-1, *(1,) * (w.ndim - 1)))
        real = _centred(x, x_zero, wide), _centred(w, w_zero, wide)
        y = convolve(n, *real, None, strides, dilations, pads, groups)
        return y if bias is None else y.astype(f64) + _channels(bias.astype(f64), x.ndim)
    w, w_zero = _weights(n, w, w_zero)
    x = _surrounded(n, x, x_zero, pads)
    y = _convolved(x, w, strides, dilations, groups)
    known = _known(n, x_zero)
    if known is None or known.any():
        assert x_zero is not None
        sums = _sum(w.astype(i32), tuple(range(1, w.ndim)))
        sums = sums if w_zero is None else sums - w_zero.astype(i32) * terms
        sums = sums * reshape(x_zero, ()).astype(i32)
        bias = -sums if bias is None else bias.astype(i32) - sums
    y = y if bias is None else y + _channels(bias.astype(i32), x.ndim)
    if w_zero is not None:
        one = full((groups, *w.shape[1:]), as_tensor(np.int8(1) if x.dtype is u8 else np.uint8(1)))
        windows = _convolved(x, one, strides, dilations, groups)
        windows = windows if groups == 1 else repeat(windows, as_int(w.shape[0]) // groups, 1)
        y = y - _channels(w_zero.astype(i32), x.ndim) * windows
    return y
