"""Loop nests around vector code: unrolled main loops, tails without a scalar loop, chunks for threads.

A nest runs over a box of axes. `parallel_nest` cuts it into chunks whose bounds do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..ir.dtypes import DType, i32, i64
from ..ir.expr import Expr, binary, broadcast, cast, const, minimum, postorder, ramp, substitute, var
from ..ir.target import Target
from .loop_ir import LINE, Buffer, For, Let, Stmt, Store, vector_variable
from .vectorize import vectorize

PARALLEL_NS: Final = 50_000  # a fork and join costs up to 50 microseconds when the workers sleep
CHUNK_NS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop variable that runs over start .. start + extent; `base`, where given, is the start, known at run time."""

    var: Expr
    extent: int
    start: int = 0
    base: Expr | None = None

    @property
    def first(self) -> Expr:
        return const(self.start) if self.base is None else self.base


@dataclass(frozen=True, slots=True)
class Spot:
    """One vector of the vector axis: `lanes` elements from `position` on, the `unit`-th of an unrolled step.

    mask   which lanes may touch memory (None: all)
    live   which lanes count, where some are visited a second time or lie beyond the end (None: all)
    """

    position: Expr
    lanes: int
    unit: int = 0
    mask: Expr | None = None
    live: Expr | None = None


Piece = Callable[[Spot], Sequence[Stmt]]


def first_lanes(count: int, lanes: int) -> Expr:
    """A mask that is true in the first `count` lanes."""
    return binary("lt", ramp(const(0, i32), lanes), const(count, i32, lanes))


def from_lane(first: int, lanes: int) -> Expr:
    """A mask that is true from lane `first` on."""
    return binary("le", const(first, i32, lanes), ramp(const(0, i32), lanes))


def has_masks(target: Target, dtypes: Sequence[DType]) -> bool:
    """Whether masked loads and stores of these dtypes are single instructions."""
    if target.vector_bits >= 512:
        return True
    return target.vector_bits == 256 and all(d.bits >= 32 for d in dtypes)


def widen(e: Expr, v: Expr, spot: Spot) -> Expr:
    """The expression for the values of v that a spot covers."""
    return widen_all([e], v, spot)[0]


def widen_all(roots: Sequence[Expr], v: Expr, spot: Spot) -> list[Expr]:
    """The expressions for the values of v that a spot covers; what they share is looked at once."""
    wide: dict[Expr, Expr] = {}
    placed: dict[Expr, Expr] = {}
    vectors = [vectorize(e, v, spot.lanes, spot.mask, None, wide) if spot.lanes > 1 else e for e in roots]
    return vectors if spot.position is v else [substitute(e, {v: spot.position}, placed) for e in vectors]


@dataclass(frozen=True, slots=True)
class VectorLoop:
    """How the vector axis is walked.

    tail: 'mask' (one masked step), 'overlap' (one more full step that ends at the last element, so that some elements are
    visited twice, with `live` leaving them out of sums) or 'narrow' (steps of halved lanes). `shrink`: whether a masked
    step may use fewer lanes.
    """

    lanes: int
    unroll: int
    tail: str
    shrink: bool = True

    def over(self, axis: Axis, piece: Piece, base: Expr | None = None) -> list[Stmt]:
        """Statements that cover the axis (from `base` on, if given, instead of its start).

        A main loop of `unroll` vectors a step, then what is left, straight.
        """
        start = axis.first if base is None else base
        step, n = self.lanes * self.unroll, axis.extent
        body: list[Stmt] = []
        at = 0
        main = n // step * step
        if main > step:
            steps = self.step(axis.var, piece)
            body.append(For(axis.var, start, binary("add", start, main), tuple(steps), "serial", step))
            at = main
        if (n - at) // self.lanes > self.unroll:
            count = (n - at) // self.lanes * self.lanes
            once = tuple(piece(Spot(axis.var, self.lanes)))
            body.append(For(axis.var, binary("add", start, at), binary("add", start, at + count), once, "serial", self.lanes))
            at += count
        unit = 0
        while n - at >= self.lanes:
            body += piece(Spot(binary("add", start, at), self.lanes, unit))
            at += self.lanes
            unit += 1
        return body + (self._rest(at, n, start, piece) if at < n else [])

    def step(self, position: Expr, piece: Piece) -> list[Stmt]:
        """One step of the main loop."""
        return [s for u in range(self.unroll) for s in piece(Spot(binary("add", position, u * self.lanes), self.lanes, u))]

    def _rest(self, at: int, n: int, start: Expr, piece: Piece) -> list[Stmt]:
        """The last elements, fewer than `lanes`."""
        lanes, left = self.lanes, n - at
        if self.tail == "mask":
            while self.shrink and lanes // 2 >= left and lanes > 4:
                lanes //= 2
            mask = None if lanes == left else first_lanes(left, lanes)
            return list(piece(Spot(binary("add", start, at), lanes, 0, mask, mask)))
        if self.tail == "overlap" and n >= lanes:
            live = from_lane(lanes - left, lanes)
            return list(piece(Spot(binary("add", start, n - lanes), lanes, 0, None, live)))
        body: list[Stmt] = []
        while at < n:
            while lanes > n - at:
                lanes //= 2
            body += piece(Spot(binary("add", start, at), lanes))
            at += lanes
        return body


def nest(axes: Sequence[Axis], inner: Sequence[Stmt], kind: str = "serial") -> list[Stmt]:
    """Loops over the axes, the first outermost, around `inner`."""
    body = tuple(inner)
    for axis in reversed(axes):
        body = (For(axis.var, axis.first, binary("add", axis.first, axis.extent), body, kind),)
    return list(body)


def unit_axes(axes: Sequence[Axis]) -> tuple[list[Axis], dict[Expr, Expr]]:
    """The axes of more than one element, and the values of the others."""
    kept = [a for a in axes if a.extent != 1]
    return kept, {a.var: const(a.start) for a in axes if a.extent == 1}


def parallel_nest(
    axes: Sequence[Axis],
    inner: Sequence[Stmt],
    nanoseconds: float,
    *,
    most: int | None = None,
    least: float | None = None,
    chunk: float | None = None,
) -> tuple[list[Stmt], bool]:
    """Loops over `axes` around `inner`, the outer ones shared between threads where the whole takes `least` nanoseconds.

    `nanoseconds` is the estimate for the whole nest, `chunk` what a thread should take at a time; `most` is how many leading
    axes may be shared. Gives the statements and whether they are parallel.
    """
    least, chunk = PARALLEL_NS if least is None else least, CHUNK_NS if chunk is None else chunk
    shared = list(axes[: len(axes) if most is None else most])
    if nanoseconds < least or not shared:
        return nest(axes, inner), False
    total, used = 1, 0
    for axis in shared:
        total *= axis.extent
        used += 1
        if nanoseconds / total <= chunk:
            break
    if total < 2:
        return nest(axes, inner), False
    per = nanoseconds / total
    group = max(1, min(int(chunk / per), (total + 7) // 8))
    outer, rest = shared[:used], axes[used:]
    chunks = (total + group - 1) // group
    p = var(f"{outer[0].var.attr}_chunk")
    body = nest(rest, inner)
    if used == 1:
        axis = outer[0]
        first = binary("add", binary("mul", p, group), axis.start)
        if group == 1:
            stmts: list[Stmt] = [Let(axis.var, first), *body]
        else:
            last: Expr = binary("add", first, group)
            if axis.extent % group:
                last = minimum(last, const(axis.start + axis.extent))
            stmts = [For(axis.var, first, last, tuple(body))]
    else:
        q = p if group == 1 else var(f"{outer[0].var.attr}_flat")
        lets: list[Stmt] = []
        inside = total
        for axis in outer:
            inside //= axis.extent
            place = binary("floordiv", q, inside)
            if axis is not outer[0]:
                place = binary("mod", place, axis.extent)
            lets.append(Let(axis.var, binary("add", place, axis.start)))
        stmts = [*lets, *body]
        if group > 1:
            end: Expr = binary("mul", binary("add", p, 1), group)
            if total % group:
                end = minimum(end, const(total))
            stmts = [For(q, binary("mul", p, group), end, tuple(stmts))]
    return [For(p, const(0), const(chunks), tuple(stmts), "parallel")], True


def parallel_vector(
    axis: Axis, loop: VectorLoop, piece: Piece, nanoseconds: float, lets: Sequence[Stmt] = ()
) -> tuple[list[Stmt], bool]:
    """A single vector axis, cut into blocks that threads share; the rest that fills no block follows.

    `lets` come before the code of each block.
    """
    step = loop.lanes * loop.unroll
    block = int(axis.extent * CHUNK_NS / max(nanoseconds, 1.0)) // step * step
    block = max(block, step)
    if nanoseconds < PARALLEL_NS or axis.extent < 2 * block:
        return [*lets, *loop.over(axis, piece)], False
    chunks = axis.extent // block
    p = var(f"{axis.var.attr}_chunk")
    first = binary("add", binary("mul", p, block), axis.start)
    steps = loop.step(axis.var, piece)
    body = For(axis.var, first, binary("add", first, block), tuple(steps), "serial", step)
    done = axis.start + chunks * block
    rest = Axis(axis.var, axis.start + axis.extent - done, done)
    after = [*lets, *loop.over(rest, piece)] if rest.extent else []
    return [For(p, const(0), const(chunks), (*lets, body), "parallel"), *after], True


def parallel_lines(
    axis: Axis, loop: VectorLoop, piece: Piece, nanoseconds: float, lets: Sequence[Stmt], stored: Buffer
) -> list[Stmt] | None:
    """As `parallel_vector`, for one contiguous store of `stored` at the axis' own index: its vectors begin where lines do.

    A streaming store of part of a line costs as much as one of the whole, and an array may begin anywhere in a line (numpy's
    large ones begin 16 bytes into one). None where there is nothing to share, or the target has no masks.
    """
    line = LINE // stored.dtype.itemsize
    step = loop.lanes * loop.unroll
    block = max(int(axis.extent * CHUNK_NS / max(nanoseconds, 1.0)) // step * step, step)
    if loop.tail != "mask" or line % loop.lanes or axis.start or nanoseconds < PARALLEL_NS or axis.extent < 2 * block + line:
        return None
    lanes, lead = loop.lanes, var(f"{axis.var.attr}_lead")
    first_line = Let(lead, Expr("to_line", (), i64, 1, stored))
    chunks = (axis.extent - line) // block
    p = var(f"{axis.var.attr}_chunk")
    first = binary("mul", p, block)

    def shifted(spot: Spot) -> Sequence[Stmt]:
        return piece(replace(spot, position=binary("add", spot.position, lead)))

    def masked(position: Expr, before: Expr) -> Sequence[Stmt]:
        """The lanes from a position on that lie before another one."""
        count = cast(binary("sub", before, position), i32)
        mask = binary("lt", ramp(const(0, i32), lanes), broadcast(count, lanes))
        return piece(Spot(position, lanes, 0, mask, mask))

    body = For(axis.var, first, binary("add", first, block), tuple(loop.step(axis.var, shifted)), "serial", step)
    head = [s for k in range(0, line, lanes) for s in masked(const(k), lead)]
    done = chunks * block
    whole = (axis.extent - done - line) // lanes * lanes
    rest = For(axis.var, const(done), const(done + whole), tuple(shifted(Spot(axis.var, lanes))), "serial", lanes)
    last = [s for k in range(done + whole, axis.extent, lanes) for s in masked(binary("add", lead, k), const(axis.extent))]
    return [
        For(p, const(0), const(chunks), (first_line, *lets, body), "parallel"),
        first_line,
        *lets,
        *head,
        *([rest] if whole else []),
        *last,
    ]


def share(values: Sequence[Expr], numbers: Iterator[int]) -> tuple[list[Stmt], list[Expr]]:
    """Lets for what several of the values have in common, and the values in terms of them.

    All loads that the values share then happen before any of the stores that use them. `numbers` make the names unique.
    """
    order = list(postorder(values))
    users = dict.fromkeys(order, 0)  # which values use an expression, a bit for each
    for k, root in enumerate(values):
        users[root] |= 1 << k
    for e in reversed(order):
        for a in e.args:
            users[a] |= users[e]
    common = {e for e, k in users.items() if k & (k - 1) and e.op not in ("const", "var", "broadcast", "ramp")}
    if not common:
        return [], list(values)
    tops = dict.fromkeys(e for e in values if e in common)
    for e, ks in users.items():
        tops.update((a, None) for a in e.args if a in common and (e not in common or users[a] != ks))
    lets: list[Stmt] = []
    named: dict[Expr, Expr] = {}
    for e in order:
        if e in tops and e.dtype is not i64:
            name = vector_variable(f"t{next(numbers)}", e.dtype, e.lanes)
            lets.append(Let(name, substitute(e, {}, named)))
            named[e] = name
    return lets, [substitute(v, {}, named) for v in values]


def store_piece(
    stores: Sequence[tuple[Buffer, Expr, Expr]],
    v: Expr,
    strides: Sequence[int | None],
    numbers: Iterator[int],
    *,
    nontemporal: bool,
) -> Piece:
    """A piece that stores each (buffer, flat index, value) along v; `strides` are those of the indices along v."""

    def piece(spot: Spot) -> list[Stmt]:
        wides = [broadcast(wide, spot.lanes) for wide in widen_all([value for _, _, value in stores], v, spot)]
        done: list[Stmt] = []
        if len(wides) > 1:
            # Every value before any store: an output may then take the memory of an operand that another one reads.
            done, wides = share(wides, numbers)
            for k, wide in enumerate(wides):
                if wide.op not in ("const", "var") and not (wide.op == "broadcast" and wide.args[0].op == "var"):
                    wides[k] = vector_variable(f"t{next(numbers)}", wide.dtype, wide.lanes)
                    done.append(Let(wides[k], wide))
        for (buffer, index, _), wide, stride in zip(stores, wides, strides, strict=True):
            if stride == 1 or spot.lanes == 1:
                at = substitute(index, {v: spot.position})
            else:
                at = widen(index, v, spot)
            done.append(Store(buffer, (at,), wide, spot.mask, nontemporal and stride == 1))
        return done

    return piece
