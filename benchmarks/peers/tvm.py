"""TVM without tuning: its ONNX frontend, the default Relax pipeline, code for this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    path, inputs = str(task.onnx), task.inputs()

    def build() -> Entry:
        shapes = {i.name: list(x.shape) for i, x in zip(_inputs(onnx.load(path)), inputs, strict=True)}
        module = from_onnx(onnx.load(path), shape_dict=shapes, keep_params_in_input=False)
        target = tvm.target.Target.from_device(tvm.cpu())
        with target:
            module = relax.get_pipeline("zero")(module)
        machine = relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())
        arguments = [tvm.runtime.tensor(x) for x in inputs]
        return Entry(lambda: machine["main"](*arguments), _arrays)

    return build


def _inputs(model: Any) -> list[Any]:
    constants = {c.name for c in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in constants]


def _arrays(result: Any) -> list[Any]:
    parts = [result] if hasattr(result, "numpy") else list(result)
    return [p.numpy() for p in parts]
