"""Runs tests of tests/gpu on the mock driver, in a process of its own: python gpu_tests.py LIBRARY EXPRESSION...

It shows that these tests would find a GPU that computes wrong or right; test_gpu_set.py calls it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cuda.mock import minicuda
from tests.cuda.mock.driver import Driver

if __name__ == "__main__":
    minicuda.install(sys.argv[1])
    driver = Driver(sys.argv[1], 1 << 26)
    folder = Path(__file__).resolve().parents[2] / "gpu"
    sys.exit(pytest.main([str(folder), "-m", "gpu", "-k", sys.argv[2], "-rA", "-q"]))
