from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tensorwright.runtime import host
from tensorwright.runtime.binding import Binding
from tensorwright.runtime.cache import CacheWarning, DiskCache, Key, default_folder, source_digest, source_stamp
from tensorwright.runtime.compiled import Compiled, PassRecord


@pytest.fixture
def key() -> Key:
    return Key("graph", host.host(), (("threads", 2),), "compiler", "llvm")


@pytest.fixture
def compiled(add_one) -> Compiled:
    constants = (np.arange(6, dtype=np.float32).reshape(2, 3), np.array(True), np.zeros((0, 2), np.int64))
    program = dataclasses.replace(add_one(), constants=constants, aliases=())
    return Compiled(program, add_one(name="prepare"), "same", {}, (PassRecord("fuse", "exact", 9, 4, 1.5, True),))


def equal(a: Compiled, b: Compiled) -> bool:
    for p, q in ((a.run, b.run), (a.prepare, b.prepare)):
        plain = {f.name for f in dataclasses.fields(p)} - {"constants", "texts"}
        if any(getattr(p, n) != getattr(q, n) for n in plain):
            return False
        if [(c.dtype, c.shape, c.tobytes()) for c in p.constants] != [(c.dtype, c.shape, c.tobytes()) for c in q.constants]:
            return False
    return a.passes == b.passes and a.prepare_key == b.prepare_key


def test_an_entry_comes_back_whole_and_runs(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache")
    assert cache.get(key) is None
    assert cache.put(key, compiled)
    found = cache.get(key)
    assert found is not None and found.from_cache and equal(found, compiled)
    x = np.ones((2, 3), np.float32)
    assert np.array_equal(Binding(found.run, {}, 1).call((x,)), x + 1)


def test_any_part_of_the_key_changes_it(key):
    others = [
        dataclasses.replace(key, graph="other"),
        dataclasses.replace(key, target=dataclasses.replace(key.target, l2=1)),
        dataclasses.replace(key, flags=(("threads", 1),)),
        dataclasses.replace(key, compiler="other"),
        dataclasses.replace(key, llvm="other"),
    ]
    assert len({k.digest() for k in (key, *others)}) == 6
    assert len(others) == len(dataclasses.fields(Key)), "a part of the key is not tested"


def test_the_compilers_source_decides(tmp_path):
    (tmp_path / "ir").mkdir()
    (tmp_path / "ir" / "a.py").write_text("x = 1\n")
    digests = [source_digest(tmp_path, ("ir",))]
    (tmp_path / "ir" / "a.py").write_text("x = 2\n")
    digests.append(source_digest(tmp_path, ("ir",)))
    (tmp_path / "ir" / "a.py").rename(tmp_path / "ir" / "b.py")
    digests.append(source_digest(tmp_path, ("ir",)))
    assert len(set(digests)) == 3


def test_the_digest_of_sources_is_read_again_only_when_a_file_changed(tmp_path):
    (tmp_path / "ir" / "ops").mkdir(parents=True)
    (tmp_path / "ir" / "ops" / "a.py").write_text("x = 1\n")
    cache, read = DiskCache(tmp_path / "cache"), []

    def digest() -> str:
        read.append(source_digest(tmp_path, ("ir",)))
        return read[-1]

    assert cache.source("stamp", digest) == cache.source("stamp", digest) and len(read) == 2  # no folder to remember it in
    (tmp_path / "cache").mkdir(mode=0o700)
    stamp = source_stamp(tmp_path, ("ir",))
    first = cache.source(stamp, digest)
    assert cache.source(source_stamp(tmp_path, ("ir",)), digest) == first and len(read) == 3
    (tmp_path / "ir" / "ops" / "a.py").write_text("x = 23\n")
    assert cache.source(source_stamp(tmp_path, ("ir",)), digest) != first and len(read) == 4
    (tmp_path / "cache" / "source").write_bytes(b"damaged")
    assert cache.source(source_stamp(tmp_path, ("ir",)), digest) == read[3]


def test_an_entry_cut_off_or_with_flipped_bytes_is_a_miss_and_goes_away(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache")
    rng = random.Random(3)
    for trial in range(60):
        cache.put(key, compiled)
        (path, size, _), *_ = cache.entries()
        data = bytearray(path.read_bytes())
        if trial % 2:
            del data[size * trial // 60 :]
        else:
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert cache.get(key) is None
        assert cache.entries() == []


def test_an_entry_filed_under_another_key_is_a_miss(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache")
    other = dataclasses.replace(key, graph="other")
    cache.put(key, compiled)
    (path, _, _), *_ = cache.entries()
    wrong = cache._path(other)
    wrong.parent.mkdir(exist_ok=True)
    path.rename(wrong)
    assert cache.get(other) is None


def test_a_folder_that_others_may_write_to_is_not_believed(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache")
    cache.put(key, compiled)
    (tmp_path / "cache").chmod(0o777)
    assert cache.get(key) is None
    with pytest.warns(CacheWarning, match="others than its owner may write to it.*TENSORWRIGHT_CACHE"):
        assert not cache.put(key, compiled)
    assert not cache.put(key, compiled), "said once for a folder"
    (tmp_path / "cache").chmod(0o700)
    assert cache.get(key) is not None


def test_the_cache_stays_within_its_size_and_drops_what_was_used_longest_ago(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache")
    keys = [dataclasses.replace(key, graph=str(i)) for i in range(4)]
    for age, k in enumerate(keys[:3]):
        cache.put(k, compiled)
        os.utime(cache._path(k), (1000 + age, 1000 + age))
    size = cache.entries()[0][1]
    assert cache.get(keys[0]) is not None  # used now: no longer the oldest
    cache.max_bytes = 3 * size
    cache.put(keys[3], compiled)
    assert [cache.get(k) is not None for k in keys] == [True, False, True, True]
    assert cache.clear() == 3 and cache.entries() == []


def test_a_disk_that_takes_nothing_costs_no_error(tmp_path, key, compiled):
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "cache")
    with pytest.warns(CacheWarning, match=r"cannot be written: Not a directory"):
        assert not cache.put(key, compiled)
    assert cache.get(key) is None


FILL = """
import sys
import tempfile
from pathlib import Path
from tensorwright.runtime import host
from tensorwright.runtime.cache import DiskCache, Key
cache = DiskCache(Path(sys.argv[1]))
key = Key("graph", host.host(), (("threads", 2),), "compiler", "llvm")
seed = DiskCache(Path(sys.argv[2])).get(key)
assert seed is not None
print("ready", flush=True); sys.stdin.readline()
for i in range(40):
    assert cache.put(key, seed)
    found = cache.get(key)
    assert found is not None and found.run.object_code == seed.run.object_code
"""


def test_two_processes_that_fill_one_entry_do_no_harm(tmp_path: Path, key, compiled):
    assert DiskCache(tmp_path / "seed").put(key, compiled)
    command = [sys.executable, "-c", FILL, str(tmp_path / "cache"), str(tmp_path / "seed")]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for p in pair:
        assert p.stdout is not None and p.stdout.readline() == "ready\n"
    for p in pair:
        p.communicate("go\n", timeout=60)
    assert [p.returncode for p in pair] == [0, 0]
    cache = DiskCache(tmp_path / "cache")
    assert cache.get(key) is not None and len(cache.entries()) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_where_the_cache_lies_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tensorwright"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "tensorwright"

    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder() == Path(tempfile.gettempdir()) / f"tensorwright-{os.getuid()}"


def test_what_is_no_entry_of_ours_is_left_alone(tmp_path, key, compiled):
    cache = DiskCache(tmp_path / "cache", max_bytes=0)
    odd = tmp_path / "cache" / "ab" / "folder.twc"
    odd.mkdir(parents=True)
    (tmp_path / "cache").chmod(0o700)
    assert cache.put(key, compiled) and cache.entries() == []
    entry = cache._path(key)
    entry.mkdir()  # a folder where an entry belongs
    assert cache.get(key) is None
    with pytest.warns(CacheWarning, match="directory"):
        assert not cache.put(key, compiled)
    assert cache.clear() == 0 and odd.is_dir() and entry.is_dir()
