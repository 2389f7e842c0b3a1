"""Scans: running sums along one axis, in vectors over the other axes where one of them is contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from ..ir.expr import Expr, binary, cast, const, load, substitute, var
from ..ir.graph import Graph
from ..ir.lowering import Scan
from ..ir.target import Target
from .groups import Body, Lowered, accumulator, combine, flat_index, identity, lanes_for, lowered, static_shape
from .loop_ir import Alloc, Buffer, For, Stmt, Store
from .maps import BYTES_PER_NS, restrict
from .nests import Axis, Spot, VectorLoop, has_masks, parallel_nest, unit_axes, widen


def lower_scan(graph: Graph, target: Target, name: str, aligns: Sequence[int] = ()) -> Lowered:
    """The kernel of a cumulative sum or product: serial along its axis, the others in vectors and threads."""
    body = Body(graph, aligns)
    node, form = body.sole(Scan)
    shape = static_shape(node)
    axes = [Axis(var(f"i{k}"), n) for k, n in enumerate(shape)]
    length, t = shape[form.axis], axes[form.axis].var
    kept, fixed = unit_axes([a for k, a in enumerate(axes) if k != form.axis])
    place: Expr = binary("sub", length - 1, t) if form.reverse else t
    index = [fixed.get(a.var, a.var) for a in axes]
    index[form.axis] = place
    box = restrict([*kept, axes[form.axis]], [])
    body.normal = box.simplifier.simplify
    value = body.value(node.inputs[0], index)
    target_index = box.simplifier.simplify(flat_index(index, shape))
    out = body.outputs[0]
    held = accumulator(node.dtype)
    dtypes = [node.dtype]
    # the last axis of more than one element is contiguous; where that is the scanned one, there are no vectors
    inner = kept[-1] if any(n > 1 for n in shape[form.axis + 1 :]) else None
    lanes = lanes_for(target, dtypes) if inner is not None else 1
    while inner is not None and lanes > 1 and lanes // 2 >= inner.extent:
        lanes //= 2
    v = inner.var if inner is not None else t

    numbers = count()

    def column(spot: Spot) -> list[Stmt]:
        n = spot.lanes
        total = Buffer(f"total{next(numbers)}", held, (n,), scope="register", align=64)
        at = (const(0),)
        old = load(total, at, held, lanes=n)
        new = combine(form.kind, old, cast(widen(value, v, spot) if inner is not None else value, held))
        where = box.simplifier.simplify(target_index)
        if inner is not None:
            where = substitute(where, {v: spot.position})
        # Each statement reads the total as it is then: before the update (exclusive) or after it.
        steps: list[Stmt] = [Store(total, at, new), Store(out, (where,), cast(old, node.dtype), spot.mask)]
        if form.exclusive:
            steps.reverse()
        return [Alloc(total), Store(total, at, identity(form.kind, held, n)), For(t, const(0), const(length), tuple(steps))]

    nanoseconds = out.span * max(2.0 * node.dtype.itemsize / BYTES_PER_NS, 1.5 / lanes)
    if inner is None:
        nested, parallel = parallel_nest(kept, column(Spot(t, 1)), nanoseconds)
    else:
        tail = "mask" if has_masks(target, dtypes) else "overlap"
        loop = VectorLoop(lanes, 1, tail, shrink=True)
        nested, parallel = parallel_nest(kept[:-1], loop.over(inner, column), nanoseconds)
    return lowered(
        body, name, nested, doc=f"scan ({form.kind}) along axis {form.axis}", parallel=parallel, note=f"serial over {length}"
    )


__all__ = ["lower_scan"]
