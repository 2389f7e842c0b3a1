"""Integer, logical and floating-point arithmetic, comparisons and selections.

`.approx` functions (ex2, lg2, sin, cos, rcp, rsqrt, sqrt, tanh, div) are computed in fp64 and rounded once, so they are within
half a unit in the last place of fp32: closer than a GPU's, whose bounds PTX states (2 units for ex2, rcp, rsqrt and div, an
absolute error of 2^-20.5 and more for sin and cos, a relative one of 2^-11 for tanh). A kernel must not rely on the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from . import float_math as fm
from .decode import Decoder, Step, Value, opcode
from .ptx_parse import Both, Immediate, Instruction, Register
from .ptx_types import TYPES, PtxType
from .state import Batch

ROUNDING: Final = ("rn", "rz", "rm", "rp")


def _step1(d: Decoder, i: Instruction, t: PtxType, f: Callable[[Value], Value]) -> Step:
    o = d.operands(i, 2)
    w, a = d.write(i, o[0]), d.read(i, o[1], t)
    return lambda b: w(b, f(a(b)))


def _step2(d: Decoder, i: Instruction, t: PtxType, f: Callable[[Value, Value], Value], second: PtxType | None = None) -> Step:
    o = d.operands(i, 3)
    w, a, c = d.write(i, o[0]), d.read(i, o[1], t), d.read(i, o[2], second or t)
    return lambda b: w(b, f(a(b), c(b)))


def _step3(d: Decoder, i: Instruction, ts: tuple[PtxType, PtxType, PtxType], f: Callable[[Value, Value, Value], Value]) -> Step:
    o = d.operands(i, 4)
    w = d.write(i, o[0])
    x, y, z = (d.read(i, p, t) for p, t in zip(o[1:], ts, strict=True))
    return lambda b: w(b, f(x(b), y(b), z(b)))


# --- integers --------------------------------------------------------------------------------------------------------


def high_product(a: Value, c: Value, t: PtxType) -> Value:
    """The upper half of a * c."""
    if t.size < 8:
        wide = np.dtype(f"{t.dtype.kind}{t.size * 2}")
        return (a.astype(wide) * c.astype(wide) >> wide.type(t.bits)).astype(t.dtype)
    u = np.uint64
    x, y = a.view(u), c.view(u)
    m = u(0xFFFFFFFF)
    xl, xh, yl, yh = x & m, x >> u(32), y & m, y >> u(32)
    mid = (xl * yl >> u(32)) + (xh * yl & m) + (xl * yh & m)
    r = xh * yh + (xh * yl >> u(32)) + (xl * yh >> u(32)) + (mid >> u(32))
    if t.kind == "s":
        r = r - np.where(a < 0, y, u(0)) - np.where(c < 0, x, u(0))
    return r.view(t.dtype)


def quotient(a: Value, c: Value, t: PtxType) -> tuple[Value, Value]:
    """(a / c, a % c) rounded towards zero; a division by zero gives all ones and a, as NVIDIA's GPUs do (PTX leaves it open)."""
    zero = c == 0
    safe = np.where(zero, t.dtype.type(1), c)
    if t.kind == "u":
        q = a // safe
        return np.where(zero, ~t.dtype.type(0), q), np.where(zero, a, a - q * safe)
    u = np.dtype(f"u{t.size}")
    size = np.abs(a).view(u) // np.abs(safe).view(u)  # as unsigned numbers: the lowest one has no positive counterpart
    q = np.where((a < 0) != (safe < 0), np.zeros_like(size) - size, size).view(t.dtype)
    return np.where(zero, t.dtype.type(-1), q), np.where(zero, a, a - q * safe)


def shifted(a: Value, n: Value, t: PtxType, left: bool) -> Value:
    """A shift whose count is clamped to the width."""
    big = n >= t.bits
    m = np.minimum(n, t.bits - 1).astype(t.dtype)
    r = a << m if left else a >> m
    if (left or t.kind != "s") and np.any(big):
        r = np.where(big, t.dtype.type(0), r)
    return r


def _saturated(f: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    return lambda a, c: np.clip(f(a.astype(np.int64), c.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)


@opcode("add", "sub")
def _add(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    f: Callable[[Any, Any], Any] = np.add if i.parts[0] == "add" else np.subtract
    if t.kind in "fx":
        return _float2(d, i, t, f)
    mods = d.modifiers(i, ("sat", "cc"))
    if "cc" in mods:
        return _carry(d, i, t, with_carry=False)
    return _step2(d, i, t, _saturated(f) if "sat" in mods else f)


@opcode("addc", "subc")
def _addc(d: Decoder, i: Instruction) -> Step:
    d.modifiers(i, ("cc",))
    return _carry(d, i, d.type_of(i), with_carry=True)


def _carry(d: Decoder, i: Instruction, t: PtxType, with_carry: bool) -> Step:
    """Extended-precision sums: subtraction is a + ~b + carry with the carry bit meaning "no borrow"."""
    u = TYPES[f"u{t.bits}"]
    o = d.operands(i, 3)
    w, x, y = d.write(i, o[0]), d.read(i, o[1], u), d.read(i, o[2], u)
    subtract, out = i.parts[0].startswith("sub"), "cc" in i.parts

    def step(b: Batch) -> None:
        p, q = x(b), y(b)
        if subtract:
            q = ~q
        at = slice(None) if b.ix is None else b.ix
        c = b.carry[at].astype(u.dtype) if with_carry else u.dtype.type(subtract)
        s = p + q
        r = s + c
        if out:
            b.carry[at] = (s < p) | (r < s)
        w(b, r)

    return step


@opcode("mul")
def _mul(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    if t.kind in "fx":
        return _float2(d, i, t, np.multiply)
    mods = d.modifiers(i, ("lo", "hi", "wide"))
    if "hi" in mods:
        return _step2(d, i, t, lambda a, c: high_product(a, c, t))
    if "wide" in mods:
        wide = np.dtype(f"{t.dtype.kind}{t.size * 2}")
        return _step2(d, i, t, lambda a, c: a.astype(wide) * c.astype(wide))
    return _step2(d, i, t, np.multiply)


@opcode("mul24", "mad24")
def _mul24(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    if "lo" not in d.modifiers(i, ("lo",)):
        d.refuse(i)

    def cut(v: Value) -> Value:
        return (v << t.dtype.type(8)) >> t.dtype.type(8)

    if i.parts[0] == "mul24":
        return _step2(d, i, t, lambda a, c: cut(a) * cut(c))
    return _step3(d, i, (t, t, t), lambda a, c, e: cut(a) * cut(c) + e)


@opcode("mad")
def _mad(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    if t.kind in "fx":
        return _fma(d, i)
    mods = d.modifiers(i, ("lo", "hi", "wide"))
    if "wide" in mods:
        wide = TYPES[f"{t.kind}{t.bits * 2}"]
        return _step3(d, i, (t, t, wide), lambda a, c, e: a.astype(wide.dtype) * c.astype(wide.dtype) + e)
    if "hi" in mods:
        return _step3(d, i, (t, t, t), lambda a, c, e: high_product(a, c, t) + e)
    return _step3(d, i, (t, t, t), lambda a, c, e: a * c + e)


@opcode("sad")
def _sad(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ())
    return _step3(d, i, (t, t, t), lambda a, c, e: np.where(a < c, c - a, a - c) + e)


@opcode("rem")
def _rem(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ())
    return _step2(d, i, t, lambda a, c: quotient(a, c, t)[1])


@opcode("and", "or", "xor")
def _logic(d: Decoder, i: Instruction) -> Step:
    d.modifiers(i, ())
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[0]]
    return _step2(d, i, d.type_of(i), f)


@opcode("not")
def _not(d: Decoder, i: Instruction) -> Step:
    d.modifiers(i, ())
    return _step1(d, i, d.type_of(i), np.invert)


@opcode("cnot")
def _cnot(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    return _step1(d, i, t, lambda a: np.where(a == 0, t.dtype.type(1), t.dtype.type(0)))


@opcode("lop3")
def _lop3(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 5)
    d.modifiers(i, ())
    t = d.type_of(i)
    if not isinstance(o[4], Immediate) or isinstance(o[0], Both):
        d.refuse(i)
    table = int(o[4].value)
    w = d.write(i, o[0])
    x, y, z = (d.read(i, p, t) for p in o[1:4])

    def step(b: Batch) -> None:
        a, c, e = x(b), y(b), z(b)
        r = np.zeros_like(a | c | e)
        for k in range(8):
            if table >> k & 1:
                r = r | ((a if k & 4 else ~a) & (c if k & 2 else ~c) & (e if k & 1 else ~e))
        w(b, r)

    return step


@opcode("shl", "shr")
def _shift(d: Decoder, i: Instruction) -> Step:
    t, left = d.type_of(i), i.parts[0] == "shl"
    d.modifiers(i, ())
    return _step2(d, i, t, lambda a, n: shifted(a, n, t, left), TYPES["u32"])


@opcode("shf")
def _funnel(d: Decoder, i: Instruction) -> Step:
    mods = d.modifiers(i, ("l", "r", "wrap", "clamp"))
    left, wrap = "l" in mods, "wrap" in mods
    u = TYPES["u32"]

    def f(lo: Value, hi: Value, n: Value) -> Value:
        n = (n & np.uint32(31)).astype(np.uint64) if wrap else np.minimum(n, 32).astype(np.uint64)
        both = (hi.astype(np.uint64) << np.uint64(32)) | lo.astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return _step3(d, i, (u, u, u), f)


def _bit_length(v: Value) -> Value:
    """How many bits an unsigned number needs."""
    r = np.zeros(np.shape(v), np.uint32)
    x = np.asarray(v).astype(np.uint64)
    for s in (32, 16, 8, 4, 2, 1):
        big = x >= np.uint64(1 << s)
        r = r + np.where(big, np.uint32(s), np.uint32(0))
        x = np.where(big, x >> np.uint64(s), x)
    return r + (x > 0).astype(np.uint32)


@opcode("popc", "clz", "bfind", "brev")
def _count_bits(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    mods = d.modifiers(i, ("shiftamt",))
    name = i.parts[0]
    u = np.dtype(f"u{t.size}")

    def reverse(v: Value) -> Value:
        r = np.zeros_like(v)
        for k in range(t.bits):
            r = r | (((v >> t.dtype.type(k)) & t.dtype.type(1)) << t.dtype.type(t.bits - 1 - k))
        return r

    def find(v: Value) -> Value:
        if t.kind == "s":
            v = np.where(v < 0, ~v, v)
        n = _bit_length(v.view(u)) - np.uint32(1)
        return np.where(n == np.uint32(0xFFFFFFFF), n, np.uint32(t.bits - 1) - n) if "shiftamt" in mods else n

    table: dict[str, Callable[[Value], Value]] = {
        "popc": lambda v: np.bitwise_count(v).astype(np.uint32),
        "clz": lambda v: np.uint32(t.bits) - _bit_length(v),
        "bfind": find,
        "brev": reverse,
    }
    return _step1(d, i, t, table[name])


@opcode("bfe")
def _bfe(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ())
    u32 = TYPES["u32"]

    def f(a: Value, pos: Value, n: Value) -> Value:
        pos, n = pos & np.uint32(255), n & np.uint32(255)
        u = np.dtype(f"u{t.size}")
        v = shifted(a, pos, t, left=False)
        keep = np.where(n >= t.bits, ~u.type(0), (u.type(1) << np.minimum(n, t.bits - 1).astype(u)) - u.type(1))
        r = v.view(u) & keep
        if t.kind == "s":
            top = np.minimum(pos + n - np.uint32(1), np.uint32(t.bits - 1))
            sign = (shifted(a, top, t, left=False) & t.dtype.type(1)) != 0
            r = np.where(sign & (n > 0), r | ~keep, r)
        return np.where(n == 0, u.type(0), r).view(t.dtype)

    return _step3(d, i, (t, u32, u32), f)


@opcode("bfi")
def _bfi(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ())
    u32 = TYPES["u32"]
    o = d.operands(i, 5)
    w, x, y, p, q = d.write(i, o[0]), d.read(i, o[1], t), d.read(i, o[2], t), d.read(i, o[3], u32), d.read(i, o[4], u32)
    one = t.dtype.type(1)

    def step(b: Batch) -> None:
        pos, n = p(b) & np.uint32(255), q(b) & np.uint32(255)
        keep = np.where(n >= t.bits, ~t.dtype.type(0), (one << np.minimum(n, t.bits - 1).astype(t.dtype)) - one)
        keep = shifted(keep, pos, t, left=True)
        w(b, (shifted(x(b), pos, t, left=True) & keep) | (y(b) & ~keep))

    return step


@opcode("bmsk")
def _bmsk(d: Decoder, i: Instruction) -> Step:
    t = TYPES["u32"]
    clamp = "clamp" in d.modifiers(i, ("clamp", "wrap"))

    def f(a: Value, n: Value) -> Value:
        if not clamp:
            a, n = a & np.uint32(31), n & np.uint32(31)
        ones = np.where(n >= 32, ~np.uint32(0), (np.uint32(1) << np.minimum(n, 31).astype(np.uint32)) - np.uint32(1))
        return shifted(ones, a, t, left=True)

    return _step2(d, i, t, f)


@opcode("szext")
def _szext(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    wrap = "wrap" in d.modifiers(i, ("clamp", "wrap"))

    def f(a: Value, n: Value) -> Value:
        n = n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))
        s = np.uint32(32) - n
        return shifted(shifted(a, s, t, left=True), s, t, left=False)

    return _step2(d, i, t, f, TYPES["u32"])


@opcode("dp4a", "dp2a")
def _dot(d: Decoder, i: Instruction) -> Step:
    """Four products of bytes (or two of halves and bytes) summed onto an accumulator, modulo 2^32."""
    o = d.operands(i, 4)
    four = i.parts[0] == "dp4a"
    mods = d.modifiers(i, ("lo", "hi"))
    ta, tb = d.type_of(i, 0), d.type_of(i, 1)
    signed = "s" in ta.kind + tb.kind
    w, u = d.write(i, o[0]), TYPES["u32"]
    x, y, z = (d.read(i, p, u) for p in o[1:])

    def part(v: Value, k: int, bits: int, t: PtxType) -> Value:
        e = (v >> np.uint32(bits * k)).astype(np.dtype(f"u{bits // 8}"))
        return (e.view(np.dtype(f"i{bits // 8}")) if t.kind == "s" else e).astype(np.int64)

    def step(b: Batch) -> None:
        p, q = x(b), y(b)
        s = z(b).view(np.int32).astype(np.int64) if signed else z(b).astype(np.int64)
        if four:
            for k in range(4):
                s = s + part(p, k, 8, ta) * part(q, k, 8, tb)
        else:
            for k in range(2):
                s = s + part(p, k, 16, ta) * part(q, k + (2 if "hi" in mods else 0), 8, tb)
        w(b, s.astype(np.uint32))

    return step


# --- floats ----------------------------------------------------------------------------------------------------------


def unpacked(v: Value, name: str) -> Value:
    """fp16, bf16 and pairs of them as fp64 (pairs get a last axis of 2)."""
    if name == "f16":
        return v.astype(np.float64)
    if name == "bf16":
        return fm.bf16_to_f32(v).astype(np.float64)
    parts = np.ascontiguousarray(v).view(np.uint16).reshape(*np.shape(v), 2)
    return parts.view(np.float16).astype(np.float64) if name == "f16x2" else fm.bf16_to_f32(parts).astype(np.float64)


def packed(v: Value, name: str) -> Value:
    """fp64 values (exact, or rounded to odd) in the form that registers hold."""
    if name == "f16":
        return v.astype(np.float16)
    if name == "bf16":
        return fm.f64_to_bf16(v)
    parts = v.astype(np.float16).view(np.uint16) if name == "f16x2" else fm.f64_to_bf16(v)
    return np.ascontiguousarray(parts).view(np.uint32)[..., 0]


_HALVES: Final = ("f16", "bf16", "f16x2", "bf16x2")


def _relu(v: Value) -> Value:
    return np.where(np.isnan(v), v, np.where(v > 0, v, 0.0))


def _clamp01(v: Value) -> Value:
    """`.sat`: to [0, 1], NaN to 0."""
    zero = v.dtype.type(0)
    return np.where(v >= 1, v.dtype.type(1), np.where(v > 0, v, zero))


def _finish(f: Callable[..., Value], mods: set[str]) -> Callable[..., Value]:
    """Adds `.ftz` and `.sat` to a function of fp32 values."""
    if "ftz" in mods:
        inner = f

        def f(*v: Value) -> Value:
            return fm.flush(inner(*(fm.flush(x) for x in v)))

    if "sat" not in mods:
        return f
    return lambda *v: _clamp01(f(*v))


def _to_odd(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A sum, difference or product of narrow floats in fp64: exact, or rounded to odd."""
    if f is np.add:
        return fm.odd_sum
    return (lambda a, c: fm.odd_sum(a, -c)) if f is np.subtract else f


def _float2(d: Decoder, i: Instruction, t: PtxType, f: Callable[[Any, Any], Any]) -> Step:
    mods = d.modifiers(i, (*ROUNDING, "ftz", "sat"))
    if t.name in _HALVES:
        if mods - {"rn", "sat"}:
            d.refuse(i)
        # sums and products of fp16 and bf16 are exact in fp64, except sums of very different sizes: those to odd
        g = _to_odd(f)
        sat = "sat" in mods

        def half(a: Value, c: Value) -> Value:
            r = g(unpacked(a, t.name), unpacked(c, t.name))
            return packed(_clamp01(r) if sat else r, t.name)

        return _step2(d, i, t, half)
    mode = next((m for m in mods if m in ROUNDING), "rn")
    if mode != "rn":
        if t.name != "f32":
            d.refuse(i, "directed rounding in fp64")
        g = _to_odd(f)

        def directed(a: Value, c: Value) -> Value:
            return fm.directed32(g(a.astype(np.float64), c.astype(np.float64)), mode).astype(np.float32)

        return _step2(d, i, t, _finish(directed, mods))
    return _step2(d, i, t, _finish(f, mods) if mods & {"ftz", "sat"} else f)


@opcode("fma")
def _fma(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    mods = d.modifiers(i, (*ROUNDING, "ftz", "sat", "relu"))
    ts = (t, t, t)
    if t.name in _HALVES:

        def half(a: Value, c: Value, e: Value) -> Value:
            r = fm.odd_sum(unpacked(a, t.name) * unpacked(c, t.name), unpacked(e, t.name))
            return packed(_relu(r) if "relu" in mods else _clamp01(r) if "sat" in mods else r, t.name)

        return _step3(d, i, ts, half)
    mode = next((m for m in mods if m in ROUNDING), "rn")
    if t.name == "f64":
        if mods - {"rn"}:
            d.refuse(i)
        return _step3(d, i, ts, fm.fma64)
    if mode == "rn":
        return _step3(d, i, ts, _finish(fm.fma32, mods) if mods & {"ftz", "sat"} else fm.fma32)

    def directed(a: Value, c: Value, e: Value) -> Value:
        return fm.directed32(fm.odd_sum(a.astype(np.float64) * c.astype(np.float64), e.astype(np.float64)), mode)

    return _step3(d, i, ts, _finish(directed, mods))


@opcode("div")
def _div(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    if t.kind not in "fx":
        d.modifiers(i, ())
        return _step2(d, i, t, lambda a, c: quotient(a, c, t)[0])
    mods = d.modifiers(i, ("rn", "approx", "full", "ftz"))
    return _step2(d, i, t, _finish(np.divide, mods))


@opcode("min", "max")
def _minmax(d: Decoder, i: Instruction) -> Step:
    t, low = d.type_of(i), i.parts[0] == "min"
    if t.kind not in "fx":
        mods = d.modifiers(i, ("relu",))
        if mods:
            d.refuse(i)
        return _step2(d, i, t, np.minimum if low else np.maximum)
    mods = d.modifiers(i, ("ftz", "NaN"))
    nan = "NaN" in mods
    f = fm.minimum if low else fm.maximum
    if t.name in _HALVES:
        return _step2(d, i, t, lambda a, c: packed(f(unpacked(a, t.name), unpacked(c, t.name), nan), t.name))
    return _step2(d, i, t, _finish(lambda a, c: f(a, c, nan), mods))


@opcode("neg", "abs")
def _sign(d: Decoder, i: Instruction) -> Step:
    t, negate = d.type_of(i), i.parts[0] == "neg"
    mods = d.modifiers(i, ("ftz",))
    if t.name in ("bf16", "f16x2", "bf16x2"):
        bit = t.dtype.type(0x8000 if t.size == 2 else 0x80008000)
        return _step1(d, i, t, lambda v: v ^ bit if negate else v & ~bit)
    f: Callable[[Any], Any] = np.negative if negate else np.abs
    return _step1(d, i, t, _finish(f, mods) if mods else f)


def _wide(f: Callable[[Any], Any]) -> Callable[[Value], Value]:
    """A function computed in fp64 and rounded to the argument's own type."""
    return lambda v: f(v.astype(np.float64)).astype(v.dtype)


_APPROXIMATE: Final[dict[str, Callable[[Value], Value]]] = {
    "ex2": _wide(np.exp2),
    "lg2": _wide(np.log2),
    "sin": _wide(np.sin),
    "cos": _wide(np.cos),
    "tanh": _wide(np.tanh),
    "rcp": lambda v: v.dtype.type(1) / v,
    "rsqrt": _wide(lambda v: 1 / np.sqrt(v)),
    "sqrt": np.sqrt,
}


@opcode("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt")
def _function(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    mods = d.modifiers(i, ("approx", "full", "ftz", "rn"))
    f = _APPROXIMATE[i.parts[0]]
    if "approx" not in mods and i.parts[0] not in ("rcp", "sqrt"):
        d.refuse(i)
    if t.name in _HALVES:
        if i.parts[0] not in ("ex2", "tanh"):
            d.refuse(i)
        return _step1(d, i, t, lambda v: packed(f(unpacked(v, t.name)), t.name))
    return _step1(d, i, t, _finish(f, mods))


@opcode("copysign")
def _copysign(d: Decoder, i: Instruction) -> Step:
    d.modifiers(i, ())
    return _step2(d, i, d.type_of(i), lambda a, c: np.copysign(c, a))  # the sign of a, the size of b


@opcode("testp")
def _testp(d: Decoder, i: Instruction) -> Step:
    t, what = d.type_of(i), i.parts[1]
    tiny = np.finfo(t.dtype).tiny
    table: dict[str, Callable[[Value], Value]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= tiny),
        "subnormal": lambda v: (np.abs(v) < tiny) & (v != 0),
    }
    if what not in table:
        d.refuse(i)
    return _step1(d, i, t, table[what])


# --- comparisons and selections --------------------------------------------------------------------------------------

_COMPARE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, c: (a == c) | np.isnan(a) | np.isnan(c),
    "neu": np.not_equal,
    "ltu": lambda a, c: ~(a >= c),
    "leu": lambda a, c: ~(a > c),
    "gtu": lambda a, c: ~(a <= c),
    "geu": lambda a, c: ~(a < c),
    "num": lambda a, c: ~(np.isnan(a) | np.isnan(c)),
    "nan": lambda a, c: np.isnan(a) | np.isnan(c),
}


def comparison(d: Decoder, i: Instruction, t: PtxType) -> Callable[[Value, Value], Value]:
    """The comparison among an opcode's parts, on values of type t. `ne` is false for NaN among floats, `neu` true."""
    name = i.parts[1]
    if name == "ne":
        f: Callable[[Any, Any], Any] = np.not_equal if t.kind != "f" else lambda a, c: (a < c) | (a > c)
    elif name in _COMPARE and (t.kind == "f" or name in ("eq", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs")):
        f = _COMPARE[name]
    else:
        d.refuse(i, f"unknown comparison .{name}")
    if t.name == "bf16":
        return lambda a, c: f(fm.bf16_to_f32(a), fm.bf16_to_f32(c))
    if "ftz" in i.parts:
        return lambda a, c: f(fm.flush(a), fm.flush(c))
    return f


@opcode("setp")
def _setp(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 3, 4)
    t = d.type_of(i)
    mods = d.modifiers(i, (*_COMPARE, "ne", "ftz", "and", "or", "xor"))
    if t.kind == "x":
        d.refuse(i)
    f = comparison(d, i, t)
    first, second = d.result_and_predicate(i, o[0])
    w = d.write(i, first)
    w2 = d.write(i, second) if second is not None else None
    x, y = d.read(i, o[1], t), d.read(i, o[2], t)
    join = next((g for n, g in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)) if n in mods), None)
    z = d.read(i, o[3], TYPES["pred"]) if len(o) == 4 else None
    if (join is None) != (z is None):
        d.refuse(i)

    def step(b: Batch) -> None:
        r = f(x(b), y(b))
        if z is not None and join is not None:
            p = z(b)
            w(b, join(r, p))
            if w2 is not None:
                w2(b, join(~r, p))
            return
        w(b, r)
        if w2 is not None:
            w2(b, ~r)

    return step


@opcode("set")
def _set(d: Decoder, i: Instruction) -> Step:
    to, t = d.type_of(i, 0), d.type_of(i, 1)
    d.modifiers(i, (*_COMPARE, "ne", "ftz"))
    f = comparison(d, i, t)
    true = to.dtype.type(1) if to.kind == "f" else ~np.dtype(f"u{to.size}").type(0)
    return _step2(d, i, t, lambda a, c: np.where(f(a, c), true, true.dtype.type(0)))


@opcode("selp")
def _selp(d: Decoder, i: Instruction) -> Step:
    t = d.type_of(i)
    d.modifiers(i, ())
    o = d.operands(i, 4)
    w = d.write(i, o[0])
    x, y, z = d.read(i, o[1], t), d.read(i, o[2], t), d.read(i, o[3], TYPES["pred"])
    maybe = [d.index[p.name] for p in o[1:3] if isinstance(p, Register) and p.name in d.index]

    def step(b: Batch) -> None:
        if not any(k in b.partial or b.regs[k] is None for k in maybe):
            w(b, np.where(z(b), x(b), y(b)))
            return
        # only the operand a thread takes must be defined
        p = np.broadcast_to(b.active(z(b)), b.act.shape)
        act = b.act
        for read, chosen in ((x, act[p]), (y, act[~p])):
            if len(chosen):
                b.select(chosen)
                w(b, np.array(read(b)))
        b.select(act)

    return step


@opcode("slct")
def _slct(d: Decoder, i: Instruction) -> Step:
    t, by = d.type_of(i, 0), d.type_of(i, 1)
    return _step3(d, i, (t, t, by), lambda a, c, e: np.where(e >= 0, a, c))
