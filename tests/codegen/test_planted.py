"""Bugs planted in code generation and in the runtime: each is caught by a check that this project runs anyway.

A plant replaces one function or constant by a wrong one. Its check must pass without the plant (the control) and fail
with it. The checks are: compiled == interpreter in f64 (`agree`), loop IR verified and interpreted (`interpreted`: bounds,
races, uninitialised reads, the memory plan), loop interpreter == compiled to the bit, checked mode, the cache and artifact
checks, and what the runtime promises about results.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen import (
    accumulate,
    contractions,
    maps,
    nests,
    scans,
    scatter,
    vecmath_f32,
    vectorize,
)
from tensorwright.codegen.contraction import layout, microkernel, root
from tensorwright.codegen.contraction.types import Epilogue
from tensorwright.codegen.linear import Linear
from tensorwright.codegen.llvm.arithmetic import Arithmetic
from tensorwright.codegen.llvm.types import literal, vector
from tensorwright.codegen.loop_ir import If, Stmt, Store
from tensorwright.codegen.memory_plan import outputs, places
from tensorwright.ir.build import full, input_node
from tensorwright.ir.contraction import Axis, Contraction, affine
from tensorwright.ir.dtypes import f32, i32
from tensorwright.ir.expr import const, maximum
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.ops import indexing
from tensorwright.ir.target import Target, with_caches
from tensorwright.ir.types import tensor
from tensorwright.runtime import artifact, binding, container
from tensorwright.runtime.executable import Executable
from tensorwright.settings import Flags

from .helpers import host, host_rows
from .programs import Array, agree, compiled, interpreted

Patch = pytest.MonkeyPatch
NAN = float("nan")


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(-2, 2, s).astype(np.float32) for s in shapes]


def floats(*values: Sequence[float]) -> list[Array]:
    return [np.array(v, np.float32) for v in values]


def inputs(*shapes: tuple[int, ...], dtype: str = "f32") -> list[Node]:
    return [input_node(f"x{k}", tensor(dtype, s)) for k, s in enumerate(shapes)]


def graph_of(build: Callable[..., Any], *shapes: tuple[int, ...], dtype: str = "f32") -> Graph:
    nodes = inputs(*shapes, dtype=dtype)
    made = build(*nodes)
    return Graph(tuple(nodes), made if isinstance(made, tuple) else (made,))


def region(kind: str, build: Callable[..., Node], *shapes: tuple[int, ...]) -> Graph:
    """A graph of one fused region."""
    outer = inputs(*shapes)
    inner = [input_node(f"p{k}", n.tensor) for k, n in enumerate(outer)]
    body = Graph(tuple(inner), (build(*inner),), name="body")
    return Graph(tuple(outer), (make("fused", *outer, kind=kind, body=body),))


# --- checks -------------------------------------------------------------------------------------------------------------


def equals(graph: Graph, arrays: Sequence[Array] | None = None, target: Target | str | None = None) -> Callable[[], object]:
    """Compiled == interpreter in f64, and the same bits on one and two threads."""
    shapes = [i.tensor.static_shape for i in graph.inputs]
    return lambda: agree(graph, draw(*shapes) if arrays is None else arrays, target)


def loops(graph: Graph, arrays: Sequence[Array] | None = None, target: Target | str | None = None) -> Callable[[], object]:
    """The loop IR is verified, its memory plan checked, and every access of a run of it."""
    shapes = [i.tensor.static_shape for i in graph.inputs]
    return lambda: interpreted(graph, draw(*shapes) if arrays is None else arrays, target)


def same_bits(graph: Graph, target: str) -> Callable[[], None]:
    """The native program gives the loop interpreter's bits."""

    def check() -> None:
        arrays = draw(*(i.tensor.static_shape for i in graph.inputs))
        native, meant = compiled(graph, target)(arrays), interpreted(graph, arrays, target)
        for x, y in zip(native, meant, strict=True):
            assert x.tobytes() == y.tobytes(), "the native program's bits are not those that the loop IR means"

    return check


def checked(graph: Graph, arrays: Sequence[Array]) -> Callable[[], object]:
    """The bounds-checked program finds nothing to complain of."""
    return lambda: compiled(graph, checked=True)(arrays)


# --- contractions -------------------------------------------------------------------------------------------------------


def mm(m: int, k: int, n: int) -> Graph:
    return graph_of(lambda a, b: make("matmul", a, b), (m, k), (k, n))


def transposed(m: int, k: int, n: int) -> Graph:
    """A product with B's columns far apart, so that they are packed in panels first."""
    axes = (Axis("m", m, "m"), Axis("n", n, "n"), Axis("k", k, "k"))
    spec = Contraction(axes, (affine("m"), affine("k")), (affine("n"), affine("k")), (affine("m"), affine("n")))
    return graph_of(lambda a, b: make("contract", a, b, spec=spec), (m, k), (n, k))


def biased(m: int, k: int, n: int) -> Graph:
    def build(a: Node, b: Node, bias: Node) -> Node:
        y = make("matmul", a, b)
        return make("maximum", make("add", y, make("broadcast_to", bias, shape=(m, n))), full(0.0, y.tensor))

    return region("contraction", build, (m, k), (k, n), (n,))


def small_caches() -> Target:
    """The best row of this machine with caches so small that a short reduction is cut."""
    return with_caches(host(), l1=1024, l2=4096, l3=64 * 1024)


def short_rows(patch: Patch) -> None:
    """The tiles that are one row longer than the others lose that row."""
    pieces = layout.pieces

    def fewer(extent: int, size: int) -> tuple[int, int, int]:
        count, length, longer = pieces(extent, size)
        return count, length, max(0, longer - 1)

    patch.setattr(layout, "pieces", fewer)


def no_column_mask(patch: Patch) -> None:
    patch.setattr(microkernel._Builder, "_lanes_of", lambda self, j: None)


def rewritten(patch: Patch, change: Callable[[Stmt], Stmt]) -> None:
    """Every microkernel's top statements, changed."""
    build = root.build

    def wrong(nest: Any, tile: Any) -> Any:
        u = build(nest, tile)
        return replace(u, kernel=replace(u.kernel, body=tuple(change(s) for s in u.kernel.body)))

    patch.setattr(root, "build", wrong)


def every_block_from_zero(patch: Patch) -> None:
    def change(s: Stmt) -> Stmt:
        first = isinstance(s, If) and microkernel.FIRST in s.condition.args
        return If(microkernel.eq(const(0), 0), s.then, s.then) if isinstance(s, If) and first else s

    rewritten(patch, change)


def epilogue_at_each_block(patch: Patch) -> None:
    """What a block hands on has been through the activation already."""

    def change(s: Stmt) -> Stmt:
        if not (isinstance(s, If) and microkernel.LAST in s.condition.args):
            return s
        saved = [replace(x, value=maximum(x.value, 0.0)) for x in s.otherwise if isinstance(x, Store)]
        return If(s.condition, s.then, tuple(saved))

    rewritten(patch, change)


def bias_one_off(patch: Patch) -> None:
    made = contractions._epilogue

    def wrong(*args: Any) -> Epilogue:
        e = made(*args)

        def value(acc: Any, index: Any, load: Any) -> Any:
            def shifted(k: int, at: Any, mask: Any = None) -> Any:
                return load(k, (*at[:-1], at[-1] + 1), mask)

            return e.value(acc, index, shifted)

        return Epilogue(e.operands, value)

    patch.setattr(contractions, "_epilogue", wrong)


def panels_too_close(patch: Patch) -> None:
    """Panels are written one step closer together than they are read."""
    pack = root.pack_columns

    def wrong(where: Any) -> list[Stmt]:
        nearer = copy.copy(where)
        nearer.steps -= 1
        return pack(nearer)

    patch.setattr(root, "pack_columns", wrong)


def dropped_part(patch: Patch) -> None:
    """Of the independent accumulators of a cell only the first counts."""
    patch.setattr(microkernel._Builder, "_combine", lambda self: [])


# --- memory plan --------------------------------------------------------------------------------------------------------


def forked() -> Graph:
    """exp(x) is needed again when two more values have been made."""

    def build(x: Node) -> Node:
        first = make("exp", x)
        second = make("reverse", make("sin", first), axes=(0,))
        return make("add", make("reverse", make("cos", second), axes=(0,)), first)

    return graph_of(build, (64,))


def dies_too_early(patch: Patch) -> None:
    """A value is taken to be dead one step before its last reader."""
    last_use = places.last_use

    def wrong(s: Any, order: Any) -> dict[int, int]:
        made = {v: at for at, t in enumerate(order) for v in s.problem.tasks[t].writes}
        return {v: max(made.get(v, -1), at - 1) for v, at in last_use(s, order).items()}

    patch.setattr(places, "last_use", wrong)


def everything_at_zero(patch: Patch) -> None:
    def wrong(items: Any) -> int:
        for i in items:
            i.offset = 0
        return max((i.nbytes for i in items), default=0)

    patch.setattr(places, "pack", wrong)


def reversed_in_place(patch: Patch) -> None:
    """Every map is said to work in place, also where it reads other elements than it writes."""
    patch.setattr(maps, "in_place_pairs", lambda *args: frozenset({(0, 0)}))


def donated() -> Graph:
    """The first output takes the memory of x, which the second still reads."""
    x, y = inputs((33,), (33,))
    outputs = (make("add", make("exp", x), y), make("reverse", x, axes=(0,)))
    return Graph((x, y), outputs, ("a", "b"), aliases=((0, 0),))


def readers_forgotten(patch: Patch) -> None:
    patch.setattr(outputs, "_may_overwrite", lambda s, t, v, donated: True)


def swapped() -> Graph:
    x, y = inputs((16,), (16,))
    return Graph((x, y), (y, x), ("a", "b"), aliases=((0, 0), (1, 1)))


def copied_late(patch: Patch) -> None:
    """A donated input is copied from after it has been overwritten."""

    class Late(outputs.Copy):
        early = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

        def __init__(self, source: int, output: int) -> None:
            self.source, self.output = source, output

    patch.setattr(outputs, "Copy", Late)


# --- loops --------------------------------------------------------------------------------------------------------------


def along(op: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Graph:
    return graph_of(lambda x: make(op, x, axes=axes), shape)


def max_from_zero(patch: Patch) -> None:
    identity = accumulate.identity
    patch.setattr(accumulate, "identity", lambda kind, dtype, lanes=1: identity("sum" if kind == "max" else kind, dtype, lanes))


def dropped_accumulator(patch: Patch) -> None:
    tree = accumulate.Accumulator._tree
    patch.setattr(accumulate.Accumulator, "_tree", lambda self, b: tree(self, b)[:-1] or tree(self, b))


def accumulator_not_cleared(patch: Patch) -> None:
    start = accumulate.Accumulator.start
    patch.setattr(accumulate.Accumulator, "start", lambda self: [s for s in start(self) if not isinstance(s, Store)])


def tail_counted_twice(patch: Patch) -> None:
    """The last vector overlaps the one before, and nobody leaves out what was counted."""
    patch.setattr(nests, "from_lane", lambda first, lanes: microkernel.binary("le", const(0, f32, lanes), const(0, f32, lanes)))


def no_tail_mask(patch: Patch) -> None:
    patch.setattr(nests, "first_lanes", lambda count, lanes: None)


def last_chunk_too_long(patch: Patch) -> None:
    patch.setattr(nests, "minimum", lambda a, b: a)


def all_shared(patch: Patch) -> None:
    """Not a bug: loops this small are given to threads as well."""
    for module in (nests, scatter):
        patch.setattr(module, "PARALLEL_NS", 0.0)
    patch.setattr(nests, "CHUNK_NS", 1e6)


def strides_forgotten(patch: Patch) -> None:
    """A load of every second element is taken for one of neighbours."""

    class Near(Linear):
        def coefficient(self, v: Any) -> int:
            return min(1, super().coefficient(v))

    linear = vectorize.linear
    patch.setattr(vectorize, "linear", lambda e: Near(linear(e).constant, linear(e).terms))


def scan_from_one(patch: Patch) -> None:
    patch.setattr(scans, "identity", lambda kind, dtype, lanes=1: const(1, dtype, lanes))


def collisions_dropped(patch: Patch) -> None:
    """The last update of an element wins."""
    patch.setattr(scatter, "combine", lambda kind, old, new: new)


def updates_shared(patch: Patch) -> None:
    """Threads share the rows of updates, which may collide."""
    nest = scatter.nest
    patch.setattr(
        scatter, "nest", lambda axes, inner, kind="serial": nest(axes, inner, "parallel" if _is_updates(axes) else kind)
    )


def _is_updates(axes: Sequence[nests.Axis]) -> bool:
    return bool(axes) and axes[0].var.attr == "u0"


def scattered() -> tuple[Graph, list[Array]]:
    """Rows added to few places, so that most collide."""
    x, i, u = (
        input_node("x", tensor("f32", (4, 24))),
        input_node("i", tensor("i64", (9,))),
        input_node("u", tensor("f32", (9, 24))),
    )
    graph = Graph((x, i, u), (make("scatter_add", x, i, u, axis=0),))
    return graph, [*draw((4, 24)), np.array([0, 2, 2, 0, 3, 2, 0, 0, 2]), *draw((9, 24), seed=1)]


# --- instructions -------------------------------------------------------------------------------------------------------


def nan_swallowed(patch: Patch) -> None:
    binary = Arithmetic.binary

    def wrong(self: Any, op: str, d: Any, n: int, a: str, b: str, **more: Any) -> str:
        if op == "max" and d.is_float:
            return self.choose(self.compare("fcmp ule", "float", n, a, b), "float", n, self.choose(
                self.compare("fcmp uno", "float", n, b, b), "float", n, a, b), a)  # fmt: skip
        return binary(self, op, d, n, a, b, **more)

    patch.setattr(Arithmetic, "binary", wrong)


def contracted(patch: Patch) -> None:
    """LLVM may fuse a multiplication with an addition."""
    from tensorwright.codegen.llvm import arithmetic

    patch.setattr(arithmetic, "_FLOAT", {k: f"{v} contract" for k, v in arithmetic._FLOAT.items()})


def exp_off(patch: Patch) -> None:
    right = vecmath_f32._EXP
    patch.setattr(vecmath_f32, "_EXP", (*right[:2], right[2] * 1.01, *right[3:]))


def truncated(patch: Patch) -> None:
    def wrong(self: Any, op: str, d: Any, n: int, a: str, b: str, *, known: int | None) -> str:
        none = self.compare("icmp eq", "i64", n, b, literal(0, d, n))  # lanes that are switched off hold zeros
        safe = self.choose(none, "i64", n, literal(1, d, n), b)
        return str(self.t(f"sdiv {vector('i64', n)} {a}, {safe}"))

    patch.setattr(Arithmetic, "_divide", wrong)


def cast_wraps(patch: Patch) -> None:
    cast = Arithmetic.cast

    def wrong(self: Any, source: Any, to: Any, n: int, a: str) -> str:
        if source.is_float and to.kind == "int":
            return str(self.t(f"fptosi {vector('float', n)} {a} to {vector(f'i{to.bits}', n)}"))
        return cast(self, source, to, n, a)

    patch.setattr(Arithmetic, "cast", wrong)


def no_clipping(patch: Patch) -> None:
    patch.setattr(indexing, "minimum", lambda a, b: a)
    patch.setattr(indexing, "maximum", lambda a, b: a)


def taken() -> tuple[Graph, list[Array]]:
    x, i = input_node("x", tensor("f32", (5,))), input_node("i", tensor("i64", (3,)))
    return Graph((x, i), (make("gather", x, i, axis=0),)), [*draw((5,)), np.array([0, 6, -2])]


# --- the table ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """A planted bug, the check that must find it, and words of what that check says then."""

    plant: Callable[[Patch], None]
    check: Callable[[], object]
    says: str
    needs: str = ""  # a target row
    before: Callable[[Patch], None] | None = None  # for the control too


V2, V3 = "x86-64-v2", "x86-64-v3"
DIFFERS = "relative error"
LOST = "relative error inf"  # integers differ, or NaN came or went
PLANTS = {
    "tile remainder one row short": Plant(short_rows, equals(mm(41, 64, 64)), DIFFERS),
    "missing column mask": Plant(no_column_mask, loops(mm(3, 8, 5)), "out of range|outside dimension"),
    "cut reduction starts anew": Plant(every_block_from_zero, equals(biased(64, 600, 128), target=small_caches()), DIFFERS),
    "epilogue at each block": Plant(epilogue_at_each_block, equals(biased(64, 600, 128), target=small_caches()), DIFFERS),
    "epilogue bias one off": Plant(bias_one_off, loops(biased(5, 8, 20)), "out of range|outside dimension|needs 21|E0"),
    "panels packed too close": Plant(
        panels_too_close, equals(transposed(64, 48, 200)),
        DIFFERS,
    ),
    "accumulator of a dot product dropped": Plant(
        dropped_part, equals(graph_of(lambda a, b: make("matmul", a, b), (1, 512), (512, 1))), DIFFERS
    ),
    "buffer reused before its last reader": Plant(dies_too_early, loops(forked()), "does not hold it then|overwrites"),
    "all buffers at one place": Plant(everything_at_zero, loops(forked()), "does not hold it then|overwrites"),
    "in place where indices differ": Plant(
        reversed_in_place, equals(graph_of(lambda x: make("neg", make("reverse", make("exp", x), axes=(0,))), (40,))), DIFFERS
    ),
    "donated input overwritten before it is read": Plant(readers_forgotten, loops(donated()), "does not hold it then|overwrites"),
    "donated inputs swapped one after the other": Plant(copied_late, loops(swapped()), "does not hold it then"),
    "maximum starts from zero": Plant(
        max_from_zero, equals(along("max", (5, 70), (1,)), [-1 - np.abs(draw((5, 70))[0])]), DIFFERS
    ),
    "accumulator dropped": Plant(dropped_accumulator, equals(along("sum", (3, 512), (1,))), DIFFERS),
    "accumulator not cleared": Plant(accumulator_not_cleared, loops(along("sum", (3, 70), (1,))), "read before it is written"),
    "overlapping tail counted twice": Plant(tail_counted_twice, equals(along("sum", (3, 41), (1,)), target=V2), DIFFERS, V2),
    "missing tail mask": Plant(
        no_tail_mask, loops(graph_of(lambda x: make("exp", x), (37,)), target=V3), "out of range|outside dimension", V3
    ),
    "last chunk too long": Plant(
        last_chunk_too_long, loops(along("sum", (67, 40), (1,))), "out of range|outside dimension", before=all_shared
    ),
    "stride forgotten": Plant(
        strides_forgotten,
        equals(graph_of(lambda x: make("exp", make("slice", x, starts=(0,), stops=(64,), steps=(2,))), (64,))),
        DIFFERS,
    ),
    "scan starts from one": Plant(scan_from_one, equals(graph_of(lambda x: make("cumsum", x, axis=0), (9, 8))), DIFFERS),
    "scatter drops collisions": Plant(collisions_dropped, equals(*scattered()), DIFFERS),
    "colliding updates in parallel": Plant(updates_shared, loops(*scattered()), "race"),
    "maximum swallows NaN": Plant(
        nan_swallowed,
        equals(graph_of(lambda a, b: make("maximum", a, b), (4,), (4,)), floats([NAN, 1, 2, NAN], [1, NAN, 3, 0])),
        LOST,
    ),
    "multiply-add contracted": Plant(
        contracted,
        same_bits(region("map", lambda a, b, c: make("add", make("mul", a, b), c), (64,), (64,), (64,)), V3),
        "bits are not those",
        V3,
    ),
    "coefficient of exp changed": Plant(exp_off, equals(graph_of(lambda x: make("exp", x), (64,))), DIFFERS),
    "floor division truncates": Plant(
        truncated,
        equals(
            graph_of(lambda a, b: make("floordiv", a, b), (5,), (5,), dtype="i64"),
            [np.array([-7, 7, -8, 9, -1]), np.array([2, -2, 4, 4, 3])],
        ),
        LOST,
    ),
    "cast without saturation": Plant(
        cast_wraps,
        equals(graph_of(lambda x: make("cast", x, dtype=i32), (4,)), floats([1e10, -1e10, NAN, 3.7])),
        LOST,
    ),
    "gather not clipped": Plant(no_clipping, checked(*taken()), "check . fired"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_planted(name: str, monkeypatch: Patch) -> None:
    p = PLANTS[name]
    if p.needs and p.needs not in host_rows():
        pytest.skip(f"this machine cannot run {p.needs} code, which this bug is planted in")
    if p.before is not None:
        p.before(monkeypatch)
    p.check()
    with monkeypatch.context() as patch:
        p.plant(patch)
        with pytest.raises((AssertionError, tw.TensorwrightError), match=p.says):
            p.check()
    p.check()


# --- runtime ------------------------------------------------------------------------------------------------------------


def caught(monkeypatch: Patch, plant: Callable[[Patch], None], check: Callable[[], None], says: str) -> None:
    check()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError, match=says):
            check()


@pytest.mark.unvalidated("validation bypasses the cache")
def test_cache_key_without_a_flag(monkeypatch: Patch, tmp_path: Any) -> None:
    folders = iter(range(9))

    def check() -> None:
        """Code with bounds checks is other code: it must not come from the entry of code without."""
        with tw.config(cache=str(tmp_path / str(next(folders)))):
            tw.compile(lambda x: x + 1, tw.spec(4))
            again = tw.compile(lambda x: x + 1, tw.spec(4))
            assert again.compiled.from_cache, "an equal key misses"
            with tw.config(checked=True):
                found = tw.compile(lambda x: x + 1, tw.spec(4))
        assert not found.compiled.from_cache, "a hit in spite of another flag"

    caught(monkeypatch, lambda p: p.setattr(Flags, "code_flags", lambda self: ()), check, "a hit in spite")


def test_artifact_checksum_not_looked_at(monkeypatch: Patch, tmp_path: Any) -> None:
    exe = tw.compile(tw.nn.Linear(8, 8), tw.spec(1, 8), cache=False)
    numbers = iter(range(9))

    def check() -> None:
        """A bit of a weight flips on the disk."""
        path = tmp_path / f"{next(numbers)}.tw"
        exe.save(str(path))
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        try:
            artifact.loads(bytes(data))
        except tw.errors.ArtifactError:
            return
        raise AssertionError("a damaged file was loaded")

    class Blind:
        def __init__(self, data: bytes = b"") -> None: ...

        def update(self, data: bytes) -> None: ...

        def digest(self) -> bytes:
            return bytes(32)

    caught(monkeypatch, lambda p: p.setattr(container, "hashlib", SimpleNamespace(sha256=Blind)), check, "damaged file")
    assert container.hashlib is hashlib


def test_results_used_again_while_held(monkeypatch: Patch) -> None:
    def check() -> None:
        exe = tw.compile(lambda x: x * 2.0, tw.spec(16), cache=False, threads=1)
        first = exe(np.ones(16, np.float32))
        exe(np.zeros(16, np.float32))
        assert (first == 2).all(), "a result that is still held was overwritten"

    caught(monkeypatch, lambda p: p.setattr(binding, "_IDLE", 1 << 40), check, "was overwritten")


def test_prepared_weights_kept_when_weights_change(monkeypatch: Patch) -> None:
    def check() -> None:
        layer = tw.nn.Linear(64, 64)
        exe = tw.compile(tw.nn.Sequential(layer, tw.nn.BatchNorm1d(64)), tw.spec(4, 64), cache=False, threads=1)
        x = np.ones((4, 64), np.float32)
        before = exe(x).copy()
        assert exe.compiled.prepare is not None
        exe.set_parameters({k: v * 2 for k, v in exe.parameters.items() if k.endswith("weight")})
        assert np.abs(exe(x) - before).max() > 1e-3, "new weights have no effect"

    class Stays(dict[str, Any]):
        def clear(self) -> None: ...

    take = Executable._take

    def wrong(self: Executable, given: Any) -> None:
        self._prepared = Stays(self._prepared)
        take(self, given)

    caught(monkeypatch, lambda p: p.setattr(Executable, "_take", wrong), check, "no effect")
