"""Contractions on tensor cores: right on the interpreter for every unit at ragged sizes, and the figures of their tiles."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.codegen.cuda.generate import generate
from tensorwright.codegen.cuda.machine import SMS
from tensorwright.codegen.cuda.matrix_units import UNITS
from tensorwright.ir.build import full, input_node
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.ops.contract import product_spec
from tensorwright.ir.ops.tf32 import rounded
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.passes.contract import Context
from tensorwright.passes.fuse import Fuse
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore
from tensorwright.runtime.cuda.emulator import Emulator
from tensorwright.runtime.cuda.state import Counters, Options
from tensorwright.runtime.cuda.tools import assemble, sass

from tests.codegen.programs import decomposed

from .sass import loops, opcodes

Array = np.ndarray[Any, Any]
NUMPY = {"i8": np.int8, "u8": np.uint8, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32}


def drawn(kind: str, shape: tuple[int, int], seed: int) -> Array:
    """Integers whose products and sums are exact in f32; of bytes all there are."""
    low, high = {"i8": (-128, 128), "u8": (0, 256)}.get(kind, (-8, 8))
    return np.random.default_rng(seed).integers(low, high, shape).astype(NUMPY[kind])


def product(a: Array, b: Array, flip: str, sm: int, tf32: bool = False) -> tuple[CudaProgram, list[Array]]:
    """The program of a @ b, whose operands lie transposed where `flip` says t; and the operands as they lie."""
    (m, k), n = a.shape, b.shape[1]
    lying = [x.T.copy() if f == "t" else x for x, f in zip((a, b), flip, strict=True)]
    left, right = (input_node(name, TensorType(as_dtype(x.dtype), x.shape)) for name, x in zip("ab", lying, strict=True))
    spec = product_spec(m, n, k, "km" if flip[0] == "t" else "mk", "nk" if flip[1] == "t" else "kn")
    op = "contract_tf32" if tf32 else "contract" if a.dtype.itemsize == 1 else "contract_f32"
    graph = decomposed(Graph((left, right), (make(op, left, right, spec=spec),)))
    return generate(graph, row(f"cuda-sm_{sm}"), verify=True), lying


def run(program: CudaProgram, arrays: list[Array], sm: int, count: bool = False) -> tuple[Array, Counters | None]:
    """The result on the interpreter with all checks on, outputs poisoned; and the counts of its last kernel."""
    emulator = Emulator(1 << 24, Options(count=count), sm=sm)
    out = CudaBinding(program, {}, DeviceStore(emulator)).run(arrays)
    assert isinstance(out, np.ndarray)
    return out, emulator.counters[program.kernels[-1].name][-1] if count else None


RAGGED, CHUNKED = (37, 45, 70), (72, 40, 48)  # no multiple of anything; of chunks of 16 bytes, but not of tiles
UNIT_CASES = [
    (name, flip, size)
    for k, name in enumerate(UNITS)
    for flip, size in ((("nn", "nt", "tn", "tt")[k % 4], RAGGED), (("tt", "nn", "nt", "tn")[k % 4], CHUNKED))
    if k < 5 or (size is RAGGED) == (k % 2 == 0)  # of bytes, which differ in signs, one each
]


@pytest.mark.parametrize(("name", "flip", "size"), UNIT_CASES)
def test_every_unit_is_exact_at_ragged_sizes(name: str, flip: str, size: tuple[int, int, int]) -> None:
    """Operands as they lie, transposed or not; 16 bytes at a time, two elements, one."""
    m, n, k = size
    left, _, right = name.removeprefix("mma_").removesuffix("_half").partition("_")
    a, b = drawn(left, (m, k), 0), drawn(right or left, (k, n), 1)
    sm = UNITS[name].least
    program, lying = product(a, b, flip, sm, tf32=left == "tf32")
    assert name in program.texts["loops"]
    assert ("cp.async" in program.ptx) == (sm >= 80 and size[0] == 72 and not (a.itemsize == 1 and flip == "tn"))
    assert not assemble(program.ptx, sm).wrong
    out, _ = run(program, lying, sm)
    wide = np.float64 if right == "" else np.int64
    assert (out == a.astype(wide) @ b.astype(wide)).all()


TILES = [
    (80, "bf16", "nn"), (80, "bf16", "nt"), (80, "tf32", "nn"), (80, "tf32", "nt"), (80, "i8", "nt"),
    (75, "f16", "nt"), (75, "i8", "nt"),
]  # fmt: skip


@pytest.mark.parametrize(("sm", "kind", "flip"), TILES)
def test_large_tile(sm: int, kind: str, flip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """128x128x64 bytes: at most 128 registers, no spill, no bank conflict, every byte of a sector used; and right."""
    monkeypatch.setitem(SMS, sm, replace(SMS[sm], multiprocessors=1))  # one block fills it: the large tile is chosen
    k = 256 // np.dtype(NUMPY[kind]).itemsize  # four steps, one part
    a, b = drawn(kind, (128, k), 0), drawn(kind, (k, 128), 1)
    program, lying = product(a, b, flip, sm, tf32=kind == "tf32")
    assert program.infos[-1].note.startswith("tensor cores, tile 128x128, mma_")
    done = assemble(program.ptx, sm)
    assert not done.wrong
    assert max(done.registers.values()) <= 128, done.registers
    out, counted = run(program, lying, sm, count=True)
    wide = np.int64 if kind == "i8" else np.float64
    assert (out == a.astype(wide) @ b.astype(wide)).all()
    assert counted is not None
    assert counted.shared_phases == counted.shared_cycles > 0
    assert 0 < counted.sectors * 32 <= counted.bytes


@pytest.mark.parametrize(("sm", "kind", "flip"), [t for t in TILES if t not in ((80, "bf16", "nn"), (80, "tf32", "nt"))])
def test_machine_code_of_the_large_tile(sm: int, kind: str, flip: str) -> None:
    """The loop over steps of a long product: how many instructions there are beside those that multiply."""
    a, b = (np.zeros((2048, 2048), NUMPY[kind]) for _ in "ab")
    program, _ = product(a, b, flip, sm, tf32=kind == "tf32")
    done = assemble(program.ptx, sm)
    assert not done.wrong
    assert max(done.registers.values()) <= 128, done.registers
    text = sass(program.ptx, sm)
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"
    found = loops(text, least=20)
    inner = found[0] if found else opcodes(text)  # ptxas may write the steps out, "nounroll" or not
    products = sum(x.startswith(("HMMA", "IMMA")) for x in inner)
    each = 64 if sm == 75 else 32
    steps = products // each
    assert products == steps * each > 0
    assert len(found) == 1 or steps == 2048 * np.dtype(NUMPY[kind]).itemsize // 64
    few = kind + flip == "tf32nn" or (sm, kind) == (75, "i8")
    assert sum(x.startswith("LDSM") for x in inner) == steps * (8 if few else 12)
    assert sum(x.startswith("LDGSTS") for x in inner) == (4 if sm == 80 else 0)
    assert (len(inner) - products) / steps <= {"tf32nn": 72}.get(kind + flip, 60), f"{len(inner)} instructions in {steps} steps"


def test_results_of_bytes_are_whole_sectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A requantised result: eight bytes a lane, 32 of a row side by side."""
    monkeypatch.setitem(SMS, 80, replace(SMS[80], multiprocessors=1))
    x, w = (input_node(n, TensorType(as_dtype("i8"), (128, 128))) for n in "xw")
    total = make("cast", make("contract", x, w, spec=product_spec(128, 128, 128, b="nk")), dtype=as_dtype("f32"))
    scaled = make("mul", total, full(0.001, total.tensor))
    graph = decomposed(Graph((x, w), (make("cast", make("round", scaled), dtype=as_dtype("i8")),)))
    graph = Fuse().run(graph, Context())
    program = generate(graph, row("cuda-sm_80"), verify=True)
    a, b = drawn("i8", (128, 128), 0), drawn("i8", (128, 128), 1)
    out, counted = run(program, [a, b], 80, count=True)
    expected = np.clip(np.rint((a.astype(np.int64) @ b.T.astype(np.int64)).astype(np.float32) * np.float32(0.001)), -128, 127)
    assert (out == expected).all()
    assert "st.global.v2.b32" in program.ptx
    assert counted is not None
    assert counted.shared_phases == counted.shared_cycles
    assert counted.sectors * 32 == counted.bytes


def test_tf32_rounds_to_nearest_and_keeps_what_is_not_finite() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((40, 72), (72, 24)))
    a[3, 5], a[7, 1], b[2, 9] = np.inf, np.nan, 3.4e38  # the last one rounds to infinity
    exe = tw.compile(lambda x, y: x @ y, tw.spec(40, 72), tw.spec(72, 24), target="cuda-emulator", precision="tf32")
    assert ".tf32.tf32" in exe.text("ptx")
    with np.errstate(all="ignore"):
        expected = (rounded(a).astype(np.float64) @ rounded(b).astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(exe(a, b), expected, rtol=1e-5, atol=1e-5)  # f32 sums of 72 terms
    plain = tw.compile(lambda x, y: x @ y, tw.spec(40, 72), tw.spec(72, 24), target="cuda-sm_80")
    assert "mma.sync" not in plain.text("ptx"), "f32 stays f32 unless tf32 is asked for"


@pytest.mark.unvalidated("its passes are those of other tests")
@pytest.mark.parametrize(("precision", "rtol"), [("bf16", 1e-5), ("tf32", 1e-5)])
def test_convolution_and_its_gradients_are_implicit_products(precision: str, rtol: float) -> None:
    """The same numbers as a processor's: both round the operands, and sums differ in order."""
    nn.init.seed(0)
    module = nn.Conv2d(16, 24, 3, padding=1)
    x = np.random.default_rng(2).standard_normal((2, 16, 7, 7)).astype(np.float32)

    def gradients(x: tw.Tensor, w: tw.Tensor) -> Any:
        return tw.grad(lambda x, w: tw.sum(tw.tanh(tw.conv2d(x, w, padding=1))), argnums=(0, 1))(x, w)

    w = module.weight.data
    for fn, arrays, count in ((module, (x,), 1), (gradients, (x, w), 3)):
        specs = [tw.spec(*v.shape) for v in arrays]
        exe = tw.compile(fn, *specs, target="cuda-emulator", precision=precision)
        assert len(set(re.findall(r"mma\.sync\S*", exe.text("ptx")))) == 1
        assert sum(i.note.startswith("tensor cores") for i in exe.compiled.run.infos) >= count
        found, expected = exe(*arrays), tw.compile(fn, *specs, precision=precision)(*arrays)
        for f, e in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
            np.testing.assert_allclose(f, e, rtol=rtol, atol=rtol * float(np.abs(e).max()))


def test_split_reduction_is_added_up_in_order() -> None:
    """A long reduction of few tiles is cut; the parts of bytes are exact, and requantising comes after them."""
    a, b = drawn("i8", (32, 2048), 0), drawn("i8", (2048, 16), 1)
    program, lying = product(a, b, "nt", 80)
    assert re.search(r"tensor cores.* \d+ parts", program.infos[-1].note)
    out, _ = run(program, lying, 80)
    assert (out == a.astype(np.int64) @ b.astype(np.int64)).all()


def test_buffers_follow_from_shared_memory() -> None:
    notes = {}
    for sm, kind in ((75, "f16"), (80, "f16"), (90, "f16")):
        for m in (64, 4096):
            shape = (m, 512), (512, m)
            a, b = (np.zeros(s, NUMPY[kind]) for s in shape)
            notes[sm, m] = product(a, b, "nn", sm)[0].infos[-1].note.split(", ")[1:4:2]
    assert notes == {
        (75, 64): ["tile 64x64", "2 buffers"], (75, 4096): ["tile 128x128", "2 buffers"],
        (80, 64): ["tile 64x64", "4 buffers"], (80, 4096): ["tile 128x128", "3 buffers"],
        (90, 64): ["tile 64x64", "4 buffers"], (90, 4096): ["tile 128x128", "3 buffers"],
    }  # fmt: skip
