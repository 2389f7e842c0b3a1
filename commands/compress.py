"""`tensorwright compress`: a model and typical inputs in, the model with the best kind of each layer and a report out."""

from __future__ import annotations

import argparse
from typing import Any

from ..compression.compress import compress
from ..compression.search_kinds import FAMILIES
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..ir.graphs import specialize
from .model import executable, read_array
from .quantize import batches_of, write_model


def compress_command(args: argparse.Namespace) -> dict[str, Any]:
    """Searches, writes the model and the report, prints a line for each layer."""
    output = args.output or ""
    if output and not output.endswith((".onnx", ".tw")):
        raise InputError(f"-o {output}: the model is written as .onnx or .tw")
    if not args.calibration:
        raise InputError("--calibration FILE.npy: typical inputs are needed, to know ranges and to judge what is lost")
    exe, sizes = executable(args)
    found = specialize(exe.graph, sizes) if sizes else exe.graph
    graph = Graph(found.inputs, found.outputs, found.output_names, found.name, (), found.labels, exe.parameters)
    first = next((i.shape[0] for i in graph.inputs if i.attrs["role"] == "data" and i.shape), None)
    files = [*args.calibration, *([args.labels] if args.labels else [])]
    data = batches_of([read_array(f) for f in files], first if isinstance(first, int) else args.batch)
    unknown_to_onnx = ("sparse", "int4 weights") if output.endswith(".onnx") else ()
    kinds = args.kinds.split(",") if args.kinds else [k for k in FAMILIES if k not in unknown_to_onnx]
    made = compress(
        graph,
        data,
        args.metric,
        max_drop=args.max_drop,
        objective=args.objective,
        kinds=kinds,
        keep=args.keep,
        batch=args.timed_batch,
        method=args.method,
    )
    print(made)
    if output:
        write_model(made.graph, output)
        print(f"wrote {output}")
    if args.report:
        made.report.save(args.report)
        print(f"wrote {args.report}")
    return made.report.as_dict()
