"""What a memory budget costs: peak memory and time of a training step with and without one, and that no bit differs.

    python -m tensorwright.benchmarks.memory --model resnet18_b32 --share 0.5 --json result.json

The budget is parameters, gradients, optimiser state and a share of the activations that the step keeps without a budget.
Both steps run in turn in one process, so that what disturbs one disturbs the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks import models
from tensorwright.benchmarks.comparison import machine
from tensorwright.benchmarks.training import RATE, batch, initial_weights
from tensorwright.driver import build
from tensorwright.frontend.training import training_step
from tensorwright.runtime.threads import available
from tensorwright.settings import flags


def measure(name: str, share: float, rounds: int, threads: int) -> dict[str, Any]:
    """The figures for one workload. Raises RuntimeError if a bit of the state differs after two steps."""
    workload = models.TRAINING[name]
    assert workload.target is not None
    module = workload.make()
    module.load_state_dict(initial_weights(name))
    traced = training_step(module, tw.losses.cross_entropy, tw.optim.Adam(RATE), *workload.arguments, workload.target)
    now = replace(flags(), threads=threads)

    def step(budget: int | None) -> Any:
        return build(traced.graph, traced.initial_state(), purpose="training", now=now, memory_budget=budget)

    whole = step(None)
    gradients = sum(p.data.nbytes for _, p in module.named_parameters())
    budget = whole.memory.state + gradients + int(whole.memory.activations * share)
    start = time.perf_counter()
    tight = step(budget)
    seconds = time.perf_counter() - start
    arrays, rate = batch(name), np.array(RATE, np.float32)
    for _ in range(2):
        whole(rate, *arrays)
        tight(rate, *arrays)
    one, two = whole.parameters, tight.parameters
    if differing := [k for k in one if one[k].tobytes() != two[k].tobytes()]:
        raise RuntimeError(f"{name}: the state differs after two steps: {differing[:5]}")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for exe, found in zip((whole, tight), times, strict=True):
            start = time.perf_counter()
            exe(rate, *arrays)
            found.append(time.perf_counter() - start)
    medians = [statistics.median(t) * 1e3 for t in times]
    return {
        "name": name,
        "threads": threads,
        "budget": budget,
        "memory": whole.memory.as_dict(),
        "memory_within": tight.memory.as_dict(),
        "remat": None if tight.remat is None else tight.remat.as_dict(),
        "ms": medians[0],
        "ms_within": medians[1],
        "ratio": medians[1] / medians[0],
        "ratio_of_fastest": min(times[1]) / min(times[0]),
        "compile_seconds_within": seconds,
        "text": f"{whole.memory}\n{tight.remat}\n{tight.memory}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tensorwright.benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="resnet18_b32", choices=list(models.TRAINING))
    parser.add_argument("--share", type=float, default=0.5, help="of the activations that may be kept (default 0.5)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    row = measure(args.model, args.share, args.rounds, args.threads or available())
    print(row.pop("text"))
    print(
        f"{row['ms']:.1f} ms a step without a budget, {row['ms_within']:.1f} within it: {row['ratio']:.2f}x "
        f"({row['ratio_of_fastest']:.2f}x of the fastest); every bit of the state the same"
    )
    if args.json:
        text = json.dumps({"machine": machine(row["threads"]), "rows": [row]}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
