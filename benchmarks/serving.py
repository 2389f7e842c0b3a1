"""The worker's half of a contest: it makes a callable, saves its result, and answers what it is asked.

Nothing of the compiler is imported here: what a peer's process holds and imports is the peer's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorwright.benchmarks.priority import quiet

WARM_SECONDS = 0.05  # of calls before those that count: caches fill, and the threads of the one before go to sleep
KEPT = 2000  # the most times that one answer holds


def memory(field: str) -> int:
    """Bytes by /proc/self/status: VmHWM is the peak of this process, VmRSS what it holds now. 0 where there is no such file.

    `getrusage` would do for neither: its peak is inherited from the process that started this one.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:")), 0)


def serve(
    make: Callable[[], tuple[Callable[[], Any], dict[str, Any]]],
    result: str,
    threads: int,
    arrays: Callable[[Any], Sequence[Any]] | None = None,
) -> None:
    """A worker's whole life. `make` gives the call and what there is to say about it; its first result is saved to `result`.

    The result is an array, a dict of arrays (a path ending in .npz), or what `arrays` turns into a sequence of arrays, saved as
    out0, out1 ... What libraries print goes to standard error. All contestants ask for the same priority and the same cores.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    quiet()
    start = time.perf_counter()
    try:
        run, facts = make()
        begin = time.perf_counter()
        first = run()
        facts["first_call"] = time.perf_counter() - begin
        if arrays is not None:
            first = {f"out{i}": a for i, a in enumerate(arrays(first))}
    except Exception as error:  # a peer's own failure, of whatever type: reported, and it is out
        print(json.dumps({"error": f"{type(error).__name__}: {str(error)[:300]}"}), file=answers, flush=True)
        return
    facts = {"ready": time.perf_counter() - start, **facts}
    if isinstance(first, dict):
        named: dict[str, Any] = {k: np.asarray(v) for k, v in first.items()}
        np.savez(result, **named)
    else:
        np.save(result, np.asarray(first))
    del first
    print(json.dumps(facts), file=answers, flush=True)
    slow = facts["first_call"] > 1.0 and _seconds(run) > 1.0
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"peak_rss": memory("VmHWM")}), file=answers, flush=True)
            continue
        print(json.dumps(_timed(run, float(line), slow)[-KEPT:]), file=answers, flush=True)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _timed(run: Callable[[], Any], seconds: float, slow: bool) -> list[float]:
    """Milliseconds of calls; at least three, of a slow one at least one."""
    begin = time.perf_counter()
    while not slow:
        run()
        if time.perf_counter() - begin > WARM_SECONDS:
            break
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < (1 if slow else 3):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return times
