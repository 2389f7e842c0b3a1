"""tw.quantize from a Module to a compiled program of integers: accuracy, calibration, report, options, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.report import Report
from tensorwright.compression.smooth import Seen, suited
from tensorwright.compression.timing import milliseconds
from tensorwright.ir.errors import InputError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")


class Block(nn.Module):
    """Two convolutions, a norm, and a projection beside them."""

    def __init__(self, channels: int, out: int) -> None:
        self.a, self.norm = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.b, self.side = nn.Conv2d(out, out, 3, padding=1), nn.Conv2d(channels, out, 1)

    def __call__(self, x: Any) -> Any:
        y = tw.relu(self.norm(self.a(x)))
        return tw.relu(self.b(y) + self.side(x))


class Small(nn.Module):
    """Every kind of layer and what may stand between two of them."""

    def __init__(self) -> None:
        self.block = Block(3, 8)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1, groups=2)
        self.head = nn.Linear(24 * 16, 5)

    def __call__(self, x: Any) -> Any:
        x = tw.max_pool2d(self.block(x), 2)
        y = tw.relu(self.grouped(tw.relu(self.depthwise(x))))
        x = tw.concatenate([x, y], 1)
        return self.head(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def small() -> tuple[Small, list[Array]]:
    tw.seed(0)
    net, rng = Small(), np.random.default_rng(0)
    net.block.norm.running_mean.data = rng.normal(size=8).astype(np.float32) * 0.3
    net.block.norm.running_var.data = rng.uniform(0.5, 2, 8).astype(np.float32)
    return net, [rng.normal(size=(4, 3, 8, 8)).astype(np.float32) for _ in range(3)]


def interpreted(graph: Graph, x: Array) -> Array:
    from tensorwright.ir.graphs import specialize

    sized = specialize(graph, {"N": len(x)})
    return run(sized, {**graph.weights, str(graph.inputs[0].attrs["name"]): x})[0]


def error(y: Array, reference: Array) -> float:
    return float(np.abs(y - reference).max() / np.abs(reference).max())


OPTIONS: list[tuple[dict[str, Any], float]] = [
    ({}, 0.05),
    ({"method": "percentile"}, 0.05),
    ({"method": "mse"}, 0.05),
    ({"method": "entropy"}, 0.08),
    ({"activations": "int8"}, 0.08),
    ({"activations": "dynamic"}, 0.05),
    ({"weights": None}, 0.05),
    ({"activations": None}, 0.03),
    ({"per_channel": False}, 0.08),
    ({"equalize": True, "bias_correction": True}, 0.05),
    ({"keep": ["block.*", "head"]}, 0.03),
]


@pytest.mark.parametrize(("options", "most"), OPTIONS, ids=[str(o) for o, _ in OPTIONS])
def test_the_graph_is_near_the_floats(small: tuple[Small, list[Array]], options: dict[str, Any], most: float) -> None:
    net, batches = small
    graph = tw.quantize(net, batches, **options)
    reference = interpreted(tw.quantize(net, batches, keep="*"), batches[0])
    assert 0 < error(interpreted(graph, batches[0]), reference) < most


def test_compiled_it_is_what_the_graph_says(small: tuple[Small, list[Array]]) -> None:
    net, batches = small
    report = Report()
    graph = tw.quantize(net, batches, report=report)
    exe = tw.compile(graph)
    for x in (batches[0], batches[1][:1]):  # any size of batch
        assert error(exe(x), interpreted(graph, x)) < 0.01  # a rounding at a half may fall to the other side
    whole = exe.text("fuse")
    assert whole.count("i32[") >= 4
    assert [x.choice for x in report.layers] == ["int8"] * 6
    assert {x.name for x in report.layers} == {"block.a", "block.b", "block.side", "depthwise", "grouped", "head"}
    assert report.totals["bytes_after"] < report.totals["bytes_before"] / 3
    q = graph.weights["block.a.weight_q"]
    assert q.dtype == np.int8
    assert (np.abs(q).reshape(8, -1).max(1) == 127).all()  # per output channel, symmetric


def test_the_report_as_text_json_and_page(small: tuple[Small, list[Array]], tmp_path: Path) -> None:
    net, batches = small
    report = Report()
    tw.quantize(net, batches, keep="head", report=report)
    report.save(tmp_path / "r.json")
    report.save(tmp_path / "r.html")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["totals"]["layers"] == {"float": 1, "int8": 5}
    assert [x["reason"] for x in found["layers"] if x["choice"] == "float"] == ["asked to be kept"]
    page = (tmp_path / "r.html").read_text()
    assert "block.side" in page
    assert "asked to be kept" in page
    assert "5 int8" in str(report)


def test_a_layer_stays_float_where_it_measures_no_faster(small: tuple[Small, list[Array]]) -> None:
    net, batches = small
    report, asked = Report(), []

    def measure(graph: Graph) -> float:
        bytes_in = graph.inputs[0].dtype.name == "u8"
        deep = graph.inputs[0].shape[1:] == (8, 4, 4)
        asked.append((bytes_in, graph.inputs[0].shape))
        return (3.0 if deep else 1.0) if bytes_in else 2.0

    graph = tw.quantize(net, batches, measure=measure, report=report)
    floats = {x.name for x in report.layers if x.choice == "float"}
    assert floats == {"depthwise", "grouped"}
    assert (
        next(x for x in report.layers if x.name == "grouped").reason == "no faster in integers: 3.000 ms against 2.000 in floats"
    )
    assert len(asked) == 12
    assert {"depthwise.weight", "grouped.weight"} <= graph.weights.keys()
    reference = interpreted(tw.quantize(net, batches, keep="*"), batches[0])
    assert error(interpreted(graph, batches[0]), reference) < 0.05


def test_the_timer_of_the_package_measures() -> None:
    report = Report()
    net = nn.Linear(64, 64)
    tw.quantize(net, [np.ones((8, 64), np.float32)], measure=lambda g: milliseconds(g, 0.0), report=report)
    line = report.layers[0]
    assert line.float_ms is not None
    assert line.int8_ms is not None
    assert min(line.float_ms, line.int8_ms) > 0


def test_equalised_weights_compute_the_same_and_are_even() -> None:
    from tensorwright.compression.equalize import equalized
    from tensorwright.compression.source import source_of

    tw.seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    first: Any = net[0]
    first.weight.data = first.weight.data * (10.0 ** np.arange(-2, 4)).reshape(-1, 1, 1, 1).astype(np.float32)
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    source = source_of(net, (), [(x,)])
    even, notes = equalized(source)
    assert notes == ["equalised 2 pairs of layers: 0-3, 3-5"]
    np.testing.assert_allclose(interpreted(even.graph, x), interpreted(source.graph, x), rtol=2e-5, atol=1e-4)
    bounds = np.abs(even.values["0.weight"]).reshape(6, -1).max(1)
    assert bounds.max() / bounds.min() < 100  # 10^5 before


def test_smoothing_gives_bits_back_to_small_channels() -> None:
    """A layer norm with one large channel before a product: the others have few of the 255 steps without it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            self.norm, self.one, self.two = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(32, 16)

        def __call__(self, x: Any) -> Any:
            y = self.norm(x)
            return x + tw.concatenate([self.one(y), self.two(y)], -1)

    tw.seed(0)
    net = Normed()
    net.norm.weight.data[5] = 60.0
    net.one.weight.data[:, 5] *= 0.02
    net.two.weight.data[:, 5] *= 0.02
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    right = tw.compile(net, x)(x)
    report = Report()
    graphs = [tw.quantize(net, [x], smooth=s, report=report) for s in (None, 0.7)]
    plain, better = (error(tw.compile(g)(x), right) for g in graphs)
    assert better < 0.35 * plain
    assert report.notes == ["smoothed what 1 groups of layers read: one/two"]
    itself = error(tw.compile(tw.quantize(net, [x], report=report))(x), right)
    assert itself < 0.35 * plain and report.notes[0].startswith("smoothed what 1 groups of layers read: one/two (0.")
    w, high = np.random.default_rng(1).normal(size=(32, 16)), np.ones(32)
    assert suited(Seen(-high, high, high / 3), [w], signed=False) is None  # channels alike: nothing to gain
    high[5] = 60
    assert suited(Seen(-high, high, high**2 / 3), [w], signed=False) is not None
    with pytest.raises(InputError, match="smooth is a number from 0 to 1"):
        tw.quantize(net, [x], smooth=2)


def test_bias_correction_restores_means() -> None:
    tw.seed(2)
    rng = np.random.default_rng(3)
    net = nn.Linear(200, 16)
    net.weight.data = (rng.normal(size=(16, 200)) ** 3).astype(np.float32)  # few large weights: coarse steps for the others
    batches = [rng.uniform(1, 2, (64, 200)).astype(np.float32) for _ in range(4)]  # far from 0: errors add up
    right = batches[0] @ net.weight.data.T + net.bias.data
    plain, better = (interpreted(tw.quantize(net, batches, bias_correction=b), batches[0]) for b in (False, True))
    assert np.abs((better - right).mean(0)).max() < 0.35 * np.abs((plain - right).mean(0)).max()


def test_onnx_out_and_in(small: tuple[Small, list[Array]], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    net, batches = small
    graph = tw.quantize(net, batches)
    path = tmp_path / "q.onnx"
    tw.onnx.save(graph, path)
    again = tw.onnx.load(path)
    np.testing.assert_array_equal(interpreted(again, batches[0]), interpreted(graph, batches[0]))
    assert error(tw.compile(again)(batches[0]), interpreted(graph, batches[0])) < 0.01


def test_a_graph_of_onnx_is_quantised_too(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    tw.seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    x = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    tw.onnx.save(tw.quantize(net, [x], keep="*"), tmp_path / "m.onnx")  # in floats
    report = Report()
    graph = tw.quantize(tw.onnx.Model(tmp_path / "m.onnx"), [x], report=report)
    assert [x.choice for x in report.layers] == ["int8", "int8"]
    assert error(tw.compile(graph)(x), tw.compile(net, x)(x)) < 0.03


# bad input


def linear(weight: Array | None = None) -> nn.Linear:
    tw.seed(0)
    net = nn.Linear(4, 3)
    if weight is not None:
        net.weight.data = weight
    return net


def test_calibration_that_says_nothing() -> None:
    x = np.ones((2, 4), np.float32)
    for given, said in (
        ([], "calibration is empty"),
        ([np.zeros((0, 4), np.float32)], "calibration is empty"),
        (x, "an iterable of batches, not one array"),
        (3, "an iterable of batches, not int"),
    ):
        with pytest.raises(InputError, match=said):
            tw.quantize(linear(), given, tw.spec("N", 4))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="1 of 8 numbers of the input 'x' are NaN or infinite"):
            tw.quantize(linear(), [x, np.where(np.arange(8).reshape(2, 4) == 3, np.float32(bad), x)])


def test_options_that_do_not_exist() -> None:
    x = [np.ones((2, 4), np.float32)]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weights": "int7"}, "weights is one of"),
        ({"activations": "u8"}, "activations is one of"),
        ({"weights": None, "activations": None}, "nothing to quantise"),
        ({"method": "median"}, "method is one of"),
        ({"percentile": 20}, "percentile is above 50"),
        ({"keep": "nothing*"}, r"no layer is named \['nothing\*'\]; there are \['linear'\]|no layer is named"),
        ({"measure": 3}, "measure is a function"),
    ]
    for options, said in wrong:
        with pytest.raises(InputError, match=said):
            tw.quantize(linear(), x, **options)


def test_weights_that_are_zero_or_not_finite() -> None:
    x = [np.ones((2, 4), np.float32)]
    report = Report()
    graph = tw.quantize(linear(np.zeros((3, 4), np.float32)), x, report=report)
    assert report.layers[0].reason == "its weights are all zero"
    assert not any(n.op.has(Trait.QUANTIZE) for n in graph.nodes())
    one = np.ones((3, 4), np.float32)
    one[1] = 0  # one channel of zeros: a scale of 1
    graph = tw.quantize(linear(one), x)
    np.testing.assert_allclose(tw.compile(graph)(x[0])[:, 1], linear().bias.data[1], rtol=1e-6)
    one[1, 2] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        tw.quantize(linear(one), x)


def test_zero_points_at_the_rim_and_ranges_of_nothing() -> None:
    """Values that are all positive, all negative, all zero, and beyond what calibration saw."""
    w = np.eye(3, 4, dtype=np.float32)
    for sign, zero in ((1, 0), (-1, 255), (0, 0)):
        x = sign * np.linspace(0, 2, 8, dtype=np.float32).reshape(2, 4)
        report = Report()
        net = linear(w)
        graph = tw.quantize(net, [x], report=report)
        assert report.layers[0].zero == zero
        exe = tw.compile(graph)
        np.testing.assert_allclose(exe(x), x @ w.T + net.bias.data, atol=0.02)
        seen = exe(np.full((2, 4), 100 * sign, np.float32))
        np.testing.assert_allclose(seen, np.full((2, 3), 2.0 * sign) + net.bias.data, atol=0.02)  # saturates
