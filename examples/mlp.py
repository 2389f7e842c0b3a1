"""A multilayer perceptron becomes one native program: compile, call, look inside, save and load.

python examples/mlp.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import tensorwright as tw
from tensorwright import nn


def main() -> None:
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10), nn.Softmax())
    print(net.summary(tw.spec(1, 784)))

    started = time.perf_counter()
    exe = tw.compile(net, tw.spec(1, 784))
    print(f"\ncompiled in {time.perf_counter() - started:.2f} s; stages: {', '.join(exe.stages)}")

    x = np.random.default_rng(0).standard_normal((1, 784)).astype(np.float32)
    y = exe(x)
    print(f"probabilities: {np.round(y, 3)}, sum {y.sum():.6f}")

    count = 10_000
    started = time.perf_counter()
    for _ in range(count):
        exe(x)
    print(f"{(time.perf_counter() - started) / count * 1e6:.1f} microseconds a call, from Python")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlp.tw"
        exe.save(path)
        again = tw.load(path)
        assert np.array_equal(again(x), y)
        print(f"saved and loaded: {path.stat().st_size:,} bytes, the same result")


if __name__ == "__main__":
    main()
