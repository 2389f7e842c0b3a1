"""Gradients of loops and branches.

The gradient of a scan is a scan the other way. With z the cotangent of a step's carries, and J the step's Jacobian,

    z[t - 1] = J_carry^T (z[t], dy[t])      dx[t] = J_x^T (z[t], dy[t])      dw = sum over t of J_w^T (z[t], dy[t])

What the step backward needs of the step forward (its residuals) is stacked by the forward scan if it is costly (contractions,
transcendental functions, reductions) and computed again if not; with save='inputs' only what a step started from is stacked, and
all else is computed again. For this the forward scan is written down once more with these results added; the control pass makes
one of the two. The sum for dw stays out of the loop where the term is a contraction: its two factors are stacked, and one
contraction over all steps follows. Otherwise, and with save='inputs', it is carried from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..batching import batched, contraction_of, step_axis
from ..build import full, get
from ..differentiate import vjp
from ..dims import Dim
from ..graph import Graph, Label, Node, postorder
from ..graphs import closed, rebuild, with_labels
from ..lowering import Reduce
from ..op import Trait, lookup, make
from ..types import TensorType, TupleType


def scan_gradient(node: Node, cotangents: Sequence[Node | None]) -> Sequence[Node | None]:
    """One cotangent for each operand of a scan; None where none flows."""
    if node.attrs["length"] == 0:
        carries = node.attrs["carries"]
        return [*cotangents[:carries], *(None for _ in node.inputs[carries:])]
    return _ScanGradient(node, cotangents).run()


class _ScanGradient:
    def __init__(self, node: Node, cotangents: Sequence[Node | None]) -> None:
        self.node, self.cotangents = node, cotangents
        a = node.attrs
        self.body: Graph = a["body"]
        self.length: Dim = a["length"]
        self.carries: int = a["carries"]
        self.first_fixed: int = a["carries"] + a["sequences"]
        self.keep_all: bool = a["save"] == "inputs"
        self.labels: dict[Node, Label] = {}
        self.operand: dict[Node, Node] = dict(zip(self.body.inputs, node.inputs, strict=True))
        self.kind: dict[Node, str] = {
            i: "carry" if k < self.carries else "xs" if k < self.first_fixed else "fixed" for k, i in enumerate(self.body.inputs)
        }
        # Filled while the step backward is taken apart:
        self.late: set[Node] = set()  # what depends on cotangents
        self.varies: set[Node] = set()  # what differs from step to step
        self.saved: dict[Node, None] = {}  # stacked by the forward scan
        self.emitted: dict[Node, None] = {}  # stacked by the backward scan
        self.sums: dict[Node, None] = {}  # summed in a carry of the backward scan
        self.stack_of: dict[Node, Node] = {}  # once the scans are made: the stack of a saved or emitted node

    def run(self) -> list[Node | None]:
        """The cotangents of the operands."""
        body, carries = self.body, self.carries
        self.seeds = [_seed(k, o.tensor) for k, o in enumerate(body.outputs)]
        parts, active = self._step_backward()
        if all(p is None for p in parts):
            return [None] * len(parts)
        self._classify([p for p in parts if p is not None])
        carry_parts = {k: parts[k] for k in sorted(active)}
        xs_parts = {k: p for k in range(carries, self.first_fixed) if (p := parts[k]) is not None}
        for p in xs_parts.values():
            self.emitted[p] = None
        recipes = {k: self._total(p) for k in range(self.first_fixed, len(parts)) if (p := parts[k]) is not None}
        self._make(carry_parts)
        result: list[Node | None] = [None] * len(parts)
        for number, k in enumerate(carry_parts):
            result[k] = get(self.backward, number)
        for k, p in xs_parts.items():
            result[k] = self.stack_of[p]
        for k, recipe in recipes.items():
            result[k] = recipe()
        return result

    def _step_backward(self) -> tuple[tuple[Node | None, ...], set[int]]:
        """The cotangents of one step's inputs, from those of its outputs; and which carries have one. A carry that gets one
        in some step hands it to the step before, so this is a fixpoint."""
        active = {k for k in range(self.carries) if self.cotangents[k] is not None}
        while True:
            seeds = [
                s if (k in active if k < self.carries else self.cotangents[k] is not None) else None
                for k, s in enumerate(self.seeds)
            ]
            labels = dict(self.body.labels)
            parts = vjp(self.body.outputs, self.body.inputs, seeds, labels)
            grown = active | {k for k in range(self.carries) if parts[k] is not None}
            if grown == active:
                self.labels = labels
                return parts, active
            active = grown

    # Taking the step backward apart

    def _classify(self, roots: Sequence[Node]) -> None:
        seeds = set(self.seeds)
        for n in postorder([*roots, *self.body.outputs]):
            if n in seeds or any(i in self.late for i in n.inputs):
                self.late.add(n)
            if n in seeds or self.kind.get(n) in ("carry", "xs") or any(i in self.varies for i in n.inputs):
                self.varies.add(n)

    def _total(self, part: Node) -> Callable[[], Node]:
        """Says how the sum over the steps of a cotangent of an invariant is computed once the scans are there."""
        recipes = [self._term(chain, core) for chain, core in _terms(part)]

        def total() -> Node:
            result = recipes[0]()
            for r in recipes[1:]:
                result = make("add", result, r())
            return result

        return total

    def _term(self, chain: Sequence[Node], core: Node) -> Callable[[], Node]:
        spec = contraction_of(core)
        low = core.op.lower(core) if core.inputs and not core.op.has(Trait.STRUCTURAL) else None

        def moved(x: Node) -> Node:
            for m in reversed(chain):
                x = m.replace((x,))
            return x

        if not self.keep_all and spec is not None and any(self._differs(i) for i in core.inputs):
            factors = [self._stacked(i) for i in core.inputs]

            def product() -> Node:
                (a, in_a), (b, in_b) = (f() for f in factors)
                return moved(make("contract", a, b, spec=step_axis(spec, in_a, in_b, False, self.length)))

            return product
        if not self.keep_all and isinstance(low, Reduce) and low.kind == "sum" and low.axes is not None:
            summand = self._stacked(core.inputs[0])
            axes = (0, *(a + 1 for a in low.axes))

            def reduced() -> Node:
                value = make("sum", summand()[0], axes=axes, keepdims=False)
                return moved(value if value.shape == core.shape else make("reshape", value, shape=core.shape))

            return reduced
        if core in self.emitted or (self.carries == 0 and not self.keep_all):
            self.emitted[core] = None
            return lambda: moved(make("sum", self.stack_of[core], axes=(0,), keepdims=False))
        self.sums[core] = None
        return lambda: moved(self.sum_of[core])

    def _differs(self, n: Node) -> bool:
        return n in self.varies or n in self.late

    def _stacked(self, n: Node) -> Callable[[], tuple[Node, bool]]:
        """Says how the values of a node in all steps are had outside of the loops; the bool: whether they differ at all."""
        if not self._differs(n):
            return lambda: (rebuild([n], self.operand)[0], False)
        if self.kind.get(n) == "xs":
            return lambda: (self.operand[n], True)
        if n.inputs and n.op.has(Trait.MOVEMENT) and len(n.inputs) == 1:
            inner = self._stacked(n.inputs[0])
            if batched(n, [(_lead(n.inputs[0], self.length), True)], self.length) is not None:

                def moved() -> tuple[Node, bool]:
                    made = batched(n, [inner()], self.length)
                    assert made is not None
                    return made, True

                return moved
        if n in self.late:
            self.emitted[n] = None
        else:
            self.saved[n] = None
        return lambda: (self.stack_of[n], True)

    # What the step backward needs of the step forward

    def _residuals(self, roots: Iterable[Node]) -> dict[Node, None]:
        """The nodes without a cotangent in them that the roots need, and that are not computed again: stacked ones, and inputs
        of the body."""
        found: dict[Node, None] = {}
        seen: set[Node] = set()
        stack = list(roots)[::-1]
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n in self.late or not self._kept(n):
                stack += reversed(n.inputs)
            elif n in self.kind or n.inputs:
                found[n] = None
        return found

    def _kept(self, n: Node) -> bool:
        """Whether a node is taken from the forward scan and not computed again."""
        if not n.inputs:
            return True
        if n in self.saved:
            return True  # somebody needs its stack anyway
        if self.keep_all or n not in self.varies or isinstance(n.type, TupleType):
            return False
        if isinstance(n.inputs[0].type, TupleType):  # a part of an op with several results: of a loop, say
            return True
        if n.op.has(Trait.MOVEMENT) and len(n.inputs) == 1:  # a slice of something costly: the slice, if that is all
            (source,) = n.inputs
            return source.inputs != () and self._kept(source) and source not in self.saved and _smaller(n, source)
        return not (n.op.has(Trait.CHEAP) or n.op.has(Trait.MOVEMENT) or n.op.has(Trait.VIEW))

    # The scans

    def _make(self, carry_parts: Mapping[int, Node | None]) -> None:
        """Makes both scans, and notes where the stacks are."""
        node, body, a = self.node, self.body, self.node.attrs
        new_carries = [full(0, body.inputs[k].tensor) if p is None else p for k, p in carry_parts.items()]
        needed = self._residuals([*new_carries, *self.emitted, *self.sums])
        for n in needed:
            if n not in self.kind or self.kind[n] == "carry":
                self.saved[n] = None
        # forward: the same scan with more stacked results
        stacked = {n: self.carries + k for k, n in enumerate(body.outputs[self.carries :])}
        extra = [n for n in self.saved if n not in stacked]
        forward = node
        if extra:
            wider = Graph(body.inputs, (*body.outputs, *extra), (), body.name, (), body.labels)
            forward = make(node.op, *node.inputs, **{**a, "body": with_labels(wider, self.labels)})
        for k, n in enumerate(extra):
            stacked[n] = len(body.outputs) + k
        # Those that the scan gave already are taken from it, so that an extra result alone makes no difference to who uses them.
        self.stack_of = {n: get(forward if n in extra else node, stacked[n]) for n in self.saved}
        # backward
        seeds = [self.seeds[k] for k in carry_parts]
        starts = [cot if (cot := self.cotangents[k]) is not None else full(0, body.inputs[k].tensor) for k in carry_parts]
        sums = list(self.sums)
        totals = [_seed(len(self.seeds) + k, s.tensor) for k, s in enumerate(sums)]
        xs = [(n, self.operand[n]) for n in needed if self.kind.get(n) == "xs"]
        xs += [(n, self.stack_of[n]) for n in needed if n in self.stack_of]
        xs += [(self.seeds[k], c) for k, c in enumerate(self.cotangents) if k >= self.carries and c is not None]
        fixed = [(n, self.operand[n]) for n in needed if self.kind.get(n) == "fixed"]
        outputs = [*new_carries, *(make("add", t, s) for t, s in zip(totals, sums, strict=True)), *self.emitted]
        inside = [*seeds, *totals, *(n for n, _ in xs), *(n for n, _ in fixed)]
        operands = [*starts, *(full(0, s.tensor) for s in sums), *(o for _, o in xs), *(o for _, o in fixed)]
        self.backward = make(
            node.op,
            *operands,
            **{
                **a,
                "body": closed(inside, outputs, f"{body.name}_backward", self.labels),
                "carries": len(seeds) + len(sums),
                "sequences": len(xs),
                "reverse": not a["reverse"],
            },
        )
        self.sum_of = {s: get(self.backward, len(seeds) + k) for k, s in enumerate(sums)}
        before = len(seeds) + len(sums)
        self.stack_of |= {n: get(self.backward, before + k) for k, n in enumerate(self.emitted)}


def _smaller(a: Node, b: Node) -> bool:
    x, y = a.tensor.size, b.tensor.size
    return isinstance(x, int) and isinstance(y, int) and x < y


def _seed(number: int, type: TensorType) -> Node:
    return make("input", name=f"d{number}", role="data", dtype=type.dtype, shape=type.shape)


def _lead(n: Node, length: Dim) -> Node:
    """A stand-in for the stack of a node, to ask for a rule with."""
    return make("input", name="stack", role="data", dtype=n.dtype, shape=(length, *n.shape))


def _terms(part: Node) -> list[tuple[list[Node], Node]]:
    """A sum as its terms, each a core under a chain of movements (outermost first), which are linear."""
    add = lookup("add")
    found: list[tuple[list[Node], Node]] = []
    stack: list[tuple[list[Node], Node]] = [([], part)]
    while stack:
        chain, n = stack.pop()
        if n.op is add:
            stack += [(chain, i) for i in reversed(n.inputs)]
        elif len(n.inputs) == 1 and n.op.has(Trait.MOVEMENT) and n.attrs.get("value", 0.0) == 0.0:
            stack.append(([*chain, n], n.inputs[0]))
        else:
            found.append((chain, n))
    return found


def cond_gradient(node: Node, cotangents: Sequence[Node | None]) -> Sequence[Node | None]:
    """One cotangent for each operand of a cond: a cond of the branches' gradients, each of which runs its branch again."""
    operands, given = node.inputs[1:], [(k, c) for k, c in enumerate(cotangents) if c is not None]
    branches: dict[str, tuple[Graph, tuple[Node | None, ...], list[Node], dict[Node, Label]]] = {}
    for key in ("then", "orelse"):
        body: Graph = node.attrs[key]
        labels = dict(body.labels)
        seeds = [_seed(k, o.tensor) for k, o in enumerate(body.outputs)]
        wanted = {k for k, _ in given}
        parts = vjp(body.outputs, body.inputs, [s if k in wanted else None for k, s in enumerate(seeds)], labels)
        branches[key] = (body, parts, [seeds[k] for k, _ in given], labels)
    flows = [k for k in range(len(operands)) if any(b[1][k] is not None for b in branches.values())]
    if not flows:
        return [None] * len(node.inputs)
    attrs: dict[str, Graph] = {}
    for key, (body, parts, seeds, labels) in branches.items():
        outputs = [full(0, body.inputs[k].tensor) if (p := parts[k]) is None else p for k in flows]
        attrs[key] = closed([*body.inputs, *seeds], outputs, f"{body.name}_backward", labels)
    made = make(node.op, node.inputs[0], *operands, *(c for _, c in given), **attrs)
    result: list[Node | None] = [None] * len(node.inputs)
    for number, k in enumerate(flows):
        result[1 + k] = get(made, number)
    return result
