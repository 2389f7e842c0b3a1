"""Cuts a module into modules of about one size that are compiled apart and linked again.

Functions that call each other stay together; only the entry calls across, and only what it calls is visible outside a piece.
"""

from __future__ import annotations

import re
from typing import Final

LEAST: Final = 200_000  # characters of text that are worth a piece of their own
_HEAD: Final = re.compile(r"define ([^@]*)@([\w.]+)\((.*)\) (?:#\d+ )?\{")
_NAME: Final = re.compile(r"@([\w.]+)")


def pieces(text: str, entry: str, most: int) -> list[str]:
    """At most so many modules that together are the module `text`. `entry` is the function that others may call."""
    most = min(most, len(text) // LEAST)
    if most < 2:
        return [text]
    functions: dict[str, str] = {}
    rest: list[str] = []  # what every piece has
    for block in text.rstrip("\n").split("\n\n"):  # a function has no empty lines in it
        head = _HEAD.match(block)
        if head is None or head[2].startswith("tw."):
            rest.append(block)
        else:
            functions[head[2]] = block
    calls = {n: {r for r in _NAME.findall(f) if r in functions and r != n} for n, f in functions.items()}
    owner = {n: n for n in functions if n != entry}

    def root(n: str) -> str:
        while owner[n] != n:
            owner[n] = owner[owner[n]]
            n = owner[n]
        return n

    for n in owner:
        for r in calls[n]:
            if r != entry:
                owner[root(r)] = root(n)
    groups: dict[str, list[str]] = {}
    for n in owner:
        groups.setdefault(root(n), []).append(n)
    bins: list[list[str]] = [[] for _ in range(most)]
    weights = [0] * most
    bins[0], weights[0] = [entry], len(functions[entry])
    for group in sorted(groups.values(), key=lambda g: -sum(len(functions[n]) for n in g)):
        k = weights.index(min(weights))
        bins[k] += group
        weights[k] += sum(len(functions[n]) for n in group)
    return [_piece(rest, functions, set(b), calls[entry], entry) for b in bins if b]


def _piece(rest: list[str], functions: dict[str, str], own: set[str], called: set[str], entry: str) -> str:
    blocks = list(rest)
    for name, function in functions.items():
        if name in own:
            opened = entry not in own and name in called
            blocks.append(function.replace("define internal ", "define ", 1) if opened else function)
        elif entry in own and name in called:
            head = _HEAD.match(function)
            assert head is not None
            kinds = ", ".join(p.split()[0] for p in head[3].split(", ") if p)
            blocks.append(f"declare {head[1].removeprefix('internal ')}@{name}({kinds})")
    return "\n\n".join(blocks) + "\n"
