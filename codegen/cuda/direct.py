"""Contractions of short reductions whose results lie side by side: a thread adds up the products of one to four of them.

That is what depthwise convolutions are (nine steps, or twenty-five), where a tile of rows and columns would be mostly empty and a
warp for each result mostly idle. Neighbouring threads have neighbouring results, whatever kind of axis that is along, and the
epilogue follows in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...ir.contraction import Contraction
from ...ir.dims import as_int
from ...ir.expr import Expr, binary, cast, const, load, var
from ..groups import row_major, static_shape
from ..loop_ir import Alloc, Buffer, Stmt, Store
from ..maps import ranges_of
from ..nests import Axis, nest, unit_axes
from ..simplify_index import Simplifier
from .grid import over

if TYPE_CHECKING:
    from .contraction import Group, Stream

SHORT: Final = 64  # steps up to which one thread adds them up
FILL: Final = 32768  # threads that fill a device
TOGETHER: Final = 4  # results of a thread, where there are enough for that


def is_direct(g: Group) -> bool:
    """Whether a thread for each result is better than a warp: few steps, or operands that neighbours read side by side."""
    k = g.size["k"]
    if k > SHORT or g.spec.panel:
        return False
    axes = _outer(g)
    if not axes or k <= 8:
        return True
    last = axes[-1]
    strides = [abs(_stride(g.axes, s, last.var.attr)) for s in (g.a, g.b)]
    return max(strides) <= k and min(strides) <= 1


def direct(g: Group) -> tuple[list[Stmt], str]:
    """The launch, and a note."""
    from .contraction import multiply_add

    axes = _outer(g)
    steps = [Axis(var(x.name), as_int(x.extent)) for x in g.axes.of_kind("k")]
    each = 1
    total = g.size["b"] * g.size["m"] * g.size["n"]
    if axes:
        each = next(w for w in (TOGETHER, 2, 1) if axes[-1].extent % w == 0 and (w == 1 or total >= w * FILL // 2))
    thread = [*axes[:-1], Axis(axes[-1].var, axes[-1].extent // each)] if axes else [Axis(var("one"), 1)]
    kept, fixed = unit_axes(steps)
    simplifier = Simplifier(ranges_of([*thread, *kept]))
    acc = Buffer("acc", g.held, (each,), scope="register", align=16)
    at_k = _position(g.axes, "k", {a.var.attr: fixed.get(a.var, a.var) for a in steps})
    inner: list[Stmt] = []
    after: list[Stmt] = []
    for w in range(each):
        values = {a.var.attr: a.var for a in axes}
        if axes and each > 1:
            values[axes[-1].var.attr] = binary("add", binary("mul", axes[-1].var, each), w)
        at = {kind: simplifier.simplify(_position(g.axes, name, values)) for kind, name in _KINDS.items()} | {"k": at_k}
        old = load(acc, (const(w),), g.held)
        left, right = (_element(g, s, kinds, at, simplifier) for s, kinds in ((g.a, "bmk"), (g.b, "bnk")))
        inner.append(Store(acc, (const(w),), multiply_add(left, right, old)))
        after += g.stores(old, at, ranges_of(thread))
    zeros: list[Stmt] = [Store(acc, (const(w),), const(0, g.held)) for w in range(each)]
    note = "a thread for each result" if each == 1 else f"a thread for {each} results"
    return [over(thread, [Alloc(acc), *zeros, *nest(kept, inner), *after])], note


_KINDS: Final = {"b": "batch", "m": "m", "n": "n"}


def _outer(g: Group) -> list[Axis]:
    """The axes of the result that are longer than 1, the one along which its elements are neighbours last."""
    spec = g.axes
    strides: dict[str, int] = {}
    for index, stride in zip(spec.c, row_major(static_shape(g.node)), strict=True):
        for name, c in index.terms:
            strides[name] = strides.get(name, 0) + c * stride
    names = [x for name in _KINDS.values() for x in spec.of_kind(name) if as_int(x.extent) > 1]
    return [Axis(var(x.name), as_int(x.extent)) for x in sorted(names, key=lambda x: -strides[x.name])]


def _position(spec: Contraction, kind: str, values: dict[str, Expr]) -> Expr:
    """The flattened position along a kind of axis."""
    total: Expr = const(0)
    for x in spec.of_kind(kind):
        total = binary("add", binary("mul", total, as_int(x.extent)), values.get(x.name, const(0)))
    return total


def _stride(spec: Contraction, s: Stream, name: str) -> int:
    """How far apart in an operand neighbours along an axis lie; a large number where no one distance is known."""
    kind = next(short for short, long in _KINDS.items() if any(x.name == name for x in spec.of_kind(long)))
    if kind not in ("b", "m" if s.is_left else "n"):
        return 0
    inside = 1
    for x in reversed(spec.of_kind(_KINDS[kind])):
        if x.name == name:
            break
        inside *= as_int(x.extent)
    simplifier = Simplifier({})
    first, second = (simplifier.simplify(s.offset(kind, const(p))) for p in (0, inside))
    return int(second.attr) - int(first.attr) if first.is_const and second.is_const else 1 << 30


def _element(g: Group, s: Stream, kinds: str, at: dict[str, Expr], simplifier: Simplifier) -> Expr:
    total: Expr = const(s.base)
    for kind in kinds:
        total = binary("add", total, s.offset(kind, at[kind]))
    return cast(load(s.buffer, (simplifier.simplify(total),), s.dtype), g.held)


__all__ = ["direct", "is_direct"]
