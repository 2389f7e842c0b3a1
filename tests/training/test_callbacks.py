"""Callbacks: when they are called, what they do to a run, and what they write."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.errors import InputError
from tensorwright.training import callbacks as cb

from .support import data, trainer, weights

pytestmark = pytest.mark.unvalidated("about callbacks; the same few steps come from the cache")
FIT = {"batch_size": 16, "verbose": False}


class Scripted(cb.Callback):
    """Gives each epoch a value to watch, as validation would."""

    order = -1

    def __init__(self, values, name="val_loss"):
        self.values, self.name = values, name

    def on_epoch_end(self, trainer, row):
        row[self.name] = self.values[trainer.epoch - 1]


def test_hooks_come_in_order():
    log = []

    class Log(cb.Callback):
        def __init__(self, name, order):
            self.name, self.order = name, order

        def __getattribute__(self, attribute):
            if attribute.startswith("on_"):
                name = object.__getattribute__(self, "name")
                return lambda *a: log.append((name, attribute.removeprefix("on_")))
            return object.__getattribute__(self, attribute)

    x, y = data(20)
    trainer().fit(x, y, epochs=2, callbacks=[Log("late", 10), Log("early", 0)], **FIT)
    calls = ["fit_begin", *["epoch_begin", "step_end", "step_end", "epoch_end"] * 2, "fit_end", "exit"]
    assert log == [(who, call) for call in calls for who in ("early", "late")]


def test_the_model_holds_the_weights_of_now_at_the_end_of_an_epoch():
    seen = []

    class Look(cb.Callback):
        def on_epoch_end(self, trainer, row):
            state = trainer.step.parameters
            assert all(np.array_equal(p.data, state[n]) for n, p in trainer.model.named_parameters())
            seen.append(weights(trainer))
            row["norm"] = float(np.linalg.norm(seen[-1]))

    x, y = data(50)
    t = trainer()
    t.fit(x, y, epochs=2, callbacks=[Look()], **FIT)
    assert not np.array_equal(*seen) and t.history.column("norm")[1] == pytest.approx(np.linalg.norm(seen[1]))


def test_a_callback_may_stop_the_fit():
    class Stop(cb.Callback):
        def on_step_end(self, trainer, loss):
            trainer.stop("enough")

    x, y = data(50)
    t = trainer()
    assert len(t.fit(x, y, epochs=5, callbacks=[Stop()], **FIT)) == 1 and t.stopped == "enough"
    assert len(t.fit(x, y, epochs=2, **FIT)) == 3, "a new fit is a new one"


# -- early stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "epochs", "best"),
    [
        ([5, 4, 3, 3, 3, 2, 1], {"patience": 2}, 5, 3),
        ([5, 4, 3, 3, 2, 9, 9, 9], {"patience": 2}, 7, 5),
        ([5, 4.9, 4.8, 4.7, 1], {"patience": 2, "min_delta": 0.5}, 3, 1),
        ([math.nan, math.nan, 1], {"patience": 2}, 2, 0),
        ([1, 2, 3, 2, 2, 9], {"patience": 2, "mode": "max"}, 5, 3),
    ],
)
def test_early_stopping(values, options, epochs, best):
    x, y = data(50)
    stop = cb.EarlyStopping(**options)
    t = trainer()
    kept = {}

    class Keep(cb.Callback):
        def on_epoch_end(self, trainer, row):
            kept[trainer.epoch] = weights(trainer)

    t.fit(x, y, epochs=len(values), callbacks=[Scripted([float(v) for v in values]), stop, Keep()], **FIT)
    assert (t.epoch, stop.best_epoch) == (epochs, best)
    assert np.array_equal(weights(t), kept[best or epochs]), "the best weights are brought back"
    assert "has not improved since epoch" in t.stopped


def test_early_stopping_brings_the_best_back_although_it_was_never_triggered_and_training_goes_on_from_there():
    x, y = data(50)
    t = trainer()
    t.fit(x, y, epochs=1, **FIT)
    first = weights(t)
    t.fit(x, y, epochs=2, callbacks=[Scripted([0.0, 1.0, 2.0]), cb.EarlyStopping(patience=9)], **FIT)
    second = weights(t)
    t2 = trainer()
    t2.fit(x, y, epochs=2, **FIT)
    assert np.array_equal(second, weights(t2)), "epoch 2 was the best of that fit"
    assert not np.array_equal(first, second)
    state = t.step.parameters
    assert all(np.array_equal(p.data, state[n]) for n, p in t.model.named_parameters()), "the step has them too"


def test_a_value_that_is_not_there_is_said():
    x, y = data(50)
    with pytest.raises(
        InputError, match=r"EarlyStopping watches 'val_loss', .* there are loss, accuracy, learning_rate; pass validation"
    ):
        trainer().fit(x, y, callbacks=[cb.EarlyStopping()], **FIT)
    with pytest.raises(InputError, match="Checkpoint watches 'f1'"):
        trainer().fit(x, y, callbacks=[cb.Checkpoint("unused", best="f1", every_epochs=0)], **FIT)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- learning rates -----------------------------------------------------------------------------------------------------


def rates(t):
    return [round(r, 10) for r in t.history.column("learning_rate")]


def test_a_schedule_of_epochs_and_one_of_steps():
    x, y = data(50)
    t = trainer()
    t.fit(x, y, epochs=3, callbacks=[cb.LearningRate(lambda epoch: 0.1 / (epoch + 1))], **FIT)
    assert rates(t) == [0.1, 0.05, round(0.1 / 3, 10)]
    t = trainer()
    t.fit(x, y, epochs=2, callbacks=[cb.LearningRate(lambda step: 0.1 + step, per="step")], **FIT)
    assert rates(t) == [3.1, 7.1]  # of the last of four steps
    same = trainer(learning_rate=lambda step: 0.1 + step)
    same.fit(x, y, epochs=2, **FIT)
    assert np.array_equal(weights(t), weights(same))


def test_reduce_on_plateau():
    x, y = data(50)
    values = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    t = trainer(learning_rate=0.08)
    plateau = cb.ReduceOnPlateau(patience=1, factor=0.5, min_lr=0.03)
    t.fit(x, y, epochs=7, validation_data=(x, y), callbacks=[Observe(values), plateau], **FIT)
    assert rates(t) == [0.08, 0.08, 0.08, 0.08, 0.04, 0.04, 0.03]
    t.fit(x, y, epochs=1, validation_data=(x, y), callbacks=[Observe(values), cb.ReduceOnPlateau(patience=1)], **FIT)
    assert rates(t)[-1] == 0.02, "another fit keeps what was reached, with its own limits"


class Observe(cb.Callback):
    """A validation loss before the trainer's schedule looks: through the model itself it cannot be scripted."""

    def __init__(self, values):
        self.values = values

    def on_fit_begin(self, trainer):
        plateau, values = trainer, iter(self.values)
        trainer._judge.evaluate = lambda *a: {"loss": next(values)}
        assert plateau is trainer


def test_the_trainers_own_schedule_is_shown_the_validation_loss():
    x, y = data(50)
    schedule = tw.schedules.ReduceOnPlateau(0.1, patience=0, factor=0.5)
    t = trainer(learning_rate=schedule)
    t.fit(x, y, epochs=3, validation_data=(x, y), callbacks=[Observe([1.0, 2.0, 3.0])], **FIT)
    assert rates(t) == [0.1, 0.1, 0.05]


# -- writers ------------------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    x, y = data(50)
    t = trainer(metrics=["accuracy", "confusion_matrix"])
    log = cb.CSVLog(tmp_path / "log.csv")
    t.fit(x, y, epochs=2, callbacks=[log], **FIT)
    t.fit(x, y, epochs=1, callbacks=[log], validation_data=(x, y), **FIT)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [r["epoch"] for r in rows] == ["1", "2", "3"]
    assert [float(r["loss"]) for r in rows] == t.history.column("loss")
    assert rows[0]["val_loss"] == "" and float(rows[2]["val_loss"]) == t.history[2]["val_loss"]
    assert "confusion_matrix" not in rows[0]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is in the extra [train]")
    from tensorboardX import proto  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event

    x, y = data(50)
    t = trainer()
    t.fit(x, y, epochs=2, callbacks=[cb.TensorBoard(tmp_path, every_steps=3)], **FIT)
    (path,) = tmp_path.glob("events.*")
    found = {}
    raw, at = path.read_bytes(), 0
    while at < len(raw):  # TFRecord: length u64, its checksum u32, the event, its checksum u32
        length = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        at += 16 + length
    assert [s for s, _ in found["step/loss"]] == [3, 6]
    assert [v for _, v in found["epoch/loss"]] == pytest.approx(t.history.column("loss"), rel=1e-6)
    assert {"epoch/accuracy", "epoch/learning_rate", "epoch/seconds"} <= found.keys()


@pytest.mark.filterwarnings("ignore")  # those of MLflow's own dependencies
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="MLflow is in the extra [mlflow], too heavy for [test]")
    x, y = data(50)
    t = trainer()
    uri = tmp_path.as_uri()
    log = cb.MLflow("digits", uri=uri, parameters={"hidden": 16})
    t.fit(x, y, epochs=2, callbacks=[log], **FIT)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["hidden"] == "16" and "Adam" in run.data.params["optimizer"]
    assert run.data.metrics["loss"] == t.history[-1]["loss"]


def test_the_progress_lines(capsys):
    x, y = data(50)
    trainer().fit(x, y, epochs=2, batch_size=16, validation_data=(x, y))
    out = capsys.readouterr().out
    assert "memory of one step: " in out and "at its peak (state " in out
    assert "epoch 1/2  loss " in out and "epoch 2/2  loss " in out and "val_accuracy 0." in out


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    import sys

    for name in ("tensorboardX", "mlflow", "matplotlib.figure", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    for make, extra in ((lambda: cb.TensorBoard("x"), "train"), (cb.MLflow, "mlflow"), (lambda: tw.search(None, {}), "search")):
        with pytest.raises(tw.errors.RuntimeUnavailableError, match=rf"pip install 'tensorwright\[{extra}\]'"):
            make()
    with pytest.raises(tw.errors.RuntimeUnavailableError, match=r"tensorwright\[train\]"):
        tw.Trainer.__init__.__globals__["History"]([{"epoch": 1, "loss": 1.0}]).plot("x.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cb.EarlyStopping(patience=0), "patience is at least 1"),
        (lambda: cb.EarlyStopping(mode="up"), "mode is 'min', 'max' or None"),
        (lambda: cb.LearningRate(0.1, per="batch"), "per is 'epoch' or 'step'"),
        (lambda: cb.ReduceOnPlateau(factor=2.0), "factor lies between 0 and 1"),
        (lambda: cb.Checkpoint("x", keep=0), "keep is at least 1"),
        (lambda: cb.Checkpoint("x", every_epochs=0), "one of them"),
    ],
)
def test_arguments_that_are_refused(make, message):
    with pytest.raises(tw.TensorwrightError, match=message):
        make()
