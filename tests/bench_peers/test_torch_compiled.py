"""Compiled inference against PyTorch, an extra. Small models of the benchmarks' builds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.benchmarks import models

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: it is the peer of these comparisons (pip install 'tensorwright[bench]')"
)

RNG = np.random.default_rng(7)
SMALL = ((1, 16, 1, 1), (6, 24, 2, 2))


def images(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def twins() -> Any:
    from tensorwright.benchmarks import torch_models

    torch.manual_seed(0)
    return torch_models


MODELS = [
    ("ResNet50", ((1, 1, 1, 1), 16, 10), images(1, 3, 64, 64)),
    ("MobileNetV2", (SMALL, 64, 10), images(1, 3, 32, 32)),
    ("BERT", (1, 32, 4, 64, 50, 16), RNG.integers(0, 50, (2, 12))),
]


@pytest.mark.parametrize(("name", "settings", "x"), MODELS, ids=[m[0] for m in MODELS])
def test_compiled_models_agree(name: str, settings: Any, x: Any, twins: Any) -> None:
    from .twins import with_statistics

    twin = with_statistics(getattr(twins, name)(*settings)).eval()
    model = models.from_torch_state(getattr(models, name)(*settings), twin.state_dict())
    with torch.no_grad():
        want = twin(torch.from_numpy(x)).numpy()
    got = tw.compile(model, tw.spec(x), cache=False)(x)
    assert abs(got - want).max() < 1e-4 * abs(want).max()
