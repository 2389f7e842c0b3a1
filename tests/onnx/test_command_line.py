"""`tensorwright` on ONNX files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import tensorwright as tw  # noqa: E402
from onnx_graphs import F, model, node  # noqa: E402
from tensorwright.cli import main  # noqa: E402
from tensorwright.commands.onnx import difference  # noqa: E402


@pytest.fixture
def net(tmp_path: Path) -> str:
    w = np.random.default_rng(0).normal(size=(5, 4)).astype(F)
    m = model(
        [node("MatMul", ["x", "w"], ["h"], name="dense"), node("Tanh", ["h"], ["t"], name="squash"), node("Neg", ["t"], ["y"])],
        [("x", F, ["N", 5])],
        [("y", F, ["N", 4])],
        {"w": w},
    )
    path = tmp_path / "net.onnx"
    onnx.save(m, path)
    return str(path)


def test_inspect_summarises(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", net]) == 0
    said = capsys.readouterr().out
    assert "3 nodes: MatMul 1, Tanh 1, Neg 1" in said
    assert "1 arrays: 20 numbers, 80 bytes" in said
    assert "takes x: f32[N, 5]" in said and "--size N=1" in said
    assert main(["inspect", net, "--size", "N=2"]) == 0
    assert "kernels" in capsys.readouterr().out


def test_inspect_says_what_is_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = model([node("Wibble", ["x"], ["y"], name="w", domain="my")], [("x", F, [4])], [("y", F, [4])], domains={"my": 1})
    onnx.save(m, tmp_path / "bad.onnx")
    assert main(["inspect", str(tmp_path / "bad.onnx")]) == 0
    assert "my.Wibble (opset 1): 'w'" in capsys.readouterr().out
    assert main(["compile", str(tmp_path / "bad.onnx")]) == 1
    assert "OnnxError" in capsys.readouterr().err


def test_compile_saves_what_loads_again(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "net.tw"
    assert main(["compile", net, "--size", "N=2", "-o", str(saved)]) == 0
    x = np.ones((3, 5), F)
    np.testing.assert_array_equal(tw.load(saved)(x), tw.compile(tw.onnx.load(net))(x))


def test_run_compares_with_the_peer(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the bench extra")
    report = tmp_path / "report.json"
    asked = ["--compare", "onnxruntime", "--layers", "--json", str(report)]
    assert main(["run", net, "--size", "N=3", "--repeat", "1", *asked]) == 0
    found = json.loads(report.read_text())["compare"]
    assert found["y"] < 1e-5 and found["first_different"] == ""
    assert "no node differs" in capsys.readouterr().out


def test_differences() -> None:
    assert difference([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert difference([1.0], [1.0, 2.0]) == float("inf")
    assert difference([float("nan"), 1.0], [float("nan"), 1.0]) == 0.0
    assert difference([float("nan")], [1.0]) == float("inf")
    assert difference([float("inf")], [float("inf")]) == 0.0
    assert difference([float("inf")], [1.0]) == float("inf")
