"""What the comparisons make of their rows: peers that are skipped or wrong, runs that are interrupted or fail, tables, charts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tensorwright import cli
from tensorwright.benchmarks import compile_time, inference, int8, report, roofline
from tensorwright.benchmarks.comparison import BenchmarkError, Comparison
from tensorwright.benchmarks.contest import contestants, take_turns
from tensorwright.benchmarks.installed import installed_bytes
from tensorwright.ir.errors import InputError

CONTESTANT = """
import sys
import numpy as np
from tensorwright.benchmarks.serving import serve

words = sys.argv[2:]
value = {"right": 1.0, "wrong": 1.01, "undefined": np.nan}

def make():
    if words[0] == "broken":
        raise ValueError("no such operator")
    return lambda: (np.full(3, value[words[0]], np.float32),), {}

serve(make, words[1], 1, lambda found: found)
"""


def row(name: str = "mlp_b1", **changed: Any) -> dict[str, Any]:
    facts = {"import": 0.1, "import_rss": 30_000_000, "peak_rss": 50_000_000, "build": 0.2, "first_call": 0.01}
    return {
        "name": name, "threads": 2, "ours_ms": 0.01, "peers_ms": {"numpy": 0.02, "jax": 0.05}, "best_peer": "numpy",
        "ratio_to_best": 2.0, "ratios": {"numpy": 2.0, "jax": 5.0}, "ratio_undisturbed": 1.9, "gflops": 20.0, "gbps": 40.0,
        "spread_ms": {"tensorwright": [0.009, 0.012], "numpy": [0.02, 0.03], "jax": [0.04, 0.06]}, "bound": "memory",
        "fraction_of_peak": 0.5, "effective": False, "benchmark_error": False, "max_rel_error": 1e-7, "busy_elsewhere": 0.02,
        "compile_seconds": {"tensorwright": 0.21, "numpy": 0.0, "jax": 0.3}, "warm_seconds": 0.02, "bits_equal": {"1": True},
        "facts": dict.fromkeys(("tensorwright", "numpy", "jax"), facts), "out": {}, "aside": {}, **changed,
    }  # fmt: skip


def compare(measure: Any, peers: dict[str, str] | None = None) -> Comparison:
    found = {"numpy": ""} if peers is None else peers
    return Comparison("test", None, ("a", "b", "c"), ("a", "b", "c"), lambda: found, measure, lambda r: "")


def test_a_network_of_integers_is_remarked_beside_f32() -> None:
    made = {"ratio_to_f32": 3.5, "f32_ms": 7.0, "gflops": 700.0, "fraction_of_peak": 0.75, "busy_elsewhere": 0.3}
    text = int8.remark({**made, "out": {"openvino": "gone"}})
    assert text == (
        "3.50x of our f32 (7.000 ms)  700 GOP/s (75% of the integer peak)  0.30 cores busy elsewhere  openvino is out (gone)"
    )
    assert int8.match("mlp") == ["mlp_b64"] and int8.match("bert_b1") == ["bert_b1"] and not int8.match("gpt2")


def test_a_wrong_contestant_is_out_before_anything_is_timed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "contestant_of_a_test.py").write_text(CONTESTANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.savez(tmp_path / "reference.npz", out0=np.ones(3))
    names = ("right", "wrong", "undefined", "broken")
    words = {c: (c, str(tmp_path / f"{c}.npz")) for c in names}
    out: dict[str, str] = {}

    def check(name: str) -> str:
        return inference.verdict(tmp_path / f"{name}.npz", tmp_path / "reference.npz", 1e-4)[1]

    with contestants("contestant_of_a_test", words, 1, "test", check=check, out=out) as running:
        assert list(running) == ["right"]
        take_turns(running, 2, 0.001)
        assert len(running["right"].rounds) == 2 and running["right"].facts["peak_rss"] > 1_000_000
    assert out["wrong"] == "its result is wrong: relative error 1.0e-02, allowed is 1e-04"
    assert "relative error inf" in out["undefined"] and out["broken"] == "ValueError: no such operator"
    assert "wrong is out: its result is wrong" in capsys.readouterr().err


def test_results_of_another_shape_or_too_few_are_wrong(tmp_path: Path) -> None:
    np.savez(tmp_path / "want.npz", out0=np.ones(3), out1=np.ones(2))
    np.savez(tmp_path / "few.npz", out0=np.ones(3))
    np.savez(tmp_path / "shape.npz", out0=np.ones(3), out1=np.ones((2, 1)))
    np.savez(tmp_path / "second.npz", out0=np.ones(3), out1=np.array([1.0, 1.5]))
    errors = {
        k: inference.relative_error(tmp_path / f"{k}.npz", tmp_path / "want.npz") for k in ("few", "shape", "second", "want")
    }
    assert errors == {"few": np.inf, "shape": np.inf, "second": 0.5, "want": 0.0}


def test_a_peer_that_is_not_installed_is_skipped_in_words(monkeypatch: Any, capsys: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    known = inference.known_peers()
    assert known["openvino"] == "openvino is not installed (pip install 'tensorwright[bench]')" and not known["numpy"]
    compared = compare(lambda name, peers, threads, rounds: row(name, peers_ms={}), known)
    found = compared.run("a", "numpy,openvino", 1)
    assert found["skipped"] == {"openvino": known["openvino"]}
    assert "openvino is skipped: openvino is not installed" in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown peers tensorflo"):
        compared.run("a", "tensorflo", 1)


def test_bf16_runs_against_those_that_compute_in_it() -> None:
    assert set(inference.known_peers("bf16")) == {"openvino_bf16", "torch_bf16"}
    assert not {"openvino_bf16", "torch_bf16"} & set(inference.known_peers())


def test_an_interrupted_run_keeps_its_rows(capsys: Any) -> None:
    def measure(name: str, *_: Any) -> dict[str, Any]:
        if name == "b":
            raise KeyboardInterrupt
        return row(name)

    kept: list[int] = []
    found = compare(measure).run(threads=1, keep=lambda r: kept.append(len(r["rows"])))
    assert found["interrupted"] and [r["name"] for r in found["rows"]] == ["a"] and kept == [1]
    assert "interrupted: 1 of 3 rows" in capsys.readouterr().err


def test_a_failure_of_ours_does_not_stop_the_others_but_the_run_fails() -> None:
    def measure(name: str, *_: Any) -> dict[str, Any]:
        if name == "b":
            raise RuntimeError("b: Tensorwright itself is out: ValueError")
        return row(name)

    compared = compare(measure)
    found = compared.run(threads=1)
    assert [r["name"] for r in found["rows"]] == ["a", "c"] and found["geomean_ratio"] == pytest.approx(2.0)
    with pytest.raises(BenchmarkError, match="b: Tensorwright itself is out"):
        compared.judge(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark_error": True, "fraction_of_peak": 1.5}, "1.50 of the roofline"),
        ({"bits_equal": {"1": True, "4": False}}, "other bits"),
    ],
)
def test_figures_that_cannot_be_are_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        compare(None).judge({"rows": [row(**changed)]})
    assert any("ERROR" in line for line in report.remarks({"skipped": {}, "rows": [row(**changed)]}))


@pytest.mark.parametrize(
    ("bound", "done", "ms", "error", "effective"),
    [
        ("compute", 1.1e6, 2.0, False, False),
        ("compute", 1.1e6, 0.5, True, False),
        ("compute", 0.4e6, 0.5, False, True),
        ("compute", 0.4e6, 0.3, True, True),
        ("memory", 0.4e6, 0.5, True, False),
    ],
)
def test_only_a_method_with_less_arithmetic_may_be_above_the_roofline(
    monkeypatch: Any, bound: str, done: float, ms: float, error: bool, effective: bool
) -> None:
    for name in ("roofline", "again"):
        monkeypatch.setattr(inference, name, lambda *_: roofline.Roofline(1.0, bound, 200.0, 50.0))
    found = inference.limits({"ours_ms": ms}, {"flops": 10**6, "bytes": 10**6}, 2, "f32", int(done))
    assert (found["benchmark_error"], found["effective"]) == (error, effective)
    assert found["fraction_of_peak"] == pytest.approx(1.0 / ms)


def whole() -> dict[str, Any]:
    rows = [
        row(),
        row("bert_b1", out={"tvm": "it took more than 90 s"}, best_peer="jax"),
        row("lenet_b1", aside={"numpy": "why"}),
    ]
    machine = {
        "cpu": "CPU",
        "target": "x86-64-v4",
        "threads": 2,
        "cores": 2,
        "date": "2026-11-22",
        "python": "3.11",
        "versions": {},
    }
    return {
        "machine": machine, "skipped": {"openvino": "it is not installed"}, "rows": rows, "geomean_ratio": 2.0,
        "installed_bytes": {"tensorwright": 10**8}, "failed": {"op_gemv4096": "a reason"},
    }  # fmt: skip


def test_the_markdown_tables_are_well_formed() -> None:
    found = whole()
    text = report.markdown(found, "tensorwright bench inference --quick")
    assert json.loads(json.dumps(found)) == found
    tables: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    widths = [{line.count("|") for line in t} for t in tables if t]
    assert len(widths) == 4 and all(len(w) == 1 for w in widths), "every line of a table has as many cells as its head"
    for words in (
        "**2.00**",
        "50% memory",
        "openvino was skipped",
        "tvm is out",
        "numpy does not take part",
        "op_gemv4096 failed",
    ):
        assert words in text, words


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_chart_is_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib, of the bench extra")
    path = tmp_path / f"chart.{suffix}"
    report.chart(whole(), path)
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_compile_times_as_a_table() -> None:
    times = {"onnxruntime": {"session": 0.01, "to_first_result": 0.02}}
    machine = {"cpu": "CPU", "threads": 2, "date": "2026-11-22"}
    rows = [
        {"name": "a", "cold": 1.0, "warm": 0.03, "peers": times, "out": {}},
        {"name": "b", "cold": 1.0, "warm": 0.1, "peers": {}},
    ]
    nodes = [{"nodes": 100, "seconds": 0.5, "kernels": 10}]
    text = compile_time.markdown({"machine": machine, "rows": rows, "nodes": nodes, "skipped": {"iree": "not installed"}})
    assert "| a | 1.000 | 0.030 | 0.010 | 0.020 |" in text and "| 100 | 0.50 | 5.000 |" in text and "iree was skipped" in text
    assert "warm 3.0x of ONNX Runtime's session" in compile_time.line(rows[0])
    with pytest.raises(InputError, match="unknown workload 'gpt9'"):
        compile_time.run("gpt9", "", 1)


def test_installed_sizes() -> None:
    numpy, both = installed_bytes(["numpy"]), installed_bytes(["numpy", "llvmlite"])
    assert 5_000_000 < numpy < both and installed_bytes(["no-such-package"]) == 0
    assert 500_000 < installed_bytes(["tensorwright"]) < 50_000_000, "our own sources, and not what lies beside them"


@pytest.mark.parametrize("command", [["inference", "--models", "op"], ["kernels", "--rowwise"]])
def test_the_command_writes_its_files_and_fails_for_a_failure(
    tmp_path: Path, monkeypatch: Any, capsys: Any, command: list[str]
) -> None:
    asked: list[Any] = []

    def run(self: Comparison, *arguments: Any) -> dict[str, Any]:
        asked.append(arguments[0])
        return whole()

    monkeypatch.setattr(Comparison, "run", run)
    monkeypatch.chdir(tmp_path)
    files = ["--markdown", "t.md"] if command[0] == "inference" else []
    assert cli.main(["bench", *command, "--quick", "--json", "t.json", *files]) == 1
    assert "op_gemv4096" not in (asked[0] or "") and "BenchmarkError: a reason" in capsys.readouterr().err
    assert json.loads((tmp_path / "t.json").read_text())["installed_bytes"]["tensorwright"] > 500_000
    assert not files or (tmp_path / "t.md").read_text().count("\n| ") > 10
