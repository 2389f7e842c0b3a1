"""Models that run in stages: what is remembered from call to call, and how much of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import tensorwright as tw  # noqa: E402
from onnx_graphs import F, I, model, node  # noqa: E402
from tensorwright import staged  # noqa: E402
from tensorwright.ir.graph import Graph  # noqa: E402
from tensorwright.ir.interp import run  # noqa: E402


class Interpreted:
    """What stands for compiling here: the interpreter."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __call__(self, *inputs: Any) -> Any:
        found = run(self.graph, list(inputs))
        return found[0] if len(found) == 1 else tuple(found)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[staged.StagedExecutable, list[int]]:
    """y = NonZero(x) reshaped as an argument says, and how often it was imported."""
    nodes = [
        node("NonZero", ["x"], ["where"]),
        node("Reshape", ["where", "shape"], ["y"]),
    ]
    source = model(nodes, [("x", F, ("N",)), ("shape", I, (2,))], [("y", I, (None, None))])
    read, imports = tw.onnx.Model(source), [0]
    stage = read.stage

    def count(*given: Any) -> Any:
        imports[0] += 1
        return stage(*given)

    monkeypatch.setattr(read, "stage", count)
    return staged.StagedExecutable(read, Interpreted), imports  # type: ignore[arg-type]


def test_a_call_like_one_before_imports_nothing(counted: Any) -> None:
    exe, imports = counted
    x = np.array([0, 3, 0, 5, 7, 9], np.float32)
    first = exe(x, np.array([2, 2]))
    assert np.array_equal(first, [[1, 3], [4, 5]])
    before = imports[0]
    assert before > 1
    assert np.array_equal(exe(x * 2, np.array([2, 2])), first)
    assert imports[0] == before
    assert np.array_equal(exe(x, np.array([1, 4])), first.reshape(1, 4))  # another number
    assert np.array_equal(exe(x[:4], np.array([1, 2])), [[1, 3]])  # another size and another count
    assert imports[0] > before


def test_what_is_remembered_is_bounded(counted: Any) -> None:
    exe, _ = counted
    for size in range(2, 120):
        x = np.ones(size, np.float32)
        assert np.array_equal(exe(x, np.array([1, size])), np.arange(size)[None])
    assert len(exe.programs()) <= staged._KEPT
    assert len(exe._first) <= staged._KEPT
    assert np.array_equal(exe(np.ones(2, np.float32), np.array([2, 1])), [[0], [1]])  # one that was forgotten
