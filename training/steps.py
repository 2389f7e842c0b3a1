"""The compiled training steps of a run: one program per shape of batch, all working on one state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..driver import build, tracing_for
from ..frontend.module import Module
from ..frontend.training import TracedStep
from ..ir.target import Target
from ..runtime.buffers import Array
from ..runtime.executable import Executable
from ..settings import Flags
from .errors import CheckpointError

Trace = Callable[[Sequence[Array]], TracedStep]
_KEPT: Final = 64  # programs for different shapes of batch; the one used longest ago goes first


class Steps:
    """Programs by the shapes of their batch, made when first needed. State lives in the programs and is updated in place."""

    def __init__(self, trace: Trace, target: str | Target | None, flags: Flags, **options: Any) -> None:
        """`trace` gives the step for a batch; `options` go to the driver (precision, memory_budget)."""
        self._trace, self._target, self._flags, self._options = trace, target, flags, options
        self.announce: Callable[[Executable], None] | None = None  # called with each new program before it runs
        self.programs: dict[tuple[tuple[int, ...], ...], Executable] = {}
        self.traced: TracedStep | None = None
        self.restored: Mapping[str, Array] = {}  # state to start from instead of the traced one
        self.averages: Mapping[str, str] = {}  # weight's path -> the state that holds its moving average

    def program(self, arrays: Sequence[Array]) -> Executable:
        """The step for batches of these shapes. Raises CheckpointError where restored state does not fit it."""
        shapes = tuple([a.shape for a in arrays])
        found = self.programs.get(shapes)
        if found is None:
            found = self._make(arrays)
            while len(self.programs) >= _KEPT:
                self.programs.pop(next(iter(self.programs)))
        elif len(self.programs) > 1:
            del self.programs[shapes]  # the order of the dict is that of use
        self.programs[shapes] = found
        return found

    def _make(self, arrays: Sequence[Array]) -> Executable:
        with tracing_for(self._target, self._flags):
            traced = self._trace(arrays)
        state: Mapping[str, Array] = traced.state
        if self.traced is None and self.restored:
            check_state(state, self.restored)
            state = {n: traced.state[n] if n in traced.parameters else a for n, a in self.restored.items()}
        first = self.any
        options = {"target": self._target, "now": self._flags, **self._options}
        made = build(traced.graph, state, purpose="training", shares=first, **options)
        if self.traced is None:
            self.traced, self.restored, self.averages = traced, {}, traced.averages
        if self.announce is not None:
            self.announce(made)
        return made

    @property
    def any(self) -> Executable | None:
        """Some program of them; None before the first."""
        return next(iter(self.programs.values()), None)

    @property
    def largest(self) -> Executable | None:
        """The program for the largest batch so far."""
        if not self.programs:
            return None
        return self.programs[max(self.programs, key=lambda shapes: [int(np.prod(s, dtype=object)) for s in shapes])]

    def state(self) -> dict[str, Array]:
        """Copies of the state as it is now; the restored one before the first program, empty without."""
        first = self.any
        return {n: a.copy() for n, a in self.restored.items()} if first is None else first.parameters

    def load(self, values: Mapping[str, Array]) -> None:
        """Overwrites state by name, in all programs."""
        if self.any is None:
            self.restored = {**self.restored, **values} if self.restored else {}
        for program in self.programs.values():
            program.set_parameters(values)

    def refresh(self, model: Module) -> None:
        """Takes over the model's weights where they are others than those of the state."""
        first = self.any
        if first is None and self.restored:
            own = weights_of_model(model)
            self.restored = {n: own[n].data.copy() if n in own else a for n, a in self.restored.items()}
        if first is not None and (changed := changed_weights(model, first)):
            self.load(changed)

    def store(self, model: Module) -> None:
        """Puts the trained weights into the model."""
        first = self.any
        if first is not None:
            state = first.parameters
            for name, p in weights_of_model(model).items():
                if name in state:
                    p.data = state[name]


def weights_of_model(model: Module) -> dict[str, Any]:
    """Parameters and buffers by path."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def changed_weights(model: Module, exe: Executable) -> dict[str, Array]:
    """The model's weights that differ from those an executable is bound to."""
    bound = exe.parameters
    now = {n: p.data for n, p in weights_of_model(model).items() if n in bound}
    return {n: v for n, v in now.items() if not np.array_equal(bound[n], v, equal_nan=v.dtype.kind == "f")}


def check_state(expected: Mapping[str, Array], given: Mapping[str, Array]) -> None:
    """Raises CheckpointError, listing what differs, where a state is not that of the step."""
    lines = differences(expected, given)
    if lines:
        raise CheckpointError(
            "the state to resume from is not that of this training step (another optimiser, or other settings?):\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def differences(expected: Mapping[str, Any], given: Mapping[str, Any], limit: int = 20) -> list[str]:
    """What differs between two sets of named arrays: 'name: f32[3], here f32[4]', one line each."""
    lines = [f"{n}: {_kind(a)} here, not in the checkpoint" for n, a in expected.items() if n not in given]
    lines += [f"{n}: {_kind(a)} in the checkpoint, not here" for n, a in given.items() if n not in expected]
    for n, a in expected.items():
        if n in given and _kind(given[n]) != _kind(a):
            lines.append(f"{n}: {_kind(given[n])} in the checkpoint, {_kind(a)} here")
    return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]


def _kind(value: Any) -> str:
    return value if isinstance(value, str) else f"{value.dtype}{list(value.shape)}"
