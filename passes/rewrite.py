"""Rewrite rules and the driver that applies them bottom-up until none applies.

A rule is a function `(node, facts) -> Node | Miss`. Its docstring states the algebra; a Miss says why it does not apply and
at which node. The operands of the node it is given are in normal form already.

Termination. Every application must make the term smaller in a Knuth-Bendix order, which the driver asserts: the nodes that
the old and the new term share are its variables; no variable may occur more often than before, and the total weight of
the operators above them must shrink, or stay and a tie be broken (precedence of the root, then order of the operands).
Such an order is closed under contexts, so no sequence of applications, in any order, goes on for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..ir.errors import TensorwrightError, VerifyError
from ..ir.expr import postorder as expr_postorder
from ..ir.graph import Graph, Label, Node
from ..ir.op import Trait
from .contract import Context, Missed
from .facts import Facts
from .labels import finish


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a rule does not apply, and the node that stands in its way."""

    reason: str
    node: Node


Outcome = Node | Miss
Apply = Callable[[Node, Facts], Outcome]
Order = Callable[[Node, Node, Facts], bool]


class RewriteError(TensorwrightError):
    """A rule broke its promise: it changed a type, or made a term larger."""


@dataclass(frozen=True)
class Rule:
    """A named rewrite; `doc` states its algebra. `forms`, if given, are the only ones (`Facts.form`) that it is tried on."""

    name: str
    apply: Apply
    doc: str
    forms: frozenset[str] = frozenset()


def rule(apply: Apply) -> Rule:
    """Makes a Rule of a function: its name is the rule's, its docstring the algebra (required)."""
    name, doc = getattr(apply, "__name__", "?"), apply.__doc__
    if not doc:
        raise VerifyError(f"rewrite rule {name}: a docstring must state its algebra")
    return Rule(name.strip("_"), apply, doc)


def rule_on(*forms: str) -> Callable[[Apply], Rule]:
    """As `rule`, for a rule that is tried on nodes of these forms only."""
    return lambda apply: replace(rule(apply), forms=frozenset(forms))


_EXPENSIVE = {"div": 4, "pow": 8, "floordiv": 4, "mod": 4, "sqrt": 3}


def operator_weight(node: Node, facts: Facts) -> int:
    """The weight of one operator: what its scalar form costs, at least 1."""
    if not node.inputs:
        return 1
    e = facts.scalar(node)
    if e is None:
        return 2 if node.op.has(Trait.MOVEMENT) and facts.kind(node) != "view" else 1
    return max(1, sum(_EXPENSIVE.get(x.op, 1) for x in expr_postorder([e]) if x.args))


def _precedence(node: Node, facts: Facts) -> int:
    kind = facts.kind(node)
    if kind == "leaf":
        return 0
    if kind == "view":
        return 1
    return 2 if node.op.has(Trait.MOVEMENT) else 3


def _disorder(node: Node, facts: Facts) -> int:
    uniform = [facts.uniform(i) is not None for i in node.inputs]
    return sum(a and not b for k, a in enumerate(uniform) for b in uniform[k + 1 :])


def _near(node: Node, depth: int) -> set[Node]:
    """The nodes at most `depth` levels under a node."""
    found: set[Node] = set()
    level = {node}
    for _ in range(depth):
        level = {i for n in level for i in n.inputs} - found
        found |= level
    return found


def _uniform_weight(node: Node) -> int:
    """A scalar constant is as good as one movement of it, which is better than several, or than one of an array of equals."""
    steps = 0
    while node.inputs:
        node, steps = node.inputs[0], steps + 1
    return max(1, steps + bool(node.shape))


def _term(node: Node, variables: set[Node], facts: Facts) -> tuple[int, Counter[Node]] | None:
    """Total operator weight above the variables and how often each occurs, as a tree; None if it grows too large to tell."""
    weight, count = 0, Counter[Node]()
    stack = [node]
    first = True
    while stack:
        n = stack.pop()
        if n in variables and not first:
            count[n] += 1
            weight += 1
        elif facts.uniform(n) is not None:
            weight += _uniform_weight(n)
        else:
            weight += operator_weight(n, facts)
            stack += n.inputs
        first = False
        if weight > 10_000:
            return None
    return weight, count


def smaller(before: Node, after: Node, facts: Facts, depth: int = 5) -> bool:
    """Whether `after` is smaller than `before` in the Knuth-Bendix order."""
    near = _near(before, depth)
    if after in near:
        return True
    variables: set[Node] = set()
    stack, seen = [after], {after}
    while stack:
        n = stack.pop()
        for i in n.inputs:
            if i in near and facts.uniform(i) is None:
                variables.add(i)
            elif i.inputs and i not in seen:
                seen.add(i)
                stack.append(i)
        if len(seen) > 1000:
            return False
    variables = _apart(variables, facts, depth)
    old, new = _term(before, variables, facts), _term(after, variables, facts)
    if old is None or new is None or any(new[1][v] > old[1][v] for v in variables):
        return False
    if new[0] != old[0]:
        return new[0] < old[0]
    before_rank, after_rank = _precedence(before, facts), _precedence(after, facts)
    if before_rank != after_rank:
        return after_rank < before_rank
    return _disorder(after, facts) < _disorder(before, facts)


def _apart(variables: set[Node], facts: Facts, depth: int) -> set[Node]:
    """Variables none of which contains another: one that does is replaced by its operands."""
    for _ in range(2 * depth):
        nested = {v for v in variables if not _near(v, depth).isdisjoint(variables - {v})}
        if not nested:
            break
        variables = variables - nested
        variables |= {i for v in nested for i in v.inputs if facts.uniform(i) is None}
    return variables


class Rewriter:
    """Applies rules to a graph, operands first, until none applies. Iterative; every rewrite takes fuel and is logged."""

    def __init__(self, rules: Sequence[Rule], ctx: Context, order: Order = smaller, uses: Counter[Node] | None = None) -> None:
        self.uses: Counter[Node] = Counter() if uses is None else uses
        self.rules = tuple(rules)
        self.ctx = ctx
        self.facts = ctx.facts
        self.order = order
        self.normal: dict[Node, Node] = {}
        self._forward: dict[Node, Node] = {}
        self._origin: dict[Node, Node] = {}
        self._out_of_fuel = False
        self._indexed: dict[str, tuple[Rule, ...]] = {}
        self._settled = self.facts.settled.setdefault(self.rules, set())

    def run(self, graph: Graph) -> Graph:
        """The graph in normal form; the graph itself if no rule applied."""
        if not self._may_apply(graph):
            return graph
        for i in graph.inputs:
            self.normal[i] = i
        for o in graph.outputs:
            self._normalise(o)
        labels = dict(graph.labels)
        for new, old in self._origin.items():
            if new not in labels and (label := self._label(old, labels)) is not None:
                labels[new] = label
        return finish(graph, [self.normal[o] for o in graph.outputs], labels)

    def _may_apply(self, graph: Graph) -> bool:
        """Whether some node has a form that some rule is tried on."""
        forms: set[str] = set().union(*(r.forms for r in self.rules))
        form = self.facts.form
        return not all(r.forms for r in self.rules) or any(n.inputs and form(n) in forms for n in graph.nodes())

    def _label(self, node: Node, labels: dict[Node, Label]) -> Label | None:
        seen = 0
        current: Node | None = node
        while current is not None and seen < 1000:
            if current in labels:
                return labels[current]
            current, seen = self._origin.get(current), seen + 1
        return None

    def _normalise(self, root: Node) -> None:
        normal, forward = self.normal, self._forward
        stack = [root]
        while stack:
            node = stack[-1]
            if node in normal:
                stack.pop()
                continue
            target = forward.get(node)
            if target is not None:
                if target in normal:
                    normal[node] = normal[target]
                    stack.pop()
                else:
                    stack.append(target)
                continue
            operands = node.inputs
            if not operands:
                normal[node] = node
                stack.pop()
                continue
            missing = [i for i in operands if i not in normal]
            if missing:
                stack += missing
                continue
            inputs = tuple([normal[i] for i in operands])
            new: Node | None
            if inputs != operands:
                new = node.replace(inputs)
                self._check_type(node, new, "replacing operands")
            else:
                new = self._step(node)
            if new is None:
                normal[node] = node
                stack.pop()
            else:
                self._origin.setdefault(new, node)
                self.uses[new] += self.uses[node]
                forward[node] = new
                stack.append(new)

    def _step(self, node: Node) -> Node | None:
        if self._out_of_fuel or not node.inputs:
            return None
        misses = self.ctx.misses
        if node in self._settled and misses is None:
            return None
        form = self.facts.form(node)
        rules = self._indexed.get(form)
        if rules is None:
            rules = self._indexed[form] = tuple(r for r in self.rules if not r.forms or form in r.forms)
        for r in rules:
            new = r.apply(node, self.facts)
            if isinstance(new, Miss):
                if misses is not None:
                    misses.append(Missed(r.name, new.reason, new.node))
                continue
            if new is node:
                continue
            self._check_type(node, new, f"rule {r.name}")
            if not self.order(node, new, self.facts):
                raise RewriteError(
                    f"rule {r.name} turned {node!r} of {list(node.inputs)} into {new!r} of {list(new.inputs)}, which is not "
                    "smaller in the order that guarantees termination"
                )
            if not self.ctx.spend(r.name, node):
                self._out_of_fuel = True
                return None
            return new
        self._settled.add(node)
        return None

    def _check_type(self, node: Node, new: Node, what: str) -> None:
        if new.type != node.type:
            raise RewriteError(f"{what} changed the type of {node!r} into {new.type}")


def apply_rules(
    graph: Graph, rules: Iterable[Rule], ctx: Context, order: Order = smaller, uses: Counter[Node] | None = None
) -> Graph:
    """The graph with the rules applied until none applies; the graph itself if none did.

    `uses` (from `use_counts`) is kept up to date for rules that ask it whether a node has one user only.
    """
    return Rewriter(tuple(rules), ctx, order, uses).run(graph)


def use_counts(graph: Graph) -> Counter[Node]:
    """How often each node is used: once for each operand and each output that it is."""
    return Counter([*(i for n in graph.nodes() for i in n.inputs), *graph.outputs])
