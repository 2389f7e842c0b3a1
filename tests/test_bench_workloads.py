"""The inference workloads: what they compute at small sizes, what they cost, their files, and the programs that run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.benchmarks import compile_time, footprint, inference, models, neighbour, single_ops
from tensorwright.benchmarks.gpt2 import GPT2Step
from tensorwright.benchmarks.peers import PEERS, Task
from tensorwright.benchmarks.peers import numpy as plain
from tensorwright.benchmarks.prepare import fold, prepare
from tensorwright.benchmarks.roofline import contraction_flops

RNG = np.random.default_rng(3)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


SMALL: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "op_gemm1024": (single_ops.MatMul, (normal(8, 8), normal(8, 8))),
    "op_conv3x3_64_56": (lambda: single_ops.Convolution(4), (normal(1, 4, 7, 7),)),
    "op_softmax4096x1024": (single_ops.Softmax, (normal(5, 16),)),
    "op_layernorm4096x1024": (lambda: single_ops.LayerNorm(16), (normal(5, 16),)),
    "op_attention12x512x64": (single_ops.Attention, (normal(1, 2, 8, 4), normal(1, 2, 8, 4), normal(1, 2, 8, 4))),
    "op_gemv4096": (lambda: single_ops.MatVec(16), (normal(1, 16),)),
}


@pytest.mark.parametrize("name", SMALL)
def test_single_operations_are_what_plain_numpy_says(name: str) -> None:
    make, inputs = SMALL[name]
    module = make()
    got = tw.compile(module, *map(tw.spec, inputs), cache=False)(*inputs)
    weights = {k: np.asarray(v) for k, v in module.state_dict().items()}
    want = plain.program(name, weights, inputs, np.empty_like(got))()
    # sums of at most 36 products in f32, in two orders
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gelu_is_the_exact_one() -> None:
    from math import erf

    x = np.linspace(-4, 4, 33, dtype=np.float32)
    want = [v / 2 * (1 + erf(v / 2**0.5)) for v in x.tolist()]
    np.testing.assert_allclose(tw.compile(single_ops.Gelu(), tw.spec(x), cache=False)(x), want, rtol=1e-5, atol=1e-7)


def test_a_decode_step_continues_the_sequence() -> None:
    """Two single steps give the keys that one step after the other must, and logits that depend on the cache."""
    model = GPT2Step(layers=2, width=16, heads=2, vocabulary=11, positions=9)
    first = tw.compile(model, tw.spec(1, 1, dtype="i64"), tw.spec(2, 2, 1, 2, 3, 8), cache=False)
    second = tw.compile(model, tw.spec(1, 1, dtype="i64"), tw.spec(2, 2, 1, 2, 4, 8), cache=False)
    past, ids = normal(2, 2, 1, 2, 3, 8), np.array([[5]])
    logits, cache = first(ids, past)
    assert logits.shape == (1, 1, 11) and cache.shape == (2, 2, 1, 2, 4, 8)
    np.testing.assert_array_equal(cache[..., :3, :], past)
    logits, cache = logits.copy(), cache.copy()
    after, longer = second(np.array([[7]]), cache)
    np.testing.assert_array_equal(longer[..., :4, :], cache)
    changed = first(ids, past + 1)[0]
    assert abs(changed - logits).max() > 1e-3 and np.isfinite(after).all()


def test_batch_norm_is_folded_into_the_convolution() -> None:
    block = models.ConvNorm(3, 5, 3)
    x = normal(2, 3, 6, 6)
    folded = fold({f"stem.{k}": np.asarray(v) for k, v in block.state_dict().items()})
    assert set(folded) == {"stem.conv.weight", "stem.conv.bias"}
    plain_conv = nn.Conv2d(3, 5, 3, padding=1)
    plain_conv.load_state_dict({k.removeprefix("stem.conv."): v for k, v in folded.items()})
    want = tw.compile(block, tw.spec(x), cache=False)(x)
    np.testing.assert_allclose(tw.compile(plain_conv, tw.spec(x), cache=False)(x), want, rtol=1e-5, atol=1e-5)
    assert fold({"f.weight": normal(2, 2)}) == {}


def test_arithmetic_of_a_workload_is_that_of_its_contractions() -> None:
    lstm = models.INFERENCE["bilstm_b1"]
    steps = 2 * (13 * 512 + 128 * 512) + 2 * (256 * 512 + 128 * 512) + 256 * 30
    assert contraction_flops(tw.trace(lstm.make(), *lstm.arguments)) == 100 * 2 * steps
    gemm, attention = models.INFERENCE["op_gemm1024"], models.INFERENCE["op_attention12x512x64"]
    assert contraction_flops(tw.trace(gemm.make(), *gemm.arguments)) == 2 * 1024**3
    assert contraction_flops(tw.trace(attention.make(), *attention.arguments)) == 4 * 12 * 512 * 512 * 64


def test_a_name_stands_for_its_family() -> None:
    assert inference.match("resnet50") == ["resnet50_b1", "resnet50_b8"] and inference.match("mlp_b1") == ["mlp_b1"]
    assert len(inference.match("op")) == 7 and inference.match("gpt9") == []
    assert len(models.INFERENCE) == 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("mlp")
    prepare("mlp_b1", path)
    return path


def test_a_workload_as_files(folder: Path) -> None:
    task = Task("mlp_b1", folder, 1)
    assert task.about()["flops"] == 2 * (784 * 128 + 128 * 10) and task.about()["outputs"] == [[1, 10]]
    assert [x.shape for x in task.inputs()] == [(1, 784)] and task.weights()["a.weight"].shape == (128, 784)
    for name in ("tensorwright", "numpy"):
        entry = PEERS[name].enter(task)()
        np.savez(folder / f"{name}.npz", out0=entry.results(entry.run())[0])
        error, reason = inference.verdict(folder / f"{name}.npz", folder / "reference.npz", 1e-4)
        assert error < 1e-6 and not reason


def test_graphs_of_many_sizes() -> None:
    found = compile_time.compile_chain(60)
    assert 40 <= found["nodes"] <= 80 and found["seconds"] > 0 and found["kernels"] > 3


@pytest.mark.unvalidated("it takes a program from the cache, which validation bypasses")
def test_compile_times_of_a_workload(monkeypatch: Any, folder: Path) -> None:
    monkeypatch.setattr(
        compile_time, "prepare", lambda name, to: [(to / f.name).write_bytes(f.read_bytes()) for f in folder.iterdir()]
    )
    found = compile_time.run("mlp_b1", "", 1, quick=True)
    (row,) = found["rows"]
    assert row["cold"] > 0 and row["warm"] > 0 and not row["out"] and json.dumps(found)


def test_neighbour_and_footprint_say_what_they_promise(monkeypatch: Any, folder: Path, capsys: Any) -> None:
    copy = lambda name, to: [(to / f.name).write_bytes(f.read_bytes()) for f in folder.iterdir()]  # noqa: E731
    monkeypatch.setattr(neighbour, "prepare", copy)
    found = neighbour.slowdown("mlp_b1", ["numpy"], 1, 1, 0.01)
    assert set(found["slowdown"]) == {"tensorwright", "numpy"} and all(v > 0 for v in found["slowdown"].values())
    footprint.program("save", folder, 1, "mlp_b1", "off")
    memory = footprint.program("file", folder, 1, "mlp_b1", "off")
    assert 10_000_000 < memory["imported"] < memory["peak"] < 1_000_000_000
