"""Runs a list of passes over a graph, with hooks: dump, time, verify, validate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..ir.collector import no_collection
from ..ir.errors import TensorwrightError, VerifyError
from ..ir.graph import Graph
from ..ir.verify import verify
from .bodies import all_graphs
from .contract import Context, Pass, PassResult
from .facts import Facts
from .labels import write_atomically

Check = Callable[[Pass, Graph, Graph, Context], None]


@dataclass(frozen=True)
class Hooks:
    """What happens after each pass.

    dump      a folder for NNN_name.txt, one for each pass that changed something, and 000_graph.txt before all
    verify    whether to run the verifier on every graph that a pass made
    validate  called with (pass, before, after, context) after a pass that changed something; raises ValidationError
    after     called with every PassResult (progress, tables)
    number    how many passes ran before, where dumps go on counting; only 0 writes the graph as it came
    """

    dump: Path | None = None
    verify: bool = True
    validate: Check | None = None
    after: Callable[[PassResult], None] | None = field(default=None)
    number: int = 0


def run_pipeline(graph: Graph, passes: Sequence[Pass], ctx: Context | None = None, hooks: Hooks | None = None) -> Graph:
    """The graph after all passes, in order; `ctx.results` tells what each one did.

    An error inside a pass is raised again as the same exception with a note that names the pass and those that ran before.
    Raises VerifyError if a pass needs a property that no earlier pass ensures, or leaves a graph that does not verify.
    """
    with no_collection():
        return _run(graph, passes, ctx or Context(), hooks or Hooks())


def _run(graph: Graph, passes: Sequence[Pass], ctx: Context, hooks: Hooks) -> Graph:
    check_order(graph, passes, ctx.facts)
    if hooks.dump is not None:
        hooks.dump.mkdir(parents=True, exist_ok=True)
        if hooks.number == 0:
            write_atomically(hooks.dump / "000_graph.txt", str(graph))
    done: list[str] = []
    count = _count(graph)
    for number, p in enumerate(passes, start=hooks.number + 1):
        ctx.current, logged = str(p), len(ctx.log)
        start = time.perf_counter()
        try:
            after = p.apply(graph, ctx)
            ms = (time.perf_counter() - start) * 1e3
            if after is not graph and after == graph:
                raise VerifyError(f"pass {p} returned an equal graph as if it had changed; it must return the graph it was given")
            if hooks.verify and after is not graph:
                verify(after)
            if hooks.validate is not None and after is not graph:
                hooks.validate(p, graph, after, ctx)
        except TensorwrightError as e:
            e.add_note(f"in pass {p} (number {number}); before it ran: {', '.join(done) or 'none'}")
            raise
        rewrites = Counter(a.rule for a in ctx.log[logged:])
        before, count = count, count if after is graph else _count(after)
        result = PassResult(p.name, p.kind, before, count, ms, after is not graph, dict(rewrites.most_common()), after)
        ctx.results.append(result)
        if hooks.after is not None:
            hooks.after(result)
        if hooks.dump is not None and after is not graph:
            write_atomically(hooks.dump / f"{number:03}_{p.name}.txt", str(after))
        graph = after
        done.append(str(p))
    return graph


def _count(graph: Graph) -> int:
    """Nodes that compute something, in bodies too: inputs and constants are not counted."""
    return sum(1 for g in all_graphs(graph) for n in g.nodes() if n.inputs)


def check_order(graph: Graph, passes: Sequence[Pass], facts: Facts) -> None:
    """Raises VerifyError where a pass requires a property that neither the graph has nor an earlier pass ensures."""
    have = properties(graph, facts)
    before: list[str] = []
    for p in passes:
        missing = p.requires - have
        if missing:
            raise VerifyError(
                f"pass {p.name} requires {', '.join(sorted(missing))}, which no pass before it ensures; before it: "
                f"{', '.join(before) or 'none'}"
            )
        have = (have & p.keeps) | p.ensures
        before.append(p.name)


def properties(graph: Graph, facts: Facts) -> set[str]:
    """The properties that a graph has without any pass having run."""
    have = {"no_gradient", "no_marks", "decomposed"}
    for n in (n for g in all_graphs(graph) for n in g.nodes()):
        kind = facts.kind(n)
        if kind == "other":
            have.discard("no_gradient")
        elif kind == "decompose":
            have.discard("decomposed")
        elif facts.is_marker(n):
            have.discard("no_marks")
    return have
