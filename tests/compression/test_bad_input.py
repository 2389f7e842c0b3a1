"""What users may get wrong, each with what is said; and extremes that are handled: sums of more than 33,000 products of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.report import Report
from tensorwright.ir.errors import TensorwrightError

from ..passes.test_integers import TARGETS, dq
from .test_quantize import linear

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.unvalidated("long sums are slow in the interpreter; tests/passes validate the passes")

X = np.ones((2, 4), np.float32)


def of(*batches: Any, **options: Any) -> Callable[[], object]:
    return lambda: tw.quantize(options.pop("net", linear()), list(batches), tw.spec("N", 4), **options)


def pruned(model: Any = None, *specs: Any, **options: Any) -> Callable[[], object]:
    return lambda: tw.prune(model or linear(), *specs, **options)


class Residual(nn.Module):
    def __init__(self) -> None:
        self.a = nn.Linear(4, 4)

    def __call__(self, x: Any) -> Any:
        return x + self.a(x)


class Groups(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=2)

    def __call__(self, x: Any) -> Any:
        return self.b(self.a(x))


NONE, NAN = "has no channels to prune", np.full((2, 4), np.nan, np.float32)
SHARE = r"a number between 0 and 1 \(both excluded\), not"
TABLE: list[tuple[str, Callable[[], object], str]] = [
    ("no batches", of(), "calibration is empty"),
    ("a batch of nothing", of(()), "calibration is empty"),
    ("no rows", of(np.zeros((0, 4), np.float32)), "calibration is empty"),
    ("no rows among others", of(X, np.zeros((0, 4), np.float32)), "size 0 makes N = 0"),
    ("NaN", of(X, NAN), "8 of 8 numbers of the input 'x' are NaN or infinite"),
    ("infinity", of(X * np.float32(np.inf)), "8 of 8 numbers of the input 'x' are NaN or infinite"),
    ("NaN by percentile", of(NAN, method="percentile"), "NaN or infinite"),
    ("too few arrays", of([], X), r"batch 0 has 0 arrays; Linear takes 1: \['x'\]"),
    ("another width", of(np.ones((2, 5), np.float32)), "dimension 1 must be 4"),
    ("another rank", of(np.ones(4, np.float32)), "expected f32\\[N, 4\\]"),
    ("another dtype", of(np.ones((2, 4))), "convert it with x.astype"),
    ("words", of(np.array([["a"] * 4])), "convert it with x.astype"),
    ("objects", of(np.array([[None] * 4])), "convert it with x.astype"),
    ("names to keep", of(X, keep=3), "keep is a pattern of names"),
    ("weights of NaN", of(X, net=linear(np.full((3, 4), np.nan, np.float32))), "weight: its weights hold NaN"),
    ("weights of NaN alone", of(X, net=linear(np.full((3, 4), np.nan, np.float32)), activations=None), "weight: its weights"),
    *((f"a ratio of {r!r}", pruned(ratio=r), SHARE) for r in (0, 1, -0.1, 1.5, float("nan"), "a", True)),
    ("no ratio", pruned(), "ratio is missing"),
    ("a ratio among several", pruned(ratio={"weight": 2}), SHARE),
    ("a ratio of nothing", pruned(ratio={"other*": 0.5}), r"no parameter's path fits 'other\*'"),
    ("a ratio while training", lambda: tw.compression.GradualPruning(1.2, 0, 10), SHARE),
    ("an end before the begin", lambda: tw.compression.GradualPruning(0.5, 10, 10), "ends after it, not 10 to 10"),
    ("five of four", pruned(pattern="5:4"), "0 < N < M"),
    ("blocks of nothing", pruned(ratio=0.5, pattern="block 0x3"), "there is no pattern 'block 0x3'"),
    ("channels of the result", pruned(None, tw.spec(1, 4), ratio=0.5, pattern="channels"), NONE),
    ("channels of the argument", pruned(Residual(), tw.spec(1, 4), ratio=0.5, pattern="channels"), NONE),
    ("groups of the argument", pruned(Groups(), tw.spec(1, 4, 3, 3), ratio=0.5, pattern="channels"), NONE),
    ("heads of a Module", pruned(None, tw.spec(1, 4), ratio=0.5, pattern="heads"), "prune a Graph of it"),
]


@pytest.mark.parametrize(("call", "said"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_wrong_is_said(call: Callable[[], object], said: str) -> None:
    with pytest.raises(TensorwrightError, match=said):
        call()


@pytest.mark.parametrize(
    "options", [{"activations": "dynamic"}, {"activations": None}, {"activations": None, "weights": "codebook4"}], ids=str
)
def test_weights_of_zeros(options: dict[str, Any]) -> None:
    """A layer of zeros stays float, with the reason; one channel of zeros has a scale of 1 and stays zero."""
    report = Report()
    tw.quantize(linear(np.zeros((3, 4), np.float32)), None, tw.spec("N", 4), report=report, **options)
    assert [(line.choice, line.reason) for line in report.layers] == [("float", "its weights are all zero")]
    w = np.ones((3, 4), np.float32)
    w[1] = 0
    net = linear(w)
    y = tw.compile(tw.quantize(net, None, tw.spec("N", 4), **options))(X)
    np.testing.assert_array_equal(y[:, 1], np.full(2, net.bias.data[1]))


def test_a_run_of_zeros_and_of_nan_with_ranges_of_the_run() -> None:
    net = linear()
    exe = tw.compile(tw.quantize(net, None, tw.spec("N", 4), activations="dynamic"))
    np.testing.assert_array_equal(exe(0 * X), np.tile(net.bias.data, (2, 1)))
    assert np.isnan(exe(NAN)).all(), "a range of NaN says so"


@pytest.mark.parametrize("terms", [33_025, 40_000])
def test_long_sums_of_extremes_are_exact(terms: int) -> None:
    """Worst cases: 255 by -127 (weights), 255 by 255 (two activations: i32 holds 33,025), zero points at both rims."""
    w = np.full((terms, 3), -127, np.int8)
    w[:, 1] = 127
    w[::2, 2] = 127
    q = np.full((2, terms), 255, np.uint8)
    q[1, ::3] = 0

    def net(q: Any, w: Any) -> Any:
        x, high = dq(q, 0.5), dq(q, 0.5, 255)
        v = dq(w, 2.0**-6, axis=None)
        return x @ v, high @ v, x @ x.T

    graph = tw.trace(net, tw.spec(2, terms, dtype="uint8"), tw.spec(terms, 3, dtype="int8"))
    graph = tw.Graph.parse(str(graph).replace("%w: i8" + f"[{terms}, 3] data", "%w: i8" + f"[{terms}, 3] parameter"))
    wide = q.astype(np.int64)
    sums = [wide @ w, (wide - 255) @ w, wide @ wide.T]
    right = [s.astype(np.float32) * np.float32(f) for s, f in zip(sums, (2.0**-7, 2.0**-7, 0.25), strict=True)]
    assert abs(sums[2]).max() > 2**31 - 1 or terms == 33_025
    for target in (*TARGETS, None):
        exe = tw.compile(graph, parameters={"w": w}, target=target, cache=False)
        for k, (got, wanted) in enumerate(zip(exe(q), right, strict=True)):
            # what a zero point takes off is taken off the sum as f32: one rounding of the larger of the two
            np.testing.assert_allclose(got, wanted, rtol=3e-7 if k == 1 else 0, err_msg=str(target))
    text = exe.text("integers")
    assert ("f64" in text) == (terms > 33_025)


def test_values_beyond_what_calibration_saw_saturate() -> None:
    net = linear(np.eye(3, 4, dtype=np.float32))
    exe = tw.compile(tw.quantize(net, [X], method="minmax", smooth=None))
    np.testing.assert_allclose(exe(1000 * X), exe(X), rtol=1e-6)
    odd = X.copy()
    odd[0, 0] = np.nan
    zeros = np.where(np.isnan(odd), np.float32(0), odd)  # the zero point of what is never negative is 0
    np.testing.assert_array_equal(exe(odd), exe(zeros))
