"""Contractions of bytes made ready for the instruction that multiplies four, unsigned ones by signed ones; or for words.

    contract(a: i8, b: i8)  ->  contract(flip(a): u8, b) - 128 sum_k b      flip(a) = a + 128
    contract(a: u8, b: u8)  ->  contract(flip(a): i8, b) + 128 sum_k b      flip(a) = a - 128
    contract(a, b)          ->  contract(cast{i16}(a), cast{i16}(b))        where the target has no such instruction
    contract(a, b)          ->  contract(pad(a), pad(b))        where no k axis is a multiple of four (of i16: of two)

All of it modulo 2^32, as the sums are. To flip is to change the sign bit; the sums of b are a contraction with ones, which the
prepare graph makes of weights. Every target multiplies i16 two at a time without saturating, at half the rate, but at half a
rate more than bytes, whose halves would have to be taken apart for it in the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import full
from ..ir.contraction import Affine, Contraction
from ..ir.dtypes import i8, i16, i32, u8
from ..ir.graph import Graph, Node
from ..ir.op import make
from ..ir.types import TensorType
from .contract import Context, Pass
from .contract_form import generic, normalised, spec_of
from .facts import Facts
from .mixed_precision import evened
from .rewrite import Miss, Outcome, Rule, apply_rules, rule


def flip(x: Node) -> Node:
    """i8 as u8 + 128, u8 as i8 - 128."""
    to = u8 if x.dtype is i8 else i8
    changed = make("xor", x, full(-128 if x.dtype is i8 else 128, x.tensor))
    return make("bit_cast", changed, source=x.dtype.name, to=to.name)


def thin_sums(b: Node, spec: Contraction) -> Node | None:
    """For each element of C the sum of those of B that it meets, in C's rank with size 1 where it does not vary; None where a
    summed axis is A's alone."""
    own = {name for m in spec.b for name, _ in m.terms}
    k = spec.of_kind("k")
    if not k or any(x.name not in own for x in k):
        return None
    ones = full(1, TensorType(u8 if b.dtype is i8 else i8, tuple(x.extent for x in k)))
    kept = [m for m in spec.c if m.terms[0][0] in own]
    axes = tuple(x for x in spec.axes if x.name in own)
    if len(kept) + len(k) != len(axes):
        return None
    alone = Contraction(axes, tuple(Affine(((x.name, 1),)) for x in k), spec.b, tuple(kept))
    total = make("contract", ones, b, spec=normalised(alone))
    shape = tuple(spec.axis(m.terms[0][0]).extent for m in spec.c)
    thin = tuple(n if m in kept else 1 for m, n in zip(spec.c, shape, strict=True))
    return total if thin == total.shape else make("reshape", total, shape=thin)


def sums(b: Node, spec: Contraction) -> Node | None:
    """`thin_sums` in C's shape."""
    total = thin_sums(b, spec)
    shape = tuple(spec.axis(m.terms[0][0]).extent for m in spec.c)
    return total if total is None or total.shape == shape else make("broadcast_to", total, shape=shape)


def _of_integers(node: Node, facts: Facts) -> Contraction | None:
    """The contraction that a node is, of bytes or of i16, not packed yet."""
    spec = spec_of(node, facts) if "spec" in node.attrs else None
    if spec is None or spec.panel or len(node.inputs) != 2:
        return None
    return spec if _bytes(node) or all(i.dtype is i16 for i in node.inputs) else None


def _bytes(node: Node) -> bool:
    return all(i.dtype in (i8, u8) for i in node.inputs)


def _alike(node: Node) -> bool:
    return node.inputs[0].dtype is node.inputs[1].dtype


def _evened(node: Node, spec: Contraction) -> tuple[Contraction, Node, Node]:
    a, b = node.inputs
    return evened(spec, a, b, 32 // a.dtype.bits)


def _is_even(node: Node, spec: Contraction) -> bool:
    longer, a, b = _evened(node, spec)
    return a is node.inputs[0] and b is node.inputs[1] and longer == spec


def _rule(one_instruction: bool) -> Rule:
    """The rule for a target that has an instruction for unsigned by signed bytes, or has not."""

    @rule
    def by_four(node: Node, facts: Facts) -> Outcome:
        """contract(a, b) -> contract(flip(a), b) -+ 128 sum_k b; contract(cast(a), cast(b)); contract(pad(a), pad(b))."""
        spec = _of_integers(node, facts)
        if spec is None:
            return Miss("not an unpacked contraction of bytes or i16", node)
        if not all(isinstance(x.extent, int) and x.extent > 0 for x in spec.axes):
            return Miss("an extent is not known, or nothing", node)
        a, b = node.inputs
        if _bytes(node) and not one_instruction:
            return generic(node, make("cast", a, dtype=i16), make("cast", b, dtype=i16), spec)
        if _bytes(node) and _alike(node) and (total := sums(b, spec)) is not None:
            shift = make("mul", total, full(128, TensorType(i32, node.shape)))
            return make("sub" if a.dtype is i8 else "add", generic(node, flip(a), b, spec), shift)
        if _is_even(node, spec):
            return Miss("ready as it is", node)
        longer, a, b = _evened(node, spec)
        return generic(node, a, b, longer)

    return by_four


def _readier(before: Node, after: Node, facts: Facts) -> bool:
    """The order: bytes of one dtype, which become others or i16; then steps side by side."""
    old, new = _of_integers(before, facts), _of_integers(after, facts)
    if old is None:
        return False
    if new is None:
        return _bytes(before) and _alike(before)
    if _bytes(before) and not _bytes(after):
        return True
    return _alike(after) == _alike(before) and _is_even(after, new) and not _is_even(before, old)


@dataclass(frozen=True)
class BytesByFour(Pass):
    """Unlike signs where the target multiplies such, else i16; and reductions by four or two."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with its contractions of bytes ready."""
        if not any(_of_integers(n, ctx.facts) is not None for n in graph.nodes()):
            return graph
        return apply_rules(graph, [_rule(ctx.target is not None and ctx.target.vnni)], ctx, _readier)
