"""What every comparison with peers shares: choosing workloads and peers, the columns of a row, the table, the report.

A benchmark is a `Comparison`: its workloads, its peers, a function that measures one row, and one that says what is special
about a row. The command line and `tensorwright bench` run it in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tensorwright.benchmarks.contest import Contestant, geometric_mean

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One benchmark.

    workloads  all of them; `default` are those that run when none is named
    installed  the peers that can take part here
    measure    (workload, peers, threads, rounds) -> row
    remark     what the table says of a row after the times
    match      the workloads that a name on the command line stands for, none if it is unknown
    """

    program: str
    description: str | None
    workloads: tuple[str, ...]
    default: tuple[str, ...]
    installed: Callable[[], Sequence[str]]
    measure: Callable[[str, Sequence[str], int, int], Row]
    remark: Callable[[Row], str]
    match: Callable[[str], Sequence[str]] | None = None

    def run(self, names: str | None = None, peers: str | None = None, threads: int | None = None, quick: bool = False) -> Row:
        """The report: rows, machine, geometric mean; each row is printed when it is there. Names are separated by commas.

        Raises InputError for an unknown workload or peer.
        """
        from tensorwright.ir.errors import InputError
        from tensorwright.runtime.threads import available

        chosen: list[str] = []
        for n in names.split(",") if names else self.default:
            found = self.match(n) if self.match else [w for w in self.workloads if w == n]
            if not found:
                raise InputError(f"unknown workload {n!r}; expected some of {', '.join(self.workloads)}")
            chosen += found
        there = self.installed()
        against = [p for p in peers.split(",") if p] if peers is not None else list(there)
        if unknown := [p for p in against if p not in there]:
            raise InputError(f"peers {unknown} are not installed here; there are {', '.join(there) or 'none'}")
        count, rows = threads or available(), []
        for name in chosen:
            rows.append(self.measure(name, against, count, 3 if quick else 12))
            print(self.line(rows[-1]), flush=True)
        mean = geometric_mean([r["ratio_to_best"] for r in rows if r["ratio_to_best"]])
        if mean is not None:
            print(f"{mean:.2f}x of the best peer (geometric mean)")
        return {"machine": machine(count), "rows": rows, "geomean_ratio": mean}

    def line(self, r: Row) -> str:
        """A row as text, ratios first: of medians, and of first deciles, which a busy machine disturbs less."""
        ratio = "no peer"
        if r["best_peer"] is not None:
            ratio = f"{r['ratio_to_best']:.2f}x of {r['best_peer']} ({r['ratio_undisturbed']:.2f}x)"
        others = "  ".join(f"{c} {t:.3f} ({t / r['ours_ms']:.2f}x)" for c, t in r["peers_ms"].items())
        error = "" if r["max_rel_error"] is None else f"  error {r['max_rel_error']:.1e}"
        return f"{ratio:<34} {r['name']:<20} ours {r['ours_ms']:.4f} ms  {others}  {self.remark(r)}{error}"

    def main(self, words: Sequence[str]) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(prog=self.program, description=self.description)
        parser.add_argument("--models", default=None, help=f"some of {', '.join(self.workloads)}, separated by commas")
        parser.add_argument("--peers", default=None, help="separated by commas (default: what is installed)")
        parser.add_argument("--threads", type=int, default=None)
        parser.add_argument("--quick", action="store_true", help="fewer rounds")
        parser.add_argument("--json", metavar="FILE")
        args = parser.parse_args(words)
        report = self.run(args.models, args.peers, args.threads, args.quick)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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


def machine(threads: int) -> dict[str, Any]:
    """Where and when it was measured, and with which versions."""
    from importlib import metadata

    from tensorwright.runtime import host

    versions = {}
    for package in ("tensorwright", "numpy", "torch", "jax", "tensorflow-cpu", "tensorflow", "onnxruntime", "llvmlite"):
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
