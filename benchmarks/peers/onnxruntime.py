"""ONNX Runtime: every graph optimisation, weights as constants of the model, outputs bound to memory for single operations."""

from __future__ import annotations

from collections.abc import Callable

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    import onnxruntime

    path, inputs = str(task.onnx), task.inputs()
    out = task.like_outputs() if task.single else []

    def build() -> Entry:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}
        if not out:
            return Entry(lambda: session.run(None, feed))
        binding = session.io_binding()
        for name, x in feed.items():
            binding.bind_cpu_input(name, x)
        for o, array in zip(session.get_outputs(), out, strict=True):
            binding.bind_output(o.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def run() -> object:
            session.run_with_iobinding(binding)
            return out

        return Entry(run, facts={"form": "run_with_iobinding"}, kept=feed)

    return build
