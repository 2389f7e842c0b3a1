"""The examples run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAYS = {"mlp": "saved and loaded", "grad": "next point [1. 1.]", "train_digits": "digits not trained on: accuracy 0.9"}


@pytest.mark.unvalidated("as a user runs them; and the interpreter takes half a minute for the training step")
@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_examples_run(name: str, tmp_path: Path) -> None:
    if name == "train_digits":
        pytest.importorskip(
            "sklearn", reason="scikit-learn, which has the digits, is not installed (pip install 'tensorwright[demo]')"
        )
    environment = {**os.environ, "TENSORWRIGHT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
