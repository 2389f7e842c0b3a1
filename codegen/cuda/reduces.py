"""Reductions over any axes: a thread, a warp or a block for each result, long ones in parts of a size that the shape decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ...ir.expr import Expr, binary, cast, const, eq, load, minimum, var
from ...ir.graph import Graph, Node
from ...ir.lowering import Reduce
from ...ir.target import Target
from ..accumulate import POSITIONS
from ..groups import Body, Lowered, accumulator, body_name, combine, flat_index, identity, lowered, mentioned, static_shape
from ..loop_ir import Alloc, Buffer, For, If, Let, Stmt, Store
from ..maps import loads_of, ranges_of, stride_along
from ..nests import Axis, unit_axes
from ..reduces import Level, kept_shape, level_of
from ..simplify_index import Simplifier
from .grid import BLOCK, BX, TX, Names, block_tree, launch, over, places, warp_tree
from .machine import WARP
from .maps import map_outputs
from .thread import ZERO, Thread

FILL: Final = 32768  # threads that fill a device
LONGEST: Final = 64  # elements a thread adds up before parts are worth it
MOST_PARTS: Final = 256


def lower_threads(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """One thread for each element of each output, with its reductions as loops."""
    body = Body(graph, aligns)
    statements: list[Stmt] = []
    for k, node in enumerate(graph.outputs):
        if prod(static_shape(node)):
            statements.append(_element(body, k, node))
    return lowered(body, name, statements, doc=f"threads: {body_name(graph)}", parallel=True, note="a thread for each element")


def _element(body: Body, k: int, node: Node) -> Stmt:
    shape = static_shape(node)
    axes = [Axis(var(f"i{d}"), n) for d, n in enumerate(shape)]
    kept, fixed = unit_axes(axes)
    index = tuple(fixed.get(a.var, a.var) for a in axes)
    body.forget()
    whole = Simplifier(ranges_of(kept))
    body.normal = whole.simplify
    thread = Thread(body, Names())
    before, (value,) = thread.values([(node, index)])
    body.reduced = None
    body.forget()
    store = Store(body.outputs[k], (whole.simplify(flat_index(index, shape)),), value)
    return over(kept or [Axis(var("one"), 1)], [*before, store])


def lower_reduce(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The launches of a reduction group: its levels one after another, then what follows them."""
    body = Body(graph, aligns)
    forms = {
        n: form for n in graph.nodes() if n.inputs and n not in body.operand and isinstance(form := body.lowering(n), Reduce)
    }
    if any(f.axes is None or f.kind in POSITIONS for f in forms.values()):
        return lower_threads(graph, target, name, aligns)
    first, shape = next(iter(forms.items()))
    for n, form in forms.items():
        if (form.extents, form.axes) != (shape.extents, shape.axes) or kept_shape(n, form) != kept_shape(first, shape):
            return lower_threads(graph, target, name, aligns)
    level: dict[Node, int] = {}
    for n in graph.nodes():
        level[n] = max((level[i] for i in n.inputs), default=0) + (1 if n in forms else 0)
    homes: dict[Node, Buffer] = {}
    spaces: list[Buffer] = []
    for n in forms:
        if n in graph.outputs:
            homes[n] = body.outputs[graph.outputs.index(n)]
        else:
            homes[n] = Buffer(f"w{len(spaces)}", n.dtype, (prod(static_shape(n)),), align=64)
            spaces.append(homes[n])
    done: set[Node] = set()

    def bound(n: Node, at: tuple[Expr, ...]) -> Expr | None:
        return load(homes[n], (body.normal(flat_index(at, static_shape(n))),), n.dtype) if n in done else None

    body.bound = bound
    statements: list[Stmt] = []
    notes: list[str] = []
    for k in range(1, max(level.values()) + 1):
        group = [n for n in forms if level[n] == k]
        if group:
            body.forget()
            found = level_of(body, forms, group, homes, f"m{k}")
            if found.size:
                part, extra, note = level_launches(found)
                statements += part
                spaces += extra
                notes.append(note)
            done.update(group)
    later = [k for k, n in enumerate(graph.outputs) if n not in forms or homes[n] is not body.outputs[k]]
    tails = []
    for size in dict.fromkeys(body.outputs[k].span for k in later):
        if size:
            tails.append(map_outputs(body, [k for k in later if body.outputs[k].span == size]))
            statements.append(tails[-1][0])
    pairs: set[tuple[int, int]] = set()
    for tail, alike, _ in tails:  # what no other launch reads may be overwritten where it lies
        elsewhere = mentioned([s for s in statements if s is not tail])
        pairs |= {(k, i) for k, i in alike if body.buffers[i] not in elsewhere and body.outputs[k] not in elsewhere}
    doc, note = f"reduce: {body_name(graph)}", "; ".join(notes)
    return lowered(body, name, statements, doc=doc, workspaces=spaces, in_place=frozenset(pairs), parallel=True, note=note)


@dataclass(frozen=True)
class _Part:
    """The elements of the flattened reduction that a thread takes: from `start` to `stop` in steps."""

    start: Expr
    stop: Expr
    step: int


def level_launches(level: Level) -> tuple[list[Stmt], list[Buffer], str]:
    """The launches of one level of reductions, their workspaces, and a note."""
    if not level.count:
        stores = [Store(r.buffer, (r.index,), identity(r.kind, r.dtype)) for r in level.results]
        return [over(level.kept or [Axis(var("one"), 1)], stores)], [], "nothing to reduce"
    along = bool(level.reduced) and _is_contiguous(level)
    threads = 1 if not along or level.count <= 8 else WARP if level.count <= 1024 and level.size >= 64 else BLOCK
    each = threads * (LONGEST if threads == 1 else 16)
    parts = max(1, min(MOST_PARTS, level.count // each, FILL // max(level.size * threads, 1)))
    chunk = -(-level.count // parts)
    parts = -(-level.count // chunk)
    spaces: list[Buffer] = []
    targets: list[tuple[Buffer, Expr]] = []
    p = var("part")
    for r in level.results:
        held = accumulator(r.value.dtype)
        if parts == 1:
            targets.append((r.buffer, r.index))
        else:
            b = Buffer(f"{r.name}_parts", held, (parts * level.size,), align=64)
            spaces.append(b)
            targets.append((b, binary("add", binary("mul", p, level.size), r.index)))
    axes = [*([Axis(p, parts)] if parts > 1 else []), *level.kept] or [Axis(var("one"), 1)]
    start = binary("mul", p, chunk) if parts > 1 else const(0)
    stop: Expr = const(level.count)
    if parts > 1:
        stop = minimum(binary("add", start, chunk), stop) if level.count % chunk else binary("add", start, chunk)
    first = _reduction(level, targets, axes, start, stop, threads)
    who = {1: "a thread", WARP: "a warp"}.get(threads, "a block")
    if parts == 1:
        return [first], [], f"{who} for each result"
    return [first, _combined(level, spaces, parts)], spaces, f"{who} for each of {parts} parts of a result"


def _is_contiguous(level: Level) -> bool:
    """Whether what is read lies side by side along the last reduced axis rather than along the kept ones."""
    box, last = level.box, level.reduced[-1]
    near = [e for e in loads_of(box.stores) if stride_along(box, e.args[0], last.var) == 1]
    across = [e for e in loads_of(box.stores) if level.kept and stride_along(box, e.args[0], level.kept[-1].var) == 1]
    return len(near) > len(across) or (len(near) == len(across) and level.size < FILL // 4)


def _reduction(
    level: Level, targets: Sequence[tuple[Buffer, Expr]], axes: Sequence[Axis], start: Expr, stop: Expr, threads: int
) -> Stmt:
    """A launch in which `threads` threads reduce each point of the axes from `start` to `stop`."""
    names = Names()
    q = var("q")
    lane = const(0) if threads == 1 else binary("mod", TX, threads) if threads < BLOCK else TX
    accs: list[Buffer] = []
    body: list[Stmt] = []
    inner: list[Stmt] = places(q, level.reduced)
    for r in level.results:
        held = accumulator(r.value.dtype)
        acc = Buffer(names("acc"), held, (1,), scope="register", align=16)
        accs.append(acc)
        body += [Alloc(acc), Store(acc, ZERO, identity(r.kind, held))]
        inner.append(Store(acc, ZERO, combine(r.kind, load(acc, ZERO, held), cast(r.value, held))))
    body.append(For(q, binary("add", start, lane), stop, tuple(inner), "serial", threads))
    values: list[Expr] = [load(a, ZERO, a.dtype) for a in accs]
    kinds = [r.kind for r in level.results]
    if threads == WARP:
        trees = [warp_tree(k, v, names) for k, v in zip(kinds, values, strict=True)]
        body += [s for lets, _ in trees for s in lets]
        values = [v for _, v in trees]
    elif threads > WARP:
        lets, values = block_tree(kinds, values, threads, names)
        body += lets
    stores: tuple[Stmt, ...] = tuple(Store(b, (i,), cast(v, b.dtype)) for (b, i), v in zip(targets, values, strict=True))
    body += stores if threads == 1 else [If(eq(lane, const(0)), stores)]
    return group_launch(axes, body, threads)


def group_launch(axes: Sequence[Axis], body: Sequence[Stmt], threads: int) -> Stmt:
    """A launch in which each point of the axes has so many threads: one, a warp, or a block of its own."""
    total = prod(a.extent for a in axes)
    if threads == 1:
        return over(axes, body)
    if threads == WARP:
        warps = BLOCK // WARP
        while warps > 1 and warps // 2 >= total:
            warps //= 2
        g = var("g")
        position = binary("add", binary("mul", BX, warps), binary("floordiv", TX, WARP))
        inner: list[Stmt] = [*places(g, axes), *body]
        if total % warps:
            inner = [If(g < total, tuple(inner))]
        return launch(-(-total // warps), warps * WARP, [Let(g, position), *inner])
    return launch(total, threads, [*places(BX, axes), *body])


def _combined(level: Level, spaces: Sequence[Buffer], parts: int) -> Stmt:
    """The parts of every result, one after another."""
    names = Names()
    p = var("part")
    body: list[Stmt] = []
    for r, b in zip(level.results, spaces, strict=True):
        acc = Buffer(names("acc"), b.dtype, (1,), scope="register", align=16)
        at = (binary("add", binary("mul", p, level.size), r.index),)
        step = Store(acc, ZERO, combine(r.kind, load(acc, ZERO, b.dtype), load(b, at, b.dtype)))
        body += [
            Alloc(acc),
            Store(acc, ZERO, identity(r.kind, b.dtype)),
            For(p, const(0), const(parts), (step,)),
            Store(r.buffer, (r.index,), cast(load(acc, ZERO, b.dtype), r.dtype)),
        ]
    return over(level.kept or [Axis(var("one"), 1)], body)


__all__ = ["group_launch", "level_launches", "lower_reduce", "lower_threads"]
