"""Multi-head attention and the transformer (Vaswani et al. 2017). Parameter names are PyTorch's.

Masks mean what they mean in PyTorch's layers: bool masks are true where attention is *not* allowed (in
`tw.scaled_dot_product_attention`, as in PyTorch's, where it is), float masks are added to the scores. Batches come first:
`batch_first=True` is the default here, PyTorch's is False.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from ...ir.dtypes import bool_
from ...ir.errors import AttributeValueError, DTypeError, ShapeError
from .. import activations, attention, linalg, random
from ..context import error
from ..core import TensorLike, as_tensor, cast, show
from ..elementwise import logical_and, logical_not, where
from ..module import Module
from ..movement import reshape, slice_axis, swapaxes
from ..parameter import Parameter
from ..tensor import Tensor
from . import init
from .containers import ModuleList
from .init import Seed
from .layers import Linear, positive
from .norms import LayerNorm
from .simple import Dropout

Activation = str | Callable[[Tensor], Tensor]


def _mask(value: TensorLike, what: str) -> Tensor:
    t = as_tensor(value, what=what)
    if t.dtype is not bool_ and not t.dtype.is_float:
        raise error(DTypeError, f"{what} is bool (true: not allowed) or float (added to the scores), not {t.dtype}", mask=t)
    return t


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Two masks as one, each bool (true: allowed, here) or added."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype is bool_ and b.dtype is bool_:
        return logical_and(a, b)
    if a.dtype is bool_:
        return where(a, b, float("-inf"))
    return where(b, a, float("-inf")) if b.dtype is bool_ else a + b


class MultiheadAttention(Module):
    """Attention in num_heads subspaces: query (N, T, E), key (N, S, kdim) and value (N, S, vdim) -> (N, T, E).

    Parameters are in_proj_weight (3E, E) for query, key and value in this order (or, with another kdim or vdim,
    q_proj_weight, k_proj_weight, v_proj_weight), in_proj_bias and out_proj. The result is a Tensor: attention weights are
    never all in memory, and cannot be returned. add_bias_kv and add_zero_attn are not offered.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        *,
        seed: Seed = None,
    ) -> None:
        positive(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim or embed_dim, vdim=vdim or embed_dim)
        if embed_dim % num_heads:
            raise AttributeValueError(f"MultiheadAttention: embed_dim {embed_dim} does not divide into {num_heads} heads")
        source = init.generator(seed)
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.in_proj_weight: Parameter | None = None
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = Parameter(init.xavier_uniform((3 * embed_dim, embed_dim), seed=source))
        else:
            self.q_proj_weight = Parameter(init.xavier_uniform((embed_dim, embed_dim), seed=source))
            self.k_proj_weight = Parameter(init.xavier_uniform((embed_dim, self.kdim), seed=source))
            self.v_proj_weight = Parameter(init.xavier_uniform((embed_dim, self.vdim), seed=source))
        self.in_proj_bias = Parameter(init.zeros((3 * embed_dim,))) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, seed=source)
        if self.out_proj.bias is not None:
            self.out_proj.bias.data = init.zeros((embed_dim,))

    def _projected(self, sources: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        e, bias = self.embed_dim, self.in_proj_bias
        q, k, v = sources
        if self.in_proj_weight is not None and q.node is k.node is v.node:
            return linalg.linear(q, self.in_proj_weight, bias).split(3, -1)
        if self.in_proj_weight is not None and k.node is v.node:
            own = linalg.linear(q, self.in_proj_weight[:e], None if bias is None else bias[:e])
            return [own, *linalg.linear(k, self.in_proj_weight[e:], None if bias is None else bias[e:]).split(2, -1)]
        if self.in_proj_weight is not None:
            weights = [self.in_proj_weight[i * e : (i + 1) * e] for i in range(3)]
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None if bias is None else bias[i * e : (i + 1) * e] for i in range(3)]
        return [linalg.linear(s, w, b) for s, w, b in zip(sources, weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        n, t, e = x.shape
        return x.reshape(n, t, self.num_heads, e // self.num_heads).transpose(0, 2, 1, 3)

    def _allowed(self, attn_mask: TensorLike | None, key_padding_mask: TensorLike | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The masks together, as `tw.scaled_dot_product_attention` takes them over (N, heads, T, S)."""
        n, t, s = q.shape[0], q.shape[1], k.shape[1]
        mask = padding = None
        if attn_mask is not None:
            mask = _mask(attn_mask, "attn_mask")
            if mask.shape == (n * self.num_heads, t, s) and mask.ndim == 3:
                mask = reshape(mask, (n, self.num_heads, t, s))
            elif mask.shape != (t, s):
                shapes = f"{show((t, s))} or {show((n * self.num_heads, t, s))} (batch times heads first)"
                raise error(ShapeError, f"attn_mask has shape {shapes}", attn_mask=mask, query=q, key=k)
            mask = logical_not(mask) if mask.dtype is bool_ else cast(mask, q.dtype)
        if key_padding_mask is not None:
            padding = _mask(key_padding_mask, "key_padding_mask")
            if padding.shape != (n, s):
                raise error(ShapeError, f"key_padding_mask has shape {show((n, s))}", key_padding_mask=padding, key=k)
            padding = reshape(padding, (n, 1, 1, s))
            padding = logical_not(padding) if padding.dtype is bool_ else cast(padding, q.dtype)
        return _joined(mask, padding)

    def forward(
        self,
        query: TensorLike,
        key: TensorLike | None = None,
        value: TensorLike | None = None,
        *,
        key_padding_mask: TensorLike | None = None,
        attn_mask: TensorLike | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Without key and value, self-attention; without a value, it is the key.

        attn_mask         (T, S), or (N * num_heads, T, S): bool, true where attention is not allowed, or float, added
        key_padding_mask  (N, S): the same for keys of each example, true for padding
        is_causal         position t sees positions up to t, also without a mask; with masks, all hold

        Raises ShapeError for operands or masks that do not fit, DTypeError for a mask of integers.
        """
        q = as_tensor(query, what="query")
        k = q if key is None else as_tensor(key, what="key")
        v = k if value is None else as_tensor(value, what="value")
        wanted = (self.embed_dim, self.kdim, self.vdim)
        if any(x.ndim != 3 or x.shape[2] != e for x, e in zip((q, k, v), wanted, strict=True)):
            form = "(N, T, E)" if self.batch_first else "(T, N, E)"
            message = (
                f"MultiheadAttention takes query, key and value of shape {form}, E being {wanted[0]}, {wanted[1]}, {wanted[2]}"
            )
            raise error(ShapeError, message, query=q, key=k, value=v)
        if not self.batch_first:
            same = k is q, v is k
            q = swapaxes(q, 0, 1)
            k = q if same[0] else swapaxes(k, 0, 1)
            v = k if same[1] else swapaxes(v, 0, 1)
        if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
            message = "MultiheadAttention: query, key and value have one batch size, key and value one length"
            raise error(ShapeError, message, query=q, key=k, value=v)
        mask = self._allowed(attn_mask, key_padding_mask, q, k)
        q_heads, k_heads, v_heads = map(self._heads, self._projected((q, k, v)))
        p = self.dropout if self.training else 0.0
        y = attention.scaled_dot_product_attention(q_heads, k_heads, v_heads, mask, dropout_p=p, is_causal=is_causal)
        merged: Tensor = self.out_proj(y.transpose(0, 2, 1, 3).reshape(*q.shape))
        return merged if self.batch_first else swapaxes(merged, 0, 1)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"


class _Layer(Module):
    """What encoder and decoder layers share: the two-layer network, residuals, and where the norms stand."""

    def _set(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, activation: Activation, layer_norm_eps: float,
        batch_first: bool, norm_first: bool, bias: bool, source: Seed, attentions: tuple[str, ...],
    ) -> None:  # fmt: skip
        known: dict[str, Callable[..., Tensor]] = {"relu": activations.relu, "gelu": activations.gelu}
        if isinstance(activation, str) and activation not in known:
            raise AttributeValueError(f"activation is 'relu', 'gelu' or a function, not {activation!r}")
        for name in attentions:
            made = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, seed=source)
            setattr(self, name, made)
        self.linear1 = Linear(d_model, dim_feedforward, bias, seed=source)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, seed=source)
        for i in range(len(attentions) + 1):
            setattr(self, f"norm{i + 1}", LayerNorm(d_model, layer_norm_eps, bias=bias))
        self.activation = known[activation] if isinstance(activation, str) else activation
        self.norm_first = norm_first

    def _drop(self, x: Tensor) -> Tensor:
        return random.dropout(x, self.dropout.p) if self.training else x

    def _feed(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return y

    def _residual(self, x: Tensor, norm: LayerNorm, part: Callable[[Tensor], Tensor]) -> Tensor:
        y: Tensor = x + self._drop(part(norm(x))) if self.norm_first else norm(x + self._drop(part(x)))
        return y


class TransformerEncoderLayer(_Layer):
    """Self-attention and a two-layer network, each with residual and layer norm (after it, or before with norm_first)."""

    self_attn: MultiheadAttention
    norm1: LayerNorm
    norm2: LayerNorm

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        *,
        seed: Seed = None,
    ) -> None:
        source = init.generator(seed)
        self._set(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, source,
            ("self_attn",),
        )  # fmt: skip

    def forward(
        self,
        src: TensorLike,
        src_mask: TensorLike | None = None,
        src_key_padding_mask: TensorLike | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (N, T, d_model); the masks as in `MultiheadAttention`."""

        def attend(x: Tensor) -> Tensor:
            y: Tensor = self.self_attn(x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
            return y

        x = self._residual(as_tensor(src, what="src"), self.norm1, attend)
        return self._residual(x, self.norm2, self._feed)


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to the encoder's result (`memory`) and a two-layer network, each with residual and norm."""

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention
    norm1: LayerNorm
    norm2: LayerNorm
    norm3: LayerNorm

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        *,
        seed: Seed = None,
    ) -> None:
        source = init.generator(seed)
        self._set(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, source,
            ("self_attn", "multihead_attn"),
        )  # fmt: skip

    def forward(
        self,
        tgt: TensorLike,
        memory: TensorLike,
        tgt_mask: TensorLike | None = None,
        memory_mask: TensorLike | None = None,
        tgt_key_padding_mask: TensorLike | None = None,
        memory_key_padding_mask: TensorLike | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt (N, T, d_model), memory (N, S, d_model); the masks as in `MultiheadAttention`."""

        def attend(x: Tensor) -> Tensor:
            y: Tensor = self.self_attn(x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
            return y

        def look(x: Tensor) -> Tensor:
            y: Tensor = self.multihead_attn(
                x, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal
            )
            return y

        x = self._residual(as_tensor(tgt, what="tgt"), self.norm1, attend)
        x = self._residual(x, self.norm2, look)
        return self._residual(x, self.norm3, self._feed)


def _stack(layer: Module | Callable[[], Module], count: int) -> ModuleList:
    positive(num_layers=count)
    return ModuleList([copy.deepcopy(layer) if isinstance(layer, Module) else layer() for _ in range(count)])


class TransformerEncoder(Module):
    """num_layers encoder layers, then `norm` if given.

    A layer is copied, weights and all, as PyTorch does; a function that makes one gives every layer weights of its own:
    TransformerEncoder(lambda: TransformerEncoderLayer(256, 4), 6).
    """

    def __init__(
        self, encoder_layer: Module | Callable[[], Module], num_layers: int, norm: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.layers = _stack(encoder_layer, num_layers)
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self,
        src: TensorLike,
        mask: TensorLike | None = None,
        src_key_padding_mask: TensorLike | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As the layers' forward, one after the other."""
        x = as_tensor(src, what="src")
        for layer in self.layers:
            x = layer(x, mask, src_key_padding_mask, is_causal)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Module):
    """num_layers decoder layers, then `norm` if given. The layer is copied or made as in `TransformerEncoder`."""

    def __init__(
        self, decoder_layer: Module | Callable[[], Module], num_layers: int, norm: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.layers = _stack(decoder_layer, num_layers)
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self,
        tgt: TensorLike,
        memory: TensorLike,
        tgt_mask: TensorLike | None = None,
        memory_mask: TensorLike | None = None,
        tgt_key_padding_mask: TensorLike | None = None,
        memory_key_padding_mask: TensorLike | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As the layers' forward, one after the other; the memory is the same for all."""
        x = as_tensor(tgt, what="tgt")
        for layer in self.layers:
            x = layer(
                x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
            )
        return x if self.norm is None else self.norm(x)


class PositionalEncoding(Module):
    """x plus sines and cosines of the position, then dropout. x (N, T, d_model), T at most max_len. No parameters."""

    def __init__(self, d_model: int, dropout: float = 0.0, max_len: int = 5000, batch_first: bool = True) -> None:
        positive(d_model=d_model, max_len=max_len)
        self.d_model, self.max_len, self.batch_first = d_model, max_len, batch_first
        self.dropout = Dropout(dropout)

    def forward(self, x: TensorLike) -> Tensor:
        t = as_tensor(x, what="PositionalEncoding")
        if t.ndim != 3 or t.shape[2] != self.d_model:
            raise error(ShapeError, f"PositionalEncoding takes (N, T, {self.d_model})", x=t)
        length = t.shape[1 if self.batch_first else 0]
        if isinstance(length, int) and length > self.max_len:
            raise error(ShapeError, f"PositionalEncoding: {length} positions, and max_len is {self.max_len}", x=t)
        if isinstance(length, int):
            table = attention.sinusoidal_positions(length, self.d_model)
        else:
            table = slice_axis(attention.sinusoidal_positions(self.max_len, self.d_model), 0, 0, length)
        table = cast(table, t.dtype) if t.dtype.is_float else table
        y: Tensor = self.dropout(t + (table if self.batch_first else table.reshape(length, 1, self.d_model)))
        return y
