"""Stores past the cache: where they are used, what they ask of an output's address, and the maximum's instruction."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.loop_interp import run as interpret
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.nests import has_masks
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import f32
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.target import Target, with_caches
from tensorwright.ir.target import row as named_row
from tensorwright.ir.types import tensor

from .helpers import aligned, emit_kernel, host, host_rows, run_kernel
from .programs import compiled

X86 = [r for r in host_rows() if r.startswith("x86")]
needs_x86 = pytest.mark.skipif(not X86, reason="looks for x86 instructions")


def small_caches(target: Target) -> Target:
    """Caches so small that an array of a few kilobytes far exceeds them."""
    return with_caches(target, l1=1024, l2=2048, l3=4096)


def double(n: int, *, donated: bool = False) -> Graph:
    x = input_node("x", tensor("f32", (n,)))
    return Graph((x,), (make("add", x, x),), aliases=((0, 0),) if donated else ())


@needs_x86
def test_only_what_exceeds_the_cache_is_streamed() -> None:
    target = small_caches(host())
    large = compiled(double(5003), target)
    asm = large.program.texts["asm"]
    assert "vmovntps" in asm and "sfence" in asm and large.program.output_align == ((0, 16),)
    x = np.random.default_rng(0).standard_normal(5003).astype(np.float32)
    np.testing.assert_array_equal(large([x])[0], x + x)
    for graph in (double(500), double(5003, donated=True)):  # fits the cache; lies in an array that may be anyone's
        other = compiled(graph, target)
        assert "movnt" not in other.program.texts["asm"] and other.program.output_align == ()


@pytest.mark.parametrize("columns", [131, 1000])
def test_rows_ask_for_the_next_row(columns: int) -> None:
    """The second pass over a row asks for what the first one over the next row reads, where the operand exceeds L2."""
    x = np.random.default_rng(4).standard_normal((37, columns)).astype(np.float32)
    far = tw.compile(lambda x: tw.softmax(x, -1), tw.spec(*x.shape), target=small_caches(host()), cache=False)
    near = tw.compile(lambda x: tw.softmax(x, -1), tw.spec(*x.shape), cache=False)
    assert "prefetch" in far.text("loops") and "prefetch" not in near.text("loops")
    np.testing.assert_array_equal(far(x), near(x))


@needs_x86
@pytest.mark.parametrize("shape", [(5003,), (37, 131)])
def test_an_output_at_any_address_is_written_rightly(shape: tuple[int, ...]) -> None:
    """A streaming store to an address that is no multiple of 16 would end the process."""
    exe = tw.compile(lambda x: tw.softmax(tw.gelu(x), -1) if len(shape) > 1 else tw.gelu(x), tw.spec(*shape),
                     target=small_caches(host()), cache=False)  # fmt: skip
    assert exe.compiled.run.output_align == ((0, 16),)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    want = exe(x).copy()
    size = x.size
    for first in range(6):
        memory = np.full(size + 8, 7, np.float32)
        out = memory[first : first + size].reshape(shape)
        assert exe(x, out=out) is out
        np.testing.assert_array_equal(out, want)
        assert (memory[:first] == 7).all() and (memory[first + size :] == 7).all()


@pytest.mark.parametrize("columns", [48, 50])
def test_kept_values_in_memory_that_the_operand_gives_up(columns: int) -> None:
    """The exponentials of a softmax lie in its output's row, here the row of the operand."""
    exe = tw.compile(lambda x, w: tw.softmax(x @ w, -1) @ w, tw.spec(9, columns), tw.spec(columns, columns), cache=False)
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((9, columns)).astype(np.float32), rng.standard_normal((columns, columns)).astype(np.float32)
    logits = x.astype(np.float64) @ w
    e = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(exe(x, w), e / e.sum(-1, keepdims=True) @ w, rtol=0, atol=3e-5)  # logits of size 20 in f32
    if has_masks(host(), [f32]):
        assert "_in_place" in exe.text("loops") and "local" not in exe.text("loops")


SPECIAL = np.array([np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1e-42, -1e-42], np.float32)


def test_the_maximum_has_the_same_bits_at_every_width_and_row() -> None:
    a, b = (m.ravel() for m in np.meshgrid(SPECIAL, SPECIAL))
    n = -(-a.size // 16) * 16
    a, b = np.resize(a, n), np.resize(b, n)
    found = []
    for name in host_rows():
        for lanes in (1, 4, 8, 16):
            out = [np.zeros(n, np.float32), np.zeros(n, np.float32)]
            loads = f"a[i]:{lanes}, b[i]:{lanes}" if lanes > 1 else "a[i], b[i]"
            module = parse_module(f"""
                kernel main(a: f32[{n}], b: f32[{n}], y: f32[{n}], z: f32[{n}]) {{
                  for i in 0 .. {n} step {lanes} serial {{
                    store y[i] = max({loads})
                    store z[i] = min({loads})
                  }}
                }}""")
            run_kernel(module, "main", [a, b, *out], name)
            np.testing.assert_array_equal(out[0], np.maximum(a, b))
            np.testing.assert_array_equal(out[1], np.minimum(a, b))
            found.append([np.where(np.isnan(v), 0, v.view(np.int32)) for v in out])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@needs_x86
@pytest.mark.parametrize("name", X86)
def test_a_maximum_is_one_compare_beside_its_instruction(name: str) -> None:
    lanes = {"x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16}[name]
    asm = emit_kernel(parse_module(f"""
        kernel main(a: f32[64], y: f32[64]) {{
          store y[0] = max(y[0]:{lanes}, a[0]:{lanes})
        }}"""), "main", name).asm  # fmt: skip
    assert "maxps" in asm and len(re.findall("cmp\\w*ps", asm)) == 1


@pytest.mark.unvalidated("two arrays of a third of a million elements, for a kernel that is the same with validation")
@pytest.mark.parametrize("row", X86 or ["x86-64-v2"])
@needs_x86
def test_streaming_vectors_begin_where_lines_do(row: str) -> None:
    """Wherever the output begins, down to one element: whole lines are streamed, and nothing beside the output is touched."""
    exe = tw.compile(tw.gelu, tw.spec(333_337), target=small_caches(named_row(row)), cache=False)
    if row != "x86-64-v2":
        assert "to_line" in exe.text("loops") and "vmovntps\t%xmm" not in exe.text("asm")
    x = np.random.default_rng(1).standard_normal(333_337).astype(np.float32)
    want = exe(x).copy()
    for first in range(20):
        memory = np.full(x.size + 40, 7, np.float32)
        out = memory[first : first + x.size]
        assert exe(x, out=out) is out
        np.testing.assert_array_equal(out, want)
        assert (memory[:first] == 7).all() and (memory[first + x.size :] == 7).all()


def test_to_line_in_the_interpreter_and_in_machine_code() -> None:
    """Stores from the first line on: the number of elements before it is 0 where the array is aligned."""
    module = parse_module("""
kernel k(x: f32[64] readonly, y: f32[64] align 4) {
  let lead = to_line(y)
  for i in 0 .. 48 step 16 serial {
    store y[i + lead] = x[i + lead]:16 nontemporal
  }
}
""")
    assert parse_module(print_module(module)).kernels[0].body[0].value is module.kernels[0].body[0].value
    x = np.arange(64, dtype=np.float32)
    for first in range(16):
        memory = aligned(np.full(96, -1, np.float32))
        y = memory[first : first + 64]
        assert run_kernel(module, "k", [x, y], checked=first % 2 == 1) == 0
        lead = -first % 16
        np.testing.assert_array_equal(y[lead : lead + 48], x[lead : lead + 48])
        assert (y[:lead] == -1).all() and (y[lead + 48 :] == -1).all()
    y = np.full(64, -1, np.float32)
    interpret(module, "k", [x, y])
    written = np.flatnonzero(y != -1)
    assert len(written) == 48 and (np.diff(written) == 1).all()
