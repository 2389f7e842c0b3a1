"""Whole-graph helpers: sizes of symbolic dimensions, specialising to them, inlining a body."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .collector import no_collection
from .contraction import Axis, Contraction
from .dims import Dim, DimExpr, Symbol, evaluate, symbols
from .errors import InputError, ShapeError
from .graph import Graph, Label, Node, postorder
from .op import make


def graph_symbols(graph: Graph) -> frozenset[str]:
    """The names of the symbolic dimensions that the types of the graph's inputs mention."""
    return frozenset().union(*(i.tensor.symbols for i in graph.inputs))


def _solve(d: Dim, size: int, known: Mapping[str, int]) -> tuple[str, int] | None:
    """(name, value) if `d` is `coefficient * name + constant` in one name not yet known, and size fits it."""
    try:
        value = evaluate(d, known)
    except ShapeError:  # a division by what became zero: reported when every dimension is checked
        return None
    if isinstance(value, int):
        return None
    coefficient, constant, name = 0, 0, None
    for monomial, factor in value.terms:
        if not monomial:
            constant = factor
        elif len(monomial) == 1 and isinstance(monomial[0], Symbol) and name is None:
            coefficient, name = factor, monomial[0].name
        else:
            return None
    if name is None or (size - constant) % coefficient:
        return None
    return name, (size - constant) // coefficient


def bind_sizes(graph: Graph, shapes: Sequence[Any] | Mapping[str, Any]) -> dict[str, int]:
    """The size of each symbolic dimension, from one shape (or array) per input, in order or by input name.

    Every dimension of every input is checked. Raises InputError that names the input, its declared type and what was
    given: a wrong number of inputs, an unknown name, a wrong rank or size, sizes that contradict each other, a size that
    is not positive where it is symbolic, or a symbol that the given shapes do not determine.
    """
    given = [_shape(s) for s in ordered(graph, shapes)]
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    pending: list[tuple[Node, int, Dim, int]] = []
    for node, shape in zip(graph.inputs, given, strict=True):
        name = node.attrs["name"]
        if len(shape) != len(node.shape):
            raise InputError(f"input {name!r} is {node.type}: expected {len(node.shape)} dimensions, got shape {shape}")
        for axis, (d, size) in enumerate(zip(node.shape, shape, strict=True)):
            if isinstance(d, DimExpr):
                pending.append((node, axis, d, size))
            elif d != size:
                raise InputError(f"input {name!r} is {node.type}: dimension {axis} must be {d}, got shape {shape}")
    progress = True
    while progress:
        progress = False
        for node, _, d, size in pending:
            solved = _solve(d, size, sizes)
            if solved is None or solved[0] in sizes:
                continue
            if solved[1] < 1:
                raise InputError(
                    f"input {node.attrs['name']!r} is {node.type}: size {size} makes {solved[0]} = {solved[1]}; 1 is the least"
                )
            sizes[solved[0]], origin[solved[0]] = solved[1], node.attrs["name"]
            progress = True
    for node, axis, d, size in pending:
        try:
            value = evaluate(d, sizes)
        except ShapeError as e:
            raise InputError(f"input {node.attrs['name']!r} is {node.type}: dimension {axis}: {e}") from None
        if not isinstance(value, int):
            names = ", ".join(sorted(symbols(value)))
            raise InputError(f"input {node.attrs['name']!r} is {node.type}: the shapes given do not determine {names}")
        if value != size:
            because = ", ".join(f"{s} = {sizes[s]} from input {origin[s]!r}" for s in sorted(symbols(d)))
            raise InputError(
                f"input {node.attrs['name']!r} is {node.type}: dimension {axis} must be {value} ({because}), got {size}"
            )
    return sizes


def ordered(graph: Graph, values: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """One value per input, in the order of the inputs, from a sequence or a mapping by name. Raises InputError."""
    names = [i.attrs["name"] for i in graph.inputs]
    if isinstance(values, Mapping):
        missing = [n for n in names if n not in values]
        extra = [n for n in values if n not in set(names)]
        if missing or extra:
            said = [f"missing {missing}"] * bool(missing) + [f"not an input: {extra}"] * bool(extra)
            raise InputError(f"graph {graph.name!r} takes {_list(names)}: {'; '.join(said)}")
        return [values[n] for n in names]
    if len(values) != len(names):
        raise InputError(f"graph {graph.name!r} takes {len(names)} inputs ({_list(names)}), got {len(values)}")
    return list(values)


def _list(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in (value.shape if hasattr(value, "shape") else value))


def substitute_sizes(value: Any, sizes: Mapping[str, Dim]) -> Any:
    """An attribute value with sizes put in for symbols, wherever dimensions occur in it."""
    if isinstance(value, DimExpr):
        return evaluate(value, sizes)
    if isinstance(value, tuple):
        return tuple(substitute_sizes(v, sizes) for v in value)
    if isinstance(value, Contraction):
        axes = tuple(Axis(x.name, evaluate(x.extent, sizes), x.kind) for x in value.axes)
        return replace(value, axes=axes, b_shape=substitute_sizes(value.b_shape, sizes))
    if isinstance(value, Graph):
        return specialize(value, sizes)
    return value


def specialize(graph: Graph, sizes: Mapping[str, Dim]) -> Graph:
    """The graph with sizes put in for (some of) its symbolic dimensions; every type is inferred anew. Iterative.

    Raises ShapeError if an op refuses the sizes. The graph itself if it mentions none of the names.
    """
    with no_collection():
        return _specialized(graph, sizes)


def _specialized(graph: Graph, sizes: Mapping[str, Dim]) -> Graph:
    done: dict[Node, Node] = {}
    labels: dict[Node, Label] = {}
    for node in postorder((*graph.inputs, *graph.outputs)):
        inputs = tuple(done[i] for i in node.inputs)
        attrs = {k: substitute_sizes(v, sizes) for k, v in node.attrs.items()}
        same = inputs == node.inputs and all(attrs[k] is v or attrs[k] == v for k, v in node.attrs.items())
        done[node] = new = node if same else make(node.op, *inputs, **attrs)
        if node in graph.labels:
            labels.setdefault(new, graph.labels[node])
    inputs, outputs = tuple(done[i] for i in graph.inputs), tuple(done[o] for o in graph.outputs)
    if inputs == graph.inputs and outputs == graph.outputs:
        return graph
    return Graph(inputs, outputs, graph.output_names, graph.name, graph.aliases, labels, graph.weights)


def inline(body: Graph, operands: Sequence[Node]) -> tuple[Node, ...]:
    """The outputs of `body` with the operands in place of its inputs; every type is inferred anew. Iterative.

    Raises ShapeError when their number is wrong, and what an op raises when a type does not fit.
    """
    if len(operands) != len(body.inputs):
        raise ShapeError(f"inline: {len(operands)} operands for a body with {len(body.inputs)} inputs")
    return rebuild(body.outputs, dict(zip(body.inputs, operands, strict=True)))


def closed(inputs: Sequence[Node], outputs: Sequence[Node], name: str, labels: Mapping[Node, Label]) -> Graph:
    """The body of a loop or branch: a graph in which the nodes `inputs` have become p0, p1, ...; labels follow. Iterative."""
    fresh = [make("input", name=f"p{k}", role="data", dtype=n.dtype, shape=n.shape) for k, n in enumerate(inputs)]
    done: dict[Node, Node] = dict(zip(inputs, fresh, strict=True))
    moved: dict[Node, Label] = {}
    for n in postorder(outputs):
        if n not in done:
            done[n] = n.replace(tuple(done[i] for i in n.inputs))
            if n in labels:
                moved.setdefault(done[n], labels[n])
    return with_labels(Graph(tuple(fresh), tuple(done[o] for o in outputs), (), name), moved)


def with_labels(graph: Graph, labels: Mapping[Node, Label]) -> Graph:
    """The graph with those of the labels that are on its nodes."""
    alive = {n: labels[n] for n in graph.nodes() if n in labels}
    return Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, graph.aliases, alive, graph.weights)


def rebuild(roots: Iterable[Node], replacements: Mapping[Node, Node]) -> tuple[Node, ...]:
    """The roots with some nodes replaced wherever they are used. Iterative; nodes above no replacement stay themselves."""
    roots = tuple(roots)
    done = dict(replacements)
    for node in postorder(roots):
        if node not in done:
            done[node] = node.replace(tuple(done[i] for i in node.inputs))
    return tuple(done[r] for r in roots)
