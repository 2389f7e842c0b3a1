"""Floats that hold integers are known as such, and Winograd's method leaves sums of them alone."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen.contraction import preferred_panel
from tensorwright.ir.build import constant, get, input_node
from tensorwright.ir.dtypes import DType, f32, i8, u8
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.facts import Facts
from tensorwright.passes.manager import run_pipeline
from tensorwright.passes.whole_numbers import whole


def centred(x: Node, zero: float) -> Node:
    return make("sub", make("cast", x, dtype=f32), make("broadcast_to", constant(zero, f32), shape=x.shape))


def image(dtype: DType) -> Node:
    return input_node("x", TensorType(dtype, (1, 64, 64, 64)))


def loop() -> Node:
    """What a loop gives: a value of a node that has several."""
    total, x = (input_node(n, TensorType(f32, (4,))) for n in ("p0", "p1"))
    xs = input_node("xs", TensorType(f32, (3, 4)))
    body = Graph((total, x), (make("add", total, x), x))
    return get(make("scan", total, xs, body=body, length=3, carries=1, sequences=1), 0)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (centred(image(u8), 3.0), True),
        (make("pad", centred(image(u8), 3.0), low=(0, 1, 1, 0), high=(0, 1, 1, 0), interior=(0, 0, 0, 0), value=0.0), True),
        (centred(image(u8), 3.5), False),
        (centred(image(u8), np.inf), False),
        (make("exp", make("cast", image(u8), dtype=f32)), False),
        (image(f32), False),
        (loop(), False),
    ],
)
def test_what_holds_integers(node: Node, expected: bool) -> None:
    assert whole(node, Facts()) is expected


def test_quantised_convolutions_stay_direct_sums() -> None:
    """Winograd's transforms round; a ConvInteger that is off by one half of a unit is off by one after its cast."""
    target = row("x86-64-v4")
    w = input_node("w", TensorType(i8, (64, 64, 3, 3)), "parameter")

    def passed(source: Node, x: Node) -> str:
        y = make("conv2d", x, make("cast", w, dtype=f32), layout="NHWC", padding=((1, 1), (1, 1)))
        ctx = Context(target=target, preferred_panel=preferred_panel)
        return str(run_pipeline(Graph((source, w), (y,)), pipeline.inference(target), ctx))

    floats, integers = image(f32), image(u8)
    assert "winograd_output(" in passed(floats, floats)
    assert "winograd_output(" not in passed(integers, centred(integers, 3.0))
