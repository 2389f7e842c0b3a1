"""Where workers run: the fork of `codegen/llvm/placement.py`, which keeps them off the core of the thread that calls them.

Only for workers of an OpenMP runtime that we loaded: others' threads are not ours to place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import ClassVar

from ..ir.program import PLACEMENT_CALLS
from . import openmp
from .native import NativeProgram

Code = Callable[[], tuple[bytes, str]]

_code: list[Code] = []


def offer(code: Code) -> None:
    """Tells the process where the object code and its function's name come from; asked once, when threads are first needed."""
    if not _code:
        _code.append(code)


@functools.cache
def fork() -> int:
    """The address of the fork to use: one that places workers where that is possible, else OpenMP's own."""
    found = openmp.runtime()
    addresses = _addresses(found) if _code and found.ours and sys.platform.startswith("linux") else None
    return found.fork if addresses is None else _Placed(addresses).address


def _addresses(found: openmp.OpenMP) -> tuple[int, ...] | None:
    """Of the functions that it calls; None where one is missing."""
    libraries = (ctypes.CDLL(found.path), ctypes.CDLL(None))
    made = []
    for name in PLACEMENT_CALLS:
        library = next((x for x in libraries if hasattr(x, name)), None)
        if library is None:
            return None
        made.append(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
    return tuple(made)


class _Placed:
    """The loaded code, for as long as the process lives."""

    _kept: ClassVar[list[_Placed]] = []

    def __init__(self, addresses: tuple[int, ...]) -> None:
        self._native = NativeProgram(*_code[0]())
        self._functions = (ctypes.c_void_p * len(addresses))(*addresses)
        self._out = ctypes.c_void_p()
        self.forget()
        self._kept.append(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)  # the workers did not come along

    def forget(self) -> None:
        """Gives the code its functions; it knows no workers then."""
        self._native.run(ctypes.addressof(self._functions), ctypes.addressof(self._out), None)

    @property
    def address(self) -> int:
        return self._out.value or 0
