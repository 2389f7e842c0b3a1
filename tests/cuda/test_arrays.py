"""Arrays in and out of CUDA programs: `__cuda_array_interface__`, DLPack, results and state that stay on the device."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.dtypes import bf16, f32
from tensorwright.ir.errors import InputError
from tensorwright.runtime.cuda import dlpack
from tensorwright.runtime.cuda.arrays import DeviceArray
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.executable import CudaExecutable
from tensorwright.training.callbacks.base import Callback

pytestmark = pytest.mark.unvalidated("the passes are those of other tests: this is about arrays")
R = np.random.default_rng(0)


class Foreign:
    """Another library's array on the device, by `__cuda_array_interface__`."""

    def __init__(self, device: Any, array: np.ndarray, **more: Any) -> None:
        self.device, self.dtype = device, array.dtype
        self.address = device.allocate(array.nbytes, "foreign")
        device.upload(self.address, array)
        self.interface = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (self.address, False), "version": 3, "strides": None,
        } | more  # fmt: skip

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface

    def read(self) -> np.ndarray:
        found = np.empty(self.interface["shape"], self.dtype)
        self.device.download(self.address, found)
        return found


@pytest.fixture(scope="module")
def exe() -> CudaExecutable:
    made = tw.compile(lambda x, y: tw.relu(x) + y, tw.spec("N", 6), tw.spec("N", 6), target="cuda-emulator")
    assert isinstance(made, CudaExecutable)
    return made


def pair() -> tuple[np.ndarray, np.ndarray]:
    return R.standard_normal((4, 6)).astype("f4"), R.standard_normal((4, 6)).astype("f4")


def test_foreign_arrays_are_taken_and_written(exe: CudaExecutable) -> None:
    x, y = pair()
    expected = exe(x, y)
    waits: list[int] = []
    device: Any = exe.device
    device.wait_for = waits.append
    try:
        a, b, out = Foreign(device, x, stream=7), Foreign(device, y, stream=None), Foreign(device, np.zeros_like(x), stream=1)
        np.testing.assert_array_equal(exe(a, b), expected)
        np.testing.assert_array_equal(exe(a, y), expected)  # the other of the host
        assert waits == [7, 7]
        assert exe(a, b, out=out) is out
        assert waits == [7, 7, 7, 1]
    finally:
        del device.wait_for
    np.testing.assert_array_equal(out.read(), expected)
    np.testing.assert_array_equal(a.read(), x)


def test_results_stay_and_go_on(exe: CudaExecutable) -> None:
    x, y = pair()
    expected = exe(x, y)
    kept = exe.on_device(x, y)
    assert isinstance(kept, DeviceArray)
    assert (kept.shape, kept.dtype, kept.ndim) == ((4, 6), np.dtype("f4"), 2)
    np.testing.assert_array_equal(kept.numpy(), expected)
    again = exe.on_device(kept, exe.to_device(y))
    np.testing.assert_array_equal(again.numpy(), exe(expected, y))
    interface = kept.__cuda_array_interface__
    assert (interface["version"], interface["typestr"], interface["data"]) == (3, "<f4", (kept.address, False))
    out = exe.to_device(np.zeros_like(x))
    assert exe(x, y, out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected)
    assert "DeviceArray f32[4, 6]" in repr(out)


def test_memory_of_results_is_given_back(exe: CudaExecutable) -> None:
    x, y = pair()
    exe.on_device(x, y)
    device: Any = exe.device

    def live() -> int:
        gc.collect()
        return sum(not a.freed for a in device.memory.allocations)

    before = live()
    some = [exe.on_device(x, y) for _ in range(3)]
    assert live() == before + 3
    del some
    assert live() == before


def test_dlpack_lends_the_emulators_memory(exe: CudaExecutable) -> None:
    x, y = pair()
    kept = exe.on_device(x, y)
    expected = kept.numpy()
    view = np.from_dlpack(kept)  # the emulator's memory is the host's: no copy
    del kept
    gc.collect()
    np.testing.assert_array_equal(view, expected)
    before = len(dlpack._lent)
    del view
    gc.collect()
    assert len(dlpack._lent) == before - 1
    capsule = exe.to_device(x).__dlpack__(stream=-1)
    assert len(dlpack._lent) == before
    del capsule  # nobody took it
    gc.collect()
    assert len(dlpack._lent) == before - 1
    with pytest.raises(BufferError, match="no copy, no other device"):
        exe.to_device(x).__dlpack__(copy=True)


def test_torch_takes_what_dlpack_lends(exe: CudaExecutable) -> None:
    torch = pytest.importorskip("torch", reason="the bench extra; numpy is its counterpart above")
    x, y = pair()
    kept = exe.on_device(x, y)
    np.testing.assert_array_equal(torch.from_dlpack(kept).numpy(), kept.numpy())
    with pytest.raises(InputError, match="detach"):
        exe(torch.from_numpy(x).requires_grad_(), y)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i1", "u2", "i8", "?"])
def test_capsules_say_what_they_hold(dtype: str, exe: CudaExecutable) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3)
    lent = exe.to_device(array)
    loan = dlpack.Loan(lent.__dlpack__())
    assert (loan.shape, loan.dtype.numpy, loan.strides, loan.device) == ((2, 3), array.dtype, None, (1, 0))
    assert loan.address == exe.device.host_address(lent.address)
    np.testing.assert_array_equal(np.from_dlpack(lent), array)


def test_a_capsule_is_taken_once(exe: CudaExecutable) -> None:
    capsule = exe.to_device(np.ones(3, "f4")).__dlpack__()
    dlpack.Loan(capsule)
    with pytest.raises(BufferError, match="no fresh DLPack capsule"):
        dlpack.Loan(capsule)
    half = DeviceArray(exe.device, (4,), bf16)
    assert dlpack.Loan(half.__dlpack__()).dtype is bf16
    assert not hasattr(half, "__cuda_array_interface__")


class OnCuda:
    """An array whose DLPack device is CUDA's `number`, lent by an emulator that claims to be it."""

    def __init__(self, lent: DeviceArray, number: int) -> None:
        self.lent, self.number, self.streams = lent, number, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __dlpack__(self, *, stream: int | None) -> Any:
        self.streams.append(stream)
        return dlpack.lend(self.lent, self.lent.address, self.lent.shape, self.lent.kind, (2, self.number))


def test_dlpack_of_a_device(exe: CudaExecutable, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair()
    lender = OnCuda(exe.to_device(x), 0)
    with pytest.raises(InputError, match=r"input 0 \('x'\): it is on CUDA device 0, the program on PTX emulator"):
        exe(lender, y)
    monkeypatch.setattr(exe.device, "dlpack", (2, 0))
    monkeypatch.setattr(exe.device, "stream", 99)
    np.testing.assert_array_equal(exe(lender, y), exe(x, y))
    assert lender.streams == [99]  # it makes our stream wait
    with pytest.raises(InputError, match="it is on CUDA device 3"):
        exe(OnCuda(lender.lent, 3), y)
    assert not any(isinstance(v[-1], DeviceArray) and v[-1] is lender.lent for v in dlpack._lent.values()), (
        "a loan was not returned"
    )


def test_what_does_not_fit_is_refused(exe: CudaExecutable) -> None:
    x, y = pair()
    device: Any = exe.device
    for more, says in (
        ({"strides": (4, 16)}, "must be C-contiguous, got shape .4, 6. with strides .4, 16."),
        ({"mask": object()}, "with a mask"),
        ({"stream": 0}, "stream 0"),
        ({"typestr": "<f8"}, r"expected f32\[N, 6\], got f64\[4, 6\] on the device"),
        ({"typestr": "<M8[s]"}, "cannot take a .*Foreign from the device"),
        ({"shape": (4, 5)}, r"dimension 1|expected f32\[N, 6\]"),
    ):
        with pytest.raises(InputError, match=says):
            exe(Foreign(device, x, **more), y)
    with pytest.raises(InputError, match="not on this program's device"):
        exe(DeviceArray(Emulator(1 << 20), (4, 6), f32), y)
    for out, says in (
        (exe.to_device(np.zeros((4, 6))), r"must be f32\[4, 6\], writable, on the device, got f64\[4, 6\] on the device"),
        (Foreign(device, x, data=(device.allocate(96), True)), "read-only"),
        ([exe.to_device(x), exe.to_device(x)], "out= has 2 arrays, the model has 1 outputs"),
    ):
        with pytest.raises(InputError, match=says):
            exe(x, y, out=out)
    with pytest.raises(InputError, match="to_device takes an array of numbers"):
        exe.to_device(["a"])


def test_strides_of_an_axis_of_one_do_not_matter(exe: CudaExecutable) -> None:
    x = R.standard_normal((1, 6)).astype("f4")
    np.testing.assert_array_equal(exe(Foreign(exe.device, x, strides=(4, 4)), x), exe(x, x))


class Net(nn.Module):
    def __init__(self) -> None:
        self.layer = nn.Linear(5, 3)

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


def test_state_is_not_copied_between_training_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    fetched: list[int] = []
    note = Emulator._note

    def counted(self: Emulator, stream: int, what: str, extents: Any) -> None:
        if what in ("an upload", "a download"):
            (sent if what == "an upload" else fetched).append(extents[0].nbytes)
        note(self, stream, what, extents)

    monkeypatch.setattr(Emulator, "_note", counted)
    x, y = R.standard_normal((12, 5)).astype("f4"), R.integers(0, 3, 12)
    tw.seed(0)
    trainer = tw.Trainer(Net(), loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(0.1), target="cuda-emulator")
    marks: list[tuple[int, int]] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Any, loss: float) -> None:
            marks.append((len(sent), len(fetched)))

    trainer.fit(x, y, epochs=1, batch_size=4, verbose=False, shuffle=False, callbacks=[Watch()])
    assert len(marks) == 3
    weight = 5 * 3 * 4
    between = sent[marks[0][0] : marks[2][0]]
    assert between, "a batch is sent for each step"
    assert weight not in between
    assert weight not in fetched[marks[0][1] : marks[2][1]]
    assert weight in sent
