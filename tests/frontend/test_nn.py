"""Modules: what belongs to them, state dicts, modes, layers against their functions, initial values, summary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import trace_model
from tensorwright.frontend.nn import init
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError, TraceError

from .support import execute, run

RNG = np.random.default_rng(4)


class Net(nn.Module):
    def __init__(self) -> None:
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 10)

    def __call__(self, x: Any) -> Any:
        x = tw.max_pool2d(tw.relu(self.bn(self.conv(x))), 2)
        return self.head(x.reshape(x.shape[0], -1))


def test_attributes_belong_without_a_call_of_super_init() -> None:
    net = Net()
    assert [n for n, _ in net.named_parameters()] == [
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "head.weight",
        "head.bias",
    ]
    assert [n for n, _ in net.named_buffers()] == ["bn.running_mean", "bn.running_var"]
    assert [n for n, _ in net.named_modules()] == ["", "conv", "bn", "head"]
    assert len(list(net.parameters())) == 6
    assert len(list(net.modules())) == 4
    assert len(list(net.buffers())) == 2


def test_state_dicts_go_out_and_in() -> None:
    a, b = Net(), Net()
    state = a.state_dict()
    assert list(state) == [
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "head.weight",
        "head.bias",
    ]
    state["head.bias"][:] = 5  # a copy
    assert (a.head.bias.data != 5).all()
    b.load_state_dict(state)
    assert (b.head.bias.data == 5).all()
    np.testing.assert_array_equal(b.conv.weight.data, a.conv.weight.data)


def test_a_state_dict_that_does_not_match_changes_nothing_and_says_why() -> None:
    net = Net()
    state = net.state_dict()
    before = net.conv.weight.data.copy()
    changed = {**state, "conv.weight": np.zeros((4, 1, 3, 3), np.float32)}
    del changed["head.bias"]
    changed["extra"] = np.zeros(1)
    with pytest.raises(nn.StateError, match=r"missing: head\.bias\n  unexpected: extra"):
        net.load_state_dict(changed)
    np.testing.assert_array_equal(net.conv.weight.data, before)
    net.load_state_dict(changed, strict=False)
    assert (net.conv.weight.data == 0).all()
    with pytest.raises(ShapeError, match=r"head\.weight: the model has \(10, 64\), the state dict \(64, 10\)"):
        net.load_state_dict({**state, "head.weight": state["head.weight"].T})


def test_parameters_check_what_is_assigned() -> None:
    layer = nn.Linear(2, 3)
    layer.weight = np.ones((3, 2), np.float64)  # type: ignore[assignment]
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.data.dtype == np.float32
    with pytest.raises(ShapeError):
        layer.weight.data = np.ones((2, 3))
    with pytest.raises(DTypeError):
        layer.weight.data = np.ones((3, 2), np.complex64)
    assert nn.Parameter([1.0, 2.0]).dtype.name == "f32"
    assert nn.Parameter(np.arange(3)).dtype.name == "i64"
    assert nn.Parameter(np.zeros(2), dtype="f64").dtype.name == "f64"
    with pytest.raises(TraceError, match="outside a trace"):
        layer.weight + 1


def test_modes_follow_what_is_traced_unless_fixed() -> None:
    class Mode(nn.Module):
        def __init__(self) -> None:
            self.inner = nn.Dropout(0.5)

        def __call__(self, x: Any) -> Any:
            return x * (2.0 if self.training else 1.0)

    m = Mode()
    assert not m.training
    x = np.ones(1, np.float32)
    assert execute(trace_model(m, x), x) == 1
    assert execute(trace_model(m, x, training=True), x) == 2
    m.train()
    assert execute(trace_model(m, x), x) == 2
    assert m.inner.training
    m.eval()
    assert execute(trace_model(m, x, training=True), x) == 1
    m.train(None)
    assert execute(trace_model(m, x, training=True), x) == 2


def test_a_trace_without_state_refuses_training_layers() -> None:
    with pytest.raises(TraceError, match=r"running_mean would change.*eval\(\)"):
        tw.trace(nn.BatchNorm2d(3).train(), tw.spec(2, 3, 4, 4))
    with pytest.raises(TraceError, match="random draw without a key"):
        tw.trace(nn.Dropout(0.5).train(), tw.spec(2))


def test_forward_or_call_and_neither() -> None:
    class Forward(nn.Module):
        def forward(self, image: Any) -> Any:
            return image + 1

    assert tw.trace(Forward(), tw.spec(2)).inputs[0].attrs["name"] == "image"

    class Nothing(nn.Module):
        pass

    with pytest.raises(TraceError, match="neither __call__ nor forward"):
        tw.trace(Nothing(), tw.spec(2))


def test_sequential_and_module_list() -> None:
    net = nn.Sequential(nn.Linear(3, 4), tw.relu, nn.Linear(4, 2))
    assert len(net) == 3
    assert [n for n, _ in net.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(net[:1], nn.Sequential)
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    w = {k: v.astype(np.float64) for k, v in net.state_dict().items()}
    want = np.maximum(x @ w["0.weight"].T + w["0.bias"], 0) @ w["2.weight"].T + w["2.bias"]
    np.testing.assert_allclose(execute(trace_model(net, x), x), want, rtol=1e-5, atol=1e-6)
    layers = nn.ModuleList([nn.Linear(2, 2)])
    layers.append(nn.Linear(2, 2))
    assert [n for n, _ in layers.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert layers[-1] is list(layers)[1]
    with pytest.raises(TraceError, match="holds Modules"):
        layers.append(3)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="Modules and functions"):
        nn.Sequential(3)  # type: ignore[arg-type]


IMAGE = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
ROWS = RNG.standard_normal((3, 8)).astype(np.float32)
SIMPLE: list[tuple[nn.Module, Any, np.ndarray[Any, Any]]] = [
    (nn.ReLU(), tw.relu, ROWS),
    (nn.ReLU6(), tw.relu6, ROWS),
    (nn.LeakyReLU(0.2), lambda x: tw.leaky_relu(x, 0.2), ROWS),
    (nn.ELU(0.5), lambda x: tw.elu(x, 0.5), ROWS),
    (nn.SELU(), tw.selu, ROWS),
    (nn.GELU("tanh"), lambda x: tw.gelu(x, "tanh"), ROWS),
    (nn.SiLU(), tw.silu, ROWS),
    (nn.Softplus(2.0), lambda x: tw.softplus(x, 2.0), ROWS),
    (nn.Hardswish(), tw.hard_swish, ROWS),
    (nn.Tanh(), tw.tanh, ROWS),
    (nn.Sigmoid(), tw.sigmoid, ROWS),
    (nn.Softmax(0), lambda x: tw.softmax(x, 0), ROWS),
    (nn.LogSoftmax(), tw.log_softmax, ROWS),
    (nn.Dropout(0.5), lambda x: x, ROWS),
    (nn.Identity(), lambda x: x, ROWS),
    (nn.Flatten(), lambda x: x.reshape(2, -1), IMAGE),
    (nn.MaxPool2d(2), lambda x: tw.max_pool2d(x, 2), IMAGE),
    (nn.AvgPool2d(3, 2, 1, False), lambda x: tw.avg_pool2d(x, 3, 2, 1, False), IMAGE),
    (nn.AdaptiveAvgPool2d(2), lambda x: tw.adaptive_avg_pool2d(x, 2), IMAGE),
]


@pytest.mark.parametrize(("layer", "function", "x"), SIMPLE, ids=[type(m).__name__ for m, _, _ in SIMPLE])
def test_layers_without_parameters_are_their_functions(layer: nn.Module, function: Any, x: Any) -> None:
    mine, want = tw.trace(layer, x), tw.trace(function, x)
    assert mine.outputs == want.outputs


def test_layers_with_parameters_are_their_functions() -> None:
    cases: list[tuple[nn.Module, Any, Any]] = [
        (nn.Linear(8, 3), lambda m, x: tw.linear(x, m.weight, m.bias), ROWS),
        (nn.Linear(8, 3, bias=False), lambda m, x: x @ m.weight.T, ROWS),
        (nn.Conv2d(4, 8, 3, 2, 1, groups=2), lambda m, x: tw.conv2d(x, m.weight, m.bias, 2, 1, 1, 2), IMAGE),
        (nn.BatchNorm2d(4), lambda m, x: tw.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias), IMAGE),
        (nn.LayerNorm(8), lambda m, x: tw.layer_norm(x, 8, m.weight, m.bias), ROWS),
        (nn.RMSNorm(8), lambda m, x: tw.rms_norm(x, 8, m.weight), ROWS),
        (nn.GroupNorm(2, 4), lambda m, x: tw.group_norm(x, 2, m.weight, m.bias), IMAGE),
        (nn.Embedding(5, 3), lambda m, x: tw.embedding(x, m.weight), np.array([1, 4])),
    ]
    for layer, function, x in cases:
        for p in (*layer.parameters(), *layer.buffers()):
            p.data = RNG.uniform(0.5, 1.5, p.shape)
        got = execute(trace_model(layer, x), x)
        np.testing.assert_array_equal(got, execute(trace_model(lambda x, m=layer, f=function: f(m, x), x), x))


def test_multihead_attention() -> None:
    m = nn.MultiheadAttention(8, 2)
    m.in_proj_bias.data = RNG.standard_normal(24)
    x = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    w, b = m.in_proj_weight.data.astype(np.float64), m.in_proj_bias.data
    q, k, v = ((x @ w[i * 8 : i * 8 + 8].T + b[i * 8 : i * 8 + 8]).reshape(2, 5, 2, 4).transpose(0, 2, 1, 3) for i in range(3))
    y = scipy.special.softmax(q @ k.transpose(0, 1, 3, 2) / 2, -1) @ v
    want = y.transpose(0, 2, 1, 3).reshape(2, 5, 8) @ m.out_proj.weight.data.T + m.out_proj.bias.data
    np.testing.assert_allclose(execute(trace_model(m, x), x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(execute(trace_model(lambda x: m(x, x, x), x), x), want, rtol=1e-4, atol=1e-5)


def test_encoder_layer_orders_of_norm_and_causality() -> None:
    x = RNG.standard_normal((1, 4, 8)).astype(np.float32)
    for first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=first, seed=3)
        y = execute(trace_model(lambda x, m=layer: m(x, is_causal=True), x), x)
        later = x.copy()
        later[0, 3] += 1
        changed = execute(trace_model(lambda x, m=layer: m(x, is_causal=True), x), later)
        np.testing.assert_array_equal(y[0, :3], changed[0, :3])
        assert (y[0, 3] != changed[0, 3]).any()
    with pytest.raises(AttributeValueError, match="'relu', 'gelu'"):
        nn.TransformerEncoderLayer(8, 2, activation="tanh")


def test_initial_values_follow_the_seed() -> None:
    tw.seed(3)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    tw.seed(3)
    c = nn.Linear(4, 4)
    np.testing.assert_array_equal(a.weight.data, c.weight.data)
    assert (a.weight.data != b.weight.data).any()
    np.testing.assert_array_equal(nn.Conv2d(2, 2, 3, seed=9).weight.data, nn.Conv2d(2, 2, 3, seed=9).weight.data)
    # What this generator gives is fixed: it must be the same on every machine.
    np.testing.assert_allclose(init.uniform((3,), 0.0, 1.0, seed=0), PHILOX_UNIFORM, rtol=0, atol=1e-7)
    with pytest.raises(AttributeValueError, match="seed"):
        init.generator(-1)


PHILOX_UNIFORM = np.random.Generator(np.random.Philox(0)).random(3, np.float32)


def test_distributions_of_initialisers() -> None:
    shape = (200, 100, 3, 3)  # fan-in 900, fan-out 1800
    # 180,000 draws: a standard deviation is known to 0.2%.
    expected = {
        "xavier_uniform": math.sqrt(2 / 2700),
        "xavier_normal": math.sqrt(2 / 2700),
        "kaiming_uniform": math.sqrt(2 / 900),
        "kaiming_normal": math.sqrt(2 / 900),
        "lecun_uniform": math.sqrt(1 / 900),
        "lecun_normal": math.sqrt(1 / 900),
    }
    for name, std in expected.items():
        drawn = getattr(init, name)(shape, seed=1)
        assert drawn.dtype == np.float32
        assert abs(drawn.std() / std - 1) < 0.01, name
        assert abs(drawn.mean()) < std * 0.01, name
    assert abs(init.kaiming_normal(shape, mode="fan_out", nonlinearity="relu", seed=1).std() / math.sqrt(2 / 1800) - 1) < 0.01
    assert abs(init.truncated_normal((10000,), seed=1)).max() <= 2
    bound = 1 / math.sqrt(64)  # PyTorch's default: kaiming_uniform with a = sqrt(5)
    weight = nn.Linear(64, 500, seed=2).weight.data
    assert 0.99 * bound < abs(weight).max() <= bound
    assert abs(nn.Linear(64, 500, seed=2).bias.data).max() <= bound
    for s in ((4, 9), (9, 4), (4, 2, 3, 3)):
        q = init.orthogonal(s, seed=1).reshape(s[0], -1).astype(np.float64)
        small = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
        np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-6)
    with pytest.raises(ShapeError):
        init.xavier_normal((3,))
    with pytest.raises(AttributeValueError, match="nonlinearity"):
        init.gain("swish")


def test_summary_counts_parameters_and_flops() -> None:
    text = str(Net().summary(tw.spec(2, 1, 8, 8)))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "f32[2, 4, 8, 8]" in lines["conv"]
    assert "40" in lines["conv"].split()
    conv = 2 * 2 * 4 * 64 * 9 + 2 * 4 * 64  # multiply-adds, bias
    assert f"{conv:,}" in lines["conv"]
    assert "650" in lines["head"].split()
    assert "698 parameters (698 trainable)" in text
    s = Net().summary(tw.spec("N", 1, 8, 8))
    assert s.flops is None
    assert "symbolic" in str(s)
    rows = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()).summary(tw.spec(1, 2)).rows
    assert [(r.path, r.depth) for r in rows] == [("", 0), ("0", 1), ("0.0", 2), ("1", 1)]


def test_repr_shows_the_layers() -> None:
    text = repr(nn.Sequential(nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.Dropout(0.1)))
    assert (
        text == "Sequential(\n  (0): Conv2d(3, 8, kernel_size=(3, 3), stride=1, padding=0, bias=False)\n  (1): Dropout(p=0.1)\n)"
    )


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(AttributeValueError, match="groups=3"):
        nn.Conv2d(4, 8, 3, groups=3)
    with pytest.raises(AttributeValueError, match="heads"):
        nn.MultiheadAttention(8, 3)
    with pytest.raises(AttributeValueError, match="groups"):
        nn.GroupNorm(3, 4)


def test_a_module_called_outside_a_trace_says_what_to_do() -> None:
    with pytest.raises(TraceError, match=r"tw\.compile"):
        nn.Linear(2, 2)(np.ones((1, 2), np.float32))
    assert run(nn.ReLU(), np.ones(1, np.float32)) == 1
