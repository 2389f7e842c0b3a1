"""Models that others made: onnx's light ones, what transformers builds and PyTorch exports, files of packages; back to ONNX and
through ONNX Runtime; and how import and passes grow with a model.

By default a light model, a small exported one and a few of the files, where they are there, run.
TENSORWRIGHT_ONNX_MODELS=all runs every workload of `tensorwright bench onnx`. Files come from examples/fetch_onnx.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import onnx_graphs as support  # noqa: E402
import tensorwright as tw  # noqa: E402
from onnx import helper  # noqa: E402
from tensorwright.benchmarks import onnx_zoo as zoo  # noqa: E402
from tensorwright.benchmarks.onnx_inputs import MissingInputError  # noqa: E402
from tensorwright.codegen.contraction import preferred_panel  # noqa: E402
from tensorwright.ir.graph import Graph  # noqa: E402
from tensorwright.ir.graphs import specialize  # noqa: E402
from tensorwright.passes import pipeline  # noqa: E402
from tensorwright.passes.contract import Context  # noqa: E402
from tensorwright.passes.manager import Hooks, run_pipeline  # noqa: E402
from tensorwright.runtime.host import host  # noqa: E402

Array = np.ndarray[Any, Any]
QUICK = ("light_squeezenet", "silero", "silero_half", "magika")
ALL = os.environ.get("TENSORWRIGHT_ONNX_MODELS") == "all"
NAMES = tuple(zoo.WORKLOADS) if ALL else QUICK
TOLERANCE = 1e-3  # of an output's largest value, against ONNX Runtime


def runtime() -> Any:
    ort = pytest.importorskip("onnxruntime", reason="the bench extra")
    ort.set_default_logger_severity(4)
    return ort


def exporter() -> list[Any]:
    """torch, transformers, and what torch's exporter needs besides."""
    return [pytest.importorskip(n, reason=f"the bench extra: {n} is not installed") for n in zoo.EXPORTING]


def made(name: str, folder: Path) -> list[zoo.Step]:
    """The files of a workload; a few steps of a recording do here."""
    runtime()
    if name.startswith("built_"):
        exporter()
    try:
        return zoo.write(name, folder)[: None if ALL else 40]
    except MissingInputError as reason:
        pytest.skip(str(reason))


def reference(model: Any, steps: list[zoo.Step], carry: Mapping[str, str]) -> dict[str, Array]:
    session = runtime().InferenceSession(model, providers=["CPUExecutionProvider"])
    names, inputs = [o.name for o in session.get_outputs()], {i.name for i in session.get_inputs()}

    def call(step: zoo.Step) -> dict[str, Array]:
        return dict(zip(names, session.run(None, {k: v for k, v in step.items() if k in inputs}), strict=True))

    return zoo.over(call, steps, carry)


def ours(model: tw.onnx.Model, steps: list[zoo.Step], carry: Mapping[str, str]) -> dict[str, Array]:
    exe = tw.compile(model)

    def call(step: zoo.Step) -> dict[str, Array]:
        found = exe(*[step[i] for i in model.inputs])
        return dict(zip(model.outputs, found if isinstance(found, tuple) else (found,), strict=True))

    return zoo.over(call, steps, carry)


def close(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        error = np.max(np.abs(found[name].astype(np.float64) - want)) / np.max(np.abs(want.astype(np.float64)))
        assert error <= tolerance, f"{name}: {error:.1e}"  # a NaN fails as well


@pytest.mark.unvalidated("the interpreter takes these models too long, pass after pass")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_gives_what_onnx_runtime_gives_and_so_does_its_export(name: str, tmp_path: Path) -> None:
    steps = made(name, tmp_path)
    path, work = tmp_path / "model.onnx", zoo.WORKLOADS[name]
    expected = reference(str(path), steps, work.carry)
    close(ours(tw.onnx.Model(path), steps, work.carry), expected, work.tolerance)
    graph = imported(path, steps[0])
    exported = tw.onnx.save(optimised(graph), parameters=graph.weights)
    close(reference(exported.SerializeToString(), steps, work.carry), expected, work.tolerance)


def imported(path: Path, step: zoo.Step) -> Graph:
    """The Graph; for these shapes and scalars where it is not the same for all."""
    model = tw.onnx.Model(path)
    if not model.unshaped() and not model.stage({}).needs:
        return model.graph()
    scalars = {k: v for k, v in step.items() if v.ndim == 0}
    fixed = tw.onnx.Model(path, shapes={k: v.shape for k, v in step.items()})
    return fixed.graph(scalars if fixed.stage({}).needs else None)


def optimised(graph: Graph) -> Graph:
    """After the passes that keep ops which ONNX has: those before layouts and contractions take their native form."""
    names = [p.name for p in pipeline.inference()]
    return run_pipeline(graph, pipeline.inference()[: names.index("layout")], Context())


@pytest.mark.unvalidated("the interpreter takes this model too long, pass after pass")
def test_of_an_int8_model_every_integer_is_exact(tmp_path: Path) -> None:
    """ddddocr's common_old.onnx: sums of products of 8-bit integers, and the scales that activations are quantised by, are equal
    to the bit up to the first sigmoid, whose last bit is anyone's."""
    made("ddddocr_int8", tmp_path)
    whole = onnx.load(str(tmp_path / "model.onnx"))
    end = next(k for k, n in enumerate(whole.graph.node) if n.op_type == "Sigmoid")
    nodes = list(whole.graph.node)[:end]
    names = [o for n in nodes for o in n.output if o]
    part = onnx.ModelProto()
    part.CopyFrom(whole)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(nodes)
    part.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    steps = zoo.read(tmp_path)
    expected = reference(part.SerializeToString(), steps, {})
    for output in part.graph.output:
        dtype = helper.np_dtype_to_tensor_dtype(expected[output.name].dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, dtype, None))
    found = ours(tw.onnx.Model(part), steps, {})
    assert any(n.op_type == "ConvInteger" for n in nodes)
    for name in names:
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.unvalidated("exported models are compared with a peer; validating every pass takes minutes")
def test_what_torch_exports(tmp_path: Path) -> None:
    """A small BERT; whole ones are workloads of `tensorwright bench onnx`."""
    torch, transformers, _ = exporter()
    runtime()
    from tensorwright.benchmarks import onnx_built  # imports them

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    given = {"input_ids": torch.arange(18)[None], "attention_mask": torch.ones(1, 18, dtype=torch.int64)}
    onnx_built.write(model, given, tmp_path / "model.onnx")
    steps = [{k: v.numpy() for k, v in given.items()}]
    expected = reference(str(tmp_path / "model.onnx"), steps, {})
    close(ours(tw.onnx.Model(tmp_path / "model.onnx"), steps, {}), expected, 1e-4)


def chain(count: int) -> Any:
    """A residual network of about so many nodes with the shape arithmetic that exporters write."""
    rng, nodes, x = np.random.default_rng(0), list[Any](), "x"
    weights = {"zero": np.array([0]), "tail": np.array([4, 4])}
    for k in range(count // 10):
        weights[f"w{k}"] = rng.normal(0, 0.2, (16, 16)).astype(np.float32)
        weights[f"b{k}"] = rng.normal(0, 0.1, 16).astype(np.float32)
        nodes += [
            support.node("MatMul", [x, f"w{k}"], [f"m{k}"]),
            support.node("Add", [f"m{k}", f"b{k}"], [f"a{k}"]),
            support.node("Relu", [f"a{k}"], [f"r{k}"]),
            support.node("Shape", [f"r{k}"], [f"s{k}"]),
            support.node("Gather", [f"s{k}", "zero"], [f"g{k}"], axis=0),
            support.node("Concat", [f"g{k}", "tail"], [f"c{k}"], axis=0),
            support.node("Reshape", [f"r{k}", f"c{k}"], [f"h{k}"]),
            support.node("Transpose", [f"h{k}"], [f"t{k}"], perm=[0, 2, 1]),
            support.node("Reshape", [f"t{k}", f"s{k}"], [f"u{k}"]),
            support.node("Add", [f"u{k}", x], [f"x{k}"]),
        ]
        x = f"x{k}"
    f = np.float32
    return support.model(nodes, [("x", f, ("N", 16))], [(x, f, ("N", 16))], weights)


def branches(count: int) -> Any:
    """Many small softmaxes of one input, added up one after the other: every one joins a chain as long as the model."""
    nodes, weights = list[Any](), dict[str, Array]()
    for k in range(count // 4):
        weights[f"c{k}"] = np.array(k + 1.5, np.float32)
        nodes += [
            support.node("Mul", ["x", f"c{k}"], [f"m{k}"]),
            support.node("Tanh", [f"m{k}"], [f"t{k}"]),
            support.node("Softmax", [f"t{k}"], [f"s{k}"]),
            support.node("Add", [f"s{k}", f"p{k - 1}" if k else "x"], [f"p{k}"]),
        ]
    f = np.float32
    return support.model(nodes, [("x", f, ("N", 16))], [(f"p{count // 4 - 1}", f, ("N", 16))], weights)


@pytest.mark.parametrize("kind", [chain, branches])
def test_import_and_passes_take_linear_time(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: Python calls for 200 and 800 nodes."""
    monkeypatch.setenv("TENSORWRIGHT_VERIFY", "0")

    def calls(count: int) -> int:
        model, total = kind(count).SerializeToString(), 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal total
            total += event == "call"

        sys.setprofile(count_call)
        try:
            graph = specialize(tw.onnx.load(model), {"N": 8})
            run_pipeline(graph, pipeline.inference(), Context(target=host(), preferred_panel=preferred_panel))
        finally:
            sys.setprofile(None)
        return total

    calls(40)  # what is imported and computed once
    small, large = calls(200), calls(800)
    assert large < 4.4 * small, f"{small} calls for 200 nodes, {large} for 800"


@pytest.mark.skipif(not ALL, reason="takes ten seconds: TENSORWRIGHT_ONNX_MODELS=all")
def test_twenty_thousand_nodes_take_less_than_ten_seconds() -> None:
    model = chain(20_000).SerializeToString()
    start = time.process_time()
    graph = specialize(tw.onnx.load(model), {"N": 8})
    context = Context(target=host(), preferred_panel=preferred_panel)
    run_pipeline(graph, pipeline.inference(), context, Hooks(verify=False))  # as tw.compile does
    assert time.process_time() - start < 10
