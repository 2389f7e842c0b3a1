"""Our vector math: accuracy over every exponent, special values, and the same bits whatever the lanes and the row."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from tensorwright.codegen.loop_ir import Buffer, For, Kernel, Module, Store
from tensorwright.codegen.vecmath import BOUNDS
from tensorwright.codegen.vectorize import vectorize_loop
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.expr import MATH, binary, const, load, unary, var

from .helpers import Array, emit_kernel, host_rows, run_kernel

special = pytest.importorskip("scipy.special", reason="the f64 oracle of erf and sigmoid is scipy's")

# longdouble (64 bits of mantissa) where numpy has the function
ORACLES = {
    "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "erf": lambda x: special.erf(x.astype(np.float64)), "sigmoid": lambda x: special.expit(x.astype(np.float64)),
}  # fmt: skip


def module(op: str, n: int, lanes: int, dtype: str = "f32") -> Module:
    d = as_dtype(dtype)
    ins = [Buffer(f"x{k}", d, (n,), align=d.itemsize) for k in range(2 if op == "pow" else 1)]
    out, i = Buffer("y", d, (n,), align=d.itemsize), var("i")
    args = [load(b, (i,), d) for b in ins]
    e = binary("pow", *args) if op == "pow" else unary(op, args[0])
    loop = For(i, const(0), const(n), (Store(out, (i,), e),), "vector")
    return Module((Kernel("k", (*ins, out), vectorize_loop(loop, lanes)),))


def compiled(op: str, xs: list[Array], row: str, lanes: int, dtype: str = "f32") -> Array:
    y = np.zeros_like(xs[0])
    assert run_kernel(module(op, len(y), lanes, dtype), "k", [*xs, y], row) == 0
    return y


def errors(got: Array, exact: Array) -> Array:
    """Distance in units of the last place; infinite where one is NaN, infinite or of the other sign and the other is not."""
    with np.errstate(all="ignore"):
        want = exact.astype(np.float32)
        unit = np.maximum(np.spacing(np.minimum(np.abs(want), np.finfo(np.float32).max)).astype(np.float64), 2.0**-149)
        distance = np.abs(got.astype(np.float64) - exact.astype(np.float64)) / unit
    alike = (np.isnan(got) & np.isnan(want)) | ((got == want) & (np.signbit(got) == np.signbit(want)))
    finite = np.isfinite(got) & np.isfinite(want)
    zero_sign = (want == 0) & (got == 0) & ~alike
    return np.where(zero_sign, np.inf, np.where(finite, distance, np.where(alike, 0, np.inf)))


def sweep(seed: int = 0) -> Array:
    """16 mantissas of every sign and exponent, and what functions find hard."""
    rng = np.random.default_rng(seed)
    bits = (np.arange(512, dtype=np.uint32) << 23)[:, None] | rng.integers(0, 1 << 23, (512, 16), dtype=np.uint32)
    bits[:, 0] &= np.uint32(0xFF800000)
    bits[:, 1] |= np.uint32(0x007FFFFF)
    return np.concatenate([
        bits.view(np.float32).ravel(),
        rng.uniform(-110, 110, 4000).astype(np.float32),
        rng.standard_normal(8000).astype(np.float32),
        (1 + rng.standard_normal(2000) * 1e-3).astype(np.float32),
        (np.arange(1, 4000) * math.pi / 2).astype(np.float32),
        np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.72, 88.73, -87.4, -103.9, -104.1, 0.925], np.float32),
        np.array([4.1, 32768.0, 1e30], np.float32),
    ])  # fmt: skip


@pytest.mark.parametrize("op", sorted(MATH))
def test_within_its_bound_over_every_exponent(op: str) -> None:
    assert op in ORACLES
    assert BOUNDS[op] <= 4
    x = sweep()
    with np.errstate(all="ignore"):
        exact = ORACLES[op](x.astype(np.longdouble))
    for row in host_rows():
        worst = errors(compiled(op, [x], row, 16), exact)
        k = int(worst.argmax())
        assert worst[k] <= BOUNDS[op], f"{op}({x[k]!r}) on {row}: {worst[k]:.2f} ulp, exact {exact[k]}"


def test_pow() -> None:
    rng = np.random.default_rng(3)
    odd = [
        0.0,
        -0.0,
        1,
        -1,
        2,
        -2,
        0.5,
        -0.5,
        3,
        -3,
        2.5,
        np.inf,
        -np.inf,
        np.nan,
        1e-45,
        -1e-45,
        3e38,
        16777216,
        16777215,
        -16777215,
    ]
    grid = np.meshgrid(np.array(odd, np.float32), np.array(odd, np.float32))
    n = 4000
    near_one = 1 + rng.standard_normal(n) * 1e-4
    xs = [grid[0].ravel(), sweep(1)[:8192], np.exp(rng.uniform(-88, 88, n)), near_one, rng.standard_normal(n)]
    ys = [grid[1].ravel(), rng.standard_normal(8192), rng.uniform(-3, 3, n), rng.uniform(-1e6, 1e6, n), rng.integers(-30, 30, n)]
    x, y = (np.concatenate([part.astype(np.float32) for part in parts]) for parts in (xs, ys))
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
    for row in host_rows():
        worst = errors(compiled("pow", [x, y], row, 16), exact)
        k = int(worst.argmax())
        assert worst[k] <= BOUNDS["pow"], f"pow({x[k]!r}, {y[k]!r}) on {row}: {worst[k]:.2f} ulp, exact {exact[k]}"


@pytest.mark.parametrize("op", [*sorted(MATH), "pow"])
def test_same_bits_for_every_lane_count_and_row(op: str) -> None:
    """Rows with FMA and the one that emulates it, scalars and vectors of any width."""
    x = np.random.default_rng(5).permutation(sweep(2))[:4001]
    xs = [x, np.roll(x, 7)] if op == "pow" else [x]
    first: Array | None = None
    for row in host_rows():
        for lanes in (1, 4, 8, 16, 32):
            bits = np.where(np.isnan(y := compiled(op, xs, row, lanes)), 1, y.view(np.uint32))
            first = bits if first is None else first
            np.testing.assert_array_equal(bits, first, err_msg=f"{op}, {lanes} lanes, {row}")


def test_narrow_floats_are_rounded_once_from_f32() -> None:
    x = sweep()[:4000]
    for name in ("f16", "bf16"):
        d = as_dtype(name)
        with np.errstate(all="ignore"):
            narrow = x.astype(d.numpy)
            want = compiled("tanh", [narrow.astype(np.float32)], host_rows()[0], 16).astype(d.numpy)
        got = compiled("tanh", [narrow], host_rows()[0], 16, name)
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_sine_of_normal_angles_takes_no_slow_path() -> None:
    """The exact reduction of large angles stands behind a branch, all of it."""
    text = emit_kernel(module("sin", 4096, 16), "k", host_rows()[0]).llvm
    blocks = re.split(r"\n(?=[a-z.]+\d*:)", text)
    exact = [b for b in blocks if "= call <16 x double> @llvm.roundeven" in b]
    assert exact
    assert all(b.startswith("rare") for b in exact)
