"""A sample of the mutants that `python -m tests.cuda.mutants` counts: nearly all must die."""

from __future__ import annotations

from .mutants import PTX, alone, campaign


def test_most_mutants_of_five_kernels_are_killed() -> None:
    """The whole campaign (200 mutants) is the command; these 40 are others, with the same floor of 85%."""
    deaths, alive = campaign(40, seed=1)
    assert len(alive) <= 6, "\n".join(alive)
    assert len(deaths) >= 5, deaths


def test_the_originals_are_right() -> None:
    from .mutants import _subjects

    assert all(s.go(alone(s.name)) for s in _subjects())
    assert all(s.name in PTX for s in _subjects())
