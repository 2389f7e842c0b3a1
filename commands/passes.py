"""`tensorwright opt` and `reduce`: passes on the text of a graph."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..ir.errors import InputError, ValidationError
from ..ir.graph import Graph
from ..ir.text import print_graph
from ..passes import pipeline
from ..passes.contract import Context, Pass
from ..passes.manager import Hooks, run_pipeline
from ..passes.reduce import reduce
from ..passes.validate import Validator
from ..runtime import host
from .model import read_graph

_PIPELINES = {"inference": pipeline.inference, "training": pipeline.training}


def opt_command(args: argparse.Namespace) -> None:
    """Reads a graph, runs the passes, writes the graph; what each pass did goes to standard error."""
    if args.list:
        _list()
        return
    if args.graph is None or not args.passes:
        raise InputError("opt needs FILE and --passes (see tensorwright opt --list)")
    graph = read_graph(args.graph)
    ctx = context(args.target, args.fuel)
    hooks = Hooks(verify=True, validate=Validator() if args.validate else None)
    result = run_pipeline(graph, passes(args.passes, args.target), ctx, hooks)
    for r in ctx.results:
        rewrites = ", ".join(f"{n} {rule}" for rule, n in r.rewrites.items())
        change = f"{r.nodes_before} -> {r.nodes_after} nodes" if r.changed else "unchanged"
        print(f"{r.name}: {change}, {r.ms:.2f} ms{': ' + rewrites if rewrites else ''}", file=sys.stderr)
    write(result, args.output)


def reduce_command(args: argparse.Namespace) -> None:
    """Shrinks a graph on which the passes fail; prints the failure and writes the small graph."""
    graph = read_graph(args.graph)
    chosen = passes(args.passes, args.target)

    def failure(candidate: Graph) -> Exception | None:
        try:
            run_pipeline(candidate, chosen, context(args.target), Hooks(verify=True, validate=_judge))
        except Exception as error:  # whatever goes wrong inside a pass is what is being looked for
            return error
        return None

    found = failure(graph)
    if found is None:
        raise InputError(f"the passes {args.passes} do nothing wrong on {args.graph}: there is nothing to reduce")
    kind = _signature(found)

    def same(candidate: Graph) -> bool:
        error = failure(candidate)
        return error is not None and _signature(error) == kind

    small = reduce(graph, same)
    count = sum(1 for n in small.nodes() if n.inputs)
    print(f"{count} of {sum(1 for n in graph.nodes() if n.inputs)} nodes still fail: {failure(small)}", file=sys.stderr)
    write(small, args.output)
    if args.output:
        print(f"replay: tensorwright opt --passes {args.passes} --validate {args.output}", file=sys.stderr)


def _judge(p: Pass, before: Graph, after: Graph, ctx: Context) -> None:
    """Validation that only says whether: no bisection and no repro file for each candidate."""
    validator = Validator()
    if p.kind == "derivative":
        validator(p, before, after, ctx)
    elif (found := validator.difference(p, before, after, ctx)) is not None:
        raise ValidationError(f"pass {p} changed what the graph computes: {found.what}")


def _signature(error: Exception) -> tuple[str, str]:
    """What makes two failures the same: the type, and the pass it happened in."""
    notes = [n for n in getattr(error, "__notes__", []) if n.startswith("in pass ")]
    return type(error).__name__, notes[0].partition("(")[0] if notes else ""


def context(target: str | None, fuel: int | None = None) -> Context:
    """The surroundings of the passes, as the driver sets them up."""
    from ..codegen.contraction import preferred_panel
    from ..codegen.footprint import Footprint

    chosen = host.resolve(target or "host")
    return Context(target=chosen, fuel=fuel, preferred_panel=preferred_panel, memory_model=Footprint(chosen))


def passes(names: str, target: str | None) -> tuple[Pass, ...]:
    """The passes of a pipeline by its name, or those of a list of names."""
    if names in _PIPELINES:
        return _PIPELINES[names](host.resolve(target or "host"))
    return pipeline.parse(names)


def write(graph: Graph, path: str | None) -> None:
    """The graph's text, complete with its constants, to a file or standard output."""
    text = print_graph(graph, labels=False, constants=True)
    if path is None:
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def _list() -> None:
    width = max(map(len, pipeline.PASSES))
    for name, kind in pipeline.PASSES.items():
        first = (kind.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:<{width}}  {kind.kind:<10}  {first}")
    for name, make in _PIPELINES.items():
        print(f"\npipeline {name}: {','.join(str(p) for p in make(host.host()))}")
