"""Matrix products and convolutions of bf16 numbers, added up in f32; everything else stays in f32.

    contract(a, b) -> contract_f32(cast{bf16}(a), cast{bf16}(b))

It runs where every contraction has its one form, and so finds all of them: of a linear layer, a convolution, attention,
and of their gradients. What that leaves in f32 is what mixed precision leaves in f32 (Micikevicius et al. 2018, "Mixed
Precision Training"): parameters, which are the master weights, their gradients and the optimiser; losses, softmax, norms
and all sums. bf16 has the exponents of f32, so that no loss is scaled (Kalamkar et al. 2019, "A Study of BFLOAT16").

A cast is a node like any other: a weight that several contractions read, in the forward and the backward pass, is cast
once a step, and in inference once per set of weights; an activation that only contractions read is stored in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.contraction import Contraction
from ..ir.dtypes import bf16, f32
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract
from ..ir.op import Trait, make
from .bodies import map_bodies
from .contract import Context, Pass
from .facts import Facts
from .labels import finish


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Rounds the operands of f32 contractions to bf16.

    min_flops   contractions of less arithmetic stay in f32: casting costs more than it saves
    """

    kind: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    min_flops: int = 0

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with contractions of bf16; counts them in `ctx.notes`."""
        count = 0

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
            nonlocal count
            new = node.replace(inputs)
            spec = self._chosen(new, ctx.facts)
            if spec is None or not ctx.spend("mixed_precision", node):
                return new
            count += 1
            return make("contract_f32", *(make("cast", i, dtype=bf16) for i in inputs), spec=spec)

        made = graph.map_nodes(rule)
        result = finish(graph, made.outputs, dict(made.labels))
        ctx.notes[self.name] = int(str(ctx.notes.get(self.name, 0))) + count
        return result

    def reference(self, graph: Graph, ctx: Context) -> Graph:
        """The graph in f32 throughout, bodies of loops too, with operands that were rounded to bf16 and back."""
        graph = map_bodies(graph, lambda body, _: self.reference(body, ctx))

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.replace(inputs)
            if self._chosen(new, ctx.facts) is None:
                return new
            return new.replace(tuple(make("cast", make("cast", i, dtype=bf16), dtype=f32) for i in inputs))

        made = graph.map_nodes(rule)
        return finish(graph, made.outputs, dict(made.labels))

    def _chosen(self, node: Node, facts: Facts) -> Contraction | None:
        """The contraction that a node is, if it is one of f32 and large enough."""
        form = facts.lowering(node) if node.op.has(Trait.CONTRACTION) else None
        if not isinstance(form, Contract) or any(i.dtype is not f32 for i in node.inputs):
            return None
        return form.spec if not self.min_flops or form.spec.flops >= self.min_flops else None
