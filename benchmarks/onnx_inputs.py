"""What the ONNX models are given: pictures, text lines, speech, bytes and tokens as their users would give them.

Pictures are a photograph of scikit-learn's and lines drawn by Pillow; speech comes from the recordings that examples/fetch.py
gets. Where one of these is not there, `MissingInputError` says what to install or fetch.
"""

from __future__ import annotations

import importlib.util
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorwright.ir.errors import TensorwrightError

Array = np.ndarray[Any, Any]


class MissingInputError(TensorwrightError):
    """A package or file that realistic inputs are made of is not there."""


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingInputError(f"{package} is not installed: pip install 'tensorwright[examples]'")


def photo(height: int, width: int) -> Array:
    """A photograph of a palace, [height, width, 3] u8, red first."""
    _need("sklearn", "scikit-learn")
    _need("PIL", "Pillow")
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.BILINEAR))


def line(text: str, height: int, width: int) -> Array:
    """A line of dark text on light grey with some noise, [height, width, 3] u8."""
    _need("PIL", "Pillow")
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), (235, 235, 230))
    ImageDraw.Draw(image).text((height // 6, height // 8), text, fill=(20, 20, 60), font=ImageFont.load_default(height * 0.66))
    noise = np.random.default_rng(len(text)).normal(0, 6, (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def page(lines: Sequence[str], height: int, width: int) -> Array:
    """A photograph with lines of text on it, [height, width, 3] u8."""
    picture = photo(height, width).copy()
    for k, text in enumerate(lines):
        top = 20 + k * height // (len(lines) + 1)
        picture[top : top + 36, 30 : width - 30] = line(text, 36, width - 60)
    return picture


def planes(picture: Array, mean: float = 127.5, scale: float = 127.5) -> Array:
    """[height, width, 3] u8 as [1, 3, height, width] f32."""
    return np.ascontiguousarray(((picture.astype(np.float32) - mean) / scale).transpose(2, 0, 1)[None])


def speech(data: Path, rate: int, seconds: float) -> Array:
    """A recorded announcement in English, f32 from -1 to 1, at 8 or 16 kHz (the recording has 8; the rest is interpolated)."""
    path = data / "clips" / "en" / "demo-instruct.wav"
    if not path.exists():
        raise MissingInputError(f"there is no {path}: python examples/fetch.py clips")
    with wave.open(str(path)) as file:
        assert file.getframerate() == 8000
        sound = np.frombuffer(file.readframes(int(8000 * seconds)), "<i2").astype(np.float32) / 32768
    if rate == 8000:
        return sound
    spectrum = np.fft.rfft(sound)  # to twice the rate: zeros above what was there
    return (np.fft.irfft(np.pad(spectrum, (0, len(sound) - len(spectrum) + 1)), 2 * len(sound)) * 2).astype(np.float32)


def windows(sound: Array, size: int, context: int) -> Array:
    """Consecutive windows, each with the end of the one before in front of it: [count, context + size]."""
    count = len(sound) // size
    wide = np.concatenate([np.zeros(context, np.float32), sound[: count * size]])
    return np.stack([wide[k * size : (k + 1) * size + context] for k in range(count)])


def source_text() -> bytes:
    """A file of Python: this one."""
    return Path(__file__).read_bytes()


def tokens(lengths: Sequence[int], vocabulary: int = 30522) -> tuple[Array, Array]:
    """Ids and mask of sentences of these lengths, padded to the longest, with BERT's marks at both ends: [batch, length] i64."""
    rng = np.random.default_rng(0)
    ids, mask = np.zeros((len(lengths), max(lengths)), np.int64), np.zeros((len(lengths), max(lengths)), np.int64)
    for row, (length, out, seen) in enumerate(zip(lengths, ids, mask, strict=True)):
        del row
        out[:length] = rng.integers(1996, min(vocabulary, 12000), length)  # the frequent words
        out[0], out[length - 1], seen[:length] = 101, 102, 1
    return ids, mask
