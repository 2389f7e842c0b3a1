"""Compiled training steps against PyTorch in f64: every gradient, and the losses of the first steps under Adam."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("PyTorch, the oracle of these tests, is not installed", allow_module_level=True)

import torch
from tensorwright.benchmarks import torch_training, training
from tensorwright.frontend import tree

pytestmark = pytest.mark.unvalidated("steps of the size that is trained: more elements than the interpreter is asked for")
NAMES = ("mlp_b64", "demo_b64", "cifar_b64", "transformer_b8")
# f32 rounds to 6e-8 and the longest sums, those of the weight gradients, have 57,600 terms; the issue asks for 1e-4.
TOLERANCE = 1e-4


class Record:
    """An 'optimiser' that keeps the parameters and whose new state is their gradients."""

    lr = 1.0

    def init(self, params: Any) -> Any:
        return tree.map_leaves(lambda p: np.zeros_like(np.asarray(p)), params)

    def update(self, params: Any, grads: Any, state: Any, lr: Any = None) -> tuple[Any, Any]:
        return params, grads


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def torch_gradients(name: str, weights: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    module = torch_training.model(name, weights).double()
    x, target = map(torch.from_numpy, training.batch(name))
    loss = torch_training.loss_of(module, x.double() if x.is_floating_point() else x, target)
    loss.backward()
    return float(loss.detach()), {n: p.grad.numpy() for n, p in module.named_parameters()}


def test_gradients_agree(name: str) -> None:
    weights = training.initial_weights(name)
    exe, _ = training.compiled_step(name, weights, 2, Record())
    loss = float(exe(np.array(1.0, np.float32), *training.batch(name)))
    state = exe.parameters
    want_loss, want = torch_gradients(name, weights)
    assert abs(loss - want_loss) <= 1e-6 * abs(want_loss)  # a mean of at most 1,024 terms
    found = {n: state[f"optimizer.{n}"] for n in want}
    wrong = {}
    for n, reference in want.items():
        scale = np.max(np.abs(reference))
        if n.endswith(".k.bias"):  # softmax does not see a shift of all scores: zero, but for rounding
            scale = np.max(np.abs(want[n.replace("bias", "weight")]))
        error = float(np.max(np.abs(found[n] - reference)) / scale)
        if not error <= TOLERANCE:
            wrong[n] = error
    assert not wrong
    for n, before in weights.items():  # Record has changed no parameter
        np.testing.assert_array_equal(state[n], before)


def test_losses_agree_over_steps_and_threads_change_no_bit(name: str) -> None:
    weights = training.initial_weights(name)
    want = training.reference_losses(name, weights)
    states = []
    for threads in (1, 2):
        exe, _ = training.compiled_step(name, weights, threads)
        losses = [float(exe(np.array(training.RATE, np.float32), *training.batch(name))) for _ in want]
        np.testing.assert_allclose(losses, want, rtol=training.TOLERANCE)
        assert losses[-1] < losses[0]
        states.append({"losses": np.array(losses), **exe.parameters})
    for n, one in states[0].items():
        np.testing.assert_array_equal(one, states[1][n], err_msg=n)
