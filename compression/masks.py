"""Which weights to keep: scores, patterns, and masks that keep the best of a pattern's units.

A weight is looked at as outputs x taps x inputs. The units of a pattern are

    'unstructured'   single weights
    'N:M'            N of any M neighbouring inputs ('2:4', '4:16'): its ratio is 1 - N/M
    'block AxB'      A neighbouring inputs by B neighbouring outputs: 'block 1x16' fills vectors ('1x16' for short)

A unit's score is the mean of its weights' scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError

Array = np.ndarray[Any, Any]
CRITERIA: Final = ("magnitude", "normalised", "taylor", "random")


@dataclass(frozen=True)
class Pattern:
    """`inputs` x `outputs` weights are one unit; where `of` is given, `keep` of any `of` neighbouring inputs stay."""

    name: str
    inputs: int = 1
    outputs: int = 1
    keep: int = 0
    of: int = 0

    @property
    def fixed_ratio(self) -> float | None:
        """The share of zeros that the pattern itself says."""
        return 1 - self.keep / self.of if self.of else None

    def misfit(self, outputs: int, inputs: int) -> str | None:
        """Why a weight of these sizes has no whole units; None where it has."""
        if self.of and inputs % self.of:
            return f"its {inputs} inputs are no multiple of {self.of}"
        if inputs % self.inputs:
            return f"its {inputs} inputs are no multiple of {self.inputs}"
        if outputs % self.outputs:
            return f"its {outputs} outputs are no multiple of {self.outputs}"
        return None


def pattern_of(text: str) -> Pattern:
    """The pattern of a name. Raises InputError for one that does not exist."""
    if text == "unstructured":
        return Pattern(text)
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        keep, of = map(int, found.groups())
        if 0 < keep < of:
            return Pattern(text, keep=keep, of=of)
        raise InputError(f"the pattern {text!r} keeps N of M weights with 0 < N < M, as '2:4' does")
    if found := re.fullmatch(r"(?:block )?(\d+)x(\d+)", text):
        inputs, outputs = map(int, found.groups())
        if inputs and outputs:
            return Pattern(text, inputs, outputs)
    raise InputError(f"there is no pattern {text!r}: 'unstructured', 'N:M', 'block AxB', or 'channels', 'heads', 'layers'")


@dataclass(frozen=True)
class View:
    """A weight as outputs x taps x inputs: which of its dimensions are which (`inputs` None: it has none of its own)."""

    output: int
    inputs: int | None

    def open(self, w: Array) -> Array:
        """[outputs, taps, inputs]."""
        if self.inputs is None:
            return np.moveaxis(w, self.output, 0).reshape(w.shape[self.output], -1, 1)
        moved = np.moveaxis(w, (self.output, self.inputs), (0, -1))
        return moved.reshape(moved.shape[0], -1, moved.shape[-1])

    def close(self, opened: Array, like: Array) -> Array:
        """The inverse of `open`, for a weight of the shape of `like`."""
        if self.inputs is None:
            shape = np.moveaxis(like, self.output, 0).shape
            return np.moveaxis(opened.reshape(shape), 0, self.output)
        shape = np.moveaxis(like, (self.output, self.inputs), (0, -1)).shape
        return np.moveaxis(opened.reshape(shape), (0, -1), (self.output, self.inputs))


def scores_of(w: Array, criterion: str, gradient: Array | None = None, rng: np.random.Generator | None = None) -> Array:
    """How much each weight counts, of its shape in f64.

    magnitude   |w|                          normalised  |w| over the root of the mean square of the layer
    taylor      |w * dL/dw| (Molchanov 2017) random      a draw: what any criterion must beat

    Raises InputError for weights that are not finite, an unknown criterion, or 'taylor' without a gradient.
    """
    if not np.isfinite(w).all():
        raise InputError("there are weights that are not finite: nothing can be said of what they count for")
    size = np.abs(w.astype(np.float64))
    if criterion == "magnitude":
        return size
    if criterion == "normalised":
        scale = float(np.sqrt(np.mean(size * size))) if size.size else 0.0
        return np.asarray(size / scale) if scale > 0 else size
    if criterion == "taylor":
        if gradient is None:
            raise InputError("criterion='taylor' weighs by gradients: give gradients={name: array}, as gradients_of makes them")
        if gradient.shape != w.shape or not np.isfinite(gradient).all():
            raise InputError(f"a gradient for a weight of shape {w.shape} is finite and of that shape, not {gradient.shape}")
        return np.asarray(np.abs(w.astype(np.float64) * gradient))
    if criterion == "random":
        return np.asarray((rng or np.random.default_rng(0)).random(w.shape))
    raise InputError(f"criterion is one of {', '.join(CRITERIA)}, not {criterion!r}")


@dataclass(frozen=True)
class Units:
    """The units of one weight: their scores [output blocks, taps, input blocks], and how large one is."""

    pattern: Pattern
    view: View
    weight: Array
    scores: Array

    @staticmethod
    def of(pattern: Pattern, view: View, weight: Array, scores: Array) -> Units:
        """The mean of the scores over each unit."""
        s = view.open(scores)
        outputs, taps, inputs = s.shape
        blocks = s.reshape(outputs // pattern.outputs, pattern.outputs, taps, inputs // pattern.inputs, pattern.inputs)
        return Units(pattern, view, weight, blocks.mean((1, 4)))

    def mask(self, kept: Array) -> Array:
        """The mask of the weight for the units that are kept."""
        wide = np.repeat(np.repeat(kept, self.pattern.outputs, 0), self.pattern.inputs, 2)
        return np.ascontiguousarray(self.view.close(wide, self.weight))

    def best(self, ratio: float) -> Array:
        """The units to keep so that this share of them goes; in N:M patterns the best of each group."""
        if self.pattern.of:
            o, t, i = self.scores.shape
            groups = self.scores.reshape(o, t, i // self.pattern.of, self.pattern.of)
            order = np.argsort(-groups, axis=-1, kind="stable")
            kept = np.zeros(groups.shape, bool)
            np.put_along_axis(kept, order[..., : self.pattern.keep], True, -1)
            return kept.reshape(o, t, i)
        return best(self.scores, ratio)


def best(scores: Array, ratio: float) -> Array:
    """True for all but the share `ratio` of lowest scores; the first of equal ones stay, and one at least."""
    keep = max(1, round((1 - ratio) * scores.size)) if scores.size else 0
    order = np.argsort(-scores, axis=None, kind="stable")
    kept = np.zeros(scores.size, bool)
    kept[order[:keep]] = True
    return kept.reshape(scores.shape)


def together(units: Mapping[str, Units], ratio: float) -> dict[str, Array]:
    """Masks by name where all layers compete: the share `ratio` of all weights goes, and each layer keeps one unit at least."""
    names = list(units)
    flat = np.concatenate([units[n].scores.reshape(-1) for n in names]) if names else np.zeros(0)
    kept = best(flat, ratio)
    found: dict[str, Array] = {}
    at = 0
    for n in names:
        u = units[n]
        own = kept[at : at + u.scores.size].reshape(u.scores.shape)
        at += u.scores.size
        found[n] = u.mask(own if own.any() or not own.size else best(u.scores, 1.0))
    return found


def checked_ratio(ratio: Any, what: str = "ratio") -> float:
    """The ratio as a number between 0 and 1, both excluded. Raises InputError."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | np.floating) or not 0 < ratio < 1:
        raise InputError(f"{what} is the share of weights that goes, a number between 0 and 1 (both excluded), not {ratio!r}")
    return float(ratio)


def sparsity(masks: Sequence[Array]) -> float:
    """The share of weights that masks leave out."""
    total = sum(m.size for m in masks)
    return 1 - sum(int(m.sum()) for m in masks) / total if total else 0.0
