"""Algebra and data movement that make the graph smaller without changing a bit: see algebra.py and movement.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Graph
from . import algebra, movement
from .contract import Context, Pass
from .rewrite import apply_rules

RULES = (*movement.RULES, *algebra.RULES)


@dataclass(frozen=True)
class Simplify(Pass):
    """Applies every rule until none applies."""

    kind: ClassVar[str] = "exact"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph in normal form."""
        return apply_rules(graph, RULES, ctx)
