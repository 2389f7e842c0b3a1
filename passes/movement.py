"""Rewrite rules of data movement, for `simplify`: an affine read of an affine read is one affine read.

A movement (transpose, slice, broadcast, reshape by dimensions of size 1) is out[i] = x[f(i)] with f affine, so two of them
are x[g(f(i))], for which the simplest op is made again: x itself, a reshape, a transpose, a broadcast, a slice.
"""

from __future__ import annotations

from typing import Final

from ..ir.dims import Dim
from ..ir.graph import Node
from ..ir.lowering import Reduce, View
from ..ir.op import Trait, make
from .facts import Facts, IndexMap, compose
from .rewrite import Miss, Outcome, rule, rule_on


def synthesise(x: Node, index: IndexMap, shape: tuple[Dim, ...]) -> Node | None:
    """The simplest movement with out[i] = x[index(i)] and this shape; None where a single plain one does not do."""
    used = [(d, t) for d, t in enumerate(index) if x.shape[d] != 1]
    if any(t.axis is None for _, t in used):
        return _slice(x, index, shape)
    axes = [t.axis for _, t in used if t.axis is not None]
    if len(set(axes)) != len(axes):
        return None
    whole = all(t.coefficient == 1 and t.constant == 0 and shape[t.axis] == x.shape[d] for d, t in used if t.axis is not None)
    if not whole:
        return _slice(x, index, shape)
    if axes == sorted(axes):
        return _broadcast(x, {t.axis: x.shape[d] for d, t in used if t.axis is not None}, shape)
    rest = [a for a in range(len(shape)) if a not in axes]
    if len(shape) != len(x.shape) or any(shape[a] != 1 for a in rest):
        return None
    source = [t.axis if x.shape[d] != 1 and t.axis is not None else rest.pop(0) for d, t in enumerate(index)]
    return make("transpose", x, perm=tuple(source.index(a) for a in range(len(shape))))


def _broadcast(x: Node, sizes: dict[int, Dim], shape: tuple[Dim, ...]) -> Node:
    aligned = tuple(sizes.get(a, 1) for a in range(len(shape)))
    if aligned == shape:
        return x if x.shape == shape else make("reshape", x, shape=shape)
    lead = len(shape) - len(x.shape)
    if lead < 0 or (1,) * lead + x.shape != aligned:
        first = next((k for k, n in enumerate(aligned) if n != 1), len(aligned))
        x = make("reshape", x, shape=aligned[first:])
    return make("broadcast_to", x, shape=shape)


def _slice(x: Node, index: IndexMap, shape: tuple[Dim, ...]) -> Node | None:
    if len(shape) != len(x.shape):
        return None
    starts, stops, steps = [], [], []
    for d, t in enumerate(index):
        n = shape[d]
        if t.axis not in (d, None) or not isinstance(n, int) or not isinstance(x.shape[d], int):
            return None
        if t.axis is None and n != 1:
            return None
        if t.axis is not None and t.coefficient < 1:
            return None
        starts.append(t.constant)
        steps.append(t.coefficient if t.axis is not None else 1)
        stops.append(t.constant + (n - 1) * steps[-1] + 1)
    return make("slice", x, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))


@rule_on("movement")
def no_movement(node: Node, facts: Facts) -> Outcome:
    """A movement that moves nothing -> x; one that only adds, drops or exchanges dimensions of size 1 -> reshape."""
    read = facts.read(node) if node.inputs else None
    if read is None:
        return Miss("not an affine movement", node)
    x = node.inputs[read.operand]
    new = synthesise(x, read.index, node.shape)
    if new is x:
        return x
    if new is None or facts.kind(new) != "view" or facts.kind(node) == "view":
        return Miss("it moves data", node)
    return new


@rule_on("movement")
def movement_of_movement(node: Node, facts: Facts) -> Outcome:
    """f(g(... x)) -> h(x) for affine movements f, g, ..., where h is cheaper: one movement, or a broadcast of a reshape."""
    read = facts.read(node) if node.inputs else None
    if read is None:
        return Miss("not an affine movement", node)
    x, index, chain = node.inputs[read.operand], read.index, [node]
    found: list[tuple[Node, IndexMap, int]] = []
    while x.inputs and (inner := facts.read(x)) is not None and len(chain) < 8:
        chain.append(x)
        index, x = compose(index, inner.index), x.inputs[inner.operand]
        found.append((x, index, sum(_effort(n, facts) for n in chain)))
    if not found:
        return Miss("the operand is not an affine movement", x)
    for source, whole, effort in reversed(found):
        new = synthesise(source, whole, node.shape)
        if new is not None and sum(_effort(n, facts) for n in _down(new, source)) < effort:
            return new
    return Miss("the composition takes as much", node)


def _effort(node: Node, facts: Facts) -> int:
    return 1 if facts.kind(node) == "view" else 2


def _down(node: Node, source: Node) -> list[Node]:
    """The movements from a node down to what they read."""
    chain: list[Node] = []
    while node is not source:
        chain.append(node)
        node = node.inputs[0]
    return chain


def _reshapes(node: Node, facts: Facts) -> bool:
    return bool(node.inputs) and isinstance(facts.lowering(node), View) and not node.op.has(Trait.BARRIER)


@rule_on("movement")
def reshape_of_reshape(node: Node, facts: Facts) -> Outcome:
    """reshape(reshape(x)) -> reshape(x), or x if it has the shape."""
    if not _reshapes(node, facts):
        return Miss("not a reshape", node)
    inner = node.inputs[0]
    if inner.shape == node.shape:
        return inner
    if not _reshapes(inner, facts):
        return Miss("the operand is not a reshape", inner)
    x = inner.inputs[0]
    return x if x.shape == node.shape else make("reshape", x, shape=node.shape)


@rule_on("movement")
def movement_of_scalar(node: Node, facts: Facts) -> Outcome:
    """Any movement of a broadcast scalar constant -> the scalar, broadcast to the new shape."""
    if not node.inputs or not (_reshapes(node, facts) or facts.read(node) is not None):
        return Miss("not a movement", node)
    scalar = facts.uniform(node)
    if scalar is None:
        return Miss("its elements are not known to be one constant", node)
    if node.inputs[0] is scalar:
        return Miss("it moves the scalar itself", node)
    new = scalar if not node.shape else make("broadcast_to", scalar, shape=node.shape)
    return Miss("it is that broadcast", node) if new is node else new


@rule
def broadcast_last(node: Node, facts: Facts) -> Outcome:
    """f(broadcast(x), broadcast(y), c) -> broadcast(f(x, y, c)) for an elementwise f, x and y of one shape, constants c."""
    if not node.inputs or not facts.elementwise(node):
        return Miss("not elementwise", node)
    source: Node | None = None
    index: IndexMap | None = None
    for i in node.inputs:
        if facts.uniform(i) is not None:
            continue
        read = facts.read(i)
        if read is None or not facts.replicates(i) or any(t.coefficient != 1 or t.constant for t in read.index):
            return Miss("an operand is no broadcast", i)
        x = i.inputs[read.operand]
        if source is None:
            source, index = x, read.index
        elif x.shape != source.shape or read.index != index:
            return Miss("the operands are broadcast in different ways", i)
    if source is None:
        return Miss("all operands are constants", node)
    operands = []
    for i in node.inputs:
        scalar = facts.uniform(i)
        if scalar is None:
            operands.append(i.inputs[0])
        else:
            operands.append(make("broadcast_to", scalar, shape=source.shape) if source.shape else scalar)
    return make("broadcast_to", node.replace(tuple(operands)), shape=node.shape)


@rule
def reshape_last(node: Node, facts: Facts) -> Outcome:
    """f(reshape(x), reshape(y), c) -> reshape(f(x, y, c)) for an elementwise f, x and y of one shape, constants c."""
    if not node.inputs or not facts.elementwise(node):
        return Miss("not elementwise", node)
    shape: tuple[Dim, ...] | None = None
    for i in node.inputs:
        if facts.uniform(i) is not None:
            continue
        if not _reshapes(i, facts):
            return Miss("an operand is no reshape", i)
        if shape is not None and i.inputs[0].shape != shape:
            return Miss("the operands had different shapes", i)
        shape = i.inputs[0].shape
    if shape is None:
        return Miss("all operands are constants", node)
    operands = []
    for i in node.inputs:
        scalar = facts.uniform(i)
        if scalar is None:
            operands.append(i.inputs[0])
        else:
            operands.append(make("broadcast_to", scalar, shape=shape) if shape else scalar)
    return make("reshape", node.replace(tuple(operands)), shape=node.shape)


@rule_on("reduce")
def reduce_single(node: Node, facts: Facts) -> Outcome:
    """max, min or product over dimensions of size 1 -> reshape (a sum is not: 0 + -0.0 = 0.0)."""
    low = facts.lowering(node) if node.inputs else None
    if not isinstance(low, Reduce) or low.axes is None or low.kind not in ("max", "min", "prod"):
        return Miss("not such a reduction", node)
    x = node.inputs[0]
    if any(x.shape[a] != 1 for a in low.axes) or x.dtype is not node.dtype:
        return Miss("it reduces more than one element", node)
    return x if x.shape == node.shape else make("reshape", x, shape=node.shape)


RULES: Final = (
    movement_of_scalar,
    no_movement,
    reshape_of_reshape,
    movement_of_movement,
    broadcast_last,
    reshape_last,
    reduce_single,
)
