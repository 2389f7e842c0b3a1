"""Loops and branches of Tensors: scan, cond, while_loop. Their functions are traced once, into graphs of their own.

What a function uses from around it (Tensors, parameters) becomes an operand of the loop or branch by itself. Signatures and
meaning of scan, cond and while_loop are those of JAX's `lax`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..ir.dims import Dim, DimExpr
from ..ir.dtypes import bool_, f64, u64
from ..ir.errors import AttributeValueError, DTypeError, ShapeError, TraceError
from ..ir.graph import Node, postorder
from ..ir.graphs import closed
from ..ir.op import Trait, make
from ..ir.types import TensorType
from . import tree
from .context import Trace, current, error
from .core import Value, apply, as_tensor, cast, wrap
from .gradients import Parts
from .tensor import Tensor

__all__ = ["cond", "scan", "while_loop"]


def scan(
    fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: Dim | None = None,
    reverse: bool = False,
    *,
    save: str = "costly",
) -> tuple[Any, Any]:
    """(last carry, stacked ys) of `carry, y = fn(carry, x)` for each x along the leading axis of xs.

    init     the first carry: a Tensor, array or number, or a nest of such; fn gives back one of the same types. None: the steps
             do not depend on each other, and may run in parallel
    xs       a nest of Tensors with one leading axis, of which fn gets one element a step; None: fn gets None
    length   the number of steps; needed where xs is None
    reverse  runs from the last element to the first; y of a step still stands where its x does
    save     for the gradient: 'costly' keeps what is expensive to compute again, for all steps; 'inputs' keeps only what each
             step started from, and makes a loop for small memory: nothing is computed for all steps at once

    Random draws in fn differ from step to step. Raises ShapeError or DTypeError for a carry whose type changes, naming its leaf;
    TraceError where fn changes a buffer, or returns no pair.
    """
    t = current("scan")
    if save not in ("costly", "inputs"):
        raise error(AttributeValueError, f"scan: save is 'costly' or 'inputs', not {save!r}")
    carry, carry_tree = _leaves(init, "init of scan")
    stacks, xs_tree = _leaves(xs, "xs of scan")
    steps = _length(stacks, list(tree.paths(xs_tree, "xs")), length)
    body = _Body(t, "scan")
    state = [body.input(c.type, f"carry {p}") for c, p in zip(carry, tree.paths(carry_tree, "init"), strict=True)]
    parts = [body.input(TensorType(x.dtype, x.shape[1:]), p) for x, p in zip(stacks, tree.paths(xs_tree, "xs"), strict=True)]
    key = body.input(TensorType(u64, ()), "the key of a step") if t.key is not None else None
    with body.recorded(key):
        result = fn(tree.unflatten(carry_tree, state), tree.unflatten(xs_tree, parts))
        if not isinstance(result, tuple) or len(result) != 2:
            raise error(TraceError, "the function of a scan returns a pair (new carry, y); y may be None", returned=result)
        updates = _same_types("scan", "carry", result[0], carry, carry_tree)
        ys, ys_tree = _leaves(result[1], "y of scan")
    outputs = [*(u.node for u in updates), *(y.node for y in ys)]
    if not outputs:
        raise error(TraceError, "the function of this scan computes nothing: both its carry and its y are empty")
    inside = [v.node for v in (*state, *parts)]
    operands: list[Node] = [v.node for v in (*carry, *stacks)]
    sequences = len(stacks)
    if key is not None and key.node in set(postorder(outputs)):
        inside.append(key.node)
        operands.append(_keys(t, steps).node)
        sequences += 1
    captured = body.captured(outputs)
    graph = closed([*inside, *captured], outputs, _name(fn, "step"), t.labels)
    attrs = {"length": steps, "carries": len(carry), "sequences": sequences, "reverse": bool(reverse), "save": save}
    node = _made(t, "scan", [*operands, *captured], body=graph, **attrs)
    results = _parts(node, len(outputs))
    return tree.unflatten(carry_tree, results[: len(carry)]), tree.unflatten(ys_tree, results[len(carry) :])


def cond(pred: Any, then: Callable[..., Any], orelse: Callable[..., Any], *operands: Any) -> Any:
    """then(*operands) where the bool scalar `pred` is true, else orelse(*operands); only that one runs.

    Both give the same nest of the same types. A Python bool chooses at once. To choose element by element, use `tw.where`.
    Raises ShapeError, DTypeError or TraceError where the results do not match, or where a function changes a buffer.
    """
    if isinstance(pred, bool):
        return (then if pred else orelse)(*operands)
    t = current("cond")
    chosen = as_tensor(pred, what="the predicate of cond")
    if chosen.shape != () or chosen.dtype is not bool_:
        kind = ShapeError if chosen.shape != () else DTypeError
        raise error(kind, "the predicate of cond is a bool scalar: a comparison, reduced with all or any", pred=chosen)
    given, given_tree = _leaves(operands, "an operand of cond")
    traced: list[tuple[_Body, list[Tensor], list[Tensor], tree.Structure]] = []
    for fn, what in ((then, "then"), (orelse, "orelse")):
        body = _Body(t, f"the {what} function of cond", everything=True)
        inputs = [body.input(v.type, f"operand {k}") for k, v in enumerate(given)]
        with body.recorded(None, keep_key=True):
            results, structure = _leaves(fn(*tree.unflatten(given_tree, inputs)), f"a result of {what}")
        traced.append((body, inputs, results, structure))
    (first, _, a, structure), (second, _, b, other) = traced
    first.made |= second.made  # the same expression in both is one node, and belongs to both
    second.made = first.made
    if structure != other:
        raise error(TraceError, f"cond: then returns {structure}, orelse {other}; both return the same nest of Tensors")
    if not a:
        raise error(TraceError, "cond: both functions return nothing")
    for path, x, y in zip(tree.paths(structure, "result"), a, b, strict=True):
        if x.type != y.type:
            kind = ShapeError if x.shape != y.shape else DTypeError
            raise error(kind, f"cond: {path} is {x.type} in then and {y.type} in orelse; both give the same types")
    captured: dict[Node, None] = {}
    for body, _, results, _ in traced:
        captured |= dict.fromkeys(body.captured([r.node for r in results]))
    graphs = {
        key: closed([*(i.node for i in inputs), *captured], [r.node for r in results], _name(fn, key), t.labels)
        for key, fn, (_, inputs, results, _) in zip(("then", "orelse"), (then, orelse), traced, strict=True)
    }
    node = _made(t, "cond", [chosen.node, *(v.node for v in given), *captured], **graphs)
    return tree.unflatten(structure, _parts(node, len(a)))


def while_loop(test: Callable[[Any], Any], body: Callable[[Any], Any], init: Any) -> Any:
    """The carry after `carry = body(carry)` as long as `test(carry)`, a bool scalar, is true; `init` if it is false at once.

    How often it runs is known only when it runs, so it has no gradient: to train through a loop, use `tw.scan`.
    Raises ShapeError or DTypeError for a carry whose type changes, naming its leaf; TraceError for random draws and changes of
    buffers inside.
    """
    t = current("while_loop")
    carry, structure = _leaves(init, "init of while_loop")
    if not carry:
        raise error(TraceError, "while_loop: init holds no Tensor, so that the test could never change")
    record = _Body(t, "while_loop")
    state = [record.input(c.type, f"carry {p}") for c, p in zip(carry, tree.paths(structure, "init"), strict=True)]
    with record.recorded(None):
        asked = as_tensor(test(tree.unflatten(structure, state)), what="the test of while_loop")
        if asked.shape != () or asked.dtype is not bool_:
            kind = ShapeError if asked.shape != () else DTypeError
            raise error(kind, "the test of while_loop gives a bool scalar; reduce with all or any", test=asked)
        updates = _same_types("while_loop", "carry", body(tree.unflatten(structure, state)), carry, structure)
    outputs = [u.node for u in updates]
    captured = record.captured([asked.node, *outputs])
    inside = [*(s.node for s in state), *captured]
    node = _made(
        t,
        "while_loop",
        [*(c.node for c in carry), *captured],
        test=closed(inside, [asked.node], _name(test, "test"), t.labels),
        body=closed(inside, outputs, _name(body, "body"), t.labels),
        carries=len(carry),
    )
    return tree.unflatten(structure, _parts(node, len(outputs)))


# Tracing a body


@dataclass
class _Body:
    """The recording of a function that becomes a body: stand-ins for what it gets, and what it used from around it.

    With `everything`, all that the function itself computes is in the body, also what depends on none of its arguments: a
    branch that is not taken computes nothing. In a loop that is better computed once, before it.
    """

    trace: Trace
    what: str
    everything: bool = False
    stand_ins: set[Node] = field(default_factory=set)
    made: set[Node] = field(default_factory=set)

    def input(self, type: TensorType, name: str) -> Tensor:
        """A stand-in, apart from that of any other body."""
        number = self.trace.fresh_mark()
        node = make("input", name=f"{name} in {self.what} {number}", role="data", dtype=type.dtype, shape=type.shape)
        self.stand_ins.add(node)
        return wrap(node)

    @contextmanager
    def recorded(self, key: Tensor | None, keep_key: bool = False) -> Iterator[None]:
        """Within the block, random draws take the key of a step, and changes of buffers are refused."""
        t, known = self.trace, len(self.trace.labels)
        before, updates, why = t.key, dict(t.updates), t.no_key
        if key is not None:
            t.key = key.node
        elif t.key is not None and not keep_key:
            t.no_key = f"in {self.what} would be the same in each step: draw before the loop, or use tw.scan"
        try:
            yield
            changed = [n for n, node in t.updates.items() if updates.get(n) is not node]
            if changed:
                t.updates.clear()
                t.updates.update(updates)
                raise error(
                    TraceError,
                    f"{self.what} changes the buffer {changed[0]!r}, and what its function computes leaves it only as a result: "
                    "carry the value, and update the buffer after it",
                )
        finally:
            t.key, t.no_key = before, why
            self.made = set(islice(t.labels, known, None))

    def captured(self, outputs: Sequence[Node]) -> list[Node]:
        """What the outputs use from around the body, in order; constants, and what is made of them alone, are not among it."""
        order = list(postorder(outputs))
        inside, steady = set(self.stand_ins), set[Node]()
        for n in order:
            if n.op.name == "constant" or (n.inputs and all(i in steady for i in n.inputs)):
                steady.add(n)
            elif any(i in inside for i in n.inputs) or (self.everything and n.inputs and n in self.made):
                inside.add(n)
        inside |= steady
        found: dict[Node, None] = {}
        edge = [i for n in order if n in inside for i in n.inputs if i not in inside]
        edge += [o for o in outputs if o not in inside]
        for n in edge:
            while len(n.inputs) == 1 and n.op.has(Trait.MOVEMENT):  # seen by what uses it in the body, and moved out if not
                n = n.inputs[0]
            if n not in steady:
                found[n] = None
        return list(found)


def _keys(t: Trace, steps: Dim) -> Tensor:
    """A key for each step, u64[steps], made of 64 random bits of the key around the loop."""
    words = apply("random_uniform", wrap(t.random_key()), shape=(steps, 3), stream=t.fresh_stream(), dtype=f64)
    whole = cast(words * 16777216.0, u64)  # 24 bits each
    return whole[:, 0] * (1 << 48) + whole[:, 1] * (1 << 24) + whole[:, 2]


def _leaves(value: Any, what: str) -> tuple[list[Tensor], tree.Structure]:
    leaves, structure = tree.flatten(value)
    return [as_tensor(v, what=what) for v in leaves], structure


def _length(stacks: Sequence[Value], paths: Sequence[str], length: Dim | None) -> Dim:
    """The number of steps, which all sequences must have. Raises ShapeError, AttributeValueError."""
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | DimExpr)):
        raise error(AttributeValueError, f"the length of a scan is an int, not {length!r}")
    if isinstance(length, int) and length < 0:
        raise error(AttributeValueError, f"the length of a scan cannot be negative: {length}")
    if not stacks:
        if length is None:
            raise error(AttributeValueError, "a scan without xs needs a length")
        return length
    for path, x in zip(paths, stacks, strict=True):
        if not x.shape:
            raise error(ShapeError, f"scan runs over the leading axis of xs, and {path} is a scalar", **{path: x})
        if x.shape[0] != stacks[0].shape[0]:
            first = f"{paths[0]} has {stacks[0].shape[0]}"
            raise error(ShapeError, f"the xs of a scan have one leading axis: {first}, {path} has {x.shape[0]}", **{path: x})
    if length is not None and length != stacks[0].shape[0]:
        raise error(ShapeError, f"length={length}, but {paths[0]} has {stacks[0].shape[0]} steps; leave length out", xs=stacks[0])
    return stacks[0].shape[0]


def _same_types(op: str, word: str, new: Any, old: Sequence[Tensor], structure: tree.Structure) -> list[Tensor]:
    """The new carry's leaves, with the types of the old one. Python numbers take the dtype they are put in the place of."""
    leaves, found = tree.flatten(new)
    if found != structure:
        raise error(TraceError, f"{op}: the {word} is {structure} at first, and the function makes it {found}")
    result: list[Tensor] = []
    for path, before, value in zip(tree.paths(structure, word), old, leaves, strict=True):
        after = as_tensor(value, before.dtype if not isinstance(value, Value) else None, f"the new {path}")
        if after.type != before.type:
            kind = ShapeError if after.shape != before.shape else DTypeError
            fix = "broadcast the first value" if kind is ShapeError else "cast one of them with .astype"
            raise error(kind, f"{op}: {path} is {before.type} at first, and a step makes it {after.type}; {fix}")
        result.append(after)
    return result


def _made(t: Trace, op: str, operands: Sequence[Node], **attrs: Any) -> Node:
    node = make(op, *operands, **attrs)
    t.label(node)
    return node


def _parts(node: Node, count: int) -> list[Tensor]:
    return [apply("get", Parts(node), index=k) for k in range(count)]


def _name(fn: Callable[..., Any], otherwise: str) -> str:
    text = getattr(fn, "__name__", otherwise)
    return text if text.isidentifier() else otherwise
