"""3x3 convolutions by Winograd's method: where it is used, what it computes, how far it errs, and how to forbid it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import cli, nn
from tensorwright.codegen.contraction import preferred_panel
from tensorwright.codegen.generate import assemble
from tensorwright.codegen.loop_ir import Store, statements
from tensorwright.driver import build
from tensorwright.ir.build import get, input_node
from tensorwright.ir.dtypes import f32, f64
from tensorwright.ir.errors import InputError, ValidationError
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait, lookup, make
from tensorwright.ir.ops import winograd as transforms
from tensorwright.ir.target import row
from tensorwright.ir.types import TensorType
from tensorwright.passes import pipeline
from tensorwright.passes import winograd as module
from tensorwright.passes import winograd_parts as parts
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm, spec_of
from tensorwright.passes.facts import Facts
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator
from tensorwright.passes.winograd import Choice, Convolution, Winograd, choose, convolution_of
from tensorwright.passes.winograd_gradient import Blocks
from tensorwright.runtime.host import runnable_rows
from tensorwright.settings import config, flags

Array = np.ndarray[Any, Any]
TARGET = row("x86-64-v4")
SAME = ((1, 1), (1, 1))
ANY = Winograd(least=0, gain=0.0)
CHANNELS = module.CHANNELS


def inp(name: str, *shape: int, role: str = "data", dtype: Any = f32) -> Node:
    return input_node(name, TensorType(dtype, shape), role)


def layer(n: int, height: int, width: int, c: int, o: int, *, role: str = "parameter", **attrs: Any) -> Graph:
    """One convolution in NHWC with 3x3 weights."""
    x, w = inp("x", n, height, width, c), inp("w", o, c, 3, 3, role=role)
    return Graph((x, w), (make("conv2d", x, w, layout="NHWC", **{"padding": SAME, **attrs}),))


def backward(n: int, height: int, width: int, c: int, o: int, padding: Any = SAME) -> Graph:
    """The data gradient of one convolution from c to o channels."""
    dy, w = inp("dy", n, height, width, o), inp("w", o, c, 3, 3, role="parameter")
    (top, bottom), (left, right) = padding
    shape = (n, height + 2 - top - bottom, width + 2 - left - right, c)
    return Graph((dy, w), (make("conv2d_input_grad", dy, w, layout="NHWC", padding=padding, input_shape=shape),))


def context(fuel: int | None = None) -> Context:
    return Context(target=TARGET, preferred_panel=preferred_panel, fuel=fuel)


def before(graph: Graph) -> Graph:
    """The graph as it comes to the pass."""
    passes = pipeline.training(TARGET)
    at = next(k for k, p in enumerate(passes) if isinstance(p, Winograd))
    return run_pipeline(graph, passes[:at], context(), Hooks())


def transformed(graph: Graph, p: Winograd = ANY) -> Graph:
    return run_pipeline(before(graph), [ContractForm(), p], context(), Hooks(verify=True, validate=Validator()))


def tiles(graph: Graph) -> list[int]:
    """The tile sizes of the Winograd convolutions in a graph, loops included."""
    found: list[int] = []
    for n in graph.nodes():
        body = n.attrs.get("body")
        if isinstance(body, Graph):
            found += tiles(body)
        elif n.op.name == "winograd_output":
            found.append(n.attrs["tile"])
    return found


def only_contraction(graph: Graph) -> Node:
    facts = Facts()
    (found,) = [n for n in graph.nodes() if n.inputs and spec_of(n, facts) is not None]
    return found


def drawn(graph: Graph, seed: int = 0) -> list[Array]:
    """Activations as after a relu, and weights as He initialisation draws them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in graph.inputs:
        a = rng.standard_normal(i.tensor.static_shape, np.float32)
        weight = i.attrs["name"] == "w"
        made.append(a * np.float32((2 / (9 * i.shape[1])) ** 0.5) if weight else np.maximum(a, 0))
    return made


def error(found: Array, exact: Array) -> float:
    return float(np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max())


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_any_size_is_the_same_sum_as_before(tile: int, images: int, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f64 by the interpreter, so that only the algebra is judged: sizes that are whole tiles, that are not, one pixel."""
    monkeypatch.setattr(module, "choose", lambda conv, target, fixed: Choice(tile, images if conv.n > images else 0, 2.0))
    for height, width in ((4, 8), (7, 5), (1, 2), (9, 4)):
        make_one = layer if direction == "forward" else backward
        for padding in (SAME, ((1, 0), (2, 1))):
            if direction == "backward" and padding != SAME and height < 2:
                continue
            graph = make_one(4, height + 2, width + 2, 16, 32, padding=padding)
            plain = before(graph)
            after = transformed(graph)
            assert tiles(after) == [tile]
            assert any(n.op.has(Trait.CONTROL) for n in after.nodes()) == bool(images)
            arrays = [a.astype(np.float64) for a in drawn(graph)]
            (exact,), (found,) = run(plain, arrays, dtype=f64), run(after, arrays, dtype=f64)
            assert error(found, exact) < 1e-13


def test_the_transforms_are_those_of_the_textbook() -> None:
    """By matrices at the points, in f64: U = G g G', V = B' d B, y = A' M A for Cook-Toom's A, B, G."""
    rng = np.random.default_rng(0)
    for m, (p, q) in transforms.POINTS.items():
        points = [0.0, p, -p] + ([q, -q] if m == 4 else [])
        scale = [1 / np.prod([t - u for u in points if u != t]) for t in points]
        g_matrix = np.array([[s * t**k for k in range(3)] for t, s in zip(points, scale, strict=True)] + [[0, 0, 1]])
        a_matrix = np.array([[t**k for t in points] + [float(k == m - 1)] for k in range(m)])
        g = rng.standard_normal((3, 3))
        u = np.array(transforms.both_ways(transforms.weight_line, m, list(g)))
        assert np.allclose(u, g_matrix @ g @ g_matrix.T, atol=1e-14)
        x = rng.standard_normal((m + 2, m + 2))
        y = np.array(transforms.both_ways(transforms.output_line, m, list(x)))
        assert np.allclose(y, a_matrix @ x @ a_matrix.T, atol=1e-13)
        d = rng.standard_normal((m + 2, m + 2))  # B follows from the two: the identity of the whole fixes it
        v = np.array(transforms.both_ways(transforms.input_line, m, list(d)))
        direct = [[(d[i : i + 3, j : j + 3] * g).sum() for j in range(m)] for i in range(m)]
        assert np.allclose(a_matrix @ (u * v) @ a_matrix.T, direct, atol=1e-13)


def test_an_infinity_or_nan_stays_in_its_tiles_and_is_not_lost() -> None:
    graph = layer(1, 12, 12, 16, 16)
    after = transformed(graph)
    x, w = drawn(graph)
    x[0, 5, 5, 3] = np.nan
    (plain,), (found,) = run(before(graph), [x, w]), run(after, [x, w])
    assert (np.isnan(found) >= np.isnan(plain)).all() and np.isnan(plain).any()
    tile = tiles(after)[0]
    first, last = (4 // tile) * tile, (6 // tile + 1) * tile
    spoilt = np.zeros_like(found, bool)
    spoilt[:, first:last, first:last] = True
    assert not (np.isnan(found) & ~spoilt).any()


# --------------------------------------------------------------------------------------------------- where it is used


def test_what_is_no_such_convolution_stays() -> None:
    x = inp("x", 2, 12, 12, 32)

    def one(op: str, x: Node, w: Node, **attrs: Any) -> Graph:
        return Graph((x, w), (make(op, x, w, layout="NHWC", **attrs),))

    cases = {
        "stride": layer(2, 12, 12, 32, 32, stride=(2, 2)),
        "one stride": layer(2, 12, 12, 32, 32, stride=(1, 2)),
        "dilation": layer(2, 12, 12, 32, 32, dilation=(2, 2)),
        "few channels": layer(2, 12, 12, 3, 32),
        "few outputs": layer(2, 12, 12, 32, 10),
        "groups": one("conv2d", x, inp("w", 32, 16, 3, 3), padding=SAME, groups=2),
        "1x1": one("conv2d", x, inp("w", 32, 32, 1, 1)),
        "5x5": one("conv2d", x, inp("w", 32, 32, 5, 5)),
        "3x1": one("conv2d", x, inp("w", 32, 32, 3, 1)),
        "few weights": one("conv2d_weight_grad", x, inp("dy", 2, 10, 10, 10), kernel_shape=(10, 32, 3, 3)),
        "strided weights": one("conv2d_weight_grad", x, inp("dy", 2, 5, 5, 32), kernel_shape=(32, 32, 3, 3), stride=(2, 2)),
        "f64": one("conv2d", inp("x", 1, 8, 8, 16, dtype=f64), inp("w", 16, 16, 3, 3, dtype=f64)),
        "product": Graph((p := inp("a", 64, 64), q := inp("b", 64, 64)), (make("matmul", p, q),)),
    }
    for name, graph in cases.items():
        plain = before(graph)
        assert ANY.apply(plain, context()) is plain, name
    plain = before(layer(2, 12, 12, 32, 32))
    small = before(layer(1, 6, 6, 16, 32))
    assert Winograd().apply(small, context()) is small, "small layers gain nothing"
    assert ANY.apply(plain, Context()) is plain, "without a target nothing is known to be faster"
    assert ANY.apply(plain, Context(target=row("x86-64-v2"))) is plain, "without fused multiply-adds"
    assert ANY.apply(plain, context(fuel=0)) is plain


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_both_layouts_and_both_directions_are_recognised(layout: str) -> None:
    shape = (2, 16, 8, 9) if layout == "NCHW" else (2, 8, 9, 16)
    x, w = inp("x", *shape), inp("w", 32, 16, 3, 3)
    y = make("conv2d", x, w, layout=layout, padding=SAME)
    dx = make("conv2d_input_grad", make("tanh", y), w, layout=layout, padding=SAME, input_shape=shape)
    plain = before(Graph((x, w), (make("tanh", y), make("neg", dx))))
    found = [convolution_of(s) for n in plain.nodes() if n.inputs and (s := spec_of(n, Facts())) is not None]
    assert {(f.c, f.o, f.reverse) for f in found if f} == {(16, 32, False), (32, 16, True)}
    assert all((f.n, f.height, f.width) == (2, 8, 9) for f in found if f)
    assert len(tiles(transformed(Graph((x, w), (make("tanh", y), make("neg", dx)))))) == 2


def conv(n: int, size: int, channels: int) -> Convolution:
    return Convolution(n, size, size, channels, channels, (1, 2, 3, 0), False)


def test_the_model_chooses_as_measurements_do() -> None:
    """The layers of ResNet-50 at batch 1 and of ResNet-18 at batch 32, all of which gain."""
    for size, channels in ((56, 64), (28, 128), (14, 256)):
        best = choose(conv(1, size, channels), TARGET, True)
        assert best is not None and best.tile == 4 and best.images == 0 and best.gain > 1.5
    best = choose(conv(1, 7, 512), TARGET, True)
    assert best is not None and best.gain > 1.15, "7x7 images fill 49 of 64 pixels, but gain"
    for size, channels in ((32, 64), (16, 128), (8, 256), (4, 512)):
        best = choose(conv(32, size, channels), TARGET, False)
        assert best is not None and best.tile == 4 and best.gain > 1.5
    blocked = choose(conv(32, 32, 64), TARGET, False)
    assert blocked is not None and 0 < blocked.images < 32, "what lies between the transforms of 32 images is no cache's size"
    few = choose(conv(1, 7, 512), TARGET, False)
    assert few is None or few.gain < 1.15, "38 MB of transformed weights for 49 pixels"


def test_the_transform_of_weights_counts_where_they_change() -> None:
    """38 MB of transformed weights for two images of 7x7: in inference that is done beforehand."""
    graph = layer(2, 7, 7, 512, 512)
    plain = before(graph)
    prepared, stepped = Winograd().apply(plain, context()), Winograd(prepare=False).apply(plain, context())
    assert tiles(prepared) and stepped is plain
    used = [p for p in pipeline.training(TARGET) if isinstance(p, Winograd)]
    assert used == [Winograd(prepare=False)]


def test_weights_are_transformed_outside_of_a_loop_over_images() -> None:
    """In a loop that gets weights from outside, as accumulation of gradients does, they are the same in every step."""
    p0, p1 = inp("p0", 1, 28, 28, 64), inp("p1", 64, 64, 3, 3)
    body = Graph((p0, p1), (make("tanh", make("conv2d", p0, p1, layout="NHWC", padding=SAME)),))
    xs, w = inp("xs", 3, 1, 28, 28, 64), inp("w", 64, 64, 3, 3)
    loop = make("scan", xs, w, body=body, length=3, carries=0, sequences=1)
    after = run_pipeline(Graph((xs, w), (get(loop, 0),)), pipeline.training(TARGET), context())
    (inside,) = [n.attrs["body"] for n in after.nodes() if n.op.has(Trait.CONTROL)]
    assert tiles(Graph(inside.inputs, inside.outputs)) and "= winograd_weight(" not in str(inside)
    assert "= winograd_weight(" in str(after)


def test_weights_are_transformed_once_in_inference_and_packed() -> None:
    nn.init.seed(0)
    net = nn.Conv2d(64, 64, 3, padding=1)
    exe = tw.compile(net, tw.spec(1, 64, 32, 32), cache=False, validate=False)
    assert "winograd_weight" in exe.text("prepare")
    after = exe.text("fuse").partition("winograd_output")[0]
    assert "panel" in after
    run_only = exe.text("loops").partition("---- run")[2]
    assert "winograd_weight" not in run_only and "winograd_input" in run_only


def test_a_tile_is_loaded_once_and_stored_side_by_side() -> None:
    """36 (or 16) stores in one visit; were each computed apart, a tile would be loaded and transformed 36 times."""
    x = inp("x", 2, 10, 10, 32)
    y = inp("m", 6, 6, 2, 2, 2, 32)
    w = inp("w", 32, 3, 3, 32)
    for graph, stores in (
        (Graph((x,), (make("winograd_input", x, tile=4),)), 36),
        (Graph((x,), (make("winograd_input", x, tile=2),)), 16),
        (Graph((y,), (make("tanh", make("winograd_output", y, tile=4, size=(8, 8))),)), 16),
        (Graph((w,), (make("winograd_weight", w, tile=4),)), 36),
    ):
        made = assemble(run_pipeline(graph, pipeline.training(TARGET), context()), TARGET)
        (kernel,) = made.module.kernels
        assert sum(isinstance(s, Store) for s in statements(kernel.body)) == stores


# ------------------------------------------------------------------------------------------------------- compiled code


def compiled(graph: Graph, arrays: list[Array], threads: int = 1, **changes: Any) -> Array:
    with config(**{"threads": threads, "cache": "off", "validate": False, "winograd": True, **changes}):
        exe = build(graph, {}, purpose="training")
        y = exe(*arrays)
    return np.array(y)


@pytest.mark.unvalidated("layers large enough to gain take the interpreter too long")
@pytest.mark.parametrize("target", [t for t in ("x86-64-v3", "x86-64-v4") if t in runnable_rows()])
@pytest.mark.parametrize(
    ("n", "size", "channels"), [(1, 28, 64), (8, 16, 64), (1, 14, 128), (4, 7, 256), (16, 4, 256), (3, 13, 96)]
)
def test_layers_err_by_less_than_the_budget_and_threads_do_not_matter(n: int, size: int, channels: int, target: str) -> None:
    for graph in (layer(n, size, size, channels, channels, role="data"), backward(n, size, size, channels, channels)):
        arrays = drawn(graph)
        (exact,) = run(graph, [a.astype(np.float64) for a in arrays], dtype=f64)
        found = compiled(graph, arrays, target=target)
        assert error(found, exact) < module.BUDGET
        assert found.tobytes() == compiled(graph, arrays, threads=2, target=target).tobytes()
        direct = compiled(graph, arrays, target=target, winograd=False)
        assert error(direct, exact) < 2e-6
        assert found.tobytes() != direct.tobytes(), "Winograd's method was not used"


@pytest.mark.unvalidated("layers large enough to gain take the interpreter too long")
@pytest.mark.parametrize("size", [32, 14])
def test_gradients_through_it(size: int) -> None:
    """The loss, and its gradients for data and weights of two layers, of which the inner one has both."""
    x, w = inp("x", 4, 64, size, size), inp("w", 64, 64, 3, 3)
    one = make("tanh", make("conv2d", x, w, padding=SAME))
    two = make("tanh", make("conv2d", one, w, padding=SAME))
    loss = make("sum", make("mul", two, two), axes=(0, 1, 2, 3), keepdims=False)
    grads = make("gradient", loss, x, w)
    graph = Graph((x, w), (loss, get(grads, 0), get(grads, 1)))
    expanded = run_pipeline(graph, pipeline.parse("gradient,drop_marks"))
    arrays = drawn(graph)
    exact = run(expanded, [a.astype(np.float64) for a in arrays], dtype=f64)
    with config(threads=1, cache="off", validate=False):
        exe = build(graph, {}, purpose="training")
        found = [np.array(v) for v in exe(*arrays)]
    assert len(set(tiles(run_pipeline(graph, pipeline.training(TARGET), context())))) == 1
    for a, b in zip(found, exact, strict=True):
        assert error(np.asarray(a), b) < 3 * module.BUDGET  # up to three layers lie between


def test_the_epilogue_is_part_of_the_last_transform() -> None:
    """At batch 1: bias, residual and relu cost no further pass over the result."""
    x, w = inp("x", 1, 56, 56, 64), inp("w", 64, 64, 3, 3, role="parameter")
    b, r = inp("b", 64, role="parameter"), inp("r", 1, 56, 56, 64)
    y = make("add", make("conv2d", x, w, layout="NHWC", padding=SAME), make("broadcast_to", b, shape=r.shape))
    y = make("tanh", make("add", y, r))
    after = run_pipeline(Graph((x, w, b, r), (y,)), pipeline.inference(TARGET), context())
    (last,) = after.outputs
    names = [n.op.name for n in last.attrs["body"].nodes()]
    assert {"winograd_output", "add", "tanh"} <= set(names)


# --------------------------------------------------------------------------------------------------- bugs and flags


def test_a_planted_bug_is_found_and_blamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The gradient with its taps in the order of the forward pass; and a transform with a wrong factor."""
    right = module.convolution_of

    def careless(spec: Any) -> Any:
        found = right(spec)
        return found and Convolution(found.n, found.height, found.width, found.c, found.o, found.order, False)

    plain = before(backward(1, 6, 6, 16, 16))
    with monkeypatch.context() as m:
        m.setattr(module, "convolution_of", careless)
        with pytest.raises(ValidationError, match="winograd") as caught:
            run_pipeline(plain, [ContractForm(), ANY], context(), Hooks(validate=Validator(folder=tmp_path)))
    assert caught.value.rule == "winograd" and caught.value.pass_name == "winograd"  # type: ignore[attr-defined]
    op = lookup("winograd_output")
    wrong = op.reference
    object.__setattr__(op, "reference", lambda arrays, attrs: np.asarray(wrong(arrays, attrs)) * np.float32(1 + 1e-4))
    try:
        with pytest.raises(ValidationError, match="winograd"):
            run_pipeline(plain, [ContractForm(), ANY], context(), Hooks(validate=Validator(folder=tmp_path)))
    finally:
        object.__setattr__(op, "reference", wrong)
    run_pipeline(plain, [ContractForm(), ANY], context(), Hooks(validate=Validator(folder=tmp_path)))


def test_it_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    nn.init.seed(0)
    net, spec = nn.Conv2d(64, 64, 3, padding=1), tw.spec(1, 64, 24, 24)

    def used(**options: Any) -> bool:
        exe = tw.compile(net, spec, cache=False, validate=False, **options)
        return "winograd_output(" in exe.text("fuse")  # not above: the text quotes the line of the call

    assert used() and not used(winograd=False) and used(winograd=True)
    with config(winograd=False):
        assert not used() and used(winograd=True)
    monkeypatch.setenv("TENSORWRIGHT_WINOGRAD", "0")
    assert not used()
    assert ("winograd", False) in flags().code_flags(), "the cache must tell them apart"
    monkeypatch.setenv("TENSORWRIGHT_WINOGRAD", "maybe")
    with pytest.raises(InputError, match="TENSORWRIGHT_WINOGRAD"):
        flags()


def test_it_can_be_forbidden_on_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.py"
    model.write_text("from tensorwright import nn\nnet = nn.Conv2d(64, 64, 3, padding=1)\n")
    for more, used in (((), True), (("--no-winograd",), False)):
        command = ["inspect", f"{model}:net", "--spec", "1,64,24,24", "--no-cache", "--stage", "fuse", *more]
        with config(validate=False):
            assert cli.main(command) == 0
        assert ("winograd_output(" in capsys.readouterr().out) == used


def test_options_print_and_parse() -> None:
    (p,) = pipeline.parse("winograd{least=7}")
    assert p == Winograd(least=7) and str(p) == "winograd{least=7}" and Winograd.budget == 1e-5
    assert not any(isinstance(q, Winograd) for q in pipeline.training(TARGET, "f32", False))


def test_the_spec_of_a_layer() -> None:
    found = convolution_of(spec_of(only_contraction(before(layer(2, 6, 5, 16, 32))), Facts()))  # type: ignore[arg-type]
    assert found is not None and found.flops == 2 * 9 * 2 * 6 * 5 * 16 * 32


@pytest.mark.unvalidated("a step large enough to gain has more elements than are validated")
def test_training_steps_use_it_unless_forbidden() -> None:
    """In both directions and for weights; and with a memory budget, or on other numbers of threads, no bit changes."""
    from tensorwright.frontend.training import training_step

    class Net(tw.nn.Module):
        def __init__(self) -> None:
            self.first, self.second = tw.nn.Conv2d(16, 64, 3, padding=1), tw.nn.Conv2d(64, 64, 3, padding=1)

        def __call__(self, x: Any) -> Any:
            return tw.tanh(self.second(tw.tanh(self.first(x)))).mean((2, 3))

    nn.init.seed(0)
    traced = training_step(Net(), tw.losses.cross_entropy, tw.optim.SGD(0.1), tw.spec(8, 16, 32, 32), tw.spec(8, dtype="i64"))
    rng = np.random.default_rng(0)
    batch = np.array(0.1, np.float32), rng.standard_normal((8, 16, 32, 32), np.float32), rng.integers(0, 64, 8)

    def stepped(budget: int | None = None, **changes: Any) -> Any:
        with config(**changes):
            exe = build(traced.graph, traced.initial_state(), purpose="training", memory_budget=budget)
            exe(*batch)
        return exe

    plain = stepped(threads=1)
    text = plain.text("fuse")
    assert all(f"= winograd_{part}(" in text for part in ("weight", "input", "output", "spread", "gather"))
    tight = stepped(plain.memory.total - plain.memory.activations // 3, threads=1)
    assert tight.remat.points
    for other in (tight, stepped(threads=2), stepped(threads=4)):
        assert all(v.tobytes() == other.parameters[k].tobytes() for k, v in plain.parameters.items())


# ------------------------------------------------------------------------------------------------- gradients of weights


def weights_gradient(n: int, height: int, width: int, c: int, o: int, **attrs: Any) -> Graph:
    x, dy = inp("x", n, height, width, c), inp("dy", n, height, width, o)
    made = make("conv2d_weight_grad", x, dy, layout="NHWC", kernel_shape=(o, c, 3, 3), **{"padding": SAME, **attrs})
    return Graph((x, dy), (made,))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_the_gradient_of_weights_is_the_same_sum(tile: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f64 by the interpreter, in one piece, over blocks of images, and (in one piece) over channels in turns."""
    monkeypatch.setattr(module, "choose_gradient", lambda g, target: Blocks(tile, images, 2.0))
    for piece in (parts.PIECE, 200_000):
        monkeypatch.setattr(parts, "PIECE", piece)
        for height, width, c, o in ((4, 8, 32, 16), (7, 5, 16, 32), (1, 2, 16, 16)):
            graph = weights_gradient(4, height, width, c, o)
            plain, after = before(graph), transformed(graph)
            loops = [n for n in after.nodes() if n.op.has(Trait.CONTROL)]
            assert len(loops) == (images < 4 or (piece < 4 * (tile + 2) ** 2 * c * o and c == 32))
            arrays = [a.astype(np.float64) for a in drawn(graph)]
            (exact,), (found,) = run(plain, arrays, dtype=f64), run(after, arrays, dtype=f64)
            assert error(found, exact) < 1e-13


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_channels_in_turns_are_the_same_sum(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PIECE", 40_000)
    graph = (layer if direction == "forward" else backward)(2, 7, 5, 32, 32)
    after = transformed(graph, Winograd(least=0, gain=0.0, prepare=False))
    (loop,) = [n for n in after.nodes() if n.op.has(Trait.CONTROL)]
    assert loop.attrs["length"] == 2 and "winograd_weight" in str(loop.attrs["body"])
    arrays = [a.astype(np.float64) for a in drawn(graph)]
    (exact,), (found,) = run(before(graph), arrays, dtype=f64), run(after, arrays, dtype=f64)
    assert error(found, exact) < 1e-13


def test_transforms_of_the_gradient_are_transposes() -> None:
    """<A' M A, dy> = <M, A dy A'> and <G g G', s> = <g, G' s G>."""
    rng = np.random.default_rng(0)
    for m in transforms.POINTS:
        products, dy = rng.standard_normal((m + 2, m + 2)), rng.standard_normal((m, m))
        y, spread = (
            np.array(transforms.both_ways(line, m, list(x)))
            for line, x in ((transforms.output_line, products), (transforms.spread_line, dy))
        )
        assert np.isclose((y * dy).sum(), (products * spread).sum(), rtol=1e-13)
        taps = rng.standard_normal((3, 3))
        u, gathered = (
            np.array(transforms.both_ways(line, m, list(x)))
            for line, x in ((transforms.weight_line, taps), (transforms.gather_line, products))
        )
        assert np.isclose((u * products).sum(), (taps * gathered).sum(), rtol=1e-13)


@pytest.mark.unvalidated("layers large enough to gain take the interpreter too long")
@pytest.mark.parametrize("target", [t for t in ("x86-64-v3", "x86-64-v4") if t in runnable_rows()])
@pytest.mark.parametrize(("n", "size", "channels"), [(8, 32, 64), (16, 8, 128), (32, 4, 256), (4, 13, 96)])
def test_gradients_of_weights_err_by_less_than_the_budget(n: int, size: int, channels: int, target: str) -> None:
    graph = weights_gradient(n, size, size, channels, channels)
    x, dy = drawn(graph)
    dy = np.random.default_rng(1).standard_normal(dy.shape, np.float32)
    (exact,) = run(graph, [x.astype(np.float64), dy.astype(np.float64)], dtype=f64)
    found = compiled(graph, [x, dy], target=target)
    assert error(found, exact) < module.BUDGET
    assert found.tobytes() == compiled(graph, [x, dy], threads=2, target=target).tobytes()
    assert found.tobytes() != compiled(graph, [x, dy], target=target, winograd=False).tobytes(), "Winograd's method was not used"
