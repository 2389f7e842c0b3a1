"""The Device interface on the emulator, and executables that run on it: weights, state, sizes, branches, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import (
    DeviceError,
    DeviceMemoryError,
    InputError,
    KernelFaultError,
    LaunchError,
    PtxError,
    RuntimeUnavailableError,
)
from tensorwright.runtime.cuda import devices
from tensorwright.runtime.cuda.device import Extent
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.executable import CudaExecutable

from .ptx_support import kernel

R = np.random.default_rng(0)
TARGET = "cuda-emulator"
DOUBLE = kernel(
    "ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %t, 4, %d0; ld.global.f32 %f0, [%d1]; add.f32 %f0, %f0, %f0; "
    "st.global.f32 [%d1], %f0;"
)


def test_copies_launches_and_replays() -> None:
    device = Emulator(1 << 20)
    x, back = R.standard_normal(32).astype("f4"), np.empty(32, "f4")
    a, b = device.allocate(128, "a"), device.allocate(128, "b")
    assert a % 256 == b % 256 == 0
    double = device.load(DOUBLE).function("k")
    device.upload(a, x)
    graph = device.capture(lambda: (device.launch(double, (1,), (32,), [a]), device.copy(b, a, 128))[0])
    with pytest.raises(DeviceError, match="128 of 128 bytes that are copied from the device were never written"):
        device.download(b, back)  # nothing of the graph has run
    for times in (2, 4):
        graph.replay()
        device.synchronize()
        device.download(b, back)
        assert (back == times * x).all()
    device.forget(a, 64)
    with pytest.raises(KernelFaultError, match="uninitialised read"):
        graph.replay()
    device.free(a)
    for again in (lambda: device.free(a), lambda: device.upload(a, x), lambda: device.upload(b + 64, x)):
        with pytest.raises(DeviceError, match=r"freed before|leaves what is allocated"):
            again()


def test_memory_runs_out_and_comes_back() -> None:
    device = Emulator(1 << 20)
    first = device.allocate(600_000, "first")
    with pytest.raises(DeviceMemoryError, match=r"600,000 bytes asked for, 600,000 of 1,048,576 in use") as caught:
        device.allocate(600_000)
    assert isinstance(caught.value, MemoryError)
    device.free(first)
    assert device.allocate(600_000) == first


def test_launches_that_cannot_be() -> None:
    device = Emulator(1 << 20)
    module = device.load(DOUBLE)
    k = module.function("k")
    a = device.allocate(128)
    for grid, block, arguments, shared, says in (
        ((1,), (32,), [], 0, "takes 1 arguments"),
        ((1,), (32,), [np.int32(4)], 0, "of 4 bytes, the parameter .u64 has 8"),
        ((0,), (32,), [a], 0, r"a grid of \(0,\)"),
        ((1, 70_000), (32,), [a], 0, r"limits are \(2147483647, 65535, 65535\)"),
        ((1,), (1025,), [a], 0, r"a block of \(1025,\)"),
        ((1,), (64, 32), [a], 0, "a block of 2048 threads; at most 1024"),
        ((1,), (32,), [a], 300_000, "300,000 bytes of shared memory; a block of sm_90 has 232,448"),
    ):
        with pytest.raises(LaunchError, match=says):
            device.launch(k, grid, block, arguments, shared=shared)
    with pytest.raises(LaunchError, match="no kernel 'other'"):
        module.function("other")
    with pytest.raises(PtxError, match="unknown statement 'hello'"):
        device.load("hello")
    big = kernel(".shared .align 4 .b8 s[50000];")
    with pytest.raises(LaunchError, match="50,000 bytes of static shared memory, beyond 49,152"):
        device.load(big)
    fixed = device.load(DOUBLE.replace("\n{", "\n.reqntid 64, 1, 1\n{", 1)).function("k")
    with pytest.raises(LaunchError, match=r"compiled for \(64, 1, 1\)"):
        device.launch(fixed, (1,), (32,), [a])


def test_extents_limit_a_launch_to_its_arguments() -> None:
    device = Emulator(1 << 20)
    k = device.load(DOUBLE).function("k")
    a = device.allocate(256)
    device.upload(a, np.ones(64, "f4"))
    device.launch(k, (1,), (32,), [a], extents=[Extent(a, 128, True, "x")])
    with pytest.raises(
        KernelFaultError, match=r"a read of 4 bytes at byte 128 from x, outside what the launch may touch: x\[128\]"
    ):
        device.launch(k, (1,), (33,), [a], extents=[Extent(a, 128, True, "x")])
    with pytest.raises(KernelFaultError, match=r"a write to 4 bytes at byte 0 from x.*x\[128\] \(read only\)"):
        device.launch(k, (1,), (32,), [a], extents=[Extent(a, 128, False, "x")])


# --- executables -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 3)

    def __call__(self, x: Any) -> Any:
        return tw.softmax(self.second(tw.tanh(self.first(x))), axis=-1)


@pytest.mark.unvalidated("the passes are validated elsewhere: this is about the device")
def test_an_executable_runs_takes_new_weights_and_several_sizes() -> None:
    net = Net()
    exe, here = (tw.compile(net, tw.spec("N", 7), target=t) for t in (TARGET, None))
    assert isinstance(exe, CudaExecutable)
    assert "CUDA" in repr(exe)
    for n in (5, 2, 5):
        x = R.standard_normal((n, 7)).astype("f4")
        np.testing.assert_allclose(exe(x), here(x), rtol=2e-6, atol=1e-7)
    before = len(exe.device.memory.allocations)  # type: ignore[attr-defined]  # it is the emulator
    new = {n: v + np.float32(0.1) for n, v in exe.parameters.items()}
    exe.set_parameters(new)
    here.set_parameters(new)
    out = np.empty((5, 3), "f4")
    np.testing.assert_allclose(exe(x, out=out), here(x), rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(out, exe(x))
    live = [a for a in exe.device.memory.allocations if not a.freed]  # type: ignore[attr-defined]
    assert len(live) <= before, "the old weights are still on the device"
    with pytest.raises(InputError, match="dimension 1 must be 7"):
        exe(x[:, :3])
    with pytest.raises(InputError, match="CPU kernels"):
        exe.profile(x)


@pytest.mark.unvalidated("the passes of a training step are validated elsewhere: this is about the device")
def test_state_stays_on_the_device_and_comes_back_when_it_is_read() -> None:
    x, y = R.standard_normal((8, 7)).astype("f4"), R.integers(0, 3, 8)
    history = []
    for target in (TARGET, None):
        tw.seed(0)
        trainer = tw.Trainer(Net(), loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(0.05), target=target)
        log = trainer.fit(x, y, epochs=2, batch_size=4, verbose=False, shuffle=False)
        history.append(([row["loss"] for row in log], trainer.predict(x)))
    np.testing.assert_allclose(history[0][0], history[1][0], rtol=1e-4)
    np.testing.assert_allclose(history[0][1], history[1][1], rtol=1e-4, atol=1e-5)


def test_a_program_without_kernels_runs() -> None:
    exe = tw.compile(lambda x: x + 1, tw.spec(0, 3), target="cuda-emulator")
    assert exe(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_branches_and_loops_read_bytes_from_the_device() -> None:
    def model(x: Any) -> Any:
        total = tw.sum(x)
        y = tw.cond(total > 0.0, lambda: x * 2.0, lambda: x - 1.0)
        return y

    x = np.abs(R.standard_normal((3, 5))).astype("f4")
    exe = tw.compile(model, tw.spec(3, 5), target=TARGET)
    np.testing.assert_allclose(exe(x), x * 2, rtol=1e-6)
    np.testing.assert_allclose(exe(-x), -x - 1, rtol=1e-6)


def test_text_can_be_read_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing", lambda: [devices.NO_PYCUDA, devices.NO_DRIVER])
    exe = tw.compile(Net(), tw.spec(4, 7), target="cuda-sm_80")
    assert ".target sm_80" in exe.text("ptx")
    with pytest.raises(RuntimeUnavailableError, match=r"pycuda not installed: pip install .*; no NVIDIA driver \(libcuda.so.1\)"):
        exe(np.zeros((4, 7), "f4"))


@pytest.mark.parametrize("lacking", [devices.NO_PYCUDA, devices.NO_DRIVER, devices.NO_DEVICE])
def test_what_is_missing_is_said_with_what_to_do(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing", lambda: [lacking])
    with pytest.raises(RuntimeUnavailableError) as caught:
        devices.open_device("cuda")
    assert lacking in str(caught.value)
    assert "cuda-emulator" in str(caught.value)
    assert devices.report()["target='cuda'"].startswith(lacking)
    with pytest.raises(InputError, match="no CUDA target"):
        devices.open_device("cuda-fast")


def test_the_driver_is_looked_for_without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)

    def none() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(devices, "driver", none)
    assert devices.missing() == ["pycuda not installed", "no NVIDIA driver (libcuda.so.1)"]
    assert devices.report()["devices"] == "not looked for: no driver"
    monkeypatch.setattr(devices, "driver", lambda: _Driver(0, 0))
    assert devices.missing() == ["pycuda not installed", "no CUDA device"]
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(devices, "driver", lambda: _Driver(0, 2))
    assert devices.missing() == []
    assert devices.report()["driver"] == "CUDA 12.4"
    assert devices.report()["devices"] == "2"


class _Driver:
    """What of the driver's library is asked."""

    def __init__(self, status: int, count: int) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, to: Any) -> int:
        to._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, to: Any) -> int:
        to._obj.value = 12040
        return 0
