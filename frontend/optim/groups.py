"""Different options, or different optimisers, for parameters chosen by the patterns of their paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from ...ir.errors import AttributeValueError
from .. import tree
from ..core import TensorLike, as_tensor
from ..patterns import select
from .base import PerParameter, Rate


class _Frozen:
    """The value of `FROZEN`."""

    def __repr__(self) -> str:
        return "FROZEN"


FROZEN: Final = _Frozen()
"""In `Groups`: parameters that stay as they are. No gradient is computed for them."""

Choice = Mapping[str, Any] | PerParameter | _Frozen


@dataclass(frozen=True)
class Group:
    """How one parameter is updated: by which optimiser, at which multiple of the learning rate."""

    optimizer: PerParameter
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Groups:
    """An optimiser, and what is different for parameters whose path fits a pattern.

        Groups(AdamW(1e-3), {"*.bias": {"weight_decay": 0.0}, "head.*": {"lr_scale": 10}})
        Groups(Adam(1e-3), {"*": FROZEN, "head.*": {}})                     trains the head alone
        Groups(Adam(1e-3), {"embedding.*": SGD(0.1, momentum=0.9)})

    Patterns are those of `fnmatch`; they apply in order, each on top of those before it. A pattern's value is a dict of
    options (fields of the optimiser, or `lr_scale`), another optimiser, or FROZEN. Options after FROZEN start again from
    the default optimiser. All learning rates follow one schedule: an `lr` in a group is kept as its ratio to the default's.

    The state has the names and the form that it has without groups, so that a checkpoint outlives a change of patterns.

    Raises AttributeValueError for an unknown option, for a pattern that no parameter fits (with the list of paths), and where
    no parameter is left to train.
    """

    default: PerParameter
    patterns: Mapping[str, Choice]

    def __post_init__(self) -> None:
        if not isinstance(self.default, PerParameter):
            raise AttributeValueError(f"Groups: the default is one of tw.optim's optimisers, not {self.default!r}")
        for pattern, choice in self.patterns.items():
            self._changed(pattern, Group(self.default), choice)  # a wrong option is told now

    @property
    def lr(self) -> Rate:
        """The default's learning rate; groups have theirs as a multiple of it."""
        return self.default.lr

    def assign(self, paths: Sequence[str]) -> dict[str, Group | None]:
        """For each path its group; None if it is frozen. Raises AttributeValueError for a pattern that none of them fits."""
        found: dict[str, Group | None] = dict.fromkeys(paths, Group(self.default))
        for pattern, choice in self.patterns.items():
            for path in select(pattern, paths, "Groups"):
                found[path] = self._changed(pattern, found[path] or Group(self.default), choice)
        return found

    def frozen(self, paths: Sequence[str]) -> list[str]:
        """The paths of parameters that no step changes."""
        return [path for path, group in self.assign(paths).items() if group is None]

    def _changed(self, pattern: str, group: Group, choice: Choice) -> Group | None:
        if isinstance(choice, _Frozen):
            return None
        if isinstance(choice, PerParameter):
            return Group(choice, self._ratio(pattern, choice.lr))
        if not isinstance(choice, Mapping):
            raise AttributeValueError(f"Groups: {pattern!r} takes a dict of options, an optimiser or FROZEN, not {choice!r}")
        options = dict(choice)
        scale = options.pop("lr_scale", group.lr_scale)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0:
            raise AttributeValueError(f"Groups: {pattern!r}: lr_scale is a number above 0 (FROZEN keeps still), not {scale!r}")
        known = [f.name for f in fields(group.optimizer)]
        unknown = [n for n in options if n not in known]
        if unknown:
            name = type(group.optimizer).__name__
            raise AttributeValueError(
                f"Groups: {pattern!r} has options that {name} does not: {', '.join(unknown)}; it has lr_scale, {', '.join(known)}"
            )
        if "lr" in options:
            scale *= self._ratio(pattern, options["lr"])
        return Group(replace(group.optimizer, **options), float(scale))

    def _ratio(self, pattern: str, lr: Rate) -> float:
        base = self.default.lr
        if lr is base:
            return 1.0
        if callable(lr) or callable(base):
            raise AttributeValueError(
                f"Groups: {pattern!r} has a learning rate of its own beside a schedule; give it the default's schedule, and "
                "lr_scale for a multiple of it"
            )
        return lr / base

    def _parts(self, structure: tree.Structure) -> list[tuple[Group, list[int]]]:
        """The groups that are there, each with the numbers of its leaves. Raises AttributeValueError for a frozen leaf."""
        parts: dict[Group, list[int]] = {}
        for k, (path, group) in enumerate(self.assign(list(tree.paths(structure))).items()):
            if group is None:
                raise AttributeValueError(f"Groups: parameter {path!r} is frozen; a step is given the others only")
            parts.setdefault(group, []).append(k)
        return list(parts.items())

    def init(self, params: Any) -> dict[str, Any]:
        """The states of all groups, merged: a slot has an entry for each parameter whose optimiser keeps it."""
        leaves, structure = tree.flatten(params)
        paths = list(tree.paths(structure))
        merged: dict[str, Any] = {}
        for group, chosen in self._parts(structure):
            merge(merged, group.optimizer.init({paths[k]: leaves[k] for k in chosen}))
        order = {path: k for k, path in enumerate(paths)}
        return {n: _sorted(v, order) if isinstance(v, dict) else v for n, v in merged.items()}

    def update(self, params: Any, grads: Any, state: Any, lr: TensorLike | None = None) -> tuple[Any, Any]:
        """(new parameters, new state). `lr` is the default's learning rate."""
        rate = as_tensor(self.default._own_rate() if lr is None else lr, what="the learning rate")
        leaves, structure = tree.flatten(params)
        paths = list(tree.paths(structure))
        gradients = tree.flatten(grads)[0]
        moved: list[Any] = list(leaves)
        merged: dict[str, Any] = {}
        for group, chosen in self._parts(structure):
            names = [paths[k] for k in chosen]
            optimizer = group.optimizer
            own = {n: {p: state[n][p] for p in names} for n in optimizer.slots()}
            own |= {"step": state["step"]} if optimizer.counts else {}
            part_rate = rate if group.lr_scale == 1.0 else rate * group.lr_scale
            new, own = optimizer.update(
                {p: leaves[k] for p, k in zip(names, chosen, strict=True)},
                {p: gradients[k] for p, k in zip(names, chosen, strict=True)},
                own,
                part_rate,
            )
            for p, k in zip(names, chosen, strict=True):
                moved[k] = new[p]
            merge(merged, own)
        ordered = {n: {p: merged[n][p] for p in old} if isinstance(old, dict) else merged[n] for n, old in state.items()}
        return tree.unflatten(structure, moved), ordered


def merge(into: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Adds a group's state. Every group counts the same steps, so that one count serves all."""
    for name, value in state.items():
        if isinstance(value, dict):
            into.setdefault(name, {}).update(value)
        else:
            into[name] = value


def _sorted(by_path: Mapping[str, Any], order: Mapping[str, int]) -> dict[str, Any]:
    return {path: by_path[path] for path in sorted(by_path, key=lambda p: order[p])}


def frozen_paths(optimizer: object, paths: Iterable[str]) -> frozenset[str]:
    """The parameters that an optimiser wants left alone: what its method `frozen` says, if it has one."""
    ask = getattr(optimizer, "frozen", None)
    return frozenset(ask(list(paths))) if callable(ask) else frozenset()
