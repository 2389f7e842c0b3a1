"""What can go wrong while training, apart from bad input (InputError)."""

from __future__ import annotations

from ..ir.errors import TensorwrightError


class NonFiniteLossError(TensorwrightError, ArithmeticError):
    """The loss became NaN or infinite. Model and optimiser hold what they held before that step."""


class CheckpointError(TensorwrightError):
    """A checkpoint that cannot be written, cannot be read, or belongs to another model or run."""


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged and an older one is used, or a run goes on under other settings than it was started with."""
