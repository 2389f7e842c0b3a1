from __future__ import annotations

import json
import os
import random
import re
import struct

import pytest
from tensorwright.runtime.container import DamagedError, pack, unpack, write_atomically

MAGIC = b"TESTTEST"


def sealed(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """A file with a right checksum around any header: what somebody who means harm would write."""
    import hashlib

    rest = header + body
    return struct.pack("<8sQ32s", MAGIC, len(header) if length is None else length, hashlib.sha256(rest).digest()) + rest


def test_what_is_packed_comes_back():
    data = pack(MAGIC, {"a": [1, "ü"]}, {"x": b"\0\1\2", "empty": b"", "y": b"y"})
    meta, parts = unpack(MAGIC, data)
    assert meta == {"a": [1, "ü"]}
    assert {k: bytes(v) for k, v in parts.items()} == {"x": b"\0\1\2", "empty": b"", "y": b"y"}


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = pack(MAGIC, {"a": 1}, {"x": bytes(range(50))})
    rng = random.Random(0)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(DamagedError):
            unpack(MAGIC, bytes(damaged))
        with pytest.raises(DamagedError):
            unpack(MAGIC, data[:at])
    with pytest.raises(DamagedError):
        unpack(MAGIC, data + b"\0")


@pytest.mark.parametrize(
    "parts",
    [
        [["x", 1 << 60]],
        [["x", -1]],
        [["x", 1.5]],
        [["x", True]],
        [["x", "3"]],
        [["x", 1], ["x", 2]],
        [[3, 3]],
        [["x"]],
        "xx",
        None,
        [["x", 2]],
        [],
    ],
)
def test_lies_about_parts_with_a_right_checksum_are_refused(parts):
    header = json.dumps({"meta": None, "parts": parts}).encode()
    with pytest.raises(DamagedError):
        unpack(MAGIC, sealed(header, b"abc"))


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b"\xff\xfe", b'{"meta": 1}', b"[" * 100_000, b'"parts"'])
def test_headers_that_are_no_header_are_refused(header):
    with pytest.raises(DamagedError):
        unpack(MAGIC, sealed(header, b"abc"))


def test_a_header_longer_than_the_file_is_refused_before_memory_is_taken():
    with pytest.raises(DamagedError, match="claims 1152921504606846976 bytes"):
        unpack(MAGIC, sealed(b"{}", b"", length=1 << 60))


def test_a_write_that_cannot_be_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "folder", IsADirectoryError), (tmp_path / "none" / "file", FileNotFoundError)):
        with pytest.raises(kind, match=f"'{re.escape(str(path))}'$"):
            write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_written_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="disk on fire"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
