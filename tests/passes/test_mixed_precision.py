"""Contractions of bf16 numbers: what is rounded and what stays f32, how far results move, and that training does not mind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.benchmarks.models import DemoCNN
from tensorwright.driver import build
from tensorwright.frontend.training import TracedStep, training_step
from tensorwright.ir.dtypes import bf16, f32, f64
from tensorwright.ir.errors import InputError, ValidationError
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import Trait, make
from tensorwright.ir.target import row, with_bf16
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.mixed_precision import MixedPrecision
from tensorwright.passes.validate import Validator
from tensorwright.settings import flags

TARGET = with_bf16(row("x86-64-v4"))
Array = np.ndarray[Any, Any]


class MLP(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 10)

    def __call__(self, x: Any) -> Any:
        return self.b(tw.relu(self.a(x)))


def step(model: nn.Module, shape: tuple[int, ...], batch: int = 64, rate: float = 3e-3) -> TracedStep:
    return training_step(model, tw.losses.cross_entropy, tw.optim.Adam(rate), tw.spec(batch, *shape), tw.spec(batch, dtype="i64"))


def before(graph: Graph) -> Graph:
    """A step as it comes to the pass: contractions in their one form."""
    passes = pipeline.training(TARGET, "bf16")
    at = next(k for k, p in enumerate(passes) if isinstance(p, MixedPrecision))
    return run_pipeline(graph, passes[:at], Context(target=TARGET), Hooks())


def test_the_operands_of_every_contraction_are_rounded_and_nothing_else() -> None:
    nn.init.seed(0)
    graph = before(step(MLP(), (64,), 8).graph)
    ctx = Context(target=TARGET)
    after = run_pipeline(graph, [MixedPrecision()], ctx, Hooks(validate=Validator()))
    contractions = [n for n in after.nodes() if n.op.has(Trait.CONTRACTION)]
    assert len(contractions) == 5 == ctx.notes["mixed_precision"], "2 forward, 2 for weights, 1 for the hidden layer"
    for n in contractions:
        assert [i.dtype for i in n.inputs] == [bf16, bf16] and n.dtype is f32
    assert [o.dtype for o in after.outputs] == [o.dtype for o in graph.outputs] and bf16 not in {o.dtype for o in after.outputs}
    rounded = [n for n in after.nodes() if n.dtype is bf16]
    assert rounded and all(n.op.name == "cast" and n.inputs[0].dtype is f32 for n in rounded)
    assert {i: i.dtype for i in after.inputs} == {i: i.dtype for i in graph.inputs}
    assert len({n.inputs[0] for n in rounded}) == len(rounded), "a weight is cast once, for the forward and the backward pass"


def test_it_computes_what_its_reference_says_bit_for_bit() -> None:
    nn.init.seed(0)
    graph = before(step(DemoCNN(4), (1, 8, 8), 4).graph)
    p = MixedPrecision()
    after, reference = p.run(graph, Context()), p.reference(graph, Context())
    assert not any(n.dtype is bf16 and n.op.has(Trait.CONTRACTION) for n in reference.nodes())
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 10, i.tensor.static_shape).astype(i.dtype.numpy)
        if i.dtype.is_integer
        else np.abs(rng.standard_normal(i.tensor.static_shape)).astype(np.float32)
        for i in graph.inputs
    ]
    one, two, exact = run(after, arrays), run(reference, arrays), run(graph, arrays)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(one, exact, strict=True)), "nothing was rounded"


class Careless(MixedPrecision):
    """Rounds the sums as well."""

    def run(self, graph: Graph, ctx: Context) -> Graph:
        made = super().run(graph, ctx)

        def rule(n: Any, inputs: Any) -> Any:
            new = n.replace(inputs)
            if not n.op.has(Trait.CONTRACTION):
                return new
            return make("cast", make("cast", new, dtype=bf16), dtype=f32)

        return made.map_nodes(rule)


def test_validation_finds_a_pass_that_rounds_more_than_it_says() -> None:
    nn.init.seed(0)
    graph = before(tw.trace(MLP(), tw.spec(8, 64)))
    with pytest.raises(ValidationError, match=r"\(lossy\) changed what the graph computes"):
        run_pipeline(graph, [Careless()], Context(target=TARGET), Hooks(verify=False, validate=Validator()))


def test_fuel_and_the_least_size() -> None:
    nn.init.seed(0)
    graph = before(step(MLP(), (64,), 8).graph)
    ctx = Context(fuel=2)
    assert sum(n.op.name == "contract_f32" for n in MixedPrecision().run(graph, ctx).nodes()) == 2
    sizes = sorted(2 * 8 * 64 * n for n in (64, 64, 10, 10, 10))  # forward, weights, and the hidden layer's gradient
    large = MixedPrecision(min_flops=sizes[-1]).run(graph, Context())
    assert sum(n.op.name == "contract_f32" for n in large.nodes()) == 2
    assert MixedPrecision(min_flops=10**9).run(graph, Context()) is graph
    assert str(pipeline.parse("mixed_precision{min_flops=7}")[0]) == "mixed_precision{min_flops=7}"


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_the_error_of_a_layer_is_what_two_roundings_make(layer: str) -> None:
    """Each product is off by at most (1 + 2**-9)**2 - 1, so a sum by that times the sum of absolute values: a bound, not a
    tolerance. What is measured is less by far, since errors cancel: 0.3% of the largest result."""
    nn.init.seed(1)
    rng = np.random.default_rng(0)
    net: Any = nn.Linear(256, 64, bias=False) if layer == "linear" else nn.Conv2d(16, 32, 3, padding=1, bias=False)
    x = rng.standard_normal((32, 256) if layer == "linear" else (4, 16, 12, 12), np.float32)
    spec = tw.spec(*x.shape)
    found = tw.compile(net, spec, precision="bf16")(x).astype(np.float64)
    graph = tw.trace(net, spec)
    w = net.weight.data
    (exact,) = run(graph, [x.astype(np.float64), w.astype(np.float64)], dtype=f64)
    (most,) = run(graph, [np.abs(x).astype(np.float64), np.abs(w).astype(np.float64)], dtype=f64)
    bound = ((1 + 2.0**-9) ** 2 - 1) * most + 1e-5
    assert (np.abs(found - exact) <= bound).all()
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 2e-4 < error < 6e-3, f"measured {error:.1e}"
    halves = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, w)]
    (same,) = run(graph, halves, dtype=f64)
    assert np.abs(found - same).max() / np.abs(same).max() < 2e-6, "sums are not kept in f32"


def digits() -> tuple[Array, Array, Array, Array]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    return train_test_split(  # type: ignore[no-any-return]
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=0.25, random_state=0, stratify=y
    )


def accuracy(make_model: Any, shape: tuple[int, ...], precision: str, epochs: int) -> tuple[float, dict[str, Array]]:
    """Share of the 450 test images that are right after training, by the compiled step and the compiled model."""
    xa, xb, ya, yb = digits()
    nn.init.seed(0)
    model = make_model()
    traced = step(model, shape)
    now = replace(flags(), threads=1)
    exe = build(traced.graph, traced.initial_state(), purpose="training", precision=precision, now=now)
    assert ("contract_f32" in exe.text("fuse")) == (precision == "bf16")
    rng, rate = np.random.default_rng(0), np.array(3e-3, np.float32)
    for _ in range(epochs):
        order = rng.permutation(len(xa))
        for k in range(0, len(xa) - 63, 64):
            batch = order[k : k + 64]
            exe(rate, xa[batch].reshape(64, *shape), ya[batch])
    traced.store(exe.parameters)
    scores = tw.compile(model, tw.spec(len(xb), *shape), precision=precision)(xb.reshape(-1, *shape))
    return float((scores.argmax(1) == yb).mean()), exe.parameters


@pytest.mark.unvalidated("thousands of steps are trained; the pass is validated above")
@pytest.mark.parametrize(("model", "shape", "least"), [(MLP, (64,), 0.95), (DemoCNN, (1, 8, 8), 0.94)], ids=["mlp", "cnn"])
def test_training_reaches_the_same_accuracy(model: Any, shape: tuple[int, ...], least: float) -> None:
    """Within 1.5 points of f32, seven of 450 images. Over three seeds and 15 epochs the two differed by 0.7 at most."""
    epochs = 8 if model is MLP else 4
    single, _ = accuracy(model, shape, "f32", epochs)
    half, state = accuracy(model, shape, "bf16", epochs)
    assert half >= least and abs(half - single) <= 0.015, (single, half)
    weights = {k: v for k, v in state.items() if "weight" in k}
    assert weights and all(v.dtype == np.float32 for v in weights.values())
    assert any((v != v.astype(ml_dtypes.bfloat16).astype(np.float32)).mean() > 0.9 for v in weights.values()), "masters are bf16"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="precision is one of 'f32', 'bf16', 'tf32', got 'f16'"):
        tw.compile(lambda x: x, tw.spec(3), precision="f16")
