"""Each error names the user's line, the operands with their shapes, and what would fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import AttributeValueError, ShapeError, TraceError

CASES: list[tuple[Callable[..., Any], list[Any], list[str]]] = [
    (lambda a, b: a + b, [tw.spec(3, 4), tw.spec(3)], ["f32[3, 4]", "f32[3]", "dimension -1: 4 against 3", "(-1, 1)"]),
    (lambda a, b: a * b, [tw.spec(3, 4), tw.spec(4, 5)], ["f32[3, 4]", "f32[4, 5]", "@"]),
    (lambda a, b: a @ b, [tw.spec(3, 4), tw.spec(5, 4)], ["f32[5, 4]", "a @ b.T has shape (3, 5)"]),
    (lambda a, b: a @ b, [tw.spec(3, 4), tw.spec(7, 5)], ["shape (4, 5) would fit"]),
    (lambda a: a.reshape(5, 3), [tw.spec(3, 4)], ["15 elements, the Tensor has 12", "(5, -1)"]),
    (lambda a: a.sum(axis=2), [tw.spec(3, 4)], ["axis 2 is out of range for 2 dimensions"]),
    (lambda a, b: tw.concatenate([a, b]), [tw.spec(3, 4), tw.spec(3, 5)], ["dimension 1 of operand 1 is 5", "f32[3, 4]"]),
    (lambda a: tw.conv2d(a, np.ones((8, 3, 3, 3), np.float32)), [tw.spec(1, 32, 32, 3)], ["NHWC", "transpose(0, 3, 1, 2)"]),
    (lambda a: tw.conv2d(a, np.ones((8, 3, 3, 3), np.float32)), [tw.spec(3, 32, 32)], ["reshape(1, 3, 32, 32)"]),
    (lambda a: tw.max_pool2d(a, 3), [tw.spec(1, 1, 2, 2)], ["f32[1, 1, 2, 2]"]),
    (lambda a: tw.transpose(a, (0, 0)), [tw.spec(3, 4)], ["not an order of the 2 axes"]),
    (
        lambda a: tw.losses.cross_entropy(a, a[0]),
        [tw.spec(3, 4)],
        ["class numbers of shape (3,)", "probabilities of shape (3, 4)"],
    ),
    (lambda a: tw.losses.mse(a, a[:, 0]), [tw.spec(3, 1)], [".squeeze(-1)"]),
    (lambda a: tw.split(a, 5, 1), [tw.spec(3, 4)], ["does not divide into 5 equal parts"]),
    (lambda a: tw.layer_norm(a, 5), [tw.spec(3, 4)], ["must end in the normalised shape (5,)"]),
    (lambda a: tw.where(a > 0, a, np.ones(5, np.float32)), [tw.spec(3, 4)], ["condition: bool[3, 4]", "y: f32[5]"]),
]


@pytest.mark.parametrize(("fn", "specs", "parts"), CASES)
def test_shape_errors_say_what_where_and_what_fits(fn: Callable[..., Any], specs: list[Any], parts: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        tw.trace(fn, *specs)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert f"{__file__}:{inspect.getsourcelines(fn)[1]}" in text, text


class Wrong(nn.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(8, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2))

    def __call__(self, x: Any) -> Any:
        return self.blocks(self.first(x))


def test_errors_inside_modules_name_the_line_and_the_module() -> None:
    with pytest.raises(ShapeError) as caught:
        tw.trace(Wrong(), tw.spec(2, 8))
    text = str(caught.value)
    line = inspect.getsourcelines(Wrong.__call__)[1] + 1
    assert f"{__file__}:{line}: return self.blocks(self.first(x))" in text
    assert "in module blocks.1" in text
    assert "(2, 5) would fit" in text


def test_labels_hold_the_line_and_the_module_path() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    g = tw.trace(lambda x: tw.relu(net(x)), tw.spec(1, 3))
    labels = {n.op.name: g.labels[n] for n in g.nodes() if n.op.name in ("matmul", "where")}
    assert labels["matmul"].name == "net.0"
    assert labels["where"].name is None
    location = labels["where"].location
    assert location is not None
    assert location.file == __file__
    assert "tw.relu(net(x))" in location.text


def test_wrong_attributes_are_refused() -> None:
    with pytest.raises(AttributeValueError, match="'none' or 'tanh'"):
        tw.trace(lambda x: tw.gelu(x, "exact"), tw.spec(2))
    with pytest.raises(AttributeValueError, match="same"):
        tw.trace(lambda x: tw.conv2d(x, np.ones((1, 1, 3, 3), np.float32), padding="full"), tw.spec(1, 1, 4, 4))
    with pytest.raises(AttributeValueError, match="stride"):
        tw.trace(lambda x: tw.conv2d(x, np.ones((1, 1, 3, 3), np.float32), stride=0), tw.spec(1, 1, 4, 4))
    with pytest.raises(AttributeValueError, match=r"\[0, 1\]"):
        nn.Dropout(1.5)
    with pytest.raises(AttributeValueError, match="positive int"):
        nn.Linear(0, 3)


def test_values_that_cannot_be_recorded_are_refused() -> None:
    with pytest.raises(TraceError, match="str"):
        tw.trace(lambda x: x + "a", tw.spec(2))
    with pytest.raises(TraceError, match="stack"):
        tw.trace(lambda x: tw.relu([x, x]), tw.spec(2))
    with pytest.raises(TraceError, match="returned no Tensor"):
        tw.trace(lambda x: None, tw.spec(2))
    with pytest.raises(TraceError, match="returned a str"):
        tw.trace(lambda x: "a", tw.spec(2))
