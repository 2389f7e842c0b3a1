"""Random changes of one instruction: nearly all must be noticed. `python -m tests.cuda.mutants` lists those that live."""

from __future__ import annotations

from .mutants import PTX, alone, campaign


def test_most_mutants_of_five_kernels_are_killed() -> None:
    """At least 85% of 200."""
    deaths, alive = campaign(200, seed=1)
    assert len(alive) <= 30, "\n".join(alive)
    assert len(deaths) >= 5, deaths


def test_the_originals_are_right() -> None:
    from .mutants import _subjects

    assert all(s.go(alone(s.name)) for s in _subjects())
    assert all(s.name in PTX for s in _subjects())
