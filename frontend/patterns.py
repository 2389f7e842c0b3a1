"""Choosing parameters by path: shell patterns such as '*.bias', 'encoder.*', 'layers.[0-3].*'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..ir.errors import AttributeValueError


def matches(path: str, pattern: str) -> bool:
    """Whether a parameter's path fits a pattern of `fnmatch`: '*' is any text, dots included, '?' a letter, '[0-3]' a range.

    '*.bias' also fits a path that is 'bias' alone, as the parameters of a bare layer are called.
    """
    return fnmatchcase(path, pattern) or fnmatchcase("." + path, pattern)


def select(pattern: str, paths: Sequence[str], what: str) -> list[str]:
    """The paths that fit. Raises AttributeValueError, which lists the paths, for a pattern that fits none or is no string."""
    if not isinstance(pattern, str):
        raise AttributeValueError(f"{what}: a pattern is a string such as '*.bias', not {pattern!r}")
    found = [path for path in paths if matches(path, pattern)]
    if not found:
        raise AttributeValueError(f"{what}: no parameter's path fits {pattern!r}; the paths are {listing(paths)}")
    return found


def listing(paths: Iterable[str], most: int = 40) -> str:
    """Paths for an error message, cut after `most`."""
    known = list(paths)
    rest = f", and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + rest
