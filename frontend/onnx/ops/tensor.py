"""Making, joining, cutting and padding tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ....ir.dims import Dim, DimExpr
from ....ir.dtypes import bool_, f32, i32, i64
from ... import elementwise as ew
from ...core import apply, as_tensor, cast, normalize_axes, normalize_axis
from ...indexing import getitem
from ...movement import concatenate, full, iota, reshape, slice_axis, take, take_along_axis, tile, transpose
from ...tensor import Tensor
from ..call import Call
from ..description import Stored
from ..registry import op

_FAR = 1 << 31  # an end of a slice from here on means: to the end
_FAR_FOR_A_SYMBOL = 10**9  # the same for a symbolic size: what tf2onnx writes where nothing is cut off


@op("Constant")
def constant(n: Call) -> Any:
    stored = n.attribute("value")
    if isinstance(stored, Stored):
        return n.importer.stored_value(stored, n.scope + n.node.outputs[0])
    sparse = n.attribute("sparse_value")
    if isinstance(sparse, Stored):
        return n.importer.stored_value(sparse, n.scope + n.node.outputs[0])
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        found = n.attribute(name)
        if found is not None:
            return np.asarray(found, dtype)
    n.unsupported(f"a constant of {sorted(n.node.attributes)}")


@op("ConstantOfShape")
def constant_of_shape(n: Call) -> Tensor:
    value = n.stored("value")
    value = np.zeros(1, np.float32) if value is None else value
    if value.size != 1:
        n.fail(f"value holds one number, not {value.size}")
    dims = n.dims(0)
    return full(_sizes(n, dims), as_tensor(value.reshape(())))


def _sizes(n: Call, dims: Sequence[Dim]) -> tuple[Dim, ...]:
    if any(isinstance(d, int) and d < 0 for d in dims):
        n.fail(f"a size cannot be negative: {tuple(map(str, dims))}")
    return tuple(dims)


@op("Range")
def range_(n: Call) -> Tensor:
    v = n.value(0)
    if v.dtype.is_integer and any(n.value(i).is_sizes for i in range(3)):
        start, stop, step = (n.dims(i)[0] for i in range(3))
        if step != 1:
            n.unsupported(f"a range from {start} to {stop} by {step}: of symbolic sizes only steps of 1 are known")
        return iota((stop - start,), 0, v.dtype) + (start if isinstance(start, DimExpr) else as_tensor(start, v.dtype))
    start, stop, step = (n.scalar(i) for i in range(3))
    if step == 0:
        n.fail("a step of 0")
    count = max(math.ceil((stop - start) / step), 0)
    if count > 1 << 40:
        n.fail(f"a range of {count} numbers")
    wide = v.dtype if v.dtype.is_integer or v.dtype.bits >= 32 else f32
    numbers = iota((count,), 0, wide) * as_tensor(step, wide) + as_tensor(start, wide)
    return cast(numbers, v.dtype)


@op("EyeLike")
def eye_like(n: Call) -> Tensor:
    x = n.value(0)
    dtype = n.dtype("dtype", x.dtype)
    if len(x.shape) != 2:
        n.fail(f"takes a matrix, not {len(x.shape)} dimensions")
    shape = x.shape
    return cast(ew.equal(iota(shape, 0) + n.integer("k", 0), iota(shape, 1)), dtype)


@op("Concat")
def concat(n: Call) -> Tensor:
    return concatenate(n.tensors(), n.integer("axis", 1 if n.opset < 4 else None))


@op("Split")
def split(n: Call) -> list[Tensor]:
    x = n.tensor(0)
    axis = normalize_axis(n.integer("axis", 0), x.ndim, "Split")
    sizes: Sequence[Dim] | None = n.int_list("split")
    if sizes is None and n.has(1):
        sizes = n.dims(1)
    count = n.attribute("num_outputs")
    if sizes is None:
        parts, size = int(count or n.outputs), x.shape[axis]
        if parts != n.outputs:
            n.fail(f"{parts} parts for {n.outputs} outputs")
        each = -(-size // parts) if isinstance(size, int) else size // parts
        sizes = [each] * (parts - 1) + [size - each * (parts - 1)]
    if len(sizes) != n.outputs:
        n.fail(f"{len(sizes)} sizes for {n.outputs} outputs")
    cuts: list[Dim] = [0]
    for s in sizes:
        cuts.append(cuts[-1] + s)
    if isinstance(cuts[-1], int) and cuts[-1] != x.shape[axis]:
        n.fail(f"sizes {tuple(sizes)} do not add up to dimension {axis} of size {x.shape[axis]}")
    return [slice_axis(x, axis, a, b) for a, b in pairwise(cuts)]


@op("Slice", 1)
def slice_attributes(n: Call) -> Tensor:
    starts, ends = n.int_list("starts"), n.int_list("ends")
    if starts is None or ends is None:
        n.fail("starts or ends are missing")
    return _sliced(n, starts, ends, n.int_list("axes"), None)


@op("Slice", 10)
def slice_inputs(n: Call) -> Tensor:
    axes = n.ints(3) if n.has(3) else None
    return _sliced(n, n.dims(1), n.dims(2), axes, n.ints(4) if n.has(4) else None)


def _sliced(
    n: Call, starts: Sequence[Dim], ends: Sequence[Dim], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> Tensor:
    x = n.tensor(0)
    axes = range(len(starts)) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        n.fail("starts, ends, axes and steps have different lengths")
    key: list[Any] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            n.fail("a step of 0")
        a = normalize_axis(axis, x.ndim, "Slice")
        low: Dim | None = start
        high: Dim | None = end
        size = x.shape[a]
        far = _FAR if isinstance(size, int) else _FAR_FOR_A_SYMBOL
        if isinstance(low, int) and (abs(low) >= far or (step < 0 and low == -1)):
            low = None if (low > 0) == (step < 0) or low == -1 else low
        if isinstance(high, int) and (abs(high) >= far or (step < 0 and isinstance(size, int) and high < -size)):
            high = None
        key[a] = slice(low, _within(high, size), step)
    return getitem(x, tuple(key))


def _within(end: Dim | None, size: Dim) -> Dim | None:
    """A symbolic end that says no less than the whole becomes the whole."""
    return None if isinstance(end, DimExpr) and end == size else end


@op("Pad", 1, 2)
def pad_attributes(n: Call) -> Tensor:
    pads = n.int_list("pads" if n.opset >= 2 else "paddings")
    if pads is None:
        n.fail("the attribute 'pads' is missing")
    return padded(n, pads, range(n.tensor(0).ndim), n.number("value", 0.0))


@op("Pad", 11)
def pad_inputs(n: Call) -> Tensor:
    x = n.tensor(0)
    axes = normalize_list(n.ints(3), x.ndim) if n.has(3) else range(x.ndim)
    value = n.scalar(2, 0) if not n.has(2) or n.known(2) is not None else n.tensor(2)
    return padded(n, n.ints(1), axes, value)


def normalize_list(axes: Sequence[int], rank: int) -> list[int]:
    """Non-negative axes in the order given."""
    normalize_axes(tuple(axes), rank, "axes")
    return [a % rank for a in axes]


def padded(n: Call, pads: Sequence[int], axes: Sequence[int], value: Any) -> Tensor:
    """x with elements around it, in one of the four modes; negative widths cut off."""
    x, mode = n.tensor(0), n.choice("mode", "constant", "edge", "reflect", "wrap")
    count = len(axes)
    if len(pads) != 2 * count:
        n.fail(f"{len(pads)} widths for {count} axes")
    widths = {a: (pads[k], pads[k + count]) for k, a in enumerate(axes)}
    for a, (before, after) in widths.items():
        if before < 0 or after < 0:
            x = slice_axis(x, a, max(-before, 0), x.shape[a] - max(-after, 0))
    grown = {a: (max(p, 0), max(q, 0)) for a, (p, q) in widths.items() if p > 0 or q > 0}
    if not grown:
        return x
    if mode == "constant":
        low = tuple(grown.get(a, (0, 0))[0] for a in range(x.ndim))
        high = tuple(grown.get(a, (0, 0))[1] for a in range(x.ndim))
        if isinstance(value, Tensor) or x.dtype is bool_ or (isinstance(value, int) and abs(value) > 1 << 52):
            inside = apply("pad", full(x.shape, True, bool_).astype(i32), low=low, high=high, interior=(0,) * x.ndim, value=0.0)
            fill = value if isinstance(value, Tensor) else as_tensor(np.asarray(value, x.dtype.numpy))
            wide = x.astype(i32) if x.dtype is bool_ else x
            moved = apply("pad", wide, low=low, high=high, interior=(0,) * x.ndim, value=0.0).astype(x.dtype)
            return ew.where(ew.not_equal(inside, 0), moved, reshape(fill, ()))
        return apply("pad", x, low=low, high=high, interior=(0,) * x.ndim, value=float(value))
    for a, (before, after) in grown.items():
        size = n.fixed(x.shape[a])
        at = np.arange(-before, size + after)
        if mode == "edge":
            at = np.clip(at, 0, size - 1)
        elif mode == "wrap":
            at = at % max(size, 1)
        else:
            period = max(2 * (size - 1), 1)
            at = np.abs((at + size - 1) % period - (size - 1)) if size > 1 else at * 0
        x = take(x, as_tensor(at.astype(np.int64)), a)
    return x


@op("Tile", 1)
def tile_axis(n: Call) -> Tensor:
    x, axis, times = n.tensor(0), int(n.scalar(2)), int(n.scalar(1))
    return tile(x, tuple(times if a == axis % x.ndim else 1 for a in range(x.ndim)))


@op("Tile", 6)
def tile_(n: Call) -> Tensor:
    times = n.ints(1)
    if len(times) != n.tensor(0).ndim:
        n.fail(f"{len(times)} repeats for {n.tensor(0).ndim} dimensions")
    return tile(n.tensor(0), times)


@op("Trilu")
def trilu(n: Call) -> Tensor:
    x, k = n.tensor(0), int(n.scalar(1, 0))
    if x.ndim < 2:
        n.fail("takes matrices")
    rows, columns = iota(x.shape, x.ndim - 2, i64), iota(x.shape, x.ndim - 1, i64)
    keep = columns - rows >= k if n.flag("upper", True) else columns - rows <= k
    return ew.where(keep, x, full(x.shape, 0, x.dtype) if x.dtype is not bool_ else full(x.shape, False, bool_))


@op("DepthToSpace")
def depth_to_space(n: Call) -> Tensor:
    x, b = n.tensor(0), n.integer("blocksize")
    count, c, h, w = x.shape
    if n.choice("mode", "DCR", "CRD") == "DCR":
        y = transpose(reshape(x, (count, b, b, c // (b * b), h, w)), (0, 3, 4, 1, 5, 2))
    else:
        y = transpose(reshape(x, (count, c // (b * b), b, b, h, w)), (0, 1, 4, 2, 5, 3))
    return reshape(y, (count, c // (b * b), h * b, w * b))


@op("SpaceToDepth")
def space_to_depth(n: Call) -> Tensor:
    x, b = n.tensor(0), n.integer("blocksize")
    mode = n.choice("mode", "DCR", "CRD")
    count, c, h, w = x.shape
    y = reshape(x, (count, c, h // b, b, w // b, b))
    y = transpose(y, (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return reshape(y, (count, c * b * b, h // b, w // b))


@op("ReverseSequence")
def reverse_sequence(n: Call) -> Tensor:
    x, lengths = n.tensor(0), n.tensor(1)
    batch, time = n.integer("batch_axis", 1), n.integer("time_axis", 0)
    shape = x.shape
    line = tuple(shape[batch] if a == batch else 1 for a in range(x.ndim))
    length = reshape(lengths, line).astype(i64)
    t = iota(tuple(shape[a] if a == time else 1 for a in range(x.ndim)), time)
    at = ew.where(t < length, length - 1 - t, t)
    return take_along_axis(x, at, time)


@op("Dropout")
def dropout(n: Call) -> Any:
    """Inference: the input itself, and a mask that is true everywhere. With a known training_mode of true it would draw."""
    n.ignore("ratio", "is_test", "consumed_inputs", "seed")
    if n.has(2) and bool(n.scalar(2)):
        ratio = float(n.scalar(1, 0.5)) if n.has(1) else 0.5
        if ratio != 0.0:
            n.unsupported("training mode: its draws are random")
    x = n.tensor(0)
    return (x, full(x.shape, True, bool_ if n.opset >= 10 else x.dtype)) if n.wants(1) else x
