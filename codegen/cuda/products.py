"""Products with weights in forms of their own, sparse or of few bits: a thread for each result adds up its terms in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from ...ir.dtypes import f32, i32
from ...ir.errors import CompileError
from ...ir.expr import Expr, binary, cast, const, fma, load, maximum, minimum, select, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Coded, Sparse, Window
from ...ir.target import Target
from ..groups import Body, Lowered, accumulator, body_name, flat_index, lowered, static_shape
from ..loop_ir import Alloc, Buffer, For, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, unit_axes
from ..simplify_index import Simplifier
from .grid import over
from .thread import ZERO

# (first, last, term): the steps of a result at an index, and the two factors of a step
Terms = tuple[Expr, Expr, Callable[[Expr], tuple[Expr, Expr]]]


def lower_sparse(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launch of one product with a sparse matrix and the elementwise chain on its result."""

    def terms(core: Node, buffers: Sequence[Buffer], at: Sequence[Expr], shape: Sequence[int]) -> Terms:
        form = core.op.lower(core)
        assert isinstance(form, Sparse)
        x, values, offsets, starts = buffers
        depth, entries = static_shape(core.inputs[0])[-1], static_shape(core.inputs[1])[0]
        block, column = binary("floordiv", at[-1], form.block), binary("mod", at[-1], form.block)
        row = binary("mul", flat_index(at[:-1], shape[:-1]), depth)
        images = static_shape(core.inputs[0])

        def term(e: Expr) -> tuple[Expr, Expr]:
            step = _held(offsets, e, depth * form.taps - 1)
            if form.window is None:
                left = load(x, (binary("add", row, step),), x.dtype)
            else:
                left = _seen(x, images, form.window, at, step)
            return left, load(values, (binary("add", binary("mul", e, form.block), column),), values.dtype)

        return _held(starts, block, entries), _held(starts, binary("add", block, 1), entries), term

    return _product(graph, Sparse, terms, name, aligns)


def _seen(x: Buffer, shape: Sequence[int], window: Window, at: Sequence[Expr], step: Expr) -> Expr:
    """What a window reads of an image for one step of the sum of a pixel; 0 beyond the image."""
    channel, tap = binary("floordiv", step, window.taps), binary("mod", step, window.taps)
    index: list[Expr] = [at[0]]
    inside: Expr = const(True, "bool")
    for d, part in enumerate((binary("floordiv", tap, window.kernel[1]), binary("mod", tap, window.kernel[1]))):
        place = binary("add", binary("mul", at[1 + d], window.stride[d]), binary("sub", part, window.padding[d][0]))
        inside = binary("and", inside, binary("and", binary("le", const(0), place), binary("lt", place, const(shape[1 + d]))))
        index.append(minimum(maximum(place, const(0)), const(shape[1 + d] - 1)))
    return select(inside, load(x, (flat_index([*index, channel], shape),), x.dtype), const(0, x.dtype))


def _held(b: Buffer, i: Expr, last: int) -> Expr:
    """An offset held inside its range, as the record has it: no pattern reads beyond its operands."""
    return minimum(maximum(cast(load(b, (i,), b.dtype), "i64"), const(0)), const(max(last, 0)))


def lower_coded(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launch of one product with weights of 8 or 4 bits (ir/ops/coded.py) and the elementwise chain on its result."""

    def terms(core: Node, buffers: Sequence[Buffer], at: Sequence[Expr], shape: Sequence[int]) -> Terms:
        form = core.op.lower(core)
        assert isinstance(form, Coded)
        x, panels, scales, *tables = buffers
        depth = static_shape(core.inputs[0])[-1]
        _, steps, width = static_shape(core.inputs[1])
        blocks = static_shape(core.inputs[2])[1]
        panel, column = binary("floordiv", at[-1], width), binary("mod", at[-1], width)
        row = binary("mul", flat_index(at[:-1], shape[:-1]), depth)

        def place(count: int, step: Expr) -> Expr:
            return binary("add", binary("mul", binary("add", binary("mul", panel, count), step), width), column)

        def term(k: Expr) -> tuple[Expr, Expr]:
            each = 32 // form.bits if panels.dtype is i32 else 1
            q = load(panels, (place(steps, binary("floordiv", k, each)),), panels.dtype)
            if each > 1:
                shift = cast(binary("mul", binary("mod", k, each), form.bits), i32)
                low = binary("and", binary("shr", q, shift), const((1 << form.bits) - 1, i32))
                top = const((1 << (form.bits - 1)) - 1, i32)
                q = select(binary("lt", top, low), binary("sub", low, const(1 << form.bits, i32)), low)
                q = load(tables[0], (cast(low, "i64"),), f32) if tables else q
            scale = load(scales, (place(blocks, binary("floordiv", k, form.block)),), scales.dtype)
            return load(x, (binary("add", row, k),), x.dtype), binary("mul", cast(q, f32), cast(scale, f32))

        return const(0), const(depth), term

    return _product(graph, Coded, terms, name, aligns)


def _product(
    graph: Graph,
    form: type[Sparse] | type[Coded],
    terms: Callable[[Node, Sequence[Buffer], Sequence[Expr], Sequence[int]], Terms],
    name: str,
    aligns: Sequence[int],
) -> Lowered:
    body = Body(graph, aligns)
    cores = [n for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), form)]
    if len(cores) != 1 or any(i not in body.operand for i in cores[0].inputs):
        raise CompileError(f"{body_name(graph)}: one product with its operands in memory is expected")
    (core,) = cores
    shape = static_shape(core)
    if any(static_shape(o) != shape for o in graph.outputs):
        raise CompileError(f"{body_name(graph)}: what follows a product has its shape {shape}")
    if not prod(shape):
        return lowered(body, name, [], doc="product of nothing")
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    kept, fixed = unit_axes(axes)
    simplifier = Simplifier(ranges_of(kept))
    body.normal = simplifier.simplify
    at = tuple(simplifier.simplify(fixed.get(a.var, a.var)) for a in axes)
    buffers = [body.buffers[body.operand[n]] for n in core.inputs]
    first, last, term = terms(core, buffers, at, shape)
    held = accumulator(core.dtype)
    acc, total, e = Buffer("acc", held, (1,), scope="register", align=16), var("total", core.dtype), var("step")
    start, stop = var("first"), var("last")
    left, right = term(e)
    old = load(acc, ZERO, held)
    statements: list[Stmt] = [
        Let(start, first),
        Let(stop, last),
        Alloc(acc),
        Store(acc, ZERO, const(0, held)),
        For(e, start, stop, (Store(acc, ZERO, fma(cast(left, held), cast(right, held), old)),)),
        Let(total, cast(old, core.dtype)),
    ]
    body.bound = lambda n, place: total if n is core and place == at else None
    flat = simplifier.simplify(flat_index(at, shape))
    statements += [Store(b, (flat,), body.value(o, at)) for b, o in zip(body.outputs, graph.outputs, strict=True)]
    made = over(kept or [Axis(var("one"), 1)], statements)
    return lowered(body, name, [made], doc=f"product: {body_name(graph)}", parallel=True, note="a thread for each result")


__all__ = ["lower_coded", "lower_sparse"]
