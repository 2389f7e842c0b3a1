"""Machine code as nvdisasm prints it: the instructions of loops."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"(\.L_x_\d+)")


def opcodes(text: str) -> list[str]:
    """The instructions of all kernels in order."""
    return [m[1] for m in map(_INSTRUCTION.match, text.splitlines()) if m]


def loops(text: str, least: int = 0) -> list[list[str]]:
    """The instructions of each loop of at least so many, by the jumps back; without NOPs."""
    places: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if m := re.match(r"(\.L_x_\d+):", line):
            places[m[1]] = len(code)
        elif m := _INSTRUCTION.match(line):
            code.append((m[1], m[2]))
    found = []
    for k, (name, rest) in enumerate(code):
        to = _LABEL.search(rest)
        if name.startswith("BRA") and to and places.get(to[1], k + 1) <= k:
            found.append([n for n, _ in code[places[to[1]] : k + 1] if n != "NOP"])
    return [x for x in found if len(x) >= least]
