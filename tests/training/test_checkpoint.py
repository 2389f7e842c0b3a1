"""Checkpoints: nothing is lost in them, damage is seen, other models are refused, and a full disk costs nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError
from tensorwright.training import CheckpointError, CheckpointWarning
from tensorwright.training import checkpoint as files
from tensorwright.training.callbacks import Checkpoint, EarlyStopping

from .support import data, net, trainer, weights

pytestmark = pytest.mark.unvalidated("about files; the same few steps come from the cache")
FIT = {"batch_size": 16, "verbose": False}


# -- the file -----------------------------------------------------------------------------------------------------------


def test_values_of_every_kind_come_back(tmp_path):
    import ml_dtypes

    state = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(3, np.uint64),
        "bits": np.array([True, False]),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "none": np.zeros((0, 3), np.int64),
        "strided": np.arange(6, dtype=np.float64)[::2],
    }
    meta = {
        "numbers": [1, 2.5, 0.1 + 0.2, math.inf, -math.inf, True, None, "text"],
        "nested": {"arrays": [np.arange(3), {"deep": np.float32(0.1)}], "not a name/": {}},
    }
    files.write(tmp_path / "x.checkpoint", meta, state)
    found, arrays = files.read(tmp_path / "x.checkpoint")
    assert found["numbers"] == meta["numbers"]
    assert np.array_equal(found["nested"]["arrays"][0], np.arange(3)) and found["nested"]["not a name/"] == {}
    assert found["nested"]["arrays"][1]["deep"] == float(np.float32(0.1))
    assert arrays.keys() == state.keys()
    for name, a in state.items():
        assert arrays[name].dtype == a.dtype and arrays[name].shape == a.shape and arrays[name].tobytes() == a.tobytes()
    files.write(tmp_path / "x.checkpoint", {"nan": math.nan}, {})
    assert math.isnan(files.read(tmp_path / "x.checkpoint")[0]["nan"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.checkpoint"]


def test_what_cannot_be_held_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="meta/callbacks/fn is a function"):
        files.write(tmp_path / "x", {"callbacks": {"fn": lambda: 0}}, {})


def test_every_changed_byte_is_seen(tmp_path):
    path = tmp_path / "x.checkpoint"
    files.write(path, {"step": 1}, {"a": np.arange(4, dtype=np.float32)})
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="not a sound checkpoint"):
            files.read(path)
    for length in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a sound checkpoint"):
            files.read(path)


def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    exe = tw.compile(lambda x: x + 1, tw.spec(2))
    exe.save(tmp_path / "net.tw")
    with pytest.raises(CheckpointError, match="starts with b'TWMODEL1'"):
        files.read(tmp_path / "net.tw")


def test_two_runs_may_not_write_to_one_folder(tmp_path):
    with files._writer(tmp_path), pytest.raises(CheckpointError, match="another run is writing checkpoints"):
        files.check_writable(tmp_path)
    files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


# -- save and resume ----------------------------------------------------------------------------------------------------


def test_saved_and_resumed_at_every_step_the_weights_are_those_of_the_run_left_alone(tmp_path):
    x, y = data(50)
    options = {"model": None, "ema": 0.9, "clip_global_norm": 1.0, "metrics": ["accuracy", "f1"], "seed": 3}

    def fresh():
        return trainer(**{**options, "model": net(dropout=0.3)})

    alone = fresh()
    alone.fit(x, y, epochs=3, callbacks=[Checkpoint(tmp_path, every_steps=1, keep=None)], **FIT)
    saved = files.in_folder(tmp_path)
    assert len(saved) == 12
    for path in saved[1::3]:
        t = fresh()
        history = t.fit(x, y, epochs=3, resume=path, **FIT)
        assert np.array_equal(weights(t), weights(alone)), path.name
        averaged = alone.averaged_weights()
        assert all(np.array_equal(a, averaged[n]) for n, a in t.averaged_weights().items())
        for row, expected in zip(history, alone.history, strict=True):
            assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


def test_resume_in_the_process_that_trains_on(tmp_path):
    x, y = data(50)
    t = trainer()
    t.fit(x, y, epochs=2, **FIT)
    t.save(tmp_path / "two.checkpoint")
    t.fit(x, y, epochs=2, **FIT)
    four = weights(t)
    assert t.resume(tmp_path / "two.checkpoint") == tmp_path / "two.checkpoint"
    assert t.epoch == 2 and len(t.history) == 2
    t.fit(x, y, epochs=2, **FIT)
    assert np.array_equal(weights(t), four)
    assert t.resume(tmp_path) if files.in_folder(tmp_path) else True


def test_before_any_fit_a_checkpoint_holds_the_weights(tmp_path):
    a, b = trainer(), trainer()
    for p in a.model.parameters():
        p.data = p.data + 1
    a.save(tmp_path / "start.checkpoint")
    b.resume(tmp_path / "start.checkpoint")
    assert np.array_equal(weights(a), weights(b))
    x, y = data(50)
    a.fit(x, y, **FIT)
    b.fit(x, y, **FIT)
    assert np.array_equal(weights(a), weights(b))


def test_a_resumed_trainer_can_judge_and_save_before_it_trains(tmp_path):
    x, y = data(50)
    a, b = trainer(ema=0.9), trainer(ema=0.9)
    a.fit(x, y, epochs=2, callbacks=[EarlyStopping("loss", patience=5)], **FIT)
    a.save(tmp_path / "a.checkpoint")
    b.resume(tmp_path / "a.checkpoint")
    assert b.evaluate(x, y) == a.evaluate(x, y)
    b.save(tmp_path / "b.checkpoint")
    one, other = (files.read(tmp_path / f"{n}.checkpoint") for n in "ab")
    assert one[0]["callbacks"].keys() == other[0]["callbacks"].keys() == {"EarlyStopping"}
    assert all(np.array_equal(v, other[1][n]) for n, v in one[1].items())


def test_epochs_count_from_the_start_of_a_resumed_run(tmp_path):
    x, y = data(50)
    keep = Checkpoint(tmp_path)
    for wanted, steps in ((2, 8), (3, 12), (3, 12)):
        t = trainer()
        history = t.fit(x, y, epochs=wanted, resume=True, callbacks=[keep], **FIT)
        assert len(history) == t.epoch == wanted and t.step_number == steps


def test_weights_changed_between_resume_and_fit_count(tmp_path):
    x, y = data(64)
    t = trainer()
    t.fit(x, y, batch_size=64, shuffle=False, verbose=False)
    t.save(tmp_path / "t.checkpoint")
    t = trainer()
    t.resume(tmp_path / "t.checkpoint")
    for p in t.model.parameters():
        p.data = np.zeros_like(p.data)
    t.fit(x, y, batch_size=64, shuffle=False, verbose=False)
    assert t.history[-1]["loss"] == pytest.approx(np.log(3), rel=1e-5)


def test_a_run_that_stopped_early_is_over_and_its_best_weights_come_back(tmp_path):
    x, y = data(50)
    callbacks = [EarlyStopping("loss", patience=1, mode="max"), Checkpoint(tmp_path)]
    alone = trainer()
    alone.fit(x, y, epochs=9, callbacks=callbacks, **FIT)
    assert alone.epoch == 2, "a falling loss is no improvement here"
    again = trainer()
    again.fit(x, y, epochs=9, callbacks=callbacks, resume=True, **FIT)
    assert again.epoch == 2 and again.step is None and np.array_equal(weights(again), weights(alone))
    assert all(np.array_equal(a, alone.weights()[n]) for n, a in again.weights().items())


def test_weights_set_by_hand_are_saved(tmp_path):
    x, y = data(50)
    t = trainer()
    t.fit(x, y, **FIT)
    for p in t.model.parameters():
        p.data = np.ones_like(p.data)
    t.save(tmp_path / "t.checkpoint")
    other = trainer()
    other.resume(tmp_path / "t.checkpoint")
    assert (weights(other) == 1).all()


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_the_checkpoint_of_another_model_says_what_differs(tmp_path):
    trainer().save(tmp_path / "a.checkpoint")
    other = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3, bias=False), nn.BatchNorm1d(3))
    t = trainer(other)
    before = weights(t)
    with pytest.raises(CheckpointError) as caught:
        t.resume(tmp_path / "a.checkpoint")
    text = str(caught.value)
    assert "is the checkpoint of another model (Sequential)" in text
    assert "0.weight: float32[16, 8] in the checkpoint, float32[32, 8] here" in text
    assert "2.bias: float32[3] in the checkpoint, not here" in text
    assert "3.running_mean: float32[3] here, not in the checkpoint" in text
    assert np.array_equal(weights(t), before)


def test_another_optimiser_is_refused_before_anything_is_lost(tmp_path):
    x, y = data(50)
    t = trainer()
    t.fit(x, y, **FIT)
    t.save(tmp_path / "adam.checkpoint")
    sgd = trainer(optimizer=tw.optim.SGD(0.1, momentum=0.9))
    with pytest.warns(CheckpointWarning, match=r"optimizer: Adam\(.* then, SGD\(.* now"):
        sgd.resume(tmp_path / "adam.checkpoint")
    with pytest.raises(CheckpointError, match=r"another optimiser.*\n.*optimizer.momentum.0.weight: float32.* here, not in the"):
        sgd.fit(x, y, **FIT)


def test_other_settings_are_said_loudly(tmp_path):
    x, y = data(50)
    t = trainer(learning_rate=0.01)
    t.fit(x, y, **FIT)
    t.save(tmp_path / "t.checkpoint")
    with pytest.warns(CheckpointWarning, match="learning_rate: 0.01 then, 0.001 now; .*|seed: 0 then, 5 now"):
        trainer(learning_rate=0.001, seed=5).resume(tmp_path / "t.checkpoint")


def test_other_data_within_an_epoch_are_refused_and_between_epochs_said(tmp_path):
    x, y = data(50)
    trainer().fit(x, y, callbacks=[Checkpoint(tmp_path, every_steps=1, keep=None)], **FIT)
    within, end = files.step_file(tmp_path, 2), files.step_file(tmp_path, 4)
    with pytest.raises(
        CheckpointError, match="stopped after batch 2 of epoch 1 and cannot go on there with other data: batch_size: 16 then, 8"
    ):
        trainer().fit(x, y, epochs=2, batch_size=8, resume=within, verbose=False)
    with pytest.raises(CheckpointError, match="examples: 50 then, 40 now"):
        trainer().fit(x[:40], y[:40], epochs=2, resume=within, **FIT)
    with pytest.warns(CheckpointWarning, match="goes on with other data than before: examples"):
        trainer().fit(x[:40], y[:40], epochs=2, resume=end, **FIT)


def test_a_callback_that_is_missing_is_said(tmp_path):
    x, y = data(50)
    callbacks = [EarlyStopping("loss"), Checkpoint(tmp_path)]
    trainer().fit(x, y, callbacks=callbacks, **FIT)
    with pytest.warns(CheckpointWarning, match="goes on without them: EarlyStopping$"):
        trainer().fit(x, y, epochs=2, resume=tmp_path, **FIT)


def test_nothing_to_resume(tmp_path):
    x, y = data(50)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        trainer().resume(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        trainer().fit(x, y, resume=tmp_path / "gone.checkpoint", **FIT)
    with pytest.raises(InputError, match="resume=True takes the folder of the Checkpoint callback"):
        trainer().fit(x, y, resume=True, **FIT)
    t = trainer()
    t.fit(x, y, resume=tmp_path / "not made yet", **FIT)
    assert t.epoch == 1


# -- damage, disks ------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path):
    x, y = data(50)
    alone = trainer()
    alone.fit(x, y, epochs=3, callbacks=[Checkpoint(tmp_path, keep=3)], **FIT)
    newest, before, _ = files.in_folder(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    t = trainer()
    with pytest.warns(CheckpointWarning, match=f"{newest.name} is not a sound checkpoint: .*; going back to {before.name}"):
        t.fit(x, y, epochs=3, resume=tmp_path, callbacks=[Checkpoint(tmp_path)], **FIT)
    assert np.array_equal(weights(t), weights(alone))
    for path in files.in_folder(tmp_path):
        path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        trainer().resume(tmp_path)


def test_keep_and_best(tmp_path):
    x, y = data(60)
    t = trainer()
    t.fit(x, y, epochs=5, validation_split=0.2, callbacks=[Checkpoint(tmp_path, keep=2, best="val_accuracy")], **FIT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.checkpoint",
        "step-0000000012.checkpoint",
        "step-0000000015.checkpoint",
    ]
    best = t.history.best("val_accuracy")
    loaded = trainer()
    loaded.resume(tmp_path / "best.checkpoint")
    assert loaded.evaluate(x[48:], y[48:])["accuracy"] == best["val_accuracy"]
    assert loaded.epoch == best["epoch"]


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    x, y = data(50)
    t = trainer()
    for folder in (tmp_path / "file" / "below", Path("/proc/here")):
        with pytest.raises(CheckpointError, match="checkpoints cannot be written to"):
            t.fit(x, y, callbacks=[Checkpoint(folder)], **FIT)
    assert t.step_number == 0


FULL = """
import resource, sys
import numpy as np
import tensorwright as tw
from tensorwright.training import CheckpointError
from tensorwright.training.callbacks import Checkpoint
sys.path.insert(0, sys.argv[2])
from support import data, trainer, weights

x, y = data(50)
t = trainer()
t.fit(x, y, batch_size=16, callbacks=[Checkpoint(sys.argv[1])], verbose=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # what a full disk does to a file, to this one
try:
    t.fit(x, y, epochs=5, batch_size=16, callbacks=[Checkpoint(sys.argv[1])], verbose=False)
except CheckpointError as error:
    print(error)
    print(t.epoch, t.step_number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
t.save(sys.argv[1] + "/rescued.checkpoint")
t.fit(x, y, epochs=1, batch_size=16, verbose=False)
other = trainer()
other.fit(x, y, epochs=3, batch_size=16, verbose=False)
print(bool((weights(t) == weights(other)).all()))
"""


def test_a_full_disk_costs_neither_the_checkpoint_before_nor_the_state(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    message, numbers, same = done.stdout.splitlines()
    assert (
        "could not be written: the file is too large. Earlier checkpoints are intact, and the trainer keeps its state" in message
    )
    assert numbers == "2 8" and same == "True"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rescued.checkpoint", "step-0000000004.checkpoint"]
    assert files.read(tmp_path / "step-0000000004.checkpoint")[0]["epoch"] == 1
    assert files.read(tmp_path / "rescued.checkpoint")[0]["epoch"] == 2


def test_a_full_device_is_called_full(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    @contextmanager
    def full(folder):  # it cannot be emptied and renamed; the rest of writing stays as it is
        with open("/dev/full", "r+b", buffering=0) as file:
            yield file, folder / "beside"

    monkeypatch.setattr(files, "_writer", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer().save(tmp_path / "x.checkpoint")


# -- exceptions ---------------------------------------------------------------------------------------------------------


def test_what_a_callback_raises_leaves_the_state_usable(tmp_path):
    x, y = data(50)

    class Fails(tw.callbacks.Callback):
        closed = False

        def on_step_end(self, trainer, loss):
            if trainer.step_number == 6:
                raise ZeroDivisionError("mine")

        def on_exit(self, trainer):
            self.closed = True

    t, fails = trainer(), Fails()
    with pytest.raises(ZeroDivisionError, match="mine"):
        t.fit(x, y, epochs=3, callbacks=[fails], **FIT)
    assert fails.closed and t.step_number == 6 and t.epoch == 1 and t.batch == 2 and not t.finished
    alone = trainer()
    alone.fit(x, y, epochs=3, callbacks=[Checkpoint(tmp_path, every_steps=6, keep=None)], **FIT)
    at_six = files.read(files.step_file(tmp_path, 6))[1]
    assert all(np.array_equal(p.data, at_six[n]) for n, p in t.model.named_parameters())
    t.save(tmp_path / "rescued.checkpoint")  # in the middle of an epoch: it goes on exactly there
    t.fit(x, y, epochs=3, resume=tmp_path / "rescued.checkpoint", **FIT)
    assert np.array_equal(weights(t), weights(alone))


def test_a_checkpoint_is_json_and_safetensors_and_nothing_else(tmp_path):
    x, y = data(50)
    t = trainer()
    t.fit(x, y, **FIT)
    t.save(tmp_path / "t.checkpoint")
    raw = (tmp_path / "t.checkpoint").read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[48 : 48 + length])
    assert header["parts"][0][0] == "arrays"
    from safetensors.numpy import load

    arrays = load(raw[48 + length :])
    assert {"state/0.weight", "state/optimizer.m.0.weight", "state/optimizer.step"} <= arrays.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("history"),
        lambda meta: meta.update(model={**meta["model"], "0.weight": "float32[1]"}),
        lambda meta: meta.update(at={"metrics": 1, "unheard": 2}),
        lambda meta: meta.update(state=["not there"]),
        lambda meta: meta.update(history=[1]),
        lambda meta: meta.update(model="text"),
    ],
)
def test_a_sound_file_that_lies_is_refused_and_changes_nothing(tmp_path, change):
    x, y = data(50)
    t = trainer()
    t.fit(x, y, **FIT)
    t.save(tmp_path / "t.checkpoint")
    meta, arrays = files.read(tmp_path / "t.checkpoint")
    change(meta)
    files.write(tmp_path / "t.checkpoint", meta, {n.removeprefix("state/"): a for n, a in arrays.items()})
    t.fit(x, y, **FIT)
    before = weights(t)
    with pytest.raises(CheckpointError, match=r"does not hold the state of a Trainer|another model"):
        t.resume(tmp_path / "t.checkpoint")
    assert np.array_equal(weights(t), before) and t.epoch == 2


def test_nesting_without_end_is_refused(tmp_path):
    from safetensors.numpy import save
    from tensorwright.runtime.container import pack

    deep = {"format": 1, "meta": [], "dtypes": {}}
    for _ in range(900):
        deep["meta"] = [deep["meta"]]
    (tmp_path / "deep.checkpoint").write_bytes(pack(files.MAGIC, deep, {"arrays": save({})}))
    with pytest.raises(CheckpointError, match=r"does not hold a checkpoint|not a sound checkpoint"):
        files.read(tmp_path / "deep.checkpoint")
