"""Flags: everything that can be set from outside, in one typed place. `tensorwright doctor` prints this table.

    with tw.config(threads=1, validate=True):
        exe = tw.compile(model, spec)

A flag comes from the innermost `config` block, else from its environment variable, else from its default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from .ir.errors import InputError


def _flag(default: Any, doc: str, *, code: bool = False) -> Any:
    return field(default=default, metadata={"doc": doc, "code": code})


@dataclass(frozen=True)
class Flags:
    """The values in force. Each field is the environment variable TENSORWRIGHT_<NAME> as well."""

    threads: int | None = _flag(None, "most threads one call may use; unset: all that affinity and the CPU quota allow")
    target: str = _flag("host", "target row to compile for: host, x86-64-v2, x86-64-v3, x86-64-v4, aarch64-neon", code=True)
    cache: str = _flag("", "folder of the compile cache, or 'off'; unset: $XDG_CACHE_HOME/tensorwright or ~/.cache/tensorwright")
    cache_bytes: int = _flag(1024**3, "bytes the cache may take before the entries used longest ago are removed")
    validate: bool = _flag(False, "check every pass against the interpreter while compiling (slow)")
    verify: bool = _flag(False, "check the graph after every pass, and the loops and the memory plan")
    checked: bool = _flag(False, "compile every load and store with a bounds check (slow)", code=True)
    winograd: bool = _flag(True, "3x3 convolutions by Winograd's method where it is expected to be faster", code=True)
    cuda_loops: str = _flag(
        "auto",
        "CUDA: loops of small kernels as 'launches', as 'one' kernel wherever one block can run them, or 'auto': as estimated",
        code=True,
    )
    dump: str = _flag("", "folder that gets the text of every stage of every compile, numbered; unset: none")

    def code_flags(self) -> tuple[tuple[str, str | int | bool | None], ...]:
        """Name and value of each flag that changes the generated code: part of the cache key."""
        return tuple((f.name, getattr(self, f.name)) for f in fields(self) if f.metadata["code"])


_current: ContextVar[Flags | None] = ContextVar("tensorwright_flags", default=None)
_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}


def flags() -> Flags:
    """The flags in force here and now. Raises InputError for an environment variable that makes no sense."""
    return _current.get() or _from_environment()


@contextmanager
def config(**changes: Any) -> Iterator[Flags]:
    """Sets flags for the block (this thread and what it awaits): `with tw.config(threads=1): ...`. Raises InputError."""
    known = {f.name: f for f in fields(Flags)}
    unknown = sorted(changes.keys() - known.keys())
    if unknown:
        raise InputError(f"unknown flags {unknown}; there are {', '.join(known)}")
    for name, value in changes.items():
        _check(name, value)
    token = _current.set(replace(flags(), **changes))
    try:
        yield flags()
    finally:
        _current.reset(token)


def describe() -> list[tuple[str, str, str, str]]:
    """(flag, environment variable, value now, meaning) of each flag."""
    now = flags()
    return [(f.name, _variable(f.name), str(getattr(now, f.name)), str(f.metadata["doc"])) for f in fields(Flags)]


def _variable(name: str) -> str:
    return f"TENSORWRIGHT_{name.upper()}"


def _from_environment() -> Flags:
    found: dict[str, Any] = {}
    for f in fields(Flags):
        text = os.environ.get(_variable(f.name), "").strip()
        if text:
            found[f.name] = _parse(f.name, str(f.type), text)
            _check(f.name, found[f.name], _variable(f.name))
    return Flags(**found)


def _parse(name: str, kind: str, text: str) -> Any:
    if kind.startswith("bool"):
        if text.lower() not in _TRUE | _FALSE:
            raise InputError(f"{_variable(name)}={text!r}: expected one of {', '.join(sorted(_TRUE | _FALSE))}")
        return text.lower() in _TRUE
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{_variable(name)}={text!r}: expected an integer") from None
    return text


def _check(name: str, value: Any, where: str | None = None) -> None:
    kind = next(str(f.type) for f in fields(Flags) if f.name == name)
    fits = {
        "bool": isinstance(value, bool),
        "int": type(value) is int and value >= 0,
        "int | None": value is None or (type(value) is int and value >= 1),
        "str": isinstance(value, str),
    }[kind]
    if not fits:
        wanted = {"int": "an integer of at least 0", "int | None": "an integer of at least 1"}.get(kind, f"a {kind}")
        raise InputError(f"{where or name}: expected {wanted}, got {value!r}")
