"""`tensorwright compress`: a model and typical inputs in, the model with the best kind of each layer and a report out."""

from __future__ import annotations

import argparse
from typing import Any, Final

from ..compression.compress import compress
from ..compression.search_kinds import FAMILIES
from ..ir.errors import InputError
from .compression import batch_of, check_pattern, checked_files, data_of, model_of, options_named, share_of, write

_OPTIONS: Final = {
    "kinds": "--kinds",
    "max_drop": "--max-drop",
    "keep": "--keep",
    "batch": "--timed-batch",
    "data": "--calibration",
    "metric": "--metric",
    "validation": "--validation",
}


def compress_command(args: argparse.Namespace) -> dict[str, Any]:
    """Searches, writes the model and the report, prints a line for each layer."""
    checked_files(args)
    if not args.calibration:
        raise InputError("--calibration FILE.npy: typical inputs are needed, to know ranges and to judge what is lost")
    graph = model_of(args)
    size = batch_of(graph, args.batch)
    data = data_of([*args.calibration, *([args.labels] if args.labels else [])], size)
    unknown_to_onnx = ("sparse", "int4 weights") if (args.output or "").endswith(".onnx") else ()
    kinds = args.kinds.split(",") if args.kinds else [k for k in FAMILIES if k not in unknown_to_onnx]
    more: dict[str, Any] = {"patterns": args.patterns.split(",")} if args.patterns else {}
    for pattern in more.get("patterns", ()):
        check_pattern("--patterns", pattern)
    if args.sparsities:
        more["sparsities"] = [_share("--sparsities", s) for s in args.sparsities.split(",")]
    with options_named(_OPTIONS):
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
            validation=_validation(args, size),
            **more,
        )
    print(made)
    write(args, made.graph, made.report)
    return made.report.as_dict()


def _validation(args: argparse.Namespace, size: int) -> Any:
    """What the result is judged on: a share of the data, batches of files of their own, or None."""
    given = args.validation
    if args.validation_labels and not given:
        raise InputError("--validation-labels belongs to the files of --validation")
    if not given:
        return None
    if not given[0].endswith(".npy") and len(given) == 1:
        return _share("--validation", given[0])
    return data_of([*given, *([args.validation_labels] if args.validation_labels else [])], size, "--validation")


def _share(option: str, text: str) -> float:
    share = share_of(text)
    if share is None:
        raise InputError(f"{option} {text}: a share between 0 and 1 is expected")
    return share
