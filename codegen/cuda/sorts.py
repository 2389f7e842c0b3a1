"""Sorts: positions of the first elements of each row, NaN last (first, descending), equal ones in their order.

    up to 64 elements    a thread for each: it counts those before it, and writes itself there
    up to 2048           a block for a row: a bitonic network in shared memory. Elements are compared with their positions, so no
                         two are equal and the result is the stable one; what fills up to a power of two comes after everything
    more                 such sorted runs, which are merged in pairs: an element's place is its own rank and how many of the other
                         run come before it, by bisection. A run keeps no more than is asked for

Networks are of comparisons whose order does not depend on data (Batcher 1968): no thread waits for another but at barriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from ...ir.dims import as_int
from ...ir.dtypes import bool_, i32, i64
from ...ir.expr import Expr, binary, cast, const, eq, load, logical_not, minimum, select, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Sort
from ...ir.target import Target
from ..groups import Body, Lowered, flat_index, identity, lowered, static_shape
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, unit_axes
from ..simplify_index import Simplifier
from ..sorts import before
from .grid import TX, over
from .reduces import group_launch
from .thread import ZERO

RANKED: Final = 64  # elements of a row up to which each counts the others
RUN: Final = 2048  # elements that a block sorts: 24 KB of doubles and positions
THREADS: Final = 512
ONE: Final = [Axis(var("one"), 1)]


class Rows:
    """The rows of a sort, and its elements."""

    def __init__(self, body: Body, node: Node, form: Sort) -> None:
        self.body, self.node, self.form, self.source = body, node, form, node.inputs[0]
        self.shape = static_shape(self.source)
        self.n, self.count = self.shape[form.axis], as_int(form.count)
        self.axes, self.fixed = unit_axes([Axis(var(f"i{k}"), m) for k, m in enumerate(self.shape) if k != form.axis])
        self.dtype, self.out = self.source.dtype, body.outputs[0]

    def index(self, e: Expr) -> list[Expr]:
        outer = [self.fixed.get(v, v) for k in range(len(self.shape)) if k != self.form.axis for v in [var(f"i{k}")]]
        return [*outer[: self.form.axis], e, *outer[self.form.axis :]]

    def value(self, e: Expr) -> Expr:
        """The element at a position of the row: a variable that is inside it."""
        self._simplifier(e)
        self.body.forget()
        return self.body.value(self.source, self.index(e))

    def place(self, e: Expr) -> Expr:
        """Where rank e of the row lies in the result."""
        return self._simplifier(e).simplify(flat_index(self.index(e), static_shape(self.node)))

    def row(self) -> Expr:
        """The number of the row."""
        return flat_index([a.var for a in self.axes], [a.extent for a in self.axes]) if self.axes else const(0)

    def _simplifier(self, e: Expr) -> Simplifier:
        made = Simplifier(ranges_of([*self.axes, *([Axis(e, self.n)] if e.op == "var" else [])]))
        self.body.normal = made.simplify
        return made

    def earlier(self, key: Expr, position: Expr, other_key: Expr, other: Expr) -> Expr:
        """Whether an element comes before another one."""
        descending = self.form.descending
        tie = binary("and", logical_not(before(other_key, key, descending)), binary("lt", position, other))
        return binary("or", before(key, other_key, descending), tie)

    def last(self) -> Expr:
        """A key that no other comes after."""
        if self.dtype.is_float and not self.form.descending:
            return const(float("nan"), self.dtype)
        return identity("max" if self.form.descending else "min", self.dtype)


def lower_sort(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of a sort."""
    body = Body(graph, aligns)
    node, form = body.sole(Sort)
    if body.outputs[0].span == 0:
        return lowered(body, name, [], doc="sort of nothing")
    statements, used, note = launches(Rows(body, node, form))
    return lowered(body, name, statements, doc=f"sort along axis {form.axis}", workspaces=used, parallel=True, note=note)


def launches(r: Rows) -> tuple[list[Stmt], list[Buffer], str]:
    """The launches of a sort, their workspaces, and a note."""
    if r.n <= RANKED:
        return [_ranked(r)], [], "a thread for each element"
    if r.n <= RUN:
        return [_runs(r, None, None)], [], f"a block for each row of {r.n}"
    total = prod(a.extent for a in r.axes) * r.n
    keys = [Buffer(f"keys{k}", r.dtype, (total,), align=64) for k in range(2)]
    positions = [Buffer(f"places{k}", i32, (total,), align=64) for k in range(2)]
    statements: list[Stmt] = [_runs(r, keys[0], positions[0])]
    width, level = RUN, 0
    while width < r.n:
        here, there = level % 2, (level + 1) % 2
        is_last = 2 * width >= r.n
        target = None if is_last else (keys[there], positions[there])
        statements.append(_merge(r, width, (keys[here], positions[here]), target, level))
        width, level = 2 * width, level + 1
    used = [b for k in range(2 if level > 1 else 1) for b in (keys[k], positions[k])]
    return statements, used, f"a block for each {RUN} of {r.n}, {level} merges"


def _ranked(r: Rows) -> Stmt:
    """Each element counts those before it."""
    e, j = Axis(var("e"), r.n), var("j")
    rank = Buffer("rank", i64, (1,), scope="register", align=16)
    key, other, ahead = var("key", r.dtype), var("other", r.dtype), var("ahead", bool_)
    old = load(rank, ZERO, i64)
    mine = r.value(e.var)
    inner: list[Stmt] = [
        Let(other, r.value(j)),
        Let(ahead, r.earlier(other, j, key, e.var)),
        Store(rank, ZERO, binary("add", old, select(ahead, const(1), const(0)))),
    ]
    at = var("at")
    write: Stmt = Store(r.out, (r.place(at),), e.var)
    body: list[Stmt] = [Alloc(rank), Store(rank, ZERO, const(0)), Let(key, mine), For(j, const(0), const(r.n), tuple(inner))]
    body += [Let(at, old), write if r.count == r.n else If(binary("lt", at, const(r.count)), (write,))]
    return over([*r.axes, e], body)


def _runs(r: Rows, keys_out: Buffer | None, places_out: Buffer | None) -> Stmt:
    """A block sorts each run of RUN elements (or the whole row): its keys and positions, or the result itself."""
    size = 1 << (min(r.n, RUN) - 1).bit_length()
    levels = size.bit_length() - 1
    threads = min(THREADS, size // 2)
    run = Axis(var("run"), -(-r.n // RUN))
    rows = [*r.axes, *([run] if run.extent > 1 else [])] or ONE
    start = var("start")
    keys = Buffer("keys", r.dtype, (size,), scope="shared", align=16)
    held = Buffer("positions", i32, (size,), scope="shared", align=16)
    e, p = var("e"), var("p")
    body: list[Stmt] = [Alloc(keys), Alloc(held), Let(start, binary("mul", run.var, RUN) if run.extent > 1 else const(0))]
    fill: tuple[Stmt, ...] = (Store(keys, (e,), r.last()),)
    take: list[Stmt] = [Let(p, binary("add", start, e)), Store(held, (e,), cast(p, i32))]
    value: Stmt = Store(keys, (e,), r.value(p))
    take.append(If(binary("lt", p, const(r.n)), (value,), fill) if r.n % size else value)
    body.append(For(e, TX, const(size), tuple(take), "serial", threads))
    body += [Barrier(), *_network(r, keys, held, levels, threads)]
    kept = min(r.count, size)
    here = minimum(const(kept), binary("sub", const(r.n), start)) if run.extent > 1 else const(kept)
    if keys_out is None or places_out is None:
        done: list[Stmt] = [Store(r.out, (r.place(e),), cast(load(held, (e,), i32), i64))]
    else:
        to = binary("add", binary("mul", r.row(), r.n), binary("add", start, e))
        done = [Store(keys_out, (to,), load(keys, (e,), r.dtype)), Store(places_out, (to,), load(held, (e,), i32))]
    body.append(For(e, TX, here, tuple(done), "serial", threads))
    return group_launch(rows, body, threads)


def _network(r: Rows, keys: Buffer, held: Buffer, levels: int, threads: int) -> list[Stmt]:
    """The bitonic network: stage s makes runs of 2 << s, up and down in turns; its steps compare elements 1 << j apart."""
    s, t, j, q = var("stage"), var("step"), var("distance"), var("pair")
    low, high, up = var("low"), var("high"), var("up", bool_)
    a, b = var("low_key", r.dtype), var("high_key", r.dtype)
    pa, pb, wrong = var("low_place", i32), var("high_place", i32), var("wrong", bool_)
    inner: list[Stmt] = [
        Let(low, binary("add", q, binary("sub", q, binary("and", q, binary("sub", j, 1))))),  # a 0 where j has its bit
        Let(high, binary("add", low, j)),
        Let(up, eq(binary("and", binary("shr", low, binary("add", s, 1)), const(1)), const(0))),
        Let(a, load(keys, (low,), r.dtype)),
        Let(b, load(keys, (high,), r.dtype)),
        Let(pa, load(held, (low,), i32)),
        Let(pb, load(held, (high,), i32)),
        Let(wrong, binary("eq", r.earlier(b, pb, a, pa), up)),
        If(
            wrong,
            (
                Store(keys, (low,), b),
                Store(keys, (high,), a),
                Store(held, (low,), pb),
                Store(held, (high,), pa),
            ),
        ),
    ]
    pairs = For(q, TX, const((1 << levels) // 2), tuple(inner), "serial", threads)
    step = For(
        t, const(0), binary("add", s, 1), (Let(j, binary("shl", const(1), binary("sub", s, t))), pairs, Barrier()), "serial", 1
    )
    return [For(s, const(0), const(levels), (step,))]


def _merge(r: Rows, width: int, source: tuple[Buffer, Buffer], target: tuple[Buffer, Buffer] | None, level: int) -> Stmt:
    """A thread for each element of runs of `width`: its place in the run of twice that."""
    keys, held = source
    most = min(width, r.count)
    runs = -(-r.n // width)
    axes = [*r.axes, Axis(var("run"), runs), Axis(var("e"), most)]
    run, e = var("run"), var("e")
    base, size, other, length, key = var("base"), var("size"), var("other"), var("length"), var("key", r.dtype)
    row = binary("mul", r.row(), r.n)

    def kept(first: Expr) -> Expr:
        """How many elements of the run that begins there are kept; below 1 where there is no such run."""
        return minimum(const(most), binary("sub", const(r.n), first))

    is_right = var("is_right", bool_)
    low = Buffer("low", i64, (1,), scope="register", align=16)
    high = Buffer("high", i64, (1,), scope="register", align=16)
    middle, theirs, ahead = var("middle"), var("theirs", r.dtype), var("ahead", bool_)
    place, at = var("place", i32), var("at")
    descending = r.form.descending
    # of equal elements those of the left run come first
    first = before(theirs, key, descending)
    not_after = logical_not(before(key, theirs, descending))
    step: list[Stmt] = [
        Let(middle, binary("shr", binary("add", load(low, ZERO, i64), load(high, ZERO, i64)), const(1))),
        If(
            binary("lt", load(low, ZERO, i64), load(high, ZERO, i64)),
            (
                Let(theirs, load(keys, (binary("add", row, binary("add", other, middle)),), r.dtype)),
                Let(ahead, select(is_right, not_after, first)),
                Store(low, ZERO, select(ahead, binary("add", middle, 1), load(low, ZERO, i64))),
                Store(high, ZERO, select(ahead, load(high, ZERO, i64), middle)),
            ),
        ),
    ]
    pair = binary("sub", run, binary("mod", run, 2))
    write: list[Stmt]
    if target is None:
        write = [Store(r.out, (r.place(at),), cast(place, i64))]
    else:
        to = binary("add", row, binary("add", binary("mul", pair, width), at))
        write = [Store(target[0], (to,), key), Store(target[1], (to,), place)]
    inside: list[Stmt] = [
        Let(key, load(keys, (binary("add", row, binary("add", base, e)),), r.dtype)),
        Let(place, load(held, (binary("add", row, binary("add", base, e)),), i32)),
        Let(is_right, eq(binary("mod", run, 2), const(1))),
        Let(other, binary("mul", select(is_right, binary("sub", run, 1), binary("add", run, 1)), width)),
        Let(length, binary("max", kept(other), const(0))),
        Alloc(low),
        Alloc(high),
        Store(low, ZERO, const(0)),
        Store(high, ZERO, length),
        For(var("round"), const(0), const(most.bit_length() + 1), tuple(step)),
        Let(at, binary("add", e, load(low, ZERO, i64))),
        If(binary("lt", at, const(min(2 * width, r.count))), tuple(write)),
    ]
    body: list[Stmt] = [Let(base, binary("mul", run, width)), Let(size, kept(base)), If(binary("lt", e, size), tuple(inside))]
    return over(axes, body, tag=str(level))


__all__ = ["Rows", "launches", "lower_sort"]
