"""`tensorwright quantize`: a model and typical inputs in, the model in integers and a report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..compression.quantize import quantize
from ..compression.report import Report
from ..compression.timing import milliseconds
from ..driver import compile as compile_model
from ..ir.errors import InputError
from ..ir.graph import Graph
from ..ir.graphs import specialize
from ..runtime.buffers import Array
from .model import executable, read_array


def quantize_command(args: argparse.Namespace) -> dict[str, Any]:
    """Quantises, writes the model and the report, prints a line for each layer."""
    exe, sizes = executable(args)
    if args.output and not args.output.endswith((".onnx", ".tw")):
        raise InputError(f"-o {args.output}: the model is written as .onnx or .tw")
    found = specialize(exe.graph, sizes) if sizes else exe.graph
    graph = Graph(found.inputs, found.outputs, found.output_names, found.name, (), found.labels, exe.parameters)
    if not args.calibration and args.activations != "dynamic" and args.only != "weights":
        raise InputError("--calibration FILE.npy: typical inputs are needed to know the ranges of activations")
    report = Report()
    made = quantize(
        graph,
        batches_of([read_array(f) for f in args.calibration], args.batch) or None,
        weights=None if args.only == "activations" else "int8",
        activations=None if args.only == "weights" else args.activations,
        per_channel=not args.per_tensor,
        method=args.method,
        percentile=args.percentile,
        bias_correction=args.bias_correction,
        equalize=args.equalize,
        keep=args.keep,
        measure=milliseconds if args.measure else None,
        report=report,
    )
    print(report)
    if args.output:
        write_model(made, args.output)
        print(f"wrote {args.output}")
    if args.report:
        report.save(args.report)
        print(f"wrote {args.report}")
    return report.as_dict()


def batches_of(arrays: Sequence[Array], size: int) -> list[tuple[Array, ...]]:
    """Arrays (one for each argument) cut along the first dimension."""
    if not arrays:
        return []
    counts = {a.shape[0] if a.ndim else 0 for a in arrays}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"--calibration: the files hold {[a.shape for a in arrays]}; one or more inputs each, as many in all")
    (count,) = counts
    return [tuple(a[k : k + size] for a in arrays) for k in range(0, count - count % size or count, size)]


def write_model(graph: Graph, path: str) -> None:
    """Writes a graph with its weights as .tw or .onnx."""
    if Path(path).suffix == ".tw":
        compile_model(graph).save(path)
        return
    from ..frontend.onnx import save

    save(graph, path)
