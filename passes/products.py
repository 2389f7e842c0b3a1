"""Products of two values that no weights are in, as the scores of attention and their product with its values.

Where such a product is in the body of a loop, an operand either comes from around the loop (a slice of a sequence, or what is the
same in every step), or is computed in the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ir.dtypes import f32
from ..ir.graph import Graph, Node
from ..ir.op import Trait
from .facts import Facts, derived, weights
from .insert_quantize import sources
from .layers import channels
from .loop_layers import loops_with_weights


@dataclass(frozen=True)
class Operand:
    """One side of a product: what is read in the graph around, or `inside` what a body computes."""

    around: Node | None
    inside: Node | None


@dataclass(frozen=True)
class Product:
    """left times right; `loop` is the loop in whose body the node is, None for the graph itself."""

    name: str
    node: Node
    left: Operand
    right: Operand
    loop: Node | None


def find_products(graph: Graph, taken: Iterable[str] = (), facts: Facts | None = None) -> list[Product]:
    """The products of two activations in f32 of a graph and of the bodies of its loops, under names that are not taken."""
    facts, names, found = facts or Facts(), set(taken), list[Product]()

    def look(body: Graph, held: Iterable[Node], loop: Node | None, given: Mapping[Node, Node | None]) -> None:
        fixed = derived(body.nodes(), frozenset(held))
        for n in body.nodes():
            if not n.op.has(Trait.QUANTISABLE) or len(n.inputs) != 2 or n.dtype is not f32:
                continue
            if any(i in fixed or i.dtype is not f32 for i in n.inputs) or channels(n, facts) is None:
                continue
            sides = [_operand(i, loop, given, facts) for i in n.inputs]
            if sides[0] is None or sides[1] is None:
                continue
            label = body.labels.get(n)
            name = first = (label.name if label is not None else None) or n.op.name
            count = 1
            while name in names:
                count += 1
                name = f"{first}#{count}"
            names.add(name)
            found.append(Product(name, n, sides[0], sides[1], loop))

    look(graph, weights(graph), None, {})
    for loop, form, outside in loops_with_weights(graph, facts):
        given = {p: o if k >= form.carries else None for k, (p, o) in enumerate(zip(form.body.inputs, loop.inputs, strict=True))}
        look(form.body, (i for i in form.body.inputs if i in outside), loop, given)
    return found


def _operand(x: Node, loop: Node | None, given: Mapping[Node, Node | None], facts: Facts) -> Operand | None:
    """Where an operand comes from; None where that is several places."""
    if loop is None:
        return Operand(x, None)
    found = sources(x, facts, {})
    if len(found) != 1:
        return None
    if found[0] not in given:
        return Operand(None, x)
    around = given[found[0]]
    return None if around is None or around.dtype is not f32 else Operand(around, None)
