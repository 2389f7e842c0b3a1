"""Every operation, compiled for each row this machine runs, against its numpy definition, bit for bit (any NaN for NaN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tensorwright.codegen.loop_ir import Buffer, For, Kernel, Module, Stmt, Store
from tensorwright.codegen.loop_values import apply
from tensorwright.ir.dtypes import DType, as_dtype, bool_, f32, f64
from tensorwright.ir.errors import CompileError
from tensorwright.ir.expr import COMPARE, Expr, binary, bitcast, cast, const, fma, load, reduce_lanes, select, unary, var

from .helpers import Array, host_rows, run_kernel

N = 64
Build = Callable[..., Expr]
FLOATS = ("f32", "f64", "f16", "bf16")
INTEGERS = ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")


def samples(d: DType, seed: int) -> Array:
    """Random values, and those where something special happens."""
    rng = np.random.default_rng(seed)
    if d is bool_:
        return rng.integers(0, 2, N).astype(np.bool_)
    if d.is_float:
        x = (rng.standard_normal(N) * 3).astype(d.numpy)
        special = [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            1.0,
            -1.0,
            0.5,
            1.5,
            2.5,
            -2.5,
            1e-40,
            6e-8,
            65504.0,
            65520.0,
            3e9,
            -3e9,
            1e19,
        ]
        with np.errstate(over="ignore"):
            x[rng.permutation(N)[: len(special)]] = np.array(special).astype(d.numpy)
        return x
    info = np.iinfo(d.numpy)
    x = rng.integers(info.min, info.max, N, dtype=d.numpy, endpoint=True)
    x[: N // 2] = rng.integers(-5 if d.kind == "int" else 0, 6, N // 2)
    x[rng.permutation(N)[:4]] = [info.min, info.max, 0, info.max // 2]
    return x


def evaluate(
    builds: Sequence[Build], dtypes: list[DType], arrays: list[Array], row: str, lanes: int
) -> list[tuple[Array, Array]]:
    """For each expression the compiled result and the definition's; one kernel computes them all."""
    ins = [Buffer(f"x{k}", d, (N,), align=d.itemsize) for k, d in enumerate(dtypes)]
    i = var("i")
    here = [load(b, (i,), b.dtype, lanes=lanes) for b in ins]
    outs: list[Buffer] = []
    body: list[Stmt] = []
    for k, build in enumerate(builds):
        e = build(*here)
        full = e.lanes == lanes
        outs.append(Buffer(f"out{k}", e.dtype, (N if full else N // lanes,), align=e.dtype.itemsize))
        body.append(Store(outs[-1], (i if full else i // lanes,), e))
    got = [np.zeros(b.shape, b.dtype.numpy) for b in outs]
    loop = For(i, const(0), const(N), tuple(body), "serial", lanes)
    assert run_kernel(Module((Kernel("k", (*ins, *outs), (loop,)),)), "k", [*arrays, *got], row) == 0
    results = []
    for build, b, g in zip(builds, outs, got, strict=True):
        want = []
        for k in range(0, N, lanes):
            values: dict[Expr, Array] = dict(zip(here, (a[k : k + lanes] for a in arrays), strict=True))
            want.append(_define(build(*here), values))
        results.append((g, np.concatenate(want).astype(b.dtype.numpy)))
    return results


def _define(e: Expr, values: dict[Expr, Array]) -> Array:
    if e not in values:
        values[e] = apply(e, [_define(a, values) for a in e.args])
    return values[e]


def same(got: Array, want: Array, what: str) -> None:
    if as_dtype(got.dtype).is_float:
        nan = np.isnan(want.astype(np.float64))
        assert np.array_equal(nan, np.isnan(got.astype(np.float64))), what
        got, want = np.where(nan, np.ones_like(got), got), np.where(nan, np.ones_like(want), want)
    bad = got.view(np.uint8).reshape(len(got), -1) != want.view(np.uint8).reshape(len(want), -1)
    k = int(np.argmax(bad.any(axis=1)))
    assert not bad.any(), f"{what}: lane {k}: got {got[k]!r}, want {want[k]!r}"


def operations(d: DType) -> list[str]:
    if d is bool_:
        return ["and", "or", "xor", "max", "min", "eq", "ne", "lt", "le"]
    common = ["add", "sub", "mul", "max", "min", *sorted(COMPARE)]
    return [*common, "div"] if d.is_float else [*common, "floordiv", "mod", "and", "or", "xor", "shl", "shr"]


@pytest.mark.parametrize("row", host_rows())
@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, "bool"])
def test_operations(name: str, row: str) -> None:
    d = as_dtype(name)
    a, b = samples(d, 1), samples(d, 2)
    lanes = 16
    outs: list[Build] = [lambda x, y, op=op: binary(op, x, y) for op in operations(d)]
    unaries = ["not", "abs"] if d is bool_ else ["neg", "abs", "floor", "ceil", "round", "trunc"]
    unaries += ["sqrt"] if d.is_float else ["not"] if d is not bool_ else []
    outs += [lambda x, y, op=op: unary(op, x) for op in unaries]
    outs += [lambda x, y: select(binary("lt", x, y), x, y)]
    if d is not bool_:
        outs += [lambda x, y, op=op: reduce_lanes(op, x) for op in ("add", "mul", "max", "min")]
        outs += [lambda x, y, c=c: binary("max", const(c, d, lanes), x) for c in (0, 3)]
    if d.is_integer:
        for c in (-8, -7, -1, 0, 1, 2, 3, 10, 64):
            if c >= 0 or d.kind == "int":
                outs += [lambda x, y, c=c, op=op: binary(op, x, const(c, d, lanes)) for op in ("floordiv", "mod", "shl", "shr")]
    for k, (got, want) in enumerate(evaluate(outs, [d, d], [a, b], row, lanes)):
        same(got, want, f"operation {k} of {name} on {row}")


@pytest.mark.parametrize("row", host_rows())
@pytest.mark.parametrize("source", [*FLOATS, "i8", "i32", "i64", "u8", "u32", "u64", "bool"])
def test_casts(source: str, row: str) -> None:
    d = as_dtype(source)
    a = samples(d, 3)
    targets = [as_dtype(t) for t in (*FLOATS, *INTEGERS, "bool")]
    if d.bits == 64 and d.is_integer:
        targets = targets[:2] + targets[4:]  # to f16 and bf16 they are rounded to f64 on the way: stated in arithmetic.py
    with np.errstate(all="ignore"):
        results = evaluate([lambda x, to=to: cast(x, to) for to in targets], [d], [a], row, 16)
    for to, (got, want) in zip(targets, results, strict=True):
        same(got, want, f"{source} to {to.name} on {row}")


@pytest.mark.parametrize("row", host_rows())
def test_scalars(row: str) -> None:
    for name in ("f32", "i32", "i64", "u8", "bf16"):
        d = as_dtype(name)
        builds: list[Build] = [lambda x, y, op=op: binary(op, x, y) for op in operations(d)]
        results = evaluate(builds, [d, d], [samples(d, 4), samples(d, 5)], row, 1)
        for op, (got, want) in zip(operations(d), results, strict=True):
            same(got, want, f"scalar {op} of {name} on {row}")


def patterns(seed: int) -> Array:
    """Random bits: every exponent, denormals, infinities, NaN."""
    return np.random.default_rng(seed).integers(0, 1 << 32, N, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize("row", host_rows())
def test_fma_is_rounded_once(row: str) -> None:
    for seed in range(6):
        a, b = patterns(seed), patterns(seed + 100)
        with np.errstate(all="ignore"):
            # an addend close to the product, of the other sign: what is left is what rounding twice would get wrong
            c = (-(a.astype(np.float64) * b) * (1 + 2.0**-24)).astype(np.float32) if seed % 2 else patterns(seed + 200)
        same(*evaluate([fma], [f32, f32, f32], [a, b, c], row, 16)[0], f"fma on {row}")


def test_fma_of_f64() -> None:
    a, b, c = (samples(f64, k) for k in (7, 8, 9))
    for row in host_rows():
        if row == "x86-64-v2":
            with pytest.raises(CompileError, match="f64 fused multiply-add cannot be emulated"):
                evaluate([fma], [f64, f64, f64], [a, b, c], row, 16)
        else:
            same(*evaluate([fma], [f64, f64, f64], [a, b, c], row, 16)[0], f"f64 fma on {row}")


def test_bitcast() -> None:
    for row in host_rows():
        for source, to in (("f32", "i32"), ("i32", "f32"), ("f64", "u64"), ("f16", "i16"), ("bf16", "u16"), ("i16", "bf16")):
            d = as_dtype(source)
            results = evaluate([lambda x, to=to: bitcast(x, as_dtype(to))], [d], [samples(d, 6)], row, 16)
            same(*results[0], f"bitcast {source} to {to} on {row}")


def test_what_is_not_defined_is_an_error() -> None:
    for op, name in (("div", "i32"), ("shl", "f32"), ("add", "bool"), ("floordiv", "f32"), ("pow", "f64")):
        d = as_dtype(name)
        with pytest.raises(CompileError, match=op):
            evaluate([lambda x, y, op=op: binary(op, x, y)], [d, d], [samples(d, 1), samples(d, 2)], host_rows()[0], 4)
