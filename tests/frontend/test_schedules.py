"""Schedules against closed forms and against torch.optim.lr_scheduler; what they remember comes back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tensorwright import schedules as S
from tensorwright.ir.errors import AttributeValueError

BASE = 0.1
PLATEAU = [1.0, 0.9, 0.95, 0.9, 0.9, 0.8999, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, math.nan, math.nan, math.nan, 0.1]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (S.Constant(BASE), lambda t: 0.1),
        (S.Constant(BASE, factor=0.5, total_iters=3), lambda t: 0.05 if t < 3 else 0.1),
        (S.Step(BASE, 4), lambda t: 0.1 * 0.1 ** (t // 4)),
        (S.MultiStep(BASE, [7, 3], 0.5), lambda t: 0.1 * 0.5 ** ((t >= 3) + (t >= 7))),
        (S.Exponential(BASE, 0.9), lambda t: 0.1 * 0.9**t),
        (S.Linear(BASE, 0.5, 1.0, 10), lambda t: 0.05 + 0.005 * min(t, 10)),
        (S.Polynomial(BASE, 10, 2.0), lambda t: 0.1 * (1 - min(t, 10) / 10) ** 2),
        (S.Cosine(BASE, 20, 0.02), lambda t: 0.02 + 0.08 * math.cos(math.pi * min(t, 20) / 40) ** 2),
        (S.CosineRestarts(BASE, 5), lambda t: 0.1 * math.cos(math.pi * (t % 5) / 10) ** 2),
        (
            S.CosineRestarts(BASE, 5, 2),
            lambda t: 0.1 * math.cos(math.pi * (t / 10 if t < 5 else (t - 5) / 20 if t < 15 else (t - 15) / 40)) ** 2,
        ),
        (S.Cyclic(0.1, 0.5, 4), lambda t: 0.1 + 0.1 * min(t % 8, 8 - t % 8)),
        (S.Warmup(S.Step(BASE, 4), 8), lambda t: 0.1 * t / 8 if t < 8 else 0.1 * 0.1 ** ((t - 8) // 4)),
        (S.Warmup(BASE, 8, start_factor=0.5), lambda t: 0.05 + 0.05 * min(t, 8) / 8),
        (S.Sequential([0.3, S.Exponential(BASE, 0.5)], [4]), lambda t: 0.3 if t < 4 else 0.1 * 0.5 ** (t - 4)),
        (S.Product([S.Exponential(BASE, 0.9), S.Step(1.0, 5)]), lambda t: 0.1 * 0.9**t * 0.1 ** (t // 5)),
        (S.PerEpoch(S.Exponential(BASE, 0.5), 6), lambda t: 0.1 * 0.5 ** (t // 6)),
        (S.as_schedule(lambda t: 1 / (1 + t)), lambda t: 1 / (1 + t)),
    ],
    ids=lambda x: re.sub(r" at 0x\w+", "", repr(x)),  # the same in every process: workers compare them
)
def test_closed_forms(schedule: S.Schedule, want: Callable[[int], float]) -> None:
    found = S.values(schedule, 24)
    np.testing.assert_allclose(found, [want(t) for t in range(24)], rtol=1e-12, atol=1e-17)
    assert [schedule(t) for t in reversed(range(24))] == found[::-1]  # pure: the same in any order, bit for bit
    assert schedule.state_dict() == {}
    assert not schedule.observes
    assert not schedule.observe(1.0)


PEERS: list[tuple[S.Schedule, str, dict[str, Any], int]] = [
    (S.Constant(BASE, 0.25, 7), "ConstantLR", {"factor": 0.25, "total_iters": 7}, 20),
    (S.Step(BASE, 6, 0.3), "StepLR", {"step_size": 6, "gamma": 0.3}, 30),
    (S.MultiStep(BASE, [4, 9, 9], 0.5), "MultiStepLR", {"milestones": [4, 9, 9], "gamma": 0.5}, 20),
    (S.Exponential(BASE, 0.93), "ExponentialLR", {"gamma": 0.93}, 40),
    (S.Linear(BASE, 0.1, 0.8, 12), "LinearLR", {"start_factor": 0.1, "end_factor": 0.8, "total_iters": 12}, 20),
    (S.Polynomial(BASE, 15, 1.7), "PolynomialLR", {"total_iters": 15, "power": 1.7}, 20),
    (S.Cosine(BASE, 20, 0.01), "CosineAnnealingLR", {"T_max": 20, "eta_min": 0.01}, 21),
    (S.CosineRestarts(BASE, 5, 2, 0.01), "CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 2, "eta_min": 0.01}, 60),
    (S.CosineRestarts(BASE, 7), "CosineAnnealingWarmRestarts", {"T_0": 7}, 30),
    (S.Cyclic(0.01, BASE, 5, 9), "CyclicLR", {"base_lr": 0.01, "max_lr": BASE, "step_size_up": 5, "step_size_down": 9}, 50),
    (
        S.Cyclic(0.01, BASE, 5, mode="triangular2"),
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": BASE, "step_size_up": 5, "mode": "triangular2"},
        50,
    ),
    (
        S.Cyclic(0.01, BASE, 5, mode="exp_range", gamma=0.97),
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": BASE, "step_size_up": 5, "mode": "exp_range", "gamma": 0.97},
        50,
    ),
    (S.OneCycle(BASE, 40), "OneCycleLR", {"max_lr": BASE, "total_steps": 40}, 40),
    (
        S.OneCycle(BASE, 33, 0.4, "linear", 10.0, 100.0),
        "OneCycleLR",
        {
            "max_lr": BASE,
            "total_steps": 33,
            "pct_start": 0.4,
            "anneal_strategy": "linear",
            "div_factor": 10.0,
            "final_div_factor": 100.0,
        },
        33,
    ),
    (
        S.OneCycle(BASE, 50, 0.3, three_phase=True),
        "OneCycleLR",
        {"max_lr": BASE, "total_steps": 50, "pct_start": 0.3, "three_phase": True},
        50,
    ),
]


def _torch_optimizer(torch: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE, momentum=0.9)
    optimizer.step()  # torch warns if a scheduler steps before the optimiser
    return optimizer


@pytest.mark.parametrize(("schedule", "peer", "options", "steps"), PEERS, ids=[f"{p[1]} {k}" for k, p in enumerate(PEERS)])
def test_schedules_are_those_of_torch(schedule: S.Schedule, peer: str, options: dict[str, Any], steps: int) -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    optimizer = _torch_optimizer(torch)
    more = {"cycle_momentum": False} if peer in ("CyclicLR", "OneCycleLR") else {}
    scheduler = getattr(torch.optim.lr_scheduler, peer)(optimizer, **options, **more)
    theirs = []
    for t in range(steps):
        theirs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if t + 1 < steps:
            scheduler.step()
    # torch multiplies the rate from step to step, so that its roundings add up
    np.testing.assert_allclose(S.values(schedule, steps), theirs, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 1},
        {"patience": 0, "factor": 0.5, "cooldown": 2},
        {"patience": 1, "threshold": 0.2, "threshold_mode": "abs"},
        {"patience": 0, "factor": 0.2, "min_lr": 0.01},
        {"patience": 1, "mode": "max"},
    ],
)
def test_the_plateau_schedule_is_that_of_torch(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    optimizer = _torch_optimizer(torch)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    ours = S.ReduceOnPlateau(BASE, **options)
    for epoch, value in enumerate(PLATEAU):
        assert ours(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), epoch
        theirs.step(value)
        before = ours(epoch)
        assert ours.observe(value) == (ours(epoch) < before)
    assert ours(99) < BASE


def test_the_plateau_schedule_by_hand() -> None:
    s = S.ReduceOnPlateau(1.0, factor=0.5, patience=2, cooldown=1)
    rates = []
    for value in (3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        s.observe(value)
        rates.append(s(0))
    # 2.0 is the best; three values no better: half; one is not counted; three more: half again
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert not s.observe(math.nan)
    assert s.state_dict()["best"] == 2.0


def test_what_is_remembered_comes_back_bit_for_bit_through_json() -> None:
    def make() -> S.Schedule:
        return S.Warmup(S.Product([S.ReduceOnPlateau(S.Cosine(BASE, 100), patience=0, factor=0.3), S.Step(1.0, 7)]), 5)

    a, b = make(), make()
    assert a.observes
    for epoch, value in enumerate(PLATEAU):
        a(epoch)
        a.observe(value)
        b = make()
        b.load_state_dict(json.loads(json.dumps(a.state_dict(), allow_nan=False)))
        assert S.values(b, 60) == S.values(a, 60)
        assert b.state_dict() == a.state_dict()
    assert a(8) < make()(8)
    with pytest.raises(AttributeValueError, match="another schedule"):
        S.Constant(0.1).load_state_dict(a.state_dict())
    with pytest.raises(AttributeValueError, match="another schedule"):
        S.ReduceOnPlateau(0.1).load_state_dict({})


def test_one_cycle_stays_at_its_end() -> None:
    s = S.OneCycle(1.0, 10)
    assert s(9) == s(10) == s(1000) == pytest.approx(1 / 25 / 1e4)
    assert max(S.values(s, 10)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: S.Constant(-1.0),
        lambda: S.Step(0.1, 0),
        lambda: S.Exponential(0.1, 0.0),
        lambda: S.Polynomial(0.1, 0),
        lambda: S.Cosine(0.1, 10, eta_min=0.2),
        lambda: S.CosineRestarts(0.1, 5, T_mult=1.5),  # type: ignore[arg-type]
        lambda: S.Cyclic(0.2, 0.1),
        lambda: S.Cyclic(0.1, 0.2, mode="square"),
        lambda: S.OneCycle(0.1, 10, anneal_strategy="sin"),
        lambda: S.Warmup(0.1, 0),
        lambda: S.Sequential([0.1, 0.2], [3, 4]),
        lambda: S.Product([]),
        lambda: S.PerEpoch(0.1, 0),
        lambda: S.ReduceOnPlateau(0.1, mode="least"),
        lambda: S.ReduceOnPlateau(0.1, factor=1.0),
        lambda: S.as_schedule("fast"),
        lambda: S.Constant(0.1)(-1),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(AttributeValueError):
        make()
