"""`tensorwright bench`: the benchmarks of the package, from the command line."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from .ir.errors import RuntimeUnavailableError


def kernels_command(args: argparse.Namespace) -> dict[str, Any]:
    """Contractions one by one; the figures."""
    _there("kernels")
    from .benchmarks import kernels

    result: dict[str, Any] = kernels.run(args.target, args.threads, args.quick)
    return result


def inference_command(args: argparse.Namespace) -> dict[str, Any]:
    """Whole models against peers; the figures."""
    _there("inference")
    from .benchmarks import inference

    return inference.run(args.models, args.peers, args.threads, args.quick)


def _there(name: str) -> None:
    if importlib.util.find_spec(f"{__package__}.benchmarks.{name}") is None:
        raise RuntimeUnavailableError(f"the benchmark {name!r} is not part of this installation")
