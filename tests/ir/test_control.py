"""scan, cond and while_loop in the graph IR: meaning, types, text, verifier, cost, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwright.ir import (
    Graph,
    Node,
    constant,
    full,
    get,
    graph_cost,
    input_node,
    make,
    outputs,
    parse_graph,
    run,
    specialize,
    symbol,
    tensor,
    to_svg,
    verify,
)
from tensorwright.ir.batching import batched
from tensorwright.ir.contraction import Contraction
from tensorwright.ir.differentiate import vjp
from tensorwright.ir.dtypes import f64
from tensorwright.ir.errors import (
    AttributeValueError,
    DTypeError,
    GradientError,
    ParseError,
    ShapeError,
    StepLimitError,
    VerifyError,
)
from tensorwright.ir.lowering import Branch, Loop, While
from tensorwright.ir.op import REGISTRY, Trait
from tensorwright.ir.ops import sample_node

CONTROL = [op for op in REGISTRY.values() if op.has(Trait.CONTROL)]
SAMPLES = [(op, s) for op in CONTROL for s in op.samples()]
IDS = [f"{op.name}-{s.label}" for op, s in SAMPLES]
RNG = np.random.default_rng(7)


def f32(name: str, *shape: Any, dtype: str = "f32") -> Node:
    return input_node(name, tensor(dtype, shape))


def body(*shapes: tuple[Any, ...]) -> list[Node]:
    return [f32(f"p{k}", *s) for k, s in enumerate(shapes)]


def recurrence(batch: int = 2, size: int = 3) -> Graph:
    h, x, w = body((batch, size), (batch, size), (size, size))
    new = make("tanh", make("add", make("matmul", h, w), x))
    return Graph((h, x, w), (new, make("mul", new, new)))


def scanned(graph: Graph, *operands: Node, length: Any, carries: int, sequences: int, **attrs: Any) -> Node:
    return make("scan", *operands, body=graph, length=length, carries=carries, sequences=sequences, **attrs)


def array(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.uniform(-1, 1, shape).astype(np.float32)


# Meaning


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_scan_is_a_loop(steps: int, reverse: bool) -> None:
    h0, x, w = f32("h", 2, 3), f32("x", steps, 2, 3), f32("w", 3, 3)
    node = scanned(recurrence(), h0, x, w, length=steps, carries=1, sequences=1, reverse=reverse)
    arrays = [array(2, 3), array(steps, 2, 3), array(3, 3)]
    last, stack = run(Graph((h0, x, w), outputs(node)), arrays)
    h, expected = arrays[0], np.zeros((steps, 2, 3), np.float32)
    for t in reversed(range(steps)) if reverse else range(steps):
        h = np.tanh(h @ arrays[2] + arrays[1][t])
        expected[t] = h * h
    np.testing.assert_array_equal(last, h)
    np.testing.assert_array_equal(stack, expected)


def test_scan_without_carries_is_a_map_and_without_sequences_counts() -> None:
    (p,) = body((4,))
    x = f32("x", 6, 4)
    square = scanned(Graph((p,), (make("mul", p, p),)), x, length=6, carries=0, sequences=1)
    value = array(6, 4)
    np.testing.assert_array_equal(run(Graph((x,), outputs(square)), [value])[0], value * value)
    doubling = scanned(Graph((p,), (make("add", p, p),)), f32("y", 4), length=5, carries=1, sequences=0)
    np.testing.assert_array_equal(run(Graph((f32("y", 4),), outputs(doubling)), [value[0]])[0], value[0] * 32)


def test_cond_runs_one_branch_only() -> None:
    """The other one would not come to an end."""
    (p,) = body((3,))
    forever = make("while_loop", p, test=Graph((p,), (constant(True),)), body=Graph((p,), (p,)), carries=1)
    pred, x = f32("pred", dtype="bool"), f32("x", 3)
    node = make("cond", pred, x, then=Graph((p,), (make("neg", p),)), orelse=Graph((p,), (get(forever, 0),)))
    graph = Graph((pred, x), outputs(node))
    value = array(3)
    np.testing.assert_array_equal(run(graph, [np.array(True), value])[0], -value)
    with pytest.raises(StepLimitError, match="while_loop"):
        run(graph, [np.array(False), value], limit=50)


def test_while_loop_counts() -> None:
    n, step = body((), ())
    test = Graph((n, step), (make("less", n, constant(10.0, "f32")),))
    a, b = f32("a"), f32("b")
    node = make("while_loop", a, b, test=test, body=Graph((n, step), (make("add", n, step),)), carries=1)
    graph = Graph((a, b), outputs(node))
    assert float(run(graph, [np.float32(0), np.float32(3)])[0]) == 12
    assert float(run(graph, [np.float32(11), np.float32(3)])[0]) == 11
    assert float(run(graph, [np.float32(np.nan), np.float32(3)])[0]) != 0, "a comparison with NaN is false: no run"


def test_f64_reaches_bodies() -> None:
    op = REGISTRY["scan"]
    sample = next(iter(op.samples()))
    graph, arrays = sample_node(op, sample)
    wide = run(graph, [a.astype(np.float64) for a in arrays], f64)
    assert all(r.dtype == np.float64 for r in wide)
    h, w = arrays[0].astype(np.float64), arrays[2].astype(np.float64)
    for x in arrays[1].astype(np.float64):
        h = np.tanh(h @ w + x)
    np.testing.assert_allclose(wide[0], h, rtol=1e-14)
    by_itself = op.reference([a.astype(np.float64) for a in arrays], {**op.attrs, **sample.attrs})
    np.testing.assert_array_equal(by_itself[0], wide[0])


def test_lowerings() -> None:
    forms = {op.name: op.lower(sample_node(op, next(iter(op.samples())))[0].outputs[0].inputs[0]) for op in CONTROL}
    loop, branch, until = forms["scan"], forms["cond"], forms["while_loop"]
    assert isinstance(loop, Loop) and (loop.length, loop.carries, loop.sequences, loop.reverse) == (3, 1, 1, False)
    assert isinstance(branch, Branch) and isinstance(until, While) and until.carries == 1


# Types


def bad_scan(**changes: Any) -> Any:
    def build() -> Node:
        h, x, w = f32("h", 2, 3), f32("x", 5, 2, 3), f32("w", 3, 3)
        attrs = {"body": recurrence(), "length": 5, "carries": 1, "sequences": 1, **changes}
        operands = attrs.pop("operands", (h, x, w))
        return make("scan", *operands, **attrs)

    return build


H, X, W = f32("h", 2, 3), f32("x", 5, 2, 3), f32("w", 3, 3)
(P,) = body((3,))
SCALAR = Graph((P,), (P,))
TOTAL = make("sum", P, axes=(0,), keepdims=True)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (bad_scan(length=4), ShapeError, r"operand 1 is a sequence of 4 steps, but it is f32\[5, 2, 3\]"),
        (bad_scan(length=-1), AttributeValueError, "cannot be negative"),
        (bad_scan(length="N"), AttributeValueError, "length is a dimension"),
        (bad_scan(carries=True), AttributeValueError, "carries is a number"),
        (bad_scan(carries=4), ShapeError, "4 carries and 1 sequences, but 3 operands"),
        (bad_scan(reverse=1), AttributeValueError, "reverse is true or false"),
        (bad_scan(save="all"), AttributeValueError, "save is one of costly, inputs"),
        (bad_scan(body=None), AttributeValueError, "body is a Graph, not NoneType"),
        (bad_scan(operands=(H, X)), ShapeError, "2 values for the 3 inputs of body"),
        (bad_scan(operands=(W, X, W)), ShapeError, r"operand 0 \(carry 0\) is f32\[3, 3\], input p0 of body takes f32\[2, 3\]"),
        (bad_scan(operands=(H, X, H)), ShapeError, r"operand 2 \(invariant 0\)"),
        (bad_scan(body=Graph((H, *recurrence().inputs[1:]), (H,))), AttributeValueError, "named p0 of role data"),
        (
            lambda: scanned(Graph((P,), (TOTAL,)), f32("y", 3), length=2, carries=1, sequences=0),
            ShapeError,
            r"carry 0 is f32\[3\] and the body makes it f32\[1\]",
        ),
        (lambda: scanned(Graph((P,), ()), f32("y", 4, 3), length=4, carries=0, sequences=1), ShapeError, "neither carries nor"),
        (lambda: make("cond", f32("q", 1, dtype="bool"), then=SCALAR, orelse=SCALAR), ShapeError, "is a scalar"),
        (lambda: make("cond", f32("q"), f32("y", 3), then=SCALAR, orelse=SCALAR), DTypeError, "is bool"),
        (
            lambda: make("cond", f32("q", dtype="bool"), f32("y", 3), then=SCALAR, orelse=Graph((P,), (TOTAL,))),
            ShapeError,
            r"output 0 is f32\[3\] in then and f32\[1\] in orelse",
        ),
        (
            lambda: make("while_loop", f32("y", 3), test=SCALAR, body=SCALAR, carries=1),
            ShapeError,
            r"the test gives one bool scalar, not f32\[3\]",
        ),
        (lambda: make("while_loop", f32("y", 3), test=SCALAR, body=SCALAR, carries=0), ShapeError, "at least one carry"),
    ],
)
def test_errors_name_the_operand(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


# Text, verifier, cost


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=IDS)
def test_samples_verify_print_and_parse(op: Any, sample: Any) -> None:
    graph, _ = sample_node(op, sample)
    verify(graph)
    assert parse_graph(str(graph)) == graph
    assert graph_cost(graph).flops >= 0
    assert to_svg(graph).startswith("<svg")


def nested(steps: Any = 4) -> Graph:
    """A scan whose body has a scan: cumulative products of rows, summed."""
    c, x = body((), (3,))
    inner_c, inner_x = body((), ())
    inner = Graph((inner_c, inner_x), (make("tanh", make("mul", inner_c, inner_x)),))
    product = get(scanned(inner, constant(1.0, "f32"), x, length=3, carries=1, sequences=1), 0)
    outer = Graph((c, x), (make("add", c, product), product))
    start, rows = f32("start"), f32("rows", steps, 3)
    return Graph((start, rows), outputs(scanned(outer, start, rows, length=steps, carries=1, sequences=1)))


def test_nested_scans_with_a_symbolic_length() -> None:
    graph = nested(symbol("N"))
    verify(graph)
    assert parse_graph(str(graph)) == graph
    rows = array(4, 3)
    expected = []
    for row in rows:
        value = np.float32(1)
        for x in row:
            value = np.tanh(value * x)
        expected.append(value)
    results = run(graph, [np.float32(0.5), rows])
    np.testing.assert_allclose(results[1], expected, rtol=1e-6)
    np.testing.assert_allclose(results[0], 0.5 + np.sum(expected), rtol=1e-6)
    assert specialize(graph, {"N": 4}) == nested(4)


def test_bodies_may_use_sizes_of_the_graph_around_them() -> None:
    """No input of the body has N alone; it is known from outside."""
    size = symbol("N")
    (p,) = body((size * 2,))
    x, y = f32("x", size), f32("y", 3, size * 2)
    inner = Graph((p,), (make("add", p, make("cast", make("iota", shape=(size * 2,), axis=0, dtype=f64), dtype=p.dtype)),))
    graph = Graph((x, y), outputs(scanned(inner, y, length=3, carries=0, sequences=1)))
    verify(graph)
    assert run(graph, [array(2), array(3, 4)])[0].shape == (3, 4)


def test_the_verifier_descends_into_bodies() -> None:
    h, x, w = body((2, 3), (2, 3), (3, 3))
    wrong = Node(REGISTRY["neg"], (w,), {}, tensor("f32", (2, 3)))
    node = scanned(Graph((h, x, w), (wrong,)), H, X, W, length=5, carries=1, sequences=1)
    with pytest.raises(VerifyError, match=r"neg is recorded as f32\[2, 3\]"):
        verify(Graph((H, X, W), outputs(node)))


def test_text_of_a_scan_with_wrong_types_is_refused() -> None:
    text = str(Graph((H, X, W), outputs(scanned(recurrence(), H, X, W, length=5, carries=1, sequences=1))))
    with pytest.raises(ParseError, match="sequence of 4 steps"):
        parse_graph(text.replace("length = 5", "length = 4"))
    with pytest.raises(ParseError):
        parse_graph(text.replace("carries = 1", "carries = false"))


def test_a_loop_costs_its_steps() -> None:
    node = scanned(recurrence(), H, X, W, length=5, carries=1, sequences=1)
    once = graph_cost(recurrence())
    cost = graph_cost(Graph((H, X, W), outputs(node)))
    assert cost.flops == 5 * once.flops and cost.read == 5 * once.read
    assert graph_cost(Graph((H, X, W), outputs(node))).flops == 5 * (2 * 2 * 3 * 3 + 3 * 2 * 3)


# Gradients


def gradients(graph: Graph, prefix: str = "seed") -> tuple[Graph, list[Node]]:
    """The cotangents of the float inputs, given those of the outputs as more inputs."""
    seeds = [input_node(f"{prefix}{k}", o.tensor) for k, o in enumerate(graph.outputs)]
    xs = [i for i in graph.inputs if i.dtype.is_float]
    found = vjp(graph.outputs, xs, [s if s.dtype.is_float else None for s in seeds])
    results = tuple(full(0, x.tensor) if p is None else p for x, p in zip(xs, found, strict=True))
    return Graph((*graph.inputs, *seeds), results), xs


def check(graph: Graph, arrays: list[Any], prefix: str = "seed") -> tuple[Graph, list[Any]]:
    """Central differences in f64 agree; returns the gradient's graph with arguments for it."""
    made, xs = gradients(graph, prefix)
    verify(made)
    assert parse_graph(str(made)) == made
    wide = [a.astype(np.float64) if np.asarray(a).dtype.kind == "f" else a for a in arrays]
    weights = [
        RNG.normal(size=o.tensor.static_shape) if o.dtype.is_float else np.zeros(o.tensor.static_shape, o.dtype.numpy)
        for o in graph.outputs
    ]

    def loss(values: list[Any]) -> float:
        return sum(float((w * y).sum()) for w, y in zip(weights, run(graph, values, f64), strict=True) if y.dtype.kind == "f")

    found = run(made, [*wide, *weights], f64)
    for x, dx in zip(xs, found, strict=True):
        k, step = graph.inputs.index(x), 1e-6
        direction = RNG.normal(size=dx.shape)
        ends = [loss([*wide[:k], wide[k] + sign * step * direction, *wide[k + 1 :]]) for sign in (1, -1)]
        expected, value = (ends[0] - ends[1]) / (2 * step), float((dx * direction).sum())
        size = max(1.0, float(np.sqrt((dx**2).sum())))  # what the difference of two rounded values is measured against
        assert abs(value - expected) < 1e-6 * size, f"{x.attrs['name']}: {value} is not {expected}"
    narrow = [np.asarray(w, o.dtype.numpy) for w, o in zip(weights, graph.outputs, strict=True)]
    return made, [*arrays, *narrow]


DIFFERENTIABLE = [
    (op, sample, change)
    for op, sample in SAMPLES
    if sample.gradient
    for change in ({}, {"save": "inputs"})[: 2 if "save" in op.attrs else 1]
]


@pytest.mark.parametrize(
    ("op", "sample", "change"), DIFFERENTIABLE, ids=[f"{o.name}-{s.label}-{c}" for o, s, c in DIFFERENTIABLE]
)
def test_first_and_second_derivatives_of_samples(op: Any, sample: Any, change: dict[str, Any]) -> None:
    graph, arrays = sample_node(op, sample)
    graph = Graph(graph.inputs, outputs(graph.outputs[0].inputs[0].replace(**change)))
    check(*check(graph, arrays), prefix="second")


def lstm(batch: int, size: int) -> Graph:
    h, c, x, w, b = body((batch, size), (batch, size), (batch, 4 * size), (4 * size, size), (4 * size,))
    g = make("add", make("matmul", h, make("transpose", w, perm=(1, 0))), x)
    g = make("add", g, make("broadcast_to", make("reshape", b, shape=(1, 4 * size)), shape=(batch, 4 * size)))
    i, f, n, o = (make("slice", g, starts=(0, k * size), stops=(batch, (k + 1) * size), steps=(1, 1)) for k in range(4))
    c2 = make("add", make("mul", make("sigmoid", f), c), make("mul", make("sigmoid", i), make("tanh", n)))
    h2 = make("mul", make("sigmoid", o), make("tanh", c2))
    return Graph((h, c, x, w, b), (h2, c2, h2))


def lstm_scan(steps: int = 4, batch: int = 2, size: int = 3, **attrs: Any) -> Graph:
    inputs = [f32("h", batch, size), f32("c", batch, size), f32("x", steps, batch, 4 * size), f32("w", 4 * size, size)]
    inputs.append(f32("b", 4 * size))
    node = scanned(lstm(batch, size), *inputs, length=steps, carries=2, sequences=1, **attrs)
    return Graph(tuple(inputs), outputs(node))


def lstm_arrays(steps: int = 4, batch: int = 2, size: int = 3) -> list[Any]:
    shapes = [(batch, size), (batch, size), (steps, batch, 4 * size), (4 * size, size), (4 * size,)]
    return [array(*s) for s in shapes]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("save", ["costly", "inputs"])
def test_gradient_of_an_lstm(reverse: bool, save: str) -> None:
    check(lstm_scan(reverse=reverse, save=save), lstm_arrays())


def scans(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op.has(Trait.CONTROL)]


def products(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op.has(Trait.CONTRACTION)]


def test_weight_gradients_are_one_product_over_all_steps() -> None:
    made, _ = gradients(lstm_scan())
    (outside,) = products(made)
    spec: Contraction = outside.attrs["spec"]
    assert {x.extent for x in spec.of_kind("k")} == {4, 2}, "summed over steps and batch"
    backward = next(n for n in scans(made) if n.attrs["reverse"])
    assert len(products(backward.attrs["body"])) == 1, "the recurrent product alone is left in the loop"
    assert backward.attrs["carries"] == 2, "no cotangent of a weight is carried"
    slices = [n for n in backward.attrs["body"].nodes() if n.op.name in ("pad", "tanh", "sigmoid")]
    assert not slices, "gates stand side by side, and nothing costly is computed again"


def test_save_inputs_keeps_carries_only() -> None:
    made, _ = gradients(lstm_scan(save="inputs"))
    forward, backward = sorted(scans(made), key=lambda n: n.attrs["reverse"])[-2:]
    extra = forward.attrs["body"].outputs[3:]
    assert set(extra) <= set(forward.attrs["body"].inputs[:2])
    assert backward.attrs["carries"] == 4, "the cotangents of w and b are carried"
    assert not products(made)


def test_gradient_of_a_map_is_a_map() -> None:
    x, w = body((3, 4), (4, 4))
    graph = Graph((x, w), (make("tanh", make("matmul", x, w)),))
    a, b = f32("a", 5, 3, 4), f32("b", 4, 4)
    whole = Graph((a, b), outputs(scanned(graph, a, b, length=5, carries=0, sequences=1)))
    made, _ = check(whole, [array(5, 3, 4), array(4, 4)])
    assert all(n.attrs["carries"] == 0 for n in scans(made))


def test_gradient_through_nested_scans() -> None:
    check(*check(nested(), [np.float32(0.3), array(4, 3)]), prefix="second")


def test_gradient_through_a_carry_that_only_later_steps_read() -> None:
    """b[t+1] = a[t], a[t+1] = x[t]: the cotangent of a comes to be only when that of b has gone one step back."""
    a, b, x = body((3,), (3,), (3,))
    graph = Graph((a, b, x), (make("mul", x, x), a, make("sin", b)))
    inputs = (f32("a", 3), f32("b", 3), f32("x", 5, 3))
    node = scanned(graph, *inputs, length=5, carries=2, sequences=1)
    check(Graph(inputs, (get(node, 2),)), [array(3), array(3), array(5, 3)])
    check(Graph(inputs, (get(node, 1),)), [array(3), array(3), array(5, 3)])


def test_gradient_with_integer_carries_and_invariants_used_elementwise() -> None:
    n, h, x, w = f32("p0", dtype="i32"), *body((), (3,), (3,), (3,))[1:]
    count = make("broadcast_to", make("cast", n, dtype=h.dtype), shape=(3,))
    new = make("tanh", make("add", make("mul", h, w), make("mul", x, count)))
    graph = Graph((n, h, x, w), (make("add", n, constant(1, "i32")), new, make("add", new, w)))
    inputs = (f32("n", dtype="i32"), f32("h", 3), f32("x", 4, 3), f32("w", 3))
    node = scanned(graph, *inputs, length=4, carries=2, sequences=1)
    check(Graph(inputs, outputs(node)), [np.int32(1), array(3), array(4, 3), array(3)])


def test_a_scan_through_which_nothing_flows_has_no_gradient_scan() -> None:
    (p,) = body((3,))
    x = f32("x", 4, 3)
    node = scanned(Graph((p,), (make("stop_gradient", p),)), x, length=4, carries=0, sequences=1)
    made, _ = gradients(Graph((x,), outputs(node)))
    assert not scans(made)


def test_while_loop_has_no_gradient_and_says_what_to_use() -> None:
    op = REGISTRY["while_loop"]
    graph, _ = sample_node(op, next(iter(op.samples())))
    with pytest.raises(GradientError, match=r"while_loop .* has no gradient .*use scan"):
        gradients(graph)


def test_one_branch_may_not_depend_on_an_operand() -> None:
    x, y = body((3,), (3,))
    pred, a, b = f32("pred", dtype="bool"), f32("a", 3), f32("b", 3)
    node = make("cond", pred, a, b, then=Graph((x, y), (make("sin", x),)), orelse=Graph((x, y), (make("mul", y, y),)))
    for value in (True, False):
        check(Graph((pred, a, b), outputs(node)), [np.array(value), array(3), array(3)])


# One op for all steps


def test_batched_ops_are_the_op_for_every_step() -> None:
    x, y, w = f32("x", 2, 3), f32("y", 2, 3), f32("w", 3, 4)
    cases = [
        make("add", x, y),
        make("tanh", x),
        make("matmul", x, w),
        make("transpose", x, perm=(1, 0)),
        make("reshape", x, shape=(3, 2)),
        make("broadcast_to", x, shape=(5, 2, 3)),
        make("slice", x, starts=(0, 1), stops=(2, 3), steps=(1, 1)),
        make("sum", x, axes=(1,), keepdims=False),
        make("cast", x, dtype=f64),
    ]
    for node in cases:
        varying = [i for i in node.inputs if i is not w]
        stacks = {i: f32(f"s{k}", 6, *i.shape) for k, i in enumerate(varying)}
        whole = batched(node, [(stacks.get(i, i), i in stacks) for i in node.inputs], 6)
        assert whole is not None, node
        arrays = {s: array(6, *i.shape) for i, s in stacks.items()}
        weight = array(3, 4)
        arguments = (*stacks.values(), *([w] if w in node.inputs else []))
        (found,) = run(Graph(arguments, (whole,)), [arrays.get(a, weight) for a in arguments])
        for t in range(6):
            single = [arrays[stacks[i]][t] if i in stacks else weight for i in dict.fromkeys(node.inputs)]
            (expected,) = run(Graph(tuple(dict.fromkeys(node.inputs)), (node,)), single)
            np.testing.assert_allclose(found[t], expected, rtol=1e-6)


def test_a_lookup_for_all_steps() -> None:
    table, index = f32("table", 7, 3), f32("index", 2, dtype="i64")
    node, many = make("gather", table, index, axis=0), f32("many", 6, 2, dtype="i64")
    whole = batched(node, [(table, False), (many, True)], 6)
    assert whole is not None
    values, at = array(7, 3), RNG.integers(0, 7, (6, 2))
    np.testing.assert_array_equal(run(Graph((table, many), (whole,)), [values, at])[0], values[at])
    assert batched(node, [(f32("tables", 6, 7, 3), True), (many, True)], 6) is None


def test_what_has_no_rule_for_all_steps_says_so() -> None:
    x = f32("x", 2, 3)
    for node in (make("reverse", x, axes=(0,)), make("max", x, axes=(0,), keepdims=False)):
        assert batched(node, [(f32("s", 6, 2, 3), True)], 6) is None
