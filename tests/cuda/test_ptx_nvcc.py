"""PTX that nvcc made from five CUDA C++ kernels runs right on the interpreter, with all checks on."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tensorwright.ir.errors import KernelFaultError
from tensorwright.runtime.cuda.ptx_parse import parse_ptx

from .ptx_support import Out, run

FOLDER = Path(__file__).parent / "nvcc"
PTX = (FOLDER / "kernels.ptx").read_text()
R = np.random.default_rng(0)


def test_the_module_holds_the_five_kernels_of_the_source() -> None:
    module = parse_ptx(PTX)
    source = (FOLDER / "kernels.cu").read_text()
    assert len(module.kernels) == 5
    assert all(f"__global__ void {name}(" in source for name in module.kernels)
    lines = {i.source for i in module.kernels["saxpy"].code}
    row = next(k for k, text in enumerate(source.splitlines(), 1) if "a * x[i] + y[i]" in text)
    assert f"kernels.cu:{row}" in lines


def test_saxpy() -> None:
    x, y = R.standard_normal((2, 1000), np.float32)
    got, _ = run(PTX, "saxpy", (3,), (96,), [1000, 2.5, x, y])
    wanted = np.float64(2.5) * x + y
    assert np.abs(got[1] - wanted).max() < 1e-6


@pytest.mark.parametrize(("m", "n", "k"), [(33, 20, 41), (16, 16, 16), (1, 50, 3)])
def test_sgemm(m: int, n: int, k: int) -> None:
    a, b = R.standard_normal((m, k), np.float32), R.standard_normal((k, n), np.float32)
    got, _ = run(PTX, "sgemm", (-(-n // 16), -(-m // 16)), (16, 16), [a, b, Out((m, n)), m, n, k], extents=True)
    assert np.abs(got[2] - a.astype("f8") @ b).max() < 1e-5


def test_softmax_with_dynamic_shared_memory() -> None:
    x = R.standard_normal((5, 333), np.float32) * 4
    x[2, 7], x[3] = 90, -np.inf
    x[3, 5] = 0
    got, _ = run(PTX, "softmax", (5,), (128,), [x, Out((5, 333)), 333], shared=16, extents=True)
    e = np.exp(x.astype("f8") - x.max(1, keepdims=True))
    assert np.abs(got[1] - e / e.sum(1, keepdims=True)).max() < 1e-6
    with pytest.raises(KernelFaultError, match=r"out of bounds: kernel softmax: .*shared"):
        run(PTX, "softmax", (5,), (128,), [x, Out((5, 333)), 333], shared=8)


def test_histogram_with_atomics() -> None:
    x = R.integers(0, 256, 3000).astype(np.uint8)
    h, positions = np.zeros(257, np.uint32), np.full(3000, -1, np.int32)
    got, _ = run(PTX, "histogram", (4,), (128,), [x, 3000, h, positions])
    assert (got[1][:256] == np.bincount(x, minlength=256)).all()
    assert got[1][256] == (x == 255).sum()
    assert sorted(got[2][got[2] >= 0]) == np.flatnonzero(x == 255).tolist()


def test_a_tensor_core_gemm_with_asynchronous_copies() -> None:
    m, n, k = 32, 24, 96
    a, b = (R.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((m, k), (n, k)))
    args = [a.view(np.uint16), b.view(np.uint16), Out((m, n)), m, n, k]
    got, _ = run(PTX, "gemm_bf16", (n // 8, m // 16), (32,), args, extents=True)
    assert np.abs(got[2] - a.astype("f8") @ b.astype("f8").T).max() < 1e-4
