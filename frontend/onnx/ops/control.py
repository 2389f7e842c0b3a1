"""Branches and loops."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ....ir.dtypes import i64
from ...control import cond, scan, while_loop
from ...core import as_tensor
from ...elementwise import less, logical_and
from ...movement import flip, iota, moveaxis, reshape, stack
from ...tensor import Tensor
from ..call import Call, Pending
from ..description import GraphDef
from ..registry import op
from ..values import Value

UNROLLED: Final = 20_000  # nodes, the most that an unrolled loop may give


@op("If")
def if_(n: Call) -> Any:
    """A condition that is known takes its branch now. Otherwise both are compiled if they give the same types; where they do
    not, the condition's value is needed first."""
    then, other = n.graph("then_branch"), n.graph("else_branch")
    known = n.known(0)
    if known is None and not _alike(n, then, other):
        known = n.array(0)
    if known is not None:
        return n.run(then if bool(known.reshape(())) else other, [], "then" if bool(known.reshape(())) else "else")
    recorded = n.importer.recorded

    def branch(body: Any, tag: str) -> Any:
        return recorded(lambda: [as_tensor(v.tensor) for v in n.run(body, [], tag)])

    return cond(reshape(n.tensor(0), ()), branch(then, "then"), branch(other, "else"))


def _alike(n: Call, then: Any, other: Any) -> bool:
    """Whether both branches declare the same types, all sizes numbers."""
    a, b = ([(v.kind, v.dtype, v.shape) for v in g.outputs] for g in (then, other))
    return a == b and all(s is not None and all(isinstance(d, int) for d in s) for _, _, s in a)


# --- Scan -----------------------------------------------------------------------------------------------------------


@op("Scan", 9)
def scan_(n: Call) -> Any:
    """States first, then arrays that are read element by element along an axis, in one direction or the other."""
    body, count = n.graph("body"), n.integer("num_scan_inputs")
    given = n.tensors()
    _check_count(n, count, given)
    states, arrays = given[: len(given) - count], given[len(given) - count :]
    outputs = len(body.outputs) - len(states)
    in_axes, in_back = n.int_list("scan_input_axes") or (0,) * count, n.int_list("scan_input_directions") or (0,) * count
    out_axes, out_back = n.int_list("scan_output_axes") or (0,) * outputs, n.int_list("scan_output_directions") or (0,) * outputs
    xs = [_first(a, axis, bool(back)) for a, axis, back in zip(arrays, in_axes, in_back, strict=True)]

    def step(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = [v.tensor for v in n.run(body, [n.as_value(t) for t in (*carry, *x)], "body")]
        return found[: len(states)], found[len(states) :]

    last, ys = scan(n.importer.recorded(step), states, xs)
    made = [flip(y, (0,)) if back else y for y, back in zip(ys, out_back, strict=True)]
    return (*last, *(moveaxis(y, 0, axis) for y, axis in zip(made, out_axes, strict=True)))


def _check_count(n: Call, count: int, given: list[Tensor]) -> None:
    if not 1 <= count <= len(given):
        n.fail(f"num_scan_inputs={count} of {len(given)} inputs")


def _first(x: Tensor, axis: int, backwards: bool) -> Tensor:
    x = moveaxis(x, axis, 0)
    return flip(x, (0,)) if backwards else x


@op("Scan", 8)
def scan_8(n: Call) -> Any:
    """Of opset 8: every operand has a batch axis before all others, and the examples run one after the other."""
    body, count = n.graph("body"), n.integer("num_scan_inputs")
    if n.has(0):
        n.unsupported("sequence_lens; every sequence must be whole")
    given = [n.tensor(i) for i in range(1, len(n.inputs))]
    _check_count(n, count, given)
    states, arrays = given[: len(given) - count], given[len(given) - count :]
    backwards = n.int_list("directions") or (0,) * count

    def step(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = [v.tensor for v in n.run(body, [n.as_value(t) for t in (*carry, *x)], "body")]
        return found[: len(states)], found[len(states) :]

    def example(_: None, operands: tuple[list[Tensor], list[Tensor]]) -> tuple[None, tuple[list[Tensor], list[Tensor]]]:
        start, sequences = operands
        xs = [flip(x, (0,)) if back else x for x, back in zip(sequences, backwards, strict=True)]
        return None, scan(step, start, xs)

    _, (last, ys) = scan(n.importer.recorded(example), None, (states, arrays))
    return (*last, *ys)


# --- Loop -----------------------------------------------------------------------------------------------------------


class _ShapeChangeError(Exception):
    """A state changes its type from one step to the next."""


@op("Loop", 1, 11, 13, 16)
def loop(n: Call) -> Any:
    """A count that is known, and a condition that stays true: a scan. A condition that a step computes: a while_loop, which is
    run first for the number of steps where results of each step are stacked. States that change their shape: unrolled."""
    body = n.graph("body")
    states = [n.value(i) for i in range(2, len(n.inputs))]
    going = n.known(1) if n.has(1) else np.ones((), bool)
    if going is None and n.has(0) and _condition_stays(body):
        going = n.array(1)  # once for all steps
    if going is not None and not bool(going.reshape(())):
        count = 0
    elif going is not None and n.has(0) and _condition_stays(body):
        count = max(0, int(n.array(0).reshape(())))
    else:
        return _conditional(n, body, states)
    before = n.importer.mark()
    try:
        return _counted(n, body, states, count)
    except (_ShapeChangeError, Pending):  # each step is its own, with its number known: what a loop cannot do may be possible
        n.importer.restore(before)
        return _unrolled(n, body, states, count)


def _condition_stays(body: GraphDef) -> bool:
    """Whether the body gives its condition back as it was, or a constant true. Looked up in the body's nodes."""
    name = body.outputs[0].name
    makers = {o: node for node in body.nodes for o in node.outputs}
    while name in makers and makers[name].op == "Identity":
        name = makers[name].inputs[0]
    if name == body.inputs[1].name:
        return True
    stored = body.initializers.get(name)
    if stored is None and name in makers and makers[name].op == "Constant":
        stored = makers[name].attributes.get("value")
    return stored is not None and bool(np.all(stored.load()))


def _step(n: Call, body: GraphDef, i: Tensor, carry: list[Tensor]) -> list[Tensor]:
    """The outputs of one step: the condition, states, results."""
    values = [n.as_value(i), n.as_value(np.ones((), bool)), *(n.as_value(t) for t in carry)]
    found = [v.tensor for v in n.run(body, values, "body")]
    if any(a.type != b.type for a, b in zip(found[1 : 1 + len(carry)], carry, strict=True)):
        raise _ShapeChangeError
    return found


def _counted(n: Call, body: GraphDef, states: list[Value], count: int) -> Any:
    def step(carry: list[Tensor], i: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = _step(n, body, i, carry)
        return found[1 : 1 + len(states)], found[1 + len(states) :]

    last, ys = scan(n.importer.recorded(step), [v.tensor for v in states], iota((count,), 0))
    return (*last, *ys)


def _unrolled(n: Call, body: GraphDef, states: list[Value], count: int) -> Any:
    if count * len(body.nodes) > UNROLLED:
        n.unsupported(
            f"states that change their shape, in {count} steps of {len(body.nodes)} nodes; at most {UNROLLED} are unrolled"
        )
    rows: list[list[Tensor]] = []
    for i in range(count):
        given = [n.as_value(np.asarray(i, np.int64)), n.as_value(np.ones((), bool)), *states]
        found = n.run(body, given, f"body{i}")
        states = found[1 : 1 + len(states)]
        rows.append([v.tensor for v in found[1 + len(states) :]])
    if not rows and len(body.outputs) > 1 + len(states):
        n.unsupported("no step at all, of which results are stacked")
    return (*states, *(stack([r[k] for r in rows], 0) for k in range(len(body.outputs) - 1 - len(states))))


def _conditional(n: Call, body: GraphDef, states: list[Value]) -> Any:
    """The steps that a condition allows, at most as many as the count says."""
    start = [v.tensor for v in states]
    going = reshape(n.tensor(1), ()) if n.has(1) else as_tensor(np.ones((), bool))
    most = reshape(n.tensor(0), ()).astype(i64) if n.has(0) else as_tensor(np.asarray(2**62, np.int64))

    def test(carry: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
        return logical_and(carry[1], less(carry[0], most))

    def step(carry: tuple[Tensor, Tensor, list[Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        found = _step(n, body, carry[0], carry[2])
        return carry[0] + 1, reshape(found[0], ()), found[1 : 1 + len(states)]

    try:
        count, _, last = while_loop(test, n.importer.recorded(step), (as_tensor(np.zeros((), np.int64)), going, start))
    except _ShapeChangeError:
        n.unsupported("states that change their shape, in a number of steps that only a run knows")
    if len(body.outputs) == 1 + len(states):
        return tuple(last)
    return _counted(n, body, states, int(n.need(count, "steps")))
