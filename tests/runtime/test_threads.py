from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorwright.ir.errors import InputError, RuntimeUnavailableError
from tensorwright.runtime import openmp, threads
from tensorwright.runtime.native import NativeProgram

# a region whose body adds 1 to a counter: what the counter holds afterwards is how many threads ran it
REGION = """
target triple = "x86_64-unknown-linux-gnu"
define internal void @body(ptr %data) {
  %old = atomicrmw add ptr %data, i64 1 seq_cst
  ret void
}
define i32 @main_run(ptr %b, ptr %d, ptr %ctx) {
  %counter = load ptr, ptr %b
  %threads = load i64, ptr %ctx
  %n = trunc i64 %threads to i32
  %fp = getelementptr i64, ptr %ctx, i64 2
  %fork = load ptr, ptr %fp
  call void %fork(ptr @body, ptr %counter, i32 %n, i32 0)
  ret i32 0
}
"""


def count_threads(program: NativeProgram, asked: int) -> int:
    counter = np.zeros(1, np.int64)
    table = (ctypes.c_void_p * 1)(counter.ctypes.data)
    program.run(ctypes.addressof(table), None, ctypes.addressof(threads.context(asked)))
    return int(counter[0])


def test_a_region_runs_once_on_each_thread(assemble):
    program = NativeProgram(assemble(REGION), "main_run")
    assert [count_threads(program, n) for n in (2, 3)] == [2, 3]


def test_an_idle_process_uses_no_cpu_soon_after_a_region(assemble):
    if not openmp.runtime().ours:
        pytest.skip("another library's OpenMP runtime is loaded in this process: its spinning is its owner's setting")
    program = NativeProgram(assemble(REGION), "main_run")
    count_threads(program, 2)
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.15)
    assert time.process_time() - before < 0.05


def test_a_runtime_that_is_loaded_already_is_used():
    code = (
        "import ctypes, glob, os\n"
        "from importlib import metadata\n"
        "path = next(str(f.locate()) for f in metadata.files('cmeel-libomp') if f.name == 'libomp.so')\n"
        "ctypes.CDLL(path)\n"
        "from tensorwright.runtime import openmp\n"
        "found = openmp.runtime()\n"
        "print(found.ours, found.path == os.path.realpath(path), len(openmp.loaded()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True", "1"]


def test_a_child_of_fork_still_computes(assemble):
    program = NativeProgram(assemble(REGION), "main_run")
    count_threads(program, 2)
    child = os.fork()
    if child == 0:
        os._exit(0 if 1 <= count_threads(program, 2) <= 2 else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child of a fork hangs in a parallel region")


def test_a_child_of_fork_stays_on_one_thread_where_the_runtime_is_libgomp():
    code = (
        "import ctypes, os, sys\n"
        "try:\n    ctypes.CDLL(sys.argv[1])\nexcept OSError:\n    sys.exit('no libgomp')\n"
        "from tensorwright.runtime import openmp, threads\n"
        "assert 'libgomp' in openmp.runtime().path and not openmp.runtime().survives_fork\n"
        "c = threads.context(2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(c.threads)\n"
        "print(c.threads, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    libgomp = [str(p) for base in sys.path for p in Path(base).glob("*/libgomp-*.so*")] or ["libgomp.so.1"]
    done = subprocess.run([sys.executable, "-c", code, libgomp[0]], capture_output=True, text=True, check=False, timeout=60)
    if "no libgomp" in done.stderr:
        pytest.skip("there is no libgomp on this machine to test with")
    assert done.stdout.split() == ["2", "1"]


def test_no_runtime_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(openmp, "loaded", list)
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    monkeypatch.setattr(openmp, "_usual", lambda suffix: tmp_path)
    with pytest.raises(RuntimeUnavailableError, match="pip install cmeel-libomp"):
        openmp._find.__wrapped__()


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "400000 100000", "a/cpu.max": "max 100000", "a/b/cpu.max": "200000 100000"}, "0::/a/b", 2.0),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, "0::/a/b", 0.5),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n0::/", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None),
        ({"cpu.max": "nonsense"}, "0::/", None),
        ({}, "0::/gone", None),
    ],
)
def test_the_quota_of_the_cgroup(tmp_path: Path, files, membership, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert threads.quota(tmp_path, tmp_path / "membership") == expected


def test_the_number_of_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.resolve(None) == threads.available() >= 1
    assert threads.resolve(7) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.resolve(None) == 1 and threads.resolve(2) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads.resolve(None) == threads.available()
    with pytest.raises(InputError, match="at least 1, got 0"):
        threads.resolve(0)
