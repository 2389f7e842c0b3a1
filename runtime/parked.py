"""Weights in a file without a name, mapped twice: for whoever wrote them, who may go on writing, and for those who only read.

    writable     private pages: what is written to them stays in this process, and the file as it is
    read-only    what was in the array when it was put here, whatever is written later; its pages can be given back (mapped.py)

Neither takes memory until it is touched, and pages that were only read are the system's to take back. The file goes away with the
last array that is a view of it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.errors import TensorwrightError
from .buffers import Array

LARGE: Final = 256 * 1024  # bytes of an array that is worth to be put here
_ALIGN: Final = mmap.ALLOCATIONGRANULARITY
_MOST: Final = 1 << 30  # bytes written at once


class Park:
    """Room for arrays of these sizes in bytes, in `folder`: a context, within which they are `put` there in any order."""

    def __init__(self, sizes: Sequence[int], folder: Path) -> None:
        """Raises TensorwrightError where the folder or the room in it is missing; nothing has changed then."""
        self._places: list[int] = []
        at = 0
        for size in sizes:
            self._places.append(at)
            at += -(-size // _ALIGN) * _ALIGN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by __exit__)
            number = self._file.fileno()
            # all of it now: a page that the disk has no room for would end the process when it is read
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(number, 0, at)
            else:
                os.ftruncate(number, at)
            self._writable = mmap.mmap(number, at, access=mmap.ACCESS_COPY)
            self._fixed = mmap.mmap(number, at, access=mmap.ACCESS_READ)  # the maps keep the file when it is closed
        except OSError as error:
            raise TensorwrightError(
                f"weights of {at:,} bytes cannot be put in a file in {folder}: {error}; make room there, or compile without "
                "release_weights"
            ) from error

    def __enter__(self) -> Park:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def put(self, number: int, array: Array) -> tuple[Array, Array]:
        """The array's writable and its read-only successor. Raises TensorwrightError if the disk fails."""
        at = self._places[number]
        left = array.reshape(-1).view(np.uint8).data
        try:
            self._file.seek(at)
            while left:
                left = left[self._file.write(left[:_MOST]) :]
        except OSError as error:
            raise TensorwrightError(f"weights cannot be put in a file: {error}; compile without release_weights") from error

        def view(mapping: mmap.mmap) -> Array:
            return np.frombuffer(mapping, array.dtype, array.size, at).reshape(array.shape)

        return view(self._writable), view(self._fixed)
