"""The disk cache of compiled programs: content-addressed, checksummed, shared by processes, bounded.

An entry's key is a hash of everything that decides the machine code: the traced graph (without weights), the target,
the flags that change code, the compiler's own source, LLVM's version. An entry that is damaged in any way is a miss.
Machine code is only ever read from a folder that belongs to the user alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.cuda_program import CudaProgram
from ..ir.dtypes import as_dtype
from ..ir.memory import ArenaUse, Rematerialisation
from ..ir.program import Argument, KernelInfo, Program
from ..ir.target import Target
from ..ir.types import tensor
from .compiled import Compiled, PassRecord
from .container import DamagedError, pack, unpack, write_atomically
from .mapped import map_file

MAGIC: Final = b"TWCACHE1"
PREPARED: Final = ".twp"  # files of prepared weights; programs and the rest are ".twc"
DEFAULT_BYTES: Final = 1024**3
_ABANDONED: Final = 3600  # seconds after which nobody is still writing a file
_reported: set[Path] = set()  # folders that a warning was given for


class CacheWarning(UserWarning):
    """The disk cache cannot be used: programs are compiled anew in each process, which is slower and not wrong."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tensorwright`, or `~/.cache/tensorwright`; for a user without a home, a folder in the temporary one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "tensorwright"
    try:
        return Path.home() / ".cache" / "tensorwright"
    except RuntimeError:  # a container's user that no password file knows
        return Path(tempfile.gettempdir()) / f"tensorwright-{os.getuid()}"


def source_digest(root: Path, places: Iterable[str]) -> str:
    """A hash over every Python file in these places, files or folders (names and contents): another compiler, another key."""
    total = hashlib.sha256()
    for path in sorted(_sources(root, places)):
        data = Path(path).read_bytes()
        total.update(f"{os.path.relpath(path, root)}:{len(data)}\n".encode() + data)
    return total.hexdigest()


def source_stamp(root: Path, places: Iterable[str]) -> str:
    """A hash over where these files are, their sizes and when they were written: as long as it stays, so does the digest."""
    found = sorted((path, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in _sources(root, places).items())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _sources(root: Path, places: Iterable[str]) -> dict[str, os.stat_result]:
    found: dict[str, os.stat_result] = {}
    pending = [str(root / place) for place in places]
    while pending:
        place = pending.pop()
        if place.endswith(".py"):
            found[place] = os.stat(place)
            continue
        with os.scandir(place) as entries:
            for e in entries:
                if e.name.endswith(".py"):
                    found[e.path] = e.stat()
                elif e.is_dir() and e.name != "__pycache__":
                    pending.append(e.path)
    return found


@dataclass(frozen=True)
class Key:
    """All that decides the machine code, in one place. `flags` are (name, value) pairs."""

    graph: str
    target: Target
    flags: tuple[tuple[str, str | int | bool | None], ...]
    compiler: str
    llvm: str

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class DiskCache:
    """Entries of `folder`, at most `max_bytes` of them: the ones used longest ago go first. Never raises for its own sake."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def _path(self, key: Key) -> Path:
        digest = key.digest()
        return self.folder / digest[:2] / f"{digest}.twc"

    def _trusted(self) -> bool:
        """Whether nobody else can write here: machine code from elsewhere would run with our rights."""
        try:
            found = self.folder.stat()
        except OSError:
            return False
        return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))

    def get(self, key: Key) -> Compiled | None:
        """The entry, or None: not there, damaged, or in a folder that others may write to."""
        path = self._path(key)
        try:
            data = path.read_bytes() if self._trusted() else None
        except OSError:
            return None
        if data is None:
            return None
        try:
            meta, parts = unpack(MAGIC, data)
            if meta["key"] != key.digest():
                raise DamagedError("it is filed under another key")
            found = _decode(meta, parts)
        except (DamagedError, KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError):
            with contextlib.suppress(OSError):  # in a folder that is read-only it stays, and is a miss each time
                path.unlink()  # so that a damaged entry is met once
            return None
        with contextlib.suppress(OSError):  # evicted this moment by another process; the entry in hand is good
            os.utime(path)  # its age is what eviction goes by
        return found

    def keep(self, name: str, data: bytes) -> None:
        """Keeps bytes under a name that says all they depend on. What cannot be written is not kept."""
        path = self._named(name)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._trusted():
                path.parent.mkdir(exist_ok=True, mode=0o700)
                write_atomically(path, pack(MAGIC, {"name": name}, {"data": data}))

    def kept(self, name: str) -> bytes | None:
        """The bytes kept under a name; None if they are not there, damaged, or where others may write to."""
        try:
            meta, parts = unpack(MAGIC, self._named(name).read_bytes() if self._trusted() else b"")
            return bytes(parts["data"]) if meta["name"] == name else None
        except (OSError, DamagedError, KeyError, TypeError):
            return None

    def source(self, stamp: str, digest: Callable[[], str]) -> str:
        """The digest of sources with this `source_stamp`, which is remembered from one process to the next."""
        path = self.folder / "source"
        with contextlib.suppress(OSError, DamagedError, KeyError, TypeError):
            meta, _ = unpack(MAGIC, path.read_bytes() if self._trusted() else b"")
            if meta["stamp"] == stamp:
                return str(meta["digest"])
        found = digest()
        with contextlib.suppress(OSError):
            if self._trusted():
                write_atomically(path, pack(MAGIC, {"stamp": stamp, "digest": found}, {}))
        return found

    def secret(self, size: int) -> bytes | None:
        """Random bytes of this cache that only its owner can read; None where they cannot be kept."""
        path = self.folder / "secret"
        for _ in range(2):
            with contextlib.suppress(OSError, DamagedError, KeyError, TypeError):
                meta, parts = unpack(MAGIC, path.read_bytes() if self._trusted() else b"")
                private = not hasattr(os, "getuid") or not path.stat().st_mode & 0o077
                if meta["name"] == "secret" and len(parts["data"]) == size and private:
                    return bytes(parts["data"])  # read, even if just made: of two processes at once, both take one's
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not self._trusted():
                    return None
                write_atomically(path, pack(MAGIC, {"name": "secret"}, {"data": secrets.token_bytes(size)}), mode=0o600)
            except OSError:
                return None
        return None

    def prepared_path(self, key: str) -> Path:
        """Where prepared weights with this key lie."""
        return self.folder / key[:2] / f"{key}{PREPARED}"

    def keep_prepared(self, path: Path, pieces: Sequence[bytes | memoryview]) -> bool:
        """Writes a file of prepared weights; False where that cannot be or they would take more than half of the cache.

        Other prepared weights go, those used longest ago first, until all of them take no more than half.
        """
        limit = self.max_bytes // 2
        size = sum(len(p) for p in pieces)
        if size > limit or not self._trusted():
            return False
        entries = [e for e in self.entries() if e[0].suffix == PREPARED and e[0] != path]
        total = size + sum(bytes for _, bytes, _ in entries)
        for old, bytes, _ in entries:
            if total <= limit:
                break
            _remove(old)
            total -= bytes
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomically(path, *pieces)
        except OSError:
            return False
        self.evict()
        return True

    def mapped(self, path: Path) -> mmap.mmap | None:
        """A read-only map of a file of this cache; None where there is none, or where others may write to it."""
        try:
            if not self._trusted():
                return None
            found = map_file(path)
        except OSError:
            return None
        if not len(found):
            self.drop(path)  # nothing that we wrote
        return found if isinstance(found, mmap.mmap) else None

    def used(self, path: Path) -> None:
        """Says that an entry was used now: its age is what eviction goes by."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def drop(self, path: Path) -> None:
        """Removes an entry that turned out to be damaged or of no use."""
        _remove(path)

    def _named(self, name: str) -> Path:
        digest = hashlib.sha256(f"named {name}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.twc"

    def put(self, key: Key, compiled: Compiled) -> bool:
        """Stores an entry; False, and a CacheWarning once per folder, when that cannot be (disk full, read-only, not ours)."""
        meta, parts = _encode(compiled)
        meta["key"] = key.digest()
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._trusted():
                return self._refused("others than its owner may write to it, so no machine code is taken from it")
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomically(path, pack(MAGIC, meta, parts))
        except OSError as error:
            return self._refused(f"{error.strerror or error} ({error.filename or path})")
        self.evict()
        return True

    def _refused(self, why: str) -> bool:
        if self.folder not in _reported:
            _reported.add(self.folder)
            warnings.warn(
                f"the compile cache {self.folder} cannot be written: {why}. Programs are compiled anew in each process; set "
                "TENSORWRIGHT_CACHE to a folder that is yours alone, or to 'off'",
                CacheWarning,
                stacklevel=2,
            )
        return False

    def entries(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of every entry, the oldest first."""
        found = []
        for path in self.folder.glob("??/*.tw[cp]"):
            try:
                status = path.stat()
            except OSError:
                continue  # evicted by another process between the listing and the look
            if not stat.S_ISREG(status.st_mode):
                continue  # nothing that we wrote
            found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda e: e[2])

    def evict(self) -> None:
        """Removes the entries used longest ago until the rest is within `max_bytes`."""
        for path in self.folder.glob("??/.*.tmp"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _ABANDONED:  # its writer was killed
                    path.unlink()
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if total <= self.max_bytes:
                break
            _remove(path)
            total -= size

    def clear(self) -> int:
        """Removes every entry; how many there were."""
        entries = self.entries()
        for path, _, _ in entries:
            _remove(path)
        return len(entries)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process was first, or the folder is read-only
        path.unlink()


def _encode(compiled: Compiled) -> tuple[dict[str, Any], dict[str, bytes]]:
    parts: dict[str, bytes] = {}
    meta: dict[str, Any] = {
        "run": _encode_program(compiled.run, "run", parts),
        "prepare": None if compiled.prepare is None else _encode_program(compiled.prepare, "prepare", parts),
        "prepare_key": compiled.prepare_key,
        "passes": [asdict(p) for p in compiled.passes],
        "remat": None if compiled.remat is None else compiled.remat.as_dict(),
        "tuned": dict(compiled.tuned),
    }
    return meta, parts


def _decode(meta: dict[str, Any], parts: dict[str, memoryview]) -> Compiled:
    return Compiled(
        run=_decode_program(meta["run"], "run", parts),
        prepare=None if meta["prepare"] is None else _decode_program(meta["prepare"], "prepare", parts),
        prepare_key=str(meta["prepare_key"]),
        passes=tuple(PassRecord(**p) for p in meta["passes"]),
        remat=None if meta["remat"] is None else Rematerialisation.from_dict(meta["remat"]),
        from_cache=True,
        tuned={str(k): int(v) for k, v in meta["tuned"].items()},
    )


def _encode_program(program: Program | CudaProgram, prefix: str, parts: dict[str, bytes]) -> dict[str, Any]:
    if isinstance(program, CudaProgram):
        from .cuda.stored import encode_program

        return {"cuda": encode_program(program, prefix, parts)}
    parts[f"{prefix}/object"] = program.object_code
    for k, constant in enumerate(program.constants):
        parts[f"{prefix}/constant{k}"] = np.ascontiguousarray(constant).tobytes()
    return {
        "name": program.name,
        "target": asdict(program.target),
        "inputs": [_encode_argument(a) for a in program.inputs],
        "outputs": [_encode_argument(a) for a in program.outputs],
        "constants": [[as_dtype(c.dtype).name, list(c.shape)] for c in program.constants],
        "arena_bytes": program.arena_bytes,
        "kernels": [asdict(k) for k in program.kernels],
        "aliases": [list(a) for a in program.aliases],
        "align": program.align,
        "output_align": [list(a) for a in program.output_align],
        "use": asdict(program.use),
    }


def _decode_program(meta: dict[str, Any], prefix: str, parts: dict[str, memoryview]) -> Any:
    """A Program, or the CudaProgram that runs in its place on a device."""
    if "cuda" in meta:
        from .cuda.stored import decode_program

        return decode_program(meta["cuda"], prefix, parts)
    kernels = tuple(KernelInfo(**{**k, "nodes": tuple(k["nodes"]), "weights": tuple(k["weights"])}) for k in meta["kernels"])
    constants = []
    for k, (dtype, shape) in enumerate(meta["constants"]):
        raw = parts[f"{prefix}/constant{k}"]
        constants.append(np.frombuffer(raw, dtype=as_dtype(dtype).numpy).reshape(shape))
    return Program(
        name=meta["name"],
        target=Target(**{f.name: meta["target"][f.name] for f in fields(Target)}),
        inputs=tuple(_decode_argument(a) for a in meta["inputs"]),
        outputs=tuple(_decode_argument(a) for a in meta["outputs"]),
        constants=tuple(constants),
        arena_bytes=int(meta["arena_bytes"]),
        kernels=kernels,
        object_code=bytes(parts[f"{prefix}/object"]),
        aliases=tuple((int(o), int(i)) for o, i in meta["aliases"]),
        align=int(meta["align"]),
        output_align=tuple((int(o), int(n)) for o, n in meta["output_align"]),
        use=ArenaUse(**meta["use"]),
    )


def _encode_argument(a: Argument) -> list[Any]:
    return [a.name, a.type.dtype.name, list(a.type.static_shape), a.role]


def _decode_argument(row: list[Any]) -> Argument:
    name, dtype, shape, role = row
    return Argument(str(name), tensor(dtype, shape), str(role))
