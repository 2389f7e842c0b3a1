"""Arrays on a device, in and out: our own, and those of other libraries through `__cuda_array_interface__` and DLPack.

What another library lends is copied on the device into the program's own memory, after what that library's stream had to do;
the call waits for the copy, so that the lender may do with its memory what it likes afterwards. Results that stay on the device
are new arrays; who takes them is told our stream (version 3 of the interface), or its stream waits for ours (DLPack).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ...ir.dtypes import DType, as_dtype
from ...ir.errors import DeviceError, DTypeError, InputError
from ...ir.types import TensorType
from ..buffers import Array
from .device import Device
from .dlpack import CPU, CUDA, Loan, lend

_LEGACY: Final = 1  # CUDA's default stream, as both protocols number it
_NO_WAIT: Final = -1  # DLPack: the borrower needs no order


class DeviceArray:
    """A C-contiguous array in a device's memory, which goes with it. `numpy()` copies it to the host."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: DType) -> None:
        """Unwritten memory. Raises DeviceMemoryError."""
        self.device, self.shape, self.kind = device, tuple(shape), dtype
        self.address = device.allocate(max(self.nbytes, 1), "an array")

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.kind.numpy

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.kind.itemsize

    def numpy(self) -> Array:
        """A copy on the host."""
        found = np.empty(self.shape, self.dtype)
        self.device.download(self.address, found)
        return found

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.isbuiltin != 1:
            raise AttributeError(f"{self.dtype} has no name in __cuda_array_interface__; DLPack has one")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.device.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for a borrower whose stream (None: CUDA's default one; -1: it needs no order) waits for ours."""
        if dl_device not in (None, self.device.dlpack) or copy:
            raise BufferError("it is lent as it lies: no copy, no other device; numpy() copies it to the host")
        if stream != _NO_WAIT:
            self.device.let_wait(stream or _LEGACY)
        return lend(self, self.device.host_address(self.address), self.shape, self.kind, self.device.dlpack)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with contextlib.suppress(DeviceError):  # its context is lost or the process ends: the memory has gone with it
                self.device.free(self.address)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.kind.name}{list(self.shape)} on {self.device.name}>"


class Borrowed:
    """An array on the device that a caller gave: `value` is what was given; `loan` keeps it there."""

    def __init__(
        self, value: Any, address: int, shape: tuple[int, ...], dtype: DType, *, stream: int | None, writable: bool, loan: Any
    ) -> None:
        self.value, self.address, self.shape, self.kind = value, address, shape, dtype
        self.stream, self.writable, self.loan = stream, writable, loan
        self.ndim, self.dtype = len(shape), dtype.numpy
        self.nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize

    @property
    def described(self) -> str:
        """As `buffers.describe` writes arrays."""
        return f"{self.kind.name}[{', '.join(map(str, self.shape))}] on the device"

    @property
    def foreign(self) -> bool:
        """Whether another library may free or reuse the memory."""
        return not isinstance(self.value, DeviceArray)


def borrow(value: Any, device: Callable[[], Device], where: Callable[[], str]) -> Borrowed | None:
    """An argument that lies on the device; None for one of the host. `device` opens it, if it is needed.

    Raises InputError for an array on another device, not contiguous, masked, or that its library does not give.
    """
    if isinstance(value, np.ndarray | np.generic | int | float):
        return None
    if isinstance(value, DeviceArray):
        if value.device is not device():
            raise InputError(f"{where()}: {value!r} is not on this program's device; pass its numpy()")
        return Borrowed(value, value.address, value.shape, value.kind, stream=None, writable=True, loan=value)
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is not None:
            return _by_interface(value, interface, where)
        if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] in CUDA:
            return _by_dlpack(value, device(), where)
    except (BufferError, RuntimeError, TypeError, ValueError, KeyError, DTypeError) as error:
        if isinstance(error, InputError):
            raise
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        advice = "pass an array that is detached from its gradient, of a dtype that numpy knows"
        raise InputError(f"{where()}: cannot take a {kind} from the device: {error}; {advice}") from error
    return None


def _by_interface(value: Any, interface: dict[str, Any], where: Callable[[], str]) -> Borrowed:
    shape = tuple(int(n) for n in interface["shape"])
    dtype = as_dtype(np.dtype(interface["typestr"]))
    if interface.get("mask") is not None:
        raise InputError(f"{where()}: an array with a mask cannot be taken; fill it first")
    _contiguous(shape, interface.get("strides"), dtype.itemsize, where)
    address, read_only = interface["data"]
    stream = interface.get("stream")
    if stream == 0:
        raise InputError(f"{where()}: __cuda_array_interface__ has stream 0, which its definition does not allow")
    return Borrowed(value, int(address), shape, dtype, stream=stream, writable=not read_only, loan=value)


def _by_dlpack(value: Any, device: Device, where: Callable[[], str]) -> Borrowed:
    kind, number = value.__dlpack_device__()
    if device.dlpack[0] == CPU or (kind == CUDA[0] and (kind, number) != device.dlpack):
        raise InputError(f"{where()}: it is on CUDA device {number}, the program on {device.name}; copy it there, or to the host")
    loan = Loan(value.__dlpack__(stream=device.stream))  # the lender makes our stream wait
    strides = None if loan.strides is None else tuple(s * loan.dtype.itemsize for s in loan.strides)
    _contiguous(loan.shape, strides, loan.dtype.itemsize, where)
    return Borrowed(value, loan.address, loan.shape, loan.dtype, stream=None, writable=True, loan=loan)


def _contiguous(shape: tuple[int, ...], strides: Sequence[int] | None, itemsize: int, where: Callable[[], str]) -> None:
    if strides is None or 0 in shape:
        return
    wanted, step = [], itemsize
    for n in reversed(shape):
        wanted.append(step)
        step *= n
    if any(n > 1 and s != w for n, s, w in zip(shape, strides, reversed(wanted), strict=True)):
        raise InputError(
            f"{where()}: an array on the device must be C-contiguous, got shape {shape} with strides {tuple(strides)}"
        )


def check_type(found: Borrowed, expected: TensorType, where: Callable[[], str]) -> None:
    """Raises InputError for another dtype: nothing is converted silently."""
    if found.kind is not expected.dtype:
        raise InputError(f"{where()}: expected {expected}, got {found.described}; convert it on the device first")


__all__ = ["Borrowed", "DeviceArray", "borrow", "check_type"]
