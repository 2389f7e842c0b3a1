"""The real pycuda on a mock libcuda.so.1 whose device is the PTX emulator: the whole host path, errors included.

pycuda exists as source only and needs CUDA's headers to build, so it is not among the packages that tests install. Where it has
been built (`python -m tests.cuda.mock.build FOLDER`, a job of its own), PYCUDA_MOCK names the folder; elsewhere the test
skips and says so. What can be tested without pycuda is in test_cuda_device.py and below.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    "doctor", "load, copies and launches", "graph replay", "streams in a graph", "copies beside launches", "training",
    "arrays of other libraries", "an exported folder", "wrong arguments", "memory and modules",
    "a failed kernel and a lost context",
]  # fmt: skip


def host_path(base: Path, *arguments: str) -> None:
    path = os.pathsep.join([str(ROOT), str(base / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(base), "TENSORWRIGHT_VALIDATE": "0"}
    script = [sys.executable, str(Path(__file__).parent / "mock" / "host_path.py"), str(base / "libcuda.so.1"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.removeprefix("ok ") for line in done.stdout.splitlines() if line.startswith("ok ")] == PARTS


def test_the_whole_host_path_through_pycuda() -> None:
    folder = os.environ.get("PYCUDA_MOCK")
    if not folder:
        pytest.skip("pycuda is not built here: python -m tests.cuda.mock.build FOLDER, then PYCUDA_MOCK=FOLDER")
    host_path(Path(folder))


def test_the_whole_host_path_without_pycuda(mock_driver: Path) -> None:
    """The same with a few lines of ctypes in pycuda's place (mock/minicuda.py): our side of it, everywhere."""
    host_path(mock_driver.parent, "mini")


def test_the_mock_driver_builds_and_answers(mock_driver: Path) -> None:
    """Without a device behind it, it says what a driver without a GPU says."""
    library = ctypes.CDLL(str(mock_driver))
    assert library.cuInit(0) == 100
    count = ctypes.c_int(-1)
    assert library.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == 0
    assert library.cuMemAllocManaged() == 801
