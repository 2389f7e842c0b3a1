"""Speech recognition: spoken strings of digits, MFCC -> BiLSTM -> CTC, decoded greedily and by beam search.

pip install 'tensorwright[examples]'
apt-get install espeak-ng                      # Debian's speech synthesiser speaks the training strings
python examples/fetch.py tidigits
python examples/digit_strings.py               # at most 10% word errors on voices that it has not heard

Data: strings of one to seven digits by espeak-ng (1.51 in Debian 12), in 101 voices times eight accents of English, at many
speeds and pitches; twelve voices speak in the test alone. The 31 utterances of TIDIGITS in Debian's pocketsphinx-testdata, by two
people, are recognised too, with no figure to reach: they come not as sound but as Sphinx's MFCCs, so ours are made like those.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import tensorwright as tw
from rapidfuzz.distance import Levenshtein
from scipy.signal import resample_poly
from support import need, run
from tensorwright import losses, nn, optim, schedules

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh")
ACCENTS = ("en-gb", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
TEST_VOICES = ("Annie", "linda", "steph", "steph2", "steph3", "john", "Mike", "Marco", "m3", "f4", "paul", "grandma")
STACKED = 3  # 10 ms frames in one step of the network
COEFFICIENTS = 13

# ---------------------------------------------------------------------- sound


def voices() -> list[str]:
    """The voices that espeak-ng can put on."""
    if shutil.which("espeak-ng") is None:
        sys.exit("error: espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    return sorted({line.split("!v/")[1].split("(")[0].strip() for line in listed.splitlines() if "!v/" in line})


def speak(text: str, voice: str, speed: int, pitch: int, gap: int) -> Any:
    """What espeak-ng says, as f32 at 8 kHz."""
    options = ["-v", voice, "-s", str(speed), "-p", str(pitch), "-g", str(gap)]
    wav = subprocess.run(["espeak-ng", *options, "--stdout", text], capture_output=True, check=True).stdout
    sound = np.frombuffer(wav[44 : len(wav) // 2 * 2], "<i2").astype(np.float32) / 32768  # behind the header, at 22,050 Hz
    return resample_poly(sound, 160, 441).astype(np.float32)


def mfcc(sound: Any) -> Any:
    """13 coefficients every 10 ms as CMU Sphinx computes them (its defaults for 8 kHz speech): (frames, 13)."""
    emphasised = librosa.effects.preemphasis(sound * 32768, coef=0.97)
    mel = librosa.feature.melspectrogram(
        y=emphasised, sr=8000, n_fft=256, win_length=200, hop_length=80, window="hamming", center=False, n_mels=20, fmin=1,
        fmax=4000, htk=True,
    )  # fmt: skip
    return librosa.feature.mfcc(S=np.log(np.maximum(mel, 1e-5)), n_mfcc=COEFFICIENTS).T


def steps_of(coefficients: Any) -> Any:
    """What the network is given: coefficients of mean 0 and deviation 1 over the utterance, three frames a step."""
    scaled = (coefficients - coefficients.mean(axis=0)) / (coefficients.std(axis=0) + 1e-5)
    whole = len(scaled) // STACKED * STACKED
    return scaled[:whole].reshape(-1, STACKED * COEFFICIENTS).astype(np.float32)


def utterance(names: Sequence[str], seed: Sequence[int]) -> tuple[Any, Any]:
    """(digits, steps): a random string in a random voice, between silences, in some noise."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, len(WORDS), size=rng.integers(1, 8))
    voice = f"{rng.choice(ACCENTS)}+{rng.choice(names)}"
    text = " ".join(WORDS[d] for d in digits)
    sound = speak(text, voice, int(rng.integers(90, 200)), int(rng.integers(20, 80)), int(rng.integers(0, 8)))
    sound = np.pad(sound, rng.integers(400, 3000, size=2))
    noise = rng.standard_normal(len(sound)) * sound.std() * 10 ** (-rng.uniform(15, 40) / 20)
    return digits, steps_of(mfcc((sound + noise).astype(np.float32)))


def strings(data: Path, names: Sequence[str], count: int, seed: int) -> list[tuple[Any, Any]]:
    """(digits, steps) of `count` utterances; kept in a file, for 4,000 of them take a minute."""
    key = hashlib.sha256(repr((sorted(names), count, seed, STACKED)).encode()).hexdigest()[:16]
    kept = data / f"digit-strings-{key}.npz"
    if not kept.exists():
        with ThreadPoolExecutor(2) as pool:
            spoken = list(pool.map(lambda i: utterance(names, [seed, i]), range(count)))
        lengths = [(len(d), len(s)) for d, s in spoken]
        np.savez(
            kept, digits=np.concatenate([d for d, _ in spoken]), steps=np.concatenate([s for _, s in spoken]), lengths=lengths
        )
    with np.load(kept) as file:
        ends = np.cumsum(file["lengths"], axis=0)[:-1]
        digits, steps = np.split(file["digits"], ends[:, 0]), np.split(file["steps"], ends[:, 1])
    return list(zip(digits, steps, strict=True))


def tidigits(folder: Path) -> list[tuple[Any, Any]]:
    """(digits, steps) of Sphinx's feature files: a count, then big- or little-endian f32. 'man.ah.6o838a.mfc' says 6 oh 8 3 8."""
    found = []
    for path in sorted(folder.glob("*.mfc")):
        raw = path.read_bytes()
        order = "<" if int.from_bytes(raw[:4], "little") * 4 == len(raw) - 4 else ">"
        coefficients = np.frombuffer(raw[4:], f"{order}f4").reshape(-1, COEFFICIENTS)
        digits = ["0123456789o".index(c) for c in path.stem.split(".")[2][:-1].replace("z", "0")]
        found.append((np.array(digits), steps_of(coefficients)))
    return found


# ---------------------------------------------------------------------- network


class Recogniser(nn.Module):
    """Steps (N, T, features) of some lengths (N,) -> logits (N, T, 1 + words); 0 is CTC's blank."""

    def __init__(self, hidden: int) -> None:
        self.lstm = nn.LSTM(STACKED * COEFFICIENTS, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(2 * hidden, 1 + len(WORDS))

    def __call__(self, x: Any, lengths: Any) -> Any:
        h, _ = self.lstm(x, lengths=lengths)
        return self.head(self.drop(h))


def ctc(logits: Any, target: Any) -> Any:
    """The loss, for targets (words (N, 7), how many (N,), steps (N,))."""
    words, counts, lengths = target
    time_first = tw.swapaxes(tw.log_softmax(logits, axis=-1), 0, 1)
    return losses.ctc(time_first, words, input_lengths=lengths, target_lengths=counts)


def arrays(utterances: list[tuple[Any, Any]], length: int) -> tuple[Any, Any]:
    """((steps, lengths), (words, counts, lengths)) of utterances, padded. Words are digits plus 1."""
    x = np.zeros((len(utterances), length, STACKED * COEFFICIENTS), np.float32)
    words = np.zeros((len(utterances), 7), np.int32)
    for into, numbers, (digits, steps) in zip(x, words, utterances, strict=True):
        into[: len(steps)] = steps
        numbers[: len(digits)] = digits + 1
    lengths = np.array([len(s) for _, s in utterances], np.int32)
    counts = np.array([len(d) for d, _ in utterances], np.int32)
    return (x, lengths), (words, counts, lengths)


def noisy(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A little noise on the features, so that voices are not learnt by heart."""
    steps, lengths = x
    return (steps + 0.2 * rng.standard_normal(steps.shape, np.float32), lengths), y


# ---------------------------------------------------------------------- decoding


def greedy(log_p: Any) -> list[int]:
    """The best symbol of each step (T, symbols), repetitions and blanks taken out."""
    best = log_p.argmax(-1)
    return [int(b) for i, b in enumerate(best) if b and (i == 0 or best[i - 1] != b)]


def beam_search(log_p: Any, width: int = 8) -> list[int]:
    """The most probable string: all alignments that spell a prefix are added up (Hannun et al. 2014, without a language model).

    A prefix has two probabilities: of the alignments so far that end in a blank, and of those that end in its last symbol.
    """
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for step in log_p:
        found: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], blank: float = -np.inf, symbol: float = -np.inf, found: Any = found) -> None:
            old = found.get(prefix, (-np.inf, -np.inf))
            found[prefix] = np.logaddexp(old[0], blank), np.logaddexp(old[1], symbol)

        for prefix, (blank, symbol) in beams.items():
            total = np.logaddexp(blank, symbol)
            add(prefix, blank=total + step[0])
            if prefix:
                add(prefix, symbol=symbol + step[prefix[-1]])  # held on
            for s in range(1, len(step)):
                again = bool(prefix) and prefix[-1] == s
                add((*prefix, s), symbol=(blank if again else total) + step[s])  # the same symbol again needs a blank between
        beams = dict(sorted(found.items(), key=lambda item: -np.logaddexp(*item[1]))[:width])
    return list(next(iter(beams)))


def word_errors(trainer: tw.Trainer, utterances: list[tuple[Any, Any]], length: int) -> tuple[float, float]:
    """Words wrong, missing or too many, over words spoken: decoded greedily, and by beam search."""
    x, _ = arrays(utterances, length)
    logits = trainer.predict(x)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    spoken = [(digits + 1).tolist() for digits, _ in utterances]
    rates = []
    for decode in (greedy, beam_search):
        heard = [decode(p[:n]) for p, n in zip(log_p, x[1], strict=True)]
        wrong = sum(Levenshtein.distance(a, b) for a, b in zip(heard, spoken, strict=True))
        rates.append(wrong / sum(map(len, spoken)))
    return rates[0], rates[1]


def main(
    data: Path,
    epochs: int = 10,
    train_strings: int = 4000,
    test_strings: int = 400,
    hidden: int = 128,
    length: int = 160,
    batch_size: int = 32,
    rate: float = 3e-3,
    seed: int = 0,
) -> dict[str, Any]:
    data.mkdir(parents=True, exist_ok=True)
    known = voices()
    held_out = [v for v in known if v in TEST_VOICES]
    train = strings(data, [v for v in known if v not in TEST_VOICES], train_strings, seed=2 * seed)
    test = strings(data, held_out, test_strings, seed=2 * seed + 1)
    train, test = ([u for u in part if len(u[1]) <= length] for part in (train, test))
    print(
        f"{len(train)} strings in {len(known) - len(held_out)} voices to learn from, {len(test)} in {len(held_out)} for the test"
    )

    tw.seed(seed)
    trainer = tw.Trainer(
        Recogniser(hidden),
        loss=ctc,
        optimizer=optim.Adam(rate),
        learning_rate=schedules.OneCycle(rate, total_steps=epochs * -(-len(train) // batch_size)),
        clip_global_norm=1.0,
        seed=seed,
    )
    trainer.fit(*arrays(train, length), epochs=epochs, batch_size=batch_size, augment=noisy)
    by_greedy, by_beam = word_errors(trainer, test, length)
    figures = {"word_errors": by_beam, "word_errors_greedy": by_greedy}
    people = [u for u in tidigits(need(data / "tidigits")) if len(u[1]) <= length]
    by_greedy, by_beam = word_errors(trainer, people, length)
    return {
        **figures,
        "tidigits_utterances": len(people),
        "tidigits_word_errors": by_beam,
        "tidigits_word_errors_greedy": by_greedy,
    }


if __name__ == "__main__":
    run(main, at_most={"word_errors": 0.10})
