"""The demo and the model benchmark, as short as they can be and still show every figure that they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorwright import cli
from tensorwright.benchmarks import inference
from tensorwright.benchmarks.roofline import Roofline


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.mark.unvalidated("the interpreter takes half a minute for the training step; smaller ones are validated elsewhere")
def test_the_demo_learns_digits_and_shows_every_stage(capsys):
    pytest.importorskip("sklearn", reason="scikit-learn holds the demo's data and is not installed")
    assert cli.main(["demo", "--seeds", "1", "--epochs", "4", "--threads", "1", "--json", "demo.json"]) == 0
    figures = json.loads(Path("demo.json").read_text())
    assert figures["test_accuracy"] > 0.9, "four epochs reach about 0.97"
    for field in ("seconds", "peak_bytes", "passes", "kernels", "speedup_over_numpy"):
        assert figures[field], field
    assert all(k["fraction_of_peak"] <= 1.1 for k in figures["kernels"]), "above the roofline"
    names = {p.name[4:] for p in Path("tensorwright-demo").rglob("*.txt")}
    assert {"graph.txt", "gradient.txt", "fuse.txt", "loops.txt", "llvm.txt", "asm.txt"} <= names
    out = capsys.readouterr().out
    for word in ("passes", "of peak", "peak memory of one call", "in numpy", "Median test accuracy"):
        assert word in out


def test_bench_inference_compares_in_one_run(capsys, monkeypatch):
    # a limit that no machine reaches: what happens at the measured one, test_bench_reports asks with made-up times
    for name in ("roofline", "again"):
        monkeypatch.setattr(inference, name, lambda *_: Roofline(1e-5, "memory", 1e6, 1e6))
    command = ["bench", "inference", "--models", "mlp_b1", "--peers", "numpy", "--threads", "1", "--quick"]
    command += ["--json", "b.json", "--markdown", "b.md"]
    assert cli.main(command) == 0
    result = json.loads(Path("b.json").read_text())
    (row,) = result["rows"]
    expected = {"name", "threads", "ours_ms", "peers_ms", "best_peer", "ratio_to_best", "gflops", "gbps", "fraction_of_peak"}
    assert expected <= row.keys() and row["best_peer"] == "numpy"
    assert (
        row["bits_equal"] == {"1": True, "2": True, "4": True} and row["warm_seconds"] > 0 and row["facts"]["numpy"]["peak_rss"]
    )
    assert (
        "| mlp_b1 | **" in Path("b.md").read_text() and "tensorwright bench inference --models mlp_b1" in Path("b.md").read_text()
    )
    assert row["max_rel_error"] < 1e-5 and result["machine"]["cpu"]
    assert (
        result["geomean_ratio"] == pytest.approx(row["ratio_to_best"]) == pytest.approx(row["peers_ms"]["numpy"] / row["ours_ms"])
    )
    assert row["fraction_of_peak"] == pytest.approx(1e-5 / row["ours_ms"]) and not row["benchmark_error"]
    assert capsys.readouterr().out.startswith(f"{row['ratio_to_best']:.2f}x of numpy"), "the ratio is printed first"
