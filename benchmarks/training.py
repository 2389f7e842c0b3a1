"""Whole training steps against PyTorch eager: forward, loss, backward and Adam, one native call each.

    python -m tensorwright.benchmarks.training --models demo_b64,transformer_b8 --json result.json

Every contestant starts from the same weights (by name, from a file) and repeats the step on the same batch. PyTorch takes
part with Adam as it comes and with `fused=True`, convolutions in channels last. Before anything is timed, the losses of
the first three steps are compared with PyTorch's in f64.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks import models
from tensorwright.benchmarks.contest import contestants, geometric_mean, serve, take_turns
from tensorwright.benchmarks.inference import machine
from tensorwright.driver import build
from tensorwright.frontend.nn.init import seed
from tensorwright.frontend.training import TracedStep, training_step
from tensorwright.settings import flags

Array = np.ndarray[Any, Any]
DEFAULT = ("mlp_b64", "demo_b64", "cifar_b64", "transformer_b8")
PEERS = ("torch", "torch_fused")
RATE = 1e-3
STEPS = 3  # whose losses are compared
# Adam divides by the root of a tiny second moment in its first steps, so that a gradient of rounding errors moves a weight by
# as much as a real one: losses part faster than gradients do.
TOLERANCE = 1e-4


def installed_peers() -> list[str]:
    """The peers that can take part here."""
    return list(PEERS) if importlib.util.find_spec("torch") is not None else []


# ---------------------------------------------------------------------------------------------------- contestants


def compiled_step(name: str, weights: Mapping[str, Array], threads: int, optimizer: Any = None) -> tuple[Any, TracedStep]:
    """The Executable of a workload's training step and what it was traced to; Adam unless given otherwise."""
    workload = models.TRAINING[name]
    assert workload.target is not None
    module = workload.make()
    module.load_state_dict(dict(weights))
    optimizer = tw.optim.Adam(RATE) if optimizer is None else optimizer
    traced = training_step(module, tw.losses.cross_entropy, optimizer, *workload.arguments, workload.target)
    return build(traced.graph, traced.state, purpose="training", now=replace(flags(), threads=threads)), traced


def batch(name: str) -> list[Array]:
    """The model's arguments and the target."""
    return models.TRAINING[name].inputs()


def ours(name: str, weights: Mapping[str, Array], threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Tensorwright: one native call."""
    exe, _ = compiled_step(name, weights, threads)
    arrays, rate = batch(name), np.array(RATE, np.float32)
    losses = [float(exe(rate, *arrays)) for _ in range(STEPS)]
    kernels = exe.compiled.run.kernels
    facts = {
        "losses": losses,
        "flops": sum(k.flops for k in kernels),
        "bytes": sum(k.bytes for k in kernels),
        "kernels": len(kernels),
        "peak_bytes": exe.peak_bytes,
    }
    return lambda: exe(rate, *arrays), facts


def by_torch(
    name: str, weights: Mapping[str, Array], threads: int, fused: bool = False
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """PyTorch eager."""
    import torch
    from tensorwright.benchmarks import torch_training

    torch.set_num_threads(threads)
    module = torch_training.model(name, weights)
    x, target = map(torch.from_numpy, batch(name))
    if x.ndim == 4:
        module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = (
        torch.optim.Adam(module.parameters(), lr=RATE, fused=True) if fused else torch.optim.Adam(module.parameters(), lr=RATE)
    )
    run = torch_training.step(module, optimizer, x, target)
    return run, {"losses": [float(run()) for _ in range(STEPS)]}


CONTESTANTS: dict[str, Callable[..., tuple[Callable[[], Any], dict[str, Any]]]] = {
    "tensorwright": ours,
    "torch": by_torch,
    "torch_fused": functools.partial(by_torch, fused=True),
}


def reference_losses(name: str, weights: Mapping[str, Array]) -> list[float]:
    """Losses of the first steps by PyTorch in f64."""
    import torch
    from tensorwright.benchmarks import torch_training

    module = torch_training.model(name, weights).double()
    x, target = map(torch.from_numpy, batch(name))
    run = torch_training.step(
        module, torch.optim.Adam(module.parameters(), lr=RATE), x.double() if x.is_floating_point() else x, target
    )
    return [float(run()) for _ in range(STEPS)]


# ---------------------------------------------------------------------------------------------------- the comparison


def initial_weights(name: str) -> dict[str, Array]:
    """Weights of the workload's model, the same in every process."""
    seed(0)
    return {k: np.asarray(v) for k, v in models.TRAINING[name].make().state_dict().items()}


def measure(name: str, peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """One row. Raises RuntimeError if Tensorwright fails, or its losses are wrong."""
    weights = initial_weights(name)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/weights.npz", **weights)  # type: ignore[arg-type]
        words = {c: (c, name, folder) for c in ("tensorwright", *peers)}
        with contestants("tensorwright.benchmarks.training", words, threads, name) as running:
            if "tensorwright" not in running:
                raise RuntimeError(f"{name}: Tensorwright itself failed")
            take_turns(running, rounds)
            times = {c: p.median for c, p in running.items()}
            spread = {c: p.spread for c, p in running.items()}
            facts = {c: p.facts for c, p in running.items()}
    error = None
    if any(p in PEERS for p in peers):
        want = reference_losses(name, weights)
        error = max(abs(a - b) / abs(b) for a, b in zip(facts["tensorwright"]["losses"], want, strict=True))
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name}: losses {facts['tensorwright']['losses']}, expected {want}")
    mine = times.pop("tensorwright")
    best = min(times, key=times.__getitem__, default=None)
    gflops = facts["tensorwright"]["flops"] / mine * 1e-6
    from tensorwright.driver import measured_peak
    from tensorwright.runtime.host import host

    return {
        "name": name,
        "threads": threads,
        "ours_ms": mine,
        "peers_ms": times,
        "best_peer": best,
        "ratio_to_best": times[best] / mine if best else None,
        "ratios": {c: t / mine for c, t in times.items()},
        "ratio_undisturbed": min(spread[c][0] for c in times) / spread["tensorwright"][0] if best else None,
        "spread_ms": spread,
        "gflops": gflops,
        "gbps": facts["tensorwright"]["bytes"] / mine * 1e-6,
        "fraction_of_peak": gflops / measured_peak(host(), threads),
        "max_rel_error": error,
        "losses": {c: f["losses"] for c, f in facts.items()},
        "kernels": facts["tensorwright"]["kernels"],
        "peak_bytes": facts["tensorwright"]["peak_bytes"],
        "seconds_to_first_result": {c: f["ready"] for c, f in facts.items()},
    }


def run(
    names: str | None = None, peers: str | None = None, threads: int | None = None, quick: bool = False
) -> list[dict[str, Any]]:
    """The rows. Raises InputError for an unknown workload or peer."""
    from tensorwright.ir.errors import InputError
    from tensorwright.runtime.threads import available

    chosen = names.split(",") if names else list(DEFAULT)
    if unknown := [n for n in chosen if n not in models.TRAINING]:
        raise InputError(f"unknown workloads {unknown}; expected some of {', '.join(models.TRAINING)}")
    there = installed_peers()
    against = [p for p in peers.split(",") if p] if peers is not None else there
    if unknown := [p for p in against if p not in there]:
        raise InputError(f"peers {unknown} are not installed here; there are {', '.join(there) or 'none'}")
    return [measure(n, against, threads or available(), 3 if quick else 12) for n in chosen]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, ratios first: of medians, and of first deciles, which a busy machine disturbs less."""
    lines = []
    for r in rows:
        ratio = "no peer" if r["best_peer"] is None else f"{r['ratio_to_best']:.2f}x of {r['best_peer']}"
        if best := r["ratio_undisturbed"]:
            ratio += f" ({best:.2f}x)"
        others = "  ".join(f"{c} {t:.3f} ({t / r['ours_ms']:.2f}x)" for c, t in r["peers_ms"].items())
        error = "" if r["max_rel_error"] is None else f"  error of losses {r['max_rel_error']:.1e}"
        lines.append(
            f"{ratio:<30} {r['name']:<15} ours {r['ours_ms']:.3f} ms a step  {others}  {r['gflops']:.1f} GFLOP/s "
            f"({r['fraction_of_peak']:.0%} of peak)  {r['kernels']} kernels{error}"
        )
    mean = geometric_mean([r["ratio_to_best"] for r in rows if r["ratio_to_best"]])
    if mean is not None:
        lines.append(f"{mean:.2f}x of the best peer (geometric mean)")
    return "\n".join(lines)


def report(rows: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """What --json writes."""
    mean = geometric_mean([r["ratio_to_best"] for r in rows if r["ratio_to_best"]])
    return {"machine": machine(threads), "rows": list(rows), "geomean_ratio": mean}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--worker"]:
        _, contestant, name, folder, threads = words
        weights = dict(np.load(f"{folder}/weights.npz"))
        serve(lambda: CONTESTANTS[contestant](name, weights, int(threads)), f"{folder}/{contestant}.npy", int(threads))
        return
    parser = argparse.ArgumentParser(prog="tensorwright bench training", description=__doc__)
    parser.add_argument("--models", default=None, help=f"some of {', '.join(models.TRAINING)}, separated by commas")
    parser.add_argument("--peers", default=None, help=f"some of {', '.join(PEERS)} (default: what is installed)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(words)
    rows = run(args.models, args.peers, args.threads, args.quick)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(report(rows, rows[0]["threads"]), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
