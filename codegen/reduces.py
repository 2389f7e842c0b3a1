"""Reductions over any axes, with what feeds them inlined.

Where the reduced axis is contiguous, a few vector accumulators run along it and are combined at the end; where a kept
axis is, vectors lie along that one and rows are added up. Long reductions with few results are cut into parts of a
size that depends on the shape alone, so that any number of threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

import numpy as np

from ..ir.dims import as_int
from ..ir.dtypes import DType, i32
from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, eq, load, postorder, select, substitute, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Reduce
from ..ir.target import Target
from .accumulate import NOWHERE, POSITIONS, Accumulator
from .groups import (
    UNROLL_LIMIT,
    Body,
    Lowered,
    better,
    body_name,
    combine,
    cost,
    flat_index,
    identity,
    lanes_for,
    lowered,
    static_shape,
)
from .loop_ir import Alloc, Buffer, For, Stmt, Store
from .maps import BYTES_PER_NS, CYCLE_NS, Box, lower_map, map_outputs, merge_axes, ranges_of, restrict, stride_along
from .nests import CHUNK_NS, PARALLEL_NS, Axis, Spot, VectorLoop, has_masks, nest, parallel_nest, unit_axes, widen
from .simplify_index import Simplifier

MOST_PARTS: Final = 64
LONGEST: Final = 4096  # elements added one after another into one accumulator of a column
BLOCK_BYTES: Final = 8 * 1024  # of a block of column sums kept in L1


@dataclass(frozen=True, slots=True)
class Result:
    """One reduction of a level: where its results go (buffer, flat index over the kept variables)."""

    name: str
    kind: str
    value: Expr
    place: Expr
    dtype: DType
    buffer: Buffer
    index: Expr


@dataclass(frozen=True, slots=True)
class Level:
    """Reductions over one iteration space that do not depend on each other."""

    kept: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    results: tuple[Result, ...]
    box: Box

    @property
    def count(self) -> int:
        """Elements that go into one result."""
        return int(np.prod([a.extent for a in self.reduced], dtype=np.int64))

    @property
    def size(self) -> int:
        """Number of results."""
        return int(np.prod([a.extent for a in self.kept], dtype=np.int64))


def lower_reduce(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of a reduction group. Raises CompileError for reductions over different axes in one group."""
    body = Body(graph, aligns)
    nodes = [n for n in graph.nodes() if n.inputs and n not in body.operand]
    forms = {n: form for n in nodes if isinstance(form := body.lowering(n), Reduce)}
    if not forms:
        raise CompileError(f"a reduction region needs a reduction; this one has {body_name(graph)}")
    if all(_is_small(n, form) for n, form in forms.items()):
        return lower_map(graph, target, name, aligns)
    first, shape = next(iter(forms.items()))
    for n, form in forms.items():
        if (form.extents, form.axes) != (shape.extents, shape.axes) or kept_shape(n, form) != kept_shape(first, shape):
            raise CompileError(
                f"a reduction region reduces one space over one set of axes; {n.op.name} {n.type} over "
                f"{form.axes or form.extents} does not fit {first.op.name} {first.type} over {shape.axes or shape.extents}; "
                "leave it outside the region"
            )
    level: dict[Node, int] = {}
    for n in graph.nodes():
        level[n] = max((level[i] for i in n.inputs), default=0) + (1 if n in forms else 0)
    homes: dict[Node, Buffer] = {}
    spaces: list[Buffer] = []
    for n in forms:
        if n in graph.outputs:
            homes[n] = body.outputs[graph.outputs.index(n)]
        else:
            homes[n] = Buffer(f"w{len(spaces)}", n.dtype, (int(np.prod(static_shape(n), dtype=np.int64)),), align=64)
            spaces.append(homes[n])
    done: set[Node] = set()

    def bound(n: Node, at: tuple[Expr, ...]) -> Expr | None:
        if n in done:
            return load(homes[n], (body.normal(flat_index(at, static_shape(n))),), n.dtype)
        return None

    body.bound = bound
    statements: list[Stmt] = []
    parallel = False
    notes: list[str] = []
    for k in range(1, max(level.values()) + 1):
        group = [n for n in forms if level[n] == k]
        if not group:
            continue
        body.forget()
        part, shared, extra, note = _Emitter(level_of(body, forms, group, homes, f"m{k}"), target, f"{k}").emit()
        statements += part
        spaces += extra
        parallel = parallel or shared
        notes.append(note)
        done.update(group)
    numbers = count()
    later = [k for k, n in enumerate(graph.outputs) if n not in forms or homes[n] is not body.outputs[k]]
    sizes = dict.fromkeys(body.outputs[k].span for k in later)
    pairs: frozenset[tuple[int, int]] = frozenset()
    for size in sizes:
        some = [k for k in later if body.outputs[k].span == size]
        part, shared, found, _ = map_outputs(body, some, target, numbers)
        statements += part
        parallel = parallel or shared
        # The reductions are done then: what only the last loops still read may make way for what they write.
        pairs = found if len(sizes) == 1 else pairs
    doc = f"reduce: {body_name(graph)}"
    return lowered(body, name, statements, doc=doc, workspaces=spaces, in_place=pairs, parallel=parallel, note="; ".join(notes))


def _is_small(node: Node, form: Reduce) -> bool:
    """Whether a reduction is best written out as one expression: few elements, and not the contiguous ones."""
    total = int(np.prod([as_int(n) for n in form.extents], dtype=np.int64))
    contiguous = form.axes is not None and len(node.inputs[0].shape) - 1 in form.axes
    return total <= (4 if contiguous else UNROLL_LIMIT)


def kept_shape(node: Node, form: Reduce) -> tuple[int, ...]:
    shape = static_shape(node)
    if form.axes is None or not form.keepdims:
        return shape
    return tuple(n for d, n in enumerate(shape) if d not in form.axes)


def level_of(body: Body, forms: dict[Node, Reduce], group: Sequence[Node], homes: dict[Node, Buffer], name: str) -> Level:
    """The reductions of a level over common variables, their axes merged."""
    form = forms[group[0]]
    outer = kept_shape(group[0], form)
    extents = tuple(as_int(n) for n in form.extents)
    kept = [Axis(var(f"i{k}"), n) for k, n in enumerate(outer)]
    reduced = [Axis(var(f"r{k}"), n) for k, n in enumerate(extents)]
    order: list[Axis] = []
    if form.axes is None:
        order = kept + reduced
    else:
        left, inner = iter(kept), iter(reduced)
        order = [next(inner) if d in form.axes else next(left) for d in range(len(kept) + len(reduced))]
    some, fixed = unit_axes(order)
    simplifier = Simplifier(ranges_of(some))
    body.normal = simplifier.simplify
    at = tuple(fixed.get(a.var, a.var) for a in kept)
    r = tuple(fixed.get(a.var, a.var) for a in reduced)
    stores: list[tuple[Buffer, Expr, Expr]] = []
    place = flat_index(r, extents)
    for n in group:
        f = forms[n]
        index = list(at)
        if f.axes is not None and f.keepdims:
            for axis in f.axes:
                index.insert(axis, const(0))
        value = f.value(tuple(index), r, body.reader(n))
        stores.append((homes[n], flat_index(at, outer), value))
    # The position rides along as a store of its own, so that merging keeps it linear too.
    positions = any(forms[n].kind in POSITIONS for n in group)
    if positions:
        stores.append((homes[group[0]], const(0), place))
    inside = {a.var for a in reduced}
    box = merge_axes(restrict(some, stores), lambda a, b: (a.var in inside) is not (b.var in inside))
    place = box.stores[-1][2] if positions else const(0)
    results = tuple(
        Result(f"{name}_{k}", forms[n].kind, v, place, n.dtype, b, i)
        for k, (n, (b, i, v)) in enumerate(zip(group, box.stores, strict=False))
    )
    return Level(tuple(a for a in box.axes if a.var not in inside), tuple(a for a in box.axes if a.var in inside), results, box)


@dataclass(frozen=True, slots=True)
class _Rows:
    """How long rows are added up: `sums` are a block's sums in L1, `together` rows are taken in at a time."""

    reduced: tuple[Axis, ...]
    sums: tuple[Buffer, ...]
    together: int
    loop: VectorLoop
    part: Expr | None


class _Emitter:
    """Loops for one level."""

    def __init__(self, level: Level, target: Target, tag: str) -> None:
        self.level, self.target, self.tag = level, target, tag
        loads = [e for e in postorder([r.value for r in level.results]) if e.op == "load"]
        self.loads = list(dict.fromkeys(loads))
        self.dtypes = [r.value.dtype for r in level.results] + [e.dtype for e in loads]
        self.masks = has_masks(target, [*self.dtypes, *(r.dtype for r in level.results)])
        self.lanes = lanes_for(target, self.dtypes)
        self.work = cost([r.value for r in level.results]) + 2 * len(level.results)
        self.most = 8 if target.registers >= 32 else 4
        total = level.count * level.size
        unit = sum(e.dtype.itemsize for e in self.loads)
        self.nanoseconds = total * max(unit / BYTES_PER_NS, self.work * 0.5 * CYCLE_NS / self.lanes)
        self.parts: dict[str, tuple[Buffer, Buffer | None]] = {}
        self.spaces: list[Buffer] = []
        self.numbers = count()  # for names: each accumulator its own

    def emit(self) -> tuple[list[Stmt], bool, list[Buffer], str]:
        """Statements, whether they are parallel, workspace arrays, and a note on the scheme."""
        level = self.level
        if level.count == 0:
            return self._empty(), False, [], "nothing to reduce"
        axis = self._axis()
        across = axis in level.kept
        scheme = "vectors across results" if across else "vectors along the reduction"
        tiles = level.size if not across else level.size // axis.extent * max(1, axis.extent // (8 * self.lanes))
        sequential = level.count if across else level.count // (self.lanes * self.most)
        few = self.nanoseconds >= PARALLEL_NS and tiles < 8
        if level.reduced and (few or (across and sequential > LONGEST)):
            statements, parallel, parts = self._in_parts(axis, across)
            if parts > 1:
                return statements, parallel, self.spaces, f"{scheme}, {parts} parts"
        inner = self._tile(axis, across, level.reduced, None)
        outer = [a for a in level.kept if a is not axis]
        statements, parallel = parallel_nest(outer, inner, self.nanoseconds)
        return statements, parallel, [], scheme

    def _empty(self) -> list[Stmt]:
        done: list[Stmt] = []
        for r in self.level.results:
            done += nest(self.level.kept, [Store(r.buffer, (r.index,), identity(r.kind, r.dtype))])
        return done

    def _axis(self) -> Axis:
        """The axis along which vectors are cheapest."""
        box, lanes = self.level.box, self.lanes
        best, choice = float("inf"), None
        for axis in reversed((*self.level.kept, *self.level.reduced)):
            vectors = -(-axis.extent // lanes) / axis.extent
            price = 0.5 * self.work * vectors
            for e in self.loads:
                stride = stride_along(box, e.args[0], axis.var)
                price += vectors if stride == 1 else 0.1 * vectors if stride == 0 else 1.0
            price += (1.0 if axis in self.level.kept else 24.0) / self.level.count
            if price < best:
                best, choice = price, axis
        if choice is None:  # a single element
            return Axis(var("r"), 1)
        return choice

    # -- parts --------------------------------------------------------------------------------------------------------

    def _in_parts(self, axis: Axis, across: bool) -> tuple[list[Stmt], bool, int]:
        """The outermost reduced axis cut into parts, each summed to a workspace, and the parts combined in order."""
        level = self.level
        first = level.reduced[0]
        step = self.lanes * self.most if first is axis else 1
        wanted = max(2, min(MOST_PARTS, int(self.nanoseconds / CHUNK_NS)))
        if across and self.level.count > LONGEST:
            wanted = max(wanted, min(MOST_PARTS, -(-level.count // LONGEST)))
        size = -(-first.extent // wanted)
        size = max(step, -(-size // step) * step)
        whole, left = divmod(first.extent, size)
        parts = whole + (left > 0)
        if parts < 2:
            return [], False, parts
        for r in level.results:
            held = Accumulator(r.name, r.kind, r.value, r.dtype, 1, 1).held
            best = Buffer(f"{r.name}_parts", held, (parts * level.size,), align=64)
            where = Buffer(f"{r.name}_places", i32, (parts * level.size,), align=64) if r.kind in POSITIONS else None
            self.parts[r.name] = (best, where)
            self.spaces += [best] if where is None else [best, where]
        outer = [a for a in level.kept if a is not axis]
        p = var("part")

        def one(number: Expr, start: Expr, extent: int) -> list[Stmt]:
            piece = replace(first, extent=extent, base=start)
            reduced = (piece, *level.reduced[1:])
            its = piece if axis is first else axis
            return nest(outer, self._tile(its, across, reduced, number))

        body = one(p, binary("add", binary("mul", p, size), first.start), size)
        kind = "parallel" if self.nanoseconds >= PARALLEL_NS else "serial"
        done: list[Stmt] = [For(p, const(0), const(whole), tuple(body), kind)]
        if left:
            done += one(const(whole), const(first.start + whole * size), left)
        return done + self._combine(parts), kind == "parallel", parts

    def _combine(self, parts: int) -> list[Stmt]:
        """The parts of every result, taken in order."""
        size = self.level.size
        done: list[Stmt] = []
        j, p = var("j"), var("part")
        for r in self.level.results:
            best, where = self.parts[r.name]
            held = best.dtype
            lanes = self.lanes
            while lanes > 1 and lanes // 2 >= size:
                lanes //= 2

            def piece(
                spot: Spot, r: Result = r, best: Buffer = best, where: Buffer | None = where, held: DType = held
            ) -> list[Stmt]:
                n = spot.lanes
                tag = f"{r.name}_{next(self.numbers)}"
                acc = Buffer(f"{tag}_all", held, (n,), scope="register", align=64)
                at = (const(0),)
                index = binary("add", binary("mul", p, size), spot.position)
                new, old = load(best, (index,), held, spot.mask, n), load(acc, at, held, lanes=n)
                steps: list[Stmt] = []
                head: list[Stmt] = [Alloc(acc), Store(acc, at, identity(r.kind, held, n))]
                if where is not None:
                    spots = Buffer(f"{tag}_at", i32, (n,), scope="register", align=64)
                    head += [Alloc(spots), Store(spots, at, const(0, i32, n))]
                    wins = better(r.kind, new, old)
                    was = load(spots, at, i32, lanes=n)
                    here = load(where, (index,), i32, spot.mask, n)
                    steps = [Store(spots, at, select(wins, here, was)), Store(acc, at, select(wins, new, old))]
                    final = cast(was, r.dtype)
                else:
                    steps = [Store(acc, at, combine(r.kind, old, new))]
                    final = cast(old, r.dtype)
                loop = For(p, const(0), const(parts), tuple(steps))
                return [*head, loop, Store(r.buffer, (spot.position,), final, spot.mask)]

            loop = VectorLoop(lanes, 1, "mask" if self.masks else "overlap", shrink=False)
            done += loop.over(Axis(j, size), piece)
        return done

    # -- one tile -----------------------------------------------------------------------------------------------------

    def _tile(self, axis: Axis, across: bool, reduced: Sequence[Axis], part: Expr | None) -> list[Stmt]:
        """The code inside the outer kept loops; `part` is the number of the part, where there are parts."""
        return self._across(axis, reduced, part) if across else self._along(axis, reduced, part)

    def _store(
        self, r: Result, value: Expr, spot: Spot | None, v: Expr, *, part: Expr | None, places: Expr | None = None
    ) -> list[Stmt]:
        """Writes a result (or a part of one): `value` is the reduced value, `places` its position."""
        lanes = 1 if spot is None else spot.lanes
        mask = None if spot is None else spot.mask

        def at(extra: Expr) -> Expr:
            index = binary("add", extra, r.index)
            if spot is None or lanes == 1:
                return index if spot is None else substitute(index, {v: spot.position})
            straight = stride_along(self.level.box, r.index, v) == 1
            return substitute(index, {v: spot.position}) if straight else widen(index, v, spot)

        if part is not None:
            best, where = self.parts[r.name]
            base = binary("mul", part, self.level.size)
            done: list[Stmt] = [Store(best, (at(base),), value, mask)]
            if where is not None and places is not None:
                done.append(Store(where, (at(base),), places, mask))
            return done
        return [Store(r.buffer, (at(const(0)),), cast(value if places is None else places, r.dtype), mask)]

    def _along(self, axis: Axis, reduced: Sequence[Axis], part: Expr | None) -> list[Stmt]:
        """Accumulators along a reduced axis."""
        lanes = self.lanes
        while lanes > 1 and lanes // 2 >= axis.extent:
            lanes //= 2
        units = max(1, (self.most if self.work <= 12 * len(self.level.results) else 4) // len(self.level.results))
        units = min(units, max(1, axis.extent // lanes))
        accs = [
            Accumulator(f"{r.name}_{next(self.numbers)}", r.kind, r.value, r.dtype, lanes, units, r.place)
            for r in self.level.results
        ]
        loop = VectorLoop(lanes, units, "mask" if self.masks else "overlap", shrink=False)

        def piece(spot: Spot) -> list[Stmt]:
            return [s for a in accs for s in a.step(spot, axis.var, spot.unit % units)]

        body = [s for a in accs for s in a.start()]
        body += nest([a for a in reduced if a.var is not axis.var], loop.over(axis, piece))
        for r, a in zip(self.level.results, accs, strict=True):
            if r.kind in POSITIONS:
                lets, best, found = a.position()
                body += [*lets, *self._store(r, best, None, axis.var, part=part, places=found)]
            else:
                body += self._store(r, a.total(), None, axis.var, part=part)
        return body

    def _across(self, axis: Axis, reduced: Sequence[Axis], part: Expr | None) -> list[Stmt]:
        """Vectors along a kept axis; rows are taken in one after another."""
        lanes = self.lanes
        while lanes > 1 and lanes // 2 >= axis.extent:
            lanes //= 2
        positions = any(r.kind in POSITIONS for r in self.level.results)
        wide = max(1, self.most // len(self.level.results))
        if not positions and axis.extent > wide * lanes and int(np.prod([a.extent for a in reduced], dtype=np.int64)) >= 16:
            return self._rows(axis, reduced, part, lanes)
        units = min(wide, max(1, axis.extent // lanes))
        tile = units * lanes
        main = axis.extent // tile * tile
        body: list[Stmt] = []
        if main:
            spots = [Spot(binary("add", axis.var, u * lanes), lanes) for u in range(units)]
            inner = tuple(self._columns(axis, spots, reduced, part))
            body.append(For(axis.var, const(axis.start), const(axis.start + main), inner, "serial", tile))
        at = axis.start + main
        while axis.start + axis.extent - at >= lanes:
            body += self._columns(axis, [Spot(const(at), lanes)], reduced, part)
            at += lanes

        def rest(spot: Spot) -> list[Stmt]:
            return self._columns(axis, [spot], reduced, part)

        left = axis.start + axis.extent - at
        if left:
            tail = "mask" if self.masks else "narrow"
            body += VectorLoop(lanes, 1, tail).over(Axis(axis.var, left, at), rest)
        return body

    def _columns(self, axis: Axis, spots: Sequence[Spot], reduced: Sequence[Axis], part: Expr | None) -> list[Stmt]:
        """A few vectors of results in registers, all rows taken in."""
        positions = any(r.kind in POSITIONS for r in self.level.results)
        inner = reduced[-1] if reduced else None
        budget = self.most // (len(spots) * len(self.level.results))
        rows = 1 if positions or inner is None else max(1, min(budget, inner.extent, 8))
        accs = [
            [Accumulator(f"{r.name}_{next(self.numbers)}", r.kind, r.value, r.dtype, s.lanes, rows, r.place) for s in spots]
            for r in self.level.results
        ]

        def take(row: int) -> list[Stmt]:
            moved = {} if inner is None or row == 0 else {inner.var: binary("add", inner.var, row)}
            done: list[Stmt] = []
            for group in accs:
                for s, a in zip(spots, group, strict=True):
                    here = replace(
                        a, value=substitute(a.value, moved), place=None if a.place is None else substitute(a.place, moved)
                    )
                    done += here.step(replace(s, live=None), axis.var, row)
            return done

        body: list[Stmt] = [s for group in accs for a in group for s in a.start()]
        loops: list[Stmt] = []
        if inner is None:
            loops = take(0)
        else:
            main = inner.extent // rows * rows
            start = inner.first
            if main:
                steps = tuple(s for row in range(rows) for s in take(row))
                loops.append(For(inner.var, start, binary("add", start, main), steps, "serial", rows))
            for k in range(main, inner.extent):
                loops.append(For(inner.var, binary("add", start, k), binary("add", start, k + 1), tuple(take(0)), "serial", 1))
        body += nest(reduced[:-1], loops)
        for r, group in zip(self.level.results, accs, strict=True):
            for s, a in zip(spots, group, strict=True):
                if r.kind in POSITIONS:
                    found = load(a.where, (const(0), const(0)), i32, lanes=s.lanes)
                    best = load(a.best, (const(0), const(0)), a.held, lanes=s.lanes)
                    found = select(eq(found, const(NOWHERE, i32, s.lanes)), const(0, i32, s.lanes), found)
                    body += self._store(r, best, s, axis.var, part=part, places=found)
                else:
                    body += self._store(r, a.vector(), s, axis.var, part=part)
        return body

    def _rows(self, axis: Axis, reduced: Sequence[Axis], part: Expr | None, lanes: int) -> list[Stmt]:
        """Long rows: a block of sums in L1, four rows taken in at a time."""
        held = [Accumulator(r.name, r.kind, r.value, r.dtype, 1, 1).held for r in self.level.results]
        width = max(BLOCK_BYTES // max(d.itemsize for d in held), lanes)
        inner = reduced[-1]
        loop = VectorLoop(lanes, 2, "mask" if self.masks else "narrow")
        body: list[Stmt] = []
        blocks = [(axis.start + k, min(width, axis.extent - k)) for k in range(0, axis.extent, width)]
        if len(blocks) > 2 and blocks[0][1] * len(blocks) != axis.extent:
            full, last = blocks[:-1], blocks[-1:]
        else:
            full, last = (blocks, []) if len({n for _, n in blocks}) == 1 else (blocks[:-1], blocks[-1:])
        sums = [
            Buffer(f"{r.name}_sums", d, (width,), scope="local", align=64) for r, d in zip(self.level.results, held, strict=True)
        ]
        body += [Alloc(b) for b in sums]
        rows = _Rows(tuple(reduced), tuple(sums), min(4, inner.extent), loop, part)
        block = var(f"{axis.var.attr}_block")
        if len(full) == 1:
            body += self._row_block(axis, const(full[0][0]), full[0][1], rows)
        elif full:
            inside = self._row_block(axis, block, width, rows)
            body.append(For(block, const(full[0][0]), const(full[0][0] + width * len(full)), tuple(inside), "serial", width))
        for at, n in last:
            body += self._row_block(axis, const(at), n, rows)
        return body

    def _row_block(self, axis: Axis, first: Expr, extent: int, rows: _Rows) -> list[Stmt]:
        """The sums of columns first .. first + extent."""
        sums, inner, loop = rows.sums, rows.reduced[-1], rows.loop
        c = var(f"{axis.var.attr}_in")
        column = Axis(c, extent)
        moved = {axis.var: binary("add", first, c)}
        results = self.level.results

        def clear(spot: Spot) -> list[Stmt]:
            return [
                Store(b, (spot.position,), identity(r.kind, b.dtype, spot.lanes), spot.mask)
                for r, b in zip(results, sums, strict=True)
            ]

        def taking(count: int) -> list[Stmt]:
            def piece(spot: Spot) -> list[Stmt]:
                done: list[Stmt] = []
                for r, b in zip(results, sums, strict=True):
                    values = []
                    for k in range(count):
                        here = substitute(r.value, moved | ({inner.var: binary("add", inner.var, k)} if k else {}))
                        values.append(cast(broadcast(widen(here, c, spot), spot.lanes), b.dtype))
                    while len(values) > 1:
                        values = [combine(r.kind, x, y) for x, y in zip(values[::2], values[1::2], strict=False)] + (
                            values[-1:] if len(values) % 2 else []
                        )
                    old = load(b, (spot.position,), b.dtype, spot.mask, spot.lanes)
                    done.append(Store(b, (spot.position,), combine(r.kind, old, values[0]), spot.mask))
                return done

            return loop.over(column, piece)

        start, main = inner.first, inner.extent // rows.together * rows.together
        loops: list[Stmt] = []
        if main:
            loops.append(For(inner.var, start, binary("add", start, main), tuple(taking(rows.together)), "serial", rows.together))
        if inner.extent > main:
            loops.append(For(inner.var, binary("add", start, main), binary("add", start, inner.extent), tuple(taking(1))))

        def write(spot: Spot) -> list[Stmt]:
            done: list[Stmt] = []
            for r, b in zip(results, sums, strict=True):
                value = load(b, (spot.position,), b.dtype, spot.mask, spot.lanes)
                there = replace(spot, position=binary("add", first, spot.position))
                done += self._store(r, value, there, axis.var, part=rows.part)
            return done

        return [*loop.over(column, clear), *nest(rows.reduced[:-1], loops), *loop.over(column, write)]


__all__ = ["lower_reduce"]
