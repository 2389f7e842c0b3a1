"""Contractions of operands that were rounded to bf16: which become products of pairs, and that they keep their numbers."""

from __future__ import annotations

import numpy as np
import tensorwright as tw
from tensorwright.compression.search_kinds import rounded
from tensorwright.compression.source import source_of
from tensorwright.driver import build
from tensorwright.ir.dtypes import bf16, f32
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait
from tensorwright.ir.target import Target, row, with_bf16
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.layers import find_layers
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator

TARGET = with_bf16(row("x86-64-v4"))


def halves(model: tw.nn.Module, shape: tuple[int, ...], operands: slice = slice(0, 2)) -> Graph:
    """A model whose layers read rounded operands (both, or some)."""
    source = source_of(model, [tw.spec(*shape)], [])
    layers = {x.node for x in find_layers(source.graph)}

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        chosen = set(inputs[operands]) if node in layers else set()
        return node.replace(tuple(rounded(i) if i in chosen else i for i in inputs))

    g = source.graph.map_nodes(rule)
    return Graph(g.inputs, g.outputs, g.output_names, g.name, (), g.labels, source.values)


def contractions(graph: Graph, target: Target) -> list[Node]:
    """The contractions just after the pass."""
    passes = pipeline.inference(TARGET)
    at = next(k for k, p in enumerate(passes) if p.name == "rounded_products")
    ctx = Context(target=target)
    before = run_pipeline(graph, passes[:at], ctx, Hooks())
    after = run_pipeline(before, passes[at : at + 1], ctx, Hooks(validate=Validator()))
    return [n for n in after.nodes() if n.op.has(Trait.CONTRACTION)]


def test_rounded_operands_multiply_in_pairs_and_others_stay() -> None:
    tw.seed(0)
    conv, shape = tw.nn.Conv2d(8, 16, 3, stride=2, padding=1), (1, 8, 9, 9)
    (pairs,) = contractions(halves(conv, shape), TARGET)
    assert [i.dtype for i in pairs.inputs] == [bf16, bf16] and pairs.dtype is f32, "through the padding"
    (plain,) = contractions(halves(conv, shape, slice(0, 1)), TARGET)
    assert [i.dtype for i in plain.inputs] == [f32, f32], "the weights were not rounded"
    (elsewhere,) = contractions(halves(conv, shape), row("x86-64-v3"))
    assert [i.dtype for i in elsewhere.inputs] == [f32, f32], "no instruction for pairs"


def test_compiled_they_keep_their_numbers() -> None:
    tw.seed(0)
    graph = halves(tw.nn.Sequential(tw.nn.Linear(40, 24), tw.nn.ReLU(), tw.nn.Linear(24, 8)), (3, 40))
    x = np.random.default_rng(0).standard_normal((3, 40), dtype=np.float32)
    given = {"x": x, **{str(i.attrs["name"]): graph.weights[str(i.attrs["name"])] for i in graph.inputs[1:]}}
    expected = run(graph, given)[0]
    assert np.abs(build(graph, graph.weights)(x) - expected).max() < 2e-6 * np.abs(expected).max() * 40  # sums of 40 in f32
