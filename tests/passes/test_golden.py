"""Golden texts: small graphs after each pipeline stage that matters. `UPDATE_GOLDEN=1 pytest tests/passes` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tensorwright.ir.build import full, get, input_node
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.text import print_graph
from tensorwright.ir.types import tensor
from tensorwright.passes.manager import run_pipeline
from tensorwright.passes.pipeline import inference, training
from tensorwright.passes.prepare import split

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def t(*shape, dtype="f32"):
    return tensor(dtype, shape)


def bc(x, shape):
    return make("broadcast_to", x, shape=shape)


def linear_softmax():
    x, w, b = input_node("x", t(4, 8)), input_node("w", t(5, 8), "parameter"), input_node("b", t(5), "parameter")
    y = make("add", make("matmul", x, make("transpose", w, perm=(1, 0))), bc(b, (4, 5)))
    e = make("exp", make("sub", y, bc(make("max", y, axes=(1,), keepdims=True), y.shape)))
    return Graph((x, w, b), (make("div", e, bc(make("sum", e, axes=(1,), keepdims=True), e.shape)),), name="linear_softmax")


def conv_norm_relu():
    x, w = input_node("x", t(1, 3, 8, 8)), input_node("w", t(8, 3, 3, 3), "parameter")
    y = make("conv2d", x, w, padding=((1, 1), (1, 1)))
    scale, mean = input_node("scale", t(8), "parameter"), input_node("mean", t(8), "parameter")

    def channel(v):
        return bc(make("reshape", v, shape=(8, 1, 1)), y.shape)

    y = make("mul", make("sub", y, channel(mean)), channel(scale))
    y = make("max_pool2d", make("maximum", y, full(0.0, y.tensor)), kernel=(2, 2), stride=(2, 2))
    return Graph((x, w, scale, mean), (y,), name="conv_norm_relu")


def sgd_step():
    x, w, m = input_node("x", t(4, 8)), input_node("w", t(8, 3), "state"), input_node("m", t(8, 3), "state")
    v = make("mark", w, id=0)
    y = make("tanh", make("matmul", x, v))
    loss = make("mean", make("mul", y, y), axes=(0, 1), keepdims=False)
    grad = get(make("gradient", loss, v), 0)
    new_m = make("add", make("mul", m, full(0.9, m.tensor)), grad)
    new_w = make("sub", w, make("mul", new_m, full(0.1, w.tensor)))
    return Graph((w, m, x), (new_w, new_m, loss), ("w", "m", "loss"), "sgd_step", ((0, 0), (1, 1)))


CASES = {
    "linear_softmax": (linear_softmax, inference),
    "conv_norm_relu": (conv_norm_relu, inference),
    "sgd_step": (sgd_step, training),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name, context):
    build, passes = CASES[name]
    graph = build()
    after = run_pipeline(graph, passes(), context(8))
    prepare, run = split(after) if passes is inference else (None, after)
    parts = ["# before", print_graph(graph, labels=False)]
    if prepare is not None:
        parts += ["# prepare", print_graph(prepare, labels=False)]
    parts += ["# run", print_graph(run, labels=False)]
    text = "\n".join(parts)
    path = GOLDEN / f"passes_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"differs from {path.name}; UPDATE_GOLDEN=1 writes it anew"
