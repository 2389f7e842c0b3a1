"""Bad input through the whole compiler, each risky case in a process of its own: our error or a right result, no crash.

What the call path refuses is in test_executable.py, damaged files in test_artifact.py and test_container.py, hostile graph
text in tests/ir/test_text_hostile.py, two processes on one cache in test_cache.py and test_compile.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError, ShapeError

PRELUDE = """
import faulthandler, os, resource, sys, warnings
faulthandler.enable()
import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import TensorwrightError
"""


def child(code: str, *arguments: object, **environment: str) -> str:
    """What the code prints, in a process of its own. Fails if that ends in any way but by itself."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


SIZES = """
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # so that a machine with much memory refuses as well
outer = lambda x: x[:, None] * x[None, :]
cases = {
    "input 2**80": lambda: tw.compile(lambda x: x + 1, tw.spec(1 << 40, 1 << 40)),
    "input 2**62": lambda: tw.compile(lambda x: x + 1, tw.spec(1 << 62)),
    "never stored": lambda: tw.compile(lambda x: tw.zeros((1 << 40, 1 << 40)).sum() + x, tw.spec()),
    "intermediate": lambda: tw.compile(outer, tw.spec(1 << 32)),
    "symbolic": lambda: tw.compile(outer, tw.spec("N")).specialise(N=1 << 40),
    "symbolic 2**70": lambda: tw.compile(lambda x: x + 1, tw.spec("N")).specialise(N=1 << 70),
    "one-hot": lambda: tw.compile(lambda x: tw.one_hot(x, 1 << 62), tw.spec(3, dtype="i64")),
    "terabytes at the call": lambda: tw.compile(outer, tw.spec(1 << 21))(np.zeros(1 << 21, np.float32)),
    "terabytes from nothing": lambda: tw.compile(lambda x: tw.arange(1 << 40) + x, tw.spec(dtype="i64"))(np.int64(1)),
}
for name, case in cases.items():
    try:
        case()
        print(f"{name}: accepted")
    except TensorwrightError as error:
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
"""


@pytest.mark.unvalidated("the interpreter cannot compute them either")
def test_sizes_that_no_machine_has_are_errors_before_anything_is_made_of_them():
    said = dict(line.split(": ", 1) for line in child(SIZES).splitlines())
    at_call = {"terabytes at the call", "terabytes from nothing"}
    assert len(said) == 9
    for name, message in said.items():
        if name in at_call:
            assert "OutOfMemoryError: the model needs a block of" in message, (name, message)
        else:
            assert "ShapeError" in message and "bytes; an array has at most 2**56: check its shape" in message, (name, message)


LIES = """
import random, re
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
def misc(x, i):
    y = tw.take(x, i, axis=0).cumsum(axis=1)
    return tw.scatter_add(x, i, y * 2), x.argmax(axis=1), tw.softmax(x, -1)
net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
texts = [
    tw.compile(misc, tw.spec(6, 5), tw.spec(3, dtype="i64"), cache=False).text("fuse"),
    tw.compile(net, tw.spec(2, 1, 6, 6), cache=False).text("pack_weights"),
]
rng = random.Random(11)
counts = {"refused": 0, "ran": 0}
for trial in range(160):
    text = texts[trial % 2]
    for _ in range(rng.choice((1, 1, 2))):
        numbers = list(re.finditer(r"[0-9]+", text))
        at = rng.choice(numbers)
        new = rng.choice((str(int(at.group()) + 1), str(int(at.group()) * 2), "0", "1", "64", rng.choice(numbers).group()))
        text = text[: at.start()] + new + text[at.end() :]
    try:
        graph = tw.Graph.parse(text)
        exe = tw.compile(graph, cache=False, threads=1)
        arrays = [np.ones(t.static_shape, t.dtype.numpy) for _, t in exe.arguments]
        with tw.config(checked=True):
            tw.compile(graph, cache=False, threads=1)(*arrays)
        exe(*arrays)
        counts["ran"] += 1
    except TensorwrightError:
        counts["refused"] += 1
print(counts["refused"], counts["ran"])
"""


@pytest.mark.unvalidated("what is looked for is a crash; values are checked elsewhere")
def test_graph_text_with_other_numbers_is_refused_or_runs_within_its_bounds():
    refused, ran = map(int, child(LIES).split())
    assert refused > 60 and ran > 10


ENTRIES = """
from pathlib import Path
exe = lambda: tw.compile(lambda x: tw.tanh(x) * 3, tw.spec(2, 3))
x = np.ones((2, 3), np.float32)
right = exe()(x).copy()
(entry,) = Path(sys.argv[1]).rglob("*.twc")
sound = entry.read_bytes()
assert exe().compiled.from_cache
damaged = {
    "half": sound[: len(sound) // 2], "empty": b"", "head": sound[:48], "longer": sound + b"x", "zeros": bytes(len(sound)),
    "flipped": sound[:-9] + bytes([sound[-9] ^ 16]) + sound[-8:], "flipped length": sound[:9] + b"\\xff" + sound[10:],
}
for what, data in damaged.items():
    entry.write_bytes(data)
    again = exe()
    assert not again.compiled.from_cache and np.array_equal(again(x), right), what
    assert exe().compiled.from_cache, f"{what}: the entry was not made anew"
entry.unlink()
entry.mkdir()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    again = exe()
assert np.array_equal(again(x), right)
assert [w.category.__name__ for w in said] == ["CacheWarning"] and "irectory" in str(said[0].message), said
"""


@pytest.mark.unvalidated("validation bypasses the cache")
def test_whatever_lies_where_a_cache_entry_belongs_the_result_is_right(tmp_path: Path):
    child(ENTRIES, tmp_path / "cache", TENSORWRIGHT_CACHE=str(tmp_path / "cache"))


REFUSING = """
kind, folder = sys.argv[1:]
fn, x = (lambda x: tw.tanh(x) * 3), np.ones((2, 3), np.float32)
from tensorwright.compiler import compiler_digest

compiler_digest()  # reads the package's source, which the other user below may not be allowed to
right = tw.compile(fn, tw.spec(2, 3), cache=False)(x).copy()  # everything is imported now
if kind == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # a write beyond it fails, as on a full disk
elif kind in ("read-only", "unreadable") and os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)  # to root nothing is forbidden
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    results = [tw.compile(fn, tw.spec(2, 3))(x).copy() for _ in range(2)]
assert all(np.array_equal(r, right) for r in results)
print(*(f"{w.category.__name__}: {w.message}" for w in said), sep="\\n")
"""


@pytest.mark.unvalidated("validation bypasses the cache")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("read-only", "ermission denied|others than its owner"),
        ("unreadable", "ermission denied|others than its owner"),
        ("full", "File too large"),
        ("a file", "File exists|Not a directory"),
        ("below a file", "Not a directory"),
        ("open to all", "others than its owner"),
        ("missing", None),
    ],
)
def test_a_cache_that_takes_nothing_is_said_once_and_costs_no_result(tmp_path: Path, kind: str, reason: str | None):
    tmp_path.chmod(0o755)
    folder = tmp_path / "cache"
    if kind in ("a file", "below a file"):
        folder.write_text("")
        folder = folder / "deeper" if kind == "below a file" else folder
    elif kind == "missing":
        folder = folder / "some" / "where"
    else:
        folder.mkdir(mode=0o700)
        folder.chmod({"read-only": 0o555, "unreadable": 0o000, "open to all": 0o777}.get(kind, 0o700))
    said = child(REFUSING, kind, folder, TENSORWRIGHT_CACHE=str(folder)).strip()
    if folder.is_dir():
        folder.chmod(0o700)
    assert not list(tmp_path.rglob("*.tmp"))
    if reason is None:
        assert said == "" and list(folder.rglob("*.twc"))
    else:
        assert said.count("CacheWarning") == 1, said
        assert re.search(f"the compile cache .* cannot be written: .*({reason}).*TENSORWRIGHT_CACHE", said), said


@pytest.mark.parametrize("make", [np.asfortranarray, lambda x: x[::-1][::-1], lambda x: np.repeat(x, 2, 1)[:, ::2]])
def test_a_real_model_takes_arrays_however_they_lie(make):
    exe = tw.compile(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(-1)), tw.spec(4, 6))
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    x[0] = np.nan
    y = exe(x)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()
    assert np.array_equal(exe(make(x)), y, equal_nan=True)
    with pytest.raises(InputError, match="foreign byte order"):
        exe(make(x).astype(">f4"))


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_a_real_model_of_nothing(shape):
    exe = tw.compile(lambda x: (x @ x.T, x.sum(0), x.sum(1), tw.tanh(x), tw.concatenate([x, x])), tw.spec(*shape))
    x = np.zeros(shape, np.float32)
    expected = (x @ x.T, x.sum(0), x.sum(1), x, np.concatenate([x, x]))
    for y, want in zip(exe(x), expected, strict=True):
        assert y.shape == want.shape and np.array_equal(y, want)
    if shape[1] == 0:
        with pytest.raises(ShapeError, match=r"max over dimension 1 of .*, which is empty: it has no value"):
            tw.compile(lambda x: tw.softmax(x, -1), tw.spec(*shape))
