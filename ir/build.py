"""Short ways to make the structural nodes: inputs, constants, parts of tuples, fused regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import AttributeValueError
from .graph import Graph, Literal, Node
from .op import make
from .types import TensorType, TupleType


def input_node(name: str, type: TensorType, role: str = "data") -> Node:
    """An argument of a graph; `role` is 'data', 'parameter', 'state' or 'prepared'."""
    return make("input", name=name, role=role, dtype=type.dtype, shape=type.shape)


def constant(value: Any, dtype: object | None = None) -> Node:
    """A constant from a Literal, or from anything numpy makes an array of; `dtype` converts it."""
    if isinstance(value, Literal):
        if dtype is not None:
            raise AttributeValueError("constant: a Literal has its dtype already; give no other")
        return make("constant", value=value)
    return make("constant", value=Literal(value, dtype))


def full(value: float | int | bool, type: TensorType) -> Node:
    """A tensor of `type` with `value` in every element: a 0-d constant, broadcast where the type has dimensions."""
    scalar = constant(value, type.dtype)
    return make("broadcast_to", scalar, shape=type.shape) if type.shape else scalar


def get(node: Node, index: int) -> Node:
    """Output number `index` of a node with several outputs."""
    return make("get", node, index=index)


def outputs(node: Node) -> tuple[Node, ...]:
    """The outputs of a node as nodes: itself if it has one, its `get` nodes if it has several."""
    if isinstance(node.type, TupleType):
        return tuple(get(node, i) for i in range(len(node.type.items)))
    return (node,)


def fused(body: Graph, operands: Sequence[Node], kind: str) -> Node:
    """A region that becomes one kernel: `body`, whose inputs p0, p1, ... stand for the operands.

    `kind` is 'map', 'rows', 'reduce' or 'contraction'; docs/ir.md says what each may hold.
    """
    return make("fused", *operands, body=body, kind=kind)
