"""Small data in the formats that examples/fetch.py writes, made here: the examples run on them without a network."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 11


def mnist(data: Path) -> None:
    """scikit-learn's digits, enlarged from 8x8 to 24x24 pixels, in a frame: 1,500 to train on, 297 for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images, np.ones((3, 3))) * (255 / 16)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    parts = {"x_train": images[:1500], "y_train": labels[:1500], "x_test": images[1500:], "y_test": labels[1500:]}
    np.savez(data / "mnist.npz", **parts)


def emoji(data: Path) -> None:
    """Three classes of 40 pictures: a disc, a square or stripes, in a colour of the class's own, on white."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    shapes = [(x - 16) ** 2 + (y - 16) ** 2 < 100, (abs(x - 16) < 9) & (abs(y - 16) < 9), x // 4 % 2 == 0]
    labels = np.repeat(np.arange(3), 40)
    images = np.full((120, 32, 32, 3), 255, np.uint8)
    for image, label in zip(images, labels, strict=True):
        colour = rng.integers(0, 120, 3)
        colour[label] = 230
        image[shapes[label]] = colour
    names = np.array([f"picture-{i}" for i in range(120)])
    classes = np.array(["discs", "squares", "stripes"])
    np.savez(data / "emoji.npz", images=images, labels=labels.astype(np.uint8), names=names, classes=classes)


def clips(data: Path) -> None:
    """Six clips a language, 0.4 to 0.9 s of a chord of its own in noise; and one of silence, which must not count."""
    rng = np.random.default_rng(0)
    for k, language in enumerate(("en", "es", "fr", "it", "ru")):
        folder = data / "clips" / language
        folder.mkdir(parents=True)
        for i in range(6):
            _wav(folder / f"clip{i}.wav", _tone(rng, 250 * 1.5**k, rng.uniform(0.4, 0.9)))
        _wav(folder / "silence-1.wav", np.zeros(8000))


def vowels(data: Path) -> None:
    """Utterances of 7 to 12 frames by nine speakers, each about a point of his own."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((9, 12)) * 2
    (data / "vowels").mkdir()
    for part in ("TRAIN", "TEST"):
        rows = []
        for i in range(45):
            frames = centres[i % 9, :, None] + 0.3 * rng.standard_normal((12, rng.integers(7, 13)))
            rows.append(":".join(",".join(f"{v:.4f}" for v in c) for c in frames) + f":{i % 9 + 1}")
        (data / "vowels" / f"{part}.ts").write_text("# about the data\n@dimensions 12\n@data\n" + "\n".join(rows) + "\n")


def tidigits(data: Path) -> None:
    """Two utterances as Sphinx's feature files, one in each byte order."""
    (data / "tidigits").mkdir()
    rng = np.random.default_rng(0)
    for name, order in (("man.ah.6o838a", ">"), ("woman.ak.za", "<")):
        values = rng.standard_normal((120, 13))
        head = np.array(values.size, f"{order}i4").tobytes()
        (data / "tidigits" / f"{name}.mfc").write_bytes(head + values.astype(f"{order}f4").tobytes())


def cifar(data: Path) -> None:
    """Four images, and weights of chance in the shapes of the network that fetch.py brings."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    channels, widths = [3, 64, 64, 128, 128, 64, 64], [64, 1024, 512, 10]
    for k in range(6):
        tail, (a, b) = f"_{k}" if k else "", channels[k : k + 2]
        arrays[f"conv2d{tail}/kernel"] = rng.normal(0, (2 / (9 * a)) ** 0.5, (3, 3, a, b))
        arrays[f"conv2d{tail}/bias"] = arrays[f"batch_normalization{tail}/beta"] = np.zeros(b)
        arrays[f"batch_normalization{tail}/moving_mean"] = np.full(b, 0.5)
        arrays[f"batch_normalization{tail}/gamma"] = arrays[f"batch_normalization{tail}/moving_variance"] = np.ones(b)
    for k in range(3):
        tail, (a, b) = f"_{k}" if k else "", widths[k : k + 2]
        arrays[f"dense{tail}/kernel"], arrays[f"dense{tail}/bias"] = rng.normal(0, (2 / a) ** 0.5, (a, b)), np.zeros(b)
    images = {k: rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8) for k in ("images", "others")}
    floats = {k: v.astype(np.float32) for k, v in arrays.items()}
    np.savez(data / "cifar.npz", labels=np.arange(4, dtype=np.uint8), **images, **floats)


def minilm(data: Path) -> None:
    """A transformer of one layer with weights of chance, and a vocabulary of the verse of `shakespeare`."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    words = ["[CLS]", "[SEP]", "[UNK]", ",", "so", "long", "lives", "this", "and", "gives", "life", "to", "the", "##e"]
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{k}_embeddings.weight": (n, 16) for k, n in (("word", len(words)), ("position", 8), ("token_type", 2))
    }
    for name, (out, into) in {
        **{f"attention.self.{t}": (16, 16) for t in ("query", "key", "value")},
        "attention.output.dense": (16, 16), "intermediate.dense": (32, 16), "output.dense": (16, 32),
    }.items():  # fmt: skip
        shapes |= {f"encoder.layer.0.{name}.weight": (out, into), f"encoder.layer.0.{name}.bias": (out,)}
    weights = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        weights |= {f"{name}.LayerNorm.weight": np.ones(16, np.float32), f"{name}.LayerNorm.bias": np.zeros(16, np.float32)}
    (data / "minilm").mkdir()
    save_file(weights, data / "minilm" / "model.safetensors")
    (data / "minilm" / "vocabulary.txt").write_text("\n".join(words))


def shakespeare(data: Path) -> None:
    """A verse over and over; the plays that are kept for the test too."""
    (data / "shakespeare").mkdir()
    for name in ("hamlet", "macbeth", "twelfth_night"):
        (data / "shakespeare" / f"{name}.txt").write_text("So long lives this, and this gives life to thee.\n" * 20)


def tables(data: Path) -> None:
    """Both tables with 120 rows, gaps, and answers that follow from the numbers."""
    import pandas as pd

    rng = np.random.default_rng(0)
    (data / "tables").mkdir()
    sick = rng.random(120) < 0.4
    ratings = pd.DataFrame({f"V{i}": np.clip(rng.normal(3 + 3 * sick, 1.5), 1, 10).round() for i in range(1, 10)})
    ratings.loc[rng.integers(0, 120, 6), "V6"] = np.nan
    ratings.insert(0, "ID", np.arange(120))
    ratings.assign(**{"class": np.where(sick, "malignant", "benign")}).to_csv(data / "tables" / "biopsy.csv")

    male = rng.random(120) < 0.5
    size = rng.normal(0, 1, (120, 4)) + 1.5 * male[:, None]
    birds = pd.DataFrame(
        {
            "species": rng.choice(["Adelie", "Gentoo"], 120),
            "island": rng.choice(["Biscoe", "Dream"], 120),
            "bill_length_mm": 44 + 5 * size[:, 0],
            "bill_depth_mm": 17 + 2 * size[:, 1],
            "flipper_length_mm": 200 + 14 * size[:, 2],
            "body_mass_g": 4200 + 800 * size[:, 3],
            "sex": np.where(male, "male", "female"),
            "year": 2007,
        }
    )
    birds.loc[[3, 50], "sex"] = np.nan
    birds.loc[[3, 7], "body_mass_g"] = np.nan
    birds.to_csv(data / "tables" / "penguins.csv", index=False)


def speak(text: str, voice: str, speed: int, pitch: int, gap: int) -> Any:
    """In place of espeak-ng: a tone for each word, 0.15 s at 8 kHz, and a short silence."""
    from digit_strings import WORDS as words

    t = np.arange(1200) / 8000
    parts = [np.r_[np.sin(2 * np.pi * (300 + 300 * words.index(w)) * t) * 0.3, np.zeros(400)] for w in text.split()]
    return np.concatenate(parts).astype(np.float32)


def _tone(rng: np.random.Generator, frequency: float, seconds: float) -> Any:
    t = np.arange(int(8000 * seconds)) / 8000
    return 0.3 * np.sin(2 * np.pi * frequency * t) + 0.1 * np.sin(4 * np.pi * frequency * t) + 0.01 * rng.standard_normal(len(t))


def _wav(path: Path, sound: Any) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
