"""Runs loop-IR kernels natively on numpy arrays: emits, loads the object into this process, calls its entry point."""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from tensorwright.codegen.llvm import Emitted, emit
from tensorwright.codegen.loop_ir import Module
from tensorwright.codegen.plan import EntryPlan, Step
from tensorwright.ir.target import ROWS, Target, row

Array = np.ndarray[Any, Any]
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


@_FORK
def _fork(body: int, data: int, threads: int, _flags: int) -> None:
    """Python threads in the place of OpenMP: slow, and as parallel as a test needs."""
    run = _BODY(body)
    others = [threading.Thread(target=run, args=(data,)) for _ in range(threads - 1)]
    for t in others:
        t.start()
    run(data)
    for t in others:
        t.join()


def host_rows() -> list[str]:
    """The target rows that this machine can run, widest first."""
    features = llvm.get_host_cpu_features()
    need = {"x86-64-v4": "avx512vl", "x86-64-v3": "fma", "x86-64-v2": "sse4.2", "aarch64-neon": "neon"}
    return [name for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2", "aarch64-neon") if name in ROWS and features.get(need[name])]


def host() -> Target:
    return row(host_rows()[0])


class Loaded:
    """An emitted program in memory; call it with the addresses of its buffers."""

    def __init__(self, emitted: Emitted, name: str = "main") -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(emitted.object_code))
        self._engine.finalize_object()
        address = self._engine.get_function_address(f"{name}_run")
        self._run = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address)
        self._libc = ctypes.CDLL(None)

    def __call__(self, addresses: Sequence[int], threads: int = 1, ticks: Array | None = None) -> int:
        buffers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        clock = ctypes.cast(self._libc.clock_gettime, ctypes.c_void_p).value
        fork = ctypes.cast(_fork, ctypes.c_void_p).value
        context = (ctypes.c_uint64 * 4)(threads, 0 if ticks is None else ticks.ctypes.data, fork, clock)
        return int(self._run(ctypes.addressof(buffers), None, ctypes.addressof(context)))


def aligned(array: Array, align: int = 64) -> Array:
    """A C-contiguous copy at an aligned address."""
    raw = np.zeros(array.nbytes + align, np.uint8)
    start = -raw.ctypes.data % align
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def emit_kernel(module: Module, kernel: str, target: Target | str | None = None, *, checked: bool = False) -> Emitted:
    """The module compiled with an entry that calls one kernel, its i-th buffer in slot i."""
    chosen = host() if target is None else row(target) if isinstance(target, str) else target
    count = len(module[kernel].buffers)
    return emit(module, EntryPlan("main", (Step(kernel, tuple((i, 0) for i in range(count))),)), chosen, checked=checked)


def run_kernel(
    module: Module,
    kernel: str,
    arrays: Sequence[Array],
    target: Target | str | None = None,
    *,
    threads: int = 1,
    checked: bool = False,
) -> int:
    """Compiles the module and runs one kernel on numpy arrays, in place (pass `aligned(...)` where buffers claim alignment).

    Returns the entry point's code: 0, or in a checked run 1 + the number of the violated check (printed).
    """
    buffers = module[kernel].buffers
    assert len(arrays) == len(buffers), f"{kernel} takes {len(buffers)} buffers, got {len(arrays)}"
    for b, a in zip(buffers, arrays, strict=True):
        assert a.dtype == b.dtype.numpy, f"{b.name} holds {b.dtype}, got {a.dtype}"
        assert a.size >= b.span, f"{b.name} spans {b.span} elements, got {a.size}"
        assert a.ctypes.data % max(b.align, 1) == 0, f"{b.name} must be aligned to {b.align} bytes"
        assert a.flags.c_contiguous, f"{b.name} must be contiguous"
    emitted = emit_kernel(module, kernel, target, checked=checked)
    code = Loaded(emitted)([a.ctypes.data for a in arrays], threads)
    if code:
        print(emitted.checks[code - 1])
    return code
