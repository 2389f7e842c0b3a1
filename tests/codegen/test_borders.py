"""Contractions that write into the inside of a padded array, and those that write where an operand of their epilogue lies."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen.contraction.canonical import canonical
from tensorwright.codegen.contraction.types import Epilogue, Operand
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.loop_ir import For
from tensorwright.ir.build import full, input_node
from tensorwright.ir.contraction import Axis, Contraction, affine
from tensorwright.ir.dtypes import DType, f32, i8, u8
from tensorwright.ir.expr import Expr, const
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.lowering import Load
from tensorwright.ir.op import make
from tensorwright.ir.ops.structural import FUSED
from tensorwright.ir.padding import padding_of
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm
from tensorwright.passes.decompose import Decompose
from tensorwright.passes.fuse import Fuse
from tensorwright.passes.manager import run_pipeline

from .helpers import host, host_rows
from .programs import Array, agree, compiled, error, interpreted


def array(name: str, *shape: int, dtype: DType = f32) -> Node:
    return input_node(name, TensorType(dtype, shape))


def conv(x: Node, w: Node, stride: int = 1) -> Node:
    return make("conv2d", x, w, stride=(stride, stride), layout="NHWC")


def padded(x: Node, low: tuple[int, ...], high: tuple[int, ...], value: float = 0.0) -> Node:
    return make("pad", x, low=low, high=high, interior=(0,) * len(low), value=value)


def relu(x: Node) -> Node:
    return make("maximum", x, full(0, x.tensor))


def fused(graph: Graph, target: str = "") -> Graph:
    return run_pipeline(graph, (Decompose(), ContractForm(), Fuse()), Context(target=row(target) if target else host()))


def borders(graph: Graph) -> list[Node]:
    """The contraction regions that end with a padding."""
    return [
        n for n in graph.nodes() if n.op is FUSED and n.attrs["kind"] == "contraction" and padding_of(n.attrs["body"].outputs[0])
    ]


def draw(graph: Graph) -> list[Array]:
    rng = np.random.default_rng(3)
    given = [(i.tensor.static_shape, i.dtype) for i in graph.inputs]
    return [(rng.standard_normal(s) if d is f32 else rng.integers(0, 9, s)).astype(d.numpy) for s, d in given]


def chain(size: int, channels: tuple[int, int, int], low: int, high: int, stride: int, value: float = 0.0, n: int = 1) -> Graph:
    """conv(pad(relu(conv(x) + b))): the first writes what the second reads."""
    a, b, c = channels
    x, w, v, bias = array("x", n, size, size, a), array("w", b, a, 1, 1), array("v", c, b, 2, 2), array("b", b)
    y = conv(x, w)
    y = relu(make("add", y, make("broadcast_to", bias, shape=y.shape)))
    p = padded(y, (0, low, low, 0), (0, high, high, 0), value)
    return Graph((x, w, v, bias), (conv(p, v, stride),))


@pytest.mark.parametrize("target", host_rows())
@pytest.mark.parametrize(
    ("size", "channels", "low", "high", "stride", "value", "n"),
    [(7, (5, 16, 9), 1, 1, 1, 0.0, 1), (6, (4, 20, 3), 1, 0, 2, -2.5, 2), (5, (3, 7, 4), 1, 2, 1, 0.0, 3)],
)
def test_a_contraction_writes_into_a_padded_array(
    target: str, size: int, channels: tuple[int, int, int], low: int, high: int, stride: int, value: float, n: int
) -> None:
    after = fused(chain(size, channels, low, high, stride, value, n), target)
    assert len(borders(after)) == 1
    runner = agree(after, draw(after), target)
    assert len(runner.program.kernels) == 2


def test_borders_by_the_loop_interpreter() -> None:
    after = fused(chain(3, (1, 18, 1), 1, 1, 3, 0.5, 2))
    assert len(borders(after)) == 1
    arrays = draw(after)
    (checked,) = interpreted(after, arrays)  # bounds, races, what nobody wrote
    assert error(checked, compiled(after)(arrays)[0]) <= 2e-6


def test_a_large_border_is_shared_between_threads() -> None:
    after = fused(chain(6, (2, 512, 2), 2, 2, 1, 1.5, 4))
    assert len(borders(after)) == 1
    agree(after, draw(after))
    loops = [s for k in assemble(after, host()).module.kernels for s in k.body if isinstance(s, For) and s.var.attr == "border"]
    assert [s.kind for s in loops] == ["parallel"]


def test_bytes_are_padded_with_their_zero_point() -> None:
    x, w, v = array("x", 9, 12, dtype=u8), array("w", 12, 24, dtype=i8), array("v", 24, 5, dtype=i8)
    sums = make("matmul", x, w)
    y = make("cast", make("minimum", make("maximum", sums, full(0, sums.tensor)), full(255, sums.tensor)), dtype=u8)
    after = fused(Graph((x, w, v), (make("matmul", padded(y, (2, 0), (3, 0), 7), v),)))
    assert len(borders(after)) == 1
    agree(after, draw(after), budget=0.0)


def test_what_must_not_be_written_by_a_contraction() -> None:
    x, w, v = array("x", 1, 6, 6, 4), array("w", 8, 4, 1, 1), array("v", 8, 8, 3, 3)
    y = conv(x, w)
    around = padded(y, (0, 1, 1, 0), (0, 1, 1, 0))
    wide = padded(y, (0, 0, 0, 1), (0, 0, 0, 3))
    far = padded(y, (0, 9, 9, 0), (0, 9, 9, 0))
    third = array("u", 4, 12, 1, 1)
    cases = [
        ((x, w, v), (conv(around, v), y)),  # what is inside is read as it is too
        ((x, w), (relu(around),)),  # its reader is elementwise: one map without an array between
        ((x, w, third), (conv(wide, third),)),  # vectors along channels
        ((x, w, v), (conv(far, v),)),  # nearly all of it is border
    ]
    for inputs, outputs in cases:
        after = fused(Graph(inputs, outputs))
        assert not borders(after)
        agree(after, draw(after))
    assert not borders(
        run_pipeline(Graph((x, w, v), (conv(around, v),)), (ContractForm(), Fuse(borders=False)), Context(target=host()))
    )


def residual(rows: int, columns: int, steps: int) -> Graph:
    """relu(a b + r) - 1 with r = c d, which nothing reads afterwards."""
    a, b, c, d = array("a", rows, steps), array("b", steps, columns), array("c", rows, steps), array("d", steps, columns)
    r = make("tanh", make("matmul", c, d))
    y = relu(make("add", make("matmul", a, b), r))
    z = make("matmul", y, make("transpose", y, perm=(1, 0)))
    return Graph((a, b, c, d), (z,))


@pytest.mark.parametrize(("rows", "columns", "steps"), [(33, 40, 24), (64, 128, 16), (5, 7, 700)])
def test_a_residual_lies_where_its_sum_goes(rows: int, columns: int, steps: int) -> None:
    after = fused(residual(rows, columns, steps))
    made = assemble(after, host())
    assert sum(bool(s.shared) for s in made.plan.steps) == 1
    agree(after, draw(after))


def test_a_residual_in_place_by_the_loop_interpreter() -> None:
    after = fused(residual(3, 18, 2))
    arrays = draw(after)
    (checked,) = interpreted(after, arrays)
    assert error(checked, compiled(after)(arrays)[0]) <= 2e-6


@pytest.mark.parametrize(("indices", "expected"), [(["ij"], {0}), (["ji"], set()), (["ij", "ji"], set()), (["i0"], set())])
def test_only_what_is_read_where_it_is_written_may_lie_there(indices: list[str], expected: set[int]) -> None:
    axes = (Axis("m", 8, "m"), Axis("n", 8, "n"), Axis("k", 4, "k"))
    spec = Contraction(axes, (affine("m"), affine("k")), (affine("k"), affine("n")), (affine("m"), affine("n")))
    square = Operand(f32, (8, 1), 64)

    def value(acc: Expr, index: tuple[Expr, ...], load: Load) -> Expr:
        for name in indices:
            acc = acc + load(0, [const(0) if c == "0" else index["ij".index(c)] for c in name])
        return acc

    nest = canonical(spec, Operand(f32, (4, 1), 64), square, square, Epilogue((square,), value))
    assert nest.in_place == expected
