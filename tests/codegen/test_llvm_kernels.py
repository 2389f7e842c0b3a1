"""Kernels written in loop-IR text: compiled for every row, serial and parallel, plain and checked, they equal the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.codegen.loop_interp import run
from tensorwright.codegen.loop_ir import Module
from tensorwright.codegen.loop_parse import parse_module
from tensorwright.codegen.loop_text import print_module
from tensorwright.codegen.loop_verify import verify
from tensorwright.ir.errors import CompileError, VerifyError
from tensorwright.ir.target import row

from .helpers import Array, aligned, emit_kernel, host, host_rows, run_kernel


def agree(text: str, arrays: list[Array], *, kernel: str = "main", exact: bool = True) -> list[Array]:
    """Runs the interpreter and every compiled form; gives the arrays afterwards."""
    module = parse_module(text)
    verify(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)
    want = [aligned(a) for a in arrays]
    run(module, kernel, want)
    for name in host_rows():
        for threads, checked in ((1, False), (1, True), (2, False)):
            got = [aligned(a) for a in arrays]
            assert run_kernel(module, kernel, got, name, threads=threads, checked=checked) == 0
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(
                    g.view(np.uint8), w.view(np.uint8), err_msg=f"{name}, {threads} threads, checked {checked}"
                )
    return want


def f32(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 33])
def test_vector_loop_with_masked_tail(n: int) -> None:
    x, y = f32(n), np.zeros(n, np.float32)
    out = agree(
        f"""
        kernel main(x: f32[{n}], y: f32[{n}]) {{
          for i in 0 .. {n} vector {{
            let a = x[i] * 2.0:f32
            store y[i] = select(a < 0.0:f32, a, max(a, x[0]))
          }}
        }}""",
        [x, y],
    )[1]
    np.testing.assert_array_equal(out, np.where(x * 2 < 0, x * 2, np.maximum(x * 2, x[0])))


def test_registers_through_loops_and_branches() -> None:
    x = f32(7, 8)
    out = agree(
        """
        kernel main(x: f32[7, 8], y: f32[3, 8]) {
          alloc acc: f32[3, 8] register
          for j in 0 .. 3 unrolled {
            store acc[j, 0] = 0.0:f32x8
          }
          for i in 0 .. 7 serial {
            if i % 2 == 0 {
              store acc[0, 0] = acc[0, 0]:8 + x[i, 0]:8
            } else {
              store acc[1, 0] = acc[1, 0]:8 - x[i, 0]:8
            }
            if 3 < i {
              for k in i .. 6 serial {
                store acc[2, 0] = acc[2, 0]:8 + x[k, 0]:8
              }
            }
          }
          store acc[2, 4] = x[6, 3]
          for j in 0 .. 3 unrolled {
            store y[j, 0] = acc[j, 0]:8
          }
        }""",
        [x, np.zeros((3, 8), np.float32)],
    )[1]
    np.testing.assert_allclose(out[0], x[::2].sum(0), rtol=1e-6)
    assert out[2, 4] == x[6, 3]


def test_parallel() -> None:
    x = f32(37, 20)
    module = parse_module(
        """
        kernel scale(a: f32[20], b: f32[20], by: i64) noinline {
          for i in 0 .. 20 vector {
            store b[i] = a[i] * cast(f32, by)
          }
        }
        kernel main(x: f32[37, 20], y: f32[37, 20], scratch: f32[2, 20]) {
          let twice = 2.0:f32 * x[0, 0]
          for r in 1 .. 37 step 3 parallel {
            let last = min(r + 3, 37)
            for i in r .. last serial {
              call scale(x @ i * 20, scratch @ tid * 20; i + 1)
              for j in 0 .. 20 vector {
                store y[i, j] = scratch[tid, j] + twice
              }
            }
          }
        }"""
    )
    verify(module)
    want = np.zeros_like(x)
    want[1:] = x[1:] * np.arange(2, 38, dtype=np.float32)[:, None] + np.float32(2) * x[0, 0]
    y = np.zeros_like(x)
    run(module, "main", [x, y, np.zeros((2, 20), np.float32)])
    np.testing.assert_array_equal(y, want)
    for name in host_rows():
        for threads in (1, 2):
            y = np.zeros_like(x)
            assert (
                run_kernel(module, "main", [x, y, np.zeros((2, 20), np.float32)], name, threads=threads, checked=threads == 1)
                == 0
            )
            np.testing.assert_array_equal(y, want)


def test_gather_scatter_and_strides() -> None:
    x, at = f32(50), np.random.default_rng(1).permutation(50).astype(np.int32)
    out = agree(
        """
        kernel main(x: f32[50], at: i32[50], y: f32[50], t: f32[50, 2], s: f32[10, 5] strides [1, 10]) {
          for i in 0 .. 50 vector {
            store y[i] = x[cast(i64, at[i])]
          }
          for i in 0 .. 50 vector {
            store t[i, 1] = x[49 - i]
          }
          for i in 0 .. 50 vector {
            store t[cast(i64, at[i]), 0] = x[i]
          }
          for i in 0 .. 10 serial {
            for j in 0 .. 5 vector {
              store s[i, j] = x[i * 5 + j] + t[j * 3, 1]
            }
          }
        }""",
        [x, at, np.zeros(50, np.float32), np.zeros((50, 2), np.float32), np.zeros(50, np.float32)],
    )
    np.testing.assert_array_equal(out[2], x[at])
    np.testing.assert_array_equal(out[3][:, 1], x[::-1])
    np.testing.assert_array_equal(out[3][at, 0], x)
    np.testing.assert_array_equal(out[4].reshape(5, 10).T, x.reshape(10, 5) + x[::-1][np.arange(5) * 3])


def test_masked_accesses_touch_no_memory() -> None:
    """The masked-off side runs past the arrays: unchecked code may not fault or write there, checked code may not complain."""
    x = f32(20)
    out = agree(
        """
        kernel main(x: f32[20], y: f32[20], z: bool[20]) {
          for i in 0 .. 20 serial {
            store y[i] = x[i + 1000000000000; false] + x[i - 4; 4 <= i]
            store y[i * 1000000000000] = 7.0:f32 if i == 0
          }
          for i in 0 .. 20 vector {
            store z[i] = x[i + 16; i < 4] < x[i]
          }
        }""",
        [x, np.zeros(20, np.float32), np.zeros(20, np.bool_)],
    )
    shifted = np.concatenate([np.zeros(4, np.float32), x[:16]])
    np.testing.assert_array_equal(out[1][1:], shifted[1:])
    assert out[1][0] == 7
    np.testing.assert_array_equal(out[2], np.where(np.arange(20) < 4, np.concatenate([x[16:], x[:16]]), 0) < x)


def test_narrow_types_in_memory() -> None:
    rng = np.random.default_rng(2)
    import ml_dtypes

    h, b = rng.standard_normal(40).astype(np.float16), rng.standard_normal(40).astype(ml_dtypes.bfloat16)
    q, flags = rng.integers(-128, 128, 40).astype(np.int8), rng.integers(0, 2, 40).astype(np.bool_)
    out = agree(
        """
        kernel main(h: f16[40] align 2, b: bf16[40] align 2, q: i8[40] align 1,
                    flags: bool[40] align 1, o: bf16[40] align 2, p: i8[40] align 1) {
          for i in 0 .. 40 vector {
            let s = cast(bf16, cast(f32, h[i]) + cast(f32, b[i]))
            store o[i] = select(flags[i], s * b[i], s)
            store p[i] = q[i] * q[i] + 3:i8
          }
        }""",
        [h, b, q, flags, np.zeros(40, ml_dtypes.bfloat16), np.zeros(40, np.int8)],
    )
    np.testing.assert_array_equal(out[5], (q * q + 3).astype(np.int8))


def test_local_arrays_and_nontemporal_stores() -> None:
    x = f32(64)
    out = agree(
        """
        kernel main(x: f32[64] align 64, y: f32[64] align 64) {
          alloc t: f32[64] local align 64
          for i in 0 .. 64 step 16 serial {
            store t[i] = x[i]:16 * x[i]:16
          }
          for i in 0 .. 64 step 16 serial {
            store y[i] = t[48 - i]:16 nontemporal
          }
        }""",
        [x, np.zeros(64, np.float32)],
    )[1]
    np.testing.assert_array_equal(out, (x * x).reshape(4, 16)[::-1].ravel())
    assert "vmovntps" in emit_kernel(parse_module("""
        kernel main(y: f32[64] align 64) {
          store y[16] = 1.0:f32x16 nontemporal
        }"""), "main", "x86-64-v4").asm  # fmt: skip


def test_math_agrees_with_the_interpreter() -> None:
    x = np.concatenate([f32(50) * 10, np.array([0, -0.0, np.inf, -np.inf, 1e-40, 1e9, 3e38], np.float32)])
    calls = ["exp", "log", "log1p", "expm1", "sin", "cos", "tanh", "erf", "sigmoid"]
    n = len(x)
    stores = "\n".join(f"store y[{k}, i] = {op}(x[i])" for k, op in enumerate(calls))
    text = f"kernel main(x: f32[{n}], y: f32[9, {n}]) {{\n for i in 0 .. {n} vector {{\n {stores}\n }}\n }}"
    module = parse_module(text)
    want = np.zeros((9, n), np.float32)
    run(module, "main", [x, want])
    for name in host_rows():
        got = np.zeros((9, n), np.float32)
        run_kernel(module, "main", [x, got], name)
        np.testing.assert_array_equal(np.nan_to_num(got, nan=7), np.nan_to_num(want, nan=7), err_msg=name)
        np.testing.assert_array_equal(np.signbit(got)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


# -- errors ------------------------------------------------------------------------------------------------------------


def broken(text: str) -> Module:
    return parse_module(text)


@pytest.mark.parametrize("lanes", [1, 16])
def test_checked_code_names_the_access(lanes: int, capsys: pytest.CaptureFixture[str]) -> None:
    wide = f":{lanes}" if lanes > 1 else ""
    module = broken(f"""
        kernel main(x: f32[4, 16], n: f32[1], y: f32[4, 16]) {{
          let k = cast(i64, n[0])
          store y[0, 0] = x[k, {0 if lanes > 1 else 3}]{wide}
          store y[k, 0] = x[1, 0]{wide}
        }}""")
    x, y = f32(4, 16), np.zeros((4, 16), np.float32)
    for name in host_rows():
        assert run_kernel(module, "main", [x, np.full(1, 3, np.float32), y], name, checked=True) == 0
        y[...] = 5
        code = run_kernel(module, "main", [x, np.full(1, 4, np.float32), y], name, checked=True)
        emitted = emit_kernel(module, "main", name, checked=True)
        assert "load of x" in emitted.checks[code - 1]
        assert (y[0, :lanes] == 0).all()
        assert (y[1:] == 5).all()
    with pytest.raises(VerifyError, match="index 4 of x is out of range in dimension 0 of size 4"):
        run(module, "main", [x, np.full(1, 4, np.float32), y])


def test_what_cannot_be_emitted() -> None:
    cases = {
        "not constant": "alloc r: f32[4] register\n for i in 0 .. 4 serial {\n store r[i] = 0.0:f32\n }",
        "stands inside another": "for i in 0 .. 4 parallel {\n for j in 0 .. 4 parallel {\n store y[i] = 0.0:f32\n }\n }",
        "barrier": "barrier",
        "bounds of unrolled loop": "for i in 0 .. cast(i64, y[0]) unrolled {\n store y[i] = 0.0:f32\n }",
        "block loop": "for i in 0 .. 4 block {\n store y[i] = 0.0:f32\n }",
    }
    for message, body in cases.items():
        with pytest.raises(CompileError, match=message):
            emit_kernel(parse_module(f"kernel main(y: f32[4]) {{\n{body}\n}}"), "main")


def test_aarch64_emits_an_object() -> None:
    emitted = emit_kernel(parse_module("""
        kernel main(x: f32[40], y: f32[40]) {
          for r in 0 .. 40 step 20 parallel {
            for i in r .. r + 20 vector {
              store y[i] = fma(x[i], x[i], exp(x[i]))
            }
          }
        }"""), "main", "aarch64-neon")  # fmt: skip
    assert emitted.object_code[:4] == b"\x7fELF"
    assert emitted.object_code[18] == 183  # EM_AARCH64
    assert "fmla\tv" in emitted.asm


def test_no_symbol_is_left_undefined() -> None:
    """An object must not ask for libm, memset or memcpy: the runtime gives it nothing."""
    text = """
        kernel main(x: f32[4096], y: f32[4096], z: f64[4096] align 8, h: f16[4096] align 2, q: u64[4096] align 8) {
          for i in 0 .. 4096 vector {
            store y[i] = 0.0:f32
          }
          for i in 0 .. 4096 vector {
            store y[i] = x[i]
          }
          for i in 0 .. 4096 vector {
            store h[i] = cast(f16, z[i]) * sin(h[i])
            store z[i] = sqrt(floor(z[i])) / 3.0:f64
            store y[i] = fma(x[i], y[i], round(x[i])) + exp(x[i]) + cast(f32, q[i] // 7:u64)
            store q[i] = cast(u64, x[i]) % q[i]
          }
        }"""
    for name in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64-neon"):
        asm = emit_kernel(parse_module(text), "main", name).asm
        calls = [line for line in asm.splitlines() if line.strip().startswith(("call", "jmp\tmem", "bl\t"))]
        outside = [c for c in calls if "tw." not in c and "main" not in c and "*" not in c]
        assert not outside, (name, outside)


def test_timestamps() -> None:
    from tensorwright.codegen.llvm import emit
    from tensorwright.codegen.plan import EntryPlan, Step

    from .helpers import Loaded

    module = parse_module("kernel k(y: f32[4]) {\n store y[0] = y[0] + 1.0:f32\n}")
    emitted = emit(module, EntryPlan("twice", (Step("k", ((0, 0),)), Step("k", ((0, 4),)))), host())
    y, ticks = np.zeros(8, np.float32), np.zeros(4, np.int64)
    assert Loaded(emitted, "twice")([y.ctypes.data], ticks=ticks) == 0
    assert y[0] == 1
    assert y[1] == 1
    assert 0 < ticks[0] <= ticks[1] <= ticks[2]
    assert ticks[3] == 0
    assert row(host().name) is host()
