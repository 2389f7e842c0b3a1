"""Products of a few rows with dequantised weights read the integers themselves, which become floats in registers.

    contract(x, dequantize_blocks(q, s))       ->  coded_matmul(x, panels(q), panels(s))
    contract(x, dequantize(q, s, 0))           ->  the same, with one scale for a whole column
    contract(x, cast{f32}(w))                  ->  the same, with scales of one: w in bf16 or f16
    contract(x, dequantize_codebook(q, t, s))  ->  codebook_matmul(x, panels(q), panels(s), t) of sixteen entries; of 256 in bf16
                                                   coded_matmul(x, panels(t[q]), panels(s))

Such a product waits for its weights' way from memory, so it takes the time of their bytes. Many rows wait for arithmetic: they
read floats that are made once, in the prepare graph, as without this pass. The panels are made of ordinary nodes that depend on
weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.build import constant, full
from ..ir.contraction import Affine, Contraction
from ..ir.dtypes import bf16, f16, f32, i8, i32
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from ..ir.ops.coded import ENTRIES
from ..ir.types import TensorType
from .contract import Context, Pass
from .contract_form import permutation, spec_of
from .facts import Facts, derived
from .labels import finish

MOST_ROWS: Final = 4  # more wait for arithmetic, not for weights: those in floats then take no longer from L3
MOST_COLD: Final = 6  # ... nor from memory
WIDTH: Final = 64  # columns of a panel
STEPS: Final = 8  # of four bits in an i32


@dataclass(frozen=True)
class _Coded:
    """Weights [N, K] as i8, u8, bf16 or f16 and their scales [N, K / block]; `bits` of an integer count, which with a table is
    a place in it."""

    q: Node
    scale: Node
    block: int
    bits: int
    table: Node | None = None


@dataclass(frozen=True)
class CodedWeights(Pass):
    """Weights of few rows stay in 16, 8 or 4 bits; nothing without a processor as target."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with products of coded weights."""
        if ctx.target is None or ctx.target.is_cuda or not any(_is_coded(n, ctx.facts) for n in graph.nodes()):
            return graph
        fixed, l3 = derived(graph.nodes(), ctx.weights(graph)), ctx.target.l3

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.replace(inputs)
            found = _product(node, new, fixed, ctx.facts, l3) if node.inputs else None
            return found if found is not None and ctx.spend("coded_product", node) else new

        made = graph.map_nodes(rule)
        return finish(graph, made.outputs, made.labels)


def _product(old: Node, node: Node, fixed: Mapping[Node, bool], facts: Facts, l3: int) -> Node | None:
    spec = spec_of(node, facts)
    if spec is None or spec.panel or node.dtype is not f32 or fixed.get(old.inputs[1]) is not True:
        return None
    order = _plain(spec)
    if order is None:
        return None
    coded = _weights(node.inputs[1], order, facts)
    if coded is None:
        return None
    n, k = coded.q.shape
    assert isinstance(n, int) and isinstance(k, int)
    if math.prod(spec_rows(spec)) > (MOST_COLD if n * k * f32.itemsize > l3 else MOST_ROWS):
        return None
    x = node.inputs[0]
    flat = x if x.shape[-1] == k else make("reshape", x, shape=(*spec_rows(spec), k))
    panels, scales, block = _panels(coded, n, k), _scale_panels(coded.scale, n), min(coded.block, k)
    if coded.table is None:
        y = make("coded_matmul", flat, panels, scales, n=n, bits=coded.bits, block=block)
    else:
        y = make("codebook_matmul", flat, panels, scales, coded.table, n=n, block=block)
    return y if y.shape == node.shape else make("reshape", y, shape=node.shape)


def _is_coded(node: Node, facts: Facts) -> bool:
    """Whether a node stands for weights in few bits."""
    return bool(node.inputs) and (node.op.has(Trait.BLOCKS) or node.op.has(Trait.DEQUANTIZE) or _widened(node, facts))


def _widened(node: Node, facts: Facts) -> bool:
    """Whether a node is 16-bit floats as f32."""
    e = facts.scalar(node) if node.inputs else None
    return e is not None and e.op == "cast" and node.dtype is f32 and node.inputs[0].dtype in (bf16, f16)


def spec_rows(spec: Contraction) -> tuple[int, ...]:
    """The extents of the m axes."""
    return tuple(x.extent for x in spec.of_kind("m") if isinstance(x.extent, int))


def _plain(spec: Contraction) -> tuple[int, int] | None:
    """The dimensions of B that are its columns and its steps, where the spec is a product of a matrix B with a few rows, whose
    elements lie as the axes say; None for any other."""
    long = [x for x in spec.axes if x.extent != 1]
    if any(not isinstance(x.extent, int) for x in spec.axes) or any(x.kind == "batch" for x in long):
        return None
    rows, columns, steps = ([x.name for x in long if x.kind == kind] for kind in "mnk")
    if len(columns) != 1 or len(steps) != 1:
        return None

    def names(index: tuple[Affine, ...]) -> list[str] | None:
        """The long axes that the dimensions are, in order; None where one is not an axis itself."""
        found: list[str] = []
        for m in index:
            terms = [t for t in m.terms if spec.axis(t[0]).extent != 1]
            if m.constant or len(terms) > 1 or any(c != 1 for _, c in terms):
                return None
            found += [name for name, _ in terms]
        return found

    b = names(spec.b)
    if names(spec.a) != [*rows, *steps] or names(spec.c) != [*rows, *columns] or b is None or len(b) != 2:
        return None
    if len(spec.b) != 2:
        return None
    return b.index(columns[0]), b.index(steps[0])


def _weights(b: Node, order: tuple[int, int], facts: Facts) -> _Coded | None:
    """What B is dequantised from, as [N, K]: through transposes."""
    column, step = order
    while (perm := permutation(b, facts)) is not None and len(perm) == 2:
        b, column, step = b.inputs[0], perm[column], perm[step]
    swap = (column, step) != (0, 1)

    def turned(x: Node) -> Node:
        return make("transpose", x, perm=(1, 0)) if swap else x

    if len(b.shape) != 2 or not b.inputs:
        return None
    if _widened(b, facts):
        n, k = b.shape[column], b.shape[step]
        return _Coded(turned(b.inputs[0]), full(1.0, TensorType(f32, (n, 1))), k, 16) if isinstance(k, int) else None
    if b.op.has(Trait.BLOCKS) and len(b.inputs) == 3:
        q, table, scale = b.inputs
        block = b.attrs["block"]
        if b.attrs["axis"] != step:
            return None
        if table.shape == (ENTRIES,) and table.dtype is f32 and (block % STEPS == 0 or block >= b.shape[step]):
            return _Coded(turned(q), turned(scale), block, 4, table)
        if table.shape == (256,) and _widened(table, facts):  # no registers hold these: what is meant instead of its places
            entries = make("gather", table.inputs[0], make("cast", q, dtype=i32), axis=0)
            return _Coded(turned(entries), turned(scale), block, 16)
        return None
    if b.inputs[0].dtype is not i8:
        return None
    if b.op.has(Trait.BLOCKS) and b.attrs["axis"] == step:
        block = b.attrs["block"]
        if b.attrs["bits"] == 4 and block % STEPS and block < b.shape[step]:
            return None
        scale = b.inputs[1]
        scale = make("cast", scale, dtype=f32) if scale.dtype is f16 else scale
        return _Coded(turned(b.inputs[0]), turned(scale), block, b.attrs["bits"])
    if b.op.has(Trait.DEQUANTIZE) and facts.value(b.inputs[2]) == 0:
        n, k = b.shape[column], b.shape[step]
        scale, axis = b.inputs[1], b.attrs["axis"]
        if scale.dtype is not f32 or axis not in (None, column) or not isinstance(k, int):
            return None
        scale = make("reshape", scale, shape=(n, 1)) if axis is not None else make("broadcast_to", scale, shape=(n, 1))
        return _Coded(turned(b.inputs[0]), scale, k, 8)
    return None


def _padded(x: Node, rows: int, columns: int) -> Node:
    """A matrix with zeros up to so many rows and columns."""
    n, k = x.shape
    assert isinstance(n, int) and isinstance(k, int)
    if (n, k) == (rows, columns):
        return x
    return make("pad", x, low=(0, 0), high=(rows - n, columns - k), interior=(0, 0), value=0)


def _panels(coded: _Coded, n: int, k: int) -> Node:
    """[N, K] -> [P, K, W], of four bits [P, K / 8, W]."""
    count = -(-n // WIDTH)
    if coded.bits >= 8:
        x = make("reshape", _padded(coded.q, count * WIDTH, k), shape=(count, WIDTH, k))
        return make("transpose", x, perm=(0, 2, 1))
    words = -(-k // STEPS)
    x = make("cast", _padded(coded.q, count * WIDTH, words * STEPS), dtype=i32)
    x = make("reshape", x, shape=(count, WIDTH, words, STEPS))
    places = make("reshape", constant([4 * t for t in range(STEPS)], i32), shape=(1, 1, 1, STEPS))
    low = make("shift_left", make("and", x, full(15, x.tensor)), make("broadcast_to", places, shape=x.shape))
    word = make("sum", low, axes=(3,), keepdims=False)
    return make("transpose", word, perm=(0, 2, 1))


def _scale_panels(scale: Node, n: int) -> Node:
    """[N, G] -> [P, G, W]."""
    count, blocks = -(-n // WIDTH), scale.shape[1]
    assert isinstance(blocks, int)
    x = make("reshape", _padded(scale, count * WIDTH, blocks), shape=(count, WIDTH, blocks))
    return make("transpose", x, perm=(0, 2, 1))
