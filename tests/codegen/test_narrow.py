"""Floats and integers of 8 bits and fewer: every value read, and every kind of number written, as ml_dtypes does it."""

import numpy as np
import pytest
from tensorwright.ir import dtypes as d
from tensorwright.ir.build import input_node
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.ops.compare import cast_array
from tensorwright.ir.ops.narrow import is_narrow
from tensorwright.ir.types import TensorType

from .helpers import host_rows
from .programs import compiled

X86 = host_rows()

NARROW = [t for t in d.ALL if is_narrow(t)]


def casts(pairs, arrays, target):
    """One program for all: (from, to) of each array."""
    inputs = [input_node(f"x{k}", TensorType(a, x.shape)) for k, ((a, _), x) in enumerate(zip(pairs, arrays, strict=True))]
    outputs = [make("cast", i, dtype=to) for i, (_, to) in zip(inputs, pairs, strict=True)]
    return compiled(Graph(tuple(inputs), tuple(outputs)), target)(arrays, 1)


@pytest.mark.parametrize("target", X86)
def test_every_value_is_read(target):
    pairs = [(t, to) for t in NARROW for to in (d.f32, d.f16, d.f64, *((d.i8, d.i32) if t.is_integer else ()))]
    arrays = [np.arange(1 << t.bits, dtype=np.uint8).view(t.numpy) for t, _ in pairs]
    for (t, to), x, got in zip(pairs, arrays, casts(pairs, arrays, target), strict=True):
        want = cast_array(x, to)
        assert np.array_equal(got, want, equal_nan=to.is_float), (t, to)
        if to.is_float:
            assert np.array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0])), (t, to)


@pytest.mark.parametrize("target", X86)
def test_every_kind_of_number_is_written(target):
    """All values, half way between neighbours, a little beside, far away, NaN and Inf."""
    rng = np.random.default_rng(0)
    pairs, arrays = [], []
    for t in NARROW:
        every = cast_array(np.arange(1 << t.bits, dtype=np.uint8).view(t.numpy), d.f64)
        finite = np.sort(every[np.isfinite(every)])
        middle = (finite[:-1] + finite[1:]) / 2
        wild = rng.normal(size=500) * np.exp(rng.normal(size=500) * 4)
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e9, -1e9, 5e-8, -5e-8]
        numbers = np.concatenate([finite, middle, middle * (1 + 1e-7), middle * (1 - 1e-12), wild, special])
        for of in (d.f32, d.f16, d.f64):
            pairs.append((of, t))
            with np.errstate(over="ignore"):
                arrays.append(numbers.astype(of.numpy))
    for (of, t), x, got in zip(pairs, arrays, casts(pairs, arrays, target), strict=True):
        assert got.tobytes() == cast_array(x, t).tobytes(), (of, t)


def test_they_are_moved_as_they_are():
    raw = np.arange(12, dtype=np.uint8).reshape(3, 4).view(d.f8e5m2.numpy)
    x = input_node("x", TensorType(d.f8e5m2, (3, 4)))
    moved = make("slice", make("transpose", x, perm=(1, 0)), starts=(1, 0), stops=(4, 3), steps=(1, 1))
    (got,) = compiled(Graph((x,), (moved,)), "x86-64-v3")([raw], 1)
    assert got.tobytes() == np.ascontiguousarray(raw.T[1:]).tobytes()
