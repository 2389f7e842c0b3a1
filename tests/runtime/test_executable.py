"""The call path, on a hand-made program y = x + 1: what is accepted, what is refused, what is allocated, what is shared."""

from __future__ import annotations

import mmap
import sys
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import tensorwright as tw
import tensorwright.ir.ops
from tensorwright.ir.build import full, input_node
from tensorwright.ir.dims import symbol
from tensorwright.ir.errors import CompileError, InputError
from tensorwright.ir.graph import Graph
from tensorwright.ir.op import make
from tensorwright.ir.program import Argument, Program
from tensorwright.ir.types import tensor
from tensorwright.runtime import host
from tensorwright.runtime.buffers import address_of, empties, empty
from tensorwright.runtime.compiled import Compiled
from tensorwright.runtime.executable import Executable
from tensorwright.runtime.mapped import mapping_of, release
from tensorwright.runtime.pages import Settling, make_present


def graph_of(shape, role: str = "data", aliases=()) -> Graph:
    x = input_node("x", tensor("f32", shape), role)
    return Graph((x,), (make("add", x, full(1.0, x.tensor)),), name="plus_one", aliases=aliases)


@pytest.fixture
def plus_one(add_one):
    def make_it(shape=(2, 3), parameters=None, aliases=(), role="data", **more) -> Executable:
        def build(sizes):
            sizes_now = tuple(sizes.get(str(d), d) for d in shape)
            return Compiled(add_one(sizes_now, aliases=aliases), texts={"graph": "text", "late": lambda: "made"})

        dims = tuple(symbol(d) if isinstance(d, str) else d for d in shape)
        return Executable(graph_of(dims, role, aliases), build, parameters, **more)

    return make_it


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def read_only() -> np.ndarray:
    x = X.copy()
    x.flags.writeable = False
    return x


class OnlyDLPack:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **more):
        return self._array.__dlpack__(**more)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnAnotherDevice(OnlyDLPack):
    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **more):
        raise BufferError("the array is on a CUDA device")


class Subclass(np.ndarray):
    pass


def misaligned() -> np.ndarray:
    raw = np.zeros(X.nbytes + 1, np.uint8)
    view = raw[1:].view(np.float32).reshape(2, 3)
    view[...] = X
    assert not view.flags.aligned
    return view


@pytest.mark.parametrize(
    "value",
    [
        X,
        read_only(),
        np.asfortranarray(X),
        np.repeat(X, 2, axis=1)[:, ::2],
        X[::-1][::-1],
        np.broadcast_to(X[:1], (2, 3)),
        misaligned(),
        X.view(Subclass),
        OnlyDLPack(X),
    ],
    ids=["plain", "read-only", "fortran", "strided", "reversed", "broadcast", "misaligned", "subclass", "dlpack"],
)
def test_what_is_an_array_of_the_right_type_works(plus_one, value):
    exe = plus_one()
    expected = (value._array if isinstance(value, OnlyDLPack) else np.asarray(value)) + 1
    for _ in range(2):  # the careful way, then the fast one
        assert np.array_equal(exe(value), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.astype(np.float64), r"input 0 \('x'\): expected f32\[2, 3\], got f64\[2, 3\]; convert it with x.astype\(np.float32\)"),
        (X.astype(np.int32), r"got i32\[2, 3\]"),
        (X.astype(">f4"), "foreign byte order"),
        (X.astype(ml_dtypes.bfloat16), r"got bf16\[2, 3\]"),
        (X.astype(complex), r"got complex128\[2, 3\]"),
        (X.astype(object), r"got object\[2, 3\]"),
        (np.array("text"), r"got <U4\[\]"),
        (X[0], r"expected f32\[2, 3\] \(rank 2\), got f32\[3\] \(rank 1\)"),
        (X[None], r"\(rank 3\)"),
        (X.T, r"expected f32\[2, 3\], got f32\[3, 2\]"),
        (X[:0], r"got f32\[0, 3\]"),
        (X.tolist(), "got a list; use np.asarray"),
        (1.0, "got a float"),
        (None, "got a NoneType"),
        (OnAnotherDevice(X), "CUDA device.*on the CPU"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_was_expected(plus_one, value, message):
    exe = plus_one()
    exe(X)
    with pytest.raises(InputError, match=message):
        exe(value)
    assert np.array_equal(exe(X), X + 1)


def test_the_number_of_inputs_is_checked(plus_one):
    exe = plus_one()
    for inputs in ((), (X, X)):
        with pytest.raises(InputError, match=r"plus_one takes 1 inputs \(x: f32\[2, 3\]\), got"):
            exe(*inputs)


def test_nan_and_infinity_go_through(plus_one):
    x = np.array([[np.nan, np.inf, -np.inf], [0.0, -0.0, 1e38]], np.float32)
    assert np.array_equal(plus_one()(x), x + 1, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), ()])
def test_empty_arrays_and_scalars(plus_one, shape):
    exe = plus_one(shape)
    x = np.full(shape, 2, np.float32)
    assert np.array_equal(exe(x), x + 1) and exe(x).shape == shape
    if shape == ():
        assert exe(2.0) == 3 and exe(np.float32(2)) == 3 and exe(True + 1) == 3
        with pytest.raises(InputError, match="expected a f32 scalar, got True"):
            exe(True)


# ---------------------------------------------------------------------------------------------------- outputs


def test_an_output_is_not_used_again_while_anybody_sees_it(plus_one):
    exe = plus_one()
    first = exe(X)
    views = [first[0], first.T, first.reshape(-1)[2:], memoryview(first), np.from_dlpack(first)]
    place = address_of(first)
    del first
    for kept in range(len(views), 0, -1):
        results = [exe(X + n) for n in range(8)]
        assert place not in map(address_of, results), f"used again while {type(views[0])} still sees it"
        del results
        views.pop()
        assert kept == len(views) + 1
    results = [exe(X) for _ in range(8)]
    assert all(np.array_equal(r, X + 1) for r in results)


def test_a_dropped_output_is_used_again(plus_one):
    exe = plus_one()
    places = set()
    for _ in range(50):
        y = exe(X)
        places.add(address_of(y))
    assert len(places) <= 2


def test_outputs_of_a_model_with_several_are_kept_apart(assemble):
    text = """
    target triple = "x86_64-unknown-linux-gnu"
    define i32 @main_run(ptr %b, ptr %d, ptr %ctx) {
      %x = load ptr, ptr %b
      %v = load float, ptr %x
      %y0 = getelementptr ptr, ptr %b, i64 1
      %y1 = getelementptr ptr, ptr %b, i64 2
      %p0 = load ptr, ptr %y0
      %p1 = load ptr, ptr %y1
      store float %v, ptr %p0
      %n = fneg float %v
      store float %n, ptr %p1
      ret i32 0
    }"""
    x = input_node("x", tensor("f32", ()))
    graph = Graph((x,), (x, make("neg", x)))
    t = tensor("f32", ())
    program = Program("main", host.host(), (Argument("x", t),), (Argument("a", t), Argument("b", t)), (), 0, (), assemble(text))
    exe = Executable(graph, lambda sizes: Compiled(program))
    kept = [exe(np.float32(n)) for n in range(10)]  # only the tuples are held
    assert [(float(a), float(b)) for a, b in kept] == [(n, -n) for n in range(10)]
    a, _ = exe(np.float32(5))
    assert all(exe(np.float32(n))[0] is not a for n in range(10)) and a == 5
    one, other = np.zeros((), np.float32), np.zeros((), np.float32)
    assert exe(np.float32(7), out=(one, other)) == (one, other) and (one, other) == (7, -7)
    with pytest.raises(InputError, match="out= for 'b' shares memory with out= for 'a'"):
        exe(np.float32(7), out=(one, one[None].reshape(())))


def test_out_takes_the_result(plus_one):
    exe = plus_one()
    y = np.zeros((2, 3), np.float32)
    assert exe(X, out=y) is y
    assert np.array_equal(y, X + 1)
    wide = np.zeros((2, 6), np.float32)
    assert np.array_equal(exe(X, out=wide[:, ::2]), X + 1) and np.array_equal(wide[:, ::2], X + 1) and not wide[:, 1::2].any()
    x = np.zeros(7, np.float32)
    x[:6] = X.ravel()
    shifted = x[1:].reshape(2, 3)
    result = exe(x[:6].reshape(2, 3), out=shifted)  # the output overlaps the input, one element on
    assert result is shifted and np.array_equal(shifted, X + 1)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((2, 3)), r"out= for 'y' must be f32\[2, 3\], got f64"),
        (np.zeros((3, 2), np.float32), r"got f32\[3, 2\]"),
        (read_only(), "read-only"),
        ([], "out= has 0 arrays, the model has 1"),
        ([[1.0]], "got a list"),
        (5, r"out= takes an array, or a list or tuple of arrays in the order of the outputs \(y\); got a int"),
        ({"y": X}, "got a dict"),
    ],
)
def test_an_out_that_does_not_fit(plus_one, out, message):
    with pytest.raises(InputError, match=message):
        plus_one()(X, out=out)


# ---------------------------------------------------------------------------------------------------- allocation, threads


def test_a_call_allocates_nothing_after_the_first(plus_one):
    exe = plus_one((256, 256))
    x = np.zeros((256, 256), np.float32)
    for _ in range(4):
        y = exe(x)
    loop = range(200)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in loop:
            y = exe(x)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert y[0, 0] == 1
    assert after - before < 100, "something is kept from each call"
    # the objects that pass through Python (the argument tuple, the address) come and go; an array would be 262,144 bytes
    assert peak - before < 2048


def test_threads_share_one_executable(plus_one):
    exe = plus_one((64, 64))
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        kept = []
        for _ in range(300):
            x = rng.random((64, 64), dtype=np.float32)
            kept.append((x, exe(x)))
            if len(kept) > 3:
                x, y = kept.pop(0)
                if not np.array_equal(y, x + 1):
                    wrong.append(f"thread {seed}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_arrays_of_ours_are_aligned_and_zero():
    for shape in ((), (0,), (3,), (1000, 7), (2048, 1024)):
        array = empty(shape, tensor("f32", ()).dtype)
        assert address_of(array) % 64 == 0 and array.shape == shape and not array.any()
    several = empties([tensor("f32", (3, 5)), tensor("f32", (0,)), tensor("f32", ()), tensor("f32", (1200, 1000))])
    for k, array in enumerate(several):
        assert address_of(array) % 64 == 0 and not array.any()
        array[...] = k
    assert [a.shape for a in several] == [(3, 5), (0,), (), (1200, 1000)]
    assert isinstance(several[0].base, mmap.mmap)
    settling = Settling(several)
    for _ in range(100):
        settling.after(1.0)
    assert settling.done and all((array == k).all() for k, array in enumerate(several))
    assert Settling(empties([tensor("f32", (3,))])).done and Settling([]).done


def test_pages_that_are_present_are_zero_and_not_asked_for_again():
    several = empties([tensor("f32", (3, 5)), tensor("f32", (2200, 1000))])
    make_present(several, 2)
    assert all(not array.any() for array in several)
    several[1][...] = 7
    settling = Settling(several)
    while not settling.done:
        settling.after(1.0)
    assert (several[1] == 7).all()
    make_present(empties([tensor("f32", (3,))]), 2)  # too little for a page
    make_present([], 2)


def test_mapped_weights_are_used_where_they_lie(tmp_path):
    """Read-only maps of files: found through views, never those that take writes."""
    table = np.arange(600_000, dtype=np.float32).reshape(-1, 4)
    table.tofile(tmp_path / "table")
    mapped = np.memmap(tmp_path / "table", np.float32, "r", shape=table.shape)
    found = mapping_of(mapped[1:].reshape(-1)[::2])
    assert found is not None and mapping_of(table) is None
    assert mapping_of(np.memmap(tmp_path / "table", np.float32, "c", shape=table.shape)) is None
    before = mapped.sum()
    release(found)
    assert mapped.sum() == before
    net = tw.nn.Embedding(*table.shape)
    exe = tw.compile(tw.trace(net, tw.spec(3, dtype="i64")), parameters={"weight": mapped})
    assert np.array_equal(exe(np.array([0, 7, 9])), table[[0, 7, 9]])
    assert np.shares_memory(exe.parameters["weight"], mapped)


# ---------------------------------------------------------------------------------------------------- sizes, weights, state


def test_symbolic_sizes_are_specialised_per_call(plus_one):
    exe = plus_one(("N", 3))
    assert exe.symbols == ("N",)
    with pytest.raises(InputError, match=r"has not met one: call it, or exe.specialise\(N=...\)"):
        exe.text("graph")
    for n in (2, 5, 2, 1):
        x = np.ones((n, 3), np.float32)
        assert np.array_equal(exe(x), x + 1)
        assert exe.memory.inputs == n * 12
    with pytest.raises(InputError, match="N"):
        exe(np.ones((2, 4), np.float32))
    exe.specialise(N=9)
    assert exe.memory.outputs == 9 * 12
    with pytest.raises(InputError, match=r"has the symbolic sizes \['N'\], got \['M'\]"):
        exe.specialise(M=1)
    for size in (0, -3, 2.5, True, "8"):
        with pytest.raises(InputError, match=r"size N: expected an integer of at least 1, got"):
            exe.specialise(N=size)


def test_text_and_stages(plus_one):
    exe = plus_one()
    assert exe.stages == ("graph", "late")
    assert (exe.text("graph"), exe.text("late")) == ("text", "made")
    with pytest.raises(InputError, match="no stage 'asm'; there are graph, late"):
        exe.text("asm")


def test_memory_is_known_before_a_run(plus_one):
    exe = plus_one((2, 3))
    found = exe.memory
    assert (found.arena, found.constants, found.state, found.prepared, found.inputs, found.outputs) == (64, 0, 0, 0, 24, 24)
    assert exe.peak_bytes == found.total == 112


def test_donated_state_is_updated_in_place_and_not_returned(plus_one):
    exe = plus_one(parameters={"x": X}, aliases=((0, 0),), role="state")
    assert exe() == () and exe() == ()
    assert np.array_equal(exe.parameters["x"], X + 2)
    assert X[0, 1] == 1, "the caller's array must not be written to"
    snapshot = exe.parameters["x"]
    exe()
    assert np.array_equal(snapshot, X + 2)
    exe.set_parameters({"x": X})
    exe()
    assert np.array_equal(exe.parameters["x"], X + 1)
    profile = exe.profile(repeats=3)
    assert profile.kernels[0].name == "add_one"
    assert np.array_equal(exe.parameters["x"], X + 1), "profiling must not train"


def test_a_donated_argument_comes_back_as_the_output(plus_one):
    exe = plus_one(aliases=((0, 0),))
    x = X.copy()
    assert exe(x) is x and np.array_equal(x, X + 1)
    with pytest.raises(InputError, match=r"input 'x' is donated.*x\.copy\(\)"):
        exe(read_only())
    with pytest.raises(InputError, match="is donated"):
        exe(np.asfortranarray(X))


def test_bound_weights_are_ours(plus_one):
    weights = X.copy()
    exe = plus_one(parameters={"x": weights}, role="parameter")
    weights[...] = 100
    assert np.array_equal(exe(), X + 1)
    with pytest.raises(ValueError, match="read-only"):
        exe.parameters["x"][...] = 0
    with pytest.raises(InputError, match="read-only"):
        exe(out=exe.parameters["x"])
    exe.set_parameters({"x": weights})
    assert np.array_equal(exe(), weights + 1)
    with pytest.raises(InputError, match=r"unknown parameters \['w'\]"):
        exe.set_parameters({"w": X})
    with pytest.raises(InputError, match=r"parameter 'x': expected f32\[2, 3\], got f32\[3\]"):
        exe.set_parameters({"x": X[0]})
    assert np.array_equal(exe(), weights + 1)


def test_unknown_parameters_are_refused(plus_one):
    with pytest.raises(CompileError, match=r"parameters \['w'\] are no inputs of the graph"):
        plus_one(parameters={"w": X})


def test_code_that_cannot_run_here_can_be_read_but_not_called(plus_one):
    exe = plus_one(not_runnable="this is for another machine")
    assert exe.text("graph") == "text"
    with pytest.raises(InputError, match="this is for another machine"):
        exe(X)


def test_profile_against_a_peak(plus_one):
    exe = plus_one((64, 64), peak=lambda threads: 100.0 * threads)
    profile = exe.profile(np.zeros((64, 64), np.float32), repeats=2)
    (kernel,) = profile.kernels
    assert profile.peak_gflops == 100 and profile.to_dict()["kernels"][0]["nodes"] == ("add",)
    assert "add_one" in str(profile) and kernel.share in (0.0, 1.0)
    with pytest.raises(InputError, match="repeats: expected an integer of at least 1, got 0"):
        exe.profile(np.zeros((64, 64), np.float32), repeats=0)


def test_a_profile_is_of_a_program_whose_pages_are_settled(monkeypatch):
    """However new it is: of two copies of one program, one that has run for long has no advantage."""
    asked = []
    monkeypatch.setattr("tensorwright.runtime.executable.make_present", lambda arrays, threads: None)
    monkeypatch.setattr(Settling, "after", lambda self, seconds: asked.append(seconds))
    net = tw.nn.Linear(1024, 1024)  # 4 MB: two pages and more
    exe = tw.compile(net, tw.spec(16, 1024))
    x = np.ones((16, 1024), np.float32)
    exe(x)
    exe.profile(x, repeats=1)
    exe.profile(x, repeats=1)
    exe(x)
    assert asked.count(np.inf) == 1 and asked[-1] == np.inf, "once, and calls do not ask after it"
