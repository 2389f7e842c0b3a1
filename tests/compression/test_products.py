"""Products of two activations in integers: attention's, in a loop over heads and without one; and where they stay float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.report import Report
from tensorwright.ir.errors import InputError
from tensorwright.ir.graph import Graph

from .test_quantize import error, interpreted

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")


class Attention(nn.Module):
    def __init__(self, looped: bool) -> None:
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.looped = looped

    def __call__(self, x: Any) -> Any:
        q, k, v = (f(x).reshape(*x.shape[:2], 2, 8).transpose(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        if self.looped:
            a = tw.scaled_dot_product_attention(q, k, v)
        else:
            a = tw.softmax(q @ k.transpose(0, 1, 3, 2) / np.float32(8**0.5), -1) @ v
        return self.o(a.transpose(0, 2, 1, 3).reshape(*x.shape))


def attention(looped: bool) -> tuple[nn.Module, Array]:
    tw.seed(0)
    return Attention(looped), np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)


@pytest.mark.parametrize("looped", [True, False])
def test_attention_in_integers(looped: bool) -> None:
    net, x = attention(looped)
    report = Report()
    graph = tw.quantize(net, [x], tw.spec(*x.shape), products=True, report=report)
    assert [line.choice for line in report.layers] == ["int8"] * 6
    assert [line.reason for line in report.layers[4:]] == ["multiplies bytes of two activations"] * 2
    reference = interpreted(tw.quantize(net, [x], tw.spec(*x.shape), keep="*"), x)
    right = interpreted(graph, x)
    assert 0 < error(right, reference) < 0.03
    exe = tw.compile(graph)
    assert error(exe(x), right) < 0.01  # a rounding at a half may fall to the other side
    nodes = Graph.parse(exe.text("integers")).nodes()
    if looped:
        (loop,) = (n for n in nodes if n.op.name == "scan")
        assert [i.dtype.name for i in loop.inputs] == ["u8", "i8", "i8"]
        nodes += loop.attrs["body"].nodes()
    assert {n.dtype.name for n in nodes if n.op.name == "contract"} == {"i32"}


def test_where_they_stay_float() -> None:
    net, x = attention(True)
    report, asked = Report(), list[bool]()

    def measure(graph: Graph) -> float:
        loops = [n for n in graph.nodes() if n.op.name == "scan"]
        asked.append(bool(loops))
        tw.compile(graph)  # what is timed can be run
        return (2.0 if graph.inputs[0].dtype.name != "f32" else 1.0) if loops else len(asked) % 2

    floats = tw.quantize(net, [x], tw.spec(*x.shape), products=True, measure=measure, report=report)
    held = [(line.choice, line.float_ms, line.int8_ms) for line in report.layers[4:]]
    assert sum(asked) == 2 and held == [("float", 1.0, 2.0)] * 2
    kept = tw.quantize(net, [x], tw.spec(*x.shape), products=True, keep=[x.name for x in report.layers[4:]])
    assert not any("quantize" in str(n.attrs.get("body")) for g in (floats, kept) for n in g.nodes())
    with pytest.raises(InputError, match="over ranges that were seen"):
        tw.quantize(net, None, tw.spec(*x.shape), products=True, activations="dynamic")
