"""`tensorwright bench`: the benchmarks of the package, from the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from ..ir.dtypes import f32, i8
from ..ir.errors import RuntimeUnavailableError
from ..runtime.threads import available

ROWWISE = ("op_softmax4096x1024", "op_layernorm4096x1024", "op_gelu16M")


def kernels_command(args: argparse.Namespace) -> dict[str, Any]:
    """Contractions one by one, and row-wise kernels against peers if asked; the figures."""
    _there("kernels")
    if args.rowwise:
        args.models, args.peers, args.precision = ",".join(ROWWISE), None, "f32"
        return inference_command(args)
    count = args.threads or available()
    from ..benchmarks import kernels, winograd_kernels
    from ..runtime.host import resolve

    dtype = i8 if args.precision == "int8" else f32
    found: list[dict[str, Any]] = kernels.run(
        sorted({1, count}), args.target or "host", seconds=0.1 if args.quick else 0.4, dtype=dtype
    )
    print(kernels.table(found))
    if dtype is i8:
        return {"machine": kernels.machine(), "rows": found}
    target = resolve(args.target or "host")
    effective = winograd_kernels.run(sorted({1, count}), target, seconds=0.1 if args.quick else 0.4)
    if effective:
        print(f"\nWhole layers by Winograd's method, at the effective rate of the direct sum:\n{kernels.table(effective)}")
    return {"machine": kernels.machine(), "rows": found, "winograd": effective}


def training_command(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps against peers; the figures."""
    _there("training")
    from ..benchmarks import training

    return training.COMPARISON.run(args.models, args.peers, args.threads, args.quick)


def inference_command(args: argparse.Namespace) -> dict[str, Any]:
    """Whole models and single operations against peers; the figures.

    Files are written after every row, so that an interrupted run leaves its rows. Raises BenchmarkError at the end if a workload
    failed or a figure is above the roofline.
    """
    _there("inference")
    from ..benchmarks import inference, report

    target, picture, figures = (getattr(args, k, None) for k in ("markdown", "chart", "json"))
    words = ("models", "peers", "threads", "quick", "precision")
    given = [(w, getattr(args, w)) for w in words]
    options = [f"--{w}" if value is True else f"--{w} {value}" for w, value in given if value not in (None, False)]
    command = " ".join(["tensorwright bench inference", *options])

    def keep(found: dict[str, Any]) -> None:
        if figures and figures != "-":
            Path(figures).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if target:
            Path(target).write_text(report.markdown(inference.with_sizes(found), command), encoding="utf-8")

    compared = inference.comparison(args.precision or "f32")
    found = inference.with_sizes(compared.run(args.models, args.peers, args.threads, args.quick, keep))
    found["command"] = command
    keep(found)
    if picture:
        report.chart(found, picture)
    compared.judge(found)
    return found


def int8_command(args: argparse.Namespace) -> dict[str, Any]:
    """Networks of 8-bit integers against peers and our own f32; the figures. Raises BenchmarkError if a network failed or was
    wrong."""
    _there("int8")
    from ..benchmarks import int8

    compared = int8.comparison(Path(args.folder) if args.folder else None)
    found = compared.run(args.models, args.peers, args.threads, args.quick)
    compared.judge(found)
    return found


def sparse_command(args: argparse.Namespace) -> dict[str, Any]:
    """Sparse kernels and a ResNet-18 without half its channels beside our dense ones, and the break-even share of zeros."""
    _there("sparse")
    from ..benchmarks import sparse

    found = sparse.run(args.threads or available(), args.quick, [n for n in (args.models or "").split(",") if n])
    print(sparse.table(found))
    return found


def compile_command(args: argparse.Namespace) -> dict[str, Any]:
    """Compile times against peers, and against the number of nodes; the figures."""
    _there("compile_time")
    from ..benchmarks import compile_time

    return compile_time.run(args.models, args.peers, args.threads, args.quick, args.markdown)


def onnx_command(args: argparse.Namespace) -> dict[str, Any]:
    """Other people's ONNX models against ONNX Runtime; the figures. Files are written after every row. Raises BenchmarkError if
    a model failed or was wrong."""
    _there("onnx_models")
    from ..benchmarks import onnx_models

    compared, figures = onnx_models.comparison(), getattr(args, "json", None)

    def keep(found: dict[str, Any]) -> None:
        if figures and figures != "-":
            Path(figures).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if args.markdown:
            Path(args.markdown).write_text(onnx_models.markdown(found), encoding="utf-8")

    found = compared.run(args.models, args.peers, args.threads, args.quick, keep)
    compared.judge(found)
    return found


def _there(name: str) -> None:
    if importlib.util.find_spec(f"..benchmarks.{name}", __package__) is None:
        raise RuntimeUnavailableError(f"the benchmark {name!r} is not part of this installation")
