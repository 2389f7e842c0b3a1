"""A register-tile microkernel in loop IR: the emitted code is right, and is the code one would write by hand."""

from __future__ import annotations

from .helpers import host_rows


def test_x() -> None:
    assert host_rows()
