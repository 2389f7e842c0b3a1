"""The part of `pycuda.driver` that runtime/cuda/pycuda_device.py uses, over ctypes: for machines where pycuda is not built.

It shows that our side of the host path holds, not that pycuda does; test_pycuda.py runs both where it can.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import types
from typing import Any

import numpy as np


class Error(Exception):
    pass


class MemoryError(Error):  # pycuda's names
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


LIBRARY: Any = None


def check(name: str, *arguments: Any) -> None:
    """A call, with pycuda's kinds of errors and its messages."""
    status = getattr(LIBRARY, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        LIBRARY.cuGetErrorString(status, ctypes.byref(text))
        kind = {2: MemoryError, 701: LaunchError, 702: LaunchError, 719: LaunchError}.get(status, LogicError)
        raise kind(f"{name} failed: {(text.value or b'').decode()}")


def init() -> None:
    check("cuInit", 0)


class _Context:
    def push(self) -> None:
        Context.depth += 1

    def __repr__(self) -> str:
        return "<context>"


class Context:
    depth = 0

    @staticmethod
    def pop() -> None:
        Context.depth -= 1
        assert Context.depth >= 0, "pop without push"


class Device:
    def __init__(self, number: int) -> None:
        check("cuDeviceGet", ctypes.byref(ctypes.c_int()), number)

    def name(self) -> str:
        text = ctypes.create_string_buffer(100)
        check("cuDeviceGetName", text, 100, 0)
        return text.value.decode()

    def compute_capability(self) -> tuple[int, int]:
        a, b = ctypes.c_int(), ctypes.c_int()
        check("cuDeviceComputeCapability", ctypes.byref(a), ctypes.byref(b), 0)
        return a.value, b.value

    def total_memory(self) -> int:
        n = ctypes.c_size_t()
        check("cuDeviceTotalMem_v2", ctypes.byref(n), 0)
        return n.value

    def retain_primary_context(self) -> _Context:
        return _Context()


def _current() -> None:
    if not Context.depth:
        raise LogicError("no context is current")


class Stream:
    def __init__(self) -> None:
        _current()
        made = ctypes.c_void_p()
        check("cuStreamCreate", ctypes.byref(made), 0)
        self.handle = made.value

    def synchronize(self) -> None:
        _current()
        check("cuStreamSynchronize", ctypes.c_void_p(self.handle))

    def wait_for_event(self, event: Event) -> None:
        _current()
        check("cuStreamWaitEvent", ctypes.c_void_p(self.handle), ctypes.c_void_p(event.handle), 0)


class event_flags:  # pycuda's name
    DISABLE_TIMING = 2


class Event:
    def __init__(self, flags: int = 0) -> None:
        _current()
        made = ctypes.c_void_p()
        check("cuEventCreate", ctypes.byref(made), flags)
        self.handle = made.value

    def record(self, stream: Stream) -> None:
        _current()
        check("cuEventRecord", ctypes.c_void_p(self.handle), ctypes.c_void_p(stream.handle))

    def synchronize(self) -> None:
        check("cuEventSynchronize", ctypes.c_void_p(self.handle))


class _Locked:
    """Page-locked memory, freed with the last array of it."""

    def __init__(self, nbytes: int) -> None:
        _current()
        self.address = ctypes.c_void_p()
        check("cuMemHostAlloc", ctypes.byref(self.address), ctypes.c_size_t(nbytes), 0)
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (self.address.value, False), "version": 3}

    def __del__(self) -> None:
        LIBRARY.cuMemFreeHost(self.address)


def pagelocked_empty(shape: int, dtype: Any) -> Any:
    return np.asarray(_Locked(shape)).view(dtype)


class Allocation:
    def __init__(self, address: int) -> None:
        self.address = address

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        check("cuMemFree_v2", ctypes.c_uint64(self.address))


def mem_alloc(nbytes: int) -> Allocation:
    _current()
    p = ctypes.c_uint64()
    check("cuMemAlloc_v2", ctypes.byref(p), ctypes.c_size_t(nbytes))
    return Allocation(p.value)


def _at(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def memcpy_htod_async(to: int, array: Any, stream: Stream) -> None:
    check("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to), _at(array), ctypes.c_size_t(array.nbytes), ctypes.c_void_p(stream.handle))


def memcpy_dtoh_async(array: Any, source: int, stream: Stream) -> None:
    check(
        "cuMemcpyDtoHAsync_v2", _at(array), ctypes.c_uint64(source), ctypes.c_size_t(array.nbytes), ctypes.c_void_p(stream.handle)
    )


def memcpy_dtod_async(to: int, source: int, nbytes: int, stream: Stream) -> None:
    check("cuMemcpyDtoDAsync_v2", *(ctypes.c_uint64(v) for v in (to, source, nbytes)), ctypes.c_void_p(stream.handle))


class _Module:
    def __init__(self, text: bytes) -> None:
        self.handle = ctypes.c_void_p()
        check("cuModuleLoadDataEx", ctypes.byref(self.handle), text, 0, None, None)

    def get_function(self, name: str) -> _Function:
        made = ctypes.c_void_p()
        check("cuModuleGetFunction", ctypes.byref(made), self.handle, name.encode())
        return _Function(made)


class _Function:
    def __init__(self, handle: ctypes.c_void_p) -> None:
        self.handle, self.format = handle, ""

    def prepare(self, kinds: str) -> None:
        self.format = "".join(kinds)

    def set_attribute(self, what: int, value: int) -> None:
        check("cuFuncSetAttribute", self.handle, what, value)

    def prepared_async_call(self, grid: Any, block: Any, stream: Stream, *values: Any, shared_size: int = 0) -> None:
        data = struct.pack(self.format, *values)
        buffer, size = ctypes.create_string_buffer(data, len(data)), ctypes.c_size_t(len(data))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        shape = (ctypes.c_uint(v) for v in (*grid, *block, shared_size))
        check("cuLaunchKernel", self.handle, *shape, ctypes.c_void_p(stream.handle), None, extra)


def module_from_buffer(text: bytes) -> _Module:
    return _Module(text)


class function_attribute:  # pycuda's name
    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


def install(library: str) -> None:
    """Makes `import pycuda.driver` find this module."""
    globals()["LIBRARY"] = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    package = types.ModuleType("pycuda")
    package.__spec__ = types.SimpleNamespace(name="pycuda", loader=None, submodule_search_locations=[])  # type: ignore[assignment]  # as importlib asks
    package.driver = sys.modules[__name__]  # type: ignore[attr-defined]  # the module's own attribute
    sys.modules["pycuda"], sys.modules["pycuda.driver"] = package, sys.modules[__name__]
