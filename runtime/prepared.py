"""Prepared weights in the disk cache: a process that starts with weights that two before it had maps them from a file.

To prepare 340 MB of weights costs a first write to as many bytes of new memory. A file that the system holds in memory is
mapped in less than a millisecond, in huge pages where the file system keeps it so (ext4 and xfs of late), and processes share
it. What a start then costs is reading the weights once, which says who they are, and the file once, which says that it is whole.

    magic (8) | length of header (u64) | digest (32) | header: JSON, up to 4096 bytes | arrays, each at a multiple of 64

The digest (digest.py) is over header and arrays, under a secret of the cache. As with all entries, a file that differs from what
was written is a miss, is written beside its place and renamed, and is read only from a folder that nobody else may write to.

Files are written at the second start with the same weights, so that weights that come once cost a digest and no file, and by a
thread of its own, as a disk may take a second. They are used where the system has them in memory, or reads them about as fast as
preparing would be, and in huge pages, as calls read from those faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import mmap
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from ..ir.program import Argument, Program
from .buffers import ALIGN, Array, address_of
from .cache import DiskCache
from .container import DamagedError
from .digest import KEY_BYTES, Code, Digest
from .mapped import release

MAGIC: Final = b"TWPREP01"
WORTH: Final = 4 * 1024 * 1024  # bytes of prepared weights from which on they are kept
_HEAD: Final = struct.Struct("<8sQ32s")
_PAGE: Final = 4096
_LARGE: Final = 256 * 1024  # bytes of a weight that is read ahead
_CHUNK: Final = 2 * 1024 * 1024  # a huge page
_PATIENCE: Final = 10e-3  # seconds that reading a file may take longer than preparing
_PREPARING: Final = 0.8e-3  # seconds of preparing 2 MB, by two threads, on new memory
_POPULATE: Final = 22  # MADV_POPULATE_READ, Linux 5.14


def layout(outputs: Sequence[Argument]) -> tuple[list[int], int]:
    """Where each array begins, and the bytes of all: as `buffers.empties` lays them out."""
    places, at = [], 0
    for o in outputs:
        places.append(at)
        at += -(-o.type.nbytes // ALIGN) * ALIGN
    return places, at


class PreparedStore:
    """The prepared weights in a cache. `code` gives the digest's object code; `threads` is how many may read at once."""

    def __init__(self, cache: DiskCache, code: Code, threads: int) -> None:
        self.cache = cache
        self._code = code
        self._threads = threads
        self._ahead: dict[tuple[int, int], tuple[Array, bytes]] = {}  # address and bytes -> what is there, its digest
        self._reading: threading.Thread | None = None

    @functools.cached_property
    def _digest(self) -> Digest | None:
        secret = self.cache.secret(KEY_BYTES)
        return None if secret is None else Digest(self._code, secret, self._threads)

    def read_ahead(self, values: Iterable[Array]) -> None:
        """Begins to read large weights, which nobody may change until `entry` was called, in a thread of its own."""
        large = [v for v in values if v.nbytes >= _LARGE and v.flags.c_contiguous]
        if sys.platform.startswith("linux") and sum(v.nbytes for v in large) >= WORTH:
            self._reading = threading.Thread(target=self._read_ahead, args=(large,), name="tensorwright-digest")
            self._reading.start()

    def _read_ahead(self, values: Sequence[Array]) -> None:
        if (digest := self._digest) is not None:
            found = digest.of([(address_of(v), v.nbytes) for v in values], threads=1)
            self._ahead = {(address_of(v), v.nbytes): (v, d) for v, d in zip(values, found, strict=True)}

    def _digests(self, digest: Digest, values: Sequence[Array], between: Callable[[], None] | None) -> list[bytes]:
        known, self._ahead = self._ahead, {}
        places = [(address_of(v), v.nbytes) for v in values]
        missing = [p for p in places if p not in known]
        made = iter(digest.of(missing, between))
        return [known[p][1] if p in known else next(made) for p in places]

    def entry(self, program: Program, values: Sequence[Array], between: Callable[[], None] | None = None) -> Entry | None:
        """The place for what `program` prepares from `values` (contiguous); None where it would not pay or cannot be.

        `between` is called now and then while the values are read.
        """
        if not sys.platform.startswith("linux") or layout(program.outputs)[1] < WORTH:
            return None
        if self._reading is not None:
            self._reading.join()
        digest = self._digest
        if digest is None:
            return None
        about = hashlib.sha256(program.object_code)
        for kind, arguments in (("in", program.inputs), ("out", program.outputs)):
            about.update(repr([(kind, a.name, str(a.type)) for a in arguments]).encode())
        for constant in program.constants:
            about.update(f"{constant.dtype}{constant.shape}".encode() + np.ascontiguousarray(constant).tobytes())
        about.update(b"".join(self._digests(digest, values, between)))
        return Entry(self.cache, digest, about.hexdigest(), program.outputs)


class Entry:
    """One set of prepared weights. `get` and `put` never raise for the cache's sake."""

    def __init__(self, cache: DiskCache, digest: Digest, key: str, outputs: Sequence[Argument]) -> None:
        self._cache = cache
        self._digest = digest
        self._key = key
        self._outputs = tuple(outputs)
        self._path = cache.prepared_path(key)

    def get(self) -> list[Array] | None:
        """The arrays, read-only, as a map of the file; None where it is missing, damaged, or a slow disk has it.

        The rest is then read for those that start next.
        """
        found = self._cache.mapped(self._path)
        if found is None:
            return None
        try:
            start = self._header(found)
            base = address_of(np.frombuffer(found, np.uint8))
            if left := _populate(found, time.perf_counter() + _PATIENCE):
                threading.Thread(target=_read, args=(found, left), name="tensorwright-read", daemon=True).start()
                return None
            if _HEAD.unpack_from(found)[2] != self._sum(base, start, len(found)):
                raise DamagedError("its checksum does not match")
        except (DamagedError, ValueError, KeyError, TypeError):
            self._cache.drop(self._path)
            return None
        self._cache.used(self._path)
        return [
            np.frombuffer(found, o.type.dtype.numpy, math.prod(o.type.static_shape), start + at).reshape(o.type.static_shape)
            for o, at in zip(self._outputs, layout(self._outputs)[0], strict=True)
        ]

    def _header(self, data: mmap.mmap) -> int:
        """Where the arrays begin. Raises DamagedError and what JSON raises."""
        if len(data) < _HEAD.size:
            raise DamagedError("it is shorter than its head")
        magic, length, _ = _HEAD.unpack_from(data)
        start = _HEAD.size + length
        if magic != MAGIC or length > _PAGE or start + layout(self._outputs)[1] != len(data):
            raise DamagedError("it is none of this kind, or not of its size")
        if json.loads(data[_HEAD.size : start])["key"] != self._key:
            raise DamagedError("it is filed under another key")
        return start

    def _sum(self, base: int, start: int, size: int) -> bytes:
        header, arrays = self._digest.of([(base + _HEAD.size, start - _HEAD.size), (base + start, size - start)])
        return hashlib.sha256(header + arrays).digest()

    def put(self, outputs: Sequence[Array]) -> threading.Thread | None:
        """Stores what was prepared, one block by `buffers.empties`, if it is asked for the second time: the thread that does."""
        mark = f"prepared weights {self._key}"
        said = self._cache.kept(mark)
        if said is None:
            self._cache.keep(mark, b"once")
        if said != b"once" or self._path.exists():
            return None
        thread = threading.Thread(target=self._store, args=(outputs, mark), name="tensorwright-keep")
        thread.start()
        return thread

    def _store(self, outputs: Sequence[Array], mark: str) -> None:
        base, size = address_of(outputs[0]), layout(self._outputs)[1]
        header = json.dumps({"key": self._key}).encode()
        header += b" " * (-(_HEAD.size + len(header)) % _PAGE)
        block = (ctypes.c_char * size).from_address(base)  # `outputs` stay alive meanwhile
        text = ctypes.create_string_buffer(header, len(header))
        digests = self._digest.of([(ctypes.addressof(text), len(header)), (base, size)])
        head = _HEAD.pack(MAGIC, len(header), hashlib.sha256(b"".join(digests)).digest()) + header
        if self._cache.keep_prepared(self._path, (head, memoryview(block))) and not self._huge():
            self._cache.drop(self._path)
            self._cache.keep(mark, b"small pages")

    def _huge(self) -> bool:
        """Whether the system maps the file in huge pages: four places of it are looked at."""
        found = self._cache.mapped(self._path)
        if found is None:
            return False
        base, last = address_of(np.frombuffer(found, np.uint8)), len(found) // _CHUNK - 1
        for k in range(4):
            _libc().madvise(base + k * last // 3 * _CHUNK, _CHUNK, _POPULATE)
        return _huge_bytes(base) >= min(3, last + 1) * _CHUNK


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _populate(mapping: mmap.mmap, until: float = math.inf, start: int = 0) -> int:
    """Maps the pages of a file, in huge ones if it can be, from `start` on. Gives up when `until` is over, with what preparing as
    much would have taken added: the place that it came to, else 0. An older kernel maps at the first access.
    """
    base, size = address_of(np.frombuffer(mapping, np.uint8)), -(-len(mapping) // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # what is read from a disk then comes as such
    for at in range(start, size, _CHUNK):
        if _libc().madvise(base + at, min(_CHUNK, size - at), _POPULATE):
            return 0
        until += _PREPARING
        if time.perf_counter() > until:
            return at + _CHUNK if at + _CHUNK < size else 0
    return 0


def _read(mapping: mmap.mmap, start: int) -> None:
    """Has the system read the rest of a file, without that it stays in this process."""
    while start:
        begin = start
        start = _populate(mapping, -math.inf, begin)
        release(mapping, begin, (start or len(mapping)) - begin)
    mapping.close()


def _huge_bytes(base: int) -> int:
    """Bytes of the mapping that begins at `base` which are mapped in huge pages."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/smaps", errors="replace") as maps:
        within = False
        for line in maps:
            name, _, rest = line.partition(":" if within else "-")
            if within and name in ("FilePmdMapped", "ShmemPmdMapped") and int(rest.split()[0]):
                return int(rest.split()[0]) * 1024
            if not within:
                within = all(c in "0123456789abcdef" for c in name) and name != "" and int(name, 16) == base
            elif name == "VmFlags":
                return 0
    return 0
