"""Histories: columns, the best row, JSON, pictures."""

from __future__ import annotations

import json

import pytest
from tensorwright.ir.errors import InputError
from tensorwright.training import History


def history() -> History:
    rows = [
        {"epoch": 1, "loss": 2.0, "accuracy": 0.5, "val_loss": 2.5, "learning_rate": 0.1, "seconds": 1.0},
        {"epoch": 2, "loss": 1.0, "accuracy": 0.7, "val_loss": float("nan"), "learning_rate": 0.1, "seconds": 1.0},
        {"epoch": 3, "loss": 1.5, "accuracy": 0.6, "learning_rate": 0.1, "seconds": 1.0},
    ]
    return History(rows)


def test_columns():
    h = history()
    assert h.column("loss") == [2.0, 1.0, 1.5] and h.column("val_loss")[2] is None
    assert h.names() == ["epoch", "loss", "accuracy", "val_loss", "learning_rate", "seconds"]
    with pytest.raises(InputError, match="no epoch of the history reports 'f1'; there are epoch, loss"):
        h.column("f1")


def test_best_knows_which_way_is_up():
    h = history()
    assert h.best("loss")["epoch"] == 2 and h.best("accuracy")["epoch"] == 2 and h.best("val_loss")["epoch"] == 1
    assert h.best("loss", mode="max")["epoch"] == 1
    with pytest.raises(InputError, match="mode is 'min', 'max' or None"):
        h.best("loss", mode="up")


def test_json(tmp_path):
    text = history().to_json(tmp_path / "h.json")
    rows = json.loads((tmp_path / "h.json").read_text())
    assert rows == json.loads(text)
    assert rows[0] == history()[0] and rows[1]["val_loss"] is None


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [train]")
    h = history()
    h[0]["confusion_matrix"] = [[1, 2], [3, 4]]
    h.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    h.plot(tmp_path / "loss.svg", names=["loss"])
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    with pytest.raises(InputError, match="no epoch"):
        History().plot(tmp_path / "none.png")
    with pytest.raises(InputError, match="reports 'f1'"):
        h.plot(tmp_path / "none.png", names=["f1"])
