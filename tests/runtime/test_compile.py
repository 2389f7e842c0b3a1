"""From a model to results through the whole compiler: what `tw.compile` promises about calls, weights, cache and files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir.errors import ArtifactError, CompileError, InputError
from tensorwright.ir.interp import run as interpret
from tensorwright.runtime import host

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORWRIGHT_CACHE", str(tmp_path / "cache"))


def mlp() -> nn.Module:
    tw.seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))


def relative_error(got, want) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want)))


def expected(exe, *inputs):
    from tensorwright.ir.dtypes import f64

    names = [n for n, _ in exe.arguments]
    return interpret(exe.graph, {**exe.parameters, **dict(zip(names, inputs, strict=True))}, dtype=f64)


def test_a_module_a_function_and_a_graph_compute_the_same():
    net = mlp()
    x = RNG.random((4, 20), dtype=np.float32)
    exe = tw.compile(net, tw.spec(4, 20))
    want = expected(exe, x)[0]
    assert relative_error(exe(x), want) < 1e-6
    assert relative_error(tw.compile(lambda a: net(a * 1), x)(x), want) < 1e-6
    graph = tw.trace(net, tw.spec(4, 20))
    values = [x if i.attrs["role"] == "data" else net.state_dict()[i.attrs["name"]] for i in graph.inputs]
    assert relative_error(tw.compile(graph)(*values), want) < 1e-6


def test_stages_are_text_from_the_trace_to_the_assembly():
    exe = tw.compile(mlp(), tw.spec(4, 20))
    assert exe.stages[0] == "graph" and exe.stages[-3:] == ("loops", "llvm", "asm")
    assert "simplify" in exe.stages and "simplify.2" in exe.stages
    assert "matmul" in exe.text("graph") and "kernel" in exe.text("loops")
    assert "define" in exe.text("llvm") and "main_run" in exe.text("asm")
    assert {p.name for p in exe.passes} <= set(exe.stages)


@pytest.mark.unvalidated("validation bypasses the cache")
def test_the_second_compile_comes_from_the_cache_and_tells_the_same():
    x = RNG.random((4, 20), dtype=np.float32)
    cold, warm = (tw.compile(mlp(), tw.spec(4, 20)) for _ in range(2))
    assert not cold.compiled.from_cache and warm.compiled.from_cache
    assert warm.stages == cold.stages and warm.memory == cold.memory
    assert [p.name for p in warm.passes] == [p.name for p in cold.passes]
    for stage in ("graph", "fuse", "llvm"):
        assert warm.text(stage) == cold.text(stage)
    assert np.array_equal(warm(x), cold(x))


@pytest.mark.unvalidated("validation bypasses the cache")
def test_other_weights_of_the_same_model_come_from_the_same_entry():
    first = tw.compile(mlp(), tw.spec(4, 20))
    tw.seed(1)
    other = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
    exe = tw.compile(other, tw.spec(4, 20))
    x = RNG.random((4, 20), dtype=np.float32)
    assert exe.compiled.from_cache
    assert relative_error(exe(x), expected(exe, x)[0]) < 1e-6
    assert not np.allclose(exe(x), first(x))


def test_the_cache_can_be_off(tmp_path):
    for options in ({"cache": False}, {}):
        with tw.config(cache="off" if not options else str(tmp_path / "cache")):
            exe = tw.compile(mlp(), tw.spec(4, 20), **options)
        assert not exe.compiled.from_cache
    assert not (tmp_path / "cache").exists()


@pytest.mark.unvalidated("validation bypasses the cache")
def test_a_cache_entry_that_is_cut_in_half_is_made_anew(tmp_path):
    x = RNG.random((4, 20), dtype=np.float32)
    want = tw.compile(mlp(), tw.spec(4, 20))(x)
    (entry,) = (tmp_path / "cache").rglob("*.twc")
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    again = tw.compile(mlp(), tw.spec(4, 20))
    assert not again.compiled.from_cache and np.array_equal(again(x), want)
    assert tw.compile(mlp(), tw.spec(4, 20)).compiled.from_cache


def test_options_that_change_code_have_entries_of_their_own():
    tw.compile(mlp(), tw.spec(4, 20))
    assert not tw.compile(mlp(), tw.spec(4, 20), target="x86-64-v2").compiled.from_cache
    assert not tw.compile(mlp(), tw.spec(5, 20)).compiled.from_cache
    with tw.config(checked=True):
        assert not tw.compile(mlp(), tw.spec(4, 20)).compiled.from_cache


PROCESS = """
import numpy as np, tensorwright as tw
from tensorwright import nn
tw.seed(0)
x = np.linspace(0, 1, 80, dtype=np.float32).reshape(4, 20)
exe = tw.compile(nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5)), tw.spec(4, 20))
print(exe(x).tobytes().hex(), exe.compiled.from_cache)
"""


@pytest.mark.unvalidated("validation bypasses the cache")
def test_processes_that_compile_the_same_at_once_agree():
    env = dict(os.environ)
    pair = [subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    results = [p.communicate(timeout=120)[0].split() for p in pair]
    assert [p.returncode for p in pair] == [0, 0]
    assert results[0][0] == results[1][0]
    exe = tw.compile(mlp(), tw.spec(4, 20))
    x = np.linspace(0, 1, 80, dtype=np.float32).reshape(4, 20)
    assert exe.compiled.from_cache and exe(x).tobytes().hex() == results[0][0]


@pytest.mark.parametrize("target", host.runnable_rows())
def test_every_row_this_machine_runs_agrees_and_threads_change_no_bit(target):
    def fn(x, w):
        return tw.softmax(tw.relu(x @ w), -1), (x @ w).sum(0)

    x, w = RNG.standard_normal((300, 200), np.float32), RNG.standard_normal((200, 129), np.float32)
    one = tw.compile(fn, x, w, target=target, threads=1)
    two = tw.compile(fn, x, w, target=target, threads=2)
    assert any(k.parallel for k in two.compiled.run.kernels)
    want = expected(one, x, w)
    first = one(x, w)
    for got, reference in zip(first, want, strict=True):
        assert relative_error(got, reference) < 1e-5
    # the first calls try all threads and one: both ways must give the bits of the one-thread program
    for _ in range(6):
        assert all(np.array_equal(a, b) for a, b in zip(two(x, w), first, strict=True))


def test_code_for_another_machine_can_be_read_but_not_called():
    other = "aarch64-neon" if host.machine() == "x86_64" else "x86-64-v3"
    exe = tw.compile(mlp(), tw.spec(4, 20), target=other)
    assert "main_run" in exe.text("asm")
    with pytest.raises(InputError, match=f"is code for {other}, which this machine cannot run"):
        exe(np.zeros((4, 20), np.float32))
    with pytest.raises(CompileError, match="unknown target 'z80'"):
        tw.compile(mlp(), tw.spec(4, 20), target="z80")


def test_a_symbolic_size_is_compiled_per_size():
    exe = tw.compile(mlp(), tw.spec("N", 20))
    for n in (1, 7, 1, 16):
        x = RNG.random((n, 20), dtype=np.float32)
        got = exe(x)
        fixed = tw.compile(mlp(), tw.spec(n, 20))
        assert got.shape == (n, 5) and relative_error(got, expected(fixed, x)[0]) < 1e-6
    with pytest.raises(InputError, match="rank 1"):
        exe(np.zeros(20, np.float32))


def test_nested_arguments_and_results():
    def fn(batch, scale, pair):
        a, b = pair
        return {"sum": a + batch["x"], "more": [b * scale, batch["x"]]}

    x, a, b = (RNG.random((3,), dtype=np.float32) for _ in range(3))
    exe = tw.compile(fn, {"x": x}, 2.0, (a, b))
    result = exe({"x": x}, 2.0, (a, b))
    assert np.array_equal(result["sum"], a + x) and np.array_equal(result["more"][0], b * 2)
    assert isinstance(result["more"], list) and np.array_equal(result["more"][1], x)
    with pytest.raises(InputError, match="nested"):
        exe({"y": x}, 2.0, (a, b))


def test_weights_can_be_exchanged():
    net, other = mlp(), mlp()
    exe = tw.compile(net, tw.spec(4, 20))
    x = RNG.random((4, 20), dtype=np.float32)
    before = exe(x)
    for p in other.parameters():
        p.data = p.data * 2
    exe.set_parameters(other.state_dict())
    assert relative_error(exe(x), expected(tw.compile(other, tw.spec(4, 20)), x)[0]) < 1e-6
    exe.set_parameters(net.state_dict())
    assert np.array_equal(exe(x), before)


def test_save_and_load(tmp_path):
    x = RNG.random((3, 20), dtype=np.float32)
    exe = tw.compile(mlp(), tw.spec("N", 20))
    exe.save(tmp_path / "net.tw")
    assert np.array_equal(tw.load(tmp_path / "net.tw")(x), exe(x))
    data = (tmp_path / "net.tw").read_bytes()
    (tmp_path / "net.tw").write_bytes(data[:-5])
    with pytest.raises(ArtifactError, match=r"net\.tw is not a sound \.tw file"):
        tw.load(tmp_path / "net.tw")
    with pytest.raises(FileNotFoundError):
        tw.load(tmp_path / "none.tw")


def test_one_executable_serves_several_threads():
    exe = tw.compile(mlp(), tw.spec("N", 20))
    inputs = [RNG.random((n, 20), dtype=np.float32) for n in (1, 2, 3)]
    want = [np.array(exe(x)) for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for i in range(200):
            j = (i + k) % 3
            if not np.array_equal(exe(inputs[j]), want[j]):
                wrong.append(j)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_dump_writes_numbered_stages(tmp_path):
    tw.compile(mlp(), tw.spec(4, 20), dump=tmp_path / "dump")
    names = sorted(p.name for p in (tmp_path / "dump").rglob("*.txt"))
    assert names[0] == "000_graph.txt" and names[-1].endswith("_asm.txt")
    assert [int(n[:3]) for n in names] == sorted({int(n[:3]) for n in names}), "numbers must tell the order"


def test_validate_checks_the_passes(monkeypatch):
    from tensorwright.passes import validate

    checked = []
    original = validate.Validator.__call__
    monkeypatch.setattr(validate.Validator, "__call__", lambda self, p, *rest: (checked.append(p.name), original(self, p, *rest)))
    tw.compile(mlp(), tw.spec(2, 20), validate=True)
    assert "fuse" in checked


def test_a_bounds_checked_build_computes_the_same():
    x = RNG.random((4, 20), dtype=np.float32)
    with tw.config(checked=True):
        checked = tw.compile(mlp(), tw.spec(4, 20))
    assert np.array_equal(checked(x), tw.compile(mlp(), tw.spec(4, 20))(x))


def test_profile_names_kernels_and_rates():
    exe = tw.compile(mlp(), tw.spec(64, 20), threads=1)
    profile = exe.profile(np.zeros((64, 20), np.float32), repeats=3)
    assert [k.name for k in profile.kernels] == [k.name for k in exe.compiled.run.kernels]
    assert all(0 < k.milliseconds < 1000 for k in profile.kernels)
    assert all(k.fraction_of_peak is not None and k.fraction_of_peak <= 1.05 for k in profile.kernels), "above the roofline"
    assert sum(k.share for k in profile.kernels) == pytest.approx(1, abs=0.2)


def test_parameters_of_a_graph_are_all_given_or_none():
    graph = tw.trace(mlp(), tw.spec(4, 20))
    with pytest.raises(CompileError, match="no value for the parameters"):
        tw.compile(graph, parameters={"0.weight": np.zeros((33, 20), np.float32)})


def test_a_cap_on_threads(monkeypatch):
    monkeypatch.setenv("TENSORWRIGHT_THREADS", "1")
    assert tw.compile(mlp(), tw.spec(4, 20)).threads == 1
    assert tw.compile(mlp(), tw.spec(4, 20), threads=2).threads == 2
    with tw.config(threads=3):
        assert tw.compile(mlp(), tw.spec(4, 20)).threads == 3


@pytest.mark.unvalidated("two arrays of a million elements: more than the interpreter is asked for")
def test_calls_take_no_memory_from_the_system_after_the_first():
    """Page faults count what Python's allocator and tracemalloc would miss: native code, and large arrays."""
    import resource

    net = mlp()
    small = tw.compile(net, tw.spec(1, 20))
    large = tw.compile(lambda a, b: tw.tanh(a) * b + tw.softmax(a, -1), tw.spec(1024, 1024), tw.spec(1024, 1024))
    for exe, inputs in ((small, 1), (large, 2)):
        arrays = [np.ones(t.static_shape, np.float32) for _, t in exe.arguments]
        assert len(arrays) == inputs
        for _ in range(8):
            y = exe(*arrays)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            y = exe(*arrays)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert y.nbytes and faults < 50, f"{faults} page faults in 50 calls; one fresh output of the large model takes 1,024"


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_inputs_need_no_more_alignment_than_an_element(offset):
    def fn(a, b):
        return tw.relu(a @ b) + 1, a.sum(1), tw.softmax(b, -1)

    def at(array):
        room = np.zeros(array.size + 32, np.float32)
        start = (-room.ctypes.data % 64) // 4 + offset
        view = room[start : start + array.size].reshape(array.shape)
        view[...] = array
        return view

    a, b = RNG.standard_normal((37, 64), np.float32), RNG.standard_normal((64, 48), np.float32)
    exe = tw.compile(fn, a, b)
    outs = [at(np.zeros_like(y)) for y in exe(a, b)]
    for got, want in zip(exe(at(a), at(b), out=outs), exe(a, b), strict=True):
        assert np.array_equal(got, want)


def test_tensors_of_torch_are_taken_through_dlpack():
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing else here exports DLPack for dtypes of its own")
    exe = tw.compile(mlp(), tw.spec(4, 20))
    t = torch.rand(4, 20)
    assert np.array_equal(exe(t), exe(t.numpy()))
    assert np.array_equal(exe(t.T.contiguous().T), exe(t.numpy()))
    for bad in (t.clone().requires_grad_(), t.to(torch.bfloat16), t.double(), t.to("meta")):
        with pytest.raises(InputError, match="input 0"):
            exe(bad)


def test_importing_does_not_load_the_compiler():
    code = "import sys, tensorwright; print([m for m in sys.modules if m.startswith(('llvmlite', 'rich', 'networkx', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    assert done.stdout.strip() == "[]"
