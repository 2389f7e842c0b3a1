"""JAX: `jit` of the model with its weights as arguments, both on the device before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    import jax
    import numpy as np
    from tensorwright.benchmarks import jax_models

    model, weights, inputs = jax_models.inference(task.name, task.weights(folded=True), task.inputs())
    weights = jax.device_put(weights)
    arguments = [jax.device_put(x) for x in inputs]

    def results(found: Any) -> list[Any]:
        parts = found if isinstance(found, tuple) else (found,)
        images = task.name.startswith("op_conv")  # computed in NHWC
        return [np.asarray(p).transpose(0, 3, 1, 2) if images else np.asarray(p) for p in parts]

    def build() -> Entry:
        compiled = jax.jit(model)
        return Entry(lambda: jax.block_until_ready(compiled(weights, *arguments)), results)

    return build
