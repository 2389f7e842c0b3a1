"""What every comparison with peers shares: choosing workloads and peers, the columns of a row, the report.

A benchmark is a `Comparison`: its workloads, its peers, a function that measures one row, and one that says what is special
about a row. The command line and `tensorwright bench` run it in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tensorwright.benchmarks.contest import Contestant, geometric_mean
from tensorwright.ir.errors import InputError, TensorwrightError

Row = dict[str, Any]


class BenchmarkError(TensorwrightError):
    """A workload could not be measured, or our own result was wrong."""


@dataclass(frozen=True)
class Comparison:
    """One benchmark.

    workloads  all of them; `default` are those that run when none is named
    peers      () -> every peer it knows: "" if it is here, else why it is not
    measure    (workload, peers, threads, rounds) -> row
    remark     what the table says of a row after the times
    match      the workloads that a name on the command line stands for, none if it is unknown
    """

    program: str
    description: str | None
    workloads: tuple[str, ...]
    default: tuple[str, ...]
    peers: Callable[[], Mapping[str, str]]
    measure: Callable[[str, Sequence[str], int, int], Row]
    remark: Callable[[Row], str]
    match: Callable[[str], Sequence[str]] | None = None

    def run(
        self,
        names: str | None = None,
        peers: str | None = None,
        threads: int | None = None,
        quick: bool = False,
        keep: Callable[[Row], None] | None = None,
    ) -> Row:
        """The report: rows, machine, geometric mean; each row is printed when it is there. Names are separated by commas.

        A peer that is not installed is skipped in words. `keep` gets the report after each row: what there is when a run is
        interrupted, which ends it with the rows so far. Where Tensorwright itself fails, or is wrong, the others still run, and
        'failed' says why. Raises InputError for an unknown workload or peer.
        """
        from tensorwright.runtime.threads import available

        chosen, (against, skipped) = self._workloads(names), self._peers(peers)
        for peer, reason in skipped.items():
            print(f"{peer} is skipped: {reason}", file=sys.stderr)
        count = threads or available()
        report: Row = {"machine": machine(count), "skipped": skipped, "rows": [], "geomean_ratio": None}
        try:
            for name in chosen:
                try:
                    row = self.measure(name, against, count, 3 if quick else 12)
                except (RuntimeError, BenchmarkError) as error:
                    report.setdefault("failed", {})[name] = str(error)
                    print(f"FAILED {error}", flush=True)
                    continue
                report["rows"].append(row)
                ratios = [r["ratio_to_best"] for r in report["rows"] if r["ratio_to_best"]]
                report["geomean_ratio"] = geometric_mean(ratios)
                print(self.line(row), flush=True)
                if keep is not None:
                    keep(report)
        except KeyboardInterrupt:
            report["interrupted"] = True
            print(f"interrupted: {len(report['rows'])} of {len(chosen)} rows are there", file=sys.stderr)
        if report["geomean_ratio"] is not None:
            print(f"{report['geomean_ratio']:.2f}x of the best peer (geometric mean)")
        return report

    def judge(self, report: Row) -> None:
        """Raises BenchmarkError if a workload failed, depends on the number of threads, or is above the roofline."""
        wrong = list(report.get("failed", {}).values())
        for r in report["rows"]:
            if r.get("benchmark_error"):
                wrong.append(f"{r['name']}: {r['fraction_of_peak']:.2f} of the roofline, which nothing can exceed")
            if not all(r.get("bits_equal", {}).values()):
                wrong.append(f"{r['name']}: other bits with other numbers of threads")
        if wrong:
            raise BenchmarkError("; ".join(wrong))

    def _workloads(self, names: str | None) -> list[str]:
        chosen: list[str] = []
        for n in names.split(",") if names else self.default:
            found = self.match(n) if self.match else [w for w in self.workloads if w == n]
            if not found:
                raise InputError(f"unknown workload {n!r}; expected some of {', '.join(self.workloads)}")
            chosen += [w for w in found if w not in chosen]
        return chosen

    def _peers(self, peers: str | None) -> tuple[list[str], dict[str, str]]:
        """Those that take part, and why others do not."""
        known = self.peers()
        asked = [p for p in peers.split(",") if p] if peers is not None else list(known)
        if unknown := [p for p in asked if p not in known]:
            raise InputError(f"unknown peers {', '.join(unknown)}; expected some of {', '.join(known)}")
        return [p for p in asked if not known[p]], {p: known[p] for p in asked if known[p]}

    def line(self, r: Row) -> str:
        """A row as text, ratios first: of medians, and of first deciles, which a busy machine disturbs less."""
        ratio = "no peer"
        if r["best_peer"] is not None:
            ratio = f"{r['ratio_to_best']:.2f}x of {r['best_peer']} ({r['ratio_undisturbed']:.2f}x)"
        others = "  ".join(f"{c} {t:.3f} ({t / r['ours_ms']:.2f}x)" for c, t in r["peers_ms"].items())
        error = "" if r["max_rel_error"] is None else f"  error {r['max_rel_error']:.1e}"
        return f"{ratio:<34} {r['name']:<20} ours {r['ours_ms']:.4f} ms  {others}  {self.remark(r)}{error}"

    def main(self, words: Sequence[str]) -> None:
        """The command line of the module."""
        parser = argparse.ArgumentParser(prog=self.program, description=self.description)
        parser.add_argument("--models", default=None, help=f"some of {', '.join(self.workloads)}, separated by commas")
        parser.add_argument("--peers", default=None, help="separated by commas (default: what is installed)")
        parser.add_argument("--threads", type=int, default=None)
        parser.add_argument("--quick", action="store_true", help="fewer rounds")
        parser.add_argument("--json", metavar="FILE")
        args = parser.parse_args(words)

        def keep(report: Row) -> None:
            if args.json:
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

        found = self.run(args.models, args.peers, args.threads, args.quick, keep)
        keep(found)
        self.judge(found)


def columns(name: str, threads: int, running: Mapping[str, Contestant], *, flops: int, nbytes: int, aside: str = "") -> Row:
    """The columns that every row has, from contestants that took their turns. `aside` is one that is no peer."""
    times = {c: p.median for c, p in running.items() if c != aside}
    first = {c: p.spread[0] for c, p in running.items() if c != aside}
    mine, mine_first = times.pop("tensorwright"), first.pop("tensorwright")
    best = min(times, key=times.__getitem__, default=None)
    return {
        "name": name,
        "threads": threads,
        "ours_ms": mine,
        "peers_ms": times,
        "best_peer": best,
        "ratio_to_best": times[best] / mine if best else None,
        "ratios": {c: t / mine for c, t in times.items()},
        "ratio_undisturbed": min(first.values()) / mine_first if best else None,
        "spread_ms": {c: p.spread for c, p in running.items()},
        "gflops": flops / mine * 1e-6,
        "gbps": nbytes / mine * 1e-6,
        "seconds_to_first_result": {c: p.facts["ready"] for c, p in running.items()},
    }


PACKAGES = (
    "tensorwright", "numpy", "torch", "jax", "tensorflow-cpu", "tensorflow", "onnxruntime", "openvino", "apache-tvm",
    "iree-base-compiler", "llvmlite",
)  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """Where and when it was measured, and with which versions."""
    from importlib import metadata

    from tensorwright.runtime import host

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": host.cpu_name(),
        "target": host.host().name,
        "threads": threads,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }
