"""ResNet-18 without half its channels: trained on emoji, pruned, trained on, timed, and handed to ONNX Runtime.

pip install 'tensorwright[examples,onnx]'
python examples/fetch.py emoji
python examples/resnet18_pruned.py             # at least twice as fast with half its parameters or fewer

Data: emoji of 32x32 pixels (npm emoji-datasource-google 16.0.0). Training is short: what counts here is what pruning takes away.
With ONNX Runtime installed (pip install 'tensorwright[bench]'), the exported file is run there and compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from emoji_cnn import augment, load
from support import run
from tensorwright import losses, optim
from tensorwright.benchmarks.models import ResNet18


def milliseconds(*models: tw.nn.Module, shape: tuple[int, ...], rounds: int) -> list[float]:
    """The median time of a call of each, taking turns."""
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    exes = [tw.compile(m, x) for m in models]
    times: list[list[float]] = [[] for _ in exes]
    for _ in range(rounds):
        for exe, found in zip(exes, times, strict=True):
            exe(x)
            start = time.perf_counter()
            exe(x)
            found.append(time.perf_counter() - start)
    return [float(np.median(t)) * 1e3 for t in times]


def in_onnx_runtime(model: tw.nn.Module, images: Any) -> dict[str, Any]:
    """The most channels that a convolution of the exported file has; how far ONNX Runtime's results are from ours at most, of the
    largest one (no figure where it is not installed)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.onnx"
        file = tw.onnx.save(tw.trace(model, images), path, parameters=model.state_dict())
        figures: dict[str, Any] = {"onnx_channels": max(x.dims[0] for x in file.graph.initializer if len(x.dims) == 4)}
        if importlib.util.find_spec("onnxruntime") is None:
            print("ONNX Runtime is not installed: the exported file was not run")
            return figures
        session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (theirs,) = session.run(None, {session.get_inputs()[0].name: images})
    ours = tw.compile(model, images)(images)
    return {**figures, "onnx_difference": float(np.abs(ours - theirs).max() / np.abs(ours).max())}


def main(
    data: Path,
    epochs: int = 2,
    more: int = 8,
    ratio: float = 0.5,
    width: int = 64,
    rate: float = 0.02,
    rounds: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    (x, x_valid, x_test), (y, y_valid, y_test), classes = load(data, seed)
    tw.seed(seed)
    widths = tuple(width << k for k in range(4))
    net, whole = (ResNet18(widths, len(classes)) for _ in range(2))

    def fit(epochs: int, rate: float) -> float:
        """Trains the network as it is now; its accuracy on emoji that it has not seen, NaN without training."""
        if not epochs:
            return float("nan")
        optimizer = optim.SGD(rate, momentum=0.9)
        options: dict[str, Any] = {"loss": losses.cross_entropy, "metrics": ["accuracy"], "seed": seed}
        trainer = tw.Trainer(net, optimizer=optimizer, **options)
        trainer.fit(x, y, epochs=epochs, batch_size=64, validation_data=(x_valid, y_valid), augment=augment)
        return float(trainer.evaluate(x_test, y_test)["accuracy"])

    before = fit(epochs, rate)
    pruned = tw.prune(net, tw.spec(1, 3, 32, 32), ratio=ratio, pattern="channels")
    after = fit(more, rate / 2)
    net.eval()
    whole.eval()
    slow, fast = milliseconds(whole, net, shape=(1, 3, 32, 32), rounds=rounds)
    figures = in_onnx_runtime(net, x_test[:8])
    return {
        "dense_accuracy": before,
        "pruned_accuracy": after,
        "lost_points": 100 * (before - after),
        "parameters": pruned.parameters_after / pruned.parameters_before,
        "dense_ms": slow,
        "pruned_ms": fast,
        "faster": slow / fast,
        **figures,
    }


if __name__ == "__main__":
    run(main, at_least={"faster": 2.0}, at_most={"parameters": 0.5, "lost_points": 2.0, "onnx_difference": 1e-4})
