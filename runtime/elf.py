"""Reads what the loader must know of an ELF64 object before it is trusted with it: machine, defined and missing symbols.

The linker inside LLVM reports a missing symbol as text on stderr, or ends the process; so we look first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..ir.errors import CompileError

MACHINES = {62: "x86_64", 183: "aarch64"}
_SYMTAB = 2


@dataclass(frozen=True)
class ObjectSymbols:
    """`machine` as in a target triple; names of global symbols that the object defines and that it needs."""

    machine: str
    defined: frozenset[str]
    undefined: frozenset[str]


def symbols(code: bytes) -> ObjectSymbols:
    """The symbols of a relocatable little-endian ELF64 file.

    Raises CompileError if `code` is not one or its tables point outside it.
    """
    try:
        return _read(code)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise CompileError(f"object code of {len(code)} bytes is not a sound ELF64 object: {error}") from error


def _read(code: bytes) -> ObjectSymbols:
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"it starts with {code[:6]!r}")
    kind, machine = struct.unpack_from("<HH", code, 16)
    if kind != 1 or machine not in MACHINES:
        raise ValueError(f"file type {kind}, machine {machine}")
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    defined: set[str] = set()
    undefined: set[str] = set()
    for section in range(count):
        _, kind, _, _, offset, length, link, _, _, entry = struct.unpack_from("<IIQQQQIIQQ", code, table + section * size)
        if kind != _SYMTAB:
            continue
        strings, *_ = struct.unpack_from("<24xQ", code, table + link * size)
        if offset + length > len(code) or entry < 24:
            raise ValueError("the symbol table lies outside the file")
        for at in range(offset, offset + length, entry):
            name, info, _, home = struct.unpack_from("<IBBH", code, at)
            if info >> 4 == 0 or not name:  # local symbols and nameless ones
                continue
            end = code.index(b"\0", strings + name)
            (undefined if home == 0 else defined).add(code[strings + name : end].decode("ascii"))
    return ObjectSymbols(MACHINES[machine], frozenset(defined), frozenset(undefined))
