"""Reductions over windows of an image: pooling, depthwise convolution. Vectors along channels, a register tile of output pixels.

    for rows of the output, shared between threads
      for tiles of pixels of the row                       the first and last by themselves: windows reach over the border
        for row in the block
          for vectors of channels
            acc[t] = identity                              t: the pixels of the tile
            for taps along the columns of the window       (its outer axes; a loop, or unrolled)
              load the pixels that the tile's windows hold in this row, each once
              acc[t] = acc[t] combined with the taps of window t
            y[t] = what follows (bias, activation, residual)

Windows that reach over the upper or lower border run the same code with masked loads: a pixel outside has the value that the
record says. Each window is combined in row-major order, wherever it lies and whatever the tile is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.dims import as_int
from ..ir.dtypes import bool_, i64
from ..ir.errors import CompileError
from ..ir.expr import Expr, binary, broadcast, cast, const, fma, load, maximum, minimum, postorder, select, substitute, var
from ..ir.graph import Graph, Node
from ..ir.lowering import Reduce, View
from ..ir.target import Target
from .groups import Body, Lowered, accumulator, body_name, combine, flat_index, identity, lanes_for, lowered, static_shape
from .loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store, vector_variable
from .maps import CYCLE_NS, ranges_of
from .nests import CHUNK_NS, Axis, Spot, VectorLoop, has_masks, nest, parallel_nest, unit_axes
from .reduces import lower_reduce
from .simplify_index import Linear, Simplifier, to_expr
from .vectorize import vectorize

MOST_PIXELS: Final = 8  # of a tile
MOST_PEELED: Final = 6  # tiles that reach over a border and have code of their own
MOST_BORDER: Final = 16  # rows looked at from either end for one whose windows lie inside
UNROLLED: Final = 40  # steps of a tile up to which the taps' outer loops are unrolled
MOST_TAPS: Final = 16  # of a row of the window: these are always unrolled
VECTORS: Final = 8  # of channels in a block, at least
LEAST_NS: Final = 10_000.0  # kernels of a network follow each other: the workers are awake, and a fork is soon done
CHUNKS: Final = 16
BYTES_NS: Final = 40.0  # from L2 and L3


@dataclass(frozen=True)
class _Shape:
    """A window reduction in terms of axes.

    lane    the vector axis, along channels            pixel   the axis that tiles run along (None: no other axis)
    rows    the other axes of the result, outer first  taps    the axes of a window, outer first; the last is unrolled
    """

    lane: Axis
    pixel: Axis | None
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]


def lower_window(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of one reduction over windows with the elementwise chain on its result."""
    made = _Window(graph, target, aligns)
    if made.shape is None:
        return lower_reduce(graph, target, name, aligns)
    statements, parallel = made.emit()
    note = f"tile {made.tile} pixels x {made.lanes} channels" + (", taps unrolled" if made.unrolled else "")
    doc = f"window: {body_name(graph)}"
    return lowered(made.body, name, statements, doc=doc, in_place=made.in_place(), parallel=parallel, note=note)


class _Window:
    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        self.graph, self.target = graph, target
        self.body = body = Body(graph, aligns)
        self.shape: _Shape | None = None
        cores = [n for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), Reduce)]
        if len(cores) != 1 or len(graph.outputs) != 1:
            return
        (self.core,) = cores
        form = body.lowering(self.core)
        assert isinstance(form, Reduce)
        self.form = form
        self.result = self._behind_views(graph.outputs[0])
        if form.axes is not None or form.kind not in ("sum", "max", "min", "prod"):
            return
        if static_shape(self.result) != static_shape(self.core) or self.core.dtype is bool_:
            return
        self.held = accumulator(self.core.dtype)
        sizes = static_shape(self.core)
        self.axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(sizes)]
        kept, fixed = unit_axes(self.axes)
        self.index = tuple(fixed.get(a.var, a.var) for a in self.axes)
        extents = [as_int(n) for n in form.extents]
        self.taps = [Axis(var(f"r{k}"), n) for k, n in enumerate(extents)]
        taps, fixed_taps = unit_axes(self.taps)
        if not kept or 0 in sizes or 0 in extents:
            return
        at = tuple(fixed_taps.get(a.var, a.var) for a in self.taps)
        whole = Simplifier(ranges_of([*kept, *taps]))
        body.normal = whole.simplify
        body.forget()
        self.value = whole.simplify(form.value(self.index, at, body.reader(self.core)))
        self.shape = self._find(kept, taps, whole)
        if self.shape is None:
            return
        self._decide(kept, taps)

    def _behind_views(self, n: Node) -> Node:
        while n is not self.core and isinstance(self.body.lowering(n), View):
            n = n.inputs[0]
        return n

    # -- what is what ---------------------------------------------------------------------------------------------------

    def _find(self, kept: Sequence[Axis], taps: Sequence[Axis], whole: Simplifier) -> _Shape | None:
        """The axes' parts; None where the loads are not of that kind, and other code is better."""
        lane, others = kept[-1], list(kept[:-1])
        loads = [e for e in postorder([self.value]) if e.op == "load"]
        forms = []
        for e in loads:
            if len(e.args) < 1 or any(x.op == "load" for x in postorder(e.args)):
                return None
            form = whole.linear(e.args[0])
            if any(a.op != "var" for a, _ in form.terms) or form.coefficient(lane.var) not in (0, 1):
                return None
            forms.append(form)
        if not any(f.coefficient(lane.var) == 1 for f in forms):
            return None
        depends = [e for e in postorder([self.value]) if e is lane.var]
        conditions = [e for e in postorder([self.value]) if e.dtype is bool_ or (e.dtype is i64 and e.op in ("max", "min"))]
        if not depends or lane.var in set(postorder(conditions)):
            return None
        best: tuple[int, int, Axis, Axis] | None = None
        for f in forms:
            for a in others:
                for t in taps:
                    c, d = f.coefficient(a.var), f.coefficient(t.var)
                    if c > 0 and d > 0 and t.extent <= MOST_TAPS and (best is None or (d, c) < best[:2]):
                        best = (d, c, a, t)
        if best is not None:
            pixel, inner = best[2], best[3]
            order = (*(t for t in taps if t is not inner), inner)
            # the order in which a window is combined is row-major: the unrolled axis must be the innermost one
            if taps and inner is not taps[-1]:
                return None
            self.ahead, self.apart = best[0], best[1]
            return _Shape(lane, pixel, tuple(a for a in others if a is not pixel), order)
        if taps and taps[-1].extent > MOST_TAPS:
            return None
        self.ahead, self.apart = 1, 0
        return _Shape(lane, others[-1] if others else None, tuple(others[:-1]), tuple(taps))

    def _decide(self, kept: Sequence[Axis], taps: Sequence[Axis]) -> None:
        s, target = self.shape, self.target
        assert s is not None
        dtypes = [self.held, self.result.dtype, *(b.dtype for b in self.body.buffers)]
        lanes = lanes_for(target, dtypes)
        while lanes > 1 and lanes // 2 >= s.lane.extent:
            lanes //= 2
        self.lanes = lanes
        self.masked = has_masks(target, dtypes)
        inner = s.taps[-1].extent if s.taps else 1
        room = target.registers - inner - 2
        most = max(1, min(MOST_PIXELS, room))
        width = 1 if s.pixel is None else s.pixel.extent
        self.tile = -(-width // -(-width // most))
        outer = math.prod(t.extent for t in s.taps[:-1])
        self.unrolled = outer * inner * self.tile <= UNROLLED
        count = math.prod(a.extent for a in kept)
        reach = 1 if s.pixel is None else self.apart / max(1, self.ahead)  # pixels read for each of the result, across
        unit = self.result.dtype.itemsize + self.core.inputs[0].dtype.itemsize * reach
        steps = math.prod(t.extent for t in taps)
        self.nanoseconds = count * max(unit / BYTES_NS, (steps + 4) * CYCLE_NS / lanes)

    def in_place(self) -> frozenset[tuple[int, int]]:
        """Operands that only the epilogue reads, at the place that is written then."""
        if not self.masked:
            return frozenset()
        read = set(self.core.inputs)
        out = self.body.outputs[0]
        return frozenset(
            (0, k)
            for n, k in self.body.operand.items()
            if n not in read and self.body.buffers[k].shape == out.shape and n.dtype is out.dtype and n in self._plain()
        )

    def _plain(self) -> set[Node]:
        """Operands that the epilogue reads at its own index only: elementwise all the way."""
        found: set[Node] = set()
        other: set[Node] = set()
        stack = [self.result]
        seen = {self.core}
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n in self.body.operand:
                found.add(n)
                continue
            if not n.inputs:
                continue
            form = self.body.lowering(n)
            if getattr(form, "elementwise", False):
                stack += n.inputs
            else:
                inside = [n]
                for x in inside:
                    inside += [i for i in x.inputs if i not in inside]
                other.update(inside)
        return found - other

    # -- code -----------------------------------------------------------------------------------------------------------

    def emit(self) -> tuple[list[Stmt], bool]:
        s = self.shape
        assert s is not None
        self.numbers = itertools.count()
        lane, lane_axes = s.lane, []
        row = s.rows[-1] if s.rows else None
        outer = list(s.rows[:-1])
        chunk = min(CHUNK_NS, max(LEAST_NS / 8, self.nanoseconds / CHUNKS))
        per_row = self.nanoseconds / max(1, math.prod(a.extent for a in s.rows))
        blocks: list[Axis] = []
        start: Expr = const(0)
        stop: Expr = const(1)
        if row is not None:
            want = max(1, min(row.extent, int(chunk / max(per_row, 1.0))))
            size = -(-row.extent // -(-row.extent // want))
            block = var(f"{row.var.attr}_block")
            count = -(-row.extent // size)
            blocks.append(Axis(block, count))
            start = binary("mul", block, size)
            stop = binary("add", start, size)
            if row.extent % size:
                stop = minimum(stop, const(row.extent))
        # Channels in blocks where there are too few rows for threads to share evenly.
        self.part = lane
        total = math.prod(a.extent for a in (*outer, *blocks))
        vectors = lane.extent // self.lanes
        if total < 8 and vectors >= 2 * VECTORS and lane.extent % self.lanes == 0:
            cuts = max(d for d in range(1, vectors // VECTORS + 1) if vectors % d == 0)
            if cuts > 1:
                part = var(f"{lane.var.attr}_part")
                lane_axes = [Axis(part, cuts)]
                length = lane.extent // cuts
                self.part = Axis(lane.var, length, 0, binary("mul", part, length))
        inside = self._block(row, start, stop)
        return parallel_nest([*outer, *blocks, *lane_axes], inside, self.nanoseconds, least=LEAST_NS, chunk=chunk)

    def _tiles(self) -> list[tuple[int, int, int]]:
        """(first pixel, pixels in a tile, how many tiles): runs of tiles that share their code."""
        s = self.shape
        assert s is not None
        if s.pixel is None:
            return [(0, 1, 1)]
        width, size = s.pixel.extent, self.tile
        runs: list[tuple[int, int, int]] = []
        before = False
        starts = list(range(0, width, size))
        inside = [self._lies_inside(s.pixel.var, x, min(size, width - x)) for x in starts]
        border = sum(not i for i in inside)
        for x, within in zip(starts, inside, strict=True):
            n = min(size, width - x)
            alike = within or border > MOST_PEELED
            if runs and alike and runs[-1][1] == n and runs[-1][0] + runs[-1][1] * runs[-1][2] == x and before:
                runs[-1] = (runs[-1][0], n, runs[-1][2] + 1)
            else:
                runs.append((x, n, 1))
            before = alike
        return runs

    def _lies_inside(self, v: Expr, first: int, count: int) -> bool:
        """Whether no condition on v is open while it runs over first .. first + count, for any tap."""
        s = self.shape
        assert s is not None
        simplifier = Simplifier({v: (first, first + count - 1), **ranges_of(s.taps)})
        return not any(v in set(postorder([e])) for e in _conditions(simplifier.simplify(self.value)))

    def _inner_rows(self, row: Axis) -> tuple[int, int]:
        """first and end of the rows whose windows lie inside; empty where there are none."""
        first, end = 0, row.extent
        while first < end and first < MOST_BORDER and not self._lies_inside(row.var, first, 1):
            first += 1
        while end > first and row.extent - end < MOST_BORDER and not self._lies_inside(row.var, end - 1, 1):
            end -= 1
        return (first, end) if first < end and self._lies_inside(row.var, first, end - first) else (0, 0)

    def _block(self, row: Axis | None, start: Expr, stop: Expr) -> list[Stmt]:
        """The rows from start to stop, tile by tile; first those whose windows lie inside."""
        s = self.shape
        assert s is not None
        runs, ranges = self._tiles(), ranges_of([*s.rows, *s.taps, s.lane])
        if row is None:
            return [x for run in runs for x in self._run(run, ranges, None)]
        low, high = self._inner_rows(row)
        inside = {**ranges, row.var: (low, max(low, high - 1))}
        if low == high:
            return [x for run in runs for x in self._run(run, ranges, (row.var, start, stop))]
        first = maximum(start, const(low)) if low else start
        last = minimum(stop, const(high)) if high < row.extent else stop
        done = [x for run in runs for x in self._run(run, inside, (row.var, first, last))]
        if (low, high) == (0, row.extent):
            return done
        tests = [binary("lt", row.var, low)] if low else []
        tests += [binary("le", const(high), row.var)] if high < row.extent else []
        if len(runs) > 2:  # few rows, which need not be fast: one code for nearly all of their tiles
            width, size = runs[-1][0] + runs[-1][1] * runs[-1][2], self.tile
            runs = [(0, size, width // size)] + ([(width - width % size, width % size, 1)] if width % size else [])
        border = [x for run in runs for x in self._run(run, ranges, None)]
        return [*done, For(row.var, start, stop, (If(functools.reduce(lambda a, b: binary("or", a, b), tests), tuple(border)),))]

    def _run(
        self, run: tuple[int, int, int], ranges: dict[Expr, tuple[int, int]], rows: tuple[Expr, Expr, Expr] | None
    ) -> list[Stmt]:
        """The tiles of a run, and inside each the rows (variable, first, end), if given."""
        first, pixels, count = run
        x0: Expr = const(first) if count == 1 else var(f"x{next(self.numbers)}")
        ranges = ranges if count == 1 else {**ranges, x0: (first, first + (count - 1) * pixels)}
        body = self._rows(ranges, x0, pixels)
        if rows is not None:
            body = [For(*rows, tuple(body))]
        if count > 1:
            return [For(x0, const(first), const(first + count * pixels), tuple(body), "serial", pixels)]
        return body

    def _rows(self, ranges: dict[Expr, tuple[int, int]], x0: Expr, pixels: int) -> list[Stmt]:
        """One tile of one row: all its channels."""
        simplifier = Simplifier(ranges)
        loop = VectorLoop(self.lanes, 1, "mask" if self.masked else "overlap")

        def piece(spot: Spot) -> list[Stmt]:
            return self._piece(spot, simplifier, x0, pixels)

        return loop.over(self.part, piece)

    def _at(self, x0: Expr, t: int) -> dict[Expr, Expr]:
        s = self.shape
        assert s is not None
        return {} if s.pixel is None else {s.pixel.var: binary("add", x0, t)}

    def _piece(self, spot: Spot, simplifier: Simplifier, x0: Expr, pixels: int) -> list[Stmt]:
        s = self.shape
        assert s is not None
        tag = next(self.numbers)
        acc = Buffer(f"acc{tag}", self.held, (pixels, spot.lanes), scope="register", align=64)
        zero = identity(self.form.kind, self.held, spot.lanes)
        done: list[Stmt] = [Alloc(acc), *(Store(acc, (const(t), const(0)), zero) for t in range(pixels))]
        *outer, inner = s.taps or (Axis(var("r"), 1),)
        steps = self._steps(spot, simplifier, x0, pixels, inner, acc)
        if outer:
            kind = "unrolled" if self.unrolled else "serial"
            steps = nest(outer, steps, kind)
        done += steps
        return done + self._finish(spot, simplifier, x0, pixels, acc)

    def _wide(self, e: Expr, spot: Spot, memo: dict[Expr, Expr]) -> Expr:
        s = self.shape
        assert s is not None
        wide = vectorize(e, s.lane.var, spot.lanes, spot.mask, None, memo) if spot.lanes > 1 else e
        return wide if spot.position is s.lane.var else substitute(wide, {s.lane.var: spot.position})

    def _steps(self, spot: Spot, simplifier: Simplifier, x0: Expr, pixels: int, inner: Axis, acc: Buffer) -> list[Stmt]:
        """One row of the windows of a tile: every load once, in the order of the pixels."""
        values = self._taken(simplifier, x0, pixels, inner)
        memo: dict[Expr, Expr] = {}
        wide = [(w, t, self._wide(v, spot, memo)) for w, t, v in values]
        key = {(w, t): self._column(w, t) for w, t, _ in values}
        wide.sort(key=lambda item: (key[item[0], item[1]], item[0]))
        uses: dict[Expr, int] = {}
        for _, _, v in wide:
            for e in set(postorder([v])):
                if e.op == "load":
                    uses[e] = uses.get(e, 0) + 1
        done: list[Stmt] = []
        names: dict[Expr, Expr] = {}
        for _, t, v in wide:
            for e in postorder([v]):
                if e.op == "load" and uses[e] > 1 and e not in names:
                    names[e] = vector_variable(f"v{next(self.numbers)}", e.dtype, e.lanes)
                    done.append(Let(names[e], e))
            v = substitute(v, names)
            at = (const(t), const(0))
            old = load(acc, at, self.held, lanes=spot.lanes)
            if self.form.fused and v.op == "mul" and self.target.fma:
                a, b = (broadcast(cast(x, self.held), spot.lanes) for x in v.args)
                new = fma(a, b, old)
            else:
                new = combine(self.form.kind, old, broadcast(cast(v, self.held), spot.lanes))
            done.append(Store(acc, at, new))
        return done

    def _taken(self, simplifier: Simplifier, x0: Expr, pixels: int, inner: Axis) -> list[tuple[int, int, Expr]]:
        """(tap, pixel, value) of a row of the windows of a tile."""
        s = self.shape
        assert s is not None
        pairs = [(w, t) for w in range(inner.extent) for t in range(pixels)]
        if s.pixel is not None:
            low, high = simplifier.ranges.get(x0, (x0.attr, x0.attr)) if x0.op == "var" else (int(x0.attr), int(x0.attr))
            ranges = {**simplifier.ranges, s.pixel.var: (low, high + pixels - 1)}
            general = Simplifier(ranges)
            value = general.simplify(self.value)
            moving = {s.pixel.var, inner.var}
            if not any(moving & set(postorder([e])) for e in _conditions(value)):
                return [(w, t, self._shifted(value, general, x0, t, inner, w)) for w, t in pairs]
        return [
            (w, t, self._tamed(simplifier.simplify(substitute(self.value, {**self._at(x0, t), inner.var: const(w)})), simplifier))
            for w, t in pairs
        ]

    def _shifted(self, value: Expr, simplifier: Simplifier, x0: Expr, t: int, inner: Axis, w: int) -> Expr:
        """The value at a pixel and a tap that only the places of its loads depend on."""
        s = self.shape
        assert s is not None and s.pixel is not None
        moved: dict[Expr, Expr] = {}
        for e in postorder([value]):
            if e.op == "load":
                form = simplifier.linear(e.args[0])
                c, d = form.coefficient(s.pixel.var), form.coefficient(inner.var)
                rest = [(a, k) for a, k in form.terms if a is not s.pixel.var and a is not inner.var]
                constant = form.constant + c * t + d * w
                if x0.op == "var" and c:
                    rest.append((x0, c))
                else:
                    constant += c * int(x0.attr) if c else 0
                place = to_expr(Linear(tuple(rest), constant))
                moved[e] = load(e.attr[0], (place,), e.dtype, e.args[1] if len(e.args) > 1 else None)
        return self._tamed(substitute(value, moved), simplifier)

    def _tamed(self, value: Expr, simplifier: Simplifier) -> Expr:
        """The value with masked loads at the start of the operand where the mask is false: a processor takes hundreds of cycles
        over a load, masked off or not, from a page that is not there."""
        s = self.shape
        assert s is not None
        moved: dict[Expr, Expr] = {}
        for e in postorder([value]):
            if e.op == "load" and len(e.args) > e.attr[1]:
                index, mask = e.args[0], e.args[-1]
                along = binary("mul", s.lane.var, simplifier.linear(index).coefficient(s.lane.var))
                rest = simplifier.simplify(binary("sub", index, along))
                moved[e] = load(e.attr[0], (binary("add", select(mask, rest, const(0)), along),), e.dtype, mask)
        return substitute(value, moved) if moved else value

    def _column(self, w: int, t: int) -> int:
        """Where in the tile the pixel lies that tap w of window t meets: they are taken in this order."""
        return w * self.ahead + t * self.apart

    def _finish(self, spot: Spot, simplifier: Simplifier, x0: Expr, pixels: int, acc: Buffer) -> list[Stmt]:
        s, body = self.shape, self.body
        assert s is not None
        out = body.outputs[0]
        done: list[Stmt] = []
        total = var("window.sum", self.held)
        body.normal = simplifier.simplify
        stores: list[tuple[Expr, Expr]] = []
        loads: dict[Expr, int] = {}
        for t in range(pixels):
            index = tuple(simplifier.simplify(substitute(i, self._at(x0, t))) for i in self.index)

            def bound(n: Node, at: tuple[Expr, ...], index: tuple[Expr, ...] = index) -> Expr | None:
                if n is not self.core:
                    return None
                if at != index:
                    raise CompileError(f"{self.core.op.name}: what follows reads the result at another index than it writes")
                return cast(total, self.core.dtype)

            body.bound = bound
            body.forget()
            value = simplifier.simplify(body.value(self.result, index))
            place = simplifier.simplify(flat_index(index, static_shape(self.core)))
            held = load(acc, (const(t), const(0)), self.held, lanes=spot.lanes)
            if spot.lanes > 1:
                wide = vectorize(value, s.lane.var, spot.lanes, spot.mask, {total: held}, None)
            else:
                wide = substitute(value, {total: held})
            if spot.position is not s.lane.var:
                wide = substitute(wide, {s.lane.var: spot.position})
                place = substitute(place, {s.lane.var: spot.position})
            stores.append((place, broadcast(wide, spot.lanes)))
            for e in set(postorder([wide])):
                if e.op == "load" and e.attr[0] is not acc:
                    loads[e] = loads.get(e, 0) + 1
        names: dict[Expr, Expr] = {}
        for place, wide in stores:
            for e in postorder([wide]):
                if loads.get(e, 0) > 1 and e not in names:
                    names[e] = vector_variable(f"v{next(self.numbers)}", e.dtype, e.lanes)
                    done.append(Let(names[e], e))
            done.append(Store(out, (place,), substitute(wide, names), spot.mask))
        body.bound = None
        return done


def _conditions(value: Expr) -> Iterator[Expr]:
    """What decides between cases: comparisons of indices, and clamps."""
    for e in postorder([value]):
        if e.args and e.args[0].dtype is i64 and (e.dtype is bool_ or e.op in ("max", "min")):
            yield e
