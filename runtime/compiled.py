"""What the driver hands the runtime for one set of concrete sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..ir.memory import Rematerialisation
from ..ir.program import Program

Text = str | Callable[[], str]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: nodes before and after, and how long it took."""

    name: str
    kind: str
    nodes_before: int
    nodes_after: int
    milliseconds: float
    changed: bool


@dataclass(frozen=True)
class Compiled:
    """A run program, the prepare program that makes its `prepared` inputs from parameters, and the story of both.

    `prepare_key` is equal where two prepare programs do the same, so that executables for several sizes share what they
    prepare. `texts` maps stage names, in order, to the text or a function that makes it. `seconds` is how long it took.
    `remat` says what a memory budget led to, `tuned` what a measured search chose.
    """

    run: Program
    prepare: Program | None = None
    prepare_key: str = ""
    texts: Mapping[str, Text] = field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    remat: Rematerialisation | None = None
    seconds: float = 0.0
    from_cache: bool = False
    tuned: Mapping[str, int] = field(default_factory=dict)
