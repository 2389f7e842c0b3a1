"""A program for every size, and what it is for some: a few microseconds a value, and nothing compiled.

Slots of the entry: inputs, outputs, constants (the last one is the table of sizes), the arena, then every value that lives in
the arena. Where these lie is planned anew for each set of sizes, by lifetimes that are known before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dims import Dim, evaluate, parse_dim
from ...ir.dtypes import as_dtype
from ...ir.errors import InputError
from ...ir.memory import ArenaUse
from ...ir.program import Argument, KernelInfo, Program
from ...ir.target import Target
from ...ir.types import TensorType

_ALIGN = 64


@dataclass(frozen=True)
class Place:
    """A value of the arena: its size in elements, bytes of each, and the steps from the first to the last that use it."""

    size: Dim
    itemsize: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class GenericProgram:
    """One program for every size of the named dimensions. `at` gives it for some."""

    name: str
    target: Target
    symbols: tuple[str, ...]
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    constants: tuple[np.ndarray[Any, Any], ...]
    places: tuple[Place, ...]
    checks: tuple[tuple[Dim, str], ...]
    kernels: tuple[KernelInfo, ...]
    work: tuple[tuple[Dim, Dim], ...]
    object_code: bytes
    texts: Mapping[str, str]

    @property
    def base(self) -> Program:
        """What is the same for all sizes, without arguments: for a cache, beside `described`."""
        return Program(
            name=self.name,
            target=self.target,
            inputs=(),
            outputs=(),
            constants=self.constants,
            arena_bytes=0,
            kernels=self.kernels,
            object_code=self.object_code,
            texts=self.texts,
        )

    def described(self) -> dict[str, Any]:
        """What else there is, as plain values for a file; `restored` reads it back."""

        def argument(a: Argument) -> list[Any]:
            return [a.name, a.type.dtype.name, [str(d) for d in a.type.shape], a.role]

        return {
            "symbols": list(self.symbols),
            "inputs": [argument(a) for a in self.inputs],
            "outputs": [argument(a) for a in self.outputs],
            "places": [[str(p.size), p.itemsize, p.first, p.last] for p in self.places],
            "checks": [[str(d), what] for d, what in self.checks],
            "work": [[str(f), str(b)] for f, b in self.work],
        }

    @staticmethod
    def restored(base: Program, about: Mapping[str, Any]) -> GenericProgram:
        """The program of `base` and what `described` gave. Raises KeyError, TypeError, ValueError, ParseError for others."""

        def argument(row: Sequence[Any]) -> Argument:
            name, dtype, shape, role = row
            return Argument(str(name), TensorType(as_dtype(dtype), tuple(map(parse_dim, shape))), str(role))

        return GenericProgram(
            name=base.name,
            target=base.target,
            symbols=tuple(map(str, about["symbols"])),
            inputs=tuple(map(argument, about["inputs"])),
            outputs=tuple(map(argument, about["outputs"])),
            constants=base.constants,
            places=tuple(Place(parse_dim(s), int(i), int(f), int(last)) for s, i, f, last in about["places"]),
            checks=tuple((parse_dim(d), str(what)) for d, what in about["checks"]),
            kernels=base.kernels,
            work=tuple((parse_dim(f), parse_dim(b)) for f, b in about["work"]),
            object_code=base.object_code,
            texts=base.texts,
        )

    def at(self, sizes: Mapping[str, int]) -> Program:
        """The program for these sizes: places and shapes are put in, the code is the same. Raises InputError for sizes that the
        graph does not allow."""
        known: dict[Dim, int] = {}

        def value(d: Dim) -> int:
            if isinstance(d, int):
                return d
            found = known.get(d)
            if found is None:
                result = evaluate(d, sizes)
                assert isinstance(result, int)
                found = known[d] = result
            return found

        for d, what in self.checks:
            if value(d) < 0:
                given = ", ".join(f"{k} = {v}" for k, v in sorted(sizes.items()))
                raise InputError(f"{self.name}: {given} makes {what}: {d} is {value(d)}")
        offsets, total = _planned([(value(p.size) * p.itemsize, p.first, p.last) for p in self.places])

        def fixed(a: Argument) -> Argument:
            if all(isinstance(d, int) for d in a.type.shape):
                return a
            return Argument(a.name, TensorType(a.type.dtype, tuple(map(value, a.type.shape))), a.role)

        table = np.array([sizes[s] for s in self.symbols], np.int64)
        infos = tuple(
            KernelInfo(k.name, value(f), value(b), k.nodes, k.parallel) for k, (f, b) in zip(self.kernels, self.work, strict=True)
        )
        return Program(
            name=self.name,
            target=self.target,
            inputs=tuple(map(fixed, self.inputs)),
            outputs=tuple(map(fixed, self.outputs)),
            constants=(*self.constants, table),
            arena_bytes=total,
            kernels=infos,
            object_code=self.object_code,
            use=ArenaUse(intermediates=total),
            texts=self.texts,
            places=offsets,
        )


def _planned(values: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, ...], int]:
    """An offset for each (bytes, first step, last step), first fit in the order of the steps, and the bytes of all."""
    order = sorted(range(len(values)), key=lambda k: (values[k][1], -values[k][0]))
    offsets = [0] * len(values)
    live: list[tuple[int, int, int]] = []  # (offset, end, last step), by offset
    total = 0
    for k in order:
        nbytes, first, last = values[k]
        need = -(-max(nbytes, 1) // _ALIGN) * _ALIGN
        live = [x for x in live if x[2] >= first]
        at = 0
        slot = len(live)
        for j, (offset, end, _) in enumerate(live):
            if offset - at >= need:
                slot = j
                break
            at = end
        offsets[k] = at
        live.insert(slot, (at, at + need, last))
        total = max(total, at + need)
    return tuple(offsets), total


__all__ = ["GenericProgram", "Place"]
