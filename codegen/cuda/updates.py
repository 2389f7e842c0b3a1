"""Scatters: deterministic, since no two threads touch one element, and each element gets its updates in their order.

Many updates are put in order of where they go (sorts.py; a stable sort: those of one element stay in their order). Then each
element that has updates has one thread, which takes them one after another; neighbouring threads take neighbours of the
dimensions that do not collide. Of few updates threads go through all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

from ...ir.dims import as_int
from ...ir.dtypes import i64
from ...ir.expr import Expr, binary, const, eq, load, postorder, select, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Scatter, Sort
from ...ir.target import Target
from ..groups import Body, Lowered, combine, flat_index, lowered, static_shape
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, nest, unit_axes
from ..simplify_index import Simplifier
from .grid import over
from .sorts import Rows, launches
from .thread import ZERO

MANY: Final = 96  # updates from which on they are put in order
ONE: Final = [Axis(var("one"), 1)]


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
    targets = _Targets(body, node, form, serial, apart, one, where)
    spaces: list[Buffer] = []
    if targets.n >= MANY and targets.apply:
        copied = over(kept or ONE, [Store(out, (place,), first)])
        ordered, spaces, how = launches(targets)
        statements = [copied, *ordered, targets.launch()]
        note = f"{targets.n} updates by where they go ({how})"
        spaces = [*spaces, targets.out]
    elif apart:
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
    return lowered(body, name, statements, doc="scatter", workspaces=spaces, parallel=True, note=note)


class _Targets(Rows):
    """The updates of a scatter as a row to sort: the key of an update is where it goes, as a flat index over the dimensions of
    the result that the colliding dimensions decide; what goes nowhere comes last. `apply`: whether each dimension of the result
    is decided by those, or by the others."""

    def __init__(
        self, body: Body, node: Node, form: Scatter, serial: Sequence[Axis], apart: Sequence[Axis], one: Mapping[Expr, Expr],
        where: Sequence[Expr],
    ) -> None:  # fmt: skip
        self.body, self.scatter, self.apart, self.one, self.target = body, form, apart, one, node
        self.form, self.axes, self.dtype = Sort(0, 1), [], i64
        self.extents = [a.extent for a in serial]
        self.names = [a.var for a in serial]
        self.n = self.count = prod(self.extents)
        self.out = Buffer("order", i64, (self.n,), align=64)
        self.updates = tuple(one.get(v, v) for v in (var(f"u{k}") for k in range(len(form.extents))))
        mine, others = set(self.names), {a.var for a in apart}
        used = [{e for e in postorder([i]) if e.op == "var"} for i in where]
        self.decided = [k for k, v in enumerate(used) if not v & others]
        self.apply = all(not v & mine or not v & others for v in used) and bool(self.decided)
        self.sizes = [static_shape(node)[k] for k in self.decided]

    def at(self, e: Expr) -> tuple[Expr, ...]:
        """The update's index, of number e among those that collide."""
        values: dict[Expr, Expr] = {}
        inside = self.n
        for k, (v, n) in enumerate(zip(self.names, self.extents, strict=True)):
            inside //= n
            place = binary("floordiv", e, inside)
            values[v] = binary("mod", place, n) if k else place
        return tuple(values.get(v, v) for v in self.updates)

    def row(self) -> Expr:
        return const(0)

    def place(self, e: Expr) -> Expr:
        return e

    def value(self, e: Expr) -> Expr:
        self._normal(e)
        self.body.forget()
        where = self.scatter.index(self.at(e), self.body.reader(self.target))
        inside: Expr = const(True, "bool")
        for k, n in zip(self.decided, self.sizes, strict=True):
            i = where[k]
            inside = binary("and", inside, binary("and", binary("le", const(0), i), binary("lt", i, const(n))))
        return select(inside, flat_index([where[k] for k in self.decided], self.sizes), const(prod(self.sizes)))

    def _normal(self, e: Expr) -> Simplifier:
        made = Simplifier(ranges_of([*self.apart, *([Axis(e, self.n)] if e.op == "var" else [])]))
        self.body.normal = made.simplify
        return made

    def launch(self) -> Stmt:
        """Each run of updates to one place has a thread for each position of the others."""
        form, out, order = self.scatter, self.body.outputs[0], self.out
        p, mine, other, q, update = var("p"), var("mine"), var("other"), var("q"), var("update")
        goes, comes, there = var("goes"), var("comes"), var("there")
        low, high = (Buffer(word, i64, (1,), scope="register", align=16) for word in ("low", "high"))
        held = Buffer("held", out.dtype, (1,), scope="register", align=16)
        middle = var("middle")
        a, b = load(low, ZERO, i64), load(high, ZERO, i64)

        def number(at: Expr) -> Expr:
            return load(order, (at,), i64)

        # the end of the run: the first further on that goes elsewhere
        step: list[Stmt] = [
            Let(middle, binary("shr", binary("add", a, b), const(1))),
            If(
                binary("lt", a, b),
                (
                    Let(other, number(middle)),
                    Let(there, self.value(other)),
                    Store(high, ZERO, select(eq(there, goes), b, middle)),
                    Store(low, ZERO, select(eq(there, goes), binary("add", middle, 1), a)),
                ),
            ),
        ]
        normal = self._normal(update)
        self.body.forget()
        u = self.at(update)
        operand = self.body.reader(self.target)
        where = list(form.index(u, operand))
        inside: Expr = const(True, "bool")
        shape = static_shape(self.target)
        rest = self._split(goes, where)
        for k, n in enumerate(shape):
            if k not in self.decided:
                inside = binary("and", inside, binary("and", binary("le", const(0), rest[k]), binary("lt", rest[k], const(n))))
        flat = normal.simplify(flat_index(rest, shape))
        old = load(held, ZERO, out.dtype)
        value = form.value(u, operand)
        new = value if form.kind == "set" else combine(form.kind, old, value)
        run: list[Stmt] = [
            Alloc(low),
            Alloc(high),
            Store(low, ZERO, binary("add", p, 1)),
            Store(high, ZERO, const(self.n)),
            For(var("round"), const(0), const(self.n.bit_length()), tuple(step)),
            Alloc(held),
            Store(held, ZERO, load(out, (flat,), out.dtype)),
            For(q, p, a, (Let(update, number(q)), Store(held, ZERO, new))),
            Store(out, (flat,), old),
        ]
        first = binary("or", eq(p, const(0)), binary("ne", comes, goes))
        taken = binary("and", binary("and", first, binary("lt", goes, const(prod(self.sizes)))), inside)
        before = var("preceding")
        body: list[Stmt] = [
            Let(mine, number(p)),
            Let(goes, self.value(mine)),
            Let(before, number(select(eq(p, const(0)), p, binary("sub", p, 1)))),
            Let(comes, self.value(before)),
            If(taken, tuple(run)),
        ]
        return over([Axis(p, self.n), *self.apart], body, tag="_all")

    def _split(self, goes: Expr, where: Sequence[Expr]) -> list[Expr]:
        """The index of the result: what the key says of the dimensions it is of, and the others."""
        done = list(where)
        inside = prod(self.sizes)
        for j, (k, n) in enumerate(zip(self.decided, self.sizes, strict=True)):
            inside //= n
            place = binary("floordiv", goes, inside)
            done[k] = binary("mod", place, n) if j else place
        return done


__all__ = ["lower_scatter"]
