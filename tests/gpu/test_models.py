"""The models of "core" on the GPU: outputs and losses of training steps like the processor's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.benchmarks import models
from tensorwright.runtime.cuda.device import Device

from ..cuda.sweep import FORWARD
from ..cuda.test_training import losses

pytestmark = [pytest.mark.gpu, pytest.mark.unvalidated("the passes are validated elsewhere")]


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, gpu: Device) -> None:
    w = (models.INFERENCE | models.TRAINING)[name]
    module = w.make()
    here, there = (tw.compile(module, *w.arguments, target=t) for t in (None, "cuda"))
    a, b = here(*w.arguments), there(*w.arguments)
    for x, y in zip(_flat(a), _flat(b), strict=True):
        # sums of thousands of terms in another order: relative to the largest result
        assert np.abs(x - y).max() <= 1e-4 * np.abs(x).max()
    c = there(*w.arguments)
    for y, z in zip(_flat(b), _flat(c), strict=True):
        np.testing.assert_array_equal(y, z)  # from run to run the same bits


def _flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def test_the_demo_trains_like_on_a_processor(gpu: Device) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.random((3, 64, 1, 8, 8), np.float32), rng.integers(0, 10, (3, 64))
    np.testing.assert_allclose(losses("cuda", images, labels), losses(None, images, labels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_tensor_cores(precision: str, gpu: Device, sm: int) -> None:
    if sm < 80:
        precision = "f32"  # nothing else to compare there
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (256, 256)).astype(np.float32) for _ in range(2))  # exact in every precision
    exe = tw.compile(lambda x, y: x @ y, tw.spec(256, 256), tw.spec(256, 256), target="cuda", precision=precision)
    np.testing.assert_array_equal(exe(a, b), a @ b)
