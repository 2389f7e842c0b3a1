"""PyTorch eager in inference mode; for a single operation in the form that writes into memory, where that is faster.

In a bf16 run: the same under autocast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import Entry, Task


def prepared(task: Task, *, channels_last: bool = False) -> tuple[Any, list[Any]]:
    """The module with its weights, and its inputs. Importing torch here keeps other contestants free of it."""
    import torch
    from tensorwright.benchmarks import torch_models

    torch.set_num_threads(task.threads)
    module = torch_models.inference(task.name, task.weights())
    inputs = [torch.from_numpy(x) for x in task.inputs()]
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    return module, inputs


def results(found: Any) -> Sequence[Any]:
    """Tensors as f32 arrays in the order of their axes."""
    parts = found if isinstance(found, (tuple, list)) else (found,)
    return [t.detach().float().contiguous().numpy() for t in parts]


def enter(task: Task) -> Callable[[], Entry]:
    import torch

    module, inputs = prepared(task)

    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    def autocast() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return module(*inputs)

    def build() -> Entry:
        if task.precision == "bf16":
            return Entry(autocast, results)
        forms: dict[str, Callable[[], Any]] = {"module": call, **(_into(task.name, module, inputs) if task.single else {})}
        best = min(forms, key=lambda f: _seconds(forms[f])) if len(forms) > 1 else "module"
        return Entry(forms[best], results, {"form": best})

    return build


def _into(name: str, module: Any, inputs: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """The forms of an operation that write into memory that is there already."""
    import torch

    torch.set_grad_enabled(False)
    x = inputs[0]
    if name.startswith("op_gemm"):
        out = torch.empty(x.shape[0], inputs[1].shape[1])
        return {"torch.matmul(out=)": lambda: torch.matmul(*inputs, out=out)}
    if name.startswith("op_softmax"):
        out = torch.empty_like(x)
        return {"torch.softmax(out=)": lambda: torch.softmax(x, -1, out=out)}
    if name.startswith("op_layernorm"):
        out, mean, rstd = torch.empty_like(x), torch.empty(x.shape[0], 1), torch.empty(x.shape[0], 1)
        norm, shape, native = module.n, [x.shape[-1]], torch.ops.aten.native_layer_norm.out
        arguments = (x, shape, norm.weight, norm.bias, norm.eps)
        return {"aten.native_layer_norm.out": lambda: native(*arguments, out0=out, out1=mean, out2=rstd)[0]}
    if name.startswith("op_gelu"):
        out = torch.empty_like(x)
        return {"aten.gelu.out": lambda: torch.ops.aten.gelu.out(x, out=out)}
    if name.startswith("op_gemv"):
        out, weight = torch.empty_like(x), module.f.weight.T
        return {"torch.matmul(out=)": lambda: torch.matmul(x, weight, out=out)}
    return {}


def _seconds(run: Callable[[], Any]) -> float:
    """The median of a few calls."""
    run()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]
