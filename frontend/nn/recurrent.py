"""Recurrent layers over scan: RNN, LSTM, GRU and their cells. PyTorch's arguments, parameter names and gate order.

The projection of the inputs of all steps is one matrix product before the loop, so that a step is one product with the
recurrent weights and one elementwise kernel. Weights are (gates * hidden, ...): i f g o for LSTM, r z n for GRU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ...ir.dims import Dim
from ...ir.dtypes import i64
from ...ir.errors import AttributeValueError, DTypeError, ShapeError
from .. import control, random
from ..activations import relu, sigmoid
from ..context import error
from ..core import TensorLike, as_tensor, broadcast_to, cast
from ..elementwise import less, tanh, where
from ..linalg import linear
from ..module import Module
from ..movement import arange, concatenate, reshape, stack, swapaxes, zeros
from ..parameter import Parameter
from ..tensor import Tensor
from . import init
from .init import Seed
from .layers import positive

State = tuple[Tensor, ...]


def _rnn_step(gates: Tensor, recurrent: Tensor, state: State, nonlinearity: str) -> State:
    """h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh), or with relu (Elman 1990)."""
    total = gates + recurrent
    return (relu(total) if nonlinearity == "relu" else tanh(total),)


def _lstm_step(gates: Tensor, recurrent: Tensor, state: State, nonlinearity: str) -> State:
    """c' = f c + i g, h' = o tanh(c') (Hochreiter, Schmidhuber 1997; forget gate of Gers et al. 2000)."""
    i, f, g, o = _split(gates + recurrent, 4)
    cell = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(cell), cell


def _gru_step(gates: Tensor, recurrent: Tensor, state: State, nonlinearity: str) -> State:
    """h' = (1 - z) n + z h, n = tanh(x_n + r h_n) (Cho et al. 2014, with the reset gate after the product, as in cuDNN)."""
    given, back = _split(gates, 3), _split(recurrent, 3)
    r, z = (sigmoid(a + b) for a, b in zip(given[:2], back[:2], strict=True))
    n = tanh(given[2] + r * back[2])
    return ((1.0 - z) * n + z * state[0],)


_STEPS = {"rnn": _rnn_step, "lstm": _lstm_step, "gru": _gru_step}
_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def _split(x: Tensor, parts: int) -> list[Tensor]:
    size = x.shape[-1]
    assert isinstance(size, int)
    step = size // parts
    return [x[:, k * step : (k + 1) * step] for k in range(parts)]


def _weights(gates: int, inputs: int, hidden: int, bias: bool, seed: Any) -> list[Parameter | None]:
    """weight_ih, weight_hh, bias_ih, bias_hh, uniform within 1 / sqrt(hidden) as PyTorch draws them."""
    bound = 1.0 / math.sqrt(hidden)
    shapes: list[tuple[int, ...]] = [(gates * hidden, inputs), (gates * hidden, hidden)]
    shapes += [(gates * hidden,)] * (2 if bias else 0)
    made: list[Parameter | None] = [Parameter(init.uniform(s, -bound, bound, seed=seed)) for s in shapes]
    return made if bias else [*made, None, None]


class _Recurrent(Module):
    """What the three layers share."""

    kind: ClassVar[str]

    def _set(
        self, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float,
        bidirectional: bool, return_sequences: bool, seed: Seed,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        positive(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if not 0.0 <= dropout < 1.0:
            raise AttributeValueError(f"{name}: dropout lies in [0, 1), not {dropout!r}")
        if dropout and num_layers == 1:
            raise AttributeValueError(f"{name}: dropout is between layers, and there is one; put nn.Dropout after it")
        source = init.generator(seed)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.return_sequences = bidirectional, return_sequences
        self.nonlinearity = "tanh"
        directions = 2 if bidirectional else 1
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                inputs = input_size if layer == 0 else hidden_size * directions
                made = _weights(_GATES[self.kind], inputs, hidden_size, bias, source)
                for part, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), made, strict=True):
                    if value is not None:
                        setattr(self, f"{part}_{suffix}", value)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    def _run(self, x: TensorLike, first: Any, lengths: TensorLike | None) -> tuple[Tensor, list[State]]:
        """The sequence (or last step) of outputs in the layout of x, and the last states by layer and direction."""
        name = type(self).__name__
        given = as_tensor(x, what=f"the input of {name}")
        if given.ndim not in (2, 3) or given.shape[-1] != self.input_size:
            layout = "(batch, time, {0})" if self.batch_first else "(time, batch, {0})"
            wanted = f"{layout.format(self.input_size)} or (time, {self.input_size})"
            raise error(ShapeError, f"{name} takes {wanted}", x=given)
        if not given.dtype.is_float:
            raise error(DTypeError, f"{name} takes floats, not {given.dtype}; cast it with .astype('float32')", x=given)
        alone = given.ndim == 2
        seq = given.reshape(given.shape[0], 1, self.input_size) if alone else swapaxes(given, 0, 1) if self.batch_first else given
        steps, batch = seq.shape[:2]
        valid = None if lengths is None else self._valid(lengths, steps, batch)
        starts = self._starts(first, batch, seq)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                seq = random.dropout(seq, self.dropout)
            found = [
                self._direction(seq, suffix, starts[len(last) + k], valid, reverse=bool(k))
                for k, suffix in enumerate(self._suffixes(layer))
            ]
            seq = found[0][0] if len(found) == 1 else concatenate([y for y, _ in found], axis=-1)
            last += [state for _, state in found]
        if not self.return_sequences:
            ends = [state[0] for state in last[-len(self._suffixes(0)) :]]
            out = ends[0] if len(ends) == 1 else concatenate(ends, axis=-1)
            return (out.reshape(out.shape[-1]) if alone else out), last
        if alone:
            return seq.reshape(steps, seq.shape[-1]), last
        return (swapaxes(seq, 0, 1) if self.batch_first else seq), last

    def _direction(self, seq: Tensor, suffix: str, start: State, valid: Tensor | None, reverse: bool) -> tuple[Tensor, State]:
        """One layer in one direction: outputs (time, batch, hidden), and the last state."""
        own = vars(self)
        recurrent, bias, other = (own.get(f"{n}_{suffix}") for n in ("weight_hh", "bias_ih", "bias_hh"))
        assert recurrent is not None
        # GRU's candidate multiplies r with h W_hn^T + b_hn, so b_hh stays in the loop; elsewhere the biases are one.
        inside = other if self.kind == "gru" else None
        before = None if bias is None else bias if inside is not None or other is None else bias + other
        gates = linear(seq, own[f"weight_ih_{suffix}"], before)
        step, nonlinearity = _STEPS[self.kind], self.nonlinearity

        def body(state: State, xs: tuple[Tensor, ...]) -> tuple[State, Tensor]:
            new = step(xs[0], linear(state[0], recurrent, inside), state, nonlinearity)
            if len(xs) == 1:
                return new, new[0]
            kept = tuple(where(xs[1], a, b) for a, b in zip(new, state, strict=True))
            return kept, where(xs[1], new[0], 0.0)

        xs = (gates,) if valid is None else (gates, valid)
        final, outputs = control.scan(body, start, xs, reverse=reverse)
        return outputs, final

    def _valid(self, lengths: TensorLike, steps: Dim, batch: Dim) -> Tensor:
        """bool (time, batch, 1): whether a step lies within its sequence."""
        n = as_tensor(lengths, what="lengths")
        if n.shape != (batch,) or not n.dtype.is_integer:
            raise error(ShapeError, f"lengths is an integer Tensor with one length for each of the {batch} sequences", lengths=n)
        at = reshape(arange(steps, dtype=i64), (steps, 1, 1))
        limit = reshape(cast(n, i64), (1, batch, 1))
        return less(broadcast_to(at, (steps, batch, 1)), broadcast_to(limit, (steps, batch, 1)))

    def _starts(self, first: Any, batch: Dim, seq: Tensor) -> list[State]:
        """The first states by layer and direction."""
        count = self.num_layers * len(self._suffixes(0))
        parts = 2 if self.kind == "lstm" else 1
        if first is None:
            return [tuple(zeros((batch, self.hidden_size), seq.dtype) for _ in range(parts))] * count
        given = first if isinstance(first, (tuple, list)) else (first,)
        name = type(self).__name__
        if len(given) != parts:
            raise error(ShapeError, f"{name} takes {'a pair (h0, c0)' if parts == 2 else 'h0'} as its first state", state=first)
        states: list[Tensor] = []
        for label, value in zip(("h0", "c0"), given, strict=False):
            s = as_tensor(value, what=label)
            if s.ndim == 2 and s.shape == (count, self.hidden_size) and batch == 1:
                s = s.reshape(count, 1, self.hidden_size)
            if s.shape != (count, batch, self.hidden_size):
                raise error(
                    ShapeError,
                    f"{name}: {label} is (layers * directions, batch, hidden) = ({count}, {batch}, {self.hidden_size})",
                    **{label: s},
                )
            states.append(cast(s, seq.dtype))
        return [tuple(s[k] for s in states) for k in range(count)]

    def _stacked(self, last: list[State], part: int, alone: bool) -> Tensor:
        """(layers * directions, batch, hidden), or without batch."""
        whole = stack([state[part] for state in last])
        return whole.reshape(len(last), self.hidden_size) if alone else whole

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        text += f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        for name in ("batch_first", "bidirectional"):
            text += f", {name}=True" if getattr(self, name) else ""
        return text + (f", dropout={self.dropout}" if self.dropout else "") + ("" if self.bias else ", bias=False")


class RNN(_Recurrent):
    """A layer of Elman units: h[t] = tanh(x[t] W_ih^T + b_ih + h[t-1] W_hh^T + b_hh), or relu.

    x is (time, batch, input_size), with batch_first (batch, time, input_size), or (time, input_size). Returns (output, h): output
    (time, batch, directions * hidden) laid out as x, or with return_sequences=False the last step's (both directions'
    last) (batch, directions * hidden); h the last states (layers * directions, batch, hidden). `lengths` (batch) of integers
    says where sequences end: beyond, the state stays and the output is 0. Parameters are named as in PyTorch
    (weight_ih_l0, ..., bias_hh_l0_reverse).
    """

    kind = "rnn"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *, return_sequences: bool = True,
        seed: Seed = None,
    ) -> None:  # fmt: skip
        _check_nonlinearity(nonlinearity)
        self._set(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, return_sequences, seed)
        self.nonlinearity = nonlinearity

    def forward(self, x: TensorLike, h0: TensorLike | None = None, *, lengths: TensorLike | None = None) -> tuple[Tensor, Tensor]:
        out, last = self._run(x, h0, lengths)
        return out, self._stacked(last, 0, as_tensor(x).ndim == 2)


class LSTM(_Recurrent):
    """A layer of long short-term memory: c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]); gates in PyTorch's order i f g o.

    As `RNN`, but states are pairs: returns (output, (h, c)), and takes (h0, c0).
    """

    kind = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, return_sequences: bool = True, seed: Seed = None,
    ) -> None:  # fmt: skip
        self._set(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, return_sequences, seed)

    def forward(
        self, x: TensorLike, state: Any = None, *, lengths: TensorLike | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, last = self._run(x, state, lengths)
        alone = as_tensor(x).ndim == 2
        return out, (self._stacked(last, 0, alone), self._stacked(last, 1, alone))


class GRU(_Recurrent):
    """A layer of gated recurrent units: h[t] = (1 - z) n + z h[t-1], n = tanh(x W_in^T + b_in + r (h W_hn^T + b_hn)).

    Arguments and results as `RNN`; gates in PyTorch's order r z n.
    """

    kind = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, return_sequences: bool = True, seed: Seed = None,
    ) -> None:  # fmt: skip
        self._set(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, return_sequences, seed)

    def forward(self, x: TensorLike, h0: TensorLike | None = None, *, lengths: TensorLike | None = None) -> tuple[Tensor, Tensor]:
        out, last = self._run(x, h0, lengths)
        return out, self._stacked(last, 0, as_tensor(x).ndim == 2)


def _check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise AttributeValueError(f"nonlinearity is 'tanh' or 'relu', not {nonlinearity!r}")


class _Cell(Module):
    """One step of a recurrent layer, for loops of one's own."""

    kind: ClassVar[str]

    def _set(self, input_size: int, hidden_size: int, bias: bool, seed: Seed) -> None:
        positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.nonlinearity = "tanh"
        made = _weights(_GATES[self.kind], input_size, hidden_size, bias, init.generator(seed))
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = made

    def _step(self, x: TensorLike, state: Any) -> State:
        name, parts = type(self).__name__, 2 if self.kind == "lstm" else 1
        given = as_tensor(x, what=f"the input of {name}")
        if given.ndim not in (1, 2) or given.shape[-1] != self.input_size:
            raise error(ShapeError, f"{name} takes (batch, {self.input_size}) or ({self.input_size},)", x=given)
        rows = given.reshape(1, self.input_size) if given.ndim == 1 else given
        shape = (rows.shape[0], self.hidden_size)
        if state is None:
            states: State = tuple(zeros(shape, rows.dtype) for _ in range(parts))
        else:
            several = state if isinstance(state, (tuple, list)) else (state,)
            if len(several) != parts:
                raise error(ShapeError, f"{name} takes {'a pair (h, c)' if parts == 2 else 'h'} as its state", state=state)
            states = tuple(as_tensor(s, what="state") for s in several)
            states = tuple(s.reshape(1, self.hidden_size) if s.ndim == 1 else s for s in states)
            for s in states:
                if s.shape != shape:
                    raise error(ShapeError, f"{name}: a state is (batch, hidden) = ({shape[0]}, {shape[1]})", state=s)
        assert self.weight_ih is not None and self.weight_hh is not None
        gates, recurrent = linear(rows, self.weight_ih, self.bias_ih), linear(states[0], self.weight_hh, self.bias_hh)
        new = _STEPS[self.kind](gates, recurrent, states, self.nonlinearity)
        return tuple(s.reshape(self.hidden_size) for s in new) if given.ndim == 1 else new

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class RNNCell(_Cell):
    """One step of `RNN`: (x, h) -> h; x (batch, input_size) or (input_size,)."""

    kind = "rnn"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", *, seed: Seed = None
    ) -> None:
        _check_nonlinearity(nonlinearity)
        self._set(input_size, hidden_size, bias, seed)
        self.nonlinearity = nonlinearity

    def forward(self, x: TensorLike, h: TensorLike | None = None) -> Tensor:
        return self._step(x, h)[0]


class LSTMCell(_Cell):
    """One step of `LSTM`: (x, (h, c)) -> (h, c)."""

    kind = "lstm"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, *, seed: Seed = None) -> None:
        self._set(input_size, hidden_size, bias, seed)

    def forward(self, x: TensorLike, state: Any = None) -> tuple[Tensor, Tensor]:
        h, c = self._step(x, state)
        return h, c


class GRUCell(_Cell):
    """One step of `GRU`: (x, h) -> h."""

    kind = "gru"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, *, seed: Seed = None) -> None:
        self._set(input_size, hidden_size, bias, seed)

    def forward(self, x: TensorLike, h: TensorLike | None = None) -> Tensor:
        return self._step(x, h)[0]
