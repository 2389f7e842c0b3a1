"""Scatters: a copy of operand 0, then updates put into it, in order over the dimensions that may collide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from ..ir.dims import as_int
from ..ir.dtypes import i64
from ..ir.expr import Expr, binary, broadcast, const, load, postorder, substitute, var
from ..ir.graph import Graph
from ..ir.lowering import Scatter
from ..ir.target import Target
from .groups import Body, Lowered, combine, flat_index, lanes_for, lowered, static_shape
from .loop_ir import For, If, Let, Stmt, Store
from .maps import BYTES_PER_NS, Box, box_nest, merge_axes, ranges_of, restrict, stride_along
from .nests import PARALLEL_NS, Axis, Spot, VectorLoop, has_masks, nest, unit_axes, widen
from .simplify_index import Simplifier


def lower_scatter(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of a scatter. Each element of the result gets its updates in row-major order of the updates."""
    body = Body(graph, aligns)
    node, form = body.sole(Scatter)
    out, shape = body.outputs[0], static_shape(node)
    copied, shared = _copy(body, graph, target)
    extents = tuple(as_int(n) for n in form.extents)
    if 0 in extents:
        return lowered(body, name, copied, doc="scatter of nothing", parallel=shared)
    axes = [Axis(var(f"u{k}"), n) for k, n in enumerate(extents)]
    kept, fixed = unit_axes(axes)
    u = tuple(fixed.get(a.var, a.var) for a in axes)
    simplifier = Simplifier(ranges_of(kept))
    body.normal = simplifier.simplify

    operand = body.reader(node)
    where = tuple(simplifier.simplify(i) for i in form.index(u, operand))
    value = simplifier.simplify(form.value(u, operand))
    serial = {a.var for a in axes[: form.serial_dims]}
    # Index parts that do not depend on the parallel dimensions are computed once for each update row.
    names: dict[Expr, Expr] = {}
    for i in where:
        if any(e.op == "load" for e in postorder([i])) and not any(e.op == "var" and e not in serial for e in postorder([i])):
            names.setdefault(i, var(f"at{len(names)}", i64))
    lets = [Let(n, e) for e, n in names.items()]
    where = tuple(names.get(i, i) for i in where)
    inside: Expr | None = None
    for i, n in zip(where, shape, strict=True):
        low, high = simplifier.bounds(simplifier.linear(i))
        for needed, test in ((low < 0, binary("le", const(0), i)), (high >= n, binary("lt", i, const(n)))):
            if needed:
                inside = test if inside is None else binary("and", inside, test)
    flat = simplifier.simplify(flat_index(where, shape))
    rest = restrict([a for a in kept if a.var not in serial], [(out, flat, value)])
    loops = [a for a in kept if a.var in serial]
    invariant = inside is None or not any(e.op == "var" and e in {a.var for a in rest.axes} for e in postorder([inside]))
    nanoseconds = int(np.prod(extents, dtype=np.int64)) * max(3.0 * out.dtype.itemsize / BYTES_PER_NS, 0.5)
    if not invariant or not rest.axes:
        body_stmts: list[Stmt] = [Store(out, (flat,), _updated(form.kind, load(out, (flat,), out.dtype), value))]
        if inside is not None:
            body_stmts = [If(inside, tuple(body_stmts))]
        inner = nest(rest.axes, body_stmts)
        return lowered(
            body, name, [*copied, *nest(loops, [*lets, *inner])], doc="scatter, one element at a time",
            in_place=frozenset({(0, 0)}) if _separate(graph) else frozenset(), parallel=shared, note="serial",
        )  # fmt: skip
    rest = merge_axes(Box(rest.axes, rest.stores, rest.simplifier))
    statements, parallel = _vector_updates(rest, loops, lets, inside, form.kind, target=target, nanoseconds=nanoseconds)
    return lowered(
        body, name, [*copied, *statements], doc=f"scatter, serial over {form.serial_dims} dimensions",
        in_place=frozenset({(0, 0)}) if _separate(graph) else frozenset(), parallel=parallel or shared,
        note="vectors over what does not collide",
    )  # fmt: skip


def _updated(kind: str, old: Expr, value: Expr) -> Expr:
    """What an element becomes."""
    return value if kind == "set" else combine(kind, old, value)


def _separate(graph: Graph) -> bool:
    """Whether operand 0 is an operand of the group that nothing else in it reads."""
    node = graph.outputs[0]
    return node.inputs[0] in graph.inputs and graph.inputs.index(node.inputs[0]) == 0 and node.inputs.count(node.inputs[0]) == 1


def _copy(body: Body, graph: Graph, target: Target) -> tuple[list[Stmt], bool]:
    """out = operand 0."""
    node = graph.outputs[0]
    shape = static_shape(node)
    axes, fixed = unit_axes([Axis(var(f"i{k}"), n) for k, n in enumerate(shape)])
    index = tuple(fixed.get(v, v) for v in (var(f"i{k}") for k in range(len(shape))))
    simplifier = Simplifier(ranges_of(axes))
    body.normal = simplifier.simplify
    value = body.value(node.inputs[0], index)
    box = merge_axes(restrict(axes, [(body.outputs[0], simplifier.simplify(flat_index(index, shape)), value)]))
    body.forget()
    return box_nest(box, target, count())


def _vector_updates(
    rest: Box,
    loops: Sequence[Axis],
    lets: Sequence[Stmt],
    inside: Expr | None,
    kind: str,
    *,
    target: Target,
    nanoseconds: float,
) -> tuple[list[Stmt], bool]:
    """Update rows one after another; a row in vectors. Threads share blocks of columns, each going through all rows."""
    out, flat, value = rest.stores[0]
    axis = rest.axes[-1]
    lanes = lanes_for(target, [out.dtype])
    while lanes > 1 and lanes // 2 >= axis.extent:
        lanes //= 2
    stride = stride_along(rest, flat, axis.var)
    masks = has_masks(target, [out.dtype])

    def piece(spot: Spot) -> list[Stmt]:
        at = substitute(flat, {axis.var: spot.position}) if stride == 1 or spot.lanes == 1 else widen(flat, axis.var, spot)
        old = load(out, (at,), out.dtype, spot.mask, spot.lanes)
        new = _updated(kind, old, broadcast(widen(value, axis.var, spot), spot.lanes))
        return [Store(out, (at,), new, spot.mask)]

    def guarded(inner: list[Stmt]) -> list[Stmt]:
        return [*lets, *(inner if inside is None else [If(inside, tuple(inner))])]

    loop = VectorLoop(lanes, 2, "mask" if masks else "narrow")
    block = 4 * lanes
    if nanoseconds >= PARALLEL_NS and axis.extent >= 2 * block:
        chunks = axis.extent // block
        p = var("column_block")
        base = binary("add", binary("mul", p, block), axis.start)
        part = Axis(axis.var, block)
        rows = nest(loops, guarded(nest(rest.axes[:-1], loop.over(part, piece, base))))
        done: list[Stmt] = [For(p, const(0), const(chunks), tuple(rows), "parallel")]
        if axis.extent % block:
            left = Axis(axis.var, axis.extent % block, axis.start + chunks * block)
            done += nest(loops, guarded(nest(rest.axes[:-1], loop.over(left, piece))))
        return done, True
    return nest(loops, guarded(nest(rest.axes[:-1], loop.over(axis, piece)))), False
