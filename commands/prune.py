"""`tensorwright prune`: a model in, the model with fewer weights and a report of its layers out."""

from __future__ import annotations

import argparse
from typing import Any

from ..compression.pruning import prune
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..ir.graphs import specialize
from .model import executable
from .quantize import write_model


def prune_command(args: argparse.Namespace) -> dict[str, Any]:
    """Prunes, writes the model and the report, prints a line for each layer."""
    exe, sizes = executable(args)
    output = args.output or ""
    if output and not output.endswith((".onnx", ".tw")):
        raise InputError(f"-o {output}: the model is written as .onnx or .tw")
    found = specialize(exe.graph, sizes) if sizes else exe.graph
    graph = Graph(found.inputs, found.outputs, found.output_names, found.name, (), found.labels, exe.parameters)
    made = prune(
        graph,
        ratio=args.ratio,
        pattern=args.pattern,
        criterion=args.criterion,
        scope=args.scope,
        layers=args.layer or None,
        exclude=args.exclude,
        kernels=None if args.dense or output.endswith(".onnx") else "auto",  # ONNX has no such kernels: zeros, and smaller arrays
        seed=args.seed,
    )
    print(made)
    if output and made.graph is not None:
        write_model(made.graph, output)
        print(f"wrote {output}")
    if args.report:
        made.save(args.report)
        print(f"wrote {args.report}")
    return made.as_dict()
