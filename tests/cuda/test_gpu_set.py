"""The tests for a real GPU, where there is none: why they skip, and that they run on the mock driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorwright as tw
from tensorwright import cli
from tensorwright.ir.errors import RuntimeUnavailableError
from tensorwright.runtime.cuda import devices, tools

from ..gpu.conftest import reason

ROOT = Path(__file__).resolve().parents[2]
REASONS = {devices.NO_PYCUDA, devices.NO_DRIVER, devices.NO_DEVICE}


def run(*command: str, **more: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | more
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False
    )
    return done.stdout + done.stderr


def test_there_are_three_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacking in REASONS:
        monkeypatch.setattr(devices, "missing", lambda lacking=lacking: [lacking, devices.NO_DEVICE])
        assert reason() == lacking
    monkeypatch.setattr(devices, "missing", list)
    assert reason() is None
    assert {"pycuda not installed", "no NVIDIA driver (libcuda.so.1)", "no CUDA device"} == REASONS


@pytest.mark.parametrize("lacking", sorted(REASONS))
def test_compiling_for_cuda_and_doctor_say_which_is_missing(
    lacking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "missing", lambda: [lacking])
    with pytest.raises(RuntimeUnavailableError) as caught:
        tw.compile(tw.relu, tw.spec(3), target="cuda")
    advice = {devices.NO_PYCUDA: "pip install", devices.NO_DRIVER: "install NVIDIA's driver", devices.NO_DEVICE: "nvidia-smi"}[
        lacking
    ]
    for words in (lacking, advice, "target='cuda-emulator' runs the same kernels without a GPU"):
        assert words in str(caught.value)
    assert cli.main(["doctor", "--no-peaks"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("target='cuda' "))
    assert lacking in line
    assert advice in line


def test_doctor_names_nvidias_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.report()["ptxas"].endswith("ptxas")  # of the wheel among the packages that tests install
    monkeypatch.setattr(tools, "find", lambda name: None)
    assert (
        devices.report()["ptxas"] == "not installed, so registers of estimates are counted from PTX: pip install nvidia-cuda-nvcc"
    )
    assert "pip install nvidia-cuda-nvdisasm" in devices.report()["nvdisasm"]


@pytest.mark.skipif(reason() is None, reason="there is a GPU here: these tests run")
def test_they_skip_for_one_of_them() -> None:
    said = run("-m", "pytest", "-m", "gpu", "-rs", "tests/gpu")
    reasons = set(re.findall(r"^SKIPPED .*?: (.*)$", said, re.M))
    assert reasons == {reason()}, said
    assert reasons <= REASONS
    assert " passed" not in said
    assert " failed" not in said
    assert sum(int(n) for n in re.findall(r"^SKIPPED \[(\d+)\]", said, re.M)) > 100, said


def test_they_run_on_the_mock_driver(mock_driver: Path) -> None:
    some = "test_op and (sigmoid or cumsum) or replays or stay_on or of_torch or export or words"
    said = run(
        "tests/cuda/mock/gpu_tests.py", str(mock_driver), some, LD_LIBRARY_PATH=str(mock_driver.parent), TENSORWRIGHT_VALIDATE="0"
    )
    passed = re.findall(r"^PASSED .*::(\w+)", said, re.M)
    assert {"test_op", "test_replays_and_sizes", "test_arrays_stay_on_the_device", "test_an_export_runs"} <= set(passed), said
    assert " failed" not in said, said
