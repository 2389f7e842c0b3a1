"""The least time that a workload could take on this machine: its arithmetic at the peak, or its bytes at the memory's speed.

Arithmetic is that of contractions done directly: Winograd's method does less, so that a fraction above 1 is possible with it,
and called effective; the operations of the compiled kernels are still held against the peak. Bytes are weights, inputs and
outputs, each moved once, at the rate at which this machine reads as many bytes again and again, or copies them, whichever is
higher. Any other fraction above 1 is an error of the measurement.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensorwright.benchmarks.peak import peak, read_rate
from tensorwright.benchmarks.priority import quiet
from tensorwright.ir.dims import as_int
from tensorwright.ir.dtypes import f32
from tensorwright.ir.graph import Graph
from tensorwright.ir.lowering import Branch, Contract, Decompose, Loop, While
from tensorwright.ir.target import Target


@dataclass(frozen=True)
class Roofline:
    """`ms`: the least time; `bound`: 'compute' or 'memory'; `gflops`, `gbps`: the machine's limits for this workload."""

    ms: float
    bound: str
    gflops: float
    gbps: float


def contraction_flops(graph: Graph) -> int:
    """Multiplications and additions of the contractions of a graph as traced, those in loops as often as they run."""
    total = 0
    todo: list[tuple[Any, int]] = [(n, 1) for n in graph.nodes()]
    while todo:
        node, times = todo.pop()
        low = node.op.lower(node)
        if isinstance(low, Contract):
            total += times * low.spec.flops
        elif isinstance(low, Loop):
            todo += [(n, times * as_int(low.length)) for n in low.body.nodes()]
        elif isinstance(low, Branch | While):
            parts = (low.then, low.orelse) if isinstance(low, Branch) else (low.test, low.body)
            todo += [(n, times) for part in parts for n in part.nodes()]
        elif isinstance(low, Decompose):
            todo += [(n, times) for n in _made(low.build(node), node.inputs)]
    return total


def _made(built: Any, stops: Any) -> list[Any]:
    """The nodes between `built` and `stops`."""
    found: dict[Any, None] = {}
    stack, edge = list(built if isinstance(built, tuple) else (built,)), set(stops)
    while stack:
        node = stack.pop()
        if node not in edge and node not in found:
            found[node] = None
            stack += node.inputs
    return list(found)


def roofline(flops: int, nbytes: int, target: Target, threads: int, precision: str = "f32") -> Roofline:
    """Measured limits of `threads` cores. In bf16, arithmetic at the rate of bf16 products, or f32's where the ISA has none."""
    compute = compute_peak(target, precision) * threads
    memory = max(read_rate(target, max(nbytes // threads, 1 << 14)) * threads, copy_rate(nbytes // 8 * 8, threads))
    if precision == "bf16":
        memory *= 2  # weights may be stored in half of the bytes: an upper bound
    seconds = {"compute": flops / compute, "memory": nbytes / memory}
    bound = max(seconds, key=lambda k: seconds[k])
    return Roofline(seconds[bound] * 1e3, bound, compute * 1e-9, memory * 1e-9)


def again(flops: int, nbytes: int, target: Target, threads: int, precision: str) -> Roofline:
    """`roofline` from new measurements: the first may have met a busy moment."""
    for cached in (peak, read_rate, copy_rate, compute_peak):
        cached.cache_clear()
    return roofline(flops, nbytes, target, threads, precision)


@functools.cache
def compute_peak(target: Target, precision: str) -> float:
    """Operations per second of one core. bf16 products count as twice f32's rate: nominal, as the ISA has it."""
    rate = peak(target, f32)
    return 2 * rate if precision == "bf16" and target.bf16 else rate


@functools.cache
def copy_rate(nbytes: int, threads: int) -> float:
    """Bytes per second, read and written, of our own elementwise kernel from one half of `nbytes` to the other."""
    import tensorwright as tw

    count = max(1024, min(nbytes, 1 << 28) // 8)
    x, out = np.ones(count, np.float32), np.zeros(count, np.float32)
    exe = tw.compile(lambda x: -x, tw.spec(count), threads=threads)
    quiet()
    times: list[float] = []
    end = time.perf_counter() + 0.15
    while time.perf_counter() < end or len(times) < 8:
        start = time.perf_counter()
        exe(x, out=out)
        times.append(time.perf_counter() - start)
    return 8 * count / min(times)
