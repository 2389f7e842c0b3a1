"""Maps: every output element is an expression of operand elements. Elementwise chains, movement, gathers, small windows.

The loops run over the output. Where a comparison or clamp of one loop variable decides between cases (pads, concats,
slices of them), the box is cut there, so that the cases cost nothing in the loops; neighbouring axes that every access
walks in step become one axis; the vector axis is the one with the cheapest accesses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..ir.dtypes import i64
from ..ir.expr import Expr, binary, const, load, minimum, postorder, rebuild, substitute, var
from ..ir.graph import Graph
from ..ir.target import Target
from .groups import Body, Lowered, body_name, cost, flat_index, lanes_for, lowered, static_shape, unflatten
from .loop_ir import Alloc, Buffer, For, Let, Stmt, Store
from .nests import (
    Axis,
    Piece,
    VectorLoop,
    has_masks,
    parallel_lines,
    parallel_nest,
    parallel_vector,
    store_piece,
    unit_axes,
)
from .simplify_index import Simplifier, linear_roots
from .transpose import Transposing

MAX_BOXES: Final = 32
MAX_PIECES: Final = 512
MAX_RESIDUES: Final = 4
MAX_SIDE: Final = 8
MAX_TOGETHER: Final = 64
MIN_TILED: Final = 32  # instructions of a transform of a tile, selects included: of 36 at least in the smallest one
TILE: Final = 16
BRIEF_SIDE: Final = 8  # of a block that is transposed in registers, in code that runs once: 24 shuffles, where 16 take 64
LONG: Final = 16  # tiles side by side that are copied at once, so that what is not transposed is walked in long runs
FAR: Final = 256  # bytes from one element of a tile's row to the next from which the row is copied first
CYCLE_NS: Final = 0.3
BYTES_PER_NS: Final = 15.0


@dataclass(frozen=True, slots=True)
class Box:
    """A part of the output: its axes, and what is stored there (buffer, flat index, value), simplified for it."""

    axes: tuple[Axis, ...]
    stores: tuple[tuple[Buffer, Expr, Expr], ...]
    simplifier: Simplifier

    @property
    def size(self) -> int:
        return int(np.prod([a.extent for a in self.axes], dtype=np.int64))


def ranges_of(axes: Sequence[Axis]) -> dict[Expr, tuple[int, int]]:
    """What the variables of the axes run over."""
    return {a.var: (a.start, a.start + a.extent - 1) for a in axes}


def restrict(axes: Sequence[Axis], stores: Sequence[tuple[Buffer, Expr, Expr]]) -> Box:
    """The box of these axes: stores simplified for their ranges, axes of one element replaced by their value."""
    kept, fixed = unit_axes(axes)
    simplifier = Simplifier(ranges_of(kept))

    memo: dict[Expr, Expr] = {}

    def put(e: Expr) -> Expr:
        return simplifier.simplify(substitute(e, fixed, memo) if fixed else e)

    return Box(tuple(kept), tuple((b, put(i), put(v)) for b, i, v in stores), simplifier)


def loads_of(stores: Sequence[tuple[Buffer, Expr, Expr]]) -> list[Expr]:
    """The distinct loads under the values."""
    return [e for e in postorder([v for _, _, v in stores]) if e.op == "load"]


def inside_atoms(simplifier: Simplifier, roots: Sequence[Expr]) -> set[Expr]:
    """Variables that some index depends on other than linearly."""
    atoms = {a for r in roots for a, _ in simplifier.linear(r).terms if a.op != "var"}
    return {e for e in postorder(atoms) if e.op == "var"}


def merge_axes(box: Box, apart: Callable[[Axis, Axis], bool] = lambda a, b: False) -> Box:
    """Makes one axis of two neighbours wherever all indices walk them in step and they need not stay `apart`."""
    if len(box.axes) < 2:
        return box
    roots = linear_roots([e for _, i, v in box.stores for e in (i, v)])
    forms = [box.simplifier.linear(r) for r in roots]
    tied = inside_atoms(box.simplifier, roots)
    axes: list[Axis] = [box.axes[0]]
    gone: dict[Expr, Expr] = {}
    for b in box.axes[1:]:
        a = axes[-1]
        together = a.var not in tied and b.var not in tied and not apart(a, b)
        # The first axis may itself be a merged one: its coefficient is then that of the variable that was kept.
        if together and all(f.coefficient(a.var) == f.coefficient(b.var) * b.extent for f in forms):
            gone[a.var] = const(a.start)
            axes[-1] = Axis(b.var, a.extent * b.extent, b.start)
        else:
            axes.append(b)
    if not gone:
        return box
    return restrict(axes, [(b, substitute(i, gone), substitute(v, gone)) for b, i, v in box.stores])


def split_axes(
    axes: Sequence[Axis], stores: Sequence[tuple[Buffer, Expr, Expr]]
) -> tuple[list[Axis], list[tuple[Buffer, Expr, Expr]]]:
    """Makes two axes of one whose quotient or remainder by a divisor of its extent is asked for (a reshape does that).

    With v = c * a + b, 0 <= b < c, both v // c = a and v % c = b are linear again.
    """
    todo, done = list(axes), list(stores)
    for _ in range(8 * len(axes)):
        box = restrict(todo, done)
        todo, done = list(box.axes), list(box.stores)
        found = _divided(todo, done)
        if found is None:
            break
        k, c = found
        v = todo[k].var
        outer, inner = var(f"{v.attr}o"), var(f"{v.attr}i")
        moved = {v: binary("add", binary("mul", outer, c), inner)}
        done = [(b, substitute(i, moved), substitute(value, moved)) for b, i, value in done]
        todo[k : k + 1] = [Axis(outer, todo[k].extent // c), Axis(inner, c)]
    return todo, done


def _divided(axes: Sequence[Axis], stores: Sequence[tuple[Buffer, Expr, Expr]]) -> tuple[int, int] | None:
    """An axis (from 0 on) and the least divisor of its extent by which it is divided somewhere."""
    number = {a.var: k for k, a in enumerate(axes) if a.start == 0}
    found: dict[int, int] = {}
    for e in postorder([x for _, i, v in stores for x in (i, v)]):
        if e.op in ("floordiv", "mod") and e.dtype is i64 and e.args[0] in number and e.args[1].is_const:
            k, c = number[e.args[0]], int(e.args[1].attr)
            if 1 < c < axes[k].extent and axes[k].extent % c == 0:
                found[k] = min(c, found.get(k, c))
    return next(iter(found.items()), None)


Stores = Sequence[tuple[Buffer, Expr, Expr]]


def side_by_side(axes: Sequence[Axis], stores: Stores) -> tuple[list[Axis], list[tuple[Buffer, Expr, Expr]]] | None:
    """Stores all elements along some short axes in one visit, where their values differ and yet share most of their arithmetic;
    None where they do not.

    So it is for transforms of small tiles: apart, each of the 36 values of a 6x6 tile would load the tile anew.
    """
    box = restrict(axes, stores)
    points = box.simplifier.breakpoints([v for _, _, v in box.stores])
    short = [a for a in box.axes if a.extent <= MAX_SIDE and len(points.get(a.var, ())) == a.extent - 1]
    if not short or len(stores) * int(np.prod([a.extent for a in short])) > MAX_TOGETHER:
        return None
    left = [a for a in box.axes if a not in short]
    moves: dict[Expr, bool] = {}
    for e in postorder([v for _, _, v in box.stores]):
        moves[e] = any(e is a.var for a in short) or any(moves[a] for a in e.args)
    made: list[tuple[Buffer, Expr, Expr]] = []
    for place in itertools.product(*(range(a.start, a.start + a.extent) for a in short)):
        values = {a.var: const(k) for a, k in zip(short, place, strict=True)}
        made += [(b, substitute(i, values), _taken(v, values, moves)) for b, i, v in box.stores]
    values_of = [v for _, _, v in made]
    return (left, made) if 2 * cost(values_of) <= sum(cost([v]) for v in values_of) else None


def _taken(root: Expr, values: dict[Expr, Expr], moves: dict[Expr, bool]) -> Expr:
    """The expression for these values of variables, only what is selected looked at; `moves`: what depends on the variables."""
    done = dict(values)
    stack = [root]
    while stack:
        e = stack[-1]
        if e in done or not moves[e]:
            stack.pop()
            continue
        if e.op == "select" and (e.args[0] in done or not moves[e.args[0]]):
            test = done.get(e.args[0], e.args[0])
            if test.is_const:
                branch = e.args[1] if test.attr else e.args[2]
                if moves[branch] and branch not in done:
                    stack.append(branch)
                else:
                    done[e] = done.get(branch, branch)
                continue
        args = e.args[:1] if e.op == "select" and moves[e.args[0]] and e.args[0] not in done else e.args
        waiting = [a for a in args if moves[a] and a not in done]
        if waiting:
            stack += waiting
        else:
            done[e] = rebuild(e, tuple(done.get(a, a) for a in e.args))
    return done.get(root, root)


def tiled_boxes(axes: Sequence[Axis], stores: Stores) -> list[Box] | None:
    """Boxes in which tiles are visited whole (`side_by_side`), the last ones along an axis as far as they reach; None where the
    values are no transforms of tiles."""
    if cost([v for _, _, v in stores]) < MIN_TILED:
        return None
    sizes: dict[Expr, int] = {}
    for e in postorder([v for _, _, v in stores]):
        if e.op == "mod" and e.dtype is i64 and e.args[0].op == "var" and e.args[1].is_const and e.args[1].attr <= MAX_SIDE:
            sizes[e.args[0]] = int(e.args[1].attr)
    segments: list[list[Axis]] = []
    for a in axes:
        whole = a.extent - a.extent % sizes.get(a.var, 1) if a.start == 0 else a.extent
        parts = [Axis(a.var, whole, a.start), Axis(a.var, a.extent - whole, a.start + whole)]
        segments.append([x for x in parts if x.extent])
    boxes: list[Box] = []
    for part in itertools.product(*segments):
        box = restrict(part, stores)
        found = side_by_side(*split_axes(box.axes, box.stores))
        if found is None and len(boxes) == 0:
            return None
        boxes += cut(*(found or split_axes(box.axes, box.stores)))
    return boxes


def cut(axes: Sequence[Axis], stores: Sequence[tuple[Buffer, Expr, Expr]], limit: int = MAX_BOXES) -> list[Box]:
    """Boxes that cover the axes, cut where single-variable conditions change, as far as `limit` boxes allow."""
    whole = restrict(axes, stores)
    points = whole.simplifier.breakpoints([v for _, _, v in whole.stores])
    segments: list[list[Axis]] = []
    for axis in whole.axes:
        ends = [axis.start, *sorted(points.get(axis.var, ())), axis.start + axis.extent]
        segments.append([Axis(axis.var, b - a, a) for a, b in itertools.pairwise(ends)])
    if sum(len(s) > 1 for s in segments) == 1:
        limit = max(limit, MAX_PIECES)  # a concat of many parts
    while int(np.prod([len(s) for s in segments], dtype=np.int64)) > limit:
        k = max(range(len(segments)), key=lambda n: len(segments[n]))
        segments[k] = [whole.axes[k]]
    if all(len(s) == 1 for s in segments):
        boxes = [whole]
    else:
        boxes = [restrict(part, whole.stores) for part in itertools.product(*segments)]
    return [part for box in boxes for part in by_residue(box, max(1, 2 * limit // len(boxes)))]


def by_residue(box: Box, limit: int) -> list[Box]:
    """Boxes in which a remainder of one variable is fixed, where it decides something (a pad between elements does that).

    With v = start + c * w + b for each b < c in turn, (v + k) % c is known and (v + k) // c is linear.
    """
    todo, done = [box], list[Box]()
    while todo:
        one = todo.pop()
        found = _remainder(one) if len(todo) + len(done) < limit else None
        if found is None:
            done.append(one)
            continue
        k, c = found
        axis = one.axes[k]
        w = var(f"{axis.var.attr}r")
        for b in range(min(c, axis.extent)):
            moved = {axis.var: binary("add", binary("mul", w, c), axis.start + b)}
            stores = [(buffer, substitute(i, moved), substitute(v, moved)) for buffer, i, v in one.stores]
            axes = list(one.axes)
            axes[k] = Axis(w, -(-(axis.extent - b) // c))
            todo.append(restrict(axes, stores))
    return done


def _remainder(box: Box) -> tuple[int, int] | None:
    """An axis and a small divisor such that a condition asks for the axis' remainder."""
    number = {a.var: k for k, a in enumerate(box.axes)}
    for e in postorder([v for _, _, v in box.stores]):
        if e.op in ("eq", "ne") and e.args[0].op == "mod" and e.args[0].dtype is i64 and e.args[0].args[1].is_const:
            form, c = box.simplifier.linear(e.args[0].args[0]), int(e.args[0].args[1].attr)
            if len(form.terms) == 1 and form.terms[0][0] in number and 1 < c <= MAX_RESIDUES:
                return number[form.terms[0][0]], c
    return None


def stride_along(box: Box, index: Expr, v: Expr) -> int | None:
    """The step of a flat index along v; None where it is not linear in it."""
    form = box.simplifier.linear(index)
    if any(a is not v and v in postorder([a]) for a, _ in form.terms):
        return None
    return form.coefficient(v)


def vector_axis(box: Box, lanes: int) -> int:
    """The position of the axis whose vectors are cheapest; the inner one on a tie."""
    loads = loads_of(box.stores)
    arithmetic = cost([v for _, _, v in box.stores])
    best, choice = float("inf"), len(box.axes) - 1
    for k in range(len(box.axes) - 1, -1, -1):
        axis = box.axes[k]
        vectors = -(-axis.extent // lanes) / axis.extent
        price = 0.5 * arithmetic * vectors + 2.0 / axis.extent
        for e in loads:
            stride = stride_along(box, e.args[0], axis.var)
            price += vectors if stride == 1 else 0.1 * vectors if stride == 0 else 1.0
        for _, index, _ in box.stores:
            price += vectors if stride_along(box, index, axis.var) == 1 else 1.3
        if price < best * 0.98:
            best, choice = price, k
    return choice


def unroll_for(target: Target, stores: Sequence[tuple[Buffer, Expr, Expr]]) -> int:
    """How many vectors one step of the main loop handles: four of cheap code, one of code with long polynomials."""
    work = cost([v for _, _, v in stores])
    streams = len(loads_of(stores)) + len(stores)
    if work <= 8 and streams * 4 <= target.registers:
        return 4
    return 2 if work <= 24 and streams * 2 <= target.registers else 1


def estimate_ns(box: Box, lanes: int) -> float:
    """About how long one thread takes over a box: the greater of memory time and arithmetic time."""
    loads = loads_of(box.stores)
    unit = sum(b.dtype.itemsize for b, _, _ in box.stores) + sum(e.dtype.itemsize for e in loads)
    work = cost([v for _, _, v in box.stores]) + len(loads)
    return box.size * max(unit / BYTES_PER_NS, work * 0.5 * CYCLE_NS / lanes)


def in_place_pairs(body: Body, boxes: Sequence[Box], outputs: Sequence[int] | None = None) -> frozenset[tuple[int, int]]:
    """(output, operand) pairs that may share memory: the operand is read only at the index that is written then.

    All values of a spot are computed before any is stored, so that any choice among the pairs is safe that gives no
    memory to two. `outputs` are the numbers of those that the boxes store, in their order (all, if not given).
    """
    stored = range(len(body.outputs)) if outputs is None else outputs
    number = {b: i for i, b in enumerate(body.buffers)}
    pairs = {
        (k, i)
        for k in stored
        for i, b in enumerate(body.buffers)
        if b.shape == body.outputs[k].shape and b.dtype is body.outputs[k].dtype
    }
    for box in boxes:
        positions = [index for _, index, _ in box.stores]
        for e in loads_of(box.stores):
            if e.attr[0] in number:
                i = number[e.attr[0]]
                pairs -= {(k, i) for k, at in zip(stored, positions, strict=True) if at is not e.args[0]}
    return frozenset(pairs)


def box_nest(
    box: Box, target: Target, numbers: Iterator[int], *, nontemporal: bool = False, brief: bool = False
) -> tuple[list[Stmt], bool]:
    """The loops over a box, and whether they are parallel. `numbers` make the names of lets unique in a kernel. `brief` is for
    code that runs once: a third of the instructions, which take longer to compile than they would save."""
    dtypes = [b.dtype for b, _, _ in box.stores] + [e.dtype for e in loads_of(box.stores)]
    lanes = lanes_for(target, dtypes)
    if not box.axes:  # as in a loop's body, every value is read before anything is stored: memory may be shared in place
        names = [var(f"h{next(numbers)}", v.dtype) for _, _, v in box.stores]
        first = [Let(name, v) for name, (_, _, v) in zip(names, box.stores, strict=True)]
        return [*first, *(Store(b, (i,), name) for name, (b, i, _) in zip(names, box.stores, strict=True))], False
    at = vector_axis(box, lanes)
    axis = box.axes[at]
    while lanes > 1 and lanes // 2 >= axis.extent:
        lanes //= 2
    outer = [a for k, a in enumerate(box.axes) if k != at]
    tail = "mask" if has_masks(target, dtypes) else "overlap"
    loop = VectorLoop(lanes, 1 if brief else unroll_for(target, box.stores), tail)
    nanoseconds = estimate_ns(box, lanes)
    lets, stores = hoist(box.stores, axis.var, numbers)
    strides = [stride_along(box, i, axis.var) for _, i, _ in box.stores]
    piece = store_piece(stores, axis.var, strides, numbers, nontemporal=nontemporal)
    if not outer:
        if nontemporal and len(box.stores) == 1 and box.stores[0][1] is axis.var:
            lines = parallel_lines(axis, loop, piece, nanoseconds, lets, box.stores[0][0])
            if lines is not None:
                return lines, True
        return parallel_vector(axis, loop, piece, nanoseconds, lets)
    partner = _tile_partner(box, axis, outer, min(lanes, TILE))
    if partner is None:
        return parallel_nest(outer, [*lets, *loop.over(axis, piece)], nanoseconds)
    far = [e for e in loads_of(box.stores) if (stride_along(box, e.args[0], axis.var) or 0) > 1]
    near = all(stride_along(box, e.args[0], partner.var) == 1 for e in far) and all(s == 1 for s in strides)
    side = min(lanes, BRIEF_SIDE) if brief else lanes
    blocks = Transposing(box.stores, far, side, axis, partner, numbers)
    if near and (tail == "mask" or axis.extent % side == 0) and blocks.possible:
        number = Axis(var(f"{partner.var.attr}_block"), -(-partner.extent // side))
        return parallel_nest([a for a in outer if a is not partner] + [number], blocks.along(number.var), nanoseconds)
    if min(axis.extent, partner.extent) <= TILE:
        return parallel_nest(outer, [*lets, *loop.over(axis, piece)], nanoseconds)
    piece = store_piece(box.stores, axis.var, strides, numbers, nontemporal=False)
    copies, beside = _staged(box, axis, partner, numbers)
    staged = store_piece(beside, axis.var, strides, numbers, nontemporal=False) if copies else piece
    return _tiled(axis, partner, outer, loop, piece=piece, staged=staged, copies=copies, nanoseconds=nanoseconds)


def hoist(
    stores: Sequence[tuple[Buffer, Expr, Expr]], v: Expr, numbers: Iterator[int]
) -> tuple[list[Stmt], tuple[tuple[Buffer, Expr, Expr], ...]]:
    """Lets for what the values read independently of v, and the stores with the lets' variables in their place."""
    depends: dict[Expr, bool] = {}
    names: dict[Expr, Expr] = {}
    for e in postorder([value for _, _, value in stores]):
        depends[e] = e is v or any(depends[a] for a in e.args)
    for e, moves in depends.items():
        roots = [a for a in e.args if not depends[a]] if moves else []
        for a in (*roots, *(value for _, _, value in stores if value is e and not moves)):
            if a.op not in ("const", "var") and a not in names and any(x.op == "load" for x in postorder([a])):
                names[a] = var(f"h{next(numbers)}", a.dtype)
    if not names:
        return [], tuple(stores)
    memo: dict[Expr, Expr] = {}
    return [Let(n, a) for a, n in names.items()], tuple((b, i, substitute(value, names, memo)) for b, i, value in stores)


def _tile_partner(box: Box, axis: Axis, outer: Sequence[Axis], least: int) -> Axis | None:
    """The axis along which an access that jumps along `axis` is contiguous, both of some length: they must be walked in tiles."""
    indices = [e.args[0] for e in loads_of(box.stores)] + [i for _, i, _ in box.stores]
    for index in indices:
        if (stride_along(box, index, axis.var) or 0) > 1:
            for b in outer:
                if stride_along(box, index, b.var) == 1 and min(b.extent, axis.extent) >= least:
                    return b
    return None


def _staged(
    box: Box, axis: Axis, partner: Axis, numbers: Iterator[int]
) -> tuple[list[tuple[Buffer, Expr]], tuple[tuple[Buffer, Expr, Expr], ...]]:
    """What jumps along the vector axis and is contiguous along its partner, copied tile by tile: (copy, flat index) for each such
    load, and the stores with loads from the copies.

    Where such a load jumps by a power of two, the lines of a tile fall in a few sets of L1 and evict each other before they are
    used up: 2.4 million elements of f32[4608, 512] took 5.3 ms to transpose so, and 2.1 with the copy.
    """
    first, start = _corner(partner, axis)
    copies: list[tuple[Buffer, Expr]] = []
    near: dict[Expr, Expr] = {}
    if partner.extent % TILE:
        return [], box.stores
    for e in loads_of(box.stores):
        buffer, index = e.attr[0], e.args[0]
        stride = stride_along(box, index, axis.var)
        if len(e.args) > 1 or e.lanes > 1 or stride is None or stride_along(box, index, partner.var) != 1:
            continue
        if stride * buffer.dtype.itemsize < FAR or buffer.dtype.bits < 8 or any(x.op == "load" for x in postorder([index])):
            continue
        pitch = TILE + 1  # no power of two
        copy = Buffer(f"tile{next(numbers)}", buffer.dtype, (LONG * TILE * pitch,), scope="local", align=64)
        copies.append((copy, e))
        at = binary("add", binary("mul", binary("sub", axis.var, start), pitch), binary("sub", partner.var, first))
        near[e] = load(copy, (at,), buffer.dtype)
    return copies, tuple((b, i, substitute(v, near)) for b, i, v in box.stores)


def _corner(partner: Axis, axis: Axis) -> tuple[Expr, Expr]:
    """Variables of a tile's first element along the partner and along the vector axis."""
    return var(f"{partner.var.attr}_first"), var(f"{axis.var.attr}_first")


def _tiled(
    axis: Axis,
    partner: Axis,
    outer: Sequence[Axis],
    loop: VectorLoop,
    *,
    piece: Piece,
    staged: Piece,
    copies: Sequence[tuple[Buffer, Expr]],
    nanoseconds: float,
) -> tuple[list[Stmt], bool]:
    """Blocks of TILE of the partner by 4 * TILE of the vector axis, so that every cache line fetched is used up."""
    width = LONG * TILE if copies else 4 * TILE
    block = var(f"{partner.var.attr}_tile")
    first: Expr = binary("add", binary("mul", block, TILE), partner.start)
    last: Expr = binary("add", first, TILE)
    if partner.extent % TILE:
        last = minimum(last, const(partner.start + partner.extent))
    main = axis.extent // width * width
    body: list[Stmt] = []
    straight = VectorLoop(loop.lanes, width // loop.lanes, loop.tail)
    if main:
        inside: list[Stmt] = [For(partner.var, first, last, tuple(straight.step(axis.var, staged)))]
        if copies:
            corner, start = _corner(partner, axis)
            along = var(f"{axis.var.attr}_run")
            steps = VectorLoop(loop.lanes, loop.unroll, loop.tail)
            run = For(
                along,
                axis.var,
                binary("add", axis.var, width),
                tuple(steps.step(along, staged)),
                "serial",
                loop.lanes * loop.unroll,
            )
            inside = [For(partner.var, first, last, (run,))]
            row = var(f"{axis.var.attr}_row")
            moves = []
            for copy, e in copies:
                lanes = min(loop.lanes, TILE)
                for q in range(0, TILE, lanes):
                    at = substitute(e.args[0], {axis.var: binary("add", start, row), partner.var: binary("add", corner, q)})
                    value = load(e.attr[0], (at,), e.dtype, None, lanes)
                    moves.append(Store(copy, (binary("add", binary("mul", row, TILE + 1), q),), value))
            fetch = For(row, const(0), const(width), tuple(moves))
            inside = [Let(corner, first), Let(start, axis.var), *(Alloc(c) for c, _ in copies), fetch, *inside]
        body.append(For(axis.var, const(axis.start), const(axis.start + main), tuple(inside), "serial", width))
    if axis.extent > main:
        left = Axis(axis.var, axis.extent - main, axis.start + main)
        rest = VectorLoop(loop.lanes, loop.unroll, loop.tail if left.extent >= loop.lanes or loop.tail == "mask" else "narrow")
        body.append(For(partner.var, first, last, tuple(rest.over(left, piece))))
    tiles = Axis(block, (partner.extent + TILE - 1) // TILE)
    return parallel_nest([a for a in outer if a is not partner] + [tiles], body, nanoseconds)


def lower_map(graph: Graph, target: Target, name: str, aligns: Sequence[int] = (), *, brief: bool = False) -> Lowered:
    """The kernel of a group whose nodes are all maps and views: every output element in one visit. `brief`: see `box_nest`."""
    body = Body(graph, aligns)
    far = sum(b.span * b.dtype.itemsize for b in body.outputs) >= target.l3
    statements, parallel, pairs, count = map_outputs(body, range(len(graph.outputs)), target, nontemporal=far, brief=brief)
    note = f"{count} boxes" if count > 1 else ""
    doc = f"map: {body_name(graph)}"
    return lowered(body, name, statements, doc=doc, in_place=pairs, parallel=parallel, note=note)


def output_stores(body: Body, outputs: Sequence[int]) -> tuple[list[Axis], list[tuple[Buffer, Expr, Expr]]]:
    """The axes over the elements of some outputs, all of one size, and for each output the buffer, the place and the value."""
    nodes = [body.graph.outputs[k] for k in outputs]
    shape = static_shape(nodes[0])
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    kept, fixed = unit_axes(axes)
    index = tuple(fixed.get(a.var, a.var) for a in axes)
    whole = Simplifier(ranges_of(kept))
    body.normal = whole.simplify
    body.forget()
    stores: list[tuple[Buffer, Expr, Expr]] = []
    for k, node in zip(outputs, nodes, strict=True):
        its = static_shape(node)
        at = index if its == shape else unflatten(whole.simplify(flat_index(index, shape)), its)
        stores.append((body.outputs[k], whole.simplify(flat_index(at, its)), body.value(node, at)))
    return kept, stores


def map_outputs(
    body: Body,
    outputs: Sequence[int],
    target: Target,
    numbers: Iterator[int] | None = None,
    *,
    nontemporal: bool = False,
    brief: bool = False,
) -> tuple[list[Stmt], bool, frozenset[tuple[int, int]], int]:
    """The loops that compute some outputs, all of one size, in one visit of each element.

    Gives the statements, whether they are parallel, the pairs that may share memory, and the number of boxes.
    """
    kept, stores = output_stores(body, outputs)
    tiles = tiled_boxes(kept, stores)
    boxes = [merge_axes(b) for b in (cut(*split_axes(kept, stores)) if tiles is None else tiles)]
    pairs = in_place_pairs(body, boxes, outputs) if tiles is None else frozenset()
    statements: list[Stmt] = []
    parallel = False
    numbers = itertools.count() if numbers is None else numbers
    for box in boxes:
        part, shared = box_nest(box, target, numbers, nontemporal=nontemporal, brief=brief)
        statements += part
        parallel = parallel or shared
    dtypes = [b.dtype for b in (*body.buffers, *body.outputs)]
    if not has_masks(target, dtypes):
        pairs = frozenset()  # a tail that overlaps the last full vector computes elements twice
    return statements, parallel, pairs, len(boxes)


__all__ = ["Box", "box_nest", "cut", "lower_map", "map_outputs", "merge_axes", "output_stores", "restrict"]
