"""`tensorwright quantize` in this process: what it writes, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli

pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")

MODEL = """
import tensorwright as tw
from tensorwright import nn

tw.seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
specs = [tw.spec("N", 1, 8, 8)]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(70, 1, 8, 8)).astype(np.float32))
    return tmp_path


def test_a_model_becomes_files(files: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    arguments = ["quantize", f"{files}/net.py:model", "--calibration", f"{files}/x.npy", "--report", f"{files}/r.html"]
    assert cli.main([*arguments, "--json", f"{files}/r.json", "-o", f"{files}/q.onnx"]) == 0
    said = json.loads((files / "r.json").read_text())
    assert said["totals"]["layers"] == {"int8": 2}
    assert said["settings"]["batches"] == 2
    assert "<table>" in (files / "r.html").read_text()
    assert cli.main([*arguments, "-o", f"{files}/q.tw", "--keep", "3*", "--method", "mse"]) == 0
    x = np.load(files / "x.npy")[:5]
    one, two = tw.compile(tw.onnx.load(files / "q.onnx"))(x), tw.load(files / "q.tw")(x)
    assert one.shape == (5, 3)
    assert 0 < np.abs(one - two).max() < 0.05 * np.abs(two).max()


def test_what_is_missing_or_wrong(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{files}/net.py:model"
    np.save(files / "none.npy", np.zeros((0, 1, 8, 8), np.float32))
    for arguments, said in (
        ([], "--calibration FILE.npy: typical inputs are needed"),
        (["--calibration", f"{files}/none.npy"], "one or more inputs each"),
        (["--calibration", f"{files}/x.npy", "-o", "q.bin"], "written as .onnx or .tw"),
        (["--calibration", f"{files}/x.npy", "--keep", "9"], "no layer is named ['9']"),
    ):
        assert cli.main(["quantize", model, *arguments]) == 1
        assert said in capsys.readouterr().err
