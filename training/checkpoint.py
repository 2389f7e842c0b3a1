"""Checkpoint files: written whole or not at all, checksummed, without pickle.

A container (`runtime/container.py`: magic, JSON header, SHA-256 over everything) with one part, the arrays as safetensors. A file
is written beside its final name, flushed to the disk, and renamed, so that whoever reads sees the old file or the whole new one,
also after the process or the machine died in between. Any folder has one writer at a time.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from ..ir.dtypes import as_dtype
from ..runtime.buffers import Array
from ..runtime.container import DamagedError, pieces, unpack
from .errors import CheckpointError, CheckpointWarning

MAGIC: Final = b"TWCHECK1"
FORMAT: Final = 1
SUFFIX: Final = ".checkpoint"
_STEP: Final = re.compile(r"step-(\d+)" + re.escape(SUFFIX))
_BESIDE: Final = ".checkpoint.tmp"
_FULL: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large",
}


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:010}{SUFFIX}"


def in_folder(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were numbered by step, newest first."""
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name))]
    return [p for _, p in sorted(found, reverse=True)]


# ------------------------------------------------------------------------------------------------ writing


def write(path: Path, meta: Mapping[str, Any], state: Mapping[str, Array]) -> int:
    """Writes a checkpoint and makes sure it is on the disk; its size in bytes. What was at `path` is replaced only then.

    `meta` may hold numbers, strings, None, lists, dicts with string keys, and arrays. Raises CheckpointError where the file
    cannot be written: checkpoints already there are left as they are.
    """
    from safetensors.numpy import save as save_tensors

    arrays: dict[str, Array] = {f"state/{n}": a for n, a in state.items()}
    plain = _encoded(dict(meta), arrays, "meta")
    dtypes = {n: as_dtype(a.dtype).name for n, a in arrays.items() if a.dtype.isbuiltin != 1}
    tensors = save_tensors({n: _storable(a) for n, a in arrays.items()})
    parts = pieces(MAGIC, {"format": FORMAT, "meta": plain, "dtypes": dtypes}, {"arrays": tensors})
    size = sum(map(len, parts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writer(path.parent) as (file, beside):
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        why = _FULL.get(error.errno or 0, error.strerror or str(error))
        raise CheckpointError(
            f"the checkpoint {path} ({size:,} bytes) could not be written: {why}. Earlier checkpoints are intact, and the "
            "trainer keeps its state: make room and call trainer.save(path), which another folder may hold, or fit again"
        ) from error
    return size


def check_writable(folder: Path) -> None:
    """Raises CheckpointError where no checkpoint could be written: better before the first epoch than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _writer(folder) as (_, beside):
            beside.unlink()
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be written to {folder}: {error.strerror or error}") from error


@contextmanager
def _writer(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """The file beside the checkpoints that the next one is written to, locked and empty.

    It always has the same name, so killed runs leave one behind at most. A lock tells a second run that writes to the same
    folder. Between opening and locking the first run may have renamed the file: what is locked is then no longer what the name
    stands for, and must not be touched.
    """
    beside = folder / _BESIDE
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(beside).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        except BlockingIOError:
            file.close()
            raise CheckpointError(f"another run is writing checkpoints to {folder}; give each run a folder of its own") from None
        if current:
            break
        file.close()
    try:
        file.truncate(0)
        yield file, beside
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise
    finally:
        with suppress(OSError):  # what a failed write left in the buffer fails again; that error is on its way already
            file.close()


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(meta, state) of a checkpoint. Raises CheckpointError where it is missing, damaged, or of another format."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    try:
        head, parts = unpack(MAGIC, data)
    except DamagedError as error:
        raise CheckpointError(f"{path} is not a sound checkpoint: {error}") from error
    try:
        if head["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {head['format']!r}; this version of Tensorwright reads format {FORMAT}")
        stored = load_tensors(bytes(parts["arrays"]))
        arrays = {n: a.view(as_dtype(head["dtypes"][n]).numpy) if n in head["dtypes"] else a for n, a in stored.items()}
        meta = _decoded(head["meta"], arrays)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold a checkpoint: {error!r}") from error
    return meta, {n.removeprefix("state/"): a for n, a in arrays.items() if n.startswith("state/")}


def find(place: str | Path) -> tuple[dict[str, Any], dict[str, Array], Path] | None:
    """The checkpoint to resume from: a file, or the newest sound one of a folder; None where the folder has none.

    A damaged one is passed over with a CheckpointWarning. Raises CheckpointError for a file that is missing or damaged, and
    where a folder's checkpoints all are.
    """
    path = Path(place)
    if not path.is_dir():
        if not path.exists() and path.suffix != SUFFIX:
            return None  # a folder that no run has made yet
        return (*read(path), path)
    candidates = in_folder(path)
    damaged: list[str] = []
    for candidate in candidates:
        try:
            found = read(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"{message}; going back to {candidate.name}", CheckpointWarning, stacklevel=2)
        return (*found, candidate)
    if damaged:
        raise CheckpointError(f"none of the {len(damaged)} checkpoints in {path} can be read:\n" + "\n".join(damaged))
    return None


# ------------------------------------------------------------------------------------------------ values


def _storable(array: Array) -> Array:
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array if array.dtype.isbuiltin == 1 else array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _encoded(value: Any, arrays: dict[str, Array], name: str) -> Any:
    """The value in JSON's types: arrays go to `arrays`, floats that JSON lacks become text. Raises CheckpointError for others."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"$array": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {"$dict": [[k, _encoded(v, arrays, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_encoded(v, arrays, f"{name}/{k}") for k, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: numbers, strings, lists, dicts and arrays it can"
    )


def _decoded(value: Any, arrays: Mapping[str, Array]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, arrays) for v in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        if kind == "$array":
            return arrays[inner]
        return float(inner) if kind == "$float" else {k: _decoded(v, arrays) for k, v in inner}
    return value
