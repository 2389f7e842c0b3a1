"""`tensorwright prune` and `tensorwright bench sparse` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli
from tensorwright.benchmarks import sparse

MODEL = """
import tensorwright as tw
from tensorwright import nn
tw.seed(0)
net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
specs = [tw.spec(8, 32)]
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)


def test_a_model_is_pruned_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    options = ["--ratio", "0.75", "--pattern", "block 1x16", "--exclude", "2", "--dense", "-o", "small.tw", "--report", "r.json"]
    assert cli.main(["prune", "m.py:net", "--spec", "8,32", *options]) == 0
    report = json.loads(Path("r.json").read_text())
    assert [(r["name"], r["choice"], r["zeros"]) for r in report["layers"]] == [("0", "masked", 0.75), ("2", "dense", 0)]
    assert "wrote small.tw" in capsys.readouterr().out
    exe = tw.load("small.tw")
    assert sorted(round(float((w == 0).mean()), 2) for w in exe.parameters.values() if w.ndim == 2) == [0.0, 0.75]
    assert cli.main(["prune", "m.py:net", "--spec", "8,32", "--ratio", "0.5", "--pattern", "channels", "-o", "small.onnx"]) == 0
    shapes = sorted(w.shape for w in tw.onnx.load("small.onnx").weights.values() if w.ndim == 2)
    assert shapes == [(32, 16), (32, 32)]


def test_a_ratio_that_makes_no_sense_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", "m.py:net", "--spec", "8,32", "--ratio", "1.5"]) != 0
    assert "between 0 and 1" in capsys.readouterr().err
    assert cli.main(["prune", "m.py:net", "--spec", "8,32", "--ratio", "0.5", "-o", "small.txt"]) != 0
    assert ".onnx or .tw" in capsys.readouterr().err


@pytest.mark.unvalidated("it is timed")
def test_the_benchmark_of_sparse_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sparse, "LAYERS", (("gemm 1024", 32, 32, 64), ("1x1 32-48@4", 4, 32, 48)))
    monkeypatch.setattr(sparse, "CONVOLUTIONS", (("3x3 16-16@5", 5, 16, 16, 3, 1),))
    monkeypatch.setattr(sparse, "EVEN", ("gemm 1024",))
    monkeypatch.setattr(sparse, "RATIOS", (0.5, 0.9))
    monkeypatch.setattr(sparse, "PATTERNS", (("block 1x16", 0.75), ("unstructured", 0.9)))
    monkeypatch.setattr(sparse, "quiet", lambda: None)
    monkeypatch.setattr(sparse, "channels", lambda threads, seconds: _RESNET | {"threads": threads})
    assert cli.main(["bench", "sparse", "--threads", "1", "--quick", "--json", "s.json"]) == 0
    found = json.loads(Path("s.json").read_text())
    assert len(found["rows"]) == 7 and all(r["ratio"] == pytest.approx(r["dense_ms"] / r["ours_ms"]) for r in found["rows"])
    assert all(r["max_rel_error"] < 1e-5 for r in found["rows"][:6])  # sums of 144 products at most, in another order
    assert all(("ratio_plain" in r) == r["name"].startswith("3x3") for r in found["rows"])
    assert set(found["break_even"]["gemm 1024"]) == {"block 1x16", "unstructured"}
    assert "break-even" in capsys.readouterr().out


_RESNET = {
    "name": "ResNet-18",
    "pattern": "channels",
    "zeros": 0.5,
    "dense_ms": 2.0,
    "ours_ms": 1.0,
    "ratio": 2.0,
    "parameters": 0.3,
}


def test_break_even_lies_where_the_ratio_crosses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of 0.5 and then 1.5 cross at the middle; above 1 from the first share on, it is that share at most."""
    monkeypatch.setattr(sparse, "RATIOS", (0.2, 0.6))
    monkeypatch.setattr(sparse, "layer", lambda *row: (None, np.zeros(1)))
    for low, high, expected in ((0.5, 1.5, 0.4), (1.2, 2.0, 0.2)):
        monkeypatch.setattr(sparse, "_row", lambda *a, low=low, high=high: {"ratio": low if a[3] == 0.2 else high})
        assert sparse.break_even(1, 0.01)["unstructured"] == pytest.approx(expected)
    monkeypatch.setattr(sparse, "_row", lambda *a: {"ratio": 0.5})
    assert np.isnan(sparse.break_even(1, 0.01)["unstructured"])
