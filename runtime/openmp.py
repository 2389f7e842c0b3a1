"""The OpenMP runtime behind every parallel region: found once per process, reached through one address, `GOMP_parallel`.

LLVM's libomp and GNU's libgomp both export `GOMP_parallel(body, data, threads, flags)`. Two OpenMP runtimes in one
process each keep their own workers, and two copies of LLVM's abort; so one that is loaded already (by torch, by
scikit-learn) is used, and the libomp of the `cmeel-libomp` package is loaded only where there is none.

LLVM's runtime keeps its workers spinning for 200 ms after a region. When we are the ones to load it, that is set to 1 ms
(unless the user set KMP_BLOCKTIME), so that an idle program leaves the processor alone; and it is told to start anew in the
child of a fork, which importing scikit-learn turns off for all that is loaded later (KMP_INIT_AT_FORK): the child's first
region would wait for workers that stayed behind. A runtime that somebody else loaded keeps that owner's settings.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..ir.errors import RuntimeUnavailableError

_NO = ("false", "f", "no", "n", "off", "0", ".false.", ".f.")  # as LLVM's runtime reads them
_BINDING = ("KMP_AFFINITY", "KMP_HW_SUBSET", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
_NAMES = ("libomp", "libiomp5", "libgomp")  # in the order of preference when several are loaded


@dataclass(frozen=True)
class OpenMP:
    """A loaded OpenMP runtime. `fork` is the address of GOMP_parallel; `ours` says that we loaded it."""

    path: str
    fork: int
    ours: bool

    @property
    def survives_fork(self) -> bool:
        """Whether a child of os.fork() may open parallel regions: libgomp waits for workers that no longer exist, and so does
        LLVM's runtime where it was loaded under KMP_INIT_AT_FORK=FALSE, which for another's is taken from today's environment."""
        starts_anew = self.ours or os.environ.get("KMP_INIT_AT_FORK", "").lower() not in _NO
        return starts_anew and "libgomp" not in Path(os.path.realpath(self.path)).name


_lock = threading.Lock()


def runtime() -> OpenMP:
    """The process's OpenMP runtime; loads one at the first call.

    Raises RuntimeUnavailableError when none is loaded and none is installed.
    """
    with _lock:
        return _find()


def loaded() -> list[str]:
    """Paths of the OpenMP runtimes this process has loaded, the preferred one first."""
    if sys.platform.startswith("linux"):
        maps = Path("/proc/self/maps").read_text(errors="replace")
        paths = dict.fromkeys(line.split(None, 5)[5] for line in maps.splitlines() if line.count("/") and ".so" in line)
    else:
        import threadpoolctl

        paths = dict.fromkeys(i["filepath"] for i in threadpoolctl.threadpool_info() if i.get("user_api") == "openmp")
    rank = {p: _rank(p) for p in paths}
    return sorted((p for p in paths if rank[p] < len(_NAMES)), key=rank.__getitem__)


def _rank(path: str) -> int:
    name = Path(path).name
    return next((i for i, prefix in enumerate(_NAMES) if name.split(".")[0].split("-")[0] == prefix), len(_NAMES))


@functools.cache
def _find() -> OpenMP:
    for path in loaded():
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return OpenMP(path, _address(library), ours=False)
    path = _packaged()
    # libomp reads its environment at the first call into it
    with _environment(_settings(os.environ)):
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeUnavailableError(f"the OpenMP runtime {path} cannot be loaded: {error}; {_ADVICE}") from error
        if not hasattr(library, "GOMP_parallel"):
            raise RuntimeUnavailableError(f"the OpenMP runtime {path} does not export GOMP_parallel; {_ADVICE}")
        library.omp_get_max_threads()
    return OpenMP(path, _address(library), ours=True)


def _settings(given: Mapping[str, str]) -> dict[str, str]:
    """What our runtime is started with. It looks for the machine's topology, which takes 2 to 8 ms, only where the user binds
    threads to places; `placement` looks after the workers otherwise."""
    made = {"KMP_BLOCKTIME": given.get("KMP_BLOCKTIME", "1"), "KMP_INIT_AT_FORK": "TRUE"}
    return made if any(name in given for name in _BINDING) else made | {"KMP_AFFINITY": "disabled"}


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """These variables, and afterwards those that were."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_ADVICE = "reinstall it with 'pip install --force-reinstall cmeel-libomp', or run on one thread (TENSORWRIGHT_THREADS=1)"


def _address(library: ctypes.CDLL) -> int:
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0


def _usual(suffix: str) -> Path:
    """Where pip puts it, beside numpy: the list of a package's files takes milliseconds to read."""
    return Path(np.__file__).parents[1] / "cmeel.prefix" / "lib" / f"libomp.{suffix}"


def _packaged() -> str:
    """The libomp of the cmeel-libomp package. Raises RuntimeUnavailableError when it is not installed."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    usual = _usual(suffix)
    if usual.is_file():
        return str(usual)
    from importlib import metadata  # takes longer to import than the rest of this file's work

    try:
        files = metadata.files("cmeel-libomp") or []
    except metadata.PackageNotFoundError:
        files = []
    for entry in files:
        if entry.name == f"libomp.{suffix}":
            path = Path(str(entry.locate()))
            if path.exists():
                return str(path)
    raise RuntimeUnavailableError(
        "no OpenMP runtime: none is loaded in this process and the package cmeel-libomp is not installed (or has no "
        f"libomp.{suffix}); install it with 'pip install cmeel-libomp', or run on one thread (TENSORWRIGHT_THREADS=1)"
    )
