"""PyTorch eager with images and filters in channels-last order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Entry, Task
from .torch import prepared, results


def enter(task: Task) -> Callable[[], Entry]:
    import torch

    module, inputs = prepared(task, channels_last=True)

    def run() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return lambda: Entry(run, results)
