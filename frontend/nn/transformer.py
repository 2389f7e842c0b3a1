"""Multi-head attention and the transformer's encoder layer. Parameter names are PyTorch's; batches come first."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.errors import AttributeValueError
from .. import activations, attention, linalg, random
from ..core import TensorLike, as_tensor
from ..module import Module
from ..parameter import Parameter
from ..tensor import Tensor
from . import init
from .init import Seed
from .layers import LayerNorm, Linear
from .simple import Dropout


class MultiheadAttention(Module):
    """Attention in num_heads subspaces (Vaswani et al. 2017): query (N, T, E), key and value (N, S, E) -> (N, T, E).

    Parameters are in_proj_weight (3E, E) for query, key and value in this order, in_proj_bias, out_proj.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *, seed: Seed = None) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise AttributeValueError(f"MultiheadAttention: embed_dim {embed_dim} does not divide into {num_heads} heads")
        source = init.generator(seed)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = Parameter(init.xavier_uniform((3 * embed_dim, embed_dim), seed=source))
        self.in_proj_bias = Parameter(init.zeros((3 * embed_dim,))) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, seed=source)
        if self.out_proj.bias is not None:
            self.out_proj.bias.data = init.zeros((embed_dim,))

    def _heads(self, x: Tensor) -> Tensor:
        n, t, e = x.shape
        return x.reshape(n, t, self.num_heads, e // self.num_heads).transpose(0, 2, 1, 3)

    def forward(
        self,
        query: TensorLike,
        key: TensorLike | None = None,
        value: TensorLike | None = None,
        attn_mask: TensorLike | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Without key and value, self-attention: one product gives all three projections."""
        q = as_tensor(query, what="query")
        e = self.embed_dim
        if key is None:
            projected = linalg.linear(q, self.in_proj_weight, self.in_proj_bias).split(3, -1)
        else:
            sources = (q, key, key if value is None else value)
            projected = []
            for i, source in enumerate(sources):
                rows = slice(i * e, (i + 1) * e)
                b = None if self.in_proj_bias is None else self.in_proj_bias[rows]
                projected.append(linalg.linear(source, self.in_proj_weight[rows], b))
        q_heads, k_heads, v_heads = map(self._heads, projected)
        y = attention.scaled_dot_product_attention(
            q_heads, k_heads, v_heads, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        merged: Tensor = self.out_proj(y.transpose(0, 2, 1, 3).reshape(*q.shape))
        return merged

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"


class TransformerEncoderLayer(Module):
    """Self-attention and a two-layer network, each with residual and layer norm (after it, or before with norm_first)."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        *,
        seed: Seed = None,
    ) -> None:
        known: dict[str, Callable[..., Tensor]] = {"relu": activations.relu, "gelu": activations.gelu}
        if isinstance(activation, str) and activation not in known:
            raise AttributeValueError(f"activation is 'relu', 'gelu' or a function, not {activation!r}")
        source = init.generator(seed)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, seed=source)
        self.linear1 = Linear(d_model, dim_feedforward, seed=source)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, seed=source)
        self.norm1, self.norm2 = LayerNorm(d_model, layer_norm_eps), LayerNorm(d_model, layer_norm_eps)
        self.activation = known[activation] if isinstance(activation, str) else activation
        self.norm_first = norm_first

    def _feed(self, x: Tensor) -> Tensor:
        return self._drop(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return random.dropout(x, self.dropout.p) if self.training else x

    def forward(self, src: TensorLike, src_mask: TensorLike | None = None, is_causal: bool = False) -> Tensor:
        x = as_tensor(src, what="src")
        if self.norm_first:
            x = x + self._drop(self.self_attn(self.norm1(x), attn_mask=src_mask, is_causal=is_causal))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._drop(self.self_attn(x, attn_mask=src_mask, is_causal=is_causal)))
        y: Tensor = self.norm2(x + self._feed(x))
        return y
