"""The normal form, the choice of tiles, and that any plan the model could choose computes the same sums."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tensorwright.codegen.contraction import Operand, preferred_panel, schedule
from tensorwright.codegen.contraction.canonical import canonical
from tensorwright.codegen.contraction.generator import schedule_nest
from tensorwright.codegen.contraction.plan import Plan, pieces
from tensorwright.codegen.contraction.tile import choose, plans
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_ir import Module
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.contraction import Contraction
from tensorwright.ir.dtypes import f32
from tensorwright.ir.target import row

from ..codegen.helpers import emit_kernel, host_rows
from .cases import Case, conv, error, matmul, shape_of, weight_grad

ROWS = host_rows()
V4 = row("x86-64-v4")


def operands(spec: Contraction) -> tuple[Operand, Operand, Operand]:
    found = []
    for maps in (spec.a, spec.b, spec.c):
        x = np.empty(shape_of(spec, maps), np.float32)
        found.append(Operand(f32, tuple(s // 4 for s in x.strides), 64))
    return found[0], found[1], found[2]


def planned(spec: Contraction, panel: int = 0) -> Plan:
    a, b, c = operands(spec)
    return choose(canonical(spec.packed(panel, ()) if panel else spec, a, b, c, None), V4, f32, f32)


def test_loops_that_nest_become_one() -> None:
    nest = canonical(conv(4, 64, 14, 32, 1), *operands(conv(4, 64, 14, 32, 1)), None)
    assert sorted(x.extent for x in nest.free) == [32, 4 * 14 * 14]
    assert [x.extent for x in nest.reduce] == [64]
    padded = canonical(conv(1, 64, 14, 32, 3), *operands(conv(1, 64, 14, 32, 3)), None)
    assert sorted(x.extent for x in padded.free) == [14, 14, 32]  # rows of an image have a border between them
    packed = conv(1, 64, 14, 32, 3).packed(32, ())
    nest = canonical(packed, *operands(conv(1, 64, 14, 32, 3)), None)
    assert sorted(x.extent for x in nest.reduce) == [3, 3 * 64]  # columns and channels of a window are one run


@pytest.mark.parametrize(("extent", "size"), [(7, 3), (14, 14), (56, 14), (1024, 14), (31, 8), (5, 9)])
def test_pieces_cover_an_extent_evenly(extent: int, size: int) -> None:
    count, length, longer = pieces(extent, size)
    assert count * length + longer == extent
    assert length + (longer > 0) <= size
    assert longer < count


def test_tiles_fill_the_registers_of_the_layers_that_matter() -> None:
    """What was measured best on these layers: 16 accumulators or more of rows as they lie, wide panels for long reductions."""
    wide = planned(conv(1, 64, 56, 64, 3), 32)
    assert wide.tile_rows * wide.columns // 16 >= 16
    assert not wide.pack_row
    small = planned(conv(1, 2048, 7, 512, 1), 32)
    assert small.cycles < 1.08 * small.ideal
    product = planned(matmul(1024, 1024, 1024))
    assert product.pack_col and product.columns == 64
    assert product.cycles < 1.08 * product.ideal


def test_rows_a_page_apart_are_not_read_as_they_lie() -> None:
    """1,024 channels: a pitch of 4 KB, where a tile of more rows than L1 has ways would evict itself."""
    plan = planned(conv(1, 1024, 14, 256, 1), 32)
    assert plan.pack_row or plan.tile_rows <= V4.l1_ways


def test_preferred_panels() -> None:
    assert preferred_panel(conv(1, 64, 56, 64, 3), V4) in (16, 32)
    assert preferred_panel(matmul(1, 1000, 2048), V4) >= 64  # a vector at a time keeps few accumulators busy
    assert preferred_panel(conv(1, 64, 28, 64, 3, groups=64), V4) == 0  # depthwise: lanes along the channels
    assert preferred_panel(matmul(300, 2, 400), V4) == 0  # lanes along the reduction instead
    for target in ROWS:
        t = row(target)
        assert preferred_panel(conv(1, 16, 8, 48, 3), t) % t.lanes(32) == 0


def test_half_a_vector_of_columns_is_not_rounded_up() -> None:
    """10 -> 20 channels: three vectors of 8 lanes are two thirds of the work of two of 16, where units are 256 bits wide."""
    assert preferred_panel(conv(1, 10, 8, 20, 5), V4) == 24 and preferred_panel(conv(1, 10, 8, 28, 5), V4) == 32
    assert preferred_panel(conv(1, 64, 14, 24, 3), V4) == 24 and preferred_panel(conv(1, 240, 14, 40, 1), V4) in (40, 48)
    assert preferred_panel(conv(1, 16, 28, 200, 1), V4) % 16 == 0, "of many columns it is a small part"


CASES = {
    "product": matmul(19, 37, 21),
    "transposed": matmul(18, 35, 19, ta=True, tb=True),
    "convolution": conv(1, 6, 7, 18, 3),
    "channels first": conv(1, 5, 7, 18, 2, layout="NCHW"),
    "weight gradient": weight_grad(2, 3, 6, 5, 2),
    "depthwise": conv(1, 20, 5, 20, 3, groups=20),
}


@pytest.mark.parametrize("name", CASES)
def test_every_plan_gives_the_same_sums(name: str) -> None:
    """Not the cheapest plan alone: each kind of plan there is for a shape, as it is and with its reduction cut and split."""
    spec = CASES[name]
    a, b, c = operands(spec)
    nest = canonical(spec, a, b, c, None)
    kinds: dict[tuple[object, ...], Plan] = {}
    for p in plans(nest, V4 if "x86-64-v4" in ROWS else row(ROWS[0]), f32, f32):
        kinds.setdefault((p.row, p.along_k, p.pack_row, p.pack_col, len(p.rows), bool(p.row_source)), p)
    chosen = list(kinds.values())
    for k, p in enumerate(list(chosen)):
        if not p.along_k and p.reduce[0].extent > 1:
            block = max(1, p.reduce[0].extent // 2)
            chosen.append(replace(p, cut=0, block=block, split=bool(k % 2)))
    assert len(chosen) >= 4
    case = Case(spec, row(ROWS[0]))
    expected = case.expected()
    modules = []
    for k, p in enumerate(chosen):
        case.scheduled = schedule_nest(nest, (a, b, c), (), row(ROWS[0]), "root", p)
        case.module = Module(case.scheduled.kernels)
        verify(case.module)
        modules.append(case.module)
        assert error(case.run(checked=k % 2 == 0), expected) < 1e-5, p.describe()


def test_tiles_of_rows_by_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of several lines, and of several images, in one tile: no more rows left over than there must be. Not where a tile
    has more rows than registers hold addresses."""
    v3 = row("x86-64-v3")
    spec = conv(1, 512, 7, 512, 3)
    plan = choose(canonical(spec.packed(16, ()), *operands(spec), None), v3, f32, f32)
    assert plan.scattered and plan.row_tiles == 9 and not plan.pack_row
    assert all(p.tile_rows <= 8 for p in plans(canonical(spec, *operands(spec), None), V4, f32, f32) if p.scattered)
    monkeypatch.setattr("tensorwright.codegen.contraction.plan.PARALLEL_FROM", 0)
    for spec in (conv(3, 8, 5, 16, 3), conv(2, 5, 5, 16, 2, stride=2)):
        case = Case(spec, v3)
        nest = canonical(spec, *operands(spec), None)
        plan = max((p for p in plans(nest, v3, f32, f32) if p.scattered), key=lambda p: p.tile_rows)
        case.scheduled = schedule_nest(nest, operands(spec), (), v3, "root", plan)
        case.module = Module(case.scheduled.kernels)
        assert case.scheduled.parallel and "by their offsets" in case.scheduled.note
        arrays = case.arrays()
        interpret(case.module, "root", arrays, threads=3)
        assert error(arrays[2], case.expected()) < 1e-6
        if "x86-64-v3" in ROWS:
            assert case.run(checked=True).tobytes() == case.run(threads=2).tobytes() == arrays[2].tobytes()


def test_kernels_of_one_name_are_equal() -> None:
    """The microkernel of two layers that differ in nothing it sees is the same one; another stride is another name."""
    t = row(ROWS[0])
    names = []
    for spec in (conv(1, 16, 24, 32, 1), conv(2, 16, 24, 32, 1), conv(1, 24, 24, 32, 1)):
        scheduled = schedule(spec.packed(32, ()), *_packed_operands(spec, 32), None, t, threads=1, name="root")
        names.append({k.name for k in scheduled.kernels[:-1]})
        assert scheduled.kernels[-1].name == scheduled.root == "root"
        assert all(k.noinline and re.fullmatch(r"ukr_f32_\d+x\d+_[vk]\d+_[0-9a-f]{12}", k.name) for k in scheduled.kernels[:-1])
    assert names[0] & names[1]
    assert not names[0] & names[2]


def _packed_operands(spec: Contraction, panel: int) -> tuple[Operand, Operand, Operand]:
    a, _, c = operands(spec)
    strides = [1]
    for n in reversed([int(x) for x in spec.packed_shape(panel)][1:]):  # type: ignore[arg-type]
        strides.insert(0, strides[0] * n)
    return a, Operand(f32, tuple(strides), 64), c


@pytest.mark.parametrize(("target", "register"), [("x86-64-v4", "zmm"), ("x86-64-v3", "ymm")])
def test_the_inner_loop_is_multiply_adds_without_spills(target: str, register: str) -> None:
    spec = conv(1, 64, 28, 64, 3)
    t = row(target)
    panel = preferred_panel(spec, t)
    scheduled = schedule(spec.packed(panel, ()), *_packed_operands(spec, panel), None, t, threads=1, name="root")
    text = emit_kernel(Module(scheduled.kernels), "root", t).asm
    body = text[text.index("\nukr_") : text.index(".size\tukr_")]
    loops = re.findall(r"(\.LBB\d+_\d+):\n((?:(?!\.LBB).)*?)\tj[a-z]+\t\1\n", body, re.S)
    inner = max((code for _, code in loops), key=lambda code: code.count("vfmadd"))
    assert inner.count("vfmadd") >= 12
    assert f"%{register}" in inner
    assert "%rsp" not in inner
    assert inner.count("\n") < 2.2 * inner.count("vfmadd")


def test_copies_stay_of_reasonable_size() -> None:
    """A batch of images is not unfolded into its windows, nine times its size, in memory."""
    spec = conv(64, 64, 56, 64, 3, stride=2, layout="NCHW")
    nest = canonical(spec, *operands(spec), None)
    plan = choose(nest, V4, f32, f32)
    assert sum(plan.copied(nest.steps)) <= 2 * sum(nest.spans)


def test_code_for_aarch64_is_generated() -> None:
    spec = conv(1, 16, 8, 24, 3)
    t = row("aarch64-neon")
    panel = preferred_panel(spec, t)
    assert panel % 4 == 0 and panel > 0
    scheduled = schedule(spec.packed(panel, ()), *_packed_operands(spec, panel), None, t, threads=1, name="root")
    emitted = emit_kernel(Module(scheduled.kernels), "root", t)
    assert len(emitted.object_code) > 1000
    assert emitted.asm.count("fmla") >= 8


def test_equal_layers_are_planned_once() -> None:
    spec = conv(1, 64, 28, 64, 3)
    a, b, c = operands(spec)
    nest = canonical(spec, a, b, c, None)
    moved = replace(nest, base=tuple(x + 64 for x in nest.base))
    assert choose(nest, V4, f32, f32) is choose(moved, V4, f32, f32)
    assert choose(nest, V4, f32, f32) is not choose(nest, row("x86-64-v3"), f32, f32)


def test_what_is_decided_later_changes_what_depends_on_it() -> None:
    p = planned(conv(1, 64, 28, 64, 3), 32)
    assert p.cut < 0
    cut = p.decided(cut=0, block=1)
    assert cut == replace(p, cut=0, block=1)
    assert (cut.inside, cut.tile_rows, cut.row_tiles) == (p.inside // p.reduce[0].extent, p.tile_rows, p.row_tiles)


def test_plans_as_wide_as_the_panel() -> None:
    spec = matmul(64, 256, 64)
    a, b, c = operands(spec)
    nest = canonical(spec.packed(64, ()), a, b, c, None)
    every = list(plans(nest, V4, f32, f32))
    assert list(plans(nest, V4, f32, f32, whole=True)) == [p for p in every if p.columns == 64] != every
