"""What runs CUDA programs: one interface over a real GPU (pycuda) and the emulator.

Addresses are plain integers. Copies on the device and replays go to stream 0 in the order of the calls, launches and copies from
and to the host to the stream that they name; streams are ordered among each other by events alone. A download that names none
waits for what was asked of stream 0 before it, `join` for an event, and `synchronize` for everything. Errors are ours
(ir/errors.py): DeviceMemoryError where memory runs out, LaunchError for a launch that cannot be or that failed, DeviceLostError
afterwards, where the context is gone.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...ir.errors import DeviceError, LaunchError
from .ptx_types import TYPES
from .state import Extent

__all__ = ["Device", "Event", "Extent", "Function", "Graph", "Module", "Signature", "pack_arguments", "signatures"]

Array = np.ndarray[Any, Any]
Argument = int | float | np.generic
_FORMAT: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters: (type, bytes) each."""

    name: str
    params: tuple[tuple[str, int], ...]

    @property
    def format(self) -> str:
        """The struct format of an argument buffer, at native alignment; it is PTX's layout for scalars."""
        return "@" + "".join(_char(t) for t, _ in self.params)


def _char(name: str) -> str:
    t = TYPES[name]
    if t.kind == "f":
        return {2: "e", 4: "f", 8: "d"}[t.size]
    return _FORMAT[t.size].lower() if t.kind == "s" else _FORMAT[t.size]


_ENTRY: Final = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?\s*(?=[.{])", re.S)
_PARAM: Final = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\[]*(\[\d+\])?")


def signatures(ptx: str) -> dict[str, Signature]:
    """The entries of PTX text and what they take, without parsing their bodies. Raises LaunchError for array parameters."""
    found = {}
    for m in _ENTRY.finditer(re.sub(r"//[^\n]*", "", ptx)):
        params = _PARAM.findall(m[2] or "")
        if any(count for _, count in params):
            raise LaunchError(f"kernel {m[1]} takes a structure: only numbers and pointers can be passed")
        found[m[1]] = Signature(m[1], tuple((t, TYPES[t].size) for t, _ in params))
    return found


def pack_arguments(signature: Signature, arguments: Sequence[Argument]) -> bytes:
    """The argument buffer of a launch. Raises LaunchError for a wrong count, a number of another size, or one out of range.

    Python numbers take the parameter's type; numpy scalars must have its size, so that a float64 is not passed for an f32.
    """
    wanted = ", ".join(f".{t}" for t, _ in signature.params)
    if len(arguments) != len(signature.params):
        raise LaunchError(f"kernel {signature.name} takes {len(signature.params)} arguments ({wanted}), got {len(arguments)}")
    values: list[int | float] = []
    for k, (a, (t, size)) in enumerate(zip(arguments, signature.params, strict=True)):
        if isinstance(a, np.generic):
            if a.dtype.itemsize != size or (a.dtype.kind == "f") != (TYPES[t].kind == "f"):
                given = f"a {a.dtype} of {a.dtype.itemsize} bytes"
                raise LaunchError(f"kernel {signature.name}: argument {k} is {given}, the parameter .{t} has {size}")
            a = a.item()
        if isinstance(a, float) and TYPES[t].kind != "f":
            raise LaunchError(f"kernel {signature.name}: argument {k} is the float {a}, the parameter is .{t}")
        values.append(a)
    try:
        return struct.pack(signature.format, *values)
    except (struct.error, OverflowError) as error:
        raise LaunchError(f"kernel {signature.name} takes ({wanted}), got {tuple(values)}: {error}") from error


class Function(ABC):
    """A kernel that is loaded."""

    signature: Signature


class Module(ABC):
    """A loaded PTX module."""

    @abstractmethod
    def function(self, name: str) -> Function:
        """Raises LaunchError where the module has no such kernel."""

    @abstractmethod
    def unload(self) -> None: ...


class Graph(ABC):
    """Launches and copies that were captured."""

    @abstractmethod
    def replay(self) -> None: ...


class Event:
    """A moment of a stream."""


class Device(ABC):
    """A device. `name` describes it, `sm` is its compute capability as 80 for 8.0, `total` its memory in bytes. `stream` is the
    handle of its stream for other libraries (None: nothing runs later than it is asked for), `dlpack` its DLPack device."""

    name: str
    sm: int
    total: int
    stream: int | None = None
    dlpack: tuple[int, int]

    @abstractmethod
    def allocate(self, nbytes: int, name: str = "") -> int:
        """The address of `nbytes` bytes, a multiple of 256. Raises DeviceMemoryError."""

    @abstractmethod
    def free(self, address: int) -> None: ...

    @abstractmethod
    def staging(self, nbytes: int) -> Array:
        """Bytes of the host that copies run from and to while the host goes on: page-locked memory, which goes with the array."""

    @abstractmethod
    def upload(self, address: int, array: Array, stream: int = 0) -> None:
        """Copies a C-contiguous array to the device. It must not change until that has been waited for."""

    @abstractmethod
    def download(self, address: int, array: Array, stream: int | None = None) -> None:
        """Copies from the device into a C-contiguous array, and waits until it is there. With a stream it only asks for it: then
        the array must be of `staging`, and holds the copy once that has been waited for."""

    @abstractmethod
    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copies between two places of the device."""

    @abstractmethod
    def load(self, ptx: str) -> Module:
        """Raises DeviceError where the device cannot take the text."""

    @abstractmethod
    def launch(
        self,
        function: Function,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument],
        *,
        shared: int = 0,
        extents: Sequence[Extent] | None = None,
        stream: int = 0,
    ) -> None:
        """Starts a kernel with `shared` bytes of dynamic shared memory. `extents` say which memory it may touch: the emulator
        checks that, and that launches on different streams that touch the same bytes are ordered. Raises LaunchError."""

    @abstractmethod
    def record(self, stream: int) -> Event:
        """What a stream was asked for so far, as something to wait for."""

    @abstractmethod
    def wait(self, stream: int, event: Event) -> None:
        """What a stream is asked for from now on begins after the event."""

    @abstractmethod
    def join(self, event: Event) -> None:
        """The host waits for an event. Raises LaunchError where a kernel before it failed."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for everything. Raises LaunchError where a kernel failed meanwhile."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` asks of the device, as one thing to replay; it does not run now."""

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """What is asked for next waits for what another library's stream (1 and 2: CUDA's default ones) has to do by now."""

    @abstractmethod
    def let_wait(self, stream: int) -> None:
        """What another library asks of its stream next waits for what was asked for here by now."""

    def host_address(self, address: int) -> int:
        """The address as other libraries of the process know it."""
        return address

    @abstractmethod
    def forget(self, address: int, nbytes: int) -> None:
        """Says that nobody needs what these bytes hold. The emulator then watches that nobody reads them before they are
        written; a GPU does nothing."""


def check_buffer(array: Array, what: str) -> None:
    """Raises DeviceError for an array that cannot be copied as one stretch of bytes."""
    if not array.flags.c_contiguous:
        raise DeviceError(f"{what} needs a C-contiguous array, got shape {array.shape} with strides {array.strides}")
