"""Contestants in processes of their own that are measured in turn: what the comparisons with peers share.

A worker makes a callable, saves its result and then answers every line of seconds that it reads with the milliseconds of
the calls that it made in that time. The parent lets the workers run one after the other, round by round, so that a busy
moment of the machine meets all of them.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from tensorwright.benchmarks.harness import quiet

ROUND_SECONDS = 0.25  # of calls per contestant and round
KEPT = 2000  # the most times that one answer holds


def serve(make: Callable[[], tuple[Callable[[], Any], dict[str, Any]]], result: str, threads: int) -> None:
    """A worker's whole life. `make` gives the call and what there is to say about it; its first result is saved to `result`.

    The result is an array or a dict of arrays (a path ending in .npz). What libraries print goes to standard error. All
    contestants ask for the same priority and the same cores.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    quiet()
    start = time.perf_counter()
    try:
        run, facts = make()
        first = run()
    except Exception as error:  # a peer's own failure, of whatever type: reported, and it is out
        print(json.dumps({"error": f"{type(error).__name__}: {str(error)[:300]}"}), file=answers, flush=True)
        return
    facts = {"ready": time.perf_counter() - start, **facts}
    if isinstance(first, dict):
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in first.items()}
        np.savez(result, **arrays)
    else:
        np.save(result, np.asarray(first))
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        seconds = float(line)
        run()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
        print(json.dumps(times[-KEPT:]), file=answers, flush=True)


class Contestant:
    """A worker's process. `facts` is what it said when it was ready, `error` why it is out, `times` all milliseconds."""

    def __init__(self, module: str, arguments: Sequence[str], threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *arguments, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **dict.fromkeys(names, str(threads))},
        )
        self.times: list[float] = []
        self.rounds: list[float] = []
        self.facts: dict[str, Any] = {}
        self.error = ""

    def start(self) -> None:
        """Waits until it is ready, or out."""
        self.facts = self._read()
        self.error = self.facts.get("error", "")

    def round(self, seconds: float) -> None:
        """Lets it run for some seconds. Raises RuntimeError if its process has ended."""
        stdin: IO[str] = self.process.stdin  # type: ignore[assignment]
        stdin.write(f"{seconds}\n")
        stdin.flush()
        answer = self._read()
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        self.times += answer
        self.rounds.append(statistics.median(answer))

    @property
    def median(self) -> float:
        """The middle of the medians of its rounds, in milliseconds: a slow stretch of the machine counts as one round."""
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def spread(self) -> list[float]:
        """The first and the last decile of all its calls, in milliseconds."""
        return [float(np.quantile(self.times, q)) for q in (0.1, 0.9)]

    def _read(self) -> Any:
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        return {"error": f"its process ended: {self.log.read()[-300:]}"}

    def stop(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


@contextmanager
def contestants(module: str, arguments: Mapping[str, Sequence[str]], threads: int, label: str) -> Iterator[dict[str, Contestant]]:
    """Started contestants by name; those that fail are reported on standard error and left out."""
    running: dict[str, Contestant] = {}
    try:
        for name, words in arguments.items():
            c = running[name] = Contestant(module, words, threads)
            c.start()  # one after the other: compiling must not disturb the others
            if c.error:
                print(f"  {label}: {name} is out: {c.error}", file=sys.stderr)
                running.pop(name).stop()
        yield running
    finally:
        for c in running.values():
            c.stop()


def take_turns(running: Mapping[str, Contestant], rounds: int, seconds: float = ROUND_SECONDS) -> None:
    """Measures all of them, in turn; every other round in the opposite order."""
    for k in range(rounds):
        order = list(running.values())
        for c in order if k % 2 == 0 else reversed(order):
            c.round(seconds)


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
