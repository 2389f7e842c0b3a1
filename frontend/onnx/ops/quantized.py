"""Quantised ops of ai.onnx and of com.microsoft.

Sums of products of 8-bit integers are those of 32-bit integers, bit for bit (integer_products.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ....ir.dtypes import DType, f32, f64, i32, u8
from ... import activations as act
from ... import elementwise as ew
from ...core import apply, as_tensor, broadcast_to, normalize_axis
from ...movement import concatenate, repeat, reshape, slice_axis
from ...pooling import avg_pool2d
from ...reductions import max as largest
from ...reductions import mean, softmax
from ...reductions import min as smallest
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from .casts import narrowed
from .convolution import kernel_of, windows
from .integer_products import integer_conv, integer_matmul, rows_of
from .rnn import lstm_with

_MICROSOFT: Final = "com.microsoft"


def aligned(n: Call, t: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point over x: one number, one for each entry of an axis, or one for each block of entries of it."""
    if t.ndim == 0 or (t.ndim == 1 and t.shape[0] == 1 and not block):
        return broadcast_to(reshape(t, (1,) * x.ndim), x.shape)
    a = normalize_axis(axis, x.ndim, n.node.op)
    if block:
        if t.ndim != x.ndim:
            n.fail(f"a scale of shape {t.shape} for blocks of {block} in {x.shape}")
        return slice_axis(repeat(t, block, a), a, 0, x.shape[a])
    if t.ndim != 1:
        n.fail(f"a scale of shape {t.shape}; a number or a vector is expected")
    return broadcast_to(reshape(t, tuple(t.shape[0] if k == a else 1 for k in range(x.ndim))), x.shape)


def limits(dtype: DType) -> tuple[float, float]:
    """The least and the largest integer of a dtype."""
    return (0.0, 2.0**dtype.bits - 1) if dtype.kind == "uint" else (-(2.0 ** (dtype.bits - 1)), 2.0 ** (dtype.bits - 1) - 1)


def rounded(x: Tensor, zero: Tensor | None, dtype: DType) -> Tensor:
    """round(x) + zero, to half even, saturated to `dtype`."""
    whole = ew.round(x)
    whole = whole if whole.dtype is f64 else whole.astype(f32)
    if zero is not None:
        whole = whole + zero.astype(whole.dtype)
    return whole.astype(dtype) if dtype.bits >= 8 else ew.clip(whole, *limits(dtype)).astype(dtype)  # a cast saturates to bytes


def _thin(t: Tensor, x: Tensor, axis: int) -> int | None:
    """The axis along which a scale lies, None for a number."""
    return None if t.ndim == 0 else normalize_axis(axis, x.ndim, "the scale")


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: DType, axis: int = 1) -> Tensor:
    """x over a scale that is a number or a vector along an axis."""
    scale = reshape(scale, ()) if scale.shape == (1,) else scale
    zero = as_tensor(np.zeros((), dtype.numpy)) if zero is None else zero
    zero = broadcast_to(reshape(zero, ()) if zero.shape == (1,) else zero, scale.shape)
    return apply("quantize", x, scale.astype(x.dtype), zero, axis=_thin(scale, x, axis), dtype=dtype)


def dequantized(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """The numbers that integers stand for."""
    scale = reshape(scale, ()) if scale.shape == (1,) else scale
    zero = as_tensor(np.zeros((), x.dtype.numpy)) if zero is None else zero
    zero = broadcast_to(reshape(zero, ()) if zero.shape == (1,) else zero, scale.shape)
    return apply("dequantize", x, scale, zero, axis=_thin(scale, x, axis))


def _known(n: Call, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A scale that is a number, and a zero point that is the same everywhere, as constants where the file has them: what passes
    may do with integers depends on these."""
    if scale.ndim == 0 or scale.shape == (1,):
        number = n.importer.evaluate(scale)
        scale = scale if number is None else as_tensor(np.asarray(number).reshape(()))
    numbers = None if zero is None else n.importer.evaluate(zero)
    if zero is not None and numbers is not None and numbers.size and (numbers == numbers.reshape(-1)[0]).all():
        zero = broadcast_to(as_tensor(numbers.reshape(-1)[0]), zero.shape)
    return scale, zero


@op("QuantizeLinear", 10)
@op("QuantizeLinear", 1, domain=_MICROSOFT)
def quantize_linear(n: Call) -> Tensor:
    x, scale, zero = n.tensor(0), n.tensor(1), n.optional(2)
    axis, block = n.integer("axis", 1), n.integer("block_size", 0)
    saturate = n.flag("saturate", True)  # integers always do
    dtype = n.dtype("output_dtype") or (u8 if zero is None else zero.dtype)
    precision = n.dtype("precision")
    wide = precision or (x.dtype if x.dtype.is_float else scale.dtype)
    if not block and dtype.is_integer and dtype.bits >= 8:
        return quantized(x.astype(wide), *_known(n, scale, zero), dtype, axis)
    divided = x.astype(wide) / aligned(n, scale, x, axis, block).astype(wide)
    if dtype.is_float:
        if zero is not None and dtype.bits < 8:
            divided = divided + aligned(n, zero, x, axis, block).astype(divided.dtype)
        return narrowed(divided, dtype, saturate)
    return rounded(divided, None if zero is None else aligned(n, zero, x, axis, block), dtype)


@op("DequantizeLinear", 10)
@op("DequantizeLinear", 1, domain=_MICROSOFT)
def dequantize_linear(n: Call) -> Tensor:
    x, scale, zero = n.tensor(0), n.tensor(1), n.optional(2)
    axis, block = n.integer("axis", 1), n.integer("block_size", 0)
    dtype = n.dtype("output_dtype") or scale.dtype
    if not block and x.dtype.is_integer and x.dtype.bits >= 8 and dtype is scale.dtype:
        return dequantized(x, *_known(n, scale, zero), axis)
    value = x.astype(f64 if x.dtype.bits >= 32 else f32)
    if zero is not None:
        value = value - aligned(n, zero, x, axis, block).astype(value.dtype)
    return (value * aligned(n, scale, x, axis, block).astype(value.dtype)).astype(dtype)


def dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as u8 over its own range, which is widened to hold 0; the scale and the zero point."""
    low, high = ew.minimum(smallest(x), 0.0), ew.maximum(largest(x), 0.0)
    span = ew.where(ew.equal(low, high), 1.0, high - low)
    # in f64: the compiler turns a division by a number into a product with its reciprocal, which would be off by a bit of f32,
    # and a scale that is off by a bit puts numbers on the other side of a half
    scale = (span.astype(f64) / 255.0).astype(span.dtype)
    zero = ew.round(ew.clip(0.0 - low / scale, 0.0, 255.0)).astype(u8)
    return quantized(x, scale, zero, u8), scale, zero


@op("DynamicQuantizeLinear", 11)
def dynamic_quantize(n: Call) -> tuple[Tensor, ...]:
    return dynamic(n.tensor(0))


# --- products -------------------------------------------------------------------------------------------------------


@op("MatMulInteger", 10)
def matmul_integer(n: Call) -> Tensor:
    return integer_matmul(n, n.tensor(0), n.tensor(1), n.optional(2), n.optional(3), wrap=True).astype(i32)


@op("QLinearMatMul", 10)
def qlinear_matmul(n: Call) -> Tensor:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (n.tensor(k) for k in range(8))
    sums = integer_matmul(n, a, b, a_zero, b_zero)
    scale = rows_of(a_scale, a).astype(f32) * b_scale.astype(f32) / y_scale.astype(f32)
    return rounded(sums.astype(f32) * scale, y_zero, y_zero.dtype)


def _integer_conv(
    n: Call, x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None, bias: Tensor | None, wrap: bool = False
) -> Tensor:
    """The sums of a node and its i32 bias."""
    strides, dilations, pads = windows(n, x, kernel_of(n, w))
    return integer_conv(n, x, w, x_zero, w_zero, strides, dilations, pads, n.integer("group", 1), bias, wrap)


@op("ConvInteger", 10)
def conv_integer(n: Call) -> Tensor:
    return _integer_conv(n, n.tensor(0), n.tensor(1), n.optional(2), n.optional(3), None, wrap=True).astype(i32)


@op("QLinearConv", 10)
def qlinear_conv(n: Call) -> Tensor:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (n.tensor(k) for k in range(8))
    sums = _integer_conv(n, x, w, x_zero, w_zero, n.optional(8))
    scale = x_scale * w_scale / y_scale
    if scale.ndim == 1 and scale.shape[0] != 1:
        scale = reshape(scale, (1, -1, *(1,) * (x.ndim - 2)))
    return rounded(sums.astype(f32) * scale, y_zero, y_zero.dtype)


# --- com.microsoft --------------------------------------------------------------------------------------------------


def _real(n: Call, k: int) -> Tensor:
    """Inputs k, k + 1 and k + 2 (numbers, scale, zero point) as floats."""
    return dequantized(n.tensor(k), n.tensor(k + 1), n.optional(k + 2))


def _requantised(n: Call, y: Tensor, k: int, dtype: DType) -> Tensor:
    """y over the scale and zero point at inputs k and k + 1."""
    zero = n.optional(k + 1)
    return quantized(y, n.tensor(k), zero, dtype if zero is None else zero.dtype)


def _qlinear_pair(name: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    def convert(n: Call) -> Tensor:
        return _requantised(n, fn(_real(n, 0), _real(n, 3)), 6, n.tensor(0).dtype)

    op(name, 1, domain=_MICROSOFT)(convert)


_qlinear_pair("QLinearAdd", lambda a, b: a + b)
_qlinear_pair("QLinearMul", lambda a, b: a * b)


@op("QLinearSigmoid", 1, domain=_MICROSOFT)
def qlinear_sigmoid(n: Call) -> Tensor:
    return _requantised(n, act.sigmoid(_real(n, 0)), 3, n.tensor(0).dtype)


@op("QLinearLeakyRelu", 1, domain=_MICROSOFT)
def qlinear_leaky_relu(n: Call) -> Tensor:
    return _requantised(n, act.leaky_relu(_real(n, 0), n.number("alpha", 0.01)), 3, n.tensor(0).dtype)


@op("QLinearSoftmax", 1, domain=_MICROSOFT)
def qlinear_softmax(n: Call) -> Tensor:
    axis = n.integer("axis", -1)
    if n.integer("opset", 13) < 13:
        n.unsupported("opset below 13: a softmax over several axes at once")
    return _requantised(n, softmax(_real(n, 0), axis), 3, n.tensor(0).dtype)


@op("QLinearConcat", 1, domain=_MICROSOFT)
def qlinear_concat(n: Call) -> Tensor:
    parts = [_real(n, k) for k in range(2, len(n.inputs), 3)]
    whole = concatenate(parts, n.integer("axis"))
    return _requantised(n, whole, 0, n.tensor(2).dtype)


@op("QLinearWhere", 1, domain=_MICROSOFT)
def qlinear_where(n: Call) -> Tensor:
    return _requantised(n, ew.where(n.tensor(0), _real(n, 1), _real(n, 4)), 7, n.tensor(1).dtype)


@op("QLinearReduceMean", 1, domain=_MICROSOFT)
def qlinear_mean(n: Call) -> Tensor:
    y = mean(_real(n, 0), n.int_list("axes"), keepdims=n.flag("keepdims", True))
    return _requantised(n, y, 3, n.tensor(0).dtype)


@op("QLinearGlobalAveragePool", 1, domain=_MICROSOFT)
def qlinear_global_average(n: Call) -> Tensor:
    x = _real(n, 0)
    axes = tuple(range(1, x.ndim - 1)) if n.flag("channels_last") else tuple(range(2, x.ndim))
    return _requantised(n, mean(x, axes, keepdims=True), 3, n.tensor(0).dtype)


@op("QLinearAveragePool", 1, domain=_MICROSOFT)
def qlinear_average(n: Call) -> Tensor:
    x = _real(n, 0)
    if n.flag("channels_last") or n.flag("ceil_mode") or x.ndim != 4:
        n.unsupported("channels_last, ceil_mode or other than two spatial axes")
    kernel = n.int_list("kernel_shape") or n.fail("kernel_shape is missing")
    strides, _, pads = windows(n, x, kernel)
    counted = n.flag("count_include_pad")
    if any(a != b for a, b in pads) or (any(a for a, _ in pads) and not counted):
        n.unsupported(f"padding {pads} with count_include_pad={int(counted)}")
    y = avg_pool2d(x, _two(kernel), _two(strides), _two([a for a, _ in pads]))
    return _requantised(n, y, 3, n.tensor(0).dtype)


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


@op("MatMulIntegerToFloat", 1, domain=_MICROSOFT)
def matmul_integer_to_float(n: Call) -> Tensor:
    a, b, a_scale, b_scale = (n.tensor(k) for k in range(4))
    sums = integer_matmul(n, a, b, n.optional(4), n.optional(5))
    y = sums.astype(f32) * (a_scale * b_scale)
    bias = n.optional(6)
    return y if bias is None else y + bias


@op("DynamicQuantizeMatMul", 1, domain=_MICROSOFT)
def dynamic_quantize_matmul(n: Call) -> Tensor:
    a, a_scale, a_zero = dynamic(n.tensor(0))
    sums = integer_matmul(n, a, n.tensor(1), a_zero, n.optional(3))
    y = sums.astype(f32) * (a_scale * n.tensor(2))
    bias = n.optional(4)
    return y if bias is None else y + bias


@op("QGemm", 1, domain=_MICROSOFT)
def qgemm(n: Call) -> Tensor:
    a, b = n.tensor(0), n.tensor(3)
    a = a.transpose(1, 0) if n.flag("transA") else a
    b = b.transpose(1, 0) if n.flag("transB") else b
    sums = integer_matmul(n, a, b, n.optional(2), n.optional(5))
    bias = n.optional(6)
    sums = sums if bias is None else sums + bias.astype(f64 if sums.dtype.is_float else i32)
    y = sums.astype(f32) * (n.tensor(1) * n.tensor(4) * n.number("alpha", 1.0))
    return _requantised(n, y, 7, a.dtype) if n.has(7) else y


@op("DynamicQuantizeLSTM", 1, domain=_MICROSOFT)
def dynamic_quantize_lstm(n: Call) -> Any:
    """An LSTM with 8-bit weights [directions, inputs, 4 * hidden]; what they multiply is quantised in each step."""

    def product_of(k: int) -> Callable[[int, Tensor], Tensor]:
        weight, scale, zero = n.tensor(k), n.tensor(8 if k == 1 else 10), n.tensor(9 if k == 1 else 11)

        def times(d: int, x: Tensor) -> Tensor:
            q, x_scale, x_zero = dynamic(x)
            sums = integer_matmul(n, q, weight[d], x_zero, zero[d])
            return sums.astype(f32) * (x_scale * scale[d])

        return times

    return lstm_with(n, n.tensor(2).shape[1], product_of(1), product_of(2))
