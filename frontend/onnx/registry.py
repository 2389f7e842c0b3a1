"""The table of ONNX ops: one function for each, registered where it is written.

    @op("Squeeze", 13)
    def squeeze(n: Call) -> Tensor:
        ...

A function takes over at the opset it names and holds until a later one does. It gets a `Call`: the node's inputs, its
attributes, its opset; it returns a Tensor, a Value, an array, or a tuple of such, one per output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .description import Array

if TYPE_CHECKING:
    from .call import Call
    from .values import Value

Convert = Callable[["Call"], Any]
# (arrays of known inputs; those that are not given are None; the call for its attributes) -> the output, None: cannot say
Fold = Callable[["Call", list[Array | None]], "Array | Value | None"]
F = TypeVar("F", bound=Convert)

_OPS: Final[dict[tuple[str, str], list[Entry]]] = {}
_FOLDS: Final[dict[str, Fold]] = {}
FAMILIES: Final = (
    "elementwise", "casts", "reduce", "shape", "tensor", "indexing", "matrix", "convolution", "pool", "norm", "loss",
    "control", "rnn", "sequence", "sorting", "scatter", "signal", "image", "resize", "quantized",
    "attention", "microsoft",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """How one op is converted from the opset `since` on."""

    since: int
    convert: Convert


def op(name: str, *since: int, domain: str = "") -> Callable[[F], F]:
    """Registers a function for an op from an opset on (1 unless given; several where the function serves all of them)."""

    def register(fn: F) -> F:
        entries = _OPS.setdefault((domain, name), [])
        for version in since or (1,):
            if any(e.since == version for e in entries):
                raise ValueError(f"the ONNX op {name} is registered twice for opset {version}")
            entries.append(Entry(version, fn))
        entries.sort(key=lambda e: -e.since)
        return fn

    return register


def fold(*names: str) -> Callable[[Fold], Fold]:
    """Registers how ops of ai.onnx compute on known integers and sizes during import."""

    def register(fn: Fold) -> Fold:
        _FOLDS.update(dict.fromkeys(names, fn))
        return fn

    return register


def lookup(domain: str, name: str, opset: int) -> Convert | None:
    """The function for an op at an opset; None where there is none."""
    load_families()
    return next((e.convert for e in _OPS.get((domain, name), ()) if e.since <= opset), None)


def fold_of(domain: str, name: str) -> Fold | None:
    return _FOLDS.get(name) if not domain else None


def registered() -> dict[tuple[str, str], tuple[int, ...]]:
    """Every op there is: (domain, name) -> the opsets at which a function takes over."""
    load_families()
    return {key: tuple(sorted(e.since for e in entries)) for key, entries in sorted(_OPS.items())}


_loaded: list[bool] = []


def load_families() -> None:
    """Imports the files of ops, which register themselves."""
    if not _loaded:
        _loaded.append(True)
        for family in FAMILIES:
            import_module(f".ops.{family}", __package__)
