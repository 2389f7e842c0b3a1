"""Runs single kernels natively and times them: what the kernel benchmarks and the peak measurement share."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensorwright.benchmarks.priority import quiet  # noqa: F401 (what is timed here asks for it)
from tensorwright.codegen.llvm import Emitted, emit
from tensorwright.codegen.llvm.placement import placement as placement_code
from tensorwright.codegen.loop_ir import Module
from tensorwright.codegen.plan import EntryPlan, Step
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.program import PLACEMENT
from tensorwright.ir.target import Target
from tensorwright.runtime import placement
from tensorwright.runtime.buffers import empty
from tensorwright.runtime.native import NativeProgram
from tensorwright.runtime.threads import context

Array = np.ndarray[Any, Any]


def aligned(array: Array, align: int = 4096) -> Array:
    """A C-contiguous copy at an aligned address, in memory such as the runtime gives to weights (huge pages if large)."""
    out = empty(array.shape, as_dtype(array.dtype), align)
    out[...] = array
    return out


def compiled(module: Module, kernel: str, target: Target) -> Emitted:
    """The module with an entry that calls one kernel, its i-th buffer in slot i."""
    placement.offer(lambda: (placement_code(target), PLACEMENT))  # as a compiled model's threads are placed
    count = len(module[kernel].buffers)
    return emit(module, EntryPlan("bench", (Step(kernel, tuple((i, 0) for i in range(count))),)), target)


class Native:
    """One kernel in memory with its arrays; calling it runs it once."""

    def __init__(self, emitted: Emitted, arrays: Sequence[Array]) -> None:
        self.arrays = list(arrays)
        self.program = NativeProgram(emitted.object_code, "bench_run")
        self._addresses = (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))
        self._buffers = ctypes.addressof(self._addresses)
        self._contexts: dict[int, int] = {}

    def __call__(self, threads: int = 1) -> None:
        at = self._contexts.get(threads)
        if at is None:
            at = self._contexts[threads] = ctypes.addressof(context(threads))
        self.program.run(self._buffers, None, at)


def interleaved(
    runs: Sequence[Callable[[], object]], seconds: float, least: int = 5, *, settled: bool = False
) -> list[list[float]]:
    """Seconds per call of each, measured in turn until `seconds` have passed for each and there are `least` of each.

    A call shorter than 20 microseconds is timed as a loop of several. With `settled` each timed call follows an untimed one of
    the same, as a kernel follows others in a network: workers are awake, and each core has in its cache what it had before.
    """
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, int(20e-6 / max(1e-7, time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[0]) < least:
        for run, repeat, out in zip(runs, repeats, times, strict=True):
            if settled:
                run()
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            out.append((time.perf_counter() - start) / repeat)
    return times


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]
