"""Fused regions of each kind against the interpreter: rows, reductions, maps, contractions; sizes around the vector width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.nests import has_masks
from tensorwright.ir.build import full, fused, input_node, outputs
from tensorwright.ir.contraction import Axis, Contraction, affine
from tensorwright.ir.dtypes import f32, i32
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType

from .helpers import host, host_rows
from .programs import Array, agree, compiled, interpreted

ROWS = [r for r in host_rows() if r.startswith("x86")] or host_rows()


def wide(x: Node, like: Node) -> Node:
    return make("broadcast_to", x, shape=like.shape)


def scaled(x: Node, factor: float) -> Node:
    return make("mul", x, full(factor, x.tensor))


def softmax(x: Node) -> Node:
    axes = (len(x.shape) - 1,)
    e = make("exp", make("sub", x, wide(make("max", x, axes=axes, keepdims=True), x)))
    return make("div", e, wide(make("sum", e, axes=axes, keepdims=True), x))


def log_softmax(x: Node) -> Node:
    axes = (len(x.shape) - 1,)
    shifted = make("sub", x, wide(make("max", x, axes=axes, keepdims=True), x))
    total = make("sum", make("exp", shifted), axes=axes, keepdims=True)
    return make("sub", shifted, wide(make("log", total), x))


def softmax_gradient(y: Node, dy: Node) -> Node:
    axes = (len(y.shape) - 1,)
    return make("mul", y, make("sub", dy, wide(make("sum", make("mul", y, dy), axes=axes, keepdims=True), y)))


def moments(x: Node, axes: tuple[int, ...]) -> tuple[Node, Node, Node]:
    n = float(np.prod([x.shape[a] for a in axes]))
    mean = scaled(make("sum", x, axes=axes, keepdims=True), 1 / n)
    d = make("sub", x, wide(mean, x))
    variance = scaled(make("sum", make("mul", d, d), axes=axes, keepdims=True), 1 / n)
    return mean, d, variance


def layer_norm(x: Node, gain: Node, shift: Node) -> Node:
    _, d, variance = moments(x, (len(x.shape) - 1,))
    y = make("mul", d, wide(make("rsqrt", make("add", variance, full(1e-5, variance.tensor))), x))
    return make("add", make("mul", y, wide(gain, x)), wide(shift, x))


def region(kind: str, build: Callable[..., Node | tuple[Node, ...]], *shapes: tuple[int, ...], dtype: object = f32) -> Graph:
    """A graph of one fused region over fresh inputs."""
    types = [TensorType(dtype, s) for s in shapes]  # type: ignore[arg-type]
    inner = [input_node(f"p{k}", t) for k, t in enumerate(types)]
    made = build(*inner)
    results = made if isinstance(made, tuple) else (made,)
    body = Graph(tuple(inner), results, name=kind)
    outer = [input_node(f"x{k}", t) for k, t in enumerate(types)]
    out = outputs(fused(body, outer, kind))
    return Graph(tuple(outer), out, tuple(f"y{k}" for k in range(len(out))))


def draw(graph: Graph, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n.tensor.static_shape).astype(n.dtype.numpy) for n in graph.inputs]


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("columns", [1, 3, 7, 16, 33, 130, 1000])
def test_rows(columns: int, target: str) -> None:
    for build, count in ((softmax, 1), (log_softmax, 1), (softmax_gradient, 2)):
        graph = region("rows", build, *((5, columns),) * count)
        agree(graph, draw(graph), target)
    graph = region("rows", layer_norm, (2, 3, columns), (columns,), (columns,))
    agree(graph, draw(graph), target)


def test_rows_over_two_axes_and_row_results() -> None:
    def build(x: Node, w: Node) -> tuple[Node, ...]:
        mean, d, variance = moments(x, (2, 3))
        y = make("mul", d, wide(w, x))
        return y, make("reshape", mean, shape=mean.shape[:2]), make("sqrt", variance), make("argmax", y, axis=3)

    graph = region("rows", lambda x, w: build(x, w)[:3], (3, 4, 5, 6), (5, 6))
    agree(graph, draw(graph))


def test_rows_keep_what_is_dear_and_recompute_what_is_cheap() -> None:
    text = compiled(region("rows", softmax, (64, 512))).program.texts["loops"]
    assert text.count("exp(") <= 8  # one exp for each vector of an unrolled step
    if has_masks(host(), [f32]):  # the output's row holds the exponentials until they are divided
        assert "local" not in text
    text = compiled(region("rows", softmax, (64, 500)), "x86-64-v2").program.texts["loops"]
    assert "kept0" in text  # here the last vector overlaps the one before: what it reads must not be written yet
    text = compiled(region("rows", layer_norm, (64, 512), (512,), (512,))).program.texts["loops"]
    assert "local" not in text


@pytest.mark.parametrize("columns", [64, 70])
def test_rows_whose_outputs_read_what_is_kept(columns: int) -> None:
    """Two exponentials kept, three outputs of which each reads both; and one that is stored passes before the last."""

    def build(x: Node) -> tuple[Node, ...]:
        def total(v: Node) -> Node:
            return wide(make("sum", v, axes=(1,), keepdims=True), x)

        a = make("exp", make("sub", x, wide(make("max", x, axes=(1,), keepdims=True), x)))
        b = make("exp", make("div", a, total(a)))
        s = total(b)
        return make("div", make("mul", a, b), s), make("add", a, make("div", b, s)), make("sub", a, b), make("mul", a, total(a))

    for last in (4, 3, 1):
        graph = region("rows", lambda x, last=last: build(x)[:last], (9, columns))
        for target in ROWS:
            agree(graph, draw(graph), target)


def test_softmax_of_infinities() -> None:
    graph = region("rows", softmax, (4, 40))
    x = np.zeros((4, 40), np.float32)
    x[0, 3], x[1, 5], x[2], x[3, 1:] = np.inf, np.nan, -np.inf, -np.inf
    agree(graph, [x])


def test_quotients_at_the_ends_of_the_exponent_range() -> None:
    """A reciprocal would overflow or lose digits: the division itself is used there."""

    def build(x: Node) -> Node:
        return make("div", x, wide(make("sum", x, axes=(1,), keepdims=True), x))

    graph = region("rows", build, (4, 20))
    x = np.ones((4, 20), np.float32)
    x[0] *= np.float32(1e-39)
    x[1] *= np.float32(3e36)
    found = compiled(graph)([x])[0]
    np.testing.assert_allclose(found, np.full((4, 20), 0.05), rtol=2e-6)


REDUCTIONS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((300, 65), (0,)), ((7, 300), (1,)), ((2, 50, 3, 33), (0, 1)), ((6, 40, 17), (1,)), ((90, 5, 7), (0, 2)),
    ((3, 4, 5), (0, 1, 2)),    ((5000, 3), (0,)), ((17, 2000), (0,)), ((1, 9), (0,)), ((40, 1, 40), (0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("target", ROWS)
def test_reductions_over_any_axes(target: str) -> None:
    xs, outs, arrays = [], [], []
    rng = np.random.default_rng(1)
    for k, (shape, axes) in enumerate(REDUCTIONS):
        xs.append(input_node(f"x{k}", TensorType(f32, shape)))
        arrays.append(rng.standard_normal(shape).astype(np.float32))
        outs += [make("sum", make("mul", xs[-1], xs[-1]), axes=axes), make("max", xs[-1], axes=axes, keepdims=True)]
        if len(axes) == 1:
            outs.append(make("argmin", xs[-1], axis=axes[0]))
    agree(Graph(tuple(xs), tuple(outs), tuple(f"y{k}" for k in range(len(outs)))), arrays, target, budget=4e-6)


@pytest.mark.parametrize("shape", [(64, 33), (2000, 16), (40, 3000)])
def test_batch_statistics_are_one_region(shape: tuple[int, int]) -> None:
    def build(x: Node, w: Node) -> tuple[Node, ...]:
        mean, _, variance = moments(x, (0,))
        return make("add", mean, make("reshape", w, shape=mean.shape)), make("rsqrt", variance)

    graph = region("reduce", build, shape, shape[1:])
    agree(graph, draw(graph), budget=4e-6)


LARGE: list[tuple[Callable[..., Node], str, tuple[tuple[int, ...], ...]]] = [
    (lambda x: make("sum", x, axes=(0,)), "reduce", ((4099, 257),)),
    (lambda x: make("sum", x, axes=(0, 1)), "reduce", ((1030, 1031),)),
    (lambda x: make("sum", x, axes=(1,)), "reduce", ((3, 700_001),)),
    (lambda x: make("max", x, axes=(0,)), "reduce", ((70_000, 5),)),
    (lambda x: make("argmax", x, axis=0), "reduce", ((1_000_003,),)),
    (lambda x: make("exp", make("neg", make("abs", x))), "map", ((1_000_003,),)),
    (lambda x: make("transpose", x, perm=(1, 0)), "map", ((1031, 517),)),
    (softmax, "rows", ((1500, 100),)),
]


@pytest.mark.parametrize("case", range(len(LARGE)))
def test_threads_share_large_work_and_do_not_change_a_bit(case: int) -> None:
    build, kind, shapes = LARGE[case]
    graph = region(kind, build, *shapes)
    runner = agree(graph, draw(graph), budget=4e-6)
    assert all(k.parallel for k in runner.program.kernels)


def test_ties_of_a_long_argmax_go_to_the_first() -> None:
    graph = region("reduce", lambda x: make("argmax", x, axis=0), (1_000_003,))
    x = np.zeros(1_000_003, np.float32)
    x[[77_777, 500_000, 999_999]] = 1
    assert compiled(graph)([x], 2)[0] == 77_777
    x[[600_000, 900_000]] = np.nan
    assert compiled(graph)([x], 2)[0] == 600_000
    assert compiled(graph)([np.full(1_000_003, -np.inf, np.float32)], 2)[0] == 0


def test_small_work_stays_on_one_thread() -> None:
    for build, kind, shapes in ((softmax, "rows", ((8, 100),)), (lambda x: make("tanh", x), "map", ((4096,),))):
        assert not any(k.parallel for k in compiled(region(kind, build, *shapes)).program.kernels)


def adam(p: Node, m: Node, v: Node, g: Node) -> tuple[Node, ...]:
    m2 = make("add", scaled(m, 0.9), scaled(g, 0.1))
    v2 = make("add", scaled(v, 0.999), scaled(make("mul", g, g), 0.001))
    step = make("div", m2, make("add", make("sqrt", v2), full(1e-8, v2.tensor)))
    return m2, v2, make("sub", p, scaled(step, 0.01))


@pytest.mark.parametrize("size", [5, 16, 100, 4097])
def test_an_optimiser_update_is_one_kernel_in_place(size: int) -> None:
    plain = region("map", adam, *((size,),) * 4)
    graph = Graph(plain.inputs, plain.outputs, plain.output_names, aliases=((0, 1), (1, 2), (2, 0)))
    p, m, v, g = draw(graph)
    arrays = [p, m, np.abs(v), g]
    made = assemble(graph, host())
    assert len(made.entry.steps) == 1 and made.plan.arena_bytes == 0
    expected = compiled(plain)(arrays)
    for found, e in zip(compiled(graph)(arrays), expected, strict=True):
        assert found.tobytes() == e.tobytes()
    if size <= 16:
        for found, e in zip(interpreted(graph, arrays), expected, strict=True):
            np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-7)


def test_channel_bias_over_rows_and_images() -> None:
    for shape, axis in (((4, 9, 33), 2), ((2, 5, 7, 6), 1), ((3, 16), 0)):
        moved = tuple(n if d == axis else 1 for d, n in enumerate(shape))

        def build(x: Node, b: Node, moved: tuple[int, ...] = moved) -> Node:
            return make("maximum", make("add", x, wide(make("reshape", b, shape=moved), x)), full(0.0, x.tensor))

        graph = region("map", build, shape, (shape[axis],))
        agree(graph, draw(graph))


def test_movement_stays_in_contiguous_vectors() -> None:
    """A slice of a reshape of a pad has no gather, and no select in its loops."""
    x = input_node("x", TensorType(f32, (8, 12, 64)))
    padded = make("pad", x, low=(1, 2, 0), high=(1, 2, 0), interior=(0, 0, 0), value=1.5)
    graph = Graph((x,), (padded,))
    text = compiled(graph).program.texts["loops"]
    assert "select" not in text and "ramp" not in text
    agree(graph, draw(graph))

    def build(a: Node, b: Node) -> Node:
        joined = make("concat", a, b, axis=1)
        return make("reshape", make("slice", joined, starts=(0, 4), stops=(6, 44), steps=(1, 1)), shape=(3, 80))

    graph = region("map", build, (6, 16), (6, 32))
    agree(graph, draw(graph))
    text = compiled(graph).program.texts["loops"]
    assert "//" not in text and "%" not in text.replace("%0", "")


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize(("shape", "perm"), [((2, 20, 33), (0, 2, 1)), ((48, 40), (1, 0)), ((16, 3, 17), (2, 1, 0))])
def test_transposes_are_shuffled_in_registers(target: str, shape: tuple[int, ...], perm: tuple[int, ...]) -> None:
    """Blocks as wide as a register and what is left along both axes; a bias along each, which is read where the blocks lie."""
    turned = tuple(shape[p] for p in perm)

    def build(x: Node, r: Node, row: Node, column: Node) -> Node:
        y = make("add", make("mul", make("transpose", x, perm=perm), r), wide(row, r))
        return make("add", y, make("transpose", wide(column, x), perm=perm))

    graph = region("map", build, shape, turned, turned[-1:], shape[-1:])
    text = agree(graph, draw(graph), target).program.texts["loops"]
    assert "shuffle.low4" in text


def test_pad_between_elements_has_no_remainder_in_its_loops() -> None:
    def build(x: Node) -> Node:
        return make("pad", x, low=(0, 1, 2, 0), high=(0, 2, 1, 0), interior=(0, 1, 2, 0), value=0.0)

    graph = region("map", build, (2, 5, 6, 16))
    runner = agree(graph, draw(graph))
    assert not {"%", "//", "select"} & set(runner.program.texts["loops"].replace("%0", "").split())


def test_concat_of_many_parts_is_cut_at_each() -> None:
    graph = region("map", lambda *xs: make("concat", *xs, axis=0), *((1 + k % 3, 20) for k in range(50)))
    runner = agree(graph, draw(graph))
    assert "select" not in runner.program.texts["loops"]


def matmul(m: int, n: int, k: int) -> Contraction:
    axes = (Axis("m", m, "m"), Axis("n", n, "n"), Axis("k", k, "k"))
    return Contraction(axes, (affine("m"), affine("k")), (affine("k"), affine("n")), (affine("m"), affine("n")))


@pytest.mark.parametrize("shape", [(1, 10, 128), (7, 33, 20), (64, 48, 1)])
def test_contraction_with_bias_activation_and_residual(shape: tuple[int, int, int]) -> None:
    m, n, k = shape

    def build(a: Node, b: Node, bias: Node, r: Node) -> Node:
        y = make("contract", a, b, spec=matmul(m, n, k))
        y = make("add", make("tanh", make("add", y, wide(bias, y))), r)
        return make("reshape", y, shape=(m * n,))

    graph = region("contraction", build, (m, k), (k, n), (n,), (m, n))
    agree(graph, draw(graph), budget=4e-6)


def test_equal_regions_are_emitted_once() -> None:
    x = input_node("x", TensorType(f32, (9, 9)))
    y: Node = x
    for _ in range(4):
        inner = input_node("p0", x.tensor)
        y = fused(Graph((inner,), (make("tanh", make("exp", make("neg", inner))),), name="map"), [y], "map")
    program = compiled(Graph((x,), (y,))).program
    assert len(program.kernels) == 4 and len({k.name for k in program.kernels}) <= 3  # aligned or not, in place or not


def test_integers_and_mixed_widths() -> None:
    a, b = input_node("a", TensorType(i32, (50,))), input_node("b", TensorType(f32, (50,)))
    mixed = make("add", make("cast", a, dtype=f32), b)
    graph = Graph((a, b), (mixed, make("sum", a, axes=(0,))), ("y", "s"))
    rng = np.random.default_rng(0)
    arrays: Sequence[Array] = [rng.integers(-9, 9, 50).astype(np.int32), rng.standard_normal(50).astype(np.float32)]
    agree(graph, arrays)
