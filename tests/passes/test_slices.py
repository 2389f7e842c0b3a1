"""The first layers of a net for a few images at a time: which ops allow it, where the cut is, and that nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.benchmarks.models import ConvNorm, LeNet
from tensorwright.frontend.tracing import trace_model
from tensorwright.ir.build import constant, input_node
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import ValidationError
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait, make
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.passes import pipeline, slices
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm
from tensorwright.passes.facts import Facts
from tensorwright.passes.images import separate
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.slices import MANY, Layer, Slices, choose, prefix_of
from tensorwright.passes.validate import Validator

TARGET = row("x86-64-v4")
ALL = 10_000


def inp(name: str, *shape: int, role: str = "data") -> Node:
    return input_node(name, TensorType(f32, shape), role)


class Block(tw.nn.Module):
    """Padding, strides, batch norm, pooling, a residual, a reduction and a product: what stands before the cut in a net."""

    def __init__(self) -> None:
        self.a, self.b = ConvNorm(3, 8, 3, act=tw.relu), ConvNorm(8, 8, 1)
        self.bias = tw.nn.Parameter(np.linspace(-1, 1, 8, dtype="f").reshape(8, 1, 1))
        self.f = tw.nn.Linear(8, 5)

    def __call__(self, x: Any) -> Any:
        x = tw.max_pool2d(self.a(x), 2, 2)
        y = tw.relu(self.b(x) + x) * 0.5 + self.bias
        return tw.softmax(self.f(tw.mean(y, (2, 3))), -1)


def middle(graph: Graph) -> Graph:
    """The graph as the pass gets it."""
    passes = pipeline.inference(TARGET)
    at = [p.name for p in passes].index("slices")
    return run_pipeline(graph, passes[:at], Context(target=TARGET))


def arrays(graph: Graph) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {i.attrs["name"]: rng.uniform(0.05, 0.15, i.tensor.static_shape).astype("f") for i in graph.inputs}


def has_loop(graph: Graph) -> bool:
    return any(n.op.has(Trait.CONTROL) for n in graph.nodes())


def test_every_cut_gives_what_the_whole_batch_gives():
    graph = middle(trace_model(Block(), tw.spec(6, 3, 8, 8)).graph)
    prefix = prefix_of(graph, Facts())
    assert prefix is not None and prefix.nodes[-1] is graph.outputs[0]  # all of it
    given = arrays(graph)
    (expected,) = run(graph, given)
    for last in range(1, len(prefix.nodes) + 1):
        after = Slices(images=(1, 2, 3)[last % 3], last=last).run(graph, Context(target=TARGET))
        assert has_loop(after) and after.inputs == graph.inputs
        np.testing.assert_allclose(run(after, given)[0], expected, rtol=1e-5)


def test_values_that_are_used_again_leave_the_loop_together():
    x, w = inp("x", 4, 3), inp("w", 3, 3, role="parameter")
    a = make("exp", x)
    b = make("matmul", a, w)
    total = make("sum", a, axes=(0,), keepdims=False)  # from all images, of what the loop makes
    graph = middle(Graph((x, w), (b, total, a)))
    after = Slices(images=2, last=ALL).run(graph, Context(target=TARGET))
    assert has_loop(after)
    for got, expected in zip(run(after, arrays(graph)), run(graph, arrays(graph)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


X = inp("x", 4, 4)
MIXES = {
    "sum": make("sum", X, axes=(0,), keepdims=True),
    "transpose": make("transpose", X, perm=(1, 0)),
    "reverse": make("reverse", X, axes=(0,)),
    "slice": make("slice", X, starts=(1, 0), stops=(3, 4), steps=(1, 1)),
    "cumsum": make("cumsum", X, axis=0, exclusive=False, reverse=False),
    "matmul": make("matmul", inp("w", 4, 4, role="parameter"), X),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_images_is_seen(name):
    node = MIXES[name]
    assert not separate(node, [k for k, i in enumerate(node.inputs) if i is X], Facts())


def test_a_table_of_all_images_and_a_mean_over_them_end_the_prefix():
    table = constant(np.arange(12, dtype="f").reshape(4, 3))
    x = inp("x", 4, 3)
    y = make("exp", x)
    mean = make("broadcast_to", make("sum", y, axes=(0,), keepdims=True), shape=(4, 3))
    for other in (table, mean):
        prefix = prefix_of(Graph((x,), (make("add", y, other),)), Facts())
        assert prefix is not None and prefix.nodes == (y,)


def test_the_model_cuts_where_images_get_small_and_weights_large():
    x = inp("x", 8, 3)
    early = [Layer(x, 4 << 20, 100_000_000, 3136, 65_536)] * 10
    late = [Layer(x, 400_000, 100_000_000, 49, 8 << 20)] * 10
    last, images, gain = choose(early + late, 8, TARGET)
    assert last == 10 and images <= 2 and gain > slices.GAIN
    assert choose(late, 8, TARGET)[2] < slices.GAIN
    small = [Layer(x, 1000, 100_000, 4, 1000)]
    assert choose(small, 64, TARGET) == (0, 0, 1.0)  # no work to share
    many = choose([Layer(x, 20_000, 500_000, 100, 4000)] * 4, 64, TARGET)
    assert many[0] == 4 and 64 // many[1] >= MANY  # one fork in the place of one for each layer


def test_training_keeps_the_batch():
    assert "slices" not in {p.name for p in pipeline.training(TARGET)}
    assert pipeline.parse("slices{images=2, last=5}") == (Slices(images=2, last=5),)


@pytest.mark.unvalidated("64 images through the interpreter for each of twenty passes; the values are checked here")
def test_a_sliced_net_gives_the_same_bits_on_any_number_of_threads():
    model, x = LeNet(), np.random.default_rng(1).standard_normal((64, 1, 28, 28)).astype("f")
    results = []
    for threads in (1, 2, 4):
        exe = tw.compile(model, tw.spec(*x.shape), threads=threads)
        assert "scan" in exe.text("slices")
        results.append(np.array(exe(x)))
    assert all((r == results[0]).all() for r in results)
    expected = tw.compile(model, tw.spec(1, 1, 28, 28))
    np.testing.assert_allclose(results[0][:3], np.concatenate([expected(x[k : k + 1]) for k in range(3)]), rtol=1e-4, atol=1e-5)


def test_a_planted_bug_is_caught(monkeypatch, tmp_path):
    x = inp("x", 4, 3)
    graph = Graph((x,), (make("reverse", make("exp", x), axes=(0,)),))
    passes, hooks = [ContractForm(), Slices(images=2, last=ALL)], Hooks(validate=Validator(folder=tmp_path))
    run_pipeline(graph, passes, Context(target=TARGET), hooks)
    monkeypatch.setattr(slices, "separate", lambda node, moving, facts: True)
    with pytest.raises(ValidationError, match="slices"):
        run_pipeline(graph, passes, Context(target=TARGET), hooks)
