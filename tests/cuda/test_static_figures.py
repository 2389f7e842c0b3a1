"""What the machine code of products in f32 consists of. Tiles of tensor cores: test_tensor_cores.py."""

from __future__ import annotations

import re

import pytest
import tensorwright as tw
from tensorwright.ir.cuda_program import CudaProgram
from tensorwright.ir.target import row
from tensorwright.runtime.cuda.tools import assemble, sass

from .sass import loops


@pytest.mark.unvalidated("the interpreter would take seconds; no value is looked at")
@pytest.mark.parametrize("target", ["cuda-sm_75", "cuda-sm_80"])
@pytest.mark.parametrize(("size", "registers"), [(1024, 192), (2048, 136)])
def test_inner_loop_of_a_product_is_multiply_adds(target: str, size: int, registers: int) -> None:
    """At least 90% of the instructions of the loop over steps are FFMA, in the machine code; accesses are of 16 bytes."""
    made = tw.compile(lambda a, b: a @ b, tw.spec(size, size), tw.spec(size, size), target=target).compiled.run
    assert isinstance(made, CudaProgram)
    sm = row(target).sm
    assert not re.search(r"(ld|st)\.global(\.nc)?\.b32", made.ptx)
    done = assemble(made.ptx, sm)
    assert not done.wrong
    assert max(done.registers.values()) <= registers, done.registers
    (inner,) = loops(sass(made.ptx, sm), least=100)
    share = sum(x.startswith("FFMA") for x in inner) / len(inner)
    assert share >= 0.9, f"{share:.1%} of {len(inner)} instructions"
