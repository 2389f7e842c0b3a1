"""Runs in a process of its own, with pycuda and the mock driver: the whole host path of `target="cuda"`. Prints `ok NAME` for
each part that held; test_pycuda.py compares the names. Usage: python host_path.py LIBRARY [mini]"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import DeviceError, DeviceLostError, DeviceMemoryError, LaunchError
from tensorwright.runtime.cuda import devices
from tensorwright.runtime.cuda.dlpack import Loan

from tests.cuda.mock import minicuda
from tests.cuda.mock.driver import Driver

HEAD = ".version 7.0\n.target sm_80\n.address_size 64\n"
SCALE = (
    HEAD
    + """
.visible .entry scale(.param .u64 x, .param .f32 by, .param .s32 n) {
.reg .b64 %d<4>; .reg .f32 %f<4>; .reg .b32 %r<8>; .reg .pred %p;
mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r3, %r0, %r1, %r2; ld.param.s32 %r4, [n];
setp.ge.s32 %p, %r3, %r4; @%p ret; ld.param.u64 %d0, [x]; ld.param.f32 %f0, [by];
mad.wide.s32 %d1, %r3, 4, %d0; ld.global.f32 %f1, [%d1]; mul.rn.f32 %f1, %f1, %f0; st.global.f32 [%d1], %f1; ret; }
"""
)


class Net(nn.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def __call__(self, x: Any) -> Any:
        return tw.softmax(self.second(tw.relu(self.first(x))), axis=-1)


def fails(call: Callable[[], object], kind: type[Exception], *words: str) -> str:
    """The message of the error of exactly this kind that a call must raise."""
    try:
        call()
    except kind as error:
        assert type(error) is kind, type(error)
        message = str(error)
        assert all(w in message for w in words), message
        return message
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    if sys.argv[2:] == ["mini"]:
        minicuda.install(sys.argv[1])
    driver = Driver(sys.argv[1])
    r = np.random.default_rng(0)
    assert devices.missing() == [], devices.missing()
    assert devices.report()["target='cuda'"] == "runs here"
    print("ok doctor")

    exe = tw.compile(Net(), tw.spec(5, 6), target="cuda-sm_80")
    x = r.standard_normal((5, 6)).astype("f4")
    y = exe(x)
    np.testing.assert_allclose(y, tw.compile(Net_like(exe), tw.spec(5, 6))(x), rtol=1e-5, atol=1e-6)
    device = exe.device  # type: ignore[attr-defined]  # it is a CudaExecutable
    assert device.name == "mock of libcuda (PTX emulator)" and device.sm == 80
    assert {"load", "function", "upload", "launch", "download"} <= set(driver.log)
    print("ok load, copies and launches")

    before = driver.log.count("launch")
    assert driver.log.count("graph_launch") == 1
    np.testing.assert_array_equal(exe(x), y)
    assert driver.log.count("launch") == before and driver.log.count("graph_launch") == 2
    print("ok graph replay")

    def branches(v: Any) -> Any:
        left, right = v @ v, v @ tw.transpose(v, (1, 0))
        return left @ v - right @ right

    square = r.standard_normal((12, 12)).astype("f4")
    two = tw.compile(branches, tw.spec(12, 12), target="cuda-sm_80")
    expected = square @ square @ square - (square @ square.T) @ (square @ square.T)
    for _ in range(2):
        np.testing.assert_allclose(two(square), expected, rtol=1e-4, atol=1e-4)
    print("ok streams in a graph")

    del driver.order[:]

    def late(v: Any, w: Any) -> Any:
        first = v @ v
        return tw.exp(first), (first @ v) @ w

    apart = tw.compile(late, tw.spec(12, 12), tw.spec(12, 12), target="cuda-sm_80")
    for scale in (np.float32(1), np.float32(2)):
        found = apart(square * scale, square)
        np.testing.assert_allclose(found[0], np.exp(scale * scale * square @ square), rtol=1e-3)
        np.testing.assert_allclose(found[1], scale**3 * (square @ square @ square @ square), rtol=1e-3, atol=1e-3)
    copies = [x for x in driver.order if x[0] in ("upload", "download")]
    assert copies == [("upload", 4), ("upload", 4), ("download", 5), ("download", 5)], copies  # captured once
    assert driver.order.index(("download", 5)) < max(n for n, x in enumerate(driver.order) if x == ("record", 0))
    assert driver.log.count("allocate_host") >= 4 and driver.log[-1] == "join"
    free = driver.log.count("free_host")
    del apart
    gc.collect()
    assert driver.log.count("free_host") == free + 4, "staging memory goes with the program"
    print("ok copies beside launches")

    data, labels = r.standard_normal((8, 6)).astype("f4"), r.integers(0, 3, 8)
    losses = []
    for target in ("cuda-sm_80", None):
        tw.seed(0)
        trainer = tw.Trainer(Net(), loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(0.05), target=target)
        losses.append([row["loss"] for row in trainer.fit(data, labels, epochs=2, batch_size=4, verbose=False, shuffle=False)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    print("ok training")

    class Lent:
        """Another library's array on the device, still being written on CUDA's default stream."""

        def __init__(self, array: Any, stream: int | None) -> None:
            self.address = device.allocate(array.nbytes)
            device.upload(self.address, array)
            self.__cuda_array_interface__ = {
                "shape": array.shape, "typestr": array.dtype.str, "data": (self.address, False), "version": 3, "stream": stream,
            }  # fmt: skip

    del driver.order[:]
    np.testing.assert_array_equal(exe(Lent(x, 1)), y)
    assert driver.order[:3] == [("upload", 0), ("record", 101), ("wait", 0)], driver.order
    kept = exe.on_device(Lent(x, None))
    np.testing.assert_array_equal(kept.numpy(), y)
    assert kept.__cuda_array_interface__["stream"] == device.stream
    del driver.order[:]
    loan = Loan(kept.__dlpack__(stream=2))
    assert driver.order == [("record", 0), ("wait", 102)], driver.order
    assert (loan.address, loan.device, loan.shape) == (kept.address, (2, 0), (5, 3))
    second = exe.on_device(x)
    out = Lent(np.zeros((5, 3), np.float32), None)
    assert exe(x, out=out) is out
    assert (second.numpy() == y).all()
    if sys.argv[2:] != ["mini"]:
        from pycuda import gpuarray

        with device.calls("making a GPUArray"):
            there = gpuarray.to_gpu(x)
            np.testing.assert_array_equal(exe(there), y)
            result = gpuarray.GPUArray((5, 3), np.float32)
            exe(there, out=result)
            np.testing.assert_array_equal(result.get(), y)
            del there, result
    print("ok arrays of other libraries")

    with tempfile.TemporaryDirectory() as folder:
        exe.export(folder)
        loaded = tw.load(folder)
        np.testing.assert_array_equal(loaded(x), y)
        assert loaded.device is device
    print("ok an exported folder")

    scale = device.load(SCALE).function("scale")
    a = device.allocate(400)
    v, back = r.standard_normal(100).astype("f4"), np.empty(100, "f4")
    device.upload(a, v)
    device.launch(scale, (4,), (32,), [a, np.float32(3), 100])
    device.download(a, back)
    assert (back == v * np.float32(3)).all()
    fails(lambda: device.launch(scale, (4,), (32,), [a, 3.0]), LaunchError, "takes 3 arguments")
    fails(lambda: device.launch(scale, (4,), (32,), [a, np.float64(3), 100]), LaunchError, "float64 of 8 bytes")
    fails(lambda: device.launch(scale, (4,), (2048,), [a, 3.0, 100]), LaunchError, "launching scale")
    print("ok wrong arguments")

    fails(
        lambda: device.allocate(1 << 30, "weights"), DeviceMemoryError, "1,073,741,824 bytes for weights", "out of device memory"
    )
    fails(lambda: device.load("not ptx"), DeviceError, "loading a module")
    fails(lambda: device.load(SCALE).function("other"), LaunchError, "no kernel 'other'")
    fails(lambda: device.free(12345), DeviceError, "nothing is allocated")
    print("ok memory and modules")

    def beyond() -> None:
        device.launch(scale, (40,), (32,), [a, 3.0, 1280])
        device.synchronize()

    fails(beyond, LaunchError, "illegal address (700)")
    assert "out of bounds: kernel scale: block" in driver.faults[-1]
    for call in (lambda: device.download(a, back), lambda: device.allocate(4), lambda: exe(x), device.synchronize):
        fails(call, DeviceLostError, "lost since a kernel failed (illegal address)", "start the process again")
    print("ok a failed kernel and a lost context")


def Net_like(exe: Any) -> Net:
    """A model with an executable's weights."""
    net = Net()
    net.load_state_dict(exe.parameters)
    return net


if __name__ == "__main__":
    main()
