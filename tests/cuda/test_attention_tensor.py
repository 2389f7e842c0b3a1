"""Attention in bf16 and f16 on tensor cores: within a bound on the interpreter, inside models, and what its machine code is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorwright as tw
from tensorwright import driver
from tensorwright.codegen.cuda.generate import generate
from tensorwright.codegen.cuda.machine import SMS, limits
from tensorwright.frontend.training import training_step
from tensorwright.ir.build import input_node
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import as_dtype, bool_, f32
from tensorwright.ir.graph import Graph
from tensorwright.ir.lowering import Attention
from tensorwright.ir.op import REGISTRY, make
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.state import Options
from tensorwright.runtime.cuda.tools import assemble, sass
from tensorwright.settings import flags

from tests.codegen.programs import error
from tests.codegen.test_lower_ops import cases, together

from .sass import loops
from .test_attention import Block, on_emulator

Array = np.ndarray[Any, Any]
NUMPY = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
UNIT = {"f16": 2.0**-11, "bf16": 2.0**-8}  # half of the distance of neighbours, relative
RNG = np.random.default_rng(3)


def program(sm: int, dtype: str, shapes: list[tuple[int, ...]], mask: Any = None, **attrs: Any) -> CudaProgram:
    """Attention of operands of these shapes, under a mask (dtype, shape)."""
    nodes = [input_node(f"x{k}", TensorType(as_dtype(dtype), s)) for k, s in enumerate(shapes)]
    nodes += [] if mask is None else [input_node("mask", TensorType(*mask))]
    made = make("attention_f32", *nodes, **({"scale": 0.125, "causal": False} | attrs))
    return generate(Graph(tuple(nodes), (made,)), row(f"cuda-sm_{sm}"), verify=True)


def close(found: Array, arrays: list[Array], dtype: str, **attrs: Any) -> None:
    """Each p is off by UNIT of itself, so a result by that times the sum of p |v|; sums in f32 add some 2^-20 of it, and the row
    sums, of p that are not rounded, are off by no more than f32 makes them."""
    q, k, v = (x.astype(np.float64) for x in arrays[:3])
    attrs = {"scale": 0.125, "causal": False} | attrs
    reference = REGISTRY["attention"].reference
    expected = reference([q, k, v, *arrays[3:]], attrs)
    most = reference([q, k, np.abs(v), *arrays[3:]], attrs)[..., :-1]
    assert (np.abs(found[..., :-1] - expected[..., :-1]) <= (UNIT[dtype] + 2.0**-18) * most).all()
    np.testing.assert_allclose(found[..., -1], expected[..., -1], rtol=1e-5, atol=1e-5)


def drawn(dtype: str, *shapes: tuple[int, ...]) -> list[Array]:
    return [RNG.standard_normal(s).astype(NUMPY[dtype]) for s in shapes]


@pytest.mark.parametrize("sm", [75, 80])
def test_samples_on_the_interpreter(sm: int) -> None:
    """Forward and back; of f16 on both; of bf16, for which sm_75 has no instruction, by multiply-adds there."""
    all_of, back = cases(REGISTRY["attention_f32"]), cases(REGISTRY["attention_grad_f32"])
    some = (*all_of[::2], *back[1::4]) if sm == 80 else (*all_of[5:10:2], *back[10:19:4])
    graph, arrays = together(some, (Attention,))
    made = generate(graph, row(f"cuda-sm_{sm}"), verify=True)
    units = set(re.findall(r"mma\.sync\.aligned\.(m16n8k\d+)", made.ptx))
    assert units == ({"m16n8k16"} if sm == 80 else {"m16n8k8"})
    assert not assemble(made.ptx, sm).wrong
    for k, (found, (s, *_, expected)) in enumerate(zip(on_emulator(made, arrays), some, strict=True)):
        assert error(found, expected) <= s.budget, f"sample {k}, {s.label}"


# sm, dtype, T, S, D, E, causal, and what the kernel's way there is: 16, 8, 4 or 2 bytes at a time
CASES = [
    (80, "bf16", 70, 150, 64, 64, False), (80, "f16", 70, 70, 128, 104, True), (80, "bf16", 33, 140, 20, 36, False),
    (80, "bf16", 17, 40, 5, 1, False), (75, "f16", 70, 133, 64, 24, True), (75, "f16", 20, 70, 90, 128, False),
    (80, "f16", 1, 257, 32, 32, False),
]  # fmt: skip


@pytest.mark.parametrize(("sm", "dtype", "t", "s", "d", "e", "causal"), CASES)
def test_ragged_sizes(sm: int, dtype: str, t: int, s: int, d: int, e: int, causal: bool) -> None:
    shapes = [(2, t, d), (1, s, d), (2, s, e)]
    made = program(sm, dtype, shapes, causal=causal)
    assert made.infos[-1].note.startswith("tensor cores")
    chunks = d % 8 == 0 or e % 8 == 0 or e == 1  # a column lies along the keys
    assert ("cp.async" in made.ptx) == (sm == 80 and chunks)
    assert not assemble(made.ptx, sm).wrong
    arrays = drawn(dtype, *shapes)
    close(on_emulator(made, arrays)[0], arrays, dtype, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_two_tiles_of_queries_a_warp(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMS, 80, replace(SMS[80], multiprocessors=1))  # one block fills it
    shapes = [(1, 150, 64)] * 3
    made = program(80, "bf16", shapes, causal=causal)
    assert "128 rows, 64 columns" in made.infos[-1].note
    arrays = drawn("bf16", *shapes)
    close(on_emulator(made, arrays)[0], arrays, "bf16", causal=causal)


@pytest.mark.parametrize(
    ("kind", "shape"), [("bool", (2, 1, 1, 70)), ("bool", (1, 2, 40, 70)), ("f32", (40, 1)), ("f32", (40, 70))]
)
def test_masks_and_shared_heads(kind: str, shape: tuple[int, ...]) -> None:
    """Masks that broadcast, of bools, and of numbers (-inf among them); keys of one head for two, a negative scale."""
    shapes = [(2, 2, 40, 24), (2, 1, 70, 24), (2, 1, 70, 8)]
    mask: Array = RNG.random(shape) < 0.6 if kind == "bool" else RNG.standard_normal(shape).astype(np.float32)
    if kind == "bool":
        mask[..., 0] = True
    elif shape[1] > 1:
        mask[RNG.random(shape) < 0.3] = -np.inf
        mask[:, 0] = 0.5
    arrays = [*drawn("bf16", *shapes), mask]
    scale = -0.3 if (shape[-1] == 70 and len(shape) == 2) or shape[2:] == (1, 70) else 0.3
    made = program(80, "bf16", shapes, (as_dtype(kind), shape), scale=scale, causal=True)
    close(on_emulator(made, arrays)[0], arrays, "bf16", scale=scale, causal=True)


def test_extreme_scores_and_rows_in_which_nothing_is_allowed() -> None:
    """Scores far apart, an infinite value, a score that is NaN, and an empty row, which is NaN and leaves the others alone."""
    shapes = [(1, 40, 8), (1, 140, 8), (1, 140, 8)]
    q, k, v = drawn("bf16", *shapes)
    q[0, 3], k[0, 135], v[0, 1, 2], q[0, 9, 0] = 1e4, 1e4, np.inf, np.nan
    mask = RNG.random((1, 40, 140)) < 0.5
    mask[0, 7], mask[0, 5, 1] = False, True
    made = program(80, "bf16", shapes, (bool_, mask.shape), scale=1.0)
    (found,) = on_emulator(made, [q, k, v, mask])
    with np.errstate(all="ignore"):
        wide = [x.astype(np.float64) for x in (q, k, v)]
        expected = REGISTRY["attention"].reference([*wide, mask], {"scale": 1.0, "causal": False})
    assert np.isnan(found[0, 7, :8]).all() and found[0, 7, 8] == -np.inf
    assert np.isnan(found[0, 9]).all()
    # p errs by 2^-8, and by what f32 makes of scores of up to 8e8: those decide, and are far apart
    np.testing.assert_allclose(found[..., :8], expected[..., :8], rtol=2.0**-6, atol=2.0**-6)
    np.testing.assert_allclose(found[..., 8], expected[..., 8], rtol=1e-5, atol=1e-5)


def back(sm: int, dtype: str, shapes: list[tuple[int, ...]], side: str, mask: Any = None, **attrs: Any) -> CudaProgram:
    """The way back of one side of attention of operands of these shapes, of which q has all slices."""
    nodes = [input_node(f"x{k}", TensorType(as_dtype(dtype), s)) for k, s in enumerate(shapes)]
    nodes += [input_node(n, TensorType(f32, (*shapes[0][:-1], shapes[2][-1] + 1))) for n in ("y", "dy")]
    nodes += [] if mask is None else [input_node("mask", TensorType(*mask))]
    made = make("attention_grad_f32", *nodes, side=side, **({"scale": 0.125, "causal": False} | attrs))
    return generate(Graph(tuple(nodes), (made,)), row(f"cuda-sm_{sm}"), verify=True)


# sm, dtype, T, S, D, E, causal, mask: two launches for keys and values beyond 64 features
BACK = [
    (80, "bf16", 70, 100, 64, 40, True, None), (80, "f16", 40, 70, 104, 128, False, None),
    (75, "f16", 45, 40, 24, 64, True, None), (80, "bf16", 20, 45, 20, 7, False, "f32"),
]  # fmt: skip


@pytest.mark.parametrize("side", ["query", "keys"])
@pytest.mark.parametrize(("sm", "dtype", "t", "s", "d", "e", "causal", "kind"), BACK)
def test_the_way_back(sm: int, dtype: str, t: int, s: int, d: int, e: int, causal: bool, kind: str | None, side: str) -> None:
    """p, dy and ds are each off by UNIT of themselves: so are the terms of every sum, twice."""
    shapes = [(2, t, d), (1, s, d), (2, s, e)]
    made = back(sm, dtype, shapes, side, None if kind is None else (as_dtype(kind), (t, s)), causal=causal)
    assert made.infos[-1].note.startswith("tensor cores")
    assert len(made.kernels) == (3 if side == "keys" and d > 64 else 2)
    assert not assemble(made.ptx, sm).wrong
    q, k, v = drawn(dtype, *shapes)
    mask: list[Array] = []
    if kind == "bool":
        mask = [RNG.random((t, s)) < 0.6]
        mask[0][:, 0] = True
    elif kind is not None:
        mask = [RNG.standard_normal((t, s)).astype(np.float32)]
        mask[0][3, 4:] = -np.inf
    attrs = {"scale": 0.125, "causal": causal}
    wide = [x.astype(np.float64) for x in (q, k, v)]
    y = REGISTRY["attention"].reference([*wide, *mask], attrs).astype(np.float32)
    dy = RNG.standard_normal(y.shape).astype(np.float32)
    (found,) = on_emulator(made, [q, k, v, y, dy, *mask])
    expected, most = gradients([*wide, y.astype(np.float64), dy.astype(np.float64), *mask], attrs, side)
    assert (np.abs(found - expected) <= (2 * UNIT[dtype] + UNIT[dtype] ** 2 + 2.0**-16) * most + 1e-6).all()


def gradients(arrays: list[Array], attrs: dict[str, Any], side: str) -> tuple[Array, Array]:
    """The way back by the op's definition, and the same with the absolute values of all that is added up."""
    q, k, v, y, dy, *mask = arrays
    expected = REGISTRY["attention_grad"].reference(arrays, attrs | {"side": side})
    s = np.matmul(q, np.swapaxes(k, -1, -2)) * attrs["scale"]
    if attrs["causal"]:
        s = np.where(np.tri(*s.shape[-2:], dtype=bool), s, -np.inf)
    for m in mask:
        s = np.where(m, s, -np.inf) if m.dtype == np.bool_ else s + m
    p, d = np.exp(s - y[..., -1:]), np.abs(dy)
    delta = (d[..., :-1] * np.abs(y[..., :-1])).sum(-1, keepdims=True) + d[..., -1:]
    ds = p * (np.matmul(d[..., :-1], np.abs(np.swapaxes(v, -1, -2))) + delta) * attrs["scale"]
    if side == "query":
        return expected, np.matmul(ds, np.abs(k))
    turned = [np.matmul(np.swapaxes(a, -1, -2), b) for a, b in ((ds, np.abs(q)), (p, d[..., :-1]))]
    return expected, np.concatenate(turned, -1)


def test_nothing_flows_from_what_is_forbidden() -> None:
    """An empty row has NaN for a row sum; its dq is zero, and keys get nothing of it but dv's NaN."""
    shapes = [(40, 8), (40, 8), (40, 8)]
    q, k, v = drawn("bf16", *shapes)
    mask = RNG.random((40, 40)) < 0.5
    mask[:, 0], mask[7] = True, False
    wide = [x.astype(np.float64) for x in (q, k, v)]
    with np.errstate(all="ignore"):
        y = REGISTRY["attention"].reference([*wide, mask], {"scale": 1.0, "causal": False}).astype(np.float32)
    y[7, :8] = 0  # D is a number then, and only the row sum is not
    dy = RNG.standard_normal(y.shape).astype(np.float32)
    for side in ("query", "keys"):
        arrays = [q, k, v, y, dy, mask]
        (found,) = on_emulator(back(80, "bf16", shapes, side, (bool_, mask.shape), scale=1.0), arrays)
        with np.errstate(all="ignore"):
            expected = REGISTRY["attention_grad"].reference([*wide, y, dy, mask], {"scale": 1.0, "causal": False, "side": side})
        assert (np.isnan(found) == np.isnan(expected)).all()
        if side == "query":
            assert (found[7] == 0).all()
        else:
            assert np.isnan(found[:, 8:]).all()
        np.testing.assert_allclose(np.nan_to_num(found), np.nan_to_num(expected), atol=2.0**-6 * float(np.nanmax(expected)))


STATIC = [(75, "f16", 64), (75, "f16", 128), (80, "bf16", 64), (80, "bf16", 128), (90, "bf16", 64)]
# of the loop over tiles of keys: products, ldmatrix, copies, exponentials and all others at most
LOOP = {
    (75, 64): (64, 16, 0, 18, 190), (75, 128): (128, 32, 0, 18, 290), (80, 64): (128, 32, 8, 68, 410),
    (80, 128): (64, 32, 8, 18, 225), (90, 64): (128, 32, 8, 68, 410),
}  # fmt: skip


@pytest.mark.parametrize(("sm", "dtype", "d"), STATIC)
def test_machine_code(sm: int, dtype: str, d: int) -> None:
    """No spill; two blocks a multiprocessor; of a tile of keys four products a `ldmatrix` where a warp has 32 queries, two where
    it has 16; one multiply-add, one exponential, one maximum and one sum a score."""
    made = program(sm, dtype, [(512, 1024, d)] * 3)
    done = assemble(made.ptx, sm)
    assert not done.wrong
    (kernel,) = made.kernels
    assert limits(row(f"cuda-sm_{sm}"), 128, max(done.registers.values()), kernel.shared)[0] >= 2
    text = sass(made.ptx, sm)
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"
    inner = max(loops(text, least=100), key=len)
    count = Counter(re.split(r"[. ]", x)[0] for x in inner)
    products, matrices, copies, powers, rest = LOOP[sm, d]
    assert (count["HMMA"], count["LDSM"], count["LDGSTS"], count["MUFU"]) == (products, matrices, copies, powers)
    assert len(inner) - products - powers <= rest


# of the way back of 128 features by keys the loop for dk: products, ldmatrix, copies, exponentials, and all others at most
LOOP_BACK = {("query", 64): (96, 48, 8, 32, 330), ("keys", 64): (64, 32, 4, 16, 330), ("query", 128): (96, 48, 8, 16, 260)}


@pytest.mark.parametrize(("side", "d"), LOOP_BACK)
def test_machine_code_of_the_way_back(side: str, d: int) -> None:
    """No spill, and two blocks a multiprocessor; two products a `ldmatrix`."""
    made = back(80, "bf16", [(512, 1024, d)] * 3, side)
    done = assemble(made.ptx, 80)
    assert not done.wrong
    kernel = made.kernels[-1]
    assert limits(row("cuda-sm_80"), 128, max(done.registers.values()), kernel.shared)[0] >= 2
    text = sass(made.ptx, 80)
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"
    inner = max(loops(text, least=100), key=len)
    count = Counter(re.split(r"[. ]", x)[0] for x in inner)
    products, matrices, copies, powers, rest = LOOP_BACK[side, d]
    assert (count["HMMA"], count["LDSM"], count["LDGSTS"], count["MUFU"]) == (products, matrices, copies, powers)
    assert len(inner) - products - powers <= rest, len(inner)


@pytest.mark.parametrize(("sm", "dtype", "d"), [(75, "f16", 64), (80, "bf16", 64), (80, "bf16", 128)])
def test_no_bank_conflict_and_whole_sectors(sm: int, dtype: str, d: int) -> None:
    """What is read uses every byte of its sectors. Rows of results, with their sums, are of odd length: nothing is aligned."""
    shapes = [(1, 64, d), (1, 96, d), (1, 96, d)]
    made = program(sm, dtype, shapes)
    emulator = Emulator(1 << 24, Options(count=True), sm=sm)
    CudaBinding(made, {}, DeviceStore(emulator)).run(drawn(dtype, *shapes))
    counted = emulator.counters[made.kernels[-1].name][-1]
    assert counted.shared_phases == counted.shared_cycles > 0
    read, written = 2 * d * (64 + 96 + 96), 4 * 64 * (d + 1)
    assert counted.bytes == read + written
    assert counted.sectors * 32 <= read + 4 * written


@pytest.mark.unvalidated("its passes are those of other tests")
def test_a_model_trains_in_bf16() -> None:
    """Forward and both ways back are on tensor cores; the losses are those of a processor in bf16."""
    x, lengths, labels = RNG.standard_normal((3, 37, 16)).astype(np.float32), np.array([37, 5, 1]), RNG.integers(0, 5, 3)
    tw.seed(0)
    weights = Block(causal=True, dropout=0.0).state_dict()
    found: dict[str, list[float]] = {}
    for target in ("host", "cuda-emulator"):
        model = Block(causal=True, dropout=0.0)
        model.load_state_dict(weights)
        with driver.tracing_for(target, flags()):
            types = tw.spec(*x.shape), tw.spec(3, dtype="i64"), tw.spec(3, dtype="i64")
            traced = training_step(model, tw.losses.cross_entropy, tw.optim.SGD(0.5), *types)
        step = driver.build(traced.graph, traced.state, purpose="training", target=target, precision="bf16")
        found[target] = [float(step(np.float32(0.5), x, lengths, labels)) for _ in range(2)]
        if target != "host":
            notes = [i.note for i in step.compiled.run.infos if i.name.startswith("attention")]
            assert len(notes) == 3 and all("mma_bf16" in n for n in notes)
    np.testing.assert_allclose(found["cuda-emulator"], found["host"], rtol=5e-3)  # bf16 has 8 bits


def test_models_of_16_bits_have_it() -> None:
    dtype = "f16"
    specs = [tw.spec(2, 20, 16, dtype=dtype)] * 3
    exe = tw.compile(tw.scaled_dot_product_attention, *specs, target="cuda-emulator")
    assert f"mma_{dtype}" in exe.compiled.run.infos[0].note
    arrays = drawn(dtype, *[(2, 20, 16)] * 3)
    found = exe(*arrays)
    assert found.dtype == NUMPY[dtype]
    wide = [x.astype(np.float64) for x in arrays]
    expected = REGISTRY["attention"].reference(wide, {"scale": 0.25, "causal": False})[..., :-1]
    assert error(found.astype(np.float64), expected) <= 4 * UNIT[dtype]  # of each p, and of the result
    assert f32.name in str(exe.text("graph")), "sums are f32"
