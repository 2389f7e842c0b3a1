"""Nested containers of leaves: dicts, lists, tuples (named ones too); None holds no leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Structure:
    """The shape of a tree. `kind` is dict, list, tuple, a named tuple's class, None (no leaf) or 'leaf'."""

    kind: Any
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def leaves(self) -> int:
        return 1 if self.kind == "leaf" else sum(c.leaves for c in self.children)


_LEAF = Structure("leaf")


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves from left to right (dicts in insertion order), and what `unflatten` needs to put them back."""
    leaves: list[Any] = []

    def walk(value: Any) -> Structure:
        if value is None:
            return Structure(None)
        if isinstance(value, Mapping):
            return Structure(dict, tuple(value), tuple(walk(v) for v in value.values()))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return Structure(type(value), (), tuple(walk(v) for v in value))
        if isinstance(value, (list, tuple)):
            return Structure(list if isinstance(value, list) else tuple, (), tuple(walk(v) for v in value))
        leaves.append(value)
        return _LEAF

    structure = walk(tree)
    return leaves, structure


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Any:
    """The tree of that structure with these leaves."""
    source = iter(leaves)

    def build(s: Structure) -> Any:
        if s.kind == "leaf":
            return next(source)
        if s.kind is None:
            return None
        parts = [build(c) for c in s.children]
        if s.kind is dict:
            return dict(zip(s.keys, parts, strict=True))
        return s.kind(*parts) if hasattr(s.kind, "_fields") else s.kind(parts)

    return build(structure)


def paths(structure: Structure, prefix: str = "") -> Iterator[str]:
    """A dotted name for each leaf: keys and positions, after the prefix."""
    if structure.kind == "leaf":
        yield prefix
    names = structure.keys or getattr(structure.kind, "_fields", None) or range(len(structure.children))
    for key, child in zip(names, structure.children, strict=True):
        yield from paths(child, f"{prefix}.{key}" if prefix else str(key))


def map_leaves(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree with fn(leaf, leaves of the others...) in place of each leaf; the others have the same structure."""
    leaves, structure = flatten(tree)
    rest = [flatten(o)[0] for o in others]
    return unflatten(structure, (fn(*group) for group in zip(leaves, *rest, strict=True)))
