"""Ops of com.microsoft, which ONNX Runtime's optimiser and exporters of transformers write. On 8-bit integers: quantized.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from ....ir.dims import Dim
from ....ir.dtypes import DType, f32, f64, i32, i64, u8
from ... import activations as act
from ... import elementwise as ew
from ... import reductions as red
from ...attention import scaled_dot_product_attention
from ...core import as_tensor, broadcast_to, normalize_axis
from ...linalg import matmul
from ...movement import concatenate, iota, reshape, slice_axis, stack, swapaxes, take, transpose, zeros
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from .attention import causal, heads_apart, heads_joined, rotated, rows_of
from .convolution import convolve, kernel_of, windows
from .elementwise import numeric
from .integer_products import integer_matmul

MICROSOFT: Final = "com.microsoft"
Activation = Callable[[Tensor], Tensor]


# --- products with an activation ------------------------------------------------------------------------------------


def activation(n: Call, name: str, alpha: float | None, beta: float | None) -> Activation:
    """The activation of a fused op with its numbers; None is the op's own default."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    known: dict[str, Activation] = {
        "": lambda y: y,
        "Relu": act.relu,
        "Tanh": ew.tanh,
        "Sigmoid": act.sigmoid,
        "Softplus": act.softplus,
        "Softsign": act.softsign,
        "Gelu": act.gelu,
        "LeakyRelu": lambda y: act.leaky_relu(y, given(alpha, 0.01)),
        "Elu": lambda y: act.elu(y, given(alpha, 1.0)),
        "ThresholdedRelu": lambda y: ew.where(y > given(alpha, 1.0), y, 0.0),
        "Clip": lambda y: ew.clip(y, given(alpha, -math.inf), given(beta, math.inf)),
        "HardSigmoid": lambda y: ew.clip(y * given(alpha, 0.2) + given(beta, 0.5), 0.0, 1.0),
    }
    found = known.get(name)
    if found is None:
        n.unsupported(f"activation={name!r}; supported are {', '.join(filter(None, known))}")
    return found


def _conv(n: Call, x: Tensor) -> Tensor:
    w, b = n.tensor(1), n.optional(2)
    strides, dilations, pads = windows(n, x, kernel_of(n, w))
    return convolve(n, x, w, b, strides, dilations, pads, n.integer("group", 1))


def _fused_conv(n: Call, channels_last: bool) -> Tensor:
    """Conv, then z added, then the activation."""
    x, z = n.tensor(0), n.optional(3)
    y = _conv(n, _channels_second(x) if channels_last else x)
    y = _channels_last(y) if channels_last else y
    numbers = n.float_list("activation_params") or ()
    fn = activation(n, n.text("activation", ""), *(*numbers, None, None)[:2])
    return fn(y if z is None else y + z)


def _channels_second(x: Tensor) -> Tensor:
    return transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))


def _channels_last(x: Tensor) -> Tensor:
    return transpose(x, (0, *range(2, x.ndim), 1))


@op("FusedConv", 1, domain=MICROSOFT)
def fused_conv(n: Call) -> Tensor:
    return _fused_conv(n, False)


@op("NhwcFusedConv", 1, domain=MICROSOFT)
@op("NhwcConv", 1, domain=MICROSOFT)
def nhwc_conv(n: Call) -> Tensor:
    return _fused_conv(n, True)


def _numbers(n: Call) -> tuple[float | None, float | None]:
    """activation_alpha and activation_beta; gamma belongs to no activation here."""
    n.ignore("activation_gamma", "activation_axis")
    first, second = (n.number(f"activation_{k}", math.nan) for k in ("alpha", "beta"))
    return (None if math.isnan(first) else first), (None if math.isnan(second) else second)


@op("FusedGemm", 1, domain=MICROSOFT)
def fused_gemm(n: Call) -> Tensor:
    a, b, c = n.tensor(0), n.tensor(1), n.optional(2)
    alpha, beta = n.number("alpha", 1.0), n.number("beta", 1.0)
    if a.ndim != 2 or b.ndim != 2:
        n.fail(f"takes matrices, not {a.ndim} and {b.ndim} dimensions")
    y = matmul(transpose(a) if n.flag("transA") else a, transpose(b) if n.flag("transB") else b)
    y = y if alpha == 1.0 else y * alpha
    y = y if c is None else y + (c if beta == 1.0 else c * beta)
    return activation(n, n.text("activation", ""), *_numbers(n))(y)


def _fused_matmul(n: Call) -> Tensor:
    """transBatch takes the first axis for the rows and the rest before the last as the batch; then trans turns the last two."""
    given = []
    for k, side in enumerate("AB"):
        t = n.tensor(k)
        turn, batch = n.flag(f"trans{side}"), n.flag(f"transBatch{side}")
        if batch and t.ndim > 2:
            t = transpose(t, (*range(1, t.ndim - 1), 0, t.ndim - 1))
        given.append(swapaxes(t, -1, -2) if turn and t.ndim > 1 else t)
    alpha = n.number("alpha", 1.0)
    y = matmul(*given)
    return y if alpha == 1.0 else y * alpha


op("FusedMatMul", 1, domain=MICROSOFT)(_fused_matmul)
op("TransposeMatMul", 1, domain=MICROSOFT)(_fused_matmul)


@op("FusedMatMulActivation", 1, domain=MICROSOFT)
def fused_matmul_activation(n: Call) -> Tensor:
    return activation(n, n.text("activation"), *_numbers(n))(_fused_matmul(n))


def _integers(packed: Tensor, bits: int) -> Tensor:
    """u8 (..., bytes) -> (..., bytes * 8 / bits): the lowest bits of a byte come first."""
    each = 8 // bits
    if each == 1:
        return packed
    parts = [ew.bitwise_and(ew.right_shift(packed, np.uint8(k * bits)), np.uint8((1 << bits) - 1)) for k in range(each)]
    return reshape(stack(parts, -1), (*packed.shape[:-1], packed.shape[-1] * each))


@op("MatMulNBits", 1, domain=MICROSOFT)
def matmul_nbits(n: Call) -> Tensor:
    """x @ w.T for a weight (n, k) of 2, 4 or 8 bits in blocks along k, each with a scale and a zero point. What is made of the
    weight depends on weights alone: it is computed once, as floats."""
    a, b, scales = n.tensor(0), n.tensor(1), n.tensor(2)
    rows, depth = n.integer("N"), n.integer("K")
    bits, block = n.integer("bits", 4), n.integer("block_size")
    n.ignore("accuracy_level")  # a permission to compute with less precision
    if n.has(4):
        n.unsupported("g_idx: blocks of reordered rows")
    if n.integer("weight_prepacked", 0):
        n.unsupported("weight_prepacked: a layout for one kind of GPU")
    if bits not in (2, 4, 8):
        n.unsupported(f"bits={bits}; supported are 2, 4 and 8")
    if block < 1 or block * bits % 8 or depth < 1 or rows < 1 or b.dtype is not u8:
        n.fail(f"a weight of {b.dtype}, N={rows}, K={depth} in blocks of {block} at {bits} bits")
    count = -(-depth // block)
    b = reshape(b, (rows, count, block * bits // 8))
    scales = reshape(scales, (rows, count, 1))
    zero: Tensor | float = float(1 << (bits - 1))
    if n.has(3):
        given = n.tensor(3)
        if given.dtype is u8:
            bytes_ = -(-count * bits // 8)
            given = slice_axis(_integers(reshape(given, (rows, bytes_)), bits), 1, 0, count)
        zero = reshape(given, (rows, count, 1)).astype(f32)
    weight = ((_integers(b, bits).astype(f32) - zero) * scales.astype(f32)).astype(a.dtype)
    weight = slice_axis(reshape(weight, (rows, count * block)), 1, 0, depth)
    y = matmul(a, transpose(weight))
    return y + n.tensor(5) if n.has(5) else y


# --- activations ----------------------------------------------------------------------------------------------------


@op("Gelu", 1, domain=MICROSOFT)
def gelu(n: Call) -> Tensor:
    return numeric(act.gelu, n.tensor(0))


@op("BiasGelu", 1, domain=MICROSOFT)
def bias_gelu(n: Call) -> Tensor:
    return numeric(act.gelu, n.tensor(0) + n.tensor(1))


@op("FastGelu", 1, domain=MICROSOFT)
def fast_gelu(n: Call) -> Tensor:
    x, bias = n.tensor(0), n.optional(1)
    return numeric(lambda t: act.gelu(t, "tanh"), x if bias is None else x + bias)


@op("QuickGelu", 1, domain=MICROSOFT)
def quick_gelu(n: Call) -> Tensor:
    alpha = n.number("alpha", 1.702)
    return numeric(lambda t: t * act.sigmoid(t * alpha), n.tensor(0))


@op("BiasSplitGelu", 1, domain=MICROSOFT)
def bias_split_gelu(n: Call) -> Tensor:
    """The first half of x + bias times the gelu of the second."""
    x = n.tensor(0) + n.tensor(1)
    half = n.fixed(x.shape[-1]) // 2
    left, right = slice_axis(x, x.ndim - 1, 0, half), slice_axis(x, x.ndim - 1, half, 2 * half)
    return left * numeric(act.gelu, right)


@op("BiasAdd", 1, domain=MICROSOFT)
def bias_add(n: Call) -> Tensor:
    return n.tensor(0) + n.tensor(1) + n.tensor(2)


# --- normalisation --------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (f32, f64) else x.astype(f32)


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last axis, with the mean and the inverse deviation."""
    wide = _wide(x)
    m = red.mean(wide, -1, keepdims=True)
    inverse = ew.rsqrt(red.mean(ew.square(wide - m), -1, keepdims=True) + eps)
    y = (wide - m) * inverse * scale.astype(wide.dtype)
    y = y if bias is None else y + bias.astype(wide.dtype)
    return y.astype(x.dtype), m, inverse


def _rms_norm(x: Tensor, scale: Tensor, eps: float, axis: int = -1) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    axes = tuple(range(normalize_axis(axis, x.ndim, "the norm"), x.ndim))
    inverse = ew.rsqrt(red.mean(ew.square(wide), axes, keepdims=True) + eps)
    return (wide * inverse * scale.astype(wide.dtype)).astype(scale.dtype), inverse


@op("SimplifiedLayerNormalization", 1)
@op("SimplifiedLayerNormalization", 1, domain=MICROSOFT)
def simplified_layer_norm(n: Call) -> tuple[Tensor, ...]:
    if n.integer("stash_type", 1) != 1:
        n.unsupported("a stash_type other than f32")
    y, inverse = _rms_norm(n.tensor(0), n.tensor(1), n.number("epsilon", 1e-5), n.integer("axis", -1))
    return (y, inverse)[: max(n.outputs, 1)]


def _skipped(n: Call, bias: int) -> Tensor:
    x, skip = n.tensor(0), n.tensor(1)
    total = x + broadcast_to(reshape(skip, (1,) * (x.ndim - skip.ndim) + skip.shape), x.shape)
    return total + n.tensor(bias) if n.has(bias) else total


@op("SkipLayerNormalization", 1, domain=MICROSOFT)
def skip_layer_norm(n: Call) -> tuple[Tensor, ...]:
    total = _skipped(n, 4)
    y, m, inverse = _layer_norm(total, n.tensor(2), n.optional(3), n.number("epsilon", 1e-12))
    return (y, m, inverse, total)[: max(n.outputs, 1)]


@op("SkipSimplifiedLayerNormalization", 1, domain=MICROSOFT)
def skip_simplified_layer_norm(n: Call) -> tuple[Tensor, ...]:
    total = _skipped(n, 3)
    y, inverse = _rms_norm(total, n.tensor(2), n.number("epsilon", 1e-12))
    return (y, zeros((), f32), inverse, total)[: max(n.outputs, 1)]


@op("EmbedLayerNormalization", 1, domain=MICROSOFT)
def embed_layer_norm(n: Call) -> tuple[Tensor, ...]:
    """Rows of three tables, added and normalised; the second output counts the ones of each row of the mask."""
    ids, mask = n.tensor(0), n.optional(7)
    batch, length = ids.shape
    n.ignore("mask_index_type")  # of shape inference
    where = n.tensor(8) if n.has(8) else iota((1, length), 1)
    total = take(n.tensor(2), ids, 0) + take(n.tensor(3), where, 0)
    if n.has(1):
        total = total + take(n.tensor(4), n.tensor(1), 0)
    y, _, _ = _layer_norm(total, n.tensor(5), n.tensor(6), n.number("epsilon", 1e-12))
    index = zeros((batch,), i32) if mask is None else red.sum(ew.equal(mask, 1).astype(i32), 1, dtype=i32)
    return (y, index, total)[: max(n.outputs, 1)]


# --- attention ------------------------------------------------------------------------------------------------------


def _lengths_mask(n: Call, ends: Tensor, starts: Tensor | None, total: Dim) -> Tensor:
    """bool (batch, 1, 1, total): the positions from a start to before an end of each row."""
    place = iota((1, 1, 1, total), 3, ends.dtype)
    inside = ew.less(place, reshape(ends, (-1, 1, 1, 1)))
    if starts is not None:
        inside = ew.logical_and(inside, ew.greater_equal(place, reshape(starts, (-1, 1, 1, 1))))
    return inside


def _mask(n: Call, k: int, batch: Dim, rows: Dim, total: Dim) -> Tensor | None:
    """Input k, a mask in one of its forms, as bool (batch, 1, rows or 1, total): true where attention is allowed."""
    if not n.has(k):
        return None
    m = n.tensor(k)
    if m.ndim == 1 and m.shape[0] == batch:
        return _lengths_mask(n, m, None, total)
    if m.ndim == 1 and m.shape[0] == 2 * batch:
        return _lengths_mask(n, slice_axis(m, 0, 0, batch), slice_axis(m, 0, batch, 2 * batch), total)
    if m.ndim == 2 and m.shape[1] == total:
        return reshape(m, (m.shape[0], 1, 1, total)) > 0
    if m.ndim == 3 and m.shape[1:] == (rows, total):
        return reshape(m, (m.shape[0], 1, rows, total)) > 0
    n.unsupported(f"a mask of shape {m.shape} for {batch} rows of {rows} by {total} positions")


def _attend(n: Call, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, past: Dim) -> Tensor:
    """Attention (batch, heads, length, size). A key that the mask rules out has mask_filter_value added to its scores, and one
    that lies ahead the least number: with -10000, not -inf, a row of which nothing is allowed still gives numbers."""
    size = n.fixed(q.shape[-1])
    scale = n.number("scale", 0.0) or 1.0 / math.sqrt(size)
    ruled, ahead = n.number("mask_filter_value", -10000.0), n.flag("unidirectional")
    rows, total = q.shape[2], k.shape[2]
    added = bias
    if allowed is not None:
        part = ew.where(allowed, as_tensor(0.0, q.dtype), as_tensor(max(ruled, _least(q.dtype)), q.dtype))
        added = part if added is None else added + part
    if ahead and (added is not None or past != 0 or rows != total):
        part = ew.where(causal(rows, total, past), as_tensor(0.0, q.dtype), as_tensor(_least(q.dtype), q.dtype))
        added, ahead = part if added is None else ew.maximum(added + part, _least(q.dtype)), False
    return scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=ahead, scale=scale)


def _least(dtype: DType) -> float:
    return float(np.finfo(dtype.numpy).min) if dtype in (f32, f64) else -65504.0


def _projected(n: Call, qkv: Tensor, heads: int, sizes: tuple[int, ...] | None) -> list[Tensor]:
    """The three parts of a projection (batch, length, q + k + v), heads apart."""
    width = n.fixed(qkv.shape[2])
    widths = sizes or (width // 3,) * 3
    if len(widths) != 3 or sum(widths) != width or any(w % heads for w in widths):
        n.fail(f"{heads} heads of sizes {widths} for a projection of width {width}")
    starts = (0, widths[0], widths[0] + widths[1])
    return [heads_apart(slice_axis(qkv, 2, s, s + w), heads) for s, w in zip(starts, widths, strict=True)]


def _self_attention(n: Call, qkv: Tensor, mask: int, past: int, bias: int | None) -> tuple[Tensor, ...]:
    heads = n.integer("num_heads")
    if heads < 1:
        n.fail(f"num_heads={heads}")
    if n.flag("do_rotary") or n.flag("past_present_share_buffer"):
        n.unsupported("do_rotary or past_present_share_buffer")
    n.ignore("rotary_embedding_dim")  # of do_rotary
    sizes = n.int_list("qkv_hidden_sizes")
    q, k, v = _projected(n, qkv, heads, sizes if sizes and any(sizes) else None)
    before: Dim = 0
    if n.has(past):
        both = n.tensor(past)
        before = both.shape[3]
        k, v = (concatenate([reshape(slice_axis(both, 0, s, s + 1), both.shape[1:]), t], 2) for s, t in enumerate((k, v)))
    allowed = _mask(n, mask, q.shape[0], q.shape[2], k.shape[2])
    y = heads_joined(_attend(n, q, k, v, allowed, None if bias is None else n.optional(bias), before))
    return (y,) if not n.wants(1) else (y, stack([k, v], 0))


@op("Attention", 1, domain=MICROSOFT)
def attention(n: Call) -> tuple[Tensor, ...]:
    """One projection to queries, keys and values, then attention of several heads."""
    qkv = matmul(n.tensor(0), n.tensor(1))
    if n.has(6):
        n.unsupported("past_sequence_length: buffers that are shared")
    return _self_attention(n, qkv + n.tensor(2) if n.has(2) else qkv, 3, 4, 5)


@op("QAttention", 1, domain=MICROSOFT)
def quantised_attention(n: Call) -> tuple[Tensor, ...]:
    """Attention whose projection is a product of 8-bit integers."""
    sums = integer_matmul(n, n.tensor(0), n.tensor(1), n.optional(6), n.optional(7))
    qkv = sums.astype(f32) * (n.tensor(3) * n.tensor(4)) + n.tensor(2)
    return _self_attention(n, qkv, 5, 8, None)


@op("MultiHeadAttention", 1, domain=MICROSOFT)
def multi_head_attention(n: Call) -> tuple[Tensor, ...]:
    heads = n.integer("num_heads")
    if heads < 1:
        n.fail(f"num_heads={heads}")
    if n.has(8) or n.has(9):
        n.unsupported("past_sequence_length and cache_indirection: buffers that are shared")
    if n.wants(3):
        n.unsupported("the scores as an output")
    q, k, v = _query_key_value(n, heads)
    before: Dim = 0
    if n.has(6):
        before = n.tensor(6).shape[2]
        k, v = concatenate([n.tensor(6), k], 2), concatenate([n.tensor(7), v], 2)
    allowed = _mask(n, 4, q.shape[0], q.shape[2], k.shape[2])
    y = heads_joined(_attend(n, q, k, v, allowed, n.optional(5), before))
    return (y, k, v)[: max(n.outputs, 1)]


def _query_key_value(n: Call, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads apart, from one array of all three, one of queries and one of both others, or three; with the bias added."""
    q, key, value, bias = n.tensor(0), n.optional(1), n.optional(2), n.optional(3)
    if q.ndim == 5:
        if bias is not None:
            n.unsupported("a bias of packed queries, keys and values")
        return _unpacked(q, 3)  # type: ignore[return-value]
    if key is None:
        n.fail("keys are missing")
    width = n.fixed(q.shape[2])
    parts = [] if bias is None else [slice_axis(bias, 0, 0, width), slice_axis(bias, 0, width, 2 * width),
                                     slice_axis(bias, 0, 2 * width, bias.shape[0])]  # fmt: skip
    query = heads_apart(q + parts[0] if parts else q, heads)
    if key.ndim == 5:
        if bias is not None:
            n.unsupported("a bias of packed keys and values")
        k, v = _unpacked(key, 2)
        return query, k, v
    if value is None:
        n.fail("values are missing")
    if key.ndim == 4:  # keys and values of an earlier step, which have their bias
        return query, key, value
    k, v = (heads_apart(t + parts[i] if parts else t, heads) for i, t in ((1, key), (2, value)))
    return query, k, v


def _unpacked(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(batch, length, heads, count, size) -> count of (batch, heads, length, size)."""
    batch, length, heads, _, size = x.shape
    return tuple(swapaxes(reshape(slice_axis(x, 3, s, s + 1), (batch, length, heads, size)), 1, 2) for s in range(count))


@op("RotaryEmbedding", 1, domain=MICROSOFT)
def rotary_embedding(n: Call) -> Tensor:
    x, positions, cos, sin = (n.tensor(k) for k in range(4))
    heads, part = n.integer("num_heads", 0), n.integer("rotary_embedding_dim", 0)
    interleaved = n.flag("interleaved")
    if n.flag("is_packed_batching"):
        n.unsupported("is_packed_batching: rows of several lengths")
    if n.number("scale", 1.0) != 1.0:
        n.unsupported("a scale")
    if x.ndim not in (3, 4):
        n.fail(f"takes three or four dimensions, not {x.ndim}")
    if x.ndim == 3 and not heads:
        if part:
            n.fail("rotary_embedding_dim wants num_heads")
        heads = n.fixed(x.shape[2]) // (2 * n.fixed(cos.shape[1]))
    whole = heads_apart(x, heads) if x.ndim == 3 else x
    batch, length = whole.shape[0], whole.shape[2]
    if positions.ndim == 1:  # the first position of all
        positions = broadcast_to(reshape(positions.astype(i64), (1, 1)) + iota((1, length), 1), (batch, length))
    y = rotated(whole, rows_of(cos, positions), rows_of(sin, positions), interleaved)
    return heads_joined(y) if x.ndim == 3 else y
