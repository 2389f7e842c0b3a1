"""torch.compile: max-autotune, weights frozen, images in channels-last order; its caches are off, so that it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Entry, Task
from .torch import prepared, results


def enter(task: Task) -> Callable[[], Entry]:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    module, inputs = prepared(task, channels_last=True)

    def build() -> Entry:
        compiled = torch.compile(module, mode="max-autotune-no-cudagraphs")

        def run() -> Any:
            with torch.no_grad():
                return compiled(*inputs)

        return Entry(run, results)

    return build
