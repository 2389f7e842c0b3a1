"""What a call needs of memory is known before it runs, adds up, and is what the process then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwright import cli
from tensorwright.codegen.arena import arena_use
from tensorwright.codegen.memory_plan import Problem, Task, plan_memory
from tensorwright.driver import build
from tensorwright.frontend.training import training_step
from tensorwright.ir.memory import ArenaUse, MemoryReport, show_bytes

from .codegen.test_memory_plan import problem_from

_CHILD = """
import gc, json, os, sys
import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.driver import build
from tensorwright.frontend.training import training_step
from tensorwright.runtime.buffers import block

class Net(nn.Module):
    def __init__(self):
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(16)])
    def __call__(self, x):
        for layer in self.layers:
            x = tw.tanh(layer(x) * 0.5)
        return x

def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

specs = tw.spec(4096, 256), tw.spec(4096, 256)
traced = training_step(Net(), tw.losses.mse, tw.optim.Adam(1e-3), *specs)
state = traced.state
batch = np.array(1e-3, np.float32), *(np.ones((4096, 256), np.float32) for _ in specs)
budget = json.loads(sys.argv[1])
def make():
    return build(traced.graph, state, purpose="training", memory_budget=budget)
if sys.argv[2] == "warm":  # so that the measuring process takes the program from the cache, without LLVM in its memory
    make()
    sys.exit()
small = tw.compile(lambda x: x + 1, tw.spec(3))
small(np.ones(3, np.float32))
r0 = resident()
exe = make()
r1 = resident()
said = exe.memory.as_dict()
exe(*batch)
r2 = resident()
for _ in range(3):
    exe(*batch)
r3 = resident()
print(json.dumps({"said": said, "bound": r1 - r0, "first": r2 - r1, "later": r3 - r2, "cached": exe.compiled.from_cache}))
"""
HUGE = 2 * 1024 * 1024  # memory comes in pages of this size where the system has them


def measured(cache: Path, budget: int | None) -> dict[str, Any]:
    env = os.environ | {"TENSORWRIGHT_CACHE": str(cache), "TENSORWRIGHT_VALIDATE": "0", "TENSORWRIGHT_VERIFY": "0"}
    env["TENSORWRIGHT_THREADS"] = "1"
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # arrays in pages of their own: none in room that the heap has left over
    for mode in ("warm", "measure"):
        words = [sys.executable, "-c", _CHILD, json.dumps(budget), mode]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_the_process_takes_what_the_report_said(tmp_path: Path) -> None:
    """The tolerance: two huge pages at the ends of the arena, and 1.5 MB for Python objects, the object file and stacks."""
    budget = None
    for least in (60_000_000, 30_000_000):
        found = measured(tmp_path, budget)
        said = found["said"]
        assert found["cached"]
        assert said["total"] <= (budget or said["total"])
        assert said["arena"] > least, "the arena is too small for the measurement to show it"
        fresh = said["arena"] + said["outputs"]
        assert fresh - said["at_peak"]["gaps"] - 2 * HUGE <= found["first"] <= fresh + 2 * HUGE + 1_500_000
        own = said["state"] + said["prepared"] + said["constants"]
        assert own - 1_500_000 <= found["bound"] <= own + 2 * HUGE + 4_000_000
        assert found["later"] <= 500_000, "a later call takes memory that the report does not know of"
        budget = said["total"] * 3 // 4


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 40))
def test_the_account_of_the_arena_adds_up(seed: int) -> None:
    problem = problem_from(seed)
    plan = plan_memory(problem)
    use = arena_use(problem, plan)
    assert use.total == plan.arena_bytes
    assert min(use.activations, use.gradients, use.intermediates, use.workspace, use.gaps, use.kept) >= 0


def test_purposes_follow_from_what_reads_what() -> None:
    """w, m: state; a = f(x, w), loss = g(a); d = b(a); dw = c(d, x); w', m' = update(w, m, dw)."""
    n = 64
    w, m, x, a, loss, d, dw, w2, m2 = range(9)
    tasks = (
        Task("f", (x, w), (a,)), Task("g", (a,), (loss,)), Task("b", (a,), (d,), 300), Task("c", (d, x), (dw,)),
        Task("update", (w, m, dw), (w2, m2), 0, frozenset({(0, 0), (1, 1)})),
    )  # fmt: skip
    sizes = (4 * n, 4 * n, 8 * n, 16 * n, 4, 32 * n, 4 * n, 4 * n, 4 * n)
    problem = Problem(sizes, 3, 0, (w2, m2, loss), tasks, ((0, 0), (1, 1)))
    use = arena_use(problem, plan_memory(problem))
    assert (use.kept, use.activations, use.intermediates, use.workspace) == (16 * n, 16 * n, 32 * n, 320)
    assert use.kernel == "b" and use.gradients == 0
    big = (*sizes[:dw], 400 * n, *sizes[dw + 1 :])
    late = arena_use(
        Problem(big, 3, 0, (w2, m2, loss), tasks, ((0, 0), (1, 1))), plan_memory(Problem(big, 3, 0, (w2, m2, loss), tasks))
    )
    assert late.gradients == 400 * n and late.intermediates == 32 * n and late.kernel == "c"


def test_the_report_of_a_step_names_its_parts() -> None:
    tw.nn.init.seed(0)
    net = tw.nn.Sequential(tw.nn.Linear(20, 64), tw.nn.ReLU(), tw.nn.Linear(64, 3))
    traced = training_step(net, tw.losses.cross_entropy, tw.optim.Adam(), tw.spec(128, 20), tw.spec(128, dtype="i64"))
    exe = build(traced.graph, traced.initial_state(), purpose="training")
    report = exe.memory
    assert report.state == sum(v.nbytes for v in traced.state.values())
    assert report.inputs == 128 * 20 * 4 + 128 * 8 + 4 and report.outputs == 4
    assert (
        report.total
        == exe.peak_bytes
        == sum((report.state, report.prepared, report.inputs, report.outputs, report.constants, report.arena))
    )
    assert report.at_peak.total == report.arena and 0 < report.activations == report.at_peak.kept
    assert json.loads(json.dumps(report.as_dict()))["at_peak"]["kept"] == report.activations
    text = str(report)
    assert text.startswith(f"peak memory of one call: {show_bytes(report.total)}\n")
    for word in ("state", "inputs", "outputs", "arena", "activations", "kept for the backward half"):
        assert word in text


def test_weights_that_are_prepared_are_told_apart() -> None:
    exe = tw.compile(tw.nn.Linear(64, 64), tw.spec(16, 64))
    assert exe.memory.prepared + exe.memory.state == sum(
        a.type.nbytes for a in exe.compiled.run.inputs if a.name not in {n for n, _ in exe.arguments}
    )
    assert ("prepared weights" in str(exe.memory)) == (exe.memory.prepared > 0)
    assert MemoryReport(0, 0, 8, 4, 0, 0).total == 12 and ArenaUse().total == 0


def test_the_command_line_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.py"
    model.write_text(
        "import tensorwright as tw\n"
        "def f(x, w):\n"
        "    kept = [x := tw.tanh(x @ w) for _ in range(6)]\n"
        "    for v in reversed(kept):\n"
        "        x = tw.sin(x @ w) * tw.exp(v)\n"
        "    return x\n"
    )
    words = ["inspect", f"{model}:f", "--spec", "128,64", "--spec", "64,64", "--memory"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("peak memory of one call: ") and "arena" in text and "memory budget" not in text
    total = tw.compile(_same, tw.spec(128, 64), tw.spec(64, 64)).peak_bytes
    assert cli.main([*words, "--memory-budget", str(total - 2 * 128 * 64 * 4)]) == 0
    assert "values recomputed by" in capsys.readouterr().out
    assert cli.main([*words, "--memory-budget", "1000"]) == 1
    assert "the least peak that recomputation reached is" in capsys.readouterr().err


def _same(x: Any, w: Any) -> Any:
    kept = [x := tw.tanh(x @ w) for _ in range(6)]
    for v in reversed(kept):
        x = tw.sin(x @ w) * tw.exp(v)
    return x


def test_bytes_are_shown_in_powers_of_ten() -> None:
    assert [show_bytes(n) for n in (0, 999, 1000, 1234567, 5 * 10**9)] == ["0 B", "999 B", "1.00 kB", "1.23 MB", "5.00 GB"]
    assert np.int64(show_bytes(7).split()[0]) == 7
