"""Brings every contraction (matrix product, convolution, their gradients) into the one generic form `contract{spec}`.

    matmul(a, b)               -> contract(a, b; C[m, n] = sum_k A[m, k] B[k, n])
    contract(transpose(a), b)  -> contract(a, b)   with the dimensions of A's index map permuted: no data moves
    transpose(contract(a, b))  -> contract(a, b)   with those of C permuted, where nothing else uses the product
    contract(reshape(transpose(a)), b), transpose(reshape(contract(a, b)))   likewise: an axis splits as the reshape does

An axis is 'm' where only A and C have it, 'n' where only B and C do, 'batch' in all three, 'k' where C does not have it.
If the last dimension of C runs along an m axis alone, A and B change places, so that vectors run along n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import Dim, as_int
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract
from ..ir.op import Trait, make
from .contract import Context, Pass
from .facts import Facts, Read, derived
from .rewrite import Miss, Outcome, Rule, apply_rules, rule, rule_on, use_counts

MOST_STEPS: Final = 16  # elementwise ops between a product and what is asked about it
SHORT: Final = 16  # elements: a last dimension of fewer, such as the taps of a kernel, gives vectors no place


def spec_of(node: Node, facts: Facts) -> Contraction | None:
    """The contraction that a node is, or None."""
    low = facts.lowering(node) if node.inputs else None
    return low.spec if isinstance(low, Contract) else None


def generic(node: Node, a: Node, b: Node, spec: Contraction) -> Node:
    """The node of a spec in place of `node`: of its own op if that is generic, else a `contract`."""
    return make(node.op if "spec" in node.attrs else "contract", a, b, spec=spec)


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


def _innermost(spec: Contraction) -> int:
    """Extent of the last dimension of C that is longer than 1; symbolic ones count as long."""
    extents = [spec.axis(m.terms[0][0]).extent for m in spec.c]
    return next((n if isinstance(n, int) else SHORT for n in reversed(extents) if n != 1), SHORT)


@rule_on("contract")
def to_contract(node: Node, facts: Facts) -> Outcome:
    """op(a, b) -> contract(a, b; spec), spec from the record's lowering, the kinds of its axes normalised."""
    spec = spec_of(node, facts)
    if spec is None:
        return Miss("not a contraction", node)
    if spec.panel:
        return Miss("already packed", node)
    new = generic(node, node.inputs[0], node.inputs[1], normalised(spec))
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
    return generic(node, a, b, normalised(new))


@rule_on("contract")
def move_a(node: Node, facts: Facts) -> Outcome:
    """contract(move(a), b) -> contract(a, b) with A's index map composed with the movement (transpose, slice, broadcast)."""
    return _fold_operand(node, facts, 0)


@rule_on("contract")
def move_b(node: Node, facts: Facts) -> Outcome:
    """contract(a, move(b)) -> contract(a, b) with B's index map composed with the movement."""
    return _fold_operand(node, facts, 1)


def segments(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest runs of dimensions of two shapes that hold the same elements; None for symbolic or empty shapes."""
    if not all(isinstance(d, int) and d > 0 for d in (*old, *new)):
        return None
    result: list[tuple[list[int], list[int]]] = []
    i = k = 0
    while i < len(old) or k < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while True:
            if a <= b and i < len(old) and (a < b or not left):
                a, i = a * as_int(old[i]), i + 1
                left.append(i - 1)
            elif k < len(new) and (b < a or not right):
                b, k = b * as_int(new[k]), k + 1
                right.append(k - 1)
            else:
                break
        result.append((left, right))
    return result


def reshaped(spec: Contraction, which: str, old: Sequence[Dim], new: Sequence[Dim]) -> Contraction | None:
    """The spec with operand `which` ('a', 'b' or 'c') under another shape: an axis that is one dimension splits where the
    dimension does, dimensions that merge have one index. None where an index that is no plain axis would have to split, or a
    dimension of C would not be one axis."""
    runs = segments(old, new)
    if runs is None:
        return None
    index = getattr(spec, which)
    split: dict[str, list[Axis]] = {}
    result: list[Affine | None] = [None] * len(new)
    for left, right in runs:
        if len(left) == 1 and len(right) == 1:
            result[right[0]] = index[left[0]]
        elif len(right) <= 1:
            total = Affine(())
            for d in left:  # row-major
                total = _plus(_times(total, as_int(old[d])), index[d])
            if right:
                result[right[0]] = total
        elif not left:
            for d in right:
                result[d] = Affine(())
        elif len(left) == 1:
            terms, extent = index[left[0]].terms, old[left[0]]
            if index[left[0]].constant or len(terms) != 1 or terms[0][1] != 1 or spec.axis(terms[0][0]).extent != extent:
                return None
            axis = spec.axis(terms[0][0])
            if axis.name in split:
                return None
            split[axis.name] = [Axis(f"{axis.name}_{k}", new[d], axis.kind) for k, d in enumerate(right)]
            for part, d in zip(split[axis.name], right, strict=True):
                result[d] = Affine(((part.name, 1),))
        else:
            return None
    taken = {x.name for x in spec.axes}
    if any(part.name in taken for parts in split.values() for part in parts):
        return None
    axes = tuple(part for x in spec.axes for part in split.get(x.name, [x]))
    maps = {w: tuple(_divided(m, split) for m in getattr(spec, w)) for w in "abc"}
    maps[which] = tuple(_divided(m, split) for m in result if m is not None)
    plain = all(len(m.terms) == 1 and m.terms[0][1] == 1 and m.constant == 0 for m in maps["c"])
    if len(maps[which]) != len(new) or not plain:
        return None  # a dimension of C is one axis
    return replace(spec, axes=axes, a=maps["a"], b=maps["b"], c=maps["c"])


def _plus(x: Affine, y: Affine) -> Affine:
    total = dict(x.terms)
    for name, c in y.terms:
        total[name] = total.get(name, 0) + c
    return Affine(tuple((n, c) for n, c in total.items() if c), x.constant + y.constant)


def _times(x: Affine, factor: int) -> Affine:
    return Affine(tuple((n, c * factor) for n, c in x.terms), x.constant * factor)


def _divided(x: Affine, split: Mapping[str, list[Axis]]) -> Affine:
    """The index with each split axis as the row-major position of its parts."""
    terms: list[tuple[str, int]] = []
    for name, c in x.terms:
        step = c
        parts: list[tuple[str, int]] = []
        for part in reversed(split.get(name, [])):
            parts.append((part.name, step))
            step *= as_int(part.extent)
        terms += reversed(parts) if parts else [(name, c)]
    return Affine(tuple(terms), x.constant)


def _through_reshape(node: Node, facts: Facts, which: int) -> Outcome:
    spec = spec_of(node, facts)
    if spec is None or "spec" not in node.attrs or (which and spec.panel):
        return Miss("not an unpacked contract node", node)
    operand = node.inputs[which]
    if facts.kind(operand) != "view" or operand.op.has(Trait.BARRIER):
        return Miss("the operand is no reshape", operand)
    moved_before = operand.inputs[0]
    read = facts.read(moved_before)
    plain = read is not None and all(i.coefficient >= 0 for i in read.index) and not facts.replicates(moved_before)
    if facts.kind(moved_before) == "view" or not plain:
        return Miss("the reshape is not of a transpose or slice", operand)
    new = reshaped(spec, "ab"[which], operand.shape, moved_before.shape)
    if new is None:
        return Miss("an index that is no plain axis would have to split", operand)
    a, b = (node.inputs[0], moved_before) if which else (moved_before, node.inputs[1])
    return generic(node, a, b, normalised(new))


@rule_on("contract")
def split_a(node: Node, facts: Facts) -> Outcome:
    """contract(reshape(move(a)), b) -> contract(move(a), b), move a transpose or slice, with A's index under the other shape."""
    return _through_reshape(node, facts, 0)


@rule_on("contract")
def split_b(node: Node, facts: Facts) -> Outcome:
    """contract(a, reshape(move(b))) -> contract(a, move(b)), move a transpose or slice, with B's index under the other shape."""
    return _through_reshape(node, facts, 1)


def _about_weights(fixed: Mapping[Node, bool], uses: Counter[Node]) -> tuple[Rule, Rule]:
    """The rules that ask what comes from weights (`fixed`: such a B stays B, to be packed) and who uses a product."""

    @rule_on("contract")
    def vectors_along_n(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(b, a) where the last dimension of C runs along an m axis alone (a * b = b * a)."""
        spec = spec_of(node, facts)
        if spec is None or "spec" not in node.attrs or spec.panel:
            return Miss("not a contract node, or packed", node)
        if not _lanes_along_m(spec):
            return Miss("the last dimension of C runs along n", node)
        if fixed.get(node.inputs[1]):
            return Miss("B comes from weights and will be packed", node.inputs[1])
        return generic(node, node.inputs[1], node.inputs[0], normalised(swapped(spec)))

    @rule_on("movement")
    def move_c(node: Node, facts: Facts) -> Outcome:
        """transpose(contract(a, b)) -> contract(a, b) with C permuted, also with a reshape between; if nothing else uses it."""
        perm = permutation(node, facts) if node.inputs and facts.kind(node) != "view" else None
        if perm is None:
            return Miss("not a transpose", node)
        inner = view = node.inputs[0]
        if facts.kind(view) == "view" and not view.op.has(Trait.BARRIER):
            inner = view.inputs[0]
        spec = spec_of(inner, facts)
        if spec is None or "spec" not in inner.attrs or spec.panel:
            return Miss("not a product that is moved", inner)
        if uses[inner] != 1 or uses[view] != 1:
            return Miss("the product is used elsewhere too", inner)
        if inner is not view and (split := reshaped(spec, "c", inner.shape, view.shape)) is not None:
            spec = split
        elif inner is not view:
            return Miss("an index that is no plain axis would have to split", view)
        new = normalised(replace(spec, c=tuple(spec.c[p] for p in perm)))
        a, b = inner.inputs
        if _innermost(new) < SHORT <= _innermost(replace(new, c=spec.c)):
            return Miss("vectors of results would be scattered: better copied afterwards", node)
        if _lanes_along_m(new) and fixed.get(b):
            return Miss("vectors would run along m, with weights in B", inner)
        return generic(inner, a, b, new)

    return vectors_along_n, move_c


def _grouped(node: Node, facts: Facts) -> bool:
    """Whether a node is a product whose last dimensions are its groups and the columns of one, or elementwise work on such."""
    for _ in range(MOST_STEPS):
        spec = spec_of(node, facts)
        if spec is not None:
            kinds = [spec.axis(m.terms[0][0]).kind for m in spec.c[-2:] if m.terms]
            return kinds == ["batch", "n"]
        if not node.inputs or not facts.elementwise(node):
            return False
        deeper = (i for i in node.inputs if i.inputs and (spec_of(i, facts) is not None or facts.elementwise(i)))
        node = next(deeper, node.inputs[0])
    return False


def _merges(node: Node, facts: Facts) -> bool:
    """Whether it is a reshape that makes one dimension of the last two."""
    if not node.inputs or facts.kind(node) != "view" or node.op.has(Trait.BARRIER):
        return False
    old, new = node.inputs[0].shape, node.shape
    return len(old) == len(new) + 1 > 2 and old[:-2] == new[:-1] and old[-2] != 1 != old[-1]


def _apart(node: Node, shape: tuple[Dim, ...], facts: Facts) -> Node | None:
    """An operand of elementwise work whose last dimension becomes two; None where it is broadcast in another way."""
    scalar = facts.uniform(node)
    if scalar is not None:
        return make("broadcast_to", scalar, shape=shape)
    if _merges(node, facts) and node.inputs[0].shape == shape:
        return node.inputs[0]
    if not facts.replicates(node):
        return make("reshape", node, shape=shape)
    read = facts.read(node)
    x = node.inputs[read.operand] if read is not None else node
    if read is None or x.tensor.size != node.shape[-1]:
        return None
    last = len(node.shape) - 1
    if any(n != 1 and (t.axis, t.coefficient, t.constant) != (last, 1, 0) for n, t in zip(x.shape, read.index, strict=True)):
        return None
    return make("broadcast_to", make("reshape", x, shape=shape[-2:]), shape=shape)


@rule
def groups_apart(node: Node, facts: Facts) -> Outcome:
    """f(merge(contract(a, b)), y) -> merge(f(contract(a, b), split(y))) for an elementwise f, where the result of a product in
    groups has its groups merged with the columns of one: the work on it may join the product's kernel."""
    if not node.inputs or not facts.elementwise(node) or len(node.shape) < 2:
        return Miss("not elementwise", node)
    merged = next((i for i in node.inputs if _merges(i, facts) and _grouped(i.inputs[0], facts)), None)
    if merged is None:
        return Miss("no operand is a product whose groups are merged", node)
    shape = merged.inputs[0].shape
    operands = [_apart(i, shape, facts) for i in node.inputs]
    apart = [i for i in operands if i is not None]
    if len(apart) != len(operands):
        return Miss("an operand is broadcast in a way that does not split", node)
    return make("reshape", node.replace(tuple(apart)), shape=node.shape)


class _Progress:
    """The order: fewer non-generic contractions, then fewer movements next to contractions, then vectors along n; reshapes
    nearer to the outputs."""

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
                while i.inputs and (facts.read(i) is not None or facts.kind(i) == "view"):
                    depth, i = depth + 1, i.inputs[0]
            return (0, depth, kinds + _lanes_along_m(spec))

        if facts.elementwise(before):
            return _merges(after, facts) and after.inputs[0].op is before.op
        return measure(after) < measure(before)


def merged_groups_apart(graph: Graph, ctx: Context) -> Graph:
    """The graph after `groups_apart`."""
    groups = any(len(n.shape) > 2 and _grouped(n, ctx.facts) for n in graph.nodes() if spec_of(n, ctx.facts) is not None)
    return apply_rules(graph, (groups_apart,), ctx, _Progress()) if groups else graph


@dataclass(frozen=True)
class ContractForm(Pass):
    """One form for all contractions, with transposes folded into index maps."""

    kind: ClassVar[str] = "equivalent"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with `contract` nodes in place of every op that lowers to a contraction."""
        fixed = derived(graph.nodes(), ctx.weights(graph))
        operands = (to_contract, move_a, move_b, split_a, split_b)
        graph = apply_rules(graph, operands, ctx, _Progress())
        uses = use_counts(graph)
        products = _about_weights(fixed, uses)
        graph = apply_rules(graph, (*products, *operands), ctx, _Progress(), uses)
        return merged_groups_apart(graph, ctx)
