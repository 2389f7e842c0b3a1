"""Which of nine categories is this emoji? A CNN on 32x32 colour images, in two forms, with a validation set.

pip install 'tensorwright[examples]'
python examples/fetch.py emoji
python examples/emoji_cnn.py                   # both forms: at least 65% of the emoji they have not seen

Data: 1,906 emoji as images, with their categories (npm emoji-datasource-google 16.0.0). A fifth is set apart for the test and a
tenth of the rest for validation. No emoji is in two parts, but some look alike (a man, a woman, a person doing the same). Flips,
shifts and colour jitter make more of the training images.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from sklearn.model_selection import train_test_split
from support import need, run
from tensorwright import callbacks, losses, nn, optim, regularizers


class Plain(nn.Module):
    """3x3 conv 32, pool, dropout .25, 3x3 conv 64, pool, dropout .25, 128, dropout .5, classes."""

    def __init__(self, classes: int) -> None:
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(64 * 8 * 8, 128), nn.Linear(128, classes)
        self.drop1, self.drop2, self.drop3 = nn.Dropout(0.25), nn.Dropout(0.25), nn.Dropout(0.5)

    def __call__(self, x: Any) -> Any:
        x = self.drop1(tw.max_pool2d(tw.relu(self.conv1(x)), 2))
        x = self.drop2(tw.max_pool2d(tw.relu(self.conv2(x)), 2))
        return self.fc2(self.drop3(tw.relu(self.fc1(x.flatten(1)))))


class Normalised(nn.Module):
    """Convolutions 32, 64, 64, each with batch norm and pool, and a dense layer of 64 before the classes."""

    def __init__(self, classes: int) -> None:
        channels = [3, 32, 64, 64]
        self.convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(channels)]
        self.norms = [nn.BatchNorm2d(c) for c in channels[1:]]
        self.fc1, self.fc2 = nn.Linear(64 * 4 * 4, 64), nn.Linear(64, classes)

    def __call__(self, x: Any) -> Any:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = tw.max_pool2d(tw.relu(norm(conv(x))), 2)
        return self.fc2(tw.relu(self.fc1(x.flatten(1))))


def augment(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Half of the images mirrored; shifted by up to 3 pixels; brightness, contrast and each colour changed by up to a fifth."""
    x = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    framed = np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)), constant_values=1)  # in white, as the images are
    corners = rng.integers(0, 7, (len(x), 2))
    x = np.stack([f[:, top : top + 32, left : left + 32] for f, (top, left) in zip(framed, corners, strict=True)])
    brightness, contrast = rng.uniform(-0.2, 0.2, (len(x), 1, 1, 1)), rng.uniform(0.8, 1.2, (len(x), 1, 1, 1))
    colour = rng.uniform(0.8, 1.2, (len(x), 3, 1, 1))
    return ((x - 0.5) * contrast * colour + 0.5 + brightness).astype(np.float32), y


def load(data: Path, seed: int) -> tuple[list[Any], list[Any], list[str]]:
    """Images (n, 3, 32, 32) f32 from 0 to 1 and labels, each of training, validation and test; the classes."""
    with np.load(need(data / "emoji.npz")) as file:
        x = (file["images"].transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)
        y, classes = file["labels"].astype(np.int64), file["classes"].tolist()
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.1, stratify=y, random_state=seed)
    return [x, x_valid, x_test], [y, y_valid, y_test], classes


def trainers(classes: int, seed: int) -> dict[str, tw.Trainer]:
    """Both forms, each with what trains it."""
    tw.seed(seed)
    return {
        "plain": tw.Trainer(
            Plain(classes), loss=losses.cross_entropy, optimizer=optim.Adam(2e-3), metrics=["accuracy"], seed=seed
        ),
        "normalised": tw.Trainer(
            Normalised(classes),
            loss=losses.cross_entropy,
            optimizer=optim.SGD(0.01, momentum=0.9),
            regularizers={"*.weight": regularizers.L1L2(l1=1e-5, l2=1e-4)},
            metrics=["accuracy"],
            seed=seed,
        ),
    }


def fit(trainer: tw.Trainer, x: Any, y: Any, validation: tuple[Any, Any], epochs: int) -> None:
    """Trains until the validation set says that nothing more comes of it, or for so many epochs."""
    watch = [callbacks.ReduceOnPlateau(factor=0.5, patience=5), callbacks.EarlyStopping(patience=20)]
    trainer.fit(x, y, epochs=epochs, batch_size=128, validation_data=validation, augment=augment, callbacks=watch)


def main(data: Path, epochs: int = 120, seed: int = 0) -> dict[str, Any]:
    (x, x_valid, x_test), (y, y_valid, y_test), classes = load(data, seed)
    figures = {}
    for name, trainer in trainers(len(classes), seed).items():
        fit(trainer, x, y, (x_valid, y_valid), epochs)
        result = trainer.evaluate(x_test, y_test)
        print(f"{name}: {result['accuracy']:.4f} of {len(x_test)} emoji not seen before")
        figures |= {f"{name}_accuracy": result["accuracy"], f"{name}_epochs": len(trainer.history)}
    return figures


if __name__ == "__main__":
    run(main, at_least={"plain_accuracy": 0.65, "normalised_accuracy": 0.65})
