"""Every op record for every SM: assembled by ptxas without a spill, and right on the PTX interpreter with all its checks.

Where ptxas is missing these tests fail: it is among the packages that tests install.
"""

from __future__ import annotations

import pytest
from tensorwright.ir.op import Op

from .sweep import OPS, check_op


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op(op: Op) -> None:
    """All samples (ragged, empty, extreme values) as PTX of sm_80, outputs poisoned, against f64; every third one assembled
    for the other SMs, whose whole sets take sweep.py."""
    assert check_op(op, 80, run=True) == []
    for sm in (75, 90):
        assert check_op(op, sm, run=False, every=3) == []
