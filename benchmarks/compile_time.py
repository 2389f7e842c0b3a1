"""Compile times: ours cold and from the cache, beside the peers', and against the number of nodes of a graph.

    tensorwright bench compile --models resnet50_b1,nodes --peers onnxruntime,torch_compile --json result.json

Every figure is of a new process; imports and building the model are not counted. Cold: our cache and torch.compile's are off.
Python's bytecode is there, as pip leaves it where it installs a package: of a checkout, a process before the first makes it.
'To first result' ends with the first call, for every contestant; 'session' is ONNX Runtime's alone, before its first call.
Medians of three processes, of one where a contestant takes longer than ten seconds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorwright.benchmarks import models
from tensorwright.benchmarks.comparison import BenchmarkError, machine
from tensorwright.benchmarks.contest import Contestant
from tensorwright.benchmarks.inference import match
from tensorwright.benchmarks.peers import COMPILE_ONLY, OURS, PEERS, Peer
from tensorwright.benchmarks.prepare import prepare
from tensorwright.benchmarks.report import table
from tensorwright.ir.errors import InputError

NODES = (100, 1_000, 10_000)
WIDTHS = (16, 24, 32, 48)
AGAINST = ("onnxruntime", "torch_compile", "iree", "jax", "openvino")
LONG = 10.0  # seconds, of which one measurement must do
LIMIT = 300.0
Row = dict[str, Any]


def entrants() -> dict[str, Peer]:
    """Who compiles, by name."""
    return {name: {**PEERS, **COMPILE_ONLY}[name] for name in AGAINST}


def seconds(contestant: str, name: str, folder: str, threads: int, times: int, cache: str = "off") -> list[float] | str:
    """Medians of [to make it, to the first result] over new processes, or why there are none."""
    peer = {**PEERS, **COMPILE_ONLY}[contestant]
    environment = {**peer.environment(threads), "TENSORWRIGHT_CACHE": cache}
    if contestant == OURS:
        environment |= {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    found: list[tuple[float, float]] = []
    for _ in range(times):
        c = Contestant("tensorwright.benchmarks.worker", (contestant, name, folder, "f32"), threads, environment)
        try:
            c.start(LIMIT)
        finally:
            c.stop()
        if c.error:
            return c.error
        found.append((c.facts["build"], c.facts["build"] + c.facts["first_call"]))
        if found[-1][1] > LONG:
            break
    return [statistics.median(f[k] for f in found) for k in (0, 1)]


def measure(name: str, peers: Sequence[str], threads: int, times: int) -> Row:
    """Compile times of one workload. Raises BenchmarkError if Tensorwright fails."""
    row: Row = {"name": name, "peers": {}, "out": {}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(name, Path(folder))
        cache = f"{folder}/cache"
        seconds(OURS, name, folder, threads, 1)  # bytecode
        cold = seconds(OURS, name, folder, threads, times)
        seconds(OURS, name, folder, threads, 2, cache)  # fills the cache: prepared weights are kept from the second start on
        warm = seconds(OURS, name, folder, threads, times, cache)
        if isinstance(cold, str) or isinstance(warm, str):
            raise BenchmarkError(f"{name}: {cold if isinstance(cold, str) else warm}")
        row |= {"cold": cold[1], "warm": warm[1]}
        for peer in peers:
            found = seconds(peer, name, folder, threads, times)
            if isinstance(found, str):
                row["out"][peer] = found
                print(f"  {name}: {peer} is out: {found}", file=sys.stderr)
            else:
                row["peers"][peer] = {"session": found[0], "to_first_result": found[1]}
    return row


# ---------------------------------------------------------------------------------------------------- numbers of nodes


def chain(nodes: int) -> Any:
    """A module whose graph has about `nodes` nodes: residual layers of alternating widths with an activation each."""
    import tensorwright as tw
    from tensorwright import nn

    activations: Sequence[Callable[[Any], Any]] = (tw.relu, tw.tanh, tw.sigmoid)

    class Chain(nn.Module):
        def __init__(self, blocks: int) -> None:
            widths = [WIDTHS[0], *(WIDTHS[(k * 7) % len(WIDTHS)] for k in range(blocks))]
            self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

        def __call__(self, x: Any) -> Any:
            for k, layer in enumerate(self.layers):
                y = activations[k % len(activations)](layer(x))
                x = y * 0.5 + (x if x.shape == y.shape else y * y)
            return x

    blocks, spec = max(1, nodes // 16), tw.spec(8, WIDTHS[0])
    count = len(list(tw.trace(Chain(blocks), spec).nodes()))
    return Chain(max(1, round(blocks * nodes / count))), spec


def compile_chain(nodes: int) -> Row:
    """The time to compile a graph of about so many nodes, in this process."""
    import tensorwright as tw

    tw.compile(chain(20)[0], tw.spec(8, WIDTHS[0]), cache=False)  # imports
    module, spec = chain(nodes)
    graph = tw.trace(module, spec)
    start = time.perf_counter()
    exe = tw.compile(module, spec, cache=False)
    found = time.perf_counter() - start
    return {"nodes": len(list(graph.nodes())), "seconds": found, "kernels": len(exe.compiled.run.kernels)}


def by_nodes(sizes: Sequence[int] = NODES) -> list[Row]:
    """One row per size, each compiled in a process of its own."""
    rows = []
    for n in sizes:
        words = [sys.executable, "-m", "tensorwright.benchmarks.compile_time", "--nodes", str(n)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"a graph of {n} nodes: {done.stderr[-300:]}")
        rows.append(json.loads(done.stdout))
        r = rows[-1]
        each = r["seconds"] / r["nodes"] * 1e3
        print(f"{r['nodes']:>7} nodes  {r['seconds']:.2f} s  {each:.3f} ms a node  {r['kernels']} kernels", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------- the command


def line(r: Row) -> str:
    """A row as text."""
    session = r["peers"].get("onnxruntime", {}).get("session")
    times = f"  warm {r['warm'] / session:.1f}x of ONNX Runtime's session ({session:.3f} s)" if session else ""
    others = "  ".join(f"{p} {t['to_first_result']:.2f}" for p, t in r["peers"].items())
    return f"{r['name']:<20} cold {r['cold']:.2f} s  warm {r['warm']:.3f} s  {others}{times}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    names = list(dict.fromkeys(p for r in report["rows"] for p in r["peers"]))

    def peer(name: str, what: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda r: f"{r['peers'][name][what]:.3f}" if name in r["peers"] else "–"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "workload": lambda r: r["name"],
        "ours, cold": lambda r: f"{r['cold']:.3f}",
        "ours, warm": lambda r: f"{r['warm']:.3f}",
        "ONNX Runtime's session": peer("onnxruntime", "session"),
        **{p: peer(p, "to_first_result") for p in names},
    }
    host = report["machine"]
    lines = [
        f"Seconds to the first result; {host['cpu']}, {host['threads']} threads, {host['date']}.",
        "",
        *table(columns, report["rows"]),
    ]
    if report["nodes"]:
        lines += ["", "| nodes | seconds | ms a node |", "|---|---|---|"]
        lines += [f"| {r['nodes']} | {r['seconds']:.2f} | {r['seconds'] / r['nodes'] * 1e3:.3f} |" for r in report["nodes"]]
    lines += ["", *(f"- {p} was skipped: {why}." for p, why in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def run(names: str | None, peers: str | None, threads: int | None, quick: bool = False, target: str | None = None) -> Row:
    """The report. 'nodes' among the names stands for the graphs of many sizes; by default everything is measured.

    Raises InputError for an unknown workload or peer, BenchmarkError if Tensorwright fails.
    """
    from tensorwright.runtime.threads import available

    asked = [n for n in names.split(",") if n] if names else [*models.INFERENCE, "nodes"]
    chosen = list(dict.fromkeys(w for n in asked if n != "nodes" for w in match(n) or [n]))
    known = {p: e.missing() for p, e in entrants().items()}
    wanted = [p for p in peers.split(",") if p] if peers is not None else list(known)
    for what, unknown in (
        ("workload", [w for w in chosen if w not in models.INFERENCE]),
        ("peer", [p for p in wanted if p not in known]),
    ):
        if unknown:
            raise InputError(f"unknown {what} {unknown[0]!r}; expected some of {', '.join((*models.INFERENCE, 'nodes', *known))}")
    skipped = {p: known[p] for p in wanted if known[p]}
    for p, why in skipped.items():
        print(f"{p} is skipped: {why}", file=sys.stderr)
    count = threads or available()
    report: Row = {"machine": machine(count), "skipped": skipped, "rows": [], "nodes": []}
    try:
        for name in chosen:
            report["rows"].append(measure(name, [p for p in wanted if not known[p]], count, 1 if quick else 3))
            print(line(report["rows"][-1]), flush=True)
        if "nodes" in asked:
            report["nodes"] = by_nodes(NODES[:2] if quick else NODES)
    except KeyboardInterrupt:
        report["interrupted"] = True
        print(f"interrupted: {len(report['rows'])} of {len(chosen)} rows are there", file=sys.stderr)
    if target:
        Path(target).write_text(markdown(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nodes"]:
        print(json.dumps(compile_chain(int(sys.argv[2]))))
    else:
        run(",".join(sys.argv[1:]) or None, None, None)
