"""The most multiply-adds a core of this machine does in a second: a loop over registers, built as loop IR like any kernel."""

from __future__ import annotations

import functools

import numpy as np
from tensorwright.codegen.loop_ir import Alloc, Buffer, For, Kernel, Let, Module, Stmt, Store, vector_variable
from tensorwright.ir.dtypes import DType, f32, i8, i32
from tensorwright.ir.expr import Expr, binary, const, fma, fma_integers, load, var
from tensorwright.ir.target import Target

from .harness import Native, aligned, compiled, interleaved
from .priority import quiet

STEPS = 20_000


def peak_kernel(target: Target, dtype: DType = f32) -> tuple[Module, int]:
    """A kernel whose inner loop is multiply-adds alone, on independent accumulators; and its number of operations."""
    octets = dtype is i8  # products of u8 and i8, four at a time, added up in i32
    if octets:
        dtype = i32
    lanes = target.lanes(dtype.bits)
    count = min(16, target.registers - 2)
    source = Buffer("source", dtype, (2 * lanes,), align=64, writable=False)
    out = Buffer("out", dtype, (lanes,), align=64)
    acc = Buffer("acc", dtype, (count, lanes), scope="register", align=64)
    x, y = vector_variable("x", dtype, lanes), vector_variable("y", dtype, lanes)

    def get(i: int) -> Expr:
        return load(acc, (const(i), const(0)), dtype, None, lanes)

    body: list[Stmt] = [Let(v, load(source, (const(k * lanes),), dtype, None, lanes)) for k, v in enumerate((x, y))]
    body.append(Alloc(acc))
    body += [Store(acc, (const(i), const(0)), const(0, dtype, lanes)) for i in range(count)]
    unroll = 4
    step: list[Stmt] = []
    for _ in range(unroll):
        for i in range(count):
            # without fusing: an add and a multiply per accumulator, which is what such a kernel issues
            separate = binary("add", binary("mul", get(i), x), y)
            value = fma_integers(x, y, get(i), "u8i8") if octets else fma(x, y, get(i)) if target.fma else separate
            step.append(Store(acc, (const(i), const(0)), value))
    body.append(For(var("i"), const(0), const(STEPS), tuple(step)))
    total = get(0)
    for i in range(1, count):
        total = binary("add", total, get(i))
    body.append(Store(out, (const(0),), total))
    return Module((Kernel("peak", (source, out), tuple(body)),)), STEPS * unroll * count * lanes * (8 if octets else 2)


@functools.cache
def peak_run(target: Target, dtype: DType = f32) -> tuple[Native, int]:
    """The loop of multiply-adds, ready to run on one core, and its number of operations."""
    module, flops = peak_kernel(target, dtype)
    dtype = i32 if dtype is i8 else dtype
    lanes = target.lanes(dtype.bits)
    source = np.concatenate([np.full(lanes, 0.999), np.full(lanes, 1e-3)]).astype(dtype.numpy)
    return Native(compiled(module, "peak", target), [aligned(source), aligned(np.zeros(lanes, dtype.numpy))]), flops


@functools.cache
def peak(target: Target, dtype: DType = f32, seconds: float = 0.3) -> float:
    """Operations per second of one core on a target row; the best of many short runs."""
    native, flops = peak_run(target, dtype)
    quiet()
    (times,) = interleaved([native], seconds)
    return flops / min(times)


STREAMS = (1, 2, 4)  # the prefetchers follow several: on Zen 4, two streams from L2 gave 6% more than one


def read_kernel(target: Target, size: int, streams: int) -> tuple[Module, int]:
    """A kernel that adds up about `size` bytes, read as `streams` pieces side by side; and how many it reads."""
    lanes, accumulators = target.lanes(32), 8
    unroll = accumulators // streams
    part = min(size, 1 << 28) // 4 // (streams * lanes * unroll) * lanes * unroll
    source = Buffer("source", f32, (part * streams,), align=64, writable=False)
    out = Buffer("out", f32, (lanes,), align=64)
    acc = Buffer("acc", f32, (accumulators, lanes), scope="register", align=64)
    i = var("i")

    def get(k: int) -> Expr:
        return load(acc, (const(k), const(0)), f32, None, lanes)

    step = [
        Store(acc, (const(k), const(0)), binary("add", get(k), load(source, (i + at,), f32, None, lanes)))
        for k, at in enumerate(s * part + u * lanes for u in range(unroll) for s in range(streams))
    ]
    body: list[Stmt] = [Alloc(acc)]
    body += [Store(acc, (const(k), const(0)), const(0, f32, lanes)) for k in range(accumulators)]
    body.append(For(i, const(0), const(part), tuple(step), step=lanes * unroll))
    total = get(0)
    for k in range(1, accumulators):
        total = binary("add", total, get(k))
    body.append(Store(out, (const(0),), total))
    return Module((Kernel("read", (source, out), tuple(body)),)), part * streams * 4


@functools.cache
def read_rate(target: Target, size: int) -> float:
    """Bytes per second of one core reading `size` bytes again and again, in the number of streams that is fastest."""
    kernels = [read_kernel(target, size, streams) for streams in STREAMS]
    out = aligned(np.zeros(target.lanes(32), np.float32))
    natives = [
        Native(compiled(module, "read", target), [aligned(np.zeros(nbytes // 4, np.float32)), out]) for module, nbytes in kernels
    ]
    quiet()
    times = interleaved(natives, 0.3)
    return max(nbytes / min(t) for (_, nbytes), t in zip(kernels, times, strict=True))


def bandwidth(target: Target, size: int) -> float:
    """Bytes per second of one core that reads `size` bytes over and over, from the cache level they fit; within a factor of 2."""
    return read_rate(target, 1 << max(14, min(28, (size - 1).bit_length())))
