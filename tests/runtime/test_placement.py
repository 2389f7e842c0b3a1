"""Workers are kept off the core of the thread that calls them. In child processes: which OpenMP runtime is loaded matters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads are placed on Linux, with two cores"
)

_HEAD = """
import ctypes, os, threading
import numpy as np
import tensorwright as tw
from tensorwright.runtime import openmp, placement

cores = os.sched_getaffinity(0)
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
tw.compile(lambda x: tw.tanh(x), tw.spec(1 << 20), threads=2)
fork = ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)(placement.fork())

def masks(threads=2):
    "Where the caller and its workers may run, during a region."
    found = {}
    meet = threading.Barrier(threads)

    def body(data):
        found[threading.get_native_id()] = os.sched_getaffinity(0)
        meet.wait(30)

    fork(BODY(body), None, threads, 0)
    own = found.pop(threading.get_native_id())
    return own, list(found.values())
"""


def run(code: str, head: str = "") -> str:
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", head + _HEAD + code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_workers_follow_where_the_caller_is_not() -> None:
    """The caller is moved from core to core, then set free; its own cores are never touched."""
    run("""
a, b = sorted(cores)[:2]
for core, other in ((a, b), (b, a), (a, b)):
    seen = []
    for _ in range(20):
        os.sched_setaffinity(0, {core})          # moves it there
        os.sched_setaffinity(0, {a, b})          # where it stays unless a busy machine pulls it away
        own, (worker,) = masks()
        assert own == {a, b}, own
        assert len(worker) == 1 and worker < {a, b}, worker
        seen.append(worker)
    assert {other} in seen, (core, seen)
os.sched_setaffinity(0, cores)
""")


def test_a_caller_bound_to_one_core_binds_its_workers_to_nothing_else() -> None:
    run("""
core = min(cores)
os.sched_setaffinity(0, {core})
assert masks() == ({core}, [{core}])
""")


def test_more_threads_than_cores_may_run_anywhere() -> None:
    run("""
own, workers = masks(len(cores) + 2)
assert own == cores and workers == [cores] * (len(cores) + 1), workers
own, workers = masks(2)
assert own == cores and len(workers[0]) == len(cores) - 1, workers
""")


def test_many_callers_at_once() -> None:
    run("""
failures = []
def call():
    try:
        for _ in range(20):
            own, workers = masks()
            assert own == cores and len(workers) == 1
    except BaseException as error:
        failures.append(error)
callers = [threading.Thread(target=call) for _ in range(24)]  # more than there are records
for t in callers: t.start()
for t in callers: t.join()
assert not failures, failures
""")


@pytest.mark.parametrize("setting", [None, "FALSE"])
def test_a_forked_child_has_workers_of_its_own(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where scikit-learn was imported first, which sets KMP_INIT_AT_FORK=FALSE for the whole process."""
    monkeypatch.delenv("KMP_INIT_AT_FORK", raising=False)
    if setting is not None:
        monkeypatch.setenv("KMP_INIT_AT_FORK", setting)
    run(f"""
assert os.environ.get("KMP_INIT_AT_FORK") == {setting!r}
before = masks()
child = os.fork()
if child == 0:
    os._exit(0 if masks()[0] == cores else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert masks()[0] == before[0]
""")


def test_the_threads_of_a_runtime_that_others_loaded_are_left_alone() -> None:
    run(
        "assert not openmp.runtime().ours and placement.fork() == openmp.runtime().fork\nassert masks() == (cores, [cores])\n",
        """
import ctypes
from importlib import metadata
ctypes.CDLL(next(str(f.locate()) for f in metadata.files('cmeel-libomp') if f.name == 'libomp.so'))
""",
    )
