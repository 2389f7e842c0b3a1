"""Peak memory of a process that runs one model from a file, ours (`tw.load`) and ONNX Runtime's.

    python -m tensorwright.benchmarks.footprint --models resnet50_b1,bert_b1 --json result.json

Each runs in a process of its own that imports numpy and its library, opens the model, calls it ten times and says its peak. Ours
is measured compiling (the cache is empty), from the cache, and as a Python module whose weights are made at random first, without
and with `release_weights`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorwright.benchmarks.comparison import BenchmarkError, machine
from tensorwright.benchmarks.prepare import prepare
from tensorwright.runtime.threads import available

DEFAULT = ("resnet50_b1", "bert_b1")
CALLS = 10
# What a user would write, and no more: nothing of this package is imported for ONNX Runtime.
_START = """
import sys, numpy as np
folder, threads = sys.argv[1], int(sys.argv[2])
with np.load(folder + "/inputs.npz") as z: inputs = [z[k] for k in sorted(z.files)]
def memory(field): return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))
"""
_END = """
peak = memory("VmHWM")
print(imported, peak, int("torch" in sys.modules))
"""
PROGRAMS = {
    "onnxruntime": """
import onnxruntime as ort
imported = memory("VmRSS")
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
feed = dict(zip((i.name for i in session.get_inputs()), inputs))
for _ in range(CALLS): session.run(None, feed)
""",
    "file": """
import tensorwright as tw
imported = memory("VmRSS")
exe = tw.load(folder + "/model.tw", threads=threads)
for _ in range(CALLS): exe(*inputs)
""",
    "module": """
import tensorwright as tw
from tensorwright.benchmarks import models
imported = memory("VmRSS")
workload = models.INFERENCE[sys.argv[3]]
exe = tw.compile(workload.make(), *workload.arguments, threads=threads)
for _ in range(CALLS): exe(*inputs)
""",
    "released": """
import tensorwright as tw
from tensorwright.benchmarks import models
imported = memory("VmRSS")
workload = models.INFERENCE[sys.argv[3]]
exe = tw.compile(workload.make(), *workload.arguments, threads=threads, release_weights=True)
for _ in range(CALLS): exe(*inputs)
""",
    "save": """
import tensorwright as tw
from tensorwright.benchmarks import models
imported = memory("VmRSS")
workload = models.INFERENCE[sys.argv[3]]
module = workload.make()
module.load_state_dict(dict(np.load(folder + "/weights.npz")))
tw.compile(module, *workload.arguments, cache=False).save(folder + "/model.tw")
""",
}


def program(kind: str, folder: Path, threads: int, name: str, cache: str) -> dict[str, int]:
    """Runs one of the programs; bytes after its imports and at the peak. Raises BenchmarkError with what it said."""
    text = _START + PROGRAMS[kind].replace("CALLS", str(CALLS)) + _END
    words = [sys.executable, "-c", text, str(folder), str(threads), name]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "TENSORWRIGHT_CACHE": cache})
    if done.returncode:
        raise BenchmarkError(f"{name}, {kind}: {done.stderr[-300:]}")
    imported, peak, torch = map(int, done.stdout.split()[-3:])
    if torch:
        raise BenchmarkError(f"{name}, {kind}: torch was imported, and is part of the figure")
    return {"imported": imported, "peak": peak}


def measure(name: str, threads: int) -> dict[str, Any]:
    """Peak memory in bytes of every way to run a workload."""
    with tempfile.TemporaryDirectory() as text:
        folder, cache = Path(text), f"{text}/cache"
        prepare(name, folder)
        program("save", folder, threads, name, "off")
        found = {
            "ours_cold": program("file", folder, threads, name, cache),
            "ours_warm": program("file", folder, threads, name, cache),
            "ours_module": program("module", folder, threads, name, "off"),
            "ours_released": program("released", folder, threads, name, "off"),
        }
        if (folder / "model.onnx").exists():
            try:
                found["onnxruntime"] = program("onnxruntime", folder, threads, name, cache)
            except BenchmarkError as error:
                print(f"  {error}", file=sys.stderr)
        weights = (folder / "weights.npz").stat().st_size
    return {"name": name, "threads": threads, "weights": weights, **found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tensorwright.benchmarks.footprint", description=__doc__)
    parser.add_argument("--models", default=",".join(DEFAULT))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    count, rows = args.threads or available(), []
    for name in args.models.split(","):
        row = measure(name, count)
        rows.append(row)
        shown = "  ".join(
            f"{k} {v['peak'] / 1e6:.0f} MB ({v['imported'] / 1e6:.0f})" for k, v in row.items() if isinstance(v, dict)
        )
        peer = row.get("onnxruntime")
        against = f"  {row['ours_cold']['peak'] / peer['peak']:.2f}x of ONNX Runtime's" if peer else "  ONNX Runtime is not here"
        print(f"{name:<14} weights {row['weights'] / 1e6:.0f} MB  {shown}{against}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(count), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
