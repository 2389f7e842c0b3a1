"""Hyper-parameter search: grids, Bayesian, pruning."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import InputError
from tensorwright.training.search import Float, Int

from .support import data, net, trainer

pytest.importorskip("optuna", reason="Optuna is in the extra [search]")
pytestmark = [
    pytest.mark.unvalidated("about the search; the same few steps come from the cache"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


def bowl(settings, pruning):
    return (settings["a"] - 2) ** 2 + (settings["b"] == "wrong")


def test_a_grid_tries_every_point_once():
    found = tw.search(bowl, {"a": [0, 1, 2.5, 3], "b": ["right", "wrong"]}, sampler="grid")
    assert len(found.rows) == 8 and len({(r["a"], r["b"]) for r in found.rows}) == 8
    assert found.best == {"a": 2.5, "b": "right"} and found.value == 0.25
    assert "best of 8 trials (0 pruned): 0.25" in str(found)


def test_bayesian_search_finds_the_bottom_and_is_reproducible():
    space = {"a": (-10.0, 10.0), "b": ["right", "wrong"]}
    runs = [tw.search(bowl, space, trials=40, seed=s) for s in (1, 1, 2)]
    assert [r["a"] for r in runs[0].rows] == [r["a"] for r in runs[1].rows] != [r["a"] for r in runs[2].rows]
    assert abs(runs[0].best["a"] - 2) < 1.0 and runs[0].best["b"] == "right"
    random = tw.search(bowl, space, trials=40, seed=1, sampler="random")
    assert np.mean([r["value"] for r in runs[0].rows]) < np.mean([r["value"] for r in random.rows])


def test_choices_may_be_anything_and_ranges_stay_in_bounds():
    sgd, adam = tw.optim.SGD(0.1), tw.optim.Adam(1e-3)
    seen = []

    def look(settings, pruning):
        seen.append(settings)
        return float(settings["n"])

    found = tw.search(look, {"o": [sgd, adam], "n": (4, 9), "k": Int(8, 64, log=True), "r": (1e-4, 1e-1, "log")}, trials=12)
    assert {s["o"] for s in seen} == {sgd, adam} and found.best["o"] in (sgd, adam)
    assert all(type(s["n"]) is int and 4 <= s["n"] <= 9 and 8 <= s["k"] <= 64 and 1e-4 <= s["r"] <= 1e-1 for s in seen)


def test_it_fits_trainers_and_prunes_those_that_fall_behind():
    x, y = data(120)

    def make(settings):
        return trainer(net(), optimizer=tw.optim.SGD(settings["lr"]))

    fit = {"x": x, "y": y, "epochs": 6, "batch_size": 32, "validation_split": 0.25}
    rates = [1.0, 0.5, 0.3, 0.7, 0.4, 0.6, 1e-6, 1e-7]
    found = tw.search(make, {"lr": rates}, fit=fit, sampler="grid", monitor="val_accuracy", seed=3)
    assert found.best["lr"] >= 0.3 and found.value > 0.7
    by_rate = {r["lr"]: r for r in found.rows}
    pruned = [r for r in found.rows if r["state"] == "pruned"]
    assert pruned and all(1 < r["epochs"] < 6 for r in pruned)
    assert by_rate[found.best["lr"]]["epochs"] == 6
    unpruned = tw.search(make, {"lr": rates[-3:]}, fit=fit, sampler="grid", monitor="val_accuracy", prune=False)
    assert all(r["state"] == "complete" for r in unpruned.rows)


def test_an_objective_of_ones_own_passes_the_pruning_on():
    x, y = data(60)

    def objective(settings, pruning):
        t = trainer(net(), learning_rate=settings["lr"])
        t.fit(x, y, epochs=2, callbacks=[pruning], verbose=False)
        return t.history[-1]["loss"]

    found = tw.search(objective, {"lr": [0.1, 1e-5]}, sampler="grid", monitor="loss")
    assert found.best == {"lr": 0.1} and [r["epochs"] for r in found.rows] == [2, 2]


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({}, {}, "holds no setting"),
        ({"a": [1]}, {"sampler": "gird"}, "sampler is one of bayesian, grid, random, not 'gird'"),
        ({"a": []}, {}, "is a list of choices"),
        ({"a": 3}, {}, "is a list of choices"),
        ({"a": (3, 1)}, {}, "needs low < high"),
        ({"a": Float(0.0, 1.0, log=True)}, {}, "a positive low where log"),
        ({"a": (0.0, 1.0)}, {"sampler": "grid"}, "a range of floats, of which a grid cannot try each"),
        ({"a": (0, 999), "b": (0, 999)}, {"sampler": "grid"}, "the grid has 1,000,000 points"),
        ({"a": [1]}, {"trials": 0}, "trials is at least 1"),
    ],
)
def test_what_is_refused(space, options, message):
    with pytest.raises(InputError, match=message):
        tw.search(bowl, space, **options)


def test_an_error_in_a_trial_is_not_swallowed():
    def broken(settings, pruning):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tw.search(broken, {"a": [1]}, sampler="grid")
