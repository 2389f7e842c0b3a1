"""Channels that must go together, and models without some of them.

Every dimension of every value of a graph is an array of *atoms*, one for each index. Ops unite them: an addition the atoms of
its operands index by index, a convolution those of its input's channels with those of its weight's, a concatenation puts arrays
side by side, a reshape takes them apart. Atom 0 is what has to stay: data, results, what an op mixes in a way not followed here.
A class of united atoms that holds weights and not atom 0 is a *unit*: it goes as a whole, from every parameter that it touches.

Units that touch the same dimensions of the same parameters are a *family*: the output channels of one layer, or of all layers
that a residual stream adds up, or the heads of an attention (a head is a unit of many indices). See Fang et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..ir.dims import as_int
from ..ir.errors import InputError
from ..ir.graph import Graph, Literal, Node
from ..ir.op import Trait, make
from ..ir.ops.conv_geometry import split
from ..ir.types import TupleType
from ..passes.contract_form import segments
from ..passes.layers import find_layers

Array = np.ndarray[Any, Any]
Dims = list[Array]
STAYS: Final = 0


class Atoms:
    """A union-find over integers; arrays are united index by index."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)

    def fresh(self, count: int) -> Array:
        """New atoms."""
        first = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(first, first + count)])
        return np.arange(first, first + count)

    def roots(self, atoms: Array) -> Array:
        """The representative of each; 0 for those that stay."""
        found = self._parent[atoms]
        while not np.array_equal(found, further := self._parent[found]):
            found = further
        self._parent[atoms] = found
        return found

    def unite(self, a: Array, b: Array) -> None:
        """Index by index."""
        if a is b:
            return
        for x, y in dict.fromkeys(zip(self.roots(a).tolist(), self.roots(b).tolist(), strict=True)):
            p, q = self._root(x), self._root(y)
            if p != q:
                self._parent[max(p, q)] = min(p, q)

    def _root(self, atom: int) -> int:
        while (above := int(self._parent[atom])) != atom:
            atom = above
        return atom

    def keep(self, atoms: Array) -> None:
        """None of these may go."""
        self._parent[self.roots(atoms)] = STAYS


@dataclass
class Tracks:
    """The atoms of every value's dimensions. A symbolic or fixed dimension is an array of zeros, of length 1 if symbolic."""

    atoms: Atoms
    dims: dict[Node, Dims] = field(default_factory=dict)
    heads: list[Array] = field(default_factory=list)  # atoms of dimensions that came apart, each with several channels

    def fixed(self, node: Node) -> Dims:
        """Dimensions of which nothing may go."""
        return [np.zeros(n if isinstance(n, int) else 1, np.int64) for n in node.shape]

    def free(self, node: Node) -> Dims:
        """Atoms of its own for each dimension of more than one element."""
        return [self.atoms.fresh(n) if isinstance(n, int) and n > 1 else np.zeros(1, np.int64) for n in node.shape]

    def unite(self, a: Array, b: Array) -> None:
        if len(a) == len(b):
            self.atoms.unite(a, b)
        else:
            self.stay([a, b])

    def stay(self, dims: Sequence[Array]) -> None:
        for d in dims:
            self.atoms.keep(d)


Rule = Callable[[Tracks, Node, list[Dims]], Dims]


def _elementwise(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """All operands agree, but for what a broadcast repeats: that is as long as the others are, in each of its uses."""
    result = t.free(node)
    for k in range(len(result)):
        sides = [g[k] for i, g in zip(node.inputs, given, strict=True) if not _repeats(i, k)]
        if sides:
            result[k] = sides[0]
            for other in sides[1:]:
                t.unite(sides[0], other)
    return result


def _repeats(node: Node, dimension: int) -> bool:
    """Whether a value is the same all along a dimension, as it is one of a broadcast."""
    if node.op.name != "broadcast_to":
        return False
    k = dimension - len(node.shape) + len(node.inputs[0].shape)
    return k < 0 or node.inputs[0].shape[k] != node.shape[dimension]


def _broadcast(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """What repeats stays as long as it is, except where an elementwise op reads it: see there."""
    source, result = node.inputs[0].shape, t.fixed(node)
    shift = len(result) - len(source)
    for k, n in enumerate(source):
        if n == node.shape[k + shift]:
            result[k + shift] = given[0][k]
    return result


def _transpose(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    return [given[0][p] for p in node.attrs["perm"]]


def _concat(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    axis = node.attrs["axis"]
    for other in given[1:]:
        for k, (a, b) in enumerate(zip(given[0], other, strict=True)):
            if k != axis:
                t.unite(a, b)
    return [np.concatenate([g[k] for g in given]) if k == axis else d for k, d in enumerate(given[0])]


def _slice(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    result = t.fixed(node)
    for k, d in enumerate(given[0]):
        start, stop, step = (node.attrs[n][k] for n in ("starts", "stops", "steps"))
        if isinstance(node.inputs[0].shape[k], int) and step == 1:
            result[k] = d[as_int(start) : as_int(stop)]
        else:
            t.stay([d])
    return result


def _reshape(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """Dimensions that stay themselves keep their atoms. Where some merge, those of one may go and the others stay; where one
    comes apart, its atoms go to the part they vary along, and are united along the others."""
    old, new = node.inputs[0].shape, node.shape
    result = t.fixed(node)
    runs = segments(old, new)
    if runs is None:
        t.stay(given[0])
        return result
    for left, right in runs:
        left, right = [d for d in left if old[d] != 1], [d for d in right if new[d] != 1]
        if len(left) == len(right) == 1:
            result[right[0]] = given[0][left[0]]
            continue
        flat = _merged(t, [given[0][d] for d in left])
        if len(right) == 1:
            result[right[0]] = flat
        elif right:
            for d, part in zip(right, _parted(t, flat, [as_int(new[d]) for d in right]), strict=True):
                result[d] = part
    return result


def _merged(t: Tracks, dims: list[Array]) -> Array:
    """The atoms of the elements of several dimensions, row-major: those of the first that may go; the others stay."""
    moving = [k for k, d in enumerate(dims) if (t.atoms.roots(d) != STAYS).any()]
    for k in moving[1:]:
        t.stay([dims[k]])
    flat = np.zeros(1, np.int64)
    for k, d in enumerate(dims):
        here = d if moving[:1] == [k] else np.zeros(len(d), np.int64)
        flat = (flat[:, None] + here[None, :]).reshape(-1)  # all but one of the summands are zeros
    return flat


def _parted(t: Tracks, flat: Array, sizes: list[int]) -> list[Array]:
    """The atoms of several dimensions that one comes apart into: those of the dimension they vary along (the first, if they vary
    along several: they are united along the others, as a head of an attention goes whole)."""
    parts = [np.zeros(n, np.int64) for n in sizes]
    table = t.atoms.roots(flat).reshape(sizes)
    if (table == STAYS).all():
        return parts
    for k in range(len(sizes)):
        moved = np.moveaxis(table, k, 0).reshape(sizes[k], -1)
        if (moved == moved[:, :1]).all():
            parts[k] = np.moveaxis(flat.reshape(sizes), k, 0).reshape(sizes[k], -1)[:, 0]
            return parts
    rows = flat.reshape(sizes[0], -1)
    for j in range(1, rows.shape[1]):
        t.unite(rows[:, 0], rows[:, j])
    parts[0] = rows[:, 0]
    t.heads.append(parts[0])
    return parts


def _reduce(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """What is added up, or compared, stays; the other dimensions pass."""
    axes, keepdims = node.attrs["axes"], node.attrs["keepdims"]
    t.stay([given[0][k] for k in axes])
    rest = [np.zeros(1, np.int64) if k in axes else d for k, d in enumerate(given[0])]
    return rest if keepdims else [d for k, d in enumerate(rest) if k not in axes]


def _matmul(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    a, b = given
    t.unite(a[-1], b[-2])
    result = t.fixed(node)
    result[-1] = b[-1]
    result[-2] = a[-2]
    for k in range(len(result) - 2):
        sides = [g[j] for g in given if (j := k - len(result) + len(g)) >= 0 and j < len(g) - 2 and len(g[j]) > 1]
        result[k] = sides[0] if sides else result[k]
        for other in sides[1:]:
            t.unite(sides[0], other)
    return result


def _conv(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """Of groups, a depthwise convolution's channels go one by one; else the same channels of every group."""
    (x, w), groups, layout = given, node.attrs["groups"], node.attrs["layout"]
    channels = split(x, layout)[1]
    t.stay([d for d in x if d is not channels])
    t.stay(w[2:])
    per, outputs = as_int(node.inputs[1].shape[1]), as_int(node.inputs[1].shape[0])
    if groups == 1:
        t.unite(channels, w[1]) if per > 1 else t.stay([channels])
    elif per == 1 and outputs == groups:
        t.unite(channels, w[0])
    else:
        for g in range(groups):
            t.unite(channels[g * per : (g + 1) * per], w[1]) if per > 1 else t.stay([channels[g : g + 1]])
            each = outputs // groups
            t.unite(w[0][:each], w[0][g * each : (g + 1) * each])
    result = t.fixed(node)
    return [w[0] if k == (1 if layout == "NCHW" else 3) else d for k, d in enumerate(result)]


def _images(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """Pooling and the like: each channel by itself."""
    x, layout = given[0], node.attrs["layout"]
    where = 1 if layout == "NCHW" else 3
    t.stay([d for k, d in enumerate(x) if k != where])
    for other in given[1:]:
        t.stay(other)
    return [x[where] if k == where else d for k, d in enumerate(t.fixed(node))]


def _mixed(t: Tracks, node: Node, given: list[Dims]) -> Dims:
    """An op that is not followed: what it reads stays."""
    for dims in given:
        t.stay(dims)
    return t.fixed(node)


_RULES: Final[dict[str, Rule]] = {
    "broadcast_to": _broadcast,
    "transpose": _transpose,
    "concat": _concat,
    "slice": _slice,
    "reshape": _reshape,
    "matmul": _matmul,
    "conv2d": _conv,
}


def _rule_of(t: Tracks, node: Node) -> Rule:
    if node.op.name in _RULES:
        return _RULES[node.op.name]
    if node.op.has(Trait.ELEMENTWISE):
        return _elementwise
    if node.op.has(Trait.REDUCTION) and {"axes", "keepdims"} <= node.attrs.keys() and len(node.inputs) == 1:
        return _reduce
    if "layout" in node.attrs and node.op.has(Trait.REDUCTION) and len(node.shape) == 4:
        return _images
    return _mixed


def follow(graph: Graph) -> Tracks:
    """The atoms of all values of a graph."""
    t = Tracks(Atoms())
    several: dict[Node, list[Dims]] = {}
    for node in graph.nodes():
        given = [t.dims[i] for i in node.inputs if i in t.dims]
        if "role" in node.attrs and not node.inputs:
            t.dims[node] = t.free(node) if node.attrs["role"] == "parameter" else t.fixed(node)
        elif node.op.has(Trait.CONTROL) or any(i not in t.dims and i not in several for i in node.inputs):
            several[node] = _loop(t, node, given)
        elif node.op.has(Trait.STRUCTURAL) and "index" in node.attrs:
            t.dims[node] = several[node.inputs[0]][node.attrs["index"]]
        elif "value" in node.attrs and not node.inputs:
            t.dims[node] = t.free(node)
        elif not hasattr(node.type, "shape"):
            t.stay([d for g in given for d in g])
            several[node] = [[np.zeros(n if isinstance(n, int) else 1, np.int64) for n in i.shape] for i in node.type.items]
        else:
            t.dims[node] = _rule_of(t, node)(t, node, given)
    for o in graph.outputs:
        t.stay(t.dims[o])
    return t


def _loop(t: Tracks, node: Node, given: list[Dims]) -> list[Dims]:
    """A loop without carries runs its body for each index of its leading axis, which may have fewer; all else stays."""
    attrs = node.attrs
    steps = attrs["sequences"] if attrs.get("carries") == 0 and isinstance(attrs.get("length"), int) else 0
    for k, dims in enumerate(given):
        t.stay(dims[1:] if k < steps else dims)
    for dims in given[1:steps]:
        t.unite(given[0][0], dims[0])
    assert isinstance(node.type, TupleType), "a loop's results"
    results = [[np.zeros(n if isinstance(n, int) else 1, np.int64) for n in i.shape] for i in node.type.items]
    return [[given[0][0], *dims[1:]] for dims in results] if steps else results


# --- units and families -------------------------------------------------------------------------------------------------


@dataclass
class Family:
    """Units that touch the same dimensions of the same parameters.

    name    the first layer whose outputs they are;  members: (parameter, dimension)
    units   roots of the atoms;  places: for each member, which unit each index belongs to (-1: none of them)
    heads   whether a unit is several channels that a reshape takes apart: a head of an attention
    """

    name: str
    members: tuple[tuple[str, int], ...]
    units: list[int]
    places: dict[tuple[str, int], Array]
    heads: bool = False


def families_of(graph: Graph, tracks: Tracks) -> list[Family]:
    """All families, in the order in which the graph uses their weights."""
    touched: dict[int, list[tuple[str, int]]] = {}
    places: dict[tuple[str, int], Array] = {}
    rank: dict[str, int] = {}
    first: dict[Node, int] = {}
    for k, node in enumerate(graph.nodes()):
        for i in node.inputs:
            first.setdefault(i, k)
    for i in sorted((i for i in graph.inputs if i.attrs["role"] == "parameter"), key=lambda i: first.get(i, -1)):
        name = str(i.attrs["name"])
        rank[name] = len(i.shape)
        for d, atoms in enumerate(tracks.dims[i]):
            roots = places[name, d] = tracks.atoms.roots(atoms)
            for r in np.unique(roots):
                if r != STAYS:
                    touched.setdefault(int(r), []).append((name, d))
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for r, members in touched.items():
        groups.setdefault(tuple(members), []).append(r)
    apart = {int(r) for a in tracks.heads for r in tracks.atoms.roots(a)}
    results = {str(x.w.attrs["name"]): x.output[1] for x in find_layers(graph) if "role" in x.w.attrs}
    found: list[Family] = []
    taken: set[str] = set()
    for key, units in groups.items():
        layers = [n for n, _ in key if rank[n] >= 2]
        if not layers or len(units) < 2:
            continue
        outputs = [n for n, d in key if rank[n] >= 2 and results.get(n, 0) == d] or layers
        name = outputs[0].removesuffix(".weight")
        name = name if name not in taken else f"{name}#{sum(t.split('#')[0] == name for t in taken) + 1}"
        taken.add(name)
        order = {u: k for k, u in enumerate(units)}
        own = {m: np.array([order.get(int(r), -1) for r in places[m]]) for m in key}
        found.append(Family(name, key, units, own, any(u in apart for u in units)))
    return found


def unit_scores(family: Family, scores: Mapping[str, Array]) -> Array:
    """The mean score of the weights (of two dimensions or more) that go with each unit."""
    total, count = np.zeros(len(family.units)), np.zeros(len(family.units))
    for (name, d), place in family.places.items():
        s = scores.get(name)
        if s is None or s.ndim < 2:
            continue
        each = s.sum(tuple(k for k in range(s.ndim) if k != d))
        size = s.size // s.shape[d]
        np.add.at(total, place[place >= 0], each[place >= 0])
        np.add.at(count, place[place >= 0], size)
    return total / np.maximum(count, 1)


# --- the smaller graph --------------------------------------------------------------------------------------------------


def shrunk(graph: Graph, tracks: Tracks, gone: Sequence[int], weights: Mapping[str, Array]) -> Graph:
    """The graph without the units of these roots, its weights cut. Raises InputError where an op cannot follow."""
    dead = np.array(sorted(gone), np.int64)

    def kept(atoms: Array) -> Array:
        return ~np.isin(tracks.atoms.roots(atoms), dead)

    done: dict[Node, Node] = {}
    values: dict[str, Array] = {}
    for node in graph.nodes():
        dims = tracks.dims.get(node)
        masks = None if dims is None else [kept(d) for d in dims]
        if "role" in node.attrs and not node.inputs:
            name = str(node.attrs["name"])
            assert masks is not None
            if name in weights:
                values[name] = _cut(np.asarray(weights[name]), masks)
                done[node] = node.replace(shape=values[name].shape)
            else:
                done[node] = node
        elif "value" in node.attrs and not node.inputs:
            assert masks is not None
            array = node.attrs["value"].array
            done[node] = (
                make("constant", value=Literal(_cut(array, masks), node.dtype)) if not all(m.all() for m in masks) else node
            )
        else:
            done[node] = _remade(node, tuple(done[i] for i in node.inputs), tracks, kept)
            if masks is not None:
                shape = tuple(int(m.sum()) if isinstance(n, int) else n for m, n in zip(masks, node.shape, strict=True))
                if done[node].shape != shape:
                    raise InputError(f"{node.op.name} {node.type} cannot go without channels: it became {done[node].type}")
    inputs = tuple(done[i] for i in graph.inputs)
    labels = {done[n]: label for n, label in graph.labels.items() if n in done}
    return Graph(inputs, tuple(done[o] for o in graph.outputs), graph.output_names, graph.name, (), labels, values)


def _cut(array: Array, masks: Sequence[Array]) -> Array:
    for k, m in enumerate(masks):
        if not m.all():
            array = np.compress(m, array, axis=k)
    return np.ascontiguousarray(array)


def _remade(node: Node, inputs: tuple[Node, ...], tracks: Tracks, kept: Callable[[Array], Array]) -> Node:
    """The node on smaller inputs, with the sizes in its attributes changed."""
    attrs: dict[str, Any] = {}
    dims = tracks.dims.get(node)
    if dims is not None and _rule_of(tracks, node) is _elementwise:
        shape = tuple(int(kept(d).sum()) if isinstance(n, int) else n for d, n in zip(dims, node.shape, strict=True))
        inputs = tuple(
            make("broadcast_to", new.inputs[0], shape=shape) if old.op.name == "broadcast_to" and new.shape != shape else new
            for old, new in zip(node.inputs, inputs, strict=True)
        )
    if dims is not None and node.attrs.get("shape") == node.shape:
        attrs["shape"] = tuple(int(kept(d).sum()) if isinstance(n, int) else n for d, n in zip(dims, node.shape, strict=True))
    if "starts" in node.attrs:
        starts, stops = list(node.attrs["starts"]), list(node.attrs["stops"])
        for k, d in enumerate(tracks.dims[node.inputs[0]]):
            mask = kept(d)
            if not mask.all():
                before = np.concatenate([[0], np.cumsum(mask)])
                starts[k], stops[k] = int(before[starts[k]]), int(before[stops[k]])
        attrs |= {"starts": tuple(starts), "stops": tuple(stops)}
    if node.attrs.get("groups", 1) > 1 and node.inputs[1].shape[1] == 1 and node.inputs[1].shape[0] == node.attrs["groups"]:
        attrs["groups"] = as_int(inputs[1].shape[0])
    if node.op.has(Trait.CONTROL) and node.attrs.get("carries") == 0 and isinstance(node.attrs.get("length"), int):
        attrs["length"] = as_int(inputs[0].shape[0])
    changed = {k: v for k, v in attrs.items() if v != node.attrs[k]}
    return node.replace(inputs, **changed)
