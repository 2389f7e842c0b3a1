"""A file of named byte strings with a checksum over all of it: what cache entries and artifacts are made of.

    magic (8 bytes) | length of header (u64) | SHA-256 of the rest (32) | header: JSON | the parts, one after the other

The header is `{"meta": ..., "parts": [[name, length], ...]}`, with spaces after it so that the last part begins at a multiple
of 64 bytes and can be used where it lies in a mapped file. Reading checks every length against the file's before it
allocates, so that a hostile file costs no more than its own size.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .mapped import release

_HEAD: Final = struct.Struct("<8sQ32s")
_MAX_HEADER: Final = 64 * 1024 * 1024
_ALIGN: Final = 64
_STRETCH: Final = 8 * 1024 * 1024  # bytes of a mapped file that are read for the checksum before their pages are given back


class DamagedError(Exception):
    """The bytes are not a container that `pack` made: cut off, changed, or lying about sizes."""


def pack(magic: bytes, meta: Any, parts: Mapping[str, bytes]) -> bytes:
    """The file's bytes. `magic` has 8 bytes; `meta` is anything JSON can hold."""
    return b"".join(pieces(magic, meta, parts))


def pieces(magic: bytes, meta: Any, parts: Mapping[str, bytes]) -> list[bytes]:
    """What `pack` joins, not joined: for large parts that are written one after the other."""
    listing = {"meta": meta, "parts": [[name, len(data)] for name, data in parts.items()]}
    header = json.dumps(listing, separators=(",", ":"), allow_nan=False).encode()
    before_last = _HEAD.size + len(header) + sum(map(len, list(parts.values())[:-1]))
    header += b" " * (-before_last % _ALIGN)
    digest = hashlib.sha256(header)
    for data in parts.values():
        digest.update(data)
    return [_HEAD.pack(magic, len(header), digest.digest()), header, *parts.values()]


def unpack(magic: bytes, data: bytes | mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    """(meta, parts) of what `pack` made, as views of `data`. Raises DamagedError for anything else."""
    if len(data) < _HEAD.size:
        raise DamagedError(f"{len(data)} bytes are shorter than its {_HEAD.size}-byte head")
    found, length, digest = _HEAD.unpack_from(data)
    if found != magic:
        raise DamagedError(f"it starts with {found!r}, not {magic!r}")
    body = memoryview(data)[_HEAD.size :]
    if length > min(len(body), _MAX_HEADER):
        raise DamagedError(f"its header claims {length} bytes; {len(body)} are there, {_MAX_HEADER} are allowed")
    if _checksum(data) != digest:
        raise DamagedError("its checksum does not match: it is cut off or was changed")
    try:
        listing = json.loads(bytes(body[:length]))
        meta, entries = listing["meta"], listing["parts"]
        at, parts = length, {}
        for name, size in entries:
            if not isinstance(name, str) or type(size) is not int or size < 0 or at + size > len(body) or name in parts:
                raise DamagedError(f"part {name!r} of {size!r} bytes does not fit into the file")
            parts[name] = body[at : at + size]
            at += size
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"its header is not what it should be: {error!r}") from error
    if at != len(body):
        raise DamagedError(f"{len(body) - at} bytes follow its last part")
    return meta, parts


def _checksum(data: bytes | mmap.mmap) -> bytes:
    """SHA-256 of all but the head. A mapped file does not stay in memory for it."""
    total, view = hashlib.sha256(), memoryview(data)
    if isinstance(data, bytes):
        total.update(view[_HEAD.size :])
        return total.digest()
    for at in range(_HEAD.size, len(view), _STRETCH):
        total.update(view[at : at + _STRETCH])
        release(data, at, min(_STRETCH, len(view) - at))
    return total.digest()


def write_atomically(path: Path, *data: bytes | memoryview, mode: int = 0o666) -> None:
    """Writes next to `path` and renames, so that a reader sees the old file or the whole new one.

    `mode` is what the umask leaves of the file's permissions at most.

    Raises OSError, which names `path` and not the file next to it.
    """
    beside = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    try:
        # with the permissions that the umask gives, unlike the files of tempfile
        with open(beside, "xb", opener=lambda name, how: os.open(name, how, mode)) as file:
            try:
                for piece in data:
                    file.write(piece)
                file.flush()
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
