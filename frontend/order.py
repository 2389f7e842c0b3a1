"""Sorting: argsort, sort, top_k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.dims import Dim
from ..ir.errors import ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor, normalize_axis
from .movement import ravel, take_along_axis

if TYPE_CHECKING:
    from .tensor import Tensor


def argsort(x: TensorLike, axis: int | None = -1, *, descending: bool = False) -> Tensor:
    """The positions (i64) that sort x along an axis (None: of the flattened Tensor).

    Stable: of equal elements the one before comes first, in both directions. NaN counts as larger than every number.
    """
    t = as_tensor(x, what="argsort")
    if axis is None:
        t, axis = ravel(t), 0
    a = normalize_axis(axis, t.ndim, "argsort")
    return apply("argsort", t, axis=a, count=t.shape[a], descending=bool(descending))


def sort(x: TensorLike, axis: int | None = -1, *, descending: bool = False) -> Tensor:
    """x in order along an axis (None: of the flattened Tensor); gradients flow back to where the elements came from."""
    t = as_tensor(x, what="sort")
    if axis is None:
        t, axis = ravel(t), 0
    return take_along_axis(t, argsort(t, axis, descending=descending), axis)


def top_k(x: TensorLike, k: Dim, axis: int = -1, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) elements along an axis, in order, and their positions (i64).

    Of equal elements the one before comes first. NaN counts as larger than every number. Raises ShapeError where there are
    fewer than k.
    """
    t = as_tensor(x, what="top_k")
    a = normalize_axis(axis, t.ndim, "top_k")
    size = t.shape[a]
    if isinstance(k, int) and (k < 0 or (isinstance(size, int) and k > size)):
        raise error(ShapeError, f"top_k: k is {k}, of {size} elements along axis {a}", x=t)
    at = apply("argsort", t, axis=a, count=k, descending=bool(largest))
    return take_along_axis(t, at, a), at
