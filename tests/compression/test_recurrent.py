"""Layers in loops in integers: exact against numpy's on every row, all kinds of recurrent layers, and what stays float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.report import Report
from tensorwright.ir.errors import InputError
from tensorwright.ir.graph import Graph
from tensorwright.passes.layers import find_loop_layers

from ..passes.test_integers import TARGETS
from .test_quantize import interpreted

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")


class Limited(nn.Module):
    """h' = min(max(x W + h R, low), high) step after step: numbers of few bits, so that floats are exact."""

    def __init__(self, inputs: int, hidden: int, low: float, high: float) -> None:
        rng = np.random.default_rng(0)
        self.w, self.r = (nn.Parameter(_eighths(rng, k, hidden)) for k in (inputs, hidden))
        self.low, self.high = low, high

    def __call__(self, x: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            h = tw.minimum(tw.maximum(row @ self.w + h @ self.r, self.low), self.high)
            return h, h

        return tw.scan(step, tw.zeros((x.shape[1], self.r.shape[0])), x)[1]


def _eighths(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Multiples of 1/128 of which each column's largest is 127/128: the integers, and scales that are a power of two."""
    q = rng.integers(-127, 128, (rows, columns))
    q[0] = 127
    return (q / 128).astype(np.float32)


@pytest.mark.parametrize(("activations", "batch", "inputs", "hidden"), [("uint8", 1, 5, 33), ("int8", 3, 8, 64)])
def test_exact_against_integers(activations: str, batch: int, inputs: int, hidden: int) -> None:
    most = 255 if activations == "uint8" else 127
    least = 0 if activations == "uint8" else -127
    net = Limited(inputs, hidden, least / 64, most / 64)
    q = np.random.default_rng(1).integers(least, most + 1, (6, batch, inputs))
    q[0, 0, :2] = least, most
    x = (q / 64).astype(np.float32)
    report = Report()
    graph = tw.quantize(net, [x], tw.spec(*x.shape), activations=activations, method="minmax", smooth=None, report=report)
    assert {line.name: line.scale for line in report.layers} == {"w": 1 / 64, "r": 1 / 64}
    wq, rq = (np.rint(p.data * 128).astype(np.int64) for p in (net.w, net.r))
    h, right = np.zeros((batch, hidden), np.int64), []
    for row in q:
        total = np.clip(row @ wq + h @ rq, least * 128, most * 128)  # in units of 2^-13
        right.append(total)
        h = np.rint(total / 128).astype(np.int64)  # to half even
    for target in TARGETS:
        exe = tw.compile(graph, target=target, cache=False)
        np.testing.assert_array_equal(exe(x), np.array(right) / 8192, err_msg=target)
    assert "i32[" in _body(exe.text("fuse"))


def _body(text: str) -> str:
    """From the loop on."""
    return text[text.index("scan(") :]


def layer(kind: str, **options: Any) -> tuple[nn.Module, Array]:
    tw.seed(0)
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    return getattr(nn, kind)(5, 16, batch_first=True, **options), x


@pytest.mark.parametrize("options", [{}, {"weights": "int4", "activations": None}, {"activations": "dynamic"}], ids=str)
def test_bias_correction_in_a_loop(options: dict[str, Any]) -> None:
    """Rounded weights move the mean of every state; the correction takes that out, and integers stay integers."""
    tw.seed(0)
    net = nn.LSTM(20, 32, batch_first=True, bidirectional=True)
    x = np.abs(np.random.default_rng(0).normal(size=(64, 12, 20))).astype(np.float32)
    specs = tw.spec(32, 12, 20)
    floats = tw.compile(net, specs)(x[32:])[0]

    def moved(corrected: bool) -> tuple[float, str]:
        graph = tw.quantize(net, [x[:32]], specs, bias_correction=corrected, **options)
        exe = tw.compile(graph)
        return float(np.abs((exe(x[32:])[0] - floats).mean((0, 1))).mean()), _body(exe.text("fuse"))

    (before, _), (after, text) = moved(False), moved(True)
    assert after < before / 3, (before, after)
    assert ("i32[" in text) == (options.get("activations", "uint8") is not None)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"bidirectional": True}),
    ("LSTM", {"activations": None}),
    ("GRU", {"activations": "dynamic"}),
    ("RNN", {"weights": None}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_recurrent_layers(kind: str, options: dict[str, Any]) -> None:
    both = options.pop("bidirectional", False)
    net, x = layer(kind, num_layers=1 if both else 2, bidirectional=both)
    report = Report()
    graph = tw.quantize(net, [x], report=report, **options)
    assert [line.choice for line in report.layers] == ["int8"] * 4
    assert sum("weight_hh" in line.name for line in report.layers) == 2
    exact = interpreted(tw.quantize(net, [x], keep="*"), x)
    assert 0 < np.abs(interpreted(graph, x[:1]) - exact[:1]).max() < 0.03  # any size of batch
    if both:
        assert "weight_hh_l0.weight_q" in graph.weights and "weight_hh_l0" not in graph.weights
        np.testing.assert_allclose(tw.compile(graph)(x)[0], interpreted(graph, x), atol=0.01)  # roundings at a half


def test_training_with_rounding_in_the_loop() -> None:
    net, x = layer("LSTM", return_sequences=False)
    aware = tw.quantize_aware(lambda x: net(x)[0], [x])
    graph = aware.quantized()
    np.testing.assert_allclose(tw.compile(aware, tw.spec(*x.shape))(x), interpreted(graph, x), atol=0.01)
    before = {n: p.data.copy() for n, p in aware.weights.items()}
    trainer = tw.Trainer(aware, loss=tw.losses.mse, optimizer=tw.optim.SGD(0.1))
    trainer.fit(x, np.zeros((2, 16), np.float32), epochs=1, verbose=False)
    assert all(np.abs(aware.weights[n].data - v).max() > 0 for n, v in before.items())


def test_lengths_and_names_to_keep() -> None:
    net, x = layer("LSTM")
    lengths = np.array([7, 3])
    report = Report()

    def call(x: Any, n: Any) -> Any:
        return net(x, lengths=n)[0]

    graph = tw.quantize(call, [(x, lengths)], tw.spec(2, 7, 5), tw.spec(2, dtype="int64"), keep="*hh*", report=report)
    assert [(line.choice, line.reason) for line in report.layers] == [
        ("int8", "reads and multiplies bytes"),
        ("float", "asked to be kept"),
    ]
    y = tw.compile(graph)(x, lengths)
    assert not y[1, 3:].any()
    assert np.abs(y - tw.compile(call, x, lengths)(x, lengths)).max() < 0.03


def test_a_loop_stays_float_where_it_measures_no_faster() -> None:
    net, x = layer("LSTM", num_layers=2)
    asked: list[Graph] = []

    def measure(graph: Graph) -> float:
        asked.append(graph)
        loops = [n for n in graph.nodes() if n.op.name == "scan"]
        return 2.0 if loops and "w" in graph.weights else 1.0 if loops else len(asked) % 2

    report = Report()
    graph = tw.quantize(net, [x], measure=measure, report=report)
    held = {line.name: (line.choice, line.float_ms, line.int8_ms) for line in report.layers if "hh" in line.name}
    assert held == {f"weight_hh_l{k}": ("float", 1.0, 2.0) for k in (0, 1)}
    assert {"weight_hh_l0", "weight_hh_l1"} <= graph.weights.keys()
    for timed in asked:  # what is timed can be run
        tw.compile(timed)
    real = tw.quantize(net, [x], measure=lambda g: tw.compression.milliseconds(g, 0.0), report=report)
    assert all(line.float_ms and line.int8_ms for line in report.layers)
    tw.compile(real)(x)


def test_layers_of_loops_that_are_followed_and_not() -> None:
    def two_products(x: Any, w: Any) -> Any:
        """The second reads the first; and a loop in a loop, whose layers stay."""

        def step(h: Any, row: Any) -> Any:
            inner = tw.scan(lambda g, r: (tw.tanh(r @ w + g), None), h, tw.stack([row, h]))[0]
            return tw.tanh(tw.tanh(row @ w + h) @ w) + inner, None

        return tw.scan(step, tw.zeros((2, 4)), x)[0]

    graph = tw.trace(two_products, tw.spec(3, 2, 4), tw.spec(4, 4))
    assert not find_loop_layers(graph), "w is data"
    as_weights = tw.Graph.parse(str(graph).replace("%w: f32[4, 4] data", "%w: f32[4, 4] parameter"))
    assert len(find_loop_layers(as_weights)) == 2


def test_weights_and_calibration_that_are_not_finite() -> None:
    net, x = layer("LSTM")
    bad = x.copy()
    bad[0, 3, 2] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        tw.quantize(net, [bad])
    weight = net.weight_hh_l0
    weight.data = np.zeros_like(weight.data)
    report = Report()
    tw.quantize(net, [x], report=report)
    assert [line.reason for line in report.layers if "hh" in line.name] == ["its weights are all zero"]
    weight.data[0, 0] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        tw.quantize(net, [x])
