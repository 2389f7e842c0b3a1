"""Prepared weights kept in the cache: who gets them, what is a miss, and the digest that tells."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.llvm.digest import digest as digest_code
from tensorwright.ir.program import DIGEST, DIGEST_BLOCK, DIGEST_PASSES, DIGEST_STEP
from tensorwright.runtime import host, prepared
from tensorwright.runtime.cache import DiskCache
from tensorwright.runtime.digest import KEY_BYTES, Digest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prepared weights are kept on Linux only")


@pytest.fixture(scope="module")
def code():
    return digest_code(host.host()), DIGEST


@pytest.fixture(scope="module")
def key() -> bytes:
    return np.random.default_rng(5).bytes(KEY_BYTES)


def place(a: np.ndarray) -> tuple[int, int]:
    return a.__array_interface__["data"][0], a.nbytes


def nh(block: np.ndarray, key: bytes) -> list[int]:
    """The definition, in Python's integers."""
    m, k = block.view("<u4").tolist(), np.frombuffer(key, "<u4").tolist()
    found = []
    for p in range(DIGEST_PASSES):
        shift = p * DIGEST_STEP // 4
        words = [(a + k[i + shift]) % 2**32 for i, a in enumerate(m)]
        found.append(sum(a * b for a, b in zip(words[::2], words[1::2], strict=True)) % 2**64)
    return found


def test_the_native_code_computes_nh(code, key):
    import ctypes

    from tensorwright.runtime.native import loaded

    data = np.frombuffer(np.random.default_rng(6).bytes(3 * DIGEST_BLOCK), np.uint8)
    data = np.concatenate([data, np.full(DIGEST_BLOCK, 255, np.uint8)])  # all sums wrap around
    out = np.zeros((4, DIGEST_PASSES), np.uint64)
    own = np.frombuffer(key, np.uint8)
    # two rows in one table: the blocks 0 to 2, and block 3
    table = np.array(
        [place(own)[0], 2, place(data)[0], 3, place(out)[0], place(data[3 * DIGEST_BLOCK :])[0], 1, place(out[3:])[0]], np.uint64
    )
    assert loaded(*code).run(ctypes.c_void_p(place(table)[0]), None, None) == 0
    assert out.tolist() == [nh(b, key) for b in data.reshape(4, DIGEST_BLOCK)]


def test_a_digest_depends_on_every_byte_the_key_and_the_length_and_not_on_threads(code, key):
    one, three = Digest(lambda: code, key, 1), Digest(lambda: code, key, 3)
    data = np.frombuffer(np.random.default_rng(7).bytes(70 * DIGEST_BLOCK + 5), np.uint8).copy()
    base = one.of([place(data)])
    assert three.of([place(data)]) == base == one.of([place(data)], between=lambda: None)
    assert len(three.of([place(data[:100]), place(data[:0]), place(data)])) == 3
    seen = {base[0], one.of([place(data[:-1])])[0], Digest(lambda: code, key[::-1], 1).of([place(data)])[0]}
    for at in (0, 4095, 4096, 40 * DIGEST_BLOCK + 17, len(data) - 6, len(data) - 1):
        data[at] ^= 1
        seen.add(one.of([place(data)])[0])
        data[at] ^= 1
    swapped = np.concatenate([data[DIGEST_BLOCK : 2 * DIGEST_BLOCK], data[:DIGEST_BLOCK], data[2 * DIGEST_BLOCK :]])
    seen.add(one.of([place(swapped)])[0])
    assert len(seen) == 10
    with pytest.raises(ValueError, match="the key has 3 bytes"):
        Digest(lambda: code, b"abc", 1)


# ------------------------------------------------------------------------------------------------ in the cache


class Wide(tw.nn.Module):
    def __init__(self, n: int = 512) -> None:
        self.a = tw.nn.Linear(n, n)
        self.b = tw.nn.Linear(n, n)

    def __call__(self, x):
        return self.b(tw.relu(self.a(x)))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(net) compiles it as a process of its own would, and says whether its prepared weights came from a file."""
    monkeypatch.setattr(prepared, "WORTH", 1024 * 1024)
    monkeypatch.setattr(prepared.Entry, "_huge", lambda self: True)  # whatever file system the tests run on
    writers, got = [], []
    put, get = prepared.Entry.put, prepared.Entry.get

    def watched_put(self, outputs):
        writers.append(put(self, outputs))
        return writers[-1]

    def watched_get(self):
        got.append(get(self))
        return got[-1]

    monkeypatch.setattr(prepared.Entry, "put", watched_put)
    monkeypatch.setattr(prepared.Entry, "get", watched_get)

    def run(net, threads: int = 2):
        got.clear()
        with tw.config(cache=str(tmp_path / "cache"), validate=False):
            exe = tw.compile(net, tw.spec(8, 512), threads=threads)
        for w in writers:
            if w is not None:
                w.join()
        return exe, bool(got and got[-1] is not None)

    return run


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.twp"))


def test_the_third_start_maps_what_the_second_wrote(start, tmp_path):
    net, x = Wide(), np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)
    first, found = start(net)
    assert not found and not files(tmp_path)
    second, found = start(net)
    assert not found and len(files(tmp_path)) == 1
    third, found = start(net)
    assert found and len(files(tmp_path)) == 1
    assert first(x).tobytes() == second(x).tobytes() == third(x).tobytes()
    assert start(net, threads=1)[1]  # other code, the same prepared weights
    secret = tmp_path / "cache" / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    new = {n: np.ascontiguousarray(p[::-1]) for n, p in third.parameters.items()}
    want = first(x)
    third.set_parameters(new)
    first.set_parameters(new)
    assert third(x).tobytes() == first(x).tobytes() != want.tobytes()
    assert len(files(tmp_path)) == 1, "weights given later are not kept"


def test_other_weights_are_not_taken_for_them(start, tmp_path):
    net, x = Wide(), np.ones((8, 512), np.float32)
    for _ in range(3):
        exe, found = start(net)
    before = exe(x)
    weight = net.b.weight.data.copy()
    live = (net.a.weight.data @ x[0] + net.a.bias.data).argmax()  # a unit that its relu lets through
    weight.view(np.uint32)[300, live] ^= 1 << 22  # one bit
    net.b.weight.data = weight
    other, found = start(net)
    assert not found
    with tw.config(validate=False):
        fresh = tw.compile(net, tw.spec(8, 512), cache=False)
    assert other(x).tobytes() == fresh(x).tobytes() != before.tobytes()


@pytest.mark.parametrize("damage", ["bit", "header", "cut", "longer", "magic", "empty"])
def test_a_damaged_file_is_a_miss_and_goes(start, tmp_path, damage):
    net, x = Wide(), np.ones((8, 512), np.float32)
    want = start(net)[0](x)
    start(net)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 16
    elif damage == "header":
        data[60] ^= 1
    elif damage == "magic":
        data[0] ^= 1
    data = {"cut": data[:-64], "longer": data + bytes(64), "empty": b""}.get(damage, data)
    path.unlink()
    path.write_bytes(data)
    exe, found = start(net)
    assert not found and exe(x).tobytes() == want.tobytes()
    assert start(net)[1], "written again"


def test_a_folder_that_others_may_write_to_is_not_used(start, tmp_path):
    net = Wide()
    for _ in range(2):
        start(net)
    os.chmod(tmp_path / "cache", 0o777)
    with pytest.warns(UserWarning, match="others than its owner"):
        _, found = start(net)
    assert not found
    os.chmod(tmp_path / "cache", 0o700)
    os.chmod(tmp_path / "cache" / "secret", 0o644)  # a key that others have read is no secret: a new one, other names
    assert not start(net)[1]
    assert stat.S_IMODE((tmp_path / "cache" / "secret").stat().st_mode) == 0o600


def test_a_disk_slower_than_preparing_is_not_waited_for(start, tmp_path, monkeypatch):
    net = Wide()
    for _ in range(2):
        start(net)
    monkeypatch.setattr(prepared, "_PATIENCE", -1.0)
    monkeypatch.setattr(prepared, "_CHUNK", 256 * 1024)
    assert not start(net)[1] and len(files(tmp_path)) == 1
    monkeypatch.setattr(prepared, "_PATIENCE", 60.0)
    assert start(net)[1]


def test_they_take_half_of_the_cache_at_most_and_the_oldest_go(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    tmp_path.chmod(0o700)
    paths = [cache.prepared_path(f"{k:02d}" * 32) for k in range(4)]
    assert not cache.keep_prepared(paths[0], (bytes(501),))
    for age, p in enumerate(paths):
        assert cache.keep_prepared(p, (bytes(100), memoryview(bytes(100))))
        if p.exists():
            os.utime(p, (1000 + age, 1000 + age))
    assert [p.exists() for p in paths] == [False, False, True, True]
    killed = paths[3].parent / f".{paths[3].name}.0123.tmp"
    killed.write_bytes(b"half of it")
    os.utime(killed, (1000, 1000))
    cache.evict()
    assert not killed.exists() and paths[3].exists()
    assert cache.clear() == 2
