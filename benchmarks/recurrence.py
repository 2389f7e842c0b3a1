"""The gradient of a sum over a long tanh recurrence with respect to its weight, at batch 1.

    h <- tanh(h W + x_t)   for 1,000 steps;   y = sum(h);   dy/dW

The work is small (32x32 weights), so that what a step of the loop costs besides its arithmetic decides. Each contestant
gives a callable and its result as a list, which is compared with the f64 reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STEPS, WIDTH = 1000, 32
Contestant = tuple[Callable[[], Any], dict[str, Any]]


def weights() -> dict[str, Array]:
    """W of a spectral radius near 1 (its gradient neither dies out nor explodes), the inputs and the first state."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    xs, h = 0.1 * rng.standard_normal((STEPS, 1, WIDTH)), np.zeros((1, WIDTH))
    return {k: v.astype(np.float32) for k, v in {"w": w, "xs": xs, "h": h}.items()}


def reference(given: Mapping[str, Array]) -> list[float]:
    """Back-propagation through time in f64."""
    w, xs, h = (np.asarray(given[k], np.float64) for k in ("w", "xs", "h"))
    states = [h]
    for x in xs:
        states.append(np.tanh(states[-1] @ w + x))
    gradient, dh = np.zeros_like(w), np.ones_like(h)
    for before, after in zip(states[-2::-1], states[:0:-1], strict=True):
        dz = dh * (1 - after * after)
        gradient += before.T @ dz
        dh = dz @ w.T
    return [float(v) for v in gradient.ravel()]


def ours(given: Mapping[str, Array], threads: int) -> Contestant:
    """Tensorwright: one native call."""
    import tensorwright as tw

    def total(w: Any, xs: Any, h: Any) -> Any:
        def cell(h: Any, x: Any) -> Any:
            h = tw.tanh(h @ w + x)
            return h, None

        return tw.scan(cell, h, xs)[0].sum()

    arrays = [given[k] for k in ("w", "xs", "h")]
    exe = tw.compile(tw.grad(total), *(tw.spec(*a.shape) for a in arrays), threads=threads)
    kernels = exe.compiled.run.kernels
    facts = {
        "flops": sum(k.flops for k in kernels),
        "bytes": sum(k.bytes for k in kernels),
        "kernels": len(kernels),
        "peak_bytes": exe.peak_bytes,
    }
    return lambda: exe(*arrays), {"losses": np.asarray(exe(*arrays)).ravel().tolist(), **facts}


def by_jax(given: Mapping[str, Array], threads: int) -> Contestant:
    """JAX: `lax.scan` under `jit`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tensorwright.benchmarks import jax_training

    run = jax_training.recurrence(given["w"], given["xs"], given["h"])
    return run, {"losses": run().ravel().tolist()}


def by_torch(given: Mapping[str, Array], threads: int) -> Contestant:
    """PyTorch eager: a Python loop and autograd."""
    import torch

    torch.set_num_threads(threads)
    w = torch.from_numpy(given["w"]).requires_grad_()
    xs, first = torch.from_numpy(given["xs"]), torch.from_numpy(given["h"])

    def run() -> Any:
        h = first
        for x in xs:
            h = torch.tanh(h @ w + x)
        return torch.autograd.grad(h.sum(), w)[0]

    return run, {"losses": run().ravel().tolist()}


CONTESTANTS: dict[str, Callable[[Mapping[str, Array], int], Contestant]] = {
    "tensorwright": ours,
    "torch": by_torch,
    "jax": by_jax,
}
