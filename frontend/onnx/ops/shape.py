"""Ops that compute sizes, or change a shape and nothing else. On known sizes they are computed during import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ....ir.dims import Dim, DimExpr, product
from ...core import broadcast_to, normalize_axes, normalize_axis
from ...movement import reshape, squeeze, transpose
from ...tensor import Tensor
from ..call import Call, array_of
from ..description import Array
from ..registry import fold, op
from ..values import Value


@op("Shape")
def shape(n: Call) -> Array:
    dims = n.value(0).shape
    rank = len(dims)
    start, end = n.integer("start", 0), n.integer("end", rank)
    low, high = (min(max(v + rank if v < 0 else v, 0), rank) for v in (start, end))
    return array_of(dims[low:high])


@op("Size")
def size(n: Call) -> Any:
    return array_of([product(n.value(0).shape)]).reshape(())


def known_shape(n: Call, x: Value, wanted: Sequence[Dim], allow_zero: bool) -> tuple[Dim, ...]:
    """The target of a Reshape: 0 keeps a dimension, -1 is worked out."""
    dims: list[Dim] = []
    for k, d in enumerate(wanted):
        if isinstance(d, int) and d == 0 and not allow_zero:
            if k >= len(x.shape):
                n.fail(f"shape {tuple(wanted)} copies dimension {k} of an input of {len(x.shape)} dimensions")
            dims.append(x.shape[k])
        else:
            dims.append(d)
    unknown = [k for k, d in enumerate(dims) if isinstance(d, int) and d == -1]
    if len(unknown) == 1:
        # what is kept on both sides cancels, also where sizes are symbolic or zero
        left, right = list(x.shape), [d for d in dims if not (isinstance(d, int) and d == -1)]
        for d in list(right):
            if d in left:
                left.remove(d)
                right.remove(d)
        rest = product(right)
        if isinstance(rest, int) and rest == 0:
            n.fail(f"shape {tuple(map(str, dims))}: -1 cannot be worked out where another dimension is 0")
        dims[unknown[0]] = product(left) // rest
    return tuple(dims)


@op("Reshape", 1)
def reshape_attribute(n: Call) -> Tensor:
    n.ignore("consumed_inputs")
    wanted = n.int_list("shape")
    if wanted is None:
        n.fail("the attribute 'shape' is missing")
    return reshape(n.tensor(0), known_shape(n, n.value(0), wanted, False))


@op("Reshape", 5)
def reshape_input(n: Call) -> Tensor:
    return reshape(n.tensor(0), known_shape(n, n.value(0), n.dims(1), n.flag("allowzero")))


@op("Flatten")
def flatten(n: Call) -> Tensor:
    x = n.tensor(0)
    axis = n.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if not 0 <= axis <= x.ndim:
        n.fail(f"axis {axis} of an input of {x.ndim} dimensions")
    return reshape(x, (product(x.shape[:axis]), product(x.shape[axis:])))


def _axes(n: Call) -> tuple[int, ...] | None:
    given = n.int_list("axes")
    return n.ints(1) if given is None and n.has(1) else given


@op("Squeeze")
def squeeze_(n: Call) -> Tensor:
    return squeeze(n.tensor(0), _axes(n))


@op("Unsqueeze")
def unsqueeze(n: Call) -> Tensor:
    x, axes = n.tensor(0), _axes(n)
    if axes is None:
        n.fail("its axes are missing")
    rank = x.ndim + len(axes)
    places = normalize_axes(axes, rank, "Unsqueeze")
    old = iter(x.shape)
    return reshape(x, tuple(1 if i in places else next(old) for i in range(rank)))


@op("Transpose")
def transpose_(n: Call) -> Tensor:
    return transpose(n.tensor(0), n.int_list("perm"))


@op("Expand")
def expand(n: Call) -> Tensor:
    x, given = n.tensor(0), n.dims(1)
    rank = max(x.ndim, len(given))
    have: tuple[Dim, ...] = (*(1,) * (rank - x.ndim), *x.shape)
    wanted: tuple[Dim, ...] = (*(1,) * (rank - len(given)), *given)
    return broadcast_to(x, tuple(h if _is_one(w) else w for h, w in zip(have, wanted, strict=True)))


def _is_one(d: Dim) -> bool:
    return isinstance(d, int) and d == 1


# -- on sizes -----------------------------------------------------------------------------------------------------------
def _given(arrays: list[Array | None], count: int) -> bool:
    return len(arrays) >= count and all(a is not None for a in arrays[:count])


@fold("Concat")
def _fold_concat(n: Call, arrays: list[Array | None]) -> Array | None:
    if any(a is None or a.ndim == 0 for a in arrays):
        return None
    return np.concatenate(arrays, n.integer("axis", 1 if n.opset < 4 else None))  # type: ignore[arg-type]


@fold("Gather")
def _fold_gather(n: Call, arrays: list[Array | None]) -> Array | None:
    data, at = arrays
    if data is None or at is None or at.dtype == object or data.ndim == 0:
        return None
    axis = normalize_axis(n.integer("axis", 0), data.ndim, "Gather")
    if np.any((at < -data.shape[axis]) | (at >= data.shape[axis])):
        n.fail(f"its indices are outside of dimension {axis} of size {data.shape[axis]}")
    return np.asarray(np.take(data, at.astype(np.int64), axis), data.dtype)


@fold("Unsqueeze")
def _fold_unsqueeze(n: Call, arrays: list[Array | None]) -> Array | None:
    axes = n.int_list("axes") or (tuple(map(int, arrays[1])) if len(arrays) > 1 and arrays[1] is not None else None)
    return None if axes is None or arrays[0] is None else np.expand_dims(arrays[0], axes)


@fold("Squeeze")
def _fold_squeeze(n: Call, arrays: list[Array | None]) -> Array | None:
    axes = n.int_list("axes") or (tuple(map(int, arrays[1])) if len(arrays) > 1 and arrays[1] is not None else None)
    return None if arrays[0] is None else np.squeeze(arrays[0], axes)


@fold("Reshape")
def _fold_reshape(n: Call, arrays: list[Array | None]) -> Array | None:
    if n.opset < 5 or not _given(arrays, 2):
        return None
    wanted = n.dims(1)
    if any(isinstance(d, DimExpr) for d in wanted):
        return None
    target = known_shape(n, n.value(0), wanted, n.flag("allowzero"))
    return np.reshape(arrays[0], target)  # type: ignore[arg-type]


@fold("Slice")
def _fold_slice(n: Call, arrays: list[Array | None]) -> Array | None:
    data = arrays[0]
    if data is None or data.ndim == 0:
        return None
    if n.opset < 10:
        starts, ends, axes = n.int_list("starts"), n.int_list("ends"), n.int_list("axes")
        steps: Sequence[int] | None = None
    else:
        if any(a is not None and a.dtype == object for a in arrays[1:]) or not _given(arrays, 3):
            return None
        parts = [None if a is None else tuple(map(int, a)) for a in arrays[1:]] + [None] * (5 - len(arrays))
        starts, ends, axes, steps = parts
    if starts is None or ends is None:
        return None
    index: list[Any] = [slice(None)] * data.ndim
    for a, s, e, k in zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True):
        if k == 0:
            n.fail("a step of 0")
        index[normalize_axis(a, data.ndim, "Slice")] = slice(s, e if e >= 0 or k > 0 or e >= -data.shape[a] else None, k)
    return data[tuple(index)]


@fold("Transpose")
def _fold_transpose(n: Call, arrays: list[Array | None]) -> Array | None:
    return None if arrays[0] is None else np.transpose(arrays[0], n.int_list("perm"))


@fold("ConstantOfShape")
def _fold_filled(n: Call, arrays: list[Array | None]) -> Array | None:
    wanted, value = arrays[0], n.stored("value")
    if wanted is None or wanted.dtype == object or np.any(wanted < 0) or wanted.size > 8 or np.prod(wanted.astype(float)) > 4096:
        return None
    if value is None or value.dtype.kind not in "iub":
        return None
    return np.full(tuple(map(int, wanted)), value.reshape(-1)[0], value.dtype)


@fold("Expand")
def _fold_expand(n: Call, arrays: list[Array | None]) -> Array | None:
    a, wanted = arrays
    if a is None or wanted is None or wanted.dtype == object or wanted.size > 8 or np.prod(wanted.astype(float)) > 4096:
        return None
    return np.array(np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(map(int, wanted)))))


@fold("Range")
def _fold_range(n: Call, arrays: list[Array | None]) -> Array | None:
    if any(a is None or a.dtype == object or a.size != 1 for a in arrays):
        return None
    start, stop, step = (int(a.reshape(())) for a in arrays)  # type: ignore[union-attr]
    if step == 0 or len(range(start, stop, step)) > 4096:
        return None
    return np.arange(start, stop, step).astype(n.value(0).dtype.numpy)


def _extreme(name: str, fn: Any) -> None:
    @fold(name)
    def rule(n: Call, arrays: list[Array | None]) -> Array | None:
        if any(a is None or a.dtype == object for a in arrays):
            return None
        found = arrays[0]
        for a in arrays[1:]:
            found = fn(found, a)
        return found


_extreme("Max", np.maximum)
_extreme("Min", np.minimum)


@fold("ReduceProd")
def _fold_product(n: Call, arrays: list[Array | None]) -> Array | None:
    a = arrays[0]
    if a is None or a.ndim != 1 or a.dtype != object or len(arrays) > 1 or n.int_list("axes") not in (None, (0,), (-1,)):
        return None
    keep = n.flag("keepdims", True)
    n.ignore("noop_with_empty_axes")
    return array_of([product(list(a))]).reshape((1,) if keep else ()).astype(object)
