"""Cumulative sums, sorts and scatters on CUDA: lines for threads, warps and blocks; networks and merges; updates in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwright.codegen.cuda import sorts
from tensorwright.codegen.cuda.generate import generate
from tensorwright.ir.build import input_node
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import make
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.tools import assemble

Array = np.ndarray[Any, Any]
R = np.random.default_rng(0)


def graph_of(op: str, *arrays: Array, **attrs: Any) -> Graph:
    inputs = [input_node(f"x{k}", TensorType(as_dtype(a.dtype), a.shape)) for k, a in enumerate(arrays)]
    return Graph(tuple(inputs), (make(op, *inputs, **attrs),))


def both(graph: Graph, *arrays: Array) -> tuple[CudaProgram, Array, Array]:
    """The program, its result on the interpreter of PTX with all checks on, and the definition's. Cases take turns with SMs;
    the sweep takes the ops' samples for all three."""
    sm = (75, 80, 90)[sum(a.size for a in arrays) % 3]
    program = generate(graph, row(f"cuda-sm_{sm}"), verify=True)
    assert not assemble(program.ptx, sm).wrong, "spills, or worse"
    found = CudaBinding(program, {}, DeviceStore(Emulator(1 << 23, sm=sm))).run(list(arrays))
    return program, found, run(graph, {f"x{k}": a for k, a in enumerate(arrays)})[0]


SCANS = [
    ("cumsum", (5, 20), 1, False, False, "f4", "serial over 20"),
    ("cumsum", (3, 131), 1, False, True, "f4", "a warp for each line of 131"),
    ("cumprod", (2, 45, 3), 1, True, False, "f8", "a warp for each line of 45"),
    ("cumsum", (2, 1100), 1, True, True, "i4", "a block for each line of 1100"),
    ("cumsum", (1, 12289), 1, False, False, "i8", "a block for each of 3 parts of a line of 12289"),
    ("cumsum", (8195,), 0, True, True, "f4", "a block for each of 2 parts of a line of 8195"),
    ("cumsum", (40, 2100), 0, False, False, "f2", "serial over 40"),
]


@pytest.mark.parametrize(("op", "shape", "axis", "exclusive", "reverse", "dtype", "note"), SCANS)
def test_lines_of_every_length(
    op: str, shape: tuple[int, ...], axis: int, exclusive: bool, reverse: bool, dtype: str, note: str
) -> None:
    """Integers exactly; floats beside sums in f64, of a few thousand numbers around one."""
    numbers = R.integers(-99, 99, shape) if dtype[0] == "i" else R.uniform(0.5, 1.5, shape)
    x = numbers.astype(dtype)
    attrs = {"axis": axis, "exclusive": exclusive, "reverse": reverse}
    program, found, expected = both(graph_of(op, x, **attrs), x)
    assert program.infos[0].note == note
    if dtype[0] == "i":
        np.testing.assert_array_equal(found, expected)
    else:
        wide = x.astype("f8")
        exact = run(graph_of(op, wide, **attrs), {"x0": wide})[0]
        np.testing.assert_allclose(found.astype("f8"), exact, rtol={"f2": 1e-3, "f4": 1e-6, "f8": 1e-12}[dtype])


def test_what_is_not_finite_is_seen_from_there_on() -> None:
    x = np.ones((2, 700), np.float32)
    x[0, 300], x[1, 512], x[1, 600] = np.nan, np.inf, -np.inf
    _, found, expected = both(graph_of("cumsum", x, axis=1, exclusive=False, reverse=False), x)
    np.testing.assert_array_equal(found, expected)  # NaN where there is NaN; counts of ones are exact
    assert np.isnan(found[1, 600:]).all()
    assert np.isposinf(found[1, 512:600]).all()


SORTS = [
    ((3, 50), 1, 50, False, "f4", "a thread for each element"),
    ((64, 3), 0, 5, True, "i1", "a thread for each element"),
    ((2, 65), 1, 65, False, "?", "a block for each row of 65"),
    ((2, 130, 2), 1, 130, True, "f8", "a block for each row of 130"),
    ((1, 257), 1, 257, True, "i4", "a block for each 256 of 257, 1 merges"),
    ((2, 600), 1, 30, True, "f4", "a block for each 256 of 600, 2 merges"),
    ((1, 1100), 1, 1100, False, "f2", "a block for each 256 of 1100, 3 merges"),
]


@pytest.mark.parametrize(("shape", "axis", "count", "descending", "dtype", "note"), SORTS)
def test_sorts_are_stable_with_ties_and_nan(
    shape: tuple[int, ...],
    axis: int,
    count: int,
    descending: bool,
    dtype: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sorts, "RUN", 256)  # short runs: the interpreter is slow
    x = R.integers(0, 40, shape).astype(dtype)
    if dtype[0] == "f":
        flat = x.reshape(-1)
        flat[::17], flat[3::31], flat[5::29], flat[7::13] = np.nan, np.inf, -np.inf, -0.0
    program, found, expected = both(graph_of("argsort", x, axis=axis, count=count, descending=descending), x)
    assert program.infos[0].note == note
    np.testing.assert_array_equal(found, expected)


def test_the_longest_run_of_doubles_fits_a_block() -> None:
    x = np.zeros((1, 2048))
    program = generate(graph_of("argsort", x, axis=1, count=9, descending=True), row("cuda-sm_75"), verify=True)
    assert program.infos[0].note == "a block for each row of 2048"
    assert program.kernels[0].shared == 2048 * (8 + 4)
    assert not assemble(program.ptx, 75).wrong


SCATTERS = [
    ("scatter_add", (30, 5), (150,), 0, {}, "150 updates by where they go"),
    ("scatter_add", (7, 40), (11, 9), 1, {}, "99 updates by where they go"),
    ("scatter_add", (300,), (320,), 0, {}, "320 updates by where they go"),
    ("scatter", (30, 5), (130,), 0, {"kind": "set"}, "130 updates by where they go"),
    ("scatter", (9, 5), (40,), 0, {"kind": "max"}, "in order over 1 dimensions"),
]


@pytest.mark.parametrize(("op", "shape", "indices", "axis", "more", "note"), SCATTERS)
def test_scatters_keep_the_order_of_updates(
    op: str,
    shape: tuple[int, ...],
    indices: tuple[int, ...],
    axis: int,
    more: dict[str, str],
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit the definition's sums, one update after another; some go nowhere, and many to one place."""
    monkeypatch.setattr(sorts, "RUN", 256)
    x = R.standard_normal(shape).astype("f4")
    where = R.integers(-shape[axis] // 8, shape[axis] + 4, indices)
    where.reshape(-1)[::5] = 2
    updates = R.standard_normal((*shape[:axis], *indices, *shape[axis + 1 :])).astype("f4")
    program, found, expected = both(graph_of(op, x, where, updates, axis=axis, **more), x, where, updates)
    assert program.infos[0].note.startswith(note)
    np.testing.assert_array_equal(found, expected)
