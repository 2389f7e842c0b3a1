"""The models of "core" and their training steps: as PTX of every SM through ptxas, and small ones on the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import driver
from tensorwright.benchmarks.models import BiLSTM, DemoCNN, ResNet18, TinyTransformer, Workload
from tensorwright.frontend.training import training_step
from tensorwright.ir.dtypes import f64
from tensorwright.ir.interp import run
from tensorwright.settings import flags

from tests.frontend.support import expand

from .sweep import FORWARD, check_model

pytestmark = pytest.mark.unvalidated("the interpreter would take minutes; the passes are validated elsewhere")


@pytest.mark.parametrize("sm", [75, 80, 90])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("name", FORWARD)
def test_every_module_assembles_without_spills(name: str, train: bool, sm: int) -> None:
    """At the sizes of the benchmarks. Where ptxas is missing it fails: it is among the packages that tests install."""
    assert check_model(name, sm, train=train) == []


def ids(*shape: int) -> Any:
    return tw.spec(*shape, dtype="i64")


SMALL = {  # as deep as the models themselves, narrow, and no size a multiple of another
    "demo": Workload(lambda: DemoCNN(5), (tw.spec(3, 1, 8, 8),), ids(3)),
    "resnet18": Workload(lambda: ResNet18((3, 5, 6, 7)), (tw.spec(3, 3, 32, 32),), ids(3)),
    "transformer": Workload(lambda: TinyTransformer(4, 14, 2, 19, 23, 11), (ids(3, 11),), ids(3, 11)),
    "bilstm": Workload(lambda: BiLSTM(False), (tw.spec(3, 2, 13),), ids(3, 2)),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_step_on_the_interpreter_is_that_of_f64(name: str) -> None:
    """Loss, running statistics and what the weights are moved by, with all checks on and outputs poisoned."""
    w = SMALL[name]
    assert w.target is not None
    tw.seed(0)
    with driver.tracing_for("cuda", flags()):
        traced = training_step(w.make(), tw.losses.cross_entropy, tw.optim.SGD(1.0), *w.arguments, w.target)
    step = driver.build(traced.graph, traced.state, purpose="training", target="cuda-emulator")
    before = {n: np.asarray(v, np.float64) for n, v in traced.state.items()}
    batch = w.inputs()
    found = float(step(np.float32(1.0), *batch))
    *after, expected = run(expand(traced.graph), [*traced.state.values(), np.float32(1.0), *batch], f64)
    assert found == pytest.approx(float(expected), rel=1e-5)
    now = step.parameters
    for (n, old), new in zip(before.items(), after, strict=False):  # the first are those that have a new value
        moved, wanted = now[n] - old, new - old
        # sums of f32 through all layers, of the largest; and the weight's own rounding
        np.testing.assert_allclose(moved, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max() + 1e-7 * np.abs(old).max(), err_msg=n)
