"""OpenVINO for latency, in one stream; f32 arithmetic, or, of the bf16 and int8 runs, what it does by default (bf16)."""

from __future__ import annotations

from collections.abc import Callable

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    import numpy as np
    import openvino

    path, inputs = str(task.onnx), task.inputs()

    def build() -> Entry:
        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
        settings = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if task.precision == "f32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core.compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        for i, x in enumerate(inputs):
            request.set_input_tensor(i, openvino.Tensor(x, shared_memory=True))
        found = [request.get_output_tensor(i) for i in range(len(compiled.outputs))]
        facts = {"precision": str(compiled.get_property("INFERENCE_PRECISION_HINT"))}
        return Entry(request.infer, lambda _: [np.array(t.data) for t in found], facts, kept=inputs)

    return build
