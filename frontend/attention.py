"""Attention and embedding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir.dtypes import bool_, i32
from ..ir.errors import ShapeError
from .context import error
from .core import TensorLike, apply, as_tensor, show
from .elementwise import where
from .linalg import matmul
from .movement import as_indices, iota, swapaxes
from .random import dropout
from .reductions import softmax

if TYPE_CHECKING:
    from .tensor import Tensor


def scaled_dot_product_attention(
    query: TensorLike,
    key: TensorLike,
    value: TensorLike,
    attn_mask: TensorLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value over the last two dimensions (Vaswani et al. 2017).

    query (..., T, D), key (..., S, D), value (..., S, E) -> (..., T, E). `attn_mask` broadcasts to (..., T, S): bool, true
    where attention is allowed, or numbers to add. `is_causal` lets position t see positions up to t. The scale is
    1 / sqrt(D) unless given. `dropout_p` drops entries of the softmax; it draws from the training step's key.
    """
    q, k, v = as_tensor(query, what="query"), as_tensor(key, what="key"), as_tensor(value, what="value")
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        message = "attention: query (..., T, D), key (..., S, D) and value (..., S, E) must agree in D and S"
        raise error(ShapeError, message, query=q, key=k, value=v)
    if scale is None:
        if not isinstance(q.shape[-1], int):
            raise error(ShapeError, f"attention over a symbolic feature size ({q.shape[-1]}): pass scale=", query=q)
        scale = 1.0 / math.sqrt(q.shape[-1])
    scores = matmul(q, swapaxes(k, -1, -2)) * scale
    if is_causal:
        if attn_mask is not None:
            raise error(ShapeError, "attention: give either attn_mask or is_causal", query=q)
        t, s = scores.shape[-2:]
        scores = where(iota((t, s), 0, i32) >= iota((t, s), 1, i32), scores, -math.inf)
    elif attn_mask is not None:
        mask = as_tensor(attn_mask, what="attn_mask")
        scores = where(mask, scores, -math.inf) if mask.dtype is bool_ else scores + mask.astype(scores.dtype)
    weights = softmax(scores, -1)
    return matmul(dropout(weights, dropout_p) if dropout_p else weights, v)


def embedding(indices: TensorLike, weight: TensorLike) -> Tensor:
    """weight[indices]: rows of a table (entries, features). Indices outside the table are clipped into it."""
    table = as_tensor(weight, what="weight")
    if table.ndim != 2:
        raise error(ShapeError, f"embedding: the weight has shape (entries, features), not {show(table.shape)}", weight=table)
    return apply("gather", table, as_indices(indices, "embedding"), axis=0)
