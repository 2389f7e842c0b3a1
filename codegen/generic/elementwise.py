"""Maps: every element of outputs of one shape in one visit, vectors along the axis that memory runs along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...ir.dims import Dim
from ...ir.expr import Expr, binary, const, load, rewrite, substitute, var
from ...ir.graph import Node
from ...ir.target import Target
from ..groups import cost, lanes_for
from ..loop_ir import Buffer, Let, Stmt, Store
from ..maps import BYTES_PER_NS, CYCLE_NS, hoist, loads_of
from ..nests import store_piece
from .body import GenericBody
from .index import Axis, Space
from .loops import FINE, Walk, shared, shared_vector

Stores = tuple[tuple[Buffer, Expr, Expr], ...]


def map_statements(body: GenericBody, outputs: Sequence[int], target: Target, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """The loops that compute some outputs, all of one shape. Gives the statements, and whether they are parallel."""
    space = body.space
    nodes = [body.graph.outputs[k] for k in outputs]
    axes = body.space.axes_over("i", nodes[0].shape)
    index = tuple(const(0) if space.unit(a) else a.var for a in axes)
    stores = tuple(
        (body.outputs[k], body.flat(node, index), space.simplify(body.value(node, index)))
        for k, node in zip(outputs, nodes, strict=True)
    )
    return box(space, [a for a in axes if not space.unit(a)], stores, target, numbers)


def box(space: Space, axes: list[Axis], stores: Stores, target: Target, numbers: Iterator[int]) -> tuple[list[Stmt], bool]:
    """Loops over the axes around the stores."""
    if any(a.extent == 0 for a in axes):
        return [], False
    axes, stores = merged(space, axes, stores)
    if not axes:
        names = [var(f"h{next(numbers)}", v.dtype) for _, _, v in stores]
        first = [Let(name, v) for name, (_, _, v) in zip(names, stores, strict=True)]
        return [*first, *(Store(b, (i,), name) for name, (b, i, _) in zip(names, stores, strict=True))], False
    at = vector_axis(space, axes, stores)
    v = axes[at].var
    outer = [a for k, a in enumerate(axes) if k != at]
    dtypes = [b.dtype for b, _, _ in stores] + [e.dtype for e in loads_of(stores)]
    lanes = lanes_for(target, dtypes)
    extent = axes[at].extent
    while isinstance(extent, int) and lanes > 1 and lanes // 2 >= extent:
        lanes //= 2
    walk = Walk.of(target, dtypes, lanes, 2 if cost([x for _, _, x in stores]) <= 12 else 1)
    lets, moved = hoist(stores, v, numbers)
    strides = [_unit_stride(space, i, v) for _, i, _ in stores]
    piece = store_piece(moved, v, strides, numbers, nontemporal=False)
    each = per_element(stores, lanes)
    if not outer:
        return shared_vector(space, axes[at], walk, piece, each, lets)
    work = binary("mul", space.extent(axes[at]), each)
    return shared(space, outer, [*lets, *walk.over(space, axes[at], piece)], work, f"q{next(numbers)}")


def per_element(stores: Stores, lanes: int) -> int:
    """About how long one element takes, in 1/64 nanoseconds."""
    loads = loads_of(stores)
    unit = sum(b.dtype.itemsize for b, _, _ in stores) + sum(e.dtype.itemsize for e in loads)
    work = cost([v for _, _, v in stores]) + len(loads)
    return max(1, int(FINE * max(unit / BYTES_PER_NS, work * 0.5 * CYCLE_NS / lanes)))


def _unit_stride(space: Space, index: Expr, v: Expr) -> int | None:
    found = space.stride(index, v)
    return found if isinstance(found, int) else None


def merged(space: Space, axes: list[Axis], stores: Stores) -> tuple[list[Axis], Stores]:
    """Neighbouring axes made one where every access runs through both in one step."""
    k = len(axes) - 1
    while k > 0:
        a, b = axes[k - 1], axes[k]
        if mergeable(space, a, b, [(i, v) for _, i, v in stores]):
            one = space.axis("i", a.extent * b.extent)
            put = merger(space, a, b, one)
            stores = tuple((buffer, put(i, True), put(v, False)) for buffer, i, v in stores)
            axes = [*axes[: k - 1], one, *axes[k + 1 :]]
        k -= 1
    return axes, stores


def mergeable(space: Space, a: Axis, b: Axis, pairs: Sequence[tuple[Expr, Expr]]) -> bool:
    """Whether indices (the first of each pair) and loads (in the second) see two axes as one, and nothing else sees them."""

    def together(index: Expr) -> bool:
        s, t = space.stride(index, a.var), space.stride(index, b.var)
        return s is not None and t is not None and s == b.extent * t

    for index, value in pairs:
        if not together(index):
            return False
        stack, seen = [value], set[Expr]()
        while stack:
            e = stack.pop()
            if e in seen:
                continue
            seen.add(e)
            if e.op == "load":
                if not together(e.args[0]):
                    return False
                stack += e.args[e.attr[1] :]
            elif e is a.var or e is b.var:
                return False
            else:
                stack += e.args
    return True


def merger(space: Space, a: Axis, b: Axis, one: Axis) -> Callable[[Expr, bool], Expr]:
    """Puts one axis in the place of two: (expression, whether it is an index) -> expression."""

    def index(e: Expr) -> Expr:
        return space.simplify(substitute(e, {a.var: const(0), b.var: one.var}))

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        return load(e.attr[0], (index(e.args[0]),), e.dtype, args[1] if len(args) > 1 else None) if e.op == "load" else None

    done: dict[Expr, Expr] = {}
    return lambda e, is_index: index(e) if is_index else rewrite(e, rule, done)


def access_price(space: Space, index: Expr, v: Expr) -> float:
    """What a vector access along v costs beside a contiguous one."""
    stride = space.stride(index, v)
    return 1.0 if stride == 1 else 0.3 if stride == 0 else 8.0


def vector_axis(space: Space, axes: Sequence[Axis], stores: Stores) -> int:
    """The position of the axis whose vectors are cheapest; the inner one on a tie."""
    best, choice = float("inf"), len(axes) - 1
    for k in range(len(axes) - 1, -1, -1):
        v, n = axes[k].var, axes[k].extent
        price = sum(access_price(space, e.args[0], v) for e in loads_of(stores))
        price += sum(1.3 * access_price(space, i, v) for _, i, _ in stores)
        price *= 16 / n if isinstance(n, int) and n < 16 else 1.0
        if price < best * 0.98:
            best, choice = price, k
    return choice


def groups_by_shape(nodes: Sequence[Node]) -> list[list[int]]:
    """The positions of nodes of one shape each."""
    found: dict[tuple[Dim, ...], list[int]] = {}
    for k, n in enumerate(nodes):
        found.setdefault(n.shape, []).append(k)
    return list(found.values())


__all__ = ["box", "groups_by_shape", "map_statements", "mergeable", "merger", "per_element"]
