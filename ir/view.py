"""A graph for other eyes: as a networkx graph for analysis, as DOT, and as an SVG drawn by a small layered layout here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .errors import TensorwrightError
from .graph import Graph, Literal, Node
from .op import Trait
from .text import print_node, value_names

if TYPE_CHECKING:
    import networkx as nx

# The first trait that a node has decides its colour; what has none of them is plain.
_COLOURS: Final[tuple[tuple[Trait, str], ...]] = (
    (Trait.CONTRACTION, "#f6c177"),
    (Trait.REDUCTION, "#e8a2b0"),
    (Trait.RANDOM, "#d3b5e5"),
    (Trait.BARRIER, "#cfcfcf"),
    (Trait.ELEMENTWISE, "#b5d8f0"),
    (Trait.MOVEMENT, "#c3e2c0"),
    (Trait.VIEW, "#c3e2c0"),
)
_ROLE_COLOURS: Final = {"data": "#ffffff", "parameter": "#ece3c8", "state": "#ece3c8", "prepared": "#ece3c8"}
_PLAIN: Final = "#eeeeee"
SVG_LIMIT: Final = 5000  # nodes; a larger picture is unreadable and its layout slow

_BOX, _HEIGHT, _GAP, _LEVEL = 150.0, 34.0, 18.0, 74.0
_THIN = 10.0  # the width an edge takes where it passes a layer


def to_networkx(graph: Graph) -> nx.MultiDiGraph:
    """A networkx graph: one vertex per node (keyed by its printed name), one edge per operand with its position.

    Vertices hold `op`, `type`, `text`, `node`, and `outputs`: the names under which the graph returns it.
    """
    import networkx as nx

    names, view = value_names(graph), nx.MultiDiGraph(name=graph.name)
    for node, name in names.items():
        returned = [n for n, o in zip(graph.output_names, graph.outputs, strict=True) if o is node]
        text = print_node(node, names, graph.labels.get(node))
        view.add_node(name, op=node.op.name, type=str(node.type), text=text, node=node, outputs=returned)
    for node, name in names.items():
        for position, operand in enumerate(node.inputs):
            view.add_edge(names[operand], name, position=position)
    return view


def to_dot(graph: Graph) -> str:
    """The graph in Graphviz' DOT language."""
    names = value_names(graph)
    lines = [f"digraph {_quoted(graph.name)} {{", "  node [shape=box, style=filled, fontname=Helvetica];"]
    for node, name in names.items():
        label = "\n".join(_caption(graph, node, names))
        lines.append(f"  {_quoted(name)} [label={_quoted(label)}, fillcolor={_quoted(_colour(node))}];")
    for node, name in names.items():
        lines += [f"  {_quoted(names[operand])} -> {_quoted(name)};" for operand in node.inputs]
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(graph: Graph) -> str:
    """A picture of the graph, inputs at the top: boxes coloured by trait; hovering shows a node's line of text.

    Scalar constants have no box of their own: they stand in the title of what uses them.
    Raises TensorwrightError for more than SVG_LIMIT nodes.
    """
    names = value_names(graph)
    if len(names) > SVG_LIMIT:
        raise TensorwrightError(f"graph {graph.name!r} has {len(names)} nodes, a picture {SVG_LIMIT} at most: use to_dot")
    scalars = _scalars(graph)
    layout = _Layout(graph, set(scalars))
    edges, boxes = [], []
    for path in layout.paths:
        points = [layout.centre(v) for v in path]
        x, y = points[0]
        d = f"M{x:.0f} {y + _HEIGHT / 2:.0f}"
        y += _HEIGHT / 2
        for k, (to_x, to_y) in enumerate(points[1:], 2):
            to_y -= _HEIGHT / 2 if k == len(points) else 0.0
            middle = (y + to_y) / 2
            d += f" C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
            x, y = to_x, to_y
        edges.append(f'<path d="{d}"/>')
    returned = set(graph.outputs)
    for node in layout.layer:
        x, y = layout.centre(node)
        caption = _caption(graph, node, names, scalars)
        stroke = ' stroke="#a03030" stroke-width="2"' if node in returned else ""
        text = "".join(
            f'<text x="{x:.0f}" y="{y - 3 + 13 * k:.0f}" font-size="{11 - 2 * k}">{escape(_fit(t, 24 + 4 * k))}</text>'
            for k, t in enumerate(caption[:2])
        )
        boxes.append(
            f"<g><title>{escape(print_node(node, names, graph.labels.get(node)))}</title>"
            f'<rect x="{x - _BOX / 2:.0f}" y="{y - _HEIGHT / 2:.0f}" width="{_BOX:.0f}" height="{_HEIGHT:.0f}" rx="5"'
            f' fill="{_colour(node)}"{stroke}/>{text}</g>'
        )
    width, height = layout.size
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
            f' height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
            f"<title>{escape(graph.name)}</title>",
            '<rect width="100%" height="100%" fill="#fcfcfc"/>',
            '<g fill="none" stroke="#888888" stroke-width="1.2">',
            *edges,
            '</g>\n<g stroke="#555555" stroke-width="0.8">',
            *(b.replace("<text ", '<text stroke="none" fill="#202020" ') for b in boxes),
            "</g>\n</svg>\n",
        ]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _fit(text: str, width: int) -> str:
    """The text, cut to a width; of the name of an input, the end tells more."""
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if text.startswith("%") else text[: width - 1] + "…"


def _scalars(graph: Graph) -> dict[Node, str]:
    """The constants of one element, and what only moves such (a broadcast), with their value as text; not outputs."""
    found: dict[Node, str] = {}
    for node in graph.nodes():
        value = node.attrs.get("value")
        if isinstance(value, Literal) and value.array.size == 1:
            found[node] = f"{value.array.item():.6g}"
        elif node.op.has(Trait.MOVEMENT) and len(node.inputs) == 1 and node.inputs[0] in found:
            found[node] = found[node.inputs[0]]
    for node in graph.outputs:
        found.pop(node, None)
    users = graph.users()
    return {n: text for n, text in found.items() if users[n]}


def _caption(graph: Graph, node: Node, names: dict[Node, str], scalars: Mapping[Node, str] = MappingProxyType({})) -> list[str]:
    """A title and the type; scalar operands and the names of outputs go with the title."""
    role = node.attrs.get("role") if not node.inputs else None
    label = graph.labels.get(node)
    title = f"{names[node]} {role}" if role == "data" else names[node] if role else node.op.name
    if any(i in scalars for i in node.inputs):
        title += f"({', '.join(scalars.get(i, '·') for i in node.inputs)})"
    if label is not None and label.name and not role:
        title = f"{title} · {label.name}"
    kind, body = node.attrs.get("kind"), node.attrs.get("body")
    if isinstance(body, Graph) and kind is not None:
        inner = [n.op.name for n in body.nodes() if n.inputs]
        title = f"{kind}: {' '.join(inner)}"
    elif node.op.has(Trait.CONTROL):
        counts = (f"{k}: {sum(1 for n in v.nodes() if n.inputs)} nodes" for k, v in node.attrs.items() if isinstance(v, Graph))
        title = f"{title} ({', '.join(counts)})"
    returned = [n for n, o in zip(graph.output_names, graph.outputs, strict=True) if o is node]
    if returned:
        title = f"{title} → {', '.join(returned)}"
    return [title, str(node.type)]


def _colour(node: Node) -> str:
    if "role" in node.attrs and not node.inputs:
        return _ROLE_COLOURS.get(node.attrs["role"], _PLAIN)
    body = node.attrs.get("body")
    for trait, colour in _COLOURS:
        if node.op.has(trait) or (isinstance(body, Graph) and any(n.op.has(trait) for n in body.nodes())):
            return colour
    return _PLAIN


_Vertex = Any  # a Node, or (Node, layer): where the edges from a node pass a layer


class _Layout:
    """Layers by longest path, order within a layer by barycentres, positions close to the mean of the neighbours."""

    def __init__(self, graph: Graph, hidden: set[Node]) -> None:
        self.nodes = [n for n in graph.nodes() if n not in hidden]
        self.hidden = hidden
        self.weight: dict[_Vertex, float] = {}
        for node in self.nodes:  # what depends on data is the trunk, kept straight; the rest stands beside it
            trunk = node.attrs.get("role") == "data" or any(self.weight[i] == 1.0 for i in self._operands(node))
            self.weight[node] = 1.0 if trunk else 0.02
        self.layer = self._layers()
        self.paths: list[list[_Vertex]] = []
        up: dict[_Vertex, list[_Vertex]] = {}
        down: dict[_Vertex, list[_Vertex]] = {}
        rows: list[list[_Vertex]] = [[] for _ in range(max(self.layer.values(), default=-1) + 1)]
        for node, level in self.layer.items():
            rows[level].append(node)
        for node in list(self.layer):
            for operand in self._operands(node):
                path: list[_Vertex] = [operand]
                for level in range(self.layer[operand] + 1, self.layer[node]):
                    passing = (operand, level)
                    if passing not in up:
                        rows[level].append(passing)
                        self.weight[passing] = 0.3 * self.weight[operand]
                        up[passing] = [path[-1]]
                        down.setdefault(path[-1], []).append(passing)
                    path.append(passing)
                up.setdefault(node, []).append(path[-1])
                down.setdefault(path[-1], []).append(node)
                self.paths.append([*path, node])
        self.rows = rows
        for sweep in range(6):
            order = rows if sweep % 2 == 0 else rows[::-1]
            neighbours = up if sweep % 2 == 0 else down
            rank = {v: k for row in rows for k, v in enumerate(row)}
            for row in order:
                before = {v: k for k, v in enumerate(row)}
                wish = {v: _mean([rank[u] for u in neighbours.get(v, [])], before[v]) for v in row}
                row.sort(key=wish.__getitem__)
                rank.update((v, k) for k, v in enumerate(row))
        self._place(up, down)

    def _operands(self, node: Node) -> list[Node]:
        return [i for i in dict.fromkeys(node.inputs) if i not in self.hidden]

    def _layers(self) -> dict[Node, int]:
        import networkx as nx

        view = nx.DiGraph()
        nodes = self.nodes
        view.add_nodes_from(range(len(nodes)))
        number = {n: k for k, n in enumerate(nodes)}
        view.add_edges_from((number[i], number[n]) for n in nodes for i in self._operands(n))
        layer = {nodes[k]: level for level, ks in enumerate(nx.topological_generations(view)) for k in ks}
        users: dict[Node, list[Node]] = {n: [] for n in nodes}
        for n in nodes:
            for i in self._operands(n):
                users[i].append(n)
        for n in reversed(nodes):  # parameters, constants and what is made of them stand next to their first use
            if users[n] and (not n.inputs or self.weight[n] < 1.0):
                layer[n] = min(layer[u] for u in users[n]) - 1
        return layer

    def _place(self, up: dict[_Vertex, list[_Vertex]], down: dict[_Vertex, list[_Vertex]]) -> None:
        x: dict[_Vertex, float] = {}
        for row in self.rows:
            at = 0.0
            for v in row:
                x[v] = at + _width(v) / 2
                at += _width(v) + _GAP
        for sweep in range(12):
            neighbours = up if sweep % 2 == 0 else down
            for row in self.rows if sweep % 2 == 0 else self.rows[::-1]:
                wish = [self._pull(v, neighbours, x) for v in row]
                for v, at in zip(row, self._spread(row, wish), strict=True):
                    x[v] = at
        left = min((x[v] - _width(v) / 2 for v in x), default=0.0)
        right = max((x[v] + _width(v) / 2 for v in x), default=0.0)
        self.x = {v: at - left + 20 for v, at in x.items()}
        self.size = (right - left + 40, len(self.rows) * _LEVEL + 20)

    def _pull(self, v: _Vertex, neighbours: dict[_Vertex, list[_Vertex]], x: dict[_Vertex, float]) -> float:
        near = neighbours.get(v, [])
        weight = sum(self.weight[u] for u in near)
        return sum(self.weight[u] * x[u] for u in near) / weight if near else x[v]

    def _spread(self, row: list[_Vertex], wish: list[float]) -> list[float]:
        """Positions near the wishes, in order and without overlap: blocks that would overlap move together to their mean."""
        offsets = [0.0]
        for left, right in pairwise(row):
            offsets.append(offsets[-1] + (_width(left) + _width(right)) / 2 + _GAP)
        blocks: list[tuple[float, float, int]] = []  # weighted sum of wishes less offsets, weight, members
        for v, w, offset in zip(row, wish, offsets, strict=True):
            block = (self.weight[v] * (w - offset), self.weight[v], 1)
            while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
                last = blocks.pop()
                block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
            blocks.append(block)
        base = [total / weight for total, weight, count in blocks for _ in range(count)]
        return [b + offset for b, offset in zip(base, offsets, strict=True)]

    def centre(self, v: _Vertex) -> tuple[float, float]:
        level = self.layer[v] if isinstance(v, Node) else v[1]
        return self.x[v], 20 + _HEIGHT / 2 + level * _LEVEL


def _width(v: _Vertex) -> float:
    return _BOX if isinstance(v, Node) else _THIN


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
