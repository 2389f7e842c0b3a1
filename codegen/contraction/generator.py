"""The entry of the contraction generator: `schedule`, and the panel width weights are best packed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ...ir.contraction import Affine, Contraction
from ...ir.dims import as_int
from ...ir.dtypes import DType, bf16, f32, i8, i16, i32, u8
from ...ir.errors import CompileError
from ...ir.expr import Expr, cast, const, load, substitute, var
from ...ir.target import Target
from ..loop_ir import Buffer, For, Kernel, Stmt, Store
from .canonical import ACC, A, B, C, Loop, Nest, canonical, paired
from .layout import parameters
from .plan import Plan, accumulator
from .root import Root
from .tile import choose, panels_follow, plans
from .types import Epilogue, NoPartError, Operand, Part, Scheduled

MOST_VECTORS = 4  # of a panel: with 8, one row of A streams B from beyond L2 at 80 to 95% of the speed
WITHOUT_COPY = 1.02  # cycles that a panel may cost more which needs no copy of B
MOST_NARROW = 3  # whole vectors of columns up to which half a vector more is not rounded up
NARROW_GAIN = 0.95  # ... if the model says that it is faster by this


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
    rank: int = 0,
    part: Part | None = None,
) -> Scheduled:
    """The kernels that compute a contraction of operands that lie in memory as given.

    `threads` is a hint; neither the result nor the workspace depends on it. `rank` asks for a plan that the cost model puts
    after its first. With `part` only so many rows are computed, from where A and C are given on, with the bits that all would
    have. Raises NoPartError where that cannot be, CompileError for dtypes that are
    not supported, index maps that leave an operand, or a packing that does not fit the target's vectors.
    """
    del threads  # chunks are cut for any number of them
    nest = canonical(spec, a, b, c, epilogue)
    further = () if epilogue is None else epilogue.more
    plan = None
    if part is not None:
        nest, plan = _part(nest, part, target, a.dtype, b.dtype)
    extra = () if epilogue is None else epilogue.operands
    return schedule_nest(nest, (a, b, c, *further), extra, target, name, plan, rank)


def _part(nest: Nest, part: Part, target: Target, a: DType, b: DType) -> tuple[Nest, Plan]:
    """The form of some rows, and a plan that adds up each sum as that of all rows does: step after step, in one register.

    Raises NoPartError for anything but rows side by side times a packed matrix, with an epilogue that is the same in every row.
    """
    rows = [x for x in nest.free if x.strides[A] and not x.strides[B]]
    columns = [x for x in nest.free if x.strides[B] and not x.strides[A]]
    plain = (
        nest.panel and nest.group is None and not nest.panel_pairs and nest.dtype is a is b and not nest.more and not nest.dims
    )
    if not plain or len(rows) != 1 or len(columns) != 1 or len(nest.free) != 2 or len(nest.reduce) != 1:
        raise NoPartError("the contraction is no product of rows and a packed matrix")
    (all_rows,) = rows
    whole = all(all_rows.extent * all_rows.strides[s] == nest.spans[s] for s in (A, C)) and not any(nest.base[s] for s in (A, C))
    if not whole or any(r.stream < 0 or all_rows.strides[r.stream] for r in nest.reads) or part.rows >= all_rows.extent:
        raise NoPartError("the rows of the contraction do not lie side by side, or its epilogue differs from row to row")

    def simple(p: Plan) -> bool:
        return p.row == A and p.cut < 0 and not (p.along_k or p.pack_row or p.pack_col or p.split or p.row_source)

    before = choose(nest, target, a, b)
    if not simple(before) or before.parts > 1 or _narrowed(target, nest.panel, nest.dtype) is not target:
        raise NoPartError("the sums of the whole contraction are added up in another order")
    fewer = tuple(replace(x, extent=part.rows) if x is all_rows else x for x in nest.free)
    left_out = all_rows.extent - part.rows
    spans = tuple(n - left_out * all_rows.strides[s] if s in (A, C) else n for s, n in enumerate(nest.spans))
    new = replace(nest, free=fewer, spans=spans)
    lanes = target.lanes(nest.dtype.bits)
    found = [p for p in plans(new, target, a, b) if simple(p) and (part.narrow or p.parts == 1)]
    if part.narrow:  # to be woven into another loop, in small pieces
        found = [p.decided(unroll=min(p.unroll, 2)) for p in found if p.tile_rows == part.rows and p.columns == lanes]
    if not found:
        raise NoPartError("there is no such tile")
    return new, min(found, key=lambda p: p.cycles).decided(parts=1)


def schedule_nest(
    nest: Nest,
    abc: Sequence[Operand],
    extra: Sequence[Operand],
    target: Target,
    name: str,
    plan: Plan | None = None,
    rank: int = 0,
) -> Scheduled:
    """`schedule` for a normal form, with a plan of the caller's own if given."""
    dtype = accumulator(nest.dtype)
    for x in abc[:2]:
        accumulator(x.dtype)  # refuses what cannot be multiplied
    if plan is None:
        nest = _in_pairs(nest, target, abc[A].dtype, abc[B].dtype)
        if nest.panel_pairs and nest.pairs is None:
            raise CompileError(f"B is packed in pairs, which {target.name} without AVX512_BF16 has no instruction for")
    if 0 in (x.extent for x in nest.free):
        buffers = parameters(nest, abc, extra)
        return Scheduled((Kernel(name, buffers, (), doc="no elements"),), name, 0, "no elements")
    if 0 in (x.extent for x in nest.reduce):
        return _empty_sums(nest, parameters(nest, abc, extra), dtype, name)
    target = _narrowed(target, nest.panel, dtype)
    plan = plan or choose(nest, target, abc[A].dtype, abc[B].dtype, rank)
    return Root(nest, abc, extra, target, name, dtype, plan).build()


def _narrowed(target: Target, panel: int, sums: DType) -> Target:
    """The target with vectors of half the width, where panels are an odd number of those: 20 columns are three of 8 lanes, or two
    of 16, which take as long as four of 8 where the units for products are 256 bits wide."""
    half = replace(target, vector_bits=target.vector_bits // 2)
    odd = panel % target.lanes(sums.bits) and panel % half.lanes(sums.bits) == 0
    return half if odd and target.vector_bits == 512 else target


def _in_pairs(nest: Nest, target: Target, a: DType, b: DType) -> Nest:
    """The form in pairs, of bf16 operands on a target that multiplies them so, or of bytes and i16."""
    if a in (i8, u8) and b in (i8, u8) and nest.dtype is i32 and nest.pairs is None:
        return paired(nest, 4, f"{a}{b}") or nest
    if a is i16 and b is i16 and nest.dtype is i32 and nest.pairs is None:
        return paired(nest, 2, "i16") or nest
    if not target.bf16 or a is not bf16 or b is not bf16 or nest.dtype is not f32 or nest.pairs is not None:
        return nest
    return paired(nest) or nest


def panel_pairs(spec: Contraction, target: Target, dtype: DType) -> int:
    """How many steps panels of B hold side by side, or 0: two of i16, of bf16 on a target that multiplies such, four of bytes,
    where the extent of the last k axis is a multiple."""
    k = spec.of_kind("k")
    ways = 4 if dtype in (i8, u8) else 2 if dtype is i16 or (target.bf16 and dtype is bf16) else 0
    return ways if ways and k and as_int(k[-1].extent) % ways == 0 else 0


@lru_cache(maxsize=1024)
def preferred_panel(spec: Contraction, target: Target, dtype: DType = f32) -> int:
    """The panel width B is best packed with beforehand, or 0 to leave it as it is.

    B must have every batch axis, and the columns of C, as far as they do not follow each other, be whole panels. Dense
    operands are assumed (the layout that follows from the index maps); the width is a multiple of the target's vector. Panels
    of 16 bits and of bytes are those of `panel_pairs`, or none.
    """
    pairs = panel_pairs(spec, target, dtype)
    if dtype.bits < 32 and not pairs:
        return 0
    if spec.panel or any(not _moves(spec.b, x.name) for x in spec.of_kind("batch")):
        return 0
    if 0 in (as_int(spec.size(kind)) for kind in ("m", "n", "k")) or as_int(spec.size("n")) == 1:
        return 0
    sums = accumulator(dtype)
    other = {i8: u8, u8: i8}.get(dtype, dtype)  # the passes see to it that one is signed and one is not
    lanes = target.lanes(sums.bits)

    def form(panel: int) -> Nest:
        asked = spec.packed(panel, (), pairs) if panel else spec
        return _in_pairs(replace(canonical(asked, a, b, c, None), dtype=sums), target, other, dtype)

    def dense(maps: Sequence[Affine]) -> Operand:
        strides: list[int] = []
        inner = 1
        for index in reversed(maps):
            strides.insert(0, inner)
            inner *= 1 + index.constant + sum(abs(c) * (as_int(spec.axis(n).extent) - 1) for n, c in index.terms)
        return Operand(dtype, tuple(strides), 64)

    a, b, c = dense(spec.a), dense(spec.b), dense(spec.c)
    if spec.groups:
        most = as_int(spec.size("n")) // spec.groups // lanes
        panels = [n * lanes * spec.groups for n in (1, 2) if most and most % n == 0]
        if panels:
            return min(panels, key=lambda x: min(p.cycles for p in plans(form(x), target, dtype, dtype)))
        spec = replace(spec, groups=0)
    unpacked = choose(form(0), target, dtype, dtype)
    best: tuple[float, int] = (math.inf, 0)
    columns = _columns(form(lanes))
    if not columns:
        return 0
    need = -(-columns[0].extent // lanes)
    lying = need * lanes if [x.strides[B] for x in form(0).reduce] == [need * lanes] else 0  # this panel is B as it lies
    for vectors in sorted({-(-need // -(-need // n)) for n in range(1, min(MOST_VECTORS, need) + 1)}):
        panel = vectors * lanes
        if not panels_follow(columns, panel):
            continue
        found = min((x.cycles for x in plans(form(panel), target, dtype, dtype, whole=True)), default=math.inf)
        best = min(best, (found / WITHOUT_COPY if panel == lying else found, -panel))  # of equals the widest
    panel = -(-columns[0].extent // (lanes // 2)) * (lanes // 2)
    half = _narrowed(target, panel, sums)
    if half is not target and panel <= MOST_NARROW * lanes and not pairs and panels_follow(columns, panel):
        found = min((x.cycles for x in plans(form(panel), half, dtype, dtype, whole=True)), default=math.inf)
        best = min(best, (found / NARROW_GAIN, -panel))
    # a transposing or strided copy of B is what packing beforehand saves
    return -best[1] if best[0] < unpacked.cycles * 1.02 else 0


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
