"""Class numbers in range, checked on the host: an index beyond the classes would train on nonsense without a sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..frontend.context import Trace
from ..frontend.module import Module
from ..frontend.tracing import declare_parameters, make_inputs
from ..frontend.training import Loss
from ..ir.errors import InputError
from ..runtime.buffers import Array


@dataclass(frozen=True)
class ClassNumbers:
    """One leaf of the target holds class numbers in [0, classes), `ignored` aside."""

    leaf: int
    classes: int
    ignored: int | None

    def check(self, targets: Sequence[Array], where: str = "y") -> None:
        """Raises InputError that names the first example out of range."""
        t = targets[self.leaf]
        if t.dtype.kind not in "iu" or (int(t.min()) >= 0 and int(t.max()) < self.classes):
            return
        wrong = (t < 0) | (t >= self.classes)
        if self.ignored is not None:
            wrong &= t != self.ignored
        if not wrong.any():
            return
        at = [int(i) for i in np.argwhere(wrong)[0]]
        name = where if len(targets) == 1 else f"{where}[{self.leaf}]"
        hint = ""
        if not (t < 0).any() and int(t.max()) == self.classes:
            hint = f"; if they count from 1, pass {name} - 1" if int(t.min()) > 0 else "; the model may lack an output"
        place = at if len(at) > 1 else at[0]
        raise InputError(
            f"{name} holds the class number {int(t[tuple(at)])} at {place}, and the loss is given scores of "
            f"{self.classes} classes: numbers lie in [0, {self.classes}){hint} ({int(wrong.sum())} of {t.size} are out of range)"
        )


def class_numbers(model: Module, loss: Loss, specs: Sequence[Any]) -> list[ClassNumbers]:
    """Which leaves of the target the loss takes as class numbers, of how many classes.

    `specs` are the model's arguments and, last, the target, as for a training step.
    """
    with Trace("targets", training=True, stateful=True) as t:
        declare_parameters(t, model)
        t.key = make_key(t)
        arguments, _ = make_inputs(t, model, specs[:-1])
        known = set(t.inputs)
        target = make_inputs(t, _named_target, specs[-1:])[0][0]
        leaves = [node for name, node in t.inputs.items() if name not in known]
        loss(model(*arguments), target)
        found = t.class_numbers
        noted = [(k, *found[node]) for k, node in enumerate(leaves) if node in found]
        return [ClassNumbers(k, classes, ignored) for k, classes, ignored in noted if isinstance(classes, int)]


def make_key(t: Trace) -> Any:
    """An input for the key of random draws, as a training step has."""
    from ..ir.dtypes import u64
    from ..ir.types import TensorType

    return t.input("rng", TensorType(u64, ()), "state")


def _named_target(target: Any) -> None:
    """Only its signature is used."""
