"""The device behind the mock libcuda.so.1 (driver.c): the PTX emulator, called through the driver's C interface.

It behaves as CUDA does where a program can tell: a launch returns at once, its failure comes with the next call that waits, and
from then on every call returns the same code. A copy of page-locked memory runs beside the host (the emulator shows how late it
may come); one of other memory is over when the call returns, and cannot be captured.
"""

from __future__ import annotations

import atexit
import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from tensorwright.ir.errors import DeviceMemoryError, KernelFaultError, LaunchError, PtxError, TensorwrightError
from tensorwright.runtime.cuda.emulator import Emulator

_CALL: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
_FAULTS: Final = {"out of bounds": 700, "misaligned": 716, "trap": 715}


class Driver:
    """Answers the driver's calls; `log` holds their names, `faults` what the emulator said about failed kernels."""

    def __init__(self, library: str, capacity: int = 1 << 22) -> None:
        self.device = Emulator(capacity)
        self.log: list[str] = []
        self.faults: list[str] = []
        self.order: list[tuple[str, int]] = []  # streams whose moments were recorded, that wait for one, that copy
        self._pinned: dict[int, np.ndarray] = {}
        self.lost = 0
        self._objects: dict[int, Any] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self._call = _CALL(self._answer)  # must live as long as the library uses it
        self._library.mock_register(self._call)
        atexit.register(self._library.mock_register, None)  # what is released later must not call into a dead interpreter

    def _answer(self, name: bytes, a: Any) -> int:
        what = name.decode()
        if what not in ("attribute", "total"):
            self.log.append(what)
        if self.lost and what not in ("attribute", "total"):
            return self.lost
        try:
            return int(getattr(self, f"_{what}")(a) or 0)
        except DeviceMemoryError:
            return 2
        except PtxError:
            return 218
        except TensorwrightError as error:
            self.faults.append(str(error))
            return 1

    def _new(self, thing: Any) -> int:
        self._objects[len(self._objects) + 1] = thing
        return len(self._objects)

    def _do(self, call: Callable[[], None]) -> None:
        if self._recording is not None:
            self._recording.append(call)
        elif not self.lost:
            try:
                call()
            except KernelFaultError as fault:
                self.faults.append(str(fault))
                self.lost = _FAULTS.get(fault.kind, 719)

    def _attribute(self, a: Any) -> None:
        known = {
            1: 1024,
            2: 1024,
            3: 1024,
            4: 64,
            5: 2**31 - 1,
            6: 65535,
            7: 65535,
            8: 49152,
            10: 32,
            16: 108,
            39: 2048,
            75: 8,
            76: 0,
        }
        ctypes.c_int.from_address(a[0]).value = known.get(a[1], 0)

    def _total(self, a: Any) -> None:
        ctypes.c_size_t.from_address(a[0]).value = self.device.total

    def _synchronize(self, a: Any) -> int:
        return self.lost or self._waited(self.device.synchronize)

    def _wait_here(self, a: Any) -> int:
        return self.lost or self._waited(lambda: self.device.join(self.device.record(int(a[0]))))

    def _join(self, a: Any) -> int:
        return self.lost or self._waited(lambda: self.device.join(self._objects[a[0]]))

    def _waited(self, wait: Callable[[], None]) -> int:
        if self._recording is not None:
            return 900
        wait()
        return 0

    def _allocate(self, a: Any) -> None:
        ctypes.c_uint64.from_address(a[0]).value = self.device.allocate(a[1], f"allocation {len(self._objects)}")

    def _free(self, a: Any) -> None:
        self.device.free(a[0])

    def _upload(self, a: Any) -> int:
        to, stream = a[0], int(a[3])
        staged = self._staged(a[1], a[2])
        if staged is None and self._recording is not None:
            return 900
        data = np.frombuffer(ctypes.string_at(a[1], a[2]), np.uint8) if staged is None else staged
        self.order.append(("upload", stream))
        self._do(lambda: self.device.upload(to, data, stream))
        return 0

    def _download(self, a: Any) -> int:
        source, stream = a[1], int(a[3])
        staged = self._staged(a[0], a[2])
        self.order.append(("download", stream))
        if staged is not None:
            self._do(lambda: self.device.download(source, staged, stream))
            return 0
        if self._recording is not None:
            return 900
        self.device.join(self.device.record(stream))
        self.device.download(source, np.frombuffer((ctypes.c_uint8 * a[2]).from_address(a[0]), np.uint8))
        return 0

    def _allocate_host(self, a: Any) -> int:
        if not a[1]:
            return 1
        made = self.device.staging(a[1])
        self._pinned[made.ctypes.data] = made
        ctypes.c_uint64.from_address(a[0]).value = made.ctypes.data
        return 0

    def _free_host(self, a: Any) -> int:
        return 1 if self._pinned.pop(a[0], None) is None else 0

    def _staged(self, address: int, nbytes: int) -> np.ndarray | None:
        """The piece of page-locked memory there; None for memory that is not."""
        for start, made in self._pinned.items():
            if start <= address and address + nbytes <= start + made.nbytes:
                return made[address - start : address - start + nbytes]
        return None

    def _copy(self, a: Any) -> None:
        to, source, n = a[0], a[1], a[2]
        self._do(lambda: self.device.copy(to, source, n))

    def _load(self, a: Any) -> None:
        module = self.device.load(ctypes.string_at(a[1]).decode())
        ctypes.c_uint64.from_address(a[0]).value = self._new(module)

    def _unload(self, a: Any) -> None:
        self._objects[a[0]].unload()

    def _function(self, a: Any) -> int:
        try:
            function = self._objects[a[1]].function(ctypes.string_at(a[2]).decode())
        except LaunchError:
            return 500
        ctypes.c_uint64.from_address(a[0]).value = self._new(function)
        return 0

    def _set_attribute(self, a: Any) -> None:
        pass

    def _launch(self, a: Any) -> int:
        f = self._objects[a[0]]
        buffer = ctypes.string_at(a[8], a[9])
        if len(buffer) != struct.calcsize(f.signature.format):
            return 1
        grid, block, shared = tuple(a[1:4]), tuple(a[4:7]), int(a[7])
        if block[0] * block[1] * block[2] > 1024 or shared > 163 * 1024:
            return 1
        values = struct.unpack(f.signature.format, buffer)
        stream = int(a[10])
        self._do(lambda: self.device.launch(f, grid, block, values, shared=shared, stream=stream))
        return 0

    def _event(self, a: Any) -> None:
        ctypes.c_uint64.from_address(a[0]).value = self._new(None)

    def _record(self, a: Any) -> None:
        event, stream = a[0], int(a[1])
        self.order.append(("record", stream))

        def go() -> None:
            self._objects[event] = self.device.record(stream)

        self._do(go)

    def _wait(self, a: Any) -> None:
        stream, event = int(a[0]), a[1]
        self.order.append(("wait", stream))
        self._do(lambda: self.device.wait(stream, self._objects[event]))

    def _begin_capture(self, a: Any) -> int:
        if not a[0] or self._recording is not None:
            return 901
        self._recording = []
        return 0

    def _end_capture(self, a: Any) -> None:
        ctypes.c_uint64.from_address(a[0]).value = self._new(self._recording)
        self._recording = None

    def _instantiate(self, a: Any) -> None:
        ctypes.c_uint64.from_address(a[0]).value = self._new(list(self._objects[a[1]]))

    def _graph_launch(self, a: Any) -> None:
        for call in self._objects[a[0]]:
            self._do(call)

    def _graph_free(self, a: Any) -> None:
        self._objects[a[0]] = None
