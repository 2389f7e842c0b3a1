"""Replaces every op that stands for other ops by them, until none is left.

    op(x...) -> record.lower(op).build(op)

Termination: an op's decomposition is made of simpler ops; a chain of more than 16 is refused, which a record that
decomposes into itself would make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from ..ir.graph import Graph, Node
from ..ir.lowering import Attention
from ..ir.lowering import Decompose as Decomposition
from ..ir.ops.structural import GET
from ..ir.types import TupleType
from .contract import Context, Pass
from .facts import Facts
from .rewrite import Miss, Outcome, apply_rules, rule_on

MAX_DEPTH: Final = 16


@rule_on("decompose", "attention", "get")
def build(node: Node, facts: Facts) -> Outcome:
    """op(x...) -> what its record says that it stands for; get(op(x...), i) -> part i of that."""
    if node.op is GET:
        low = facts.lowering(node.inputs[0])
        if not isinstance(low, Decomposition):
            return Miss("its operand has code of its own", node.inputs[0])
        parts = low.build(node.inputs[0])
        return parts[node.attrs["index"]] if isinstance(parts, tuple) else parts
    low = facts.lowering(node)
    if not isinstance(low, Decomposition) or isinstance(node.type, TupleType):
        return Miss("it has code of its own, or its parts are taken one by one", node)
    result = low.build(node)
    return result[0] if isinstance(result, tuple) else result


@rule_on("decompose", "get")
def build_all_but_attention(node: Node, facts: Facts) -> Outcome:
    """As `build`, but attention stays whole: the target has a kernel for it."""
    if node.op is not GET and isinstance(facts.lowering(node), Attention):
        return Miss("the target has a kernel for it", node)
    return build.apply(node, facts)


class _Depth:
    """The order: how many decompositions a node is away from ops with code of their own."""

    def __init__(self) -> None:
        self.depth: dict[Node, int] = {}

    def __call__(self, before: Node, after: Node, facts: Facts) -> bool:
        depth = self.depth.get(before, 0) + 1
        stack, seen = [after], {after, *before.inputs}
        while stack:
            n = stack.pop()
            self.depth[n] = max(self.depth.get(n, 0), depth)
            for i in n.inputs:
                if i not in seen:
                    seen.add(i)
                    stack.append(i)
        return depth <= MAX_DEPTH


@dataclass(frozen=True)
class Decompose(Pass):
    """Leaves only ops that code can be generated for; with `attention`, attention is taken apart too."""

    attention: bool = True

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    ensures: ClassVar[frozenset[str]] = frozenset({"decomposed"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph in ops that have code of their own."""
        return apply_rules(graph, [build if self.attention else build_all_but_attention], ctx, _Depth())
