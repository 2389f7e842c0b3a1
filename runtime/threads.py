"""How many threads a program may use, and the Context that tells its native code so.

The number is the smallest of what the caller asked for (or TENSORWRIGHT_THREADS, or OMP_NUM_THREADS) and what the
process may use: its affinity mask and its cgroup's CPU quota. Asking for more than that is allowed and oversubscribes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from pathlib import Path

from ..ir.errors import InputError
from . import openmp, placement


def affinity() -> int:
    """Cores this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs that the cgroup's bandwidth limit allows (1.5 is one and a half), None where there is no limit.

    Reads cgroup v2 (`cpu.max` of every group from ours up to the root: the tightest counts) and v1 (`cpu.cfs_quota_us`).
    """
    limits: list[float] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            bases = [root / "cpu", root / controllers]
        else:
            continue
        group = Path(path.lstrip("/"))
        for base in bases:
            for folder in [group, *group.parents]:
                limits += _limit(base / folder)
    return min(limits, default=None)


def _limit(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return [int(allowed) / int(period)] if allowed not in ("max", "-1") else []
    except (OSError, ValueError, ZeroDivisionError):
        return []  # no such controller here, or a kernel that words it differently: no limit is known


def available() -> int:
    """Threads that can run at once: affinity, and the quota rounded up; at least 1."""
    limit = quota()
    return max(1, affinity() if limit is None else min(affinity(), math.ceil(limit)))


def resolve(asked: int | None) -> int:
    """The thread count for an explicit cap (None: OMP_NUM_THREADS if set, else all that are available).

    Raises InputError for what is no integer of at least 1.
    """
    if asked is not None:
        if type(asked) is not int or asked < 1:
            raise InputError(f"threads: expected an integer of at least 1, got {asked!r}")
        return asked
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text.isdigit() and int(text) > 0:
        return min(int(text), available())
    return available()


class Context(ctypes.Structure):
    """The native Context of `ir.program`: shared by every call with the same thread count, and only read by it."""

    _fields_ = (
        ("threads", ctypes.c_int64),
        ("ticks", ctypes.c_void_p),
        ("fork", ctypes.c_void_p),
        ("clock", ctypes.c_void_p),
    )


@functools.cache
def clock() -> int:
    """The address of clock_gettime, which a run that writes timestamps calls."""
    return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0


_contexts: dict[int, Context] = {}
_to_tame: list[int] = []  # contexts that a forked child must not open parallel regions with
_lock = threading.Lock()


def context(threads: int) -> Context:
    """The Context for `threads` threads. Raises RuntimeUnavailableError if more than one is asked and there is no OpenMP."""
    with _lock:
        found = _contexts.get(threads)
        if found is None:
            fork = 0
            if threads > 1:
                fork = placement.fork()
                if not openmp.runtime().survives_fork:
                    _to_tame.append(threads)
            found = _contexts[threads] = Context(threads, None, fork, None)
        return found


def _after_fork() -> None:
    # libgomp hangs in a forked child: its pool is gone but it does not know. One thread gives the same bits. No lock is
    # taken here: the thread that held it may not exist in the child.
    for threads in _to_tame:
        _contexts[threads].threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
