"""Convolution and transposed convolution of images (N, C, H, W) and signals (N, C, L).

A signal is an image of height 1: one op and one kind of kernel serve both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ir.dims import Dim
from ..ir.dtypes import DType, bool_, f32
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor, cast, promote, show
from .movement import pad, reshape

if TYPE_CHECKING:
    from .tensor import Tensor

Single = int | Sequence[int]
Pair = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]

_AXES = {1: ("(N, C, L)", "length"), 2: ("(N, C, H, W)", "height, width")}


def several(value: Any, count: int, what: str, least: int = 1) -> tuple[int, ...]:
    """`count` ints from one int or from as many. Raises AttributeValueError for others, or below `least`."""
    items = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(items) != count or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in items):
        form = "an int" if count == 1 else f"an int or {'a pair' if count == 2 else f'{count}'} of them"
        raise error(AttributeValueError, f"{what} is {form}, each at least {least}, not {value!r}")
    return items


def pair(value: Pair, what: str, least: int = 1) -> tuple[int, int]:
    """(vertical, horizontal) from one number or two. Raises AttributeValueError for others, or below `least`."""
    v, h = several(value, 2, what, least)
    return v, h


def padding_of(padding: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pads:
    """(before, after) per axis from an int, one int per axis, a (before, after) per axis, 'valid' or 'same'."""
    count = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * count
        if padding != "same":
            raise error(AttributeValueError, f"padding is an int, a pair, two pairs, 'same' or 'valid', not {padding!r}")
        if any(s != 1 for s in stride):
            raise error(AttributeValueError, f"padding='same' needs stride 1, not {tuple(stride)}; give the padding as numbers")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    if isinstance(padding, (tuple, list)) and len(padding) == count and all(isinstance(p, (tuple, list)) for p in padding):
        return tuple(pair(p, "padding", 0) for p in padding)
    return tuple((p, p) for p in several(padding, count, "padding", 0))


def spatial(x: TensorLike, what: str, count: int) -> Tensor:
    """A Tensor of `count` spatial axes after batch and channels. Raises ShapeError for other ranks, DTypeError for bools."""
    t = as_tensor(x, what=what)
    if t.ndim != count + 2:
        kind = "images" if count == 2 else "signals"
        fits = f"; x.reshape(1, {', '.join(map(str, t.shape))}) would fit" if t.ndim == count + 1 else ""
        raise error(
            ShapeError,
            f"{what} takes {kind} of shape {_AXES[count][0]}, {count + 2} dimensions, not {t.ndim}{fits}",
            x=t,
        )
    if t.dtype is bool_:
        raise error(DTypeError, f"{what} of a bool Tensor; use .astype('f32') first", x=t)
    return t if t.dtype.is_float else cast(t, f32)


def as_image(t: Tensor) -> Tensor:
    """(N, C, L) as (N, C, 1, L)."""
    n, c, length = t.shape
    return reshape(t, (n, c, 1, length))


def as_signal(t: Tensor) -> Tensor:
    """(N, C, 1, L) as (N, C, L)."""
    n, c, _, length = t.shape
    return reshape(t, (n, c, length))


def _weight(x: Tensor, weight: TensorLike, what: str, count: int, order: str) -> tuple[Tensor, tuple[int, ...], DType]:
    w = as_tensor(weight, what="weight")
    if w.ndim != count + 2:
        raise error(ShapeError, f"{what}: the weight has shape ({order}, {_AXES[count][1]})", x=x, weight=w)
    kernel = w.shape[2:]
    if not all(isinstance(k, int) for k in kernel):
        raise error(ShapeError, f"{what}: the kernel's {_AXES[count][1]} must be numbers, not symbolic", weight=w)
    return w, tuple(int(k) for k in kernel), promote(x, w)  # type: ignore[arg-type]


def _remains(size: Dim, groups: int) -> bool:
    return not isinstance(size, int) or size % groups != 0


def _check_groups(groups: object, what: str) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise error(AttributeValueError, f"{what}: groups is a positive int, not {groups!r}")


def _biased(y: Tensor, bias: TensorLike | None, channels: Dim, what: str) -> Tensor:
    if bias is None:
        return y
    b = as_tensor(bias, what="bias")
    if b.shape != (channels,):
        raise error(ShapeError, f"{what}: the bias has shape ({channels},), one number per output channel", bias=b)
    return y + reshape(b, (1, channels, *(1,) * (y.ndim - 2)))


def _conv(
    what: str, count: int, x: TensorLike, weight: TensorLike, bias: TensorLike | None,
    stride: Any, padding: Any, dilation: Any, groups: int,
) -> Tensor:  # fmt: skip
    image = spatial(x, what, count)
    w, kernel, common = _weight(image, weight, what, count, "out, in / groups")
    _check_groups(groups, what)
    if image.shape[1] != w.shape[1] * groups or _remains(w.shape[0], groups):
        takes = f"a weight of shape {show(w.shape)} with groups={groups} takes {w.shape[1] * groups}"
        message = f"{what}: x has {image.shape[1]} channels; {takes}"
        if image.shape[-1] == w.shape[1] * groups:
            there = "transpose(0, 3, 1, 2)" if count == 2 else "transpose(0, 2, 1)"
            message += f"; x looks like it has its channels last: x.{there} would fit"
        elif _remains(w.shape[0], groups):
            message += f", and its {w.shape[0]} outputs must divide by groups"
        raise error(ShapeError, message, x=image, weight=w)
    steps, holes = several(stride, count, "stride"), several(dilation, count, "dilation")
    pads = padding_of(padding, kernel, steps, holes)
    image, w = cast(image, common), cast(w, common)
    if count == 1:
        image, w = as_image(image), as_image(w)
        steps, holes, pads = (1, *steps), (1, *holes), ((0, 0), *pads)
    y = apply("conv2d", image, w, stride=steps, padding=pads, dilation=holes, groups=groups, layout="NCHW")
    y = _biased(y, bias, w.shape[0], what)
    return as_signal(y) if count == 1 else y


def conv1d(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    stride: Single = 1,
    padding: Padding = 0,
    dilation: Single = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution (cross-correlation) of x (N, C, L) with weight (O, C / groups, K), plus bias (O,).

    `padding` is an int, ((before, after),), 'same' (stride 1) or 'valid'. Raises ShapeError as `conv2d`.
    """
    return _conv("conv1d", 1, x, weight, bias, stride, padding, dilation, groups)


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

    `padding` is an int, (vertical, horizontal), ((top, bottom), (left, right)), 'same' (stride 1) or 'valid'. With
    groups = C it is depthwise. Raises ShapeError for channels that do not fit the weight and for a kernel larger than the
    padded image.
    """
    return _conv("conv2d", 2, x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    what: str, count: int, x: TensorLike, weight: TensorLike, bias: TensorLike | None,
    stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any,
) -> Tensor:  # fmt: skip
    image = spatial(x, what, count)
    w, kernel, common = _weight(image, weight, what, count, "in, out / groups")
    _check_groups(groups, what)
    if image.shape[1] != w.shape[0] or _remains(w.shape[0], groups):
        takes = f"a weight of shape {show(w.shape)} (in, out / groups) takes {w.shape[0]}"
        message = f"{what}: x has {image.shape[1]} channels; {takes}"
        if image.shape[1] == w.shape[1] * groups:
            message += "; the weight looks like a convolution's: exchange its first two axes"
        raise error(ShapeError, message + f", which must divide by groups={groups}" * (groups > 1), x=image, weight=w)
    steps, holes = several(stride, count, "stride"), several(dilation, count, "dilation")
    pads = padding_of(padding, kernel, steps, holes)
    extra = several(output_padding, count, "output_padding", 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, steps, holes, strict=True)):
        raise error(AttributeValueError, f"{what}: output_padding {output_padding} must be below the stride or the dilation")
    # size = (n - 1) * stride - padding + reach + 1 + extra, of which the extra comes out of the padding after it as far as
    # there is any; what is left over then lies beyond every kernel's reach and is zero.
    after = [max(p[1] - e, 0) for p, e in zip(pads, extra, strict=True)]
    zeros = [max(e - p[1], 0) for p, e in zip(pads, extra, strict=True)]
    kept = tuple((p[0], a) for p, a in zip(pads, after, strict=True))
    sizes: list[Dim] = []
    for n, s, p, d, k in zip(image.shape[2:], steps, kept, holes, kernel, strict=True):
        size = (n - 1) * s - p[0] - p[1] + d * (k - 1) + 1
        if isinstance(size, int) and size < 1:
            raise error(ShapeError, f"{what}: with padding {padding} the result would have size {size}", x=image, weight=w)
        sizes.append(size)
    image, w = cast(image, common), cast(w, common)
    channels = w.shape[1] * groups
    if count == 1:
        image, w = as_image(image), as_image(w)
        steps, holes, kept, sizes = (1, *steps), (1, *holes), ((0, 0), *kept), [1, *sizes]
    y = apply(
        "conv2d_input_grad", image, w, input_shape=(image.shape[0], channels, *sizes),
        stride=steps, padding=kept, dilation=holes, groups=groups, layout="NCHW",
    )  # fmt: skip
    if any(zeros):
        y = pad(y, [(0, 0)] * (4 - count) + [(0, z) for z in zeros])
    y = _biased(y, bias, channels, what)
    return as_signal(y) if count == 1 else y


def conv_transpose1d(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    stride: Single = 1,
    padding: Padding = 0,
    output_padding: Single = 0,
    groups: int = 1,
    dilation: Single = 1,
) -> Tensor:
    """The transpose of `conv1d` of x (N, C, L) with weight (C, O / groups, K), plus bias (O,). See `conv_transpose2d`."""
    return _conv_transpose("conv_transpose1d", 1, x, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Tensor:
    """The transpose (not the inverse) of `conv2d`: of x (N, C, H, W) with weight (C, O / groups, KH, KW), plus bias (O,).

    Each pixel of x adds the kernel, scaled by it, to the result at its place times the stride. Sizes are
    (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1; output_padding lies at the far end.
    Raises ShapeError for channels that do not fit the weight and for a padding that leaves nothing.
    """
    return _conv_transpose("conv_transpose2d", 2, x, weight, bias, stride, padding, output_padding, groups, dilation)
