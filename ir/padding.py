"""Padding with a constant, read from a node's attributes: which elements of its result are its operand's."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Node


@dataclass(frozen=True)
class Padding:
    """Elements before and behind an operand in each dimension, and what they are."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    value: float


def padding_of(node: Node) -> Padding | None:
    """The padding that a node is, if its sizes are known and it neither cuts elements off nor puts any between two."""
    attrs = node.attrs
    if attrs.keys() != {"low", "high", "interior", "value"} or any(attrs["interior"]):
        return None
    low, high = tuple(attrs["low"]), tuple(attrs["high"])
    if not all(isinstance(n, int) and n >= 0 for n in (*low, *high)) or not all(isinstance(d, int) for d in node.shape):
        return None
    return Padding(low, high, attrs["value"])
