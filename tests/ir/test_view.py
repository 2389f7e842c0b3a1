"""Pictures of graphs: well-formed, escaped, without overlaps, quick on large graphs."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from tensorwright.ir import Graph, Label, Location, Node, Trait, full, input_node, make, tensor, to_dot, to_networkx, to_svg
from tensorwright.ir.errors import TensorwrightError
from tensorwright.ir.testing import random_graph

SVG = "{http://www.w3.org/2000/svg}"


def residual(blocks: int) -> Graph:
    x = input_node("x", tensor("f32", (8, 16)))
    inputs, h = [x], x
    for k in range(blocks):
        w = input_node(f"block{k}.weight", tensor("f32", (16, 16)), "parameter")
        inputs.append(w)
        y = make("matmul", h, w)
        y = make("maximum", y, full(0.0, y.tensor))
        h = make("add", h, y)
    return Graph(tuple(inputs), (h,))


def drawn(graph: Graph) -> list[Node]:
    """The nodes with a box: all but scalar constants and what only moves one, unless they are returned."""
    uniform: set[Node] = set()
    for n in graph.nodes():
        scalar = n.op.name == "constant" and n.attrs["value"].array.size == 1
        if scalar or (n.op.has(Trait.MOVEMENT) and len(n.inputs) == 1 and n.inputs[0] in uniform):
            uniform.add(n)
    return [n for n in graph.nodes() if n not in uniform or n in graph.outputs]


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    root = ET.fromstring(svg)
    found = [r for g in root.iter(f"{SVG}g") for r in g.findall(f"{SVG}rect")]
    return [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in found]


@pytest.mark.parametrize("graph", [residual(1), residual(40), random_graph(np.random.default_rng(0), 60)[0], Graph((), ())])
def test_svg_is_well_formed_and_nothing_overlaps(graph):
    svg = to_svg(graph)
    places = boxes(svg)
    assert len(places) == len(drawn(graph))
    root = ET.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    rows: dict[float, list[float]] = {}
    for x, y, w, h in places:
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
        rows.setdefault(y, []).append(x)
    for xs in rows.values():
        xs.sort()
        assert all(b - a >= 150 for a, b in pairwise(xs))


def test_the_trunk_of_a_residual_network_stays_straight():
    graph = residual(60)
    svg = to_svg(graph)
    assert float(ET.fromstring(svg).get("width")) < 1500
    shown = drawn(graph)
    assert len(ET.fromstring(svg).findall(f".//{SVG}path")) == sum(len(set(n.inputs) & set(shown)) for n in shown)
    assert svg.count("maximum(·, 0)") == 60


def test_text_is_escaped():
    x = input_node('<script>&"', tensor("f32", ()))
    n = make("neg", x)
    g = Graph((x,), (n,), ("</svg>",), "a<b", labels={n: Label("<i>", Location("f", 1, "x < y & z"))})
    root = ET.fromstring(to_svg(g))
    assert "".join(root.itertext()).count("<script>") == 4
    assert '"%\\"<script>' in to_dot(g) and 'digraph "a<b"' in to_dot(g)


def test_networkx_has_the_structure():
    g = residual(3)
    view = to_networkx(g)
    assert len(view) == len(g.nodes()) and view.number_of_edges() == sum(len(n.inputs) for n in g.nodes())
    out = next(v for v, d in view.nodes(data=True) if d["outputs"])
    assert view.nodes[out]["op"] == "add" and view.nodes[out]["node"] is g.outputs[0]
    assert sorted(d["position"] for _, _, d in view.in_edges(out, data=True)) == [0, 1]


def test_a_picture_has_a_limit_and_dot_has_none():
    n = x = input_node("x", tensor("f32", ()))
    for _ in range(6000):
        n = make("neg", n)
    with pytest.raises(TensorwrightError, match="use to_dot"):
        to_svg(Graph((x,), (n,)))
    assert to_dot(Graph((x,), (n,))).count("->") == 6000
    start = time.process_time()
    to_svg(residual(500))
    assert time.process_time() - start < 20


def test_importing_ir_does_not_import_networkx():
    code = "import sys, tensorwright.ir; assert 'networkx' not in sys.modules; assert 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
