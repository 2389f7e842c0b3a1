"""Batches: order, prefetching, augmentation, weights, iterables, and what is refused."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError
from tensorwright.training.data import ArraySource, IterableSource, pays_to_prefetch, permutation, prefetched, weights_of
from tensorwright.training.prefetch import Prefetch

from .support import data, net, trainer, weights

pytestmark = pytest.mark.unvalidated("about batches; the same few steps come from the cache")


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    orders = {(s, e): permutation(100, s, e).tolist() for s in (0, 1) for e in (0, 1)}
    assert all(sorted(o) == list(range(100)) for o in orders.values())
    assert len({tuple(o) for o in orders.values()}) == 4
    assert permutation(6, 3, 2).tolist() == [2, 3, 4, 1, 5, 0], "raw Philox numbers never change: neither may this"


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_example_once_whatever_is_prefetched(ahead, shuffle):
    x, y = data(50)
    source = ArraySource(x, y, 16, shuffle=shuffle, seed=4)
    source.rooms = ahead + 1
    got = []
    with prefetched(source, 2, 1, ahead) as batches:
        for size, (a, b) in batches:
            time.sleep(0.001)  # so that the thread overwrites what it may
            assert len(a) == len(b) == size
            got.append((a.copy(), b.copy()))
    order = permutation(50, 4, 2) if shuffle else np.arange(50)
    assert np.array_equal(np.concatenate([a for a, _ in got]), x[order[16:]])
    assert np.array_equal(np.concatenate([b for _, b in got]), y[order[16:]])
    assert np.array_equal(source.examples(2, 1, 16), order[16:32])


def test_drop_last():
    x, y = data(50)
    assert [size for size, _ in ArraySource(x, y, 16, drop_last=True).epoch(0)] == [16, 16, 16]
    with pytest.raises(InputError, match="drop_last leaves no batch: there are 50 examples, and batch_size is 64"):
        ArraySource(x, y, 64, drop_last=True)


def test_prefetching_and_not_train_the_same_weights():
    x, y = data(100)
    found = []
    for ahead in (0, 2):
        t = trainer()
        t.fit(x, y, epochs=2, batch_size=32, prefetch=ahead, augment=lambda x, y, rng: (x + rng.random(), y), verbose=False)
        found.append(weights(t))
    assert np.array_equal(*found)


def test_an_augmentation_gets_its_own_batch_and_reproducible_draws():
    x, y = data(40)
    before = x.copy()
    seen = []

    def change(a, b, rng):
        a += np.float32(1)
        seen.append((a.shape, rng.integers(1 << 30)))
        return a, b

    for _ in range(2):
        trainer().fit(x, y, epochs=2, batch_size=16, shuffle=False, augment=change, verbose=False)
    assert np.array_equal(x, before), "the caller's data were changed"
    assert seen[:6] == seen[6:] and len({draw for _, draw in seen}) == 6
    assert [shape for shape, _ in seen[:3]] == [(16, 8), (16, 8), (8, 8)]


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x, y, rng: x, r"augment\(x, y, rng\) returns \(x, y\), not ndarray"),
        (lambda x, y, rng: (x.astype(np.float64), y), r"given float32\[16, 8\] and returned float64\[16, 8\]"),
        (lambda x, y, rng: (x[:3], y[:3]), "number of examples stay"),
        (lambda x, y, rng: ((x, x), y), "augment returned x nested as"),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_wrong_augmentation_is_refused(augment, message, prefetch):
    x, y = data(40)
    with pytest.raises(InputError, match=message):
        trainer().fit(x, y, batch_size=16, augment=augment, prefetch=prefetch, verbose=False)
    assert not [t for t in threading.enumerate() if "prefetch" in t.name], "the thread was left running"


def test_augmented_labels_are_checked():
    x, y = data(40)
    with pytest.raises(InputError, match="y of batch 0 of epoch 1 holds the class number"):
        trainer().fit(x, y, batch_size=16, augment=lambda x, y, rng: (x, y + 3), verbose=False)


def test_the_thread_stays_ahead_by_no_more_than_it_may():
    made = []
    with Prefetch(lambda: (made.append(k) or k for k in range(10)), 2) as items:
        taken = []
        for k in items:
            time.sleep(0.01)
            taken.append(k)
            assert len(made) <= len(taken) + 2
            if k == 4:
                break
    assert taken == [0, 1, 2, 3, 4]
    assert not items._thread.is_alive()


def test_an_error_on_the_thread_is_raised_where_its_batch_would_have_come():
    def make():
        yield 1
        raise OSError("the disk has gone")

    with Prefetch(make, 2) as items:
        it = iter(items)
        assert next(it) == 1
        with pytest.raises(OSError, match="the disk has gone"):
            next(it)


def test_batches_are_handed_from_thread_to_thread_where_making_them_is_work():
    x, y = data(50)
    assert not pays_to_prefetch(ArraySource(x, y, 16, shuffle=True))
    assert pays_to_prefetch(ArraySource(x, y, 16, augment=lambda x, y, rng: (x, y)))
    assert pays_to_prefetch(IterableSource(lambda: iter(()))) and not pays_to_prefetch(IterableSource([1]))


# -- iterables ----------------------------------------------------------------------------------------------------------


def batches_of(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def test_an_iterable_of_batches_trains_as_the_arrays_do():
    x, y = data(80)
    arrays, listed, made = trainer(), trainer(), trainer()
    arrays.fit(x, y, epochs=2, batch_size=32, shuffle=False, validation_data=(x, y), verbose=False)
    listed.fit(batches_of(x, y, 32), epochs=2, validation_data=batches_of(x, y, 32), verbose=False)
    epochs = []

    def factory(epoch):
        epochs.append(epoch)
        yield from batches_of(x, y, 32)

    made.fit(factory, epochs=2, validation_data=(x, y), verbose=False)
    assert epochs == [0, 1]
    assert np.array_equal(weights(arrays), weights(listed)) and np.array_equal(weights(arrays), weights(made))
    assert listed.history[-1]["loss"] == pytest.approx(arrays.history[-1]["loss"], rel=1e-6)
    assert listed.history[-1]["val_loss"] == pytest.approx(arrays.history[-1]["val_loss"], rel=1e-6)
    assert listed.evaluate(batches_of(x, y, 20))["loss"] == pytest.approx(arrays.evaluate(x, y)["loss"], rel=1e-5)
    assert np.allclose(listed.predict([b for b, _ in batches_of(x, y, 20)]), arrays.predict(x), rtol=1e-5, atol=1e-6)


def test_batches_of_varying_length():
    tw.seed(0)

    class Mean(nn.Module):
        def __init__(self):
            self.head = nn.Linear(4, 2)

        def __call__(self, x):
            return self.head(x.mean(axis=1))

    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((8, n, 4)).astype(np.float32), rng.integers(0, 2, 8)) for n in (3, 5, 3)]
    t = trainer(Mean())
    t.fit(batches, epochs=2, verbose=False)
    assert t.step_number == 6 and len(t._steps.programs) == 2
    assert t.evaluate(batches)["loss"] > 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (iter([1]), "can be iterated only once; give a list of batches"),
        (lambda: iter(()), "gave no batch in epoch 1"),
        ([(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))], "batch 0: there are no examples"),
        ([(np.zeros((2, 8), np.float32), np.zeros(3, np.int64))], r"batch 0: the arrays have different numbers .*: \[2, 3\]"),
        ([(np.zeros((2, 8), np.float32), np.full(2, 3))], "y of batch 0 of epoch 1 holds the class number 3 at 0"),
        ([(np.zeros((2, 8), np.float32),)], "hold no targets"),
        ([(np.zeros((2, 8)), np.zeros(2, np.int64))], "x of batch 0 is float64"),
        ([(1, 2, 3, 4)], "a tuple of 4"),
        ([(np.zeros((2, 8), np.float32), np.zeros(2, np.int64)), ({"a": np.zeros((2, 8), np.float32)}, np.zeros(2, np.int64))],
         "batch 1 is nested otherwise than the first"),
    ],
)  # fmt: skip
def test_what_is_refused_of_an_iterable(x, message):
    with pytest.raises(InputError, match=message):
        trainer().fit(x, verbose=False)


def test_y_beside_an_iterable_is_refused():
    with pytest.raises(InputError, match="taken as an iterable of batches"):
        trainer().fit([1, 2], np.zeros(2), verbose=False)


# -- weights ------------------------------------------------------------------------------------------------------------


def test_sample_weights_are_what_numpy_says():
    x, y = data(10)
    w = np.arange(10, dtype=np.float32)
    model = nn.Sequential(nn.Linear(8, 3, seed=1))
    a, b = model[0].weight.data.astype(np.float64), model[0].bias.data.astype(np.float64)
    t = trainer(model, optimizer=tw.optim.SGD(0.1))
    t.fit(x, y, batch_size=10, sample_weight=w, shuffle=False, verbose=False)
    logits = x @ a.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    share = w / w.sum()
    assert t.history[0]["loss"] == pytest.approx(-(share * np.log(p[np.arange(10), y])).sum(), rel=1e-5)
    grad = (p - np.eye(3)[y]) * share[:, None]
    assert np.allclose(model[0].weight.data, a - 0.1 * grad.T @ x, atol=1e-6)
    assert t.evaluate(x, y, sample_weight=w, batch_size=4)["loss"] == pytest.approx(
        -(share * np.log(softmax(x @ model[0].weight.data.T + model[0].bias.data)[np.arange(10), y])).sum(), rel=1e-5
    )


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_weights_may_come_and_go_between_fits():
    x, y = data(60)
    t, same = trainer(), trainer()
    t.fit(x, y, verbose=False)
    t.fit(x, y, sample_weight=np.full(60, 2.0), verbose=False)
    t.fit(x, y, verbose=False)
    same.fit(x, y, epochs=3, verbose=False)
    assert np.allclose(weights(t), weights(same), rtol=1e-4, atol=1e-6) and t.step_number == 6


def test_class_weights_are_sample_weights_by_class():
    x, y = data(60)
    by_class, by_sample, listed = trainer(), trainer(), trainer()
    by_class.fit(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, verbose=False)
    by_sample.fit(x, y, sample_weight=np.array([1, 2, 0.5], np.float32)[y], verbose=False)
    assert np.array_equal(weights(by_class), weights(by_sample))
    listed.fit(batches_of(x, y, 32), class_weight=[1.0, 2.0, 0.5], verbose=False)
    by_class = trainer()
    by_class.fit(x, y, class_weight=[1.0, 2.0, 0.5], shuffle=False, verbose=False)
    assert np.array_equal(weights(by_class), weights(listed))
    one_hot = np.eye(3, dtype=np.float32)[y]
    assert np.array_equal(weights_of((one_hot,), None, [1.0, 2.0, 0.5], 60), weights_of((y,), None, [1.0, 2.0, 0.5], 60))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample_weight": np.ones(3)}, r"sample_weight has shape \[3\]; expected one weight per example, \[60\]"),
        ({"sample_weight": np.zeros(60)}, "not all zero"),
        ({"sample_weight": np.full(60, np.nan)}, "finite"),
        ({"class_weight": {0: 1.0}}, r"no weight for the classes \[1, 2\]"),
        ({"class_weight": [1.0, -1.0, 1.0]}, "not negative"),
    ],
)
def test_weights_that_are_refused(more, message):
    x, y = data(60)
    with pytest.raises(InputError, match=message):
        trainer().fit(x, y, verbose=False, **more)


def test_class_weights_need_classes():
    x, _ = data(60)
    with pytest.raises(InputError, match="class_weight needs class numbers"):
        trainer(loss=tw.losses.mse, metrics=[]).fit(x, x[:, :1].copy()[:, 0], class_weight=[1.0], verbose=False)


# -- labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: np.where(np.arange(60) == 17, 3, y), r"number 3 at 17, .* of 3 classes: .* may lack an output \(1 of 60"),
        (lambda y: y + 1, r"if they count from 1, pass y - 1"),
        (lambda y: np.where(y == 0, -1, y), r"y holds the class number -1 at"),
    ],
)  # fmt: skip
def test_labels_out_of_range_are_found_before_anything_runs(wrong, message):
    x, y = data(60)
    t = trainer()
    with pytest.raises(InputError, match=message):
        t.fit(x, wrong(y), verbose=False)
    assert t.step is None and t.step_number == 0
    with pytest.raises(InputError, match="the validation y holds the class number 5"):
        t.fit(x, y, validation_data=(x, np.full(60, 5)), verbose=False)
    with pytest.raises(InputError, match="y holds the class number 5 at 0"):
        t.evaluate(x, np.full(60, 5))


def test_labels_are_found_through_a_loss_of_ones_own_and_the_ignored_one_is_let_through():
    x, y = data(60)

    def loss(p, t):
        return tw.losses.cross_entropy(p, t, ignore_index=-100) * 2.0

    t = trainer(loss=loss, metrics=[])
    y[3] = -100
    t.fit(x, y, verbose=False)
    y[5] = -1
    with pytest.raises(InputError, match="class number -1 at 5"):
        t.fit(x, y, verbose=False)


def test_several_inputs_and_nested_targets():
    class Two(nn.Module):
        def __init__(self):
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

        def __call__(self, x, more):
            return {"sum": self.a(x) + self.b(more["z"])}

    x, y = data(40)
    t = trainer(Two(), loss=lambda p, t: tw.losses.cross_entropy(p["sum"], t["y"]), metrics=[])
    t.fit((x, {"z": -x}), {"y": y}, epochs=2, batch_size=16, validation_split=0.25, verbose=False)
    assert "val_loss" in t.history[-1]
    assert t.predict((x, {"z": -x}))["sum"].shape == (40, 3)
    with pytest.raises(InputError, match=r"class number 7 at 0"):
        t.fit((x, {"z": -x}), {"y": np.full(40, 7)}, verbose=False)


def test_dropout_is_no_hindrance_to_looking_at_the_labels():
    x, y = data(40)
    trainer(net(dropout=0.5)).fit(x, y, verbose=False)
