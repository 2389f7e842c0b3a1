"""Pooling of images (N, C, H, W) and signals (N, C, L): windows of a size, or a number of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ir.dims import Dim
from ..ir.errors import AttributeValueError, ShapeError
from .context import error
from .convolution import Pads, Pair, Single, as_image, as_signal, several, spatial
from .core import TensorLike, apply
from .movement import ones, pad
from .reductions import max, mean

if TYPE_CHECKING:
    from .tensor import Tensor

Output = int | None | Sequence[int | None]


def _windows(
    t: Tensor, what: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[tuple[int, ...], tuple[int, ...], Pads, tuple[int, ...], tuple[int, ...]]:
    """kernel, stride, padding as given, dilation, and what ceil_mode adds to the padding at the far end."""
    count = t.ndim - 2
    kernel = several(kernel_size, count, "kernel_size")
    steps = kernel if stride is None else several(stride, count, "stride")
    holes = several(dilation, count, "dilation")
    pads = several(padding, count, "padding", 0)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, holes, strict=True)]
    if any(2 * p > e for p, e in zip(pads, extents, strict=True)):
        raise error(AttributeValueError, f"{what}: padding {padding} is more than half of the kernel {kernel}", x=t)
    more = [0] * count
    for d, (size, e, s, p) in enumerate(zip(t.shape[2:], extents, steps, pads, strict=True)):
        if not ceil_mode:
            continue
        if not isinstance(size, int):
            raise error(ShapeError, f"{what}: ceil_mode needs sizes that are numbers, not symbolic ({size})", x=t)
        room = size + 2 * p - e
        windows = -(-room // s) + 1
        if (windows - 1) * s >= size + p:  # a window must start in the image or the padding before it
            windows -= 1
        more[d] = (windows - 1) * s - room if (windows - 1) * s > room else 0
    return kernel, steps, tuple((p, p) for p in pads), holes, tuple(more)


def _attrs(kernel: tuple[int, ...], steps: tuple[int, ...], pads: Pads) -> dict[str, Any]:
    if len(kernel) == 1:
        kernel, steps, pads = (1, *kernel), (1, *steps), ((0, 0), *pads)
    return {"kernel": kernel, "stride": steps, "padding": pads, "layout": "NCHW"}


def _max_pool(
    what: str, count: int, x: TensorLike, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Tensor:
    t = spatial(x, what, count)
    kernel, steps, pads, holes, more = _windows(t, what, kernel_size, stride, padding, dilation, ceil_mode)
    pads = tuple((p[0], p[1] + m) for p, m in zip(pads, more, strict=True))
    image, holes = (as_image(t), (1, *holes)) if count == 1 else (t, holes)
    y = apply("max_pool2d", image, **_attrs(kernel, steps, pads), dilation=holes)
    return as_signal(y) if count == 1 else y


def max_pool1d(
    x: TensorLike,
    kernel_size: Single,
    stride: Single | None = None,
    padding: Single = 0,
    dilation: Single = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest value in each window of x (N, C, L). See `max_pool2d`."""
    return _max_pool("max_pool1d", 1, x, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d(
    x: TensorLike, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> Tensor:
    """The largest value in each window of x (N, C, H, W); NaN if one is NaN. The stride is the kernel size unless given.

    Padding, at most half of the window, counts as -inf. `ceil_mode` adds a last window that reaches beyond the image where
    the windows would leave pixels over. The gradient goes to the first of equal maxima.
    """
    return _max_pool("max_pool2d", 2, x, kernel_size, stride, padding, dilation, ceil_mode)


def _avg_pool(
    what: str, count: int, x: TensorLike, kernel_size: Any, stride: Any, padding: Any,
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    t = spatial(x, what, count)
    kernel, steps, pads, _, more = _windows(t, what, kernel_size, stride, padding, 1, ceil_mode)
    include = bool(count_include_pad)
    if divisor_override is not None:
        if isinstance(divisor_override, bool) or not isinstance(divisor_override, int) or divisor_override < 1:
            raise error(AttributeValueError, f"{what}: divisor_override is a positive int, not {divisor_override!r}")
        include = True
    elif any(more) and include:
        # The padding counts, what ceil_mode adds does not: pad first, then count what there is.
        t = pad(t, [(0, 0), (0, 0), *pads])
        pads, include = ((0, 0),) * count, False
    pads = tuple((p[0], p[1] + m) for p, m in zip(pads, more, strict=True))
    y = apply("avg_pool2d", as_image(t) if count == 1 else t, **_attrs(kernel, steps, pads), count_include_pad=include)
    y = as_signal(y) if count == 1 else y
    if divisor_override is None:
        return y
    window = kernel[0] * (kernel[1] if count == 2 else 1)
    return y if window == divisor_override else y * (window / divisor_override)


def avg_pool1d(
    x: TensorLike,
    kernel_size: Single,
    stride: Single | None = None,
    padding: Single = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The average of each window of x (N, C, L). See `avg_pool2d`."""
    return _avg_pool("avg_pool1d", 1, x, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    x: TensorLike,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of x (N, C, H, W); padding counts as zeros, or not at all if not count_include_pad.

    What `ceil_mode` lets a last window reach beyond the padding never counts. `divisor_override` divides by another number.
    """
    return _avg_pool("avg_pool2d", 2, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


# -- adaptive -----------------------------------------------------------------------------------------------------------
def _outputs(t: Tensor, output_size: Output) -> tuple[Dim, ...]:
    count = t.ndim - 2
    given: tuple[Any, ...] = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * count
    if len(given) != count or any(o is not None and (isinstance(o, bool) or not isinstance(o, int) or o < 1) for o in given):
        form = "a positive int or None" + (", or a pair of them" if count == 2 else "")
        raise error(AttributeValueError, f"output_size is {form}, not {output_size!r}", x=t)
    for o, size in zip(given, t.shape[2:], strict=True):
        if size == 0:
            raise error(ShapeError, f"adaptive pooling to {o} of an axis of size 0", x=t)
    return tuple(size if o is None else o for o, size in zip(given, t.shape[2:], strict=True))


def _even(t: Tensor, out: Sequence[Dim]) -> tuple[int, ...] | None:
    """The kernel (and stride) of plain pooling that gives `out` windows, where the sizes divide."""
    sizes = t.shape[2:]
    if all(isinstance(s, int) and isinstance(o, int) and s % o == 0 for s, o in zip(sizes, out, strict=True)):
        return tuple(int(s) // int(o) for s, o in zip(sizes, out, strict=True))  # type: ignore[arg-type]
    return None


def _adaptive_avg(what: str, count: int, x: TensorLike, output_size: Output) -> Tensor:
    t = spatial(x, what, count)
    out = _outputs(t, output_size)
    if all(o == 1 for o in out):
        return mean(t, tuple(range(2, t.ndim)), keepdims=True)
    kernel = _even(t, out)
    if kernel is not None:
        return _avg_pool(what, count, t, kernel, None, 0, False, True, None)
    image, goal = (as_image(t), (1, *out)) if count == 1 else (t, out)
    sizes = apply("adaptive_sum_pool2d", ones((1, 1, *image.shape[2:]), image.dtype), output=goal)
    y = apply("adaptive_sum_pool2d", image, output=goal) / sizes
    return as_signal(y) if count == 1 else y


def adaptive_avg_pool1d(x: TensorLike, output_size: Output) -> Tensor:
    """Averages of x (N, C, L) over output_size windows. See `adaptive_avg_pool2d`."""
    return _adaptive_avg("adaptive_avg_pool1d", 1, x, output_size)


def adaptive_avg_pool2d(x: TensorLike, output_size: Output) -> Tensor:
    """Averages of x (N, C, H, W) over output_size windows that share the image out evenly; None keeps that axis's size.

    Window i of n runs from floor(i * size / n) to ceil((i + 1) * size / n); the windows overlap where the sizes do not
    divide. Output size 1 is global average pooling.
    """
    return _adaptive_avg("adaptive_avg_pool2d", 2, x, output_size)


def _adaptive_max(what: str, count: int, x: TensorLike, output_size: Output) -> Tensor:
    t = spatial(x, what, count)
    out = _outputs(t, output_size)
    kernel = _even(t, out)
    if kernel is not None:
        return _max_pool(what, count, t, kernel, None, 0, 1, False)
    if all(o == 1 for o in out):  # of symbolic sizes
        return max(t, tuple(range(2, t.ndim)), keepdims=True)
    y = apply("adaptive_max_pool2d", as_image(t) if count == 1 else t, output=(1, *out) if count == 1 else out)
    return as_signal(y) if count == 1 else y


def adaptive_max_pool1d(x: TensorLike, output_size: Output) -> Tensor:
    """The largest of x (N, C, L) in each of output_size windows. See `adaptive_max_pool2d`."""
    return _adaptive_max("adaptive_max_pool1d", 1, x, output_size)


def adaptive_max_pool2d(x: TensorLike, output_size: Output) -> Tensor:
    """The largest of x (N, C, H, W) in each of output_size windows, as those of `adaptive_avg_pool2d`.

    Output size 1 is global max pooling.
    """
    return _adaptive_max("adaptive_max_pool2d", 2, x, output_size)
