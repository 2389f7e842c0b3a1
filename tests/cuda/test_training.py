"""Training on the PTX interpreter with all checks on: the losses are the processor's."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import demo, driver
from tensorwright.frontend.nn.init import seed
from tensorwright.frontend.training import training_step

RATE = np.array(2e-3, np.float32)


def losses(target: str | None, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Those of one full step of the demo's CNN with Adam for each batch, dropout and batch norm among it."""
    seed(0)
    types = tw.spec(*images.shape[1:]), tw.spec(*labels.shape[1:], dtype="i64")
    traced = training_step(demo.cnn(), tw.losses.cross_entropy, tw.optim.Adam(2e-3), *types)
    step = driver.build(traced.graph, traced.state, purpose="training", target=target)
    return [float(step(RATE, x, y)) for x, y in zip(images, labels, strict=True)]


@pytest.mark.unvalidated("its passes are those of other tests")
def test_demo_cnn_trains_like_on_a_processor() -> None:
    """Three full steps, six images each; the demo's own batches of 64: `python tests/cuda/sweep.py --train`."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((3, 6, 1, 8, 8), np.float32), rng.integers(0, 10, (3, 6))
    expected = losses(None, images, labels)
    assert len({f"{e:.3f}" for e in expected}) == 3
    np.testing.assert_allclose(losses("cuda-emulator", images, labels), expected, rtol=0, atol=1e-4)
