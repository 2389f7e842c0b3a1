"""What the tests of passes on scans share: loops built node by node."""

from __future__ import annotations

from typing import Any

from tensorwright.ir.build import input_node
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import Trait, make
from tensorwright.ir.types import tensor
from tensorwright.passes.bodies import all_graphs


def f32(name: str, *shape: Any, dtype: str = "f32", role: str = "data") -> Node:
    return input_node(name, tensor(dtype, shape), role)


def body(*shapes: tuple[Any, ...]) -> list[Node]:
    """The inputs of a body."""
    return [f32(f"p{k}", *s) for k, s in enumerate(shapes)]


def scan(graph: Graph, *operands: Node, length: Any, carries: int, sequences: int, **attrs: Any) -> Node:
    return make("scan", *operands, body=graph, length=length, carries=carries, sequences=sequences, **attrs)


def loops(graph: Graph) -> list[Node]:
    """The loops and branches of a graph and of all bodies in it."""
    return [n for g in all_graphs(graph) for n in g.nodes() if n.op.has(Trait.CONTROL)]


def graph_of(*results: Node) -> Graph:
    """The graph of these results, whose inputs are those that they need."""
    return Graph(tuple(n for n in Graph((), results).nodes() if n.attrs.get("role")), results)
