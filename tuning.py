"""A bounded measured search over what the cost models rank best: `tw.compile(..., tune=seconds)`.

Each distinct contraction of a program is made alone with its first few plans and timed on random data, the one with the most
arithmetic first, until the time is up; the fastest plan's rank is the choice, and choices are kept in the cache by what the
contraction computes. What was not reached keeps rank 0, which is what the compiler takes without a search.

Plans differ in how a sum is cut into parts, so a tuned program may differ from an untuned one in the last bits; both are the
same for any number of threads, and a choice once recorded stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from .codegen.assembly import Choices, contractions_of
from .codegen.generate import generate
from .ir.cost import graph_cost
from .ir.graph import Graph
from .ir.program import Program
from .ir.target import Target
from .ir.types import TensorType
from .runtime.binding import Binding
from .runtime.buffers import Array, address_of, empty

CANDIDATES: Final = 6
GAIN: Final = 0.97  # of the first plan's time: what another must reach, lest noise decides
_RUNS: Final = 5

Recall = Callable[[str], int | None]
Record = Callable[[str, int], None]


def tune(graph: Graph, target: Target, threads: int, seconds: float, recall: Recall, record: Record) -> Choices:
    """Ranks of plans, by contraction (`contractions_of`), found within about `seconds`.

    `recall` gives a rank recorded earlier, or None; `record` keeps one that was measured.
    """
    end = time.perf_counter() + seconds
    found: dict[str, int] = {}
    regions = contractions_of(graph, target)
    for key, region in sorted(regions.items(), key=lambda item: -graph_cost(item[1]).flops):
        known = recall(key)
        if known is None and time.perf_counter() < end:
            known = _fastest(key, region, target, threads, end)
            if known is not None:
                record(key, known)
        if known:
            found[key] = known
    return found


def _fastest(key: str, region: Graph, target: Target, threads: int, end: float) -> int | None:
    """The rank of the fastest plan; None if there was no time to try more than one."""
    best: tuple[float, int] | None = None
    seen: set[bytes] = set()
    inputs = [_random(i.tensor) for i in region.inputs]
    tried = 0
    for rank in range(CANDIDATES):
        if time.perf_counter() > end:
            break
        program = generate(region, target, name="tune", threads=threads, choices={key: rank}, texts=False)
        if program.object_code in seen:
            continue  # fewer plans than ranks, or two of the same code
        seen.add(program.object_code)
        took = measure(program, threads, inputs)
        tried += 1
        if best is None or took < (GAIN if best[1] == 0 else 1.0) * best[0]:
            best = (took, rank)
    return best[1] if best is not None and (tried > 1 or rank == CANDIDATES - 1) else None


def measure(program: Program, threads: int, inputs: list[Array] | None = None) -> float:
    """Seconds of a run on these inputs, or random ones: the least of a few, after one to warm up."""
    binding = Binding(program, {}, threads)
    inputs = [_random(a.type) for a in program.inputs] if inputs is None else inputs
    addresses = [address_of(x) for x in inputs]
    out = [empty(o.type.static_shape, o.type.dtype) for o in program.outputs]
    times = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        binding.once(inputs, addresses, out)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _random(t: TensorType) -> Array:
    made = empty(t.static_shape, t.dtype)
    if t.dtype.is_float:
        made[...] = np.random.default_rng(0).standard_normal(t.static_shape, np.float32)
    return made
