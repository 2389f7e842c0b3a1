"""Masks, criteria, scopes, gradual pruning, training that keeps masks; sparse kernels where they are faster."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.compression import GradualPruning, PolynomialDecay, gradients_of, sparsify
from tensorwright.compression.masks import View, pattern_of
from tensorwright.compression.sparsify import Blocks
from tensorwright.ir.errors import AttributeValueError, InputError, ShapeError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 32)).astype(np.float32)
Y = (X[:, :8] * 2).argmax(1)


def net(seed: int = 0) -> nn.Module:
    tw.seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def graph_of(model: nn.Module, *shape: int) -> Graph:
    g = tw.trace(model, tw.spec(*shape))
    return Graph(g.inputs, g.outputs, g.output_names, g.name, (), g.labels, model.state_dict())


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_smallest_weights_go_and_the_others_stay_as_they_are() -> None:
    model = net()
    before = model.state_dict()
    pruned = tw.prune(model, ratio=0.75)
    for name in ("0.weight", "2.weight"):
        w, mask = before[name], pruned.masks[name]
        assert mask.sum() == round(0.25 * w.size)
        assert np.abs(w[mask]).min() >= np.abs(w[~mask]).max()
        assert np.array_equal(model.state_dict()[name], np.where(mask, w, 0))
    assert pruned.sparsity == 0.75 and pruned.parameters_after < pruned.parameters_before
    assert "75.0%" in str(pruned) and pruned.as_dict()["layers"][0]["zeros"] == 0.75


def test_patterns_have_the_zeros_they_say() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 16, 1))
    masks = tw.prune(model, pattern="2:4").masks
    for m in masks.values():
        assert (np.moveaxis(m, 1, -1).reshape(-1, 4).sum(1) == 2).all()  # of any four neighbouring inputs
    masks = tw.prune(model, ratio=0.5, pattern="block 1x16").masks
    for m in masks.values():
        blocks = m.reshape(m.shape[0] // 16, 16, -1)
        assert (blocks.all(1) | ~blocks.any(1)).all()
    masks = tw.prune(model, pattern="block 4x2", ratio=0.5).masks
    m = masks["0.weight"].transpose(2, 3, 0, 1).reshape(9, 16, 2, 2, 4)
    whole, none = m.all((2, 4)), ~m.any((2, 4))
    assert (whole | none).all() and whole.sum() == none.sum()


def test_n_of_m_keeps_the_largest() -> None:
    model = nn.Linear(16, 3, bias=False)
    w = model.weight.data.copy()
    mask = tw.prune(model, pattern="4:16").masks["weight"]
    assert (mask.sum(1) == 4).all()
    for row, kept in zip(np.abs(w), mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_all_layers_compete_in_a_global_scope_and_none_dies() -> None:
    model = net()
    model.load_state_dict({**model.state_dict(), "2.weight": model.state_dict()["2.weight"] * 1e-3})
    masks = tw.prune(model, ratio=0.9, scope="global").masks
    assert masks["2.weight"].sum() == 1  # it would lose all
    total = sum(m.size for m in masks.values())
    assert abs(sum(m.sum() for m in masks.values()) - round(0.1 * total)) <= 1
    model = net()
    model.load_state_dict({**model.state_dict(), "2.weight": model.state_dict()["2.weight"] * 1e-3})
    masks = tw.prune(model, ratio=0.5, scope="global", criterion="normalised").masks
    assert 0.4 < masks["2.weight"].mean() < 0.6


@pytest.mark.unvalidated("whole training steps; what is new in them is checked by their results")
def test_gradients_weigh_by_what_the_loss_would_change() -> None:
    model = net()
    slopes = gradients_of(model, tw.losses.cross_entropy, [(X[:64], Y[:64]), (X[64:128], Y[64:128])])
    w = model.state_dict()
    mask = tw.prune(model, ratio=0.5, criterion="taylor", gradients=slopes).masks["0.weight"]
    value = np.abs(w["0.weight"] * slopes["0.weight"])
    assert value[mask].min() >= value[~mask].max()

    def loss(change: float) -> float:
        v = {n: a.astype(np.float64) for n, a in w.items()}
        v["0.weight"][3, 5] += change
        h = np.maximum(X[:128] @ v["0.weight"].T + v["0.bias"], 0) @ v["2.weight"].T + v["2.bias"]
        return float((np.log(np.exp(h).sum(1)) - h[np.arange(128), Y[:128]]).mean())

    assert slopes["0.weight"][3, 5] == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-4)  # sums of 128 terms in f32


def test_sensitive_layers_lose_less() -> None:
    """The second layer's weights alone matter to this metric: the first one bears all of it."""
    model = net()
    start = model.state_dict()["2.weight"]

    def metric() -> float:
        return -float(np.abs(dict(model.named_parameters())["2.weight"].data - start).sum())

    masks = tw.prune(model, ratio=0.6, scope="sensitivity", metric=metric).masks
    assert masks["0.weight"].mean() < 0.12 and "2.weight" in masks and masks["2.weight"].mean() > 0.8


def test_which_layers_and_how_much_of_each() -> None:
    model = net()
    pruned = tw.prune(model, ratio={"0.*": 0.5})
    assert list(pruned.masks) == ["0.weight"] and [x.choice for x in pruned.layers] == ["masked", "dense"]
    assert list(tw.prune(net(), ratio=0.5, exclude="0.*").masks) == ["2.weight"]
    assert list(tw.prune(net(), ratio=0.5, layers=["0.weight"]).masks) == ["0.weight"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 1.0}, "between 0 and 1"),
    ({"ratio": 0}, "between 0 and 1"),
    ({"ratio": float("nan")}, "between 0 and 1"),
    ({}, "ratio is missing"),
    ({"ratio": {"0.*": 1.5}}, r"the ratio of '0\.\*'"),
    ({"ratio": 0.5, "pattern": "banana"}, "there is no pattern 'banana'"),
    ({"pattern": "4:4"}, "0 < N < M"),
    ({"pattern": "2:4", "ratio": 0.3}, "the pattern itself says"),
    ({"ratio": 0.5, "pattern": "block 1x7"}, "64 outputs are no multiple of 7"),
    ({"ratio": 0.5, "criterion": "luck"}, "criterion is one of"),
    ({"ratio": 0.5, "criterion": "taylor"}, "give gradients="),
    ({"ratio": 0.5, "scope": "town"}, "scope is"),
    ({"ratio": 0.5, "scope": "sensitivity"}, "needs metric="),
    ({"ratio": 0.5, "exclude": "*"}, "nothing to prune"),
    ({"ratio": 0.5, "pattern": "channels"}, "give specs"),
    ({"ratio": 0.5, "kernels": "fast"}, "kernels is"),
]


@pytest.mark.parametrize("options,message", BAD, ids=[m for _, m in BAD])
def test_what_makes_no_sense_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tw.prune(net(), **options)


def test_names_that_fit_nothing_and_weights_that_are_not_finite() -> None:
    with pytest.raises(AttributeValueError, match=r"'layer9'; the paths are 0\.weight, 2\.weight"):
        tw.prune(net(), ratio=0.5, layers="layer9")
    model = net()
    model.load_state_dict({**model.state_dict(), "2.weight": np.full((16, 64), np.nan, np.float32)})
    with pytest.raises(InputError, match=r"2\.weight: there are weights that are not finite"):
        tw.prune(model, ratio=0.5)


def test_a_layer_of_zeros_is_no_special_case() -> None:
    model = net()
    model.load_state_dict({**model.state_dict(), "2.weight": np.zeros((16, 64), np.float32)})
    for criterion in ("magnitude", "normalised"):
        masks = tw.prune(model, ratio=0.5, criterion=criterion).masks
        assert masks["2.weight"].mean() == 0.5


def test_views_open_and_close() -> None:
    w = RNG.normal(size=(4, 6, 3, 3))
    for view in (View(0, 1), View(1, 0), View(0, None)):
        assert np.array_equal(view.close(view.open(w), w), w)
    assert pattern_of("1x16") == pattern_of("1x16") and pattern_of("block 1x16").outputs == 16


# --- training keeps masks ---------------------------------------------------------------------------------------------


@pytest.mark.unvalidated("whole training steps; what is new in them is checked by their results")
def test_training_keeps_masked_weights_at_zero_to_the_bit() -> None:
    model = net()
    masks = tw.prune(model, ratio=0.8).masks
    trainer = tw.Trainer(model, loss=tw.losses.cross_entropy, optimizer=tw.optim.AdamW(1e-2), ema=0.9, clip_global_norm=1.0)
    before = model.state_dict()
    trainer.fit(X, Y, epochs=2, batch_size=64, verbose=False)
    for name, mask in masks.items():
        for weights in (model.state_dict(), trainer.averaged_weights()):
            assert not weights[name][~mask].any() and not np.signbit(weights[name][~mask]).any()
            assert (weights[name][mask] != before[name][mask]).mean() > 0.9


def test_a_mask_fits_its_parameter() -> None:
    model = net()
    weight = dict(model.named_parameters())["0.weight"]
    with pytest.raises(ShapeError, match="an array of bool of that shape"):
        weight.mask = np.ones((2, 2), bool)
    weight.mask = np.zeros(weight.shape, bool)
    assert not weight.data.any()
    weight.mask = None
    assert weight.mask is None


@pytest.mark.unvalidated("whole training steps; what is new in them is checked by their results")
def test_gradual_pruning_follows_the_polynomial() -> None:
    model, epochs = net(), 8
    callback = GradualPruning(0.8, 4, 24, every=4)
    trainer = tw.Trainer(model, loss=tw.losses.cross_entropy, optimizer=tw.optim.SGD(0.1, momentum=0.9))
    history = trainer.fit(X, Y, epochs=epochs, batch_size=64, callbacks=[callback], verbose=False)
    decay = PolynomialDecay(0.8, 4, 24)
    assert [row["sparsity"] for row in history] == pytest.approx([decay(min(4 * (k + 1), 24)) for k in range(epochs)], abs=2e-3)
    for name in ("0.weight", "2.weight"):
        assert (model.state_dict()[name] == 0).mean() == pytest.approx(0.8, abs=1e-3)
    assert decay(0) == 0 and decay(4) == 0 and decay(14) == pytest.approx(0.8 * (1 - 0.5**3)) and decay(99) == 0.8


@pytest.mark.unvalidated("whole training steps; what is new in them is checked by their results")
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def trained(folder: Path | None, epochs: int) -> dict[str, Any]:
        model = net()
        trainer = tw.Trainer(model, loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(1e-2))
        callbacks: list[Any] = [GradualPruning(0.7, 2, 14, every=3)]
        if folder is not None:
            callbacks.append(tw.callbacks.Checkpoint(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first part ends before pruning does, and says so
            trainer.fit(X, Y, epochs=epochs, batch_size=64, callbacks=callbacks, verbose=False, resume=folder)
        return model.state_dict()

    whole = trained(None, 5)
    trained(tmp_path, 2)
    resumed = trained(tmp_path, 5)
    assert all(np.array_equal(whole[n], resumed[n]) for n in whole)
    assert (resumed["0.weight"] == 0).mean() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.unvalidated("whole training steps; what is new in them is checked by their results")
def test_gradual_pruning_says_what_it_cannot_do() -> None:
    for options, message in [
        ({"ratio": 1.0, "begin": 0, "end": 5}, "between 0 and 1"),
        ({"ratio": 0.5, "begin": 5, "end": 5}, "ends after it"),
        ({"ratio": 0.5, "begin": 0, "end": 5, "initial": 0.6}, "initial ratio"),
        ({"ratio": 0.5, "begin": 0, "end": 5, "pattern": "2:4"}, "nothing about it is gradual"),
        ({"ratio": 0.5, "begin": 0, "end": 5, "criterion": "taylor"}, "criteria"),
        ({"ratio": 0.5, "begin": 0, "end": 5, "every": 0}, "at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            GradualPruning(**options)
    trainer = tw.Trainer(net(), loss=tw.losses.cross_entropy, optimizer=tw.optim.SGD(0.1))
    trainer.fit(X, Y, batch_size=256, verbose=False)
    with pytest.raises(InputError, match="set them before the first fit"):
        trainer.fit(X, Y, batch_size=256, callbacks=[GradualPruning(0.5, 0, 5)], verbose=False)
    trainer = tw.Trainer(net(), loss=tw.losses.cross_entropy, optimizer=tw.optim.SGD(0.1))
    with pytest.warns(UserWarning, match="training ended at step 1, before pruning did at step 50"):
        trainer.fit(X, Y, batch_size=256, callbacks=[GradualPruning(0.5, 0, 50)], verbose=False)


# --- sparse kernels ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions of one tap and of several, with and without strides; a dilated one and one in groups."""

    def __init__(self) -> None:
        self.a, self.n = nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32)
        self.b, self.c = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 32, 1, stride=2)
        self.d = nn.Conv2d(32, 32, (3, 2), stride=(2, 1), padding=1)
        self.wide, self.apart = nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.fc = nn.Linear(32, 16)

    def __call__(self, x: Any) -> Any:
        y = self.d(self.c(self.b(tw.relu(self.n(self.a(x))))) + 0.5)
        return self.fc((y + self.apart(self.wide(tw.relu(y)))).mean((2, 3)))


def test_a_pruned_graph_computes_the_same_on_sparse_kernels() -> None:
    tw.seed(1)
    model = Small()
    graph = graph_of(model, 2, 8, 6, 6)
    x = RNG.normal(size=(2, 8, 6, 6)).astype(np.float32)
    dense = tw.prune(graph, ratio=0.75, pattern="block 1x16", kernels=None)
    sparse = tw.prune(graph, ratio=0.75, pattern="block 1x16", kernels="always")
    assert dense.graph is not None and sparse.graph is not None
    choices = {r.name: r.choice for r in sparse.layers}
    assert choices == {**dict.fromkeys(("a", "b", "c", "d", "fc"), "sparse 1x16"), "wide": "masked", "apart": "masked"}
    assert "its taps lie (2, 2) apart" in next(r.reason for r in sparse.layers if r.name == "wide")
    assert "groups" in next(r.reason for r in sparse.layers if r.name == "apart")
    assert sum(n.endswith(".offsets") for n in sparse.graph.weights) == 5
    assert str(sparse.graph).count("sparse_matmul(") == 2 and str(sparse.graph).count("sparse_conv2d(") == 3
    expected = run(dense.graph, {**dense.graph.weights, "x": x})[0]
    np.testing.assert_allclose(run(sparse.graph, {**sparse.graph.weights, "x": x})[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tw.compile(sparse.graph)(x), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_is_sparse_only_where_it_measures_faster() -> None:
    graph = graph_of(net(), 64, 32)

    def slow(g: Graph) -> float:
        return 2.0 if any("starts" in str(i.attrs["name"]) for i in g.inputs) else 1.0

    pruned = tw.prune(graph, ratio=0.9, pattern="block 1x16", measure=slow)
    assert pruned.graph is not None and "sparse_matmul" not in str(pruned.graph)
    assert [(r.choice, r.dense_ms, r.sparse_ms) for r in pruned.layers] == [("masked", 1.0, 2.0)] * 2
    assert "dense measures 2.00x as fast" in pruned.layers[0].reason
    fast = tw.prune(graph, ratio=0.9, pattern="block 1x16", measure=lambda g: 1 / slow(g))
    assert [r.choice for r in fast.layers] == ["sparse 1x16"] * 2 and "2.00x as fast" in fast.layers[0].reason
    few = tw.prune(graph, ratio=0.05, measure=slow)
    assert "too few, or too scattered" in few.layers[0].reason
    symbolic = tw.trace(net(), tw.spec("N", 32))
    symbolic = Graph(symbolic.inputs, symbolic.outputs, symbolic.output_names, "g", (), {}, net().state_dict())
    assert "sizes are not known" in tw.prune(symbolic, ratio=0.9, pattern="block 1x16", measure=slow).layers[0].reason


@pytest.mark.unvalidated("it is timed")
def test_what_a_stopwatch_chooses_is_reported_and_right() -> None:
    graph = graph_of(net(), 64, 32)
    pruned = tw.prune(graph, ratio=0.9, pattern="block 1x16")
    assert pruned.graph is not None
    for r in pruned.layers:
        assert r.dense_ms and r.sparse_ms and (r.choice == "sparse 1x16") == (r.sparse_ms < r.dense_ms)
    masked = tw.prune(graph, ratio=0.9, pattern="block 1x16", kernels=None).graph
    np.testing.assert_allclose(tw.compile(pruned.graph)(X[:64]), tw.compile(masked)(X[:64]), rtol=1e-5, atol=1e-6)


def test_the_widest_blocks_that_hold_few_zeros_are_chosen() -> None:
    w = np.zeros((8, 32), np.float32)
    w[2, :16] = w[5, 16:] = 1
    blocks = Blocks.of(w, 16)
    assert blocks.values.shape == (2, 16) and blocks.offsets.tolist() == [2, 5] and blocks.starts.tolist() == [0, 1, 2]
    model = nn.Linear(8, 32, bias=False)
    model.load_state_dict({"weight": w.T})
    choices = sparsify(_folded(graph_of(model, 4, 8)), always=True)[1]
    assert choices[next(iter(choices))].width == 16
    scattered = np.zeros((8, 32), np.float32)
    scattered[np.arange(32) % 8, np.arange(32)] = 1
    model.load_state_dict({"weight": scattered.T})
    choices = sparsify(_folded(graph_of(model, 4, 8)), always=True)[1]
    assert choices[next(iter(choices))].width == 1


def _folded(graph: Graph) -> Graph:
    from tensorwright.compression.source import source_of

    return source_of(graph, [], []).graph
