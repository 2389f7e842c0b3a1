"""RNN, GRU and LSTM in all variants, over scan.

The projection of the inputs of all steps is one matrix product before the loop; a step is one product with the recurrent
weights and elementwise work. Gates come in ONNX's order: z r h of a GRU, i o f c of an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ....ir.dims import Dim
from ....ir.dtypes import i64
from ... import activations as act
from ... import elementwise as ew
from ...control import scan
from ...core import as_tensor, broadcast_to
from ...linalg import matmul
from ...movement import iota, reshape, stack, swapaxes, transpose
from ...tensor import Tensor
from ..call import Call
from ..registry import op

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
Product = Callable[[int, Tensor], Tensor]


def _affine(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x * alpha + beta


def _thresholded(x: Tensor, alpha: float) -> Tensor:
    return ew.where(ew.greater(x, alpha), x, 0.0)


def _scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return ew.tanh(x * beta) * alpha


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return ew.clip(x * alpha + beta, 0.0, 1.0)


def _elu(x: Tensor, alpha: float) -> Tensor:
    return ew.where(ew.greater(x, 0.0), x, ew.expm1(ew.minimum(x, 0.0)) * alpha)


def _leaky(x: Tensor, alpha: float) -> Tensor:
    return ew.where(ew.greater_equal(x, 0.0), x, x * alpha)


# name in lower case -> (function, defaults of its parameters)
_ACTIVATIONS: Final[dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]]] = {
    "relu": (act.relu, ()),
    "tanh": (ew.tanh, ()),
    "sigmoid": (act.sigmoid, ()),
    "softsign": (act.softsign, ()),
    "softplus": (act.softplus, ()),
    "affine": (_affine, (1.0, 0.0)),
    "leakyrelu": (_leaky, (0.01,)),
    "thresholdedrelu": (_thresholded, (1.0,)),
    "scaledtanh": (_scaled_tanh, (1.0, 1.0)),
    "hardsigmoid": (_hard_sigmoid, (0.2, 0.5)),
    "elu": (_elu, (1.0,)),
}


def _activations(n: Call, defaults: tuple[str, ...], directions: int) -> list[list[Activation]]:
    """The functions of each direction. Parameters are taken from the lists of the node by the functions that have some."""
    names = n.string_list("activations") or defaults * directions
    if len(names) != len(defaults) * directions:
        n.fail(f"{len(names)} activations; {len(defaults)} for each of {directions} directions are expected")
    alphas, betas = list(n.float_list("activation_alpha") or ()), list(n.float_list("activation_beta") or ())
    found: list[Activation] = []
    for name in names:
        known = _ACTIVATIONS.get(name.lower())
        if known is None:
            n.unsupported(f"activation {name!r}; supported are {', '.join(sorted(_ACTIVATIONS))}")
        fn, values = known
        given = [*(source.pop(0) if source else default for source, default in zip((alphas, betas), values, strict=False))]
        found.append(partial(_with, fn, given))
    count = len(defaults)
    return [found[k * count : (k + 1) * count] for k in range(directions)]


def _with(fn: Callable[..., Tensor], parameters: list[float], x: Tensor) -> Tensor:
    return fn(x, *parameters)


@dataclass(frozen=True)
class _Node:
    """What the three ops share: operands with the time axis first, one entry per direction."""

    call: Call
    x: Tensor  # [steps, batch, inputs]
    lengths: Tensor | None  # [batch]
    hidden: int
    layout: bool
    backwards: tuple[bool, ...]
    clip: Activation

    @staticmethod
    def of(n: Call, lengths: int, hidden: Dim) -> _Node:
        layout = n.flag("layout", False)
        x = swapaxes(n.tensor(0), 0, 1) if layout else n.tensor(0)
        word = n.choice("direction", "forward", "reverse", "bidirectional")
        backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[word]
        shape = n.tensor(2).shape
        if not isinstance(hidden, int) or n.attribute("hidden_size", hidden) != hidden or shape[0] != len(backwards):
            n.fail(f"recurrent weights of shape {shape} for hidden_size {n.attribute('hidden_size')} and {word!r}")
        bound = n.attribute("clip")
        limit: Activation = (lambda t: t) if bound is None else (lambda t: ew.clip(t, -float(bound), float(bound)))
        given = n.optional(lengths)
        return _Node(n, x, None if given is None else given.astype(i64), hidden, layout, backwards, limit)

    def initial(self, i: int) -> list[Tensor]:
        """Input i [directions, batch, hidden], or zeros, one by one."""
        given = self.call.optional(i)
        batch = self.x.shape[1]
        if given is None:
            zero = broadcast_to(as_tensor(0.0, self.x.dtype), (batch, self.hidden))
            return [zero] * len(self.backwards)
        given = swapaxes(given, 0, 1) if self.layout else given
        return [given[d] for d in range(len(self.backwards))]

    def biases(self, i: int, gates: int) -> list[tuple[Tensor, Tensor]]:
        """The biases of inputs and of states, for each direction."""
        given, size = self.call.optional(i), gates * self.hidden
        if given is None:
            zero = broadcast_to(as_tensor(0.0, self.x.dtype), (size,))
            return [(zero, zero)] * len(self.backwards)
        return [(given[d, :size], given[d, size:]) for d in range(len(self.backwards))]

    def run(self, gates: list[Tensor], first: list[State], step: Callable[[int, Tensor, State], State]) -> list[Tensor]:
        """Y and the last states. `gates[d]` [steps, batch, n] are what direction d's `step(d, gates_t, state)` starts from."""
        sequences, lasts = [], []
        for d, backwards in enumerate(self.backwards):
            y, last = self._direction(gates[d], first[d], partial(step, d), backwards)
            sequences.append(y)
            lasts.append(last)
        y = stack(sequences, 1)  # [steps, directions, batch, hidden]
        ends = [stack([last[k] for last in lasts], 0) for k in range(len(first[0]))]
        if self.layout:
            return [transpose(y, (2, 0, 1, 3)), *(swapaxes(e, 0, 1) for e in ends)]
        return [y, *ends]

    def _direction(self, gates: Tensor, first: State, step: Callable[[Tensor, State], State], backwards: bool) -> Any:
        """A sequence that has ended (or, backwards, has not begun) keeps its state, and gives zeros."""
        steps: Dim = gates.shape[0]
        if self.lengths is None:

            def plain(state: State, g: Tensor) -> tuple[State, Tensor]:
                new = step(g, state)
                return new, new[0]

            last, y = scan(plain, first, gates, reverse=backwards)
            return y, last
        counted = reshape(self.lengths, (-1, 1))

        def masked(state: State, xs: tuple[Tensor, Tensor]) -> tuple[State, Tensor]:
            g, t = xs
            live = ew.less(t, counted)
            new = step(g, state)
            kept = tuple(ew.where(live, a, b) for a, b in zip(new, state, strict=True))
            return kept, ew.where(live, new[0], 0.0)

        last, y = scan(masked, first, (gates, iota((steps,), 0)), reverse=backwards)
        return y, last


def _parts(x: Tensor, count: int) -> list[Tensor]:
    size = x.shape[-1] // count
    return [x[..., k * size : (k + 1) * size] for k in range(count)]


@op("RNN", 1, 7, 14, 22)
def rnn(n: Call) -> Any:
    """H' = f(X W^T + H R^T + Wb + Rb)."""
    node = _Node.of(n, 4, n.tensor(2).shape[-1])
    fs = _activations(n, ("Tanh",), len(node.backwards))
    w, r, bias, hs = n.tensor(1), n.tensor(2), node.biases(3, 1), node.initial(5)
    n.ignore("output_sequence")  # of opset 1: Y is there or not by its name
    gates = [matmul(node.x, swapaxes(w[d], 0, 1)) + (b[0] + b[1]) for d, b in enumerate(bias)]

    def step(d: int, g: Tensor, state: State) -> State:
        return (fs[d][0](node.clip(g + matmul(state[0], swapaxes(r[d], 0, 1)))),)

    return tuple(node.run(gates, [(h,) for h in hs], step))


@op("GRU", 1, 3, 7, 14, 22)
def gru(n: Call) -> Any:
    """H' = (1 - z) h + z H with h from r * H (default) or from r * (H R^T + Rb) (linear_before_reset)."""
    node = _Node.of(n, 4, n.tensor(2).shape[-1])
    fs = _activations(n, ("Sigmoid", "Tanh"), len(node.backwards))
    linear = n.flag("linear_before_reset", False)
    w, r, bias, hs = n.tensor(1), n.tensor(2), node.biases(3, 3), node.initial(5)
    n.ignore("output_sequence")  # of opset 1: Y is there or not by its name
    gates = [matmul(node.x, swapaxes(w[d], 0, 1)) + b[0] for d, b in enumerate(bias)]
    size = node.hidden

    def step(d: int, g: Tensor, state: State) -> State:
        (h,) = state
        rb = bias[d][1]
        if linear:
            product = matmul(h, swapaxes(r[d], 0, 1)) + rb
            z, reset = (fs[d][0](node.clip(a + b)) for a, b in zip(_parts(g, 3)[:2], _parts(product, 3)[:2], strict=True))
            new = fs[d][1](node.clip(g[..., 2 * size :] + reset * product[..., 2 * size :]))
        else:
            both = matmul(h, swapaxes(r[d, : 2 * size], 0, 1)) + rb[: 2 * size]
            z, reset = (fs[d][0](node.clip(a + b)) for a, b in zip(_parts(g, 3)[:2], _parts(both, 2), strict=True))
            inner = matmul(reset * h, swapaxes(r[d, 2 * size :], 0, 1)) + rb[2 * size :]
            new = fs[d][1](node.clip(g[..., 2 * size :] + inner))
        return ((1.0 - z) * new + z * h,)

    return tuple(node.run(gates, [(h,) for h in hs], step))


@op("LSTM", 1, 7, 14, 22)
def lstm(n: Call) -> Any:
    """c' = f c + i g, h' = o h(c'), with peepholes P (Gers, Schmidhuber 2000) and coupled gates where asked for."""
    w, r = n.tensor(1), n.tensor(2)
    return lstm_with(n, r.shape[-1], lambda d, x: matmul(x, swapaxes(w[d], 0, 1)), lambda d, h: matmul(h, swapaxes(r[d], 0, 1)))


def lstm_with(n: Call, hidden: Dim, inputs: Product, states: Product) -> Any:
    """An LSTM whose products with the weights of direction d are `inputs(d, x)` and `states(d, h)`."""
    node = _Node.of(n, 4, hidden)
    fs = _activations(n, ("Sigmoid", "Tanh", "Tanh"), len(node.backwards))
    coupled = n.flag("input_forget", False)
    bias = node.biases(3, 4)
    hs, cs, peep = node.initial(5), node.initial(6), n.optional(7)
    n.ignore("output_sequence")  # of opset 1: Y is there or not by its name
    gates = [inputs(d, node.x) + (b[0] + b[1]) for d, b in enumerate(bias)]

    def step(d: int, g: Tensor, state: State) -> State:
        h, c = state
        i, o, f, new = _parts(g + states(d, h), 4)
        p = None if peep is None else _parts(peep[d], 3)  # of i, o, f
        if p is not None:
            i, f = i + p[0] * c, f + p[2] * c
        i = fs[d][0](node.clip(i))
        f = 1.0 - i if coupled else fs[d][0](node.clip(f))
        cell = f * c + i * fs[d][1](node.clip(new))
        if p is not None:
            o = o + p[1] * cell
        return fs[d][0](node.clip(o)) * fs[d][2](cell), cell

    return tuple(node.run(gates, list(zip(hs, cs, strict=True)), step))
