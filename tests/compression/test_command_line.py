"""`tensorwright quantize`, `prune` and `compress` in this process: what they write, and what they say of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli, nn
from tensorwright.ir.graph import Graph

pytestmark = pytest.mark.unvalidated("calibration compiles a graph with many outputs each time; tests/passes validate the passes")

MODEL = """
import tensorwright as tw
from tensorwright import nn

tw.seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
specs = [tw.spec("N", 1, 8, 8)]
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(70, 1, 8, 8)).astype(np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _graph() -> Graph:
    """The model of net.py, for batches of any size."""
    tw.seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    g = tw.trace(model, tw.spec("N", 1, 8, 8))
    return Graph(g.inputs, g.outputs, weights=model.state_dict())


def test_a_model_becomes_files(files: Path) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    arguments = ["quantize", f"{files}/net.py:model", "--calibration", f"{files}/x.npy", "--report", f"{files}/r.html"]
    assert cli.main([*arguments, "--json", f"{files}/r.json", "-o", f"{files}/q.onnx"]) == 0
    said = json.loads((files / "r.json").read_text())
    assert said["totals"]["layers"] == {"int8": 2}
    assert said["settings"]["batches"] == 2
    assert "<table>" in (files / "r.html").read_text()
    assert cli.main([*arguments, "-o", f"{files}/q.tw", "--keep", "3*", "--method", "mse"]) == 0
    x = np.load(files / "x.npy")[:5]
    one, two = tw.compile(tw.onnx.load(files / "q.onnx"))(x), tw.load(files / "q.tw")(x)
    assert one.shape == (5, 3)
    assert 0 < np.abs(one - two).max() < 0.05 * np.abs(two).max()


@pytest.mark.parametrize(
    "options, choices",
    [
        (["--weights-as", "codebook4", "--group", "16"], {"codebook4": 1, "int8": 1}),
        (["--weights-as", "bfloat16"], {"bfloat16": 2}),
        (["--activations", "dynamic", "--smooth", "none"], {"int8": 2}),
        (["--only", "activations", "--activations", "int8", "--calibration", "x.npy"], {"int8": 2}),
    ],
)
def test_kinds_of_weights_and_activations(files: Path, options: list[str], choices: dict[str, int]) -> None:
    assert cli.main(["quantize", "net.py:model", *options, "-o", "k.tw", "--json", "k.json"]) == 0
    assert json.loads(Path("k.json").read_text())["totals"]["layers"] == choices
    x = np.load("x.npy")[:4]
    floats = np.abs(y := tw.compile(_graph())(x)).max()
    assert 0 < np.abs(tw.load("k.tw")(x) - y).max() < 0.1 * floats


@pytest.mark.parametrize("form", ["onnx", "tw"])
def test_files_of_models_are_taken_and_options_reach_the_functions(files: Path, form: str) -> None:
    pytest.importorskip("onnx", reason="the onnx extra")
    tw.onnx.save(_graph(), "m.onnx")
    tw.compile(_graph()).save("m.tw")
    np.save("y.npy", tw.compile(_graph())(np.load("x.npy")).argmax(1))
    data = ["--calibration", "x.npy", "--html", "r.html", "--json", "r.json"]

    def said(*command: str) -> dict[str, Any]:
        assert cli.main([*command[:1], f"m.{form}", *command[1:], *data]) == 0
        assert "<svg" in Path("r.html").read_text()
        found: dict[str, Any] = json.loads(Path("r.json").read_text())
        return found

    q = said("quantize", "--method", "entropy", "--bias-correction", "--equalize", "--smooth", "0.5", "--per-tensor")
    wanted = {"method": "entropy", "bias_correction": True, "equalize": True, "smooth": 0.5, "per_channel": False}
    assert {k: q["settings"][k] for k in wanted} == wanted and q["totals"]["layers"] == {"int8": 2}
    by_layer = said("prune", "--ratio", "3*=0.75", "--labels", "y.npy", "--criterion", "taylor", "--dense")
    assert [x["zeros"] for x in by_layer["layers"]] == [0, 0.75]
    sensitive = said("prune", "--ratio", "0.5", "--labels", "y.npy", "--scope", "sensitivity", "--metric", "accuracy", "--dense")
    assert sensitive["sparsity"] == pytest.approx(0.5, abs=0.01)
    tried = ("--kinds", "sparse", "--patterns", "unstructured", "--sparsities", "0.8", "--max-drop", "1", "--validation", "0.5")
    c = said("compress", "--labels", "y.npy", *tried)
    assert c["settings"]["kinds"] == ["fp32", "sparse", "sparse unstructured 80%"]
    assert c["settings"]["judged on"] == "32 rows held out, searched on 32"


X = "--calibration x.npy"


@pytest.mark.parametrize(
    "command, said",
    [
        ("quantize", "--calibration FILE.npy: typical inputs are needed"),
        ("quantize --calibration none.npy", "one or more inputs each"),
        (f"quantize {X} -o q.bin", "written as .onnx or .tw"),
        (f"quantize {X} --report q.txt", "--report q.txt: the report is written as .html or .json"),
        (f"quantize {X} --keep 9", "--keep: keep: no layer is named ['9']"),
        (f"quantize {X} --percentile 10", "--percentile: percentile is above 50"),
        (f"quantize {X} --smooth 2", "--smooth 2: auto, none, or a number from 0 to 1"),
        ("quantize --weights-as int4 --group 12", "--group: group is how many inputs share a scale"),
        ("quantize --weights-as int4 --activations uint8 " + X, "--weights-as: weights='int4'"),
        ("quantize --only weights --activations int8", "--only weights and --activations int8 exclude each other"),
        ("quantize --only weights --bias-correction", "--calibration FILE.npy: typical inputs are needed for --bias-correction"),
        ("prune --ratio 1.5", "--ratio 1.5: a share between 0 and 1"),
        ("prune --ratio 0.5 --ratio 3=0.5", "give one share for all layers, or NAME=SHARE each"),
        ("prune --ratio 9=0.5", "--layer, --exclude or --ratio: prune: no parameter's path fits '9'"),
        ("prune", "--ratio: ratio is missing"),
        ("prune --ratio 0.5 --pattern 5:4", "--pattern 5:4: the pattern '5:4' keeps N of M"),
        ("prune --ratio 0.5 --scope sensitivity", "--calibration FILE.npy: --scope sensitivity needs typical inputs"),
        (f"prune --ratio 0.5 --criterion taylor {X}", "--labels FILE.npy: --criterion taylor"),
        ("compress", "--calibration FILE.npy: typical inputs are needed"),
        (f"compress {X} --kinds int7", "--kinds: kinds are"),
        (f"compress {X} --max-drop -1", "--max-drop: max_drop is how much"),
        (f"compress {X} --sparsities 0.5,2", "--sparsities 2: a share between 0 and 1"),
        (f"compress {X} --patterns 5x", "--patterns 5x: there is no pattern '5x'"),
        (f"compress {X} --validation 1.5", "--validation 1.5: a share between 0 and 1"),
        (f"compress {X} --validation-labels y.npy", "--validation-labels belongs to the files of --validation"),
        (f"compress {X} --metric accuracy", "--metric: metric='accuracy' compares with labels"),
    ],
)
def test_what_is_missing_or_wrong(files: Path, capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    name, *options = command.split()
    assert cli.main([name, "net.py:model", *options]) == 1
    assert said in capsys.readouterr().err
