"""Checks every pass by running the graph before and after it: the interpreter is the judge.

    exact        the same bits on normal, positive and adversarial inputs (NaN, Inf, zeros, denormals, overflow)
    equivalent   no further from the f64 oracle than the graph's error budget; NaN and Inf neither appear nor vanish
    derivative   directional central differences in f64, one for each x of each gradient
    lossy        within that budget of the reference that the pass gives, both in the dtypes that they declare

A difference is bisected by rewrite fuel to the rewrite that made it, the graph is shrunk to a few nodes, written to a file,
and a ValidationError names the pass, the rule, the node, its source line, and the command that replays it. A disagreement
of an equivalent pass may be a tie at a discontinuity (an argmax, a comparison): it must show in two of three draws. A wrong
rewrite shows in all.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..ir.dtypes import f64
from ..ir.errors import StepLimitError, ValidationError
from ..ir.graph import Graph, Node
from ..ir.interp import run
from ..ir.text import print_graph
from ..ir.types import TupleType
from .bodies import all_graphs, nodes_with_runs
from .central import GradientMismatch, check_gradients
from .contract import Applied, Context, Pass
from .labels import write_atomically
from .oracle import DRAWS, Array, Difference, budget_of, close_difference, draw, exact_difference
from .reduce import reduce

MAX_STEPS: Final = 20_000  # of all loops of a graph together


class ValidationSkipped(UserWarning):
    """A pass was not validated, because the graph is larger than the limit."""


@dataclass
class Validator:
    """A `validate` hook for `run_pipeline`.

    folder        where repro files go (the system's temporary folder by default)
    seed          of the inputs
    max_elements  the most elements, over all nodes, that the interpreter is asked to compute; beyond it a pass is skipped
                  with a ValidationSkipped warning
    checked       how many passes were validated
    """

    folder: Path | None = None
    seed: int = 0
    max_elements: int = 20_000_000
    checked: int = 0
    skipped: list[str] = field(default_factory=list)

    def __call__(self, p: Pass, before: Graph, after: Graph, ctx: Context) -> None:
        """Raises ValidationError if `after` does not compute what `before` does, in the sense of the pass's kind."""
        elements = _elements(before) + _elements(after)
        if elements > self.max_elements:
            text = f"pass {p} was not validated: {elements:,} elements to compute, the limit is {self.max_elements:,}"
            self.skipped.append(text)
            warnings.warn(text, ValidationSkipped, stacklevel=2)
            return
        self.checked += 1
        if p.kind == "derivative":
            try:
                check_gradients(p, before, after, ctx, self.seed)
            except GradientMismatch as e:
                self._fail_gradient(p, before, ctx, e)
            return
        found = self.difference(p, before, after, ctx)
        if found is not None:
            self._fail(p, before, ctx, found)

    def difference(self, p: Pass, before: Graph, after: Graph, ctx: Context) -> Difference | None:
        """How the results of the two graphs differ, or None where they agree as the kind of the pass demands."""
        if p.kind == "exact":
            for kind in DRAWS:
                arrays = draw(before, kind, self.seed)
                results = _both(before, after, arrays)
                found = results if isinstance(results, Difference | None) else exact_difference(*results)
                if found is not None:
                    return found
            return None
        if p.kind == "lossy":
            return self.equivalent(p.reference(before, ctx), after, oracle=False)
        return self.equivalent(before, after, at_least=p.budget)

    def equivalent(self, before: Graph, after: Graph, oracle: bool = True, at_least: float = 0.0) -> Difference | None:
        """How `after` differs from `before` by more than rounding in another order.

        Without `oracle`, `before` itself is what is right: f64 would not see the roundings that a lossy pass makes on purpose.
        `at_least` is a budget that the pass states itself.
        """
        budget = max(budget_of(before), at_least)
        found: list[Difference] = []
        for seed, kind in enumerate(("normal", "positive", "normal"), start=self.seed):
            arrays = draw(before, kind, seed)
            results = _both(before, after, arrays)
            if isinstance(results, Difference | None):
                one = results
            else:
                right = run(before, arrays, f64, limit=2 * MAX_STEPS) if oracle else results[0]
                one = close_difference(*results, right, budget)
            if one is not None:
                found.append(one)
        return found[0] if len(found) >= 2 else None

    # Failing

    def _fail(self, p: Pass, before: Graph, ctx: Context, found: Difference) -> None:
        guilty = self._bisect(p, before, ctx)

        def predicate(graph: Graph) -> bool:
            after = p.apply(graph, ctx.fresh(current=str(p)))
            return after is not graph and self.difference(p, graph, after, ctx) is not None

        small = reduce(before, predicate, hint=None if guilty is None else guilty.node)
        rule = "" if guilty is None else guilty.rule
        raise self._error(p, before, small, rule, None if guilty is None else guilty.node, found.what, found.output)

    def _bisect(self, p: Pass, before: Graph, ctx: Context) -> Applied | None:
        """The first rewrite after which the graph computes something else; None if no single one is to blame."""

        def bad(fuel: int) -> bool:
            after = p.apply(before, ctx.fresh(fuel, str(p)))
            return after is not before and self.difference(p, before, after, ctx) is not None

        whole = ctx.fresh(current=str(p))
        p.apply(before, whole)
        low, high = 0, len(whole.log)
        if high == 0 or not bad(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if bad(middle):
                high = middle
            else:
                low = middle
        upto = ctx.fresh(high, str(p))
        p.apply(before, upto)
        return upto.log[high - 1] if len(upto.log) >= high else None

    def _fail_gradient(self, p: Pass, before: Graph, ctx: Context, e: GradientMismatch) -> None:
        small = e.repro
        if small is None:

            def predicate(graph: Graph) -> bool:
                after = p.apply(graph, ctx.fresh(current=str(p)))
                try:
                    check_gradients(p, graph, after, ctx, self.seed)
                except GradientMismatch:
                    return after is not graph
                return False

            small = reduce(before, predicate, hint=e.node)
        raise self._error(p, before, small, e.rule, e.node, e.what, None)

    def _error(
        self, p: Pass, before: Graph, small: Graph, rule: str, node: Node | None, what: str, output: int | None
    ) -> ValidationError:
        places = (g.location(node) or _location_near(g, node) for g in all_graphs(before)) if node is not None else ()
        location = next((place for place in places if place is not None), None)
        where = f" at {location}" if location is not None else ""
        lines = [
            f"pass {p} ({p.kind}) changed what the graph computes"
            + (f" in output {before.output_names[output]!r}" if output is not None else "")
            + f": {what}"
        ]
        if rule:
            lines.append(f"  guilty rewrite: {rule}, applied to {node!r}{where}")
        else:
            lines.append("  no single rewrite is to blame: the pass itself is")
        path = self.write(p, rule, small)
        count = sum(1 for g in all_graphs(small) for n in g.nodes() if n.inputs)
        lines.append(f"  repro of {count} nodes: {path}")
        lines.append(f"  replay: tensorwright opt --passes {p.command} --validate {path}")
        lines.append(f"  shrink further: tensorwright reduce --passes {p.command} {path}")
        error = ValidationError("\n".join(lines))
        error.pass_name, error.rule, error.node, error.repro = p.name, rule, node, path  # type: ignore[attr-defined]
        return error

    def write(self, p: Pass, rule: str, graph: Graph) -> Path:
        """Writes a repro file, complete with constants, atomically; returns its path."""
        folder = self.folder or Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "_", f"repro_{p.name}_{rule}").strip("_")
        number, path = 0, folder / f"{stem}.txt"
        while path.exists():
            number += 1
            path = folder / f"{stem}_{number}.txt"
        head = f"# tensorwright opt --passes {p.command} --validate {path}\n"
        write_atomically(path, head + print_graph(graph, constants=True))
        return path


def _location_near(graph: Graph, node: Node) -> object:
    """The location of the first labelled node under one that a pass made."""
    stack, seen = [node], {node}
    for n in stack:
        if (found := graph.location(n)) is not None:
            return found
        for i in n.inputs:
            if i not in seen and len(seen) < 200:
                seen.add(i)
                stack.append(i)
    return None


def _both(before: Graph, after: Graph, arrays: Sequence[Array]) -> tuple[list[Array], list[Array]] | Difference | None:
    """The results of both graphs. None if a loop of `before` does not come to an end in MAX_STEPS steps on these inputs, which
    then say nothing; a Difference if one of `after` alone does not."""
    try:
        expected = run(before, arrays, limit=MAX_STEPS)
    except StepLimitError:
        return None
    try:
        return expected, run(after, arrays, limit=2 * MAX_STEPS)
    except StepLimitError:
        return Difference(0, f"a loop no longer ends within {2 * MAX_STEPS} steps")


def _elements(graph: Graph) -> int:
    total = 0
    for n, runs in nodes_with_runs(graph):
        for t in n.type.items if isinstance(n.type, TupleType) else (n.type,):
            total += runs * int(t.size) if isinstance(t.size, int) else 0
    return total


def validate_split(graph: Graph, prepare: Graph | None, run_graph: Graph, seed: int = 0) -> None:
    """Raises ValidationError unless the prepare graph followed by the run graph is `graph`, to the bit."""
    for kind in DRAWS:
        arrays = draw(graph, kind, seed)
        values: dict[str, Array] = dict(zip((i.attrs["name"] for i in graph.inputs), arrays, strict=True))
        expected = run(graph, arrays)
        if prepare is not None:
            made = run(prepare, [values[i.attrs["name"]] for i in prepare.inputs])
            values |= dict(zip(prepare.output_names, made, strict=True))
        found = exact_difference(expected, run(run_graph, [values[i.attrs["name"]] for i in run_graph.inputs]))
        if found is not None:
            raise ValidationError(f"the split into prepare and run graph changed output {found.output}: {found.what}")
