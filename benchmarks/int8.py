"""Whole networks in 8-bit integers: ours against ONNX Runtime and OpenVINO on the same file, and against our own f32.

    tensorwright bench int8 --models resnet50_b1,mlp_b64 --json result.json

ONNX Runtime's own static quantisation makes the file: activations u8 per tensor by min-max of four random inputs, weights i8 per
channel, as QDQ nodes. What is right is that graph as it is written, node by node in f32 (ONNX Runtime without optimisations). Our
f32 is without Winograd's method, which integers have no part in. Contestants have a process each and take turns.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorwright.benchmarks import models
from tensorwright.benchmarks import prepare as plain
from tensorwright.benchmarks.comparison import Comparison, Row, columns
from tensorwright.benchmarks.contest import busy, contestants, take_turns
from tensorwright.benchmarks.inference import DISTURBED, known_peers, verdict
from tensorwright.benchmarks.peak import peak
from tensorwright.benchmarks.peers import DIRECT, OURS, PEERS
from tensorwright.ir.dtypes import i8
from tensorwright.runtime.host import host

WORKLOADS: Final = ("resnet50_b1", "bert_b1", "mlp_b64", "cifar_b64", "mobilenetv2_b1")
# Of the largest value of the graph as written, by the order in which sums are rounded: a number next to a half goes to either
# side, which is one of 255 steps, and later layers make it more or less. ONNX Runtime's own optimisations differ by as much.
TOLERANCE: Final = 0.1
SAMPLES: Final = 4  # inputs that ranges are taken from
MODULE: Final = "tensorwright.benchmarks.int8"


def write(name: str, folder: Path) -> None:
    """The files of a workload, with `int8.onnx` besides. Of a transformer the products by weights are quantised, which is what
    has weights to save; attention's own two stay as they are."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    plain.write(name, folder)
    workload = models.INFERENCE[name]

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = [{f"in{k}": x for k, x in enumerate(workload.inputs(seed))} for seed in range(1, SAMPLES + 1)]

        def get_next(self) -> Any:
            """The next input, None after the last one."""
            return self.rest.pop(0) if self.rest else None

    ready = folder / "ready.onnx"
    transformer = name.startswith("bert")
    quant_pre_process(str(folder / "model.onnx"), str(ready), skip_symbolic_shape=True, skip_optimization=transformer)
    more: dict[str, Any] = {}
    if transformer:
        more = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": _without_weights(ready)}
        more["extra_options"] = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
    settings: dict[str, Any] = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(str(ready), str(folder / "int8.onnx"), Samples(), quant_format=QuantFormat.QDQ, **settings, **more)
    np.savez(folder / "quantised.npz", **plain.named("out", _as_written(folder)))


def _without_weights(path: Path) -> list[str]:
    """The matrix products of two activations."""
    import onnx

    graph = onnx.load(str(path)).graph
    held = {i.name for i in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    return [n.name for n in graph.node if n.op_type == "MatMul" and not held.intersection(n.input)]


def _as_written(folder: Path) -> list[Any]:
    """The results of int8.onnx node by node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    with np.load(folder / "inputs.npz") as inputs:
        return list(session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()}))


def measure(name: str, peers: Sequence[str], threads: int, rounds: int, kept: Path | None = None) -> Row:
    """One row: medians of all contestants on one network. `kept` is a folder of workloads written before, which this one joins.

    Raises RuntimeError if Tensorwright fails, or is wrong.
    """
    errors: dict[str, float] = {}
    out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        source = None if kept is None else kept / name
        if source is not None and (source / "quantised.npz").exists():
            shutil.copytree(source, folder, dirs_exist_ok=True)
        else:
            words = [sys.executable, "-m", MODULE, "--write", name, text]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: it could not be quantised: {done.stderr[-500:]}")
            if source is not None:
                shutil.copytree(folder, source, dirs_exist_ok=True)

        def check(contestant: str) -> str:
            right = "reference.npz" if contestant == DIRECT else "quantised.npz"
            errors[contestant], reason = verdict(folder / f"{contestant}.npz", folder / right, TOLERANCE)
            return reason

        precisions = {OURS: "int8", DIRECT: "f32", **dict.fromkeys(peers, "int8")}
        arguments = {c: (c, name, text, precision) for c, precision in precisions.items()}
        environments = {c: {**PEERS[c].environment(threads)} for c in peers}
        environments |= {c: {"TENSORWRIGHT_CACHE": str(folder / "cache")} for c in (OURS, DIRECT)}
        settings: dict[str, Any] = {"check": check, "environments": environments, "out": out}
        with contestants("tensorwright.benchmarks.worker", arguments, threads, name, **settings) as running:
            for own in (OURS, DIRECT):
                if own not in running:
                    raise RuntimeError(f"{name}: {own} is out: {out[own]}")
            others = busy(lambda: take_turns(running, rounds), [c.process.pid for c in running.values()])
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    row = columns(name, threads, running, flops=about["flops"], nbytes=about["bytes"], aside=DIRECT)
    rate = peak(host(), i8) * threads
    return row | {
        "precision": "int8",
        "f32_ms": running[DIRECT].median,
        "ratio_to_f32": running[DIRECT].median / row["ours_ms"],
        "peak_gops": rate * 1e-9,
        "fraction_of_peak": row["gflops"] * 1e9 / rate,
        "busy_elsewhere": others,
        "max_rel_error": errors.pop(OURS),
        "peers_max_rel_error": errors,
        "compile_seconds": {c: p.facts["build"] + p.facts["first_call"] for c, p in running.items()},
        "out": out,
    }


def remark(row: Mapping[str, Any]) -> str:
    """Our f32 beside it, arithmetic as part of the peak of 8-bit products, what disturbed, and who is out."""
    text = f"{row['ratio_to_f32']:.2f}x of our f32 ({row['f32_ms']:.3f} ms)  {row['gflops']:.0f} GOP/s"
    text += f" ({row['fraction_of_peak']:.0%} of the integer peak)"
    noisy = [f"{row['busy_elsewhere']:.2f} cores busy elsewhere"] if row["busy_elsewhere"] > DISTURBED else []
    return "  ".join([text, *noisy, *(f"{c} is out ({why})" for c, why in row["out"].items())])


def peers() -> dict[str, str]:
    """ONNX Runtime and OpenVINO; none without ONNX Runtime, whose quantiser makes the files."""
    found = known_peers("int8")
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("torch") is None:
        raise RuntimeError("bench int8 needs onnxruntime and torch, which make its files: pip install 'tensorwright[bench]'")
    return found


def match(name: str) -> list[str]:
    """'mlp' stands for mlp_b64."""
    return [w for w in WORKLOADS if w == name or w.startswith(f"{name}_")]


def comparison(kept: Path | None = None) -> Comparison:
    """The benchmark; `kept` as in `measure`."""

    def rows(name: str, against: Sequence[str], threads: int, rounds: int) -> Row:
        return measure(name, against, threads, rounds, kept)

    return Comparison("tensorwright bench int8", __doc__, WORKLOADS, WORKLOADS, peers, rows, remark, match)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        comparison().main(sys.argv[1:])
