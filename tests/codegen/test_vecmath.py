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
from tensorwright.ir.expr import MATH, Expr, binary, const, load, unary, var

from .helpers import Array, emit_kernel, host_rows, run_kernel

special = pytest.importorskip("scipy.special", reason="the f64 oracle of erf and sigmoid is scipy's")


def logistic(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, e, 1) / (1 + e))


# In longdouble (64 bits of mantissa), but erf: scipy has it in f64, within an ulp or so.
ORACLES = {
    "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "erf": lambda x: special.erf(x.astype(np.float64)), "sigmoid": logistic,
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
    d, limits = got.dtype, np.finfo(got.dtype)
    with np.errstate(all="ignore"):
        want = exact.astype(d)
        unit = np.maximum(np.spacing(np.minimum(np.abs(want), limits.max)), limits.smallest_subnormal).astype(np.longdouble)
        distance = np.abs(got.astype(np.longdouble) - exact) / unit
    alike = (np.isnan(got) & np.isnan(want)) | ((got == want) & (np.signbit(got) == np.signbit(want)))
    finite = np.isfinite(got) & np.isfinite(want) & ~((got == 0) & (want == 0))
    return np.asarray(np.where(finite, distance, np.where(alike, 0, np.inf)).astype(np.float64))


def sweep(name: str, seed: int = 0) -> Array:
    """Some mantissas of every sign and exponent, and what functions find hard."""
    rng = np.random.default_rng(seed)
    word, shift, each = (np.uint32, 23, 16) if name == "f32" else (np.uint64, 52, 3)
    exponents = np.arange(1 << (np.dtype(word).itemsize * 8 - shift), dtype=word) << word(shift)
    bits = exponents[:, None] | rng.integers(0, 1 << shift, (len(exponents), each), dtype=word)
    bits[:, 0] &= ~word((1 << shift) - 1)
    bits[:, 1] |= word((1 << shift) - 1)
    d = as_dtype(name).numpy
    parts = [
        bits.view(d).ravel(), rng.uniform(-110, 110, 4000), rng.uniform(-760, 720, 1000), rng.standard_normal(8000),
        1 + rng.standard_normal(2000) * 1e-3, np.arange(1, 4000) * math.pi / 2,
        [0.0, -0.0, np.inf, -np.inf, np.nan, 88.72, 88.73, -87.4, -103.9, -104.1, 0.925, 4.1, 32768.0, 1048576.0, 1e30],
    ]  # fmt: skip
    with np.errstate(all="ignore"):
        return np.concatenate([np.asarray(p).astype(d) for p in parts])


@pytest.mark.parametrize("name", ["f32", "f64"])
@pytest.mark.parametrize("op", sorted(MATH))
def test_within_its_bound_over_every_exponent(op: str, name: str) -> None:
    assert BOUNDS[name][op] <= 4
    x = sweep(name)
    with np.errstate(all="ignore"):
        exact = ORACLES[op](x.astype(np.longdouble))
    for row in host_rows():
        worst = errors(compiled(op, [x], row, 16 if name == "f32" else 8, name), exact)
        k = int(worst.argmax())
        assert worst[k] <= BOUNDS[name][op], f"{op}({x[k]!r}) on {row}: {worst[k]:.2f} ulp, exact {exact[k]}"


@pytest.mark.parametrize("factor", [1.0, 0.125, 0.088, 3.7])
def test_exp_of_a_difference_errs_by_less_than_the_difference_does(factor: float) -> None:
    """In f32 log2(e) is in one piece, with the factor: up to |x| 2^-25 more than the polynomial's three units."""
    x = -np.abs(sweep("f32"))
    x = np.append(x[~np.isnan(x)], np.float32(np.nan))
    d, i, n, c = as_dtype("f32"), var("i"), len(x), float(np.float32(factor))
    source, out = (Buffer(b, d, (n,), align=4) for b in "xy")
    value = load(source, (i,), d)
    e = Expr("exp", (value if factor == 1 else binary("mul", value, const(c, d)),), d, 1, "nonpositive")
    loop = For(i, const(0), const(n), (Store(out, (i,), e),), "vector")
    exact = np.exp(x.astype(np.longdouble) * c)
    for row in host_rows():
        y = np.zeros_like(x)
        assert run_kernel(Module((Kernel("k", (source, out), vectorize_loop(loop, 16)),)), "k", [x, y], row) == 0
        worst = errors(y, exact) / (3 + np.fmin(-x.astype(np.float64) * c, 105) / 2)
        k = int(worst.argmax())
        assert worst[k] <= 1, f"exp({x[k]!r} * {c}) on {row}: {y[k]}, exact {exact[k]}"
        assert (y[x == 0] == 1).all()


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_pow(name: str) -> None:
    rng, d = np.random.default_rng(3), as_dtype(name).numpy
    whole = 2.0 ** (24 if name == "f32" else 53)
    tiny, huge = float(np.finfo(d).smallest_subnormal), float(np.finfo(d).max)
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
        tiny,
        -tiny,
        huge,
        -huge,
        whole,
        whole - 1,
        1 - whole,
    ]
    odd += [1 + float(np.finfo(d).eps), 1 - float(np.finfo(d).epsneg)]
    grid = np.meshgrid(np.array(odd, d), np.array(odd, d))
    n, limit = 4000, 88 if name == "f32" else 700
    near_one = 1 + rng.standard_normal(n) * 1e-4
    xs = [grid[0].ravel(), sweep(name, 1)[:8192], np.exp(rng.uniform(-limit, limit, n)), near_one, rng.standard_normal(n)]
    count = len(xs[1])
    ys = [grid[1].ravel(), rng.standard_normal(count), rng.uniform(-3, 3, n), rng.uniform(-1e6, 1e6, n), rng.integers(-30, 30, n)]
    x, y = (np.concatenate([part.astype(d) for part in parts]) for parts in (xs, ys))
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
    for row in host_rows():
        worst = errors(compiled("pow", [x, y], row, 16 if name == "f32" else 8, name), exact)
        k = int(worst.argmax())
        assert worst[k] <= BOUNDS[name]["pow"], f"pow({x[k]!r}, {y[k]!r}) on {row}: {worst[k]:.2f} ulp, exact {exact[k]}"


def test_tanh_rises_to_one_and_stays_there() -> None:
    """Every fourth float from 1/4 to 16: never past 1, falling nowhere by more than rounding, 1 from 9.02 on, odd."""
    first, last = (int(np.float32(v).view(np.int32)) for v in (0.25, 16.0))
    x = np.arange(first, last, 4, dtype=np.int32).view(np.float32)
    y = compiled("tanh", [x], host_rows()[0], 16)
    assert y.max() == 1
    assert (y[x >= 9.02] == 1).all()
    assert (y[x < 8.6] < 1).all()
    assert np.diff(y).min() >= -2 * 2.0**-24
    np.testing.assert_array_equal(compiled("tanh", [-x[::97]], host_rows()[0], 16), -y[::97])


def test_sigmoid_of_far_negative_numbers_is_rounded_once() -> None:
    """Results that are denormal: the quotient alone is rounded, so within an ulp."""
    x = np.linspace(-104.5, -87.0, 400_001).astype(np.float32)
    exact = logistic(x.astype(np.longdouble))
    denormal = exact < 2.0**-127
    for row in host_rows():
        worst = errors(compiled("sigmoid", [x], row, 16), exact)
        assert worst[denormal].max() <= 1.5


@pytest.mark.parametrize(("name", "widths"), [("f32", (1, 4, 16)), ("f64", (1, 8))])
@pytest.mark.parametrize("op", [*sorted(MATH), "pow"])
def test_same_bits_for_every_lane_count_and_row(op: str, name: str, widths: tuple[int, ...]) -> None:
    """Rows with FMA and the one that emulates it, scalars and vectors of any width."""
    x = np.random.default_rng(5).permutation(sweep(name, 2))[:1501]
    xs = [x, np.roll(x, 7)] if op == "pow" else [x]
    first: Array | None = None
    for row in host_rows():
        for lanes in widths:
            y = compiled(op, xs, row, lanes, name)
            bits = np.where(np.isnan(y), 1, y.view(np.uint32 if name == "f32" else np.uint64))
            first = bits if first is None else first
            np.testing.assert_array_equal(bits, first, err_msg=f"{op}, {lanes} lanes, {row}")


def test_narrow_floats_are_rounded_once_from_f32() -> None:
    x = sweep("f32")[:4000]
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
