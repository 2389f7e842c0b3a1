"""What is read from beyond L2 is read once: panels prefetched, and a long reduction cut for all tiles together."""

from __future__ import annotations

import pytest
from tensorwright.codegen.contraction import Scheduled
from tensorwright.codegen.llvm import emit
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_ir import Buffer, For, Kernel, Module, Prefetch, Store, statements
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.codegen.plan import EntryPlan, Step
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import VerifyError
from tensorwright.ir.expr import const, load, var
from tensorwright.ir.target import ROWS, Target, row, with_caches

from ..codegen.helpers import host_rows
from .cases import Case, conv, error, matmul, weight_grad


def small(name: str) -> Target:
    """A row with caches so small that small shapes stream."""
    return with_caches(row(name), l1=4096, l2=16 * 1024, l3=1 << 20)


def prefetches(scheduled: Scheduled) -> int:
    return sum(isinstance(s, Prefetch) for k in scheduled.kernels for s in statements(k.body))


@pytest.mark.parametrize("target", host_rows())
def test_panels_beyond_l2_are_prefetched(target: str) -> None:
    """With one row tile and several, a reduction cut and whole, remainders everywhere; the sums stay what they are."""
    t = small(target)
    for k, (m, n, kk) in enumerate([(6, 130, 64), (13, 100, 70), (29, 200, 65), (30, 66, 513), (40, 80, 1030)]):
        case = Case(matmul(m, n, kk), t, panel=t.lanes(32), seed=k)
        verify(case.module)
        assert prefetches(case.scheduled) > 0, case.scheduled.note
        first = case.run(checked=True)
        assert error(first, case.expected()) <= 1e-5
        assert all(case.run(threads).tobytes() == first.tobytes() for threads in (1, 2))
    layer = Case(conv(1, 64, 4, 40, 3), t, panel=t.lanes(32))
    assert prefetches(layer.scheduled) > 0, layer.scheduled.note
    assert error(layer.run(checked=True), layer.expected()) <= 1e-5


@pytest.mark.parametrize("target", host_rows())
def test_a_few_rows_ask_for_a_line_of_each_page(target: str) -> None:
    """Whatever the panel, one in 4096 bytes that are read; and the sums stay what they are."""
    t = small(target)
    for k, (m, vectors) in enumerate([(1, 4), (1, 1), (3, 2), (4, 2)]):
        panel = vectors * t.lanes(32)
        case = Case(matmul(m, 8 * panel, 512), t, panel=panel, seed=k)
        verify(case.module)
        (tile,) = (x for x in case.scheduled.kernels if any(isinstance(s, Prefetch) and s.level == 1 for s in statements(x.body)))
        (loop,) = (s for s in tile.body if isinstance(s, For))
        asked = [s for s in loop.body if isinstance(s, Prefetch)]
        assert len(asked) == 1 and 4 * panel * loop.step <= 4096
        assert error(case.run(), case.expected()) <= 1e-5


def test_what_stays_in_cache_is_not_prefetched() -> None:
    assert prefetches(Case(matmul(64, 64, 64), row("x86-64-v4"), panel=32).scheduled) == 0


def test_the_loop_interpreter_follows_a_prefetching_kernel() -> None:
    case = Case(matmul(7, 64, 80), small("x86-64-v4"), panel=16)
    assert prefetches(case.scheduled) > 0
    arrays = case.arrays()
    interpret(case.module, "root", arrays, threads=2)
    assert error(arrays[2], case.expected()) < 1e-6


def _module(level: int, scope: str = "global") -> Module:
    x, y = Buffer("x", f32, (64,), scope=scope, align=64, writable=False), Buffer("y", f32, (64,), align=64)
    i = var("i")
    store = Store(y, (i,), load(x, (i,), f32))
    return Module((Kernel("k", (x, y), (For(i, const(0), const(64), (Prefetch(x, (i * 16 + 1000,), level), store)),)),))


def test_prefetch_in_the_loop_ir() -> None:
    module = _module(2)
    verify(module)  # its index may lie anywhere
    assert "prefetch x[i * 16 + 1000] 2" in print_module(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)
    for level, name in ((1, "prefetcht0"), (2, "prefetcht1")):
        entry = EntryPlan("main", (Step("k", ((0, 0), (1, 0))),))
        assert name in emit(_module(level), entry, ROWS["x86-64-v4"]).asm
    with pytest.raises(VerifyError, match="prefetch of global x to level 3"):
        verify(_module(3))


@pytest.mark.parametrize("target", host_rows())
def test_a_long_reduction_is_cut_for_all_tiles_together(target: str) -> None:
    """The weight gradient of a layer on a batch: a small C, operands far larger than L2."""
    case = Case(weight_grad(4, 32, 48, 48, 3), with_caches(row(target), l1=32 << 10, l2=128 << 10, l3=1 << 20))
    assert "together" in case.scheduled.note
    (root,) = (k for k in case.scheduled.kernels if k.name == "root")
    outer = [s for s in root.body if isinstance(s, For) and s.kind == "serial"]
    assert any(isinstance(s, For) and s.kind == "parallel" for f in outer for s in statements(f.body))
    first = case.run()
    assert error(first, case.expected()) <= 1e-5
    assert case.run(2).tobytes() == first.tobytes()
