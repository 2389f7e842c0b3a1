"""Softmax, layer norm and gelu against PyTorch: kernels that are bound by memory and by vector math.

    python -m tensorwright.benchmarks.rowwise --json result.json

Everyone writes into memory that is there already: a fresh array of 64 MB costs more in page faults than the kernel. The
roofline is a copy of the same size by our own code, measured in the same rounds. Errors are against an evaluation in f64.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.benchmarks.comparison import Comparison, columns
from tensorwright.benchmarks.contest import contestants, serve, take_turns

Array = np.ndarray[Any, Any]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One function of one array, and the largest relative error that it may have.

    `tolerance` is f32's rounding (6e-8) times a few: the longest sum has 1,024 terms in a tree, exp and erf are exact to 4 ULP.
    """

    shape: tuple[int, ...]
    make: Callable[[], Any]
    tolerance: float = 1e-6


class _LayerNorm(nn.Module):
    """With weights other than one and zero, so that they are used."""

    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(7)
        self.n = nn.LayerNorm(width, eps=EPS)
        self.n.weight.data = rng.uniform(0.5, 1.5, width).astype(np.float32)
        self.n.bias.data = rng.uniform(-0.5, 0.5, width).astype(np.float32)

    def __call__(self, x: Any) -> Any:
        return self.n(x)


CASES: dict[str, Case] = {
    "softmax_4096x1024": Case((4096, 1024), lambda: lambda x: tw.softmax(x, -1)),
    "layernorm_4096x1024": Case((4096, 1024), lambda: _LayerNorm(1024)),
    "gelu_16m": Case((1 << 24,), lambda: tw.gelu),
}


def case_input(name: str) -> Array:
    """Normal numbers; the first row of a matrix is large, so that a softmax without its maximum would overflow."""
    x = np.random.default_rng(1).standard_normal(CASES[name].shape).astype(np.float32)
    x[:1] *= 100.0
    return x


def installed_peers() -> list[str]:
    """The peers that can take part here."""
    return ["torch"] if importlib.util.find_spec("torch") is not None else []


# ---------------------------------------------------------------------------------------------------- contestants


def ours(name: str, threads: int) -> tuple[Callable[[], Array], dict[str, Any]]:
    """Tensorwright, writing into `out`."""
    case = CASES[name]
    exe = tw.compile(case.make(), tw.spec(*case.shape), threads=threads)
    x, out = case_input(name), np.empty(case.shape, np.float32)
    kernels = exe.compiled.run.kernels
    return lambda: exe(x, out=out), {"flops": sum(k.flops for k in kernels), "kernels": [k.name for k in kernels]}


def copy(name: str, threads: int) -> tuple[Callable[[], Array], dict[str, Any]]:
    """The same traffic and no arithmetic to speak of."""
    case = CASES[name]
    exe = tw.compile(lambda x: -x, tw.spec(*case.shape), threads=threads)
    x, out = case_input(name), np.empty(case.shape, np.float32)
    return lambda: exe(x, out=out), {}


def by_torch(name: str, threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """PyTorch eager in the fastest form that writes into memory that is there already, or allocates, if that is faster."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    x = torch.from_numpy(case_input(name))
    y = torch.empty_like(x)
    forms: dict[str, Callable[[], Any]]
    if name.startswith("softmax"):
        forms = {
            "torch.softmax(out=)": lambda: torch.softmax(x, -1, out=y),
            "torch.softmax": lambda: torch.softmax(x, -1),
        }
    elif name.startswith("layernorm"):
        norm = _LayerNorm(x.shape[-1]).n
        w, b = (torch.from_numpy(np.array(p.data)) for p in (norm.weight, norm.bias))
        mean, rstd = torch.empty(x.shape[0], 1), torch.empty(x.shape[0], 1)
        shape = [x.shape[-1]]
        native = torch.ops.aten.native_layer_norm.out
        forms = {
            "aten.native_layer_norm.out": lambda: native(x, shape, w, b, EPS, out0=y, out1=mean, out2=rstd)[0],
            "torch.nn.functional.layer_norm": lambda: torch.nn.functional.layer_norm(x, shape, w, b, EPS),
        }
    else:
        forms = {
            "aten.gelu.out": lambda: torch.ops.aten.gelu.out(x, out=y),
            "torch.nn.functional.gelu": lambda: torch.nn.functional.gelu(x),
        }
    best = min(forms, key=lambda f: _seconds(forms[f]))
    return forms[best], {"form": best}


def _seconds(run: Callable[[], Any]) -> float:
    """The median of a few calls."""
    run()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]


CONTESTANTS = {"tensorwright": ours, "copy": copy, "torch": by_torch}


def reference(name: str) -> Array:
    """The result in f64, by the ops' definitions in numpy."""
    from tensorwright.ir.dtypes import f64
    from tensorwright.ir.interp import run as interpret

    case = CASES[name]
    model = case.make()
    traced = tw.trace(model, tw.spec(*case.shape))
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    x = case_input(name)
    return interpret(traced, [state.get(str(i.attrs["name"]), x) for i in traced.inputs], dtype=f64)[0]


# ---------------------------------------------------------------------------------------------------- the comparison


def measure(name: str, peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """One row. Raises RuntimeError if Tensorwright fails, or its result is wrong."""
    names = ("tensorwright", "copy", *peers)
    with tempfile.TemporaryDirectory() as folder:
        words = {c: (c, name, f"{folder}/{c}.npy") for c in names}
        with contestants("tensorwright.benchmarks.rowwise", words, threads, name) as running:
            if "tensorwright" not in running or "copy" not in running:
                raise RuntimeError(f"{name}: Tensorwright itself failed")
            take_turns(running, rounds)
            facts = {c: p.facts for c, p in running.items()}
        want = reference(name)
        scale = float(np.max(np.abs(want)))
        errors = {c: float(np.max(np.abs(np.load(words[c][2]) - want))) / scale for c in facts if c != "copy"}
    if not errors["tensorwright"] <= CASES[name].tolerance:
        raise RuntimeError(f"{name}: relative error {errors['tensorwright']:.1e}, expected at most {CASES[name].tolerance:.0e}")
    moved = 2 * 4 * int(np.prod(CASES[name].shape))
    row = columns(name, threads, running, flops=facts["tensorwright"]["flops"], nbytes=moved, aside="copy")
    floor = running["copy"].median
    return row | {
        "copy_ms": floor,
        "fraction_of_peak": floor / row["ours_ms"],
        "max_rel_error": errors.pop("tensorwright"),
        "peers_max_rel_error": errors,
        "forms": {c: f["form"] for c, f in facts.items() if "form" in f},
        "kernels": facts["tensorwright"]["kernels"],
    }


def remark(r: Mapping[str, Any]) -> str:
    """Memory traffic of a row beside that of a copy."""
    return f"copy {r['copy_ms']:.3f}  {r['gbps']:.1f} GB/s ({r['fraction_of_peak']:.0%} of a copy's)  {r['gflops']:.1f} GFLOP/s"


COMPARISON = Comparison(
    "tensorwright bench kernels --rowwise", __doc__, tuple(CASES), tuple(CASES), installed_peers, measure, remark
)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--worker"]:
        _, contestant, name, result, threads = words
        serve(lambda: CONTESTANTS[contestant](name, int(threads)), result, int(threads))
        return
    COMPARISON.main(words)


if __name__ == "__main__":
    main()
