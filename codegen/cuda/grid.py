"""Work spread over a grid: one thread for each point of a box, and what threads of a block or a warp do together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from ...ir.expr import Expr, binary, const, eq, lane_xor, load, var
from ..groups import combine
from ..loop_ir import Alloc, Barrier, Buffer, For, If, Let, Stmt, Store
from ..nests import Axis
from .machine import WARP

BLOCK: Final = 256  # threads, where nothing speaks for another number
BX, TX = var("bx"), var("tx")


def launch(blocks: int | Sequence[int], threads: int, body: Sequence[Stmt], block_vars: Sequence[Expr] = (BX,)) -> For:
    """A launch: `blocks` are the extents of the loops over `block_vars`, the last of them blockIdx.x."""
    extents = [blocks] if isinstance(blocks, int) else list(blocks)
    made: Stmt = For(TX, const(0), const(threads), tuple(body), "thread")
    for v, n in reversed(list(zip(block_vars, extents, strict=True))):
        made = For(v, const(0), const(n), (made,), "block")
    assert isinstance(made, For)
    return made


def places(position: Expr, axes: Sequence[Axis]) -> list[Stmt]:
    """Lets that give each axis its value at a position of the row-major box."""
    done: list[Stmt] = []
    inside = prod(a.extent for a in axes)
    for k, a in enumerate(axes):
        inside //= a.extent
        place = binary("floordiv", position, inside)
        if k:
            place = binary("mod", place, a.extent)
        done.append(Let(a.var, binary("add", place, a.first)))
    return done


def over(axes: Sequence[Axis], body: Sequence[Stmt], tag: str = "", block: int = BLOCK) -> For:
    """A launch with one thread for each point of the axes, the last of them the fastest."""
    total = prod(a.extent for a in axes)
    while block > WARP and block // 2 >= total:
        block //= 2
    p = var(f"p{tag}")
    position = binary("add", binary("mul", BX, block), TX)
    inner: list[Stmt] = [*places(p, axes), *body]
    if total % block:
        inner = [If(p < total, tuple(inner))]
    return launch(-(-total // block), block, [Let(p, position), *inner])


class Names:
    """Fresh names of one kernel."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"


def warp_tree(kind: str, value: Expr, names: Names, width: int = WARP) -> tuple[list[Stmt], Expr]:
    """The values of `width` neighbouring lanes combined: every lane gets the result. Halving distances: a fixed tree."""
    done: list[Stmt] = []
    held = value
    distance = width // 2
    while distance:
        v = var(names("w"), value.dtype)
        done.append(Let(v, combine(kind, held, lane_xor(held, distance))))
        held = v
        distance //= 2
    return done, held


def block_tree(kinds: Sequence[str], values: Sequence[Expr], threads: int, names: Names) -> tuple[list[Stmt], list[Expr]]:
    """Values of all threads of a block combined, each by its kind: every thread gets the results. Warps by shuffles, then their
    results through shared memory in the order of the warps."""
    done: list[Stmt] = []
    parts: list[Expr] = []
    for value, k in zip(values, kinds, strict=True):
        lets, held = warp_tree(k, value, names)
        done += lets
        parts.append(held)
    warps = threads // WARP
    if warps == 1:
        return done, parts
    shared = [Buffer(names("sh"), v.dtype, (warps,), scope="shared", align=16) for v in parts]
    writes = tuple(Store(b, (binary("floordiv", TX, WARP),), v) for b, v in zip(shared, parts, strict=True))
    done += [Alloc(b) for b in shared]
    done += [If(eq(binary("mod", TX, WARP), const(0)), writes), Barrier()]
    results: list[Expr] = []
    for b, k in zip(shared, kinds, strict=True):
        total: Expr = load(b, (const(0),), b.dtype)
        for w in range(1, warps):
            total = combine(k, total, load(b, (const(w),), b.dtype))
        v = var(names("b"), b.dtype)
        done.append(Let(v, total))
        results.append(v)
    return done, results


__all__ = ["BLOCK", "BX", "TX", "Names", "block_tree", "launch", "over", "places", "warp_tree"]
