"""dynamic='generic': one program for every size, against the interpreter, with nothing compiled once it is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir import run
from tensorwright.ir.graphs import specialize

SIZES = (1, 7, 8, 9, 15, 16, 17, 33)
rng = np.random.default_rng(7)


@contextmanager
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any use of the code generator or of LLVM's compiler raises."""

    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("something was compiled at run time")

    with monkeypatch.context() as patched:
        for place, names in {
            "codegen.llvm": ("object_code", "emit", "begin_emit"),
            "codegen.generate": ("emit", "begin_emit", "assemble"),
            "codegen.generic.generator": ("emit",),
            "passes.manager": ("run_pipeline",),
            "generic": ("run_pipeline", "generate_generic", "generate"),
        }.items():
            module = importlib.import_module(f"tensorwright.{place}")
            for name in names:
                patched.setattr(module, name, refuse)
        yield


def check(
    fn: Any,
    spec: Any,
    shapes: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    budget: float = 5e-6,
    draw: Callable[..., Any] | None = None,
    **options: Any,
) -> tw.Executable:
    """Every shape against the interpreter; the first program serves them all. `budget` is relative to the largest result."""
    exe = tw.compile(fn, spec, dynamic="generic", **options)
    graph = tw.trace(fn, spec)
    (name,) = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] == "data"]
    with no_compiler(monkeypatch):
        results = []
        for shape in shapes:
            x = rng.standard_normal(shape).astype(np.float32) if draw is None else draw(shape)
            got = exe(x)
            results.append((x, [np.array(y) for y in (got if isinstance(got, tuple) else (got,))]))
    for x, got in results:
        wanted = run(graph, {**exe.parameters, name: x})
        for y, ref in zip(got, wanted, strict=True):
            assert y.shape == ref.shape and y.dtype == ref.dtype
            if ref.dtype.kind != "f":
                np.testing.assert_array_equal(y, ref)
            elif ref.size:
                assert np.abs(y - ref).max() <= budget * max(1.0, float(np.abs(ref).max())), x.shape
    return exe


class MLP(nn.Module):
    def __init__(self) -> None:
        self.first, self.second = nn.Linear(40, 70), nn.Linear(70, 10)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        return self.second(tw.relu(self.first(x)))


class Block(nn.Module):
    """Attention over S positions and a feed-forward net, each after a layer norm."""

    def __init__(self) -> None:
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.wide, self.back = nn.Linear(32, 64), nn.Linear(64, 32)
        self.one, self.two = nn.LayerNorm(32), nn.LayerNorm(32)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.one(x)).reshape(b, s, 3, 4, 8).transpose(2, 0, 3, 1, 4)
        y = tw.scaled_dot_product_attention(q, k, v).transpose(0, 2, 1, 3).reshape(b, s, d)
        x = x + self.out(y)
        return x + self.back(tw.gelu(self.wide(self.two(x))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(20, 5)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        x = tw.max_pool2d(tw.relu(self.norm(self.a(x))), 2)
        x = tw.avg_pool2d(tw.relu(self.b(x)), 2, padding=1)
        return self.head(x.mean(axis=(2, 3)))


@pytest.mark.parametrize("target", ["host", "x86-64-v3"])
def test_mlp(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(MLP(), tw.spec("N", 40), [(n, 40) for n in SIZES], monkeypatch, target=target)


@pytest.mark.parametrize("target", ["host", "x86-64-v3"])
def test_transformer_block(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(b, s, 32) for b, s in zip((2, 1, 3, 1, 2, 1, 1, 2), SIZES, strict=True)]
    check(Block(), tw.spec("B", "S", 32), shapes, monkeypatch, target=target)


@pytest.mark.parametrize("target", ["host", "x86-64-v3"])
def test_convolutions(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 3, 6, 6), (2, 3, 7, 9), (1, 3, 16, 15), (3, 3, 8, 33), (1, 3, 17, 8)]
    check(Convolutions(), tw.spec("N", 3, "H", "W"), shapes, monkeypatch, target=target)


FUNCTIONS: dict[str, Callable[[tw.Tensor], Any]] = {
    "softmax": lambda x: tw.softmax(x, axis=-1),
    "softmax of columns": lambda x: tw.softmax(x, axis=0),
    "sums": lambda x: (x.sum(axis=0), x.sum(axis=1), x.sum(), tw.amax(x, axis=1), tw.amin(x, axis=0)),
    "means": lambda x: x - x.mean(axis=1, keepdims=True) / x.shape[0],
    "positions": lambda x: (tw.argmax(x, axis=0), tw.argmin(x, axis=1)),
    "running": lambda x: (tw.cumsum(x, axis=0), tw.cumsum(x, axis=1)),
    "moved": lambda x: (x.T, x[:, ::-1], x.reshape(-1), tw.concatenate([x, x.T.T * 2], axis=1), tw.concatenate([x, x], axis=0)),
    "padded": lambda x: tw.pad(x, ((1, 2), (0, 3))),
    "cut": lambda x: x[:, : x.shape[1] // 2 + 1] * 2,
    "sorted": lambda x: (tw.sort(x, axis=0), tw.argsort(x, axis=1)),
    "products": lambda x: (x @ x.T, x.T @ x),
    "integers": lambda x: (x.astype("i32") * 3 // 2, (x * 10).astype("i8"), x > 0, tw.where(x > 0, x, 0.0)),
    "outer": lambda x: x[:, None, :] * x[None, :, :],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_two_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 1), (1, 17), (7, 8), (16, 15), (33, 9), (9, 33)]
    check(FUNCTIONS[name], tw.spec("N", "M"), shapes, monkeypatch)


def test_loops_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(x: tw.Tensor) -> Any:
        def step(c: tw.Tensor, row: tw.Tensor) -> tuple[tw.Tensor, tw.Tensor]:
            new = tw.tanh(c * 0.5 + row)
            return new, new * 2

        forth, seen = tw.scan(step, x[0], x)
        back, _ = tw.scan(step, x[0], x, reverse=True)
        return forth, seen, back

    check(both, tw.spec("T", "M"), [(1, 1), (7, 3), (16, 17), (5, 33)], monkeypatch)
    nets = [nn.LSTM(6, 9), nn.GRU(6, 9)]
    for net in nets:
        check(lambda x, net=net: net(x)[0], tw.spec("T", "B", 6), [(1, 1, 6), (7, 2, 6), (4, 17, 6)], monkeypatch)


def test_branches_and_loops_that_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(x: tw.Tensor) -> Any:
        small = tw.while_loop(lambda y: tw.amax(tw.abs(y)) > 0.1, lambda y: y * 0.5, x)
        return tw.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 3, x), small

    check(halved, tw.spec("N", "M"), [(1, 1), (3, 17), (8, 9), (33, 2)], monkeypatch)


def test_gather_and_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(50, 12)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(0, 50, shape)

    check(table, tw.spec("N", "S", dtype="i64"), [(n, 3) for n in SIZES], monkeypatch, draw=draw)


def test_threads_change_nothing() -> None:
    def attend(x: tw.Tensor) -> Any:
        return tw.softmax(x @ x.T, axis=-1) @ x, x.mean(axis=0), tw.cumsum(x, axis=1)

    one, two = (tw.compile(attend, tw.spec("N", 48), dynamic="generic", threads=t) for t in (1, 2))
    for n in (9, 700):
        x = rng.standard_normal((n, 48)).astype(np.float32)
        first = [np.array(y) for y in one(x)]
        for _ in range(3):
            for y, z in zip(first, two(x), strict=True):
                np.testing.assert_array_equal(y, z)


def test_out_of_what_the_graph_allows() -> None:
    exe = tw.compile(lambda x: tw.max_pool2d(x, 3), tw.spec(1, 2, "H", "W"), dynamic="generic")
    assert exe(np.ones((1, 2, 3, 9), np.float32)).shape == (1, 2, 1, 3)
    with pytest.raises(tw.errors.InputError, match="H = 2"):
        exe(np.ones((1, 2, 2, 9), np.float32))
    with pytest.raises(tw.errors.InputError, match="rank"):
        exe(np.ones((2, 3, 9), np.float32))
    pair = tw.compile(lambda x, y: x + y, tw.spec("N", 3), tw.spec("N", 3), dynamic="generic")
    with pytest.raises(tw.errors.InputError, match="N = 2"):
        pair(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32))


def test_what_is_not_carried_is_named() -> None:
    def pooled(x: tw.Tensor) -> tw.Tensor:
        return tw.adaptive_max_pool2d(tw.relu(x), 3)

    with pytest.raises(tw.errors.CompileError, match=r"(?s)specialise.*adaptive_max_pool2d .*test_generic.py:\d+.*symbolic"):
        tw.compile(pooled, tw.spec(1, 4, "H", "W"), dynamic="generic")
    with pytest.raises(tw.errors.InputError, match="dynamic is one of"):
        tw.compile(MLP(), tw.spec("N", 40), dynamic="any")
    with pytest.raises(tw.errors.InputError, match="f32"):
        tw.compile(MLP(), tw.spec("N", 40), dynamic="generic", precision="bf16")


def test_set_parameters_reaches_every_size() -> None:
    net = MLP()
    exe = tw.compile(net, tw.spec("N", 40), dynamic="generic")
    xs = [np.ones((n, 40), np.float32) for n in (2, 5)]
    before = [np.array(exe(x)) for x in xs]
    exe.set_parameters({k: 2 * v for k, v in exe.parameters.items()})
    graph = specialize(tw.trace(net, tw.spec("N", 40)), {"N": 5})
    for x, old in zip(xs, before, strict=True):
        assert not np.allclose(exe(x), old)
    np.testing.assert_allclose(exe(xs[1]), run(graph, {**exe.parameters, "x": xs[1]})[0], rtol=1e-5)


def test_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exe = tw.compile(MLP(), tw.spec("N", 40), dynamic="generic")
    exe.save(tmp_path / "model.tw")
    again = tw.load(tmp_path / "model.tw")
    with no_compiler(monkeypatch):
        for n in (3, 20):
            x = rng.standard_normal((n, 40)).astype(np.float32)
            np.testing.assert_array_equal(exe(x), again(x))


def test_memory_of_other_sizes_is_given_back() -> None:
    exe = tw.compile(lambda x: tw.softmax(x @ x.T, axis=-1) @ x, tw.spec("N", 64), dynamic="generic")
    exe._keep_bytes = 1 << 20
    for n in range(200, 260, 3):
        exe(np.ones((n, 64), np.float32))
    kept = [s.compiled.run.arena_bytes for s in exe._specialisations.values()]
    assert sum(kept[:-1]) <= 1 << 20 < sum(kept) * 20 / len(kept)


@pytest.mark.unvalidated("validation does not read the cache")
def test_cache_has_it_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MLP):
        def __call__(self, x: tw.Tensor) -> tw.Tensor:
            return super().__call__(x) * 0.75

    net = Own()
    first = tw.compile(net, tw.spec("N", 40), dynamic="generic")
    x = rng.standard_normal((11, 40)).astype(np.float32)
    wanted = np.array(first(x))
    with no_compiler(monkeypatch):
        second = tw.compile(net, tw.spec("N", 40), dynamic="generic")
        np.testing.assert_array_equal(second(x), wanted)
    assert second.compiled.from_cache and not first.compiled.from_cache
    assert second.stages == first.stages and second.text("loops") == first.text("loops")
