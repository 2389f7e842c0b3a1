"""Convolutions of one, two and three spatial axes."""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.dims import Dim
from ...convolution import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from ...core import apply
from ...movement import pad, reshape, slice_axis
from ...tensor import Tensor
from ..call import Call
from ..registry import op

Pads = list[tuple[int, int]]


def same_pads(sizes: Sequence[Dim], extents: Sequence[int], strides: Sequence[int], upper: bool, n: Call) -> Pads:
    """Padding that makes ceil(size / stride) windows; the odd one lies at the end (upper) or the start."""
    found: Pads = []
    for size, e, s in zip(sizes, extents, strides, strict=True):
        if s == 1:
            total = e - 1
        else:
            size = n.fixed(size)
            total = max((-(-size // s) - 1) * s + e - size, 0)
        small = total // 2
        found.append((small, total - small) if upper else (total - small, small))
    return found


def windows(n: Call, x: Tensor, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], Pads]:
    """strides, dilations and padding of a node with these attributes; `x` has its spatial axes from 2 on."""
    count = len(kernel)
    strides, dilations = n.int_list("strides") or (1,) * count, n.int_list("dilations") or (1,) * count
    if len(strides) != count or len(dilations) != count or x.ndim != count + 2:
        n.fail(f"strides {strides}, dilations {dilations} and a kernel {tuple(kernel)} for an input of {x.ndim} dimensions")
    if any(v < 1 for v in (*strides, *dilations, *kernel)):
        n.fail(f"strides {strides}, dilations {dilations} and kernel {tuple(kernel)} are at least 1")
    auto = n.choice("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    given = n.int_list("pads")
    if auto == "NOTSET" or not auto:
        given = given or (0,) * (2 * count)
        if len(given) != 2 * count:
            n.fail(f"pads {given} for {count} spatial axes")
        return strides, dilations, [(given[k], given[k + count]) for k in range(count)]
    if auto == "VALID":
        return strides, dilations, [(0, 0)] * count
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return strides, dilations, same_pads(x.shape[2:], extents, strides, auto == "SAME_UPPER", n)


def kernel_of(n: Call, w: Tensor) -> tuple[int, ...]:
    """The kernel's sizes, from the weight; the attribute must agree."""
    kernel = w.shape[2:]
    if not kernel or not all(isinstance(k, int) for k in kernel):
        n.fail(f"its weight has shape {w.shape}")
    given = n.int_list("kernel_shape")
    if given is not None and tuple(given) != kernel:
        n.fail(f"kernel_shape {given} does not match the weight's {kernel}")
    return kernel  # type: ignore[return-value]


@op("Conv")
def conv(n: Call) -> Tensor:
    x, w, b = n.tensor(0), n.tensor(1), n.optional(2)
    kernel = kernel_of(n, w)
    strides, dilations, pads = windows(n, x, kernel)
    return convolve(n, x, w, b, strides, dilations, pads, n.integer("group", 1))


def convolve(
    n: Call, x: Tensor, w: Tensor, b: Tensor | None, strides: Sequence[int], dilations: Sequence[int], pads: Pads, groups: int
) -> Tensor:
    """Convolution over one or two axes by our own; over three as a sum of such over the first."""
    low = [min(p, 0) for pair in pads for p in pair]
    if any(low):
        n.unsupported(f"negative padding {pads}")
    if x.ndim == 3:
        return conv1d(x, w, b, tuple(strides), tuple(pads), tuple(dilations), groups)
    if x.ndim == 4:
        return conv2d(x, w, b, tuple(strides), tuple(pads), tuple(dilations), groups)
    if x.ndim != 5:
        n.unsupported(f"convolution over {x.ndim - 2} axes")
    return _conv3d(n, x, w, b, strides, dilations, pads, groups)


def _conv3d(
    n: Call, x: Tensor, w: Tensor, b: Tensor | None, strides: Sequence[int], dilations: Sequence[int], pads: Pads, groups: int
) -> Tensor:
    x = pad(x, [(0, 0), (0, 0), pads[0], (0, 0), (0, 0)])
    count, channels, depth, h, width = x.shape
    size = w.shape[2]
    assert isinstance(size, int)
    frames = (depth - (size - 1) * dilations[0] - 1) // strides[0] + 1
    if isinstance(frames, int) and frames < 1:
        n.fail("the kernel is larger than the padded input")
    result: Tensor | None = None
    for k in range(size):
        start = k * dilations[0]
        part = slice_axis(x, 2, start, start + (frames - 1) * strides[0] + 1, strides[0])
        part = reshape(part.transpose(0, 2, 1, 3, 4), (count * frames, channels, h, width))
        weight = reshape(slice_axis(w, 2, k, k + 1), (*w.shape[:2], *w.shape[3:]))
        bias = b if k == size - 1 else None
        y = conv2d(part, weight, bias, tuple(strides[1:]), tuple(pads[1:]), tuple(dilations[1:]), groups)
        result = y if result is None else result + y
    assert result is not None
    return reshape(result, (count, frames, *result.shape[1:])).transpose(0, 2, 1, 3, 4)


@op("ConvTranspose")
def conv_transpose(n: Call) -> Tensor:
    x, w, b = n.tensor(0), n.tensor(1), n.optional(2)
    kernel = kernel_of(n, w)
    count = len(kernel)
    strides, dilations = n.int_list("strides") or (1,) * count, n.int_list("dilations") or (1,) * count
    extra = list(n.int_list("output_padding") or (0,) * count)
    groups, auto = n.integer("group", 1), n.choice("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    given, wanted = n.int_list("pads"), n.int_list("output_shape")
    full = [s * (d - 1) + h * (k - 1) + 1 for s, d, h, k in zip(strides, x.shape[2:], dilations, kernel, strict=True)]
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        goal = list(wanted)[-count:] if wanted is not None else [d * s for d, s in zip(x.shape[2:], strides, strict=True)]
        pads: Pads = []
        for k in range(count):
            total = n.fixed(full[k] + extra[k] - goal[k])
            if total < 0:
                extra[k] -= total
                total = 0
            small = total // 2
            pads.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    else:
        given = given or (0,) * (2 * count)
        pads = [(given[k], given[k + count]) for k in range(count)]
    if count > 2:
        return _transposed3d(n, x, w, b, strides, dilations, pads, extra, groups)
    # what output_padding adds beyond a stride or dilation is zeros past every kernel's reach: added here
    own = [min(e, max(s, d) - 1) for e, s, d in zip(extra, strides, dilations, strict=True)]
    more = [e - o for e, o in zip(extra, own, strict=True)]
    fn = conv_transpose1d if count == 1 else conv_transpose2d
    y = fn(x, w, None, tuple(strides), tuple(pads), tuple(own), groups, tuple(dilations))
    if any(more):
        y = pad(y, [(0, 0), (0, 0), *((0, m) for m in more)])
    return y if b is None else y + reshape(b, (1, -1, *(1,) * count))


def _transposed3d(
    n: Call, x: Tensor, w: Tensor, b: Tensor | None, strides: Sequence[int], dilations: Sequence[int], pads: Pads,
    extra: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Over three axes: one transposed convolution of images for each plane of the kernel, put in its place and added up."""
    if x.ndim != 5:
        n.unsupported(f"transposed convolution over {x.ndim - 2} axes")
    count, channels, depth, h, width = x.shape
    size = w.shape[2]
    assert isinstance(size, int)
    depth = n.fixed(depth)
    frames = reshape(x.transpose(0, 2, 1, 3, 4), (count * depth, channels, h, width))
    whole = (depth - 1) * strides[0] + (size - 1) * dilations[0] + 1
    result: Tensor | None = None
    for k in range(size):
        weight = reshape(slice_axis(w, 2, k, k + 1), (*w.shape[:2], *w.shape[3:]))
        y = conv_transpose2d(
            frames, weight, None, tuple(strides[1:]), tuple(pads[1:]), tuple(extra[1:]), groups, tuple(dilations[1:])
        )
        y = reshape(y, (count, depth, *y.shape[1:])).transpose(0, 2, 1, 3, 4)
        low = k * dilations[0]
        gap = (0, 0, strides[0] - 1, 0, 0)
        high = whole - low - ((depth - 1) * strides[0] + 1)
        y = apply("pad", y, low=(0, 0, low, 0, 0), high=(0, 0, high, 0, 0), interior=gap, value=0.0)
        result = y if result is None else result + y
    assert result is not None
    before, after = pads[0]
    grown = max(extra[0] - after, 0)
    result = slice_axis(result, 2, before, whole - max(after - extra[0], 0))
    if grown:
        result = pad(result, [(0, 0), (0, 0), (0, grown), (0, 0), (0, 0)])
    return result if b is None else result + reshape(b, (1, -1, 1, 1, 1))
