"""Module: a model or a layer. Parameters, buffers and submodules are simply its attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ..ir.errors import ShapeError, TensorwrightError, TraceError
from .context import active, error
from .parameter import Buffer, Owner, Parameter
from .summary import Summary, summarise

Array = np.ndarray[Any, Any]


class StateError(TensorwrightError, KeyError):
    """A state dict that does not match the model."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class Module(Owner):
    """Base of models and layers. Write `__call__(self, x)` or `forward(self, x)`; calling `super().__init__()` is not needed.

    Attributes that are Parameters, Buffers or Modules (also in lists, tuples and dicts) belong to the module, under the
    attribute's name. Whether layers such as Dropout are in training mode is decided by what is traced: `tw.compile` and
    `tw.trace` trace for inference, a training step for training; `train()` and `eval()` fix it for a module.
    """

    _mode: bool | None = None
    ignored_state: tuple[str, ...] = ()  # names that other libraries' state dicts hold for this layer, and it has no use for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            cls.__call__ = _scoped(cls.__dict__["__call__"])  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; overridden by subclasses (or `__call__` is)."""
        raise error(TraceError, f"{type(self).__name__} defines neither __call__ nor forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get(name)
        if isinstance(old, Parameter) and isinstance(value, np.ndarray):
            old.data = value  # net.weight = array keeps it a parameter
        else:
            object.__setattr__(self, name, value)

    # -- mode ---------------------------------------------------------------------------------------------------------
    @property
    def training(self) -> bool:
        """Whether this module behaves as in training: what train() or eval() said, else what is being traced."""
        if self._mode is not None:
            return self._mode
        recording = active()
        return recording is not None and recording.training

    def train(self, mode: bool | None = True) -> Module:
        """Fixes the mode of this module and all inside: True training, False inference, None as what is traced."""
        for _, m in self.named_modules():
            m._mode = mode
        return self

    def eval(self) -> Module:
        """Inference mode for this module and all inside, even in a training step (a frozen batch norm, say)."""
        return self.train(False)

    # -- what belongs to it -------------------------------------------------------------------------------------------
    def named_children(self) -> Iterator[tuple[str, Any]]:
        """Attributes that are modules, parameters or buffers, with names; those in containers as 'attribute.key'."""
        for name, value in vars(self).items():
            if value.__class__ not in _PLAIN:
                yield from _parts(name, value)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all inside, each once, with its path."""
        yield from self.named_parts(prefix)[0]

    def named_parts(self, prefix: str = "") -> tuple[list[tuple[str, Module]], list[tuple[str, Parameter]]]:
        """What `named_modules` gives, and all parameters and buffers in the order of attributes, in one walk."""
        modules: list[tuple[str, Module]] = []
        parameters: list[tuple[str, Parameter]] = []
        seen: set[int] = set()
        stack: list[tuple[str, Module]] = [(prefix, self)]
        while stack:
            path, m = stack.pop()
            if id(m) in seen:
                continue
            seen.add(id(m))
            modules.append((path, m))
            inner: list[tuple[str, Module]] = []
            for name, value in m.named_children():
                if isinstance(value, Module):
                    inner.append((_join(path, name), value))
                elif id(value) not in seen:
                    seen.add(id(value))
                    parameters.append((_join(path, name), value))
            stack += reversed(inner)
        return modules, parameters

    def modules(self) -> Iterator[Module]:
        """This module and all inside."""
        return (m for _, m in self.named_modules())

    def _named(self, prefix: str, buffers: bool) -> Iterator[tuple[str, Parameter]]:
        yield from ((path, p) for path, p in self.named_parts(prefix)[1] if p.is_buffer == buffers)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Parameters with their paths ('layers.0.weight'), each once (a shared one under its first path)."""
        return self._named(prefix, False)

    def parameters(self) -> Iterator[Parameter]:
        """Parameters, each once."""
        return (p for _, p in self.named_parameters())

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Buffer]]:
        """Buffers (running statistics) with their paths."""
        return self._named(prefix, True)  # type: ignore[return-value]

    def buffers(self) -> Iterator[Buffer]:
        """Buffers, each once."""
        return (b for _, b in self.named_buffers())

    def apply(self, fn: Callable[[Module], Any]) -> Module:
        """Calls fn on every module inside, then on this one."""
        for m in reversed(list(self.modules())):
            fn(m)
        return self

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers by path, in the order of attributes."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        order = {n: i for i, n in enumerate(self._state_order())}
        return {n: own[n].data.copy() for n in sorted(own, key=lambda n: order[n])}

    def _state_order(self) -> Iterator[str]:
        for path, m in self.named_modules():
            for name, value in m.named_children():
                if isinstance(value, Parameter):
                    yield _join(path, name)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over arrays by path; nothing changes unless all fit.

        Raises StateError that lists missing and unexpected names (with `strict`), ShapeError for arrays that do not fit.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        missing = [n for n in own if n not in state]
        ignored = {_join(path, n) for path, m in self.named_modules() for n in m.ignored_state}
        unexpected = [n for n in state if n not in own and n not in ignored]
        if strict and (missing or unexpected):
            lines = [f"the state dict does not match {type(self).__name__}:"]
            lines += [f"  missing: {', '.join(missing)}"] * bool(missing)
            lines += [f"  unexpected: {', '.join(unexpected)}"] * bool(unexpected)
            lines.append("  pass strict=False to load only the names that match")
            raise StateError("\n".join(lines))
        new = {n: np.asarray(state[n]) for n in own if n in state}
        wrong = [
            f"  {n}: the model has {own[n].data.shape}, the state dict {a.shape}"
            for n, a in new.items()
            if a.shape != own[n].data.shape
        ]
        if wrong:
            raise ShapeError("\n".join([f"arrays of the state dict do not fit {type(self).__name__}:", *wrong]))
        for n, a in new.items():
            own[n].data = a

    def __repr__(self) -> str:
        inner = [(n, v) for n, v in self.named_children() if isinstance(v, Module)]
        head = f"{type(self).__name__}({self.extra_repr()}"
        if not inner:
            return head + ")"
        body = "".join(f"\n  ({n}): " + repr(m).replace("\n", "\n  ") for n, m in inner)
        return f"{head}{body}\n)"

    def extra_repr(self) -> str:
        """What `repr` shows of a layer's own settings."""
        return ""

    def written_call(self) -> Callable[..., Any]:
        """The bound method whose signature names the arguments: __call__ where a subclass wrote one, else forward."""
        return self.forward if type(self).__call__ is Module.__call__ else self.__call__

    def summary(self, *specs: Any) -> Summary:
        """A table of layers with output shapes, parameters and FLOPs for arguments like `specs`; print it."""
        return summarise(self, *specs)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_PLAIN: Final = frozenset((int, float, bool, str, type(None)))  # most attributes: they hold nothing


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Module, Parameter)):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            if v.__class__ not in _PLAIN:
                yield from _parts(f"{name}.{i}", v)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _parts(f"{name}.{k}", v)


def _scoped(call: Callable[..., Any]) -> Callable[..., Any]:
    """`__call__` that also notes the module's path while it runs, for labels, errors and summaries."""

    @functools.wraps(call)
    def wrapper(self: Module, *args: Any, **kwargs: Any) -> Any:
        recording = active()
        if recording is None or (recording.scopes and recording.scopes[-1][1] is self):
            return call(self, *args, **kwargs)
        if id(self) not in recording.paths:  # reached through a container that the tracer did not look into
            recording.declare_module(type(self).__name__.lower(), self)
        path = recording.paths[id(self)]
        recording.scopes.append((path, self))
        for observe in recording.observers:
            observe("enter", self, path, None)
        try:
            result = call(self, *args, **kwargs)
        finally:
            recording.scopes.pop()
        for observe in recording.observers:
            observe("leave", self, path, result)
        return result

    return wrapper


Module.__call__ = _scoped(Module.__call__)  # type: ignore[method-assign]
