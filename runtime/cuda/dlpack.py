"""DLPack capsules by ctypes: lending memory of a device to other libraries, and borrowing theirs.

The structures are those of DLPack 0.8 (`dltensor` capsules), which every library still takes and gives unless it is asked for
others. Who lends keeps the owner until the borrower calls the deleter; who borrows calls it when done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ...ir.dtypes import DType, as_dtype, bf16

CPU: Final = 1
CUDA: Final = (2, 13)  # a device's memory, and managed memory
_FRESH, _USED = b"dltensor", b"used_dltensor"
_KINDS: Final = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_BF16: Final = 4


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_DELETER: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lent: dict[int, tuple[Any, ...]] = {}  # what a borrower still uses, by the address of its structure

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
# a capsule that is being destroyed must not become a Python object again: its address is all that is passed on
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_raw_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


@_DELETER
def _returned(managed: int) -> None:
    _lent.pop(managed, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _dropped(capsule: int) -> None:
    if _is_valid(capsule, _FRESH):  # nobody took it
        _lent.pop(int(_raw_pointer(capsule, _FRESH)), None)


def lend(owner: object, address: int, shape: Sequence[int], dtype: DType, device: tuple[int, int]) -> Any:
    """A capsule of C-contiguous memory; `owner` lives until the borrower is done."""
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    code = _BF16 if dtype is bf16 else _KINDS[dtype.numpy.kind]
    managed = _Managed()
    managed.tensor = _Tensor(
        address,
        _Device(*device),
        len(shape),
        _Type(code, 8 * dtype.itemsize, 1),
        ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
    )
    managed.deleter = ctypes.cast(_returned, ctypes.c_void_p)
    at = ctypes.addressof(managed)
    _lent[at] = managed, sizes, owner
    return _new(at, _FRESH, ctypes.cast(_dropped, ctypes.c_void_p))


class Loan:
    """Memory of another library, from a capsule: `address`, `shape`, `dtype`, `device`; `strides` in elements, or None.

    Raises BufferError for a capsule that was taken before, or a dtype that no array here has.
    """

    def __init__(self, capsule: Any) -> None:
        self._at = 0
        try:
            at = int(_pointer(capsule, _FRESH))
        except ValueError as error:
            raise BufferError(f"it gives no fresh DLPack capsule: {error}") from error
        managed = _Managed.from_address(at)
        t = managed.tensor
        kind = {v: k for k, v in _KINDS.items()}.get(t.dtype.code)
        if t.dtype.lanes != 1 or (kind is None and t.dtype.code != _BF16):
            raise BufferError(f"its DLPack dtype (code {t.dtype.code}, {t.dtype.bits} bits, {t.dtype.lanes} lanes) is not known")
        self.dtype: DType = bf16 if kind is None else as_dtype(np.dtype(f"{kind}{max(t.dtype.bits // 8, 1)}"))
        self.shape = tuple(t.shape[k] for k in range(t.ndim))
        self.strides = tuple(t.strides[k] for k in range(t.ndim)) if t.strides else None
        self.address = (t.data or 0) + t.byte_offset
        self.device = (t.device.type, t.device.id)
        _rename(capsule, _USED)
        self._at = at

    def __del__(self) -> None:
        if self._at:
            managed, self._at = _Managed.from_address(self._at), 0
            if managed.deleter:
                _DELETER(managed.deleter)(ctypes.addressof(managed))


__all__ = ["CPU", "CUDA", "Loan", "lend"]
