"""Checks gradients against directional central differences, in f64.

For y(x1, ..., xn) and a random direction v:  (y(x + h v) - y(x - h v)) / 2h  =  <dy/dx, v>  up to h^2.
What a `stop_gradient` gives counts as a constant. If they differ, the rule of every op between the xs and y is checked in the
same way on its own, and the first that fails is to blame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..ir.build import get, input_node
from ..ir.dtypes import f64
from ..ir.graph import Graph, Node, postorder
from ..ir.graphs import rebuild
from ..ir.interp import Value, evaluate, execute, run
from ..ir.op import NotDifferentiable, Trait, make
from ..ir.types import TupleType
from .bodies import map_bodies
from .contract import Context, Pass
from .oracle import Array, draw

STEP: Final = 1e-5
TOLERANCE: Final = 1e-3  # of |gradient|: kinks (relu, max) within a step of the point cost this much, a wrong rule far more
EACH: Final = 32  # xs that get a direction of their own; beyond, they share one


class GradientMismatch(Exception):  # noqa: N818 - becomes a ValidationError with the repro's path
    """The gradient pass disagrees with central differences."""

    def __init__(self, what: str, rule: str, node: Node | None, repro: Graph | None) -> None:
        super().__init__(what)
        self.what, self.rule, self.node, self.repro = what, rule, node, repro


def check_gradients(p: Pass, before: Graph, after: Graph, ctx: Context, seed: int = 0) -> None:
    """Raises GradientMismatch unless every gradient node of `before` is right, and `after` uses them as `before` does.

    Bodies of loops and branches that hold gradient nodes are checked first, each as a graph of its own.
    """

    def inside(body: Graph, invariants: frozenset[Node]) -> Graph:
        made = p.apply(body, ctx.fresh(current=str(p)))
        if made is not body:
            check_gradients(p, body, made, ctx, seed)
        return made

    before = map_bodies(before, inside)
    requests = [n for n in postorder(before.outputs) if ctx.facts.kind(n) == "other"]
    for kind in ("normal", "positive"):
        arrays = draw(before, kind, seed)
        known: dict[Node, list[Array]] = {}
        for g in requests:
            known[g] = _check_one(p, before, g, arrays, ctx, seed)
        _check_use(before, after, known, arrays)


def _check_one(p: Pass, before: Graph, g: Node, arrays: Sequence[Array], ctx: Context, seed: int) -> list[Array]:
    y, xs = g.inputs[0], g.inputs[1:]
    parts = tuple(get(g, k) for k in range(len(xs)))
    names = tuple(f"v{k}" for k in range(1 + 2 * len(xs)))
    both = p.apply(Graph(before.inputs, (y, *xs, *parts), names), ctx.fresh(current=str(p)))
    values = run(both, arrays, f64)
    new_y, new_xs = both.outputs[0], both.outputs[1 : 1 + len(xs)]
    points, gradients = values[1 : 1 + len(xs)], values[1 + len(xs) :]
    variables = [input_node(f"__x{k}", x.tensor) for k, x in enumerate(new_xs)]
    stopped = [n for n in postorder([new_y]) if _stops(n)]
    held = run(Graph(both.inputs, tuple(stopped), tuple(f"v{k}" for k in range(len(stopped)))), arrays, f64) if stopped else []
    constants = [input_node(f"__s{k}", n.tensor) for k, n in enumerate(stopped)]
    replaced = rebuild([new_y], {**dict(zip(stopped, constants, strict=True)), **dict(zip(new_xs, variables, strict=True))})
    forward = Graph((*before.inputs, *variables, *constants), replaced)
    rng = np.random.default_rng(seed)
    directions = [rng.normal(size=x.shape) for x in points]
    groups = [[k] for k in range(len(xs))] if len(xs) <= EACH else [list(range(len(xs)))]
    for group in groups:
        expected = sum(float((gradients[k] * directions[k]).sum()) for k in group)
        size = float(np.sqrt(sum(float((gradients[k] ** 2).sum()) for k in group)))
        ends = []
        for sign in (1, -1):
            moved = [x + (sign * STEP * directions[k] if k in group else 0) for k, x in enumerate(points)]
            ends.append(float(execute(forward, [*arrays, *moved, *held], f64)[0]))
        if not np.isfinite(ends).all() or not np.isfinite(expected):
            continue  # no derivative at this point; the other draw is positive
        found = (ends[0] - ends[1]) / (2 * STEP)
        noise = 1e-9 * max(map(abs, ends))  # of the difference of two rounded values, over 2h
        if abs(found - expected) > TOLERANCE * max(size, abs(found)) + noise:
            names_of = ", ".join(f"operand {k + 1}" for k in group)
            what = (
                f"the derivative of {y!r} by {names_of} of {g!r} in a random direction is {found:.6g} by central differences, "
                f"{expected:.6g} by the gradient pass"
            )
            rule, node, repro = _blame(before, both, new_y, new_xs, arrays, seed)
            raise GradientMismatch(what, rule, node if node is not None else g, repro)
    return gradients


def _stops(node: Node) -> bool:
    """Whether it lets no gradient through on purpose: a constant to whoever asks for a derivative."""
    if not (node.op.has(Trait.BARRIER) and len(node.inputs) == 1) or isinstance(node.op.grad, NotDifferentiable):
        return False
    return node.tensor.dtype.is_float and all(part is None for part in node.op.grad(node, (node,)))


def _check_use(before: Graph, after: Graph, known: dict[Node, list[Array]], arrays: Sequence[Array]) -> None:
    """`after` must be `before` with the gradients put in as values."""
    replacements: dict[Node, Node] = {}
    given: list[Array] = []
    for g, values in known.items():
        for k, v in enumerate(values):
            replacements[get(g, k)] = input_node(f"__g{len(given)}", get(g, k).tensor)
            given.append(v)
    outputs = rebuild(before.outputs, replacements)
    expected = execute(Graph((*before.inputs, *replacements.values()), outputs, before.output_names), [*arrays, *given], f64)
    for k, (x, y) in enumerate(zip(expected, run(after, arrays, f64), strict=True)):
        if not np.allclose(x, y, rtol=1e-9, atol=1e-9 * float(np.abs(np.nan_to_num(x)).max(initial=0)), equal_nan=True):
            raise GradientMismatch(
                f"output {before.output_names[k]!r} does not use the gradients as the graph says", "", None, None
            )


def _blame(
    before: Graph, both: Graph, y: Node, xs: Sequence[Node], arrays: Sequence[Array], seed: int
) -> tuple[str, Node | None, Graph | None]:
    """The first op between xs and y whose own rule is wrong at the values it has here."""
    values: dict[Node, Value] = {}
    table = dict(zip(before.inputs, (a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays), strict=True))
    values.update(table)
    run(Graph(both.inputs, (y,)), arrays, f64, observe=values.__setitem__)
    sources, matters = set(xs), set[Node]()
    for n in postorder([y]):
        if n in sources or any(i in matters for i in n.inputs):
            matters.add(n)
        if n in sources or n not in matters or isinstance(n.op.grad, NotDifferentiable) or isinstance(n.type, TupleType):
            continue
        if not n.dtype.is_float:
            continue  # a comparison: it has no slope
        operands = [values[i] for i in n.inputs]
        if any(isinstance(v, tuple) for v in operands) or any(isinstance(i.type, TupleType) for i in n.inputs):
            continue
        if not rule_is_right(n, operands, seed):  # type: ignore[arg-type]
            return f"gradient of {n.op.name}", n, _repro(n)
    return "", None, None


def _local(node: Node) -> tuple[tuple[Node, ...], Node, Node]:
    """The op on inputs of its own, and an input for its cotangent."""
    inputs = tuple(input_node(f"x{k}", i.tensor) for k, i in enumerate(node.inputs))
    return inputs, node.replace(inputs), input_node("dy", node.tensor)


def rule_is_right(node: Node, operands: Sequence[Array], seed: int = 0) -> bool:
    """Whether the gradient rule of one op agrees with central differences at these operands (f64)."""
    if isinstance(node.op.grad, NotDifferentiable):
        return True
    inputs, here, dy = _local(node)
    rng = np.random.default_rng(seed)
    cotangent = rng.normal(size=node.tensor.static_shape)
    parts = node.op.grad(here, (dy,))
    for k, (i, part) in enumerate(zip(inputs, parts, strict=True)):
        if not i.dtype.is_float or (part is None and node.op.has(Trait.BARRIER)):
            continue
        direction = rng.normal(size=operands[k].shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * STEP * direction if j == k else x for j, x in enumerate(operands)]
            ends.append(np.asarray(evaluate(here, moved, f64)))
        found = float((((ends[0] - ends[1]) / (2 * STEP)) * cotangent).sum())
        if part is None:
            expected, size = 0.0, 0.0
        else:
            (value,) = execute(Graph((*inputs, dy), (part,)), [*operands, cotangent], f64)
            expected, size = float((value * direction).sum()), float(np.sqrt((value**2).sum()))
        if not np.isfinite([found, expected]).all():
            continue
        noise = (
            1e-9
            * float(np.abs(np.concatenate([e.ravel() for e in ends])).max(initial=0))
            * max(1.0, float(np.abs(cotangent).sum()))
        )
        if abs(found - expected) > TOLERANCE * max(size, abs(found)) + noise:
            return False
    return True


def _repro(node: Node) -> Graph:
    """A graph that asks for the gradient of one op: sum(op(x...) * dy) by its float operands."""
    inputs, here, dy = _local(node)
    total = make("mul", here, dy)
    scalar = make("sum", total, axes=tuple(range(len(total.shape))), keepdims=False) if total.shape else total
    xs = [i for i in inputs if i.dtype.is_float]
    g = make("gradient", scalar, *xs)
    return Graph((*inputs, dy), tuple(get(g, k) for k in range(len(xs))))
