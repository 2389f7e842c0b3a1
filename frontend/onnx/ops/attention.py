"""Attention with bodies in it, and the pieces that attention ops of several domains share."""

from __future__ import annotations

import math

from ....ir.dims import Dim
from ....ir.dtypes import DType, f32, f64
from ... import elementwise as ew
from ...core import as_tensor, broadcast_to
from ...linalg import matmul
from ...movement import concatenate, iota, reshape, slice_axis, stack, swapaxes, take
from ...reductions import softmax
from ...tensor import Tensor
from ..call import Call
from ..description import GraphDef
from ..registry import op


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    batch, length, width = x.shape
    return swapaxes(reshape(x, (batch, length, heads, width // heads)), 1, 2)


def heads_joined(x: Tensor) -> Tensor:
    """(batch, heads, length, size) -> (batch, length, heads * size)."""
    batch, heads, length, size = x.shape
    return reshape(swapaxes(x, 1, 2), (batch, length, heads * size))


def causal(rows: Dim, columns: Dim, past: Dim) -> Tensor:
    """bool (rows, columns): whether row t, which comes after `past` others, sees a column."""
    return ew.less_equal(iota((rows, columns), 1), iota((rows, columns), 0) + past)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary positions (Su et al. 2021) of the last axis of (batch, heads, length, size); cos and sin (batch or 1, length,
    half). What is beyond twice the half stays as it is."""
    half = cos.shape[-1]
    batch, length = cos.shape[0], cos.shape[1]
    cos, sin = (reshape(t.astype(x.dtype), (batch, 1, length, half)) for t in (cos, sin))
    turned, rest = slice_axis(x, 3, 0, 2 * half), slice_axis(x, 3, 2 * half, x.shape[3])
    if interleaved:
        pairs = reshape(turned, (*turned.shape[:3], half, 2))
        a, b = (reshape(slice_axis(pairs, 4, k, k + 1), (*turned.shape[:3], half)) for k in (0, 1))
        made = reshape(stack([a * cos - b * sin, b * cos + a * sin], -1), turned.shape)
    else:
        a, b = slice_axis(turned, 3, 0, half), slice_axis(turned, 3, half, 2 * half)
        made = concatenate([a * cos - b * sin, b * cos + a * sin], 3)
    return made if rest.shape[3] == 0 else concatenate([made, rest], 3)


def rows_of(cache: Tensor, positions: Tensor) -> Tensor:
    """The rows of a cache (positions, half) at positions (batch, length)."""
    return take(cache, positions, 0)


def _body(n: Call, name: str, x: Tensor) -> Tensor:
    """What a body of one input and one output makes of x, which must keep its type."""
    found = n.attribute(name)
    if found is None:
        return x
    if not isinstance(found, GraphDef):
        n.fail(f"the attribute {name!r} is no graph")
    made = n.run(found, [n.as_value(x)], name)
    if len(made) != 1 or made[0].shape != x.shape or made[0].dtype is not x.dtype:
        n.fail(f"{name} takes {x.dtype}{list(x.shape)} and must give the same, not {made}")
    return made[0].tensor


@op("FlexAttention", 1, domain="ai.onnx.preview")
def flex_attention(n: Call) -> Tensor:
    """softmax of what score_mod makes of the scores, as prob_mod makes it, times v; query heads share heads of keys in order."""
    q, k, v = n.tensor(0), n.tensor(1), n.tensor(2)
    if min(q.ndim, k.ndim, v.ndim) != 4 or max(q.ndim, k.ndim, v.ndim) != 4:
        n.fail(f"takes four dimensions (batch, heads, length, size), not {q.shape}, {k.shape} and {v.shape}")
    precision: DType = n.dtype("softmax_precision") or (f64 if q.dtype is f64 else f32)
    size = n.fixed(q.shape[3])
    scale = n.number("scale", 1.0 / math.sqrt(size) if size else 1.0)
    many, few = n.fixed(q.shape[1]), n.fixed(k.shape[1])
    if not few or many % few:
        n.fail(f"{many} heads of queries are no multiple of {few} heads of keys")
    if many != few:
        k, v = (_shared(t, many // few) for t in (k, v))
    scores = matmul(q, swapaxes(k, 2, 3)).astype(precision) * as_tensor(scale, precision)
    probabilities = _body(n, "prob_mod", softmax(_body(n, "score_mod", scores), -1))
    return matmul(probabilities.astype(v.dtype), v)


def _shared(t: Tensor, each: int) -> Tensor:
    """Every head of keys or values for `each` heads of queries in a row."""
    batch, heads, length, size = t.shape
    wide = broadcast_to(reshape(t, (batch, heads, 1, length, size)), (batch, heads, each, length, size))
    return reshape(wide, (batch, heads * each, length, size))
