"""trace: specs, names, nested arguments and results, parameters and constants; and what it refuses."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import trace_model, tree
from tensorwright.ir.errors import AttributeValueError, DTypeError, ParseError, ShapeError, TraceError
from tensorwright.ir.interp import run as interpret

from .support import execute, run


def names(graph: Any) -> list[tuple[str, str]]:
    return [(i.attrs["name"], i.attrs["role"]) for i in graph.inputs]


def test_specs() -> None:
    assert str(tw.spec("N", 3, "2*N + 1", dtype="i64")) == "i64[N, 3, 2*N + 1]"
    assert str(tw.spec((2, 3))) == "f32[2, 3]"
    assert str(tw.spec(np.zeros((2, 3), np.int8))) == "i8[2, 3]"
    assert str(tw.spec()) == "f32[]"
    with pytest.raises(ShapeError, match="dtype="):
        tw.spec(1.5)
    with pytest.raises(ShapeError, match="negative"):
        tw.spec(-1)
    with pytest.raises(ParseError):
        tw.spec("N N")
    with pytest.raises(DTypeError):
        tw.spec(2, dtype="complex64")


def test_inputs_are_named_by_the_signature_and_by_paths_of_nested_arguments() -> None:
    def fn(x: Any, batch: dict[str, Any], *rest: Any) -> Any:
        return x + batch["a"] + batch["b"][1] * rest[0]

    s = tw.spec(2)
    g = tw.trace(fn, s, {"a": s, "b": [s, s]}, s, tw.spec(2, name="other"))
    assert names(g) == [(n, "data") for n in ("x", "batch.a", "batch.b.0", "batch.b.1", "rest0", "other")]
    assert g.name == "fn"


def test_results_may_be_nested_and_hold_arrays_and_numbers() -> None:
    x = np.arange(3.0, dtype=np.float32)
    got = run(lambda x: {"a": x + 1, "b": (x * 2, [np.ones(2, np.float32), 7])}, x)
    np.testing.assert_array_equal(got["a"], x + 1)
    np.testing.assert_array_equal(got["b"][1][0], np.ones(2))
    assert got["b"][1][1] == 7
    g = tw.trace(lambda x: {"a": x, "b": (x, x)}, x)
    assert g.output_names == ("a", "b.0", "b.1")
    assert tw.trace(lambda x: (x, x + 1), x).output_names == ("y0", "y1")
    assert tw.trace(lambda x: x + 1, x).output_names == ("y",)


def test_numbers_and_strings_are_passed_as_they_are() -> None:
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(
        run(lambda x, n, mode, none: x * n if mode == "double" and none is None else x, x, 2, "double", None), x * 2
    )


def test_captured_arrays_are_constants() -> None:
    table = np.arange(3.0, dtype=np.float32)
    g = tw.trace(lambda x: x + table, tw.spec(3))
    assert names(g) == [("x", "data")]
    assert any(n.op.name == "constant" and n.shape == (3,) for n in g.nodes())
    np.testing.assert_array_equal(run(lambda x: x + table, table), table * 2)


def test_equal_expressions_are_one_node_and_text_parses_back() -> None:
    g = tw.trace(lambda x: (x + 1) * (x + 1), tw.spec(3))
    assert sum(n.op.name == "add" for n in g.nodes()) == 1
    assert tw.Graph.parse(str(g)) == g


class Net(nn.Module):
    def __init__(self) -> None:
        self.layers = [nn.Linear(4, 3), nn.Linear(3, 2)]
        self.extra = {"scale": nn.Parameter(np.ones(2))}

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = tw.relu(layer(x))
        return x * self.extra["scale"]


def test_parameters_are_inputs_named_by_path_after_the_arguments() -> None:
    net = Net()
    want = ["extra.scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]  # its own, then its layers'
    assert names(tw.trace(net, tw.spec(1, 4))) == [("x", "data"), *((n, "parameter") for n in want)]
    traced = trace_model(lambda x: net(x) + 1, tw.spec(1, 4))
    assert list(traced.parameters) == [f"net.{n}" for n in want]
    assert traced.arguments == ("x",)
    assert list(trace_model(net.__call__, tw.spec(1, 4)).parameters) == want
    assert list(trace_model(lambda m, x: m(x), net, tw.spec(1, 4)).parameters) == [f"m.{n}" for n in want]
    assert list(trace_model({"net": net}["net"], tw.spec(1, 4)).parameters) == want


def test_modules_in_containers_are_named_by_their_class() -> None:
    nets = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    assert list(trace_model(lambda x: nets["b"](nets["a"](x)), tw.spec(1, 4)).parameters) == [
        "linear.weight",
        "linear.bias",
        "linear.weight_2",
        "linear.bias_2",
    ]


def test_only_what_is_read_is_an_input_and_a_shared_parameter_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            self.emb = nn.Embedding(5, 3)
            self.unused = nn.Linear(2, 2)
            self.again = self.emb

        def __call__(self, i: Any) -> Any:
            return self.again(i) @ self.emb.weight.T

    assert list(trace_model(Tied(), tw.spec(2, dtype="i64")).parameters) == ["emb.weight"]


def test_an_argument_whose_name_a_parameter_has_too() -> None:
    layer = nn.Linear(2, 2)
    g = tw.trace(lambda weight: layer(weight) + 1, tw.spec(1, 2))
    assert names(g)[0] == ("weight", "data")

    class Odd(nn.Module):
        def __init__(self) -> None:
            self.x = nn.Parameter(np.ones(2))

        def __call__(self, x: Any) -> Any:
            return x + self.x

    assert names(tw.trace(Odd(), tw.spec(2))) == [("x", "data"), ("x_2", "parameter")]


def test_parameter_values_are_read_when_asked_for() -> None:
    layer = nn.Linear(2, 1, bias=False)
    traced = trace_model(layer, tw.spec(1, 2))
    layer.weight.data = np.array([[2.0, 3.0]])
    assert execute(traced, np.ones((1, 2), np.float32)) == 5


def test_the_same_graph_for_every_checkpoint() -> None:
    assert tw.trace(nn.Linear(2, 2, seed=1), tw.spec(1, 2)) == tw.trace(nn.Linear(2, 2, seed=2), tw.spec(1, 2))


def test_symbolic_sizes() -> None:
    g = tw.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softmax()), tw.spec("N", 3, 4))
    assert str(g.outputs[0].type) == "f32[N, 5]"
    g = tw.trace(lambda x: tw.concatenate([x, x[:, ::-1]], 1), tw.spec("N", "T"))
    assert str(g.outputs[0].type) == "f32[N, 2*T]"


@pytest.mark.parametrize("n", [1, 3])
def test_symbolic_sizes_are_numbers_too(n: int) -> None:
    def fn(x: Any, i: Any) -> Any:
        size = x.shape[0]
        return (
            x.sum(0) / size,
            size * x,
            x[i] + size,
            tw.var(x, 0, ddof=0),
            tw.take_along_axis(x, i[:, None] * 0 - 1, 0),
            2 * size - x,
        )

    g = tw.trace(fn, tw.spec("N", 2), tw.spec(2, dtype="i64"))
    assert [o.dtype.name for o in g.outputs] == ["f32"] * 6
    x, i = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2), np.array([-1, 0])
    got = interpret(g, [x, i])
    want = [x.sum(0) / n, n * x, x[i] + n, x.var(0), np.take_along_axis(x, i[:, None] * 0 - 1, 0), 2 * n - x]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_tensor_kept_from_another_trace_is_refused() -> None:
    kept: list[Any] = []
    tw.trace(lambda x: (kept.append(x), x)[1], tw.spec(3))
    with pytest.raises(TraceError, match="'x', a Tensor of another trace"):
        tw.trace(lambda y: y + kept[0], tw.spec(3))


def test_what_is_no_spec_or_function_is_refused() -> None:
    with pytest.raises(TraceError, match="argument 'x' is a object"):
        tw.trace(lambda x: x, object())
    with pytest.raises(TraceError, match="function or a Module"):
        tw.trace(3, tw.spec(2))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"make one first: Net\(\.\.\.\)"):
        tw.trace(Net, tw.spec(1, 4))
    with pytest.raises(TraceError, match=r"tw\.spec\(1, 4\) is a spec"):
        tw.trace(Net(), (1, 4))
    with pytest.raises(AttributeValueError, match="one name"):
        tw.trace(lambda x: {"a": {"b": x}, "a.b": x}, tw.spec(2))


def test_traces_on_several_threads_do_not_meet() -> None:
    graphs: dict[int, Any] = {}

    def work(i: int) -> None:
        graphs[i] = tw.trace(lambda x: x + i, tw.spec(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(graphs[i] == tw.trace(lambda x, i=i: x + i, tw.spec(3)) for i in range(8))


def test_a_failed_trace_leaves_none_active() -> None:
    with pytest.raises(ZeroDivisionError):
        tw.trace(lambda x: 1 / 0, tw.spec(2))
    with pytest.raises(TraceError, match="outside a trace"):
        tw.ones(3)


def test_trees() -> None:
    value = {"b": [1, (2, None)], "a": 3}
    leaves, structure = tree.flatten(value)
    assert leaves == [1, 2, 3]
    assert tree.unflatten(structure, leaves) == value
    assert list(tree.paths(structure, "p")) == ["p.b.0", "p.b.1.0", "p.a"]
    assert tree.map_leaves(lambda a, b: a + b, value, value) == {"b": [2, (4, None)], "a": 6}
    assert structure.leaves == 3
