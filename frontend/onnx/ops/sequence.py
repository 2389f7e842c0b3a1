"""Sequences: lists that exist during import only. How long one is, and which element an op takes, must be known then; where
an argument decides it, the model runs in stages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ....ir.dtypes import f32
from ...core import normalize_axis
from ...movement import concatenate, slice_axis, squeeze, stack
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from ..values import Sequence, Value


def items_of(n: Call, i: int) -> tuple[Value, ...]:
    """The elements of input i. Raises OnnxError where it is no sequence."""
    found = n.value(i)
    if not isinstance(found, Sequence):
        n.fail(f"input {i} is a tensor; expected a sequence")
    return found.items


def _place(n: Call, i: int, count: int, last: int) -> int:
    """Position i of a list of `count`; negative ones count from the end."""
    at = int(n.scalar(i))
    if not -count <= at <= last:
        n.fail(f"position {at} is outside of a sequence of {count}")
    return at + count if at < 0 else at


@op("SequenceEmpty")
def empty(n: Call) -> Sequence:
    return Sequence(n.dtype("dtype", f32) or f32, ())


@op("SequenceConstruct")
def construct(n: Call) -> Sequence:
    values = tuple(n.value(i) for i in range(len(n.inputs)))
    if not values or any(v.dtype is not values[0].dtype for v in values):
        n.fail("takes one tensor or more, all of one dtype")
    return Sequence(values[0].dtype, values)


@op("SequenceAt")
def at(n: Call) -> Value:
    items = items_of(n, 0)
    return items[_place(n, 1, len(items), len(items) - 1)]


@op("SequenceErase")
def erase(n: Call) -> Sequence:
    items = items_of(n, 0)
    if not items:
        n.fail("the sequence is empty")
    place = _place(n, 1, len(items), len(items) - 1) if n.has(1) else len(items) - 1
    return Sequence(n.value(0).dtype, items[:place] + items[place + 1 :])


@op("SequenceInsert")
def insert(n: Call) -> Sequence:
    items, new = items_of(n, 0), n.value(1)
    place = _place(n, 2, len(items), len(items)) if n.has(2) else len(items)
    return Sequence(new.dtype, (*items[:place], new, *items[place:]))


@op("SequenceLength")
def length(n: Call) -> Any:
    return np.asarray(len(items_of(n, 0)), np.int64)


@op("ConcatFromSequence")
def concat(n: Call) -> Tensor:
    parts = [v.tensor for v in items_of(n, 0)]
    axis = n.integer("axis")
    if not parts:
        n.fail("the sequence is empty")
    return stack(parts, axis) if n.flag("new_axis") else concatenate(parts, axis)


@op("SplitToSequence")
def split(n: Call) -> Sequence:
    x = n.tensor(0)
    axis, keep = normalize_axis(n.integer("axis", 0), x.ndim, "SplitToSequence"), n.flag("keepdims", True)
    size = n.fixed(x.shape[axis])
    sizes = [1] * size
    if n.has(1):
        given = n.array(1)
        each = int(given) if given.ndim == 0 else 0
        if given.ndim == 0 and each < 1:
            n.fail(f"parts of {each}")
        sizes = [min(each, size - k) for k in range(0, size, each)] if given.ndim == 0 else [int(v) for v in given]
        keep = True
    cuts = [0]
    for s in sizes:
        cuts.append(cuts[-1] + s)
    if cuts[-1] != size or any(s < 0 for s in sizes):
        n.fail(f"sizes {sizes} do not add up to dimension {axis} of size {size}")
    parts = [slice_axis(x, axis, a, b) for a, b in pairwise(cuts)]
    return Sequence(x.dtype, tuple(n.as_value(p if keep else squeeze(p, axis)) for p in parts))
