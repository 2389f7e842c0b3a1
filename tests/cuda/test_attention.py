"""Attention as one kernel: against its definition in f64 on the interpreter, inside models, and what ptxas says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import driver
from tensorwright.codegen.cuda.generate import generate
from tensorwright.frontend.training import training_step
from tensorwright.ir.build import input_node
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import bool_, f32
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import REGISTRY, make
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.tools import assemble
from tensorwright.settings import flags

RNG = np.random.default_rng(11)


def on_emulator(program: CudaProgram, arrays: list[Any]) -> list[Any]:
    out = CudaBinding(program, {}, DeviceStore(Emulator(1 << 25))).run([np.ascontiguousarray(a) for a in arrays])
    return list(out) if isinstance(out, tuple) else [out]


def operands(t: int, s: int, d: int, e: int, *, mask: bool, side: str) -> list[Any]:
    shapes = [(2, t, d), (2, s, d), (2, s, e), *([(2, t, e + 1)] * 2 if side else [])]
    nodes = [input_node(f"x{k}", TensorType(f32, shape)) for k, shape in enumerate(shapes)]
    return [*nodes, *([input_node("mask", TensorType(bool_, (1, s)))] if mask else [])]


def kernels(sm: int, *sizes: int, mask: bool, causal: bool, side: str) -> CudaProgram:
    nodes = operands(*sizes, mask=mask, side=side)
    attrs: dict[str, Any] = {"scale": 0.125, "causal": causal} | ({"side": side} if side else {})
    made = make("attention_grad" if side else "attention", *nodes, **attrs)
    return generate(Graph(tuple(nodes), (made,)), row(f"cuda-sm_{sm}"), verify=True)


@pytest.mark.parametrize("sm", [75, 80, 90])
@pytest.mark.parametrize(("sizes", "mask", "causal"), [((512, 512, 64, 64), False, True), ((33, 70, 128, 65), True, False)])
def test_registers(sm: int, sizes: tuple[int, ...], mask: bool, causal: bool) -> None:
    """No spill, and two blocks of 128 threads a multiprocessor at least: at most 48 KiB of shared memory and 168 registers."""
    for side in ("", "query", "keys"):
        program = kernels(sm, *sizes, mask=mask, causal=causal, side=side)
        done = assemble(program.ptx, sm)
        assert not done.wrong
        assert max(done.registers.values()) <= 168, done.registers
        assert program.arena_bytes <= 4 * 2 * 1024, "a number for each query, and no scores"


def test_extreme_scores_and_rows_in_which_nothing_is_allowed() -> None:
    """Scores far apart, infinities, and an empty row, which is NaN and leaves the others alone."""
    q, k, v = (RNG.standard_normal((1, 40, 8)).astype(np.float32) for _ in range(3))
    q[0, 3], k[0, 35], v[0, 1, 2] = 1e4, 1e4, np.inf
    mask = RNG.random((1, 40, 40)) < 0.5
    mask[0, 7], mask[0, 5, 1] = False, True
    nodes = [*operands(40, 40, 8, 8, mask=False, side="")[:3]]
    nodes = [input_node(f"x{k}", TensorType(f32, (1, 40, 8))) for k in range(3)] + [
        input_node("m", TensorType(bool_, (1, 40, 40)))
    ]
    graph = Graph(tuple(nodes), (make("attention", *nodes, scale=1.0, causal=False),))
    (found,) = on_emulator(generate(graph, row("cuda-sm_80"), verify=True), [q, k, v, mask])
    expected = REGISTRY["attention"].reference([q.astype(float), k.astype(float), v.astype(float), mask], graph.outputs[0].attrs)
    assert np.isnan(found[0, 7, :8]).all() and found[0, 7, 8] == -np.inf
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-6)  # scores of up to 1e4, in f32


class Block(tw.nn.Module):
    """Attention of grouped heads under a mask of its own length, then something to train."""

    def __init__(self, *, causal: bool, dropout: float) -> None:
        self.causal, self.dropout = causal, dropout
        self.q, self.kv, self.out = tw.nn.Linear(16, 16), tw.nn.Linear(16, 16), tw.nn.Linear(16, 5)

    def __call__(self, x: Any, lengths: Any) -> Any:
        b, t, _ = x.shape
        q = tw.transpose(tw.reshape(self.q(x), (b, t, 4, 4)), (0, 2, 1, 3))
        kv = tw.transpose(tw.reshape(self.kv(x), (b, t, 4, 4)), (0, 2, 1, 3))
        mask = tw.reshape(tw.iota((t,), 0, "i64"), (1, 1, 1, t)) < tw.reshape(lengths, (b, 1, 1, 1))
        y = tw.scaled_dot_product_attention(q, kv[:, :2], kv[:, 2:], mask, self.dropout, self.causal, enable_gqa=True)
        return tw.max(self.out(tw.reshape(tw.transpose(y, (0, 2, 1, 3)), (b, t, 16))), axis=1)


@pytest.mark.unvalidated("its passes are those of other tests")
@pytest.mark.parametrize(("causal", "dropout"), [(True, 0.0), (False, 0.3)])
def test_a_model_trains_like_on_a_processor(causal: bool, dropout: float) -> None:
    """With dropout it stays a loop over blocks of queries, whose draws are the processor's."""
    t = 9 if dropout else 37  # a loop is many launches
    x, lengths = RNG.standard_normal((3, t, 16)).astype(np.float32), np.array([t, 5, 1])
    labels = RNG.integers(0, 5, 3)
    tw.seed(0)
    weights = Block(causal=causal, dropout=dropout).state_dict()
    found: dict[str, list[float]] = {}
    for target in ("host", "cuda-emulator"):
        model = Block(causal=causal, dropout=dropout)
        model.load_state_dict(weights)
        with driver.tracing_for(target, flags()):
            types = tw.spec(*x.shape), tw.spec(3, dtype="i64"), tw.spec(3, dtype="i64")
            traced = training_step(model, tw.losses.cross_entropy, tw.optim.SGD(0.5), *types)
        step = driver.build(traced.graph, traced.state, purpose="training", target=target)
        found[target] = [float(step(np.float32(0.5), x, lengths, labels)) for _ in range(2)]
        kinds = [k.name for k in step.compiled.run.infos] if target != "host" else []
        whole = [k for k in kinds if k.startswith("attention")]
        assert len(whole) == (3 if target != "host" and not dropout else 0), "forward, dq, and dk with dv"
    np.testing.assert_allclose(found["cuda-emulator"], found["host"], rtol=2e-5)
