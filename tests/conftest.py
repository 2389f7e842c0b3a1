"""What every test runs under: a compile cache of its own, every graph verified, every pass validated.

Compiling in a test checks each pass against the interpreter. A test that is about the cache (validation bypasses it), or
compiles what the interpreter takes too long for, is marked `unvalidated("why")`. `TENSORWRIGHT_VALIDATE=0 pytest` turns
it off for all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

_CACHE, _VALIDATE = "TENSORWRIGHT_CACHE", "TENSORWRIGHT_VALIDATE"
_wanted = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Iterator[None]:
    """Sets the environment before any test is imported, also for the processes that tests start."""
    wanted = os.environ.get(_VALIDATE, "1")
    with tempfile.TemporaryDirectory(prefix="tensorwright-test-cache-") as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv(_CACHE, cache)
        patch.setenv("TENSORWRIGHT_VERIFY", "1")
        patch.setenv(_VALIDATE, wanted)
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Also in the workers of `pytest -n`, which inherit the environment: each keeps a cache of its own within the one."""
    config.addinivalue_line("markers", "unvalidated(reason): compiles without validating each pass")
    config.stash[_wanted] = os.environ[_VALIDATE]
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        os.environ[_CACHE] = os.path.join(os.environ[_CACHE], worker)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of every scope, which may compile too."""
    mark = item.get_closest_marker("unvalidated")
    if mark is not None and (len(mark.args) != 1 or not isinstance(mark.args[0], str)):
        raise pytest.UsageError(f"{item.nodeid}: the mark is unvalidated(reason)")
    os.environ[_VALIDATE] = item.config.stash[_wanted] if mark is None else "0"
