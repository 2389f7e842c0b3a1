"""`tw.compress` on a ResNet-18 trained here, in ten settings: is any model slower, or less accurate, than was asked?

    python examples/fetch.py emoji
    python -m tensorwright.benchmarks.compress [--data FOLDER] [--weights FILE.npz] [--settings 1,4] [--json FILE] [--html FILE]

ResNet-18 (images of 32x32) learns the emoji of examples/emoji_cnn.py for some epochs, or its weights are taken from a file. Each
setting then is one call of `tw.compress` on the emoji that were not learned from. What it returns is measured anew: its accuracy
on them, and its time against the original's, in turns. The times that the report predicted for each layer are held against those
that it measured in the model that it returned.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorwright as tw
from tensorwright.benchmarks.harness import Array, interleaved, median, quiet
from tensorwright.benchmarks.kernels import machine
from tensorwright.benchmarks.models import ResNet18
from tensorwright.driver import build
from tensorwright.ir.graph import Graph
from tensorwright.ir.graphs import specialize

SIDE: Final = 32
TEST: Final = 0.2  # the share of images that is not learned from
EPOCHS: Final = 5
BATCH: Final = 128
EACH: Final = 64  # images in a batch of the data
SECONDS: Final = 1.5  # for each of two models that take turns
SLOWER: Final = 1.02  # what two measurements of one model may differ by: no slower than this is no slower
DRAWN: Final = 4e-16  # rounding of a difference of two shares


@dataclass(frozen=True)
class Setting:
    """One call of tw.compress."""

    max_drop: float
    objective: str
    kinds: tuple[str, ...] | None
    batch: int

    @property
    def name(self) -> str:
        """In a table."""
        kinds = "all kinds" if self.kinds is None else " + ".join(self.kinds)
        return f"{self.objective}, drop {self.max_drop:g}, {kinds}, batch {self.batch}"


SETTINGS: Final = (
    Setting(0.01, "latency", None, 1),
    Setting(0.0, "latency", None, 1),
    Setting(0.05, "latency", None, 1),
    Setting(0.01, "latency", None, 16),
    Setting(0.01, "latency", ("int8",), 1),
    Setting(0.005, "latency", ("bf16",), 8),
    Setting(0.02, "latency", ("sparse",), 1),
    Setting(0.01, "latency", ("int8 weights", "int4 weights"), 1),
    Setting(0.01, "size", None, 1),
    Setting(0.0, "size", ("int8 weights", "int4 weights", "int8"), 4),
)


def images(folder: Path) -> tuple[Array, Array, Array, Array, int]:
    """Images to learn from and their labels, images and labels to test with, and how many classes there are."""
    file = folder / "emoji.npz"
    if not file.exists():
        sys.exit(f"error: there is no {file}; fetch it: python examples/fetch.py emoji")
    with np.load(file) as found:
        x = (found["images"].transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)
        y, classes = found["labels"].astype(np.int64), len(found["classes"])
    order = np.random.default_rng(0).permutation(len(x))
    test = int(len(x) * TEST)
    return x[order[test:]], y[order[test:]], x[order[:test]], y[order[:test]], classes


def augment(x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Half of the images mirrored, all shifted by up to 3 pixels over white."""
    x = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    framed = np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)), constant_values=1)
    corners = rng.integers(0, 7, (len(x), 2))
    return np.stack([f[:, t : t + SIDE, q : q + SIDE] for f, (t, q) in zip(framed, corners, strict=True)]), y


def trained(folder: Path, weights: Path | None, epochs: int) -> tuple[tw.nn.Module, Array, Array]:
    """The model, and the images and labels that it has not seen."""
    x, y, x_test, y_test, classes = images(folder)
    tw.seed(0)
    model = ResNet18(classes=classes)
    if weights is not None and weights.exists():
        with np.load(weights) as found:
            model.load_state_dict(dict(found))
        return model, x_test, y_test
    steps = epochs * -(-len(x) // BATCH)
    rate = tw.schedules.OneCycle(0.05, steps)
    trainer = tw.Trainer(
        model,
        loss=tw.losses.cross_entropy,
        optimizer=tw.optim.SGD(rate, momentum=0.9),
        metrics=["accuracy"],
        seed=0,
        precision="bf16",
    )
    trainer.fit(x, y, epochs=epochs, batch_size=BATCH, augment=augment)
    if weights is not None:
        np.savez(weights, **model.state_dict())
    return model, x_test, y_test


def check(setting: Setting, model: tw.nn.Module, x: Array, y: Array) -> tuple[dict[str, Any], Any]:
    """What a setting gave, measured anew, and what tw.compress made."""
    batches = [(x[k : k + EACH], y[k : k + EACH]) for k in range(0, len(x) - EACH + 1, EACH)]
    started = time.perf_counter()
    made = tw.compress(
        model, batches, max_drop=setting.max_drop, objective=setting.objective, kinds=setting.kinds, batch=setting.batch
    )
    seconds = time.perf_counter() - started
    original = tw.compile(model, tw.spec("N", 3, SIDE, SIDE))
    good, now = (_accuracy(exe, batches) for exe in (original, tw.compile(made.graph)))
    whole = tw.trace(model, tw.spec("N", 3, SIDE, SIDE))
    graphs = (Graph(whole.inputs, whole.outputs, weights=model.state_dict()), made.graph)
    before, after = _turns(graphs, x[: setting.batch])
    t = made.report.totals
    row = {
        "name": setting.name, "objective": setting.objective, "max_drop": setting.max_drop, "batch": setting.batch,
        "kinds": setting.kinds, "chosen": t["layers"], "accuracy_before": good, "accuracy_after": now, "original_ms": before,
        "ours_ms": after, "ratio": before / after, "bytes_before": t["bytes_before"], "bytes_after": t["bytes_after"],
        "predicted_ms": t["predicted_ms"], "within_a_quarter": t["predicted_within_a_quarter"], "seconds": seconds,
        "break_even": made.report.break_even, "notes": made.report.notes,
    }  # fmt: skip
    row["accurate"] = now >= good - setting.max_drop - DRAWN
    row["no_slower"] = after <= before * SLOWER
    return row, made


def _accuracy(exe: tw.Executable, batches: Sequence[tuple[Array, Array]]) -> float:
    right = sum(int((exe(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def _turns(graphs: Sequence[Graph], x: Array) -> tuple[float, float]:
    """Milliseconds of two models that take turns."""
    runs = []
    for g in graphs:
        names = {str(s): len(x) for i in g.inputs for s in i.tensor.symbols}
        runs.append(build(specialize(g, names), g.weights))
    one, two = interleaved([functools.partial(exe, x) for exe in runs], SECONDS)
    return median(one) * 1e3, median(two) * 1e3


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as Markdown."""
    lines = [
        "| setting | chosen | accuracy | faster | weights, MB | predicted, measured ms | layers predicted within 25% | held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        chosen = ", ".join(f"{n} {k}" for k, n in r["chosen"].items())
        lines.append(
            f"| {r['name']} | {chosen} | {r['accuracy_before']:.2%} → {r['accuracy_after']:.2%} | {r['ratio']:.2f}x | "
            f"{r['bytes_before'] / 1e6:.1f} → {r['bytes_after'] / 1e6:.1f} | {r['predicted_ms']:.3f}, {r['ours_ms']:.3f} | "
            f"{r['within_a_quarter']:.0%} | {'yes' if r['accurate'] and r['no_slower'] else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("~/.cache/tensorwright/data"), help="the folder that has emoji.npz")
    parser.add_argument("--weights", type=Path, help="weights of the model (.npz): read if there, else written")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of training (default {EPOCHS})")
    parser.add_argument("--settings", metavar="1,4", help=f"numbers of settings, 1 to {len(SETTINGS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report of the first setting there")
    args = parser.parse_args(argv)
    numbers = [int(n) for n in args.settings.split(",")] if args.settings else range(1, len(SETTINGS) + 1)
    model, x, y = trained(args.data.expanduser(), args.weights, args.epochs)
    quiet()
    rows: list[dict[str, Any]] = []
    for n in numbers:
        row, made = check(SETTINGS[n - 1], model, x, y)
        rows.append(row)
        if args.html and n == numbers[0]:
            made.report.save(args.html)
        print(f"{n}: {row['name']}, {row['seconds']:.0f} s\n{made}\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, default=str) + "\n")
    print(table(rows))
    failed = [r["name"] for r in rows if not (r["accurate"] and r["no_slower"])]
    print(f"{len(rows) - len(failed)} of {len(rows)} settings held" + (f"; not: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
