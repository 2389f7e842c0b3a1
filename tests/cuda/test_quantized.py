"""Quantised networks on CUDA: the integers are those of a processor, bit for bit; convolutions of bytes are on tensor cores."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.graph import Graph
from tensorwright.ir.graphs import specialize
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.tools import assemble

pytestmark = pytest.mark.unvalidated("its passes are those of tests/compression")
Array = np.ndarray[Any, Any]


class Net(nn.Module):
    """Convolutions of 3 and of 32 channels, one that is added to, one with a stride, groups of one and of four, both poolings."""

    def __init__(self) -> None:
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise, self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 3, padding=1, groups=8)
        self.third, self.head = nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.Linear(48, 10)

    def __call__(self, x: Any) -> Any:
        y = tw.relu(self.first(x))
        y = tw.relu(self.second(y) + y)
        y = tw.relu(self.depthwise(tw.max_pool2d(y, 2)))
        y = tw.relu(self.third(tw.relu(self.grouped(y))))
        return self.head(tw.reshape(tw.avg_pool2d(y, 3), (y.shape[0], 48)))


@pytest.fixture(scope="module")
def quantized() -> tuple[Graph, Array, list[Array]]:
    """The graph with every tensor that it quantises as an output, an input, and what a processor makes of it."""
    tw.seed(0)
    x = np.random.default_rng(0).normal(size=(1, 3, 12, 12)).astype(np.float32)
    graph = tw.quantize(Net(), [x])
    codes = [n for n in graph.nodes() if n.op.has(Trait.QUANTIZE)]
    assert len(codes) >= 6, "every layer reads bytes"
    graph = Graph(graph.inputs, (*codes, *graph.outputs), (), graph.name, weights=graph.weights)
    return graph, x, tw.compile(graph)(x)


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_integers_are_those_of_a_processor(sm: int, quantized: tuple[Graph, Array, list[Array]]) -> None:
    graph, x, expected = quantized
    exe: Any = tw.compile(graph, target=f"cuda-sm_{sm}")
    device = Emulator(1 << 24, sm=sm)
    exe._open = lambda: device
    found = exe(x)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_array_equal(f, e)
    assert sum(f.dtype == np.uint8 for f in found) == len(found) - 1
    program = exe.compiled.run
    assert not assemble(program.ptx, sm).wrong, "spills, or worse"
    kind = {75: "m8n8k16", 80: "m16n8k32", 90: "m16n8k32"}[sm]
    entries = {e.split("(")[0].strip(): e for e in program.ptx.split(".visible .entry")[1:]}
    multiplied = {n for n, e in entries.items() if f"mma.sync.aligned.{kind}.row.col" in e}
    assert len(multiplied) >= 2, "the convolutions of 32 channels and more"
    nine = [i for i in program.infos if "second.weight_q" in " ".join(i.weights)]
    assert nine, "the 3x3 convolution of 32 channels"
    assert nine[0].name in multiplied
    text = entries[nine[0].name]
    assert re.search(r"mma\.sync\S*\.s32\.u8\.s8\.s32", text)
    assert ("cp.async" in text) == (sm >= 80), "channels last are runs of 16 bytes"
    assert not re.search(r"st\.global\.(v\d\.)?f32", text), "what it writes is requantised"
    alone = next(i for i in program.infos if "depthwise.weight_q" in " ".join(i.weights))
    assert alone.note.startswith("a thread for")
    assert "ld.global.nc.s8" in entries[alone.name] or "ld.global.nc.b8" in entries[alone.name]


def test_the_interpreter_agrees_within_a_step_of_a_code(quantized: tuple[Graph, Array, list[Array]]) -> None:
    """It computes what the codes stand for in floats: where a value is on the edge of two codes it may take the other, and what
    follows moves by as much."""
    graph, x, expected = quantized
    sized = specialize(graph, {"N": len(x)})
    for f, e in zip(run(sized, {**graph.weights, str(graph.inputs[0].attrs["name"]): x})[:-1], expected[:-1], strict=True):
        apart = np.abs(f.astype(np.int64) - e.astype(np.int64))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01


DEPTHWISE = [
    (3, 1, 36),
    (5, 2, 33),
    (3, 1, 128),
]  # kernel, stride, channels: in fours, one by one, and enough for threads of four


@pytest.mark.parametrize(("size", "stride", "channels"), DEPTHWISE)
def test_depthwise_convolutions_read_and_write_side_by_side(size: int, stride: int, channels: int) -> None:
    """A thread for each result, in the order in which results lie; where there are many, for four."""
    tw.seed(0)
    module = nn.Conv2d(channels, channels, size, padding=size // 2, stride=stride, groups=channels)
    side = 24 if channels == 128 else 7
    x = np.random.default_rng(1).normal(size=(1, channels, side, side)).astype(np.float32)
    exe: Any = tw.compile(module, tw.spec(*x.shape), target="cuda-sm_80")
    exe._open = lambda: Emulator(1 << 24)
    found, expected = exe(x), tw.compile(module, tw.spec(*x.shape))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # sums of at most 25 products in two orders
    info = next(i for i in exe.compiled.run.infos if i.name.startswith("contraction"))
    assert info.note == ("a thread for 4 results" if channels == 128 else "a thread for each result")
    assert not assemble(exe.compiled.run.ptx, 80).wrong
