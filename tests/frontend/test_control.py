"""tw.scan, tw.cond and tw.while_loop: nests, captured values, random draws, gradients, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import trace_model
from tensorwright.frontend.training import training_step
from tensorwright.ir.errors import AttributeValueError, DTypeError, GradientError, ShapeError, TraceError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import Trait

from .support import expand, numeric_gradient, run

RNG = np.random.default_rng(17)


def array(*shape: int) -> Any:
    return RNG.uniform(-1, 1, shape).astype(np.float32)


def loops(graph: Graph) -> list[Any]:
    return [n for n in graph.nodes() if n.op.has(Trait.CONTROL)]


# scan


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_carries_and_stacks_nests(reverse: bool) -> None:
    def fn(init: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            total = carry["sum"] + x["a"] * x["b"][0]
            return {"sum": total, "count": carry["count"] + 1}, (total, [x["a"]])

        return tw.scan(step, {"sum": init, "count": 0}, xs, reverse=reverse)

    a, b, init = array(5, 3), array(5, 3), array(3)
    carry, (totals, (same,)) = run(fn, init, {"a": a, "b": (b,)})
    order = range(5)[::-1] if reverse else range(5)
    expected, total = np.zeros((5, 3), np.float32), init
    for t in order:
        total = total + a[t] * b[t]
        expected[t] = total
    np.testing.assert_allclose(carry["sum"], total, rtol=1e-6)
    assert carry["count"] == 5
    np.testing.assert_allclose(totals, expected, rtol=1e-6)
    np.testing.assert_array_equal(same, a)


def test_scan_without_xs_and_without_carry() -> None:
    doubled, nothing = run(lambda x: tw.scan(lambda c, _: (c * 2.0, None), x, length=6), array(2) * 0 + 1)
    assert doubled.tolist() == [64, 64] and nothing is None
    none, squares = run(lambda x: tw.scan(lambda c, v: (c, v * v), None, x), np.arange(5.0, dtype=np.float32))
    assert none is None and squares.tolist() == [0, 1, 4, 9, 16]


def test_zero_steps_give_the_first_carry_and_an_empty_stack() -> None:
    carry, stack = run(lambda c, x: tw.scan(lambda c, v: (c + v, c * v), c, x), array(3), array(0, 3))
    assert carry.shape == (3,) and stack.shape == (0, 3)


def test_tensors_and_parameters_around_the_loop_become_operands() -> None:
    layer = nn.Linear(3, 3, seed=0)

    def fn(c: Any, x: Any, scale: Any) -> Any:
        twice = scale * 2.0
        return tw.scan(lambda h, v: (tw.tanh(layer(h) + v * twice), h), c, x)

    c, x, scale = array(2, 3), array(4, 2, 3), array(3)
    last, before = run(fn, c, x, scale)
    h, expected = c, []
    for v in x:
        expected.append(h)
        h = np.tanh(h @ layer.weight.data.T + layer.bias.data + v * scale * 2)
    np.testing.assert_allclose(last, h, rtol=1e-5)
    np.testing.assert_allclose(before, expected, rtol=1e-5, atol=1e-7)
    (node,) = loops(trace_model(fn, c, x, scale).graph)
    assert {i.attrs["name"] for i in node.inputs if "name" in i.attrs} == {"c", "x", "layer.weight", "layer.bias"}
    assert sum(1 for n in node.attrs["body"].nodes() if n.op.name == "constant") == 0, "what does not change is computed before"


def test_a_symbolic_number_of_steps() -> None:
    exe = tw.compile(lambda x: tw.scan(lambda c, v: (c + v, c), tw.zeros(3), x)[0], tw.spec("N", 3), cache=False)
    for steps in (1, 4):
        x = array(steps, 3)
        np.testing.assert_allclose(exe(x), x.sum(axis=0), rtol=1e-5, atol=1e-6)


def test_nested_scans_capture_from_both_levels() -> None:
    def fn(x: Any, w: Any) -> Any:
        def row(total: Any, r: Any) -> Any:
            inner, _ = tw.scan(lambda c, v: (c * v + total + w, None), 1.0, r)
            return tw.tanh(total + inner), inner

        return tw.scan(row, 0.5, x)

    x, w = array(3, 4), np.float32(0.3)
    total, stack = run(fn, x, w)
    expected, t = [], np.float32(0.5)
    for r in x:
        c = np.float32(1)
        for v in r:
            c = c * v + t + w
        expected.append(c)
        t = np.tanh(t + c)
    np.testing.assert_allclose(stack, expected, rtol=1e-5)
    np.testing.assert_allclose(total, t, rtol=1e-5)


def test_gradients_through_scan_by_every_kind_of_operand() -> None:
    c, x, w = array(3), array(4, 3), array(3, 3)

    def loss(c: Any, x: Any, w: Any) -> Any:
        last, stack = tw.scan(lambda h, v: (tw.tanh(h @ w + v), h * v), c, x)
        return (last * last).sum() + stack.sum()

    def reference(c: Any, x: Any, w: Any) -> float:
        h, total = c, 0.0
        for v in x:
            total += (h * v).sum()
            h = np.tanh(h @ w + v)
        return float((h * h).sum() + total)

    found = run(tw.grad(loss, (0, 1, 2)), c, x, w)
    values = [c, x, w]
    for k, g in enumerate(found):

        def at(v: Any, k: int = k) -> float:
            return reference(*[a if j == k else b for j, (a, b) in enumerate(zip([v] * 3, values, strict=True))])

        np.testing.assert_allclose(g, numeric_gradient(at, values[k]), rtol=2e-4, atol=1e-5)


def test_grad_inside_the_function_of_a_scan() -> None:
    def fn(w: Any, xs: Any) -> Any:
        def step(w: Any, x: Any) -> Any:
            value, g = tw.value_and_grad(lambda w: ((w * x - 1.0) ** 2).sum())(w)
            return w - 0.1 * g, value

        return tw.scan(step, w, xs)

    w, xs = array(3), array(5, 3)
    last, losses = run(fn, w, xs)
    v = w.astype(np.float64)
    for k, x in enumerate(xs):
        np.testing.assert_allclose(losses[k], ((v * x - 1) ** 2).sum(), rtol=1e-5)
        v = v - 0.1 * 2 * x * (v * x - 1)
    np.testing.assert_allclose(last, v, rtol=1e-5)


def test_save_inputs_gives_the_same_gradient() -> None:
    def gradient(save: str) -> Any:
        def loss(w: Any, x: Any) -> Any:
            return tw.scan(lambda h, v: (tw.tanh(h @ w + v), None), tw.zeros((2, 3)), x, save=save)[0].sum()

        return tw.grad(loss)

    w, x = array(3, 3), array(6, 2, 3)
    np.testing.assert_allclose(run(gradient("inputs"), w, x), run(gradient("costly"), w, x), rtol=1e-5, atol=1e-6)


# Random draws and state


def test_draws_differ_from_step_to_step_and_follow_the_key() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(40, 40, seed=1)

        def __call__(self, x: Any) -> Any:
            return tw.scan(lambda c, v: (c, tw.dropout(self.layer(v), 0.5)), 0.0, x)[1]

    traced = training_step(Noisy(), tw.losses.mse, tw.optim.SGD(0.1), tw.spec(6, 2, 40), tw.spec(6, 2, 40))
    forward = [n for n in loops(expand(traced.graph)) if not n.attrs["reverse"]]
    assert {n.attrs["sequences"] for n in forward} == {2}, "a key for each step goes in beside x"


def test_draws_from_keys_of_steps() -> None:
    def fn(key: Any) -> Any:
        from tensorwright.frontend.context import current

        current().key = key.node
        return tw.scan(lambda c, _: (c, tw.random.uniform((50,))), None, length=4)[1]

    first, again, other = (run(fn, np.uint64(k)) for k in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    rows = np.concatenate([first, other])
    assert len({tuple(r) for r in rows}) == 8 and 0.35 < rows.mean() < 0.65


def test_while_loop_refuses_random_draws() -> None:
    def fn(key: Any) -> Any:
        from tensorwright.frontend.context import current

        current().key = key.node
        return tw.while_loop(lambda x: x < 3.0, lambda x: x + tw.random.uniform(()), 0.0)

    with pytest.raises(TraceError, match=r"random draw in while_loop would be the same in each step"):
        run(fn, np.uint64(3))


def test_buffers_do_not_change_inside() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            self.norm = nn.BatchNorm1d(3)

        def __call__(self, x: Any) -> Any:
            return tw.scan(lambda c, v: (c, self.norm(v)), 0.0, x)[1]

    with pytest.raises(TraceError, match=r"changes the buffer 'norm\.running_mean'.*carry the value"):
        training_step(Normed(), tw.losses.mse, tw.optim.SGD(0.1), tw.spec(4, 2, 3), tw.spec(4, 2, 3))


# cond and while_loop


def test_cond_and_its_gradient() -> None:
    w = np.float32(3.0)

    def fn(flag: Any, x: Any, w: Any) -> Any:
        return tw.cond(flag, lambda a: {"y": tw.sin(a) * w}, lambda a: {"y": a * a}, x)

    x = array(3)
    np.testing.assert_allclose(run(fn, np.bool_(True), x, w)["y"], np.sin(x) * 3, rtol=1e-6)
    np.testing.assert_allclose(run(fn, np.bool_(False), x, w)["y"], x * x, rtol=1e-6)
    grad = lambda flag, x, w: tw.grad(lambda x, w: fn(flag, x, w)["y"].sum(), (0, 1))(x, w)  # noqa: E731
    dx, dw = run(grad, np.bool_(True), x, w)
    np.testing.assert_allclose(dx, np.cos(x) * 3, rtol=1e-6)
    np.testing.assert_allclose(dw, np.sin(x).sum(), rtol=1e-6)
    dx, dw = run(grad, np.bool_(False), x, w)
    np.testing.assert_allclose(dx, 2 * x, rtol=1e-6)
    assert dw == 0


def test_cond_computes_inside_what_its_functions_compute() -> None:
    """Also what depends on captured values alone, and what both functions compute: the branch not taken costs nothing."""
    graph = trace_model(
        lambda p, x: tw.cond(p, lambda: tw.exp(x) + 1.0, lambda: tw.exp(x) - 1.0), tw.spec(dtype="bool"), tw.spec(3)
    ).graph
    (node,) = loops(graph)
    assert not any(n.op.name == "exp" for n in graph.nodes())
    assert all(any(n.op.name == "exp" for n in node.attrs[k].nodes()) for k in ("then", "orelse"))


def test_a_python_bool_chooses_at_once() -> None:
    graph = trace_model(lambda x: tw.cond(True, tw.sin, tw.cos, x), tw.spec(3)).graph
    assert not loops(graph)


def test_while_loop_runs_until_its_test_fails() -> None:
    def collatz(n: Any) -> Any:
        def step(s: Any) -> Any:
            m, k = s
            return tw.where(m % 2 == 0, m // 2, 3 * m + 1), k + 1

        return tw.while_loop(lambda s: s[0] != 1, step, (n, 0))[1]

    assert int(run(collatz, np.int64(27))) == 111
    assert int(run(collatz, np.int64(1))) == 0


def test_while_loop_has_no_gradient() -> None:
    def fn(x: Any) -> Any:
        return tw.while_loop(lambda v: v.sum() < 10.0, lambda v: v * 2.0, x).sum()

    with pytest.raises(GradientError, match="use scan"):
        run(tw.grad(fn), array(3))


# Compiled


def test_compiled_loops_and_branches() -> None:
    def fn(x: Any, flag: Any) -> Any:
        last, stack = tw.scan(lambda c, v: (tw.tanh(c + v), c * v), tw.zeros(5), x)
        chosen = tw.cond(flag, lambda: last * 2.0, lambda: last - 1.0)
        steps = tw.while_loop(lambda n: n < 7, lambda n: n + 3, 0)
        return stack, chosen, steps

    exe = tw.compile(fn, tw.spec(6, 5), tw.spec(dtype="bool"), cache=False)
    for flag in (True, False):
        x = array(6, 5)
        for found, expected in zip(exe(x, np.bool_(flag)), run(fn, x, np.bool_(flag)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (lambda x: tw.scan(lambda c, v: (c + v, c), {"h": [0.0]}, x), TraceError, "unsupported|is .* at first"),
        (lambda x: tw.scan(lambda c, v: ({"h": c["h"].astype("f64")}, c), {"h": x[0]}, x), DTypeError,
         r"carry\.h is f32\[3\] at first, and a step makes it f64\[3\]; cast one of them"),
        (lambda x: tw.scan(lambda c, v: (c + v, c), 0.0, x), ShapeError,
         r"carry is f32\[\] at first, and a step makes it f32\[3\]; broadcast the first value"),
        (lambda x: tw.scan(lambda c, v: c + v, x[0], x), TraceError, "returns a pair"),
        (lambda x: tw.scan(lambda c, v: ([c], v), x[0], x), TraceError, "the carry is .* at first, and the function makes it"),
        (lambda x: tw.scan(lambda c, v: (c, v), 0.0, (x, x[1:])), ShapeError, r"xs\.0 has 4, xs\.1 has 3"),
        (lambda x: tw.scan(lambda c, v: (c, v), 0.0, x.sum()), ShapeError, "xs is a scalar"),
        (lambda x: tw.scan(lambda c, v: (c, v), 0.0, x, length=3), ShapeError, "length=3, but xs has 4 steps"),
        (lambda x: tw.scan(lambda c, v: (c, None), x), AttributeValueError, "needs a length"),
        (lambda x: tw.scan(lambda c, v: (c, None), x, length=-1), AttributeValueError, "cannot be negative"),
        (lambda x: tw.scan(lambda c, v: (c, None), x, length=2.5), AttributeValueError, "is an int"),
        (lambda x: tw.scan(lambda c, v: (None, None), None, x), TraceError, "computes nothing"),
        (lambda x: tw.scan(lambda c, v: (c, v), 0.0, x, save="none"), AttributeValueError, "'costly' or 'inputs'"),
        (lambda x: tw.cond(x, tw.sin, tw.cos, x), ShapeError, "bool scalar"),
        (lambda x: tw.cond(x.sum(), tw.sin, tw.cos, x), DTypeError, "bool scalar"),
        (lambda x: tw.cond(x.sum() > 0, lambda v: v, lambda v: (v, v), x), TraceError, "then returns"),
        (lambda x: tw.cond(x.sum() > 0, lambda v: v, lambda v: v.sum(), x), ShapeError,
         r"result is f32\[4, 3\] in then and f32\[\] in orelse"),
        (lambda x: tw.while_loop(lambda c: c, lambda c: c, x), ShapeError, "bool scalar"),
        (lambda x: tw.while_loop(lambda c: c.sum() < 1, lambda c: c.sum(), x), ShapeError, "a step makes it"),
        (lambda x: tw.while_loop(lambda c: True, lambda c: c, None), TraceError, "holds no Tensor"),
    ],
)  # fmt: skip
def test_errors_say_what_and_where(fn: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as e:
        run(fn, array(4, 3))
    assert "test_control.py" in str(e.value)


def test_a_value_of_a_step_kept_for_later_is_refused() -> None:
    kept: list[Any] = []

    def fn(x: Any) -> Any:
        def step(c: Any, v: Any) -> Any:
            kept.append(v)
            return c + v, None

        return tw.scan(step, tw.zeros(3), x)[0] + kept[0]

    with pytest.raises(TraceError, match=r"xs in scan \d.*kept in a variable"):
        run(fn, array(4, 3))


def test_outside_a_trace() -> None:
    with pytest.raises(TraceError, match="outside a trace"):
        tw.scan(lambda c, v: (c, v), 0.0, array(3))
