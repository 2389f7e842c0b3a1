"""Rows in a pipeline: one walk reduces the next row, computes this one and finishes the last one.

A row in three passes (a maximum, exponentials and their sum, a division) waits three times: for the loads of the first, and
for two reductions to become one number, which the pass after them needs at once. Where all rows are in the cache, one walk does
the first pass for the row after it and the last pass for the row before it. The values and their order are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..ir.dtypes import i64
from ..ir.expr import Expr, binary, cast, const, load, maximum, minimum, postorder, substitute, var
from .accumulate import POSITIONS, Accumulator
from .loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from .nests import Axis
from .row_maximum import Code, Item

Walk = Callable[[Sequence[Item], Sequence[Accumulator]], list[Stmt]]
# Divisions as products with reciprocals: the stores, the condition under which they hold, and the reciprocals' Lets.
Quick = Callable[[Sequence[Item], Iterator[int]], tuple[Sequence[Item], Expr | None, list[Stmt]]]


def fits(plans: Sequence[Code]) -> bool:
    """Whether passes are these three: reductions alone; values kept and their reductions; stores alone."""
    if len(plans) != 3:
        return False
    (lets, stores, accs, ends), (_, kept, sums, none), (_, last, after, also) = plans
    three = bool(accs) and bool(kept) and bool(sums) and bool(last) and not (lets or stores or ends or none or after or also)
    return three and all(a.kind not in POSITIONS for a in (*accs, *sums))


def pipelined(plans: Sequence[Code], row: Axis, walk: Walk, quick: Quick, numbers: Iterator[int]) -> list[Stmt]:
    """The statements for all rows of `row`. `plans` fit; their indices are in terms of the row's variable."""
    (_, _, heads, _), (lets, stores, accs, _), (late, ends, _, _) = plans
    units = accs[0].units
    before, after = (var(f"{row.var.attr}_{word}", i64) for word in ("before", "after"))
    first = [replace(a, units=units, value=substitute(a.value, {row.var: const(0)})) for a in heads]
    ahead = [replace(a, units=units, value=substitute(a.value, {row.var: after}), name=f"{a.name}_after") for a in heads]
    fast, guard, inverses = quick(ends, numbers)

    # What the last pass needs of its row, besides the columns: kept until the next row is walked.
    made = [var(a.name, a.dtype) for a in (*heads, *accs)] + [v for v, _ in (*lets, *late)]
    made += [s.var for s in inverses if isinstance(s, Let)]
    used = set(postorder([e for _, i, v in (*ends, *fast) for e in (i, v)] + ([] if guard is None else [guard])))
    needed = [v for v in made if v in used]
    kept = {v: Buffer(f"{v.attr}_kept", v.dtype, (1,), scope="register", align=64) for v in needed}
    waiting = {a.name: Buffer(f"{a.name}_waiting", a.dtype, (1,), scope="register", align=64) for a in heads}
    old = {v: var(f"{v.attr}_before", v.dtype) for v in needed}
    recalled: list[Stmt] = [Let(old[v], load(b, (const(0),), v.dtype)) for v, b in kept.items()]
    names = {**old, row.var: before}

    def at_last(items: Sequence[Item]) -> list[Item]:
        return [(b, substitute(i, names), substitute(v, names)) for b, i, v in items]

    def keep(accumulators: Sequence[Accumulator], held: Sequence[Accumulator]) -> list[Stmt]:
        pairs = zip(accumulators, held, strict=True)
        return [Store(waiting[a.name], (const(0),), cast(b.total(), a.dtype)) for a, b in pairs]

    holds = None if guard is None else substitute(guard, old)
    together = walk([*at_last(fast), *stores], [*accs, *ahead])
    alone = walk(stores, [*accs, *ahead])
    started = binary("lt", const(0), row.var)
    if holds is None:
        middle: list[Stmt] = [If(started, tuple(together), tuple(alone))]
    else:  # before the first row, what is kept is 0, for which no guard holds
        slow = If(started, tuple(walk(at_last(ends), [])))
        middle = [If(holds, tuple(together), (slow, *alone))]
    body: list[Stmt] = [
        *(Let(var(a.name, a.dtype), load(waiting[a.name], (const(0),), a.dtype)) for a in heads),
        *(Let(v, e) for v, e in lets),
        *recalled,
        Let(before, maximum(binary("sub", row.var, 1), const(0))),
        Let(after, minimum(binary("add", row.var, 1), const(row.extent - 1))),
        *(s for a in (*accs, *ahead) for s in a.start()),
        *middle,
        *(Let(var(a.name, a.dtype), cast(a.total(), a.dtype)) for a in accs),
        *(Let(v, e) for v, e in late),
        *inverses,
        *(Store(b, (const(0),), v) for v, b in kept.items()),
        *keep(heads, ahead),
    ]
    finish: list[Stmt] = walk(at_last(fast), [])
    if holds is not None:
        finish = [If(holds, tuple(finish), tuple(walk(at_last(ends), [])))]
    return [
        *(Alloc(b) for b in (*kept.values(), *waiting.values())),
        *(Store(b, (const(0),), const(0, v.dtype)) for v, b in kept.items()),
        *(s for a in first for s in a.start()),
        *walk([], first),
        *keep(heads, first),
        For(row.var, const(0), const(row.extent), tuple(body)),
        *recalled,
        Let(before, const(row.extent - 1)),
        *finish,
    ]
