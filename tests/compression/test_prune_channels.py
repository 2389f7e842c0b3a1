"""Whole channels, heads and layers: what goes together through sums, concatenations, groups, norms and reshapes; export."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression.channels import families_of, follow, shrunk
from tensorwright.compression.source import source_of
from tensorwright.ir.errors import InputError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run

RNG = np.random.default_rng(0)


class Mixed(nn.Module):
    """A concatenation, a norm over it, groups of channels, a depthwise convolution, pooling, a flatten."""

    def __init__(self) -> None:
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.n, self.g = nn.BatchNorm2d(20), nn.Conv2d(20, 20, 3, groups=4, padding=1)
        self.d, self.c = nn.Conv2d(20, 20, 3, groups=20, padding=1), nn.Conv2d(20, 8, 1)
        self.f = nn.Linear(8 * 9, 10)

    def __call__(self, x: Any) -> Any:
        h = self.n(tw.concatenate([self.a(x), self.b(x)], 1))
        return self.f(tw.max_pool2d(self.c(tw.relu(self.d(self.g(h)))), 2).flatten(1))


class Residual(nn.Module):
    """Two blocks around a stream, the second with a shortcut of its own, means over pixels."""

    def __init__(self) -> None:
        self.stem, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, stride=2)
        self.fc = nn.Linear(32, 5)

    def __call__(self, x: Any) -> Any:
        x = tw.relu(self.n(self.stem(x)))
        x = tw.relu(self.b(tw.relu(self.a(x))) + x)
        return self.fc(tw.relu(self.c(x) + self.d(x)).mean((2, 3)))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 48)


CASES = [
    (Mixed, (2, 3, 6, 6), "channels", 3),
    (Residual, (1, 3, 8, 8), "channels", 3),  # the stream, the inside of the block, the second stream
    (attention, (2, 5, 32), "heads", 1),
    (attention, (2, 5, 32), "channels", 1),
]


def values(graph: Graph, weights: Any, x: Any) -> Any:
    names = [str(i.attrs["name"]) for i in graph.inputs]
    return run(graph, {n: weights.get(n, x) for n in names})[0]


@pytest.mark.parametrize("make,shape,structure,count", CASES, ids=["mixed", "residual", "heads", "feed-forward"])
def test_a_model_without_units_that_are_zero_computes_the_same(make: Any, shape: tuple, structure: str, count: int) -> None:
    """Every second unit of each family is made zero in all weights that it touches: without it, nothing changes."""
    tw.seed(3)
    source = source_of(make(), [tw.spec(*shape)], [])
    tracks = follow(source.graph)
    families = [f for f in families_of(source.graph, tracks) if f.heads == (structure == "heads")]
    assert len(families) == count
    weights = {n: w.copy() for n, w in source.values.items()}
    gone: list[int] = []
    for f in families:
        numbers = list(range(1, len(f.units), 2))
        gone += [f.units[k] for k in numbers]
        for (name, d), place in f.places.items():
            np.moveaxis(weights[name], d, 0)[np.isin(place, numbers)] = 0
    x = RNG.normal(size=shape).astype(np.float32)
    small = shrunk(source.graph, tracks, gone, weights)
    assert sum(w.size for w in small.weights.values()) < 0.85 * sum(w.size for w in weights.values())
    # sums leave out terms that were zero, which may change where the others are rounded
    np.testing.assert_allclose(values(small, small.weights, x), values(source.graph, weights, x), rtol=1e-4, atol=1e-6)


def test_a_graph_becomes_smaller_and_runs() -> None:
    tw.seed(4)
    model, x = Residual(), RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    graph = tw.trace(model, tw.spec(1, 3, 8, 8))
    graph = Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, (), graph.labels, model.state_dict())
    pruned = tw.prune(graph, ratio=0.5, pattern="channels")
    assert pruned.graph is not None and pruned.parameters_after <= 0.5 * pruned.parameters_before
    assert {r.name: (r.total, r.kept) for r in pruned.layers} == {"stem": (16, 8), "a": (24, 12), "c": (32, 16)}
    np.testing.assert_allclose(tw.compile(pruned.graph)(x), values(pruned.graph, pruned.graph.weights, x), rtol=1e-4, atol=1e-6)
    other = tw.prune(graph, ratio={"a": 0.25}, pattern="channels", criterion="random", seed=1)
    assert {r.name: r.kept for r in other.layers} == {"stem": 16, "a": 18, "c": 32}
    competing = tw.prune(graph, ratio=0.5, pattern="channels", scope="global", criterion="normalised")
    assert sum(r.kept for r in competing.layers) == 36


def test_the_least_channels_go() -> None:
    tw.seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    first, second = dict(model.named_parameters())["0.weight"], dict(model.named_parameters())["2.weight"]
    norm = np.abs(first.data).sum(1) + np.abs(second.data).sum(0)
    keep = np.sort(np.argsort(-norm)[:3])
    expected = first.data[keep], second.data[:, keep]
    tw.prune(model, tw.spec(1, 4), ratio=0.5, pattern="channels")
    assert np.array_equal(first.data, expected[0]) and np.array_equal(second.data, expected[1])


@pytest.mark.unvalidated("a training step of a smaller model is a training step")
def test_a_module_becomes_smaller_and_trains_on() -> None:
    tw.seed(6)
    model = Mixed()
    pruned = tw.prune(model, tw.spec(2, 3, 6, 6), ratio=0.5, pattern="channels")
    assert pruned.parameters_after < 0.5 * pruned.parameters_before
    assert (model.n.num_features, model.g.groups, model.d.groups, model.c.out_channels) == (8, 4, 8, 4)
    trainer = tw.Trainer(model, loss=tw.losses.cross_entropy, optimizer=tw.optim.SGD(0.05))
    x, y = RNG.normal(size=(16, 3, 6, 6)).astype(np.float32), RNG.integers(0, 10, 16)
    history = trainer.fit(x, y, epochs=3, batch_size=16, verbose=False)
    assert history[-1]["loss"] < history[0]["loss"]


def test_branches_of_a_residual_stream_go() -> None:
    tw.seed(7)
    model = nn.Sequential(attention(), attention())
    weight = dict(model.named_parameters())["1.linear1.weight"]
    weight.data = weight.data * 1e-3  # this branch counts least
    graph = tw.trace(model, tw.spec(2, 5, 32))
    graph = Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, (), graph.labels, model.state_dict())
    pruned = tw.prune(graph, ratio=0.25, pattern="layers")
    assert [r.kept for r in pruned.layers] == [1, 1, 1, 0] and pruned.graph is not None
    assert not any("1.linear1" in n for n in pruned.graph.weights) and any("0.linear1" in n for n in pruned.graph.weights)
    x = RNG.normal(size=(2, 5, 32)).astype(np.float32)
    assert np.isfinite(tw.compile(pruned.graph)(x)).all()


class Counting(nn.Module):
    """Its own code counts channels."""

    def __init__(self) -> None:
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 3)

    def __call__(self, x: Any) -> Any:
        return self.b(self.a(x).reshape(-1, 2, 4).sum(1))


class NoChannels(nn.Module):
    """What its layer computes is the result."""

    def __init__(self) -> None:
        self.a = nn.Linear(4, 8)

    def __call__(self, x: Any) -> Any:
        return tw.softmax(self.a(x))


def test_what_cannot_be_pruned_is_told_and_stays_as_it_was() -> None:
    for structure in ("channels", "heads", "layers"):
        graph = tw.trace(model := NoChannels(), tw.spec(2, 4))
        graph = Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, (), {}, model.state_dict())
        with pytest.raises(InputError, match=f"has no {structure} to prune"):
            tw.prune(graph, ratio=0.5, pattern=structure)
    with pytest.raises(InputError, match="prune a Graph of it"):
        tw.prune(attention(), tw.spec(2, 5, 32), ratio=0.5, pattern="heads")
    with pytest.raises(InputError, match="looks at masks"):
        tw.prune(attention(), tw.spec(2, 5, 32), ratio=0.5, pattern="channels", scope="sensitivity")
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match="has no channels to prune"):  # a norm mixes them
        tw.prune(model, tw.spec(2, 4), ratio=0.5, pattern="channels")
    with pytest.raises(InputError, match="between 0 and 1"):
        tw.prune(Residual(), tw.spec(1, 3, 8, 8), ratio=2, pattern="channels")


def test_a_smaller_model_goes_to_onnx(tmp_path: Any) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    tw.seed(8)
    graph = source_of(Residual(), [tw.spec(1, 3, 8, 8)], []).graph
    pruned = tw.prune(graph, ratio=0.5, pattern="channels").graph
    assert pruned is not None
    path = tmp_path / "small.onnx"
    tw.onnx.save(pruned, path)
    x = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    expected = values(pruned, pruned.weights, x)
    back = tw.onnx.load(path)
    np.testing.assert_allclose(values(back, back.weights, x), expected, rtol=1e-5, atol=1e-6)
    ort = pytest.importorskip("onnxruntime", reason="the bench extra")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], expected, rtol=1e-4, atol=1e-5)
