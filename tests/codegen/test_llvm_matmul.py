"""Register-tile microkernels in loop IR: right, and the code one would write by hand: no spills, no moves, one FMA a product."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tensorwright.codegen.loop_ir import Module
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.ir.target import row

from .helpers import Array, aligned, emit_kernel, host_rows, run_kernel

TILES = {"x86-64-v4": (14, 2), "x86-64-v3": (6, 2), "x86-64-v2": (6, 2), "aarch64-neon": (8, 3)}


def microkernel(name: str, k: int) -> Module:
    """C = A B for one tile: A (rows, k), B (k, columns) as a panel."""
    rows, vectors = TILES[name]
    lanes = row(name).lanes(32)
    n = vectors * lanes
    return parse_module(f"""
        kernel tile(A: f32[{rows}, {k}], B: f32[{k}, {n}] align 64, C: f32[{rows}, {n}] align 16) noinline noalias {{
          alloc acc: f32[{rows}, {vectors}, {lanes}] register
          for i in 0 .. {rows} unrolled {{
            for j in 0 .. {vectors} unrolled {{
              store acc[i, j, 0] = 0.0:f32x{lanes}
            }}
          }}
          for p in 0 .. {k} serial {{
            alloc b: f32[{vectors}, {lanes}] register
            for j in 0 .. {vectors} unrolled {{
              store b[j, 0] = B[p, j * {lanes}]:{lanes}
            }}
            for i in 0 .. {rows} unrolled {{
              for j in 0 .. {vectors} unrolled {{
                store acc[i, j, 0] = fma(broadcast(A[i, p], {lanes}), b[j, 0]:{lanes}, acc[i, j, 0]:{lanes})
              }}
            }}
          }}
          for i in 0 .. {rows} unrolled {{
            for j in 0 .. {vectors} unrolled {{
              store C[i, j * {lanes}] = acc[i, j, 0]:{lanes}
            }}
          }}
        }}""")


def operands(name: str, k: int) -> list[Array]:
    rng = np.random.default_rng(0)
    rows, vectors = TILES[name]
    n = vectors * row(name).lanes(32)
    shapes = ((rows, k), (k, n))
    return [aligned(rng.standard_normal(s).astype(np.float32)) for s in shapes] + [aligned(np.zeros((rows, n), np.float32))]


@pytest.mark.parametrize("name", host_rows())
def test_value(name: str) -> None:
    a, b, c = operands(name, 100)
    assert run_kernel(microkernel(name, 100), "tile", [a, b, c], name) == 0
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)


def inner_loop(asm: str) -> list[str]:
    """The instructions of the smallest loop of `tile`."""
    function = asm[asm.index("\ntile:") :]
    lines = [x.strip() for x in function.splitlines()]
    loops = []
    for at, line in enumerate(lines):
        if m := re.match(r"(j\w+|b\.\w+|cbn?z)\s.*?(\.LBB\w+)$", line):
            start = next((k for k in range(at) if lines[k].startswith(m.group(2) + ":")), None)
            if start is not None:
                loops.append([x for x in lines[start + 1 : at + 1] if x and not x.startswith((".", "#", "//"))])
        if line.startswith(".size"):
            break
    return min(loops, key=len)


@pytest.mark.parametrize(("name", "fused"), [("x86-64-v4", "vfmadd"), ("x86-64-v3", "vfmadd"), ("aarch64-neon", "fmla")])
def test_inner_loop_holds_nothing_but_the_products(name: str, fused: str) -> None:
    rows, vectors = TILES[name]
    body = inner_loop(emit_kernel(microkernel(name, 256), "tile", name).asm)
    products = [x for x in body if x.startswith(fused)]
    assert len(products) == rows * vectors
    assert not [x for x in body if "rsp" in x or "[sp" in x], "a register is spilled in the inner loop"
    if name.startswith("x86"):
        assert all(("zmm" if name == "x86-64-v4" else "ymm") in x for x in products)
        assert len(body) <= rows * vectors + rows + vectors + 4, body


def test_mul_and_add_are_never_fused() -> None:
    text = """
        kernel main(x: f32[16], y: f32[16]) {
          store y[0] = x[0]:16 * x[0]:16 + y[0]:16
        }"""
    for name in ("x86-64-v3", "x86-64-v4", "aarch64-neon"):
        asm = emit_kernel(parse_module(text), "main", name).asm
        assert "fmadd" not in asm
        assert "fmla" not in asm


def test_max_with_a_constant_is_one_instruction() -> None:
    text = """
        kernel main(x: f32[16], y: f32[16]) {
          store y[0] = max(0.0:f32x16, x[0]:16)
        }"""
    asm = emit_kernel(parse_module(text), "main", "x86-64-v4").asm
    body = asm[asm.index("\nmain:") :]
    assert "vmaxps" in body
    assert "vcmp" not in body[: body.index("ret")]
