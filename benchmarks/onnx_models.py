"""Other people's ONNX models against ONNX Runtime: each contestant in its own process, taking turns.

    tensorwright bench onnx --models opennsfw,silero --json result.json

examples/fetch_onnx.py gets the files; the light models of the onnx package get random weights; 'built' are exported by PyTorch
from models of the transformers library. Results are compared with ONNX Runtime's before anything is timed, over a whole
recording where state is carried, and an error above the workload's tolerance is a failure. What is timed is one call with the
first inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorwright.benchmarks import onnx_zoo as zoo
from tensorwright.benchmarks.comparison import BenchmarkError, Comparison, Row, columns
from tensorwright.benchmarks.contest import busy, contestants, take_turns
from tensorwright.benchmarks.report import table

OURS: Final = "tensorwright"
PEER: Final = "onnxruntime"
MODULE: Final = "tensorwright.benchmarks.onnx_models"
DISTURBED: Final = 0.1  # cores that others used: the row is worth less


def peers() -> dict[str, str]:
    """ONNX Runtime: "" if it is here, else why not."""
    return {PEER: "" if importlib.util.find_spec(PEER) else f"{PEER} is not installed (pip install 'tensorwright[bench]')"}


def errors(found: Path, reference: Path) -> dict[str, float]:
    """Of each output, the largest difference as part of the reference's largest value; infinite for another shape or a NaN."""
    made: dict[str, float] = {}
    with np.load(found) as got, np.load(reference) as want:
        for key in want.files:
            truth = want[key].astype(np.float64)
            y = got[key].astype(np.float64) if key in got.files else None
            if y is None or y.shape != truth.shape or not np.isfinite(y).all():
                made[key] = float("inf")
            else:
                made[key] = float(np.max(np.abs(y - truth), initial=0.0) / max(float(np.max(np.abs(truth), initial=0.0)), 1e-300))
    return made


def measure(name: str, against: Sequence[str], threads: int, rounds: int) -> Row:
    """One row. Raises BenchmarkError where the model or its inputs are not there, RuntimeError where ours fails or is wrong."""
    found: dict[str, float] = {}
    out: dict[str, str] = {}
    tolerance = zoo.WORKLOADS[name].tolerance
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        words = [sys.executable, "-m", MODULE, "--write", name, text]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it cannot be made"])[-1]
            raise BenchmarkError(f"{name}: {reason}")

        def check(contestant: str) -> str:
            if contestant != OURS or not against:
                return ""
            found.update(errors(folder / f"{OURS}.npz", folder / f"{PEER}.npz"))
            worst = max(found.values())
            return "" if worst <= tolerance else f"its result differs by {worst:.1e}, allowed is {tolerance:.0e}: {found}"

        order = {c: (c, name, text) for c in (*against, OURS)}  # the reference first
        environments = {OURS: {"TENSORWRIGHT_CACHE": str(folder / "cache")}}  # empty: compiling is cold
        with contestants(MODULE, order, threads, name, check=check, environments=environments, out=out) as running:
            if OURS not in running:
                raise RuntimeError(f"{name}: Tensorwright is out: {out[OURS]}")
            others = busy(lambda: take_turns(running, rounds), [c.process.pid for c in running.values()])
    facts = {c: p.facts for c, p in running.items()}
    return {
        **columns(name, threads, running, flops=0, nbytes=0),
        "max_rel_error": max(found.values(), default=None),
        "errors": found,
        "busy_elsewhere": others,
        "nodes": facts[OURS]["nodes"],
        "form": facts[OURS]["form"],
        "steps": facts[OURS]["steps"],
        "compile_seconds": {c: f["build"] + f["first_call"] for c, f in facts.items()},
        "out": out,
    }


def remark(row: Mapping[str, Any]) -> str:
    """Nodes of the file, programs they were compiled to, time to the first result."""
    staged = " in stages" if row["form"] == "StagedExecutable" else ""
    noisy = f"  {row['busy_elsewhere']:.2f} cores busy elsewhere" if row["busy_elsewhere"] > DISTURBED else ""
    times = ", ".join(f"{c} {t:.2f} s" for c, t in row["compile_seconds"].items())
    return f"{row['nodes']} nodes{staged}, {row['steps']} steps, to first result: {times}{noisy}"


def markdown(report: Mapping[str, Any]) -> str:
    """A table of the rows: ratio, times, error, seconds to the first result; where and when, and what failed."""
    host = report["machine"]
    versions = ", ".join(f"{k} {host['versions'][k]}" for k in (OURS, PEER, "numpy") if k in host["versions"])

    def ratio(r: Mapping[str, Any]) -> str:
        return f"**{r['ratio_to_best']:.2f}** ({r['ratio_undisturbed']:.2f})" if r["best_peer"] else "no peer"

    def milliseconds(name: str) -> Callable[[Row], str]:
        return lambda r: f"{r['ours_ms'] if name == OURS else r['peers_ms'][name]:.3f}" if name in (OURS, *r["peers_ms"]) else "–"

    def first(name: str) -> Callable[[Row], str]:
        return lambda r: f"{r['compile_seconds'][name]:.2f}" if name in r["compile_seconds"] else "–"

    columns = {
        "model": lambda r: r["name"],
        "nodes": lambda r: str(r["nodes"]) + (", in stages" if r["form"] == "StagedExecutable" else ""),
        "ratio": ratio,
        "ours ms": milliseconds(OURS),
        "ONNX Runtime ms": milliseconds(PEER),
        "difference": lambda r: "–" if r["max_rel_error"] is None else f"{r['max_rel_error']:.0e}",
        "first result s, ours": first(OURS),
        "ONNX Runtime s": first(PEER),
        "busy elsewhere": lambda r: f"{r['busy_elsewhere']:.2f}",
    }
    lines = [
        f"{host['cpu']} ({host['target']}), {host['threads']} of {host['cores']} cores, {host['date']}, Python {host['python']}; "
        f"{versions}.",
        "",
        "Milliseconds a call, median of interleaved rounds; the ratio is ONNX Runtime's by ours (of first deciles in brackets); "
        "cores that others used meanwhile; the difference is the largest of any output, by that output's largest value, over all "
        "steps.",
        "",
        *table(columns, report["rows"]),
    ]
    if report.get("geomean_ratio"):
        lines += ["", f"Geometric mean: **{report['geomean_ratio']:.2f}x** of ONNX Runtime."]
    failed = [f"- {name} failed ({why})." for name, why in report.get("failed", {}).items()]
    failed += [f"- {r['name']}: {p} is out: {why}." for r in report["rows"] for p, why in r["out"].items()]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def match(name: str) -> list[str]:
    """'light' stands for all of them, 'silero' for all its variants."""
    return [w for w in zoo.WORKLOADS if w == name or w.startswith(f"{name}_")]


def comparison() -> Comparison:
    """The benchmark; by default of the files that are there, the light models, and what PyTorch can export here."""
    here: list[str] = []
    gone: list[str] = []
    for name, w in zoo.WORKLOADS.items():
        reason = w.missing(zoo.data_folder())
        (gone if reason else here).append(name)
    if gone:
        print(f"{len(gone)} models are skipped ({', '.join(gone)}): fetch them with examples/fetch_onnx.py", file=sys.stderr)
    lacking = [n for n in zoo.EXPORTING if importlib.util.find_spec(n) is None]
    if lacking:
        here = [n for n in here if not n.startswith("built_")]
        print(f"what PyTorch exports is skipped: {', '.join(lacking)} not installed", file=sys.stderr)
    return Comparison("tensorwright bench onnx", __doc__, tuple(zoo.WORKLOADS), tuple(here), peers, measure, remark, match)


def _worker(words: list[str]) -> None:
    from tensorwright.benchmarks.serving import serve

    _, contestant, name, text, count = words
    folder, threads = Path(text), int(count)
    steps, carry = zoo.read(folder), zoo.WORKLOADS[name].carry
    facts: dict[str, Any] = {"steps": len(steps)}
    call: list[zoo.Call] = []

    def make() -> tuple[Any, dict[str, Any]]:
        start = time.perf_counter()
        built, about = (_ours if contestant == OURS else _onnxruntime)(folder / "model.onnx", threads)
        call.append(built)
        facts.update(about, build=time.perf_counter() - start)
        return functools.partial(built, steps[0]), facts

    def every_step(first: Any) -> list[Any]:
        found = zoo.over(call[0], steps, carry)
        return list(found.values())

    serve(make, str(folder / f"{contestant}.npz"), threads, every_step)


def _onnxruntime(path: Path, threads: int) -> tuple[zoo.Call, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda step: dict(zip(names, session.run(None, step), strict=True)), {}


def _ours(path: Path, threads: int) -> tuple[zoo.Call, dict[str, Any]]:
    import tensorwright as tw

    model = tw.onnx.Model(path)
    exe = tw.compile(model, threads=threads)

    def call(step: zoo.Step) -> dict[str, Any]:
        found = exe(*[step[i] for i in model.inputs])
        return dict(zip(model.outputs, found if isinstance(found, tuple) else (found,), strict=True))

    return call, {"nodes": len(model.description.graph.nodes), "form": type(exe).__name__}


def main(words: list[str]) -> None:
    """The command, the process of a contestant, or the one that writes a workload's files."""
    if words[:1] == ["--worker"]:
        _worker(words)
    elif words[:1] == ["--write"]:
        zoo.write(words[1], Path(words[2]))
    else:
        comparison().main(words)


if __name__ == "__main__":
    main(sys.argv[1:])
