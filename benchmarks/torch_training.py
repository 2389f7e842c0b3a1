"""One training step of the training workloads in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from tensorwright.benchmarks import torch_models
from torch import nn


def model(name: str, weights: Mapping[str, Any]) -> nn.Module:
    """The workload's module in training mode with these weights. Raises RuntimeError where names differ."""
    return torch_models.load(torch_models.TRAINING[name.partition("_")[0]](), weights).train()


def loss_of(module: nn.Module, x: Any, target: Any) -> Any:
    """Mean cross-entropy over all positions."""
    prediction = module(x)
    return F.cross_entropy(prediction.reshape(-1, prediction.shape[-1]), target.reshape(-1))


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Any, target: Any, compiled: bool = False) -> Callable[[], Any]:
    """One call: forward, loss, backward, update. It gives the loss. `compiled`: torch.compile over forward and backward."""
    objective = torch.compile(loss_of) if compiled else loss_of

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = objective(module, x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
