"""Every op record for every SM: emitted, assembled by ptxas with no spills, and run on the PTX interpreter against f64 numpy.

    python tests/cuda/sweep.py [--sm 75,80,90] [--no-run] [--models] [--train] [OP ...]

`--models` does the models too (emitted and assembled, forward and training step), `--train` three steps of the demo's CNN on
its own batches of 64 digits, on the interpreter and on this processor. Exits with 1 where something failed. LLVM may
end the process: run it as a child of whatever must not end.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script: imports from the checkout come after this, hence E402

import tensorwright as tw  # noqa: E402
from tensorwright import driver  # noqa: E402
from tensorwright.benchmarks import models  # noqa: E402
from tensorwright.codegen.cuda.generate import generate  # noqa: E402
from tensorwright.frontend.tracing import trace_model  # noqa: E402
from tensorwright.frontend.training import training_step  # noqa: E402
from tensorwright.ir.graph import Graph  # noqa: E402
from tensorwright.ir.lowering import Attention  # noqa: E402
from tensorwright.ir.op import REGISTRY, Op, Trait  # noqa: E402
from tensorwright.ir.target import row  # noqa: E402
from tensorwright.runtime.cuda.binding import CudaBinding, DeviceStore  # noqa: E402
from tensorwright.runtime.cuda.device import Device  # noqa: E402
from tensorwright.runtime.cuda.emulator import Emulator  # noqa: E402
from tensorwright.runtime.cuda.tools import assemble  # noqa: E402
from tensorwright.settings import flags  # noqa: E402

from tests.codegen.programs import error  # noqa: E402
from tests.codegen.test_lower_ops import cases, together  # noqa: E402

OPS = [op for op in REGISTRY.values() if not op.has(Trait.STRUCTURAL)]
FORWARD = ("demo_b64", "resnet18_b32", "transformer_b8", "bilstm_b32")


def check_op(op: Op, sm: int, *, run: bool, device: Device | None = None, every: int = 1) -> list[str]:
    """What is wrong with an op's samples on an SM, or with one of so many; empty where nothing is.

    They run on the interpreter, or a device."""
    some = cases(op)[::every]
    if not some:
        return [f"{op.name} has no samples"]
    graph, arrays = together(some, (Attention,))
    program = generate(graph, row(f"cuda-sm_{sm}"), verify=True)
    wrong = assemble(program.ptx, sm).wrong if program.kernels and device is None else []
    if run:
        binding = CudaBinding(program, {}, DeviceStore(device or Emulator(1 << 27, sm=sm)))
        out = binding.run([np.ascontiguousarray(a) for a in arrays])
        results = out if isinstance(out, tuple) else (out,)
        for k, (s, _, _, _, expected) in enumerate(some):
            found = error(results[k], expected)
            if not found <= s.budget:
                wrong.append(f"sample {k} {s.label} {dict(s.attrs)}: error {found:.2e}, the budget is {s.budget:.0e}")
        binding.close()
    return wrong


@functools.lru_cache(maxsize=1)  # one for all SMs
def traced(name: str, train: bool) -> tuple[Graph, Mapping[str, Any]]:
    """The graph of a workload, or of its training step with Adam, and its weights."""
    w = (models.INFERENCE | models.TRAINING)[name]
    with driver.tracing_for("cuda", flags()):
        if not train:
            found = trace_model(w.make(), *w.arguments)
            return found.graph, found.values()
        step = training_step(models.TRAINING[name].make(), tw.losses.cross_entropy, tw.optim.Adam(1e-3), *w.arguments, w.target)
        return step.graph, step.state


def check_model(name: str, sm: int, *, train: bool) -> list[str]:
    """What ptxas says against a workload's program and the one that prepares its weights, or against its training step."""
    graph, weights = traced(name, train)
    purpose = "training" if train else "inference"
    made: Any = driver.build(graph, weights, purpose=purpose, target=f"cuda-sm_{sm}").compiled
    programs = [p for p in (made.run, made.prepare) if p is not None and p.kernels]
    if made.run not in programs:
        return [f"{name} has no kernels"]
    return [x for p in programs for x in assemble(p.ptx, sm).wrong]


def train_demo() -> list[str]:
    """What is wrong with the losses of the demo's first three steps on the interpreter."""
    from tensorwright import demo

    from tests.cuda.test_training import losses

    x, y, _, _ = demo.digits()
    n = 3 * demo.BATCH
    batches = x[:n].reshape(3, demo.BATCH, *x.shape[1:]), y[:n].reshape(3, demo.BATCH)
    found, expected = losses("cuda-emulator", *batches), losses(None, *batches)
    return [] if np.abs(np.subtract(found, expected)).max() <= 1e-4 else [f"losses {found}, on the processor {expected}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--sm", default="75,80,90", help="SMs with commas between")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    failed = 0

    def report(name: str, wrong: list[str], start: float) -> None:
        nonlocal failed
        failed += bool(wrong)
        print(f"{name:40} {time.perf_counter() - start:6.2f} s  {'ok' if not wrong else '; '.join(wrong)}", flush=True)

    if args.train:
        start = time.perf_counter()
        report("the demo's CNN, three steps", train_demo(), start)
    for sm in map(int, args.sm.split(",") if args.sm else ()):
        for op in OPS:
            if args.ops and op.name not in args.ops:
                continue
            start = time.perf_counter()
            try:
                wrong = check_op(op, sm, run=not args.no_run)
            except tw.TensorwrightError as e:
                wrong = [f"{type(e).__name__}: {e}"]
            report(f"sm_{sm} {op.name}", wrong, start)
        for name in FORWARD if args.models else ():
            for train in (False, True):
                start = time.perf_counter()
                report(f"sm_{sm} {name} {'step' if train else 'forward'}", check_model(name, sm, train=train), start)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
