"""Which language, and which speaker? Cepstra of speech into two bidirectional LSTMs of 128 and a softmax.

pip install 'tensorwright[examples]'
python examples/fetch.py clips vowels
python examples/speech_classes.py              # language: at least 90% of clips not heard; speaker: at least 94% of the test set

Data: 2,780 telephone announcements in five languages, 8 kHz (Debian asterisk-core-sounds-{en,es,fr,it,ru}-wav 1.6.1; clips of
silence left out). One voice speaks each language, so what is told apart may be the voice as much as the language. And 640
utterances of "ae" by nine men, as 12 cepstrum coefficients (Japanese Vowels, PyPI aeon 1.6.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import tensorwright as tw
from scipy.io import wavfile
from sklearn.model_selection import train_test_split
from support import need, run
from tensorwright import losses, nn, optim

LANGUAGES = ["en", "es", "fr", "it", "ru"]


class Classifier(nn.Module):
    """Sequences (N, T, features) of some lengths (N,) -> logits (N, classes): the mean of the second BiLSTM over the frames."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(2 * hidden, classes)

    def __call__(self, x: Any, lengths: Any) -> Any:
        h, _ = self.lstm(x, lengths=lengths)  # zero behind each sequence's end
        mean = h.sum(axis=1) / lengths.astype("f32")[:, None]
        return self.head(self.drop(mean))


def mfcc(path: Path, frames: int) -> Any:
    """13 mel-frequency cepstrum coefficients every 20 ms of the first `frames` * 20 ms: (T, 13)."""
    rate, samples = wavfile.read(path)
    sound = samples[: frames * rate // 50].astype(np.float32) / 32768
    found = librosa.feature.mfcc(y=sound, sr=rate, n_mfcc=13, n_mels=40, n_fft=256, win_length=rate // 40, hop_length=rate // 50)
    return found.T[:frames].astype(np.float32)


def clips(data: Path, frames: int) -> tuple[list[Any], Any]:
    """The cepstra of all clips and the number of each one's language. Kept in a file, for they take half a minute."""
    kept = data / f"clips-mfcc-{frames}.npz"
    if not kept.exists():
        paths = [p for k in LANGUAGES for p in sorted(need(data / "clips" / k).glob("*.wav"))]
        paths = [p for p in paths if not p.name.startswith("silence-") and p.stat().st_size > 2000]  # an eighth of a second
        cepstra = [mfcc(p, frames) for p in paths]
        labels = [LANGUAGES.index(p.parent.name) for p in paths]
        np.savez(kept, frames=np.concatenate(cepstra), lengths=[len(c) for c in cepstra], labels=labels)
    with np.load(kept) as file:
        return np.split(file["frames"], np.cumsum(file["lengths"])[:-1]), file["labels"].astype(np.int64)


def vowels(path: Path) -> tuple[list[Any], Any]:
    """The utterances of a .ts file, each (T, 12), and the number of each one's speaker from 0."""
    lines = need(path).read_text().split("@data\n")[1].split()
    rows = [line.split(":") for line in lines]
    sequences = [np.array([c.split(",") for c in row[:-1]], np.float32).T for row in rows]
    return sequences, np.array([int(row[-1]) - 1 for row in rows])


def padded(sequences: list[Any], mean: Any, deviation: Any, length: int) -> tuple[Any, Any]:
    """(n, length, features) with zeros behind the ends, scaled; and the lengths."""
    x = np.zeros((len(sequences), length, sequences[0].shape[1]), np.float32)
    for into, s in zip(x, sequences, strict=True):
        into[: len(s)] = (s - mean) / deviation
    return x, np.array([len(s) for s in sequences], np.int32)


def accuracy(
    train: tuple[list[Any], Any], test: tuple[list[Any], Any], classes: int, hidden: int, epochs: int, seed: int
) -> float:
    """Trains a classifier; the share of the test's sequences that it gets right."""
    frames = np.concatenate(train[0])
    scale = frames.mean(axis=0), frames.std(axis=0), max(len(s) for s in train[0] + test[0])
    tw.seed(seed)
    trainer = tw.Trainer(
        Classifier(frames.shape[1], classes, hidden),
        loss=losses.cross_entropy,
        optimizer=optim.Adam(2e-3),
        metrics=["accuracy"],
        clip_global_norm=1.0,
        seed=seed,
    )
    trainer.fit(padded(train[0], *scale), train[1], epochs=epochs, batch_size=32)
    return trainer.evaluate(padded(test[0], *scale), test[1])["accuracy"]


def main(
    data: Path, epochs: int = 6, speaker_epochs: int = 30, frames: int = 100, hidden: int = 128, seed: int = 0
) -> dict[str, Any]:
    sequences, labels = clips(data, frames)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    parts = [([sequences[i] for i in which], labels[which]) for which in (train, test)]
    print(f"languages: {len(train)} clips to learn from, {len(test)} for the test")
    language = accuracy(parts[0], parts[1], len(LANGUAGES), hidden, epochs, seed)

    parts = [vowels(data / "vowels" / name) for name in ("TRAIN.ts", "TEST.ts")]
    print(f"speakers: {len(parts[0][1])} utterances to learn from, {len(parts[1][1])} for the test")
    speaker = accuracy(parts[0], parts[1], 9, hidden, speaker_epochs, seed)
    return {"language_accuracy": language, "speaker_accuracy": speaker}


if __name__ == "__main__":
    run(main, at_least={"language_accuracy": 0.90, "speaker_accuracy": 0.94})
