"""Contractions of numbers that were rounded to bf16 multiply pairs of bf16.

    contract(cast{f32}(a), cast{f32}(b)) -> contract_f32(a, b)        a, b of bf16

Such casts are in a graph where single layers are to be computed in bf16 (`mixed_precision` does it to all). Products of bf16 are
exact in f32 and the sums stay in f32, so nothing changes but their order. Between cast and contraction there may be movements,
which then move half the bytes. Without the instruction for pairs, f32 is as good: the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.dtypes import bf16, f32
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from ..ir.types import TupleType
from .contract import Context, Pass
from .facts import Facts
from .labels import finish
from .mixed_precision import chosen, evened


@dataclass(frozen=True)
class RoundedProducts(Pass):
    """Multiplies rounded operands in pairs; on processors with AVX512_BF16."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with contractions of bf16 where both operands are."""
        target = ctx.target
        if target is None or target.is_cuda or not target.bf16:
            return graph
        if not any(not isinstance(n.type, TupleType) and n.dtype is bf16 for n in graph.nodes()):
            return graph
        narrow: dict[Node, Node | None] = {}

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
            spec = chosen(node, ctx.facts, 0) if node.inputs else None
            if spec is None:
                return node.replace(inputs)
            a, b = (_narrowed(x, narrow, ctx.facts) for x in inputs)
            if a is None or b is None or not ctx.spend("rounded_products", node):
                return node.replace(inputs)
            spec, a, b = evened(spec, a, b)
            return make("contract_f32", a, b, spec=spec)

        made = graph.map_nodes(rule)
        return finish(graph, made.outputs, dict(made.labels))


def _narrowed(x: Node, known: dict[Node, Node | None], facts: Facts) -> Node | None:
    """The numbers of x as bf16, where x was cast from them, or moves what was; else None."""
    moved: list[Node] = []
    while x not in known and _moves(x):
        moved.append(x)
        x = x.inputs[0]
    if x not in known:
        known[x] = x.inputs[0] if _widens(x, facts) else None
    for node in reversed(moved):
        below = known[node.inputs[0]]
        known[node] = None if below is None else node.replace((below,))
    return known[moved[0] if moved else x]


def _widens(x: Node, facts: Facts) -> bool:
    """Whether x is its operand of bf16, as f32."""
    if len(x.inputs) != 1 or x.op.has(Trait.STRUCTURAL) or x.dtype is not f32 or x.inputs[0].dtype is not bf16:
        return False
    e = facts.scalar(x)
    return e is not None and e.op == "cast" and e.args[0].op == "var"


def _moves(x: Node) -> bool:
    """Whether x holds its operand's elements, and zeros."""
    if len(x.inputs) != 1 or x.op.has(Trait.BARRIER) or x.op.has(Trait.CONTROL) or x.op.has(Trait.STRUCTURAL):
        return False
    plain = x.op.has(Trait.VIEW) or x.op.has(Trait.MOVEMENT)
    return plain and all(v == 0 for v in x.attrs.values() if isinstance(v, float))
