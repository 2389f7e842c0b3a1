"""Files that are damaged or mean harm: a clear OnnxError, in bounded time and memory.

TENSORWRIGHT_ONNX_MUTANTS=5000 imports, compiles and runs more mutants than the default.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import mutate  # noqa: E402
import tensorwright as tw  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_graphs import F, I, graph, model, node  # noqa: E402
from tensorwright.ir.errors import OnnxError, TensorwrightError  # noqa: E402


def refused(source: object, match: str) -> None:
    start = time.process_time()
    with pytest.raises(OnnxError, match=match):
        tw.onnx.load(source)  # type: ignore[arg-type]
    assert time.process_time() - start < 5


def simple(weights: dict[str, object] | None = None, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    return model(nodes or [node("Add", ["x", "w"], ["y"])], [("x", F, [4])], [("y", F, None)], weights or {"w": np.ones(4, F)})


MUTANTS = int(os.environ.get("TENSORWRIGHT_ONNX_MUTANTS", "0"))


def test_mutants_are_imported() -> None:
    count = MUTANTS or 150
    found = [mutate.outcome(m) for m in mutate.mutants(count, seed=7)]
    assert not [f for f in found if f.startswith("DEFECT")]
    assert found.count("graph") < count / 2  # the mutator does harm


def test_mutants_are_compiled_and_run_in_a_process_of_their_own() -> None:
    child = mutate.Child()
    large = mutate.extremes("LRN", "RoiAlign", "LpPool")  # numbers of which as many nodes were made
    try:
        found = [child.ask(m) for m in (*mutate.mutants(MUTANTS or 40, seed=11), *large)]
    finally:
        child.stop()
    assert not [f for f in found if f.startswith("DEFECT")]
    assert "ran" in found and "OnnxError at import" in found


def test_a_crash_and_a_model_that_takes_too_long_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    child = mutate.Child()
    try:
        data = simple().SerializeToString()
        assert child.ask(data) == "ran"
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGSEGV)
        assert child.ask(data).startswith("DEFECT: the process died with -11")
        monkeypatch.setattr(mutate, "SECONDS", -1.0)
        monkeypatch.setattr(mutate, "PATIENCE", -1.0)
        slow = model([node("MatMul", ["x", "x"], ["y"])], [("x", F, [2000, 2000])], [("y", F, None)])
        assert child.ask(slow.SerializeToString()).startswith("DEFECT: longer")
    finally:
        child.stop()


def test_bytes_that_are_no_model() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 100, 10_000):
        refused(rng.bytes(size), "no ONNX model|no graph|domain|node|opset|output")
    data = simple().SerializeToString()
    for cut in range(1, len(data), 7):
        try:
            tw.onnx.load(data[:cut])
        except TensorwrightError:
            continue


def test_arrays_that_lie_about_their_size() -> None:
    for dims in ([1 << 40], [1 << 32, 1 << 32], [-4], [5]):
        m = simple()
        del m.graph.initializer[0].dims[:]
        m.graph.initializer[0].dims.extend(dims)
        refused(m, "initializer 'w'")
    m = simple()
    m.graph.initializer[0].data_type = 77
    refused(m, "element type 77")
    m = simple()
    m.graph.initializer[0].raw_data = m.graph.initializer[0].raw_data[:-1]
    refused(m, "15 bytes")


def test_promises_of_terabytes() -> None:
    m = model([node("ConstantOfShape", ["s"], ["y"])], [], [("y", F, None)], {"s": np.array([1 << 30, 1 << 30])})
    refused(m, "2\\*\\*56|bytes")
    refused(model([node("Relu", ["x"], ["y"])], [("x", F, [1 << 50, 1 << 50])], [("y", F, None)]), "x")
    m = model([node("Range", ["a", "b", "c"], ["y"])], [], [("y", I, None)], {"a": I(0), "b": I(1 << 60), "c": I(1)})
    refused(m, "range")
    sparse = onnx.SparseTensorProto(dims=[1 << 40])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, F), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, I), "i"))
    m = simple()
    del m.graph.initializer[:]
    m.graph.sparse_initializer.append(sparse)
    refused(m, "too large")


def test_graphs_that_do_not_hold_together() -> None:
    refused(
        simple(nodes=[node("Add", ["x", "b"], ["a"]), node("Add", ["a", "w"], ["b"]), node("Add", ["b", "w"], ["y"])]), "cycle"
    )
    refused(simple(nodes=[node("Add", ["x", "nothing"], ["y"])]), "reads 'nothing', which nothing defines")
    refused(simple(nodes=[node("Add", ["x", "w"], ["y"]), node("Add", ["x", "x"], ["y"])]), "defined already")
    refused(simple(nodes=[node("Add", ["x", "w"], ["z"])]), "nothing defines the output 'y'")
    refused(simple({"w": np.ones(4, np.int32)}), "dtypes f32 and i32")
    refused(simple(nodes=[node("Add", ["x"], ["y"])]), "input 1 is missing")
    m = simple()
    m.opset_import[0].version = 99
    refused(m, "opset 99")
    m = simple()
    m.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    refused(m, "declared as i64")


def test_nodes_out_of_order_are_put_in_order() -> None:
    m = simple(nodes=[node("Add", ["a", "w"], ["y"]), node("Add", ["x", "w"], ["a"])])
    np.testing.assert_array_equal(tw.compile(tw.onnx.load(m))(np.zeros(4, F)), np.full(4, 2, F))


def test_functions_that_call_themselves() -> None:
    def function(name: str, calls: list[str]) -> onnx.FunctionProto:
        names = ["a", *(f"t{k}" for k in range(len(calls) - 1)), "y"]
        nodes = [helper.make_node(c, [names[k]], [names[k + 1]], domain="f") for k, c in enumerate(calls)]
        return helper.make_function("f", name, ["a"], ["y"], nodes, [helper.make_opsetid("f", 1), helper.make_opsetid("", 20)])

    def calling(functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
        return model(
            [node("F0", ["x"], ["y"], domain="f")], [("x", F, [4])], [("y", F, None)], domains={"f": 1}, functions=functions
        )

    refused(calling([function("F0", ["F1"]), function("F1", ["F0"])]), "calls itself")
    doubling = [function(f"F{k}", [f"F{k + 1}", f"F{k + 1}"]) for k in range(40)]
    last = helper.make_function("f", "F40", ["a"], ["y"], [node("Relu", ["a"], ["y"])], [helper.make_opsetid("", 20)])
    refused(calling([*doubling, last]), "its functions stand for")


def test_bodies_nested_too_deep() -> None:
    leaf = graph([node("Relu", ["x"], ["o"])], [], [("o", F, [4])])
    body = leaf
    for _ in range(26):
        body = graph([node("If", ["c"], ["o"], then_branch=body, else_branch=leaf)], [], [("o", F, [4])])
    refused(model([node("If", ["c"], ["y"], then_branch=body, else_branch=leaf)], [("x", F, [4]), ("c", np.bool_, [])],
                  [("y", F, [4])]), "nested deeper")  # fmt: skip


def outside(tmp_path: Path, location: str, **more: str) -> Path:
    m = simple()
    t = m.graph.initializer[0]
    t.ClearField("raw_data")
    t.data_location = TensorProto.EXTERNAL
    for k, v in {"location": location, **more}.items():
        t.external_data.add(key=k, value=v)
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    path.write_bytes(m.SerializeToString())
    return path


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    path = outside(tmp_path, "w.bin", offset="8", length="16")
    (path.parent / "w.bin").write_bytes(b"\0" * 8 + np.arange(4, dtype=F).tobytes())
    np.testing.assert_array_equal(tw.compile(tw.onnx.load(path))(np.ones(4, F)), np.arange(4) + 1)
    with pytest.raises(OnnxError, match="another file"):
        tw.onnx.load(path.read_bytes())


@pytest.mark.parametrize(
    ("location", "more", "match"),
    [
        ("../secret.bin", {}, "outside the model's folder"),
        ("/etc/passwd", {}, "relative to the model's folder"),
        ("link.bin", {}, "outside the model's folder"),
        ("missing.bin", {}, "no such file"),
        ("short.bin", {}, "its shape wants 16"),
        ("w.bin", {"offset": "-4"}, "its shape wants 16"),
        ("w.bin", {"length": "999999999999"}, "its shape wants 16"),
        ("w.bin", {"offset": "many"}, "no numbers"),
        ("", {}, "relative to the model's folder"),
    ],
)
def test_external_data_that_is_not_read(tmp_path: Path, location: str, more: dict[str, str], match: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    path = outside(tmp_path, location, **more)
    (path.parent / "w.bin").write_bytes(bytes(64))
    (path.parent / "short.bin").write_bytes(bytes(3))
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    refused(path, match)
