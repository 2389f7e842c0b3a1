"""Learning rates that change: functions of the step number, called on the host before each step.

    schedule = schedules.Warmup(schedules.Cosine(1e-3, T_max=10_000), steps=500)
    schedule(step)                          the learning rate of step 0, 1, 2, ...

All but `ReduceOnPlateau` are pure: the same step gives the same rate, bit for bit, whenever it is asked for. What a schedule
remembers is in `state_dict()`, plain numbers that JSON keeps exactly, and comes back by `load_state_dict`. Arguments are named
as in `torch.optim.lr_scheduler`; a schedule counts steps, and `PerEpoch` makes one count epochs.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

from ..ir.errors import AttributeValueError

Number = int | float


def _demand(good: bool, message: str) -> None:
    if not good:
        raise AttributeValueError(message)


class Schedule:
    """Base of schedules. A subclass says `rate(step)`; one that remembers something overrides the two state methods."""

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0. Raises AttributeValueError for a negative step."""
        _demand(step >= 0, f"{type(self).__name__}: steps count from 0, not {step!r}")
        return float(self.rate(int(step)))

    def rate(self, step: int) -> float:
        """The learning rate of step `step` >= 0."""
        raise NotImplementedError

    def parts(self) -> tuple[Schedule, ...]:
        """The schedules that this one is made of."""
        return ()

    def observe(self, value: float) -> bool:
        """Takes a measurement (a validation loss at the end of an epoch, say); whether it changed the schedule.

        Only `ReduceOnPlateau`, alone or inside another schedule, makes use of it.
        """
        return sum(part.observe(value) for part in self.parts()) > 0  # each of them, not only up to the first

    @property
    def observes(self) -> bool:
        """Whether `observe` has an effect, so that somebody must call it."""
        return any(part.observes for part in self.parts())

    def state_dict(self) -> dict[str, Any]:
        """What the schedule remembers, in JSON's types; empty for those that remember nothing."""
        inner = [part.state_dict() for part in self.parts()]
        return {"parts": inner} if any(inner) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` of an equal schedule gave. Raises AttributeValueError where the forms differ."""
        parts = self.parts()
        inner = state.get("parts", [{}] * len(parts))
        if set(state) - {"parts"} or not isinstance(inner, (list, tuple)) or len(inner) != len(parts):
            raise AttributeValueError(f"{type(self).__name__}: the state {dict(state)!r} is that of another schedule")
        for part, own in zip(parts, inner, strict=True):
            part.load_state_dict(own)

    def __repr__(self) -> str:
        own = ", ".join(f"{n}={v!r}" for n, v in vars(self).items() if not n.startswith("_"))
        return f"{type(self).__name__}({own})"


def as_schedule(value: Any) -> Schedule:
    """A Schedule as it is, a number as `Constant`, a function of the step as `Function`. Raises AttributeValueError else."""
    if isinstance(value, Schedule):
        return value
    if callable(value):
        return Function(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return Constant(float(value))
    raise AttributeValueError(f"a learning rate is a number, a schedule or a function of the step number, not {value!r}")


class _From(Schedule):
    """A schedule that starts from a learning rate."""

    def __init__(self, lr: float) -> None:
        _demand(isinstance(lr, Real) and lr > 0, f"{type(self).__name__}: the learning rate is positive, not {lr!r}")
        self.lr = float(lr)


class Constant(_From):
    """lr at every step; or lr * factor for the first `total_iters` steps (torch's ConstantLR)."""

    def __init__(self, lr: float, factor: float = 1.0, total_iters: int = 0) -> None:
        super().__init__(lr)
        _demand(factor > 0 and total_iters >= 0, "Constant: factor is above 0 and total_iters not negative")
        self.factor, self.total_iters = factor, total_iters

    def rate(self, step: int) -> float:
        """lr, after the first steps."""
        return self.lr * self.factor if step < self.total_iters else self.lr


class Function(Schedule):
    """Any function of the step number."""

    def __init__(self, fn: Callable[[int], float]) -> None:
        _demand(callable(fn), f"Function takes a function of the step number, not {fn!r}")
        self.fn = fn

    def rate(self, step: int) -> float:
        """What the function says."""
        return self.fn(step)


class Step(_From):
    """lr * gamma^(step // step_size)."""

    def __init__(self, lr: float, step_size: int, gamma: float = 0.1) -> None:
        super().__init__(lr)
        _demand(step_size >= 1 and gamma > 0, f"Step: step_size is at least 1 and gamma above 0, not {step_size!r}, {gamma!r}")
        self.step_size, self.gamma = step_size, gamma

    def rate(self, step: int) -> float:
        """gamma once more every step_size steps."""
        return self.lr * self.gamma ** (step // self.step_size)


class MultiStep(_From):
    """lr * gamma^(number of milestones that are reached)."""

    def __init__(self, lr: float, milestones: Sequence[int], gamma: float = 0.1) -> None:
        super().__init__(lr)
        _demand(gamma > 0 and all(m >= 0 for m in milestones), "MultiStep: gamma is above 0 and milestones are steps")
        self.milestones, self.gamma = sorted(milestones), gamma

    def rate(self, step: int) -> float:
        """gamma once more from each milestone on."""
        return self.lr * self.gamma ** bisect.bisect_right(self.milestones, step)


class Exponential(_From):
    """lr * gamma^step."""

    def __init__(self, lr: float, gamma: float) -> None:
        super().__init__(lr)
        _demand(gamma > 0, f"Exponential: gamma is above 0, not {gamma!r}")
        self.gamma = gamma

    def rate(self, step: int) -> float:
        """gamma once more at each step."""
        return self.lr * self.gamma**step


class Linear(_From):
    """lr times a factor that goes from start_factor to end_factor in total_iters steps, and stays there (torch's LinearLR)."""

    def __init__(self, lr: float, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5) -> None:
        super().__init__(lr)
        good = start_factor >= 0 and end_factor >= 0 and total_iters >= 1
        _demand(good, "Linear: factors are not negative and total_iters is at least 1")
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters

    def rate(self, step: int) -> float:
        """A straight line, then level."""
        done = min(step, self.total_iters) / self.total_iters
        return self.lr * (self.start_factor + (self.end_factor - self.start_factor) * done)


class Polynomial(_From):
    """lr * (1 - step / total_iters)^power, 0 from total_iters on (torch's PolynomialLR)."""

    def __init__(self, lr: float, total_iters: int = 5, power: float = 1.0) -> None:
        super().__init__(lr)
        _demand(total_iters >= 1 and power > 0, "Polynomial: total_iters is at least 1 and power above 0")
        self.total_iters, self.power = total_iters, power

    def rate(self, step: int) -> float:
        """Down to 0."""
        return self.lr * (1.0 - min(step, self.total_iters) / self.total_iters) ** self.power


class Cosine(_From):
    """eta_min + (lr - eta_min) * (1 + cos(pi step / T_max)) / 2 (Loshchilov and Hutter 2017, without restarts).

    After T_max steps the rate stays at eta_min, where torch's CosineAnnealingLR rises again; `CosineRestarts` starts anew.
    """

    def __init__(self, lr: float, T_max: int, eta_min: float = 0.0) -> None:
        super().__init__(lr)
        _demand(T_max >= 1 and 0 <= eta_min <= lr, "Cosine: T_max is at least 1 and eta_min between 0 and lr")
        self.T_max, self.eta_min = T_max, float(eta_min)

    def rate(self, step: int) -> float:
        """Half a cosine, then level."""
        return _half_cosine(self.lr, self.eta_min, min(step, self.T_max) / self.T_max)


class CosineRestarts(_From):
    """Half a cosine from lr to eta_min in T_0 steps, then again from lr in T_0 * T_mult, and so on (SGDR: the same paper)."""

    def __init__(self, lr: float, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> None:
        super().__init__(lr)
        good = T_0 >= 1 and T_mult >= 1 and isinstance(T_mult, int) and 0 <= eta_min <= lr
        _demand(good, "CosineRestarts: T_0 and T_mult are integers of at least 1, eta_min is between 0 and lr")
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, float(eta_min)

    def rate(self, step: int) -> float:
        """By the place in the round that runs."""
        start, length = 0, self.T_0
        if self.T_mult == 1:
            start = step - step % length
        else:
            while step >= start + length:
                start, length = start + length, length * self.T_mult
        return _half_cosine(self.lr, self.eta_min, (step - start) / length)


def _half_cosine(high: float, low: float, share: float) -> float:
    return low + (high - low) * (1.0 + math.cos(math.pi * share)) / 2.0


CYCLES: Final = ("triangular", "triangular2", "exp_range")


class Cyclic(Schedule):
    """Between base_lr and max_lr in triangles: up in step_size_up steps, down in step_size_down (Smith 2017).

    mode    'triangular': all alike; 'triangular2': half the height at each cycle; 'exp_range': the height times gamma^step
    """

    def __init__(
        self,
        base_lr: float,
        max_lr: float,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
    ) -> None:
        down = step_size_up if step_size_down is None else step_size_down
        _demand(mode in CYCLES, f"Cyclic: mode is one of {', '.join(CYCLES)}, not {mode!r}")
        _demand(0 <= base_lr <= max_lr, f"Cyclic: 0 <= base_lr <= max_lr, not {base_lr!r}, {max_lr!r}")
        _demand(step_size_up >= 1 and down >= 1 and gamma > 0, "Cyclic: step sizes are at least 1 and gamma is above 0")
        self.base_lr, self.max_lr, self.step_size_up, self.step_size_down = float(base_lr), float(max_lr), step_size_up, down
        self.mode, self.gamma = mode, gamma

    def rate(self, step: int) -> float:
        """By the place in the cycle that runs."""
        cycle, at = divmod(step, self.step_size_up + self.step_size_down)
        up = at <= self.step_size_up
        share = at / self.step_size_up if up else (self.step_size_up + self.step_size_down - at) / self.step_size_down
        shrink = 1.0 if self.mode == "triangular" else 0.5**cycle if self.mode == "triangular2" else self.gamma**step
        return self.base_lr + (self.max_lr - self.base_lr) * share * shrink


class OneCycle(Schedule):
    """Up to max_lr, then down far below the start, in total_steps (Smith and Topin 2019; torch's OneCycleLR).

    The rate starts at max_lr / div_factor, is max_lr after pct_start of the steps and ends at the start / final_div_factor.
    With `three_phase` it goes back to the start first, in as many steps as it went up. `anneal_strategy` is 'cos' or
    'linear'. After total_steps the rate stays where it ended.
    """

    def __init__(
        self,
        max_lr: float,
        total_steps: int,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
    ) -> None:
        _demand(max_lr > 0, f"OneCycle: max_lr is positive, not {max_lr!r}")
        _demand(total_steps >= 1, f"OneCycle: total_steps is at least 1, not {total_steps!r}")
        _demand(0 <= pct_start <= 1, f"OneCycle: pct_start lies in [0, 1], not {pct_start!r}")
        _demand(anneal_strategy in ("cos", "linear"), f"OneCycle: anneal_strategy is 'cos' or 'linear', not {anneal_strategy!r}")
        _demand(div_factor > 0 and final_div_factor > 0, "OneCycle: the factors to divide by are above 0")
        self.max_lr, self.total_steps, self.pct_start, self.anneal_strategy = (
            float(max_lr),
            total_steps,
            pct_start,
            anneal_strategy,
        )
        self.div_factor, self.final_div_factor, self.three_phase = div_factor, final_div_factor, three_phase
        start = self.max_lr / div_factor
        end = start / final_div_factor
        up = float(pct_start * total_steps) - 1
        back = (
            [(2 * up, self.max_lr, start), (total_steps - 1, start, end)]
            if three_phase
            else [(total_steps - 1, self.max_lr, end)]
        )
        self._phases = [(up, start, self.max_lr), *back]

    def rate(self, step: int) -> float:
        """By the place in the phase that runs."""
        step = min(step, self.total_steps - 1)
        begin = 0.0
        for end, low, high in self._phases[:-1]:
            if step <= end:
                return self._between(low, high, (step - begin) / (end - begin) if end > begin else 1.0)
            begin = end
        end, low, high = self._phases[-1]
        return self._between(low, high, (step - begin) / (end - begin) if end > begin else 1.0)

    def _between(self, start: float, end: float, share: float) -> float:
        return start + (end - start) * share if self.anneal_strategy == "linear" else _half_cosine(start, end, share)


class Warmup(Schedule):
    """A straight line from start_factor * schedule(0) up to schedule(0) in `steps` steps; then the schedule, from its step 0."""

    def __init__(self, schedule: Any, steps: int, start_factor: float = 0.0) -> None:
        _demand(steps >= 1, f"Warmup: steps is at least 1, not {steps!r}")
        _demand(0 <= start_factor <= 1, f"Warmup: start_factor lies in [0, 1], not {start_factor!r}")
        self.schedule, self.steps, self.start_factor = as_schedule(schedule), steps, start_factor

    def parts(self) -> tuple[Schedule, ...]:
        """The one that follows."""
        return (self.schedule,)

    def rate(self, step: int) -> float:
        """The line, or the schedule."""
        if step >= self.steps:
            return self.schedule(step - self.steps)
        return self.schedule(0) * (self.start_factor + (1.0 - self.start_factor) * step / self.steps)


class Sequential(Schedule):
    """One schedule after another, each from its step 0: the second from step milestones[0] on, ... (torch's SequentialLR)."""

    def __init__(self, schedules: Sequence[Any], milestones: Sequence[int]) -> None:
        self.schedules, self.milestones = [as_schedule(s) for s in schedules], list(milestones)
        good = len(self.milestones) == len(self.schedules) - 1 and self.milestones == sorted(set(self.milestones))
        _demand(good, f"Sequential: {len(self.schedules)} schedules need one milestone less, rising; got {self.milestones}")

    def parts(self) -> tuple[Schedule, ...]:
        """All of them."""
        return tuple(self.schedules)

    def rate(self, step: int) -> float:
        """What the schedule whose turn it is says."""
        k = bisect.bisect_right(self.milestones, step)
        return self.schedules[k](step - (self.milestones[k - 1] if k else 0))


class Product(Schedule):
    """The product of schedules; `Product([Cosine(1e-3, T_max=100), Step(1.0, 30)])` (torch's ChainedScheduler)."""

    def __init__(self, schedules: Sequence[Any]) -> None:
        self.schedules = [as_schedule(s) for s in schedules]
        _demand(bool(self.schedules), "Product: there is no schedule")

    def parts(self) -> tuple[Schedule, ...]:
        """The factors."""
        return tuple(self.schedules)

    def rate(self, step: int) -> float:
        """All factors multiplied."""
        return math.prod(s(step) for s in self.schedules)


class PerEpoch(Schedule):
    """A schedule that counts epochs: its step is step // steps_per_epoch."""

    def __init__(self, schedule: Any, steps_per_epoch: int) -> None:
        _demand(steps_per_epoch >= 1, f"PerEpoch: steps_per_epoch is at least 1, not {steps_per_epoch!r}")
        self.schedule, self.steps_per_epoch = as_schedule(schedule), steps_per_epoch

    def parts(self) -> tuple[Schedule, ...]:
        """The one that counts epochs."""
        return (self.schedule,)

    def rate(self, step: int) -> float:
        """The same all through an epoch."""
        return self.schedule(step // self.steps_per_epoch)


class ReduceOnPlateau(Schedule):
    """A schedule times a factor that falls when a measurement stops improving (torch's ReduceLROnPlateau).

    `observe(value)` is called at the end of each epoch. After more than `patience` values in a row that are not better than
    the best by `threshold` (a share of it with threshold_mode 'rel', a difference with 'abs'), the rate is multiplied by
    `factor`, but not below min_lr and not by steps smaller than eps; then `cooldown` values are not counted. NaN and
    infinities are never better.
    """

    def __init__(
        self,
        schedule: Any,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        _demand(mode in ("min", "max"), f"ReduceOnPlateau: mode is 'min' or 'max', not {mode!r}")
        _demand(threshold_mode in ("rel", "abs"), f"ReduceOnPlateau: threshold_mode is 'rel' or 'abs', not {threshold_mode!r}")
        _demand(0 < factor < 1, f"ReduceOnPlateau: factor lies between 0 and 1, not {factor!r}")
        good = patience >= 0 and cooldown >= 0 and threshold >= 0 and min_lr >= 0 and eps >= 0
        _demand(good, "ReduceOnPlateau: patience, threshold, cooldown, min_lr and eps are not negative")
        self.schedule, self.mode, self.factor, self.patience = as_schedule(schedule), mode, factor, patience
        self.threshold, self.threshold_mode, self.cooldown = threshold, threshold_mode, cooldown
        self.min_lr, self.eps = min_lr, eps
        self._scale = 1.0
        self._best: float | None = None
        self._bad = self._resting = self._latest = 0

    def parts(self) -> tuple[Schedule, ...]:
        """The one that is scaled."""
        return (self.schedule,)

    def rate(self, step: int) -> float:
        """The schedule's rate, reduced as often as was needed, at least min_lr."""
        self._latest = step
        return self._at(self._scale)

    def _at(self, scale: float) -> float:
        return max(self.schedule(self._latest) * scale, self.min_lr)

    @property
    def observes(self) -> bool:
        """Yes."""
        return True

    def observe(self, value: float) -> bool:
        """Takes the measurement of an epoch; whether the rate was reduced."""
        value = float(value)
        for part in self.parts():
            part.observe(value)
        if self._better(value):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._resting:
            self._resting -= 1
            self._bad = 0
        if self._bad <= self.patience:
            return False
        self._bad, self._resting = 0, self.cooldown
        reduced = self._scale * self.factor
        if self._at(self._scale) - self._at(reduced) <= self.eps:
            return False
        self._scale = reduced
        return True

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        sign = 1.0 if self.mode == "min" else -1.0
        margin = self.threshold * abs(self._best) if self.threshold_mode == "rel" else self.threshold
        return sign * value < sign * self._best - margin

    def state_dict(self) -> dict[str, Any]:
        """The factor so far, the best value, the values since it, what is left of the cooldown, the latest step."""
        own = {"scale": self._scale, "best": self._best, "bad": self._bad, "resting": self._resting, "latest": self._latest}
        return {**own, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises AttributeValueError for the state of another schedule."""
        own = ("scale", "best", "bad", "resting", "latest")
        if set(own) - set(state):
            raise AttributeValueError(f"ReduceOnPlateau: the state {dict(state)!r} is that of another schedule")
        super().load_state_dict({n: v for n, v in state.items() if n not in own})
        self._scale = float(state["scale"])
        self._best = None if state["best"] is None else float(state["best"])
        self._bad, self._resting, self._latest = int(state["bad"]), int(state["resting"]), int(state["latest"])


def values(schedule: Any, steps: int) -> list[float]:
    """The rates of the first `steps` steps, for a look or a plot."""
    return list(map(as_schedule(schedule), itertools.islice(itertools.count(), steps)))
