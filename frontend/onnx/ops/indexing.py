"""Reading and writing at positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....ir.dims import Dim, product
from ....ir.dtypes import bool_, i64
from ... import elementwise as ew
from ...core import apply, as_tensor, normalize_axis
from ...movement import iota, reshape, slice_axis, stack, take, take_along_axis
from ...reductions import argmax, cumsum
from ...reductions import sum as total
from ...tensor import Tensor
from ..call import Call
from ..registry import op


@op("Gather")
def gather(n: Call) -> Tensor:
    x = n.tensor(0)
    axis = normalize_axis(n.integer("axis", 0), x.ndim, "Gather")
    known = n.known(1)
    size = x.shape[axis]
    if known is not None and isinstance(size, int) and known.size and (known.min() < -size or known.max() >= size):
        n.fail(f"its indices {known.min()} to {known.max()} are outside of dimension {axis} of size {size}")
    if known is not None and isinstance(size, int):
        known = np.where(known < 0, known + size, known)
        return apply("gather", x, as_tensor(known), axis=axis)
    return take(x, n.tensor(1), axis)


@op("GatherElements")
def gather_elements(n: Call) -> Tensor:
    x, index = n.tensor(0), n.tensor(1)
    axis = normalize_axis(n.integer("axis", 0), x.ndim, "GatherElements")
    if index.ndim != x.ndim:
        n.fail("data and indices need the same number of dimensions")
    for a in range(x.ndim):
        if a != axis and x.shape[a] != index.shape[a]:
            x = _cut(x, a, index.shape[a])
    return take_along_axis(x, index, axis)


def _cut(x: Tensor, axis: int, size: object) -> Tensor:

    return slice_axis(x, axis, 0, size)  # type: ignore[arg-type]


@op("GatherND")
def gather_nd(n: Call) -> Tensor:
    x, index = n.tensor(0), n.tensor(1).astype(i64)
    batch = n.integer("batch_dims", 0)
    depth = index.shape[-1]
    if not isinstance(depth, int) or batch + depth > x.ndim or batch > index.ndim - 1:
        n.fail(f"indices of shape {index.shape} with batch_dims={batch} for data of {x.ndim} dimensions")
    position = linear_index(index, x.shape[batch : batch + depth])
    rest = x.shape[batch + depth :]
    inner = product(x.shape[batch : batch + depth])
    if batch:
        rows = iota((*x.shape[:batch], *(1,) * (index.ndim - 1 - batch)), 0)
        rows = rows * 0
        for a in range(batch):
            rows = rows * x.shape[a] + iota((*x.shape[:batch], *(1,) * (index.ndim - 1 - batch)), a)
        position = position + rows * inner
    flat = reshape(x, (product(x.shape[:batch]) * inner, *rest))
    return apply("gather", flat, position, axis=0)


def linear_index(index: Tensor, sizes: Sequence[Dim]) -> Tensor:
    """Positions in a flattened array from the last axis of `index`; those below 0 count from the end."""
    position: Tensor | None = None
    for k, size in enumerate(sizes):
        part = index[..., k]
        part = ew.where(part < 0, part + size, part)
        position = part if position is None else position * size + part
    return position if position is not None else iota(index.shape[:-1], 0) * 0


@op("OneHot")
def one_hot(n: Call) -> Tensor:
    index, values = n.tensor(0), n.tensor(2)
    depth = int(n.scalar(1))
    axis = n.integer("axis", -1)
    rank = index.ndim + 1
    axis = normalize_axis(axis, rank, "OneHot")
    if index.dtype.is_float:
        index = index.astype(i64)
    index = index.astype(i64)
    index = ew.where(index < 0, index + depth, index)
    index = reshape(index, (*index.shape[:axis], 1, *index.shape[axis:]))
    hit = ew.equal(index, iota(tuple(depth if a == axis else 1 for a in range(rank)), axis))
    return ew.where(hit, values[1], values[0])


@op("Hardmax")
def hardmax(n: Call) -> Tensor:

    x = n.tensor(0)
    if n.opset < 13:
        axis = normalize_axis(n.integer("axis", 1), x.ndim, "Hardmax")
        flat = reshape(x, (product(x.shape[:axis]), product(x.shape[axis:])))
        hot = ew.equal(argmax(flat, 1, keepdims=True), iota(flat.shape, 1))
        return reshape(hot.astype(x.dtype), x.shape)
    axis = normalize_axis(n.integer("axis", -1), x.ndim, "Hardmax")
    return ew.equal(argmax(x, axis, keepdims=True), iota(x.shape, axis)).astype(x.dtype)


@op("Compress")
def compress(n: Call) -> Tensor:
    """How many elements are kept decides the shape: the condition is needed before the rest is compiled."""
    x, keep = n.tensor(0), n.array(1).astype(bool).ravel()
    axis = n.attribute("axis")
    at = np.flatnonzero(keep).astype(np.int64)
    if axis is None:
        x, a = reshape(x, (-1,)), 0
    else:
        a = normalize_axis(int(axis), x.ndim, "Compress")
    return apply("gather", x, as_tensor(at), axis=a)


@op("NonZero")
def nonzero(n: Call) -> Tensor:
    """The number of elements that are not zero is computed first; their positions then come from running counts."""

    x = n.tensor(0)
    flag = (x if x.dtype is bool_ else ew.not_equal(x, 0)).astype(i64)
    flat = reshape(flag, (-1,))
    count = int(n.need(total(flat), "count"))
    if x.ndim == 0:
        return reshape(iota((count,), 0) * 0, (0, count)) if count else reshape(iota((0,), 0), (0, 0))
    # element j of the result goes to place (running count - 1): scattered there, all others dropped
    place = ew.where(flat > 0, cumsum(flat, 0) - 1, as_tensor(count, i64))
    at = apply("scatter_add", iota((count,), 0) * 0, place, iota(flat.shape, 0), axis=0)
    rows: list[Tensor] = []
    for size in reversed(x.shape):
        rows.append(ew.remainder(at, size))
        at = ew.floor_divide(at, size)

    return stack(rows[::-1], 0)
