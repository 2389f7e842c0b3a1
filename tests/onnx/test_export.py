"""Export: samples of every op that ONNX has, whole models, symbolic sizes, loops; read back by us and run by ONNX Runtime."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import backend  # noqa: E402
import tensorwright as tw  # noqa: E402
from tensorwright import nn  # noqa: E402
from tensorwright.frontend.core import apply  # noqa: E402
from tensorwright.frontend.onnx.exporter import writer  # noqa: E402
from tensorwright.ir.dtypes import u8  # noqa: E402
from tensorwright.ir.errors import OnnxError  # noqa: E402
from tensorwright.ir.interp import run  # noqa: E402
from tensorwright.ir.op import REGISTRY, Sample, Trait  # noqa: E402
from tensorwright.ir.ops.common import sample_node  # noqa: E402

RNG = np.random.default_rng(0)


def exported_ops() -> list[str]:
    """The ops for whose first sample there is ONNX."""
    found = []
    for name, record in sorted(REGISTRY.items()):
        sample = next(iter(record.samples()), None)
        if sample is not None:
            node = sample_node(record, sample)[0].outputs[0]
            if writer(node.inputs[0] if node.op.name == "get" else node) is not None:
                found.append(name)
    return found


def values(graph: tw.Graph, arrays: list[Any]) -> dict[str, Any]:
    return {str(i.attrs["name"]): a for i, a in zip(graph.inputs, arrays, strict=True)}


def back(model: Any, given: dict[str, Any]) -> list[Any]:
    """What the interpreter makes of the exported model, read back."""
    g = tw.onnx.load(model)
    return run(g, {n: given[n] if n in given else g.weights[n] for n in (str(i.attrs["name"]) for i in g.inputs)})


def peer(model: Any, given: dict[str, Any]) -> list[Any]:
    ort = pytest.importorskip("onnxruntime", reason="the bench extra")
    ort.set_default_logger_severity(4)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in given.items() if k in wanted})  # type: ignore[no-any-return]


def plain(sample: Sample) -> bool:
    """Whether the sample is one on which ONNX and its readers agree: no special values, f32 or integers."""
    return sample.label not in ("special", "f64", "f16", "bf16", "saturates")


BYTES = ("quantize", "dequantize", "argsort", "shift_left", "shift_right", "bit_cast")  # ops that ONNX has for 8-bit integers


@pytest.mark.parametrize("name", exported_ops())
def test_samples_round_trip(name: str) -> None:
    record, done = REGISTRY[name], 0
    for sample in [s for s in record.samples() if plain(s)][::3]:
        graph, arrays = sample_node(record, sample)
        few = any(a.dtype.itemsize == 1 and a.dtype.kind in "iu" for a in arrays) and name not in BYTES
        if any(a.size == 0 for a in arrays) or few:
            continue  # ONNX Runtime refuses some of these; bytes are not types of every op
        try:
            model = tw.onnx.save(graph)
        except onnx.shape_inference.InferenceError:
            if name == "pow":  # of narrow integers ONNX has none
                continue
            raise
        expected = run(graph, arrays)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # bodies are recorded on import, not kept: what comes back is run by the peer
            results = (peer if record.has(Trait.CONTROL) else back)(model, values(graph, arrays))
        for got, want in zip(results, expected, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=2e-5, atol=1e-5)
        done += 1
    assert done


NUMBERS = (
    "argsort",
    "bit_cast",
    "cumprod",
    "cumsum",
    "dequantize",
    "quantize",
    "resample",
    "scatter",
    "scatter_add",
    "shift_left",
    "shift_right",
)


@pytest.mark.parametrize("name", NUMBERS)
def test_samples_in_onnxruntime(name: str) -> None:
    record = REGISTRY[name]
    samples = [s for s in record.samples() if plain(s) and "f8" not in s.label]
    for sample in samples:
        graph, arrays = sample_node(record, sample)
        if any(a.size == 0 for a in arrays) or (name == "scatter" and sample.attrs["kind"] == "set"):
            continue  # which of several updates of one element stays is left open by ONNX
        narrow = name in ("cumprod", "cumsum", "scatter", "scatter_add", "resample") and arrays[0].dtype.itemsize < 4
        if narrow:
            continue  # ONNX Runtime has no kernels for these
        model = tw.onnx.save(graph)
        for got, want in zip(peer(model, values(graph, arrays)), run(graph, arrays), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            # products of up to a hundred factors, in the order of either
            np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=2e-5, atol=1e-5)


def ops_of(model: Any) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_patterns_become_one_op() -> None:
    def fn(x: Any, w: Any, b: Any) -> Any:
        y = tw.layer_norm(x, 4, w, b)
        return (
            tw.softmax(y, 1),
            tw.log_softmax(y),
            tw.gelu(y),
            tw.gelu(y, "tanh"),
            tw.layer_norm(y, (3, 4)) * 2.0,
            tw.layer_norm(y, 4, w),
        )

    g = tw.trace(fn, tw.spec("N", 3, 4), tw.spec(4), tw.spec(4))
    model = tw.onnx.save(g)
    ops = ops_of(model)
    assert {"Softmax", "LogSoftmax", "Gelu", "LayerNormalization"} <= set(ops) and not {"Exp", "Erf", "Tanh", "Log"} & set(ops)
    assert ops.count("LayerNormalization") == 2 and ops.count("Gelu") == 2  # without a weight it stays as it is
    given = {"x": RNG.normal(size=(2, 3, 4)).astype(np.float32), "w": np.ones(4, np.float32) * 2, "b": np.ones(4, np.float32)}
    expected = run(g, given)
    close(peer(model, given), expected)
    close(back(model, given), expected)


def test_limits_become_relu_and_clip() -> None:
    g = tw.trace(lambda x: (tw.relu(x), tw.relu6(x), tw.leaky_relu(x, 0.3), tw.clip(x, -1.0, 2.0)), tw.spec(8))
    model = tw.onnx.save(g)
    assert set(ops_of(model)) <= {"Relu", "Clip", "LeakyRelu", "Min", "Max"}
    x = np.linspace(-4, 9, 8, dtype=np.float32)
    close(peer(model, {"x": x}), run(g, [x]))


def test_what_only_looks_like_a_pattern_stays() -> None:
    def fn(x: Any, z: Any) -> Any:
        e = tw.exp(x - tw.max(x, 1, keepdims=True))
        other = tw.exp(x - tw.max(z, 1, keepdims=True))
        return (
            e / tw.sum(e, 0, keepdims=True),  # another axis
            other / tw.sum(other, 1, keepdims=True),  # another maximum
            e / tw.sum(other, 1, keepdims=True),
            x * 0.5 * (1.0 + tw.erf(z * 0.70710678)),
            x * 0.5 * (1.5 + tw.erf(x * 0.70710678)),
        )

    g = tw.trace(fn, tw.spec(3, 4), tw.spec(3, 4))
    model = tw.onnx.save(g)
    assert not {"Softmax", "Gelu"} & set(ops_of(model))
    given = {k: RNG.normal(size=(3, 4)).astype(np.float32) for k in "xz"}
    close(peer(model, given), run(g, given))


def test_patterns_in_bodies_and_parts_that_are_outputs() -> None:
    def fn(x: Any) -> Any:
        e = tw.exp(x - tw.max(x, 1, keepdims=True))
        last, _ = tw.scan(lambda h, v: (tw.softmax(h + v), None), tw.zeros((4,)), x)
        return e / tw.sum(e, 1, keepdims=True), e, last

    g = tw.trace(fn, tw.spec(3, 4))
    model = tw.onnx.save(g)
    ops = ops_of(model)
    body = next(n for n in model.graph.node if n.op_type == "Scan").attribute[0].g
    assert ops.count("Exp") == 1 and "Softmax" in ops and [n.op_type for n in body.node].count("Exp") == 0
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    close(peer(model, {"x": x}), run(g, [x]))


def test_an_optimised_graph_of_fused_regions() -> None:
    from tensorwright.passes.manager import Context
    from tensorwright.passes.pipeline import parse

    def fn(x: Any, w: Any) -> Any:
        h = tw.relu(x @ w)
        return tw.softmax(h) + 1.0, h * h, tw.mean(h, 1)

    g = tw.trace(fn, tw.spec(3, 4), tw.spec(4, 5))
    fused = g
    for p in parse("drop_marks, simplify, fuse"):
        fused = p.run(fused, Context())
    assert any(n.op.name == "fused" for n in fused.nodes())
    model = tw.onnx.save(fused)
    assert [o.name for o in model.graph.output] == list(g.output_names)
    given = {"x": RNG.normal(size=(3, 4)).astype(np.float32), "w": RNG.normal(size=(4, 5)).astype(np.float32)}
    close(peer(model, given), run(g, given))


def test_names_of_the_values_of_an_imported_model_are_kept() -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], ["first"]), onnx.helper.make_node("Exp", ["first"], ["second"]),
             onnx.helper.make_node("Add", ["second", "first"], ["y"])]  # fmt: skip
    info = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:]))
    again = tw.onnx.save(tw.onnx.load(model))
    assert [list(n.output) for n in again.graph.node] == [["first"], ["second"], ["y"]]


def test_quantised_models_are_written_as_qdq() -> None:
    def fn(x: Any, scale: Any, zero: Any) -> Any:
        q = apply("quantize", x, scale, zero, axis=1, dtype=u8)
        return apply("dequantize", q, scale, zero, axis=1)

    g = tw.trace(fn, tw.spec(2, 3, 4), tw.spec(3), tw.spec(3, dtype="u8"))
    model = tw.onnx.save(g)
    assert ops_of(model) == ["QuantizeLinear", "DequantizeLinear"]
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32) * 3
    given = {"x": x, "scale": np.array([0.1, 0.02, 0.05], np.float32), "zero": np.array([0, 128, 40], np.uint8)}
    close(peer(model, given), run(g, given))
    close(back(model, given), run(g, given))


def test_narrow_floats_keep_what_is_beyond_them() -> None:
    g = tw.trace(lambda x: (x.astype("f8e4m3fn").astype("f32"), x.astype("f8e5m2").astype("f32")), tw.spec(6))
    x = np.array([1.1, -3.3, 1e6, -1e6, np.nan, 0.01], np.float32)
    model = tw.onnx.save(g)
    close(back(model, {"x": x}), run(g, [x]))
    close(peer(model, {"x": x}), run(g, [x]))


def test_images_are_resized_by_resize() -> None:
    for kind in ("nearest", "bilinear", "bicubic"):
        g = tw.trace(lambda x, kind=kind: tw.interpolate(x, (7, 9), mode=kind), tw.spec(1, 2, 4, 5))
        model = tw.onnx.save(g)
        assert set(ops_of(model)) == ({"Gather"} if "Gather" in ops_of(model) else {"Resize"})
        x = RNG.normal(size=(1, 2, 4, 5)).astype(np.float32)
        close(peer(model, {"x": x}), run(g, [x]))


def test_the_opset_is_the_least_that_will_do() -> None:
    def opset(fn: Any, **more: Any) -> tuple[int, int]:
        model = tw.onnx.save(tw.trace(fn, tw.spec(3)), **more)
        return model.opset_import[0].version, model.ir_version

    assert opset(lambda x: tw.cumprod(x, 0)) == (21, 10)
    assert opset(lambda x: tw.cumprod(x, 0), opset=26) == (26, 13)
    assert opset(lambda x: x.astype("f8e8m0")) == (24, 12)
    with pytest.raises(OnnxError, match=r"cast f8e8m0.*from opset 24 on, not in 21"):
        opset(lambda x: x.astype("f8e8m0"), opset=21)


class Net(nn.Module):
    def __init__(self) -> None:
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 8 * 8, 10)

    def __call__(self, x: Any) -> Any:
        x = tw.max_pool2d(tw.relu(self.norm(self.conv(x))), 2)
        x = tw.gelu(self.up(x))
        return tw.log_softmax(self.head(x.reshape(x.shape[0], -1)))


def close(results: list[Any], expected: list[Any]) -> None:
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_network_with_a_symbolic_batch(tmp_path: Path) -> None:
    from tensorwright.frontend.tracing import trace_model

    traced = trace_model(Net().eval(), tw.spec("N", 3, 8, 8, name="pixels"))
    path = tmp_path / "net.onnx"
    model = tw.onnx.save(traced.graph, path, parameters=traced.values())
    assert [i.name for i in model.graph.input] == ["pixels"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert {"conv.weight", "head.bias"} <= {i.name for i in model.graph.initializer}
    for batch in (1, 5):
        x = RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)
        expected = run(traced.graph, {"pixels": x, **traced.values()})
        close(back(onnx.load(path), {"pixels": x}), expected)
        close(peer(model, {"pixels": x}), expected)


def test_sizes_are_computed_in_the_model() -> None:
    def fn(x: Any) -> Any:
        n, length = x.shape[0], x.shape[1]
        y = tw.broadcast_to(tw.arange(length).astype("f32"), (n, length)) + x
        return tw.concatenate([y[:, 1:], y[:, :1]], 1).reshape(n * length) * 2.0, y.reshape(length, n)

    g = tw.trace(fn, tw.spec("N", "L"))
    x = RNG.normal(size=(3, 5)).astype(np.float32)
    expected = run(g, [x])
    model = tw.onnx.save(g)
    close(back(model, {"x": x}), expected)
    close(peer(model, {"x": x}), expected)


def test_loops_and_branches() -> None:
    def fn(x: Any, w: Any) -> Any:
        last, all_ = tw.scan(lambda h, e: (tw.tanh(h @ w + e),) * 2, tw.zeros((2, 4)), x)
        back_, _ = tw.scan(lambda h, e: (h * 0.5 + e, None), tw.zeros((2, 4)), x, reverse=True)
        doubled, _ = tw.scan(lambda h, _: (h + h, None), last, length=3)
        grown = tw.while_loop(lambda h: tw.max(h) < 10.0, lambda h: h * 2.0 + 1.0, tw.abs(last))
        chosen = tw.cond(tw.sum(x) > 0.0, lambda a: a @ w, lambda a: a - 1.0, last)
        return all_, back_, doubled, grown, chosen

    g = tw.trace(fn, tw.spec(6, 2, 4), tw.spec(4, 4))
    model = tw.onnx.save(g)
    x, w = RNG.normal(size=(6, 2, 4)).astype(np.float32), RNG.normal(size=(4, 4)).astype(np.float32)
    for sign in (1, -1):
        given = {"x": x * sign, "w": w}
        close(peer(model, given), run(g, given))


BACK = ("test_Conv2d_groups", "test_ConvTranspose2d", "test_BatchNorm2d_eval", "test_PReLU_3d", "test_Softmax")


@pytest.mark.parametrize("name", BACK)
def test_imported_models_go_back(name: str) -> None:
    case = next((c for c in backend.cases("pytorch-converted") if c.name == name), None)
    if case is None:
        pytest.skip(f"this version of onnx has no case {name}")
    g = tw.onnx.load(case.model)
    inputs, expected = next(case.data())
    given = dict(zip([str(i.attrs["name"]) for i in g.inputs if i.attrs["role"] == "data"], inputs, strict=True))
    model = tw.onnx.save(g)
    assert [o.name for o in model.graph.output] == [o.name for o in case.model.graph.output]
    for got, want in zip(peer(model, given), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_an_output_that_is_an_input_or_given_twice() -> None:
    g = tw.trace(lambda x: (x, x + 1.0, x + 1.0), tw.spec(3))
    x = np.arange(3, dtype=np.float32)
    close(peer(tw.onnx.save(g), {"x": x}), [x, x + 1, x + 1])


def test_what_onnx_lacks_is_listed() -> None:
    def fn(x: Any, key: Any) -> Any:
        return x + tw.random.normal(x.shape, key=key), tw.random.uniform(x.shape, key=key)

    g = tw.trace(fn, tw.spec(3), tw.spec(dtype="u64"))
    with pytest.raises(OnnxError, match=r"(?s)2 nodes have no ONNX op.*random_"):
        tw.onnx.save(g)


def test_wrong_parameters_are_refused() -> None:
    g = tw.trace(lambda x: x + 1.0, tw.spec(3))
    with pytest.raises(OnnxError, match="no inputs of the graph"):
        tw.onnx.save(g, parameters={"w": np.ones(3)})
    with pytest.raises(OnnxError, match="its value"):
        tw.onnx.save(g, parameters={"x": np.ones(4, np.float32)})
    with pytest.raises(OnnxError, match="opsets 21 to 28"):
        tw.onnx.save(g, opset=3)
