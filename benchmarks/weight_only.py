"""GPT-2's decoding with weights of 32, 16, 8 and 4 bits, and of codebooks: times, and how far the logits move.

    python -m tensorwright.benchmarks.weight_only --json result.json

One token after 255 others, batch 1, from one process: the executables take turns, a few calls each. A step reads every weight
once, so its time is that of the weights' bytes. Errors are those of the logits against 32 bits, as part of the largest and as
root of the mean squares. Weights are random, so a perplexity would say nothing, and errors are those of weights without outliers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks import models
from tensorwright.benchmarks.comparison import machine
from tensorwright.benchmarks.priority import quiet
from tensorwright.passes.weight_only import weight_only
from tensorwright.runtime.threads import available

FORMS: dict[str, tuple[int, int] | dict[str, Any]] = {  # bits and group of weight_only, or arguments of tw.quantize
    "fp32": (0, 0),
    "bfloat16": {"weights": "bfloat16"},
    "float16": {"weights": "float16"},
    "int8": (8, 0),
    "int8 by 64": (8, 64),
    "codebook8": {"weights": "codebook8"},
    "int4 by 64": (4, 64),
    "int4 by 32": (4, 32),
    "codebook4 by 64": {"weights": "codebook4", "group": 64},
    "codebook4 by 32": {"weights": "codebook4", "group": 32},
}
WORKLOAD = "gpt2dec_b1"
CALLS = 4  # in a turn, of which the first is not counted: it finds the caches as another left them
WARM = 30  # calls before: weights' pages become huge, and threads are chosen


def measure(threads: int, seconds: float, forms: Sequence[str] = tuple(FORMS)) -> list[dict[str, Any]]:
    """A row for each form: milliseconds (median, first decile), their ratios to fp32, bytes of prepared weights, errors."""
    quiet()
    workload = models.INFERENCE[WORKLOAD]
    model = workload.make()
    values = {name: np.asarray(v) for name, v in model.state_dict().items()}
    graph, inputs = tw.trace(model, *workload.arguments), workload.inputs()
    runs: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    exact: Any = None
    for name in forms:
        exe = _compiled(graph, values, name, threads)
        logits = np.array(exe(*inputs)[0], np.float64)
        exact = logits if exact is None else exact
        apart = logits - exact
        rows[name] = {
            "name": name,
            "threads": threads,
            "max_error": float(np.abs(apart).max() / np.abs(exact).max()),
            "rms_error": float(np.sqrt(np.mean(apart**2) / np.mean(exact**2))),
            "same_token": bool(logits.argmax() == exact.argmax()),
        }
        runs[name] = exe
    times: dict[str, list[float]] = {name: [] for name in forms}
    for exe in runs.values():
        for _ in range(WARM):
            exe(*inputs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, exe in runs.items():
            for k in range(CALLS):
                begin = time.perf_counter()
                exe(*inputs)
                if k:
                    times[name].append((time.perf_counter() - begin) * 1e3)
    base = times[forms[0]]
    for name, row in rows.items():
        row["ms"], row["ms_p10"] = statistics.median(times[name]), float(np.quantile(times[name], 0.1))
        row["ratio"] = statistics.median(base) / row["ms"]
        row["ratio_p10"] = float(np.quantile(base, 0.1)) / row["ms_p10"]
    return list(rows.values())


def _compiled(graph: tw.Graph, values: Mapping[str, Any], name: str, threads: int) -> tw.Executable:
    form = FORMS[name]
    if isinstance(form, tuple):
        made = weight_only(graph, *form) if form[0] else graph
        return tw.compile(made, parameters=values, threads=threads)
    whole = tw.Graph(graph.inputs, graph.outputs, graph.output_names, graph.name, (), {}, values)
    return tw.compile(tw.quantize(whole, None, activations=None, **form), threads=threads)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, ratios first."""
    lines = [
        "| weights | ratio to fp32 (first deciles) | ms | logits: largest error | rms | same token |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        error = f"{r['max_error']:.1e} | {r['rms_error']:.1e} | {'yes' if r['same_token'] else 'no'}"
        lines.append(f"| {r['name']} | **{r['ratio']:.2f}** ({r['ratio_p10']:.2f}) | {r['ms']:.2f} | {error} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tensorwright.benchmarks.weight_only", description=__doc__)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    count = args.threads or available()
    rows = measure(count, args.seconds)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(count), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
