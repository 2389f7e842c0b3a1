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
from tensorwright.frontend.onnx.export_ops import exporter  # noqa: E402
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
            if exporter(node.inputs[0] if node.op.name == "get" else node) is not None:
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


@pytest.mark.parametrize("name", exported_ops())
def test_samples_round_trip(name: str) -> None:
    record, done = REGISTRY[name], 0
    for sample in [s for s in record.samples() if plain(s)][::3]:
        graph, arrays = sample_node(record, sample)
        if any(a.size == 0 for a in arrays) or any(a.dtype.itemsize == 1 and a.dtype.kind in "iu" for a in arrays):
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
    with pytest.raises(OnnxError, match="opsets 21 to 24"):
        tw.onnx.save(g, opset=3)
