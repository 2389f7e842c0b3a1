"""Files as memory: weights are read where they lie, page by page, and pages that are not needed any more are given back.

A mapped page that was only read costs nothing to give back: the next access reads it again. So the weights that only feed
the preparation of others do not have to stay in memory once that is done.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from .buffers import Array


def map_file(path: Path) -> mmap.mmap | bytes:
    """The file's bytes without reading them: a read-only map; bytes where it is empty or the system cannot map it."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:  # a file system without maps
            return file.read()


def mapping_of(array: Array) -> mmap.mmap | None:
    """The read-only map that an array is a view of, through any views; None for ordinary memory and maps that take writes."""
    owner: object = array
    for _ in range(64):
        if isinstance(owner, mmap.mmap):
            return owner if memoryview(owner).readonly else None
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
        if owner is None:
            return None
    return None


def release(mapping: mmap.mmap, start: int = 0, length: int | None = None) -> None:
    """Gives the pages of a read-only map back to the system: they are read again when they are needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, begin, (len(mapping) if length is None else start + length) - begin)
