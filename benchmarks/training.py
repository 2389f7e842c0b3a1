"""Whole training steps against the peers: forward, loss, backward and Adam, one native call each.

    python -m tensorwright.benchmarks.training --models demo_b64,transformer_b8 --json result.json

Every contestant starts from the same weights (by name, from a file) and repeats the step on the same batch. PyTorch takes
part eagerly with Adam as it comes, with `fused=True` and with channels last besides, and compiled; JAX with `jit`, TensorFlow
with `tf.function`. Before anything is timed, the losses of the first three steps are compared with PyTorch's in f64.

`recurrence_t1000` is the gradient of a tanh recurrence of 1,000 steps over a state of 32 with respect to its weight, at batch
1: no step, but what the overhead of a loop shows best.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks import models, recurrence
from tensorwright.benchmarks.comparison import Comparison, columns
from tensorwright.benchmarks.contest import contestants, take_turns
from tensorwright.benchmarks.serving import serve
from tensorwright.driver import build
from tensorwright.frontend.nn.init import seed
from tensorwright.frontend.training import TracedStep, training_step
from tensorwright.settings import flags

Array = np.ndarray[Any, Any]
RECURRENCE = "recurrence_t1000"
WORKLOADS = (*models.TRAINING, RECURRENCE)
DEFAULT = ("mlp_b64", "demo_b64", "cifar_b64", "resnet18_b32", "bilstm_b32", "transformer_b8", RECURRENCE)
PEERS = {  # and the package that each needs
    "torch": "torch",
    "torch_fused": "torch",
    "torch_channels_last": "torch",
    "torch_compile": "torch",
    "jax": "jax",
    "tensorflow": "tensorflow",
}
RATE = 1e-3
STEPS = 3  # whose losses are compared
# Adam divides by the root of a tiny second moment in its first steps, so that a gradient of rounding errors moves a weight by
# as much as a real one: losses part faster than gradients do.
TOLERANCE = 1e-4


def installed_peers() -> list[str]:
    """The peers that can take part here."""
    return [p for p, package in PEERS.items() if importlib.util.find_spec(package) is not None]


def known_peers() -> dict[str, str]:
    """Every peer: "" if it can take part here, else why not."""
    there = installed_peers()
    return {p: "" if p in there else f"{m} is not installed (pip install 'tensorwright[bench]')" for p, m in PEERS.items()}


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
    name: str,
    weights: Mapping[str, Array],
    threads: int,
    fused: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """PyTorch, eager or compiled."""
    if compiled:  # before the import: a pool of compile processes would stay and slow every contestant
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch
    from tensorwright.benchmarks import torch_training

    torch.set_num_threads(threads)
    module = torch_training.model(name, weights)
    x, target = map(torch.from_numpy, batch(name))
    if channels_last:
        module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=fused or None)
    run = torch_training.step(module, optimizer, x, target, compiled=compiled)
    return run, {"losses": [float(run()) for _ in range(STEPS)]}


def by_jax(name: str, weights: Mapping[str, Array], threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """JAX on as many cores as the process may use."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tensorwright.benchmarks import jax_training

    x, target = batch(name)
    run = jax_training.step(name, weights, x, target, RATE)
    return run, {"losses": [float(run()) for _ in range(STEPS)]}


def by_tensorflow(name: str, weights: Mapping[str, Array], threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """TensorFlow with a `tf.function`."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf
    from tensorwright.benchmarks import tf_training

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    x, target = batch(name)
    run = tf_training.step(name, weights, x, target, RATE)
    return run, {"losses": [float(run()) for _ in range(STEPS)]}


CONTESTANTS: dict[str, Callable[..., tuple[Callable[[], Any], dict[str, Any]]]] = {
    "tensorwright": ours,
    "torch": by_torch,
    "torch_fused": functools.partial(by_torch, fused=True),
    "torch_channels_last": functools.partial(by_torch, fused=True, channels_last=True),
    "torch_compile": functools.partial(by_torch, fused=True, compiled=True),
    "jax": by_jax,
    "tensorflow": by_tensorflow,
}


def takes_part(peer: str, name: str) -> bool:
    """Whether a peer has an entry for a workload: channels last is for images, the recurrence is of those who have a scan."""
    if name == RECURRENCE:
        return peer in recurrence.CONTESTANTS
    return peer != "torch_channels_last" or len(models.TRAINING[name].arguments[0].type.shape) == 4


def enter(contestant: str, name: str, weights: Mapping[str, Array], threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A contestant's callable for a workload, and what there is to say about it."""
    if name == RECURRENCE:
        return recurrence.CONTESTANTS[contestant](weights, threads)
    return CONTESTANTS[contestant](name, weights, threads)


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
    if name == RECURRENCE:
        return recurrence.weights()
    seed(0)
    return {k: np.asarray(v) for k, v in models.TRAINING[name].make().state_dict().items()}


def measure(name: str, peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """One row. Raises RuntimeError if Tensorwright fails, or its losses are wrong."""
    weights = initial_weights(name)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/weights.npz", **weights)  # type: ignore[arg-type]
        words = {c: (c, name, folder) for c in ("tensorwright", *(p for p in peers if takes_part(p, name)))}
        with contestants("tensorwright.benchmarks.training", words, threads, name) as running:
            if "tensorwright" not in running:
                raise RuntimeError(f"{name}: Tensorwright itself failed")
            take_turns(running, rounds)
            facts = {c: p.facts for c, p in running.items()}
    errors: dict[str, float] = {}
    if name == RECURRENCE or "torch" in installed_peers():
        want = np.asarray(recurrence.reference(weights) if name == RECURRENCE else reference_losses(name, weights))
        errors = {c: float(np.abs(np.asarray(f["losses"]) - want).max() / np.abs(want).max()) for c, f in facts.items()}
        if not errors["tensorwright"] <= TOLERANCE:
            raise RuntimeError(f"{name}: {facts['tensorwright']['losses']}, expected {want.tolist()}")
    from tensorwright.driver import measured_peak
    from tensorwright.runtime.host import host

    own = facts["tensorwright"]
    row = columns(name, threads, running, flops=own["flops"], nbytes=own["bytes"])
    return row | {
        "fraction_of_peak": row["gflops"] / measured_peak(host(), threads),
        "max_rel_error": errors.get("tensorwright"),
        "errors": errors,
        "kernels": own["kernels"],
        "peak_bytes": own["peak_bytes"],
    }


def remark(r: Mapping[str, Any]) -> str:
    """Arithmetic and kernels of a row."""
    return f"{r['gflops']:.1f} GFLOP/s ({r['fraction_of_peak']:.0%} of peak)  {r['kernels']} kernels"


COMPARISON = Comparison("tensorwright bench training", __doc__, WORKLOADS, DEFAULT, known_peers, measure, remark)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--worker"]:
        _, contestant, name, folder, threads = words
        weights = dict(np.load(f"{folder}/weights.npz"))
        serve(lambda: enter(contestant, name, weights, int(threads)), f"{folder}/{contestant}.npy", int(threads))
        return
    COMPARISON.main(words)


if __name__ == "__main__":
    main()
