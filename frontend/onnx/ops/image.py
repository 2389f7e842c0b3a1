"""GridSample, RoiAlign, DeformConv, Col2Im: what reads or writes images at computed places."""

from __future__ import annotations

import numpy as np

from ....ir.dims import Dim, as_int, product
from ....ir.dtypes import i64
from ... import elementwise as ew
from ...core import apply, as_tensor, broadcast_to
from ...linalg import matmul
from ...movement import expand_dims, iota, moveaxis, reshape, scatter_add, transpose
from ...reductions import max as largest
from ...reductions import sum as total
from ...sampling import grid_sample, sample
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from .convolution import kernel_of, windows


@op("GridSample", 16)
def grid_sampled(n: Call) -> Tensor:
    mode = n.choice("mode", "linear", "nearest", "cubic", "bilinear", "bicubic")
    padding = n.choice("padding_mode", "zeros", "border", "reflection")
    return grid_sample(n.tensor(0), n.tensor(1), mode.removeprefix("bi"), padding, n.flag("align_corners", False))


@op("RoiAlign", 10, 16, 22)
def roi_align(n: Call) -> Tensor:
    """Each bin of a region is read at a grid of points, bilinearly, and the points are averaged (or the largest is taken).

    Without a sampling_ratio the number of points depends on the regions, which are needed before the rest is compiled.
    """
    x, rois, image = n.tensor(0), n.tensor(1), n.tensor(2).astype(i64)
    mode = n.choice("mode", "avg", "max")
    half = n.opset >= 16 and n.choice("coordinate_transformation_mode", "half_pixel", "output_half_pixel") == "half_pixel"
    bins = (n.integer("output_height", 1), n.integer("output_width", 1))
    ratio, scale = n.integer("sampling_ratio", 0), n.number("spatial_scale", 1.0)
    for number in (*bins, ratio):
        n.bounded(number, "bins or points of a region")
    sizes = tuple(as_int(s) for s in x.shape[2:])
    corner = rois * scale - (0.5 if half else 0.0)  # x1, y1, x2, y2
    rows = rois.shape[0]
    places: list[Tensor] = []
    inside: list[Tensor] = []  # whether a point lies on the image; others count as 0
    given: list[Tensor] = []  # whether a region has this point at all
    counts: list[Tensor] = []
    shape: list[Dim] = [rows]
    for axis in (0, 1):  # rows, then columns
        start, end = corner[:, 1 - axis], corner[:, 3 - axis]
        length = end - start if half else ew.maximum(end - start, 1.0)
        step = length * (1.0 / bins[axis])
        own = ew.ceil(step) if ratio <= 0 else step * 0.0 + float(ratio)
        points = ratio if ratio > 0 else max(1, int(n.need(largest(own), f"points{axis}")))
        start, step, own_points = (reshape(t, (rows, 1, 1)) for t in (start, step, own))
        k = as_tensor(np.arange(bins[axis]).reshape(1, -1, 1).astype(x.dtype.numpy))
        i = as_tensor(np.arange(points).reshape(1, 1, -1).astype(x.dtype.numpy))
        at = start + k * step + (i + 0.5) * step / ew.maximum(own_points, 1.0)  # [rois, bins, points]
        inside.append(ew.logical_and(ew.greater_equal(at, -1.0), ew.less_equal(at, float(sizes[axis]))))
        given.append(broadcast_to(ew.less(i, own_points), at.shape))
        places.append(ew.clip(at, 0.0, sizes[axis] - 1.0))
        counts.append(own)
        shape += [bins[axis], points]

    def over(t: Tensor, axis: int) -> Tensor:
        """[rois, bins, points] of one axis over all of [rois, rows, points, columns, points]."""
        own_shape = [shape[d] if d == 0 or (d - 1) // 2 == axis else 1 for d in range(5)]
        return broadcast_to(reshape(t, tuple(own_shape)), tuple(shape))

    y, z = (over(t, axis) for axis, t in enumerate(places))
    lies, there = (expand_dims(ew.logical_and(over(t[0], 0), over(t[1], 1)), -1) for t in (inside, given))
    corners = [ew.where(lies, v, 0.0) for v in _weighted_corners(x, image, (y, z), sizes)]
    if mode == "avg":
        value = ew.where(there, corners[0] + corners[1] + corners[2] + corners[3], 0.0)
        count = reshape(ew.maximum(counts[0] * counts[1], 1.0), (rows, 1, 1, 1))
        return moveaxis(total(value, (2, 4)) / count, -1, 1)
    top = ew.maximum(ew.maximum(corners[0], corners[1]), ew.maximum(corners[2], corners[3]))
    return moveaxis(largest(ew.where(there, top, -np.inf), (2, 4)), -1, 1)


def _weighted_corners(x: Tensor, image: Tensor, places: tuple[Tensor, Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    """The four elements around each point times their bilinear weights, [..., C] each; `image` [rois] says which image."""
    flat = reshape(transpose(x, (0, 2, 3, 1)), (x.shape[0] * product(sizes), x.shape[1]))
    row = reshape(image, (image.shape[0], *(1,) * (places[0].ndim - 1)))
    around = []
    for at, size in zip(places, sizes, strict=True):
        low = ew.floor(at)
        part = at - low
        around.append(((low, 1.0 - part), (ew.minimum(low + 1.0, size - 1.0), part)))
    found = []
    for y, wy in around[0]:
        for z, wz in around[1]:
            position = (row * sizes[0] + y.astype(i64)) * sizes[1] + z.astype(i64)
            found.append(apply("gather", flat, position, axis=0) * expand_dims(wy * wz, -1))
    return found


@op("DeformConv", 19)
def deform_conv(n: Call) -> Tensor:
    """The image is read where the offsets say, with zeros around it; the rest is a matrix product with the weights."""
    x, w, offset = n.tensor(0), n.tensor(1), n.tensor(2)
    bias, mask = n.optional(3), n.optional(4)
    if x.ndim != 4:
        n.unsupported(f"of {x.ndim - 2} spatial axes; two are")
    kernel = kernel_of(n, w)
    strides, dilations, pads = windows(n, x, kernel)
    groups, offset_groups = n.integer("group", 1), n.integer("offset_group", 1)
    batch, channels = x.shape[0], as_int(x.shape[1])
    taps, out = kernel[0] * kernel[1], offset.shape[2:]
    if channels % offset_groups or channels % groups:
        n.fail(f"{channels} channels in {groups} groups and {offset_groups} offset groups")
    shifts = reshape(offset, (batch * offset_groups, taps, 2, *out))
    grid = np.stack(np.meshgrid(*(np.arange(k) * d for k, d in zip(kernel, dilations, strict=True)), indexing="ij")).reshape(
        2, taps
    )
    places = []
    for axis in (0, 1):
        start = as_tensor((grid[axis] - pads[axis][0]).reshape(1, taps, 1, 1).astype(x.dtype.numpy))
        step = iota((1, 1, *(out[a] if a == axis else 1 for a in (0, 1))), 2 + axis).astype(x.dtype) * float(strides[axis])
        places.append(shifts[:, :, axis] + (start + step))
    parts = reshape(x, (batch * offset_groups, channels // offset_groups, *x.shape[2:]))
    edge = [(0.0, as_int(s) - 1.0) for s in x.shape[2:]]
    read = sample(parts, places, "linear", "zeros", edge)  # [batch * offset groups, taps, *out, channels of one]
    if mask is not None:
        read = read * reshape(mask, (batch * offset_groups, taps, *out, 1))
    read = reshape(read, (batch, offset_groups, taps, product(out), channels // offset_groups))
    read = reshape(transpose(read, (0, 1, 4, 2, 3)), (batch, groups, channels // groups * taps, product(out)))
    weights = reshape(w, (1, groups, w.shape[0] // groups, channels // groups * taps))
    y = reshape(matmul(weights, read), (batch, w.shape[0], *out))
    return y if bias is None else y + reshape(bias, (1, -1, 1, 1))


@op("Col2Im", 18)
def col2im(n: Call) -> Tensor:
    """Overlapping blocks added up where they stand: one scatter of all elements."""
    x, sizes, kernel = n.tensor(0), n.ints(1), n.ints(2)
    count = len(sizes)
    strides, dilations = n.int_list("strides") or (1,) * count, n.int_list("dilations") or (1,) * count
    given = n.int_list("pads") or (0,) * (2 * count)
    if len(kernel) != count or len(strides) != count or len(dilations) != count or len(given) != 2 * count:
        n.fail(f"image {sizes}, block {kernel}, strides {strides}, dilations {dilations}, pads {given} do not fit")
    blocks = []
    for a in range(count):
        room = sizes[a] + given[a] + given[a + count] - dilations[a] * (kernel[a] - 1) - 1
        blocks.append(room // strides[a] + 1)
    taps, places = int(np.prod(kernel)), int(np.prod(blocks))
    batch, width = x.shape[0], as_int(x.shape[1])
    if width % taps or x.shape[2] != places:
        n.fail(f"data of shape {x.shape} for blocks of {kernel} at {tuple(blocks)} places")
    at, inside = np.zeros((taps, places), np.int64), np.ones((taps, places), bool)
    offsets, starts = np.indices(kernel).reshape(count, taps), np.indices(blocks).reshape(count, places)
    for a in range(count):
        where = starts[a][None, :] * strides[a] - given[a] + offsets[a][:, None] * dilations[a]
        inside &= (where >= 0) & (where < sizes[a])
        at = at * sizes[a] + where
    flat = np.where(inside, at, -1).reshape(-1)
    area = int(np.prod(sizes))
    rows = reshape(x, (batch * (width // taps), taps * places))
    zero = as_tensor(np.zeros((), x.dtype.numpy))
    image = scatter_add(broadcast_to(zero, (batch * (width // taps), area)), as_tensor(flat), rows, axis=1)
    return reshape(image, (batch, width // taps, *sizes))
