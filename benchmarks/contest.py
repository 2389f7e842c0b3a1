"""Contestants in processes of their own that are measured in turn: what the comparisons with peers share.

A worker (`serving.py`) makes a callable, saves its result and then answers every line of seconds that it reads with the
milliseconds of the calls that it made in that time, and the line `end` with what it used. The parent lets the workers run one
after the other, round by round, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

ROUND_SECONDS = 0.25  # of calls per contestant and round
SLOW = 5.0  # times the fastest: who takes longer leaves after two rounds
START_SECONDS = 180.0  # to be ready, and to answer

Check = Callable[[str], str]


def ticks(process: int) -> int:
    """Processor time of all threads of a process, in the kernel's ticks (of 10 ms, mostly); 0 where there is no /proc."""
    stat = Path(f"/proc/{process}/stat")
    return sum(map(int, stat.read_text(encoding="utf-8").rpartition(")")[2].split()[11:13])) if stat.exists() else 0


def busy(work: Callable[[], object], processes: Sequence[int]) -> float:
    """Cores that everyone but these processes and this one used while `work` ran, on average; 0 where there is no /proc/stat."""
    if not Path("/proc/stat").exists():
        work()
        return 0.0

    def used() -> tuple[float, float]:
        fields = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
        total = sum(int(fields[k]) for k in (0, 1, 2, 5, 6, 7))
        return (total - sum(map(ticks, ids))) / os.sysconf("SC_CLK_TCK"), time.perf_counter()

    ids = [os.getpid(), *processes]
    before, start = used()
    work()
    after, end = used()
    return max(0.0, (after - before) / (end - start))


class Contestant:
    """A worker's process. `facts` is what it said when it was ready, `error` why it is out, `times` all milliseconds."""

    def __init__(self, module: str, arguments: Sequence[str], threads: int, environment: Mapping[str, str] | None = None) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS")
        kept = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *arguments, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,  # its priority is its own (`priority`)
            env={**kept, **dict.fromkeys(names, str(threads)), **(environment or {})},
        )
        self.times: list[float] = []
        self.rounds: list[float] = []
        self.facts: dict[str, Any] = {}
        self.error = ""

    def start(self, limit: float = START_SECONDS) -> None:
        """Waits until it is ready, or out: also when that takes more than `limit` seconds."""
        self.facts = self._read(limit)
        self.error = self.facts.get("error", "")

    def round(self, seconds: float) -> None:
        """Lets it run for some seconds. Raises RuntimeError if its process has ended."""
        answer = self._ask(str(seconds))
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        self.times += answer
        self.rounds.append(statistics.median(answer))

    def finish(self) -> None:
        """Adds to the facts what it used."""
        self.facts |= self._ask("end")

    @property
    def median(self) -> float:
        """The middle of the medians of its rounds, in milliseconds: a slow stretch of the machine counts as one round."""
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def spread(self) -> list[float]:
        """The first and the last decile of all its calls, in milliseconds."""
        return [float(np.quantile(self.times, q)) for q in (0.1, 0.9)]

    def _ask(self, line: str) -> Any:
        stdin: IO[str] = self.process.stdin  # type: ignore[assignment]
        try:
            stdin.write(f"{line}\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # its process has ended: reading says so, and why
        return self._read(START_SECONDS)

    def _read(self, limit: float) -> Any:
        """The next line. Each question has one line for an answer, so that nothing waits in the buffer."""
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        if not select.select([stdout], [], [], limit)[0]:
            self.process.kill()
            return {"error": f"it took more than {limit:.0f} s"}
        line = stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        return {"error": f"its process ended: {self.log.read()[-300:].strip()}"}

    def rest(self, limit: float = 0.5) -> None:
        """Waits until its threads sleep: some runtimes' workers spin for 200 ms after a call, on a core that the next needs."""
        end = time.perf_counter() + limit
        before = ticks(self.process.pid)
        while time.perf_counter() < end:
            time.sleep(0.03)  # three ticks
            now = ticks(self.process.pid)
            if now == before:
                return
            before = now

    def stop(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # it may have ended already
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
def contestants(
    module: str,
    arguments: Mapping[str, Sequence[str]],
    threads: int,
    label: str,
    *,
    check: Check | None = None,
    environments: Mapping[str, Mapping[str, str]] | None = None,
    out: MutableMapping[str, str] | None = None,
) -> Iterator[dict[str, Contestant]]:
    """Started contestants by name. Those that fail, and those in whose result `check(name)` finds a fault (in words), are
    reported on standard error and in `out`, and left out before anything is timed."""
    running: dict[str, Contestant] = {}
    try:
        for name, words in arguments.items():
            c = running[name] = Contestant(module, words, threads, (environments or {}).get(name))
            c.start()  # one after the other: compiling must not disturb the others
            if reason := c.error or (check(name) if check else ""):
                print(f"  {label}: {name} is out: {reason}", file=sys.stderr)
                if out is not None:
                    out[name] = reason
                running.pop(name).stop()
        yield running
    finally:
        for c in running.values():
            c.stop()


def take_turns(running: Mapping[str, Contestant], rounds: int, seconds: float = ROUND_SECONDS) -> None:
    """Measures all of them, in turn; every other round in the opposite order.

    Who is much slower than the fastest peer leaves after two rounds: it cannot become the best one.
    """
    for k in range(rounds):
        order = list(running.values())
        if k > 1:
            fastest = min(c.median for c in order)
            order = [c for c in order if c is running.get("tensorwright") or c.median <= SLOW * fastest]
        for c in order if k % 2 == 0 else reversed(order):
            c.round(seconds)
            c.rest()
    for c in running.values():
        c.finish()


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
