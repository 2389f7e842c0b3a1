"""Products beside cuBLAS, through torch or CuPy where one is installed with CUDA: figures printed (pytest -s), results compared.

No time is asserted: there is no figure of a GPU yet that a limit could come from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.runtime.cuda.device import Device

from .test_device import libraries

pytestmark = [pytest.mark.gpu, pytest.mark.unvalidated("the passes are validated elsewhere")]
SIZES = ((1024, 1024, 1024), (4096, 4096, 4096), (64, 4096, 4096), (4096, 64, 4096))
_RUNS, _TIMES = 7, 20


def seconds(work: Callable[[int], None]) -> float:
    """The median time of one of `_TIMES` runs; `work` runs so often and waits."""
    work(_TIMES)
    found = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        work(_TIMES)
        found.append((time.perf_counter() - start) / _TIMES)
    return statistics.median(found)


Peer = tuple[str, Callable[[int], None], np.ndarray]


def cublas(a: np.ndarray, b: np.ndarray, precision: str) -> Peer | None:
    """Who calls cuBLAS here, the product there, and its result; None without torch or CuPy."""
    there = [module for module, _ in libraries()]
    if "torch" in there:
        return _torch(a, b, precision)
    return _cupy(a, b) if "cupy" in there and precision == "f32" else None


def _torch(a: np.ndarray, b: np.ndarray, precision: str) -> Peer:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, y = (torch.from_numpy(v).cuda().to(kind) for v in (a, b))
    z = torch.empty((len(a), b.shape[1]), device="cuda", dtype=kind)

    def work(n: int) -> None:
        for _ in range(n):
            torch.matmul(x, y, out=z)
        torch.cuda.synchronize()

    work(1)
    return "cuBLAS through torch", work, z.float().cpu().numpy()


def _cupy(a: np.ndarray, b: np.ndarray) -> Peer:
    import cupy

    x, y = cupy.asarray(a), cupy.asarray(b)

    def work(n: int) -> None:
        for _ in range(n):
            cupy.matmul(x, y)
        cupy.cuda.Device().synchronize()

    return "cuBLAS through CuPy", work, cupy.matmul(x, y).get()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", ["f32", "tf32", "bf16"])
def test_products(size: tuple[int, int, int], precision: str, gpu: Device, sm: int) -> None:
    if precision != "f32" and sm < 80:
        precision = "f32"
    m, n, k = size
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    exe: Any = tw.compile(lambda x, y: x @ y, tw.spec(m, k), tw.spec(k, n), target="cuda", precision=precision)
    ours = exe(a, b)
    binding = exe._bound(exe._latest)
    t = seconds(binding.again)
    estimated = exe.profile(estimate=True).microseconds
    line = f"{m}x{n}x{k} {precision}: {t * 1e6:.1f} us, {2 * m * n * k / t * 1e-12:.2f} TFLOP/s (estimate {estimated:.1f} us)"
    peer = cublas(a, b, precision)
    if peer is None:
        print(f"\n{line}; neither torch with CUDA nor CuPy is installed: nothing to compare with")
        reference = a @ b
    else:
        who, work, reference = peer
        other = seconds(work)
        print(f"\n{line}; {who}: {other * 1e6:.1f} us, ours takes {t / other:.2f} times as long")
    # each of k products is rounded, to 8 bits in bf16: both results are this far from the exact one at most
    error = {"f32": 1e-6, "tf32": 2e-3, "bf16": 2e-2}[precision] * np.sqrt(k) * 4
    assert np.abs(ours - reference).max() <= error * max(1.0, np.abs(reference).max() / np.sqrt(k))
