"""Huge pages for prepared weights: at once where they are cheap, else in the course of calls.

They spare translations for as long as the weights are read (a matrix-vector product of 4096 x 4096 took 1.2 ms on small pages and
0.8 on huge ones), and the faults of a first write: 340 MB took two threads 28 ms, 108 on small pages. But on a virtual machine
whose host had taken the memory back, a page took 4 to 7 ms and not 0.2. So they are made one at a time for as long as that is no
slower than small pages would be (`make_present`). What is left stays small and is made huge after calls, at a small share of the
calls' time (`Settling`): to ask for that took 5 to 8 ms there, whatever the size, and half a millisecond a page; so more and more
pages are asked for at once.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Final

from .buffers import Array

_POPULATE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_NO_HUGE: Final = 15  # MADV_NOHUGEPAGE
_PATIENCE: Final = 3e-3  # seconds that a thread may take longer over huge pages than over small ones
_SMALL: Final = 0.6e-3  # seconds of one thread, of two, to write to 2 MB of small pages for the first time
_COLLAPSE: Final = 25  # MADV_COLLAPSE, Linux 6.1
_HUGE: Final = 2 * 1024 * 1024
_SHARE: Final = 0.1  # of the time of calls that may go into making huge pages
_DELAY: Final = 0.25  # seconds of calls before the first: a program that is run once does not need them
_MOST: Final = 16  # pages at once


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_present: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # the address up to which pages are huge


def make_present(arrays: Sequence[Array], threads: int) -> None:
    """Gives a block of new arrays huge pages, by several threads, until they turn out to be slow to come by."""
    owner = arrays[0].base if arrays else None
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    first, end = -(-base // _HUGE) * _HUGE, (base + len(owner)) // _HUGE * _HUGE
    if end <= first or _madvise()(first, end - first, mmap.MADV_HUGEPAGE):
        return
    pages = iter(range(first, end, _HUGE))
    slow = threading.Event()
    left: list[int] = []

    def work() -> None:
        start = time.perf_counter()
        for done, page in enumerate(pages, start=1):
            if slow.is_set() or _madvise()(page, _HUGE, _POPULATE):
                left.append(page)
                slow.set()
                return
            if time.perf_counter() - start > _PATIENCE + done * _SMALL:
                slow.set()

    others = [threading.Thread(target=work, name="tensorwright-pages") for _ in range(min(threads, (end - first) // _HUGE) - 1)]
    for t in others:
        t.start()
    work()
    for t in others:
        t.join()
    rest = min(left, default=end)
    if rest < end:
        _madvise()(rest, end - rest, _NO_HUGE)
    _present[owner] = rest


class Settling:
    """Makes the pages of one block of weights huge, some at a time, between calls. `done` once none is left."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        owner = arrays[0].base if arrays else None
        self._left: list[tuple[int, int]] = []  # address and bytes of what is asked for at once, the last first
        self._budget = -_SHARE * _DELAY
        self._owner = owner
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_HUGEPAGE"):
            base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
            _madvise()(base // mmap.PAGESIZE * mmap.PAGESIZE, len(owner), mmap.MADV_HUGEPAGE)
            at, pages = max(-(-base // _HUGE) * _HUGE, _present.get(owner, 0)), 1
            while at + _HUGE <= base + len(owner):
                pages = min(pages, (base + len(owner) - at) // _HUGE)
                self._left.append((at, pages * _HUGE))
                at, pages = at + pages * _HUGE, min(2 * pages, _MOST)
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
                failed = _madvise()(*self._left.pop(), _COLLAPSE)
            except IndexError:  # another thread took the last one
                return
            if failed and ctypes.get_errno() == errno.EINVAL:
                self._left = []  # an older kernel
            self._budget -= time.perf_counter() - start
