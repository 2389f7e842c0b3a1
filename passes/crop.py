"""What nothing reads is not computed: the part of a value that its readers want is found, and products make that part alone.

    pool2(f(conv(x)))   ->   pool2(f(conv'(x)))     conv': one row and column fewer, where windows of 2 leave out the 15th
    f(a @ b)[:, -1]     ->   f(a[:, -1] @ b)

From the outputs to the inputs, each node is wanted in a box, the smallest that holds what its readers read: found from index
maps of contractions and movements, and from the loads of windows. Then nodes are made anew for their boxes. Where a record
cannot be made for a part of its result, all of it is wanted; that a window's can is proved on its lowering, which must be the
same expression.

Pooling that rounds down is the common case, and it adds up: of 32x32 pixels, two 3x3 convolutions with a pooling by 2 behind each
make 28x28 and 12x12, not 30x30 and 13x13. Nothing is done unless a contraction becomes smaller, and what would be cut for no
contraction's sake stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import ClassVar, Final

from ..ir.contraction import Affine, Contraction
from ..ir.dims import as_int
from ..ir.errors import TensorwrightError
from ..ir.expr import Expr, ExprLike, lift, load, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Map, Reduce
from ..ir.op import Trait, make
from ..ir.ops.structural import CONSTANT, INPUT
from ..ir.padding import Padding, padding_of
from ..ir.types import TupleType
from .contract import Context, Pass
from .contract_form import spec_of
from .facts import Facts, Read, Term, index_variables, linear
from .labels import finish
from .movement import synthesise
from .winograd_parts import plain

LEAST: Final = 0.03  # of a contraction's work that is saved, below which it is left as it is

Box = tuple[tuple[int, int], ...]
"""For each dimension, the first element and the end."""


def whole(node: Node) -> Box:
    """All of a value whose sizes are known."""
    return tuple((0, n) for n in node.tensor.static_shape)


def _known(node: Node) -> bool:
    return not isinstance(node.type, TupleType) and all(isinstance(n, int) and n > 0 for n in node.shape)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(end - first for first, end in box)


def _union(a: Box, b: Box) -> Box:
    return tuple((min(p[0], q[0]), max(p[1], q[1])) for p, q in zip(a, b, strict=True))


def _range(index: Affine, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """First and end of what an index runs over."""
    low = high = index.constant
    for name, c in index.terms:
        ends = [c * ranges[name][0], c * (ranges[name][1] - 1)]
        low, high = low + min(ends), high + max(ends)
    return low, high + 1


def _axes(spec: Contraction, box: Box) -> dict[str, tuple[int, int]] | None:
    """What each axis runs over where the result's box is wanted; None where a dimension of the result is no axis."""
    ranges = {a.name: (0, as_int(a.extent)) for a in spec.axes}
    for index, part in zip(spec.c, box, strict=True):
        name = plain(index)
        if name is None:
            if index.terms or index.constant:
                return None
            continue
        ranges[name] = part
    return ranges


def _canonical(e: ExprLike, axes: Mapping[Expr, int], names: Sequence[Expr], shift: int) -> Expr:
    """An index less `shift`, written in one way if it is affine."""
    found = linear(lift(e), axes)
    if found is None:
        return lift(e) - shift
    total: Expr = lift(found[1] - shift)
    for axis, c in sorted(found[0].items()):
        total = total + names[axis] * c
    return total


class _Crop:
    """One graph: what is wanted of each node, and the nodes made for that."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph, self.facts = graph, facts
        self.nodes = tuple(graph.nodes())
        self.boxes: dict[Node, Box] = {}  # of nodes of which a part is wanted
        self.parts: dict[Node, tuple[Box, ...]] = {}  # what such nodes read, and those that read a part of something

    def box(self, node: Node) -> Box:
        return self.boxes.get(node) or whole(node)

    # -- what is read ---------------------------------------------------------------------------------------------------

    def reads(self, node: Node, box: Box) -> tuple[Box, ...] | None:
        """The boxes of the operands from which the box of a node is made; None where that is not known to be a part."""
        op = node.op
        if any(op.has(t) for t in (Trait.BARRIER, Trait.RANDOM, Trait.CONTROL, Trait.STRUCTURAL)):
            return None
        if not all(map(_known, node.inputs)):
            return None
        spec = spec_of(node, self.facts)
        if spec is not None:
            if "spec" not in node.attrs or spec.panel or spec.groups:
                return None
            ranges = _axes(spec, box)
            if ranges is None:
                return None
            return tuple(tuple(_range(i, ranges) for i in indices) for indices in (spec.a, spec.b))
        if self.facts.elementwise(node):
            return (box,) * len(node.inputs)
        read = self.facts.read(node)
        if read is not None:
            return self._moved(node, read, box)
        padding = padding_of(node)
        if padding is not None:
            inside = _inside(padding, whole(node.inputs[0]), box)
            return None if inside is None else (inside,)
        return self._loaded(node, box)

    def _moved(self, node: Node, read: Read, box: Box) -> tuple[Box, ...] | None:
        if len(node.inputs) != 1:
            return None
        found = []
        for t in read.index:
            ends = [t.constant] * 2 if t.axis is None else [t.coefficient * e + t.constant for e in _ends(box[t.axis])]
            found.append((min(ends), max(ends) + 1))
        return (tuple(found),)

    def _loaded(self, node: Node, box: Box) -> tuple[Box, ...] | None:
        """By the loads of a lowering, of which each index is affine; where it is not, that dimension is wanted whole."""
        low = self.facts.lowering(node)
        if not isinstance(low, Map | Reduce):
            return None
        steps = [*low.extents] if isinstance(low, Reduce) else []
        if not all(isinstance(n, int) and n > 0 for n in steps):
            return None
        names = _variables(node, low)
        ranges = [*box, *((0, as_int(n)) for n in steps)]
        axes = {v: k for k, v in enumerate(names)}
        found: dict[int, Box] = {}

        def value(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
            operand, part = node.inputs[k], []
            for e, size in zip(index, operand.tensor.static_shape, strict=True):
                form = linear(lift(e), axes)
                first, end = (0, size) if form is None else _reach(form, ranges)
                part.append((max(0, min(first, size - 1)), min(size, max(end, 1))))
            found[k] = _union(found[k], tuple(part)) if k in found else tuple(part)
            return load(k, list(index), operand.dtype, mask)

        _value(low, names, len(box), value)
        return tuple(found.get(k, whole(i)) for k, i in enumerate(node.inputs))

    # -- a node for a part ------------------------------------------------------------------------------------------------

    def made(self, node: Node, box: Box, parts: Sequence[Box], operands: Sequence[tuple[Node, Box]]) -> Node | None:
        """The node for a box of its result, of operands that cover these boxes of theirs; None where there is none."""
        spec = spec_of(node, self.facts)
        if spec is not None:
            ranges = _axes(spec, box)
            assert ranges is not None
            extents = tuple(replace(a, extent=ranges[a.name][1] - ranges[a.name][0]) for a in spec.axes)
            a, b = (
                tuple(_shifted(i, ranges, first) for i, (first, _) in zip(indices, cover, strict=True))
                for indices, (_, cover) in zip((spec.a, spec.b), operands, strict=True)
            )
            inputs = (operands[0][0], operands[1][0])
            return make(node.op, *inputs, **{**node.attrs, "spec": replace(spec, axes=extents, a=a, b=b)})
        cut = tuple(_part(x, cover, part) for (x, cover), part in zip(operands, parts, strict=True))
        if self.facts.elementwise(node):
            return node.replace(cut)
        read = self.facts.read(node)
        if read is not None:
            index = []
            for t, (first, _) in zip(read.index, parts[0], strict=True):
                start = 0 if t.axis is None else t.coefficient * box[t.axis][0]
                index.append(Term(t.axis, t.coefficient, t.constant + start - first))
            return synthesise(cut[0], tuple(index), _sizes(box))
        padding = padding_of(node)
        if padding is not None:
            return _padded(node, padding, cut[0], box, parts[0])
        try:
            new = node.replace(cut)
        except TensorwrightError:  # its attributes do not fit operands of this size
            return None
        return new if self._alike(node, new, box, parts) else None

    def _alike(self, node: Node, new: Node, box: Box, parts: Sequence[Box]) -> bool:
        """Whether element i of the new node is by its lowering element i of the box of the old one."""
        old_form, form = self.facts.lowering(node), self.facts.lowering(new)
        if not isinstance(old_form, Map | Reduce) or not isinstance(form, Map | Reduce):
            return False
        if new.shape != _sizes(box) or new.dtype is not node.dtype or _but_value(old_form) != _but_value(form):
            return False
        names = _variables(node, old_form)
        axes = {v: k for k, v in enumerate(names)}

        def reader(shifts: Sequence[Sequence[int]]) -> Callable[..., Expr]:
            def value(k: int, index: Sequence[ExprLike], mask: Expr | None = None) -> Expr:
                places = [_canonical(e, axes, names, s) for e, s in zip(index, shifts[k], strict=True)]
                return load(k, places, node.inputs[k].dtype, mask)

            return value

        rank = len(box)
        moved = [v + box[k][0] if k < rank else v for k, v in enumerate(names)]
        before = _value(old_form, moved, rank, reader([[first for first, _ in p] for p in parts]))
        after = _value(form, names, rank, reader([[0] * len(p) for p in parts]))
        return before is after

    # -- the graph --------------------------------------------------------------------------------------------------------

    def find(self, helps: frozenset[Node] | None) -> None:
        """What is wanted of each node. With `helps`, a node of which all is wanted reads parts of those nodes alone."""
        self.boxes, self.parts = {}, {}
        wanted: dict[Node, Box | None] = dict.fromkeys(self.graph.outputs)  # None: all
        for node in reversed(self.nodes):
            known = _known(node)
            asked = wanted.get(node)
            box = asked if asked is not None and known and asked != whole(node) else None
            parts = self._possible(node, box, helps) if known and node.inputs else None
            if parts is None and box is not None:
                box = None
                parts = self._possible(node, None, helps)
            if box is not None:
                self.boxes[node] = box
            if parts is not None:
                self.parts[node] = parts
            for k, i in enumerate(node.inputs):
                part = None if parts is None else parts[k]
                if i in wanted:
                    before = wanted[i]
                    wanted[i] = None if before is None or part is None else _union(before, part)
                else:
                    wanted[i] = part

    def _possible(self, node: Node, box: Box | None, helps: frozenset[Node] | None) -> tuple[Box, ...] | None:
        """What the node reads for a box of it (None: for all of it), if it can be made so, and reads a part of something."""
        if box is not None and (node.op is INPUT or node.op is CONSTANT):
            return None
        if box is None and self.facts.elementwise(node):
            return None
        parts = self.reads(node, box or whole(node))
        if parts is None:
            return None
        if box is None:
            if helps is not None:
                parts = tuple(p if i in helps else whole(i) for p, i in zip(parts, node.inputs, strict=True))
            if all(p == whole(i) for p, i in zip(parts, node.inputs, strict=True)):
                return None
            if spec_of(node, self.facts) is not None:
                return parts
        operands = [(_part(i, whole(i), p), p) for i, p in zip(node.inputs, parts, strict=True)]
        return None if self.made(node, box or whole(node), parts, operands) is None else parts

    def smaller(self) -> list[Node]:
        """Contractions of which a part is wanted that saves enough."""
        found = []
        for n, box in self.boxes.items():
            if spec_of(n, self.facts) is not None and prod(_sizes(box)) <= (1 - LEAST) * prod(n.tensor.static_shape):
                found.append(n)
        return found

    def helping(self, chosen: Sequence[Node]) -> frozenset[Node]:
        """Nodes of which a part is wanted, through which it comes to be wanted of the chosen ones."""
        helps = set(chosen)
        for n in self.nodes:
            if n in self.boxes and any(i in helps for i in n.inputs):
                helps.add(n)
        return frozenset(helps)

    def rewrite(self) -> dict[Node, Node]:
        """The nodes that take the place of others that stay whole."""
        done: dict[Node, tuple[Node, Box]] = {}
        result: dict[Node, Node] = {}
        for node in self.nodes:
            parts = self.parts.get(node)
            if parts is None:
                if any(i in result for i in node.inputs):
                    result[node] = node.replace(tuple(result.get(i, i) for i in node.inputs))
                continue
            operands = [done[i] if i in done else (result.get(i, i), whole(i)) for i in node.inputs]
            new = self.made(node, self.box(node), parts, operands)
            assert new is not None, f"{node} could be made for a part, and now it cannot"
            if node in self.boxes:
                done[node] = (new, self.boxes[node])
            else:
                result[node] = new
        return result


def _ends(part: tuple[int, int]) -> tuple[int, int]:
    return part[0], part[1] - 1


def _reach(form: tuple[dict[int, int], int], ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    terms, constant = form
    return _range(Affine(tuple((str(k), c) for k, c in terms.items()), constant), {str(k): r for k, r in enumerate(ranges)})


def _but_value(low: Map | Reduce) -> list[object]:
    return [type(low), *(getattr(low, f.name) for f in fields(low) if f.name != "value")]


def _variables(node: Node, low: Map | Reduce) -> tuple[Expr, ...]:
    steps = low.extents if isinstance(low, Reduce) else ()
    return (*index_variables(len(node.shape)), *(var(f"r{k}") for k in range(len(steps))))


def _value(low: Map | Reduce, names: Sequence[Expr], rank: int, read: Callable[..., Expr]) -> Expr:
    index = tuple(names[:rank])
    return low.value(index, tuple(names[rank:]), read) if isinstance(low, Reduce) else low.value(index, read)


def _shifted(index: Affine, ranges: Mapping[str, tuple[int, int]], first: int) -> Affine:
    """An index whose axes begin at 0 in the place of where their ranges do, into what begins at `first`."""
    return Affine(index.terms, index.constant + sum(c * ranges[n][0] for n, c in index.terms) - first)


def _inside(padding: Padding, x: Box, box: Box) -> Box | None:
    """What of the padded operand lies in a box; None for nothing."""
    part = tuple((max(0, a - low), min(n, b - low)) for (a, b), low, (_, n) in zip(box, padding.low, x, strict=True))
    return part if all(a < b for a, b in part) else None


def _padded(node: Node, padding: Padding, x: Node, box: Box, part: Box) -> Node:
    low = tuple(max(0, before - a) for (a, _), before in zip(box, padding.low, strict=True))
    high = tuple(n - before - m for n, before, m in zip(_sizes(box), low, _sizes(part), strict=True))
    return node.replace((x,), low=low, high=high) if any((*low, *high)) else x


def _part(x: Node, cover: Box, part: Box) -> Node:
    """What covers a box cut to another."""
    if cover == part:
        return x
    starts = tuple(a - first for (a, _), (first, _) in zip(part, cover, strict=True))
    stops = tuple(b - first for (_, b), (first, _) in zip(part, cover, strict=True))
    return make("slice", x, starts=starts, stops=stops, steps=(1,) * len(part))


@dataclass(frozen=True)
class Crop(Pass):
    """Contractions make what is read of them."""

    kind: ClassVar[str] = "equivalent"  # the same sums, which a reference may add up in another order for another size
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with smaller contractions; the graph itself where none becomes smaller."""
        if not any("spec" in n.attrs for n in graph.nodes()):
            return graph
        crop = _Crop(graph, ctx.facts)
        crop.find(None)
        chosen = crop.smaller()
        if not chosen:
            return graph
        crop.find(crop.helping(chosen))
        if not crop.smaller() or not ctx.spend("crop", chosen[0]):
            return graph
        made = crop.rewrite()
        outputs = [made.get(o, o) for o in graph.outputs]
        labels = {**graph.labels, **{made[n]: label for n, label in graph.labels.items() if n in made}}
        return finish(graph, outputs, labels)
