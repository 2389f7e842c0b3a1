"""The whole path, from a function or Module to results: compiled == interpreter in f64, on what users build."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.driver import build
from tensorwright.frontend.training import training_step
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import f64
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run as interpret
from tensorwright.ir.op import make
from tensorwright.ir.types import tensor
from tensorwright.passes.gradient import Gradient
from tensorwright.passes.manager import run_pipeline
from tensorwright.runtime.executable import Executable

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def no_cache() -> Any:
    """What is tested is the compiler, not the cache of what it made before."""
    with tw.config(cache="off"):
        yield


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def meaning(exe: Executable, *arrays: Array) -> list[Array]:
    """What the traced graph means for these arguments, with the weights that are bound: the interpreter in f64."""
    given = exe.parameters | dict(zip((n for n, _ in exe.arguments), arrays, strict=True))
    return interpret(with_gradients(exe.graph), given, f64)


def with_gradients(graph: Graph) -> Graph:
    """The graph with its gradient nodes expanded: they have no meaning of their own."""
    return run_pipeline(graph, (Gradient(),))


def leaves(result: Any) -> list[Array]:
    if isinstance(result, dict):
        return [x for k in sorted(result) for x in leaves(result[k])]
    return [x for r in result for x in leaves(r)] if isinstance(result, (tuple, list)) else [result]


def close(found: Any, expected: list[Array], budget: float) -> None:
    """max|found - expected| / max|expected| of each output is within the budget; integers are equal."""
    found = leaves(found)
    assert len(found) == len(expected)
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape
        if x.dtype.kind in "biu":
            assert np.array_equal(x, y), f"output {k}"
        elif y.size:
            error = np.abs(x - y).max() / (np.abs(y).max() or 1.0)
            assert error <= budget, f"output {k}: relative error {error:.1e}"


def agrees(model: Any, *arrays: Array, specs: tuple[Any, ...] = (), budget: float = 3e-6) -> Executable:
    """Compiles a model for these arguments (or specs), runs it and compares."""
    exe = tw.compile(model, *(specs or arrays))
    close(exe(*arrays), meaning(exe, *arrays), budget)
    return exe


# --- models -------------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    tw.seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10), nn.Softmax())


def cnn() -> nn.Module:
    tw.seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    for name, buffer in net.named_buffers():
        if buffer.data.dtype == np.float32:  # statistics as after training
            spread = rng.uniform(0.5, 2.0, buffer.data.shape) if "var" in name else rng.normal(size=buffer.data.shape)
            buffer.data = spread.astype(np.float32)
    return net


def transformer() -> nn.Module:
    tw.seed(4)
    return nn.TransformerEncoderLayer(32, 4, 64)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    # the budgets: of one op (3e-6 at most) times the depth that errors add up over
    "mlp": (mlp, (5, 20), 1e-5),
    "cnn": (cnn, (2, 1, 12, 12), 1e-5),
    "transformer": (transformer, (2, 9, 32), 1e-5),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    made, shape, budget = MODELS[name]
    x = draw(*shape)
    model = made()
    exe = agrees(model, x, budget=budget)
    with tw.config(checked=True):
        checked = tw.compile(model, tw.spec(*shape))
    assert checked(x).tobytes() == exe(x).tobytes(), "checks that find nothing change nothing"
    one = tw.compile(model, tw.spec(*shape), threads=1)
    assert one(x).tobytes() == exe(x).tobytes()


def test_saved_and_loaded_gives_the_same_bits(tmp_path: Any) -> None:
    x = draw(2, 1, 12, 12)
    exe = tw.compile(cnn(), tw.spec(2, 1, 12, 12))
    exe.save(str(tmp_path / "net.tw"))
    assert tw.load(tmp_path / "net.tw")(x).tobytes() == exe(x).tobytes()


def test_validated_while_compiling() -> None:
    x = draw(3, 20)
    model = mlp()
    assert tw.compile(model, tw.spec(3, 20), validate=True)(x).tobytes() == tw.compile(model, tw.spec(3, 20))(x).tobytes()


# --- training -----------------------------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: Any, x: Array, target: Array, count: int, budget: float) -> list[float]:
    """Steps of a compiled training step, each compared with the interpreter in f64 from the same state; the losses."""
    step = training_step(
        model, tw.losses.cross_entropy, optimizer, tw.spec(*x.shape), tw.spec(*target.shape, dtype="i64"), seed=5
    )
    exe, expanded = build(step.graph, step.initial_state(), purpose="training"), with_gradients(step.graph)
    rate = np.array(0.05, np.float32)
    state = step.initial_state()
    found = []
    for _ in range(count):
        expected = interpret(expanded, state | {"learning_rate": rate} | dict(zip(step.batch, (x, target), strict=True)), f64)
        result = exe(rate, x, target)
        state = {n: a.copy() for n, a in exe.parameters.items()}
        names = list(step.graph.output_names[: step.updated])
        close([*(state[n] for n in names), *leaves(result)], expected, budget)
        found.append(float(leaves(result)[0]))
    return found


def test_training_step_of_a_cnn() -> None:
    x, target = draw(6, 1, 12, 12), np.arange(6) % 10
    # SGD passes gradients on as they are; their error is that of some twenty ops, each within 3e-6 of its largest result
    losses = steps(cnn(), tw.optim.SGD(0.05, momentum=0.9), x, target, 3, 5e-5)
    assert losses[-1] < losses[0]


def test_training_step_with_dropout_and_adam() -> None:
    tw.seed(6)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 10))
    x, target = draw(8, 16), np.arange(8) % 10
    # Adam divides the first moment by the root of the second, which keeps relative errors; only a gradient that is small
    # beside the others of its array has a large one, and its weight moves by less than the learning rate of 0.05
    losses = steps(model, tw.optim.Adam(0.01), x, target, 2, 5e-5)
    assert losses[-1] < losses[0]


def test_donated_state_keeps_its_memory() -> None:
    """An accumulator that is donated is updated where it lies; one that is swapped with another is not torn."""
    a, b, x = (input_node(n, tensor("f32", (33,)), "data") for n in "abx")
    total = make("add", a, make("mul", b, x))
    exe = tw.compile(Graph((a, b, x), (total, a, make("reverse", total, axes=(0,))), ("a", "b", "y"), aliases=((0, 0), (1, 1))))
    first, second, values = draw(33), draw(33, seed=1), draw(33, seed=2)
    was, other = first.copy(), second.copy()
    new, old, y = exe(first, second, values)
    assert new is first
    assert old is second
    np.testing.assert_allclose(new, was + other * values, rtol=1e-6, atol=1e-6)
    assert np.array_equal(old, was)
    assert np.array_equal(y, new[::-1])


# --- functions ----------------------------------------------------------------------------------------------------------


def test_symbolic_batch_serves_several_sizes() -> None:
    exe = tw.compile(mlp(), tw.spec("N", 20))
    for n in (1, 7, 16, 33, 1):
        x = draw(n, 20, seed=n)
        close(exe(x), meaning(exe, x), 1e-5)
    with pytest.raises(tw.errors.InputError, match="1 is the least"):
        exe(draw(0, 20))


def test_sizes_in_expressions() -> None:
    exe = tw.compile(lambda x, y: tw.concatenate([x, y], axis=0).sum(axis=1) / x.shape[1], tw.spec("N", "M"), tw.spec("2*N", "M"))
    for n, m in ((1, 5), (3, 17), (2, 1)):
        arrays = draw(n, m), draw(2 * n, m, seed=1)
        close(exe(*arrays), meaning(exe, *arrays), 3e-6)


def test_several_outputs() -> None:
    def fn(x: Any, y: Any) -> Any:
        z = tw.tanh(x) @ y
        return {"b": z, "a": (x, z.max(axis=0), [z.argmax(axis=1), np.float32(2.5) * tw.ones(3)]), "c": z}

    x, y = draw(6, 9), draw(9, 20)
    exe = tw.compile(fn, x, y)
    found = exe(x, y)
    assert list(found) == ["b", "a", "c"]
    one, two, (where, constant) = found["a"]
    close([found["b"], one, two, where, constant, found["c"]], meaning(exe, x, y), 3e-6)
    assert where.dtype == np.int64
    assert np.array_equal(one, x)
    assert one is not x


def test_gradients() -> None:
    def fn(w: Any, x: Any) -> Any:
        h = tw.gelu(x @ w["first"]) @ w["second"]
        return (tw.log_softmax(h, axis=-1) * h).mean()

    w = {"first": draw(12, 16), "second": draw(16, 5, seed=1)}
    x = draw(7, 12, seed=2)
    exe = tw.compile(tw.value_and_grad(fn), w, x)
    value, gradient = exe(w, x)
    expected = meaning(exe, w["first"], w["second"], x)
    close([value, gradient["first"], gradient["second"]], expected, 1e-5)
    # and the interpreter's gradient is one: a central difference of the function's own graph, in f64
    plain = tw.trace(fn, w, x)
    step = 1e-5 * np.sign(draw(12, 16, seed=3)).astype(np.float64)
    up, down = (interpret(plain, [w["first"] + s * step, w["second"], x], f64)[0] for s in (1, -1))
    assert abs((up - down) / 2e-5 - (expected[1] * np.sign(step)).sum()) < 1e-6 * np.abs(expected[1]).sum()


def test_products_with_constants() -> None:
    """A product reads its operands from memory, also where every element is one constant, as in the gradient of a sum."""
    x = draw(5, 7)
    agrees(lambda x: tw.tanh(x @ tw.full((7, 4), 0.5) + 1.0), x)
    agrees(tw.grad(lambda x: (x @ x.T).sum()), x)


def test_gradient_of_a_gradient() -> None:
    slope = tw.grad(lambda x: (tw.sin(x) * x * x).sum())
    exe = tw.compile(tw.grad(lambda x: slope(x).sum()), tw.spec(19))
    x = draw(19)
    exact = (2 - x * x) * np.sin(x.astype(np.float64)) + 4 * x * np.cos(x.astype(np.float64))
    close(exe(x), [exact], 5e-6)


def test_f64() -> None:
    """What is f64 in the beginning is f64 to the end, to f64's precision."""
    x, y = (np.random.default_rng(s).normal(size=(9, 9)) for s in (0, 1))
    exe = tw.compile(lambda a, b: ((a @ b) / (tw.sqrt(a * a) + 1.0)).sum(axis=0), x, y)
    found = exe(x, y)
    assert found.dtype == np.float64
    close(found, meaning(exe, x, y), 1e-14)


def test_integers() -> None:
    def fn(a: Any, b: Any) -> Any:
        q, r = a // b, a % b
        return q, r, q * b + r, (a & b) ^ (a | b), (a < b).sum(), a.sum(axis=0), a.max(axis=1), tw.take(a, b[0] % 5, axis=0)

    for dtype in ("i8", "u8", "i32", "i64"):
        low = 0 if dtype == "u8" else -100
        rng = np.random.default_rng(7)
        kind = np.dtype({"i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}[dtype])
        a, b = rng.integers(low, 100, (5, 21)).astype(kind), rng.integers(1, 9, (5, 21)).astype(kind)
        exe = agrees(fn, a, b)
        assert np.array_equal(exe(a, b)[2], a)


def test_nothing_in_nothing_out() -> None:
    """Empty inputs, and reductions over nothing."""

    def fn(x: Any, w: Any) -> Any:
        return x @ w, x.sum(axis=0), x.sum(), tw.concatenate([x, x * 2.0], axis=0), tw.exp(x).prod(axis=1)

    for n, k in ((0, 4), (3, 0), (0, 0)):
        agrees(fn, draw(n, k), draw(k, 6, seed=1))


def test_deep_chain_compiles_in_bounded_time() -> None:
    """2,000 ops one after another, of which none can be left out. The bound is ten times what it takes on a busy machine."""

    def fn(x: Any) -> Any:
        for _ in range(600):
            x = tw.sin(x * 1.25 + 0.5).reshape(-1) if x.shape == (4, 8) else tw.tanh(x.reshape(4, 8) - 0.75)
        return x

    start = time.perf_counter()
    exe = tw.compile(fn, tw.spec(32))
    seconds = time.perf_counter() - start
    assert len([n for n in exe.graph.nodes() if n.inputs]) >= 2000
    x = draw(32)
    found, before, oracle = exe(x), interpret(exe.graph, [x])[0], meaning(exe, x)[0]
    # sin and tanh are contractions here on the average: errors of 1,000 functions do not add up
    assert np.abs(found - oracle).max() <= max(1e-5, 8 * np.abs(before - oracle).max())
    assert seconds < 60, f"compiling took {seconds:.1f} s"


def test_many_python_threads_at_once() -> None:
    """Eight threads, two executables, sizes that are met for the first time by several threads at once."""
    shared, batch = tw.compile(transformer(), tw.spec(2, 9, 32)), tw.compile(mlp(), tw.spec("N", 20))
    xs = [draw(2, 9, 32, seed=s) for s in range(8)]
    ys = [draw(1 + s % 3, 20, seed=s) for s in range(8)]
    expected = [(meaning(shared, x)[0], meaning(batch, y)[0]) for x, y in zip(xs, ys, strict=True)]
    results: list[list[tuple[Array, Array]]] = [[] for _ in range(8)]
    problems: list[BaseException] = []
    start = threading.Barrier(8)

    def work(k: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                results[k].append((shared(xs[k]), batch(ys[k])))
        except BaseException as error:  # shown by the main thread
            problems.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not problems
    for k in range(8):
        assert len(results[k]) == 20
        for found, other in results[k]:
            close(found, [expected[k][0]], 1e-5)
            close(other, [expected[k][1]], 1e-5)


def test_trainer_learns_and_the_model_predicts_the_same() -> None:
    """What a Trainer leaves behind in the model is what the model computes when it is compiled on its own."""
    tw.seed(8)
    rng = np.random.default_rng(9)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 2))
    trainer = tw.Trainer(model, loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(0.02), metrics=["accuracy"])
    trainer.fit(x, y, epochs=25, batch_size=64, verbose=False)
    predicted = trainer.predict(x)
    assert (predicted.argmax(1) == y).mean() > 0.9
    close(tw.compile(model, tw.spec(200, 8))(x), [predicted.astype(np.float64)], 1e-5)
