"""Tensorwright, in the way a user calls it."""

from __future__ import annotations

from collections.abc import Callable

import tensorwright as tw
from tensorwright.benchmarks import models

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    workload = models.INFERENCE[task.name]
    module = workload.make()
    module.load_state_dict(task.weights())
    inputs = task.inputs()

    def build() -> Entry:
        if task.precision == "int8":
            exe = tw.compile(tw.onnx.Model(task.onnx), threads=task.threads)
        else:
            exe = tw.compile(module, *workload.arguments, threads=task.threads, precision=task.precision)
        kernels = exe.compiled.run.kernels
        facts = {
            "peak_bytes": exe.peak_bytes,
            "kernels": len(kernels),
            "flops": sum(k.flops for k in kernels),
        }
        if task.single:
            out = task.like_outputs()
            target = out[0] if len(out) == 1 else out
            return Entry(lambda: exe(*inputs, out=target), facts=facts)
        return Entry(lambda: exe(*inputs), facts=facts)

    return build
