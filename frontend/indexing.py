"""x[...]: ints, slices, None, Ellipsis and integer Tensors, by numpy's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.dims import Dim, DimExpr
from ..ir.dtypes import bool_
from ..ir.errors import ShapeError, TraceError
from .context import error
from .core import Value, apply, as_tensor, broadcast_shapes, show
from .core import broadcast_to as _broadcast_to
from .movement import as_indices, flip, reshape, transpose, wrap_negative

if TYPE_CHECKING:
    from .tensor import Tensor


def getitem(t: Tensor, key: Any) -> Tensor:
    """t[key]. Raises ShapeError for too many or out-of-range indices, TraceError for bool masks."""
    items = list(key) if isinstance(key, tuple) else [key]
    items = [np.asarray(i) if isinstance(i, list) else i for i in items]
    for i in items:
        if getattr(i, "dtype", None) in (bool_, np.dtype(bool)) or isinstance(i, (bool, np.bool_)):
            message = "a bool mask as an index selects a number of elements known only at run time; use tw.where(mask, x, other)"
            raise error(TraceError, message, operand=t)
    dots = [n for n, i in enumerate(items) if i is Ellipsis]
    if len(dots) > 1:
        raise error(ShapeError, "an index may hold one Ellipsis", operand=t)
    used = sum(i is not None and i is not Ellipsis for i in items)
    if used > t.ndim:
        raise error(ShapeError, f"{used} indices for a Tensor of {t.ndim} dimensions, shape {show(t.shape)}", operand=t)
    at = dots[0] if dots else len(items)
    items[at : at + bool(dots)] = [slice(None)] * (t.ndim - used)
    return _basic_then_advanced(t, items)


def _basic_then_advanced(t: Tensor, items: list[Any]) -> Tensor:
    starts: list[Dim] = []
    stops: list[Dim] = []
    steps: list[int] = []
    reversed_axes: list[int] = []
    shape: list[Dim] = []  # after slicing: dropped ints left out, None as 1
    tensors: list[tuple[int, Tensor]] = []  # (position in the new shape, indices)
    axis = 0
    for item in items:
        if item is None:
            shape.append(1)
            continue
        size = t.shape[axis]
        if isinstance(item, slice):
            low, high, step, backwards = _bounds(item, size, t, axis)
            if backwards:
                reversed_axes.append(axis)
            shape.append(_count(low, high, step))
        elif isinstance(item, (Value, np.ndarray)) and not (isinstance(item, np.ndarray) and item.ndim == 0):
            low, high, step = 0, size, 1
            tensors.append((len(shape), as_indices(item, "index")))
            shape.append(size)
        else:
            low = _integer(item, size, t, axis)
            high, step = low + 1, 1
        starts.append(low)
        stops.append(high)
        steps.append(step)
        axis += 1
    result = t
    if starts != [0] * t.ndim or stops != list(t.shape) or steps != [1] * t.ndim:
        result = apply("slice", t, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))
    if reversed_axes:
        result = flip(result, tuple(reversed_axes))
    result = reshape(result, tuple(shape))
    return _gather(result, tensors) if tensors else result


def _count(low: Dim, high: Dim, step: int) -> Dim:
    return (high - low + (step - 1)) // step


def _integer(item: object, size: Dim, t: Tensor, axis: int) -> Dim:
    if isinstance(item, DimExpr):
        return item
    if isinstance(item, float) or not hasattr(item, "__index__"):
        raise error(TraceError, f"an index is an int, a slice, None, ... or an integer Tensor, not {item!r}", operand=t)
    i = int(item.__index__())
    if isinstance(size, int) and not -size <= i < size:
        raise error(ShapeError, f"index {i} is out of range for dimension {axis} of size {size}", operand=t)
    return i if i >= 0 else size + i


def _bounds(item: slice, size: Dim, t: Tensor, axis: int) -> tuple[Dim, Dim, int, bool]:
    """(low, high, step > 0, whether to reverse afterwards) of the same elements as the slice."""
    for part in (item.start, item.stop, item.step):
        if isinstance(part, Value):
            message = "a slice bound cannot be a Tensor: its value is known only at run time; take(x, start + arange(n)) gathers"
            raise error(TraceError, message, operand=t)
    step = 1 if item.step is None else int(item.step)
    if step == 0:
        raise error(ShapeError, "a slice step cannot be 0", operand=t)
    if isinstance(size, int) and not isinstance(item.start, DimExpr) and not isinstance(item.stop, DimExpr):
        start, stop, step = item.indices(size)
        count = len(range(start, stop, step))
        if step > 0:
            return start, start + _span(count, step), step, False
        last = start + (count - 1) * step
        return (last, last + _span(count, -step), -step, True) if count else (0, 0, 1, False)
    if step < 0:
        if item.start is None and item.stop is None and step == -1:
            return 0, size, 1, True
        raise error(ShapeError, f"dimension {axis} is symbolic ({size}): with a negative step only [::-1] is known", operand=t)
    # A symbolic size: bounds are taken to lie inside it.
    low: Dim = 0 if item.start is None else item.start
    high: Dim = size if item.stop is None else item.stop
    low = size + low if isinstance(low, int) and low < 0 else low
    high = size + high if isinstance(high, int) and high < 0 else high
    return low, high, step, False


def _span(count: int, step: int) -> int:
    return (count - 1) * step + 1 if count else 0


def _gather(t: Tensor, tensors: list[tuple[int, Tensor]]) -> Tensor:
    """Integer Tensors in one or more places: x[..., i, ..., j, ...]."""
    if len(tensors) == 1:
        axis, index = tensors[0]
        return apply("gather", t, wrap_negative(index, t.shape[axis]), axis=axis)
    axes = [a for a, _ in tensors]
    shape = broadcast_shapes("index", *(i for _, i in tensors))
    rest = [a for a in range(t.ndim) if a not in axes]
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    front = axes[0] if adjacent else 0  # numpy: the indexed dimensions stay in place only if they are adjacent
    order = [*rest[:front], *axes, *rest[front:]]
    moved = transpose(t, order)
    linear: Any = None
    size: Dim = 1
    for a, index in tensors:
        i = _broadcast_to(wrap_negative(index, t.shape[a]).astype("i64"), shape)
        i = _clip_index(i, t.shape[a])
        linear = i if linear is None else linear * t.shape[a] + i
        size = size * t.shape[a]
    flat = reshape(moved, (*moved.shape[:front], size, *moved.shape[front + len(axes) :]))
    return apply("gather", flat, linear, axis=front)


def _clip_index(index: Tensor, size: Dim) -> Tensor:
    last = size - 1
    low = _broadcast_to(as_tensor(0, index.dtype), index.shape)
    high = _broadcast_to(as_tensor(last, index.dtype), index.shape)
    return apply("minimum", apply("maximum", index, low), high)
