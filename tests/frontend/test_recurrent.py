"""RNN, LSTM, GRU and their cells: against loops in numpy, and against PyTorch where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import trace_model
from tensorwright.frontend.training import training_step
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError
from tensorwright.ir.op import Trait
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.validate import Validator

from .support import numeric_gradient, run

RNG = np.random.default_rng(19)
KINDS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
CELLS = {"RNN": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}


def array(*shape: int) -> Any:
    return RNG.uniform(-1, 1, shape).astype(np.float32)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def numpy_step(kind: str, x: Any, state: Any, w: Any, relu: bool = False) -> Any:
    """One step in f64: the equations as PyTorch's documentation of the layers states them."""
    w_ih, w_hh, b_ih, b_hh = w
    h = state[0]
    gates, recurrent = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if kind == "RNN":
        total = gates + recurrent
        return (np.maximum(total, 0) if relu else np.tanh(total),)
    if kind == "LSTM":
        i, f, g, o = np.split(gates + recurrent, 4, axis=-1)
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    (r, z, n), (hr, hz, hn) = np.split(gates, 3, axis=-1), np.split(recurrent, 3, axis=-1)
    z = sigmoid(z + hz)
    return ((1 - z) * np.tanh(n + sigmoid(r + hr) * hn) + z * h,)


def numpy_layer(module: Any, kind: str, x: Any, first: Any = None, lengths: Any = None, relu: bool = False) -> Any:
    """(time, batch, features) -> outputs and last states, in f64."""
    p = {n: v.data.astype(np.float64) for n, v in module.named_parameters()}
    hidden, last = module.hidden_size, []
    x = x.astype(np.float64)
    for layer in range(module.num_layers):
        ys = []
        for d, suffix in enumerate(["", "_reverse"][: 2 if module.bidirectional else 1]):
            names = [f"{n}_l{layer}{suffix}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            w = [p.get(n, 0.0) for n in names]
            k = len(last)
            parts = 2 if kind == "LSTM" else 1
            state = tuple(
                np.zeros((x.shape[1], hidden)) if first is None else first[j][k].astype(np.float64) for j in range(parts)
            )
            y = np.zeros((*x.shape[:2], hidden))
            for t in range(len(x))[:: -1 if d else 1]:
                new = numpy_step(kind, x[t], state, w, relu)
                valid = np.ones((x.shape[1], 1), bool) if lengths is None else (t < lengths)[:, None]
                state = tuple(np.where(valid, a, b) for a, b in zip(new, state, strict=True))
                y[t] = np.where(valid, new[0], 0)
            ys.append(y)
            last.append(state)
        x = np.concatenate(ys, axis=-1)
    return x, [np.stack([s[j] for s in last]) for j in range(len(last[0]))]


def flat(result: Any) -> list[Any]:
    out, state = result
    return [out, *(state if isinstance(state, tuple) else (state,))]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("variable", [False, True])
def test_layers_are_loops(kind: str, options: dict[str, Any], variable: bool) -> None:
    module = KINDS[kind](5, 4, **options, seed=3)
    x = array(6, 3, 5)
    lengths = np.array([6, 2, 4]) if variable else None
    directions = module.num_layers * (2 if module.bidirectional else 1)
    first = [array(directions, 3, 4) for _ in range(2 if kind == "LSTM" else 1)]
    expected, states = numpy_layer(module, kind, x, first, lengths)
    given = x.swapaxes(0, 1).copy() if module.batch_first else x
    state = tuple(first) if kind == "LSTM" else first[0]
    if variable:
        found = flat(run(lambda x, s, n: module(x, s, lengths=n), given, state, lengths))
    else:
        found = flat(run(module, given, state))
    found[0] = found[0].swapaxes(0, 1) if module.batch_first else found[0]
    for a, b in zip(found, [expected, *states], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_relu_units_and_their_names() -> None:
    module = nn.RNN(5, 4, nonlinearity="relu", bidirectional=True, seed=1)
    x = array(6, 3, 5)
    expected, states = numpy_layer(module, "RNN", x, relu=True)
    found = flat(run(module, x))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], states[0], rtol=1e-5, atol=1e-6)
    assert list(module.state_dict()) == [
        "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0",
        "weight_ih_l0_reverse", "weight_hh_l0_reverse", "bias_ih_l0_reverse", "bias_hh_l0_reverse",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_state_alone_and_no_batch(kind: str) -> None:
    whole, last = (KINDS[kind](5, 4, bidirectional=True, return_sequences=r, seed=2) for r in (True, False))
    x = array(6, 3, 5)
    sequence, end = flat(run(whole, x)), flat(run(last, x))
    np.testing.assert_allclose(end[0], np.concatenate([sequence[0][-1, :, :4], sequence[0][0, :, 4:]], axis=-1), rtol=1e-6)
    single, single_end = flat(run(whole, x[:, 1])), flat(run(last, x[:, 1]))
    np.testing.assert_allclose(single[0], sequence[0][:, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(single[1], sequence[1][:, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(single_end[0], end[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_one_step(kind: str) -> None:
    cell, layer = CELLS[kind](5, 4, seed=5), KINDS[kind](5, 4, seed=5)
    layer.load_state_dict({f"{n}_l0": v for n, v in cell.state_dict().items()})
    x, h = array(1, 3, 5), array(3, 4)
    state = (h, array(3, 4)) if kind == "LSTM" else h
    first = tuple(s[None] for s in state) if kind == "LSTM" else h[None]
    found = run(cell, x[0], state)
    expected = flat(run(layer, x, first))[1:]
    for a, b in zip(found if kind == "LSTM" else [found], expected, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-7)
    alone = run(cell, x[0, 0])
    assert (alone[0] if kind == "LSTM" else alone).shape == (4,)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_input_and_parameters(kind: str) -> None:
    module = KINDS[kind](3, 2, bidirectional=True, seed=7)
    x, lengths = array(4, 2, 3), np.array([4, 2])

    def loss(m: Any, x: Any, n: Any) -> Any:
        out, state = m(x, lengths=n)
        return (out * out).sum() + sum((s * s).sum() for s in (state if isinstance(state, tuple) else (state,)))

    def value(x: Any) -> float:
        out, states = numpy_layer(module, kind, x, None, lengths)
        return float((out**2).sum() + sum((s**2).sum() for s in states))

    by_module, by_x = run(lambda x, n: tw.grad(loss, (0, 1))(module, x, n), x, lengths)
    np.testing.assert_allclose(by_x, numeric_gradient(value, x), rtol=1e-4, atol=1e-5)
    for name, p in module.named_parameters():
        old = p.data.astype(np.float64)

        def at(v: Any, p: Any = p) -> float:
            p._data = v  # in f64, past the check of dtypes
            return value(x)

        expected = numeric_gradient(at, old)
        p._data = old.astype(np.float32)
        np.testing.assert_allclose(by_module[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipelines_on_layers(kind: str) -> None:
    """Every pass validated, for inference and for a training step; the bodies hold no movement of weights."""
    module = KINDS[kind](5, 8, bidirectional=True, seed=7)
    traced = trace_model(lambda x: tw.grad(lambda m, x: (m(x)[0] ** 2).mean())(module, x), tw.spec(4, 3, 5))
    from tensorwright.ir.target import row

    for graph, passes in (
        (traced.graph, pipeline.training()),
        (trace_model(module, tw.spec(4, 3, 5)).graph, pipeline.inference()),
    ):
        ctx = Context(target=row("x86-64-v3"), preferred_panel=lambda spec, target, dtype: 8)
        after = run_pipeline(graph, passes, ctx, Hooks(validate=Validator()))
        loops = [n for n in after.nodes() if n.op.has(Trait.CONTROL)]
        assert len(loops) == (4 if passes == pipeline.training() else 2)
        for loop in loops:
            assert not {n.op.name for n in loop.attrs["body"].nodes()} & {"transpose", "pad"}  # a reshape moves nothing


def test_dropout_between_layers_in_training_only() -> None:
    module = nn.LSTM(5, 4, num_layers=2, dropout=0.5, seed=1)
    x = array(6, 3, 5)
    plain = nn.LSTM(5, 4, num_layers=2, seed=1)
    np.testing.assert_array_equal(run(module, x)[0], run(plain, x)[0])

    class Net(nn.Module):
        def __init__(self) -> None:
            self.lstm = module

        def __call__(self, x: Any) -> Any:
            return self.lstm(x)[0]

    traced = training_step(Net(), tw.losses.mse, tw.optim.SGD(0.1), tw.spec(6, 3, 5), tw.spec(6, 3, 4))
    assert any(n.op.has(Trait.RANDOM) for n in traced.graph.nodes())


def test_compiled_layers_give_what_the_interpreter_gives() -> None:
    module = nn.LSTM(5, 9, num_layers=2, bidirectional=True, seed=4)
    x, lengths = array(7, 3, 5), np.array([7, 1, 4])
    exe = tw.compile(lambda x, n: module(x, lengths=n), tw.spec(7, 3, 5), tw.spec(3, dtype="i64"), cache=False)
    out, (h, c) = exe(x, lengths)
    expected, states = numpy_layer(module, "LSTM", x, None, lengths)
    for a, b in zip((out, h, c), (expected, *states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: nn.LSTM(0, 4), AttributeValueError, "input_size is a positive int"),
        (lambda: nn.LSTM(3, 4, dropout=1.0, num_layers=2), AttributeValueError, r"dropout lies in \[0, 1\)"),
        (lambda: nn.GRU(3, 4, dropout=0.5), AttributeValueError, "between layers, and there is one"),
        (lambda: nn.RNN(3, 4, nonlinearity="gelu"), AttributeValueError, "'tanh' or 'relu'"),
        (lambda: run(nn.LSTM(3, 4), array(5, 2, 7)), ShapeError, r"LSTM takes \(time, batch, 3\)"),
        (lambda: run(nn.GRU(3, 4, batch_first=True), array(5, 2, 7)), ShapeError, r"\(batch, time, 3\)"),
        (lambda: run(nn.LSTM(3, 4), np.zeros((5, 2, 3), np.int64)), DTypeError, "takes floats"),
        (lambda: run(nn.LSTM(3, 4), array(5, 2, 3), array(1, 2, 4)), ShapeError, r"pair \(h0, c0\)"),
        (lambda: run(nn.GRU(3, 4), array(5, 2, 3), array(2, 2, 4)), ShapeError, r"h0 is .* = \(1, 2, 4\)"),
        (
            lambda: run(lambda x, n: nn.GRU(3, 4)(x, lengths=n), array(5, 2, 3), np.array([1, 2, 3])),
            ShapeError,
            "one length for each of the 2 sequences",
        ),
        (lambda: run(nn.LSTMCell(3, 4), array(2, 2, 3)), ShapeError, r"takes \(batch, 3\)"),
        (lambda: run(nn.GRUCell(3, 4), array(2, 3), array(3, 4)), ShapeError, r"\(batch, hidden\) = \(2, 4\)"),
    ],
)
def test_errors(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_against_torch(kind: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the bench extra")
    theirs = getattr(torch.nn, kind)(5, 4, **options)
    module = KINDS[kind](5, 4, **options)
    state = {n: p.detach().numpy() for n, p in theirs.state_dict().items()}
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state)
    x, lengths = array(*((3, 6, 5) if options.get("batch_first") else (6, 3, 5))), np.array([6, 2, 4])
    rnn = torch.nn.utils.rnn
    first = bool(options.get("batch_first"))
    packed = rnn.pack_padded_sequence(torch.tensor(x), torch.tensor(lengths), batch_first=first, enforce_sorted=False)
    out, last = theirs(packed)
    padded = rnn.pad_packed_sequence(out, batch_first=first, total_length=6)[0]
    expected = [padded, *(last if isinstance(last, tuple) else (last,))]
    found = flat(run(lambda x, n: module(x, lengths=n), x, lengths))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-5, atol=1e-6)
