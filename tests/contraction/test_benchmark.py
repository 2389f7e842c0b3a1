"""The kernel benchmark: its rows, its peak as the roofline, and that it leaves no slow shape unexplained in silence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tensorwright.benchmarks import kernels, winograd_kernels
from tensorwright.benchmarks.peak import peak
from tensorwright.runtime.host import resolve, runnable_rows

KEYS = {
    "name",
    "threads",
    "ours_ms",
    "peers_ms",
    "best_peer",
    "ratio_to_best",
    "gflops",
    "gbps",
    "fraction_of_peak",
    "max_rel_error",
}


def test_rows_stay_under_the_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "layers", lambda: [kernels.matmul(64, 64, 64), kernels.conv(16, 16, 14, 3)])
    monkeypatch.setattr(winograd_kernels, "LAYERS", ((16, 16, 14), (8, 8, 14)))
    path = tmp_path / "rows.json"
    code = kernels.main(["--target", "host", "--threads", "1", "--seconds", "0.02", "--sweep", "6", "--json", str(path)])
    assert code in (0, 1)  # 1: these small layers miss the goal set for large ones
    report = json.loads(path.read_text())
    assert set(report) >= {"machine", "rows", "geomean_ratio"}
    assert len(report["rows"]) == 2 and len(report["sweep"]) == 6
    (effective,) = report["winograd"]  # too few channels of the other one
    assert effective["max_rel_error"] < 1e-5 and effective["gflops"] > 0
    for r in report["rows"]:
        assert set(r) >= KEYS
        assert 0 < r["fraction_of_peak"] < 1.1  # peak and kernel are timed apart, on a clock that drifts
        assert r["max_rel_error"] < 1e-5
    assert "of peak" in capsys.readouterr().out


def test_the_peak_of_wider_vectors_is_not_lower() -> None:
    speeds = [peak(resolve(name), seconds=0.05) for name in runnable_rows()]
    assert all(wide > 0.8 * narrow for narrow, wide in itertools.pairwise(speeds))
    assert speeds[0] > 1e9


def test_a_reason_names_what_holds_a_shape_back() -> None:
    t = resolve("host")
    assert "microsecond" in kernels.reason(kernels.matmul(4, 4, 4), t)
    assert "lanes" in kernels.reason(kernels.matmul(2000, 2, 100), t)
    assert kernels.reason(kernels.matmul(512, 512, 512, weights=True), t) == ""
