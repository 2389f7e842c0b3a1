"""Loads object code into the process. The only place of the runtime that knows llvmlite.

One LLJIT serves the process; each program is a library of its own in it, so that equal names do not meet. The libraries
see nothing of the process: what an object may call is the short list `IMPORTS`, and anything else is an error before
LLVM's linker sees it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import platform
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding as llvm

from ..ir.errors import CompileError
from ..ir.program import objects_of
from .elf import symbols

# What LLVM itself calls for: block copies, and the multiply-add of machines without the instruction.
IMPORTS: Final = ("memcpy", "memmove", "memset", "fma", "fmaf")
_MACHINE: Final = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
_ENTRY: Final = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

_LIBM: Final = "libSystem.dylib" if platform.system() == "Darwin" else "libm.so.6"

_lock, _once = threading.Lock(), threading.Lock()
_numbers = itertools.count()
_imports: dict[str, int] = {}


@functools.cache
def _compiler() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in IMPORTS:
        library = ctypes.CDLL(None) if name.startswith("mem") else ctypes.CDLL(_LIBM)
        _imports[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), opt=2)
    return llvm.create_lljit_compiler(machine, suppress_errors=True)


_loaded: weakref.WeakValueDictionary[tuple[bytes, str], NativeProgram] = weakref.WeakValueDictionary()


def loaded(object_code: bytes, entry: str) -> NativeProgram:
    """The program, loaded once for as long as someone holds it: one that serves every size is bound for many."""
    with _once:
        found = _loaded.get((object_code, entry))
        if found is None:
            found = _loaded[object_code, entry] = NativeProgram(object_code, entry)
        return found


class NativeProgram:
    """Machine code in memory. `run(buffers, dims, context)` calls its entry; the addresses are ints, 0 for none.

    The code stays mapped for as long as this object lives; a caller keeps it alive during a run.
    """

    def __init__(self, object_code: bytes, entry: str) -> None:
        """Raises CompileError if the object is for another machine, lacks `entry`, or calls what it must not."""
        try:
            objects = objects_of(object_code)
        except ValueError as error:
            raise CompileError(f"object code of {len(object_code)} bytes does not load: {error}") from error
        tables = [symbols(o) for o in objects]
        for found in tables:
            if found.machine != _MACHINE:
                raise CompileError(f"object code for {found.machine} cannot run on this machine ({_MACHINE})")
        defined = frozenset().union(*(t.defined for t in tables))
        if entry not in defined:
            raise CompileError(f"object code has no function {entry!r}; it defines {sorted(defined)[:8]}")
        undefined = frozenset().union(*(t.undefined for t in tables)) - defined
        with _lock:
            compiler = _compiler()
            missing = sorted(undefined - _imports.keys())
            if missing:
                raise CompileError(f"object code calls {missing}, but may call only {sorted(_imports)}")
            builder = llvm.JITLibraryBuilder().export_symbol(entry)
            for o in objects:
                builder.add_object_img(o)
            for name in undefined:
                builder.import_symbol(name, _imports[name])
            try:
                # in this order: __dict__ drops the library before the compiler that owns its memory
                self._library = builder.link(compiler, f"program{next(_numbers)}")
            except RuntimeError as error:
                raise CompileError(f"object code of {len(object_code)} bytes does not load: {error}") from error
            self._compiler = compiler
        self.address: int = self._library[entry]
        self.run: Callable[[int | None, int | None, int | None], int] = _ENTRY(self.address)


def release_compiler() -> None:
    """Gives memory back that compiling took: free blocks of the heap, and pages of LLVM's code, which are read again if needed.

    ResNet-50 takes 30 MB less then, at the moment when its prepared weights are added.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps", errors="replace") as maps:
        for line in maps:
            place, mode, *_, path = line.split(None, 5)
            # code alone: pages that the dynamic linker wrote to are not the file's any more
            if mode == "r-xp" and "llvmlite" in path:
                start, end = (int(x, 16) for x in place.split("-"))
                libc.madvise(start, end - start, mmap.MADV_DONTNEED)


def host_features() -> tuple[str, dict[str, bool]]:
    """LLVM's name of this machine's processor, and which of its features are there."""
    return llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features())


def llvm_version() -> str:
    """llvmlite's and LLVM's versions, part of every cache key."""
    import llvmlite

    return f"llvmlite {llvmlite.__version__}, LLVM {'.'.join(map(str, llvm.llvm_version_info))}"
