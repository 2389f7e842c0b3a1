"""Whole models against numpy, PyTorch and ONNX Runtime: each contestant in its own process, taking turns.

    python -m tensorwright.benchmarks.inference --models mlp_b1,resnet50_b1 --json result.json

Every contestant gets the same weights (by name, from a file), the same input, the same number of threads and the same
cores. They are measured in rounds, in turn, so that a busy moment of the machine meets all of them; figures are medians.
Errors are against an evaluation in f64.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tensorwright.benchmarks import models
from tensorwright.benchmarks.comparison import Comparison, columns
from tensorwright.benchmarks.contest import contestants, serve, take_turns
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
        reference = _reference(name, module, x, peers)
        outputs = {c: np.load(f"{folder}/{c}.npy").astype(np.float64) for c in running}
    errors = {c: float(np.max(np.abs(y - reference)) / np.max(np.abs(reference))) for c, y in outputs.items()}
    exe = tw.compile(module, *workload.arguments, threads=threads)
    kernels = exe.compiled.run.kernels
    row = columns(name, threads, running, flops=sum(k.flops for k in kernels), nbytes=sum(k.bytes for k in kernels))
    return row | {
        "fraction_of_peak": row["gflops"] / measured_peak(exe.compiled.run.target, threads),
        "max_rel_error": errors.pop("tensorwright"),
        "peers_max_rel_error": errors,
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


def remark(r: Mapping[str, Any]) -> str:
    """Arithmetic of a row."""
    return f"{r['gflops']:.1f} GFLOP/s ({r['fraction_of_peak']:.0%} of peak)"


def match(name: str) -> list[str]:
    """'mlp' stands for all its batch sizes that run by default."""
    return [w for w in models.INFERENCE if w == name or (w.startswith(f"{name}_b") and w in DEFAULT)]


COMPARISON = Comparison(
    "tensorwright bench inference", __doc__, tuple(models.INFERENCE), DEFAULT, installed_peers, measure, remark, match
)


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
    COMPARISON.main(words)


if __name__ == "__main__":
    main()
