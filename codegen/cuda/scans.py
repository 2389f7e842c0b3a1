"""Cumulative sums and products: a thread for each line where there are many, else a warp or a block for each, or several blocks.

A block goes over its line in pieces of four elements a thread. In a piece a thread adds up its own, a warp the sums of its lanes
in five exchanges (lane and lane xor d hold the sums of neighbouring groups of d lanes: the upper one adds what the lower has to
what comes before it), the block those of its warps in their order. The tree follows from sizes alone.

Long lines of few rows are cut: one launch adds up each part, the next begins each part with the parts before it, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from ...ir.dtypes import bool_
from ...ir.expr import Expr, binary, cast, const, eq, lane_xor, load, ne, select, var
from ...ir.graph import Graph
from ...ir.lowering import Scan
from ...ir.target import Target
from ..groups import Body, Lowered, accumulator, combine, flat_index, identity, lowered, static_shape
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, unit_axes
from ..simplify_index import Simplifier
from .grid import BLOCK, TX, Names, block_tree, over
from .machine import WARP
from .reduces import group_launch
from .thread import ZERO

ONE: Final = [Axis(var("one"), 1)]
EACH: Final = 4  # elements of a thread in a piece
FILL: Final = 32768  # threads that fill a device
SHORT: Final = 32  # elements up to which a thread takes a line
LONG: Final = 512  # elements from which on a block takes a line, not a warp
PART: Final = 4096  # least elements of a part of a line
MOST_PARTS: Final = 64


class _Line:
    """A scan whose lines have more than one thread each."""

    def __init__(self, body: Body, form: Scan, shape: Sequence[int], threads: int, parts: int) -> None:
        self.body, self.form, self.threads, self.names = body, form, threads, Names()
        self.node = body.graph.outputs[0]
        axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
        self.length, self.shape, self.position = shape[form.axis], shape, axes[form.axis].var
        self.kept, fixed = unit_axes([a for k, a in enumerate(axes) if k != form.axis])
        self.index = [fixed.get(a.var, a.var) for a in axes]
        self.held = accumulator(self.node.dtype)
        self.lane = binary("mod", TX, WARP) if threads == WARP else TX
        self.chunk = -(-self.length // parts)
        self.parts = -(-self.length // self.chunk)
        self.part = Axis(var("part"), self.parts)
        self.rows = [*self.kept, *([self.part] if self.parts > 1 else [])] or ONE
        size = prod(a.extent for a in self.kept) * self.parts
        self.totals = Buffer("totals", self.held, (size,), align=64)

    def _bounds(self) -> tuple[Expr, Expr]:
        """The first position of the part, and its end."""
        if self.parts == 1:
            return const(0), const(self.length)
        first = binary("mul", self.part.var, self.chunk)
        return first, binary("min", binary("add", first, self.chunk), const(self.length))

    def _values(self, first: Expr, stop: Expr) -> tuple[list[Stmt], list[tuple[Expr, Expr, Expr]]]:
        """The thread's elements of the piece at `first`: whether each is there, where it lies in the result, and what it is."""
        done: list[Stmt] = []
        found: list[tuple[Expr, Expr, Expr]] = []
        for e in range(EACH):
            t = var(self.names("t"))
            done.append(Let(t, binary("add", first, binary("add", binary("mul", self.lane, EACH), e))))
            index = list(self.index)
            index[self.form.axis] = binary("sub", self.length - 1, t) if self.form.reverse else t
            simplifier = Simplifier(ranges_of([*self.kept, Axis(t, self.length)]))
            self.body.normal = simplifier.simplify
            self.body.forget()
            value = cast(self.body.value(self.node.inputs[0], index), self.held)
            own = Buffer(self.names("own"), self.held, (1,), scope="register", align=16)
            there = binary("lt", t, stop)
            done += [
                Alloc(own),
                Store(own, ZERO, identity(self.form.kind, self.held)),
                If(there, (Store(own, ZERO, value),)),
            ]
            v = var(self.names("v"), self.held)
            done.append(Let(v, load(own, ZERO, self.held)))
            found.append((there, simplifier.simplify(flat_index(index, self.shape)), v))
        return done, found

    def _sum(self, values: Sequence[Expr]) -> Expr:
        total = values[0]
        for v in values[1:]:
            total = combine(self.form.kind, total, v)
        return total

    def totals_of_parts(self) -> Stmt:
        """The launch that adds up each part."""
        first, stop = self._bounds()
        p, names = var("piece"), self.names
        acc = Buffer("acc", self.held, (1,), scope="register", align=16)
        lets, found = self._values(p, stop)
        more = combine(self.form.kind, load(acc, ZERO, self.held), self._sum([v for _, _, v in found]))
        body: list[Stmt] = [
            Alloc(acc),
            Store(acc, ZERO, identity(self.form.kind, self.held)),
            For(p, first, stop, (*lets, Store(acc, ZERO, more)), "serial", self.threads * EACH),
        ]
        after, (total,) = block_tree([self.form.kind], [load(acc, ZERO, self.held)], self.threads, names)
        place = binary("add", binary("mul", self._row(), self.parts), self.part.var)
        body += [*after, If(eq(TX, const(0)), (Store(self.totals, (place,), total),))]
        return group_launch(self.rows, body, self.threads)

    def _row(self) -> Expr:
        return flat_index([a.var for a in self.kept], [a.extent for a in self.kept]) if self.kept else const(0)

    def launch(self) -> Stmt:
        """The launch that writes the results."""
        kind, held, names = self.form.kind, self.held, self.names
        first, stop = self._bounds()
        carry = Buffer("carry", held, (1,), scope="register", align=16)
        body: list[Stmt] = [Alloc(carry), Store(carry, ZERO, identity(kind, held))]
        if self.parts > 1:
            q = var("before")
            place = binary("add", binary("mul", self._row(), self.parts), q)
            more = combine(kind, load(carry, ZERO, held), load(self.totals, (place,), held))
            body.append(For(q, const(0), self.part.var, (Store(carry, ZERO, more),)))
        p = var("piece")
        lets, found = self._values(p, stop)
        mine = var(names("mine"), held)
        lets.append(Let(mine, self._sum([v for _, _, v in found])))
        exchanged, before, total = self._warp(mine)
        lets += exchanged
        warps = self.threads // WARP
        start = var(names("start"), held)
        old = load(carry, ZERO, held)
        if warps == 1:
            lets += [Let(start, combine(kind, old, before)), Store(carry, ZERO, combine(kind, old, total))]
        else:
            shared = Buffer(names("sh"), held, (warps,), scope="shared", align=16)
            w = binary("floordiv", TX, WARP)
            body.append(Alloc(shared))
            lets += [
                If(eq(binary("mod", TX, WARP), const(0)), (Store(shared, (w,), total),)),
                Barrier(),
            ]
            running: Expr = old
            chosen: Expr = old
            for k in range(warps):
                if k:
                    chosen = select(eq(w, const(k)), running, chosen)
                v = var(names("r"), held)
                lets.append(Let(v, combine(kind, running, load(shared, (const(k),), held))))
                running = v
            lets += [Let(start, combine(kind, chosen, before)), Store(carry, ZERO, running)]
        out = self.body.outputs[0]
        at: Expr = start
        for there, where, v in found:
            following = var(names("at"), held)
            lets.append(Let(following, combine(kind, at, v)))
            result = at if self.form.exclusive else following
            lets.append(If(there, (Store(out, (where,), cast(result, self.node.dtype)),)))
            at = following
        if warps > 1:
            lets.append(Barrier())  # the sums of warps are read before the next piece writes its own
        body.append(For(p, first, stop, tuple(lets), "serial", self.threads * EACH))
        return group_launch(self.rows, body, self.threads)

    def _warp(self, mine: Expr) -> tuple[list[Stmt], Expr, Expr]:
        """Of a value of each lane: what those of the lanes before come to, and all of them."""
        kind, names = self.form.kind, self.names
        done: list[Stmt] = []
        before: Expr = identity(kind, self.held)
        total = mine
        d = 1
        while d < WARP:
            other, upper = var(names("w"), self.held), var(names("u"), bool_)
            done += [
                Let(other, lane_xor(total, d)),
                Let(upper, ne(binary("and", binary("mod", TX, WARP), const(d)), const(0))),
            ]
            # what neighbours share: the lower group first, on both sides the same two numbers in the same order
            low, high = var(names("l"), self.held), var(names("h"), self.held)
            done += [Let(low, select(upper, other, total)), Let(high, select(upper, total, other))]
            b, t = var(names("b"), self.held), var(names("s"), self.held)
            done += [Let(b, select(upper, combine(kind, other, before), before)), Let(t, combine(kind, low, high))]
            before, total = b, t
            d *= 2
        return done, before, total


def lower_scan(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of a cumulative sum or product."""
    body = Body(graph, aligns)
    node, form = body.sole(Scan)
    shape = static_shape(node)
    if 0 in shape:
        return lowered(body, name, [], doc="scan of nothing")
    length, rows = shape[form.axis], prod(shape) // shape[form.axis]
    doc = f"scan ({form.kind}) along axis {form.axis}"
    side_by_side = prod(shape[form.axis + 1 :]) == 1
    # neighbouring threads on neighbouring lines read side by side where lines do not lie so themselves
    if length <= SHORT or rows >= (FILL if side_by_side else FILL // 16):
        return lowered(body, name, [_serial(body, form, shape)], doc=doc, parallel=True, note=f"serial over {length}")
    threads = WARP if length < LONG else BLOCK
    parts = max(1, min(MOST_PARTS, length // PART, FILL // (rows * BLOCK))) if threads == BLOCK else 1
    line = _Line(body, form, shape, threads, parts)
    who = "a warp" if threads == WARP else "a block"
    if line.parts == 1:
        return lowered(body, name, [line.launch()], doc=doc, parallel=True, note=f"{who} for each line of {length}")
    note = f"a block for each of {line.parts} parts of a line of {length}"
    launches = [line.totals_of_parts(), line.launch()]
    return lowered(body, name, launches, doc=doc, workspaces=[line.totals], parallel=True, note=note)


def _serial(body: Body, form: Scan, shape: Sequence[int]) -> Stmt:
    """A thread for each line."""
    node = body.graph.outputs[0]
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    length, t = shape[form.axis], axes[form.axis].var
    kept, fixed = unit_axes([a for k, a in enumerate(axes) if k != form.axis])
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
    return over(kept or ONE, inner)


__all__ = ["lower_scan"]
