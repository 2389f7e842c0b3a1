"""Arithmetic on 16-bit floats is done in f32 and rounded once per op: here that is written out.

    op(a, b) -> cast{bf16}(op(cast{f32}(a), cast{f32}(b)))

That is what the interpreter does, and so what a graph means: an op, however long its expression, has one rounding, a sum
has one at its end. Written out before anything is decomposed or fused, it needs nothing else anywhere: to the passes and
the code generator the casts are elementwise ops like others, which fuse into the kernels around them, and fusing changes
no bits. A region that computed in f32 from its loads to its stores would be faster and more accurate, but its results would
depend on what was fused.

Left alone are movements, contractions and attention (the code generator adds up their products in f32 and rounds once), and what
a single comparison, choice or cast computes without rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.build import get
from ..ir.dtypes import DType, bf16, f16, f32
from ..ir.expr import Expr, postorder
from ..ir.graph import Graph, Node
from ..ir.lowering import Attention
from ..ir.op import Trait, make
from ..ir.ops.structural import GET
from ..ir.types import TupleType
from .contract import Context, Pass
from .facts import Facts
from .labels import finish

NARROW: Final = (bf16, f16)
_APART: Final = (Trait.STRUCTURAL, Trait.BARRIER, Trait.CONTROL, Trait.MOVEMENT, Trait.VIEW, Trait.CONTRACTION)
_EXACT: Final = frozenset(
    {"var", "const", "select", "lt", "le", "eq", "ne", "and", "or", "xor", "not", "max", "min", "neg", "abs"}
)


@dataclass(frozen=True)
class Widen(Pass):
    """Puts casts to f32 and back around every op that rounds 16-bit floats."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with arithmetic in f32 and f64 only."""
        parts: dict[Node, Node] = {}  # an op of several outputs -> itself in f32

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
            if node.op is GET and inputs[0] in parts:
                return _as(get(parts[inputs[0]], node.attrs["index"]), node.dtype)
            new = node.replace(inputs)
            if not rounds(new, ctx.facts) or not ctx.spend("widen", node):
                return new
            attrs = {k: f32 if isinstance(v, DType) and v in NARROW else v for k, v in node.attrs.items()}
            wide = make(node.op, *(_as(i, f32) if i.dtype in NARROW else i for i in inputs), **attrs)
            if isinstance(node.type, TupleType):
                parts[new] = wide
                return new
            return _as(wide, node.dtype)

        made = graph.map_nodes(rule)
        return finish(graph, made.outputs, dict(made.labels))


def rounds(node: Node, facts: Facts) -> bool:
    """Whether a node rounds 16-bit floats other than by one cast."""
    if not node.inputs or any(node.op.has(t) for t in _APART):
        return False
    results = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    if not any(t.dtype in NARROW for t in (*results, *(i.type for i in node.inputs if not isinstance(i.type, TupleType)))):
        return False
    if isinstance(facts.lowering(node), Attention):
        return False
    scalar = facts.scalar(node)
    return scalar is None or not _exact(scalar)


def _exact(value: Expr) -> bool:
    """Whether an element is computed without rounding, but for one cast of an operand."""
    if value.op == "cast" and value.args[0].op == "var":
        return True
    return all(
        e.op in _EXACT and (e.op != "const" or e.dtype not in NARROW or float(e.dtype.numpy.type(e.attr)) == e.attr)
        for e in postorder([value])
    )


def _as(node: Node, dtype: DType) -> Node:
    return node if node.dtype is dtype else make("cast", node, dtype=dtype)
