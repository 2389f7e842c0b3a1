"""Pruning while a model trains: a callback that lets more and more weights go, along a polynomial (Zhu and Gupta 2017).

    ratio(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^power          begin <= t <= end

At first many weights may go, as many of them are redundant, then ever fewer. Between the steps at which masks are made anew, and
after the last of them, the training step itself keeps what is masked at zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from ..training.callbacks.base import Callback
from ..training.history import Row
from .masks import checked_ratio, pattern_of, sparsity
from .options import Options, names_of
from .pruning import masks_for, weights_of

if TYPE_CHECKING:
    from ..training.trainer import Trainer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PolynomialDecay:
    """The ratio of each step, from `initial` at step `begin` to `final` at step `end`; constant after it, 0 before."""

    final: float
    begin: int
    end: int
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        checked_ratio(self.final, "the final ratio")
        if not 0 <= self.initial <= self.final:
            raise InputError(f"the initial ratio lies between 0 and the final one, {self.final}, not {self.initial!r}")
        if not 0 <= self.begin < self.end:
            raise InputError(f"pruning begins at a step of at least 0 and ends after it, not {self.begin} to {self.end}")
        if not self.power > 0:
            raise InputError(f"the power of the polynomial is above 0, not {self.power!r}")

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        left = 1 - (min(step, self.end) - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**self.power


class GradualPruning(Callback):
    """Prunes the Trainer's model step by step, from `begin` to `end`, and keeps the masks from then on.

    ratio      the final share of zeros, between 0 and 1
    begin, end the steps (batches) at which pruning begins, and is done
    every      how many steps lie between two changes of the masks
    pattern, criterion, scope, layers, exclude   as for `tw.prune` (scope 'layer' or 'global'; criterion other than 'taylor')

    The row of each epoch gets 'sparsity'. Raises InputError for options outside their domain, and from fit for a Trainer whose
    step was compiled without masks.
    """

    order = -10  # before checkpoints and loggers

    def __init__(
        self,
        ratio: float,
        begin: int,
        end: int,
        *,
        every: int = 100,
        initial: float = 0.0,
        power: float = 3.0,
        pattern: str = "unstructured",
        criterion: str = "magnitude",
        scope: str = "layer",
        layers: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self.schedule = PolynomialDecay(ratio, begin, end, initial, power)
        self.pattern = pattern_of(pattern)
        if self.pattern.of:
            raise InputError(f"the pattern {pattern!r} has one ratio: nothing about it is gradual; prune once, and train on")
        if criterion not in ("magnitude", "normalised", "random") or scope not in ("layer", "global"):
            raise InputError(
                "gradual pruning knows the criteria 'magnitude', 'normalised', 'random' and the scopes 'layer', 'global', not "
                f"{criterion!r} and {scope!r}"
            )
        if every < 1:
            raise InputError(f"every is a number of steps, at least 1, not {every!r}")
        self.every = every
        self._options = Options(None, criterion, scope, names_of(layers), names_of(exclude) or (), {}, seed)
        self._masks: dict[str, Array] = {}
        self._trainer: Trainer | None = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Every weight that is to be pruned gets a mask, all true if it has none, so that the step is compiled with it."""
        self._trainer = trainer
        weights = weights_of(trainer.model)
        chosen = self._options.chosen([n for n, (p, _) in weights.items() if p.requires_grad])
        masks = {n: weights[n][0].mask for n in chosen}
        self._masks = {n: np.ones(weights[n][0].data.shape, bool) if m is None else m for n, m in masks.items()}
        trainer.set_masks(self._masks)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """New masks where it is time for them: of the weights as they are now."""
        t, s = trainer.step_number, self.schedule
        if not s.begin <= t <= s.end or ((t - s.begin) % self.every and t != s.end):
            return
        ratio = s(t)
        if ratio <= 0:
            return
        now = trainer.weights()
        views = {n: (now[n], view) for n, (_, view) in weights_of(trainer.model).items() if n in self._masks}
        masks, why = masks_for(views, self.pattern, self._options.with_ratio(ratio))
        if t == s.end and why:
            warnings.warn("not pruned: " + "; ".join(f"{n}: {r}" for n, r in why.items()), stacklevel=2)
        self._masks |= masks
        trainer.set_masks(masks)

    def on_epoch_end(self, trainer: Trainer, row: Row) -> None:
        """The share of zeros among the weights with masks."""
        row["sparsity"] = sparsity(list(self._masks.values()))

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.step_number < self.schedule.end:
            warnings.warn(
                f"training ended at step {trainer.step_number}, before pruning did at step {self.schedule.end}: the share of "
                f"zeros is {sparsity(list(self._masks.values())):.1%}, not {self.schedule.final:.1%}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        masks = {n: np.asarray(m, bool) for n, m in state["masks"].items()}
        self._masks = masks
        if self._trainer is not None:
            self._trainer.set_masks(masks)
