"""Every instruction of the PTX interpreter against numpy, on random and on extreme values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tensorwright.runtime.cuda import float_math as fm

from .ptx_support import HEAD, Out, kernel, run, single

N = 256
F32 = [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 0.5, 2.0**24, -(2.0**31), 2.0**31, 2.0**32, 3e38, -3e38, 1e-40, -1e-45, 1e-38]
F32 += [float("inf"), -float("inf"), float("nan"), 255.5, -128.5, 65504.0, 65520.0, 1e-8]
S32 = [0, 1, -1, 2, -2, 31, 32, 33, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), -(2**31) + 1, 0x0F0F0F0F, 7]


def values(kind: str, seed: int) -> np.ndarray[Any, Any]:
    """N values of a PTX type: every extreme one with others at random, the rest of all magnitudes."""
    r = np.random.default_rng(seed)
    if kind == "bf16":
        return values("f32", seed).astype(ml_dtypes.bfloat16)
    if kind[0] == "f":
        dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
        x = r.standard_normal(N) * 10.0 ** r.integers(-6, 7, N)
        x[: len(F32)] = F32
    else:
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
        x = r.integers(-(2**62), 2**62, N) >> r.integers(0, 62, N)
        x[: len(S32)] = S32
        if kind in ("u64", "s64"):
            x[len(S32) : len(S32) + 3] = [2**63 - 1, -(2**63), -(2**63) + 1]
    r.shuffle(x[: N // 2])
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def carrier(kind: str) -> str:
    return kind if kind[0] != "f" and kind != "bf16" else f"b{kind.strip('bf')}"


def compute(opcode: str, kinds: str, result: str, arrays: list[Any], extra: str = "") -> np.ndarray[Any, Any]:
    """The instruction on arrays of types `kinds` (separated by spaces)."""
    names = kinds.split()
    register = {"bf16": "b16", "f16": "b16"}
    loads = [(f"%a{k}", carrier(n), register.get(n, n)) for k, n in enumerate(names)]
    operands = "".join(f", %a{k}" for k in range(len(names))) + extra
    text = single(f"{opcode} %o{operands};", loads, ("%o", carrier(result), register.get(result, result)))
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}.get(result)
    dtype = dtype or np.dtype(f"{'i' if result[0] == 's' else 'u'}{int(result[1:]) // 8}")
    raw = [a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a for a in arrays]
    out = np.dtype(dtype)
    got, _ = run(text, "k", (1,), (N,), [*raw, Out(N, np.uint16 if result == "bf16" else out)])
    return got[-1].view(out)


def same(got: Any, wanted: Any, what: str) -> None:
    """Equal bits, any NaN for NaN."""
    g, w = np.asarray(got), np.asarray(wanted)
    assert g.dtype == w.dtype, (what, g.dtype, w.dtype)
    bits = f"u{g.dtype.itemsize}"
    equal = g.view(bits) == w.view(bits)
    if g.dtype.kind == "f" or g.dtype == ml_dtypes.bfloat16:
        equal |= np.isnan(g) & np.isnan(w)
    bad = np.flatnonzero(~equal)
    assert not len(bad), f"{what}: at {bad[0]} got {g[bad[0]]!r}, expected {w[bad[0]]!r} ({len(bad)} differ)"


def wide(kind: str) -> Any:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 4}")


def exact_high(a: Any, b: Any) -> Any:
    bits = a.dtype.itemsize * 8
    return np.array([(int(x) * int(y) >> bits) & ((1 << bits) - 1) for x, y in zip(a, b, strict=True)], f"u{bits // 8}").view(
        a.dtype
    )


def divided(a: Any, b: Any, rest: bool) -> Any:
    out = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        q = 0 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        out.append(x if rest and y == 0 else -1 if y == 0 else x - q * y if rest else q)
    bits = a.dtype.itemsize * 8
    return np.array([v & ((1 << bits) - 1) for v in out], f"u{bits // 8}").view(a.dtype)


def shift(a: Any, n: Any, left: bool) -> Any:
    bits = a.dtype.itemsize * 8
    out = []
    for x, k in zip(a.tolist(), n.tolist(), strict=True):
        out.append(((x << min(k, bits)) if left else (x >> min(k, bits))) & ((1 << bits) - 1))
    return np.array(out, f"u{bits // 8}").view(a.dtype)


INTEGER: list[tuple[str, str, str, Any]] = [
    *(
        (f"{op}.{t}", f"{t} {t}", t, f)
        for t in ("s32", "u32", "s64", "u64", "s16", "u16")
        for op, f in (("add", np.add), ("sub", np.subtract), ("min", np.minimum), ("max", np.maximum))
    ),
    *(
        (f"{op}.{t}", f"{t} {t}", t, lambda a, b, r=r: divided(a, b, r))
        for t in ("s32", "u32", "s64", "u64", "s16")
        for op, r in (("div", False), ("rem", True))
    ),
    *((f"mul.lo.{t}", f"{t} {t}", t, np.multiply) for t in ("s32", "u32", "s64", "u16")),
    *((f"mul.hi.{t}", f"{t} {t}", t, exact_high) for t in ("s32", "u32", "s64", "u64")),
    *(
        (f"mul.wide.{t}", f"{t} {t}", f"{t[0]}{int(t[1:]) * 2}", lambda a, b, t=t: a.astype(wide(t)) * b.astype(wide(t)))
        for t in ("s32", "u32", "s16", "u16")
    ),
    *((f"mad.lo.{t}", f"{t} {t} {t}", t, lambda a, b, c: a * b + c) for t in ("s32", "u32", "s64")),
    ("mad.hi.u32", "u32 u32 u32", "u32", lambda a, b, c: exact_high(a, b) + c),
    ("mad.wide.s32", "s32 s32 s64", "s64", lambda a, b, c: a.astype("i8") * b.astype("i8") + c),
    *(
        (f"{op}.b{n}", f"u{n} u{n}", f"u{n}", f)
        for n in (16, 32, 64)
        for op, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
    ),
    ("not.b32", "u32", "u32", np.invert),
    ("cnot.b32", "u32", "u32", lambda a: (a == 0).astype("u4")),
    ("abs.s32", "s32", "s32", np.abs),
    ("neg.s32", "s32", "s32", np.negative),
    ("neg.s64", "s64", "s64", np.negative),
    ("popc.b32", "u32", "u32", lambda a: np.array([int(v).bit_count() for v in a], "u4")),
    ("popc.b64", "u64", "u32", lambda a: np.array([int(v).bit_count() for v in a], "u4")),
    ("clz.b32", "u32", "u32", lambda a: np.array([32 - int(v).bit_length() for v in a], "u4")),
    ("clz.b64", "u64", "u32", lambda a: np.array([64 - int(v).bit_length() for v in a], "u4")),
    ("bfind.u32", "u32", "u32", lambda a: np.array([(int(v).bit_length() - 1) & 0xFFFFFFFF for v in a], "u4")),
    (
        "bfind.s32",
        "s32",
        "u32",
        lambda a: np.array([((int(v) if v >= 0 else ~int(v)).bit_length() - 1) & 0xFFFFFFFF for v in a], "u4"),
    ),
    ("brev.b32", "u32", "u32", lambda a: np.array([int(f"{int(v):032b}"[::-1], 2) for v in a], "u4")),
    (
        "sad.s32",
        "s32 s32 s32",
        "s32",
        lambda a, b, c: np.array(
            [(abs(int(x) - int(y)) + int(z)) & 0xFFFFFFFF for x, y, z in zip(a, b, c, strict=True)], "u4"
        ).view("i4"),
    ),
    ("add.sat.s32", "s32 s32", "s32", lambda a, b: np.clip(a.astype("i8") + b.astype("i8"), -(2**31), 2**31 - 1).astype("i4")),
    ("sub.sat.s32", "s32 s32", "s32", lambda a, b: np.clip(a.astype("i8") - b.astype("i8"), -(2**31), 2**31 - 1).astype("i4")),
    ("mul24.lo.u32", "u32 u32", "u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
]


@pytest.mark.parametrize(("opcode", "kinds", "result", "f"), INTEGER, ids=[i[0] for i in INTEGER])
def test_an_integer_instruction(opcode: str, kinds: str, result: str, f: Any) -> None:
    arrays = [values(k, 3 + j) for j, k in enumerate(kinds.split())]
    with np.errstate(all="ignore"):
        same(compute(opcode, kinds, result, arrays), f(*arrays), opcode)


@pytest.mark.parametrize("t", ["b32", "b64", "b16"])
def test_shifts_clamp_their_count(t: str) -> None:
    n = int(t[1:])
    count = np.random.default_rng(0).integers(0, 2 * n, N).astype("u4")
    count[:4] = 0, n, n - 1, 2**32 - 1
    for op, kind, left in ((f"shl.{t}", f"u{n}", True), (f"shr.u{n}", f"u{n}", False), (f"shr.s{n}", f"s{n}", False)):
        a = values(kind, 5)
        same(compute(op, f"{kind} u32", kind, [a, count]), shift(a, count, left), op)


def test_funnel_shifts() -> None:
    a, b = values("u32", 1), values("u32", 2)
    n = np.random.default_rng(0).integers(0, 64, N).astype("u4")
    both = [(int(y) << 32) | int(x) for x, y in zip(a, b, strict=True)]
    for mode, count in (("wrap", [int(k) & 31 for k in n]), ("clamp", [min(int(k), 32) for k in n])):
        left = np.array([((v << k) >> 32) & 0xFFFFFFFF for v, k in zip(both, count, strict=True)], "u4")
        right = np.array([(v >> k) & 0xFFFFFFFF for v, k in zip(both, count, strict=True)], "u4")
        same(compute(f"shf.l.{mode}.b32", "u32 u32 u32", "u32", [a, b, n]), left, f"shf.l.{mode}")
        same(compute(f"shf.r.{mode}.b32", "u32 u32 u32", "u32", [a, b, n]), right, f"shf.r.{mode}")


def test_bit_fields() -> None:
    a, b = values("u32", 1), values("u32", 2)
    r = np.random.default_rng(3)
    at, n = r.integers(0, 40, N).astype("u4"), r.integers(0, 40, N).astype("u4")
    got = compute("bfe.u32", "u32 u32 u32", "u32", [a, at, n])
    same(got, np.array([(int(v) >> int(p)) & ((1 << int(k)) - 1) for v, p, k in zip(a, at, n, strict=True)], "u4"), "bfe.u32")
    signed = []
    for v, p, k in zip(a.view("i4").tolist(), at.tolist(), n.tolist(), strict=True):
        top = (v >> min(p + k - 1, 31)) & 1 if k else 0
        signed.append(((v >> min(p, 31)) & ((1 << k) - 1) | (-1 << k if top else 0)) if k else 0)
    wanted = np.array([s & 0xFFFFFFFF for s in signed], "u4").view("i4")
    same(compute("bfe.s32", "s32 u32 u32", "s32", [a.view("i4"), at, n]), wanted, "bfe.s32")
    mask = [(((1 << int(k)) - 1) << int(p)) & 0xFFFFFFFF for p, k in zip(at, n, strict=True)]
    inserted = [((int(x) << int(p)) & m | int(y) & ~m) & 0xFFFFFFFF for x, y, p, m in zip(a, b, at, mask, strict=True)]
    same(compute("bfi.b32", "u32 u32 u32 u32", "u32", [a, b, at, n]), np.array(inserted, "u4"), "bfi")


@pytest.mark.parametrize("table", [0x96, 0xE8, 0x80, 0xFE, 0x1B])
def test_lop3(table: int) -> None:
    a, b, c = (values("u32", k) for k in range(3))
    wanted = np.zeros(N, "u4")
    for bit in range(32):
        k = ((a >> bit) & 1) << 2 | ((b >> bit) & 1) << 1 | ((c >> bit) & 1)
        wanted |= ((np.uint32(table) >> k) & 1) << np.uint32(bit)
    same(compute("lop3.b32", "u32 u32 u32", "u32", [a, b, c], f", {table}"), wanted, "lop3")


def test_byte_permutation_and_dot_products() -> None:
    a, b, c = (values("u32", k) for k in range(3))
    bytes_ = np.concatenate([a.view("u1").reshape(N, 4), b.view("u1").reshape(N, 4)], 1)
    out = np.zeros((N, 4), "u1")
    for k in range(4):
        sel = (c >> np.uint32(4 * k)) & 15
        byte = bytes_[np.arange(N), sel & 7]
        out[:, k] = np.where(sel & 8, np.where(byte & 128, 255, 0), byte)
    same(compute("prmt.b32", "u32 u32 u32", "u32", [a, b, c]), out.view("u4")[:, 0], "prmt")
    for ta, tb in (("s32", "s32"), ("u32", "u32"), ("s32", "u32"), ("u32", "s32")):
        x = a.view("i1" if ta[0] == "s" else "u1").reshape(N, 4).astype("i8")
        y = b.view("i1" if tb[0] == "s" else "u1").reshape(N, 4).astype("i8")
        same(compute(f"dp4a.{ta}.{tb}", "u32 u32 u32", "u32", [a, b, c]), ((x * y).sum(1) + c).astype("u4"), f"dp4a.{ta}.{tb}")


def test_sums_with_carry_make_128_bits() -> None:
    text = single(
        "add.cc.u64 %x, %a, %b;\naddc.u64 %o, 0, 0;\nsub.cc.u64 %x, %a, %b;\nsubc.u64 %y, 0, 0;\nshl.b64 %y, %y, "
        "8;\nor.b64 %o, %o, %y;",
        [("%a", "u64", "u64"), ("%b", "u64", "u64")], ("%o", "u64", "u64"), ".reg .u64 %x, %y;",
    )  # fmt: skip
    a, b = values("u64", 1), values("u64", 2)
    got, _ = run(text, "k", (1,), (N,), [a, b, Out(N, np.uint64)])
    wanted = [
        (int(x) + int(y) >> 64) | ((-(int(x) < int(y)) & (2**64 - 1)) << 8) & (2**64 - 1) for x, y in zip(a, b, strict=True)
    ]
    assert got[-1].tolist() == wanted


# --- floats ----------------------------------------------------------------------------------------------------------


def test_fused_multiply_add_rounds_once() -> None:
    r = np.random.default_rng(0)
    a, b = values("f32", 1), values("f32", 2)
    with np.errstate(all="ignore"):
        near = -(a * b) * (1 + r.integers(-2, 3, N) * np.float32(2**-23))
    c = np.where(r.random(N) < 0.7, near, values("f32", 3)).astype("f4")
    c[:40] = (np.float32(2) ** r.integers(-30, 30, 40)).astype("f4")
    a[:40], b[:40] = 1 + np.float32(2**-23) * r.integers(0, 9, 40), 1 + np.float32(2**-23) * r.integers(0, 9, 40)
    for kind, dtype in (("f32", np.float32), ("f64", np.float64)):
        x, y, z = (v.astype(dtype) for v in (a, b, c))
        if kind == "f64":
            x[:40] = 1 + 2.0**-52 * r.integers(0, 9, 40)
            y[:40] = 1 - 2.0**-52 * r.integers(0, 9, 40)
            x[40:60] *= 1e200
        with np.errstate(all="ignore"):
            plain = x.astype("f8") * y.astype("f8") + z.astype("f8")
        got = compute(f"fma.rn.{kind}", f"{kind} " * 3, kind, [x, y, z])
        for g, p, u, v, w in zip(got, plain, x, y, z, strict=True):
            if not np.isfinite(u) or not np.isfinite(v) or not np.isfinite(w):
                assert np.isnan(g) if np.isnan(p) else g == dtype(p)
                continue
            exact = Fraction(float(u)) * Fraction(float(v)) + Fraction(float(w))
            assert nearest(g, exact, dtype), (kind, u, v, w, g)


def nearest(got: Any, exact: Fraction, dtype: Any) -> bool:
    """Whether a float is the one nearest to an exact value, the even one on ties."""
    top = Fraction(float(np.finfo(dtype).max))
    if np.isinf(got):
        return abs(exact) >= top + (top - Fraction(float(np.nextafter(np.finfo(dtype).max, dtype(0))))) / 2
    mine = abs(Fraction(float(got)) - exact)
    for other in (np.nextafter(got, dtype(np.inf)), np.nextafter(got, dtype(-np.inf))):
        if np.isfinite(other):
            theirs = abs(Fraction(float(other)) - exact)
            if theirs < mine or (theirs == mine and mine and np.asarray(got).view(f"i{got.itemsize}") & 1):
                return False
    return True


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    a, b, c = (np.where(np.isfinite(v), v, 1).astype("f4") for v in (values("f32", 1), values("f32", 2), values("f32", 3)))
    a, b = np.clip(a, -1e15, 1e15), np.clip(b, -1e15, 1e15)
    for op, kinds, exact in (
        ("add", "f32 f32", [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)]),
        ("mul", "f32 f32", [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]),
        (
            "fma",
            "f32 f32 f32",
            [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)],
        ),
    ):
        got = compute(f"{op}.{mode}.f32", kinds, "f32", [a, b, c][: len(kinds.split())])
        for g, e in zip(got, exact, strict=True):
            v = Fraction(float(g)) if np.isfinite(g) else None
            if v is None:
                assert abs(e) > Fraction(3e38)
                continue
            up, down = np.nextafter(g, np.float32(np.inf)), np.nextafter(g, np.float32(-np.inf))
            if mode == "rp" or (mode == "rz" and e < 0):
                assert v >= e and (v == e or Fraction(float(down)) < e)
            else:
                assert v <= e and (v == e or not np.isfinite(up) or Fraction(float(up)) > e)


def low(a: Any, b: Any) -> Any:
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where((a < b) | ((a == b) & np.signbit(a)), a, b))).astype(
        a.dtype
    )


def high(a: Any, b: Any) -> Any:
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where((a > b) | ((a == b) & np.signbit(b)), a, b))).astype(
        a.dtype
    )


def flushed(f: Any) -> Any:
    def z(v: Any) -> Any:
        return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)

    return lambda *a: z(f(*(z(v) for v in a)))


def bf(f: Any) -> Any:
    return lambda *a: f(*(v.astype("f8") for v in a)).astype("f4").astype(ml_dtypes.bfloat16)


FLOAT: list[tuple[str, str, str, Any]] = [
    *(
        (f"{op}.{t}", f"{t} {t}", t, f)
        for t in ("f32", "f64", "f16")
        for op, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply))
    ),
    *((f"div.rn.{t}", f"{t} {t}", t, np.divide) for t in ("f32", "f64")),
    *((f"sqrt.rn.{t}", t, t, np.sqrt) for t in ("f32", "f64")),
    *((f"rcp.rn.{t}", t, t, lambda a: a.dtype.type(1) / a) for t in ("f32", "f64")),
    *((f"min.{t}", f"{t} {t}", t, low) for t in ("f32", "f64", "f16")),
    *((f"max.{t}", f"{t} {t}", t, high) for t in ("f32", "f64", "f16")),
    ("min.NaN.f32", "f32 f32", "f32", lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32("nan"), low(a, b))),
    ("max.NaN.f32", "f32 f32", "f32", lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32("nan"), high(a, b))),
    *((f"{op}.f32", "f32", "f32", f) for op, f in (("neg", np.negative), ("abs", np.abs))),
    ("neg.bf16", "bf16", "bf16", np.negative),
    ("abs.bf16", "bf16", "bf16", np.abs),
    ("add.ftz.f32", "f32 f32", "f32", flushed(np.add)),
    ("mul.ftz.f32", "f32 f32", "f32", flushed(np.multiply)),
    (
        "add.sat.f32",
        "f32 f32",
        "f32",
        lambda a, b: np.where(np.isnan(a + b), np.float32(0), np.clip(a + b, 0, 1) + np.float32(0)),
    ),
    ("copysign.f32", "f32 f32", "f32", lambda a, b: np.copysign(b, a)),
    ("ex2.approx.f32", "f32", "f32", lambda a: np.exp2(a.astype("f8")).astype("f4")),
    ("ex2.approx.ftz.f32", "f32", "f32", flushed(lambda a: np.exp2(a.astype("f8")).astype("f4"))),
    ("lg2.approx.f32", "f32", "f32", lambda a: np.log2(a.astype("f8")).astype("f4")),
    ("sin.approx.f32", "f32", "f32", lambda a: np.sin(a.astype("f8")).astype("f4")),
    ("cos.approx.f32", "f32", "f32", lambda a: np.cos(a.astype("f8")).astype("f4")),
    ("tanh.approx.f32", "f32", "f32", lambda a: np.tanh(a.astype("f8")).astype("f4")),
    ("rsqrt.approx.f32", "f32", "f32", lambda a: (1 / np.sqrt(a.astype("f8"))).astype("f4")),
    ("add.rn.bf16", "bf16 bf16", "bf16", bf(np.add)),
    ("mul.rn.bf16", "bf16 bf16", "bf16", bf(np.multiply)),
    ("fma.rn.f16", "f16 f16 f16", "f16", lambda a, b, c: (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype("f2")),
    ("fma.rn.ftz.f32", "f32 f32 f32", "f32", flushed(fm.fma32)),
]


@pytest.mark.parametrize(("opcode", "kinds", "result", "f"), FLOAT, ids=[i[0] for i in FLOAT])
def test_a_float_instruction(opcode: str, kinds: str, result: str, f: Any) -> None:
    arrays = [values(k, 3 + j) for j, k in enumerate(kinds.split())]
    with np.errstate(all="ignore"):
        same(compute(opcode, kinds, result, arrays), f(*arrays), opcode)


def integral(a: Any, to: str, f: Any) -> Any:
    dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    info = np.iinfo(dtype)
    return np.array(
        [
            0 if np.isnan(v) else min(max(int(f(v)) if np.isfinite(v) else (info.max if v > 0 else info.min), info.min), info.max)
            for v in a.astype("f8")
        ]
    ).astype(dtype)


CONVERT: list[tuple[str, str, str, Any]] = [
    *(
        (f"cvt.{m}.{to}.{t}", t, to, lambda a, to=to, f=f: integral(a, to, f))
        for t in ("f32", "f64", "f16")
        for to in ("s32", "u32", "s64")
        for m, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil))
    ),
    *(
        (f"cvt.{m}.f32.f32", "f32", "f32", f)
        for m, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil))
    ),
    *((f"cvt.rn.f32.{t}", t, "f32", lambda a: a.astype("f4")) for t in ("s32", "u32", "s64", "u64", "s16", "f64")),
    *((f"cvt.rn.f64.{t}", t, "f64", lambda a: a.astype("f8")) for t in ("s32", "s64")),
    ("cvt.f64.f32", "f32", "f64", lambda a: a.astype("f8")),
    ("cvt.f32.f16", "f16", "f32", lambda a: a.astype("f4")),
    ("cvt.rn.f16.f32", "f32", "f16", lambda a: a.astype("f2")),
    ("cvt.f32.bf16", "bf16", "f32", lambda a: a.astype("f4")),
    ("cvt.rn.bf16.f32", "f32", "bf16", lambda a: a.astype(ml_dtypes.bfloat16)),
    ("cvt.sat.f32.f32", "f32", "f32", lambda a: np.where(np.isnan(a), np.float32(0), np.clip(a, 0, 1) + np.float32(0))),
    ("cvt.ftz.f64.f32", "f32", "f64", lambda a: np.where(np.abs(a) < np.finfo("f4").tiny, np.copysign(0.0, a), a.astype("f8"))),
    ("cvt.s64.s32", "s32", "s64", lambda a: a.astype("i8")),
    ("cvt.u64.u32", "u32", "u64", lambda a: a.astype("u8")),
    ("cvt.u32.u64", "u64", "u32", lambda a: a.astype("u4")),
    ("cvt.s32.s8", "s32", "s32", lambda a: a.astype("i1").astype("i4")),
    ("cvt.u32.u16", "u16", "u32", lambda a: a.astype("u4")),
    ("cvt.sat.u8.s32", "s32", "u32", lambda a: np.clip(a, 0, 255).astype("u4")),
    ("cvt.sat.s8.s32", "s32", "s32", lambda a: np.clip(a, -128, 127).astype("i4")),
]


@pytest.mark.parametrize(("opcode", "kinds", "result", "f"), CONVERT, ids=[i[0] for i in CONVERT])
def test_a_conversion(opcode: str, kinds: str, result: str, f: Any) -> None:
    arrays = [values(k, 3 + j) for j, k in enumerate(kinds.split())]
    with np.errstate(all="ignore"):
        same(compute(opcode, kinds, result, arrays), f(*arrays), opcode)


def test_conversions_of_pairs_and_tf32() -> None:
    a, b = values("f32", 1), values("f32", 2)
    with np.errstate(all="ignore"):
        for name, dtype in (("f16x2", np.float16), ("bf16x2", ml_dtypes.bfloat16)):
            got = compute(f"cvt.rn.{name}.f32", "f32 f32", "u32", [a, b]).view("u2").reshape(N, 2)
            same(got[:, 1].view(dtype), a.astype(dtype), name)
            same(got[:, 0].view(dtype), b.astype(dtype), name)
    got = compute("cvt.rna.tf32.f32", "f32", "u32", [a]).view("f4")
    finite = np.isfinite(a) & (np.abs(a) < 1e38)
    assert not (got.view("u4")[finite] & 0x1FFF).any()
    assert (np.abs(got[finite] - a[finite]) <= np.maximum(np.abs(a[finite]) * 2.0**-11, 1e-41)).all()


@pytest.mark.parametrize("t", ["f16x2", "bf16x2"])
def test_arithmetic_on_pairs(t: str) -> None:
    dtype = np.float16 if t == "f16x2" else ml_dtypes.bfloat16
    with np.errstate(all="ignore"):
        a, b, c = (values("f32", k).astype(dtype) for k in range(3))
        for op, n, f in (("fma.rn", 3, lambda x, y, z: x * y + z), ("add", 2, np.add), ("mul", 2, np.multiply)):
            words = [np.tile(v.view("u4"), 4)[:N] for v in (a, b, c)][:n]
            got = compute(f"{op}.{t}", "u32 " * n, "u32", words)
            exact = f(*(v.view(dtype).astype("f8") for v in words))
            if dtype is np.float16:
                same(got.view(dtype), exact.astype(np.float16), f"{op}.{t}")
                continue
            parts = [v.view(dtype).astype("f8") for v in words]
            for g, e, *v in zip(got.view("u2"), exact, *parts, strict=True):
                if not np.isfinite(v).all() or not abs(e) < 3e38:
                    continue
                x = [Fraction(float(u)) for u in v]
                true = x[0] * x[1] + x[2] if n == 3 else x[0] + x[1] if op == "add" else x[0] * x[1]
                mine, other = (abs(Fraction(float(fm.bf16_to_f32(np.uint16(k)))) - true) for k in (g, beside(g, true)))
                assert mine < other or (mine == other and not g & 1), (op, v, g)


def beside(bits: Any, true: Fraction) -> int:
    """The bf16 value next to one, on the side of an exact value."""
    value = Fraction(float(fm.bf16_to_f32(np.uint16(bits))))
    if value == 0:
        return 1 if true > 0 else 0x8001
    return int(bits) + (1 if (true > value) == (value > 0) else -1)


COMPARE = [
    *(
        ("s32", c, f)
        for c, f in (
            ("eq", np.equal),
            ("ne", np.not_equal),
            ("lt", np.less),
            ("le", np.less_equal),
            ("gt", np.greater),
            ("ge", np.greater_equal),
        )
    ),
    *(("u32", c, f) for c, f in (("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal))),
    *(("f32", c, f) for c, f in (("eq", np.equal), ("lt", np.less), ("ge", np.greater_equal), ("neu", np.not_equal))),
    ("f32", "ne", lambda a, b: (a < b) | (a > b)),
    ("f32", "equ", lambda a, b: ~((a < b) | (a > b))),
    ("f32", "ltu", lambda a, b: ~(a >= b)),
    ("f32", "leu", lambda a, b: ~(a > b)),
    ("f32", "gtu", lambda a, b: ~(a <= b)),
    ("f32", "geu", lambda a, b: ~(a < b)),
    ("f32", "num", lambda a, b: ~np.isnan(a + b) | (np.isinf(a) & np.isinf(b))),
    ("f32", "nan", lambda a, b: np.isnan(a) | np.isnan(b)),
    ("f64", "lt", np.less),
    ("s64", "lt", np.less),
    ("u64", "gt", np.greater),
]


@pytest.mark.parametrize(("t", "how", "f"), COMPARE, ids=[f"{t}.{c}" for t, c, _ in COMPARE])
def test_a_comparison(t: str, how: str, f: Any) -> None:
    a, b = values(t, 1), values(t, 2)
    b[::3] = a[::3]
    body = f"setp.{how}.{t} %p|%q, %a0, %a1;\nselp.b32 %o, 1, 0, %p;\nselp.b32 %z, 2, 0, %q;\nor.b32 %o, %o, %z;"
    text = single(body, [("%a0", carrier(t), t), ("%a1", carrier(t), t)], ("%o", "u32", "b32"), ".reg .pred %q; .reg .b32 %z;")
    got, _ = run(text, "k", (1,), (N,), [a, b, Out(N, np.uint32)])
    with np.errstate(all="ignore"):
        yes = f(a, b)
    assert (got[-1] == np.where(yes, 1, 2)).all()


def test_comparisons_joined_with_a_predicate_and_slct() -> None:
    a, b = values("s32", 1), values("s32", 2)
    for join, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        body = f"setp.gt.s32 %p, %a0, 0;\nsetp.lt.{join}.s32 %p, %a0, %a1, %p;\nselp.b32 %o, 1, 0, %p;"
        text = single(body, [("%a0", "s32", "s32"), ("%a1", "s32", "s32")], ("%o", "u32", "b32"))
        assert (run(text, "k", (1,), (N,), [a, b, Out(N, np.uint32)])[0][-1] == f(a < b, a > 0)).all()
    x = values("f32", 4)
    same(compute("slct.s32.f32", "s32 s32 f32", "s32", [a, b, x]), np.where(x >= 0, a, b), "slct")
    same(compute("set.lt.u32.s32", "s32 s32", "u32", [a, b]), np.where(a < b, 2**32 - 1, 0).astype("u4"), "set")


def test_moves_pack_unpack_and_narrow_loads() -> None:
    x = values("u64", 1)
    body = "mov.b64 {%lo, %hi}, %a0;\nmov.b32 {%s0, %s1}, %hi;\nmov.b32 %hi, {%s1, %s0};\nmov.b64 %o, {%hi, %lo};"
    text = single(body, [("%a0", "u64", "u64")], ("%o", "u64", "u64"), ".reg .b32 %lo, %hi; .reg .b16 %s0, %s1;")
    got, _ = run(text, "k", (1,), (N,), [x, Out(N, np.uint64)])
    hi = x >> np.uint64(32)
    hi = (hi >> np.uint64(16)) | ((hi & np.uint64(0xFFFF)) << np.uint64(16))
    assert (got[-1] == (hi | (x << np.uint64(32)))).all()
    for how, dtype in (("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16)):
        v = values(how if how[1:] != "8" else f"{how[0]}16", 2).astype(dtype)
        text = single("cvt.s64.s32 %o, %a0;", [("%a0", how, "b32")], ("%o", "s64", "s64"))
        assert (run(text, "k", (1,), (N,), [v, Out(N, np.int64)])[0][-1] == v).all(), how


def test_jumps_through_a_table_loops_and_early_exits() -> None:
    body = """
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %t, 4, %d0; mov.u32 %r0, 0; and.b32 %r1, %t, 3;
    setp.eq.u32 %p0, %r1, 3; @%p0 bra $out;
    $table: .branchtargets $a, $b, $c;
    brx.idx %r1, $table;
    $a: add.u32 %r0, %r0, 100; bra $loop;
    $b: add.u32 %r0, %r0, 200; bra.uni $loop;
    $c: add.u32 %r0, %r0, 300;
    $loop: add.u32 %r0, %r0, 1; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %t; @%p1 bra $loop;
    st.global.u32 [%d0], %r0; ret;
    $out: st.global.u32 [%d0], 7;
    """
    got, _ = run(kernel("mov.u32 %r2, 0;" + body), "k", (1,), (100,), [Out(100, np.uint32)])
    t = np.arange(100)
    assert (got[0] == np.where(t % 4 == 3, 7, 100 * (t % 4 + 1) + np.maximum(t, 1))).all()


def test_generic_addresses_local_memory_and_variables() -> None:
    head = """.const .align 4 .u32 table[4] = {10, 20, 30, 40};
    .global .align 8 .u64 where = generic(seen);
    .global .align 4 .u32 seen[2] = {5, 6};"""
    body = """
    .local .align 4 .b8 mine[16]; .shared .align 4 .b8 ours[256];
    mov.u64 %d1, mine; cvta.local.u64 %d1, %d1; mov.u64 %d2, ours; cvta.shared.u64 %d3, %d2;
    and.b32 %r0, %t, 3; mul.wide.u32 %d4, %r0, 4; mov.u64 %d5, table; add.u64 %d5, %d5, %d4; ld.const.u32 %r1, [%d5];
    st.u32 [%d1+4], %r1; ld.local.u32 %r2, [mine+4];
    mul.wide.u32 %d6, %t, 4; add.u64 %d3, %d3, %d6; st.u32 [%d3], %r2; bar.sync 0;
    xor.b32 %r3, %t, 1; mul.wide.u32 %d6, %r3, 4; add.u64 %d7, %d2, %d6; ld.shared.u32 %r4, [%d7];
    ld.global.u64 %d8, [where]; ld.u32 %r5, [%d8+4]; add.u32 %r4, %r4, %r5;
    isspacep.shared %p0, %d3; selp.b32 %r6, 1000, 0, %p0; add.u32 %r4, %r4, %r6;
    ld.param.u64 %d9, [p0]; mad.wide.u32 %d9, %t, 4, %d9; st.global.u32 [%d9], %r4;
    """
    got, _ = run(kernel(body, head=head), "k", (1,), (64,), [Out(64, np.uint32)])
    assert (got[0] == 10 * ((np.arange(64) ^ 1) % 4 + 1) + 6 + 1000).all()


def test_special_registers_in_three_dimensions() -> None:
    body = """
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %ctaid.z; mov.u32 %r1, %nctaid.y; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %nctaid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %ntid.z; mov.u32 %r2, %tid.z; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %ntid.y; mov.u32 %r2, %tid.y; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r0, %r0, %r1, %r2;
    mad.wide.u32 %d0, %r0, 4, %d0; mov.u32 %r3, %laneid; st.global.u32 [%d0], %r3;
    """
    got, _ = run(kernel(body), "k", (2, 3, 2), (5, 4, 3), [Out(720, np.uint32)])
    assert (got[0] == np.tile(np.arange(60) % 32, 12)).all()


def test_the_table_holds_what_llvm_and_nvcc_write() -> None:
    from tensorwright.runtime.cuda import ptx_interp  # noqa: F401  # fills the table
    from tensorwright.runtime.cuda.decode import OPCODES

    assert {
        "fma",
        "mad",
        "mma",
        "ldmatrix",
        "cp",
        "atom",
        "red",
        "shfl",
        "vote",
        "redux",
        "dp4a",
        "prmt",
        "ex2",
    } <= OPCODES.keys()
    assert HEAD.startswith(".version")
