"""DFT, STFT and MelWeightMatrix."""

from __future__ import annotations

import numpy as np

from ....ir.dtypes import DType, f32
from ...core import as_tensor, normalize_axis
from ...fft import as_float, dft, irdft
from ...movement import reshape, stack, take
from ...tensor import Tensor
from ..call import Call
from ..registry import op


@op("DFT", 17, 20)
def fourier(n: Call) -> Tensor:
    x = n.tensor(0)
    real_only = x.shape[-1] == 1
    axis = n.integer("axis", 1) if n.opset < 20 else int(n.scalar(2, -2))
    axis = normalize_axis(axis, x.ndim, "DFT")
    if axis == x.ndim - 1:
        n.fail("the axis is the one of real and imaginary parts")
    length = int(n.scalar(1)) if n.has(1) else None
    inverse, onesided = n.flag("inverse", False), n.flag("onesided", False)
    parts = as_float(x)
    re, im = parts[..., 0], None if real_only else parts[..., 1]
    if onesided and inverse:
        signal = irdft(re, re * 0.0 if im is None else im, axis=axis, length=length)
        return reshape(signal, (*signal.shape, 1)).astype(x.dtype)
    return stack(dft(re, im, axis=axis, length=length, inverse=inverse, onesided=onesided), -1).astype(x.dtype)


@op("STFT", 17)
def short_time_fourier(n: Call) -> Tensor:
    """Frames are gathered, weighted and transformed together."""
    x, step = n.tensor(0), int(n.scalar(1))
    window = n.optional(2)
    size = x.shape[1]
    length = n.scalar(3) if n.has(3) else window.shape[0] if window is not None else size
    if not isinstance(size, int) or not isinstance(length, int):
        n.unsupported(f"frames of {length} of a signal of the symbolic size {size}")
    if step < 1 or length < 1:
        n.fail(f"frame_step {step} and frame_length {length} are at least 1")
    count = 1 + (size - length) // step
    if count < 1:
        n.fail(f"frames of {length} of a signal of {size}")
    at = np.arange(count)[:, None] * step + np.arange(length)
    frames = take(as_float(x), as_tensor(at), 1)  # [batch, frames, length, 1 or 2]
    if window is not None:
        width = window.shape[0]
        if width != length:
            n.fail(f"a window of {width} for frames of {length}")
        frames = frames * reshape(window.astype(frames.dtype), (1, 1, length, 1))
    im = frames[..., 1] if x.ndim == 3 and x.shape[2] == 2 else None
    return stack(dft(frames[..., 0], im, axis=2, onesided=n.flag("onesided", True)), -1).astype(x.dtype)


@op("MelWeightMatrix", 17)
def mel_weights(n: Call) -> object:
    """Triangles in the mel scale, from numbers that the model knows."""
    bins, length, rate = (int(n.scalar(k)) for k in range(3))
    low, high = (float(n.scalar(k)) for k in (3, 4))
    dtype: DType = n.dtype("output_datatype", f32) or f32
    if bins < 1 or length < 1 or rate < 1:
        n.fail(f"num_mel_bins {bins}, dft_length {length} and sample_rate {rate} are at least 1")
    ends = 2595.0 * np.log10(1.0 + np.array([low, high]) / 700.0)
    mel = ends[0] + np.arange(bins + 2) * ((ends[1] - ends[0]) / (bins + 2))
    edge = ((length + 1) * (700.0 * (10.0 ** (mel / 2595.0) - 1.0)) // rate).astype(np.int64)
    rows = length // 2 + 1
    if edge.min() < 0 or edge.max() >= rows:
        n.fail(f"frequencies from {low} to {high} Hz do not lie within the {rows} bins of a signal at {rate} Hz")
    weights = np.zeros((rows, bins))
    for i, (a, b, c) in enumerate(zip(edge, edge[1:], edge[2:], strict=False)):
        if a == b:
            weights[b, i] = 1
        else:
            weights[a : b + 1, i] = np.arange(b + 1 - a) / (b - a)
        if c > b:
            weights[b:c, i] = np.arange(c - b, 0, -1) / (c - b)
    return weights.astype(dtype.numpy)
