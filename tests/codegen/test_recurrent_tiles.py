"""Recurrent steps as one kernel: columns of a product in groups, joined where they are summed; projections inside loops."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.ir import input_node, make, parse_graph, print_graph, tensor
from tensorwright.ir.contraction import Axis, Contraction, affine
from tensorwright.ir.errors import AttributeValueError
from tensorwright.ir.graph import Graph
from tensorwright.ir.ops.contract import pack, unpack

from .helpers import host_rows

RNG = np.random.default_rng(3)
STEPS, INPUTS, UNITS = 5, 6, 32


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return (0.5 * RNG.standard_normal(shape)).astype(np.float32)


class Both(nn.Module):
    """A bidirectional layer and what it returns."""

    def __init__(self, kind: type[Any], units: int = UNITS) -> None:
        self.layer = kind(INPUTS, units, bidirectional=True, seed=1)

    def __call__(self, x: tw.Tensor) -> tw.Tensor:
        y: tw.Tensor = self.layer(x)[0]
        return y


def lstm(layer: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Both directions in f64."""
    values = {k: np.asarray(v.data, np.float64) for k, v in layer.named_parameters()}
    units, outs = values["weight_hh_l0"].shape[1], []
    for suffix in ("l0", "l0_reverse"):
        wi, wh, bi, bh = (values[f"{n}_{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = c = np.zeros((x.shape[1], units))
        y = np.zeros((len(x), x.shape[1], units))
        for t in range(len(x))[:: -1 if "reverse" in suffix else 1]:
            i, f, g, o = np.split(x[t] @ wi.T + bi + h @ wh.T + bh, 4, axis=1)
            c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            y[t] = h = np.tanh(c) / (1 + np.exp(-o))
        outs.append(y)
    return np.concatenate(outs, -1)


def kernels(exe: Any, least: int = 3, most: int = 99) -> list[str]:
    """The kernels that a program calls, in lines indented by so many columns: those in loops by 5 or more."""
    lines = str(exe.text("loops")).rsplit("# entry main", 1)[1].splitlines()
    found = (re.match(r"#( +)(\w+)\(", line) for line in lines)
    return [m.group(2) for m in found if m and least <= len(m.group(1)) <= most]


@pytest.mark.parametrize("target", host_rows())
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_an_lstm_computes_its_cell_in_the_tile(batch: int, target: str) -> None:
    model = Both(nn.LSTM)
    x = draw(STEPS, batch, INPUTS)
    found = []
    for threads in (1, 2, 4):
        exe = tw.compile(model, tw.spec(STEPS, batch, INPUTS), target=target, threads=threads)
        found.append(np.asarray(exe(x)))
    assert np.abs(found[0] - lstm(model.layer, x)).max() < 2e-6
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    steps = [k for k in kernels(exe, 5) if not k.startswith("map_concat")]
    assert len(steps) == 2 and all(k.startswith("contraction") for k in steps), "a step is one kernel for each direction"


def test_a_gru_and_a_gated_linear_unit_are_joined_too() -> None:
    exe = tw.compile(Both(nn.GRU), tw.spec(STEPS, 3, INPUTS), threads=1)
    assert [k.split("_")[0] for k in kernels(exe, 5)] == 2 * ["contraction"]

    class Gated(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Parameter(draw(INPUTS, 2 * UNITS))

        def __call__(self, x: tw.Tensor) -> tw.Tensor:
            y = x @ self.w
            return tw.sigmoid(y[:, :UNITS]) * y[:, UNITS:]

    model, x = Gated(), draw(7, INPUTS)
    exe = tw.compile(model, tw.spec(7, INPUTS), threads=1)
    y = x.astype(np.float64) @ np.asarray(model.w.data)
    assert np.abs(np.asarray(exe(x)) - y[:, UNITS:] / (1 + np.exp(-y[:, :UNITS]))).max() < 2e-6
    assert len(exe.compiled.run.kernels) == 1


def test_groups_of_no_whole_vectors_or_read_otherwise_stay_as_they_are() -> None:
    model, x = Both(nn.LSTM, units=20), draw(STEPS, 3, INPUTS)
    exe = tw.compile(model, tw.spec(STEPS, 3, INPUTS), threads=1)
    assert np.abs(np.asarray(exe(x)) - lstm(model.layer, x)).max() < 2e-6
    assert "groups" not in exe.text("pack_weights")

    class Heads(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Parameter(draw(INPUTS, 3 * UNITS))

        def __call__(self, x: tw.Tensor) -> tuple[tw.Tensor, ...]:
            y = x @ self.w
            return tuple(y[:, k * UNITS : (k + 1) * UNITS].reshape(7, 4, 8) for k in range(3))

    assert "groups" not in tw.compile(Heads(), tw.spec(7, INPUTS), threads=1).text("pack_weights")


def test_projections_go_into_loops_whose_steps_have_rows_for_them() -> None:
    def outside(batch: int, units: int = UNITS) -> int:
        exe = tw.compile(Both(nn.LSTM, units), tw.spec(2, batch, INPUTS), threads=1)
        return sum(k.startswith("contraction") for k in kernels(exe, most=4))

    assert outside(8) == 0
    assert outside(1) == 2, "a single row waits for weights: it reads as few as it can"
    assert outside(8, units=256) == 2, "weights of a step beyond L2"


def test_both_directions_of_a_layer_are_not_joined_for_the_next_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            self.first = nn.LSTM(INPUTS, UNITS, bidirectional=True, seed=1)
            self.second = nn.LSTM(2 * UNITS, UNITS, seed=2)

        def __call__(self, x: tw.Tensor) -> tw.Tensor:
            y: tw.Tensor = self.second(self.first(x)[0])[0]
            return y

    model, x = Two(), draw(STEPS, 8, INPUTS)
    exe = tw.compile(model, tw.spec(STEPS, 8, INPUTS), threads=1)
    assert not [k for k in kernels(exe, most=4) if k.startswith("map_concat")], "a step reads the parts where they lie"
    alone = nn.LSTM(2 * UNITS, UNITS, bidirectional=True, seed=2)  # lstm() takes both directions: the second one is left out
    alone.load_state_dict({**alone.state_dict(), **model.second.state_dict()})
    assert np.abs(np.asarray(exe(x)) - lstm(alone, lstm(model.first, x))[..., :UNITS]).max() < 2e-6


def test_the_gradient_through_a_loop_with_its_projection_inside() -> None:
    """Against differences of the f64 reference, along one direction of all parameters at once."""
    layer = nn.LSTM(INPUTS, UNITS, seed=2)
    names = list(dict(layer.named_parameters()))
    x, mask = draw(STEPS, 8, INPUTS), draw(STEPS, 8, UNITS)
    values = [np.asarray(p.data) for _, p in layer.named_parameters()]

    def loss(*given: tw.Tensor) -> tw.Tensor:
        *weights, data = given
        total: tw.Tensor = (tw.functional_call(layer, dict(zip(names, weights, strict=True)), data)[0] * mask).sum()
        return total

    def reference(given: list[np.ndarray[Any, Any]]) -> float:
        wi, wh, bi, bh = (v.astype(np.float64) for v in given)
        h = c = np.zeros((8, UNITS))
        total = 0.0
        for t in range(STEPS):
            i, f, g, o = np.split(x[t] @ wi.T + bi + h @ wh.T + bh, 4, axis=1)
            c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            h = np.tanh(c) / (1 + np.exp(-o))
            total += float((h * mask[t]).sum())
        return total

    exe = tw.compile(tw.grad(loss, argnums=(0, 1, 2, 3)), *(tw.spec(*v.shape) for v in (*values, x)), threads=1)
    assert f"k={INPUTS + UNITS}:k" in exe.text("pack_weights") and "groups=4" in exe.text("pack_weights")
    found = [np.asarray(g, np.float64) for g in exe(*values, x)]
    along = [draw(*v.shape).astype(np.float64) for v in values]
    step = 1e-5
    ahead, behind = (reference([v + s * step * d for v, d in zip(values, along, strict=True)]) for s in (1, -1))
    slope = sum(float((g * d).sum()) for g, d in zip(found, along, strict=True))
    assert abs(slope - (ahead - behind) / (2 * step)) < 1e-4 * abs(slope)


def grouped(groups: int, panel: int = 0, n: int = 24) -> Contraction:
    axes = (Axis("m", 4, "m"), Axis("n", n, "n"), Axis("k", 5, "k"))
    b_shape = (n, 5) if panel else ()
    return Contraction(
        axes, (affine("m"), affine("k")), (affine("n"), affine("k")), (affine("m"), affine("n")), panel, b_shape, groups=groups
    )


def test_panels_of_groups_and_back() -> None:
    b = draw(24, 5)
    spec = grouped(3, panel=12)
    panels = pack(b, spec, 12)
    assert panels.shape == (2, 5, 12)
    assert (panels[1, :, 4:8] == b[12:16].T).all(), "the second four columns of the second group"
    assert (unpack(panels, spec) == b).all()


def test_groups_in_text_and_groups_that_cannot_be() -> None:
    a, b = input_node("a", tensor("f32", (4, 5))), input_node("b", tensor("f32", (24, 5)))
    graph = Graph((a, b), (make("contract", a, b, spec=grouped(3)),))
    assert parse_graph(print_graph(graph)) == graph and "groups=3" in print_graph(graph)
    with pytest.raises(AttributeValueError, match="5 groups"):
        make("contract", a, b, spec=grouped(5))
