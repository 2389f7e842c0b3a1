"""Layers: contractions of data with weights, found by what ops lower to, with the channels of both.

For a result y = op(x, w), channel e of y and dimension d of w go together where w times a vector along d is y times that vector
along e: the output channels of a convolution, the columns of a matrix product. The same for the input channels: dimension i of x
and dimension j of w. Both are read off the index maps of the contraction that the op is or becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.build import input_node
from ..ir.contraction import Affine, Contraction
from ..ir.dims import Dim, as_int, evaluate
from ..ir.graph import Graph, Node, postorder
from ..ir.lowering import Decompose
from ..ir.op import Trait, make
from ..ir.types import TensorType
from .contract_form import segments, spec_of
from .facts import Facts, derived, weights
from .loop_layers import loops_with_weights

Pairing = tuple[int, int]
_SOME: Final = 23  # in the place of a size that is not known


@dataclass(frozen=True)
class Layer:
    """A contraction whose operand `w` comes from weights, and x from data.

    output    (dimension of the result, dimension of w) of the output channels
    inputs    (dimension of x, dimension of w) of the input channels, None where x's channels go apart in groups of several
    terms     products in one sum
    loop      the loop in whose body node and x are (w is a node around it); None for the graph itself
    """

    name: str
    node: Node
    x: Node
    w: Node
    output: Pairing
    inputs: Pairing | None
    terms: int
    loop: Node | None = None


def find_layers(graph: Graph, facts: Facts | None = None) -> list[Layer]:
    """The layers of a graph in its order; those in bodies of loops are not looked at."""
    facts = facts or Facts()
    nodes = graph.nodes()
    fixed = derived(nodes, weights(graph))
    return _named_layers(graph, nodes, {n: n for n in fixed}, frozenset(fixed), facts, set(), None)


def find_loop_layers(graph: Graph, taken: Iterable[str] = (), facts: Facts | None = None) -> list[Layer]:
    """The layers in the bodies of a graph's loops; their names are none of those that are taken."""
    facts = facts or Facts()
    found: list[Layer] = []
    names = set(taken)
    for loop, form, outside in loops_with_weights(graph, facts):
        same = frozenset(derived(form.body.nodes(), frozenset(form.body.inputs[form.carries + form.sequences :])))
        found += _named_layers(form.body, form.body.nodes(), outside, same, facts, names, loop)
    return found


def _named_layers(
    graph: Graph,
    nodes: Iterable[Node],
    held: Mapping[Node, Node],
    same: frozenset[Node],
    facts: Facts,
    taken: set[str],
    loop: Node | None,
) -> list[Layer]:
    """The layers among nodes whose weights are in `held`, which says what they are in the graph around; x is not in `same`."""
    found: list[Layer] = []
    for n in nodes:
        if not n.op.has(Trait.QUANTISABLE) or len(n.inputs) != 2:
            continue
        x, w = n.inputs
        if x in same or w not in held:
            continue  # no weights, or weights on the left
        where = channels(n, facts)
        if where is None:
            continue
        name = first = _name(graph, n, held[w])
        count = 1
        while name in taken:
            count += 1
            name = f"{first}#{count}"
        taken.add(name)
        found.append(Layer(name, n, x, held[w], where[0], where[1], where[2], loop))
    return found


def _name(graph: Graph, node: Node, w: Node) -> str:
    """The name of the largest weight that w comes from, without '.weight': unique, and what the user knows."""
    sources = [n for n in postorder([w]) if "role" in n.attrs]
    largest = max(sources, key=lambda n: n.tensor.nbytes, default=None)
    label = graph.labels.get(node)
    if largest is None:
        return (label.name if label is not None else None) or node.op.name
    return str(largest.attrs["name"]).removesuffix(".weight")


def channels(node: Node, facts: Facts) -> tuple[Pairing, Pairing | None, int] | None:
    """(output channels, input channels, products in one sum) of op(x, w); None where it has no channels as layers do."""
    inner, x, shape = _contraction(node, facts)
    spec = spec_of(inner, facts) if inner is not None else None
    if inner is None or spec is None:
        return None
    summed = {a.name for a in spec.of_kind("k")}
    out = _paired(_merged(spec.c, inner.shape, shape), spec.b, summed)
    if out is None:
        return None
    into = _paired_inputs(spec) if len(inner.inputs[0].shape) == len(x.shape) else None
    terms = spec.size("k")
    return (out, into, as_int(terms)) if isinstance(terms, int) else None


def _contraction(node: Node, facts: Facts) -> tuple[Node | None, Node, tuple[Dim, ...]]:
    """The contraction that a node is or becomes by decomposition, if its operand w is the node's own, and its result the node's
    under another shape at most; a stand-in for x, and the shape of the result. Symbolic sizes are some number here."""
    x = input_node("x", _sized(node.inputs[0].tensor))
    w = input_node("w", _sized(node.inputs[1].tensor))
    current = node.replace((x, w))
    shape = current.shape
    for _ in range(8):
        low = facts.lowering(current) if current.inputs else None
        if isinstance(low, Decompose):
            built = low.build(current)
            if isinstance(built, tuple):
                return None, x, shape
            current = built
        elif current.inputs and facts.kind(current) == "view":
            current = current.inputs[0]
        else:
            break
    fits = current.inputs and spec_of(current, facts) is not None and current.inputs[1] is w
    return (current if fits else None), x, shape


def _sized(t: TensorType) -> TensorType:
    return TensorType(t.dtype, tuple(evaluate(d, dict.fromkeys(t.symbols, _SOME)) for d in t.shape))


def _merged(index: Sequence[Affine], old: Sequence[Dim], new: Sequence[Dim]) -> list[Affine | None]:
    """The index of each dimension of the result after a reshape that merges dimensions; None for one that it does not give."""
    if tuple(old) == tuple(new):
        return list(index)
    runs = segments(old, new)
    result: list[Affine | None] = [None] * len(new)
    for left, right in runs or ():
        if len(right) != 1:
            continue
        terms: list[tuple[str, int]] = []
        step = 1
        for d in reversed(left):
            if len(index[d].terms) != 1 or index[d].constant:
                break
            terms.insert(0, (index[d].terms[0][0], index[d].terms[0][1] * step))
            step *= as_int(old[d])
        else:
            result[right[0]] = Affine(tuple(terms))
    return result


def _same(a: Affine, b: Affine) -> bool:
    return a.constant == b.constant and dict(a.terms) == dict(b.terms)


def _paired(result: Sequence[Affine | None], b: Sequence[Affine], summed: set[str]) -> Pairing | None:
    """The last dimension of the result that one dimension of w has alone."""
    pairs = [(e, d) for e, m in enumerate(result) for d, o in enumerate(b) if m is not None and m.terms and _same(m, o)]
    names = [(e, d) for e, d in pairs if not {n for n, _ in b[d].terms} & summed]
    return names[-1] if names else None


def _paired_inputs(spec: Contraction) -> Pairing | None:
    long = {x.name for x in spec.axes if x.extent != 1}

    def kept(index: Affine) -> Affine:
        return Affine(tuple(t for t in index.terms if t[0] in long), index.constant)

    a, b = [kept(m) for m in spec.a], [kept(m) for m in spec.b]
    pairs = [(i, j) for i, m in enumerate(a) for j, o in enumerate(b) if m.terms and _same(m, o)]
    return pairs[0] if len(pairs) == 1 else None


def along(vector: Node, dimension: int, like: Node) -> Node:
    """A vector along one dimension of a tensor, in its shape."""
    thin = tuple(n if k == dimension else 1 for k, n in enumerate(like.shape))
    x = vector if vector.shape == thin else make("reshape", vector, shape=thin)
    return x if x.shape == like.shape else make("broadcast_to", x, shape=like.shape)


def rebuilt(graph: Graph, table: Mapping[Node, Node]) -> Graph:
    """The graph with nodes replaced, wherever they are used."""
    return graph.map_nodes(lambda n, ins: table[n] if n in table else n.replace(ins))
