"""A GPU through pycuda, which is imported here and nowhere else. Graphs, which pycuda does not have, go to the driver itself.

Every call makes the device's primary context current for its thread and takes it back, so that any Python thread may call and
other libraries keep their own. After a kernel has failed, CUDA refuses everything in that context: so do we, in so many words.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pycuda.driver as cuda

from ...ir.cuda_streams import ALL
from ...ir.errors import DeviceError, DeviceLostError, DeviceMemoryError, LaunchError
from . import device as base
from .device import Argument, Array, Extent, Signature, check_buffer, pack_arguments, signatures
from .devices import driver
from .dlpack import CUDA

_CAPTURE_THREAD_LOCAL: Final = 1
_NO_TIMING: Final = 2  # of an event that is only waited for
# The driver's codes after a kernel went wrong: from then on every call of the context returns the same one.
_FAILED: Final = {
    700: "illegal address", 702: "time limit", 710: "assertion", 714: "hardware stack error", 715: "illegal instruction",
    716: "misaligned address", 717: "invalid address space", 718: "invalid program counter", 719: "launch failed",
}  # fmt: skip
_GONE: Final = {4: "the driver is shutting down", 201: "invalid context", 214: "memory error (ECC)", 709: "context destroyed"}
_OUT_OF_MEMORY: Final = 2


class PycudaFunction(base.Function):
    """A kernel on the GPU, prepared for arguments of its signature."""

    def __init__(self, handle: Any, signature: Signature) -> None:
        self.handle, self.signature = handle, signature
        self.shared_limit = 48 * 1024


class PycudaModule(base.Module):
    """A module on the GPU."""

    def __init__(self, device: PycudaDevice, ptx: str) -> None:
        self.device = device
        self._signatures = signatures(ptx)
        with device.calls("loading a module"):
            self._handle = cuda.module_from_buffer(ptx.encode() + b"\0")
        self._functions: dict[str, PycudaFunction] = {}

    def function(self, name: str) -> PycudaFunction:
        found = self._functions.get(name)
        if found is None:
            if name not in self._signatures:
                raise LaunchError(f"the module has no kernel {name!r}; it has {sorted(self._signatures)}")
            signature = self._signatures[name]
            with self.device.calls(f"looking up {name}"):
                handle = self._handle.get_function(name)
                handle.prepare(signature.format[1:])
            found = self._functions[name] = PycudaFunction(handle, signature)
        return found

    def unload(self) -> None:
        with self.device.calls("unloading a module"):
            self._functions = {}
            self._handle = None


class PycudaGraph(base.Graph):
    """A captured graph, instantiated."""

    def __init__(self, device: PycudaDevice, graph: ctypes.c_void_p) -> None:
        self.device, self._graph = device, graph
        self._exec = ctypes.c_void_p()
        device.check("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_uint64(0))

    def replay(self) -> None:
        with self.device.calls("replaying a graph"):
            self.device.check("cuGraphLaunch", self._exec, self.device.stream_handle)

    def __del__(self) -> None:
        if self.device.lost or not self._exec:
            return
        with self.device.calls("releasing a graph"):
            self.device.check("cuGraphExecDestroy", self._exec)
            self.device.check("cuGraphDestroy", self._graph)


class PycudaEvent(base.Event):
    """An event of CUDA."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class PycudaDevice(base.Device):
    """GPU `number`, in its primary context. Streams beyond the first are made when they are first used."""

    def __init__(self, number: int = 0) -> None:
        self.lost = ""
        self._lock = threading.RLock()
        self._depth = threading.local()
        cuda.init()
        self._device = cuda.Device(number)
        self.name = self._device.name()
        major, minor = self._device.compute_capability()
        self.sm = 10 * major + minor
        self.total = self._device.total_memory()
        self._driver = driver()
        self._context = self._device.retain_primary_context()
        self._allocations: dict[int, Any] = {}
        with self.calls("opening the device"):
            self._stream = cuda.Stream()
        self._streams = [self._stream]
        self.stream_handle = ctypes.c_void_p(self._stream.handle)
        self.stream = int(self._stream.handle)
        self.dlpack = (CUDA[0], number)

    # ------------------------------------------------------------------ errors

    @contextmanager
    def calls(self, what: str) -> Iterator[None]:
        """Calls to CUDA in the device's context; its errors become ours."""
        if self.lost:
            raise DeviceLostError(f"{what}: the context of {self.name} is lost since {self.lost}; start the process again")
        with self._lock:
            depth = getattr(self._depth, "n", 0)
            if not depth:
                self._context.push()
            self._depth.n = depth + 1
            try:
                yield
            except cuda.MemoryError as error:
                raise DeviceMemoryError(f"{what}: out of device memory on {self.name} ({self.total:,} bytes): {error}") from error
            except cuda.Error as error:
                # pycuda tells no code; a context that is lost answers with it to everything
                raise self._error(what, int(self._driver.cuCtxSynchronize()), str(error)) from error
            finally:
                self._depth.n = depth
                if not depth:
                    cuda.Context.pop()

    def _error(self, what: str, status: int, text: str) -> DeviceError:
        """Our error for a failed call; `status` is what the context says of itself."""
        if status in _FAILED:
            self.lost = f"a kernel failed ({_FAILED[status]})"
            return LaunchError(f"{what}: a kernel has failed on {self.name}: {_FAILED[status]} ({status}): {text}")
        if status in _GONE:
            self.lost = f"{_GONE[status]} ({status})"
            return DeviceLostError(f"{what}: the context of {self.name} is lost: {self.lost}: {text}; start the process again")
        return (LaunchError if what.startswith("launching") else DeviceError)(f"{what}: {text}")

    def check(self, function: str, *arguments: Any) -> None:
        """A call of the driver that pycuda does not have. Raises our errors for what it returns."""
        status = int(getattr(self._driver, function)(*arguments))
        if status == _OUT_OF_MEMORY:
            raise DeviceMemoryError(f"{function}: out of device memory on {self.name}")
        if status:
            raise self._error(function, status, f"error {status}")

    # ------------------------------------------------------------------ memory

    def allocate(self, nbytes: int, name: str = "") -> int:
        with self.calls(f"allocating {nbytes:,} bytes{' for ' + name if name else ''}"):
            made = cuda.mem_alloc(nbytes)
        self._allocations[int(made)] = made
        return int(made)

    def free(self, address: int) -> None:
        made = self._allocations.pop(address, None)
        if made is None:
            raise DeviceError(f"nothing is allocated at {address:#x}: it was freed before, or never allocated")
        with self.calls("freeing memory"):
            made.free()

    def staging(self, nbytes: int) -> Array:
        with self.calls(f"allocating {nbytes:,} bytes of page-locked memory"):
            found: Array = cuda.pagelocked_empty(nbytes, np.uint8)
        return found

    def upload(self, address: int, array: Array, stream: int = 0) -> None:
        check_buffer(array, "a copy to the device")
        if array.nbytes:
            with self.calls(f"copying {array.nbytes:,} bytes to the device"):
                cuda.memcpy_htod_async(address, array.reshape(-1).view(np.uint8), self._at(stream))

    def download(self, address: int, array: Array, stream: int | None = None) -> None:
        check_buffer(array, "a copy from the device")
        with self.calls(f"copying {array.nbytes:,} bytes from the device"):
            if array.nbytes:
                cuda.memcpy_dtoh_async(array.reshape(-1).view(np.uint8), address, self._at(stream or 0))
            if stream is None:
                self._stream.synchronize()

    def copy(self, to: int, source: int, nbytes: int) -> None:
        if nbytes:
            with self.calls(f"copying {nbytes:,} bytes on the device"):
                cuda.memcpy_dtod_async(to, source, nbytes, self._stream)

    def forget(self, address: int, nbytes: int) -> None:
        """Nothing to do."""

    # ------------------------------------------------------------------ work

    def load(self, ptx: str) -> PycudaModule:
        return PycudaModule(self, ptx)

    def launch(
        self,
        function: base.Function,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument],
        *,
        shared: int = 0,
        extents: Sequence[Extent] | None = None,
        stream: int = 0,
    ) -> None:
        if not isinstance(function, PycudaFunction):
            raise LaunchError(f"{function!r} was not loaded by this device")
        pack_arguments(function.signature, arguments)  # refuses what does not fit, as the emulator does
        values = [a.item() if isinstance(a, np.generic) else a for a in arguments]
        g, b = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        with self.calls(f"launching {function.signature.name} on a grid of {tuple(g)} blocks of {tuple(b)} threads"):
            if shared > function.shared_limit:
                function.handle.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
                function.shared_limit = shared
            function.handle.prepared_async_call(g, b, self._at(stream), *values, shared_size=shared)

    def synchronize(self) -> None:
        with self.calls("waiting for the device"):
            for s in self._streams:
                s.synchronize()

    def _at(self, stream: int) -> Any:
        while len(self._streams) <= stream:
            self._streams.append(cuda.Stream())
        return self._streams[stream]

    def record(self, stream: int) -> PycudaEvent:
        with self.calls("recording an event"):
            made = cuda.Event(cuda.event_flags.DISABLE_TIMING)
            made.record(self._at(stream))
        return PycudaEvent(made)

    def wait(self, stream: int, event: base.Event) -> None:
        if not isinstance(event, PycudaEvent):
            raise DeviceError(f"{event!r} was not recorded by this device")
        with self.calls("waiting for an event"):
            self._at(stream).wait_for_event(event.handle)

    def join(self, event: base.Event) -> None:
        if not isinstance(event, PycudaEvent):
            raise DeviceError(f"{event!r} was not recorded by this device")
        with self.calls("waiting for the device"):
            event.handle.synchronize()

    def wait_for(self, stream: int) -> None:
        self._order(ctypes.c_void_p(stream), self.stream_handle)

    def let_wait(self, stream: int) -> None:
        self._order(self.stream_handle, ctypes.c_void_p(stream))

    def _order(self, first: ctypes.c_void_p, then: ctypes.c_void_p) -> None:
        """Makes a stream wait for what another has to do by now."""
        event = ctypes.c_void_p()
        with self.calls("ordering two streams"):
            self.check("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_NO_TIMING))
            try:
                self.check("cuEventRecord", event, first)
                self.check("cuStreamWaitEvent", then, event, ctypes.c_uint(0))
            finally:
                self.check("cuEventDestroy_v2", event)  # the driver keeps it until it has happened

    def capture(self, work: Callable[[], None]) -> PycudaGraph:
        with self.calls("capturing a graph"):
            self._at(ALL - 1)  # all there are: none is made while calls are captured
            graph = ctypes.c_void_p()
            self.check("cuStreamBeginCapture_v2", self.stream_handle, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
            try:
                work()
            finally:
                self.check("cuStreamEndCapture", self.stream_handle, ctypes.byref(graph))
            return PycudaGraph(self, graph)
