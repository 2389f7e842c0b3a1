"""Where a NaN or an infinity came from: the traced step, before any pass, run again in numpy, node by node.

The step keeps the state of before where its loss is not finite, so the same state and batch give the same values again, random
draws included. Values are freed after their last use.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.graph import Graph, Node, postorder
from ..ir.interp import Value, evaluate, execute
from ..ir.types import TupleType
from ..runtime.buffers import Array

_SHOWN: Final = 4  # operands whose value at the place is shown


@dataclass
class Finding:
    """`text` says what was found. `row` is the example of the batch, where it is the data's fault; `in_state` the weights'."""

    text: str
    row: int | None = None
    in_state: bool = False


def explain(graph: Graph, state: Mapping[str, Array], batch: Mapping[str, Array]) -> Finding:
    """The first op of a training step whose result is NaN (or else infinite) while its operands are not, or the input that is.

    `graph` is the step as traced; `state` and `batch` are arrays by input name.
    """
    for name, array in batch.items():
        if (at := _first(array, np.isnan)) is not None:
            return Finding(f"The data hold it: input {name!r} of the step is nan at {_place(at)}", at[0] if at else None)
    for name, array in state.items():
        if (at := _first(array, np.isnan)) is not None:
            what = "parameter or state"
            return Finding(
                f"The {what} {name!r} already held nan at {_place(at)} before this step: the gradient of an earlier step was not "
                "finite though its loss was (clip_global_norm catches that in its step)",
                in_state=True,
            )
    # here, as in the driver: a run whose program comes from the cache needs no passes
    from ..passes.manager import run_pipeline
    from ..passes.pipeline import parse

    plain = run_pipeline(graph, parse("gradient,drop_marks"))
    outputs = dict(zip(plain.output_names, plain.outputs, strict=True))
    judged = [outputs[n] for n in ("loss", "penalty") if n in outputs]
    with np.errstate(all="ignore"):
        walk = _Walk(plain, {**state, **batch})
        guilty = walk.run(judged) or walk.infinite(judged) or walk.run(plain.outputs) or walk.infinite(walk.tested(outputs))
    if guilty is None:
        return Finding(
            "The step as it was traced, run in numpy on the same batch and weights, gives finite numbers: they lie at the edge "
            "of what a float can hold, or the compiled step is wrong. Compile with TENSORWRIGHT_VALIDATE=1 to find out"
        )
    return Finding(f"It came from {guilty}")


class _Walk:
    """Evaluates nodes in order and remembers which held NaN or infinities; stops at the first NaN made of none."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Array]) -> None:
        self.graph = graph
        self.order = list(postorder(graph.outputs))
        self.values: dict[Node, Value] = {}
        self.flags: dict[Node, tuple[bool, bool]] = {}
        self.uses = Counter(i for n in self.order for i in n.inputs)
        for node in graph.inputs:
            self._keep(node, np.asarray(arrays[str(node.attrs["name"])]))

    def _keep(self, node: Node, value: Value) -> None:
        self.flags[node] = _flags(value)
        if self.uses[node]:
            self.values[node] = value

    def run(self, roots: Sequence[Node]) -> str | None:
        """Evaluates what the roots need; a description of the first node that made a NaN."""
        for node in postorder(roots):
            if node in self.flags:
                continue
            operands = [self.values[i] for i in node.inputs]
            value = evaluate(node, operands)
            nan, _ = _flags(value)
            if nan and not any(self.flags[i][0] for i in node.inputs):
                return self._describe(node, operands, value, np.isnan, "nan")
            for i in node.inputs:
                self.uses[i] -= 1
                if not self.uses[i]:
                    self.values.pop(i, None)
            self._keep(node, value)
        return None

    def infinite(self, roots: Sequence[Node]) -> str | None:
        """A description of the node where the infinity in one of the (evaluated) roots began."""
        for root in roots:
            if self.flags[root][1]:
                return self._origin(root)
        return None

    def tested(self, outputs: Mapping[str, Node]) -> list[Node]:
        """What the step's own test of finiteness looks at: floats that bools are made of."""
        if "finite" not in outputs:
            return []
        below = [n for n in postorder([outputs["finite"]]) if not isinstance(n.type, TupleType) and n.dtype.kind == "bool"]
        return [i for n in below for i in n.inputs if i in self.flags]

    def _origin(self, node: Node) -> str:
        while True:
            source = next((i for i in node.inputs if self.flags[i][1]), None)
            if source is None:
                return f"{_named(self.graph, node)}, which became infinite"
            node = source

    def _describe(self, node: Node, operands: Sequence[Value], value: Value, test: Any, word: str) -> str:
        if node.op.control is not None and (inner := _inside(node, operands)) is not None:
            return f"{inner}, within {_named(self.graph, node)}"
        text = f"{_named(self.graph, node)}, the first to give {word}"
        parts = value if isinstance(value, tuple) else (value,)
        at = next((p for v in parts if (p := _first(v, test)) is not None), ())
        shown = [_at(v, at, parts[0].shape) for v in operands[:_SHOWN] if not isinstance(v, tuple)]
        known = bool(shown) and all(shown)
        if known:
            text += f": at {_place(at)}, from {' and '.join(filter(None, shown))}"
            if not any(s and s.endswith("inf") for s in shown):
                return text
        endless = next((i for i in node.inputs if self.flags[i][1]), None)
        return text if endless is None else f"{text}. Infinite before it: {self._origin(endless)}"


def _inside(node: Node, operands: Sequence[Value]) -> str | None:
    """The node in the body of a loop or branch that made the first NaN there."""
    found: list[str] = []
    runs = 0

    def body(graph: Graph, arrays: Sequence[Array]) -> list[Array]:
        nonlocal runs
        walk = _Walk(graph, dict(zip((str(i.attrs["name"]) for i in graph.inputs), arrays, strict=True)))
        for output in graph.outputs:
            walk.uses[output] += 1  # kept: they are the results
        for i in graph.inputs:
            walk.values.setdefault(i, arrays[graph.inputs.index(i)])
        if not found and (guilty := walk.run(graph.outputs)):
            found.append(f"{guilty} (run {runs} of the body)")
        runs += 1
        if found:
            return execute(graph, arrays)
        return [np.asarray(walk.values[o]) for o in graph.outputs]

    assert node.op.control is not None
    node.op.control(operands, node.attrs, body)  # type: ignore[arg-type]
    return found[0] if found else None


def _flags(value: Value) -> tuple[bool, bool]:
    """(holds NaN, holds an infinity)"""
    nan = infinite = False
    for array in value if isinstance(value, tuple) else (value,):
        if array.dtype.kind not in "iub":
            wide = array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
            if not np.isfinite(wide).all():
                nan |= bool(np.isnan(wide).any())
                infinite |= bool(np.isinf(wide).any())
    return nan, infinite


def _first(array: Array, test: Any) -> tuple[int, ...] | None:
    """Where the first element that passes the test stands."""
    if array.dtype.kind in "iub":
        return None
    hit = test(array if array.dtype.isbuiltin == 1 else array.astype(np.float32))
    return tuple(int(i) for i in np.argwhere(hit)[0]) if hit.any() else None


def _at(value: Value, place: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """The operand's element at a place of the result, where both have one shape."""
    assert not isinstance(value, tuple)
    if value.shape == ():
        return f"{value.item():g}" if value.dtype.kind not in "b" else str(value.item())
    return f"{float(value[place]):g}" if value.shape == shape else None


def _place(at: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, at))}]"


def _named(graph: Graph, node: Node) -> str:
    """The op, its type, the module it belongs to and the user's line; of the nearest node that has one, if it has none."""
    if node.op.name == "input":
        return f"input {node.attrs['name']!r} {node.type}"
    text = f"op '{node.op.name}' {node.type}"
    seen, queue = {node}, deque([node])
    while queue:
        n = queue.popleft()
        label = graph.labels.get(n)
        if label is not None and label.location is not None:
            near = "" if n is node else "near "
            module = f" in module {label.name}" if label.name and n.op.name != "input" else ""
            return f"{text}{module} ({near}{label.location})"
        for i in n.inputs:
            if i not in seen and len(seen) < 1000:
                seen.add(i)
                queue.append(i)
    return text
