"""Modules that hold modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...ir.errors import TraceError
from ..module import Module


class ModuleList(Module):
    """A list of modules; its parameters are named '0.weight' and so on."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        for m in modules:
            self.append(m)

    def append(self, module: Module) -> ModuleList:
        """Adds a module at the end. Raises TraceError for what is no Module."""
        if not isinstance(module, Module):
            raise TraceError(f"{type(self).__name__} holds Modules, not {type(module).__name__}")
        setattr(self, str(len(self)), module)
        return self

    def _items(self) -> list[Module]:
        return [v for k, v in vars(self).items() if k.isdigit()]

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._items())

    def __getitem__(self, index: int | slice) -> Any:
        found = self._items()[index]
        return type(self)(found) if isinstance(found, list) else found


class Sequential(Module):
    """Modules (or plain functions of a Tensor) called one after the other; parameters are named '0.weight' and so on."""

    def __init__(self, *layers: Callable[..., Any]) -> None:
        for i, layer in enumerate(layers):
            if not callable(layer):
                raise TraceError(f"Sequential holds Modules and functions, not {type(layer).__name__}")
            setattr(self, str(i), layer)

    def _items(self) -> list[Callable[..., Any]]:
        return [v for k, v in vars(self).items() if k.isdigit()]

    def forward(self, x: Any) -> Any:
        for layer in self._items():
            x = layer(x)
        return x

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self._items())

    def __getitem__(self, index: int | slice) -> Any:
        found = self._items()[index]
        return Sequential(*found) if isinstance(found, list) else found
