"""`tensorwright demo`: a small CNN learns real handwritten digits, and every stage of the compiler is shown on the way.

The data are scikit-learn's 1,797 digits of 8x8 pixels, split 80/20, stratified. Training runs a compiled step; the
accuracy is that of the compiled inference program on the 20% it has not seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from .commands.model import console as wide_console
from .commands.model import passes_table
from .driver import compile as compile_model
from .frontend import losses, nn, optim
from .frontend.nn.init import seed as seed_weights
from .frontend.specs import spec
from .ir.errors import InputError, RuntimeUnavailableError
from .ir.interp import run as interpret
from .passes import pipeline
from .passes.manager import run_pipeline
from .runtime import host
from .runtime.buffers import Array
from .runtime.executable import Executable
from .settings import config, flags
from .training.trainer import Trainer

BATCH: Final = 64
_TOP: Final = 12  # kernels shown


def digits() -> tuple[Array, Array, Array, Array]:
    """(train images, train labels, test images, test labels); images f32[N, 1, 8, 8] in 0 to 1, labels i64[N].

    Raises RuntimeUnavailableError when scikit-learn, which holds the data, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeUnavailableError("the demo's data come with scikit-learn: pip install 'tensorwright[demo]'") from error
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    x, x2, y, y2 = train_test_split(images, data.target.astype(np.int64), test_size=0.2, stratify=data.target, random_state=0)
    return x, y, x2, y2


def cnn() -> nn.Module:
    """Two convolutions with batch norm, a pooling and two dense layers: 8x8 pixels to 10 scores."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(seed: int, epochs: int, data: Sequence[Array], verbose: bool) -> tuple[Trainer, float]:
    """(trainer, test accuracy) of one training from scratch."""
    x, y, x2, y2 = data
    seed_weights(seed)
    trainer = Trainer(
        cnn(),
        loss=losses.cross_entropy,
        optimizer=optim.Adam(2e-3),
        metrics=["accuracy"],
        learning_rate=_cosine(2e-3, epochs * -(-len(x) // BATCH)),
        seed=seed,
    )
    trainer.fit(x, y, epochs=epochs, batch_size=BATCH, verbose=verbose)
    return trainer, trainer.evaluate(x2, y2, batch_size=120)["accuracy"]


def _cosine(peak: float, steps: int) -> Any:
    return lambda step: peak * 0.5 * (1 + np.cos(np.pi * min(step / steps, 1)))


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo; the figures."""
    console = wide_console()
    start = time.perf_counter()
    row = host.resolve(args.target or flags().target).name
    if lacking := host.missing_features(row):
        raise InputError(
            f"the demo runs what it compiles, and this machine cannot run {row}: it lacks {', '.join(lacking)}; "
            f"targets that run here: {', '.join(host.runnable_rows())}"
        )
    data = digits()
    console.print(f"[bold]Data[/]: {len(data[0])} images to train on, {len(data[2])} to test, 8x8 pixels, 10 classes")

    console.rule("1. The training step: forward, backward and Adam, compiled to one native program")
    with config(dump=args.dump):
        trainer, first = train(0, args.epochs, data, verbose=True)
        exe = compile_model(trainer.model, spec(1, 1, 8, 8), target=args.target, name="digits")
    step = trainer.step
    assert step is not None
    compiled = step.compiled
    console.print(passes_table(compiled))
    console.print(f"Known before a step ran: {step.memory}", highlight=False)

    console.rule("2. Its kernels, against the measured peak of this machine")
    batch = (np.array(1e-4, np.float32), data[0][:BATCH], data[1][:BATCH])
    ours, numpy_ms = _against_numpy(step, batch)
    profile = step.profile(*batch)
    console.print(profile.table(_TOP))
    speedup = numpy_ms / ours
    console.print(
        f"One step of {BATCH} images: {ours:.3f} ms; the same graph in numpy: {numpy_ms:.1f} ms: [bold]{speedup:.0f}x[/]"
    )

    console.rule("3. Inference, one image at a time")
    image = data[2][:1]
    micros = _median_ms(lambda: exe(image), 200) * 1e3
    console.print(f"One image takes {micros:.1f} microseconds, from Python, all in ({len(exe.compiled.run.kernels)} kernels)")
    scores = exe(image)
    console.print(_picture(image[0, 0]))
    console.print(f"seen as {int(np.argmax(scores))}, labelled {int(data[3][0])}")

    trainings = "one training" if args.seeds == 1 else f"{args.seeds} trainings"
    console.rule(f"4. Accuracy on {len(data[2])} unseen images, {trainings}")
    accuracies = [first]
    for seed in range(1, args.seeds):
        accuracies.append(train(seed, args.epochs, data, verbose=False)[1])
    for seed, accuracy in enumerate(accuracies):
        console.print(f"  seed {seed}: {accuracy:.4f}")
    median = statistics.median(accuracies)
    seconds = time.perf_counter() - start
    dumps = sorted(p for p in Path(args.dump).rglob("*.txt"))
    console.print(f"Median test accuracy [bold]{median:.4f}[/], {seconds:.1f} s in all")
    console.print(f"Every stage as text: {len(dumps)} files in {args.dump}/")
    return {
        "test_accuracy": median,
        "accuracies": accuracies,
        "seconds": seconds,
        "peak_bytes": step.peak_bytes,
        "memory": step.memory.as_dict(),
        "passes": [asdict(p) for p in compiled.passes],
        "kernels": profile.to_dict()["kernels"],
        "peak_gflops": profile.peak_gflops,
        "threads": profile.threads,
        "target": compiled.run.target.name,
        "step_milliseconds": ours,
        "numpy_step_milliseconds": numpy_ms,
        "speedup_over_numpy": speedup,
        "inference_microseconds": micros,
        "dumps": len(dumps),
        "history": trainer.history,
    }


def _against_numpy(step: Executable, batch: Sequence[Array]) -> tuple[float, float]:
    """Milliseconds of one step, ours and the numpy interpreter's, on the same graph; the state is put back afterwards."""
    before = step.parameters
    graph = run_pipeline(step.graph, pipeline.parse("gradient,drop_marks"))
    arrays = {**before, **dict(zip((n for n, _ in step.arguments), batch, strict=True))}
    numpy_ms = _median_ms(lambda: interpret(graph, arrays), 1)
    ours = _median_ms(lambda: step(*batch), 100)
    step.set_parameters(before)
    return ours, numpy_ms


def _median_ms(fn: Any, repeats: int) -> float:
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _picture(image: Array) -> str:
    return "\n".join("  " + "".join(" .:-=+*#%@"[min(int(v * 9.99), 9)] * 2 for v in row) for row in image)
