"""Reductions over axes: an attribute until opset 12 (ReduceSum) or 17 (the others), an input from then on."""

from __future__ import annotations

from collections.abc import Callable

from ....ir.dims import product
from ....ir.dtypes import bool_, f32, f64
from ... import elementwise as ew
from ... import reductions as red
from ...core import normalize_axes, normalize_axis
from ...movement import flip, full
from ...tensor import Tensor
from ..call import Call
from ..registry import op

Axes = tuple[int, ...] | None


def _axes(n: Call, rank: int) -> Axes:
    """The axes to reduce; an empty tuple: none of them."""
    given = n.int_list("axes")
    if given is None and n.has(1):
        given = n.ints(1)
    if not given:
        return () if n.flag("noop_with_empty_axes") else None
    n.ignore("noop_with_empty_axes")
    return normalize_axes(given, rank, n.node.op)


def _reduction(name: str, fn: Callable[[Tensor, Axes, bool], Tensor], before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """`before` is what happens to each element even where nothing is reduced."""

    def convert(n: Call) -> Tensor:
        x = n.tensor(0)
        axes, keep = _axes(n, x.ndim), n.flag("keepdims", True)
        narrow = x.dtype.is_float and x.dtype not in (f32, f64)
        wide = x.astype(f32) if narrow else x
        y = before(wide) if axes == () else fn(before(wide), axes, keep)
        return y.astype(x.dtype)

    op(name)(convert)


def _extreme(fn: Callable[..., Tensor], smallest: bool) -> Callable[[Tensor, Axes, bool], Tensor]:
    """The largest or smallest; of nothing the least or greatest value there is."""

    def reduce(x: Tensor, axes: Axes, keep: bool) -> Tensor:
        over = normalize_axes(axes, x.ndim, "reduce")
        if product([x.shape[a] for a in over]) == 0:
            shape = tuple(1 if a in over else d for a, d in enumerate(x.shape) if keep or a not in over)
            if x.dtype.is_float:
                return full(shape, float("inf") if smallest else -float("inf"), x.dtype)
            if x.dtype is bool_:
                return full(shape, smallest, x.dtype)
            low = -(1 << (x.dtype.bits - 1)) if x.dtype.kind == "int" else 0
            return full(shape, low + (1 << x.dtype.bits) - 1 if smallest else low, x.dtype)
        return fn(x, axes, keepdims=keep)

    return reduce


def _sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return red.sum(x, axes, dtype=x.dtype, keepdims=keep)


def _logsumexp(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    over = normalize_axes(axes, x.ndim, "ReduceLogSumExp")
    if product([x.shape[a] for a in over]) == 0:
        return ew.log(red.sum(ew.exp(x), axes, keepdims=keep))
    return red.logsumexp(x, axes, keepdims=keep)


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.dtype.is_float:
        return red.mean(x, axes, keepdims=keep)
    count = product([x.shape[a] for a in normalize_axes(axes, x.ndim, "ReduceMean")])
    from .elementwise import integer_divide

    total = _sum(x, axes, keep)
    return integer_divide(total, full(total.shape, count, x.dtype))


_reduction("ReduceSum", _sum)
_reduction("ReduceMean", _mean)
_reduction("ReduceProd", lambda x, axes, keep: red.prod(x, axes, dtype=x.dtype, keepdims=keep))
_reduction("ReduceMax", _extreme(red.max, smallest=False))
_reduction("ReduceMin", _extreme(red.min, smallest=True))
_reduction("ReduceL1", _sum, ew.abs)
_reduction("ReduceSumSquare", _sum, ew.square)


def _root(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return ew.sqrt(_sum(ew.square(x), axes, keep))


_reduction("ReduceL2", _root)
_reduction("ReduceLogSum", lambda x, axes, keep: ew.log(_sum(x, axes, keep)))
_reduction("ReduceLogSumExp", _logsumexp)


def _position(name: str, fn: Callable[..., Tensor]) -> None:
    def convert(n: Call) -> Tensor:
        x = n.tensor(0)
        axis, keep = normalize_axis(n.integer("axis", 0), x.ndim, name), n.flag("keepdims", True)
        if not n.flag("select_last_index"):
            return fn(x, axis, keepdims=keep)
        size = x.shape[axis]
        found = fn(flip(x, axis), axis, keepdims=keep)
        return full(found.shape, size - 1, found.dtype) - found

    op(name)(convert)


_position("ArgMax", red.argmax)
_position("ArgMin", red.argmin)


@op("CumSum")
def cumsum(n: Call) -> Tensor:
    x = n.tensor(0)
    axis = normalize_axis(int(n.scalar(1)), x.ndim, "CumSum")
    y = red.cumsum(x, axis, exclusive=n.flag("exclusive"), reverse=n.flag("reverse"))
    return y.astype(x.dtype)
