"""Weights that `release_weights` puts in a file: the same results, and arrays that behave as before."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import InputError, TensorwrightError
from tensorwright.runtime.mapped import mapping_of
from tensorwright.runtime.parked import LARGE, Park


class Net(nn.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(300, 320)
        self.last = nn.Linear(320, 4)

    def __call__(self, x: Any) -> Any:
        return self.last(tw.tanh(self.first(x)))


SPEC = tw.spec(2, 300)


def _x() -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal((2, 300), np.float32)


def _in_file(array: Any) -> bool:
    owner = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner is not None


def test_results_and_weights_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWRIGHT_CACHE", str(tmp_path))
    module = Net()
    before = {n: a.copy() for n, a in module.state_dict().items()}
    plain = tw.compile(module, SPEC)(_x())
    exe = tw.compile(module, SPEC, release_weights=True)
    assert exe(_x()).tobytes() == plain.tobytes()
    assert _in_file(module.first.weight.data) and not _in_file(module.last.weight.data)  # a small one stays
    assert {n: a.tobytes() for n, a in module.state_dict().items()} == {n: a.tobytes() for n, a in before.items()}
    assert exe.parameters["first.weight"].tobytes() == before["first.weight"].tobytes()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".twc", ".obj", "")]  # the file has no name
    exe.save(tmp_path / "m.tw")
    assert tw.load(tmp_path / "m.tw")(_x()).tobytes() == plain.tobytes()


def test_writing_to_weights_changes_the_module_alone() -> None:
    module = Net()
    exe = tw.compile(module, SPEC, release_weights=True, cache=False)
    was = exe(_x())
    module.first.weight.data[:] = 0
    assert (module.first.weight.data == 0).all()
    assert exe(_x()).tobytes() == was.tobytes()
    again = tw.compile(module, SPEC, release_weights=True, cache=False)  # what is in the module now, from a file of its own
    assert again(_x()).tobytes() == tw.compile(module, SPEC, cache=False)(_x()).tobytes()
    assert exe(_x()).tobytes() == was.tobytes()


def test_training_goes_on_after_it() -> None:
    x, y = _x(), np.array([1, 3], np.int32)
    start = {n: a.copy() for n, a in Net().state_dict().items()}

    def trained(release: bool) -> dict[str, bytes]:
        module = Net()
        module.load_state_dict(start)
        if release:
            tw.compile(module, SPEC, release_weights=True, cache=False)
        trainer = tw.Trainer(module, loss=tw.losses.cross_entropy, optimizer=tw.optim.SGD(0.1))
        trainer.fit(x, y, batch_size=2, epochs=2, verbose=False)
        return {n: a.tobytes() for n, a in module.state_dict().items()}

    assert trained(True) == trained(False)


def test_an_array_that_others_hold_stays() -> None:
    module = Net()
    held = module.first.weight.data
    tw.compile(module, SPEC, release_weights=True, cache=False)
    assert module.first.weight.data is held


def test_what_a_program_reads_can_be_given_back(tmp_path: Path) -> None:
    values = [np.arange(LARGE // 4, dtype=np.float32).reshape(2, -1), np.ones(5, np.int8)]
    with Park([v.nbytes for v in values], tmp_path) as park:
        made = [park.put(k, v) for k, v in enumerate(values)]
    for v, (writable, fixed) in zip(values, made, strict=True):
        assert writable.flags.writeable and mapping_of(writable) is None
        assert not fixed.flags.writeable and mapping_of(fixed) is not None
        writable[...] = 7
        assert fixed.tobytes() == v.tobytes() and fixed.shape == writable.shape == v.shape and fixed.dtype == v.dtype


def test_errors(tmp_path: Path) -> None:
    graph = tw.trace(lambda x: x + 1, tw.spec(2))
    with pytest.raises(InputError, match="release_weights= is for the weights of Modules"):
        tw.compile(graph, release_weights=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TensorwrightError, match="cannot be put in a file"):
        Park([LARGE], tmp_path / "file")
