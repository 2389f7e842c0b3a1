"""Running sums, scatters and sorts of any size."""

from __future__ import annotations

from collections.abc import Iterator

from ...ir.dims import product
from ...ir.dtypes import bool_, i64
from ...ir.expr import Expr, binary, cast, const, load, logical_not, maximum, minimum, postorder, select, substitute, var
from ...ir.lowering import Scan, Scatter, Sort
from ...ir.target import Target
from ..groups import accumulator, combine, identity, lanes_for
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..nests import Spot
from ..sorts import before
from .body import GenericBody
from .elementwise import box
from .loops import FINE, UNKNOWN, Walk, nest, shared, wide


def scan_statements(body: GenericBody, target: Target, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """A running sum or product: serial along its axis, vectors along the last of the others, threads over the rest."""
    space = body.space
    node, form = body.sole(Scan)
    axes = space.axes_over("i", node.shape)
    along = axes[form.axis]
    t = along.var
    place = binary("sub", binary("sub", space.extent(along), 1), t) if form.reverse else t
    index: list[Expr] = [const(0) if a.extent == 1 and a is not along else a.var for a in axes]
    index[form.axis] = place
    value = space.simplify(body.value(node.inputs[0], index))
    flat = body.flat(node, [space.simplify(i) for i in index])
    others = [a for a in axes if a is not along and a.extent != 1]
    inner = others[-1] if others and axes.index(others[-1]) > form.axis else None
    held = accumulator(node.dtype)
    lanes = lanes_for(target, [node.dtype, held]) if inner is not None else 1
    out = body.outputs[0]

    def column(spot: Spot) -> list[Stmt]:
        n = spot.lanes
        total = Buffer(f"total{next(numbers)}", held, (n,), scope="register", align=64)
        at = (const(0),)
        old = load(total, at, held, lanes=n)
        here, there = value, flat
        if inner is not None:
            here, there = wide(value, inner.var, spot), substitute(flat, {inner.var: spot.position})
        new = combine(form.kind, old, cast(here, held))
        steps: list[Stmt] = [Store(total, at, new), Store(out, (there,), cast(old, node.dtype), spot.mask)]
        if form.exclusive:
            steps.reverse()
        start = Store(total, at, identity(form.kind, held, n))
        return [Alloc(total), start, For(t, const(0), space.extent(along), tuple(steps))]

    work = binary("mul", space.extent(along), FINE)
    if inner is None:
        return shared(space, others, column(Spot(t, 1)), work, f"q{next(numbers)}")
    walk = Walk.of(target, [node.dtype, held], lanes, 1)
    stmts = walk.over(space, inner, column)
    return shared(space, others[:-1], stmts, binary("mul", work, space.extent(inner)), f"q{next(numbers)}")


def scatter_statements(body: GenericBody, target: Target, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """A copy of operand 0, then the updates one after the other in row-major order."""
    space = body.space
    node, form = body.sole(Scatter)
    axes = space.axes_over("i", node.shape)
    index = tuple(const(0) if a.extent == 1 else a.var for a in axes)
    copied = (body.outputs[0], body.flat(node, index), space.simplify(body.value(node.inputs[0], index)))
    stmts, parallel = box(space, [a for a in axes if a.extent != 1], (copied,), target, numbers)
    body.forget()
    updates = space.axes_over("u", form.extents)
    u = tuple(const(0) if a.extent == 1 else a.var for a in updates)
    operand = body.reader(node)
    where = [space.simplify(i) for i in form.index(u, operand)]
    value = space.simplify(form.value(u, operand))
    lets: list[Stmt] = []
    names: list[Expr] = []
    for i in where:
        name = i
        if any(e.op == "load" for e in postorder([i])):
            name = var(f"at{next(numbers)}", i64)
            lets.append(Let(name, i))
        names.append(name)
    inside: Expr | None = None
    for i, n in zip(names, body.extents(node.shape), strict=True):
        test = binary("and", binary("le", const(0), i), binary("lt", i, space.expr(n)))
        inside = test if inside is None else binary("and", inside, test)
    flat = space.flat(names, body.extents(node.shape))
    out = body.outputs[0]
    old = load(out, (flat,), out.dtype)
    new = value if form.kind == "set" else combine(form.kind, old, value)
    store: list[Stmt] = [Store(out, (flat,), new)]
    if inside is not None:
        store = [If(inside, tuple(store))]
    return [*stmts, *nest(space, [a for a in updates if a.extent != 1], [*lets, *store])], parallel


def sort_statements(body: GenericBody, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """A merge sort of each row, as that of `codegen.sorts`, with as many levels as a row's length takes at run time.

    The scratch arrays hold two states each, of which a level reads one and writes the other.
    """
    space = body.space
    node, form = body.sole(Sort)
    source = node.inputs[0]
    rows = [space.axis("i", space.size(d)) for k, d in enumerate(source.shape) if k != form.axis]
    outer = [const(0) if a.extent == 1 else a.var for a in rows]
    n, count = space.expr(space.size(source.shape[form.axis])), space.expr(space.size(form.count))
    elements = product(source.shape)
    total = space.expr(space.size(elements))
    keys = Buffer("keys", source.dtype, (UNKNOWN,), align=64)
    places = Buffer("places", i64, (UNKNOWN,), align=64)
    body.workspaces += [(keys, elements * 2), (places, elements * 2)]
    e = space.axis("e", space.size(source.shape[form.axis])).var

    def index(k: Expr) -> list[Expr]:
        return [*outer[: form.axis], k, *outer[form.axis :]]

    start = binary("mul", space.flat(outer, [a.extent for a in rows]), n)
    at = binary("add", start, e)
    first = (Store(keys, (at,), space.simplify(body.value(source, index(e)))), Store(places, (at,), e))
    levels: Expr = const(0)
    for k in range(40):
        levels = binary("add", levels, cast(binary("lt", const(1 << k), n), i64))
    level, last = var("level"), var("levels")
    merged = _merged(level, keys, places, start, n, count, total, form.descending)
    out = body.outputs[0]
    result = load(places, (binary("add", at, binary("mul", binary("and", last, const(1)), total)),), i64)
    stmts: list[Stmt] = [
        For(e, const(0), n, first),
        Let(last, levels),
        For(level, const(0), last, tuple(merged)),
        For(e, const(0), count, (Store(out, (body.flat(node, index(e)),), result),)),
    ]
    work = binary("mul", binary("mul", n, 10), const(3 * FINE))
    return shared(space, [a for a in rows if a.extent != 1], stmts, work, f"q{next(numbers)}")


def _merged(
    level: Expr, keys: Buffer, places: Buffer, start: Expr, n: Expr, count: Expr, total: Expr, descending: bool
) -> list[Stmt]:
    """One level: runs of 1 << level elements, of which at most `count` are kept, to runs of twice as many."""
    width, here, there = var("width"), var("from"), var("to")
    run, m, low = var("run"), var("m"), var("low")
    base, a_end, b_start, b_end, stop, most = (var(x) for x in ("base", "a_end", "b_start", "b_end", "stop", "most"))
    a_key, b_key = var("a_key", keys.dtype), var("b_key", keys.dtype)
    from_b = var("from_b", bool_)
    taken = Buffer("taken", i64, (1,), scope="register", align=64)
    a, b = binary("add", base, low), binary("add", b_start, binary("sub", m, low))
    a_safe, b_safe = minimum(a, binary("sub", a_end, 1)), minimum(b, binary("sub", n, 1))
    wins = binary(
        "and", binary("lt", b, b_end), binary("or", logical_not(binary("lt", a, a_end)), before(b_key, a_key, descending))
    )
    source = binary("add", here, select(from_b, b_safe, a_safe))
    target = binary("add", binary("add", there, base), m)
    step = (
        Let(low, load(taken, (const(0),), i64)),
        Let(a_key, load(keys, (binary("add", here, a_safe),), keys.dtype)),
        Let(b_key, load(keys, (binary("add", here, b_safe),), keys.dtype)),
        Let(from_b, wins),
        Store(keys, (target,), select(from_b, b_key, a_key)),
        Store(places, (target,), load(places, (source,), i64)),
        Store(taken, (const(0),), select(from_b, low, binary("add", low, 1))),
    )
    both = binary("add", binary("sub", a_end, base), maximum(binary("sub", b_end, b_start), 0))
    one = (
        Let(base, binary("mul", run, binary("mul", width, 2))),
        Let(a_end, minimum(binary("add", base, most), n)),
        Let(b_start, binary("add", base, width)),
        Let(b_end, minimum(binary("add", b_start, most), n)),
        Let(stop, minimum(both, count)),
        Alloc(taken),
        Store(taken, (const(0),), const(0)),
        For(m, const(0), stop, step),
    )
    twice = binary("mul", width, 2)
    runs = binary("floordiv", binary("add", n, binary("sub", twice, 1)), twice)
    parity = binary("and", level, const(1))
    return [
        Let(width, binary("shl", const(1), level)),
        Let(most, minimum(width, count)),
        Let(here, binary("add", start, binary("mul", parity, total))),
        Let(there, binary("add", start, binary("mul", binary("sub", 1, parity), total))),
        For(run, const(0), runs, one),
    ]


__all__ = ["scan_statements", "scatter_statements", "sort_statements"]
