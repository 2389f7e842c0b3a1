"""Writes a workload to a folder, where every contestant takes it from: weights, inputs, the result in f64, an ONNX file.

    python -m tensorwright.benchmarks.prepare bert_b1 FOLDER

It runs in a process of its own, so that whoever compares need not hold the weights. The reference is PyTorch's result in f64
where it is installed, else the interpreter's. The ONNX file is PyTorch's export, batch norm folded.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks import models
from tensorwright.benchmarks.roofline import contraction_flops
from tensorwright.frontend.nn.init import seed
from tensorwright.ir.dtypes import f64
from tensorwright.ir.interp import run as interpret

Array = np.ndarray[Any, Any]


def prepare(name: str, folder: Path) -> None:
    """Runs `write` in a process of its own. Raises RuntimeError with what it said if it fails."""
    words = [sys.executable, "-m", "tensorwright.benchmarks.prepare", name, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: its weights and its reference could not be made: {done.stderr[-500:]}")


def write(name: str, folder: Path) -> None:
    """The files of a workload: weights.npz, folded.npz (if there are batch norms), inputs.npz, reference.npz, about.json, and
    model.onnx (where PyTorch and onnx are installed)."""
    seed(0)
    workload = models.INFERENCE[name]
    module: Any = workload.make()
    weights = {k: np.asarray(v) for k, v in module.state_dict().items()}
    inputs = workload.inputs()
    traced = tw.trace(module, *workload.arguments)
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
    np.savez(folder / "inputs.npz", **named("in", inputs))
    if folded := fold(weights):
        np.savez(folder / "folded.npz", **folded)  # type: ignore[arg-type]
    about = {
        "name": name,
        "outputs": [list(o.tensor.static_shape) for o in traced.outputs],
        "flops": contraction_flops(traced),
        "bytes": sum(t.tensor.nbytes for t in (*traced.inputs, *traced.outputs)) - _unread(name, traced),
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if importlib.util.find_spec("torch") is not None:
        results = _with_torch(name, weights, inputs, folder)
    else:
        given = [weights.get(str(i.attrs["name"])) for i in traced.inputs]
        rest = iter(inputs)
        results = interpret(traced, [next(rest) if g is None else g for g in given], dtype=f64)
    np.savez(folder / "reference.npz", **named("out", results))


def named(start: str, arrays: Sequence[Array]) -> dict[str, Any]:
    """Arrays by names in their order: in0, in1 ..."""
    return {f"{start}{i}": x for i, x in enumerate(arrays)}


def _unread(name: str, traced: Any) -> int:
    """Bytes of tables of which a call reads a few rows: they are no traffic. The tied output matrix of GPT-2 is read."""
    tables = {"bert_b1": ("emb.weight", "pos.weight", "typ.weight"), "gpt2dec_b1": ("pos.weight",)}.get(name, ())
    return sum(i.tensor.nbytes for i in traced.inputs if str(i.attrs["name"]) in tables)


def fold(weights: Mapping[str, Array], eps: float = 1e-5) -> dict[str, Array]:
    """The weights with each batch norm `x.bn` folded into the convolution `x.conv`; {} where there is none. Computed in f64."""
    suffix = ".bn.running_var"
    blocks = [k.removesuffix(suffix) for k in weights if k.endswith(suffix)]
    if not blocks:
        return {}
    found = {k: v for k, v in weights.items() if ".bn." not in k}
    for block in blocks:
        part = {k: weights[f"{block}.bn.{k}"].astype(np.float64) for k in ("weight", "bias", "running_mean", "running_var")}
        scale = part["weight"] / np.sqrt(part["running_var"] + eps)
        filters = weights[f"{block}.conv.weight"]
        found[f"{block}.conv.weight"] = (filters * scale[:, None, None, None]).astype(filters.dtype)
        found[f"{block}.conv.bias"] = (part["bias"] - part["running_mean"] * scale).astype(filters.dtype)
    return found


def _with_torch(name: str, weights: Mapping[str, Array], inputs: Sequence[Array], folder: Path) -> list[Array]:
    """The results in f64; writes the ONNX file on the way."""
    import torch
    from tensorwright.benchmarks import torch_models

    module = torch_models.inference(name, weights)
    given = [torch.from_numpy(x) for x in inputs]
    if importlib.util.find_spec("onnx") is not None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = [f"in{i}" for i in range(len(given))]
            path = str(folder / "model.onnx")
            torch.onnx.export(module, tuple(given), path, input_names=names, opset_version=17, dynamo=False)
    module = torch_models.inference(name, weights, fold=False).double()
    with torch.inference_mode():
        found = module(*(x.double() if x.is_floating_point() else x for x in given))
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
