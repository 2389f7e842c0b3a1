"""The examples, run at small size on stand-ins for their data; those that need no data, as a user runs them."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HELPERS = ("fetch", "support")
SAYS = {"mlp": "saved and loaded", "grad": "next point [1. 1.]", "train_digits": "digits not trained on: accuracy 0.9"}
NEEDED = {"sklearn": "scikit-learn", "pandas": "pandas", "librosa": "librosa", "rapidfuzz": "rapidfuzz", "optuna": "Optuna"}

pytestmark = pytest.mark.unvalidated("as a user runs them; and the interpreter takes minutes for some of the training steps")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of examples/ by name, as `python examples/NAME.py` would find it and what it imports."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for module, package in NEEDED.items():
        pytest.importorskip(module, reason=f"{package} is not installed (pip install 'tensorwright[examples]')")
    before = set(sys.modules)
    yield importlib.import_module
    names = {p.stem for p in EXAMPLES.glob("*.py")} | {"stand_ins"}
    for name in (set(sys.modules) - before) & names:
        del sys.modules[name]


def stand_in(example: Callable[[str], ModuleType], data: Path, *names: str) -> None:
    made = example("stand_ins")
    for name in names:
        getattr(made, name)(data)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_examples_without_fetched_data_run(name: str, tmp_path: Path) -> None:
    if name == "train_digits":
        pytest.importorskip(
            "sklearn", reason="scikit-learn, which has the digits, is not installed (pip install 'tensorwright[demo]')"
        )
    environment = {**os.environ, "TENSORWRIGHT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_every_example_says_how_to_run_it_and_is_in_the_docs() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        if path.stem in HELPERS:
            continue
        head = path.read_text().split('"""')[1]
        assert f"python examples/{path.name}" in head, path.name
        assert path.stem in SAYS or f"examples/{path.name}" in page, f"docs/examples.md does not tell of {path.name}"


def test_linear_regression(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "tables")
    assert example("linear_regression").main(tmp_path)["max_difference"] < 1e-3


def test_mnist_dense(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    assert example("mnist_dense").main(tmp_path, epochs=4)["test_accuracy"] > 0.85


def test_mnist_one_hot(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    figures = example("mnist_one_hot").main(tmp_path, epochs=4)
    assert figures["test_accuracy"] > 0.8
    confusion = np.array(figures["confusion"])
    assert confusion.sum() == 297
    assert np.trace(confusion) / 297 == pytest.approx(figures["test_accuracy"])


def test_mnist_augmented(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    figures = example("mnist_augmented").main(tmp_path, epochs=4)
    assert figures["test_accuracy"] > 0.5  # four epochs of 24 steps, on images that are never the same
    assert figures["loaded_agrees"]


def test_augmentation_moves_images_and_keeps_their_kind(example: Any) -> None:
    module = example("mnist_augmented")
    x = np.zeros((64, 28, 28), np.float32)
    x[:, 10:18, 10:18] = 1
    y = np.arange(64)
    new, labels = module.augment(x, y, np.random.default_rng(0))
    assert new.shape == x.shape and new.dtype == np.float32 and labels is y
    assert len(np.unique(new.reshape(64, -1), axis=0)) == 64
    assert new.min() >= 0 and new.max() <= 1 + 1e-6
    assert 0.4 < new.sum() / x.sum() < 1.1  # moved within the frame; erasing takes a little
    again, _ = module.augment(x, y, np.random.default_rng(0))
    assert np.array_equal(new, again)


def test_mnist_convnet(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    assert example("mnist_convnet").main(tmp_path, epochs=3)["test_accuracy"] > 0.7


def test_mnist_pruned(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    figures = example("mnist_pruned").main(tmp_path, epochs=3, more=2)
    assert abs(figures["zeros"] - 0.8) < 1e-3 and figures["test_accuracy"] > 0.7


def test_emoji_cnn(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "emoji")
    figures = example("emoji_cnn").main(tmp_path, epochs=6)
    assert figures["plain_accuracy"] > 0.6
    assert figures["normalised_accuracy"] > 0.5


def test_quantized_cnn(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist", "emoji")
    small: dict[str, Any] = {"mnist_epochs": 3, "emoji_epochs": 6, "rate": 1e-4, "weights": str(tmp_path / "kept")}
    figures = example("quantized_cnn").main(tmp_path, **small)
    for name in ("mnist", "plain", "normalised"):  # one of 24 emoji is 4.2 points
        assert figures[f"{name}_float"] > 50 and abs(figures[f"{name}_lost"]) < 4.3 and figures[f"{name}_aware_lost"] < 4.3
    net = example("mnist_convnet").ConvNet()
    before = net.conv1.weight.data.copy()
    assert example("quantized_cnn").floats(net, small["weights"], "mnist_convnet", lambda: pytest.fail("it was kept")) is net
    assert not np.array_equal(before, net.conv1.weight.data)


def test_quantized_models(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "cifar", "minilm", "shakespeare")
    figures = example("quantized_models").main(tmp_path, count=2, length=8, heads=2)
    assert figures["cifar_kept"] >= 3 and figures["minilm_cosine"] > 0.99  # weights of chance
    module = example("quantized_models")
    vocabulary = {p: k for k, p in enumerate(("[CLS]", "[SEP]", "[UNK]", "so", "long", "##er", "lo", "##ng", "."))}
    assert module.pieces("So longer, xy.", vocabulary) == [0, 3, 4, 5, 2, 2, 8, 1]


def test_resnet18_pruned(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    stand_in(example, tmp_path, "emoji")
    figures = example("resnet18_pruned").main(
        tmp_path, epochs=0, more=0, width=4, rounds=2
    )  # a training step takes long to compile
    assert figures["parameters"] < 0.35 and figures["onnx_channels"] == 16  # of 32
    assert figures.get("onnx_difference", 0.0) < 1e-4  # where ONNX Runtime is installed


def test_no_emoji_is_in_two_parts(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "emoji")
    parts, labels, classes = example("emoji_cnn").load(tmp_path, seed=0)
    pictures = [{image.tobytes() for image in part} for part in parts]
    assert not pictures[0] & pictures[2] and not pictures[0] & pictures[1] and not pictures[1] & pictures[2]
    assert [len(y) for y in labels] == [86, 10, 24] and len(classes) == 3


def test_speech_classes(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "clips", "vowels")
    figures = example("speech_classes").main(tmp_path, epochs=60, speaker_epochs=30, frames=30, hidden=16)
    assert figures["language_accuracy"] > 0.5  # chance is 0.2
    assert figures["speaker_accuracy"] > 0.5  # chance is 0.11
    sequences, labels = example("speech_classes").clips(tmp_path, 30)
    assert len(sequences) == len(labels) == 30  # six a language: the silence is left out
    assert {s.shape[1] for s in sequences} == {13} and max(map(len, sequences)) == 30


def test_digit_strings(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(example, tmp_path, "tidigits")
    module = example("digit_strings")
    monkeypatch.setattr(module, "speak", example("stand_ins").speak)
    monkeypatch.setattr(module, "voices", lambda: ["john", "m3", "m4", "m5"])
    figures = module.main(tmp_path, epochs=45, train_strings=160, test_strings=20, hidden=32, length=50, batch_size=8, rate=1e-2)
    assert figures["word_errors"] < 0.5
    assert figures["tidigits_utterances"] == 2
    assert len(list(tmp_path.glob("digit-strings-*.npz"))) == 2


def test_tidigits_are_read_in_both_byte_orders(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "tidigits")
    (six, features), (zero, others) = example("digit_strings").tidigits(tmp_path / "tidigits")
    assert six.tolist() == [6, 10, 8, 3, 8] and zero.tolist() == [0]
    assert features.shape == others.shape == (40, 39)
    assert abs(features.mean()) < 1e-6 and abs(others.mean()) < 1e-6


def test_decoders_against_all_alignments(example: Any) -> None:
    """On short sequences the probability of a string is the sum over every alignment that spells it."""
    module = example("digit_strings")
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.standard_normal((5, 3)) * 1.5
        log_p = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        total: dict[tuple[int, ...], float] = {}
        for path in np.ndindex(*(3,) * 5):
            spelt = tuple(s for i, s in enumerate(path) if s and (i == 0 or path[i - 1] != s))
            total[spelt] = total.get(spelt, 0.0) + math.exp(sum(log_p[t, s] for t, s in enumerate(path)))
        assert tuple(module.beam_search(log_p, width=100)) == max(total, key=lambda k: total[k])
    blank, a, b = np.log(np.eye(3) * 0.97 + 0.01)
    assert module.greedy(np.array([a, a, blank, a, b, blank])) == [1, 1, 2]
    assert module.greedy(np.array([blank, blank])) == module.beam_search(np.array([blank, blank])) == []


def test_shakespeare(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "shakespeare")
    picture = tmp_path / "curve.png"
    figures = example("shakespeare").main(
        tmp_path, epochs=2, steps=40, batch_size=8, context=16, width=16, layers=1, heads=2, rate=1e-2, plot=str(picture)
    )
    assert figures["held_out_nats"] < 2.5  # 23 kinds of characters: log 23 = 3.1 knowing nothing
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert figures["characters_read"] == 2 * 40 * 8 * 16


def test_clean_table(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "tables")
    figures = example("clean_table").main(tmp_path, folds=2, epochs=20)
    assert figures["biopsy_auc"] > 0.9 and figures["penguins_auc"] > 0.9
    assert figures["worst_loss_to_logistic"] < 0.1


def test_cleaning_leaves_no_gap(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "tables")
    module = example("clean_table")
    for table, y in (module.biopsy(tmp_path), module.penguins(tmp_path)):
        x = module.preparation(table).fit_transform(table)
        assert np.isfinite(x).all() and len(x) == len(y) and set(y) == {0.0, 1.0}


def test_mnist_search(example: Any, tmp_path: Path) -> None:
    stand_in(example, tmp_path, "mnist")
    figures = example("mnist_search").main(tmp_path, trials=2, trial_epochs=1, epochs=2, held_out=200)
    assert figures["test_accuracy"] > 0.6
    assert figures["hidden"] >= 32


# ---------------------------------------------------------------------- their command line


def test_command_line_writes_figures_and_judges_them(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(
        "'''A tiny example.'''\n"
        "from support import run\n"
        "def main(data, wanted: float = 0.5, plot: str = 'a.png'):\n"
        "    return {'accuracy': wanted, 'where': str(data)}\n"
        "run(main, at_least={'accuracy': 0.9})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(tmp_path / "tiny.py"),
            "--data",
            str(tmp_path),
            "--json",
            str(tmp_path / "out.json"),
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    full = call("--plot", "b.png")
    assert full.returncode == 1
    assert "not reached: accuracy 0.5000, at least 0.9 expected" in full.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["full"] and written["figures"]["accuracy"] == 0.5 and written["at_least"] == {"accuracy": 0.9}
    assert written["example"] == "tiny" and written["figures"]["where"] == str(tmp_path)
    small = call("--wanted", "0.1")  # other than the stated settings: nothing to reach
    assert small.returncode == 0
    assert not json.loads((tmp_path / "out.json").read_text())["full"]


def test_missing_data_names_the_command(example: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python examples/fetch\.py"):
        example("mnist_dense").main(tmp_path)


def test_folder_of_the_data(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = example("support").data_folder
    monkeypatch.delenv("TENSORWRIGHT_DATA", raising=False)
    assert folder() == Path("~/.cache/tensorwright/data").expanduser()
    monkeypatch.setenv("TENSORWRIGHT_DATA", str(tmp_path))
    assert folder() == tmp_path
    assert folder(tmp_path / "given") == tmp_path / "given"
