"""How close contractions come to the machine's multiply-add peak: the layers of the main job, and a sweep of random shapes.

Run as `tensorwright bench kernels`, or `python -m tensorwright.benchmarks.kernels --json out.json`. Each kernel is the one
that the compiler would call, weights packed as it packs them; times are the median of calls, the thread counts in turn,
each timed call after an untimed one with as many threads, and the peak is that of a loop over registers between them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tensorwright.codegen.contraction import Epilogue, Operand, Scheduled, preferred_panel, schedule
from tensorwright.codegen.loop_ir import Module
from tensorwright.ir import ops as _ops  # noqa: F401  registers the records
from tensorwright.ir.build import input_node
from tensorwright.ir.contraction import Contraction, strided_view
from tensorwright.ir.dims import as_int
from tensorwright.ir.dtypes import DType, as_dtype, f32, i8, i32, u8
from tensorwright.ir.expr import Expr, cast, fma, unary
from tensorwright.ir.fma import fma32
from tensorwright.ir.graph import Node
from tensorwright.ir.lowering import Contract, Load
from tensorwright.ir.op import make
from tensorwright.ir.ops.contract import pack
from tensorwright.ir.target import Target
from tensorwright.ir.types import TensorType
from tensorwright.runtime.host import cpu_name, resolve

from . import winograd_kernels
from .harness import Array, Native, aligned, compiled, interleaved, median
from .peak import bandwidth, peak, peak_run
from .priority import quiet

GOAL = {"x86-64-v4": 0.85, "x86-64-v3": 0.80}


@dataclass(frozen=True)
class Kernel:
    """One contraction to measure: its op, the shapes of its operands, and whether B is a weight (packed beforehand)."""

    name: str
    spec: Contraction
    a: tuple[int, ...]
    b: tuple[int, ...]
    weights: bool = False


def _kernel(name: str, node: Node, weights: bool) -> Kernel:
    form = node.op.lower(node)
    assert isinstance(form, Contract), name
    shapes = [tuple(as_int(d) for d in x.tensor.shape) for x in node.inputs]
    return Kernel(name, form.spec, shapes[0], shapes[1], weights)


def _input(name: str, *shape: int) -> Node:
    return input_node(name, TensorType(f32, shape))


def matmul(m: int, n: int, k: int, *, weights: bool = False, name: str = "") -> Kernel:
    """C[m, n] = A[m, k] B[k, n]."""
    return _kernel(name or f"gemm {m}x{n}x{k}", make("matmul", _input("a", m, k), _input("b", k, n)), weights)


def conv(c: int, o: int, size: int, kernel: int, *, stride: int = 1, layout: str = "NHWC", name: str = "") -> Kernel:
    """A convolution with `size` x `size` outputs, its input padded already; weights packed."""
    side = (size - 1) * stride + kernel
    x = _input("x", 1, side, side, c) if layout == "NHWC" else _input("x", 1, c, side, side)
    node = make("conv2d", x, _input("w", o, c, kernel, kernel), stride=(stride, stride), layout=layout)
    tag = f"{' /' + str(stride) if stride > 1 else ''}{' NCHW' if layout == 'NCHW' else ''}"
    return _kernel(name or f"conv {kernel}x{kernel} {c}-{o}@{size}{tag}", node, True)


def weight_gradient(c: int, o: int, size: int, kernel: int, *, stride: int = 1) -> Kernel:
    """dW of a convolution in NHWC."""
    side = (size - 1) * stride + kernel
    x, dy = _input("x", 1, side, side, c), _input("dy", 1, size, size, o)
    node = make("conv2d_weight_grad", x, dy, kernel_shape=(o, c, kernel, kernel), stride=(stride, stride), layout="NHWC")
    form = node.op.lower(node)
    while not isinstance(form, Contract):  # a transpose of the contraction: take the contraction
        built = form.build(node)  # type: ignore[union-attr]
        node = _contraction_under(built)
        form = node.op.lower(node)
    return _kernel(f"dW {kernel}x{kernel} {c}-{o}@{size}{' /' + str(stride) if stride > 1 else ''}", node, False)


def _contraction_under(node: Node | tuple[Node, ...]) -> Node:
    stack = list(node) if isinstance(node, tuple) else [node]
    while stack:
        n = stack.pop()
        if n.inputs and isinstance(n.op.lower(n), Contract):
            return n
        stack += n.inputs
    raise ValueError("no contraction in a decomposition")


def layers() -> list[Kernel]:
    """A square product and the convolutions of ResNet-50."""
    shapes = [(64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (512, 512, 7, 3)]
    shapes += [(64, 256, 56, 1), (256, 64, 56, 1), (2048, 512, 7, 1)]
    return [matmul(1024, 1024, 1024), *(conv(*s) for s in shapes)]


def _packed(b: Array, spec: Contraction, panel: int) -> Array:
    if b.dtype == np.int8:
        return pack(b, spec, panel, 4)
    order = tuple(x for kind in ("batch", "n", "k") for x in spec.of_kind(kind))
    view = strided_view(b, spec.b, order)
    batch = tuple(as_int(x.extent) for x in spec.of_kind("batch"))
    n, k = as_int(spec.size("n")), as_int(spec.size("k"))
    wide = np.zeros((*batch, -(-n // panel) * panel, k), b.dtype)
    wide[..., :n, :] = view.reshape(*batch, n, k)
    return np.ascontiguousarray(wide.reshape(*batch, -1, panel, k).swapaxes(-1, -2))


def _reference(spec: Contraction, a: Array, b: Array) -> Array:
    """In f64, by matrix products."""
    letters = {x.name: chr(97 + i) for i, x in enumerate(spec.axes)}
    used = [tuple(x for x in spec.axes if any(n == x.name for m in maps for n, _ in m.terms)) for maps in (spec.a, spec.b)]
    views = [strided_view(v.astype(np.float64), m, axes) for v, m, axes in zip((a, b), (spec.a, spec.b), used, strict=True)]
    texts = ["".join(letters[x.name] for x in axes) for axes in used]
    out = "".join(letters[m.terms[0][0]] for m in spec.c)
    result: Array = np.einsum(f"{texts[0]},{texts[1]}->{out}", *views, optimize=True)
    return result


@dataclass
class Prepared:
    """A kernel compiled, with operands in memory."""

    kernel: Kernel
    scheduled: Scheduled
    native: Native
    error: float
    bytes: int
    dtype: DType = f32


def prepare(kernel: Kernel, target: Target, check: bool = True, dtype: DType = f32) -> Prepared:
    """Compiles a kernel, runs it once and compares it with f64. With `dtype` i8 it multiplies u8 by i8, and gives u8 as a layer
    of a quantised network does: each channel of the sums scaled, shifted and rounded, to the bit as numpy does it."""
    rng = np.random.default_rng(1)
    octets = dtype is i8
    if octets:
        a, b = rng.integers(0, 256, kernel.a, np.uint8), rng.integers(-128, 128, kernel.b, np.int8)
    else:
        a, b = (rng.standard_normal(s, dtype=np.float32) for s in (kernel.a, kernel.b))
    spec = kernel.spec
    panel = preferred_panel(spec, target, dtype) if kernel.weights else 0
    operand_b = b
    if panel:
        operand_b, spec = _packed(b, spec, panel), spec.packed(panel, b.shape, 4 * octets)
    c = np.zeros([as_int(spec.axis(m.terms[0][0]).extent) for m in spec.c], np.uint8 if octets else np.float32)

    def operand(x: Array) -> Operand:
        return Operand(as_dtype(x.dtype), tuple(s // x.itemsize for s in x.strides), 64)

    more = _requantising(kernel, rng) if octets else []
    epilogue = Epilogue(tuple(map(operand, more)), _requantised, i32) if more else None
    scheduled = schedule(spec, operand(a), operand(operand_b), operand(c), epilogue, target, threads=2, name="kernel")
    module = Module(scheduled.kernels)
    arrays = [aligned(x) for x in (a, operand_b, c, *more)]
    if scheduled.workspace:
        arrays.append(aligned(np.zeros(scheduled.workspace, np.uint8)))
    native = Native(compiled(module, "kernel", target), arrays)
    native()
    error = 0.0
    if check:
        ref = _reference(kernel.spec, a, b)
        if more:
            ref = np.clip(np.rint(fma32(ref.astype(np.float32), *more)), 0, 255)
        error = float(np.abs(arrays[2] - ref).max() / max(float(np.abs(ref).max()), 1e-30))
    return Prepared(kernel, scheduled, native, error, sum(x.nbytes for x in (a, operand_b, c, *more)), dtype)


def _requantising(kernel: Kernel, rng: np.random.Generator) -> list[Array]:
    """A scale and a shift for each channel, such that bytes are used from end to end."""
    columns, steps = as_int(kernel.spec.size("n")), as_int(kernel.spec.size("k"))
    spread = math.sqrt(steps) * 147 * 74  # of the sums: bytes of 0 to 255, and of -128 to 127, have these root mean squares
    scale = rng.uniform(0.5, 1.5, columns) * 100 / spread
    return [scale.astype(np.float32), rng.uniform(100, 150, columns).astype(np.float32)]


def _requantised(total: Expr, index: tuple[Expr, ...], load: Load) -> Expr:
    scaled = fma(cast(total, f32), load(0, index[-1:]), load(1, index[-1:]))
    return cast(unary("round", scaled), u8)


def _row(p: Prepared, threads: int, seconds: float, best: float, target: Target, limit: float) -> dict[str, Any]:
    """A row of the table; `limit`: operations a second of one core at that time."""
    flops = p.kernel.spec.flops
    return {
        "name": p.kernel.name,
        "target": target.name,
        "threads": threads,
        "ours_ms": seconds * 1e3,
        "fastest_ms": best * 1e3,
        "gflops": flops / seconds / 1e9,
        "gbps": p.bytes / seconds / 1e9,
        "fraction_of_peak": flops / seconds / (limit * threads),
        "max_rel_error": p.error,
        "peers_ms": {},  # what is measured against here is the machine
        "best_peer": None,
        "ratio_to_best": None,
        "note": p.scheduled.note,
    }


def run(
    threads: Sequence[int] = (1, 2), target: str | Target = "host", *, seconds: float = 0.4, names: Sequence[str] = (),
    dtype: DType = f32,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per layer and thread count; `names` keeps the layers whose name holds one of them."""
    t = resolve(target)
    quiet()
    rows: list[dict[str, Any]] = []
    for kernel in layers():
        if names and not any(n in kernel.name for n in names):
            continue
        kernel = replace(kernel, weights=True) if dtype is i8 else kernel  # quantised layers have weights
        p = prepare(kernel, t, dtype=dtype)
        limit, operations = peak_run(t, dtype)
        # the peak of the same seconds, in calls as long as the kernel's: a core is slower while others keep the machine busy,
        # and what interrupts each of the kernel's calls would miss most calls of a shorter loop
        again = max(1, round(kernel.spec.flops / operations))

        def bare(limit: Native = limit, again: int = again) -> None:
            for _ in range(again):
                limit()

        alone, *times = interleaved([bare, *(lambda n=n, p=p: p.native(n) for n in threads)], seconds, settled=True)
        rate = again * operations / median(alone)
        row = {n: _row(p, n, median(x), min(x), t, rate) for n, x in zip(threads, times, strict=True)}
        for n in threads:
            if 1 in row and n != 1:
                row[n]["speedup"] = row[1]["ours_ms"] / row[n]["ours_ms"]
        rows += row.values()
    return rows


def random_kernels(count: int, seed: int) -> list[Kernel]:
    """Products and convolutions with sizes spread evenly over orders of magnitude."""
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    found: list[Kernel] = []
    while len(found) < count:
        kind = rng.random()
        if kind < 0.5:
            found.append(matmul(size(1, 1024), size(1, 1024), size(4, 1024), weights=rng.random() < 0.5))
            continue
        c, o, side, k, stride = size(1, 512), size(1, 512), size(4, 64), rng.choice((1, 1, 3, 3, 5)), rng.choice((1, 1, 2))
        if c * o * side * side * k * k > 5e8:
            continue
        if kind < 0.85:
            found.append(conv(c, o, side, k, stride=stride, layout="NCHW" if rng.random() < 0.2 else "NHWC"))
        else:
            found.append(weight_gradient(c, o, side, k, stride=stride))
    return found


def attainable(p: Prepared, target: Target) -> float:
    """Seconds that peak, memory and the call itself allow: what a shape's fraction is measured against."""
    slow = bandwidth(target, p.bytes)
    return max(p.kernel.spec.flops / peak(target), p.bytes / slow, 2e-7)


def reason(k: Kernel, target: Target) -> str:
    """Why a shape cannot come near what larger ones reach; empty if it should."""
    m, n, steps = (as_int(k.spec.size(x)) for x in ("m", "n", "k"))
    lanes = target.lanes(32)
    if m * n * steps < 100_000:
        return "less than a microsecond of work: the call, the loops around the tile and its prologue weigh more"
    if min(m, n) < lanes and steps < 16 * lanes:
        return f"one side of {min(m, n)} leaves lanes of {lanes} empty, and too few steps to let lanes run along them"
    if min(m, n) < lanes and max(m, n) > 64:
        return f"one side of {min(m, n)}: lanes along the reduction, whose sums are added at the end, or lanes left empty"
    if steps < 32:
        return f"{steps} steps: a tile's prologue and epilogue weigh as much as its sums"
    if not k.weights and m * n * steps < 60 * (m * steps + n * steps):
        return "copying an operand into the order of the tiles costs as much as the product itself"
    return ""


def sweep(target: str | Target = "host", *, count: int = 200, seed: int = 5, seconds: float = 0.02) -> list[dict[str, Any]]:
    """Random shapes, one thread. `fraction` is of what is attainable; `of_neighbours` relates it to the median of the five
    shapes with the nearest sizes; below one half, `reason` says why.
    """
    t = resolve(target)
    quiet()
    rows: list[dict[str, Any]] = []
    sizes: list[list[float]] = []
    for kernel in random_kernels(count, seed):
        p = prepare(kernel, t)
        (times,) = interleaved([p.native], seconds)
        best = min(times)
        row = _row(p, 1, median(times), best, t, peak(t))
        row["fraction"] = attainable(p, t) / best
        rows.append(row)
        sizes.append([math.log(max(1, as_int(kernel.spec.size(x)))) for x in ("m", "n", "k")])
        row["reason"] = reason(kernel, t)
    for row, at in zip(rows, sizes, strict=True):
        far = [sum((x - y) ** 2 for x, y in zip(s, at, strict=True)) for s in sizes]
        near = median([rows[i]["fraction"] for i in sorted(range(len(rows)), key=far.__getitem__)[1:6]])
        row["of_neighbours"] = row["fraction"] / near
    return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    target = resolve("host")
    return {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version(), "target": target.name,
            "peak_gflops": peak(target) / 1e9, "l1": target.l1, "l2": target.l2, "l3": target.l3}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text: fraction of peak first."""
    lines = [f"{'kernel':26} {'target':10} threads   of peak  GFLOP/s      ms  speedup  error"]
    for r in rows:
        speedup = f"{r['speedup']:7.2f}" if "speedup" in r else " " * 7
        lines.append(
            f"{r['name']:26} {r['target']:10} {r['threads']:7d} {100 * r['fraction_of_peak']:8.1f}% {r['gflops']:8.1f} "
            f"{r['ours_ms']:7.3f}  {speedup}  {r['max_rel_error']:.0e}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a layer misses its goal on one thread."""
    parser = argparse.ArgumentParser(prog="tensorwright bench kernels", description=__doc__)
    parser.add_argument(
        "--target", action="append", help="a target row, or 'host' (default: host, then x86-64-v3 if it runs here)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=("f32", "int8"), default="f32", help="int8: u8 by i8, to u8")
    parser.add_argument("--only", nargs="*", default=[], help="parts of layer names")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each measurement")
    parser.add_argument("--sweep", type=int, default=0, metavar="COUNT", help="also measure this many random shapes")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    effective: list[dict[str, Any]] = []
    targets = given.target or (["host", "x86-64-v3"] if resolve("host").name == "x86-64-v4" else ["host"])
    for target in targets:
        t = resolve(target)
        dtype = i8 if given.precision == "int8" else f32
        print(f"{t.name}: peak of one core {peak(t, dtype) / 1e9:.1f} {'GOP' if dtype is i8 else 'GFLOP'}/s")
        rows += run(given.threads, t, seconds=given.seconds, names=given.only, dtype=dtype)
        effective += [] if dtype is i8 else winograd_kernels.run(given.threads, t, seconds=given.seconds, names=given.only)
    print(table(rows))
    if effective:
        print(f"\nWhole layers by Winograd's method, at the effective rate of the direct sum:\n{table(effective)}")
    swept: list[dict[str, Any]] = []
    if given.sweep:
        swept = sweep(targets[0], count=given.sweep)
        low = [r for r in swept if r["of_neighbours"] < 0.5]
        print(f"\n{len(swept)} random shapes: {len(low)} below half of their neighbours")
        for r in sorted(low, key=lambda r: r["of_neighbours"]):
            print(f"  {r['name']:28} {r['of_neighbours']:.2f} of its neighbours: {r['reason'] or 'no reason known'}")
    if given.json:
        found = {"machine": machine(), "rows": rows, "winograd": effective, "sweep": swept, "geomean_ratio": None}
        given.json.write_text(json.dumps(found, indent=1))
    ones = [r for r in rows if r["threads"] == 1]
    return int(any(r["fraction_of_peak"] < GOAL.get(r["target"], 0.0) for r in ones))


if __name__ == "__main__":
    raise SystemExit(main())
