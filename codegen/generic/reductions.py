"""Reductions with the maps around them: rows (softmax, norms), sums over any axes, windows of pooling.

Every value of the result is reduced by one thread in an order that only the sizes and the target decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ir.dims import product
from ...ir.dtypes import i32
from ...ir.expr import Expr, binary, broadcast, cast, const, load, select, substitute, var
from ...ir.graph import Node
from ...ir.lowering import Reduce
from ...ir.target import Target
from ..accumulate import NOWHERE, POSITIONS, Accumulator
from ..groups import accumulator, cost, lanes_for
from ..loop_ir import Buffer, Let, Stmt, Store, vector_variable
from ..maps import BYTES_PER_NS, CYCLE_NS, loads_of
from ..nests import Spot
from .body import GenericBody, UnsupportedError
from .elementwise import access_price, mergeable, merger
from .index import Axis
from .loops import FINE, Walk, nest, product_of, shared, wide

_UNROLLED = 32  # passes of the loops over a window that are written out


@dataclass
class _Result:
    """One reduction: the scalar that stands for its result, what is reduced, and the position of that (argmax)."""

    name: Expr
    kind: str
    node: Node
    value: Expr
    place: Expr | None


@dataclass
class _Output:
    buffer: Buffer
    index: Expr
    value: Expr
    full: bool


class Reduction:
    """The loops of a region whose reductions all run over the same axes."""

    def __init__(self, body: GenericBody, target: Target, numbers: Iterator[int]) -> None:
        self.body, self.target, self.numbers = body, target, numbers
        self.space = body.space
        nodes = [n for n in body.graph.nodes() if n not in body.operand and n.inputs and isinstance(body.lowering(n), Reduce)]
        forms = [body.lowering(n) for n in nodes]
        first = forms[0]
        assert isinstance(first, Reduce)
        self.axes = first.axes
        full = nodes[0].inputs[0].shape if first.axes is not None else ()
        for n, f in zip(nodes, forms, strict=True):
            if not isinstance(f, Reduce) or f.axes != first.axes or (f.axes is not None and n.inputs[0].shape != full):
                raise UnsupportedError(f"{n.op.name} {n.type} reduces other axes than {nodes[0].op.name} beside it")
        if first.axes is not None:
            lead_shape = tuple(d for k, d in enumerate(full) if k not in first.axes)
        else:
            lead_shape = nodes[0].shape
            if len(nodes) > 1:
                raise UnsupportedError(f"two reductions over windows in one region: {nodes[0].op.name} and {nodes[1].op.name}")
        self.lead_shape, self.full_shape = lead_shape, full
        self.lead = self.space.axes_over("i", lead_shape)
        self.red = self.space.axes_over("r", first.extents)
        self.results: list[_Result] = []
        at, r = self._vars(self.lead), self._vars(self.red)
        known: dict[Node, Expr] = {}
        body.bound = lambda n, _at: known.get(n)
        body.forget()
        for n, f in zip(nodes, forms, strict=True):
            assert isinstance(f, Reduce)
            index = at if f.axes is None or not f.keepdims else self._spread(at, [const(0)] * len(f.axes))
            value = self.space.simplify(f.value(tuple(index), tuple(r), body.reader(n)))
            place = self.space.flat(r, [a.extent for a in self.red]) if f.kind in POSITIONS else None
            known[n] = var(f"res{len(known)}", n.dtype)
            self.results.append(_Result(known[n], f.kind, n, value, place))
        self.outputs = [self._output(k, o, at, r) for k, o in enumerate(body.graph.outputs)]
        self.lead = [a for a in self.lead if a.extent != 1]
        self.red = [a for a in self.red if a.extent != 1]
        self._merge()

    def _vars(self, axes: Sequence[Axis]) -> list[Expr]:
        return [const(0) if a.extent == 1 else a.var for a in axes]

    def _spread(self, at: Sequence[Expr], r: Sequence[Expr]) -> list[Expr]:
        """Lead and reduced parts as one index over the full shape."""
        axes = self.axes or ()
        lead, inner = iter(at), iter(r)
        return [next(inner) if k in axes else next(lead) for k in range(len(at) + len(r))]

    def _output(self, k: int, o: Node, at: list[Expr], r: list[Expr]) -> _Output:
        space = self.space
        extents = self.body.extents(o.shape)
        full = self.axes is not None and o.shape == self.full_shape and bool(self.red)
        if full:
            index: Sequence[Expr] = self._spread(at, r)
        elif self.axes is not None and len(o.shape) == len(self.full_shape) and len(o.shape) != len(at):
            index = self._spread(at, [const(0)] * len(r))
        elif product(o.shape) == product(self.lead_shape):
            flat = space.flat(at, self.body.extents(self.lead_shape))
            index = at if o.shape == self.lead_shape else space.unflat(flat, extents)
        else:
            raise UnsupportedError(f"{o.op.name} {o.type} is no result of the reduction beside it")
        value = space.simplify(self.body.value(o, index))
        return _Output(self.body.outputs[k], space.flat(index, extents), value, full)

    def _merge(self) -> None:
        for axes in (self.red, self.lead):
            k = len(axes) - 1
            while k > 0:
                a, b = axes[k - 1], axes[k]
                zero = const(0)
                pairs = [(x.place, x.value) for x in self.results if x.place is not None and axes is self.red]
                pairs += [(o.index, o.value) for o in self.outputs if o.full or axes is self.lead]
                values = [x.value for x in self.results]
                values += [o.value for o in self.outputs if not (o.full or axes is self.lead)]
                plain = all(mergeable(self.space, a, b, [(zero, v)]) for v in values)
                if plain and mergeable(self.space, a, b, pairs):
                    one = self.space.axis("m", a.extent * b.extent)
                    put = merger(self.space, a, b, one)
                    for x in self.results:
                        x.value = put(x.value, False)
                        if x.place is not None:
                            x.place = put(x.place, True)
                    for o in self.outputs:
                        o.index, o.value = put(o.index, True), put(o.value, False)
                    axes[k - 1 : k + 1] = [one]
                k -= 1

    # -- code ---------------------------------------------------------------------------------------------------------

    def statements(self) -> tuple[list[Stmt], bool]:
        if not self.red:
            self.red = [self.space.axis("r", 1)]
        values = [x.value for x in self.results]
        loads = loads_of([(o.buffer, o.index, o.value) for o in self.outputs])
        loads += [e for e in loads_of([(self.outputs[0].buffer, const(0), v) for v in values]) if e not in loads]
        dtypes = [e.dtype for e in loads] + [accumulator(v.dtype) for v in values] + [o.buffer.dtype for o in self.outputs]
        lanes = lanes_for(self.target, dtypes)
        columns = bool(self.lead) and self._price(self.lead[-1], loads) <= self._price(self.red[-1], loads)
        axis = (self.lead if columns else self.red)[-1]
        while isinstance(axis.extent, int) and lanes > 1 and lanes // 2 >= axis.extent:
            lanes //= 2
        work = cost(values) + len(loads) + cost([o.value for o in self.outputs if o.full])
        unit = sum(e.dtype.itemsize for e in loads)
        each = max(1, int(FINE * max(unit / BYTES_PER_NS, work * 0.5 * CYCLE_NS / lanes)))
        if columns:
            return self._columns(Walk.of(self.target, dtypes, lanes, 1), each)
        light = cost(values) <= 24
        units = 4 if light else 2
        if isinstance(axis.extent, int):
            units = max(1, min(units, axis.extent // lanes))
        return self._rows(Walk.of(self.target, dtypes, lanes, units), each)

    def _price(self, axis: Axis, loads: Sequence[Expr]) -> float:
        price = sum(access_price(self.space, e.args[0], axis.var) for e in loads)
        for o in self.outputs:
            if o.full:
                price += access_price(self.space, o.index, axis.var)
        if isinstance(axis.extent, int) and axis.extent < 16:
            price *= 16 / axis.extent
        return price

    def _rows(self, walk: Walk, each: int) -> tuple[list[Stmt], bool]:
        """Vectors along the reduced axis; the lanes are joined at the end."""
        axis, outer = self.red[-1], self.red[:-1]
        inner: list[Stmt] = []
        for x in self.results:
            units = walk.unroll
            acc = Accumulator(f"a{next(self.numbers)}", x.kind, x.value, x.node.dtype, walk.lanes, units, x.place)

            def piece(spot: Spot, acc: Accumulator = acc, x: _Result = x) -> list[Stmt]:
                return acc.step(spot, axis.var, spot.unit)

            inner += [*acc.start(), *nest(self.space, outer, walk.over(self.space, axis, piece))]
            if x.kind in POSITIONS:
                lets, _, found = acc.position()
                inner += [*lets, Let(x.name, cast(found, x.node.dtype))]
            else:
                inner.append(Let(x.name, cast(acc.total(), x.node.dtype)))
        inner += [Store(o.buffer, (o.index,), o.value) for o in self.outputs if not o.full]
        fulls = [o for o in self.outputs if o.full]
        if fulls:
            inner += nest(self.space, outer, walk.over(self.space, axis, lambda spot: self._stored(fulls, axis.var, spot, {})))
        work = binary("mul", product_of(self.space, self.red), const(each))
        return shared(self.space, self.lead, inner, binary("add", work, 20 * FINE), f"q{next(self.numbers)}")

    def _columns(self, walk: Walk, each: int) -> tuple[list[Stmt], bool]:
        """Vectors along an axis that stays; each lane is reduced on its own."""
        axis, outer = self.lead[-1], self.lead[:-1]

        def piece(spot: Spot) -> list[Stmt]:
            n, done, bound = spot.lanes, list[Stmt](), dict[Expr, Expr]()
            for x in self.results:
                place = x.place
                acc = Accumulator(f"a{next(self.numbers)}", x.kind, x.value, x.node.dtype, n, 1, place)
                new = cast(broadcast(wide(x.value, axis.var, spot, bound), n), acc.held)
                here = Spot(spot.position, n, 0, spot.mask, None)
                done += [*acc.start(), *nest(self.space, self.red, acc.step(here, axis.var, 0, new), _UNROLLED)]
                at = (const(0), const(0))
                if x.kind in POSITIONS:
                    found = load(acc.where, at, i32, lanes=n)
                    found = select(binary("eq", found, const(NOWHERE, i32, n)), const(0, i32, n), found)
                    found = cast(found, x.node.dtype)
                else:
                    found = cast(acc.vector(), x.node.dtype)
                name = vector_variable(f"{x.name.attr}_{next(self.numbers)}", x.node.dtype, n)
                done.append(Let(name, found))
                bound[x.name] = name
            done += self._stored([o for o in self.outputs if not o.full], axis.var, spot, bound)
            fulls = [o for o in self.outputs if o.full]
            if fulls:
                done += nest(self.space, self.red, self._stored(fulls, axis.var, spot, bound), _UNROLLED)
            return done

        work = binary("mul", binary("mul", product_of(self.space, self.red), self.space.extent(axis)), const(each))
        inner = walk.over(self.space, axis, piece)
        if outer:
            return shared(self.space, outer, inner, work, f"q{next(self.numbers)}")
        blocks = self.space.axis("block", self.space.divide("//", axis.extent + (walk.lanes - 1), walk.lanes))
        start, stop = var(f"{axis.var.attr}_start"), var(f"{axis.var.attr}_stop")
        last = binary("add", start, walk.lanes)
        block: list[Stmt] = [
            Let(start, binary("mul", blocks.var, walk.lanes)),
            Let(stop, binary("min", last, self.space.extent(axis))),
            *walk.over(self.space, axis, piece, start, stop),
        ]
        part = binary("mul", product_of(self.space, self.red), const(each * walk.lanes))
        return shared(self.space, [blocks], block, part, f"q{next(self.numbers)}")

    def _stored(self, outputs: Sequence[_Output], v: Expr, spot: Spot, bound: dict[Expr, Expr]) -> list[Stmt]:
        """The values of all outputs at a spot, before any is stored."""
        names: list[Expr] = []
        done: list[Stmt] = []
        for o in outputs:
            value = broadcast(wide(o.value, v, spot, bound), spot.lanes)
            names.append(vector_variable(f"t{next(self.numbers)}", value.dtype, spot.lanes))
            done.append(Let(names[-1], value))
        for o, name in zip(outputs, names, strict=True):
            straight = spot.lanes == 1 or self.space.stride(o.index, v) == 1
            at = substitute(o.index, {v: spot.position}) if straight else wide(o.index, v, spot)
            done.append(Store(o.buffer, (at,), name, spot.mask))
        return done


def reduce_statements(body: GenericBody, target: Target, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """The loops of a region of reductions over the same axes, and whether they are parallel."""
    return Reduction(body, target, numbers).statements()


__all__ = ["Reduction", "reduce_statements"]
