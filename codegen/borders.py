"""The border of a padded array whose inside another kernel writes: constants stored around it.

for the leading dimensions that are not padded
  for each padded dimension, at its start and at its end
    for the inside of the dimensions before it: a run of constants
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ..ir.expr import Expr, const, var
from ..ir.padding import Padding
from .loop_ir import Buffer, For, Stmt, Store

MOST_SERIAL: Final = 1 << 18  # bytes from which threads share the work, where there are leading dimensions
STRAIGHT: Final = 16  # stores of a run that stand without a loop


def border(out: Buffer, shape: Sequence[int], padding: Padding, lanes: int) -> list[Stmt]:
    """Stores of the padding's value around the inside of an array of this shape that fills the buffer `out`."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    inside = [n - a - b for n, a, b in zip(shape, padding.low, padding.high, strict=True)]
    padded = [d for d in range(len(shape)) if inside[d] != shape[d]]
    if not padded or 0 in shape:
        return []
    whole = var("border")
    count = math.prod(shape[: padded[0]])
    value = int(padding.value) if out.dtype.is_integer else padding.value
    body: list[Stmt] = []
    for d in padded:
        for first, length in ((0, padding.low[d]), (padding.low[d] + inside[d], padding.high[d])):
            if not length:
                continue
            at: Expr = whole * strides[padded[0] - 1] if count > 1 else const(0)
            loops: list[tuple[Expr, int]] = []
            for e in range(padded[0], d):
                v = var(f"border{e}")
                loops.append((v, inside[e]))
                at = at + (v + padding.low[e]) * strides[e]
            run = tuple(_run(out, at + first * strides[d], length * strides[d], value, lanes))
            for v, n in reversed(loops):
                run = (For(v, const(0), const(n), run),)
            body += run
    if count == 1:
        return body
    outside = count * (math.prod(shape[padded[0] :]) - math.prod(inside[padded[0] :]))
    kind = "parallel" if outside * out.dtype.itemsize > MOST_SERIAL else "serial"
    return [For(whole, const(0), const(count), tuple(body), kind)]


def _run(out: Buffer, at: Expr, length: int, value: float, lanes: int) -> list[Stmt]:
    """`length` constants from an index on: whole vectors, then ever smaller ones."""
    body: list[Stmt] = []
    done = 0
    if length > STRAIGHT * lanes:
        k = var("border_run")
        done = length // lanes * lanes
        body.append(For(k, const(0), const(done), (Store(out, (at + k,), const(value, out.dtype, lanes)),), step=lanes))
    while done < length:
        n = min(lanes, 1 << ((length - done).bit_length() - 1))
        body.append(Store(out, (at + done,), const(value, out.dtype, n)))
        done += n
    return body
