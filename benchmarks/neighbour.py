"""A good neighbour: what one busy process on one of the cores does to a model, and what an idle executable uses.

    python -m tensorwright.benchmarks.neighbour --models resnet50_b1,lenet_b64 --json result.json

Each contestant is measured in rounds with and without a process that spins on one core, at the same priority. The slowdown is
the ratio of the medians; two cores of which one is half ours would allow 4/3. Idle: a process makes some calls, waits ten
milliseconds, and counts the CPU time of all its threads over the next half second; a call later, it does so again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorwright.benchmarks.comparison import BenchmarkError, machine
from tensorwright.benchmarks.contest import busy, contestants
from tensorwright.benchmarks.inference import DISTURBED, TOLERANCE, known_peers, verdict
from tensorwright.benchmarks.peers import OURS, PEERS
from tensorwright.benchmarks.prepare import prepare
from tensorwright.runtime.threads import available

DEFAULT = ("resnet50_b1", "lenet_b64")
AGAINST = ("torch", "onnxruntime", "openvino", "jax")
SPIN = """
import os
os.sched_setaffinity(0, {CORE})
from tensorwright.benchmarks.priority import quiet
quiet()
print(flush=True)
while True: pass
"""
GRACE, WATCHED = 0.01, 0.5  # seconds after the last call, and of looking


@contextmanager
def busy_core() -> Iterator[None]:
    """One process that spins on the last core this one may use, as long as the context lasts."""
    core = max(os.sched_getaffinity(0))
    # a session of its own, as contestants have: priorities count within a session's group only, and its group gets theirs
    words = [sys.executable, "-c", SPIN.replace("CORE", str(core))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def slowdown(name: str, peers: Sequence[str], threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians alone and beside a busy process, of everyone, in turn. Raises BenchmarkError if Tensorwright is out."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        prepare(name, folder)

        def check(contestant: str) -> str:
            return verdict(folder / f"{contestant}.npz", folder / "reference.npz", TOLERANCE["f32"])[1]

        chosen = (OURS, *(p for p in peers if not PEERS[p].takes(name)))
        words = {c: (c, name, text, "f32") for c in chosen}
        environments = {c: PEERS[c].environment(threads) for c in chosen}
        module = "tensorwright.benchmarks.worker"
        with contestants(module, words, threads, name, check=check, environments=environments) as running:
            if OURS not in running:
                raise BenchmarkError(f"{name}: Tensorwright itself is out")
            alone: dict[str, list[float]] = {c: [] for c in running}
            beside: dict[str, list[float]] = {c: [] for c in running}
            others, pids = [], [p.process.pid for p in running.values()]
            for _ in range(rounds):
                for c, process in running.items():
                    others.append(busy(lambda c=process: c.round(seconds), pids))  # type: ignore[misc]
                    alone[c].append(process.rounds[-1])
                    with busy_core():
                        process.round(seconds)
                    beside[c].append(process.rounds[-1])
    ms = {c: (statistics.median(alone[c]), statistics.median(beside[c])) for c in alone}
    return {
        "name": name,
        "threads": threads,
        "busy_elsewhere": statistics.median(others),
        "alone_ms": {c: m[0] for c, m in ms.items()},
        "beside_ms": {c: m[1] for c, m in ms.items()},
        "slowdown": {c: m[1] / m[0] for c, m in ms.items()},
    }


def idle(name: str, threads: int) -> dict[str, Any]:
    """CPU seconds per second that an executable uses from ten milliseconds after its last call on, in a process of its own."""
    words = [sys.executable, "-m", "tensorwright.benchmarks.neighbour", "--idle", name, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{name}: {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _idle_here(name: str, threads: int) -> dict[str, Any]:
    import tensorwright as tw
    from tensorwright.benchmarks import models

    workload = models.INFERENCE[name]
    exe, inputs = tw.compile(workload.make(), *workload.arguments, threads=threads), workload.inputs()
    shares = []
    for _ in range(3):
        for _ in range(20):
            exe(*inputs)
        time.sleep(GRACE)
        before, start = time.process_time(), time.perf_counter()  # process time: that of all threads
        time.sleep(WATCHED)
        shares.append((time.process_time() - before) / (time.perf_counter() - start))
    return {"name": name, "threads": threads, "idle_cpu": max(shares), "idle_cpu_each": shares}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--idle"]:
        print(json.dumps(_idle_here(words[1], int(words[2]))))
        return
    parser = argparse.ArgumentParser(prog="python -m tensorwright.benchmarks.neighbour", description=__doc__)
    parser.add_argument("--models", default=",".join(DEFAULT))
    parser.add_argument("--peers", default=",".join(AGAINST))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(words)
    count, known = args.threads or available(), known_peers()
    peers = []
    for p in args.peers.split(","):
        if known.get(p, "unknown"):
            print(f"{p} is skipped: {known.get(p, 'no such peer')}", file=sys.stderr)
        else:
            peers.append(p)
    rows = []
    for name in args.models.split(","):
        row = slowdown(name, peers, count, args.rounds, args.seconds) | idle(name, count)
        rows.append(row)
        slower = "  ".join(f"{c} {s:.2f}x" for c, s in row["slowdown"].items())
        print(f"{name:<14} beside a busy process: {slower}   idle after 10 ms: {row['idle_cpu']:.1%} of a core", flush=True)
        if row["busy_elsewhere"] > DISTURBED:
            print(f"  {row['busy_elsewhere']:.2f} cores were busy with something else when it should have been alone", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(count), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
