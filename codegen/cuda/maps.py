"""Maps: one thread computes 16 bytes of the output where memory allows, else one element."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod
from typing import Final

from ...ir.expr import Expr, binary, var
from ...ir.graph import Graph
from ...ir.target import Target
from ..groups import Body, Lowered, body_name, cost, lowered, static_shape
from ..loop_ir import Buffer, If, Let, Stmt, Store
from ..maps import Box, in_place_pairs, loads_of, merge_axes, output_stores, restrict, split_axes, stride_along
from ..nests import Axis, Spot, store_piece
from .grid import BLOCK, BX, TX, launch, over

WIDEST: Final = 16  # bytes of one access
MOST_WORK: Final = 160  # instructions of a thread up to which values of its elements fit registers at once


def lower_map(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of a group whose nodes are all maps and views: one for each size of its outputs."""
    body = Body(graph, aligns)
    sizes: dict[int, list[int]] = {}
    for k, n in enumerate(graph.outputs):
        sizes.setdefault(prod(static_shape(n)), []).append(k)
    statements: list[Stmt] = []
    pairs: frozenset[tuple[int, int]] = frozenset()
    notes: list[str] = []
    for size, outputs in sizes.items():
        if size:
            part, pairs, note = map_outputs(body, outputs)
            statements.append(part)
            notes.append(note)
    pairs = pairs if len(sizes) == 1 else frozenset()
    return lowered(body, name, statements, doc=f"map: {body_name(graph)}", in_place=pairs, parallel=True, note="; ".join(notes))


def map_outputs(body: Body, outputs: Sequence[int], tag: str = "") -> tuple[Stmt, frozenset[tuple[int, int]], str]:
    """The launch that computes some outputs, all of one size above 0; the pairs that may share memory; and a note."""
    kept, stores = output_stores(body, outputs)
    box = merge_axes(restrict(*split_axes(kept, stores)))
    pairs = in_place_pairs(body, [box], outputs)
    stmt, lanes = box_launch(box, tag)
    return stmt, pairs, f"{lanes} elements a thread" if lanes > 1 else ""


def box_launch(box: Box, tag: str = "") -> tuple[Stmt, int]:
    """A launch over a box, and how many neighbouring elements each thread computes."""
    numbers = count()
    if not box.axes:
        names = [var(f"h{next(numbers)}", v.dtype) for _, _, v in box.stores]
        first: list[Stmt] = [Let(n, v) for n, (_, _, v) in zip(names, box.stores, strict=True)]
        done = [Store(b, (i,), n) for n, (b, i, _) in zip(names, box.stores, strict=True)]
        return over([Axis(var("one"), 1)], [*first, *done], tag), 1
    axis, outer = box.axes[-1], box.axes[:-1]
    lanes = vector_lanes(box, axis)
    strides = [stride_along(box, i, axis.var) for _, i, _ in box.stores]
    piece = store_piece(box.stores, axis.var, strides, numbers, nontemporal=False)
    if lanes == 1:
        return over(box.axes, piece(Spot(axis.var, 1)), tag), 1
    left = axis.extent % lanes
    if left == 0:
        step = var(f"{axis.var.attr}v")
        spot = Spot(binary("add", binary("mul", step, lanes), axis.first), lanes)
        return over([*outer, Axis(step, axis.extent // lanes)], piece(spot), tag), lanes
    # One axis whose length is no multiple: the threads after the last whole vector take an element each.
    whole = axis.extent // lanes
    p = var(f"p{tag}")
    total = whole + left
    wide = piece(Spot(binary("add", binary("mul", p, lanes), axis.first), lanes))
    single = piece(Spot(binary("add", binary("add", p, whole * lanes - whole), axis.first), 1))
    inner: list[Stmt] = [If(p < whole, tuple(wide), (If(p < total, tuple(single)),))]
    return launch(-(-total // BLOCK), BLOCK, [Let(p, binary("add", binary("mul", BX, BLOCK), TX)), *inner]), lanes


def vector_lanes(box: Box, axis: Axis) -> int:
    """How many neighbours along the last axis one access may take: every access runs in steps of one or stays, 16 bytes at most,
    and each lies at a multiple of its size."""
    accesses = [(b, i) for b, i, _ in box.stores] + [(e.attr[0], e.args[0]) for e in loads_of(box.stores)]
    if any(len(e.args) > e.attr[1] for e in loads_of(box.stores)):
        return 1
    moving = []
    for b, i in accesses:
        stride = stride_along(box, i, axis.var)
        if stride not in (0, 1):
            return 1
        if stride == 1:
            moving.append((b, i))
    if any(stride_along(box, i, axis.var) != 1 for _, i, _ in box.stores) or _selects(box, axis):
        return 1
    lanes = min(8, WIDEST // max(int(b.dtype.itemsize) for b, _ in moving))
    work = cost([v for _, _, v in box.stores])
    while lanes > 1 and (lanes * work > MOST_WORK or not _fits(box, moving, axis, lanes)):
        lanes //= 2
    if axis.extent % lanes and axis.extent < 4 * lanes:
        return 1
    return lanes


def _selects(box: Box, axis: Axis) -> bool:
    """Whether a value depends on the axis other than through what it reads: its lanes then do not run in step."""
    reads = set(loads_of(box.stores))
    stack = [v for _, _, v in box.stores]
    seen: set[Expr] = set()
    while stack:
        e = stack.pop()
        if e in seen or e in reads:
            continue
        seen.add(e)
        if e is axis.var:
            return True
        stack += e.args
    return False


def _fits(box: Box, moving: Sequence[tuple[Buffer, Expr]], axis: Axis, lanes: int) -> bool:
    ragged = axis.extent % lanes != 0 and len(box.axes) > 1
    return axis.extent >= 2 * lanes and not ragged and _aligned(box, moving, axis, lanes)


def _aligned(box: Box, moving: Sequence[tuple[Buffer, Expr]], axis: Axis, lanes: int) -> bool:
    """Whether vectors of so many elements lie at multiples of their size: in every row, and in memory from its start."""
    for b, i in moving:
        form = box.simplifier.linear(i)
        if b.align % (lanes * b.dtype.itemsize):
            return False
        offset = form.constant + axis.start
        if offset % lanes or any(c % lanes for a, c in form.terms if a is not axis.var):
            return False
    return True


__all__ = ["box_launch", "lower_map", "map_outputs"]
