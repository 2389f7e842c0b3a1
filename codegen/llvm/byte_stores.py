"""Several vectors of f32 that are rounded to u8 and stored side by side: packed into one vector of bytes, stored once.

    store y[i]     = cast(u8, round(a))                  p = packssdw(cvtps2dq(min(a, 255)), cvtps2dq(min(b, 255)))
    store y[i + n] = cast(u8, round(b))        ->        q = packssdw(cvtps2dq(min(c, 255)), ...)
    ...                                                  store y[i] = dwords of packuswb(p, q), put in order

Both packings saturate, which makes 0 of what is negative; of a NaN, and of what is below every i32, the conversion makes the
least i32. (One instruction truncates and stores a vector, but it takes two operations, and the limits two more.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...ir.dtypes import f32, u8
from ...ir.expr import Expr, postorder
from ..loop_ir import Stmt, Store
from .types import literal

if TYPE_CHECKING:
    from .kernel import KernelText

MOST: Final = 4  # vectors of f32 whose bytes fill one
_PACK: Final = {
    16: ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"),
    8: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"),
    4: ("llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packuswb.128"),
}


def _rounded(s: Stmt, lanes: int) -> Expr | None:
    """a where the statement stores cast(u8, round(a)) of a whole vector."""
    if not isinstance(s, Store) or s.mask is not None or s.nontemporal or s.buffer.dtype is not u8:
        return None
    value = s.value
    if value.op != "cast" or value.lanes != lanes or value.args[0].op != "round":
        return None
    inner = value.args[0].args[0]
    return inner if inner.dtype is f32 else None


def store_packed(text: KernelText, body: Sequence[Stmt], at: int) -> int:
    """Emits the stores from `at` on that are of this kind; how many, 0 if it is not worth it or the target has no packing."""
    lanes = text.module.target.lanes(32)
    first = body[at]
    if lanes not in _PACK or text.module.checked or not text.module.target.name.startswith("x86") or not isinstance(first, Store):
        return 0
    values: list[Expr] = []
    place = None
    for k, s in enumerate(body[at : at + MOST]):
        value = _rounded(s, lanes)
        if value is None or not isinstance(s, Store) or s.buffer is not first.buffer:
            break
        scalar, wide = text._split(s.buffer, s.index, lanes)
        if wide is not None:
            break
        if place is None:
            place = scalar
        if scalar.terms != place.terms or scalar.constant != place.constant + k * lanes:
            break
        if any(e.op == "load" and e.attr[0].name == first.buffer.name for e in postorder([value])):
            break  # it may read what the store before it has written
        values.append(value)
    if place is None or len(values) < 2:
        return 0
    bytes_ = _pack(text, [text.value(v) for v in values], lanes)
    count = len(values) * lanes
    p = text.address(first.buffer, place)
    text.line(f"store <{count} x i8> {bytes_}, ptr {p}, align {text.alignment(first.buffer, place)}")
    return len(values)


def _pack(text: KernelText, values: Sequence[str], n: int) -> str:
    """The bytes of two to four vectors of n numbers, in order."""
    v, w, narrow = f"<{n} x float>", f"<{n} x i32>", f"<{2 * n} x i16>"
    most = literal(255.0, f32, n)
    whole = []
    for x in values:
        below = text.choose(text.compare("fcmp ogt", "float", n, x, most), "float", n, most, x)  # a NaN stays
        whole.append(_converted(text, below, n, v, w))
    words, octets = _PACK[n]
    whole += [whole[-1]] * (MOST - len(whole))
    low = text.call(words, narrow, [(w, whole[0]), (w, whole[1])], f"{w}, {w}")
    high = low if len(values) == 2 else text.call(words, narrow, [(w, whole[2]), (w, whole[3])], f"{w}, {w}")
    packed = text.call(octets, f"<{4 * n} x i8>", [(narrow, low), (narrow, high)], f"{narrow}, {narrow}")
    # 128 bits of it hold four numbers of each vector
    groups = n // 4
    order = ", ".join(f"i32 {g * 4 + k}" for k in range(len(values)) for g in range(groups))
    count = len(values) * groups
    dwords = text.t(f"bitcast <{4 * n} x i8> {packed} to {w}")
    ordered = text.t(f"shufflevector {w} {dwords}, {w} poison, <{count} x i32> <{order}>")
    return text.t(f"bitcast <{count} x i32> {ordered} to <{4 * count} x i8>")


def _converted(text: KernelText, x: str, n: int, v: str, w: str) -> str:
    """To i32, halves to even; the least i32 of a NaN and of what has none."""
    if n == 16:
        given = [(v, x), (w, "zeroinitializer"), ("i16", "-1"), ("i32", "4")]  # 4: as this thread rounds
        return text.call("llvm.x86.avx512.mask.cvtps2dq.512", w, given, f"{v}, {w}, i16, i32 immarg")
    return text.call("llvm.x86.avx.cvt.ps2dq.256" if n == 8 else "llvm.x86.sse2.cvtps2dq", w, [(v, x)], v)
