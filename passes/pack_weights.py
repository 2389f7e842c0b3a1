"""Weights of contractions in panels, as the register tile reads them: a panel holds `width` columns of B, k after k.

    B -> [batch..., N, K] -> padded with zeros to whole panels -> [batch..., N / width, K, width]

Panels of bf16 hold pairs of steps, as the instruction that multiplies pairs reads them: [batch..., N / width, K / 2, width, 2];
those of bytes hold four.

N and K are the products of the n and k axes in the order of the spec. The movement is made of ordinary nodes that depend on
weights alone, so the prepare graph does it once. How wide (or whether at all) is for the code generator to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.contraction import Affine, Axis, Contraction
from ..ir.dims import Dim, as_int
from ..ir.graph import Graph, Node
from ..ir.op import Trait, make
from .column_groups import grouped, whole_groups
from .contract import Context, Pass, PreferredPanel
from .contract_form import spec_of
from .facts import Facts, derived
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on


@dataclass(frozen=True)
class Split:
    """How one dimension of B falls into axes: elements `start`, `start + step`, ... below `stop` are the row-major positions
    of `axes`, some of which (`reversed`, by number) run backwards."""

    axes: list[Axis]
    reversed: list[int]
    start: int
    stop: Dim
    step: int


def axes_of(index: Affine, spec: Contraction, extent: Dim) -> Split | None:
    """The axes that one dimension splits into, outermost first, if its index meets no element twice, in steps of one size;
    None otherwise. So it is for a kernel with its taps reversed, and for those of its taps that one phase of an image meets."""
    terms = sorted((t for t in index.terms if spec.axis(t[0]).extent != 1), key=lambda t: -abs(t[1]))
    if not all(isinstance(spec.axis(name).extent, int) for name, _ in terms):
        plain = len(terms) == 1 and terms[0][1] == 1 and index.constant == 0 and spec.axis(terms[0][0]).extent == extent
        return Split([spec.axis(terms[0][0])], [], 0, extent, 1) if plain else None
    axes = [spec.axis(name) for name, _ in terms]
    step = unit = abs(terms[-1][1]) if terms else 1
    start = index.constant
    for (_, coefficient), x in zip(reversed(terms), reversed(axes), strict=True):
        if abs(coefficient) != step:
            return None
        start += min(0, coefficient * (as_int(x.extent) - 1))
        step *= as_int(x.extent)
    return Split(axes, [k for k, (_, a) in enumerate(terms) if a < 0], start, start + step - unit + 1, unit)


def matrix(b: Node, spec: Contraction) -> Node | None:
    """B as [batch..., N, K]; None where its index maps are not plain."""
    order: list[Axis] = []
    backwards: list[int] = []
    parts: list[Split] = []
    for index, extent in zip(spec.b, b.shape, strict=True):
        split = axes_of(index, spec, extent)
        if split is None:
            return None
        backwards += [len(order) + k for k in split.reversed]
        order += split.axes
        parts.append(split)
    if any((p.start, p.stop, p.step) != (0, n, 1) for p, n in zip(parts, b.shape, strict=True)):
        starts, stops, steps = zip(*((p.start, p.stop, p.step) for p in parts), strict=True)
        b = make("slice", b, starts=starts, stops=stops, steps=steps)
    wanted = [*spec.of_kind("batch"), *spec.of_kind("n"), *spec.of_kind("k")]
    # an axis of extent 1 may stand anywhere: to move it is no movement
    wanted = [a for a in wanted if a.extent != 1]
    if sorted(x.name for x in order) != sorted(x.name for x in wanted):
        return None
    x = _reshape(b, [a.extent for a in order])
    if backwards:
        x = make("reverse", x, axes=tuple(backwards))
    perm = tuple(order.index(a) for a in wanted)
    if perm != tuple(range(len(perm))):
        x = make("transpose", x, perm=perm)
    batch = [a.extent for a in spec.of_kind("batch")]
    return _reshape(x, [*batch, spec.size("n"), spec.size("k")])


def pack(b: Node, spec: Contraction, width: int, pairs: int = 0) -> Node | None:
    """B in panels of `width` columns, of `pairs` steps side by side if wanted; None where its index maps are not plain."""
    x = matrix(b, spec)
    if x is None or not isinstance(x.shape[-2], int):
        return None
    rank, n = len(x.shape), x.shape[-2]
    if spec.groups:
        tile, lead = width // spec.groups, x.shape[:-2]
        apart = make("reshape", x, shape=(*lead, spec.groups, n // spec.groups // tile, tile, x.shape[-1]))
        perm = (*range(rank - 2), rank - 1, rank - 2, rank, rank + 1)
        x = make("reshape", make("transpose", apart, perm=perm), shape=x.shape)
    missing = -n % width
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    if not (missing or pairs or spec.groups) and x.op.has(Trait.MOVEMENT) and x.attrs.get("perm") == swapped:
        # B lies as [batch..., K, N]: one movement in place of two, and none if a panel holds every column
        lying, depth = x.inputs[0], x.shape[-1]
        if n == width:
            return _reshape(lying, [*x.shape[:-2], 1, depth, n])
        lying = _reshape(lying, [*x.shape[:-2], depth, n // width, width])
        return make("transpose", lying, perm=(*range(rank - 2), rank - 1, rank - 2, rank))
    zeros = (0,) * rank
    if missing:
        high = (0,) * (rank - 2) + (missing, 0)
        x = make("pad", x, low=zeros, high=high, interior=zeros, value=0.0)
    steps: tuple[Dim, ...] = (x.shape[-1] // pairs, pairs) if pairs else (x.shape[-1],)
    x = _reshape(x, [*x.shape[:-2], (n + missing) // width, width, *steps])
    if pairs:
        return make("transpose", x, perm=(*range(rank - 1), rank, rank - 1, rank + 1))
    return make("transpose", x, perm=(*range(rank - 1), rank, rank - 1))


def _reshape(x: Node, shape: Sequence[object]) -> Node:
    return x if x.shape == tuple(shape) else make("reshape", x, shape=tuple(shape))


def _rule(fixed: Mapping[Node, bool], ctx: Context, preferred: PreferredPanel) -> Rule:
    """The rule for a graph whose weights are `fixed`."""

    @rule_on("contract")
    def pack_operand(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(a, panels(b)) where b comes from weights alone and the target wants panels."""
        spec = spec_of(node, facts)
        if spec is None or spec.panel or "spec" not in node.attrs:
            return Miss("not an unpacked contract node", node)
        b = node.inputs[1]
        if fixed.get(b) is not True:
            return Miss("B does not come from weights alone", b)
        if ctx.target is None:
            return Miss("no target is given", node)
        width, pairs = preferred(spec, ctx.target, b.dtype), 32 // b.dtype.bits if b.dtype.bits < 32 else 0
        if width <= 0:
            return Miss("the code generator reads B as it is", b)
        if spec.groups and not whole_groups(spec, width, ctx.target):
            spec = replace(spec, groups=0)
        packed = pack(b, spec, width, pairs)
        if packed is None:
            return Miss("B is indexed in a way that has no panels", b)
        # contract, or its f32 sums of bf16
        return make(node.op, node.inputs[0], packed, spec=spec.packed(width, b.shape, pairs))

    return pack_operand


def _packed_once(before: Node, after: Node, facts: Facts) -> bool:
    """The order: contractions with an unpacked B."""
    old, new = spec_of(before, facts), spec_of(after, facts)
    return old is not None and new is not None and not old.panel and new.panel > 0


@dataclass(frozen=True)
class PackWeights(Pass):
    """Packs every B that comes from weights; nothing without a target and a `preferred_panel` in the context."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})
    ensures: ClassVar[frozenset[str]] = frozenset({"packed"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with packed weights."""
        given = ctx.weights(graph)
        if ctx.preferred_panel is None or ctx.target is None or not given:
            return graph
        graph = grouped(graph, derived(graph.nodes(), given), ctx.target, ctx.facts)
        return apply_rules(graph, [_rule(derived(graph.nodes(), given), ctx, ctx.preferred_panel)], ctx, _packed_once)
