"""One decode step of GPT-2 (Radford et al. 2019): a token and the cache of what came before -> logits and the new cache."""

from __future__ import annotations

from typing import Any

import tensorwright as tw
from tensorwright import nn

Tensor = Any


class GPT2Layer(nn.Module):
    """Layer norm before attention over the cache and one new position, and before a gelu network."""

    def __init__(self, width: int, heads: int) -> None:
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        return x.reshape(batch, time, self.heads, width // self.heads).transpose(0, 2, 1, 3)

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(t) for t in tw.split(self.qkv(self.n1(x)), 3, -1))
        keys, values = tw.concatenate([keys, k], 2), tw.concatenate([values, v], 2)
        attended = tw.scaled_dot_product_attention(q, keys, values)
        x = x + self.o(attended.transpose(0, 2, 1, 3).reshape(*x.shape))
        return x + self.f2(tw.gelu(self.f1(self.n2(x)), approximate="tanh")), keys, values


class GPT2Step(nn.Module):
    """ids [B, 1], cache [layers, 2, B, heads, P, width/heads] -> logits [B, 1, vocabulary], cache with P + 1 positions."""

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, positions: int = 1024
    ) -> None:
        self.emb, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.emb.weight.data = nn.init.normal(self.emb.weight.shape, 0.0, 0.02)
        self.pos.weight.data = nn.init.normal(self.pos.weight.shape, 0.0, 0.01)
        self.layers = nn.ModuleList([GPT2Layer(width, heads) for _ in range(layers)])
        self.n = nn.LayerNorm(width)

    def __call__(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = self.emb(ids) + self.pos.weight[past.shape[4]]
        new = []
        for i, layer in enumerate(self.layers):
            x, keys, values = layer(x, past[i, 0], past[i, 1])
            new.append(tw.stack([keys, values]))
        return tw.matmul(self.n(x), self.emb.weight.T), tw.stack(new)
