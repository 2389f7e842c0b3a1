"""What a pass is: a named, typed step from graph to graph that says what it needs, what it promises and what it may change.

A pass is a frozen dataclass; its fields are its options. `kind` says how much it may change the values:

    exact        the same bits (any NaN is as good as any other)
    equivalent   the same reals in another order of rounding: within per-op error budgets of an f64 oracle
    derivative   `gradient` nodes are replaced by what they stand for, checked against central differences
    lossy        values change on purpose; the pass gives the reference that it is checked against

`requires` and `ensures` are sets of the properties below. The manager refuses a list of passes in which a required
property is not there; what a pass does not declare in `keeps` and `ensures` is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, Protocol

from ..ir.contraction import Contraction
from ..ir.dtypes import DType
from ..ir.errors import AttributeValueError
from ..ir.graph import Graph, Node
from ..ir.memory import MemoryModel
from ..ir.target import Target
from .bodies import map_bodies
from .facts import Facts, weights

KINDS: Final = ("exact", "equivalent", "derivative", "lossy")
PROPERTIES: Final[Mapping[str, str]] = {
    "no_gradient": "no `gradient` nodes",
    "no_marks": "no identity nodes that only gradients need",
    "decomposed": "no op whose lowering is a decomposition",
    "nhwc": "convolutions and pooling with channels last",
    "contract_form": "every contraction is a `contract` node",
    "packed": "weights of contractions stand in panels where the target wants them so",
    "fused": "regions that become one kernel are `fused` nodes",
}


class PreferredPanel(Protocol):
    """How wide the panels of a packed B of this type should be for this contraction; 0 leaves it as it is. Panels of 16-bit
    floats hold pairs."""

    def __call__(self, spec: Contraction, target: Target, dtype: DType, /) -> int: ...


@dataclass(frozen=True)
class Applied:
    """One rewrite that was made: the pass, the rule, and the node it was applied to."""

    pass_name: str
    rule: str
    node: Node


@dataclass
class Context:
    """What passes share during one run of a pipeline, and what they get from outside.

    fuel             how many rewrites may still be made in all (None: any number); the one that breaks something is
                     found by bisecting it
    log              the rewrites made so far
    misses           a list to collect failed matches in, or None not to
    preferred_panel  from the code generator; None leaves weights unpacked
    invariants       while a pass is at the body of a loop: its inputs that are the same in every step
    memory_model     from the code generator; how much memory a graph would need
    notes            what passes tell their caller, by their name
    """

    target: Target | None = None
    fuel: int | None = None
    preferred_panel: PreferredPanel | None = None
    memory_model: MemoryModel | None = None
    notes: dict[str, object] = field(default_factory=dict)
    log: list[Applied] = field(default_factory=list)
    misses: list[Missed] | None = None
    facts: Facts = field(default_factory=Facts)
    results: list[PassResult] = field(default_factory=list)
    current: str = ""
    invariants: frozenset[Node] = frozenset()

    def weights(self, graph: Graph) -> frozenset[Node]:
        """The inputs that are worth preparing: those that stay the same from run to run, or from step to step of a loop."""
        return weights(graph) | self.invariants

    def spend(self, rule: str, node: Node) -> bool:
        """Takes one unit of fuel for a rewrite and logs it; False when none is left, and the rewrite must not be made."""
        if self.fuel is not None:
            if self.fuel <= 0:
                return False
            self.fuel -= 1
        self.log.append(Applied(self.current, rule, node))
        return True

    def fresh(self, fuel: int | None = None, current: str = "") -> Context:
        """A context with the same surroundings, an empty log and its own fuel: for replaying a pass."""
        return Context(self.target, fuel, self.preferred_panel, self.memory_model, current=current)


@dataclass(frozen=True)
class Missed:
    """A rule that did not apply: why, and at which node it failed."""

    rule: str
    reason: str
    node: Node


@dataclass(frozen=True)
class PassResult:
    """What one pass did: for the table that the demo prints, and for `Executable.text(stage)`."""

    name: str
    kind: str
    nodes_before: int
    nodes_after: int
    ms: float
    changed: bool
    rewrites: Mapping[str, int]
    after: Graph = field(repr=False)


@dataclass(frozen=True)
class Pass:
    """Base of every pass. A subclass sets the class variables, adds its options as fields, and defines `run`."""

    kind: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[frozenset[str]] = frozenset(PROPERTIES)
    budget: ClassVar[float] = 0.0  # of an equivalent pass whose results err by more than by rounding in another order

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "kind", None) not in KINDS:
            raise AttributeValueError(f"pass {cls.__name__}: kind is one of {', '.join(KINDS)}")
        unknown = (cls.requires | cls.ensures | cls.keeps) - PROPERTIES.keys()
        if unknown:
            raise AttributeValueError(f"pass {cls.__name__}: unknown properties {sorted(unknown)}; known: {sorted(PROPERTIES)}")

    @property
    def name(self) -> str:
        """The class name in snake case; also the name of the file that defines it."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def command(self) -> str:
        """How the command line names it: without options, unless it does nothing without them."""
        return self.name

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph after the pass: the same object if, and only if, nothing changed."""
        raise NotImplementedError

    def apply(self, graph: Graph, ctx: Context) -> Graph:
        """`run` on every body of a loop or branch, innermost first, then on the graph around them."""
        outer = ctx.invariants

        def inside(body: Graph, invariants: frozenset[Node]) -> Graph:
            ctx.invariants = invariants
            try:
                return self.apply(body, ctx)
            finally:
                ctx.invariants = outer

        return self.run(map_bodies(graph, inside), ctx)

    def reference(self, graph: Graph, ctx: Context) -> Graph:
        """What a lossy pass is checked against (its own masked or fake-quantised graph)."""
        raise NotImplementedError(f"pass {self.name} is not lossy")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.name}{{{options}}}" if options else self.name


Predicate = Callable[[Graph], bool]
