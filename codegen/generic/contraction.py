"""Contractions of any size: a register tile with run-time rows, columns and depth, over B in panels or as it lies.

The rows of a tile are positions in the product of the m axes, taken apart by division once a tile; so are the columns of B
that is no single axis. What an element is does not depend on the tile it falls in: its products are added up one after the
other, each with one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...ir.contraction import Affine, Contraction
from ...ir.contraction import Axis as SpecAxis
from ...ir.dims import Dim
from ...ir.dtypes import DType, bool_, f32, f64
from ...ir.expr import Expr, binary, broadcast, cast, const, fma, load, minimum, ramp, substitute, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Contract
from ...ir.target import Target
from ..groups import accumulator, identity
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store, vector_variable
from ..nests import Spot
from .body import GenericBody, UnsupportedError
from .elementwise import box
from .index import Axis, Monomial, Space, poly_of, terms_of
from .loops import FINE, UNKNOWN, shared, wide

_WRITTEN_OUT: Final = 12  # steps of short inner loops over the reduction that are written out
_DEPTH: Final = 4  # steps of the reduction in one pass of the inner loop


def generic_panel(spec: Contraction, target: Target, dtype: DType) -> int:
    """How many columns a panel of packed weights holds; 0 where B is read as it is."""
    n, k = spec.size("n"), spec.size("k")
    if dtype not in (f32, f64) or not isinstance(n, int) or not isinstance(k, int) or n < 2 or k == 0:
        return 0
    lanes, most = target.vector_bits // dtype.bits, _tile(target)[1]
    vectors = min(most, -(-n // lanes))
    while vectors > 1 and -n % (vectors * lanes) >= lanes:
        vectors -= 1
    return vectors * lanes


def _tile(target: Target) -> tuple[int, int]:
    """Rows of the register tile, and its vectors in a row."""
    if target.registers >= 32 and target.vector_bits >= 512:
        return 6, 4
    return (6, 2) if target.registers >= 16 and target.vector_bits >= 256 else (4, 2)


@dataclass
class Packed:
    """The kernel that brings B into panels first: its statements, what it reads, and the elements of the panels."""

    statements: list[Stmt]
    parallel: bool
    space: Space
    size: Dim
    dtype: DType
    source: Node


class Tile:
    def __init__(self, body: GenericBody, target: Target, numbers: Iterator[int]) -> None:
        self.body, self.target, self.numbers, self.space = body, target, numbers, body.space
        cores = [n for n in body.graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), Contract)]
        if len(cores) != 1:
            raise UnsupportedError(f"a region of {len(cores)} contractions")
        self.core = cores[0]
        form = body.lowering(self.core)
        assert isinstance(form, Contract)
        self.spec = form.spec
        if self.spec.pairs or self.core.dtype.bits < 32:
            raise UnsupportedError(f"{self.core.op.name} {self.core.type}: contractions of pairs or of narrow results")
        self.dtype = accumulator(self.core.dtype)
        self.groups = self._joined_groups()
        if not self.groups:
            self.spec, _ = self.spec.split_groups()
        self.lanes = max(1, target.vector_bits // self.dtype.bits)
        self.rows, self.vectors = _tile(target)
        self.a, self.b = self.core.inputs[0], self.core.inputs[1]
        self.axes: dict[str, SpecAxis] = {x.name: x for x in self.spec.axes}
        self.panels: Buffer | None = None  # in which B is packed here
        self.packing: Packed | None = None
        self._columns()

    def _joined_groups(self) -> int:
        """How many groups of columns the epilogue joins, one by one; 0 where outputs have all columns."""
        shape, odd = self.core.shape, [o for o in self.body.graph.outputs if o.shape != self.core.shape]
        if not odd:
            return 0
        count, panel = self.spec.groups, self.spec.panel
        lanes = max(1, self.target.vector_bits // self.dtype.bits)
        fits = count > 1 and panel > 0 and panel % (count * lanes) == 0 and isinstance(shape[-1], int)
        width = shape[-1] // count if fits and isinstance(shape[-1], int) else 0
        if not fits or any(o.shape != (*shape[:-1], width) for o in self.body.graph.outputs):
            raise UnsupportedError(f"{odd[0].op.name} {odd[0].type} joins columns of a contraction of type {self.core.type}")
        return count

    # -- columns ------------------------------------------------------------------------------------------------------

    def _columns(self) -> None:
        """How B is read: as panels, as it lies, or as panels that are made first."""
        n = self.spec.of_kind("n")
        count = self.spec.size("n")
        if self.spec.panel:
            self.vectors = self.spec.panel // self.lanes
            return
        if isinstance(count, int):
            vectors = min(self.vectors, max(1, -(-count // self.lanes)))
            while vectors > 1 and -count % (vectors * self.lanes) >= self.lanes:
                vectors -= 1
            self.vectors = vectors
        if self._lies(n):
            return
        width = self.vectors * self.lanes
        batch = [x for x in self.spec.of_kind("batch") if any(t == x.name for i in self.spec.b for t, _ in i.terms)]
        depth = list(self.spec.of_kind("k"))
        self.panels = Buffer("panels", self.b.dtype, (UNKNOWN,), align=64)
        self.packing = self._pack(batch, list(n), depth, width)

    def _lies(self, n: Sequence[SpecAxis]) -> bool:
        """Whether the columns of B are one axis that memory runs along."""
        inner = [x for x in n if x.extent != 1]
        if len(inner) != 1 or not self.spec.b:
            return False
        last = self.spec.b[-1]
        others = [t for i in self.spec.b[:-1] for t, _ in i.terms]
        own = [c for t, c in last.terms if t == inner[0].name]
        return own == [1] and inner[0].name not in others

    def _pack(self, batch: list[SpecAxis], n: list[SpecAxis], depth: list[SpecAxis], width: int) -> Packed:
        """panels[batch, N / width, K, width] = B, zero beyond N."""
        body = GenericBody(Graph((self._input(),), (self._input(),)), (self.b.dtype.itemsize,) * 2)
        space = body.space
        buffer = Buffer("p0", self.b.dtype, (UNKNOWN,), align=self.b.dtype.itemsize, writable=False)
        out = Buffer("y0", self.b.dtype, (UNKNOWN,), align=64)
        lead = [space.axis("b", space.size(x.extent)) for x in batch]
        count: Dim = 1
        for x in n:
            count = count * x.extent
        total: Dim = 1
        for x in n:
            total = total * space.size(x.extent)
        tiles = space.axis("p", space.size(_ceil(count, width)))
        ks = [space.axis("k", space.size(x.extent)) for x in depth]
        j = space.axis("j", width)
        column = binary("add", binary("mul", tiles.var, width), j.var)
        safe = minimum(column, binary("sub", space.expr(total), 1))
        inside = None if isinstance(count, int) and count % width == 0 else binary("lt", column, space.expr(total))
        at: dict[str, Expr] = {x.name: a.var for x, a in zip([*batch, *depth], [*lead, *ks], strict=True)}
        place = safe if inside is not None and len(n) > 1 else column
        for x, e in zip(n, space.unflat(place, [space.size(x.extent) for x in n]), strict=True):
            at[x.name] = e
        index = [_affine(i, at) for i in self.spec.b]
        flat = space.flat(index, space.sizes(self.b.shape))
        value = load(buffer, (space.simplify(flat),), self.b.dtype, inside)
        k_axes = [*lead, tiles, *ks, j]
        to = space.flat([a.var for a in k_axes], [a.extent for a in k_axes])
        kept = [a for a in k_axes if a.extent != 1]
        gone = {a.var: const(0) for a in k_axes if a.extent == 1}
        store = (out, space.simplify(substitute(to, gone)), space.simplify(substitute(value, gone)))
        statements, parallel = box(space, kept, (store,), self.target, self.numbers)
        size: Dim = _ceil(count, width) * width
        for x in (*batch, *depth):
            size = size * x.extent
        return Packed(statements, parallel, space, size, self.b.dtype, self.b)

    def _input(self) -> Node:
        from ...ir.build import input_node

        return input_node("p0", self.b.tensor)

    # -- the tile -----------------------------------------------------------------------------------------------------

    def statements(self) -> tuple[list[Stmt], bool]:
        space, spec = self.space, self.spec
        width = self.vectors * self.lanes
        self.batch = [space.axis("b", space.size(x.extent)) for x in spec.of_kind("batch")]
        self.depth = [space.axis("k", space.size(x.extent)) for x in spec.of_kind("k")]
        count: Dim = 1
        for x in spec.of_kind("m"):
            count = count * space.size(x.extent)
        columns: Dim = 1
        for x in spec.of_kind("n"):
            columns = columns * space.size(x.extent)
        self.count, self.columns = count, columns
        self.row = space.axis("row", count)
        at = {x.name: a.var if a.extent != 1 else const(0) for x, a in zip(spec.of_kind("batch"), self.batch, strict=True)}
        at |= {x.name: a.var if a.extent != 1 else const(0) for x, a in zip(spec.of_kind("k"), self.depth, strict=True)}
        m = spec.of_kind("m")
        at |= dict(zip([x.name for x in m], space.unflat(self.row.var, [space.size(x.extent) for x in m]), strict=True))
        self._column_variable(at)
        self._operands(at)
        self._results(at)
        rows = space.axis("rows", space.size(_ceil(self._user(m), self.rows)))
        panels = space.axis("panel", space.size(_ceil(self._user(spec.of_kind("n")), width)))
        first, column, left = var("first_row"), var("column"), var("rows_left")
        inner: list[Stmt] = [
            Let(first, binary("mul", rows.var, self.rows)),
            Let(column, binary("mul", panels.var, width)),
            Let(left, minimum(binary("sub", space.expr(count), first), self.rows)),
        ]
        self.panel, self.column = panels.var, column
        if isinstance(count, int) and count % self.rows == 0:
            inner += self._tile_of(self.rows, first)
        else:
            inner += self._by_rows(first, left)
        depth: Expr = const(1)
        for a in self.depth:
            depth = binary("mul", depth, space.extent(a))
        per = max(1, int(FINE * self.rows * width / 16.0 / max(self.lanes / 4, 1)))
        work = binary("add", binary("mul", depth, per), 30 * FINE)
        axes = [*[a for a in self.batch if a.extent != 1], panels, rows]
        return shared(space, axes, inner, work, f"q{next(self.numbers)}")

    def _user(self, axes: Sequence[SpecAxis]) -> Dim:
        total: Dim = 1
        for x in axes:
            total = total * x.extent
        return total

    def _column_variable(self, at: dict[str, Expr]) -> None:
        """Columns are numbered by a base and a lane, where vectors are known not to cross the ends of inner axes."""
        space, n = self.space, self.spec.of_kind("n")
        whole = isinstance(self.columns, int) and self.columns % self.lanes == 0
        several = len([x for x in n if x.extent != 1]) > 1
        self.vector: Axis | None = None
        if several and whole:
            self.vector = space.axis("vector", space.divide("//", self.columns, self.lanes))
            self.lane = space.axis("lane", self.lanes)
            place = binary("add", binary("mul", self.vector.var, self.lanes), self.lane.var)
        else:
            self.lane = space.axis("n", self.columns)
            place = self.lane.var
        self.place = place
        at |= dict(zip([x.name for x in n], space.unflat(place, [space.size(x.extent) for x in n]), strict=True))

    def _operands(self, at: dict[str, Expr]) -> None:
        """Positions in A and B, apart into what the tile fixes and what moves with the reduction."""
        space, body = self.space, self.body
        self.a_buffer = body.source(self.a)
        flat = space.flat([_affine(i, at) for i in self.spec.a], body.extents(self.a.shape))
        self.a_base, self.a_step = self._split(flat)
        self.straight = 0  # elements from one column to the next, where B is read as it lies: 1
        if self.spec.panel or self.panels is not None:
            width = self.vectors * self.lanes
            depth: Dim = 1
            k: Dim = 0
            for a in self.depth:
                k = k * a.extent + (space.poly(a.var) if a.extent != 1 else 0)
                depth = depth * a.extent
            used = [
                (x, a)
                for x, a in zip(self.spec.of_kind("batch"), self.batch, strict=True)
                if self.spec.panel or any(t == x.name for i in self.spec.b for t, _ in i.terms)
            ]
            lead: Dim = 0
            for _, a in used:
                lead = lead * a.extent + (space.poly(a.var) if a.extent != 1 else 0)
            tiles = space.size(_ceil(self._user(self.spec.of_kind("n")), width))
            self.b_buffer = body.source(self.b) if self.spec.panel else self.panels
            self.tile_axis = space.axis("tile", tiles)
            base = ((lead * tiles + space.poly(self.tile_axis.var)) * depth) * width
            self.b_base, self.b_step = space.expr(base), space.expr(k * width)
            return
        self.b_buffer = body.source(self.b)
        self.straight = 1
        flat = space.flat([_affine(i, at) for i in self.spec.b], body.extents(self.b.shape))
        self.b_base, self.b_step = self._split(flat)

    def _split(self, flat: Expr) -> tuple[Expr, Expr]:
        names = {str(a.var.attr) for a in self.depth}
        fixed: list[tuple[Monomial, int]] = []
        moving: list[tuple[Monomial, int]] = []
        for term in terms_of(self.space.poly(flat)):
            (moving if any(getattr(a, "name", "") in names for a in term[0]) else fixed).append(term)
        return self.space.expr(poly_of(fixed)), self.space.expr(poly_of(moving))

    def _results(self, at: dict[str, Expr]) -> None:
        """Each output as an index and a value over row and column, with the contraction as a variable."""
        body, space = self.body, self.space
        self.sum = var("sum", self.core.dtype)
        self.sums = [var(f"sum{k}", self.core.dtype) for k in range(self.groups)]
        if self.groups:
            self._joined(at)
            return
        index = [space.simplify(_affine(i, at)) for i in self.spec.c]
        body.bound = lambda n, _at: self.sum if n is self.core else None
        body.forget()
        self.outputs = [
            (body.outputs[k], body.flat(o, index), space.simplify(body.value(o, index))) for k, o in enumerate(body.graph.outputs)
        ]

    def _joined(self, at: dict[str, Expr]) -> None:
        """Outputs that join groups of columns: the contraction at a column of group k is the k-th variable."""
        body, space = self.body, self.space
        units = self.body.graph.outputs[0].shape[-1]
        assert isinstance(units, int)
        self.lane = space.axis("n", units)
        names = dict(at) | {self.spec.of_kind("n")[0].name: self.lane.var}
        index = [space.simplify(_affine(i, names)) for i in self.spec.c]

        def bound(n: Node, place: tuple[Expr, ...]) -> Expr | None:
            if n is not self.core:
                return None
            distance = space.poly(place[-1]) - space.poly(self.lane.var)
            if not isinstance(distance, int) or distance % units:
                raise UnsupportedError(f"{n.op.name} {n.type} is read at columns that are no group's")
            return self.sums[distance // units]

        body.bound = bound
        body.forget()
        self.outputs = [
            (body.outputs[k], body.flat(o, index), space.simplify(body.value(o, index))) for k, o in enumerate(body.graph.outputs)
        ]

    def _by_rows(self, first: Expr, left: Expr) -> list[Stmt]:
        """A whole tile where there are rows for it; else tiles of 4, 2, 1 rows."""
        rest: list[Stmt] = []
        base: Expr = first
        size = 1
        while size * 2 < self.rows:
            size *= 2
        while size:
            bit = binary("and", left, const(size))
            rest.append(If(binary("ne", bit, const(0)), tuple(self._tile_of(size, base))))
            if size > 1:
                name = var(f"row_base{next(self.numbers)}")
                rest.append(Let(name, binary("add", base, bit)))
                base = name
            size //= 2
        return [If(binary("eq", left, const(self.rows)), tuple(self._tile_of(self.rows, first)), tuple(rest))]

    def _tile_of(self, rows: int, first: Expr) -> list[Stmt]:
        """The sums of a tile, and what becomes of them."""
        n, lanes, vectors = next(self.numbers), self.lanes, self.vectors
        acc = Buffer(f"acc{n}", self.dtype, (rows * vectors, lanes), scope="register", align=64)
        done: list[Stmt] = []
        bases: list[Expr] = []
        for r in range(rows):
            name = var(f"line{n}_{r}")
            done.append(Let(name, substitute(self.a_base, {self.row.var: binary("add", first, r)})))
            bases.append(name)
        origin = var(f"origin{n}")
        b_base = self.b_base
        if self.straight:
            b_base = substitute(b_base, {self.lane.var: self.column})
        else:
            b_base = substitute(b_base, {self.tile_axis.var: self.panel})
        done.append(Let(origin, b_base))
        done.append(Alloc(acc))
        zero = identity("sum", self.dtype, lanes)
        done += [Store(acc, (const(i), const(0)), zero) for i in range(rows * vectors)]
        masks: list[Expr | None] = [None] * vectors
        ragged = not (isinstance(self.columns, int) and self.columns % (vectors * lanes) == 0)
        if ragged:
            total = broadcast(self.space.expr(self.columns), lanes)
            for u in range(vectors):
                m = vector_variable(f"mask{n}_{u}", bool_, lanes)
                done.append(Let(m, binary("lt", ramp(binary("add", self.column, u * lanes), lanes), total)))
                masks[u] = m

        def step(shift: dict[Expr, Expr]) -> list[Stmt]:
            part: list[Stmt] = []
            wides: list[Expr] = []
            to_a, to_b = substitute(self.a_step, shift), substitute(self.b_step, shift)
            for u in range(vectors):
                place = binary("add", binary("add", origin, to_b), u * lanes)
                x = load(self.b_buffer, (place,), self.b.dtype, masks[u] if self.straight else None, lanes)
                name = vector_variable(f"w{next(self.numbers)}", self.dtype, lanes)
                part.append(Let(name, cast(x, self.dtype)))
                wides.append(name)
            for r in range(rows):
                x = cast(load(self.a_buffer, (binary("add", bases[r], to_a),), self.a.dtype), self.dtype)
                for u in range(vectors):
                    at = (const(r * vectors + u), const(0))
                    old = load(acc, at, self.dtype, lanes=lanes)
                    new = fma(broadcast(x, lanes), wides[u], old)
                    if not self.dtype.is_float:
                        new = binary("add", old, binary("mul", broadcast(x, lanes), wides[u]))
                    part.append(Store(acc, at, new))
            return part

        done += self._reduced(step)
        return [*done, *self._stored(acc, rows, first, masks)]

    def _reduced(self, step: Callable[[dict[Expr, Expr]], list[Stmt]]) -> list[Stmt]:
        """The loops over the reduction around `step`."""
        space = self.space
        depth = [a for a in self.depth if a.extent != 1]
        if not depth:
            return list(step({}))
        inner = depth[-1]
        k, n = inner.var, space.extent(inner)
        main = binary("mul", binary("floordiv", n, _DEPTH), _DEPTH)
        steps = [s for d in range(_DEPTH) for s in step({k: binary("add", k, d)})]
        body: list[Stmt] = []
        if isinstance(inner.extent, int) and inner.extent < _DEPTH:
            shifts: list[dict[Expr, Expr]] = [{k: const(d)} for d in range(inner.extent)]
            depth = depth[:-1]
            while depth and isinstance(taps := depth[-1].extent, int) and taps * len(shifts) <= _WRITTEN_OUT:
                shifts = [{depth[-1].var: const(d), **s} for d in range(taps) for s in shifts]
                depth = depth[:-1]
            depth = [*depth, inner]
            body = [s for shift in shifts for s in step(shift)]
        else:
            body = [For(k, const(0), main, tuple(steps), "serial", _DEPTH)]
            if not isinstance(inner.extent, int) or inner.extent % _DEPTH:
                body.append(For(k, main, n, tuple(step({}))))
        for a in reversed(depth[:-1]):
            body = [For(a.var, const(0), space.extent(a), tuple(body))]
        return body

    def _stored(self, acc: Buffer, rows: int, first: Expr, masks: Sequence[Expr | None]) -> list[Stmt]:
        lanes, vectors = self.lanes, self.vectors
        done: list[Stmt] = []
        if self.groups:
            for r in range(rows):
                done += self._joined_row(acc, r, first)
            return done
        for r in range(rows):
            row = {self.row.var: binary("add", first, r)}
            for u in range(vectors):
                start = binary("add", self.column, u * lanes)
                n = next(self.numbers)
                total = vector_variable(f"s{n}", self.core.dtype, lanes)
                value = load(acc, (const(r * vectors + u), const(0)), self.dtype, lanes=lanes)
                part: list[Stmt] = [Let(total, cast(value, self.core.dtype))]
                position: Expr = start
                put = dict(row)
                if self.vector is not None:
                    name = var(f"v{n}")
                    part.append(Let(name, binary("floordiv", start, lanes)))
                    put[self.vector.var] = name
                    position = const(0)
                spot = Spot(position, lanes, 0, masks[u])
                names: list[Expr] = []
                for k, (_, _, value) in enumerate(self.outputs):
                    x = broadcast(wide(substitute(value, put), self.lane.var, spot, {self.sum: total}), lanes)
                    names.append(vector_variable(f"t{n}_{k}", x.dtype, lanes))
                    part.append(Let(names[-1], x))
                for (buffer, index, _), name in zip(self.outputs, names, strict=True):
                    here = substitute(index, put)
                    if self.space.stride(index, self.lane.var) == 1:
                        here = substitute(here, {self.lane.var: position})
                    else:
                        here = wide(here, self.lane.var, spot)
                    part.append(Store(buffer, (here,), name, masks[u]))
                done += part
        return done

    def _joined_row(self, acc: Buffer, r: int, first: Expr) -> list[Stmt]:
        """A row of what joins groups: each group has as many vectors of a panel."""
        each = self.vectors // self.groups
        row = {self.row.var: binary("add", first, r)}
        done: list[Stmt] = []
        for u in range(each):
            start = binary("add", binary("mul", self.panel, each * self.lanes), u * self.lanes)
            n = next(self.numbers)
            bound: dict[Expr, Expr] = {}
            for k, name in enumerate(self.sums):
                total = vector_variable(f"s{n}_{k}", self.core.dtype, self.lanes)
                x = load(acc, (const(r * self.vectors + k * each + u), const(0)), self.dtype, lanes=self.lanes)
                done.append(Let(total, cast(x, self.core.dtype)))
                bound[name] = total
            spot = Spot(start, self.lanes)
            names: list[Expr] = []
            for k, (_, _, value) in enumerate(self.outputs):
                x = broadcast(wide(substitute(value, row), self.lane.var, spot, bound), self.lanes)
                names.append(vector_variable(f"t{n}_{k}", x.dtype, self.lanes))
                done.append(Let(names[-1], x))
            for (buffer, index, _), name in zip(self.outputs, names, strict=True):
                done.append(Store(buffer, (substitute(index, {**row, self.lane.var: start}),), name))
        return done


def _affine(i: Affine, at: dict[str, Expr]) -> Expr:
    total: Expr = const(i.constant)
    for name, c in i.terms:
        total = binary("add", binary("mul", at[name], c), total)
    return total


def _ceil(count: Dim, step: int) -> Dim:
    return (count + (step - 1)) // step


__all__ = ["Packed", "Tile", "generic_panel"]
