"""`tensorwright prune`: a model in, the model with fewer weights and a report of its layers out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from ..compression.gradients import gradients_of
from ..compression.options import Ratio
from ..compression.pruning import prune
from ..compression.search_metric import Judge
from ..driver import build
from ..frontend import losses
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..runtime.buffers import Array
from .compression import batch_of, check_pattern, checked_files, data_of, model_of, options_named, share_of, write

_OPTIONS: Final = {"ratio": "--ratio", "by": "--ratio", "scope": "--scope", "prune": "--layer, --exclude or --ratio"}


def prune_command(args: argparse.Namespace) -> dict[str, Any]:
    """Prunes, writes the model and the report, prints a line for each layer."""
    checked_files(args)
    ratio = ratio_of(args.ratio)
    check_pattern("--pattern", args.pattern)
    sensitive, taylor = args.scope == "sensitivity", args.criterion == "taylor"
    for asked, option in ((sensitive, "--scope sensitivity"), (taylor, "--criterion taylor")):
        if asked and not args.calibration:
            raise InputError(f"--calibration FILE.npy: {option} needs typical inputs")
    if taylor and not args.labels:
        raise InputError("--labels FILE.npy: --criterion taylor weighs by the gradients of a loss, which needs targets")
    graph = model_of(args)
    files = [*args.calibration, *([args.labels] if args.labels else [])]
    data = data_of(files, batch_of(graph, args.batch))
    if taylor and len(files) != 2:
        raise InputError("--calibration FILE.npy: --criterion taylor is for models with one argument")
    with options_named(_OPTIONS):
        made = prune(
            graph,
            ratio=ratio,
            pattern=args.pattern,
            criterion=args.criterion,
            scope=args.scope,
            layers=args.layer or None,
            exclude=args.exclude,
            gradients=gradients_of(graph, getattr(losses, args.loss), [(x, y) for x, y in data]) if taylor else None,
            metric=_metric(graph, data, args.metric) if sensitive else None,
            # ONNX has no such kernels: zeros, and smaller arrays
            kernels=None if args.dense or (args.output or "").endswith(".onnx") else "always" if args.sparse else "auto",
            seed=args.seed,
        )
    print(made)
    write(args, made.graph, made)
    return made.as_dict()


def ratio_of(given: list[str]) -> Ratio | None:
    """One share, or shares by pattern of layer names: `0.5`, or `head*=0.5` and `body*=0.75`."""
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        share = share_of(number)
        if share is None:
            raise InputError(f"--ratio {text}: a share between 0 and 1, or NAME=SHARE for the layers of a name or pattern")
        found[name] = share
    if "" in found and len(given) > 1:
        raise InputError(f"--ratio {' --ratio '.join(given)}: give one share for all layers, or NAME=SHARE each")
    return found.get("", found) if found else None


def _metric(graph: Graph, data: list[tuple[Array, ...]], name: str | None) -> Callable[[Callable[..., Any]], float]:
    """What a program scores over the data."""
    count = sum(i.attrs["role"] == "data" for i in graph.inputs)
    judge = Judge(data, count, name)
    judge.start(build(graph, graph.weights))
    return lambda exe: judge.score(judge.outputs(exe))
