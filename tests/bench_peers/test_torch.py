"""Models, layers, gradients and optimisers against PyTorch, an extra. Small sizes: our side runs in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import losses, nn, optim
from tensorwright.benchmarks import models
from tensorwright.frontend import trace_model, training_step
from tensorwright.ir.interp import run as interpret
from tensorwright.passes.contract import Context
from tensorwright.passes.gradient import Gradient

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: it is the peer of these comparisons (pip install 'tensorwright[bench]')"
)

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(6)
# Both sides compute in f32 in different orders, through up to thirty layers.
TOLERANCE = 1e-5
SMALL = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))


def images(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def relative(got: Array, want: Array) -> float:
    assert got.shape == want.shape
    return float(abs(got - want).max() / abs(want).max())


MODELS: list[tuple[str, tuple[Any, ...], Array]] = [
    ("MLP", (), images(3, 784)),
    ("LeNet", (), images(2, 1, 28, 28)),
    ("Cifar", (), images(2, 3, 32, 32)),
    ("DemoCNN", (), images(2, 1, 8, 8)),
    ("ResNet50", ((1, 2, 1, 1), 8, 10), images(1, 3, 64, 64)),
    ("ResNet18", ((8, 16, 16, 32),), images(2, 3, 16, 16)),
    ("MobileNetV2", (SMALL, 64, 10), images(1, 3, 32, 32)),
    ("BERT", (2, 32, 4, 64, 50, 16), RNG.integers(0, 50, (2, 12))),
    ("TinyTransformer", (2, 32, 4, 64, 50, 12), RNG.integers(0, 50, (2, 12))),
]


@pytest.fixture(scope="module")
def twins() -> Any:
    from tensorwright.benchmarks import torch_models

    torch.manual_seed(0)
    return torch_models


def ours(module: nn.Module, *arrays: Array) -> Array:
    traced = trace_model(module, *arrays)
    return interpret(traced.graph, [*arrays, *traced.values().values()])[0]


@pytest.mark.parametrize(("name", "settings", "x"), MODELS, ids=[m[0] for m in MODELS])
def test_models_agree(name: str, settings: tuple[Any, ...], x: Array, twins: Any) -> None:
    from .twins import with_statistics

    twin = with_statistics(getattr(twins, name)(*settings)).eval()
    model = models.from_torch_state(getattr(models, name)(*settings), twin.state_dict())
    with torch.no_grad():
        want = twin(torch.from_numpy(x)).numpy()
    assert relative(ours(model, x), want) < TOLERANCE


def step_like_torch(
    model: nn.Module, twin: Any, optimizer: optim.Optimizer, peer: Any, batches: list[tuple[Array, Array]]
) -> None:
    """The same batches through both; losses, parameters and buffers stay together."""
    x, y = batches[0]
    step = training_step(model, losses.cross_entropy, optimizer, tw.spec(x), tw.spec(y))
    graph = Gradient().run(step.graph, Context())
    state = list(step.initial_state().values())
    for x, y in batches:
        out = interpret(graph, [*state, np.float32(optimizer.lr), x, y])
        state[: step.updated] = out[: step.updated]
        peer.zero_grad()
        logits = twin(torch.from_numpy(x))
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(y).reshape(-1))
        loss.backward()
        peer.step()
        assert abs(float(out[step.updated]) - loss.item()) < 1e-4 * abs(loss.item())
    for name, value in twin.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            got = dict(zip(step.state, state, strict=True))[name]
            assert relative(got, value.detach().numpy()) < 1e-4, name


TRAINED: list[tuple[str, tuple[Any, ...], Callable[[], tuple[Array, Array]]]] = [
    ("DemoCNN", (4,), lambda: (images(8, 1, 8, 8), RNG.integers(0, 10, 8))),
    ("ResNet18", ((4, 8),), lambda: (images(8, 3, 8, 8), RNG.integers(0, 10, 8))),
    ("TinyTransformer", (2, 32, 4, 64, 50, 12), lambda: (RNG.integers(0, 50, (2, 12)), RNG.integers(0, 50, (2, 12)))),
]


@pytest.mark.parametrize(("name", "settings", "batch"), TRAINED, ids=[m[0] for m in TRAINED])
def test_gradients_agree_within_1e_4(name: str, settings: tuple[Any, ...], batch: Any, twins: Any) -> None:
    """One step of plain gradient descent with rate 1: what a parameter moves by is its gradient."""
    twin = getattr(twins, name)(*settings).train()
    model = models.from_torch_state(getattr(models, name)(*settings), twin.state_dict())
    x, y = batch()
    step = training_step(model, losses.cross_entropy, optim.SGD(1.0), tw.spec(x), tw.spec(y))
    out = interpret(Gradient().run(step.graph, Context()), [*step.state.values(), np.float32(1.0), x, y])
    logits = twin(torch.from_numpy(x))
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(y).reshape(-1)).backward()
    # The largest gradient sets the scale: some (a bias before a batch norm) are zero but for rounding.
    scale = max(float(p.grad.abs().max()) for p in twin.parameters())
    for (parameter, p), new in zip(twin.named_parameters(), out, strict=False):
        moved = step.state[parameter] - new
        assert abs(moved - p.grad.numpy()).max() < 1e-4 * max(scale * 0.1, float(p.grad.abs().max())), parameter


OPTIMIZERS: list[tuple[optim.Optimizer, Callable[[Any], Any]]] = [
    (
        optim.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-3, nesterov=True),
    ),
    (optim.Adam(1e-3, weight_decay=1e-3), lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-3)),
    (optim.AdamW(1e-3, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1)),
]


@pytest.mark.parametrize(("optimizer", "peer"), OPTIMIZERS, ids=[type(o).__name__ for o, _ in OPTIMIZERS])
def test_training_stays_together_over_steps(optimizer: optim.Optimizer, peer: Any, twins: Any) -> None:
    twin = twins.DemoCNN(4).train()
    model = models.from_torch_state(models.DemoCNN(4), twin.state_dict())
    step_like_torch(
        model, twin, optimizer, peer(twin.parameters()), [(images(8, 1, 8, 8), RNG.integers(0, 10, 8)) for _ in range(5)]
    )


def test_running_statistics_stay_together(twins: Any) -> None:
    twin = twins.ResNet18((4, 8)).train()
    model = models.from_torch_state(models.ResNet18((4, 8)), twin.state_dict())
    batches = [(images(8, 3, 8, 8), RNG.integers(0, 10, 8)) for _ in range(2)]
    step_like_torch(model, twin, optim.SGD(1e-3), torch.optim.SGD(twin.parameters(), 1e-3), batches)


LAYERS: list[tuple[Callable[[Any], Any], Array]] = [
    (lambda m: m.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), 2, 2), images(2, 4, 9, 8)),
    (lambda m: m.BatchNorm2d(4), images(2, 4, 5, 5)),
    (lambda m: m.GroupNorm(2, 4), images(2, 4, 5, 5)),
    (lambda m: m.LayerNorm((5, 6)), images(2, 5, 6)),
    (lambda m: m.GELU("tanh"), images(4, 5)),
    (lambda m: m.Softplus(2.0), images(4, 5) * 9),
    (lambda m: m.MaxPool2d(3, 2, 1), images(2, 3, 7, 8)),
    (lambda m: m.ELU(0.5), images(4, 5)),
    (lambda m: m.AvgPool2d(3, 2, 1, count_include_pad=False), images(2, 3, 7, 8)),
    (lambda m: m.AdaptiveAvgPool2d((3, 5)), images(2, 3, 7, 8)),
    (lambda m: m.LeakyReLU(0.2), images(4, 5)),
    (lambda m: m.Hardswish(), images(4, 5) * 4),
    (lambda m: m.LogSoftmax(1), images(4, 5)),
    (lambda m: m.Embedding(7, 3), RNG.integers(0, 7, (2, 4))),
]


@pytest.mark.parametrize(("make", "x"), LAYERS, ids=[type(make(nn)).__name__ for make, _ in LAYERS])
def test_layers_agree(make: Callable[[Any], Any], x: Array) -> None:
    peer = make(torch.nn).eval()
    layer = models.from_torch_state(make(nn), peer.state_dict())
    with torch.no_grad():
        want = peer(torch.from_numpy(x)).numpy()
    assert relative(ours(layer, x), want) < TOLERANCE


@pytest.mark.parametrize("first", [False, True])
def test_encoder_layers_agree(first: bool) -> None:
    peer = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=first)
    layer = models.from_torch_state(nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", norm_first=first), peer.state_dict())
    x = images(2, 5, 16)
    assert relative(ours(layer, x), peer(torch.from_numpy(x)).detach().numpy()) < TOLERANCE


def test_relu_gradients_at_zero_agree() -> None:
    x = np.array([-1.0, 0.0, 6.0, 7.0], np.float32)
    for mine, theirs in (
        (tw.relu, torch.nn.functional.relu),
        (tw.relu6, torch.nn.functional.relu6),
        (tw.elu, torch.nn.functional.elu),
        (tw.leaky_relu, torch.nn.functional.leaky_relu),
        (tw.softplus, torch.nn.functional.softplus),
    ):
        t = torch.from_numpy(x).requires_grad_()
        theirs(t).sum().backward()
        g = Gradient().run(tw.trace(tw.grad(lambda x, f=mine: tw.sum(f(x))), x), Context())
        np.testing.assert_allclose(interpret(g, [x])[0], t.grad.numpy(), rtol=1e-6)
