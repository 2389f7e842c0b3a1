"""Recurrent loops of one row with the projection of later steps woven into them: the same bits as one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.codegen.loop_ir import Kernel, Let
from tensorwright.codegen.weave import woven
from tensorwright.ir.dtypes import f32
from tensorwright.ir.expr import const, var

from .helpers import host_rows
from .test_recurrent_tiles import lstm

pytestmark = pytest.mark.unvalidated("what passes do to such layers is validated in test_recurrent_tiles.py")
RNG = np.random.default_rng(5)
UNITS, INPUTS = 64, 48


class Layer(nn.Module):
    """A recurrent layer and what it returns."""

    def __init__(self, kind: type[Any], both: bool = True) -> None:
        self.layer = kind(INPUTS, UNITS, bidirectional=both, seed=1)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        y: tw.Tensor = self.layer(x)[0]
        return y


def entry(exe: Any) -> str:
    return str(exe.text("loops")).rsplit("# entry main", 1)[1]


@pytest.mark.parametrize("target", host_rows()[:1])
@pytest.mark.parametrize("steps", [27, 32])
def test_the_bits_are_those_of_a_projection_before_the_loop(steps: int, target: str) -> None:
    model = Layer(nn.LSTM)
    x = (0.5 * RNG.standard_normal((steps, 1, INPUTS))).astype(np.float32)
    programs = {n: tw.compile(model, tw.spec(*x.shape), target=target, threads=n) for n in (1, 2, 4)}
    found = {n: np.asarray(exe(x)) for n, exe in programs.items()}
    assert np.abs(found[1] - lstm(model.layer, x)).max() < 2e-6
    assert (found[1] == found[4]).all() and (found[2] == found[4]).all()
    assert "_with_" not in entry(programs[4]), "two directions on four threads: each projection has all of them"
    if target == "x86-64-v4":
        assert entry(programs[1]).count("_with_") == entry(programs[2]).count("_with_") == 2
        assert "reverse\n" in entry(programs[1])


def test_a_single_direction_is_woven_on_one_thread() -> None:
    if "x86-64-v4" not in host_rows():
        pytest.skip("AVX2's registers do not hold both tiles")
    model = Layer(nn.GRU, both=False)
    x = RNG.standard_normal((30, 1, INPUTS)).astype(np.float32)
    one, two = (tw.compile(model, tw.spec(*x.shape), target="x86-64-v4", threads=n) for n in (1, 2))
    assert ("_with_" in entry(one), "_with_" in entry(two)) == (True, False)
    assert (np.asarray(one(x)) == np.asarray(two(x))).all()


def test_steps_of_several_rows_are_not_woven() -> None:
    x = RNG.standard_normal((27, 3, INPUTS)).astype(np.float32)
    assert "_with_" not in entry(tw.compile(Layer(nn.LSTM), tw.spec(*x.shape), threads=1))


def test_a_kernel_without_a_loop_cannot_be_woven() -> None:
    straight = Kernel("straight", (), (Let(var("x", f32), const(1.0, f32)),))
    assert woven(straight, straight) is None
