"""Brings every contraction (matrix product, convolution, their gradients) into the one generic form `contract{spec}`.

    matmul(a, b)               -> contract(a, b; C[m, n] = sum_k A[m, k] B[k, n])
    contract(transpose(a), b)  -> contract(a, b)   with the dimensions of A's index map permuted: no data moves
    transpose(contract(a, b))  -> contract(a, b)   with those of C permuted, where nothing else uses the product

An axis is 'm' where only A and C have it, 'n' where only B and C do, 'batch' in all three, 'k' where C does not have it.
If the last dimension of C runs along an m axis alone, A and B change places, so that vectors run along n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract
from ..ir.op import make
from .contract import Context, Pass
from .facts import Facts, Read
from .rewrite import Miss, Outcome, Rule, apply_rules, rule, use_counts


def spec_of(node: Node, facts: Facts) -> Contraction | None:
    """The contraction that a node is, or None."""
    low = facts.lowering(node) if node.inputs else None
    return low.spec if isinstance(low, Contract) else None


def generic(a: Node, b: Node, spec: Contraction) -> Node:
    """The `contract` node of a spec."""
    return make("contract", a, b, spec=spec)


def _axes(index: Sequence[Affine]) -> set[str]:
    return {name for a in index for name, _ in a.terms}


def normalised(spec: Contraction) -> Contraction:
    """The spec with the kind of each axis as its occurrences say (see the module)."""
    a, b, c = _axes(spec.a), _axes(spec.b), _axes(spec.c)
    axes: list[Axis] = []
    for x in spec.axes:
        if x.name not in c:
            kind = "k"
        elif x.name in a:
            kind = "batch" if x.name in b else "m"
        else:
            kind = "n" if x.name in b else x.kind
        axes.append(x if kind == x.kind else Axis(x.name, x.extent, kind))
    return replace(spec, axes=tuple(axes))


def swapped(spec: Contraction) -> Contraction:
    """The spec with A and B exchanged."""
    other = {"m": "n", "n": "m"}
    return replace(spec, axes=tuple(Axis(x.name, x.extent, other.get(x.kind, x.kind)) for x in spec.axes), a=spec.b, b=spec.a)


def _lanes_along_m(spec: Contraction) -> bool:
    if not spec.c or not spec.c[-1].terms:
        return False
    kinds = {spec.axis(name).kind for name, _ in spec.c[-1].terms}
    return kinds == {"m"} and bool(spec.of_kind("n"))


@rule
def to_contract(node: Node, facts: Facts) -> Outcome:
    """op(a, b) -> contract(a, b; spec), spec from the record's lowering, the kinds of its axes normalised."""
    spec = spec_of(node, facts)
    if spec is None:
        return Miss("not a contraction", node)
    if spec.panel:
        return Miss("already packed", node)
    new = generic(node.inputs[0], node.inputs[1], normalised(spec))
    return Miss("already in the generic form", node) if new is node else new


def permutation(node: Node, facts: Facts) -> tuple[int, ...] | None:
    """perm where node = transpose(x, perm); None where it is no such movement."""
    read = facts.read(node) if node.inputs else None
    if read is None:
        return None
    x, rank = node.inputs[read.operand], len(node.shape)
    axes = [t.axis for t in read.index]
    free = [k for k in range(rank) if k not in axes]
    if len(axes) != rank or any(t.coefficient != 1 or t.constant for t in read.index if t.axis is not None):
        return None
    source = [free.pop(0) if k is None else k for k in axes if k is not None or free]
    if sorted(source) != list(range(rank)) or any(x.shape[d] != node.shape[k] for d, k in enumerate(source)):
        return None
    return tuple(source.index(k) for k in range(rank))


def moved(index: tuple[Affine, ...], read: Read) -> tuple[Affine, ...] | None:
    """The index map of the operand under a movement: x[read(index)]; None where that is not plain (negative steps)."""
    result: list[Affine] = []
    for t in read.index:
        if t.coefficient < 0:
            return None
        if t.axis is None:
            result.append(Affine((), t.constant))
            continue
        outer = index[t.axis]
        terms = tuple((name, c * t.coefficient) for name, c in outer.terms)
        result.append(Affine(terms, outer.constant * t.coefficient + t.constant))
    return tuple(result)


def _fold_operand(node: Node, facts: Facts, which: int) -> Outcome:
    spec = spec_of(node, facts)
    if spec is None or "spec" not in node.attrs:
        return Miss("not a contract node", node)
    operand = node.inputs[which]
    read = facts.read(operand)
    if read is None or (which == 1 and spec.panel):
        return Miss("the operand is not moved data", operand)
    index = moved(spec.b if which else spec.a, read)
    if index is None:
        return Miss("the movement runs backwards", operand)
    new = replace(spec, b=index) if which else replace(spec, a=index)
    names = _axes(new.a) | _axes(new.b)
    if any(x.name not in names for x in spec.axes):
        return Miss("an axis would be left without an operand", operand)
    kept = [x for x in spec.axes if x.kind == "k" and not (x.name in _axes(new.a) and x.name in _axes(new.b))]
    if kept:
        return Miss("a summed axis would be broadcast: better summed before", operand)
    moved_from = operand.inputs[read.operand]
    a, b = (node.inputs[0], moved_from) if which else (moved_from, node.inputs[1])
    return generic(a, b, normalised(new))


@rule
def move_a(node: Node, facts: Facts) -> Outcome:
    """contract(move(a), b) -> contract(a, b) with A's index map composed with the movement (transpose, slice, broadcast)."""
    return _fold_operand(node, facts, 0)


@rule
def move_b(node: Node, facts: Facts) -> Outcome:
    """contract(a, move(b)) -> contract(a, b) with B's index map composed with the movement."""
    return _fold_operand(node, facts, 1)


@rule
def vectors_along_n(node: Node, facts: Facts) -> Outcome:
    """contract(a, b) -> contract(b, a) where the last dimension of C runs along an m axis alone (a * b = b * a)."""
    spec = spec_of(node, facts)
    if spec is None or "spec" not in node.attrs or spec.panel:
        return Miss("not a contract node, or packed", node)
    if not _lanes_along_m(spec):
        return Miss("the last dimension of C runs along n", node)
    return generic(node.inputs[1], node.inputs[0], normalised(swapped(spec)))


def move_c(uses: Counter[Node]) -> Rule:
    """The rule for transposed products, which asks how many users a product has."""

    @rule
    def move_c(node: Node, facts: Facts) -> Outcome:
        """transpose(contract(a, b)) -> contract(a, b) with the dimensions of C permuted; only if nothing else uses it."""
        if not node.inputs:
            return Miss("a leaf", node)
        read = facts.read(node)
        inner = node.inputs[0]
        spec = spec_of(inner, facts) if read is not None else None
        if read is None or spec is None or "spec" not in inner.attrs or spec.panel:
            return Miss("not a moved product", node)
        perm = permutation(node, facts)
        if perm is None:
            return Miss("not a transpose", node)
        if uses[inner] != 1:
            return Miss("the product is used elsewhere too", inner)
        a, b = inner.inputs
        return generic(a, b, normalised(replace(spec, c=tuple(spec.c[p] for p in perm))))

    return move_c


class _Progress:
    """The order: fewer non-generic contractions, then fewer movements next to contractions, then vectors along n."""

    def __call__(self, before: Node, after: Node, facts: Facts) -> bool:
        def measure(node: Node) -> tuple[int, int, int]:
            spec = spec_of(node, facts)
            if spec is None:
                return (2, 0, 0)
            if "spec" not in node.attrs:
                return (1, 0, 0)
            kinds = sum(x != y for x, y in zip(spec.axes, normalised(spec).axes, strict=True))
            depth = 0
            for i in node.inputs:
                while i.inputs and (r := facts.read(i)) is not None:
                    depth, i = depth + 1, i.inputs[r.operand]
            return (0, depth, kinds + _lanes_along_m(spec))

        return measure(after) < measure(before)


@dataclass(frozen=True)
class ContractForm(Pass):
    """One form for all contractions, with transposes folded into index maps."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with `contract` nodes in place of every op that lowers to a contraction."""
        graph = apply_rules(graph, [to_contract, move_a, move_b, vectors_along_n], ctx, _Progress())
        uses = use_counts(graph)
        return apply_rules(graph, [move_c(uses), move_a, move_b, vectors_along_n], ctx, _Progress(), uses)
