"""ScatterElements, ScatterND, TensorScatter, CumProd, Det."""

from __future__ import annotations

from typing import Final

from ....ir.dims import Dim, product
from ....ir.dtypes import i64
from ... import elementwise as ew
from ...control import scan
from ...core import apply, as_tensor, broadcast_to, normalize_axis
from ...movement import iota, reshape, scatter, scatter_add, take
from ...reductions import argmax, cumprod
from ...reductions import sum as total
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from .indexing import linear_index

_KINDS: Final = {"none": "set", "add": "add", "mul": "mul", "max": "max", "min": "min"}


def _put(n: Call, flat: Tensor, position: Tensor, updates: Tensor) -> Tensor:
    """Updates at positions along axis 0, combined as the node's `reduction` says."""
    kind = _KINDS[n.choice("reduction", "none", *[k for k in _KINDS if k != "none"])]
    if kind == "add":
        return scatter_add(flat, position, updates)
    return scatter(flat, position, updates, kind=kind)


@op("Scatter")
@op("ScatterElements")
def scatter_elements(n: Call) -> Tensor:
    x, index, updates = n.tensor(0), n.tensor(1).astype(i64), n.tensor(2)
    axis = normalize_axis(n.integer("axis", 0), x.ndim, "ScatterElements")
    if index.ndim != x.ndim or index.shape != updates.shape:
        n.fail(f"data {x.shape}, indices {index.shape} and updates {updates.shape} do not fit")
    index = ew.where(index < 0, index + x.shape[axis], index)
    # A position outside of its axis would be one of another row: it must not count at all.
    inside = ew.logical_and(ew.less(index, x.shape[axis]), ew.greater_equal(index, 0))
    position: Tensor | None = None
    stride: Dim = 1
    for a in reversed(range(x.ndim)):
        part = (index if a == axis else iota(index.shape, a)) * stride
        position = part if position is None else position + part
        stride = stride * x.shape[a]
    if position is None:
        n.fail("data has no axis")
    position = ew.where(inside, position, as_tensor(-1, i64))
    done = _put(n, reshape(x, (-1,)), reshape(position, (-1,)), reshape(updates, (-1,)))
    return reshape(done, x.shape)


@op("ScatterND")
def scatter_nd(n: Call) -> Tensor:
    x, index, updates = n.tensor(0), n.tensor(1).astype(i64), n.tensor(2)
    depth = index.shape[-1]
    if not isinstance(depth, int) or depth > x.ndim:
        n.fail(f"indices of shape {index.shape} for data of {x.ndim} dimensions")
    outer, rest = product(x.shape[:depth]), x.shape[depth:]
    position = reshape(linear_index(index, x.shape[:depth]), (-1,))
    done = _put(n, reshape(x, (outer, *rest)), position, reshape(updates, (product(index.shape[:-1]), *rest)))
    return reshape(done, x.shape)


@op("TensorScatter", 24)
def tensor_scatter(n: Call) -> Tensor:
    """A key or value cache [batch, ..., length, ...] with an update written from `write_indices[batch]` on."""
    cache, update = n.tensor(0), n.tensor(1)
    axis = normalize_axis(n.integer("axis", -2), cache.ndim, "TensorScatter")
    circular = n.choice("mode", "linear", "circular") == "circular"
    batch, length, new = cache.shape[0], cache.shape[axis], update.shape[axis]
    start = n.tensor(2).astype(i64) if n.has(2) else iota((batch,), 0) * 0
    shape = update.shape
    thin = tuple(batch if a == 0 else 1 for a in range(cache.ndim))
    index = broadcast_to(reshape(start, thin), shape) + iota(shape, axis)
    if circular:
        index = ew.remainder(index, length)
    position: Tensor | None = None
    stride: Dim = 1
    for a in reversed(range(cache.ndim)):
        part = (index if a == axis else iota(shape, a)) * stride
        position = part if position is None else position + part
        stride = stride * cache.shape[a]
    if position is None or new == 0:
        return cache
    position = ew.where(ew.less(index, length), position, as_tensor(-1, i64))
    flat = scatter(reshape(cache, (-1,)), reshape(position, (-1,)), reshape(update, (-1,)))
    return reshape(flat, cache.shape)


@op("CumProd", 26)
def cumulative_product(n: Call) -> Tensor:
    x = n.tensor(0)
    axis = normalize_axis(int(n.scalar(1)), x.ndim, "CumProd")
    made = cumprod(x, axis, exclusive=n.flag("exclusive", False), reverse=n.flag("reverse", False))
    return made.astype(x.dtype)


@op("Det")
def determinant(n: Call) -> Tensor:
    """Gaussian elimination with partial pivoting, all matrices side by side; one column a step."""
    x = n.tensor(0)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        n.fail(f"takes square matrices, not {x.shape}")
    size = x.shape[-1]
    if not isinstance(size, int):
        n.unsupported(f"of matrices of the symbolic size {size}")
    outer = x.shape[:-2]
    a = reshape(x, (product(outer), size, size))
    ones = total(a, (1, 2)) * 0 + 1 if size else as_tensor(1, x.dtype)
    if size == 0:
        return broadcast_to(ones, outer)
    ones = ew.where(ew.equal(ones, ones), ones, as_tensor(1, x.dtype))  # NaN * 0 is NaN
    row = iota((1, size), 1)

    def step(carry: tuple[Tensor, Tensor], k: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        m, det = carry
        column = reshape(take(m, reshape(k, (1,)), 2), m.shape[:2])
        pivot = reshape(argmax(ew.where(row < k, as_tensor(-1, x.dtype), ew.abs(column)), 1), (-1, 1))
        at_k, at_p = ew.equal(row, k), ew.equal(row, pivot)
        order = ew.where(at_k, pivot, ew.where(at_p, k, row))  # rows k and pivot swapped
        flat = reshape(order + iota((m.shape[0], 1), 0) * size, (-1,))
        m = reshape(apply("gather", reshape(m, (-1, size)), flat, axis=0), m.shape)
        top = take(m, reshape(k, (1,)), 1)  # [matrices, 1, size]
        head = take(top, reshape(k, (1,)), 2)  # [matrices, 1, 1]
        below = ew.logical_and(reshape(row > k, (1, size, 1)), ew.not_equal(head, 0))
        factor = ew.where(below, take(m, reshape(k, (1,)), 2) / ew.where(ew.equal(head, 0), as_tensor(1, x.dtype), head), 0)
        sign = ew.where(ew.equal(reshape(pivot, (-1,)), k), as_tensor(1, x.dtype), as_tensor(-1, x.dtype))
        return (m - factor * top, det * sign * reshape(head, (-1,))), None

    (_, det), _ = scan(step, (a, ones), iota((size,), 0))
    return reshape(det, outer)
