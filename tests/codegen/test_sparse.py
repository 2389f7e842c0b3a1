"""Products with sparse matrices: every block width and row, what follows them, threads, hostile patterns."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir.build import constant, fused, input_node
from tensorwright.ir.dtypes import DType, f32, f64, i32
from tensorwright.ir.errors import DTypeError, ShapeError, VerifyError
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType
from tensorwright.ir.verify import verify

from .helpers import host_rows
from .programs import Array, agree, compiled, interpreted

ROWS = [r for r in host_rows() if r.startswith("x86")] or host_rows()


def pattern(rng: np.random.Generator, depth: int, blocks: int, width: int, density: float, dtype: DType = f32) -> list[Array]:
    kept = rng.random((blocks, depth)) < density
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
    values = rng.uniform(-2, 2, (int(kept.sum()), width)).astype(dtype.numpy)
    return [values, np.nonzero(kept)[1].astype(np.int32), starts]


def operands(x: tuple[int, ...], values: int, width: int, blocks: int, dtype: DType) -> list[Node]:
    shapes = [(x, dtype), ((values, width), dtype), ((values,), i32), ((blocks + 1,), i32)]
    return [input_node(f"p{k}", TensorType(d, s)) for k, (s, d) in enumerate(shapes)]


def region(x: tuple[int, ...], given: list[Array], dtype: DType = f32, op: str = "sparse_matmul", **attrs: object) -> Graph:
    """max(x @ sparse + bias, 0) + residual as a fused region."""
    p = operands(x, *given[0].shape, len(given[2]) - 1, dtype)
    y = make(op, *p, **attrs)
    p += [input_node("p4", TensorType(dtype, (y.shape[-1],))), input_node("p5", y.tensor)]
    zero = make("broadcast_to", constant(0.0, dtype), shape=y.shape)
    z = make("add", make("maximum", make("add", y, make("broadcast_to", p[4], shape=y.shape)), zero), p[5])
    body = Graph(tuple(p), (z,), name="sparse")
    outer = [input_node(f"x{k}", n.tensor) for k, n in enumerate(p)]
    return Graph(tuple(outer), (fused(body, outer, "sparse"),))


# rows that fill no panel, one, several; fewer steps than lanes; columns that fill no vector; narrow blocks and wide ones
CASES = [
    ((3,), 9, 4, 16, 0.5),
    ((2, 5, 7), 33, 3, 32, 0.2),
    ((133,), 20, 37, 1, 0.3),
    ((150,), 18, 9, 2, 0.4),
    ((17,), 3, 5, 8, 0.6),
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=[f"{x}-1x{w}" for x, _, _, w, _ in CASES])
def test_with_bias_activation_and_residual(case: tuple, row: str) -> None:
    lead, depth, blocks, width, density = case
    rng = np.random.default_rng(1)
    given = pattern(rng, depth, blocks, width, density)
    graph = region((*lead, depth), given)
    more = [rng.uniform(-2, 2, n.shape).astype(np.float32) for n in graph.inputs[4:]]
    arrays = [rng.uniform(-2, 2, (*lead, depth)).astype(np.float32), *given, *more]
    (found,) = agree(graph, arrays, row, 5e-6)(arrays)  # sums of 33 products at most, their terms up to 4
    if row == ROWS[0]:
        assert interpreted(graph, arrays, row)[0].tobytes() == found.tobytes()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("width", [1, 16])
def test_convolutions_with_what_follows(width: int, row: str) -> None:
    """Several panels, a last one of fewer rows, a stride: the same bits on 1, 2 and 4 threads. Of f64 too."""
    rng = np.random.default_rng(5)
    given = pattern(rng, 20 * 9, 32 // width, width, 0.15)
    graph = region((2, 29, 41, 20), given, op="sparse_conv2d", kernel=(3, 3), stride=(1, 2), padding=((1, 1), (0, 2)))
    more = [rng.uniform(-2, 2, n.shape).astype(np.float32) for n in graph.inputs[4:]]
    arrays = [rng.uniform(-2, 2, (2, 29, 41, 20)).astype(np.float32), *given, *more]
    program = agree(graph, arrays, row, 5e-6)
    one, two, four = (program(arrays, threads)[0].tobytes() for threads in (1, 2, 4))
    assert one == two == four
    double = region((1, 5, 6, 20), [given[0].astype(np.float64), *given[1:]], f64, "sparse_conv2d", kernel=(3, 3))
    agree(double, [rng.uniform(-2, 2, n.shape) if n.dtype is f64 else a for n, a in zip(double.inputs, arrays, strict=True)], row)


def test_f64() -> None:
    rng = np.random.default_rng(2)
    given = pattern(rng, 31, 5, 8, 0.3, f64)
    graph = region((21, 31), given, f64)
    more = [rng.uniform(-2, 2, n.shape) for n in graph.inputs[4:]]
    agree(graph, [rng.uniform(-2, 2, (21, 31)), *given, *more], ROWS[0])


@pytest.mark.parametrize("width", [1, 16])
def test_the_bits_do_not_depend_on_threads_or_on_the_rows_beside(width: int) -> None:
    rng = np.random.default_rng(3)
    given = pattern(rng, 256, 256 // width, width, 0.25)
    x = rng.uniform(-1, 1, (333, 256)).astype(np.float32)

    def run(rows: Array, threads: int) -> Array:
        p = operands(rows.shape, *given[0].shape, len(given[2]) - 1, f32)
        program = compiled(Graph(tuple(p), (make("sparse_matmul", *p),)), ROWS[0])
        assert len(rows) < 100 or any(k.parallel for k in program.program.kernels)
        return program([rows, *given], threads)[0]

    whole = run(x, 1)
    assert whole.tobytes() == run(x, 2).tobytes() == run(x, 4).tobytes()
    for part in (slice(0, 2), slice(40, 90)):
        assert whole[part].tobytes() == run(np.ascontiguousarray(x[part]), 1).tobytes()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("width", [1, 16])
def test_what_is_not_stored_is_not_multiplied(width: int, row: str) -> None:
    """An infinity meets only the entries there are: the others stay finite. A pattern out of range reads nothing beyond."""
    x = np.ones((20, 5), np.float32)
    x[3, 2], x[7, 1] = np.inf, np.nan
    values = np.ones((4, width), np.float32)
    offsets, starts = np.array([0, 2, -(2**31), 2**31 - 1], np.int32), np.array([-7, 1, 3, 2**31 - 1], np.int32)
    p = operands(x.shape, 4, width, 3, f32)
    graph = Graph(tuple(p), (make("sparse_matmul", *p),))
    (y,) = agree(graph, [x, values, offsets, starts], row)([x, values, offsets, starts])
    assert np.isfinite(y[:, :width]).all() and np.isinf(y[3, width]) and np.isnan(y[7]).sum() == 0


def test_a_compiled_graph_fuses_what_follows() -> None:
    rng = np.random.default_rng(4)
    given = pattern(rng, 40, 3, 16, 0.3)
    p = operands((30, 40), *given[0].shape, 3, f32)
    parameters = [input_node(n.attrs["name"], n.tensor, "parameter") for n in p[1:]]
    y = make("sparse_matmul", p[0], *parameters)
    graph = Graph((p[0], *parameters), (make("maximum", y, make("broadcast_to", constant(0.0, f32), shape=y.shape)),))
    exe = tw.compile(graph, parameters={f"p{k + 1}": a for k, a in enumerate(given)})
    assert len(exe.programs[0].kernels) == 1 if hasattr(exe, "programs") else True
    x = rng.uniform(-1, 1, (30, 40)).astype(np.float32)
    dense = np.zeros((40, 48), np.float32)
    for b in range(3):
        part = slice(given[2][b], given[2][b + 1])
        dense[given[1][part], 16 * b : 16 * b + 16] = given[0][part]
    np.testing.assert_allclose(exe(x), np.maximum(x @ dense, 0), atol=2e-5)


def test_bad_operands_are_named() -> None:
    p = operands((4, 8), 3, 16, 2, f32)
    with pytest.raises(DTypeError, match="operand 2 of sparse_matmul has dtype f32, expected i32"):
        make("sparse_matmul", p[0], p[1], input_node("o", TensorType(f32, (3,))), p[3])
    with pytest.raises(ShapeError, match=r"operand 2 of sparse_matmul has shape \[5\], expected \[3\]"):
        make("sparse_matmul", p[0], p[1], input_node("o", TensorType(i32, (5,))), p[3])
    with pytest.raises(ShapeError, match="a power of two"):
        make("sparse_matmul", p[0], input_node("v", TensorType(f32, (3, 12))), p[2], p[3])
    with pytest.raises(ShapeError, match="nothing for 3 entries to meet"):
        make("sparse_matmul", input_node("x", TensorType(f32, (4, 0))), *p[1:])


def test_the_verifier_knows_the_kind() -> None:
    p = operands((4, 8), 3, 16, 2, f32)
    body = Graph(tuple(p), (make("exp", make("sparse_matmul", make("exp", p[0]), *p[1:])),), name="sparse")
    outer = [input_node(f"x{k}", n.tensor) for k, n in enumerate(p)]
    with pytest.raises(VerifyError, match="operands of the sparse product must be inputs of the body"):
        verify(Graph(tuple(outer), (fused(body, outer, "sparse"),)))
