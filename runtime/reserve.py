"""Memory for prepared weights, made present before it is needed.

The first touch of a page costs a fault: 150 MB of them took 50 to 100 ms here, as long as all else between the cache and the
first result. A thread that needs no interpreter lock makes the pages present while the model is traced or compiled; in huge
pages where the system has them at hand, which also spares translations for as long as the weights are read.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import time
from typing import Any, Final

from .buffers import ALIGN, block

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_PIECE: Final = 2 * 1024 * 1024  # a piece keeps others from mapping memory while it is made present
_SLOW: Final = 1e-9  # seconds a byte: slower than small pages would be, so huge ones have to be made by moving memory
_LEAST: Final = 4 * 1024 * 1024


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


class Reserve:
    """A block of `nbytes` whose pages a thread of its own makes present. `take` ends that and gives the block, once.

    Where huge pages turn out to be slow to get, the rest is made of small ones.
    """

    def __init__(self, nbytes: int, align: int = ALIGN) -> None:
        self.nbytes = nbytes
        self._owner, self._address = block(nbytes, align, huge=True)
        self._stop = False
        self._thread: threading.Thread | None = None
        if nbytes >= _LEAST and isinstance(self._owner, mmap.mmap) and hasattr(mmap, "MADV_HUGEPAGE"):
            self._thread = threading.Thread(target=self._populate, name="tensorwright-reserve", daemon=True)
            self._thread.start()

    def _populate(self) -> None:
        madvise, page = _madvise(), mmap.PAGESIZE
        base = self._address // page * page
        end = (self._address + self.nbytes) // page * page
        at = base
        while at < end and not self._stop:
            piece = min(_PIECE, end - at)
            start = time.perf_counter()
            if madvise(at, piece, _POPULATE_WRITE):
                return  # an older kernel, or no memory: pages come when they are touched
            at += piece
            if time.perf_counter() - start > _SLOW * piece and at < end:
                self._owner.madvise(mmap.MADV_NOHUGEPAGE, at - base, end - at)

    def take(self) -> tuple[Any, int]:
        """(owner, address) as `buffers.block` returns them. Pages that are not present yet come when they are touched."""
        self.cancel()
        if self._thread is not None:
            self._thread.join()
        return self._owner, self._address

    def cancel(self) -> None:
        """Makes no more pages present. The memory goes with the object."""
        self._stop = True
