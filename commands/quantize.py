"""`tensorwright quantize`: a model and typical inputs in, the model in integers and a report out."""

from __future__ import annotations

import argparse
from typing import Any, Final

from ..compression.quantize import quantize
from ..compression.report import Report
from ..compression.timing import milliseconds
from ..ir.errors import InputError
from .compression import batch_of, checked_files, data_of, model_of, options_named, write

NONE: Final = "none"
_OPTIONS: Final = {
    "weights": "--weights-as",
    "activations": "--activations",
    "percentile": "--percentile",
    "group": "--group",
    "smooth": "--smooth",
    "products": "--products",
    "bias_correction": "--bias-correction",
    "keep": "--keep",
    "calibration": "--calibration",
}


def quantize_command(args: argparse.Namespace) -> dict[str, Any]:
    """Quantises, writes the model and the report, prints a line for each layer."""
    checked_files(args)
    weights, activations = _kinds(args)
    calibrated = activations not in (None, "dynamic")
    if not args.calibration and (calibrated or args.bias_correction):
        why = "to know the ranges of activations" if calibrated else "for --bias-correction"
        raise InputError(f"--calibration FILE.npy: typical inputs are needed {why}")
    smooth = _smooth(args.smooth)
    graph = model_of(args)
    report = Report()
    with options_named(_OPTIONS):
        made = quantize(
            graph,
            data_of(args.calibration, batch_of(graph, args.batch)) or None,
            weights=weights,
            activations=activations,
            per_channel=not args.per_tensor,
            method=args.method,
            percentile=args.percentile,
            bias_correction=args.bias_correction,
            equalize=args.equalize,
            smooth=smooth,
            keep=args.keep,
            group=args.group,
            products=args.products,
            measure=milliseconds if args.measure else None,
            report=report,
        )
    print(report)
    write(args, made, report)
    return report.as_dict()


def _kinds(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """What weights and activations become. Kinds of weights other than int8 leave activations in floats."""
    weights, activations = args.kind, args.activations
    if args.only == "weights" and activations not in (None, NONE):
        raise InputError(f"--only weights and --activations {activations} exclude each other")
    if args.only == "activations" and weights not in (None, NONE):
        raise InputError(f"--only activations and --weights-as {weights} exclude each other")
    weights = weights or (NONE if args.only == "activations" else "int8")
    activations = activations or (NONE if args.only == "weights" or weights not in (NONE, "int8") else "uint8")
    return (None if weights == NONE else weights), (None if activations == NONE else activations)


def _smooth(text: str) -> float | str | None:
    """'auto', None for 'none', or a number from 0 to 1."""
    if text in ("auto", NONE):
        return None if text == NONE else text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"--smooth {text}: auto, none, or a number from 0 to 1")
    return value
