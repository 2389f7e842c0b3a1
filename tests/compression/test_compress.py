"""`tw.compress`: what it chooses by times and a metric that the tests give, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli, nn
from tensorwright.compression.compress import crossing
from tensorwright.compression.search import Candidate, Search
from tensorwright.compression.search_kinds import FLOATS, Kind
from tensorwright.compression.search_times import WHOLE, Clock, Owners, paces
from tensorwright.ir.errors import InputError
from tensorwright.ir.graph import Graph
from tensorwright.passes.layers import find_layers

pytestmark = pytest.mark.unvalidated("each model is compiled in every kind of layer; tests/passes validate the passes")
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 32), dtype=np.float32)
DATA = [(X[:24],), (X[24:],)]


class Two(nn.Module):
    """Two layers, each with a result of its own."""

    def __init__(self) -> None:
        tw.seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)

    def __call__(self, x: Any) -> Any:
        h = tw.relu(self.first(x))
        return h, self.second(h)


def mlp() -> nn.Module:
    tw.seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


def kinds_in(graph: Graph) -> dict[str, str]:
    """What the weights of each layer are stored as, by the layer's name."""
    found: dict[str, str] = {}
    for i in graph.inputs:
        name, _, what = str(i.attrs["name"]).rpartition(".")
        if i.attrs["role"] == "parameter" and what in ("weight", "weight_q", "bf16", "values"):
            found[name.removesuffix(".weight")] = {"weight": "fp32", "weight_q": "int8", "bf16": "bf16", "values": "sparse"}[what]
    return found


def stopwatch(**ms: Mapping[str, float] | float) -> Callable[[Graph], dict[str, float]]:
    """A clock: milliseconds by kind for each layer, 1.0 where nothing is said."""

    def measure(graph: Graph) -> dict[str, float]:
        kinds = kinds_in(graph)
        times = {}
        for n, k in kinds.items():
            given = ms.get(k, 1.0)
            times[n] = given if isinstance(given, float) else given.get(n, 1.0)
        return {**times, WHOLE: sum(times.values())}

    return measure


def test_a_layer_takes_the_kind_that_measures_faster() -> None:
    made = tw.compress(
        mlp(), DATA, kinds=["int8", "bf16"], measure=stopwatch(int8={"0": 0.2, "2": 3.0}, bf16={"0": 0.5, "2": 0.99})
    )
    assert kinds_in(made.graph) == {"0": "int8", "2": "fp32"}
    first, second = made.report.layers
    assert (first.choice, first.predicted_ms, first.original_ms) == ("int8", 0.2, 1.0)
    assert second.choice == "fp32" and "nothing is faster: bf16 takes 0.9900 ms against 1.0000" in second.reason
    assert made.report.ratio == pytest.approx(1.2 / 2) and made.report.totals["layers"] == {"int8": 1, "fp32": 1}
    assert made.report.bytes_after == sum(np.asarray(w).nbytes for w in made.graph.weights.values()) < made.report.bytes_before
    assert tw.compile(made.graph)(X).shape == (48, 16)


def test_a_layer_that_the_metric_punishes_stays_float() -> None:
    model = Two()
    floats = tw.compile(model, tw.spec(48, 32))(X)

    def metric(results: tuple[Array, ...]) -> float:
        return -float(np.abs(results[0] - floats[0]).max())

    made = tw.compress(model, DATA, metric, max_drop=1e-6, kinds="int8", measure=stopwatch(int8=0.1))
    assert kinds_in(made.graph) == {"first": "fp32", "second": "int8"}
    drop = made.report.layers[0].options[1].drop
    assert "costs" in made.report.layers[0].reason and drop is not None and drop > 1e-3
    assert metric(tw.compile(made.graph)(X)) >= -1e-6
    everything = tw.compress(model, DATA, metric, max_drop=10, kinds="int8", measure=stopwatch(int8=0.1))
    assert kinds_in(everything.graph) == {"first": "int8", "second": "int8"}


def test_no_drop_at_all_keeps_every_answer() -> None:
    model = mlp()
    made = tw.compress(model, DATA, max_drop=0, kinds=["int8", "sparse"], measure=stopwatch(int8=0.5, sparse=0.1))
    assert made.report.settings["metric"] == "agreement" and made.report.metric_after == 1
    before, after = tw.compile(model, tw.spec(48, 32))(X), tw.compile(made.graph)(X)
    assert np.array_equal(before.argmax(1), after.argmax(1))


def test_a_model_that_is_slower_as_a_whole_is_not_returned() -> None:
    def measure(graph: Graph) -> dict[str, float]:
        times = stopwatch(int8=0.1)(graph)
        return times | {WHOLE: 5.0 if "int8" in kinds_in(graph).values() else 2.0}

    made = tw.compress(mlp(), DATA, max_drop=1, kinds="int8", measure=measure)
    assert set(kinds_in(made.graph).values()) == {"fp32"} and made.report.ratio == 1
    assert "took 2.500 of the original's time" in str(made)


def test_a_layer_that_is_slower_among_others_goes_back() -> None:
    """Alone in its kind it looked faster; beside layers of other kinds it is not."""

    def measure(graph: Graph) -> dict[str, float]:
        times, kinds = stopwatch(int8={"2": 0.5}, bf16={"0": 0.5, "2": 2.0})(graph), kinds_in(graph)
        if kinds == {"0": "bf16", "2": "int8"}:
            times |= {"2": 2.0, WHOLE: 2.5}
        return times

    made = tw.compress(mlp(), DATA, max_drop=1, kinds=["int8", "bf16"], measure=measure)
    assert kinds_in(made.graph) == {"0": "bf16", "2": "fp32"}
    assert "2 went back to floats" in str(made)


@pytest.mark.parametrize("without, choices", [(1.1, ("bf16", "fp32")), (1.9, ("bf16", "int8"))])
def test_a_layer_that_does_not_help_goes_back_where_that_is_faster(without: float, choices: tuple[str, str]) -> None:
    """The mixture is faster than the original, but its second layer slower than it was: the whole decides."""

    def measure(graph: Graph) -> dict[str, float]:
        times, kinds = stopwatch(int8={"0": 3.0, "2": 0.5}, bf16={"0": 0.1, "2": 2.0})(graph), kinds_in(graph)
        if kinds == {"0": "bf16", "2": "int8"}:
            times |= {"2": 1.5, WHOLE: 1.6}
        return times | ({WHOLE: without} if kinds == {"0": "bf16", "2": "fp32"} else {})

    made = tw.compress(mlp(), DATA, max_drop=1, kinds=["int8", "bf16"], measure=measure)
    assert tuple(x.choice for x in made.report.layers) == choices
    assert kinds_in(made.graph) == dict(zip("02", choices, strict=True))
    assert made.report.measured_ms == (1.1 if without == 1.1 else 1.6)
    assert ("which made it faster" in str(made)) == (without == 1.1)


def test_size_counts_bytes_and_asks_for_no_more_time() -> None:
    kinds = ["int8 weights", "int4 weights", "bf16"]
    made = tw.compress(mlp(), DATA, max_drop=1, objective="size", kinds=kinds, measure=stopwatch())
    assert [x.choice for x in made.report.layers] == ["int4 weights", "int4 weights"]
    assert made.report.bytes_after < made.report.bytes_before / 4
    kept = tw.compress(mlp(), DATA, max_drop=1, objective="size", kinds=kinds, keep="2", measure=stopwatch())
    assert kinds_in(kept.graph)["2"] == "fp32" and kept.report.layers[1].reason == "asked to be kept"


def test_channels_go_that_nothing_misses() -> None:
    """Half of the hidden units are read with weights of zero, or nearly."""
    model = mlp()
    weights = model.state_dict()
    weights["2.weight"] = np.where(np.arange(32) < 16, weights["2.weight"], np.float32(1e-9))
    weights["0.weight"] = np.where(np.arange(32)[:, None] < 16, weights["0.weight"], np.float32(1e-3))
    model.load_state_dict(weights)

    def measure(graph: Graph) -> dict[str, float]:
        times = {n: float(np.asarray(graph.weights[f"{n}.weight"]).size) for n in ("0", "2")}
        return {**times, WHOLE: sum(times.values())}

    made = tw.compress(model, DATA, max_drop=0, kinds="pruned", measure=measure)
    assert [(x.choice, x.measured_ms) for x in made.report.layers] == [("pruned", 512), ("pruned", 256)]
    assert made.report.ratio == 0.5 and "50.0% of 0" in str(made) and made.report.bytes_after < made.report.bytes_before
    assert np.allclose(tw.compile(made.graph)(X), tw.compile(model, tw.spec(48, 32))(X), atol=1e-5)
    whole = tw.compress(mlp(), DATA, max_drop=0, kinds="pruned", measure=measure)
    assert [x.choice for x in whole.report.layers] == ["fp32", "fp32"] and "no channels can go" in str(whole)


def test_integers_read_smoothed_channels() -> None:
    """Two channels of a norm are 40 times the others: as in `tw.quantize` they do not take the others' bits."""
    tw.seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
    weights = model.state_dict()
    weights["0.weight"] = np.where(np.arange(32) < 2, np.float32(40), np.float32(1))
    weights["1.weight"] = weights["1.weight"] * np.where(np.arange(32) < 2, np.float32(0.01), np.float32(1))
    model.load_state_dict(weights)
    floats = tw.compile(model, tw.spec(48, 32))(X)

    def off(graph: Graph) -> float:
        return float(np.sqrt(np.mean((tw.compile(graph)(X) - floats) ** 2) / np.mean(floats**2)))

    made = tw.compress(model, DATA, "cosine", max_drop=1, kinds="int8", measure=stopwatch(int8=0.1))
    assert kinds_in(made.graph)["1"] == "int8" and "smooth.0" in made.graph.weights
    plain, smooth = (off(tw.quantize(model, DATA, method="mse", smooth=s)) for s in (None, "auto"))
    assert off(made.graph) == pytest.approx(smooth, rel=1e-3) and smooth < plain / 3
    assert made.report.layers[0].error == pytest.approx(smooth, rel=0.1)  # by the probe, in floats
    left = tw.compress(model, DATA, "cosine", max_drop=1, kinds=["int8", "bf16"], measure=stopwatch(int8=3.0, bf16=0.1))
    assert kinds_in(left.graph)["1"] == "bf16" and "smooth.0" not in left.graph.weights


def test_labels_are_what_the_metric_is_given_and_accuracy_is_the_default() -> None:
    model = mlp()
    labels = tw.compile(model, tw.spec(48, 32))(X).argmax(1)
    data = [(X[:24], labels[:24]), (X[24:], labels[24:])]
    made = tw.compress(model, data, kinds="int8", measure=stopwatch(int8=0.1), max_drop=0)
    assert made.report.settings["metric"] == "accuracy" and made.report.metric_before == 1 == made.report.metric_after
    seen: list[tuple[int, ...]] = []

    def metric(y: Array, t: Array) -> float:
        seen.append((*y.shape, *t.shape))
        return 0.0

    tw.compress(model, data, metric, kinds="int8", measure=stopwatch(int8=0.1))
    assert set(seen) == {(48, 16, 48)}


def test_the_result_is_judged_on_data_that_the_search_has_not_seen() -> None:
    """The rows of the search allow anything, those held out allow no integers; and the other way round."""
    model = mlp()
    floats = tw.compile(model, tw.spec(24, 32))
    held = RNG.standard_normal((24, 32), dtype=np.float32)

    def metric(y: Array, t: Array) -> float:
        """Minus the largest difference, where targets are given."""
        return -float(np.abs(y - t).max()) if np.isfinite(t).all() else 0.0

    def batch(x: Array, judged: bool) -> tuple[Array, Array]:
        return x, floats(x) if judged else np.full((24, 16), np.inf, np.float32)

    strict = [batch(X[:24], False), batch(held, True)]
    options: dict[str, Any] = {"kinds": "int8", "max_drop": 1e-6, "measure": stopwatch(int8=0.1)}
    seen = tw.compress(model, strict[:1], metric, **options)
    assert set(kinds_in(seen.graph).values()) == {"int8"} and seen.report.settings["judged on"] == "the 24 rows of the search"
    made = tw.compress(model, strict[:1], metric, **options, validation=strict[1:])
    assert set(kinds_in(made.graph).values()) == {"fp32"} and "layers went back to floats" in str(made)
    assert made.report.settings["judged on"] == "24 rows held out, searched on 24" and made.report.metric_after == 0
    share = tw.compress(model, [*strict, batch(X[24:], False)], metric, **options, validation=0.3)  # the batch in the middle
    assert set(kinds_in(share.graph).values()) == {"fp32"} and share.report.settings["judged on"] == made.report.settings[
        "judged on"
    ].replace("searched on 24", "searched on 48")


def test_this_machine_times_layers_in_the_model_and_tells_their_kernels_apart() -> None:
    tw.seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 16)
    )
    x = RNG.standard_normal((16, 3, 8, 8), dtype=np.float32)
    made = tw.compress(model, [x], kinds=["int8", "sparse"], batch=2, max_drop=1, sparsities=(0.5, 0.75))
    assert made.report.settings["timed"] == {"x": [2, 3, 8, 8]}
    assert [x.name for x in made.report.layers] == ["0", "2", "5"]
    assert all(x.measured_ms > 0 and x.predicted_ms > 0 for x in made.report.layers)
    assert list(made.report.break_even) == ["block 1x16"]
    graph = tw.trace(model, tw.spec(2, 3, 8, 8))
    graph = Graph(graph.inputs, graph.outputs, weights=model.state_dict())
    layers = find_layers(graph)
    exe = Clock(graph, layers, [x[:2]], {}).compiled(graph)
    owners = Owners(graph, layers).of_kernels(exe.profile(x[:2], repeats=1).kernels, exe.compiled.run.inputs)
    assert list(dict.fromkeys(owners)) == ["0", "2", "5"], "in the order in which they run, none without a layer"


def test_a_machine_that_changes_its_pace_does_not_tear_models_apart() -> None:
    """Two models alike, of which the one is slow in a little less than half of the rounds, the other in a little more."""
    slow = np.repeat([1.0, 1.5], [13, 11]), np.repeat([1.0, 1.5], [11, 13])
    assert np.median(slow[1]) == 1.5 * np.median(slow[0])
    first, second = (np.median(t / paces(slow)) for t in slow)
    assert second == pytest.approx(first) and np.allclose(paces([np.array([2.0, 3.0, 2.0])]), [1, 1.5, 1])


def test_reports_are_text_json_and_a_page_with_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tw.compress(mlp(), DATA, max_drop=0.1, kinds=["int8"], measure=stopwatch(int8={"0": 0.2, "2": 3.0}))
    for name in ("r.json", "r.html"):
        made.report.save(tmp_path / name)
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["totals"]["predicted_within_a_quarter"] == 1 and said["layers"][0]["options"][1]["ms"] == 0.2
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 3 and "<td>int8</td>" in page and "src=" not in page
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in made.report.html()


def test_what_makes_no_sense_is_refused() -> None:
    clock = stopwatch(int8=0.1)
    for options, said in (
        ({"metric": 3}, "metric is a function of results and targets"),
        ({"metric": "loss"}, "metric is a function"),
        ({"metric": lambda y: float("nan")}, "gave nan: a finite number is expected"),
        ({"metric": lambda y: None}, "gave None: a number is expected"),
        ({"metric": "accuracy"}, "compares with labels"),
        ({"max_drop": -0.1}, "max_drop is how much"),
        ({"max_drop": float("nan")}, "max_drop is how much"),
        ({"objective": "speed"}, "objective is 'latency' or 'size', not 'speed'"),
        ({"kinds": "int7"}, "there is no 'int7'"),
        ({"keep": "9"}, "no layer is named ['9']"),
        ({"batch": 0}, "batch is a number of at least 1"),
        ({"method": "guess"}, "method is one of"),
        ({"measure": 1.0}, "measure is a function"),
        ({"validation": 1.5}, "validation is batches, or the share of them"),
        ({"validation": []}, "validation is empty"),
        ({"validation": [(X, X)]}, "validation: batch 0 has 2 arrays, batch 0 of data has 1"),
        ({"validation": [(X * np.inf,)]}, "validation: batch 0 holds NaN"),
        ({"measure": lambda g: {"0": 1.0}}, "of the whole call under ''"),
    ):
        with pytest.raises(InputError, match=said.replace("[", r"\[").replace("]", r"\]")):
            tw.compress(mlp(), DATA, **{"measure": clock, **options})
    with pytest.raises(InputError, match="holds out whole batches, and data is one"):
        tw.compress(mlp(), DATA[:1], measure=clock, validation=0.5)
    for data, said in (
        ([], "data is empty"),
        ([(X[:0],)], "data is empty"),
        (X, "iterable of batches"),
        ([(X * np.nan,)], "NaN"),
    ):
        with pytest.raises(InputError, match=said):
            tw.compress(mlp(), data, measure=clock)


def test_the_search_takes_back_what_harms_most_for_what_it_saves() -> None:
    def of(kind: str, cost: float, drop: float) -> Candidate:
        return Candidate(Kind(kind), cost, cost, 0, drop, 0.0)

    units = {
        "a": [of("fp32", 10, 0), of("int8", 2, 0.01), of("bf16", 5, 0.0), of("sparse", 1, 0.5)],
        "b": [of("fp32", 4, 0), of("int8", 1, 0.2)],
        "c": [of("fp32", 3, 0), of("int8", 4, 0.0)],
    }
    asked: list[float] = []

    def allows(limit: float) -> Callable[[Mapping[str, Candidate]], bool]:
        def holds(mixture: Mapping[str, Candidate]) -> bool:
            asked.append(sum(c.drop for c in mixture.values()))
            return asked[-1] <= limit

        return holds

    for limit, expected in (
        (1.0, ("sparse", "int8", "fp32")), (0.3, ("int8", "int8", "fp32")), (0.1, ("int8", "fp32", "fp32")),
        (0.0, ("bf16", "fp32", "fp32")),
    ):  # fmt: skip
        search = Search(units, allows(limit))
        mixture, _ = search.cheapest()
        mixture = search.improved(mixture, 10)
        assert tuple(mixture[n].kind.family for n in "abc") == expected
    assert FLOATS.name == "fp32"


def test_break_even_is_where_the_times_cross() -> None:
    assert crossing([(0.5, 3.0), (0.75, 1.0)], 2.0) == pytest.approx(0.625)
    assert crossing([(0.5, 2.0), (0.75, 1.0)], 3.0) == pytest.approx(0.25)
    assert crossing([(0.5, 2.0), (0.75, 1.0)], 9.0) == 0.0
    assert crossing([(0.5, 3.0), (0.75, 2.5)], 1.0) is None


MODEL = """
import tensorwright as tw
from tensorwright import nn

tw.seed(0)
net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
specs = [tw.spec("N", 32)]
"""


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    np.save("x.npy", X)
    options = [
        "--calibration",
        "x.npy",
        "--max-drop",
        "1",
        "--objective",
        "size",
        "--kinds",
        "int8 weights",
        "--timed-batch",
        "1",
    ]
    assert cli.main(["compress", "m.py:net", *options, "-o", "c.tw", "--report", "r.html", "--json", "r.json"]) == 0
    assert json.loads(Path("r.json").read_text())["settings"]["metric"] == "agreement" and "<svg" in Path("r.html").read_text()
    assert tw.load("c.tw")(X).shape == (48, 16)
    assert cli.main(["prune", "m.py:net", "--spec", "8,32", "--ratio", "0.5", "--dense", "--report", "p.html"]) == 0
    assert "What is left of each layer" in Path("p.html").read_text()
    assert cli.main(["compress", "m.py:net"]) == 1 and "--calibration FILE.npy" in capsys.readouterr().err
