"""The device itself: replays, copies, arrays of other libraries, an export, what a failed kernel leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import DeviceMemoryError
from tensorwright.runtime.cuda.device import Device
from tensorwright.runtime.cuda.executable import CudaExecutable

pytestmark = [pytest.mark.gpu, pytest.mark.unvalidated("the passes are validated elsewhere")]
R = np.random.default_rng(0)


@pytest.fixture
def exe(gpu: Device) -> CudaExecutable:
    made = tw.compile(lambda x, y: tw.softmax(tw.relu(x) @ y, axis=-1), tw.spec("N", 33), tw.spec(33, 17), target="cuda")
    assert isinstance(made, CudaExecutable)
    return made


def test_replays_and_sizes(exe: CudaExecutable) -> None:
    y = R.standard_normal((33, 17)).astype("f4")
    for n in (5, 64, 5):
        x = R.standard_normal((n, 33)).astype("f4")
        e = np.exp(np.maximum(x, 0).astype("f8") @ y)
        np.testing.assert_allclose(exe(x, y), e / e.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_arrays_stay_on_the_device(exe: CudaExecutable) -> None:
    x, y = R.standard_normal((5, 33)).astype("f4"), R.standard_normal((33, 17)).astype("f4")
    expected = exe(x, y)
    held = exe.to_device(x)
    for _ in range(3):
        np.testing.assert_array_equal(exe.on_device(held, y).numpy(), expected)


def test_arrays_of_torch_and_cupy(exe: CudaExecutable) -> None:
    """With whichever of them has a GPU here; without either, our own array stands for one by its interface."""
    x, y = R.standard_normal((5, 33)).astype("f4"), R.standard_normal((33, 17)).astype("f4")
    expected = exe(x, y)
    for given in lent(x) or [exe.to_device(x)]:
        np.testing.assert_array_equal(exe(given, y), expected)
    for module, take in libraries():
        taken = take(exe.on_device(x, y))
        np.testing.assert_array_equal(taken.cpu().numpy() if module == "torch" else taken.get(), expected)


def libraries() -> list[tuple[str, Any]]:
    """Libraries that have a GPU here, and how they take an array through DLPack."""
    found: list[tuple[str, Any]] = []
    try:
        import torch

        if torch.cuda.is_available():
            found.append(("torch", torch.from_dlpack))
    except ImportError:
        pass  # it is no requirement
    try:
        import cupy

        found.append(("cupy", cupy.from_dlpack))
    except ImportError:
        pass  # nor is this
    return found


def lent(array: np.ndarray) -> list[Any]:
    """The array in each library that has a GPU here."""
    made: list[Any] = []
    for module, _ in libraries():
        if module == "torch":
            import torch

            made.append(torch.from_numpy(array).cuda())
        else:
            import cupy

            made.append(cupy.asarray(array))
    return made


def test_an_export_runs(exe: CudaExecutable, tmp_path: Path) -> None:
    x, y = R.standard_normal((5, 33)).astype("f4"), R.standard_normal((33, 17)).astype("f4")
    expected = exe(x, y)
    exe.export(tmp_path / "model")
    np.testing.assert_array_equal(tw.load(tmp_path / "model")(x, y), expected)


def test_memory_runs_out_in_words(gpu: Device) -> None:
    with pytest.raises(DeviceMemoryError, match="out of device memory"):
        gpu.allocate(1 << 46)
    gpu.free(gpu.allocate(256))


_FAILS = """
import numpy as np
from tensorwright.ir.errors import DeviceLostError, LaunchError
from tensorwright.runtime.cuda.devices import open_device

PTX = '''.version 7.0
.target sm_75
.address_size 64
.visible .entry bad(.param .u64 x) {
.reg .b64 %d<2>; .reg .b32 %r<2>;
mov.b32 %r0, 1; mov.b64 %d0, 64; st.global.b32 [%d0], %r0; ret; }
'''
device = open_device("cuda")
address = device.allocate(256)
try:
    device.launch(device.load(PTX).function("bad"), (1,), (1,), [address])
    device.synchronize()
except LaunchError as error:
    print("launch:", error)
try:
    device.allocate(256)
except DeviceLostError as error:
    print("lost:", error)
"""


def test_a_failed_kernel_loses_the_context(gpu: Device) -> None:
    """In a process of its own, which has no device afterwards."""
    done = subprocess.run([sys.executable, "-c", _FAILS], capture_output=True, text=True, timeout=300, check=False)
    assert "launch: " in done.stdout, done.stderr
    assert "illegal address (700)" in done.stdout
    assert "lost: " in done.stdout
