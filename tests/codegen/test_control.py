"""Loops and branches in native code: compiled = loop interpreter = interpreter, one and two threads, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.plan import Block, Loop, Section, Step, walk
from tensorwright.ir.build import constant, get, input_node
from tensorwright.ir.dtypes import bool_, i32
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType, tensor

from .helpers import host
from .programs import Array, agree, compiled, error, interpreted

SIZES = (1, 7, 16, 17, 33)


def body(build: Callable[..., tuple[Node, ...]], *types: TensorType) -> Graph:
    """A body: `build` of inputs p0, p1, ..."""
    inputs = [input_node(f"p{k}", t) for k, t in enumerate(types)]
    return Graph(tuple(inputs), build(*inputs), name="body")


def graph(build: Callable[..., tuple[Node, ...]], *types: TensorType) -> Graph:
    inputs = [input_node(f"x{k}", t) for k, t in enumerate(types)]
    return Graph(tuple(inputs), build(*inputs))


def draw(g: Graph, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    found = [rng.uniform(-1, 1, i.tensor.static_shape).astype(i.dtype.numpy) for i in g.inputs]
    # square matrices are weights: small ones, so that a recurrence forgets its rounding errors
    return [a / np.sqrt(a.shape[0], dtype=np.float32) if a.ndim == 2 and a.shape[0] == a.shape[1] else a for a in found]


def same(g: Graph, arrays: Sequence[Array] | None = None, budget: float = 1e-5) -> None:
    """All ways to run a graph agree: native on one and two threads, bounds-checked, and the loop interpreter."""
    arrays = draw(g) if arrays is None else arrays
    runner = agree(g, arrays, budget=budget)
    native = runner(arrays)
    for other in (interpreted(g, arrays), compiled(g, checked=True)(arrays)):
        for x, y in zip(native, other, strict=True):
            assert error(x, y) <= budget


def parts(node: Node) -> tuple[Node, ...]:
    return tuple(get(node, k) for k in range(len(node.type.items)))


def f(*shape: int) -> TensorType:
    return tensor("f32", shape)


def recurrence(n: int, batch: int, length: int, *, reverse: bool = False) -> Graph:
    """h' = tanh(h @ w + x): h is stacked, so that each step reads it from the slice that the step before wrote."""
    step = body(
        lambda h, x, w: (new := make("tanh", make("add", make("matmul", h, w), x)), new), f(batch, n), f(batch, n), f(n, n)
    )
    return graph(
        lambda h, x, w: parts(make("scan", h, x, w, body=step, length=length, carries=1, sequences=1, reverse=reverse)),
        f(batch, n), f(length, batch, n), f(n, n),
    )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_recurrence(n: int, reverse: bool) -> None:
    same(recurrence(n, 2, 5, reverse=reverse))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 6, 7])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_length_and_every_choice_of_results(length: int, wanted: tuple[int, ...], reverse: bool) -> None:
    g = recurrence(5, 1, length, reverse=reverse)
    same(Graph(g.inputs, tuple(g.outputs[k] for k in wanted)))


def lstm_like(n: int, batch: int, length: int, *, save: bool, reverse: bool = False) -> Graph:
    """Two carries. With `save`, the old carries are stacked, as a gradient wants them, else the new h."""

    def step(h: Node, c: Node, x: Node, w: Node) -> tuple[Node, ...]:
        g = make("add", make("matmul", h, w), x)
        i, o, z = (make("slice", g, starts=(0, k * n), stops=(batch, (k + 1) * n), steps=(1, 1)) for k in range(3))
        new_c = make("add", make("mul", make("sigmoid", i), c), make("tanh", z))
        new_h = make("mul", make("sigmoid", o), make("tanh", new_c))
        return (new_h, new_c, h, c) if save else (new_h, new_c, new_h)

    b = body(step, f(batch, n), f(batch, n), f(batch, 3 * n), f(n, 3 * n))
    return graph(
        lambda h, c, x, w: parts(make("scan", h, c, x, w, body=b, length=length, carries=2, sequences=1, reverse=reverse)),
        f(batch, n), f(batch, n), f(length, batch, 3 * n), f(n, 3 * n),
    )  # fmt: skip


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_carries_that_are_stacked_before_and_after(save: bool, length: int, reverse: bool) -> None:
    same(lstm_like(7, 2, length, save=save, reverse=reverse))
    g = lstm_like(16, 1, length, save=save, reverse=reverse)
    same(Graph(g.inputs, g.outputs[2:]))


def loop_of(g: Graph) -> Loop:
    found = [n for n in walk(assemble(g, host()).entry.steps) if isinstance(n, Loop)]
    assert len(found) == 1
    return found[0]


def test_a_recurrence_is_read_from_what_it_stacks_without_a_copy() -> None:
    names = [getattr(n, "kernel", "") for n in walk(loop_of(recurrence(16, 2, 9)).nodes)]
    assert not any(n.startswith("copy") for n in names), names
    saved = loop_of(lstm_like(16, 2, 9, save=True))
    assert not any(getattr(n, "kernel", "").startswith("copy") for n in walk(saved.nodes))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 16, 19])
def test_swapped_turned_and_unchanged_carries(length: int, n: int) -> None:
    """(a, b, c, d) -> (b, a, c, a + d), stacking c, x, and what is a constant."""

    def step(a: Node, b: Node, c: Node, d: Node, x: Node) -> tuple[Node, ...]:
        return b, a, c, make("add", a, d), c, x, make("mul", x, d), constant(np.arange(n, dtype=np.float32))

    b = body(step, *[f(n)] * 5)
    g = graph(lambda *v: parts(make("scan", *v, body=b, length=length, carries=4, sequences=1)), *[f(n)] * 4, f(length, n))
    same(g)


def test_one_operand_as_two_carries_a_sequence_and_an_invariant() -> None:
    b = body(
        lambda a, c, x, w: (
            make("add", a, make("broadcast_to", x, shape=(4, 4))),
            make("matmul", c, w),
            make("mul", x, make("sum", w, axes=(0,), keepdims=False)),
        ),
        f(4, 4), f(4, 4), f(4), f(4, 4),
    )  # fmt: skip
    same(graph(lambda x: (*parts(make("scan", x, x, x, x, body=b, length=4, carries=2, sequences=1)), x), f(4, 4)))


def test_carries_of_other_dtypes_and_without_elements() -> None:
    def step(n: Node, flag: Node, none: Node, x: Node) -> tuple[Node, ...]:
        big = make("less", constant(np.float32(0)), x)
        return make("add", n, make("cast", big, dtype=i32)), make("where", flag, flag, big), none, big, none

    b = body(step, tensor("i32", ()), tensor("bool", ()), f(0, 3), f())
    g = graph(
        lambda n, e, x: parts(make("scan", n, constant(False, bool_), e, x, body=b, length=6, carries=3, sequences=1)),
        tensor("i32", ()), f(0, 3), f(6),
    )  # fmt: skip
    arrays = [np.array(3, np.int32), np.zeros((0, 3), np.float32), np.array([-1, 2, -3, 4, 5, -6], np.float32)]
    same(g, arrays)
    assert compiled(g)(arrays)[0] == 6


def test_constants_as_carries_and_results_that_are_operands() -> None:
    b = body(lambda c, k: (make("add", c, k), make("neg", k)), f(3), f(3))
    zero, one = constant(np.zeros(3, np.float32)), constant(np.arange(3, dtype=np.float32))

    def build(x: Node) -> tuple[Node, ...]:
        total, _ = parts(made := make("scan", zero, one, body=b, length=5, carries=1, sequences=0))
        return total, get(made, 1), x, one

    same(graph(build, f(2)))


def test_a_loop_without_operands() -> None:
    b = body(lambda: (constant(np.arange(5, dtype=np.float32)), make("neg", constant(np.ones(5, np.float32)))))
    node = make("scan", body=b, length=3, carries=0, sequences=0)
    same(Graph((), parts(node)), [])


def test_a_donated_input_is_the_carry_in_place() -> None:
    step = body(lambda w, x: (make("mul", w, x),), f(33), f(33))
    x = [input_node("w", f(33), "state"), input_node("x", f(6, 33))]
    g = Graph(tuple(x), parts(make("scan", *x, body=step, length=6, carries=1, sequences=1)), aliases=((0, 0),))
    made = assemble(g, host())
    assert made.plan.arena_bytes == 0 and [type(n).__name__ for n in walk(made.entry.steps)] == ["Block", "Loop", "Step"]
    a, b = draw(g)
    expected = a.astype(np.float64)
    for row in b.astype(np.float64):
        expected = expected * row
    np.testing.assert_allclose(compiled(g)([a, b])[0], expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 16, 33])
@pytest.mark.parametrize("flag", [False, True])
def test_branches(n: int, flag: bool) -> None:
    then = body(lambda a, b: (make("matmul", a, b), a, constant(np.float32(2))), f(n, n), f(n, n))
    other = body(lambda a, b: (make("exp", make("add", a, b)), b, make("sum", a, axes=(0, 1), keepdims=False)), f(n, n), f(n, n))
    x = [input_node("p", tensor("bool", ())), input_node("a", f(n, n)), input_node("b", f(n, n))]
    made = make("cond", *x, then=then, orelse=other)
    a, b = draw(Graph(tuple(x[1:]), ()))
    for outputs in (parts(made), parts(made)[:1], (get(made, 1), make("neg", get(made, 0)))):
        same(Graph(tuple(x), outputs), [np.array(flag), a, b])


@pytest.mark.parametrize("start", [0.0, 3.0, 50.0])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_while(start: float, wanted: tuple[int, ...]) -> None:
    types = (f(), f(3, 3), f(3, 3))
    test = body(lambda n, m, w: (make("less", n, constant(np.float32(20))),), *types)
    step = body(lambda n, m, w: (make("add", n, constant(np.float32(1.5))), make("matmul", m, w)), *types)
    g = graph(lambda n, m, w: parts(make("while_loop", n, m, w, test=test, body=step, carries=2)), *types)
    arrays = draw(g)
    arrays[0] = np.array(start, np.float32)
    same(Graph(g.inputs, tuple(g.outputs[k] for k in wanted)), arrays)


def test_nested() -> None:
    """A loop in a loop in a branch in a loop, with a while inside."""
    inner = body(lambda a, x, w: (new := make("tanh", make("add", make("matmul", a, w), x)), new), f(2, 5), f(2, 5), f(5, 5))
    types = (f(2, 5),)
    until = body(lambda v: (make("less", make("max", v, axes=(0, 1), keepdims=False), constant(np.float32(3))),), *types)
    double = body(lambda v: (make("add", v, constant(np.ones((2, 5), np.float32))),), *types)

    def outer(a: Node, x: Node, w: Node) -> tuple[Node, ...]:
        last, rows = parts(make("scan", a, x, w, body=inner, length=3, carries=1, sequences=1, reverse=True))
        (grown,) = parts(make("while_loop", last, test=until, body=double, carries=1))
        return last, make("sum", rows, axes=(0,), keepdims=False), grown

    middle = body(outer, f(2, 5), f(3, 2, 5), f(5, 5))
    keep = body(lambda a, xs, w: (a, a, a), f(2, 5), f(4, 3, 2, 5), f(5, 5))
    run = body(
        lambda a, xs, w: (
            (p := parts(make("scan", a, xs, w, body=middle, length=4, carries=1, sequences=1)))[0],
            make("sum", p[1], axes=(0,), keepdims=False),
            make("max", p[2], axes=(0,), keepdims=False),
        ),
        f(2, 5), f(4, 3, 2, 5), f(5, 5),
    )  # fmt: skip

    def top(a: Node, flag: Node, xs: Node, w: Node) -> tuple[Node, ...]:
        return parts(make("cond", flag, a, xs, w, then=run, orelse=keep))

    step = body(top, f(2, 5), tensor("bool", ()), f(4, 3, 2, 5), f(5, 5))
    g = graph(
        lambda a, flags, xs, w: parts(make("scan", a, flags, xs, w, body=step, length=3, carries=1, sequences=2)),
        f(2, 5), tensor("bool", (3,)), f(3, 4, 3, 2, 5), f(5, 5),
    )  # fmt: skip
    arrays = draw(g)
    arrays[1] = np.array([True, False, True])
    same(g, arrays)


def mapped(length: int, n: int) -> Graph:
    """A loop without carries whose passes have memory of their own: (x @ w) @ w and a row sum."""

    def step(x: Node, w: Node) -> tuple[Node, ...]:
        y = make("matmul", make("exp", make("matmul", x, w)), w)
        return y, make("sum", y, axes=(1,), keepdims=False)

    b = body(step, f(n, n), f(n, n))
    return graph(lambda x, w: parts(make("scan", x, w, body=b, length=length, carries=0, sequences=1)), f(length, n, n), f(n, n))


@pytest.mark.parametrize(("length", "n"), [(1, 40), (2, 90), (5, 64), (33, 48), (200, 17)])
def test_passes_without_carries_run_on_several_threads(length: int, n: int) -> None:
    g = mapped(length, n)
    arrays = draw(g)
    runner = agree(g, arrays, budget=1e-5)
    few = runner(arrays, 1)
    for threads in (2, 3, 7, 40):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(few, runner(arrays, threads), strict=True)), threads
    if length * n < 50:
        same(g, arrays)
    regions = loop_of(g).regions
    assert (regions is not None) == (length > 1)


def test_a_map_in_a_loop_and_a_loop_in_a_map() -> None:
    inner = mapped(8, 48)
    step = body(
        lambda x, w: (
            make("tanh", (p := parts(make("scan", x, w, body=inner_body(inner), length=8, carries=0, sequences=1)))[0]),
            make("sum", p[1], axes=(0,), keepdims=False),
        ),
        f(8, 48, 48), f(48, 48),
    )  # fmt: skip
    g = graph(lambda x, w: parts(make("scan", x, w, body=step, length=3, carries=1, sequences=0)), f(8, 48, 48), f(48, 48))
    assert loop_in(g).regions is not None
    agree(g, draw(g), budget=1e-5)
    rows = body(
        lambda xs, h, w: parts(make("scan", h, xs, w, body=recurrence_body(24, 2), length=6, carries=1, sequences=1)),
        f(6, 2, 24), f(2, 24), f(24, 24),
    )  # fmt: skip
    g = graph(
        lambda xs, hs, w: parts(make("scan", xs, hs, w, body=rows, length=90, carries=0, sequences=2)),
        f(90, 6, 2, 24), f(90, 2, 24), f(24, 24),
    )  # fmt: skip
    outer, nested = (n for n in walk(assemble(g, host()).entry.steps) if isinstance(n, Loop))
    assert outer.regions is not None and nested.regions is None
    agree(g, draw(g), budget=1e-5)


def inner_body(g: Graph) -> Graph:
    return g.outputs[0].inputs[0].attrs["body"]


def recurrence_body(n: int, batch: int) -> Graph:
    return inner_body(recurrence(n, batch, 1))


def loop_in(g: Graph) -> Loop:
    """The innermost loop."""
    return [n for n in walk(assemble(g, host()).entry.steps) if isinstance(n, Loop)][-1]


def two_ways(length: int, n: int, batch: int = 4) -> Graph:
    """A recurrence read forwards and one read backwards."""
    step = recurrence_body(n, batch)

    def build(h: Node, x: Node, w: Node, v: Node) -> tuple[Node, ...]:
        a = make("scan", h, x, w, body=step, length=length, carries=1, sequences=1)
        b = make("scan", h, x, v, body=step, length=length, carries=1, sequences=1, reverse=True)
        return make("concat", get(a, 1), get(b, 1), axis=2), get(a, 0), get(b, 0)

    return graph(build, f(batch, n), f(length, batch, n), f(n, n), f(n, n))


def test_two_directions_run_at_the_same_time() -> None:
    g = two_ways(60, 64)
    (section,) = (n for n in walk(assemble(g, host()).entry.steps) if isinstance(n, Section))
    assert len(section.nodes) == 2
    agree(g, draw(g), budget=1e-5)
    short = two_ways(3, 16)
    assert not any(isinstance(n, Section) for n in walk(assemble(short, host()).entry.steps)), "too short to wake a thread"
    same(short)


def test_each_direction_has_its_own_projection_where_there_are_no_more_threads() -> None:
    """A thread multiplies the sequence and runs the loop over the result; what both loops, or others, read stays outside."""
    step = recurrence_body(64, 4)

    def build(shared: bool) -> Graph:
        def two(h: Node, x: Node, w: Node, v: Node) -> tuple[Node, ...]:
            p = make("matmul", make("tanh", x), w)
            q = p if shared else make("matmul", make("tanh", x), v)
            a = make("scan", h, p, w, body=step, length=60, carries=1, sequences=1)
            b = make("scan", h, q, v, body=step, length=60, carries=1, sequences=1, reverse=True)
            return get(a, 1), get(b, 1)

        return graph(two, f(4, 64), f(60, 4, 64), f(64, 64), f(64, 64))

    def inside(g: Graph, threads: int) -> list[int]:
        (section,) = (n for n in assemble(g, host(), threads=threads).entry.steps if isinstance(n, Section))
        return [sum(isinstance(n, Step) for n in part.nodes) for part in section.nodes if isinstance(part, Block)]

    g = build(shared=False)
    assert inside(g, 2) == [1, 1] and inside(g, 4) == [0, 0]
    assert inside(build(shared=True), 2) == [0, 0]
    agree(g, draw(g), budget=1e-5)


def test_loops_that_depend_on_each_other_run_one_after_the_other() -> None:
    step = recurrence_body(64, 4)

    def build(h: Node, x: Node, w: Node) -> tuple[Node, ...]:
        a = make("scan", h, x, w, body=step, length=60, carries=1, sequences=1)
        b = make("scan", h, make("exp", get(a, 1)), w, body=step, length=60, carries=1, sequences=1, reverse=True)
        return get(a, 0), get(b, 1)

    g = graph(build, f(4, 64), f(60, 4, 64), f(64, 64))
    assert not any(isinstance(n, Section) for n in walk(assemble(g, host()).entry.steps))
    agree(g, draw(g), budget=1e-5)
