"""Layers in the bodies of loops: the recurrent products of LSTM, GRU and RNN, whose weights are the same in every step.

    scan(h; f(op(h, w)); ..., w)  ->  scan(h; f(op(g(h), v)); ..., p...)        v made of p... in the body, p... around the loop

Bodies of loops in the graph itself are looked at, not those of loops in loops, of branches, and of loops without a fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.build import get, input_node
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import closed, rebuild
from ..ir.lowering import Loop
from ..ir.op import Trait, make
from ..ir.types import TupleType
from .facts import Facts, derived, weights


@dataclass(frozen=True)
class Change:
    """What takes the place of the operands of a layer in a body.

    of_x   what is read, made of what was
    w      the weights, as nodes around the loop, of which those in `held` become operands of the loop; or made of what they were
    shift  a node around the loop, of the result's rank, that is broadcast and added to the result
    """

    of_x: Callable[[Node], Node]
    w: Node | Callable[[Node], Node]
    held: tuple[Node, ...] = ()
    shift: Node | None = None


def loop_of(node: Node) -> Loop | None:
    """The loop over a sequence that a node is."""
    form = node.op.lower(node) if node.inputs and node.op.has(Trait.CONTROL) else None
    return form if isinstance(form, Loop) else None


def loops_with_weights(graph: Graph, facts: Facts) -> list[tuple[Node, Loop, dict[Node, Node]]]:
    """The loops of a graph, and for those nodes of their bodies that depend on weights alone the same around the loop."""
    fixed = derived(graph.nodes(), weights(graph))
    found = []
    for n in graph.nodes():
        form = loop_of(n)
        if form is None:
            continue
        first = form.carries + form.sequences
        given = dict(zip(form.body.inputs[first:], n.inputs[first:], strict=True))
        held = {p: o for p, o in given.items() if fixed.get(o)}
        inside = [x for x, from_weights in derived(form.body.nodes(), frozenset(held)).items() if from_weights]
        found.append((n, form, dict(zip(inside, rebuild(inside, held), strict=True))))
    return found


def stacked(loop: Node, node: Node) -> Node:
    """The values of a node of the loop's body in all steps, as a node of the graph around it: [length, ...]."""
    form = loop_of(loop)
    assert form is not None
    body = closed(form.body.inputs, [*form.body.outputs, node], form.body.name, form.body.labels)
    return get(loop.replace(body=body), len(form.body.outputs))


def changed_loop(loop: Node, changes: Mapping[Node, Change]) -> Node:
    """The loop with other operands of layers, by their nodes in its body. Operands that nothing reads any more are gone."""
    form = loop_of(loop)
    assert form is not None
    shifts = [c.shift for c in changes.values() if c.shift is not None]
    held = list(dict.fromkeys([*(h for c in changes.values() for h in c.held), *shifts]))
    fresh = {h: input_node(f"held{k}", h.tensor) for k, h in enumerate(held)}
    done: dict[Node, Node] = {i: i for i in form.body.inputs}
    labels = dict(form.body.labels)
    for n in postorder(form.body.outputs):
        if n in done:
            continue
        given = tuple(done[i] for i in n.inputs)
        if n in changes:
            w = changes[n].w
            given = (changes[n].of_x(given[0]), rebuild([w], fresh)[0] if isinstance(w, Node) else w(given[1]))
        done[n] = n.replace(given)
        shift = changes[n].shift if n in changes else None
        if shift is not None:
            added = fresh[shift]
            wide = added if added.shape == done[n].shape else make("broadcast_to", added, shape=done[n].shape)
            done[n] = make("add", done[n], wide)
        if n in labels:
            labels.setdefault(done[n], labels[n])
    outputs = [done[o] for o in form.body.outputs]
    read = set(postorder(outputs))
    first = form.carries + form.sequences
    keep = [k for k, i in enumerate(form.body.inputs) if k < first or i in read]
    inputs = [*(form.body.inputs[k] for k in keep), *fresh.values()]
    body = closed(inputs, outputs, form.body.name, labels)
    return make(loop.op, *(loop.inputs[k] for k in keep), *held, **{**loop.attrs, "body": body})


def results(loop: Node) -> Sequence[Node]:
    """The results of a loop."""
    assert isinstance(loop.type, TupleType)
    return [get(loop, k) for k in range(len(loop.type.items))]
