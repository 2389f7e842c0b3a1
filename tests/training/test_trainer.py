"""The training loop: what a step computes, partial batches, state, validation data, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError
from tensorwright.training import NonFiniteLossError, Trainer

from .support import data, trainer, weights


def test_it_learns_and_evaluate_and_predict_agree():
    x, y = data()
    t = trainer()
    history = t.fit(x, y, epochs=20, batch_size=32, verbose=False)
    assert len(history) == 20 and history is t.history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    scores = t.evaluate(x, y, batch_size=64)
    predicted = t.predict(x, batch_size=33)
    assert predicted.shape == (200, 3)
    assert scores["accuracy"] == pytest.approx((predicted.argmax(1) == y).mean(), abs=1e-6)
    assert scores["accuracy"] > 0.9


def test_a_step_is_one_native_call_that_does_what_numpy_says():
    x, y = data(10)
    model = nn.Sequential(nn.Linear(8, 3))
    before = {n: p.data.astype(np.float64) for n, p in model.named_parameters()}
    t = Trainer(model, loss=tw.losses.mse, optimizer=tw.optim.SGD(0.1))
    target = np.eye(3, dtype=np.float32)[y]
    t.fit(x, target, epochs=1, batch_size=10, shuffle=False, verbose=False)
    error = x.astype(np.float64) @ before["0.weight"].T + before["0.bias"] - target
    after = {n: p.data for n, p in model.named_parameters()}
    assert np.allclose(after["0.weight"], before["0.weight"] - 0.1 * 2 * error.T @ x / error.size, atol=1e-6)
    assert np.allclose(after["0.bias"], before["0.bias"] - 0.1 * 2 * error.sum(0) / error.size, atol=1e-6)
    assert t.history[0]["loss"] == pytest.approx((error**2).mean(), rel=1e-5)


def test_the_smaller_last_batch_counts_as_what_it_is():
    x, y = data(10)
    t = trainer(optimizer=tw.optim.SGD(1e-30))  # weights stay, so the epoch's mean must be the mean over all examples
    (row,) = t.fit(x, y, batch_size=4, shuffle=False, verbose=False)
    assert sorted(t.steps) == [2, 4]
    scores = t.evaluate(x, y, batch_size=3)
    assert row["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert row["accuracy"] == pytest.approx(scores["accuracy"], rel=1e-6)


def test_steps_of_both_sizes_work_on_one_state():
    x, y = data(10)
    t = trainer()
    t.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=False)
    first, second = t.steps.values()
    for name, value in first.parameters.items():
        assert np.array_equal(value, second.parameters[name])
    counted = [v for n, v in first.parameters.items() if n.startswith("optimizer") and v.shape == ()]
    assert counted and all(v == 6 for v in counted), "Adam must have counted the steps of both sizes"


def test_equal_seeds_give_equal_weights_to_the_bit():
    x, y = data(70)
    results = []
    for seed in (1, 1, 2):
        t = trainer(seed=seed)
        t.fit(x, y, epochs=2, batch_size=32, verbose=False)
        results.append(np.concatenate([p.data.ravel() for p in t.model.parameters()]))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_training_goes_on_where_it_stopped():
    x, y = data(64)
    once, twice = trainer(), trainer()
    once.fit(x, y, epochs=4, batch_size=32, verbose=False)
    twice.fit(x, y, epochs=2, batch_size=32, verbose=False)
    twice.fit(x, y, epochs=2, batch_size=32, verbose=False)
    assert [r["loss"] for r in once.history] == [r["loss"] for r in twice.history]
    assert [r["epoch"] for r in twice.history] == [1, 2, 3, 4]


def test_weights_that_the_user_changes_between_fits_are_used():
    x, y = data(64)
    t = trainer()
    t.fit(x, y, batch_size=32, verbose=False)
    for p in t.model.parameters():
        p.data = np.zeros_like(p.data)
    t.fit(x, y, batch_size=64, shuffle=False, verbose=False)
    assert t.history[-1]["loss"] == pytest.approx(np.log(3), rel=1e-5)


def test_validation_data_and_split():
    x, y = data(100)
    t = trainer()
    row = t.fit(x, y, batch_size=32, validation_split=0.25, verbose=False)[-1]
    assert {"val_loss", "val_accuracy"} <= row.keys()
    assert row["val_loss"] == pytest.approx(t.evaluate(x[75:], y[75:])["loss"], rel=1e-6)
    row = t.fit(x, y, batch_size=32, validation_data=(x[:10], y[:10]), verbose=False)[-1]
    assert row["val_loss"] == pytest.approx(t.evaluate(x[:10], y[:10])["loss"], rel=1e-6)


def test_batch_norm_and_dropout_train_and_are_off_in_evaluation():
    x, y = data(96)
    tw.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    t = trainer(model)
    t.fit(x, y, epochs=3, batch_size=32, verbose=False)
    buffers = dict(model.named_buffers())
    assert any(np.any(b.data != 0) for n, b in buffers.items() if n.endswith("running_mean"))
    assert np.array_equal(t.predict(x), t.predict(x))


def test_a_learning_rate_schedule_is_asked_for_every_step():
    x, y = data(64)
    asked = []
    t = trainer(learning_rate=lambda step: (asked.append(step), 1e-3)[1])
    t.fit(x, y, epochs=2, batch_size=32, verbose=False)
    assert sorted(set(asked)) == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_weights_of_the_step_before():
    x, y = data(64)
    t, good = trainer(), trainer()
    t.fit(x, y, batch_size=32, verbose=False)
    good.fit(x, y, batch_size=32, verbose=False)
    bad = x.copy()
    bad[40, 2] = np.nan
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan in epoch 2, batch 2 \(step 3\)") as caught:
        t.fit(bad, y, batch_size=32, shuffle=False, verbose=False)
    assert "input 'x' of the step is nan at [8, 2] (example 40 of the data)" in str(caught.value)
    good.fit(x[:32], y[:32], batch_size=32, shuffle=False, verbose=False)  # the one good step of that epoch
    assert np.array_equal(weights(t), weights(good))
    t.fit(x, y, batch_size=32, verbose=False)
    assert np.isfinite(t.history[-1]["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 8))}, r"x is float64; .*x\.astype\(np\.float32\)"),
        ({"y": np.zeros(3, np.int64)}, r"different numbers of examples: \[4, 3\]"),
        ({"x": np.zeros((0, 8), np.float32), "y": np.zeros(0, np.int64)}, "there are no examples"),
        ({"x": np.float32(1)}, "no axis of examples"),
        ({"x": ()}, "x holds no array"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"epochs": 0}, "must be at least 1"),
        ({"validation_split": 1.0}, "below 1"),
        ({"validation_split": 0.5, "validation_data": (1, 2)}, "not both"),
    ],
)
def test_what_fit_refuses(change, message):
    options = {"x": np.zeros((4, 8), np.float32), "y": np.zeros(4, np.int64), "verbose": False, **change}
    with pytest.raises(InputError, match=message):
        trainer().fit(options.pop("x"), options.pop("y"), **options)


def test_other_types_than_before_are_refused():
    x, y = data(8)
    t = trainer()
    t.fit(x, y, batch_size=8, verbose=False)
    with pytest.raises(InputError, match="fit was called with other types before"):
        t.fit(x, y.astype(np.int32), batch_size=8, verbose=False)
