"""Tests on a real GPU: `pytest -m gpu`. Where none can be used they skip, and say which of three things is missing."""

from __future__ import annotations

import pytest
from tensorwright.runtime.cuda import devices
from tensorwright.runtime.cuda.device import Device


def reason() -> str | None:
    """The first thing that a GPU needs and is not there, as `devices.py` names the three; None where all are."""
    lacking = devices.missing()
    return lacking[0] if lacking else None


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The machine's GPU; the test skips where there is none."""
    why = reason()
    if why is not None:
        pytest.skip(why)
    return devices.open_device("cuda")


@pytest.fixture(scope="session")
def sm(gpu: Device) -> int:
    """The best SM of our rows that the GPU runs."""
    from tensorwright.cuda.compiling import resolve

    return resolve("cuda")[0].sm
