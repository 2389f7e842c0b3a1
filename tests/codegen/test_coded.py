"""Products with weights of 16, 8 and 4 bits, of codebooks too: odd sizes on every row, threads, and whole models."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import DType, bf16, f16, f32, i8, i32
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType
from tensorwright.passes.weight_only import weight_only

from .helpers import host_rows
from .programs import Array, agree, compiled, interpreted

ROWS = [r for r in host_rows() if r.startswith("x86")] or host_rows()

# rows, K, N, bits, block: a last block of one step and of none; columns that fill no vector, no panel, several; words cut short
CASES = [
    (1, 96, 128, 8, 96),
    (1, 65, 67, 4, 32),
    (2, 33, 193, 8, 16),
    (4, 40, 1, 4, 8),
    (5, 7, 64, 4, 64),
    (6, 1, 15, 8, 1),
    (17, 50, 71, 4, 24),
    (3, 33, 66, 16, 33),
]
TABLES = [(1, 65, 67, 32), (5, 40, 130, 8)]


def product(rows: int, k: int, n: int, bits: int, block: int, half: DType = bf16) -> tuple[Graph, list[Array]]:
    rng = np.random.default_rng(rows + k + n)
    count = -(-n // 64)
    if bits == 8:
        q: Array = rng.integers(-128, 128, (count, k, 64)).astype(np.int8)
    elif bits == 4:
        q = rng.integers(-(2**31), 2**31, (count, -(-k // 8), 64)).astype(np.int32)
    else:
        q = rng.uniform(-100, 100, (count, k, 64)).astype(half.numpy)
    scales = rng.uniform(0.001, 0.01, (count, -(-k // block), 64)).astype(np.float32)
    arrays = [rng.uniform(-2, 2, (rows, k)).astype(np.float32), q, scales]
    nodes = [
        input_node(f"p{i}", TensorType(d, a.shape))
        for i, (a, d) in enumerate(zip(arrays, (f32, {4: i32, 8: i8, 16: half}[bits], f32), strict=True))
    ]
    return Graph(tuple(nodes), (make("coded_matmul", *nodes, n=n, bits=bits, block=block),)), arrays


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_sizes(case: tuple[int, int, int, int, int], row: str) -> None:
    graph, arrays = product(*case)
    (found,) = agree(graph, arrays, row, 5e-6)(arrays)  # sums of 96 products, with other roundings than the reference's
    if row == ROWS[0]:
        assert interpreted(graph, arrays, row)[0].tobytes() == found.tobytes()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_codebooks_of_odd_sizes(case: tuple[int, int, int, int], row: str) -> None:
    rows, k, n, block = case
    graph, arrays = product(rows, k, n, 4, block)
    table = input_node("table", TensorType(f32, (16,)))
    node = make("codebook_matmul", *graph.inputs, table, n=n, block=block)
    arrays.append(np.random.default_rng(0).normal(size=16).astype(np.float32))
    graph = Graph((*graph.inputs, table), (node,))
    (found,) = agree(graph, arrays, row, 5e-6)(arrays)
    if row == ROWS[0]:
        assert interpreted(graph, arrays, row)[0].tobytes() == found.tobytes()


@pytest.mark.parametrize("row", ROWS)
def test_halves_of_ieee(row: str) -> None:
    agree(*product(2, 20, 70, 16, 20, f16), row, 5e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bits_do_not_depend_on_threads(bits: int) -> None:
    graph, arrays = product(3, 512, 640, bits, 32)
    program = compiled(graph, ROWS[0])
    assert any(k.parallel for k in program.program.kernels)
    whole = program(arrays, 1)[0]
    assert whole.tobytes() == program(arrays, 2)[0].tobytes() == program(arrays, 4)[0].tobytes()


def test_infinities_meet_every_weight() -> None:
    graph, arrays = product(2, 33, 70, 4, 8)
    arrays[0][0, 5], arrays[0][1, 7] = np.inf, np.nan
    (y,) = agree(graph, arrays, ROWS[0], 5e-6)(arrays)
    assert np.isnan(y[1]).all() and not np.isfinite(y[0]).any()


class _Two(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Linear(70, 130), nn.Linear(130, 33, bias=False)

    def __call__(self, x: Node) -> Node:
        return self.b(tw.relu(self.a(x)))


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 32), (4, 64)])
def test_weights_of_a_model(bits: int, group: int) -> None:
    net, rng = _Two(), np.random.default_rng(5)
    values = {n: np.asarray(v) for n, v in net.state_dict().items()}
    for rows, products in ((3, 2), (9, 0)):
        graph = weight_only(tw.trace(net, tw.spec(rows, 70)), bits, group)
        exe = tw.compile(graph, parameters=values)
        assert exe.text("fuse").count(" coded_matmul") == products, "more rows read floats"
        x = rng.standard_normal((rows, 70)).astype(np.float32)
        exact = _by_hand(values, x, bits, group)
        assert np.abs(exe(x) - exact).max() <= 1e-5 * np.abs(exact).max()


def _by_hand(values: dict[str, Array], x: Array, bits: int, group: int) -> Array:
    """The definition: weights [out, in] quantised block by block, one at a time, then products in f64."""
    most = 2 ** (bits - 1) - 1

    def near(w: Array) -> Array:
        out = np.zeros(w.shape)
        step = group or w.shape[1]
        for n in range(w.shape[0]):
            for k in range(0, w.shape[1], step):
                part = w[n, k : k + step]
                s = np.float32(np.abs(part).max() * np.float32(1 / most))
                if group:
                    s = np.float32(s.astype(bf16.numpy))
                out[n, k : k + step] = np.clip(np.rint(part / s), -most, most) * np.float64(s)
        return out

    hidden = np.maximum(x @ near(values["a.weight"]).T + values["a.bias"], 0)
    return hidden @ near(values["b.weight"]).T
