"""What nothing reads is not computed: which contractions become smaller, what stays whole, and that no value changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.benchmarks.models import Cifar
from tensorwright.frontend.tracing import trace_model
from tensorwright.ir.errors import ValidationError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.padding import Padding
from tensorwright.ir.target import row
from tensorwright.passes import crop, pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm
from tensorwright.passes.crop import Box, Crop
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator

TARGET = row("x86-64-v4")


def before(graph: Graph) -> Graph:
    """The graph as the pass gets it."""
    passes = pipeline.inference(TARGET)
    at = [p.name for p in passes].index("crop")
    return run_pipeline(graph, passes[:at], Context(target=TARGET))


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Graph:
    return before(trace_model(function, *(tw.spec(*s) for s in shapes)).graph)


def contractions(graph: Graph) -> list[tuple[int, ...]]:
    return [n.tensor.static_shape for n in graph.nodes() if "spec" in n.attrs]


def cut(graph: Graph) -> Graph:
    """The graph after the pass, which must compute the same."""
    after = Crop().run(graph, Context(target=TARGET))
    rng = np.random.default_rng(0)
    given = {i.attrs["name"]: rng.standard_normal(i.tensor.static_shape).astype("f") for i in graph.inputs}
    for x, y in zip(run(graph, given), run(after, given), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)  # numpy adds up another number of rows in another order
    return after


def test_pooling_that_rounds_down_reaches_all_layers_before() -> None:
    graph = before(trace_model(Cifar(), tw.spec(2, 3, 32, 32)).graph)
    assert contractions(graph)[:3] == [(2, 30, 30, 32), (2, 13, 13, 64), (2, 4, 4, 64)]
    assert contractions(cut(graph))[:3] == [(2, 28, 28, 32), (2, 12, 12, 64), (2, 4, 4, 64)]


def conv(x: Any, weight: Any, padding: int = 0) -> Any:
    return tw.conv2d(x, weight, padding=padding)


IMAGE, TAPS = (1, 4, 9, 9), (4, 4, 3, 3)


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        ("padding", lambda x, k: tw.max_pool2d(tw.relu(conv(x, k, 1)), 2), (IMAGE, TAPS), [(1, 8, 8, 4)]),
        ("padded windows", lambda x, k: tw.max_pool2d(conv(x, k, 1), 3, 4, 1), (IMAGE, TAPS), [(1, 9, 9, 4)]),
        ("windows apart", lambda x, k: tw.max_pool2d(conv(x, k, 1), 2, 5), (IMAGE, TAPS), [(1, 7, 7, 4)]),
        ("average", lambda x, k: tw.avg_pool2d(conv(x, k, 1) * 2.0 + 1.0, 2), (IMAGE, TAPS), [(1, 8, 8, 4)]),
        ("residual", lambda x, k: tw.max_pool2d(conv(x, k, 1) + x, 2), (IMAGE, TAPS), [(1, 4, 8, 8)]),
        (
            "two layers",
            lambda x, k: tw.max_pool2d(conv(tw.relu(conv(x, k, 1)), k), 2),
            (IMAGE, TAPS),
            [(1, 8, 8, 4), (1, 6, 6, 4)],
        ),
        ("a slice from the middle", lambda x, k: tw.tanh(conv(x, k))[:, :, 2:5, 3:6], (IMAGE, TAPS), [(1, 3, 3, 4)]),
        ("two readers", lambda x, k: (conv(x, k)[:, :, 2:4], conv(x, k)[:, :, 3:6]), (IMAGE, TAPS), [(1, 4, 7, 4)]),
        ("a reader of all", lambda x, k: (tw.max_pool2d(conv(x, k), 2), conv(x, k)), (IMAGE, TAPS), [(1, 7, 7, 4)]),
        ("last position", lambda x, w: tw.softmax(tw.relu(x @ w), -1)[:, -1], ((2, 7, 5), (5, 6)), [(2, 1, 6)]),
        ("columns", lambda x, w: tw.relu(x @ w)[:, 2:4], ((7, 5), (5, 6)), [(7, 2)]),
        ("a sum over what is cut", lambda x, w: tw.softmax(x @ w, 0)[-1], ((7, 5), (5, 6)), [(7, 6)]),
        ("a running sum", lambda x, w: tw.cumsum(x @ w, 0)[3], ((7, 5), (5, 6)), [(7, 6)]),
        ("reshaped", lambda x, w: (x @ w).reshape(6, 7)[2:], ((7, 5), (5, 6)), [(7, 6)]),
    ],
)
def test_what_is_computed(
    name: str, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], expected: list[tuple[int, ...]]
) -> None:
    assert contractions(cut(traced(function, *shapes))) == expected, name


def test_a_graph_without_such_readers_is_left_alone() -> None:
    for graph in (
        traced(lambda x, k: tw.max_pool2d(conv(x, k, 1), 2), (1, 4, 8, 8), TAPS),
        traced(lambda x, w: tw.softmax(x @ w, -1), (7, 5), (5, 6)),
        traced(lambda x, k: tw.conv2d(conv(x, k, 1), k, stride=2), (1, 4, 9, 9), TAPS),
    ):
        assert Crop().run(graph, Context(target=TARGET)) is graph


def test_less_than_is_worth_it_stays() -> None:
    """One of 101 rows: a hundredth of the work."""
    graph = traced(lambda x, w: tw.relu(x @ w)[:100], (101, 5), (5, 6))
    assert Crop().run(graph, Context(target=TARGET)) is graph


def test_one_unit_of_fuel() -> None:
    graph = before(trace_model(Cifar(), tw.spec(1, 3, 32, 32)).graph)
    assert Crop().run(graph, Context(target=TARGET, fuel=0)) is graph
    assert Crop().run(graph, Context(target=TARGET, fuel=1)) is not graph


def test_a_wrong_box_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is padded is cut one element further on."""
    graph = traced(lambda x, k: tw.max_pool2d(conv(x, k, 1), 2, 5), IMAGE, TAPS)

    def further(padding: Padding, x: Box, box: Box) -> Box | None:
        part = right(padding, x, box)
        return part and tuple((a + 1, b + 1) if b < end else (a, b) for (a, b), (_, end) in zip(part, x, strict=True))

    right = crop._inside
    monkeypatch.setattr(crop, "_inside", further)
    with pytest.raises(ValidationError, match="crop"):
        run_pipeline(graph, (ContractForm(), Crop()), Context(target=TARGET), Hooks(validate=Validator(folder=tmp_path)))


@pytest.mark.unvalidated("compiled code is compared with the interpreter")
def test_winograd_takes_an_image_of_which_a_part_is_read() -> None:
    """Channels last as they come: the product's operand is larger than what it reads."""

    def function(x: Any, k: Any) -> Any:
        return tw.max_pool2d(tw.conv2d(tw.transpose(x, (0, 3, 1, 2)), k), 2)

    graph = traced(function, (1, 17, 17, 32), (64, 32, 3, 3))
    rng = np.random.default_rng(1)
    x, k = rng.standard_normal((1, 17, 17, 32)).astype("f"), (rng.standard_normal((64, 32, 3, 3)) / 17).astype("f")
    exe = tw.compile(function, tw.spec(*x.shape), tw.spec(*k.shape), threads=1)
    assert any("winograd_input" in n for kernel in exe.compiled.run.kernels for n in kernel.nodes)
    np.testing.assert_allclose(exe(x, k), run(graph, {"x": x, "k": k})[0], rtol=1e-4, atol=1e-4)


def test_a_constant_of_which_a_part_is_read_stays_in_memory() -> None:
    table = np.arange(16, dtype=np.float32).reshape(4, 4)  # few enough numbers to stand inside a body
    x = np.ones((3, 4), np.float32)
    exe = tw.compile(lambda x: tw.relu(x @ table)[:, :2], tw.spec(3, 4))
    np.testing.assert_array_equal(exe(x), (x @ table)[:, :2])
