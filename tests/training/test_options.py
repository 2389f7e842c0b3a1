"""What a Trainer passes on to its step, reports, and promises: weights, metrics, averages, memory, thread counts."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError
from tensorwright.training import Trainer

from .support import data, net, trainer, weights

pytestmark = pytest.mark.unvalidated("about what is passed on and reported; validated steps are trained in test_trainer.py")
FIT = {"batch_size": 16, "verbose": False}


def convnet() -> nn.Module:
    tw.seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(16 * 14 * 14, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def test_one_thread_and_two_give_the_same_weights_to_the_bit():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((160, 1, 28, 28)).astype(np.float32), rng.integers(0, 10, 160)
    found, kernels = [], []
    for threads in (1, 2):
        t = Trainer(convnet(), loss=tw.losses.cross_entropy, optimizer=tw.optim.Adam(1e-3), seed=1, threads=threads, ema=0.99)
        t.fit(x, y, epochs=2, batch_size=32, validation_split=0.2, verbose=False)
        assert t.step.threads == threads
        kernels.append(sum(k.parallel for k in t.step.compiled.run.kernels))
        found.append((weights(t), np.concatenate([a.ravel() for a in t.averaged_weights().values()]), t.history[-1]["val_loss"]))
    assert kernels[1] > 3, "nothing runs in parallel: the test tests nothing"
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}])
def test_two_epochs_are_one_and_one_more(options):
    x, y = data(50)
    once, twice = trainer(net(0.2)), trainer(net(0.2))
    once.fit(x, y, epochs=2, **options, **FIT)
    for _ in range(2):
        twice.fit(x, y, **options, **FIT)
    assert np.array_equal(weights(once), weights(twice))


def test_regularizers_clipping_and_groups_reach_the_step():
    x, y = data(50)
    plain = trainer()
    plain.fit(x, y, **FIT)
    for options in (
        {"regularizers": {"*.weight": tw.regularizers.L2(0.1)}},
        {"clip_value": 1e-3},
        {"clip_norm": 1e-3},
        {"clip_global_norm": 1e-3},
    ):
        t = trainer(**options, optimizer=tw.optim.SGD(0.1))
        same = trainer(optimizer=tw.optim.SGD(0.1))
        t.fit(x, y, **FIT)
        same.fit(x, y, **FIT)
        assert not np.array_equal(weights(t), weights(same)), options
        assert ("penalty" in t.history[0]) == ("regularizers" in options)
    model = nn.Sequential(nn.Linear(8, 3, seed=1))
    t = trainer(model, regularizers={"*.weight": tw.regularizers.L2(0.1)}, optimizer=tw.optim.SGD(1e-30))
    t.fit(x, y, **FIT)
    assert t.history[0]["penalty"] == pytest.approx(0.1 * (model[0].weight.data ** 2).sum(), rel=1e-5)


def test_accumulation_gives_the_whole_batchs_gradient():
    x, y = data(50)
    whole, parts = (trainer(optimizer=tw.optim.SGD(0.1), accumulate=n) for n in (1, 4))
    for t in (whole, parts):
        t.fit(x, y, batch_size=24, shuffle=False, verbose=False)  # 24, 24 and 2: the last is cut in two
    assert np.allclose(weights(whole), weights(parts), rtol=1e-4, atol=1e-6)
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-5)


def test_averaged_weights_are_judged_and_kept_apart():
    x, y = data(60)
    t = trainer(ema=0.9, optimizer=tw.optim.SGD(0.5))
    with pytest.raises(InputError, match="there are no averaged weights"):
        t.averaged_weights()
    history = t.fit(x, y, epochs=3, validation_data=(x, y), **FIT)
    averaged = t.averaged_weights()
    assert averaged.keys() == dict(t.model.named_parameters()).keys()
    assert not any(np.array_equal(averaged[n], p.data) for n, p in t.model.named_parameters())
    other = net()
    other.load_state_dict(averaged)
    assert np.array_equal(t.predict(x), trainer(other).predict(x))
    raw = net()
    raw.load_state_dict(t.weights())
    assert np.array_equal(t.predict(x, averaged=False), trainer(raw).predict(x))
    assert (
        history[-1]["val_loss"]
        == t.evaluate(x, y, batch_size=16)["loss"]
        != t.evaluate(x, y, batch_size=16, averaged=False)["loss"]
    )


def test_metrics_over_all_examples_are_scikit_learns():
    from sklearn.metrics import confusion_matrix, f1_score

    x, y = data(90)
    t = trainer(metrics=["accuracy", tw.metrics.F1(), "confusion_matrix", "auc"], optimizer=tw.optim.SGD(1e-30))
    (row,) = t.fit(x, y, validation_split=1 / 3, **FIT)
    predicted = t.predict(x).argmax(1)
    assert row["f1"] == pytest.approx(f1_score(y[:60], predicted[:60], average="macro"))
    assert row["val_f1"] == pytest.approx(f1_score(y[60:], predicted[60:], average="macro"))
    assert row["val_confusion_matrix"] == confusion_matrix(y[60:], predicted[60:]).tolist()
    assert 0 < row["auc"] < 1
    scores = t.evaluate(x, y, batch_size=7)
    assert scores["f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert scores["accuracy"] == pytest.approx((y == predicted).mean())


def test_a_metric_of_ones_own_may_keep_what_it_is_given():
    class Kept:
        name = "kept"

        def __init__(self):
            self.reset()

        def update(self, prediction, target):
            self.pairs.append((prediction, target))

        def reset(self):
            self.pairs = []

        def result(self):
            assert [len(p) for p, _ in self.pairs] in ([16, 16, 16, 2], [50])
            return float(np.concatenate([t for _, t in self.pairs]).sum())

    x, y = data(50)
    t = trainer(metrics=[Kept()])
    (row,) = t.fit(x, y, **FIT)
    assert row["kept"] == y.sum() == t.evaluate(x, y)["kept"]


def test_the_memory_of_a_step_is_known_before_it_runs():
    x, y = data(50)
    t = trainer()
    with pytest.raises(InputError, match=r"fit first, or give memory\(x, y, batch_size="):
        t.memory()
    before = t.memory(x, y, batch_size=16)
    assert t.step_number == 0 and before.total == t.step.peak_bytes
    assert before.state == sum(a.nbytes for a in t.step.parameters.values())
    assert before.inputs == 16 * (8 * 4 + 8) + 4
    start = weights(t)
    t.fit(x, y, **FIT)
    assert t.memory() == before and not np.array_equal(weights(t), start)


def test_weights_can_be_taken_and_given():
    x, y = data(50)
    t = trainer()
    t.fit(x, y, **FIT)
    kept = t.weights()
    t.fit(x, y, **FIT)
    t.set_weights(kept)
    assert all(np.array_equal(p.data, kept[n]) for n, p in t.model.named_parameters())
    assert all(np.array_equal(t.step.parameters[n], a) for n, a in kept.items())


def test_frozen_parameters_stay():
    x, y = data(50)
    model = net()
    model[0].weight.requires_grad = False
    before = model[0].weight.data.copy()
    t = trainer(model)
    t.fit(x, y, **FIT)
    assert np.array_equal(model[0].weight.data, before) and t.history[0]["loss"] > 0


def test_settings_are_text_without_addresses():
    t = trainer(learning_rate=lambda step: 0.1, regularizers={"*.weight": tw.regularizers.L2(0.1)}, clip_value=1.0)
    text = str(t.settings())
    assert " at 0x" not in text and "cross_entropy" in text and "L1L2(l1=0.0, l2=0.1)" in text and "clip_value" in text


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(tw.TensorwrightError, match="two metrics have the name 'accuracy'"):
        trainer(metrics=["accuracy", "accuracy"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prefetch": -1}, "prefetch is a number of batches"),
        ({"validation_split": 0.001}, "leaves none to validate on"),
        ({"validation_split": 0.999}, "leaves no example to train on"),
        ({"validation_data": (np.zeros((2, 8), np.float32), np.zeros(3, np.int64))}, r"different numbers of examples: \[2, 3\]"),
    ],
)
def test_more_that_fit_refuses(more, message):
    x, y = data(20)
    with pytest.raises(InputError, match=message):
        trainer().fit(x, y, verbose=False, **more)


def test_fit_without_targets_is_refused():
    with pytest.raises(InputError, match="y is missing"):
        trainer().fit(np.zeros((4, 8), np.float32), verbose=False)
