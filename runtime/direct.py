"""Calls without Python's overhead: a builtin function made of native code that checks arrays and runs a program.

The native code (`codegen/llvm/callpath.py`) reads array objects as numpy's C interface lays them out, and counts references
as CPython does. Where either differs (another Python, one without the global lock, a numpy that a probe shows to differ),
there is no direct path and calls go through `Binding`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..ir.program import CallTable
from ..ir.types import TensorType
from .buffers import Array, address_of
from .native import NativeProgram

MARK: Final = object()  # stands after a given output in a direct call
_FASTCALL: Final = 0x0080
_FIELDS: Final = struct.Struct("=qqqiiqqqqi")  # count, type, data, rank, padding, dimensions, strides, base, dtype, flags


class _Table(np.ndarray[Any, Any]):
    """The words of one program, and what their addresses point to."""

    keep: object


class _Method(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


@functools.cache
def supported() -> bool:
    """Whether this Python and this numpy are laid out as the native code expects."""
    plain = sys.implementation.name == "cpython" and sys.maxsize > 2**32 and sys.byteorder == "little"
    if not plain or sysconfig.get_config_var("Py_GIL_DISABLED") or sysconfig.get_config_var("Py_TRACE_REFS"):
        return False
    if hasattr(sys, "gettotalrefcount"):  # a debug build checks the counts of threads that we do not tell it of
        return False
    probe = np.zeros((2, 3), np.float32)
    count, kind, data, rank, _, dims, _, _, dtype, flags = _FIELDS.unpack(ctypes.string_at(id(probe), _FIELDS.size))
    if kind != id(np.ndarray) or data != address_of(probe) or rank != 2 or dtype != id(probe.dtype):
        return False
    shape = struct.unpack("=qq", ctypes.string_at(dims, 16))
    return count & 0xFFFFFFFF == 1 and shape == (2, 3) and flags & 1281 == 1281 and probe.flags.num == flags


_lock = threading.Lock()
_loaded: list[Direct] = []


def direct(code: Callable[[], tuple[bytes, str]]) -> Direct:
    """The process's native function; `code` gives its object code and name, and is asked once."""
    with _lock:
        if not _loaded:
            _loaded.append(Direct(*code()))
        return _loaded[0]


class Direct:
    """The native function, loaded once per process, and the definition of it that Python's functions share."""

    def __init__(self, object_code: bytes, entry: str) -> None:
        self._native = NativeProgram(object_code, entry)
        self._method = _Method(b"tensorwright_call", self._native.address, _FASTCALL, None)
        api = ctypes.pythonapi
        self._make = api.PyCFunction_NewEx
        self._make.restype, self._make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        names = {"incref": "Py_IncRef", "decref": "Py_DecRef", "save": "PyEval_SaveThread", "restore": "PyEval_RestoreThread"}
        self._functions = {k: ctypes.cast(getattr(api, n), ctypes.c_void_p).value or 0 for k, n in names.items()}

    def function(
        self,
        run: int,
        frame: int,
        context: int,
        arguments: Sequence[tuple[TensorType, int]],
        output: tuple[TensorType, int, int],
        outputs: Sequence[Array],
        keep: object,
    ) -> Callable[..., Any] | None:
        """A function of the argument arrays (and, after them, an output array and MARK) that gives the output, or None where
        something is not exactly as expected.

        `run`, `frame` and `context` are addresses. `arguments` are types and places in the frame, `output` likewise, with
        what its address must be a multiple of; `outputs` are arrays that nobody else holds. `keep` lives as long as the function.
        None if a type is not one that the table can describe.
        """
        types = [*arguments, output[:2]]
        if any(t.rank > CallTable.MAX_RANK for t, _ in types):
            return None
        table = np.zeros(CallTable.ARGUMENTS + CallTable.STRIDE * len(types), np.int64).view(_Table)
        words = dict(self._functions)
        words |= {"n": len(arguments), "alignment": max(output[2], 1) - 1, "run": run, "frame": frame, "context": context}
        words |= {"ndarray": id(np.ndarray), "nothing": id(None), "sentinel": id(MARK)}
        for name, value in words.items():
            table[CallTable.WORDS.index(name)] = value
        for k, array in enumerate(outputs[: CallTable.RING_SIZE]):
            at = CallTable.RING + 2 * k
            table[at : at + 2] = id(array), address_of(array)
        for k, (t, slot) in enumerate(types):
            at = CallTable.ARGUMENTS + CallTable.STRIDE * k
            table[at : at + 4] = id(t.dtype.numpy), t.rank, slot, t.nbytes
            table[at + 4 : at + 4 + t.rank] = t.static_shape
        table.keep = (keep, tuple(outputs), [t.dtype.numpy for t, _ in types], self)
        made: Callable[..., Any] = self._make(ctypes.addressof(self._method), table, None)
        return made
