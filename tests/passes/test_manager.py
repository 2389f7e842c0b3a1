"""The pass contract and the manager: options, order, hooks, dumps, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from tensorwright.ir.build import full, get, input_node
from tensorwright.ir.errors import AttributeValueError, TensorwrightError, VerifyError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.types import tensor
from tensorwright.passes.contract import PROPERTIES, Context, Pass
from tensorwright.passes.fuse import Fuse
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.pipeline import PASSES, inference, parse, training
from tensorwright.passes.simplify import Simplify

X = input_node("x", tensor("f32", (3, 4)))
ONE = full(1.0, X.tensor)


def graph():
    return Graph((X,), (make("exp", make("mul", X, ONE)),))


def test_names_and_options():
    assert [p.name for p in (Simplify(), Fuse())] == ["simplify", "fuse"]
    assert str(Fuse(max_nodes=3)) == "fuse{max_nodes=3}" and str(Fuse()) == "fuse"
    assert all(name == cls().name and cls.__module__.endswith("." + name) for name, cls in PASSES.items()), "one pass, one file"


def test_every_pass_of_the_pipelines_is_known_and_documented():
    for p in (*inference(), *training()):
        assert PASSES[p.name] is type(p)
        assert type(p).__doc__ and type(p).run.__doc__
        assert p.kind in ("exact", "equivalent", "derivative")
        assert p.requires | p.ensures <= PROPERTIES.keys()


def test_an_unknown_kind_or_property_is_refused():
    with pytest.raises(AttributeValueError, match="kind is one of"):

        class Sloppy(Pass):
            kind: ClassVar[str] = "roughly"

    with pytest.raises(AttributeValueError, match="unknown properties"):

        class Wishful(Pass):
            kind: ClassVar[str] = "exact"
            ensures: ClassVar[frozenset[str]] = frozenset({"fast"})


def test_parse():
    assert parse("simplify, fuse") == (Simplify(), Fuse())
    with pytest.raises(AttributeValueError, match="did you mean: simplify"):
        parse("simplifi")


def test_options_parse_as_they_print():
    for passes in (inference(), training(), (Fuse(max_nodes=3, kinds=("map", "rows")), Simplify())):
        assert parse(", ".join(map(str, passes))) == passes
    for text, message in {
        "fuse{nodes=3}": "no option 'nodes'",
        "fuse{max_nodes='many'}": "is like 96",
        "fuse{max_nodes=__import__('os')}": "option=value",
        "fuse{3}": "option=value",
        "fuse{max_nodes": "passes are written",
        "simplify{x=1}": "it has none",
    }.items():
        with pytest.raises(AttributeValueError, match=message):
            parse(text)


def test_results_and_dumps(tmp_path):
    ctx = Context()
    seen = []
    after = run_pipeline(graph(), (Simplify(), Simplify(), Fuse()), ctx, Hooks(dump=tmp_path, after=seen.append))
    assert [r.name for r in ctx.results] == ["simplify", "simplify", "fuse"] and seen == ctx.results
    first, second, _ = ctx.results
    assert first.changed and first.rewrites == {"times_one": 1} and first.nodes_before == 3 and first.nodes_after == 1
    assert not second.changed and second.after is first.after and first.ms > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000_graph.txt", "001_simplify.txt"]
    assert Graph.parse((tmp_path / "001_simplify.txt").read_text()) == after


def test_a_missing_requirement_names_the_passes_before():
    g = make("gradient", make("sum", X, axes=(0, 1), keepdims=False), X)
    asked = Graph((X,), (get(g, 0),))
    with pytest.raises(VerifyError, match=r"fuse requires no_gradient.*before it: simplify"):
        run_pipeline(asked, (Simplify(), Fuse()))


@dataclass(frozen=True)
class Broken(Pass):
    """Fails."""

    kind: ClassVar[str] = "exact"
    how: str = "raise"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """Raises, or returns something that is not a graph's equal."""
        if self.how == "raise":
            raise TensorwrightError("out of luck")
        if self.how == "copy":
            return Graph(graph.inputs, graph.outputs, graph.output_names, graph.name)
        return Graph((), graph.outputs)


def test_a_failing_pass_is_named_with_those_before():
    with pytest.raises(TensorwrightError, match="out of luck") as e:
        run_pipeline(graph(), (Simplify(), Broken()))
    assert "in pass broken (number 2); before it ran: simplify" in e.value.__notes__[0]


def test_changed_must_be_honest():
    with pytest.raises(VerifyError, match="equal graph as if it had changed"):
        run_pipeline(graph(), (Broken("copy"),))


def test_a_graph_that_does_not_verify_is_refused():
    with pytest.raises(VerifyError, match="not declared") as e:
        run_pipeline(graph(), (Broken("inputs"),))
    assert "in pass broken" in e.value.__notes__[0]
    run_pipeline(graph(), (Broken("inputs"),), hooks=Hooks(verify=False))


def test_fuel_is_shared_by_the_passes():
    ctx = Context(fuel=0)
    assert run_pipeline(graph(), inference(), ctx).outputs == graph().outputs
    assert not ctx.log


def test_runs_are_deterministic():
    first, second = (run_pipeline(graph(), inference()) for _ in range(2))
    assert first == second
    assert np.isfinite(len(str(first)))
