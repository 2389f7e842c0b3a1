"""Gradients kept in bounds. Trees of gradients in, trees of the same form out."""

from __future__ import annotations

from typing import Any

from ...ir.errors import AttributeValueError
from .. import tree
from ..core import cast
from ..elementwise import clip, minimum, sqrt, square
from ..movement import zeros
from ..reductions import sum
from ..tensor import Tensor
from .base import WIDE, scaled


def check_limit(limit: float, name: str) -> float:
    """The limit itself. Raises AttributeValueError unless it is above 0."""
    if not limit > 0:
        raise AttributeValueError(f"{name} is a number above 0, not {limit!r}")
    return float(limit)


def clip_by_value(grads: Any, clip_value: float) -> Any:
    """Each element within [-clip_value, clip_value]."""
    limit = check_limit(clip_value, "clip_value")
    return tree.map_leaves(lambda g: clip(g, -limit, limit), grads)


def clip_by_norm(grads: Any, max_norm: float) -> Any:
    """Each tensor scaled down, if need be, so that its own Euclidean norm is at most max_norm (Pascanu et al. 2013)."""
    limit = check_limit(max_norm, "clip_norm")
    return tree.map_leaves(lambda g: scaled(g, _factor(sqrt(_squares(g)), limit)), grads)


def clip_by_global_norm(grads: Any, max_norm: float, norm: Tensor | None = None) -> Any:
    """All gradients scaled down together so that their norm is at most max_norm, as `torch.nn.utils.clip_grad_norm_`.

    `norm` is their `global_norm`, if it is at hand.
    """
    limit = check_limit(max_norm, "clip_global_norm")
    factor = _factor(global_norm(grads) if norm is None else norm, limit)
    return tree.map_leaves(lambda g: scaled(g, factor), grads)


def global_norm(grads: Any) -> Tensor:
    """The Euclidean norm of all gradients together."""
    total = zeros(())
    for g in tree.flatten(grads)[0]:
        total = total + _squares(g)
    return sqrt(total)


def _squares(g: Tensor) -> Tensor:
    return sum(square(g if g.dtype.bits >= WIDE.bits else cast(g, WIDE)))


def _factor(norm: Tensor, limit: float) -> Tensor:
    return minimum(limit / (norm + 1e-6), 1.0)
