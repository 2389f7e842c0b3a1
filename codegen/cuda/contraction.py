"""Contractions: a block computes a tile of C from tiles of A and B in shared memory, a thread a small tile in registers.

    for blocks of columns, of rows, of (batch, part of the reduction)
      acc[TM, TN] = 0
      for steps of BK along the reduction
        every thread brings its share of A and B to shared memory, from where affine functions of the axes say it lies:
        a convolution is nothing else
        for k in 0 .. BK:  acc[i, j] = fma(a[i], b[j], acc[i, j])
      C[i, j] = epilogue(acc[i, j])

The next step's elements are in registers before the products of this one are taken. Rows and columns of a thread lie in groups
of four, one group in each half of the tile. Of few rows or columns, every element is a sum of products (reduces.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ...ir.build import full
from ...ir.contraction import Affine, Axis, Contraction
from ...ir.dims import as_int
from ...ir.dtypes import DType
from ...ir.errors import CompileError
from ...ir.expr import Expr, binary, cast, const, fma, load, minimum, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Contract, View
from ...ir.target import Target
from .. import nests
from ..contraction.plan import accumulator
from ..groups import Body, Lowered, body_name, flat_index, is_constant, lowered, row_major, static_shape, unflatten
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store
from ..maps import Box, ranges_of
from ..reduces import Level, Result
from ..simplify_index import Simplifier
from .direct import direct, is_direct
from .grid import BX, TX, launch, over, places
from .machine import sm_of
from .maps import lower_map
from .reduces import level_launches
from .thread import ZERO

FEW: Final = 8  # rows or columns up to which a tile would be mostly empty
MOST_SPLITS: Final = 32
MOST_OUTER: Final = 65535  # blocks along the second and third dimension of a grid
BLOCK_VARS: Final = (var("part_of_batch"), var("tile_row"), var("tile_column"))


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and steps of a block; rows and columns of a thread."""

    rows: int
    columns: int
    steps: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> int:
        return (self.rows // self.thread_rows) * (self.columns // self.thread_columns)


TILES: Final = (Tile(128, 128, 16, 8, 8), Tile(64, 64, 16, 8, 8), Tile(32, 32, 32, 4, 2))


class Stream:
    """Where an operand's elements lie: per kind of axis a function from the flattened position to an offset."""

    def __init__(
        self, spec: Contraction, maps: Sequence[Affine], shape: Sequence[int], dtype: DType, buffer: Buffer, is_left: bool
    ) -> None:
        self.dtype, self.buffer, self.is_left = dtype, buffer, is_left
        terms: dict[str, int] = {}
        self.base = 0
        for index, stride in zip(maps, row_major(shape), strict=True):
            self.base += index.constant * stride
            for name, c in index.terms:
                terms[name] = terms.get(name, 0) + c * stride
        self.loops = {kind: merged([(as_int(x.extent), terms.get(x.name, 0)) for x in spec.of_kind(kind)]) for kind in "bmnk"}
        self.loops["b"] = merged([(as_int(x.extent), terms.get(x.name, 0)) for x in spec.of_kind("batch")])

    def offset(self, kind: str, position: Expr) -> Expr:
        """The part of the offset that the axes of a kind give."""
        total: Expr = const(0)
        loops = self.loops[kind]
        inside = prod(n for n, _ in loops)
        for k, (n, stride) in enumerate(loops):
            inside //= n
            place = binary("floordiv", position, inside)
            total = binary("add", total, binary("mul", binary("mod", place, n) if k else place, stride))
        return total

    def step(self, kind: str) -> tuple[int, int]:
        """The extent and stride of the innermost loop of a kind."""
        return self.loops[kind][-1] if self.loops[kind] else (1, 0)

    def distance(self, kind: str) -> int | None:
        """The one stride of a kind; None where neighbours are not all at one distance."""
        return None if len(self.loops[kind]) > 1 else self.loops[kind][0][1] if self.loops[kind] else 0

    def runs(self, kind: str, other: Sequence[str], width: int) -> bool:
        """Whether so many neighbours along a kind are one access: side by side, and at a multiple of their size everywhere."""
        n, stride = self.step(kind)
        rest = [s for o in other for _, s in self.loops[o]] + [s for _, s in self.loops[kind][:-1]]
        whole = n % width == 0 and self.base % width == 0 and not any(s % width for s in rest)
        return stride == 1 and whole and self.buffer.align % (width * self.dtype.itemsize) == 0


class Packed(Stream):
    """B in panels: see `Contraction.panel`."""

    def __init__(self, spec: Contraction, dtype: DType, buffer: Buffer) -> None:
        self.dtype, self.buffer, self.base, self.is_left = dtype, buffer, 0, False
        self.panel, self.pairs = spec.panel, spec.pairs or 1
        self.k, self.n = as_int(spec.size("k")), as_int(spec.size("n"))
        size = -(-self.n // self.panel) * self.k * self.panel
        self.loops = {"b": merged([(as_int(x.extent), s) for x, s in _batches(spec, size)])}

    def offset(self, kind: str, position: Expr) -> Expr:
        if kind == "b":
            return super().offset(kind, position)
        w, p = self.panel, self.pairs
        if kind == "n":
            tile = binary("mul", binary("floordiv", position, w), self.k * w)
            return binary("add", tile, binary("mul", binary("mod", position, w), p))
        return binary("add", binary("mul", binary("floordiv", position, p), w * p), binary("mod", position, p))

    def step(self, kind: str) -> tuple[int, int]:
        return (self.n, 1) if kind == "n" and self.pairs == 1 else (1, 0)

    def distance(self, kind: str) -> int | None:
        return super().distance(kind) if kind == "b" else None

    def runs(self, kind: str, other: Sequence[str], width: int) -> bool:
        return False


def _batches(spec: Contraction, size: int) -> list[tuple[Axis, int]]:
    found: list[tuple[Axis, int]] = []
    for x in reversed(spec.of_kind("batch")):
        found.insert(0, (x, size))
        size *= as_int(x.extent)
    return found


def merged(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring loops as one wherever the outer stride is the inner one's whole length."""
    done: list[tuple[int, int]] = []
    for n, s in loops:
        if n == 1:
            continue
        if done and done[-1][1] == n * s:
            done[-1] = (done[-1][0] * n, s)
        else:
            done.append((n, s))
    return done


class Group:
    """A contraction region: the product, its operands, and the epilogue on its result."""

    def __init__(self, graph: Graph, aligns: Sequence[int]) -> None:
        self.graph = graph
        self.body = body = Body(graph, aligns)
        found = [n for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(body.lowering(n), Contract)]
        if len(found) != 1:
            raise CompileError(f"a contraction region holds one contraction; this one has {len(found)}: {body_name(graph)}")
        (self.node,) = found
        form = body.lowering(self.node)
        assert isinstance(form, Contract)
        self.spec, self.tf32 = form.spec, form.tf32
        self.held = accumulator(self.node.dtype)
        self.size = {k: as_int(self.spec.size(name)) for k, name in (("b", "batch"), ("m", "m"), ("n", "n"), ("k", "k"))}

    def setup(self) -> None:
        """The streams of the operands; only where there is something to add up."""
        spec, _ = self.spec.split_groups()
        self.axes = spec
        left, right = self.node.inputs
        self.a = Stream(spec, spec.a, static_shape(left), left.dtype, self._source(left), True)
        if spec.panel:
            self.b: Stream = Packed(spec, right.dtype, self._source(right))
        else:
            self.b = Stream(spec, spec.b, static_shape(right), right.dtype, self._source(right), False)

    def _source(self, n: Node) -> Buffer:
        """The memory that an operand is, behind views."""
        body = self.body
        while n not in body.operand:
            if is_constant(n):
                if n not in body.constants:
                    body.constants[n] = Buffer(
                        f"k{len(body.constants)}", n.dtype, (prod(static_shape(n)),), align=64, writable=False
                    )
                return body.constants[n]
            if not n.inputs or not isinstance(body.lowering(n), View):
                raise CompileError(
                    f"{self.node.op.name} {self.node.type}: its operands must come from outside the region, not from {n.op.name}"
                )
            n = n.inputs[0]
        return body.buffers[body.operand[n]]

    def index(self, at: dict[str, Expr]) -> tuple[Expr, ...]:
        """The index of the result at positions b, m and n."""
        values: dict[str, Expr] = {}
        for kind, name in (("b", "batch"), ("m", "m"), ("n", "n")):
            inside = self.size[kind]
            for k, x in enumerate(self.axes.of_kind(name)):
                inside //= as_int(x.extent)
                place = binary("floordiv", at[kind], inside)
                values[x.name] = binary("mod", place, as_int(x.extent)) if k else place
        done = []
        for c in self.axes.c:
            total: Expr = const(c.constant)
            for name, k in c.terms:
                total = binary("add", total, binary("mul", values[name], k))
            done.append(total)
        return tuple(done)

    def stores(self, acc: Expr, at: dict[str, Expr], ranges: Mapping[Expr, tuple[int, int]] | None = None) -> list[Stmt]:
        """What becomes of a sum: the values first, then the stores. `ranges` are those of the variables in positions; without,
        positions that are variables have their axes'."""
        body, node = self.body, self.node
        simplifier = Simplifier(ranges or {v: (0, self.size[k] - 1) for k, v in at.items() if v.op == "var"})
        body.normal = simplifier.simplify
        index = tuple(simplifier.simplify(i) for i in self.index(at))

        def bound(n: Node, place: tuple[Expr, ...]) -> Expr | None:
            if n is not node:
                return None
            if place != index:
                raise CompileError(f"{node.op.name} {node.type}: its epilogue reads the result at another index than it writes")
            return cast(acc, node.dtype)

        body.forget()
        body.bound = bound
        done: list[Stmt] = []
        flat = flat_index(index, static_shape(node))
        for k, o in enumerate(self.graph.outputs):
            shape = static_shape(o)
            where = index if shape == static_shape(node) else unflatten(simplifier.simplify(flat), shape)
            place = simplifier.simplify(flat_index(where, shape))
            done.append(Store(body.outputs[k], (place,), body.value(o, where)))
        return done


def multiply_add(a: Expr, b: Expr, c: Expr) -> Expr:
    """c + a * b, with one rounding of floats."""
    return fma(a, b, c) if c.dtype.is_float else binary("add", c, binary("mul", a, b))


def lower_contraction(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of a contraction and its epilogue. Raises CompileError for a region that is not of that form."""
    g = Group(graph, aligns)
    if g.size["k"] == 0:  # nothing to add up: the epilogue of zeros, which is a map
        zeros = full(0.0, g.node.tensor)
        return lower_map(graph.map_nodes(lambda n, i: zeros if n is g.node else n.replace(i)), target, name, aligns)
    if 0 in g.size.values():
        return lowered(g.body, name, [], doc="contraction of nothing")
    g.setup()
    spaces: list[Buffer] = []
    if min(g.size["m"], g.size["n"]) <= FEW or g.size["k"] < 4:
        if is_direct(g):
            statements, note = direct(g)
        else:
            statements, spaces, note = _sums(g)
    else:
        statements, spaces, note = _tiled(g, target)
    doc = f"contraction: {body_name(graph)}"
    return lowered(g.body, name, statements, doc=doc, workspaces=spaces, parallel=True, note=note)


def _sums(g: Group) -> tuple[list[Stmt], list[Buffer], str]:
    """Few rows or columns: every element a sum of products, then the epilogue as a map."""
    at = {k: var(f"c{k}") for k in "bmnk"}
    axes = {k: nests.Axis(at[k], g.size[k]) for k in "bmnk"}
    kept = [axes[k] for k in "bmn" if axes[k].extent > 1]
    fixed = {k: (at[k] if axes[k].extent > 1 else const(0)) for k in "bmnk"}
    simplifier = Simplifier(ranges_of([*kept, axes["k"]]))

    def operand(s: Stream, kinds: str) -> Expr:
        total: Expr = const(s.base)
        for k in kinds:
            total = binary("add", total, s.offset(k, fixed[k]))
        return cast(load(s.buffer, (simplifier.simplify(total),), s.dtype), g.held)

    value = binary("mul", operand(g.a, "bmk"), operand(g.b, "bnk"))
    cells = g.size["b"] * g.size["m"] * g.size["n"]
    sums = Buffer("sums", g.held, (cells,), align=64)
    flat: Expr = const(0)
    for k in "bmn":
        flat = binary("add", binary("mul", flat, g.size[k]), fixed[k])
    place = simplifier.simplify(flat)
    reduced = [axes["k"]]
    box = Box((*kept, *reduced), ((sums, place, value),), simplifier)
    result = Result("s", "sum", value, const(0), g.held, sums, place)
    statements, spaces, note = level_launches(Level(tuple(kept), tuple(reduced), (result,), box))
    after = g.stores(load(sums, (flat,), g.held), fixed)
    values = [var(f"v{k}", s.value.dtype) for k, s in enumerate(after) if isinstance(s, Store)]
    lets: list[Stmt] = [Let(v, s.value) for v, s in zip(values, after, strict=True) if isinstance(s, Store)]
    done: list[Stmt] = [Store(s.buffer, s.index, v) for v, s in zip(values, after, strict=True) if isinstance(s, Store)]
    statements.append(over(kept or [nests.Axis(var("one"), 1)], [*lets, *done]))
    return statements, [sums, *spaces], note


def choose(g: Group, target: Target) -> tuple[Tile, int]:
    """The tile, and in how many parts the reduction is cut: the largest tile that gives every multiprocessor a block."""
    sms = sm_of(target).multiprocessors
    m, n, k, b = (g.size[x] for x in "mnkb")
    best = TILES[-1]
    for t in TILES:
        blocks = -(-m // t.rows) * -(-n // t.columns) * b
        waste = (-(-m // t.rows) * t.rows * -(-n // t.columns) * t.columns) / (m * n)
        if blocks >= sms and waste <= 1.5:
            best = t
            break
    if g.held.itemsize > 4 and best is TILES[0]:
        best = TILES[1]
    blocks = -(-m // best.rows) * -(-n // best.columns) * b
    splits = max(1, min(MOST_SPLITS, 2 * sms // blocks, k // (4 * best.steps)))
    return best, splits


def _tiled(g: Group, target: Target) -> tuple[list[Stmt], list[Buffer], str]:
    from . import tensor_cores

    tile, splits = choose(g, target)
    note = f"tile {tile.rows}x{tile.columns}x{tile.steps}, {tile.thread_rows}x{tile.thread_columns} a thread"
    note += f", {splits} parts" if splits > 1 else ""
    made = Tiled(g, tile, splits)
    plan = tensor_cores.plan_for(g, target)
    if plan is not None:
        made, note = tensor_cores.TensorTiled(g, plan), str(plan)
    statements: list[Stmt] = [made.launch()]
    if made.splits > 1:
        statements.append(made.combined())
    return statements, [made.sums] if made.splits > 1 else [], note


class Tiled:
    """The statements of a tiled contraction."""

    def __init__(self, g: Group, tile: Tile, splits: int) -> None:
        self.g, self.tile, self.splits = g, tile, splits
        m, n, k = (g.size[x] for x in "mnk")
        self.grid = (g.size["b"] * splits, -(-m // tile.rows), -(-n // tile.columns))
        chunk = -(-k // splits)
        self.chunk = -(-chunk // tile.steps) * tile.steps if splits > 1 else k  # steps of a part, a multiple of the tile's
        self.cells = g.size["b"] * m * n
        self.sums = Buffer("sums", g.held, (splits * self.cells,), align=64)

    def places(self) -> tuple[Expr, Expr, Expr, Expr, Expr, Expr, list[Stmt]]:
        """Batch, part, first row and column of the block's tile, first and last step, and the lets that bind them."""
        g, t = self.g, self.tile
        bz, by, bx = BLOCK_VARS
        batch, part, row0, col0, first, last = map(var, ("batch", "part", "row0", "col0", "k_first", "k_last"))
        end = minimum(binary("add", first, self.chunk), const(g.size["k"])) if self.splits > 1 else const(self.chunk)
        lets: list[Stmt] = [
            Let(batch, binary("floordiv", bz, self.splits) if g.size["b"] > 1 else const(0)),
            Let(part, binary("mod", bz, self.splits)),
            Let(row0, binary("mul", by, t.rows)),
            Let(col0, binary("mul", bx, t.columns)),
            Let(first, binary("mul", part, self.chunk)),
            Let(last, end),
        ]
        return batch, part, row0, col0, first, last, lets

    def launch(self) -> Stmt:
        """The launch that computes the tiles."""
        g, t = self.g, self.tile
        batch, part, row0, col0, first, last, lets = self.places()
        a = _Side(self, "a", g.a, "m", row0, t.rows, batch)
        b = _Side(self, "b", g.b, "n", col0, t.columns, batch)
        acc = Buffer("acc", g.held, (t.thread_rows, t.thread_columns), scope="register", align=16)
        body: list[Stmt] = [*lets, *a.declare(), *b.declare(), Alloc(acc)]
        body += [
            Store(acc, (const(i), const(j)), const(0, g.held)) for i in range(t.thread_rows) for j in range(t.thread_columns)
        ]
        ways = t.columns // t.thread_columns
        tx, ty = var("tx_"), var("ty_")
        body += [Let(tx, binary("mod", TX, ways)), Let(ty, binary("floordiv", TX, ways))]
        k0 = var("k0")
        body += [*a.fetch(first), *b.fetch(first)]
        following = binary("add", k0, t.steps)
        more: list[Stmt] = [*a.fetch(following), *b.fetch(following)]
        step: list[Stmt] = [*a.put(), *b.put(), Barrier()]
        step.append(If(binary("lt", following, last), tuple(more)))
        step += [*self.products(acc, a, b, tx, ty), Barrier()]
        body.append(For(k0, first, last, tuple(step), "serial", t.steps))
        body += self.finish(acc, row0, col0, batch, part, tx, ty)
        return self.gridded(t.threads, body)

    def gridded(self, threads: int, body: Sequence[Stmt]) -> Stmt:
        """A launch over the grid; of one dimension where another would have more blocks than a device takes."""
        if max(self.grid[:2]) <= MOST_OUTER:
            return launch(self.grid, threads, body, BLOCK_VARS)
        axes = [nests.Axis(v, n) for v, n in zip(BLOCK_VARS, self.grid, strict=True)]
        return launch(prod(self.grid), threads, [*places(BX, axes), *body])

    def products(self, acc: Buffer, a: _Side, b: _Side, tx: Expr, ty: Expr) -> list[Stmt]:
        """The products of one step: fragments of a row and a column, four at a time."""
        t, held = self.tile, self.g.held
        done: list[Stmt] = []
        for k in range(t.steps):
            lets, left = a.fragment(k, ty, t.thread_rows)
            more, right = b.fragment(k, tx, t.thread_columns)
            done += [*lets, *more]
            for i in range(t.thread_rows):
                for j in range(t.thread_columns):
                    at = (const(i), const(j))
                    done.append(Store(acc, at, multiply_add(left[i], right[j], load(acc, at, held))))
        return done

    def finish(self, acc: Buffer, row0: Expr, col0: Expr, batch: Expr, part: Expr, tx: Expr, ty: Expr) -> list[Stmt]:
        """The epilogue on the thread's elements, or the sums of a part."""
        g, t = self.g, self.tile
        rows = thread_places(ty, t.rows, t.thread_rows)
        columns = thread_places(tx, t.columns, t.thread_columns)
        done: list[Stmt] = []
        ms, ns = [var(f"m{i}") for i in range(len(rows))], [var(f"n{j}") for j in range(len(columns))]
        done += [Let(v, binary("add", row0, p)) for v, p in zip(ms, rows, strict=True)]
        done += [Let(v, binary("add", col0, p)) for v, p in zip(ns, columns, strict=True)]
        m_whole, n_whole = g.size["m"] % t.rows == 0, g.size["n"] % t.columns == 0
        width = min(4, t.thread_columns)
        width = width if g.size["n"] % width == 0 else 1
        for i, m in enumerate(ms):
            inner: list[Stmt] = []
            for j in range(0, len(ns), width):
                some: list[Stmt] = []
                for c in range(j, j + width):
                    some += self.element(load(acc, (const(i), const(c)), g.held), m, ns[c], batch, part)
                inner += some if n_whole else [If(binary("lt", ns[j], const(g.size["n"])), tuple(some))]
            done += inner if m_whole else [If(binary("lt", m, const(g.size["m"])), tuple(inner))]
        return done

    def element(self, value: Expr, m: Expr, n: Expr, batch: Expr, part: Expr) -> list[Stmt]:
        g = self.g
        if self.splits == 1:
            return g.stores(value, {"b": batch if g.size["b"] > 1 else const(0), "m": m, "n": n})
        flat = binary("add", binary("mul", batch, g.size["m"]), m)
        flat = binary("add", binary("mul", flat, g.size["n"]), n)
        return [Store(self.sums, (binary("add", binary("mul", part, self.cells), flat),), value)]

    def combined(self) -> Stmt:
        """The parts of every element added up in order, then the epilogue."""
        g = self.g
        at = {k: var(f"c{k}") for k in "bmn"}
        fixed = {k: (at[k] if g.size[k] > 1 else const(0)) for k in "bmn"}
        kept = [nests.Axis(at[k], g.size[k]) for k in "bmn" if g.size[k] > 1]
        flat: Expr = const(0)
        for k in "bmn":
            flat = binary("add", binary("mul", flat, g.size[k]), fixed[k])
        p, acc = var("part"), Buffer("total", g.held, (1,), scope="register", align=16)
        one = load(self.sums, (binary("add", binary("mul", p, self.cells), flat),), g.held)
        total = var("sum", g.held)
        body: list[Stmt] = [
            Alloc(acc),
            Store(acc, ZERO, const(0, g.held)),
            For(p, const(0), const(self.splits), (Store(acc, ZERO, binary("add", load(acc, ZERO, g.held), one)),)),
            Let(total, load(acc, ZERO, g.held)),
            *g.stores(total, fixed),
        ]
        return over(kept, body)


def thread_places(position: Expr, size: int, each: int) -> list[Expr]:
    """Which rows (or columns) of a tile of `size` a thread has: groups of four, one group in each of `each` // 4 equal parts."""
    width = min(4, each)
    return [
        binary("add", binary("mul", position, width), (size // (each // width)) * (e // width) + e % width) for e in range(each)
    ]


class _Side:
    """One operand's way to a block: what each thread fetches into registers, puts into shared memory and takes from there."""

    def __init__(self, owner: Tiled, name: str, s: Stream, kind: str, origin: Expr, size: int, batch: Expr) -> None:
        self.owner, self.name, self.s, self.kind, self.origin, self.size, self.batch = owner, name, s, kind, origin, size, batch
        t = owner.tile
        self.along_k = s.step("k")[1] == 1 and not (s.step(kind)[1] == 1 and s.step(kind)[0] >= s.step("k")[0])
        self.width = 1
        if s.dtype is owner.g.held:
            widest = 16 // s.dtype.itemsize
            way, rest = ("k", ("b", kind)) if self.along_k else (kind, ("b", "k"))
            whole = owner.g.size[way] % widest == 0 and (t.steps if self.along_k else size) % widest == 0
            if whole and s.runs(way, rest, widest):
                self.width = widest
        # a row more than the tile keeps stores along the reduction off each other's banks
        self.row = size + (4 if self.along_k else 0)
        self.shared = Buffer(f"{name}_shared", owner.g.held, (t.steps, self.row), scope="shared", align=16)
        self.count = size * t.steps // (t.threads * self.width)
        self.stage = Buffer(f"{name}_stage", owner.g.held, (self.count * self.width,), scope="register", align=16)
        inner = (t.steps if self.along_k else size) // self.width
        self.inner = inner
        self.base = var(f"{name}_base")
        self.parts: list[tuple[Expr, Expr, Expr, Expr | None]] = []  # place in the tile: k, row; offset; whether the row is there

    def declare(self) -> list[Stmt]:
        """What does not change from step to step: where the thread's elements begin."""
        t, g, s = self.owner.tile, self.owner.g, self.s
        total: Expr = binary("add", s.offset("b", self.batch if g.size["b"] > 1 else const(0)), s.base)
        done: list[Stmt] = [Alloc(self.shared), Alloc(self.stage), Let(self.base, total)]
        whole = g.size[self.kind] % self.size == 0
        # more than two accesses at equal distances: one address, and the others from it (of two, both take fewer registers)
        distance = s.distance(self.kind) if t.threads % self.inner == 0 and self.count > 2 else None
        even = distance is not None
        for j in range(self.count):
            e = TX if even else binary("add", TX, j * t.threads)
            fast = binary("mul", binary("mod", e, self.inner), self.width)
            slow = binary("floordiv", e, self.inner)
            k, r = (fast, slow) if self.along_k else (slow, fast)
            names = [f"{self.name}_{word}{0 if even else j}" for word in ("k", "r", "at", "off")]
            kv, rv, at, off = map(var, names)
            if j == 0 or not even:
                done += [Let(kv, k), Let(rv, r), Let(at, binary("add", self.origin, rv))]
                done.append(Let(off, binary("add", self.base, s.offset(self.kind, at))))
            if even and j:
                further = j * (t.threads // self.inner)
                kv, rv = (kv, binary("add", rv, further)) if self.along_k else (binary("add", kv, further), rv)
                if self.along_k:
                    at = binary("add", at, further)
                    off = binary("add", off, further * (distance or 0))
            inside = None if whole else binary("lt", at, const(g.size[self.kind]))
            self.parts.append((kv, rv, off, inside))
        return done

    def fetch(self, k0: Expr) -> list[Stmt]:
        """The elements of the step that begins at k0, into registers; zeros beyond the ends."""
        g, s, w = self.owner.g, self.s, self.width
        ragged = g.size["k"] % self.owner.tile.steps != 0 or self.owner.splits > 1
        last = const(g.size["k"]) if self.owner.splits == 1 else var("k_last")
        done: list[Stmt] = []
        for j, (kv, _, off, inside) in enumerate(self.parts):
            k = binary("add", k0, kv)
            test = inside
            if ragged:
                there = binary("lt", k, last)
                test = there if test is None else binary("and", test, there)
            at = binary("add", off, s.offset("k", k))
            slot = (const(j * w),)
            got = Store(self.stage, slot, cast(load(s.buffer, (at,), s.dtype, None, w), g.held))
            if test is None:
                done.append(got)
            else:
                done.append(If(test, (got,), (Store(self.stage, slot, const(0, g.held, w)),)))
        return done

    def put(self) -> list[Stmt]:
        """From registers to shared memory, k outermost there."""
        g, w = self.owner.g, self.width
        done: list[Stmt] = []
        for j, (kv, rv, _, _) in enumerate(self.parts):
            if self.along_k:
                done += [
                    Store(self.shared, (binary("add", kv, c), rv), load(self.stage, (const(j * w + c),), g.held))
                    for c in range(w)
                ]
            else:
                done.append(Store(self.shared, (kv, rv), load(self.stage, (const(j * w),), g.held, None, w)))
        return done

    def fragment(self, k: int, position: Expr, each: int) -> tuple[list[Stmt], list[Expr]]:
        """The thread's `each` elements of step k: declarations and stores before, and the elements."""
        g = self.owner.g
        width = min(4, each)
        places = thread_places(position, self.size, each)
        part = Buffer(f"{self.name}_part{k}", g.held, (each,), scope="register", align=16)
        done: list[Stmt] = [Alloc(part)]
        # accesses of 16 bytes: two doubles at a time
        lanes = max(1, min(width, 16 // g.held.itemsize))
        for e in range(0, each, lanes):
            done.append(Store(part, (const(e),), load(self.shared, (const(k), places[e]), g.held, None, lanes)))
        return done, [load(part, (const(e),), g.held) for e in range(each)]


__all__ = ["TILES", "Group", "Tile", "lower_contraction"]
