"""The script that test_kill.py kills: a small fit with checkpoints every few steps. Arguments: folder, result file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.training.callbacks import Checkpoint, EarlyStopping, ReduceOnPlateau


def main(folder: str, result: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((150, 8), np.float32)
    y = (x @ rng.standard_normal((8, 3), np.float32)).argmax(1)
    tw.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    schedule = tw.schedules.Warmup(tw.schedules.Cosine(1e-2, T_max=400), steps=10)
    t = tw.Trainer(
        model,
        loss=tw.losses.cross_entropy,
        optimizer=tw.optim.Adam(1e-2),
        metrics=["accuracy"],
        learning_rate=schedule,
        ema=0.9,
        seed=7,
        threads=1,
    )
    callbacks = [
        Checkpoint(folder, every_steps=2, keep=2, best="val_loss"),
        EarlyStopping(patience=12),
        ReduceOnPlateau(patience=1, factor=0.5),
    ]
    t.fit(
        x,
        y,
        epochs=14,
        batch_size=16,
        validation_split=0.2,
        augment=lambda x, y, rng: (x + rng.normal(0, 0.01, x.shape).astype(np.float32), y),
        callbacks=callbacks,
        resume=folder,
        verbose=False,
    )
    arrays = {**t.weights(), **{f"average {n}": a for n, a in t.averaged_weights().items()}}
    arrays["history"] = np.array([[r["loss"], r["accuracy"], r["val_loss"], r["learning_rate"]] for r in t.history])
    beside = Path(result + ".tmp.npz")
    np.savez(beside, **arrays)
    beside.rename(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
