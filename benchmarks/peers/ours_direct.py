"""Tensorwright in f32 without Winograd's method."""

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
        exe = tw.compile(module, *workload.arguments, threads=task.threads, winograd=False)
        return Entry(lambda: exe(*inputs))

    return build
