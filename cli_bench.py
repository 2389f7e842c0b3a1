"""`tensorwright bench`: the benchmarks of the package, from the command line."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from .ir.errors import RuntimeUnavailableError
from .runtime.threads import available


def kernels_command(args: argparse.Namespace) -> dict[str, Any]:
    """Contractions one by one, and row-wise kernels against torch if asked; the figures."""
    _there("kernels")
    if args.rowwise:
        from .benchmarks import rowwise

        return rowwise.COMPARISON.run(threads=args.threads, quick=args.quick)
    count = args.threads or available()
    from .benchmarks import kernels

    found: list[dict[str, Any]] = kernels.run(sorted({1, count}), args.target or "host", seconds=0.1 if args.quick else 0.4)
    print(kernels.table(found))
    return {"machine": kernels.machine(), "rows": found}


def training_command(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps against peers; the figures."""
    _there("training")
    from .benchmarks import training

    return training.COMPARISON.run(args.models, args.peers, args.threads, args.quick)


def inference_command(args: argparse.Namespace) -> dict[str, Any]:
    """Whole models against peers; the figures."""
    _there("inference")
    from .benchmarks import inference

    return inference.COMPARISON.run(args.models, args.peers, args.threads, args.quick)


def _there(name: str) -> None:
    if importlib.util.find_spec(f"{__package__}.benchmarks.{name}") is None:
        raise RuntimeUnavailableError(f"the benchmark {name!r} is not part of this installation")
