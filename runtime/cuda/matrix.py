"""Matrix instructions of the tensor cores: ldmatrix, stmatrix, mma.sync.

Products are exact. Floating-point sums run in fp64, the products from k = 0 on, then C, and are rounded once to the
accumulator's type: every machine gives the same bits. A GPU adds the products of one instruction with fewer bits and in an order
it does not promise: results agree within a few units of fp32. Of a tf32 operand the last 13 bits are dropped, as the hardware
does. Integer sums are exact, modulo 2^32 without `.satfinite`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from . import float_math as fm
from .counters import note_shared
from .decode import Decoder, Step, WarpStep, opcode
from .ptx_parse import Instruction, Operand
from .ptx_types import TYPES, WARP
from .state import Array, Batch

_LANE: Final = np.arange(WARP)
_ROW: Final = _LANE >> 2
_QUAD: Final = _LANE & 3


def _whole_warps(b: Batch) -> int:
    """How many warps are active. Faults where one is not whole (the scheduler has waited for its lanes)."""
    n = len(b.act) // WARP
    if n * WARP != len(b.act) or ((b.act.reshape(n, WARP) - _LANE) % WARP != (b.act.reshape(n, WARP)[:, :1]) % WARP).any():
        b.fault("divergent warp", "a matrix instruction needs all 32 lanes of a warp", b.act)
    return n


@opcode("ldmatrix", "stmatrix")
def _ldmatrix(d: Decoder, i: Instruction) -> Step:
    """8x8 matrices of 16-bit elements: lane 8m + r gives the address of row r of matrix m; each lane gets (puts) the elements
    (row lane / 4, columns 2 (lane % 4) and the next), with .trans those of the transposed matrix."""
    load = i.parts[0] == "ldmatrix"
    mods = d.modifiers(i, ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"))
    n = next((int(m[1]) for m in mods if m in ("x1", "x2", "x4")), 0)
    o = d.operands(i, 2)
    registers = d.each(o[0] if load else o[1])
    if "m8n8" not in mods or d.type_of(i).name != "b16" or len(registers) != n or not {"shared", "shared::cta"} & mods:
        d.refuse(i)
    address, _ = d.address(i, o[1] if load else o[0])
    trans = "trans" in mods
    writes = [d.result(i, r) for r in registers] if load else []
    reads = [d.wanted(i, r, TYPES["b32"]) for r in registers] if not load else []

    def rows(b: Batch, m: int, at: Array) -> tuple[Array, Array]:
        warps = _whole_warps(b)
        a = at.reshape(warps, WARP)[:, 8 * m : 8 * m + 8].reshape(-1)
        who = b.act.reshape(warps, WARP)[:, 8 * m : 8 * m + 8].reshape(-1)
        if b.count:
            note_shared(b.counters, b, a, 16, who)
        return b.touch("shared", a, 16, "r" if load else "w", who) // 2, who

    def step_load(b: Batch) -> None:
        at = address(b)
        data = b.shared.data.view(np.uint16)
        for m, w in enumerate(writes):
            first, _ = rows(b, m, at)
            t = data[first[:, None] + np.arange(8)].reshape(-1, 8, 8)
            if trans:
                t = t.transpose(0, 2, 1)
            pair = np.stack([t[:, _ROW, 2 * _QUAD], t[:, _ROW, 2 * _QUAD + 1]], -1)
            w(b, np.ascontiguousarray(pair).view(np.uint32).reshape(-1))

    def step_store(b: Batch) -> None:
        at = address(b)
        data = b.shared.data.view(np.uint16)
        for m, r in enumerate(reads):
            first, _ = rows(b, m, at)
            v = np.broadcast_to(r(b), b.act.shape)
            pair = np.ascontiguousarray(v).view(np.uint16).reshape(-1, WARP, 2)
            t = np.zeros((len(pair), 8, 8), np.uint16)
            t[:, _ROW, 2 * _QUAD], t[:, _ROW, 2 * _QUAD + 1] = pair[..., 0], pair[..., 1]
            if trans:
                t = t.transpose(0, 2, 1)
            data[first[:, None] + np.arange(8)] = t.reshape(-1, 8)

    return WarpStep(step_load if load else step_store, None)


@dataclass(frozen=True)
class Shape:
    """m, n, k of an mma and how many elements one 32-bit (f64: 64-bit) register of A and B holds."""

    m: int
    n: int
    k: int
    per: int

    @property
    def a(self) -> list[tuple[Array, Array]]:
        """(row, first column) of each register of A, per lane."""
        halves = self.m // 8
        n = halves * self.k // (4 * self.per)
        return [(_ROW + 8 * (r % halves), (_QUAD + r // halves * 4) * self.per) for r in range(n)]

    @property
    def b(self) -> list[tuple[Array, Array]]:
        """(first row, column) of each register of B, per lane."""
        return [(_QUAD * self.per + r * 4 * self.per, _ROW) for r in range(self.k // (4 * self.per))]

    @property
    def c(self) -> list[tuple[Array, Array]]:
        """(row, column) of each element of C and D, per lane."""
        return [(_ROW + 8 * (r // 2), 2 * _QUAD + r % 2) for r in range(self.m * self.n // WARP)]


_SHAPES: Final = {
    "f16": ("m16n8k8", "m16n8k16"), "bf16": ("m16n8k8", "m16n8k16"), "tf32": ("m16n8k4", "m16n8k8"),
    "s8": ("m8n8k16", "m16n8k16", "m16n8k32"), "u8": ("m8n8k16", "m16n8k16", "m16n8k32"), "f64": ("m8n8k4",),
}  # fmt: skip


def _elements(v: Array, name: str) -> Array:
    """The elements in a register of A or B: (warps, 32) to (warps, 32, elements), exact in fp64 or int64."""
    if name == "f64":
        return v.view(np.float64)[..., None]
    if name == "tf32":
        return fm.tf32(v.view(np.float32)).astype(np.float64)[..., None]
    kind = {"f16": np.float16, "bf16": np.uint16, "s8": np.int8, "u8": np.uint8}[name]
    e = np.ascontiguousarray(v).view(kind).reshape(*v.shape, -1)
    if name == "bf16":
        return fm.bf16_to_f32(e).astype(np.float64)
    return e.astype(np.float64) if name == "f16" else e.astype(np.int64)


@opcode("mma")
def _mma(d: Decoder, i: Instruction) -> Step:
    """D = A B + C on fragments spread over a warp: A by rows, B by columns."""
    shape = next((p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p)), "")
    mods = d.modifiers(i, ("sync", "aligned", shape, "row", "col", "satfinite"))
    if [p for p in i.parts if p in ("row", "col")] != ["row", "col"]:
        d.refuse(i, "only row.col")
    o = d.operands(i, 4)
    td, ta, tb, tc = (d.type_of(i, k) for k in range(4)) if sum(p in TYPES for p in i.parts) == 4 else d.refuse(i)
    if shape not in _SHAPES.get(ta.name, ()) or shape not in _SHAPES.get(tb.name, ()) or td.name != tc.name:
        d.refuse(i)
    integer = ta.name in ("s8", "u8")
    if td.name != ("s32" if integer else "f64" if ta.name == "f64" else "f32") and not (td.name == "f16" == ta.name):
        d.refuse(i)
    m, n, k = (int(x) for x in re.findall(r"\d+", shape))
    s = Shape(m, n, k, {"f64": 1, "tf32": 1}.get(ta.name, 4 // ta.size))
    word = TYPES["b64" if ta.name == "f64" else "b32"]
    half = td.name == "f16"

    def fragment(operand: Operand, count: int, name: str) -> list[Any]:
        items = d.each(operand)
        if len(items) != count:
            d.refuse(i, f"{len(items)} registers where {count} belong")
        return [d.wanted(i, r, TYPES[name]) for r in items]

    a, c = fragment(o[1], len(s.a), word.name), len(s.c) // (2 if half else 1)
    b_ = fragment(o[2], len(s.b), word.name)
    acc = fragment(o[3], c, "b32" if half else tc.name)
    out = d.each(o[0])
    if len(out) != c:
        d.refuse(i)
    writes = [d.result(i, r) for r in out]
    kind = np.int64 if integer else np.float64

    def step(b: Batch) -> None:
        warps = _whole_warps(b)

        def lanes(v: Any) -> Array:
            return np.broadcast_to(v, b.act.shape).reshape(warps, WARP)

        x, y = np.zeros((warps, m, k), kind), np.zeros((warps, k, n), kind)
        z = np.zeros((warps, m, n), kind)
        for read, (row, col) in zip(a, s.a, strict=True):
            e = _elements(lanes(read(b)), ta.name)
            for j in range(s.per):
                x[:, row, col + j] = e[..., j]
        for read, (row, col) in zip(b_, s.b, strict=True):
            e = _elements(lanes(read(b)), tb.name)
            for j in range(s.per):
                y[:, row + j, col] = e[..., j]
        values = [lanes(read(b)) for read in acc]
        if half:
            pairs = [_elements(v, "f16") for v in values]
            values = [p[..., j] for p in pairs for j in range(2)]
        for v, (row, col) in zip(values, s.c, strict=True):
            z[:, row, col] = v
        total: Array = x[:, :, 0, None] * y[:, 0, None, :]
        for step in range(1, k):  # an order of its own, not a library's
            total += x[:, :, step, None] * y[:, step, None, :]
        total += z
        if integer and "satfinite" in mods:
            total = np.clip(total, -(2**31), 2**31 - 1)
        result: Array = total.astype(td.dtype)
        parts: list[Array] = [np.ascontiguousarray(result[:, row, col]).reshape(-1) for row, col in s.c]
        if half:
            pairs_ = [np.ascontiguousarray(np.stack(p, -1)) for p in zip(parts[::2], parts[1::2], strict=True)]
            parts = [p.view(np.uint32).reshape(-1) for p in pairs_]
        for w, v in zip(writes, parts, strict=True):
            w(b, v)

    return WarpStep(step, None)
