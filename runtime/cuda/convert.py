"""Moves, packing and unpacking, conversions between types, byte permutation, address-space conversions."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from . import float_math as fm
from .decode import Decoder, Step, Value, opcode, undefined
from .memory import LOCAL_BASE, SHARED_BASE, WINDOW
from .ptx_parse import Immediate, Instruction, Register, Symbol, Vector
from .ptx_types import TYPES, UNSIGNED
from .state import Batch

BASES: Final = {"global": 0, "const": 0, "param": 0, "shared": SHARED_BASE, "local": LOCAL_BASE}


@opcode("mov")
def _mov(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2)
    t = d.type_of(i)
    d.modifiers(i, ())
    if isinstance(o[0], Vector):
        return _unpack(d, i, o[0])
    if isinstance(o[1], Vector):
        return _pack(d, i, o[1])
    w, source = d.write(i, o[0]), o[1]
    if isinstance(source, Register) and source.name in d.index and isinstance(o[0], Register) and o[0].name in d.index:
        k, to, name = d.index[source.name], d.index[o[0].name], source.name
        if d.types[k].size != d.types[to].size or (d.types[k].kind == "p") != (t.kind == "p"):
            d.refuse(i, f"{source.name} and {o[0].name} differ in size")

        def copy(b: Batch) -> None:
            v, known = b.regs[k], b.partial.get(k)
            if v is None:
                undefined(b, k, name)
            if known is not None:  # a copy of what is not known is not known either, and no mistake yet
                act = b.act[known[b.act]]
                if len(act) < len(b.act):
                    keep = b.act
                    if len(act):
                        b.select(act)
                        b.ix = act
                        w(b, v[act])
                        b.select(keep)
                    _forget(b, to, keep[~known[keep]])
                    return
            w(b, v.copy() if b.ix is None or not v.ndim else v[b.ix])

        return copy
    read = d.read(i, source, t)
    if isinstance(source, Immediate | Symbol):
        return lambda b: w(b, read(b))
    return lambda b: w(b, np.array(read(b)))


def _forget(b: Batch, k: int, threads: Any) -> None:
    """Marks a register as unknown in some threads."""
    now = b.regs[k]
    if now is None:
        return
    if not now.ndim:
        b.regs[k] = np.full(b.threads, now)
    known = b.partial.setdefault(k, np.ones(b.threads, np.bool_))
    known[threads] = False


def _unpack(d: Decoder, i: Instruction, to: Vector) -> Step:
    t = d.type_of(i)
    n = len(to.items)
    part = t.size // n
    if part not in UNSIGNED or part * n != t.size:
        d.refuse(i)
    writes = [d.write(i, o) for o in to.items]
    u, narrow = UNSIGNED[t.size], UNSIGNED[part]
    read = d.read(i, i.operands[1], TYPES[f"b{t.bits}"])

    def step(b: Batch) -> None:
        v = read(b)
        for k, w in enumerate(writes):
            w(b, (v >> u.type(8 * part * k)).astype(narrow))

    return step


def _pack(d: Decoder, i: Instruction, source: Vector) -> Step:
    t = d.type_of(i)
    part = t.size // len(source.items)
    if part not in UNSIGNED or part * len(source.items) != t.size:
        d.refuse(i)
    reads = [d.read(i, o, TYPES[f"b{8 * part}"]) for o in source.items]
    u = UNSIGNED[t.size]
    w = d.write(i, i.operands[0])

    def step(b: Batch) -> None:
        r: Value = u.type(0)
        for k, read in enumerate(reads):
            r = r | (read(b).astype(u) << u.type(8 * part * k))
        w(b, r)

    return step


@opcode("cvta")
def _cvta(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2)
    t = d.type_of(i)
    back = "to" in i.parts
    space = next((p for p in i.parts if p in BASES), "")
    if not space or t.size != 8:
        d.refuse(i)
    base = np.uint64(BASES[space])
    w, read = d.write(i, o[0]), d.read(i, o[1], t)
    return lambda b: w(b, read(b) - base if back else read(b) + base)


@opcode("isspacep")
def _isspacep(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2)
    w, read = d.write(i, o[0]), d.read(i, o[1], TYPES["u64"])
    base = BASES.get(i.parts[1], -1)
    if base < 0:
        d.refuse(i)

    def step(b: Batch) -> None:
        v = read(b)
        if base:
            w(b, (v >= np.uint64(base)) & (v < np.uint64(base + WINDOW)))
        else:
            w(b, v >= np.uint64(LOCAL_BASE + WINDOW))

    return step


@opcode("prmt")
def _prmt(d: Decoder, i: Instruction) -> Step:
    """Four bytes chosen from eight; in the default mode bit 3 of a selector copies the byte's sign."""
    o = d.operands(i, 4)
    if d.modifiers(i, ()):
        d.refuse(i)
    u = TYPES["u32"]
    w = d.write(i, o[0])
    x, y, z = (d.read(i, p, u) for p in o[1:])

    def step(b: Batch) -> None:
        both = (y(b).astype(np.uint64) << np.uint64(32)) | x(b).astype(np.uint64)
        s = z(b).astype(np.uint64)
        r: Value = np.uint32(0)
        for k in range(4):
            sel = s >> np.uint64(4 * k)
            byte = (both >> ((sel & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            byte = np.where(sel & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            r = r | (byte.astype(np.uint32) << np.uint32(8 * k))
        w(b, r)

    return step


_INTEGRAL: Final = ("rni", "rzi", "rmi", "rpi")
_NEAR: Final = ("rn", "rz", "rm", "rp", "rna")
_ROUND: Final = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def _cvt(d: Decoder, i: Instruction) -> Step:
    o = d.operands(i, 2, 3)
    to, t = d.type_of(i, 0), d.type_of(i, 1)
    mods = d.modifiers(i, (*_INTEGRAL, *_NEAR, "sat", "ftz", "relu", "satfinite"))
    mode = next((m for m in mods if m in _INTEGRAL + _NEAR), "")
    sat = "sat" in mods
    w = d.write(i, o[0], to.size if to.kind not in "fx" else 0)
    if to.kind == "x":
        return _cvt_pair(d, i, to.name, mods)
    if len(o) != 2 or "satfinite" in mods:
        d.refuse(i)
    x = d.read(i, o[1], t, exact=False)
    if t.kind == "f" and to.kind == "f":
        return _cvt_float(d, i, mode, mods)
    if t.kind == "f":
        if mode not in _INTEGRAL:
            d.refuse(i, "a rounding to an integer is missing")
        if t.name == "bf16":
            return lambda b: w(b, fm.to_integer(fm.bf16_to_f32(x(b)), to.dtype, mode))
        if "ftz" in mods:
            return lambda b: w(b, fm.to_integer(fm.flush(x(b)), to.dtype, mode))
        return lambda b: w(b, fm.to_integer(x(b), to.dtype, mode))
    if to.kind == "f":
        return _cvt_from_integer(d, i, mode, sat)
    if sat:
        info = np.iinfo(to.dtype)

        def clamp(b: Batch) -> None:
            v = x(b)
            least, most = np.iinfo(v.dtype).min, np.iinfo(v.dtype).max
            w(b, np.clip(v, v.dtype.type(max(least, info.min)), v.dtype.type(min(most, info.max))).astype(to.dtype))

        return clamp
    return lambda b: w(b, x(b).astype(to.dtype))


def _cvt_from_integer(d: Decoder, i: Instruction, mode: str, sat: bool) -> Step:
    o, to, t = i.operands, d.type_of(i, 0), d.type_of(i, 1)
    w, x = d.write(i, o[0]), d.read(i, o[1], t, exact=False)
    if mode not in ("rn", "rz", "rm", "rp") or sat:
        d.refuse(i)
    if to.name == "f32" and t.size < 8:  # exact in fp64
        return lambda b: w(b, fm.directed32(x(b).astype(np.float64), mode).astype(np.float32))
    if mode != "rn":
        d.refuse(i)
    if to.name == "bf16":
        return lambda b: w(b, fm.f64_to_bf16(x(b).astype(np.float64)))
    return lambda b: w(b, x(b).astype(to.dtype))


def _cvt_float(d: Decoder, i: Instruction, mode: str, mods: set[str]) -> Step:
    o, to, t = i.operands, d.type_of(i, 0), d.type_of(i, 1)
    w = d.write(i, o[0])
    if to.name == "tf32":
        if mode not in ("rna", "rn") or t.name != "f32":
            d.refuse(i)
        x = d.read(i, o[1], t)
        if mode == "rna":
            return lambda b: w(b, fm.round_tf32(x(b)))
        d.refuse(i)
    x = d.read(i, o[1], t)
    ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    if mode in _INTEGRAL and (to.name != t.name or to.name == "bf16"):
        d.refuse(i)

    def convert(v: Value) -> Value:
        if ftz and t.name == "f32":
            v = fm.flush(v)
        if mode in _INTEGRAL:
            v = _ROUND[mode](v)
        wide = fm.bf16_to_f32(v) if t.name == "bf16" else v
        if relu:
            wide = np.where(np.isnan(wide), wide, np.where(wide > 0, wide, wide.dtype.type(0)))
        if sat:
            wide = np.where(wide >= 1, wide.dtype.type(1), np.where(wide > 0, wide, wide.dtype.type(0)))
        if to.name == "bf16":
            if wide.dtype == np.float64:
                return fm.f64_to_bf16(wide)
            return fm.f32_to_bf16(wide, mode or "rn")
        if to.name == "f32" and wide.dtype == np.float64 and mode in ("rz", "rm", "rp"):
            r = fm.directed32(wide, mode).astype(np.float32)
        elif to.name == "f16" and mode == "rz":
            r = wide.astype(np.float16)
            r = np.where(np.abs(r.astype(np.float64)) > np.abs(wide), np.nextafter(r, np.float16(0)), r)
        elif mode in ("rm", "rp", "rna"):
            d.refuse(i)
        else:
            r = wide.astype(to.dtype)
        return fm.flush(r) if ftz and to.name == "f32" else r

    roundings = {"f32": ("rn", "rz", "rm", "rp"), "bf16": ("rn", "rz", "rna")}.get(to.name, ("rn", "rz"))
    if to.size < t.size and mode not in roundings:
        d.refuse(i, "a rounding is missing")
    if to.name == "bf16" and mode not in ("rn", "rz", "rna", ""):
        d.refuse(i)
    return lambda b: w(b, convert(x(b)))


def _cvt_pair(d: Decoder, i: Instruction, name: str, mods: set[str]) -> Step:
    """cvt.rn.bf16x2.f32 d, a, b: a to the upper half, b to the lower."""
    o = d.operands(i, 3)
    f32 = TYPES["f32"]
    mode = "rz" if "rz" in mods else "rn"
    if mods - {"rn", "rz", "relu"} or (name == "f16x2" and mode == "rz"):
        d.refuse(i)
    w, x, y = d.write(i, o[0]), d.read(i, o[1], f32), d.read(i, o[2], f32)

    def half(v: Value) -> Value:
        if "relu" in mods:
            v = np.where(np.isnan(v), v, np.where(v > 0, v, np.float32(0)))
        if name == "bf16x2":
            return fm.f32_to_bf16(v, mode).astype(np.uint32)
        return v.astype(np.float16).view(np.uint16).astype(np.uint32)

    return lambda b: w(b, (half(x(b)) << np.uint32(16)) | half(y(b)))
