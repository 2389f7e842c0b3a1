"""Convolutions with sparse weights: y[n, i, j, :] = sum over entries of x[n, i*s + h - pad, j*s + w - pad, c] * value.

A panel holds what some rows of the result read of the image, channel after channel, and of each channel first the rows and
columns that the taps of one remainder mod the stride read, then those of the next:

    panel[c][row mod s][column mod s][row / s][column / s]          zeros beyond the image

so that neighbouring pixels of the result read neighbours in the panel whatever the stride, and a step of the reduction is one
distance from there for all pixels:

    c * plane * remainders  +  (h mod s, w mod s) * plane  +  (h / s) * pitch  +  w / s

Blocks that fill vectors (1x16): the pixels of a tile, some rows by some columns, are the registers, each a broadcast of one
element. Narrower blocks: the pixels are the lanes, in runs of the panel that go on from row to row; what a run computes between
two rows is not stored. (Implicit products for convolutions: Chetlur et al., "cuDNN: efficient primitives for deep learning",
2014; unstructured weights over shifted images: Park et al., "Faster CNNs with direct sparse convolutions", 2017.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ..ir.expr import Expr, binary, const, load, var
from ..ir.graph import Graph
from ..ir.target import Target
from .groups import static_shape
from .loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store, vector_variable
from .nests import CHUNK_NS, Axis, first_lanes, parallel_nest
from .sparse_common import CHUNKS, LEAST_NS, PACK_NS, SHARED, STACK, VECTORS, Product
from .transpose import columns

ROWS: Final = 4  # of tiles in a panel at most: more rows share what lies between them, and leave less of a cache


class Windows(Product):
    """A convolution with sparse weights, and the elementwise chain on its result."""

    def __init__(self, graph: Graph, target: Target, aligns: Sequence[int]) -> None:
        super().__init__(graph, target, aligns)
        window = self.form.window
        assert window is not None
        self.kernel, self.stride = window.kernel, window.stride
        self.top, self.left = window.padding[0][0], window.padding[1][0]
        self.images, self.height, self.across, self.channels = static_shape(self.core.inputs[0])
        _, self.high, self.long = self.lead
        self.remainders = tuple(min(s, k) for s, k in zip(self.stride, self.kernel, strict=True))
        self.pitch = self.long + (self.kernel[1] - 1) // self.stride[1]
        self.tile_vectors = max(1, min(VECTORS, self.room))
        self.tile = self._tile()
        self.over = (self.kernel[0] - 1) // self.stride[0]
        self.step = self._rows_of_a_panel()
        self.panels, self.rest = divmod(self.high, self.step)
        self.plane = (self.step + self.over) * self.pitch
        self.channel = self.remainders[0] * self.remainders[1] * self.plane
        # runs of narrow blocks read up to a whole vector, and so do tiles in which fewer rows are left
        self.slack = 0 if self.wide else self.tile_vectors * self.lanes
        size = self.channels * self.channel + self.slack
        count = self.images * (self.panels + bool(self.rest))
        self.copying = count * size * PACK_NS
        self.parts = self.parts_of(count, max(self.copying, 1.0))
        self.own = size * self.dtype.itemsize <= STACK
        self.size = size
        self.packed = Buffer("panels", self.dtype, (max(1, count * size),), align=64)
        self.panel = Buffer("panel_of_thread", self.dtype, (max(1, size),), scope="local", align=64)
        self.workspaces = () if self.own else (self.packed,)
        kind = "" if self.wide else " in vectors"
        self.note = f"{self.entries} blocks 1x{self.width}, {self.tile[0]} x {self.tile[1]} pixels{kind}"

    def _tile(self) -> tuple[int, int]:
        """(rows, columns) of the pixels whose sums registers hold at once: whole rows, as many as fit, or equal parts of one."""
        if self.wide:
            if self.long <= self.room:
                return min(self.room // max(self.long, 1), max(self.high, 1)) or 1, max(self.long, 1)
            return 1, -(-self.long // -(-self.long // self.room))
        run = self.tile_vectors * self.lanes
        if self.long >= run:
            return 1, run
        return max(1, min(self.high, (run - self.long) // self.pitch + 1)), max(self.long, 1)

    def _rows_of_a_panel(self) -> int:
        """Whole tiles, as many as leave enough panels for the threads and fit a quarter of L2."""
        rows = self.tile[0]

        def fits(count: int) -> bool:
            elements = self.channels * self.remainders[0] * self.remainders[1] * (count * rows + self.over) * self.pitch
            shared = self.images * -(-self.high // (count * rows)) >= SHARED
            return shared and elements * self.dtype.itemsize <= self.target.l2 // 4

        return rows * max([1, *(n for n in range(2, ROWS + 1) if fits(n))])

    def emit(self) -> tuple[list[Stmt], bool]:
        """Panel by panel; the last one of an image may hold fewer rows."""
        n, q, part = var("image"), var("panel"), var("part")
        count = self.panels + bool(self.rest)
        total = self.nanoseconds + self.copying
        chunk = max(LEAST_NS / 8, min(CHUNK_NS, total / CHUNKS))
        outer = [Axis(n, self.images), Axis(q, count)]
        if self.own:

            def panel(rows: int) -> list[Stmt]:
                done: list[Stmt] = []
                for g, whole, body in self.groups(n, q, self.panel, const(0), rows):
                    done += self.share_of(part, g, whole, body)
                return done

            inner = [Alloc(self.panel), *self.pack(n, q, self.panel, const(0)), *self.either(q, panel)]
            axes = [*outer, *([Axis(part, self.parts)] if self.parts > 1 else [])]
            return parallel_nest(axes, inner, total, least=LEAST_NS, chunk=chunk)
        start = binary("mul", binary("add", binary("mul", n, count), q), self.size)
        done, shared = parallel_nest(outer, self.pack(n, q, self.packed, start), self.copying, least=LEAST_NS, chunk=chunk)
        made = {r: self.groups(n, q, self.packed, start, r) for r in {self.step if self.panels else self.rest, self.rest} if r}
        for k, (g, whole, _) in enumerate(next(iter(made.values()))):

            def group(rows: int, k: int = k) -> list[Stmt]:
                return made[rows][k][2]

            body = self.either(q, group)
            more, threads = parallel_nest([Axis(g, whole), *outer], body, self.nanoseconds, least=LEAST_NS, chunk=chunk)
            done, shared = done + more, shared or threads
        return done, shared

    # -- the image in panels -------------------------------------------------------------------------------------------------

    def pack(self, image: Expr, panel: Expr, into: Buffer, start: Expr) -> list[Stmt]:
        """What the rows of a panel read, row by row: zeros for those beyond the image."""
        done: list[Stmt] = []
        for a in range(self.remainders[0]):
            r = var(f"r{next(self.numbers)}")
            y = var(f"y{next(self.numbers)}")
            place = binary("mul", binary("add", binary("mul", panel, self.step), r), self.stride[0])
            row = binary("mul", binary("add", binary("mul", image, self.height), y), self.across)
            copies: list[Stmt] = []
            zeros: list[Stmt] = []
            for b in range(self.remainders[1]):
                first = (a * self.remainders[1] + b) * self.plane
                to = binary("add", binary("add", start, first), binary("mul", r, self.pitch))
                copies += self._row(row, into, to, b)
                zeros += self._zeros(into, to)
            inside = binary("and", binary("le", const(0), y), binary("lt", y, const(self.height)))
            body = [Let(y, binary("add", place, a - self.top)), If(inside, tuple(copies), tuple(zeros))]
            done.append(For(r, const(0), const(self.step + self.over), tuple(body)))
        if self.slack:
            at = var(f"s{next(self.numbers)}")
            end = binary("add", start, self.channels * self.channel)
            zero = const(0, self.dtype, self.lanes)
            store = Store(into, (binary("add", end, at),), zero)
            done.append(For(at, const(0), const(self.slack), (store,), step=self.lanes))
        return done

    @property
    def in_squares(self) -> bool:
        """Whether rows are copied `lanes` pixels by `lanes` channels, transposed in registers."""
        return self.lanes > 1 and self.channels >= self.lanes and (self.pitch >= self.lanes or self.masked)

    def _chunks(self) -> Iterator[tuple[int, Expr | None]]:
        """(first, mask) of the vectors that cover a row of the panel; the last one may cover some of it again."""
        if self.pitch < self.lanes:
            yield 0, first_lanes(self.pitch, self.lanes)
            return
        for first in range(0, self.pitch, self.lanes):
            yield min(first, self.pitch - self.lanes), None

    def _column(self, k: int, b: int) -> int:
        """The column of the image that lies at place k of a row of the panel, for a remainder b."""
        return k * self.stride[1] + b - self.left

    def _row(self, row: Expr, into: Buffer, to: Expr, b: int) -> list[Stmt]:
        """One row of the panel for one remainder of columns, all channels."""
        lanes, channels = self.lanes, self.channels
        if not self.in_squares:
            return self._row_by_elements(row, into, to, b)
        done: list[Stmt] = []
        inner: list[int] = []
        edges: list[tuple[int, Expr | None]] = []
        for first, mask in self._chunks():
            ends = self._column(first, b), self._column(first + lanes - 1, b)
            whole = mask is None and ends[0] >= 0 and ends[1] < self.across
            if whole and (not inner or first == inner[-1] + lanes):
                inner.append(first)
            else:
                edges.append((first, mask))
        c = var(f"c{next(self.numbers)}")
        steps: list[Stmt] = []
        if len(inner) > 2:  # alike but for where they lie
            k = var(f"k{next(self.numbers)}")
            square = self._square(row, into, to, b, c, k, None)
            steps.append(For(k, const(inner[0]), const(inner[-1] + lanes), tuple(square), step=lanes))
        else:
            edges += [(first, None) for first in inner]
        for first, mask in edges:
            steps += self._square(row, into, to, b, c, const(first), mask)
        done.append(For(c, const(0), const(channels // lanes * lanes), tuple(steps), step=lanes))
        if channels % lanes:  # the last channels once more, whole
            for first, mask in self._chunks():
                done += self._square(row, into, to, b, const(channels - lanes), const(first), mask)
        return done

    def _square(self, row: Expr, into: Buffer, to: Expr, b: int, c: Expr, k: Expr, mask: Expr | None) -> list[Stmt]:
        """`lanes` channels from c on of `lanes` places from k on; k is known but in the middle of a row."""
        lanes, done, rows = self.lanes, list[Stmt](), list[Expr]()
        for r in range(lanes):
            column = binary("add", binary("mul", k, self.stride[1]), r * self.stride[1] + b - self.left)
            inside = not k.is_const or 0 <= int(column.attr) < self.across
            at = binary("add", binary("mul", binary("add", row, column), self.channels), c)
            value = load(self.x, (at,), self.dtype, None, lanes) if inside else const(0, self.dtype, lanes)
            rows.append(vector_variable(f"x{next(self.numbers)}", self.dtype, lanes))
            done.append(Let(rows[-1], value))
        lets, turned = columns(rows, self.numbers)
        place = binary("add", binary("add", to, binary("mul", c, self.channel)), k)
        stores = (Store(into, (binary("add", place, i * self.channel),), v, mask) for i, v in enumerate(turned))
        return [*done, *lets, *stores]

    def _row_by_elements(self, row: Expr, into: Buffer, to: Expr, b: int) -> list[Stmt]:
        """As `_row`, for images of few channels, or rows of few pixels on targets without masks."""
        c, k = var(f"c{next(self.numbers)}"), var(f"k{next(self.numbers)}")
        inside = [p for p in range(self.pitch) if 0 <= self._column(p, b) < self.across]
        low, high = (inside[0], inside[-1] + 1) if inside else (0, 0)
        place = binary("add", to, binary("mul", c, self.channel))
        column = binary("add", binary("mul", k, self.stride[1]), b - self.left)
        value = load(self.x, (binary("add", binary("mul", binary("add", row, column), self.channels), c),), self.dtype)
        body: list[Stmt] = []
        for first, end, v in ((0, low, const(0, self.dtype)), (low, high, value), (high, self.pitch, const(0, self.dtype))):
            if end > first:
                body.append(For(k, const(first), const(end), (Store(into, (binary("add", place, k),), v),)))
        return [For(c, const(0), const(self.channels), tuple(body))]

    def _zeros(self, into: Buffer, to: Expr) -> list[Stmt]:
        """A row of the panel beyond the image."""
        c = var(f"c{next(self.numbers)}")
        place = binary("add", to, binary("mul", c, self.channel))
        if self.in_squares:
            zero = const(0, self.dtype, self.lanes)
            body: list[Stmt] = [Store(into, (binary("add", place, first),), zero, mask) for first, mask in self._chunks()]
        else:
            k = var(f"k{next(self.numbers)}")
            body = [For(k, const(0), const(self.pitch), (Store(into, (binary("add", place, k),), const(0, self.dtype)),))]
        return [For(c, const(0), const(self.channels), tuple(body))]

    # -- tiles ---------------------------------------------------------------------------------------------------------------

    def distance(self, step: Expr) -> Expr:
        """How far a step of the reduction lies from a pixel's first one."""
        taps = self.form.taps
        if taps == 1:
            return binary("mul", step, self.channel)
        c, t = binary("floordiv", step, taps), binary("mod", step, taps)
        h, w = binary("floordiv", t, self.kernel[1]), binary("mod", t, self.kernel[1])
        (sy, sx), far = self.stride, binary("mul", c, self.channel)
        if self.remainders != (1, 1):
            remainder = binary("add", binary("mul", binary("mod", h, sy), self.remainders[1]), binary("mod", w, sx))
            far = binary("add", far, binary("mul", remainder, self.plane))
        row = binary("mul", binary("floordiv", h, sy), self.pitch)
        return binary("add", far, binary("add", row, binary("floordiv", w, sx)))

    def groups(self, image: Expr, panel: Expr, source: Buffer, start: Expr, rows: int) -> list[tuple[Expr, int, list[Stmt]]]:
        """(variable, how many, code of one): blocks of columns, or groups of narrow ones, for `rows` rows of a panel."""
        g = var("group")
        top = binary("add", binary("mul", image, self.high), binary("mul", panel, self.step))

        def code(group: Expr, width: int) -> list[Stmt]:
            done: list[Stmt] = []
            bounds: tuple[Expr, Expr] | None = None
            if self.wide:
                lets, *found = self.bounds(group)
                done, bounds = list(lets), (found[0], found[1])

            def one(y: Expr, x: Expr, high: int, long: int) -> list[Stmt]:
                return self._pixels(source, start, top, y, x, high, long, group, width, bounds)

            return done + self._tiles(rows, one)

        if self.wide:
            return [(g, self.columns // self.width, code(g, self.width))]
        whole, left = divmod(self.columns, self.lanes)
        made = [(g, whole, code(g, self.lanes))] if whole else []
        last = var("last_group")
        return [*made, (last, 1, code(binary("add", last, whole), left))] if left else made

    def _tiles(self, rows: int, one: Callable[[Expr, Expr, int, int], list[Stmt]]) -> list[Stmt]:
        """The tiles of so many rows; those that hold less than the others have code of their own."""
        high, long = self.tile
        (down, low), (across, short) = divmod(rows, high), divmod(self.long, long)
        done: list[Stmt] = []

        def line(y: Expr, count: int) -> list[Stmt]:
            x = var(f"x{next(self.numbers)}")
            made: list[Stmt] = []
            if across == 1:
                made += one(y, const(0), count, long)
            elif across:
                made.append(For(x, const(0), const(across * long), tuple(one(y, x, count, long)), step=long))
            return made + (one(y, const(across * long), count, short) if short else [])

        if down == 1:
            done += line(const(0), high)
        elif down:
            y = var(f"y{next(self.numbers)}")
            done.append(For(y, const(0), const(down * high), tuple(line(y, high)), step=high))
        return done + (line(const(down * high), low) if low else [])

    def _pixels(
        self, source: Buffer, start: Expr, top: Expr, y: Expr, x: Expr, high: int, long: int, group: Expr, width: int,
        bounds: tuple[Expr, Expr] | None,
    ) -> list[Stmt]:  # fmt: skip
        """The tile of `high` x `long` pixels at row y of the panel and column x, for a group of columns."""
        corner = binary("add", start, binary("add", binary("mul", y, self.pitch), x))
        row = binary("add", binary("mul", binary("add", top, y), self.long), x)
        places = [(i * self.pitch + j, binary("add", row, i * self.long + j)) for i in range(high) for j in range(long)]

        def base(step: Expr) -> Expr:
            return binary("add", corner, self.distance(step))

        if bounds is not None:
            return self.wide_tile(source, base, [p for p, _ in places], [r for _, r in places], group, *bounds)
        lanes = self.lanes
        vectors = -(-(places[-1][0] + 1) // lanes)
        tile, done = self.narrow_sums(source, base, group, width, vectors, vectors * lanes)
        for v in range(vectors):
            some = [(p - v * lanes, r) for p, r in places if p // lanes == v]
            done += self.turned(tile, const(v * lanes), some, binary("mul", group, lanes), width)
        return done


__all__ = ["Windows"]
