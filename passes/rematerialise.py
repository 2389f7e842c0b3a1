"""Keeps a program within a memory budget by computing some values again instead of keeping them.

    ... v = f(x) ... g(v) ............................. h(v) ...
    ... v = f(x) ... g(v) ... v' = f(recompute{id}(x, w)); h(v') ...        w is what is computed just before h(v)

A forward pass leaves behind what the backward pass reads much later. Between its last early use and its first late one a
value does nothing but take room; where what it was computed from is still there then (or is cheap to compute again too),
its kernel can run a second time instead. The barrier keeps the two apart, and its second operand makes the second one
wait until the first late use is next.

The choice is greedy, in the order in which the memory planner would run the kernels: at the fullest step, of all values
that lie idle over it, take the one with the most bytes above the budget, times the steps it frees them for, per cost of
computing it again; then look at the fullest step anew. Cost is bytes moved plus flops at BALANCE flops a byte: batch
norms and activations go long before convolutions. When the estimate fits, the planner has the last word.

Chen et al. 2016 ("Training Deep Nets with Sublinear Memory Cost") keep every sqrt(n)-th layer and compute segments again;
Jain et al. 2020 ("Checkmate") solve for the best schedule as an integer program. Greedy choice on the planner's own order
needs no layers, takes fractions of a second, and ends at sqrt(n) segments where every layer costs the same.

The kernels that run again are those that ran before, so that every bit is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Final, NamedTuple

from ..ir.build import get
from ..ir.cost import node_cost
from ..ir.errors import CompileError
from ..ir.graph import Graph, Label, Node
from ..ir.memory import MemoryUse, Recomputation, Rematerialisation, show_bytes
from ..ir.op import make
from ..ir.ops.structural import CONSTANT, GET, INPUT
from ..ir.types import TupleType, Type
from .contract import Context, Pass
from .facts import Facts
from .labels import finish

BALANCE: Final = 10  # flops that take as long as moving one byte
MAX_CHAIN: Final = 24  # kernels that may run again for one value
SHARES: Final = (0.8, 0.6, 0.4, 0.2, 0.0)  # of the arena without recomputation, to aim at one after another
ROUNDS: Final = 12  # times that the planner is asked whether the estimate was right


@dataclass(frozen=True)
class Rematerialise(Pass):
    """memory_budget: the most bytes that one run may need, inputs, parameters and state included; 0: any number."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient", "decomposed"})
    memory_budget: int = 0

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with some kernels run twice; the graph itself if it fits the budget as it is.

        Leaves a Rematerialisation in `ctx.notes`. Raises CompileError where the budget cannot be met, with the least peak
        that was reached.
        """
        if self.memory_budget <= 0:
            return graph
        if ctx.memory_model is None:
            raise CompileError("rematerialise needs the code generator's memory model in its context, and there is none")
        use = ctx.memory_model(graph)
        before = least = use.peak
        if before <= self.memory_budget:
            ctx.notes["rematerialise"] = Rematerialisation(self.memory_budget, before, before, ())
            return graph
        room = self.memory_budget - use.fixed
        targets = [(room, ROUNDS)] if room > 0 else []
        # Where the greedy way down ends above the budget, one that aims lower may not. These do not depend on the budget, so
        # that the least peak among them is one that can be asked for.
        targets += [(int(use.arena * share), 1) for share in SHARES]
        for target, rounds in targets:
            result, peak, points = self._attempt(graph, use, target, ctx, rounds)
            least = min(least, peak)
            if peak > self.memory_budget:
                continue
            allowed = sum(ctx.spend("recompute", node) for node, _ in points)
            if allowed < len(points):  # out of fuel
                return self._attempt(graph, use, target, ctx, rounds, allowed)[0]
            shown = tuple(p for _, p in points)
            ctx.notes["rematerialise"] = Rematerialisation(self.memory_budget, before, peak, shown)
            return result
        raise CompileError(
            f"{graph.name}: a memory budget of {self.memory_budget:,} bytes ({show_bytes(self.memory_budget)}) cannot be met: "
            f"{use.fixed:,} are inputs, parameters, state, constants and outputs, and the least peak that recomputation reached "
            f"is {least:,} ({show_bytes(least)}; without any it is {show_bytes(before)}). Give that much, or take a smaller batch"
        )

    def _attempt(
        self, graph: Graph, use: MemoryUse, target: int, ctx: Context, rounds: int, limit: int | None = None
    ) -> tuple[Graph, int, list[_Point]]:
        """The graph with the arena brought down towards `target` bytes, the peak of a run, and what is computed again: at most
        `limit` values."""
        assert ctx.memory_model is not None
        schedule = _Schedule(graph, use, ctx.facts)
        points: list[_Point] = []
        result, peak = graph, use.peak
        for _ in range(rounds):
            found = _reach(schedule, target, None if limit is None else limit - len(points))
            if not found:
                break
            points += found
            result = schedule.build()
            peak = ctx.memory_model(result).peak
            if peak <= self.memory_budget:
                break
            target = min(target, schedule.peak()) - (peak - self.memory_budget)
        return result, peak, points

    @property
    def command(self) -> str:
        return f"'{self}'"

    def apply(self, graph: Graph, ctx: Context) -> Graph:
        """`run` on the graph alone: its budget is that of the whole program, the body of a loop is one kernel here."""
        return self.run(graph, ctx)


class _Kernel:
    """One call of a kernel: the node it is, and where its operands come from."""

    __slots__ = ("again", "credit", "node", "outside", "price", "reads", "sizes", "workspace")

    def __init__(self, node: Node, price: float) -> None:
        self.node = node
        self.price = price
        self.reads: dict[tuple[Node, int], tuple[_Kernel, int]] = {}  # the value as the graph has it -> whose it is now
        self.outside: list[Node] = []  # inputs of the graph that it reads
        self.sizes: dict[int, int] = {}  # bytes in the arena by result
        self.workspace = 0
        self.credit = 0  # bytes of results that take an operand's memory
        self.again = 0  # the number of the recomputation that it belongs to


_Value = tuple[_Kernel, int]
_Point = tuple[Node, Recomputation]


@dataclass
class _Choice:
    """A value to compute again before step `at`, by running `chain` again; what it frees, and what it costs."""

    value: _Value
    at: int
    chain: list[_Kernel]
    price: float
    score: float


class _Saved(NamedTuple):
    order: list[_Kernel]
    reads: list[dict[tuple[Node, int], _Value]]
    number: int


class _Schedule:
    """The kernels in the order in which they run, with what is computed again put in."""

    def __init__(self, graph: Graph, use: MemoryUse, facts: Facts) -> None:
        self.graph, self.facts = graph, facts
        self.number = 0
        known = {n: _Kernel(n, _price(n)) for n in use.order}
        self.order = list(known.values())
        for k, space in zip(self.order, use.workspace, strict=True):
            k.workspace = space
        self.kept: set[_Value] = set()  # read at the very end
        for v in use.values:
            known[v.node].sizes[v.index] = v.nbytes
            if v.in_place:
                known[v.node].credit += v.nbytes
        for k in self.order:
            for operand in k.node.inputs:
                root = self._root(operand)
                if root[0] in known:
                    k.reads[root] = (known[root[0]], root[1])
                elif root[0].op is INPUT:
                    k.outside.append(root[0])
        ends = [self._root(o) for o in graph.outputs]
        self.kept = {(known[n], i) for n, i in ends if n in known}
        donated = [(graph.inputs[i], ends[o]) for o, i in graph.aliases]
        self.overwrites = {i: known[end[0]] for i, end in donated if end[0] in known}
        self._index()

    def _root(self, node: Node) -> tuple[Node, int]:
        """The kernel's result whose bytes a value is: through views and parts."""
        k = 0
        while True:
            if node.op is GET:
                node, k = node.inputs[0], int(node.attrs["index"])
            elif node.inputs and self.facts.kind(node) == "view":
                node, k = node.inputs[0], 0
            else:
                return node, k

    def _index(self) -> None:
        """Finds positions and uses anew."""
        self.position = {k: at for at, k in enumerate(self.order)}
        self.uses: dict[_Value, list[int]] = {}
        for at, k in enumerate(self.order):
            for value in dict.fromkeys(k.reads.values()):
                self.uses.setdefault(value, []).append(at)
        for value in self.kept:
            self.uses.setdefault(value, []).append(len(self.order))

    def live(self) -> list[int]:
        """Bytes of the arena in use at each step."""
        change = [0] * (len(self.order) + 1)
        for at, k in enumerate(self.order):
            for i, n in k.sizes.items():
                change[at] += n
                last = self.uses.get((k, i), (at,))[-1]
                if last + 1 < len(change):
                    change[last + 1] -= n
        total = list(accumulate(change[:-1]))
        return [n + k.workspace - k.credit for n, k in zip(total, self.order, strict=True)]

    def peak(self) -> int:
        return max(self.live(), default=0)

    # Choosing.

    def choices(self, live: Sequence[int], at: int, target: int) -> list[_Choice]:
        """The values that lie idle over step `at`, those most worth computing again first."""
        over = [max(0, n - target) for n in live]
        small = live[at] >> 12
        found: list[_Choice] = []
        for k in self.order[:at]:
            for i, n in k.sizes.items():
                if n <= small:
                    continue  # hundreds of them would not be felt
                uses = self.uses.get((k, i), [])
                later = next((u for u in uses if u >= at), None)
                if later is None or later == at or later >= len(self.order):
                    continue
                earlier = max((u for u in uses if u < at), default=self.position[k])
                chain = self.chain(k, later)
                if chain is None:
                    continue
                freed = sum(min(n, x) for x in over[earlier + 1 : later])
                price = sum(c.price for c in chain)
                found.append(_Choice((k, i), later, chain, price, freed / price))
        return sorted(found, key=lambda c: -c.score)

    def chain(self, kernel: _Kernel, at: int) -> list[_Kernel] | None:
        """The kernels to run again before step `at` for the results of one of them, in order; None if that cannot be."""
        needed: dict[_Kernel, None] = {}
        stack = [kernel]
        while stack:
            k = stack.pop()
            if k in needed:
                continue
            needed[k] = None
            if len(needed) > MAX_CHAIN or not (k.reads or k.outside):
                return None
            if any(i in self.overwrites and self.position[self.overwrites[i]] < at for i in k.outside):
                return None  # the input holds its new value by then
            for value in k.reads.values():
                if value[1] in value[0].sizes and self.uses[value][-1] < at:
                    stack.append(value[0])
        return sorted(needed, key=self.position.__getitem__)

    def apply(self, choice: _Choice) -> None:
        """Puts the chain in before its step; the late readers of its last kernel's results read the new ones."""
        self.number += 1
        copies: dict[_Kernel, _Kernel] = {}
        for k in choice.chain:
            new = copies[k] = _Kernel(k.node, k.price)
            new.reads = {v: (copies.get(p, p), i) for v, (p, i) in k.reads.items()}
            new.outside, new.sizes, new.workspace, new.again = k.outside, dict(k.sizes), k.workspace, self.number
        old = choice.value[0]
        for k in self.order[choice.at :]:
            for v, (p, i) in k.reads.items():
                if p is old:
                    k.reads[v] = (copies[old], i)
        self.order[choice.at : choice.at] = copies.values()
        self._index()

    def saved(self) -> _Saved:
        """What `restore` takes the schedule back to."""
        return _Saved(list(self.order), [dict(k.reads) for k in self.order], self.number)

    def restore(self, state: _Saved) -> None:
        self.order, self.number = list(state.order), state.number
        for k, reads in zip(self.order, state.reads, strict=True):
            k.reads = dict(reads)
        self._index()

    # Building.

    def build(self) -> Graph:
        """The graph of this schedule."""
        made: dict[_Kernel, Node] = {}
        labels: dict[Node, Label] = dict(self.graph.labels)
        before: Node | None = None
        for at, k in enumerate(self.order):
            if at and self.order[at - 1].again != k.again:
                before = made[self.order[at - 1]]
            inputs = [self._operand(x, k, made) for x in k.node.inputs]
            if k.again and before is not None and not any(p.again == k.again for p, _ in k.reads.values()):
                inputs = self._barrier(k, inputs, before)
            made[k] = k.node.replace(tuple(inputs))
            self._label(k.node, made[k], labels)
        first = {k.node: k for k in self.order if not k.again}
        outputs = [
            self._rebuilt(o, {r: (first[r[0]], r[1]) for r in [self._root(o)] if r[0] in first}, made) for o in self.graph.outputs
        ]
        return finish(self.graph, outputs, labels)

    def _barrier(self, k: _Kernel, inputs: list[Node], before: Node) -> list[Node]:
        """The operands of a kernel that runs again, one of them behind the barrier: the first that is no constant."""
        wait = get(before, 0) if isinstance(before.type, TupleType) else before
        at = next(j for j, x in enumerate(k.node.inputs) if self._root(x) in k.reads or self._root(x)[0].op is INPUT)
        inputs[at] = make("recompute", inputs[at], wait, id=k.again)
        return inputs

    def _operand(self, x: Node, k: _Kernel, made: dict[_Kernel, Node]) -> Node:
        return self._rebuilt(x, k.reads, made)

    def _rebuilt(self, x: Node, reads: dict[tuple[Node, int], _Value], made: dict[_Kernel, Node]) -> Node:
        """A value with the kernel at its root replaced by the one that it is read from now."""
        path: list[Node] = []
        node = x
        while node.op is GET or (node.inputs and node.op is not CONSTANT and self.facts.kind(node) == "view"):
            path.append(node)
            node = node.inputs[0]
        root = self._root(x)
        if root not in reads:
            return x
        new = made[reads[root][0]]
        for n in reversed(path):
            new = n.replace((new, *(self._late(w, made) for w in n.inputs[1:])))
        return new

    def _late(self, w: Node, made: dict[_Kernel, Node]) -> Node:
        """What a barrier that was there before waits for, as it is now."""
        root = self._root(w)
        first = next((k for k in made if k.node is root[0]), None)
        return w if first is None else self._rebuilt(w, {root: (first, root[1])}, made)

    @staticmethod
    def _label(old: Node, new: Node, labels: dict[Node, Label]) -> None:
        if old in labels:
            labels.setdefault(new, labels[old])


def _reach(schedule: _Schedule, target: int, limit: int | None) -> list[_Point]:
    """Puts recomputations in until the estimate is at most `target`, nothing helps any more, or there are `limit`."""
    done: list[_Point] = []
    while limit is None or len(done) < limit:
        live = schedule.live()
        peak = max(live, default=0)
        if peak <= target:
            break
        at = live.index(peak)
        chosen = _first_that_helps(schedule, schedule.choices(live, at, target), peak)
        if chosen is None:
            break
        reader = schedule.order[chosen.at].node
        done.append((chosen.value[0].node, _described(schedule.graph, chosen, reader)))
        schedule.apply(chosen)
    return done


def _first_that_helps(schedule: _Schedule, choices: Iterable[_Choice], peak: int) -> _Choice | None:
    """The first choice whose own run does not need as much as what it is to relieve."""
    for choice in choices:
        if choice.score <= 0:
            return None
        before = schedule.saved()
        schedule.apply(choice)
        live = schedule.live()
        schedule.restore(before)
        if max(live[choice.at : choice.at + len(choice.chain) + 1]) < peak:
            return choice
    return None


def _price(node: Node) -> float:
    cost = node_cost(node)
    return max(1.0, cost.bytes + cost.flops / BALANCE)


def _described(graph: Graph, choice: _Choice, reader: Node) -> Recomputation:
    costs = [node_cost(k.node) for k in choice.chain]
    kernel, index = choice.value
    return Recomputation(
        value=f"{_type(kernel.node, index)} {_what(graph, kernel.node)}",
        nbytes=kernel.sizes[index],
        before=_what(graph, reader),
        kernels=len(choice.chain),
        flops=sum(c.flops for c in costs),
        moved=sum(c.bytes for c in costs),
    )


def _type(node: Node, index: int) -> Type:
    return node.type.items[index] if isinstance(node.type, TupleType) else node.type


def _what(graph: Graph, node: Node) -> str:
    """A kernel in words: what it does, and where that is in the user's source."""
    body = node.attrs.get("body")
    ops = [n.op.name for n in body.nodes() if n.inputs] if isinstance(body, Graph) else [node.op.name]
    ops = [o for o in dict.fromkeys(ops) if o not in ("broadcast_to", "reshape")] or ops
    name = "+".join(ops if len(ops) <= 4 else [*ops[:2], "...", ops[-1]])
    where = graph.location(node)
    return f"{name} at {where.file.rsplit('/', 1)[-1]}:{where.line}" if where else name
