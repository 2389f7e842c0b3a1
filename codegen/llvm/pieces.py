"""Cuts a module into modules of about one size that are compiled apart and linked again.

Functions that call each other stay together; only the entry calls across, and only what it calls is visible outside a piece.
"""

from __future__ import annotations

import re
from typing import Final

LEAST: Final = 200_000  # characters of text that are worth a piece of their own
_FUNCTION: Final = re.compile(r"^define [^@]*@([\w.]+)\((.*)\) (#\d+ )?\{\n[\s\S]*?^\}$", re.M)
_NAME: Final = re.compile(r"@([\w.]+)")


def pieces(text: str, entry: str, most: int) -> list[str]:
    """At most so many modules that together are the module `text`. `entry` is the function that others may call."""
    most = min(most, len(text) // LEAST)
    if most < 2:
        return [text]
    functions = {m[1]: m for m in _FUNCTION.finditer(text)}
    shared = {n for n in functions if n.startswith("tw.")}
    calls = {n: {r for r in _NAME.findall(m[0]) if r in functions and r not in shared and r != n} for n, m in functions.items()}
    owner = {n: n for n in functions if n not in shared and n != entry}

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
    bins[0], weights[0] = [entry], len(functions[entry][0])
    for group in sorted(groups.values(), key=lambda g: -sum(len(functions[n][0]) for n in g)):
        k = weights.index(min(weights))
        bins[k] += group
        weights[k] += sum(len(functions[n][0]) for n in group)
    rest = _FUNCTION.sub(lambda m: m[0] if m[1] in shared else "", text)
    return [_piece(rest, text, functions, set(b), calls[entry], entry) for b in bins if b]


def _piece(rest: str, text: str, functions: dict[str, re.Match[str]], own: set[str], called: set[str], entry: str) -> str:
    lines = [rest]
    for m in _FUNCTION.finditer(text):
        name = m[1]
        if name in own:
            opened = entry not in own and name in called
            lines.append(m[0].replace("define internal ", "define ", 1) if opened else m[0])
        elif entry in own and name in called:
            kinds = ", ".join(p.split()[0] for p in m[2].split(", ") if p)
            lines.append(f"declare {m[0].split('@', 1)[0].removeprefix('define internal ')}@{name}({kinds})")
    return "\n\n".join(lines) + "\n"
