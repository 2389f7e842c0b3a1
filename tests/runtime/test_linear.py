"""Compiling costs work in proportion to the number of nodes. Work is counted in calls, not timed."""

from __future__ import annotations

import sys

import pytest
import tensorwright as tw
from tensorwright import nn


class Layer(nn.Module):
    def __init__(self):
        self.f, self.n = nn.Linear(16, 16), nn.LayerNorm(16)

    def __call__(self, x):
        return self.n(x + tw.relu(self.f(x)))


def chain(count):
    def f(x):
        a, b = x, tw.tanh(x)
        for _ in range(6 * count):
            a, b = b, a * 0.5 + b
        return b

    return f, tw.spec(64)


def layers(count):
    return nn.Sequential(*(Layer() for _ in range(count))), tw.spec(4, 16)


def calls(made) -> int:
    """Calls of functions, Python's and C's, that compiling takes."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        tw.compile(*made, cache=False)
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.unvalidated("validation runs the interpreter, whose calls are not the compiler's")
@pytest.mark.parametrize("kind", [chain, layers])
def test_work_grows_with_the_nodes(kind):
    with tw.config(verify=False):
        tw.compile(*kind(2), cache=False)  # imports, and what is made once per process
        few, some, many = (calls(kind(n)) for n in (6, 24, 42))
    # the same number of further layers costs the same; a twentieth is for tables that grow in steps
    assert many - some < 1.05 * (some - few) + 2000, (few, some, many)
