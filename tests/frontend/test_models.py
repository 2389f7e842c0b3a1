"""The benchmark workloads: the published sizes, and outputs of the right type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import losses, optim
from tensorwright.benchmarks import models
from tensorwright.frontend import training_step

# Trainable parameters: ResNet-50 and MobileNetV2 as in the papers' reference code, the others by their shapes.
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "mlp_b64": (101_770, (64, 10)),
    "lenet_b1": (21_840, (1, 10)),
    "cifar_b64": (122_570, (64, 10)),
    "resnet50_b1": (25_557_032, (1, 1000)),
    "mobilenetv2_b1": (3_504_872, (1, 1000)),
}


@pytest.mark.parametrize("name", SIZES)
def test_inference_workloads(name: str) -> None:
    workload = models.INFERENCE[name]
    model = workload.make()
    count, shape = SIZES[name]
    assert sum(p.data.size for p in model.parameters()) == count
    graph = tw.trace(model, *workload.arguments)
    assert graph.outputs[0].shape == shape
    assert all(i.attrs["role"] == "parameter" for i in graph.inputs[len(workload.arguments) :])


@pytest.mark.parametrize("name", ["mlp_b64", "demo_b64", "transformer_b8"])
def test_training_workloads(name: str) -> None:
    workload = models.TRAINING[name]
    assert workload.target is not None
    model: Any = workload.make()
    step = training_step(model, losses.cross_entropy, optim.Adam(), *workload.arguments, workload.target)
    assert set(dict(model.named_parameters())) <= set(step.state)
    for spec, array in zip((*workload.arguments, workload.target), workload.inputs(), strict=True):
        assert array.shape == spec.shape
        assert array.dtype == spec.dtype.numpy
        if spec.dtype.is_integer:
            assert 0 <= array.min() <= array.max() < workload.classes
    np.testing.assert_array_equal(workload.inputs()[0], workload.inputs()[0])
