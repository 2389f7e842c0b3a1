"""Whole models against numpy, PyTorch and ONNX Runtime: each contestant in its own process, taking turns.

    python -m tensorwright.benchmarks.inference --models mlp_b1,resnet50_b1 --json result.json

Every contestant gets the same weights (by name, from a file), the same input, the same number of threads and the same
cores. They are measured in rounds, in turn, so that a busy moment of the machine meets all of them; figures are medians.
Errors are against an evaluation in f64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tensorwright.benchmarks import models
from tensorwright.benchmarks.contest import contestants, geometric_mean, serve, take_turns
from tensorwright.frontend.nn.init import seed

DEFAULT = ("mlp_b1", "mlp_b64", "lenet_b1", "lenet_b64", "cifar_b1", "cifar_b64", "resnet50_b1", "resnet50_b8")
PEERS = ("numpy", "torch", "torch_compile", "onnxruntime")


def installed_peers() -> list[str]:
    """The peers that can take part here; torch.compile needs a C++ compiler, ONNX Runtime a torch that exports for it."""
    torch = importlib.util.find_spec("torch") is not None
    there = {
        "numpy": True,
        "torch": torch,
        "torch_compile": torch and any(map(shutil.which, ("g++", "c++", "clang++"))),
        "onnxruntime": torch and all(importlib.util.find_spec(m) for m in ("onnxruntime", "onnx", "onnxscript")),
    }
    return [p for p in PEERS if there[p]]


# ---------------------------------------------------------------------------------------------------- contestants


def ours(name: str, weights: dict[str, Any], x: Any, threads: int) -> Callable[[], Any]:
    """Tensorwright, in the way a user calls it."""
    import tensorwright as tw

    module = models.INFERENCE[name].make()
    module.load_state_dict(weights)
    exe = tw.compile(module, *models.INFERENCE[name].arguments, threads=threads)
    return lambda: exe(x)


def by_numpy(name: str, weights: dict[str, Any], x: Any, threads: int) -> Callable[[], Any]:
    """The interpreter of the same graph: numpy, op by op."""
    import tensorwright as tw
    from tensorwright.ir.interp import run

    module = models.INFERENCE[name].make()
    module.load_state_dict(weights)
    graph = tw.trace(module, *models.INFERENCE[name].arguments)
    values = {**weights, next(str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] == "data"): x}
    arrays = [values[str(i.attrs["name"])] for i in graph.inputs]
    return lambda: run(graph, arrays)[0]


def _torch_model(name: str, weights: dict[str, Any], threads: int) -> Any:
    import torch
    from tensorwright.benchmarks import torch_models

    torch.set_num_threads(threads)
    return torch_models.load(torch_models.INFERENCE[name.partition("_")[0]](), weights).eval()


def by_torch(name: str, weights: dict[str, Any], x: Any, threads: int) -> Callable[[], Any]:
    """PyTorch eager, inference mode, channels last where that is how it is fast."""
    import torch

    model = _torch_model(name, weights, threads)
    t = torch.from_numpy(x)
    if t.ndim == 4:
        model, t = model.to(memory_format=torch.channels_last), t.contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.inference_mode():
            return model(t)

    return run


def by_torch_compile(name: str, weights: dict[str, Any], x: Any, threads: int) -> Callable[[], Any]:
    """torch.compile, max-autotune, weights frozen."""
    # Its pool of compile processes keeps a core busy between rounds, and every other contestant pays for it.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    model = _torch_model(name, weights, threads)
    t = torch.from_numpy(x)
    if t.ndim == 4:
        model, t = model.to(memory_format=torch.channels_last), t.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs")

    def run() -> Any:
        with torch.inference_mode():
            return compiled(t)

    return run


def by_onnxruntime(name: str, weights: dict[str, Any], x: Any, threads: int) -> Callable[[], Any]:
    """ONNX Runtime, every graph optimisation, weights as constants of the model."""
    import onnxruntime
    import torch

    model = _torch_model(name, weights, threads)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (torch.from_numpy(x),), path, dynamo=True, verbose=False, external_data=False)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


CONTESTANTS = {
    "tensorwright": ours,
    "numpy": by_numpy,
    "torch": by_torch,
    "torch_compile": by_torch_compile,
    "onnxruntime": by_onnxruntime,
}


# ---------------------------------------------------------------------------------------------------- the comparison


def measure(name: str, peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """One row: medians of all contestants on one workload. Raises RuntimeError if Tensorwright fails."""
    import tensorwright as tw
    from tensorwright.driver import measured_peak

    seed(0)
    workload = models.INFERENCE[name]
    module = workload.make()
    (x,) = workload.inputs()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/weights.npz", **module.state_dict())
        np.save(f"{folder}/input.npy", x)
        words = {c: (c, name, folder) for c in ("tensorwright", *peers)}
        with contestants("tensorwright.benchmarks.inference", words, threads, name) as running:
            if "tensorwright" not in running:
                raise RuntimeError(f"{name}: Tensorwright itself failed")
            take_turns(running, rounds)
            medians = {c: p.median for c, p in running.items()}
            spread = {c: p.spread for c, p in running.items()}
            ready = {c: p.facts["ready"] for c, p in running.items()}
        reference = _reference(name, module, x, peers)
        outputs = {c: np.load(f"{folder}/{c}.npy").astype(np.float64) for c in medians}
    errors = {c: float(np.max(np.abs(y - reference)) / np.max(np.abs(reference))) for c, y in outputs.items()}
    exe = tw.compile(module, *workload.arguments, threads=threads)
    mine = medians.pop("tensorwright")
    best = min(medians, key=medians.__getitem__, default=None)
    gflops = sum(k.flops for k in exe.compiled.run.kernels) / mine * 1e-6
    return {
        "name": name,
        "threads": threads,
        "ours_ms": mine,
        "peers_ms": medians,
        "best_peer": best,
        "ratio_to_best": medians[best] / mine if best else None,
        "ratios": {c: t / mine for c, t in medians.items()},
        "spread_ms": spread,
        "gflops": gflops,
        "gbps": sum(k.bytes for k in exe.compiled.run.kernels) / mine * 1e-6,
        "fraction_of_peak": gflops / measured_peak(exe.compiled.run.target, threads),
        "max_rel_error": errors.pop("tensorwright"),
        "peers_max_rel_error": errors,
        "seconds_to_first_result": ready,
        "peak_bytes": exe.peak_bytes,
    }


def _reference(name: str, module: Any, x: Any, peers: Sequence[str]) -> Any:
    """The result in f64: torch's where it takes part (fast), else the interpreter's."""
    if "torch" in peers:
        import torch

        model = _torch_model(name, module.state_dict(), os.cpu_count() or 1).double()
        with torch.inference_mode():
            return model(torch.from_numpy(x).double()).numpy()
    import tensorwright as tw
    from tensorwright.ir.dtypes import f64
    from tensorwright.ir.interp import run

    traced = tw.trace(module, *models.INFERENCE[name].arguments)
    state = module.state_dict()
    return run(traced, [state.get(str(i.attrs["name"]), x) for i in traced.inputs], dtype=f64)[0]


def compare(names: Sequence[str], peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """All rows, the machine, and the geometric mean of the ratios to the best peer; prints as it goes."""
    rows = []
    for name in names:
        row = measure(name, peers, threads, rounds)
        rows.append(row)
        ratio = "no peer" if row["best_peer"] is None else f"{row['ratio_to_best']:.2f}x of {row['best_peer']}"
        others = "  ".join(f"{c} {t:.3f} ({t / row['ours_ms']:.1f}x)" for c, t in row["peers_ms"].items())
        print(
            f"{ratio:<24} {name:<14} ours {row['ours_ms']:.4f} ms  {others}  {row['gflops']:.1f} GFLOP/s "
            f"({row['fraction_of_peak']:.0%} of peak)  error {row['max_rel_error']:.1e}",
            flush=True,
        )
    mean = geometric_mean([r["ratio_to_best"] for r in rows if r["ratio_to_best"]])
    if mean is not None:
        print(f"{mean:.2f}x of the best peer (geometric mean)")
    return {"machine": machine(threads), "rows": rows, "geomean_ratio": mean}


def machine(threads: int) -> dict[str, Any]:
    """Where and when it was measured, and with which versions."""
    from importlib import metadata

    from tensorwright.runtime import host

    versions = {}
    for package in ("tensorwright", "numpy", "torch", "onnxruntime", "llvmlite"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": host.cpu_name(),
        "target": host.host().name,
        "threads": threads,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--worker"]:
        _, contestant, name, folder, count = words
        weights = dict(np.load(f"{folder}/weights.npz"))
        x = np.load(f"{folder}/input.npy")

        def make() -> tuple[Callable[[], Any], dict[str, Any]]:
            return CONTESTANTS[contestant](name, weights, x, int(count)), {}

        serve(make, f"{folder}/{contestant}.npy", int(count))
        return
    parser = argparse.ArgumentParser(prog="tensorwright bench inference", description=__doc__)
    parser.add_argument(
        "--models", default=",".join(DEFAULT), help=f"workloads, separated by commas: {', '.join(models.INFERENCE)}"
    )
    parser.add_argument("--peers", default=None, help=f"some of {', '.join(PEERS)} (default: what is installed)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(words)
    result = run(args.models, args.peers, args.threads, args.quick)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(names: str | None, peers: str | None, threads: int | None, quick: bool) -> dict[str, Any]:
    """What the command line does. Raises InputError for an unknown workload or peer."""
    from tensorwright.ir.errors import InputError
    from tensorwright.runtime.threads import available

    chosen: list[str] = []
    for n in names.split(",") if names else DEFAULT:
        found = [w for w in models.INFERENCE if w == n or (w.startswith(f"{n}_b") and w in DEFAULT)]
        if not found:
            raise InputError(f"unknown workload {n!r}; expected some of {', '.join(models.INFERENCE)}")
        chosen += found
    there = installed_peers()
    against = peers.split(",") if peers else there
    if unknown := [p for p in against if p and p not in there]:
        raise InputError(f"peers {unknown} are not installed here; there are {', '.join(there)}")
    return compare(chosen, [p for p in against if p], threads or available(), 3 if quick else 12)


if __name__ == "__main__":
    main()
