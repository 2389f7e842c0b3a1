"""Attention, embedding, positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..ir.dims import Dim, as_int, product
from ..ir.dtypes import bf16, bool_, f16, f32, i32
from ..ir.errors import AttributeValueError, ShapeError
from .context import current, error
from .control import scan
from .core import TensorLike, apply, as_tensor, constant, show
from .elementwise import stop_gradient, where
from .linalg import matmul
from .movement import as_indices, concatenate, iota, reshape, slice_axis, swapaxes
from .random import dropout
from .reductions import softmax

if TYPE_CHECKING:
    from .tensor import Tensor

BLOCK: Final = 32 * 1024  # scores of a block of queries: 128 KiB of f32, which leave L2 to the keys and values
WHOLE: Final = 2 * BLOCK  # scores up to which queries are one block: two would prepare the keys twice
TALL: Final = 64  # queries of a block at least: every block reads and writes the gradients of all its keys and values
SHORT: Final = 32  # queries that causal attention gives keys of their own at least: contractions of fewer rows are slow
WIDEST: Final = 128  # features of a query or value up to which tiles of attention fit into a block's shared memory
GROUPS: Final = 8  # numbers of keys that causal attention distinguishes at most: there is code for each


def scaled_dot_product_attention(
    query: TensorLike,
    key: TensorLike,
    value: TensorLike,
    attn_mask: TensorLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value over the last two dimensions (Vaswani et al. 2017).

    query (..., T, D), key (..., S, D), value (..., S, E) -> (..., T, E); the dimensions before these broadcast. `attn_mask`
    broadcasts to (..., T, S): bool, true where attention is allowed, or numbers to add. `is_causal` lets position t see
    positions up to t; with a mask, both hold. A row in which nothing is allowed gives NaN. The scale is 1 / sqrt(D) unless
    given. `dropout_p` drops entries of the softmax; it draws from the training step's key. `enable_gqa` lets key and value
    (..., heads, S, D) have fewer heads than the query, each for several of its heads in a row.

    The scores (..., T, S) are never all in memory, neither forward nor backward: a loop runs over the slices, and in each over
    blocks of queries, and the gradient computes the scores of a block again. With is_causal, keys that no query of a
    block sees are left out. Where T or S is symbolic, all scores are computed at once.

    Raises ShapeError for operands that do not fit, AttributeValueError for a dropout_p that is no probability.
    """
    q, k, v = as_tensor(query, what="query"), as_tensor(key, what="key"), as_tensor(value, what="value")
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        message = "attention: query (..., T, D), key (..., S, D) and value (..., S, E) must agree in D and S"
        raise error(ShapeError, message, query=q, key=k, value=v)
    if scale is None:
        if not isinstance(q.shape[-1], int):
            raise error(ShapeError, f"attention over a symbolic feature size ({q.shape[-1]}): pass scale=", query=q)
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    mask = None if attn_mask is None else as_tensor(attn_mask, what="attn_mask")
    if mask is not None:
        _check_mask(mask, q, k)
    rules = _Rules(scale, is_causal, dropout_p)
    if enable_gqa:
        return _grouped(q, k, v, mask, rules)
    return _attention(q, k, v, mask, rules)


@dataclass(frozen=True)
class _Rules:
    scale: float
    causal: bool
    dropout: float

    @property
    def attrs(self) -> dict[str, Any]:
        """Those of the op."""
        return {"scale": float(self.scale), "causal": self.causal}


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    """Raises ShapeError unless the mask's last two dimensions are 1, or T and S."""
    rows, columns = (1, 1, *mask.shape)[-2:]
    if rows not in (1, q.shape[-2]) or columns not in (1, k.shape[-2]):
        wanted = show((q.shape[-2], k.shape[-2]))
        message = f"attention: attn_mask of shape {show(mask.shape)} does not broadcast to (..., T, S), with {wanted}"
        raise error(ShapeError, message, attn_mask=mask, query=q, key=k)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules) -> Tensor:
    """Query heads in groups, each with one head of key and value: (heads) -> (groups, heads of a group), (groups, 1)."""
    heads = [x.shape[-3] if x.ndim > 2 else 0 for x in (q, k, v)]
    many, few = heads[0], heads[1]
    if not isinstance(many, int) or not isinstance(few, int) or heads[2] != few or not few or many % few:
        message = (
            "attention with enable_gqa: query (..., heads, T, D), and key and value with one number of heads that divides it"
        )
        raise error(ShapeError, message, query=q, key=k, value=v)

    def split(x: Tensor, groups: int, each: int) -> Tensor:
        return reshape(x, (*x.shape[:-3], groups, each, *x.shape[-2:]))

    if mask is not None and mask.ndim > 2:
        if mask.shape[-3] not in (1, many):
            raise error(ShapeError, f"attention: attn_mask of shape {show(mask.shape)} is not for {many} heads", attn_mask=mask)
        mask = split(mask, 1, 1) if mask.shape[-3] == 1 else split(mask, few, many // few)
    y = _attention(split(q, few, many // few), split(k, few, 1), split(v, few, 1), mask, rules)
    return reshape(y, (*y.shape[:-4], many, *y.shape[-2:]))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules) -> Tensor:
    t, s = q.shape[-2], k.shape[-2]
    if not isinstance(t, int) or not isinstance(s, int) or not t * s:
        return _rows(q, k, v, mask, rules)
    if current("attention").whole_attention and _fits_a_kernel(q, k, v, rules):
        masks = [] if mask is None else [mask if mask.ndim > 1 else reshape(mask, (1, *mask.shape))]
        op = "attention" if q.dtype is f32 else "attention_f32"
        y = apply(op, q, k, v, *(m if m.dtype is bool_ else m.astype(f32) for m in masks), **rules.attrs)
        return slice_axis(y, -1, 0, as_int(v.shape[-1])).astype(q.dtype)
    operands = [q, k, v] if mask is None else [q, k, v, mask if mask.ndim > 1 else reshape(mask, (1, *mask.shape))]

    def slice(parts: Sequence[Tensor]) -> Tensor:
        q, k, v, *masks = parts
        return _slice(q, k, v, masks[0] if masks else None, rules)

    return _over_slices(operands, slice)


def _fits_a_kernel(q: Tensor, k: Tensor, v: Tensor, rules: _Rules) -> bool:
    """Whether attention is written as one op where the target has a kernel for it. Not with dropout: its draws are those of the
    blocks of queries, the same on all targets."""
    wide = [x.shape[-1] for x in (q, v)]
    sized = all(isinstance(n, int) and 0 < n <= WIDEST for n in wide)
    return sized and not rules.dropout and q.dtype in (f32, f16, bf16) and all(x.dtype is q.dtype for x in (k, v))


def _over_slices(operands: Sequence[Tensor], fn: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """fn over the last two dimensions of operands whose other dimensions broadcast.

    One loop for each run of dimensions that the same operands have; the others are the same Tensor in all its passes, so that
    nothing is repeated in memory. E.g. for query (8, 4, T, D) and mask (8, 1, 1, S) a loop over 8, in it one over 4.
    """
    rank = max(x.ndim for x in operands) - 2
    shapes = [(1,) * (rank + 2 - x.ndim) + x.shape for x in operands]
    lead = [_common(axis, shapes, operands) for axis in range(rank)]
    loops: list[tuple[list[Dim], tuple[bool, ...]]] = []
    for axis, size in enumerate(lead):
        runs = tuple(shape[axis] != 1 for shape in shapes)
        if size == 1:
            continue
        if loops and loops[-1][1] == runs:
            loops[-1][0].append(size)
        else:
            loops.append(([size], runs))
    loops = loops or [([1], (True,) * len(operands))]
    given = [reshape(x, (*(product(sizes) for sizes, runs in loops if runs[i]), *x.shape[-2:])) for i, x in enumerate(operands)]

    def run(level: int, parts: Sequence[Tensor]) -> Tensor:
        if level == len(loops):
            return fn(parts)
        runs = loops[level][1]

        def step(_: None, xs: list[Tensor]) -> tuple[None, Tensor]:
            each = iter(xs)
            return None, run(level + 1, [next(each) if r else p for p, r in zip(parts, runs, strict=True)])

        y: Tensor = scan(step, None, [p for p, r in zip(parts, runs, strict=True) if r], save="inputs")[1]
        return y

    y = run(0, given)
    return reshape(y, (*lead, *y.shape[-2:]))


def _common(axis: int, shapes: Sequence[tuple[Dim, ...]], operands: Sequence[Tensor]) -> Dim:
    sizes = list(dict.fromkeys(shape[axis] for shape in shapes if shape[axis] != 1))
    if len(sizes) > 1:
        named = dict(zip(("query", "key", "value", "attn_mask"), operands, strict=False))
        met = " and ".join(map(str, sizes))
        raise error(ShapeError, f"attention: the dimensions before the last two do not broadcast together: {met} meet", **named)
    return sizes[0] if sizes else 1


def _slice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules) -> Tensor:
    """Attention of queries (T, D) to keys (S, D), T and S known, in blocks of queries."""
    t, s = (as_int(x.shape[0]) for x in (q, k))
    if not rules.causal:
        return _blocks(q, k, v, mask, rules, 0)
    rows = _multiple(max(SHORT, min(2 * TALL, -(-t // 4)), -(-t // GROUPS)))
    parts: list[Tensor] = []
    for low in range(0, t, rows):
        high, seen = min(low + rows, t), min(low + rows, t, s)
        part = mask
        if part is not None and part.shape[0] != 1:
            part = slice_axis(part, 0, low, high)
        if part is not None and part.shape[1] != 1:
            part = slice_axis(part, 1, 0, seen)
        keys, values = slice_axis(k, 0, 0, seen), slice_axis(v, 0, 0, seen)
        parts.append(_blocks(slice_axis(q, 0, low, high), keys, values, part, rules, low))
    return concatenate(parts, 0) if len(parts) > 1 else parts[0]


def _multiple(rows: int) -> int:
    return -(-rows // 16) * 16


def _blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules, first: int) -> Tensor:
    """Attention of queries, the first of which is at position `first`, to keys from position 0 on: a loop over blocks."""
    t, s = (as_int(x.shape[0]) for x in (q, k))
    count = 1 if t * s <= WHOLE else -(-t // max(TALL, BLOCK // s))
    rows = _multiple(-(-t // count))
    whole = t // rows if count > 1 else 0
    parts: list[Tensor] = []
    if whole > 1:
        by_row = [q] if mask is None or mask.shape[0] == 1 else [q, mask]
        xs = [reshape(slice_axis(x, 0, 0, whole * rows), (whole, rows, x.shape[1])) for x in by_row]
        if rules.causal:
            xs.append(constant(np.arange(first, first + whole * rows, rows), i32))

        def block(_: None, parts: list[Tensor]) -> tuple[None, Tensor]:
            at = parts[-1] if rules.causal else 0
            return None, _rows(parts[0], k, v, parts[1] if len(by_row) > 1 else mask, rules, at)

        y = scan(block, None, xs, save="inputs")[1]
        parts.append(reshape(y, (whole * rows, v.shape[1])))
    low = len(parts) * whole * rows
    for high in dict.fromkeys((min(low + rows, t) if count > 1 else t, t)):
        if low < high:
            part = slice_axis(mask, 0, low, high) if mask is not None and mask.shape[0] != 1 else mask
            parts.append(_rows(slice_axis(q, 0, low, high), k, v, part, rules, first + low))
        low = high
    return concatenate(parts, 0) if len(parts) > 1 else parts[0]


def _rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules, first: TensorLike = 0) -> Tensor:
    """All scores at once, of queries from position `first` on to keys from position 0 on."""
    scores = matmul(q, swapaxes(k, -1, -2)) * rules.scale
    if rules.causal:
        t, s = scores.shape[-2:]
        scores = where(iota((t, s), 0, i32) + first >= iota((t, s), 1, i32), scores, -math.inf)
    if mask is not None:
        scores = where(mask, scores, -math.inf) if mask.dtype is bool_ else scores + mask.astype(scores.dtype)
    weights = softmax(scores, -1) if k.shape[-2] != 0 else scores
    return matmul(dropout(weights, rules.dropout) if rules.dropout else weights, v)


def embedding(indices: TensorLike, weight: TensorLike, padding_idx: int | None = None) -> Tensor:
    """weight[indices]: rows of a table (entries, features). Indices outside the table are clipped into it.

    The row `padding_idx` (negative: from the end) gets no gradient.
    """
    table = as_tensor(weight, what="weight")
    if table.ndim != 2:
        raise error(ShapeError, f"embedding: the weight has shape (entries, features), not {show(table.shape)}", weight=table)
    if padding_idx is not None:
        entries = table.shape[0]
        if not isinstance(entries, int) or not -entries <= padding_idx < entries:
            raise error(AttributeValueError, f"embedding: padding_idx {padding_idx} is no row of the weight", weight=table)
        # Kept out of the table's gradient, and not of the updates to it: that is part of the kernel that uses the gradient.
        table = where(iota((entries, 1), 0, i32) == padding_idx % entries, stop_gradient(table), table)
    return apply("gather", table, as_indices(indices, "embedding"), axis=0)


def sinusoidal_positions(length: int, features: int, base: float = 10000.0) -> Tensor:
    """A constant (length, features): sin(t / base^(2i / features)) at 2i and the cosine at 2i + 1 (Vaswani et al. 2017)."""
    if length < 0 or features < 1 or features % 2:
        raise error(AttributeValueError, f"sinusoidal_positions: features is even and positive, not {features!r}")
    rates = base ** (-np.arange(0, features, 2) / features)
    angles = np.arange(length)[:, None] * rates
    return constant(np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, features), f32)
