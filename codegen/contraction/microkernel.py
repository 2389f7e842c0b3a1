"""The register tile: rows x columns of accumulators, updated once per step of the reduction, then the epilogue.

One description serves every form. Lanes run along the columns, a loop of C, or (`along_k`) along the innermost
reduction loop, whose lanes are then added at the end in a fixed tree. `row` is the operand that a column does not move,
loaded once per row and, with lanes along C, broadcast; `col` the other one. (If both move with the column, as in a
depthwise convolution with lanes along the channels, both are vectors.)

    alloc acc[parts, rows, columns]; acc = 0, or the partial sums of the blocks of the reduction done so far
    for k...: acc[u, i, j] = fma(row[i, k], col[j, k], acc[u, i, j])
    C[i, j] = epilogue(sum over u of acc[u, i, j]), or the partial sums of a reduction that goes on
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.dtypes import DType
from ...ir.expr import (
    Expr,
    binary,
    broadcast,
    cast,
    const,
    eq,
    fma,
    fma_bf16,
    fma_integers,
    load,
    postorder,
    ramp,
    reduce_lanes,
    substitute,
    var,
)
from ..loop_ir import Alloc, Buffer, Call, For, If, Kernel, Let, Prefetch, Stmt, Store, expressions, statements, vector_variable
from ..vectorize import vectorize
from .canonical import ACC, C, Loop, Nest

FETCHED_FROM = 1024  # multiply-adds of a tile from which what its epilogue reads is asked for at its start
MOST_FETCHED = 64  # lines, at most
HELD = 16  # last steps of a single row whose elements are held in registers
LANE = var("lane")
STEPS, FIRST, LAST = var("steps"), var("first"), var("last")


@dataclass(frozen=True)
class Tile:
    """What a register tile is made of.

    rows           per row its offset in every stream, relative to the tile's origin
    columns, step  how many columns, and the stride from one to the next in every stream
    groups, apart  how many groups of so many columns, and the stride from one to the next in every stream
    lanes          elements of a vector
    loops          reduction loops inside the tile, outer first; strides are (row operand, column operand)
    variable       the outermost of `loops` has its extent in the parameter `steps`
    partial        the reduction is cut: partial sums live in the buffer `part`; parameters `first` and `last`
    parts, unroll  independent accumulators per cell; steps of the innermost loop per iteration
    fused          multiply-adds are fused (the target has the instruction)
    aligns         bytes to which elements of the row and of the column operand are aligned: of bf16 pairs in place 2
    reach          the largest offset of a row in the row operand, where the tile is passed those of its rows; otherwise -1
    pairs          an element of both operands is two bf16, or four bytes, their products and the sum one instruction
    factors        of bytes: which are signed, of the row and of the column operand (`fma_integers`)
    padded         the column operand may be read up to whole vectors (it is packed)
    ahead          lines of the column operand's next panel that an iteration of the innermost loop asks for (`Plan.ahead`)
    line           elements of a line of cache
    page           if not 0: elements of a page, of which one line is asked for, in place of `ahead` lines of each iteration
    """

    row: int
    col: int
    rows: tuple[tuple[int, ...], ...]
    columns: int
    step: tuple[int, ...]
    groups: int
    apart: tuple[int, ...]
    lanes: int
    along_k: bool
    loops: tuple[Loop, ...]
    variable: bool
    partial: bool
    parts: int
    unroll: int
    fused: bool
    padded: bool
    ahead: int
    line: int
    page: int
    dtype: DType
    row_dtype: DType
    col_dtype: DType
    reach: int
    pairs: bool
    factors: str
    aligns: tuple[int, int]

    @property
    def vectors(self) -> int:
        """Accumulators of a row."""
        return self.columns if self.along_k else -(-self.columns // self.lanes) * self.groups


@dataclass(frozen=True)
class Ukernel:
    """A microkernel and how to call it.

    `views[i]` is (stream, shift): the i-th buffer parameter starts at the tile's offset in that stream plus `shift`; a
    stream below 0 is epilogue operand -1 - stream, whole. What is prefetched, if anything, and the partial sums, if any, come
    last. The scalars are: steps
    (if variable), first and last (if partial), then the index of each of `dims` (streams) at the tile's origin, then the
    offset of each row in the row operand (if `Tile.reach` is not -1).
    """

    kernel: Kernel
    views: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]


class _Window:
    """A parameter as the tile sees it: [offset of row and step, lane], the lane with a stride of its own.

    Positions overlap, as those of a convolution's windows do. Offsets count from the lowest one, `low`.
    """

    def __init__(
        self, name: str, dtype: DType, low: int, high: int, lanes: int, stride: int, writable: bool = False, align: int = 0
    ) -> None:
        self.low = low
        self.flat = stride == 0
        shape = (high - low + 1,) if self.flat else (high - low + 1, lanes)
        strides = (1,) if self.flat else (1, stride)
        if stride < 0:
            self.low = low + stride * (lanes - 1)
            shape, strides = (high - self.low + 1,), (1,)
        self.reversed = stride if stride < 0 else 0
        self.buffer = Buffer(name, dtype, shape, strides=strides, align=align or dtype.itemsize, writable=writable)

    def at(self, offset: Expr | int, lane: Expr | int = 0) -> tuple[Expr, ...]:
        first = (const(0) + offset) + (-self.low)
        if self.reversed:
            return (first + (const(0) + lane) * self.reversed,)
        return (first,) if self.flat else (first, const(0) + lane)


def fingerprint(body: Sequence[Stmt], parameters: Sequence[Buffer]) -> str:
    """A short hash of everything that makes a kernel what it is, names of variables and buffers included."""
    text: list[str] = [repr(parameters)]
    ids: dict[Expr, int] = {}
    seen: dict[int, str] = {}

    def known(b: object) -> str:
        """A buffer's text, made once for each: every load and store names one."""
        found = seen.get(id(b))
        if found is None:
            found = seen[id(b)] = repr(b)
        return found

    for s in statements(tuple(body)):
        roots = expressions(s)
        for e in postorder(roots, ids):
            attr = e.attr
            what = f"{known(attr[0])}{attr[1]}" if e.op == "load" else repr(attr)
            text.append(f"{e.op}{[ids[a] for a in e.args]}{e.dtype.name}{e.lanes}{what}")
            ids[e] = len(ids)
        parts = [type(s).__name__, *[str(ids[e]) for e in roots]]
        match s:
            case For():
                parts += [repr(s.var), s.kind, str(s.step), str(len(s.body))]
            case Store():
                parts += [known(s.buffer), str(s.mask is not None), str(s.nontemporal)]
            case Let():
                parts.append(repr(s.var))
            case Prefetch():
                parts += [known(s.buffer), str(s.level)]
            case If():
                parts += [str(len(s.then)), str(len(s.otherwise))]
            case Alloc():
                parts.append(repr(s.buffer))
            case Call():
                parts += [s.kernel, *(repr(b) for b, _ in s.views)]
        text.append(" ".join(parts))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


def build(nest: Nest, t: Tile) -> Ukernel:
    """The kernel of a tile. Its name holds dtype, tile, lanes, and a hash of its body."""
    return _Builder(nest, t).build()


class _Builder:
    def __init__(self, nest: Nest, t: Tile) -> None:
        self.nest, self.t = nest, t
        self.across = 1 if t.along_k else t.lanes  # columns an accumulator covers
        self.acc = Buffer("acc", t.dtype, (t.parts, len(t.rows), t.vectors * t.lanes), scope="register", align=64)
        self.row = self._operand(t.row, t.row_dtype, 0)
        self.col = self._operand(t.col, t.col_dtype, 1)
        self.out = self._window("c", C, nest.out, writable=True)
        self.more = [self._window(f"c{k}", s, v.dtype, writable=True) for k, (s, v) in enumerate(nest.more, 1)]
        self.reads = [self._window(f"e{i}", r.stream, r.dtype) if r.stream >= 0 else None for i, r in enumerate(nest.reads)]
        self.ahead = Buffer("ahead", t.col_dtype, (1,), align=t.col_dtype.itemsize, writable=False)
        self.part = Buffer("part", t.dtype, (len(t.rows), t.vectors * t.lanes), align=64)
        self.dims = {v: var(str(v.attr)) for v, _ in nest.dims}

    def _operand(self, stream: int, dtype: DType, which: int) -> _Window:
        t = self.t
        low = min(r[stream] for r in t.rows)
        high = max(r[stream] for r in t.rows) + (max(0, t.reach) if stream == t.row else 0)
        for x in t.loops[:-1] if t.along_k else t.loops:
            reach = x.strides[which] * (x.extent - 1)
            low, high = low + min(0, reach), high + max(0, reach)
        name = "ab"[stream]
        if t.along_k:
            reach = t.step[stream] * (t.columns - 1)
            low, high = low + min(0, reach), high + max(0, reach)
            return _Window(name, dtype, low, high, t.loops[-1].extent, t.loops[-1].strides[which], align=t.aligns[which])
        lanes = t.vectors * t.lanes if t.padded and stream == t.col else t.columns
        return _Window(name, dtype, low, high, lanes, t.step[stream], align=t.aligns[which])

    def _window(self, name: str, stream: int, dtype: DType, writable: bool = False) -> _Window:
        t = self.t
        offsets = [r[stream] + g * t.apart[stream] for r in t.rows for g in range(t.groups)]
        return _Window(name, dtype, min(offsets), max(offsets), t.columns, t.step[stream], writable)

    def _place(self, i: int) -> Expr:
        """Where row i starts in the row operand."""
        return const(self.t.rows[i][self.t.row]) if self.t.reach < 0 else var(f"place{i}")

    def _lanes_of(self, j: int) -> Expr | None:
        """The mask of vector j's columns; None where all are there."""
        t = self.t
        return None if t.along_k or t.groups > 1 else self._first(t.columns - j * t.lanes)

    def _first(self, count: int) -> Expr | None:
        """The mask of the first `count` lanes; None for all."""
        lanes = self.t.lanes
        return None if count >= lanes else binary("lt", ramp(0, lanes), const(count, lanes=lanes))

    def _vector(self, window: _Window, offset: Expr | int, j: int, mask: Expr | None) -> Expr:
        """Vector j of an operand, widened to the accumulator's dtype."""
        t = self.t
        if window.flat:
            return broadcast(cast(load(window.buffer, window.at(offset), window.buffer.dtype), t.dtype), t.lanes)
        at = window.at(offset, j * t.lanes)
        if window.reversed:
            value = vectorize(
                load(window.buffer, window.at(offset, LANE + j * t.lanes), window.buffer.dtype), LANE, t.lanes, mask
            )
            value = substitute(value, {LANE: const(0)})
        else:
            value = load(window.buffer, at, window.buffer.dtype, mask, t.lanes)
        return cast(value, t.dtype)

    def _multiply_add(self, a: Expr, b: Expr, c: Expr) -> Expr:
        if self.t.pairs:
            return fma_integers(a, b, c, self.t.factors) if self.t.factors else fma_bf16(a, b, c)
        return fma(a, b, c) if self.t.fused and self.t.dtype.is_float else c + a * b

    def _cell(self, u: int, i: int, j: int) -> tuple[Expr, ...]:
        return const(u), const(i), const(j * self.t.lanes)

    def _get(self, u: int, i: int, j: int) -> Expr:
        return load(self.acc, self._cell(u, i, j), self.t.dtype, None, self.t.lanes)

    def _step(self, row_offset: Expr, col_offset: Expr, u: int, tag: str) -> list[Stmt]:
        """One step of the reduction, for lanes along C."""
        t = self.t
        out: list[Stmt] = []
        masked = not t.padded
        columns = []
        for j in range(t.vectors):
            name = vector_variable(f"v{tag}_{j}", t.dtype, t.lanes)
            out.append(Let(name, self._vector(self.col, col_offset, j, self._lanes_of(j) if masked else None)))
            columns.append(name)
        for i in range(len(t.rows)):
            at = row_offset + self._place(i)
            shared = self._vector(self.row, at, 0, None) if self.row.flat else None
            if shared is not None and t.vectors > 1:
                name = vector_variable(f"a{tag}_{i}", t.dtype, t.lanes)
                out.append(Let(name, shared))
                shared = name
            for j, column in enumerate(columns):
                value = shared if shared is not None else self._vector(self.row, at, j, self._lanes_of(j))
                out.append(Store(self.acc, self._cell(u, i, j), self._multiply_add(value, column, self._get(u, i, j))))
        return out

    def _by_columns(self, x: Loop, row_offset: Expr, col_offset: Expr, first: int) -> list[Stmt]:
        """The last steps of a single row, from `first` on, column by column.

        In a recurrence a step waits for the one before it. So the first columns' epilogue runs beside the multiply-adds of the
        others, and the next step begins with the elements that are there first.
        """
        t = self.t
        out: list[Stmt] = []
        names = [vector_variable(f"al{k}", t.dtype, t.lanes) for k in range(first, x.extent)]
        for k, name in enumerate(names, first):
            out.append(Let(name, self._vector(self.row, row_offset + k * x.strides[0] + self._place(0), 0, None)))
        for j in range(t.vectors):
            mask = None if t.padded else self._lanes_of(j)
            for k, name in enumerate(names, first):
                column = self._vector(self.col, col_offset + k * x.strides[1], j, mask)
                u = k % t.parts
                out.append(Store(self.acc, self._cell(u, 0, j), self._multiply_add(name, column, self._get(u, 0, j))))
        return out

    def _dot_step(self, row_offset: Expr, col_offset: Expr, k: Expr, mask: Expr | None, u: int, tag: str) -> list[Stmt]:
        """`lanes` steps of the innermost reduction loop at once."""
        t = self.t
        out: list[Stmt] = []
        columns = []
        for j in range(t.columns):
            name = vector_variable(f"v{tag}_{j}", t.dtype, t.lanes)
            out.append(Let(name, self._along(self.col, col_offset + j * t.step[t.col], k, mask)))
            columns.append(name)
        for i, r in enumerate(t.rows):
            name = vector_variable(f"a{tag}_{i}", t.dtype, t.lanes)
            out.append(Let(name, self._along(self.row, row_offset + r[t.row], k, mask)))
            for j, column in enumerate(columns):
                out.append(Store(self.acc, self._cell(u, i, j), self._multiply_add(name, column, self._get(u, i, j))))
        return out

    def _along(self, window: _Window, offset: Expr, k: Expr, mask: Expr | None) -> Expr:
        t = self.t
        dtype = window.buffer.dtype
        if window.flat:
            value = broadcast(load(window.buffer, window.at(offset), dtype), t.lanes)
        elif window.reversed:
            value = vectorize(load(window.buffer, window.at(offset, k + LANE), dtype), LANE, t.lanes, mask)
            value = substitute(value, {LANE: const(0)})
        else:
            value = load(window.buffer, window.at(offset, k), dtype, mask, t.lanes)
        return cast(value, t.dtype)

    def _reduction(self, level: int, row_offset: Expr, col_offset: Expr, done: Expr) -> list[Stmt]:
        """The loops from `level` in; `done`: steps of the tile before the first one here."""
        t = self.t
        if not t.loops:
            return self._step(row_offset, col_offset, 0, "")
        x = t.loops[level]
        k = var(f"k{level}")
        done = done + k * math.prod(y.extent for y in t.loops[level + 1 :])
        if level < len(t.loops) - 1:
            stop = STEPS if t.variable and level == 0 else const(x.extent)
            body = self._reduction(level + 1, row_offset + k * x.strides[0], col_offset + k * x.strides[1], done)
            return [For(k, const(0), stop, tuple(body))]
        if t.along_k:
            return self._dot(x, k, row_offset, col_offset)

        def steps(start: Expr, count: int, tag: str) -> list[Stmt]:
            out: list[Stmt] = []
            for u in range(count):
                at = start + u
                rows, cols = row_offset + at * x.strides[0], col_offset + at * x.strides[1]
                if not start.is_const:  # keep the constant part of the address outside the product
                    rows = row_offset + start * x.strides[0] + u * x.strides[0]
                    cols = col_offset + start * x.strides[1] + u * x.strides[1]
                out += self._step(rows, cols, u % t.parts, f"{tag}{u}")
                if t.page:
                    out += self._page(done) if u == 0 and start is k and tag == "s" else []
                    continue
                for n in range(u * t.ahead // count, (u + 1) * t.ahead // count if tag == "s" else 0):
                    at = done * (t.ahead * t.line // t.unroll) + n * t.line
                    out.append(Prefetch(self.ahead, (at,), 2))
            return out

        if t.variable and level == 0:
            if t.unroll == 1:
                return [For(k, const(0), STEPS, tuple(steps(k, 1, "s")))]
            whole = STEPS - STEPS % t.unroll
            rest = var("r")
            return [
                For(k, const(0), whole, tuple(steps(k, t.unroll, "s")), step=t.unroll),
                For(rest, whole, STEPS, tuple(steps(rest, 1, "r"))),
            ]
        if x.extent <= t.unroll:
            straight = len(t.loops) == 1 and len(t.rows) == 1 and t.vectors > 1 and self.row.flat and not t.partial
            last = min(x.extent // 2, HELD) if straight and x.extent > 8 else 0
            return steps(const(0), x.extent - last, "s") + self._by_columns(x, row_offset, col_offset, x.extent - last)
        whole_count = x.extent - x.extent % t.unroll
        out: list[Stmt] = [For(k, const(0), const(whole_count), tuple(steps(k, t.unroll, "s")), step=t.unroll)]
        return out + steps(const(whole_count), x.extent % t.unroll, "r")

    def _page(self, done: Expr) -> list[Stmt]:
        """Asks for the first line of the page that an iteration is in, once it has come that far."""
        t = self.t
        width = t.vectors * t.lanes
        at = done * width
        if t.unroll * width % t.page:
            at = at // t.page * t.page  # several iterations in a page: the line is there after the first
        return [Prefetch(self.ahead, (at,), 1)]

    def _dot(self, x: Loop, k: Expr, row_offset: Expr, col_offset: Expr) -> list[Stmt]:
        t = self.t
        out: list[Stmt] = []
        stride = t.lanes * t.parts
        whole = x.extent // stride * stride
        if whole:
            body: list[Stmt] = []
            for u in range(t.parts):
                body += self._dot_step(row_offset, col_offset, k + u * t.lanes, None, u, f"s{u}")
            out.append(For(k, const(0), const(whole), tuple(body), step=stride))
        for u, start in enumerate(range(whole, x.extent, t.lanes)):
            out += self._dot_step(row_offset, col_offset, const(start), self._first(x.extent - start), u % t.parts, f"r{u}")
        return out

    def _cells(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(len(self.t.rows)) for j in range(self.t.vectors)]

    def _start(self) -> list[Stmt]:
        t = self.t
        zero = const(0, t.dtype, t.lanes)
        clear: list[Stmt] = [Store(self.acc, self._cell(u, i, j), zero) for u in range(t.parts) for i, j in self._cells()]
        if not t.partial:
            return clear
        again: list[Stmt] = []
        for u in range(t.parts):
            for i, j in self._cells():
                value = load(self.part, (const(i), const(j * t.lanes)), t.dtype, None, t.lanes) if u == 0 else zero
                again.append(Store(self.acc, self._cell(u, i, j), value))
        return [If(eq(FIRST, 1), tuple(clear), tuple(again))]

    def _fetch(self) -> list[Stmt]:
        """Asks for what the epilogue is going to read: it is there when the sums are."""
        t = self.t
        steps = math.prod(x.extent for x in t.loops)
        if t.along_k or t.variable or steps * len(t.rows) * t.vectors < FETCHED_FROM:
            return []
        out: list[Stmt] = []
        for r, window in zip(self.nest.reads, self.reads, strict=True):
            if window is None or window.flat or window.reversed or t.step[r.stream] != 1:
                continue
            places = {row[r.stream] + g * t.apart[r.stream] for row in t.rows for g in range(t.groups)}
            line = t.line * t.dtype.itemsize // r.dtype.itemsize
            out += [Prefetch(window.buffer, window.at(p, j), 1) for p in sorted(places) for j in range(0, t.columns, line)]
        return out if len(out) <= MOST_FETCHED else []

    def _combine(self) -> list[Stmt]:
        """Adds the parts: pairs, then pairs of pairs."""
        t = self.t
        out: list[Stmt] = []
        distance = 1
        while distance < t.parts:
            for u in range(0, t.parts - distance, 2 * distance):
                for i, j in self._cells():
                    out.append(Store(self.acc, self._cell(u, i, j), self._get(u, i, j) + self._get(u + distance, i, j)))
            distance *= 2
        return out

    def _values(self, row: Sequence[int], accs: Sequence[Expr]) -> list[Expr]:
        """The epilogue of a row (its offsets) as scalar expressions of LANE: what C holds, and each further output."""
        values: dict[Expr, Expr] = {}
        for d, stream in self.nest.dims:
            values[d] = self.dims[d] + LANE * self.t.step[stream] + row[stream]
        names = [f"{ACC}{g}" for g in range(self.t.groups)] if self.nest.joined else [ACC]
        markers: dict[Expr, Expr] = {
            var(name, self.nest.dtype): cast(acc, self.nest.dtype) for name, acc in zip(names, accs, strict=True)
        }
        for k, (r, window) in enumerate(zip(self.nest.reads, self.reads, strict=True)):
            if window is not None:
                markers[r.marker] = load(window.buffer, window.at(row[r.stream], LANE), r.dtype)
            else:
                assert r.flat is not None
                whole = self.whole[k]
                mask = None if r.mask is None else substitute(r.mask, values)
                markers[r.marker] = load(whole, (substitute(r.flat, values),), r.dtype, mask)
        memo: dict[Expr, Expr] = {}
        return [substitute(v, values | markers, memo) for v in (self.nest.value, *(v for _, v in self.nest.more))]

    def _finish(self) -> list[Stmt]:
        t = self.t
        out: list[Stmt] = []
        for i in range(len(t.rows)):
            row = t.rows[i][C]
            if t.along_k:
                for j in range(t.columns):
                    total = var(f"sum{i}_{j}", t.dtype)
                    out.append(Let(total, reduce_lanes("add", self._get(0, i, j))))
                    value = substitute(self._values(t.rows[i], (total,))[0], {LANE: const(j)})
                    out.append(Store(self.out.buffer, self.out.at(row, j), value))
                continue
            if self.nest.joined:
                out += self._joined(i)
                continue
            total = var("sum", t.dtype)
            each = t.vectors // t.groups
            for g in range(t.groups):
                moved = [o + g * s for o, s in zip(t.rows[i], t.apart, strict=True)]
                (scalar,) = self._values(moved, (total,))
                for j in range(each):
                    mask = self._lanes_of(j)
                    # LANE is the first column of vector j; the sum is not loaded again, so the mask must not touch it
                    value = vectorize(scalar, LANE, t.lanes, mask, {total: self._get(0, i, g * each + j)})
                    value = substitute(broadcast(value, t.lanes), {LANE: const(j * t.lanes)})
                    out.append(Store(self.out.buffer, self.out.at(moved[C], j * t.lanes), value, mask))
        return out

    def _joined(self, i: int) -> list[Stmt]:
        """Of row i what the epilogue makes of the sums of all groups; an output that another one uses is computed once."""
        t, each = self.t, self.t.vectors // self.t.groups
        row = t.rows[i]
        sums = [var(f"sum{g}", t.dtype) for g in range(t.groups)]
        scalars = self._values(row, sums)
        outputs = [(self.out, C), *zip(self.more, (s for s, _ in self.nest.more), strict=True)]
        out: list[Stmt] = []
        for j in range(each):
            held = {total: self._get(0, i, g * each + j) for g, total in enumerate(sums)}
            memo: dict[Expr, Expr] = {}
            wide = [broadcast(vectorize(v, LANE, t.lanes, None, held, memo), t.lanes) for v in scalars]
            lane: dict[Expr, Expr] = {}
            values = [substitute(v, {LANE: const(j * t.lanes)}, lane) for v in wide]
            names: dict[Expr, Expr] = {}
            for k in sorted(range(len(values)), key=lambda k: len(list(postorder([values[k]])))):
                value, (window, stream) = substitute(values[k], names), outputs[k]
                if value.op not in ("var", "const"):
                    name = vector_variable(f"y{i}_{j}_{k}", value.dtype, t.lanes)
                    out.append(Let(name, value))
                    names[values[k]] = value = name
                out.append(Store(window.buffer, window.at(row[stream], j * t.lanes), value))
        return out

    def build(self) -> Ukernel:
        """The kernel, with the streams its parameters follow."""
        t = self.t
        self.whole: dict[int, Buffer] = {}
        views: list[tuple[int, int]] = []
        buffers: list[Buffer] = []
        for stream, window in sorted([(t.row, self.row), (t.col, self.col)], key=lambda x: x[0]):
            views.append((stream, window.low))
            buffers.append(window.buffer)
        views.append((C, self.out.low))
        buffers.append(self.out.buffer)
        for k, (r, read) in enumerate(zip(self.nest.reads, self.reads, strict=True)):
            if read is not None:
                views.append((r.stream, read.low))
                buffers.append(read.buffer)
            else:
                self.whole[k] = Buffer(
                    f"e{k}", r.dtype, (self.nest.read_spans[r.operand],), align=r.dtype.itemsize, writable=False
                )
                views.append((-1 - r.operand, 0))
                buffers.append(self.whole[k])
        for (stream, _), window in zip(self.nest.more, self.more, strict=True):
            views.append((stream, window.low))
            buffers.append(window.buffer)
        scalars = [STEPS] if t.variable else []
        if t.ahead:
            buffers.append(self.ahead)
        if t.partial:
            scalars += [FIRST, LAST]
            buffers.append(self.part)
        scalars += [self.dims[v] for v, _ in self.nest.dims]
        if t.reach >= 0:
            scalars += [self._place(i) for i in range(len(t.rows))]
        body: list[Stmt] = [*self._fetch(), Alloc(self.acc), *self._start()]
        body += self._reduction(0, const(0), const(0), const(0))
        body += self._combine()
        finish = self._finish()
        if t.partial:
            save = [Store(self.part, (const(i), const(j * t.lanes)), self._get(0, i, j)) for i, j in self._cells()]
            body.append(If(eq(LAST, 1), tuple(finish), tuple(save)))
        else:
            body += finish
        form = "k" if t.along_k else "v"
        name = f"ukr_{t.dtype}_{len(t.rows)}x{t.columns * t.groups}_{form}{t.lanes}_{fingerprint(body, buffers)}"
        doc = f"{len(t.rows)} rows x {t.columns} columns, lanes along {'k' if t.along_k else 'columns'}"
        kernel = Kernel(name, tuple(buffers), tuple(body), tuple(scalars), doc=doc, noinline=True)
        return Ukernel(kernel, tuple(views), tuple(s for _, s in self.nest.dims))
