"""Loops whose extents are read at run time: vector loops with a masked rest, and chunks of work for threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...ir.dtypes import DType, bool_, i64
from ...ir.expr import Expr, binary, broadcast, const, load, maximum, minimum, postorder, ramp, select, substitute, var
from ...ir.target import Target
from ..loop_ir import Buffer, For, Kernel, Let, Stmt, Store, expressions, statements, vector_variable
from ..nests import CHUNK_NS, PARALLEL_NS, Piece, Spot, VectorLoop, has_masks
from ..nests import Axis as FixedAxis
from ..vectorize import vectorize
from .index import Axis, Space

SIZES: Final = Buffer("sizes", i64, (1 << 20,), align=8, writable=False)
UNKNOWN: Final = 1 << 40  # elements of a buffer whose size is known when it runs
FINE: Final = 64  # estimates are in 1/64 nanoseconds
_SPLIT: Final = 4096  # elements of a single loop that a thread takes at least


@dataclass(frozen=True, slots=True)
class Walk:
    """How a vector axis is walked: `unroll` vectors of `lanes` a step, and how what is left over is."""

    lanes: int
    unroll: int
    masked: bool

    @staticmethod
    def of(target: Target, dtypes: Sequence[DType], lanes: int, unroll: int) -> Walk:
        return Walk(lanes, unroll, has_masks(target, dtypes))

    def over(self, space: Space, axis: Axis, piece: Piece, start: Expr | None = None, stop: Expr | None = None) -> list[Stmt]:
        """Statements that cover the axis, or start .. stop of it."""
        if isinstance(axis.extent, int) and start is None:
            loop = VectorLoop(self.lanes, self.unroll, "mask" if self.masked else "narrow")
            return loop.over(FixedAxis(axis.var, axis.extent), piece)
        v, n, step = axis.var, self.lanes, self.lanes * self.unroll
        first = const(0) if start is None else start
        last = space.extent(axis) if stop is None else stop
        length = binary("sub", last, first)

        def whole(count: int) -> Expr:
            return binary("add", first, binary("mul", binary("floordiv", length, count), count))

        main = [s for u in range(self.unroll) for s in piece(Spot(binary("add", v, u * n), n, u))]
        done: list[Stmt] = [For(v, first, whole(step), tuple(main), "serial", step)]
        if self.unroll > 1:
            done.append(For(v, whole(step), whole(n), tuple(piece(Spot(v, n))), "serial", n))
        if n == 1:
            return done
        if self.masked:
            m = vector_variable(f"{v.attr}.mask", bool_, n)
            tail = [Let(m, binary("lt", ramp(v, n), broadcast(last, n))), *piece(Spot(v, n, 0, m, m))]
            return [*done, For(v, whole(n), last, tuple(tail), "serial", n)]
        while n > 1:
            n //= 2
            done.append(For(v, whole(2 * n), whole(n), tuple(piece(Spot(v, n))), "serial", n))
        return done


def wide(e: Expr, v: Expr, spot: Spot, bound: dict[Expr, Expr] | None = None) -> Expr:
    """The expression for the values of v that a spot covers; `bound` maps scalars to the vectors of their lanes."""
    if spot.lanes > 1:
        e = vectorize(e, v, spot.lanes, spot.mask, bound)
    elif bound:
        e = substitute(e, bound)
    return e if spot.position is v else substitute(e, {v: spot.position})


def product_of(space: Space, axes: Sequence[Axis]) -> Expr:
    total: Expr = const(1)
    for a in axes:
        total = binary("mul", total, space.extent(a))
    return total


def nest(space: Space, axes: Sequence[Axis], inner: Sequence[Stmt], unroll: int = 0) -> list[Stmt]:
    """Serial loops over the axes, the first outermost; unrolled if they make no more than `unroll` passes in all."""
    count = 1
    for a in axes:
        count = count * a.extent if isinstance(a.extent, int) else unroll + 1
    body = tuple(inner)
    for a in reversed(axes):
        body = (For(a.var, const(0), space.extent(a), body, "unrolled" if count <= unroll else "serial"),)
    return list(body)


def shared(space: Space, axes: Sequence[Axis], inner: Sequence[Stmt], work: Expr, stem: str = "q") -> tuple[list[Stmt], bool]:
    """Loops over the axes around `inner`, cut into chunks for threads where the whole is worth it.

    `work` is the estimate for one pass of `inner`, in 1/64 nanoseconds. What is computed does not depend on the cut.
    """
    if not axes:
        return list(inner), False
    total = product_of(space, axes)
    each = maximum(work, 1)
    fair = maximum(binary("floordiv", binary("add", total, 7), 8), 1)
    group = minimum(maximum(binary("floordiv", const(CHUNK_NS * FINE), each), 1), fair)
    small = binary("lt", binary("mul", total, each), const(PARALLEL_NS * FINE))
    g, t, p, q = var(f"{stem}_group"), var(f"{stem}_total"), var(f"{stem}_chunk"), var(f"{stem}_flat")
    before: list[Stmt] = [Let(t, total), Let(g, select(small, maximum(t, 1), group))]
    first = binary("mul", p, g)
    last = minimum(binary("add", first, g), t)
    if len(axes) == 1:
        body: tuple[Stmt, ...] = (For(axes[0].var, first, last, tuple(inner)),)
    else:  # whole passes of the innermost axis in a loop, and only what is around it taken apart by division
        begin, end, n = var(f"{stem}_begin"), var(f"{stem}_end"), space.extent(axes[-1])
        before_it = binary("mul", q, n)
        low, high = maximum(binary("sub", begin, before_it), 0), minimum(binary("sub", end, before_it), n)
        around = axes[:-1]
        if len(around) == 1:
            q = around[0].var
            low, high = (substitute(e, {var(f"{stem}_flat"): q}) for e in (low, high))
        rows = For(axes[-1].var, low, high, tuple(inner))
        final = binary("floordiv", binary("add", end, binary("sub", n, 1)), n)
        body = (
            Let(begin, first),
            Let(end, last),
            For(q, binary("floordiv", begin, n), final, (*_ordered(space, around, q, stem), rows)),
        )
    chunks = binary("floordiv", binary("add", t, binary("sub", g, 1)), g)
    return [*before, For(p, const(0), chunks, body, "parallel")], True


def _ordered(space: Space, axes: Sequence[Axis], q: Expr, stem: str) -> list[Stmt]:
    """Lets that take a flat position apart, the innermost axis first."""
    lets: list[Stmt] = []
    rest = q
    for k in range(len(axes) - 1, 0, -1):
        n = space.extent(axes[k])
        name = var(f"{stem}_rest{k}") if k > 1 else axes[0].var
        lets.append(Let(name, binary("floordiv", rest, n)))
        lets.append(Let(axes[k].var, binary("sub", rest, binary("mul", name, n))))
        rest = name
    return lets


def shared_vector(
    space: Space, axis: Axis, walk: Walk, piece: Piece, per_element: int, lets: Sequence[Stmt] = ()
) -> tuple[list[Stmt], bool]:
    """A single vector axis in blocks that threads share. `per_element` is in 1/64 nanoseconds."""
    if isinstance(axis.extent, int) and axis.extent * per_element < PARALLEL_NS * FINE:
        return [*lets, *walk.over(space, axis, piece)], False
    n = space.extent(axis)
    blocks = space.axis("block", space.divide("//", axis.extent + (_SPLIT - 1), _SPLIT))
    start, stop = var(f"{axis.var.attr}_start"), var(f"{axis.var.attr}_stop")
    inner: list[Stmt] = [
        Let(start, binary("mul", blocks.var, _SPLIT)),
        Let(stop, minimum(binary("add", start, _SPLIT), n)),
        *lets,
        *walk.over(space, axis, piece, start, stop),
    ]
    return shared(space, [blocks], inner, const(_SPLIT * per_element), f"{axis.var.attr}_q")


def kernel(name: str, space: Space, buffers: Sequence[Buffer], body: Sequence[Stmt], symbols: Sequence[str], doc: str) -> Kernel:
    """The kernel over those of the buffers that are used, then the table of sizes; sizes and named extents are read first."""
    used: set[str] = set()
    free: set[Expr] = set()
    for s in statements(tuple(body)):
        if isinstance(s, Store):
            used.add(s.buffer.name)
        for e in postorder(expressions(s)):
            if e.op == "load":
                used.add(e.attr[0].name)
            elif e.op == "var":
                free.add(e)
    lets: list[Stmt] = []
    named = {var(n): d for n, d in space.definitions.items() if var(n) in free}
    for d in named.values():
        free.update(e for e in postorder([d]) if e.op == "var")
    sizes = [k for k, s in enumerate(symbols) if var(f"size.{s}") in free]
    for k in sizes:
        lets.append(Let(var(f"size.{symbols[k]}"), maximum(load(SIZES, (const(k),), i64), 1)))
    lets += [Let(v, maximum(d, 0)) for v, d in named.items()]
    kept = [b for b in buffers if b.name in used]
    return Kernel(name, (*kept, *([SIZES] if sizes else [])), (*lets, *body), doc=doc, noalias=True)
