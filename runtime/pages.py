"""Huge pages for prepared weights, made in the course of calls.

They spare translations for as long as the weights are read: a matrix-vector product of 4096 x 4096 took 1.2 ms on small pages and
0.8 on huge ones. But 340 MB of them took anything from 30 to 860 ms on a virtual machine, because the system may have to move
memory first, and it does that by itself only at some 2 MB a second. So weights are prepared on small pages, and these are made
huge one at a time after calls, at a small share of the calls' time.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import time
from collections.abc import Sequence
from typing import Any, Final

from .buffers import Array

_COLLAPSE: Final = 25  # MADV_COLLAPSE, Linux 6.1
_HUGE: Final = 2 * 1024 * 1024
_SHARE: Final = 0.1  # of the time of calls that may go into making huge pages
_DELAY: Final = 0.25  # seconds of calls before the first: a program that is run once does not need them


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


class Settling:
    """Makes the pages of one block of weights huge, one at a time, between calls. `done` once none is left."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        owner = arrays[0].base if arrays else None
        self._left: list[int] = []
        self._budget = -_SHARE * _DELAY
        self._owner = owner
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_HUGEPAGE"):
            base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
            _madvise()(base // mmap.PAGESIZE * mmap.PAGESIZE, len(owner), mmap.MADV_HUGEPAGE)
            self._left = list(range(-(-base // _HUGE) * _HUGE, base + len(owner) - _HUGE + 1, _HUGE))
            self._left.reverse()

    @property
    def done(self) -> bool:
        return not self._left

    def after(self, seconds: float) -> None:
        """What a call of that many seconds allows. A page that cannot be had stays small."""
        self._budget += _SHARE * seconds
        while self._budget > 0 and self._left:
            start = time.perf_counter()
            try:
                failed = _madvise()(self._left.pop(), _HUGE, _COLLAPSE)
            except IndexError:  # another thread took the last one
                return
            if failed and ctypes.get_errno() == errno.EINVAL:
                self._left = []  # an older kernel
            self._budget -= time.perf_counter() - start
