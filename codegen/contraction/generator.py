"""The entry of the contraction generator: `schedule`, and the panel width weights are best packed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from ...ir.contraction import Affine, Contraction
from ...ir.dims import as_int
from ...ir.dtypes import DType, bf16, f32
from ...ir.expr import Expr, cast, const, load, substitute, var
from ...ir.target import Target
from ..loop_ir import Buffer, For, Kernel, Stmt, Store
from .canonical import ACC, A, B, C, Loop, Nest, canonical, paired
from .layout import parameters
from .plan import Plan, accumulator
from .root import Root
from .tile import choose, panels_follow, plans
from .types import Epilogue, Operand, Scheduled


def schedule(
    spec: Contraction,
    a: Operand,
    b: Operand,
    c: Operand,
    epilogue: Epilogue | None,
    target: Target,
    *,
    threads: int,
    name: str,
) -> Scheduled:
    """The kernels that compute a contraction of operands that lie in memory as given.

    `threads` is a hint; neither the result nor the workspace depends on it. Raises CompileError for dtypes that are
    not supported, index maps that leave an operand, or a packing that does not fit the target's vectors.
    """
    del threads  # chunks are cut for any number of them
    nest = canonical(spec, a, b, c, epilogue)
    return schedule_nest(nest, (a, b, c), () if epilogue is None else epilogue.operands, target, name)


def schedule_nest(
    nest: Nest, abc: Sequence[Operand], extra: Sequence[Operand], target: Target, name: str, plan: Plan | None = None
) -> Scheduled:
    """`schedule` for a normal form, with a plan of the caller's own if given."""
    dtype = accumulator(nest.dtype)
    for x in abc[:2]:
        accumulator(x.dtype)  # refuses what cannot be multiplied
    if plan is None and target.bf16 and abc[A].dtype is bf16 and abc[B].dtype is bf16 and dtype is f32:
        nest = paired(nest) or nest
    if 0 in (x.extent for x in nest.free):
        buffers = parameters(nest, abc, extra)
        return Scheduled((Kernel(name, buffers, (), doc="no elements"),), name, 0, "no elements")
    if 0 in (x.extent for x in nest.reduce):
        return _empty_sums(nest, parameters(nest, abc, extra), dtype, name)
    return Root(nest, abc, extra, target, name, dtype, plan or choose(nest, target, abc[A].dtype, abc[B].dtype)).build()


@lru_cache(maxsize=1024)
def preferred_panel(spec: Contraction, target: Target, dtype: DType = f32) -> int:
    """The panel width B is best packed with beforehand, or 0 to leave it as it is.

    B must have every batch axis, and the columns of C, as far as they do not follow each other, be whole panels. Dense
    operands are assumed (the layout that follows from the index maps); the width is a multiple of the target's vector.
    """
    if spec.panel or any(not _moves(spec.b, x.name) for x in spec.of_kind("batch")):
        return 0
    if 0 in (as_int(spec.size(kind)) for kind in ("m", "n", "k")) or as_int(spec.size("n")) == 1:
        return 0
    lanes = target.lanes(dtype.bits)

    def dense(maps: Sequence[Affine]) -> Operand:
        strides: list[int] = []
        inner = 1
        for index in reversed(maps):
            strides.insert(0, inner)
            inner *= 1 + index.constant + sum(abs(c) * (as_int(spec.axis(n).extent) - 1) for n, c in index.terms)
        return Operand(dtype, tuple(strides), 64)

    a, b, c = dense(spec.a), dense(spec.b), dense(spec.c)
    unpacked = choose(canonical(spec, a, b, c, None), target, dtype, dtype)
    best: tuple[float, int] = (math.inf, 0)
    columns = _columns(canonical(spec.packed(lanes, ()), a, b, c, None))
    if not columns:
        return 0
    need = -(-columns[0].extent // lanes)
    most = 8 if as_int(spec.size("m")) <= 4 else 4
    for vectors in sorted({-(-need // -(-need // n)) for n in range(1, min(most, need) + 1)}):
        panel = vectors * lanes
        packed = canonical(spec.packed(panel, ()), a, b, c, None)
        if not panels_follow(columns, panel):
            continue
        found = min((x.cycles for x in plans(packed, target, dtype, dtype, whole=True)), default=math.inf)
        best = min(best, (found, panel))
    # a transposing or strided copy of B is what packing beforehand saves
    return best[1] if best[0] < unpacked.cycles * 1.02 else 0


def _columns(nest: Nest) -> list[Loop]:
    """The column loops of a packed B, innermost first."""
    return sorted((x for x in nest.free if x.strides[A] == 0 and x.strides[B] != 0), key=lambda x: x.strides[B])


def _moves(maps: Sequence[Affine], axis: str) -> bool:
    return any(n == axis for m in maps for n, _ in m.terms)


def _empty_sums(nest: Nest, buffers: tuple[Buffer, ...], dtype: DType, name: str) -> Scheduled:
    """C = epilogue(0): there is nothing to sum."""
    loops = [var(f"i{n}") for n in range(len(nest.free))]

    def at(stream: int) -> Expr:
        total: Expr = const(nest.base[stream])
        for v, x in zip(loops, nest.free, strict=True):
            total = total + v * x.strides[stream]
        return total

    values = {v: at(stream) for v, stream in nest.dims}
    markers = {var(ACC, nest.dtype): cast(const(0, dtype), nest.dtype)}
    for r in nest.reads:
        index = at(r.stream) if r.flat is None else substitute(r.flat, values)
        mask = None if r.mask is None else substitute(r.mask, values)
        markers[r.marker] = load(buffers[3 + r.operand], (index,), r.dtype, mask)
    body: tuple[Stmt, ...] = (Store(buffers[C], (at(C),), substitute(nest.value, values | markers)),)
    for v, x in reversed(list(zip(loops, nest.free, strict=True))):
        body = (For(v, const(0), const(x.extent), body),)
    return Scheduled((Kernel(name, buffers, body, doc="empty sums"),), name, 0, "the reduction is empty: C = epilogue(0)")
