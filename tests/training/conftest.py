"""One compile cache for the tests of training, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorwright as tw


@pytest.fixture(autouse=True, scope="package")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tw.config(cache=str(tmp_path_factory.mktemp("cache")), threads=1):
        yield
