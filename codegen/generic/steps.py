"""The small kernels around the body of a loop whose length is known at run time: its counter, and the slices of a pass.

The counter is an i64 in memory. Pass n of a loop over `length` works on element n, in a reversed one on length - 1 - n.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from ...ir.dims import Dim, product
from ...ir.dtypes import bool_, i64
from ...ir.expr import Expr, binary, const, lift, load, var
from ...ir.target import Target
from ...ir.types import TensorType
from ..loop_ir import Buffer, Kernel, Let, Stmt, Store
from .elementwise import box
from .index import Space
from .loops import UNKNOWN, kernel

_COUNTER: Final = Buffer("counter", i64, (1,), align=8)


def start_kernel(symbols: Sequence[str]) -> Kernel:
    """counter = 0."""
    return kernel("loop_start", Space(), [_COUNTER], [Store(_COUNTER, (const(0),), const(0))], symbols, "counter = 0")


def step_kernel(symbols: Sequence[str]) -> Kernel:
    """counter = counter + 1."""
    more = binary("add", load(_COUNTER, (const(0),), i64), 1)
    return kernel("loop_step", Space(), [_COUNTER], [Store(_COUNTER, (const(0),), more)], symbols, "counter = counter + 1")


def test_kernel(length: Dim, symbols: Sequence[str]) -> Kernel:
    """again = counter < length."""
    again = Buffer("again", bool_, (1,), align=1)
    found = binary("lt", load(_COUNTER, (const(0),), i64), lift(length))
    body = [Store(again, (const(0),), found)]
    return kernel("loop_test", Space(), [_COUNTER, again], body, symbols, f"again = counter < {length}")


def slice_kernel(t: TensorType, length: Dim, reverse: bool, target: Target, symbols: Sequence[str]) -> Kernel:
    """y = x[place of this pass], an element of type t."""
    return _moved("slice", t, length, reverse, target, symbols)


def stack_kernel(t: TensorType, length: Dim, reverse: bool, target: Target, symbols: Sequence[str]) -> Kernel:
    """y[place of this pass] = x, an element of type t."""
    return _moved("stack", t, length, reverse, target, symbols)


def _moved(what: str, t: TensorType, length: Dim, reverse: bool, target: Target, symbols: Sequence[str]) -> Kernel:
    space = Space()
    x = Buffer("x", t.dtype, (UNKNOWN,), align=t.dtype.itemsize, writable=False)
    y = Buffer("y", t.dtype, (UNKNOWN,), align=t.dtype.itemsize)
    n = space.size(product(t.shape))
    axis = space.axis("i", n)
    place = var("place")
    count: Expr = load(_COUNTER, (const(0),), i64)
    if reverse:
        count = binary("sub", binary("sub", lift(length), 1), count)
    here: Expr = axis.var if n != 1 else const(0)
    far = space.simplify(binary("add", binary("mul", place, space.expr(n)), here))
    at, source = (here, far) if what == "slice" else (far, here)
    store = (y, at, load(x, (source,), t.dtype))
    stmts, _ = box(space, [axis] if n != 1 else [], (store,), target, itertools.count())
    body: list[Stmt] = [Let(place, count), *stmts]
    doc = f"{what} {t} of {length}{' reversed' if reverse else ''}"
    return kernel(what, space, [x, _COUNTER, y], body, symbols, doc)


__all__ = ["slice_kernel", "stack_kernel", "start_kernel", "step_kernel", "test_kernel"]
