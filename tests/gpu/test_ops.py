"""Every op record's samples on the GPU against f64 numpy, within the records' budgets."""

from __future__ import annotations

import pytest
from tensorwright.ir.op import REGISTRY, Op, Trait
from tensorwright.runtime.cuda.device import Device

from ..cuda.sweep import check_op

pytestmark = [pytest.mark.gpu, pytest.mark.unvalidated("the passes are validated elsewhere")]
OPS = [op for op in REGISTRY.values() if not op.has(Trait.STRUCTURAL)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op(op: Op, gpu: Device, sm: int) -> None:
    assert check_op(op, sm, run=True, device=gpu) == []
