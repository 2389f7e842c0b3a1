"""A run killed with SIGKILL at random moments and started again ends with the bits of the run left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorwright.training.checkpoint import in_folder, read

SCRIPT = Path(__file__).with_name("killed.py")
KILLS = 20


def start(folder: Path, result: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(result)], stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def trains(folder: Path, process: subprocess.Popen[bytes], before: list[Path]) -> bool:
    """Waits until the run has written a checkpoint; False if it ends first."""
    while process.poll() is None:
        if folder.exists() and in_folder(folder) != before:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.unvalidated("twenty processes compile the same step; the cache has to serve them, and validation bypasses it")
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    left_alone = tmp_path / "alone.npz"
    finished(start(tmp_path / "alone", left_alone))  # fills the compile cache too
    began = time.monotonic()
    second = start(tmp_path / "again", tmp_path / "again.npz")
    assert trains(tmp_path / "again", second, [])
    starting, began = time.monotonic() - began, time.monotonic()
    finished(second)
    training = time.monotonic() - began
    folder, result = tmp_path / "killed", tmp_path / "killed.npz"
    rng = random.Random(11)
    kills, seen = 0, set()
    while kills < KILLS:
        before = in_folder(folder) if folder.exists() else []
        process = start(folder, result)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, starting))
        elif trains(folder, process, before):
            time.sleep(rng.uniform(0, training / 6))
        if process.poll() is not None:
            finished(process)
            result.unlink()
            for path in folder.iterdir():  # it was through before all kills were spent: again from the start
                path.unlink()
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        for path in [*in_folder(folder), *folder.glob("best*")] if folder.exists() else []:
            seen.add(read(path)[0]["step"])  # raises where one cannot be read
    assert len(seen) > KILLS // 2, f"the kills fell into the training too seldom for the test to mean anything: {seen}"
    finished(start(folder, result))
    expected, found = np.load(left_alone), np.load(result)
    assert sorted(expected.files) == sorted(found.files)
    for name in expected.files:
        assert expected[name].tobytes() == found[name].tobytes(), name
    again = np.load(tmp_path / "again.npz")
    assert all(expected[n].tobytes() == again[n].tobytes() for n in expected.files), "not even two undisturbed runs agree"
