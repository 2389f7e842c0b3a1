"""LLVM in processes of its own: modules cut into pieces, the same results, refusals, workers that are gone."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.codegen.generate import assemble, begin
from tensorwright.codegen.llvm import Workers, pieces
from tensorwright.codegen.llvm.compile import data_layout, object_code
from tensorwright.codegen.llvm.entry import module_text
from tensorwright.ir.errors import CompileError
from tensorwright.ir.program import joined, objects_of
from tensorwright.runtime.elf import symbols
from tensorwright.runtime.native import NativeProgram

from .helpers import host


class Net(nn.Module):
    """Several products of different sizes, so that there are kernels to share out."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in ((20, 70), (70, 33), (33, 90), (90, 10))])

    def __call__(self, x):
        for layer in self.layers:
            x = tw.tanh(layer(x))
        return tw.softmax(x, -1)


@pytest.mark.unvalidated("the driver is not what is tested")
def test_pieces_are_linked_to_the_same_program(monkeypatch):
    monkeypatch.setattr(pieces, "LEAST", 10_000)
    monkeypatch.setattr("tensorwright.compiler.WORTH_WORKERS", 10**9)
    net, spec = Net(), tw.spec(5, 20)
    x = np.random.default_rng(0).standard_normal((5, 20)).astype(np.float32)
    whole = tw.compile(net, spec, cache=False)
    assert len(objects_of(whole.compiled.run.object_code)) == 1
    monkeypatch.setattr("tensorwright.compiler.WORTH_WORKERS", 1)
    cut = tw.compile(net, spec, cache=False)
    assert len(objects_of(cut.compiled.run.object_code)) == 2
    assert whole.text("llvm") == cut.text("llvm")
    assert np.array_equal(whole(x), cut(x))


def test_each_function_is_in_one_piece_and_calls_across_are_declared(monkeypatch):
    monkeypatch.setattr(pieces, "LEAST", 1_000)
    exe = tw.compile(Net(), tw.spec(5, 20), cache=False)
    text = exe.text("llvm").split("; ---- run\n")[1]
    cut = pieces.pieces(text, "main_run", 3)
    assert len(cut) == 3
    objects = [symbols(object_code(t, host())) for t in cut]
    defined = [n for o in objects for n in o.defined]
    assert len(defined) == len(set(defined)) and "main_run" in objects[0].defined
    assert objects[0].undefined >= set(defined) - objects[0].defined
    assert pieces.pieces(text, "main_run", 1) == [text]


def test_what_llvm_refuses_is_an_error_and_a_dead_worker_is_replaced():
    graph = tw.trace(lambda x: x, tw.spec(3))
    made = assemble(graph, host())
    text, _ = module_text(made.module, made.entry, host(), data_layout(host()), False)
    with Workers(1) as workers:
        with pytest.raises(CompileError, match="refused"):
            workers.begin("this is no module", "main_run", host(), 1)()
        (code,) = workers.begin(text, "main_run", host(), 1)()
        assert code == object_code(text, host())
        workers._workers[0]._process.kill()
        workers._workers[0]._process.wait()
        assert workers.begin(text, "main_run", host(), 1)() == [code]
        assert begin(graph, host(), workers=workers)().object_code == code
    assert not workers


def test_objects_are_joined_and_taken_apart():
    assert objects_of(joined([b"one"])) == [b"one"]
    assert objects_of(joined([b"one", b"", b"three"])) == [b"one", b"", b"three"]
    for wrong in (joined([b"one", b"two"])[:-1], joined([b"one", b"two"])[:20], joined([b"a", b"b"]) + b"c"):
        with pytest.raises(ValueError, match=r"objects|cut off"):
            objects_of(wrong)
        with pytest.raises(CompileError, match="does not load"):
            NativeProgram(wrong, "main_run")
