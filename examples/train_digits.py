"""Trains a small CNN on scikit-learn's 1,797 handwritten digits. Each training step is one native call.

pip install 'tensorwright[demo]'
python examples/train_digits.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorwright as tw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorwright import losses, nn, optim


class Digits(nn.Module):
    """8x8 images -> 10 classes."""

    def __init__(self) -> None:
        self.c1, self.c2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.drop = nn.Dropout(0.25)
        self.f1, self.f2 = nn.Linear(512, 64), nn.Linear(64, 10)

    def __call__(self, x: Any) -> Any:
        x = tw.relu(self.c1(x))
        x = tw.max_pool2d(tw.relu(self.c2(x)), 2)
        return self.f2(self.drop(tw.relu(self.f1(x.flatten(1)))))


def main(epochs: int = 8) -> float:
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)

    trainer = tw.Trainer(Digits(), loss=losses.cross_entropy, optimizer=optim.Adam(2e-3), metrics=["accuracy"])
    trainer.fit(x, y, epochs=epochs, batch_size=64)
    result = trainer.evaluate(x_test, y_test)
    print(f"on {len(x_test)} digits not trained on: accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}")

    scores = trainer.predict(x_test[:8])
    print("predicted", scores.argmax(-1), "true", y_test[:8])
    return float(result["accuracy"])


if __name__ == "__main__":
    main()
