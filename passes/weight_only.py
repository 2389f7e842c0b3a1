"""Weights of matrix products as integers of 8 or 4 bits with scales, activations as they are.

    op(x, w)  ->  op(x, dequantize_blocks(q, s))        q = round(w / s), s = max |w| / (2^(bits-1) - 1) of each block of inputs

In 8 bits a scale belongs to a whole output channel, in 4 to `group` consecutive inputs of one, and is rounded to bf16 before
the integers are made, so that it adds nothing to their error. All of it depends on weights alone: it is in the prepare graph.
"""

from __future__ import annotations

from ..ir.build import full
from ..ir.dtypes import bf16, f32, i8
from ..ir.errors import AttributeValueError
from ..ir.graph import Graph, Node
from ..ir.op import make
from .layers import Layer, find_layers


def check(bits: int, group: int) -> None:
    """Raises AttributeValueError for bits other than 4 and 8, and groups that are no multiple of 8 (0: a whole channel)."""
    if bits not in (4, 8):
        raise AttributeValueError(f"bits is 4 or 8, not {bits!r}")
    if type(group) is not int or group < 0 or group % 8:
        raise AttributeValueError(f"group is how many inputs share a scale, a multiple of 8 (0: all of them), not {group!r}")


def fits(layer: Layer) -> bool:
    """Whether a layer is a product with one matrix of f32 whose input channels are one of its dimensions."""
    w = layer.w
    return w.dtype is f32 and len(w.shape) == 2 and layer.inputs is not None and layer.inputs[1] != layer.output[1]


def coded(w: Node, axis: int, bits: int, group: int) -> Node:
    """The numbers that the integers of a matrix w stand for, with a scale for each `group` entries along `axis` (0: all)."""
    check(bits, group)
    (n, k) = (w.tensor.static_shape[1 - axis], w.tensor.static_shape[axis])
    block = min(group, k) if group else k
    blocks = -(-k // max(block, 1)) if k else 0
    if 0 in (n, k):
        return w
    x = w if axis == 1 else make("transpose", w, perm=(1, 0))
    if blocks * block != k:
        x = make("pad", x, low=(0, 0), high=(0, blocks * block - k), interior=(0, 0), value=0.0)
    x = make("reshape", x, shape=(n, blocks, block))
    most = 2 ** (bits - 1) - 1
    bound = make("max", make("abs", x), axes=(2,), keepdims=True)
    scale = make("mul", bound, full(1.0 / most, bound.tensor))
    if group:
        scale = make("cast", make("cast", scale, dtype=bf16), dtype=f32)
    # a block of zeros, or of numbers whose reciprocal would overflow, has a scale of 1
    scale = make("where", make("less", full(2.0**-100, scale.tensor), scale), scale, full(1.0, scale.tensor))
    whole = make("round", make("div", x, make("broadcast_to", scale, shape=x.shape)))
    limit = full(float(most), whole.tensor)
    whole = make("minimum", limit, make("maximum", make("neg", limit), whole))
    q = make("reshape", make("cast", whole, dtype=i8), shape=(n, blocks * block))
    if blocks * block != k:
        q = make("slice", q, starts=(0, 0), stops=(n, k), steps=(1, 1))
    s = make("reshape", scale, shape=(n, blocks))
    s = make("cast", s, dtype=bf16) if group else s
    if axis == 0:
        q, s = (make("transpose", t, perm=(1, 0)) for t in (q, s))
    return make("dequantize_blocks", q, s, axis=axis, block=block, bits=bits)


def weight_only(graph: Graph, bits: int = 8, group: int = 0) -> Graph:
    """The graph with the weights of its matrix products coded; convolutions, and products in loops, keep theirs."""
    check(bits, group)
    table: dict[Node, Node] = {}
    for layer in find_layers(graph):
        if fits(layer):
            assert layer.inputs is not None
            new = coded(layer.w, layer.inputs[1], bits, group)
            table[layer.node] = layer.node.replace((layer.x, new))
    if not table:
        return graph
    return graph.map_nodes(lambda n, ins: n.replace((ins[0], table[n].inputs[1])) if n in table else n.replace(ins))


__all__ = ["check", "coded", "fits", "weight_only"]
