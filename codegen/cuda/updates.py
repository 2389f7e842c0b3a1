"""Running sums, scatters and sorts: a thread for each line, update column or row, in the order of the definition.

Scatters are deterministic: no two threads touch one element, and each element gets its updates in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.dims import as_int
from ...ir.expr import Expr, binary, cast, const, eq, load, postorder, var
from ...ir.graph import Graph
from ...ir.lowering import Scan, Scatter, Sort
from ...ir.target import Target
from ..groups import Body, Lowered, accumulator, combine, flat_index, identity, lowered, static_shape
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, nest, unit_axes
from ..simplify_index import Simplifier
from ..sorts import sort_statements
from .grid import over
from .thread import ZERO

ONE = [Axis(var("one"), 1)]


def lower_scan(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launch of a cumulative sum or product."""
    body = Body(graph, aligns)
    node, form = body.sole(Scan)
    shape = static_shape(node)
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    length, t = shape[form.axis], axes[form.axis].var
    kept, fixed = unit_axes([a for k, a in enumerate(axes) if k != form.axis])
    if 0 in shape:
        return lowered(body, name, [], doc="scan of nothing")
    index = [fixed.get(a.var, a.var) for a in axes]
    index[form.axis] = binary("sub", length - 1, t) if form.reverse else t
    simplifier = Simplifier(ranges_of([*kept, axes[form.axis]]))
    body.normal = simplifier.simplify
    held = accumulator(node.dtype)
    value = cast(body.value(node.inputs[0], index), held)
    total = Buffer("total", held, (1,), scope="register", align=16)
    old = load(total, ZERO, held)
    where = simplifier.simplify(flat_index(index, shape))
    steps: list[Stmt] = [
        Store(total, ZERO, combine(form.kind, old, value)),
        Store(body.outputs[0], (where,), cast(old, node.dtype)),
    ]
    if form.exclusive:
        steps.reverse()
    inner: list[Stmt] = [
        Alloc(total),
        Store(total, ZERO, identity(form.kind, held)),
        For(t, const(0), const(length), tuple(steps)),
    ]
    doc = f"scan ({form.kind}) along axis {form.axis}"
    return lowered(body, name, [over(kept or ONE, inner)], doc=doc, parallel=True, note=f"serial over {length}")


def lower_scatter(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """A copy of operand 0, then the updates: a thread for each position of the dimensions that do not collide goes through the
    others in order; where all may collide, a thread for each element of the result looks for its own."""
    body = Body(graph, aligns)
    node, form = body.sole(Scatter)
    out, shape = body.outputs[0], static_shape(node)
    extents = tuple(as_int(n) for n in form.extents)
    if 0 in shape:
        return lowered(body, name, [], doc="scatter into nothing")
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    kept, fixed = unit_axes(axes)
    at = tuple(fixed.get(a.var, a.var) for a in axes)
    updates = [Axis(var(f"u{k}"), n) for k, n in enumerate(extents)]
    some, one = unit_axes(updates)
    u = tuple(one.get(a.var, a.var) for a in updates)
    simplifier = Simplifier(ranges_of([*kept, *some]))
    body.normal = simplifier.simplify
    place = simplifier.simplify(flat_index(at, shape))
    first = body.value(node.inputs[0], at)
    if 0 in extents:
        return lowered(body, name, [over(kept or ONE, [Store(out, (place,), first)])], doc="scatter of nothing", parallel=True)
    body.forget()
    operand = body.reader(node)
    where = [simplifier.simplify(i) for i in form.index(u, operand)]
    value = form.value(u, operand)
    lets: list[Stmt] = []
    names: list[Expr] = []
    for k, i in enumerate(where):
        names.append(var(f"at{k}") if any(e.op == "load" for e in postorder([i])) else i)
        if names[-1] is not i:
            lets.append(Let(names[-1], i))
    serial = [a for a in some if a in updates[: form.serial_dims]]
    apart = [a for a in some if a not in serial]
    if apart:
        inside: Expr = const(True, "bool")
        for i, n in zip(names, shape, strict=True):
            inside = binary("and", inside, binary("and", binary("le", const(0), i), binary("lt", i, const(n))))
        flat = flat_index(names, shape)
        new = value if form.kind == "set" else combine(form.kind, load(out, (flat,), out.dtype), value)
        step: list[Stmt] = [*lets, If(inside, (Store(out, (flat,), new),))]
        copied = over(kept or ONE, [Store(out, (place,), first)])
        statements = [copied, over(apart, nest(serial, step))]
        note = f"in order over {form.serial_dims} dimensions"
    else:
        held = Buffer("held", out.dtype, (1,), scope="register", align=16)
        old = load(held, ZERO, out.dtype)
        mine: Expr = const(True, "bool")
        for i, j in zip(names, at, strict=True):
            mine = binary("and", mine, eq(i, j))
        new = value if form.kind == "set" else combine(form.kind, old, value)
        step = [*lets, If(mine, (Store(held, ZERO, new),))]
        body_ = [Alloc(held), Store(held, ZERO, first), *nest(serial, step), Store(out, (place,), old)]
        statements = [over(kept or ONE, body_)]
        note = "each element looks for its updates"
    return lowered(body, name, statements, doc="scatter", parallel=True, note=note)


def lower_sort(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launch of a sort: a thread for each row."""
    body = Body(graph, aligns)
    node, form = body.sole(Sort)
    if body.outputs[0].span == 0:
        return lowered(body, name, [], doc="sort of nothing")
    rows, statements, used = sort_statements(body, node, form)
    made = over(rows or ONE, statements)
    return lowered(
        body, name, [made], doc=f"sort along axis {form.axis}", workspaces=used, parallel=True, note="a thread for each row"
    )


__all__ = ["lower_scan", "lower_scatter", "lower_sort"]
