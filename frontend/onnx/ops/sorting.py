"""TopK, Unique and NonMaxSuppression: what needs an order."""

from __future__ import annotations

import numpy as np

from ....ir.dims import Shape, product
from ....ir.dtypes import f32, i64
from ... import elementwise as ew
from ...control import scan
from ...core import apply, as_tensor, broadcast_to, normalize_axis
from ...movement import concatenate, iota, reshape, slice_axis, stack, take, take_along_axis, transpose
from ...order import argsort, top_k
from ...reductions import all as all_of
from ...reductions import cumsum
from ...reductions import sum as total
from ...tensor import Tensor
from ..call import Call
from ..registry import op


@op("TopK", 1, 10, 11)
def topk(n: Call) -> tuple[Tensor, Tensor]:
    x = n.tensor(0)
    k = n.integer("k") if n.opset < 10 else int(n.scalar(1))
    axis = normalize_axis(n.integer("axis", -1), x.ndim, "TopK")
    largest = n.flag("largest", True) if n.opset >= 11 else True
    n.ignore("sorted")  # what may come in any order may come in this one
    return top_k(x, k, axis, largest=largest)


def selected(keep: Tensor, count: int) -> Tensor:
    """The positions, in order, of the `count` true elements of a vector of bools."""
    flag = keep.astype(i64)
    place = ew.where(keep, cumsum(flag, 0) - 1, as_tensor(count, i64))
    return apply("scatter_add", iota((count,), 0) * 0, place, iota(flag.shape, 0), axis=0)


# --- Unique ---------------------------------------------------------------------------------------------------------


@op("Unique")
def unique(n: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slices in lexicographic order: a stable sort by each column, the last one first. Equal ones are neighbours then.

    How many differ is computed before the rest is compiled.
    """
    x = n.tensor(0)
    axis, ascending = n.attribute("axis"), n.flag("sorted", True)
    if axis is None:
        rows, a = reshape(x, (-1, 1)), 0
        rest: Shape = ()
    else:
        a = normalize_axis(int(axis), x.ndim, "Unique")
        order = [a, *(k for k in range(x.ndim) if k != a)]
        moved = transpose(x, order)
        rest = moved.shape[1:]
        rows = reshape(moved, (x.shape[a], product(rest)))
    size, width = rows.shape
    if not isinstance(width, int):
        n.unsupported(f"slices of the symbolic size {width}")
    if width > 4096:
        n.unsupported(f"slices of {width} elements; at most 4096 are compared")
    if size == 0:
        n.unsupported("of nothing")
    at = iota((size,), 0)
    for column in reversed(range(width)):
        at = take(at, argsort(take(rows[:, column], at), 0))
    ordered = take(rows, at, 0)
    differs = ew.logical_not(all_of(ew.equal(ordered[1:], ordered[:-1]), 1))
    starts = concatenate([as_tensor(np.ones(1, bool)), differs], 0)
    group = cumsum(starts.astype(i64), 0) - 1  # of each sorted slice
    count = int(n.need(total(starts.astype(i64)), "count"))
    first = take(at, selected(starts, count))  # the sort is stable: the first of a group is the first in x
    counts = apply("scatter_add", iota((count,), 0) * 0, group, iota(group.shape, 0) * 0 + 1, axis=0)
    inverse = apply("scatter", iota((size,), 0) * 0, at, group, axis=0, kind="set")
    if not ascending:  # in the order of first appearance
        by_first = argsort(first, 0)
        rank = argsort(by_first, 0)
        first, counts, inverse = take(first, by_first), take(counts, by_first), take(rank, inverse)
    if axis is None:
        return take(reshape(x, (-1,)), first), first, inverse, counts
    values = reshape(take(rows, first, 0), (count, *rest))
    back = [k + 1 if k < a else 0 if k == a else k for k in range(x.ndim)]
    return transpose(values, back), first, inverse, counts


# --- NonMaxSuppression ----------------------------------------------------------------------------------------------


@op("NonMaxSuppression")
def non_max_suppression(n: Call) -> Tensor:
    """Boxes by falling score; one that overlaps too much with one kept before is dropped. Images and classes side by side.

    How many are kept is computed before the rest is compiled.
    """
    boxes, scores = n.tensor(0), n.tensor(1)
    most = int(n.scalar(2, 0))
    overlap = ew.maximum(reshape(n.tensor(3), ()), 0.0) if n.has(3) else as_tensor(0.0, f32)
    threshold = reshape(n.tensor(4), ()) if n.has(4) else None
    centers = n.flag("center_point_box", False)
    batch, count, _ = boxes.shape
    classes = scores.shape[1]
    if not all(isinstance(d, int) for d in (batch, count, classes)):
        n.unsupported("of symbolic sizes")
    if most <= 0 or 0 in (batch, count, classes):
        return iota((0, 3), 0)
    order = argsort(scores, 2, descending=True)  # [batch, classes, count]
    ranked = take_along_axis(scores, order, 2)
    corners = _corners(boxes, centers)
    per_class = broadcast_to(reshape(corners, (batch, 1, count, 4)), (batch, classes, count, 4))
    at = broadcast_to(reshape(order, (batch, classes, count, 1)), (batch, classes, count, 4))
    box = take_along_axis(per_class, at, 2)  # by falling score
    area = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    good = ew.equal(ranked, ranked) if threshold is None else ew.greater(ranked, threshold)

    def step(carry: tuple[Tensor, Tensor], i: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        kept, taken = carry
        mine = take(box, reshape(i, (1,)), 2)  # [batch, classes, 1, 4]
        low, high = ew.maximum(mine[..., :2], box[..., :2]), ew.minimum(mine[..., 2:], box[..., 2:])
        side = ew.maximum(high - low, 0.0)
        shared = side[..., 0] * side[..., 1]
        union = take(area, reshape(i, (1,)), 2) + area - shared
        # a box of no area overlaps nothing; written without the division, so that 0 / 0 never is
        over = ew.logical_and(ew.greater(shared, overlap * union), ew.greater(union, 0.0))
        hit = total(ew.logical_and(over, kept).astype(i64), 2)
        mine_good = reshape(take(good, reshape(i, (1,)), 2), hit.shape)
        keep = ew.logical_and(ew.logical_and(mine_good, ew.equal(hit, 0)), ew.less(taken, most))
        here = ew.equal(iota((1, 1, count), 2), i)
        kept = ew.logical_or(kept, ew.logical_and(here, reshape(keep, (batch, classes, 1))))
        return (kept, taken + keep.astype(i64)), None

    none = ew.less(order, 0)
    start = (none, reshape(slice_axis(order, 2, 0, 1), (batch, classes)) * 0)
    (kept, _), _ = scan(step, start, iota((count,), 0))
    flat = reshape(kept, (-1,))
    found = int(n.need(total(flat.astype(i64)), "count"))
    place = selected(flat, found)
    group = place // count
    picked = take(reshape(order, (-1,)), place)
    return stack([group // classes, ew.remainder(group, classes), picked], 1)


def _corners(boxes: Tensor, centers: bool) -> Tensor:
    """[..., (y1, x1, y2, x2)] with y1 <= y2 and x1 <= x2."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centers:  # x, y, width, height
        half = second * 0.5
        return concatenate([first - half, first + half], -1)
    return concatenate([ew.minimum(first, second), ew.maximum(first, second)], -1)
