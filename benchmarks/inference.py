"""Whole models and single operations against the peers: each contestant in its own process, taking turns.

    tensorwright bench inference --models resnet50,op --json result.json --markdown table.md --chart chart.png

Every contestant gets the same weights and inputs from files, the same number of threads and the same cores. Results are
compared with an evaluation in f64 before anything is timed, and who is wrong is out. Then they are measured in rounds, in turn,
so that a busy moment of the machine meets all of them; figures are medians. One more process compiles from the cache, and
compares the bits of 1, 2 and 4 threads.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorwright.benchmarks import models
from tensorwright.benchmarks.comparison import Comparison, Row, columns
from tensorwright.benchmarks.contest import Contestant, busy, contestants, take_turns
from tensorwright.benchmarks.installed import installed_bytes
from tensorwright.benchmarks.peers import OURS, PEERS
from tensorwright.benchmarks.prepare import prepare
from tensorwright.benchmarks.roofline import again, roofline
from tensorwright.runtime.host import host

TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}  # of the largest value of the f64 result
THREADS = (1, 2, 4)  # whose results must have the same bits
DISTURBED = 0.1  # cores that others used: the row is worth less
RETRIES = 4  # measurements of the machine's limits before a row is said to be above them
ROUNDING = 1.03  # a fraction of the roofline above it is an error: both are measured, on a machine that others use too
COLUMNS = ("import", "import_rss", "peak_rss", "build", "first_call", "form", "precision")


def known_peers(precision: str = "f32") -> dict[str, str]:
    """The contestants with an entry for a precision, ourselves left out: "" for those that are here, else why not."""
    return {name: p.missing() for name, p in PEERS.items() if name != OURS and precision in p.precisions}


def relative_error(found: Path, reference: Path) -> float:
    """The largest difference over all outputs, as part of the output's largest value. Infinite for another shape or a NaN."""
    worst = 0.0
    with np.load(found) as got, np.load(reference) as want:
        if len(got.files) < len(want.files):
            return float("inf")
        for key in want.files:
            y, truth = got[key], want[key]
            if y.shape != truth.shape:
                return float("inf")
            worst = max(worst, float(np.max(np.abs(y - truth), initial=0.0) / max(float(np.max(np.abs(truth))), 1e-300)))
            if not np.isfinite(y).all():
                return float("inf")
    return worst


def verdict(found: Path, reference: Path, tolerance: float) -> tuple[float, str]:
    """The error of a result, and "" or why its contestant is out."""
    error = relative_error(found, reference)
    return error, "" if error <= tolerance else f"its result is wrong: relative error {error:.1e}, allowed is {tolerance:.0e}"


def measure(name: str, peers: Sequence[str], threads: int, rounds: int, precision: str = "f32") -> Row:
    """One row: medians of all contestants on one workload. Raises RuntimeError if Tensorwright fails, or is wrong."""
    errors: dict[str, float] = {}
    out: dict[str, str] = {}
    aside = {p: why for p in peers if (why := PEERS[p].takes(name))}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        prepare(name, folder)

        def check(contestant: str) -> str:
            path = folder / f"{contestant}.npz"
            errors[contestant], reason = verdict(path, folder / "reference.npz", TOLERANCE[precision])
            if contestant != OURS:
                path.unlink()
            return reason

        chosen = (OURS, *(p for p in peers if p not in aside))
        environments = {c: dict(PEERS[c].environment(threads)) for c in chosen}
        environments[OURS]["TENSORWRIGHT_CACHE"] = str(folder / "cache")  # empty: the first compile is a cold one
        words = {c: (c, name, text, precision) for c in chosen}
        module = "tensorwright.benchmarks.worker"
        settings: dict[str, Any] = {"check": check, "environments": environments, "out": out}
        with contestants(module, words, threads, name, **settings) as running:
            if OURS not in running:
                raise RuntimeError(f"{name}: Tensorwright itself is out: {out[OURS]}")
            again = _again(name, folder, precision, threads, environments[OURS])
            others = busy(lambda: take_turns(running, rounds), [c.process.pid for c in running.values()])
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    row = columns(name, threads, running, flops=about["flops"], nbytes=about["bytes"])
    facts = {c: {k: p.facts[k] for k in COLUMNS if k in p.facts} for c, p in running.items()}
    own = running[OURS].facts
    return row | {
        **limits(row, about, threads, precision, own["flops"]),
        "precision": precision,
        "busy_elsewhere": others,
        "max_rel_error": errors.pop(OURS),
        "peers_max_rel_error": errors,
        "compile_seconds": {c: f["build"] + f["first_call"] for c, f in facts.items()},
        "warm_seconds": again["warm"],
        "bits_equal": again["equal"],
        "facts": facts,
        "out": out,
        "aside": aside,
        "peak_bytes": own["peak_bytes"],
        "kernels": own["kernels"],
    }


def limits(row: Row, about: Mapping[str, Any], threads: int, precision: str, done: int) -> Row:
    """Where the row stands below the roofline, and whether it stands above. `done`: the operations of the compiled kernels."""
    line = roofline(about["flops"], about["bytes"], host(), threads, precision)
    least = min(1.0, done / about["flops"]) if line.bound == "compute" else 1.0  # of the direct arithmetic
    for _ in range(RETRIES):
        if least * line.ms <= row["ours_ms"]:
            break
        line = min(line, again(about["flops"], about["bytes"], host(), threads, precision), key=lambda r: r.ms)
    fraction = line.ms / row["ours_ms"]
    return {
        "flops": about["flops"],
        "bytes": about["bytes"],
        "bound": line.bound,
        "peak_gflops": line.gflops,
        "peak_gbps": line.gbps,
        "fraction_of_peak": fraction,
        "effective": fraction > 1 and least < 1,
        "benchmark_error": least * fraction > ROUNDING,
    }


def _again(name: str, folder: Path, precision: str, threads: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Seconds from a filled cache to the first result in a new process, and whether numbers of threads change any bit."""
    cores = os.cpu_count() or 1
    found: dict[str, Any] = {"warm": None, "equal": {}}
    want = _outputs(folder)
    for count in dict.fromkeys((threads, *THREADS)):
        c = Contestant("tensorwright.benchmarks.worker", (OURS, name, str(folder), precision), count, environment)
        try:
            c.start()
            if c.error:
                raise RuntimeError(f"{name} with {count} threads: {c.error}")
        finally:
            c.stop()
        if found["warm"] is None:
            found["warm"] = c.facts["build"] + c.facts["first_call"]
        found["equal"][str(count)] = _outputs(folder) == want
    if different := [n for n, same in found["equal"].items() if not same]:
        print(f"  {name}: ERROR: other bits with {', '.join(different)} threads ({cores} cores)", file=sys.stderr)
    return found


def _outputs(folder: Path) -> list[bytes]:
    with np.load(folder / f"{OURS}.npz") as arrays:
        return [arrays[k].tobytes() for k in sorted(arrays.files)]


def remark(r: Mapping[str, Any]) -> str:
    """Arithmetic or traffic of a row as part of the machine's limit, compile times, and what is wrong."""
    rate = f"{r['gflops']:.1f} GFLOP/s" if r["bound"] == "compute" else f"{r['gbps']:.1f} GB/s"
    word = " effective" if r["effective"] else ""
    fraction = f"{rate} ({r['fraction_of_peak']:.0%} of the {r['bound']} peak{word})"
    wrong = ["BENCHMARK ERROR: above the roofline"] if r["benchmark_error"] else []
    wrong += [] if all(r["bits_equal"].values()) else ["ERROR: bits depend on the number of threads"]
    wrong += [f"{r['busy_elsewhere']:.2f} cores busy elsewhere"] if r["busy_elsewhere"] > DISTURBED else []
    wrong += [f"{c} is out ({why})" for c, why in r["out"].items()]
    return "  ".join([fraction, f"compile {r['compile_seconds'][OURS]:.2f} s, warm {r['warm_seconds']:.3f} s", *wrong])


def match(name: str) -> list[str]:
    """'mlp' stands for all its batch sizes, 'op' for all single operations, 'resnet50_b1' for itself."""
    return [w for w in models.INFERENCE if w == name or w.startswith(f"{name}_")]


def comparison(precision: str = "f32") -> Comparison:
    """The benchmark in a precision: in bf16, ours and the peers that compute in it."""
    workloads = tuple(models.INFERENCE)
    peers = functools.partial(known_peers, precision)
    rows = functools.partial(measure, precision=precision)
    return Comparison("tensorwright bench inference", __doc__, workloads, workloads, peers, rows, remark, match)


def with_sizes(report: Row) -> Row:
    """The report with the bytes that each contestant's packages take on disk, those they share counted for each."""
    names = {c for r in report["rows"] for c in (OURS, *r["peers_ms"])}
    return report | {"installed_bytes": {c: installed_bytes(PEERS[c].distributions) for c in sorted(names)}}


if __name__ == "__main__":
    comparison().main(sys.argv[1:])
