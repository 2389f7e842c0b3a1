"""What one thread does alone: the value of a node's element with its reductions as loops. The general way, for whatever has no
schedule of its own (windows of pooling, short reductions, argmax, nested reductions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.dims import as_int
from ...ir.expr import Expr, binary, cast, const, load, select, var
from ...ir.graph import Node
from ...ir.lowering import Reduce
from ..groups import Body, accumulator, better, combine, flat_index, identity
from ..loop_ir import Alloc, Buffer, If, Let, Stmt, Store
from ..nests import Axis, nest, unit_axes
from .grid import Names

ZERO = (const(0),)


class Thread:
    """Collects the statements of a thread; `Body.reduced` is set to it."""

    def __init__(self, body: Body, names: Names) -> None:
        self.body, self.names = body, names
        self.blocks: list[list[Stmt]] = [[]]
        self.scopes: list[dict[tuple[Node, tuple[Expr, ...], Expr | None], Expr]] = [{}]
        body.reduced = self.reduced

    def values(self, wanted: Sequence[tuple[Node, tuple[Expr, ...]]]) -> tuple[list[Stmt], list[Expr]]:
        """The statements before, and the values at indices."""
        found = [self.body.value(n, at) for n, at in wanted]
        done, self.blocks[-1] = self.blocks[-1], []
        return done, found

    def reduced(self, node: Node, form: Reduce, at: tuple[Expr, ...], mask: Expr | None) -> Expr:
        """The result of a reduction at an index: a loop before the statement that uses it."""
        key = (node, at, mask)
        for scope in self.scopes:
            if key in scope:
                return scope[key]
        axes = [Axis(var(self.names("r")), as_int(n)) for n in form.extents]
        kept, fixed = unit_axes(axes)
        r = tuple(fixed.get(a.var, a.var) for a in axes)
        self.blocks.append([])
        self.scopes.append({})
        forget = self.body.forget
        forget()  # what was remembered may stand in the blocks around, what will be must not outlive this one
        value = form.value(at, r, self._reader(node, mask))
        positions = form.kind in ("argmax", "argmin")
        held = accumulator(value.dtype if positions else node.dtype)
        acc = Buffer(self.names("acc"), held, (1,), scope="register", align=16)
        before: list[Stmt] = [Alloc(acc), Store(acc, ZERO, identity(form.kind, held))]
        if positions:
            inner, result = self._position(node, form, cast(value, held), acc, r, axes, before)
        else:
            new = combine(form.kind, load(acc, ZERO, held), cast(value, held))
            inner = [*self.blocks[-1], Store(acc, ZERO, new)]
            result = cast(load(acc, ZERO, held), node.dtype)
        self.blocks.pop()
        self.scopes.pop()
        forget()
        loops: list[Stmt] = nest(kept, inner)
        self.blocks[-1] += before
        self.blocks[-1] += loops if mask is None else [If(mask, tuple(loops))]
        name = var(self.names("red"), node.dtype)
        self.blocks[-1].append(Let(name, result))
        self.scopes[-1][key] = name
        return name

    def _position(
        self, node: Node, form: Reduce, value: Expr, acc: Buffer, r: Sequence[Expr], axes: Sequence[Axis], before: list[Stmt]
    ) -> tuple[list[Stmt], Expr]:
        """The steps of an argmax: `where` is the position of the first best, -1 before there is one."""
        where = Buffer(self.names("at"), node.dtype, (1,), scope="register", align=16)
        before += [Alloc(where), Store(where, ZERO, const(0, node.dtype))]
        place = self.body.normal(flat_index(r, [a.extent for a in axes]))
        v, wins = var(self.names("v"), value.dtype), var(self.names("wins"), const(True, "bool").dtype)
        first = binary("eq", place, const(0))
        test = binary("or", first, better(form.kind, v, load(acc, ZERO, value.dtype)))
        inner = [
            *self.blocks[-1],
            Let(v, value),
            Let(wins, test),
            Store(acc, ZERO, select(wins, v, load(acc, ZERO, value.dtype))),
            Store(where, ZERO, select(wins, cast(place, node.dtype), load(where, ZERO, node.dtype))),
        ]
        return inner, load(where, ZERO, node.dtype)

    def _reader(self, node: Node, mask: Expr | None) -> Callable[..., Expr]:
        def operand(k: int, index: Sequence[Expr], inner: Expr | None = None) -> Expr:
            both = mask if inner is None else inner if mask is None else binary("and", mask, inner)
            return self.body.value(node.inputs[k], index, both)

        return operand


__all__ = ["Thread"]
