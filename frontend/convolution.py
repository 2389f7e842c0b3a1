"""Convolution and pooling of images in NCHW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.dims import Dim
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .core import TensorLike, Value, apply, as_tensor, cast, promote, show
from .movement import concatenate, reshape, slice_axis
from .reductions import mean

if TYPE_CHECKING:
    from .tensor import Tensor

Pair = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


def pair(value: Pair, what: str, least: int = 1) -> tuple[int, int]:
    """(vertical, horizontal) from one number or two. Raises AttributeValueError for others, or below `least`."""
    items = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(items) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in items):
        raise error(AttributeValueError, f"{what} is an int of at least {least} or a pair of such, not {value!r}")
    return items[0], items[1]


def padding_pairs(
    padding: Padding, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) from an int, a pair, two pairs, 'valid' or 'same'."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0), (0, 0)
        if padding != "same":
            raise error(AttributeValueError, f"padding is an int, a pair, two pairs, 'same' or 'valid', not {padding!r}")
        if stride != (1, 1):
            raise error(AttributeValueError, f"padding='same' needs stride 1, not {stride}; give the padding as numbers")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    if isinstance(padding, (tuple, list)) and len(padding) == 2 and all(isinstance(p, (tuple, list)) for p in padding):
        return pair(padding[0], "padding", 0), pair(padding[1], "padding", 0)
    v, h = pair(padding, "padding", 0)  # type: ignore[arg-type]
    return (v, v), (h, h)


def _image(x: TensorLike, what: str) -> Tensor:
    t = as_tensor(x, what=what)
    if t.ndim != 4:
        fits = f"; x.reshape(1, {', '.join(map(str, t.shape))}) would fit" if t.ndim == 3 else ""
        raise error(ShapeError, f"{what} takes images of shape (N, C, H, W), four dimensions, not {t.ndim}{fits}", x=t)
    return t


def conv2d(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution (cross-correlation) of x (N, C, H, W) with weight (O, C / groups, KH, KW), plus bias (O,).

    `padding` is an int, (vertical, horizontal), ((top, bottom), (left, right)), 'same' (stride 1) or 'valid'.
    Raises ShapeError for channels that do not fit the weight and for a kernel larger than the padded image.
    """
    image, w = _image(x, "conv2d"), as_tensor(weight, what="weight")
    if w.ndim != 4:
        raise error(ShapeError, "conv2d: the weight has shape (out, in / groups, height, width)", x=image, weight=w)
    if groups < 1 or image.shape[1] != w.shape[1] * groups or _remains(w.shape[0], groups):
        takes = f"a weight of shape {show(w.shape)} with groups={groups} takes {w.shape[1] * groups}"
        message = f"conv2d: x has {image.shape[1]} channels; {takes}"
        if image.shape[3] == w.shape[1] * groups:
            message += "; x looks like NHWC: x.transpose(0, 3, 1, 2) would fit"
        elif _remains(w.shape[0], groups):
            message += f", and its {w.shape[0]} outputs must divide by groups"
        raise error(ShapeError, message, x=image, weight=w)
    height, width = w.shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        raise error(ShapeError, "conv2d: the kernel's height and width must be numbers, not symbolic", weight=w)
    kernel = (height, width)
    steps, holes = pair(stride, "stride"), pair(dilation, "dilation")
    pads = padding_pairs(padding, kernel, steps, holes)
    common = promote(image, w)
    result = apply(
        "conv2d", cast(image, common), cast(w, common), stride=steps, padding=pads, dilation=holes, groups=groups, layout="NCHW"
    )
    if bias is None:
        return result
    b = as_tensor(bias, what="bias")
    if b.shape != (w.shape[0],):
        raise error(ShapeError, f"conv2d: the bias has shape ({w.shape[0]},), one number per output channel", bias=b, weight=w)
    return result + reshape(b, (1, w.shape[0], 1, 1))


def _remains(size: Dim, groups: int) -> bool:
    return not isinstance(size, int) or size % groups != 0


def max_pool2d(x: TensorLike, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The largest value in each window of x (N, C, H, W). The stride is the kernel size unless given."""
    t = _image(x, "max_pool2d")
    kernel = pair(kernel_size, "kernel_size")
    pads = _pool_padding(padding, kernel, t)
    steps = kernel if stride is None else pair(stride, "stride")
    return apply("max_pool2d", t, kernel=kernel, stride=steps, padding=pads, layout="NCHW")


def avg_pool2d(
    x: TensorLike, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, count_include_pad: bool = True
) -> Tensor:
    """The average of each window of x (N, C, H, W); padding counts as zeros, or not at all if not count_include_pad."""
    t = _image(x, "avg_pool2d")
    kernel = pair(kernel_size, "kernel_size")
    pads = _pool_padding(padding, kernel, t)
    steps = kernel if stride is None else pair(stride, "stride")
    return apply(
        "avg_pool2d", t, kernel=kernel, stride=steps, padding=pads, layout="NCHW", count_include_pad=bool(count_include_pad)
    )


def _pool_padding(padding: Pair, kernel: tuple[int, int], t: Value) -> tuple[tuple[int, int], tuple[int, int]]:
    v, h = pair(padding, "padding", 0)
    if 2 * v > kernel[0] or 2 * h > kernel[1]:
        raise error(AttributeValueError, f"padding {padding} is more than half of the kernel {kernel}", x=t)
    return (v, v), (h, h)


def adaptive_avg_pool2d(x: TensorLike, output_size: Pair) -> Tensor:
    """Averages of x (N, C, H, W) over output_size windows that share the image out evenly, as PyTorch's."""
    t = _image(x, "adaptive_avg_pool2d")
    out = pair(output_size, "output_size")
    if out == (1, 1):
        return mean(t, (2, 3), keepdims=True)
    sizes = t.shape[2:]
    if all(isinstance(s, int) and s % o == 0 for s, o in zip(sizes, out, strict=True)):
        return avg_pool2d(t, (int(sizes[0]) // out[0], int(sizes[1]) // out[1]))  # type: ignore[arg-type]
    for axis, o in ((2, out[0]), (3, out[1])):
        size = t.shape[axis]
        if not isinstance(size, int):
            raise error(ShapeError, f"adaptive_avg_pool2d to {out} of a symbolic size ({size}); only output size 1 is known", x=t)
        windows = [(i * size // o, -(-(i + 1) * size // o)) for i in range(o)]
        t = concatenate([mean(slice_axis(t, axis, low, high), axis, keepdims=True) for low, high in windows], axis)
    return t
