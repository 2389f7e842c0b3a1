"""Gradient accumulation: a loop over micro-batches inside the step, so that only one of them has its activations in memory.

    a batch of k * b examples -> [k, b, ...] -> scan: carry + (what one micro-batch adds) -> sums

The body is traced in the step's own trace, on stand-ins for the micro-batch, for the running statistics and for the random
key; then the nodes are cut out into the loop's body, and what they use from around it becomes an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import ShapeError, TraceError
from ..ir.graph import Node, postorder
from ..ir.graphs import closed
from ..ir.op import make
from ..ir.types import TensorType
from . import tree
from .context import Trace, error
from .core import apply, wrap
from .gradients import Parts
from .movement import reshape, zeros
from .parameter import Parameter
from .tensor import Tensor

Body = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


class MicroBatches:
    """The loop over `count` equal parts of a batch. `split` what differs between them, then `run` the body."""

    def __init__(self, t: Trace, count: int, buffers: Mapping[str, Parameter]) -> None:
        self.t, self.count, self.buffers = t, count, buffers
        self.examples: int | None = None
        self._made = 0
        self._sequences: list[tuple[Node, Tensor]] = []  # (stand-in, the whole in parts)
        self._fixed: list[tuple[Node, Node]] = []  # (stand-in, value outside)

    def _stand_in(self, type: TensorType) -> Node:
        self._made += 1
        return make("input", name=f"micro batch: {self._made}", role="data", dtype=type.dtype, shape=type.shape)

    def split(self, values: Any) -> Any:
        """A tree of Tensors of the whole batch, as Tensors of one micro-batch.

        Raises ShapeError for a Tensor whose first axis is not the whole batch, or does not divide by the number of parts.
        """
        return tree.map_leaves(lambda v: self._part(v) if isinstance(v, Tensor) else v, values)

    def _part(self, whole: Tensor) -> Tensor:
        size = whole.shape[0] if whole.shape else None
        if not isinstance(size, int):
            raise error(ShapeError, "accumulate= needs batches of a known size, counted by the first axis", batch=whole)
        self.examples = size if self.examples is None else self.examples
        if size != self.examples or size % self.count or not size:
            raise error(
                ShapeError,
                f"accumulate={self.count} cuts every batch input along its first axis into {self.count} equal parts; the first "
                f"input has {self.examples} examples",
                batch=whole,
            )
        parts = reshape(whole, (self.count, size // self.count, *whole.shape[1:]))
        node = self._stand_in(TensorType(whole.dtype, parts.shape[1:]))
        self._sequences.append((node, parts))
        return wrap(node)

    def fixed(self, value: Tensor) -> Tensor:
        """A Tensor computed once, outside the loop, for use in its body."""
        node = self._stand_in(value.type)
        self._fixed.append((node, value.node))
        return wrap(node)

    def run(self, body: Body) -> tuple[list[Tensor], list[Tensor], Node | None]:
        """Traces `body() -> (what to sum, what to stack)` and makes the loop.

        Returns the sums over micro-batches, the stacked values with the micro-batches put together again along the first
        axis, and the random key after the last draw (None if nothing was drawn). The trace's updates of buffers are those
        after the last micro-batch. Raises TraceError for a value to be stacked without an axis of examples.
        """
        t = self.t
        before = set(t.inputs)
        outside = {n: (b, t.read(b), self._stand_in(b.type)) for n, b in self.buffers.items()}
        key, earlier = t.key, dict(t.updates)
        assert key is not None
        t.key = key_in = self._stand_in(TensorType(key.dtype, ()))
        with t.bind([(b, inner) for b, _, inner in outside.values()]):
            sums, stacks = body()
        t.key = key
        updates, t.updates = t.updates, earlier
        for s in stacks:
            if not s.shape or s.shape[0] != (self.examples or 0) // self.count:
                raise error(TraceError, "with accumulate=, a prediction has the micro-batch as its first axis", prediction=s)
        carried: list[tuple[Node, Tensor, Node]] = []  # (stand-in, start, value after a step)
        for s in sums:
            inner = self._stand_in(s.type)
            carried.append((inner, zeros(s.shape, s.dtype), (wrap(inner) + s).node))
        names = [n for n in outside if t.name_of(self.buffers[n]) in updates]
        for n in names:
            b, start, inner = outside[n]
            carried.append((inner, wrap(start), updates[t.name_of(b)]))
        if t.drew_random:
            carried.append((key_in, wrap(key), (wrap(key_in) + np.uint64(1)).node))
        results = [after for _, _, after in carried] + [s.node for s in stacks]
        used = set(postorder(results))
        loose = [(inner, start) for n, (_, start, inner) in outside.items() if n not in names] + self._fixed
        known = {inner for inner, _, _ in carried} | {inner for inner, _ in self._sequences}
        invariants = [(inner, value) for inner, value in loose if inner in used]
        known |= {inner for inner, _ in invariants}
        invariants += [(n, n) for n in postorder(results) if n.op.name == "input" and n not in known]
        for n in set(t.inputs) - before:
            if t.inputs[n] not in {value for _, value in invariants} | {start.node for _, start, _ in carried}:
                del t.inputs[n], t.parameters[n]  # a buffer that nobody read
        inside = [*(i for i, _, _ in carried), *(i for i, _ in self._sequences), *(i for i, _ in invariants)]
        operands = [*(s.node for _, s, _ in carried), *(p.node for _, p in self._sequences), *(v for _, v in invariants)]
        graph = closed(inside, results, "micro_batch", t.labels)
        sizes = {"length": self.count, "carries": len(carried), "sequences": len(self._sequences)}
        loop = make("scan", *operands, body=graph, save="inputs", **sizes)  # nothing moves out to be done for all parts at once
        t.label(loop)
        parts = Parts(loop)
        outputs = [apply("get", parts, index=i) for i in range(len(results))]
        for k, n in enumerate(names):
            t.update(self.buffers[n], outputs[len(sums) + k].node)
        last = outputs[len(carried) - 1].node if t.drew_random else None
        together = [reshape(v, (self.examples or 0, *v.shape[2:])) for v in outputs[len(carried) :]]
        return outputs[: len(sums)], together, last
