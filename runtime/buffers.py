"""Memory that native code works on: aligned arrays, addresses of arrays, and what a caller may pass in as one."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..ir.dtypes import DType, as_dtype
from ..ir.errors import DTypeError, InputError, TensorwrightError
from ..ir.types import TensorType

Array = np.ndarray[Any, Any]
ALIGN: Final = 64
_HUGE: Final = 4 * 1024 * 1024  # from this size on, ask for huge pages: a fresh 64 MB array costs 16,000 faults without
_PAGE: Final = 2 * 1024 * 1024  # a huge page


class OutOfMemoryError(TensorwrightError, MemoryError):
    """A buffer that the system has no memory for; `Executable.peak_bytes` tells the need before a run."""


def _private(nbytes: int) -> mmap.mmap:
    """Anonymous memory. Python maps it shared by default, and shared memory gets no huge pages."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def block(nbytes: int, align: int = ALIGN, *, huge: bool = True) -> tuple[Any, int]:
    """Zeroed memory as (owner, address of its first aligned byte). The owner exports a writable buffer.

    A large block is made of huge pages where the system has them, unless `huge` is False. It then begins with one: of 4 MB that
    begin anywhere, half would be small pages.
    Raises OutOfMemoryError when the system does not give that much.
    """
    if nbytes >= _HUGE:
        try:
            align = max(align, _PAGE) if huge else align
            owner: Any = _private(nbytes + align)
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(
                f"the model needs a block of {nbytes:,} bytes, which the system does not give: {error}"
            ) from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            owner.madvise(mmap.MADV_HUGEPAGE, -base % align, nbytes // _PAGE * _PAGE)  # the rest would be a whole page, too
    else:
        owner = (ctypes.c_char * (nbytes + align))()
        base = ctypes.addressof(owner)
    return owner, base + -base % align


def empty(shape: Sequence[int], dtype: DType, align: int = ALIGN) -> Array:
    """A C-contiguous array whose first element is aligned (zeroed).

    Its `base` is not an ndarray: numpy then makes it, and not the memory below, the base of every view of it, so that a
    view keeps the array's own reference count up.
    """
    count = int(np.prod(shape, dtype=object))
    owner, address = block(count * dtype.itemsize, align)
    base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    return np.ndarray(tuple(shape), dtype.numpy, buffer=owner, offset=address - base)


def empties(types: Sequence[TensorType], align: int = ALIGN) -> list[Array]:
    """As `empty` for each type, in one block, which is not zeroed twice as many small ones are; on ordinary pages, unless
    `pages.make_present` finds huge ones."""
    sizes = [-(-t.nbytes // align) * align for t in types]
    owner, address = block(sum(sizes), align, huge=False)
    at = address - ctypes.addressof(ctypes.c_char.from_buffer(owner))
    made: list[Array] = []
    for t, size in zip(types, sizes, strict=True):
        made.append(np.ndarray(t.static_shape, t.dtype.numpy, buffer=owner, offset=at))
        at += size
    return made


def aligned_copy(array: Array, align: int = ALIGN) -> Array:
    """A C-contiguous, aligned copy in native byte order."""
    copy = empty(array.shape, as_dtype(array.dtype), align)
    np.copyto(copy, array)
    return copy


def address_of(array: Array) -> int:
    """The address of element 0, for any ndarray: read-only, empty, or of a dtype without a buffer format."""
    return int(array.__array_interface__["data"][0])


def describe(value: object) -> str:
    """What the caller passed, for an error message: 'f32[3, 4]', or the Python type."""
    if not isinstance(value, np.ndarray):
        if isinstance(text := getattr(value, "described", None), str):
            return text  # an array on a device
        return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
    try:
        name = as_dtype(value.dtype).name
    except DTypeError:
        name = str(value.dtype)
    if not value.dtype.isnative:
        name += " in foreign byte order"
    return f"{name}[{', '.join(map(str, value.shape))}]"


def as_array(value: object, expected: TensorType, where: Callable[[], str]) -> Array:
    """The caller's argument as an ndarray of the expected dtype (its shape is not looked at here).

    Takes ndarrays, numpy scalars, whatever has `__dlpack__` on the CPU (no copy), and Python numbers where a 0-d array is
    expected. Raises InputError otherwise, and for another dtype: nothing is converted silently.
    """
    if isinstance(value, np.ndarray):
        array: Array = value
    elif isinstance(value, np.generic):
        array = np.asarray(value)
    elif isinstance(value, (bool, int, float)) and expected.rank == 0:
        return _number(value, expected.dtype, where)
    elif hasattr(value, "__dlpack__"):
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{where()}: cannot take {describe(value)} through __dlpack__: {error}; expected {expected}: pass a numpy "
                "array, or a tensor on the CPU that is detached from its gradient"
            ) from error
    else:
        raise InputError(
            f"{where()}: expected {expected} as a numpy array or an object with __dlpack__, got {describe(value)}; "
            f"use np.asarray(x, np.{expected.dtype.numpy.name})"
        )
    if array.dtype != expected.dtype.numpy:
        raise InputError(
            f"{where()}: expected {expected}, got {describe(array)}; convert it with x.astype({_spelled(expected.dtype)})"
        )
    return array


def _spelled(dtype: DType) -> str:
    return f"np.{dtype.numpy.name}" if dtype.numpy.isbuiltin == 1 else f"ml_dtypes.{dtype.numpy.name}"


def _number(value: bool | int | float, dtype: DType, where: Callable[[], str]) -> Array:
    fits = isinstance(value, bool) if dtype.kind == "bool" else not isinstance(value, bool)
    if fits and (dtype.is_float or isinstance(value, int)):
        try:
            return np.array(value, dtype.numpy)
        except OverflowError:
            pass  # an integer outside the dtype's range: the error below says so
    raise InputError(f"{where()}: expected a {dtype.name} scalar, got {value!r}")
