"""What the tests of CUDA share: the mock driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mock import build


@pytest.fixture(scope="session")
def mock_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our libcuda.so.1 in a folder of its own. It is C: the test skips where there is no compiler."""
    try:
        return build.driver(tmp_path_factory.mktemp("driver"))
    except FileNotFoundError as error:
        pytest.skip(f"the mock driver is C: {error}")
