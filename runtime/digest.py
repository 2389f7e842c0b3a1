"""What arrays contain, as 32 bytes: their identity in the cache, and what tells whether a file is as it was written.

Blocks go through the keyed NH hash of `codegen/llvm/digest.py`, at the speed of memory; the results, the rest that fills no
block and all sizes through SHA-256. With a key that is random and secret, that two given contents agree has a probability of
2^-128 a block; who does not know the key cannot look for such contents.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from ..ir.program import DIGEST_BLOCK, DIGEST_PASSES, DIGEST_STEP
from .buffers import address_of
from .native import loaded

KEY_BYTES: Final = DIGEST_BLOCK + (DIGEST_PASSES - 1) * DIGEST_STEP
_ROW: Final = 64  # blocks of what is shared out among threads
_RELEASED: Final = 64  # rows after which pages may be given back

Memory = tuple[int, int]  # address and bytes
Code = Callable[[], tuple[bytes, str]]


class Digest:
    """The digest under one key, by at most `threads` threads."""

    def __init__(self, code: Code, key: bytes, threads: int) -> None:
        """`code` gives the object code and its function's name. Raises ValueError for a key of another length."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, expected {KEY_BYTES}")
        self._native = loaded(*code())
        self._key = np.frombuffer(key, np.uint8)
        self._threads = threads

    def of(self, memory: Sequence[Memory], between: Callable[[], None] | None = None, threads: int = 0) -> list[bytes]:
        """The digest of each of these pieces of memory. `between` is called now and then while they are read."""
        blocks = [n // DIGEST_BLOCK for _, n in memory]
        results = np.empty((sum(blocks), DIGEST_PASSES), np.uint64)
        rows, at = [], address_of(results)
        for (address, _), count in zip(memory, blocks, strict=True):
            for first in range(0, count, _ROW):
                rows.append((address + first * DIGEST_BLOCK, min(_ROW, count - first), at + first * 8 * DIGEST_PASSES))
            at += count * 8 * DIGEST_PASSES
        step = _RELEASED if between is not None else max(1, len(rows))
        for start in range(0, len(rows), step):
            self._run(rows[start : start + step], threads or self._threads)
            if between is not None:
                between()
        found, at = [], 0
        for (address, size), count in zip(memory, blocks, strict=True):
            one = hashlib.sha256(size.to_bytes(8, "little"))
            one.update(results[at : at + count].data)
            one.update(ctypes.string_at(address + count * DIGEST_BLOCK, size - count * DIGEST_BLOCK))
            found.append(one.digest())
            at += count
        return found

    def _run(self, rows: Sequence[tuple[int, int, int]], threads: int) -> None:
        """Each thread takes some rows, in one call: nobody waits for Python's lock in between."""
        share = max(1, -(-len(rows) // threads))
        tables = []
        for first in range(0, len(rows), share):
            words = np.array(rows[first : first + share], np.uint64).ravel()
            tables.append(np.concatenate([np.array([address_of(self._key), len(words) // 3], np.uint64), words]))
        others = [threading.Thread(target=self._native.run, args=(address_of(t), None, None)) for t in tables[1:]]
        for thread in others:
            thread.start()
        for table in tables[:1]:
            self._native.run(address_of(table), None, None)
        for thread in others:
            thread.join()
