"""Import: names, weights, symbolic sizes, stages, functions, errors that list every node."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import tensorwright as tw  # noqa: E402
from onnx import helper  # noqa: E402
from onnx_graphs import F, I, graph, model, node  # noqa: E402
from tensorwright.frontend.onnx.registry import registered  # noqa: E402
from tensorwright.ir.errors import OnnxError  # noqa: E402

RNG = np.random.default_rng(0)


def test_names_weights_and_outputs_are_kept() -> None:
    w, b = RNG.normal(size=(5, 4)).astype(F), RNG.normal(size=4).astype(F)
    m = model(
        [node("Gemm", ["x:0", "w", "b"], ["h"], name="dense"), node("Relu", ["h"], ["y:0"])],
        [("x:0", F, ["batch size", 5])],
        [("y:0", F, ["batch size", 4]), ("h", F, ["batch size", 4])],
        {"w": w, "b": b},
    )
    g = tw.onnx.load(m)
    assert [(i.attrs["name"], i.attrs["role"]) for i in g.inputs] == [("x:0", "data"), ("w", "parameter"), ("b", "parameter")]
    assert g.output_names == ("y:0", "h")
    assert str(g.inputs[0].shape[0]) == "batch_size"
    assert any("dense" in str(label.location) for label in g.labels.values())
    x = RNG.normal(size=(3, 5)).astype(F)
    exe = tw.compile(g)
    y, h = exe(x)
    np.testing.assert_allclose(h, x @ w + b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, np.maximum(x @ w + b, 0), rtol=1e-5, atol=1e-6)
    exe.set_parameters({"b": b + 1})
    np.testing.assert_allclose(exe(x)[1], x @ w + b + 1, rtol=1e-5, atol=1e-6)
    assert tw.compile(g, parameters={}).arguments[1][0] == "w"


def test_weights_stay_out_of_the_graph_and_scalars_in_it() -> None:
    def made(scale: float) -> tw.Graph:
        w = np.full((4, 4), scale, F)
        return tw.onnx.load(model([node("MatMul", ["x", "w"], ["a"]), node("Mul", ["a", "s"], ["y"])], [("x", F, [2, 4])],
                                  [("y", F, [2, 4])], {"w": w, "s": F(0.5)}))  # fmt: skip

    a, b = made(1), made(2)
    assert a.fingerprint() == b.fingerprint()
    assert set(a.weights) == {"w"}


@pytest.mark.parametrize("batch", [1, 3])
def test_shape_arithmetic_folds_over_symbolic_sizes(batch: int) -> None:
    """The usual flatten of an exporter: Shape, Gather, Unsqueeze, Concat, Reshape; and a split of heads."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["flat"]),
        node("Shape", ["flat"], ["s2"]),
        node("Slice", ["s2", "one", "two"], ["width"]),
        node("Div", ["width", "four"], ["w4"]),
        node("Concat", ["n1", "fours", "w4"], ["target2"], axis=0),
        node("Cast", ["target2"], ["target3"], to=7),
        node("Reshape", ["flat", "target3"], ["y"]),
    ]
    weights = {"zero": I(0), "axes": np.array([0]), "rest": np.array([-1]), "one": np.array([1]), "two": np.array([2]),
               "four": np.array([4]), "fours": np.array([4])}  # fmt: skip
    g = tw.onnx.load(model(nodes, [("x", F, ["N", 2, "L"])], [("y", F, None)], weights))
    assert [str(d) for d in g.outputs[0].shape] == ["N", "4", "((2*L) // 4)"]
    assert {n.op.name for n in g.nodes()} == {"input", "reshape"}
    x = RNG.normal(size=(batch, 2, 6)).astype(F)
    np.testing.assert_array_equal(tw.compile(g)(x), x.reshape(batch, 4, 3))


def test_sizes_and_shapes_can_be_given() -> None:
    m = model([node("Relu", ["x"], ["y"])], [("x", F, ["N", None])], [("y", F, None)])
    assert [str(d) for d in tw.onnx.load(m).inputs[0].shape] == ["N", "x_1"]
    assert tw.onnx.load(m, sizes={"N": 4, "x_1": 2}).inputs[0].shape == (4, 2)
    assert tw.onnx.load(m, shapes={"x": (7, 8)}).inputs[0].shape == (7, 8)


def test_a_shape_that_is_an_argument_is_compiled_in_stages() -> None:
    m = model([node("Reshape", ["x", "shape"], ["y"])], [("x", F, [6]), ("shape", I, [2])], [("y", F, None)])
    with pytest.raises(OnnxError, match=r"values=\{'shape'"):
        tw.onnx.load(m)
    assert tw.onnx.load(m, values={"shape": [2, 3]}).outputs[0].shape == (2, 3)
    exe = tw.compile(tw.onnx.Model(m))
    x = np.arange(6, dtype=F)
    for shape in ([2, 3], [3, 2], [2, 3]):
        np.testing.assert_array_equal(exe(x, np.array(shape)), x.reshape(shape))
    assert len(exe.programs()) == 2


def test_a_data_dependent_size_runs_in_two_programs() -> None:
    m = model(
        [node("NonZero", ["x"], ["at"]), node("Transpose", ["at"], ["rows"]), node("GatherND", ["x", "rows"], ["y"])],
        [("x", F, [3, 4])],
        [("y", F, ["k"])],
    )
    exe = tw.compile(tw.onnx.Model(m))
    for _ in range(3):
        x = (RNG.normal(size=(3, 4)) * (RNG.random((3, 4)) < 0.5)).astype(F)
        np.testing.assert_array_equal(exe(x), x[x != 0])


def test_an_input_without_a_declared_rank() -> None:
    m = model([node("Softmax", ["x"], ["y"], axis=-1)], [("x", F, None)], [("y", F, None)])
    with pytest.raises(OnnxError, match="no declared shape"):
        tw.onnx.load(m)
    exe = tw.compile(tw.onnx.Model(m))
    assert exe(np.zeros((2, 3), F)).shape == (2, 3)
    assert exe(np.zeros(5, F)).shape == (5,)


def test_functions_of_the_model_with_attribute_references() -> None:
    body = [
        helper.make_node("Constant", [], ["c"]),
        node("Add", ["a", "c"], ["t"]),
        node("Mul", ["t", "b"], ["y"]),
    ]
    ref = onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="bias")
    body[0].attribute.append(ref)
    f = helper.make_function("my", "AddMul", ["a", "b"], ["y"], body, [helper.make_opsetid("", 20)], ["bias"])
    m = model(
        [node("AddMul", ["x", "x"], ["h"], domain="my", bias=2.0), node("AddMul", ["h", "x"], ["y"], domain="my", bias=-1.0)],
        [("x", F, [4])],
        [("y", F, [4])],
        domains={"my": 1},
        functions=[f],
    )
    x = RNG.normal(size=4).astype(F)
    np.testing.assert_allclose(tw.compile(tw.onnx.load(m))(x), ((x + 2) * x - 1) * x, rtol=1e-5)


def test_every_unsupported_node_is_listed_at_once() -> None:
    m = model(
        [
            node("Relu", ["x"], ["a"]),
            node("Frobnicate", ["a"], ["b"], name="first", domain="my.ops"),
            node("Frobnicate", ["b"], ["c"], name="second", domain="my.ops"),
            node("Wibble", ["c"], ["y"], name="third", domain="my.ops"),
        ],
        [("x", F, [4])],
        [("y", F, [4])],
        domains={"my.ops": 3},
    )
    with pytest.raises(OnnxError) as caught:
        tw.onnx.load(m)
    text = str(caught.value)
    assert "my.ops.Frobnicate (opset 3): 'first', 'second'" in text
    assert "my.ops.Wibble (opset 3): 'third'" in text


def test_unsupported_attributes_are_listed_with_node_op_and_opset() -> None:
    m = model(
        [node("Relu", ["x"], ["a"], name="r", slope=0.5), node("Gelu", ["a"], ["y"], name="g", approximate="cubic")],
        [("x", F, [4])],
        [("y", F, [4])],
    )
    with pytest.raises(OnnxError) as caught:
        tw.onnx.load(m)
    text = str(caught.value)
    assert "node 'r' (Relu, opset 20 of ai.onnx): the attributes ['slope'] are not known" in text
    assert "approximate='cubic'" not in text  # it reads what is pending: reported once the first is mended


def test_independent_problems_are_reported_together() -> None:
    m = model(
        [node("Relu", ["x"], ["a"], name="r", slope=0.5), node("Gelu", ["x"], ["y"], name="g", approximate="cubic")],
        [("x", F, [4])],
        [("y", F, [4]), ("a", F, [4])],
    )
    with pytest.raises(OnnxError, match=r"(?s)2 nodes.*'r'.*'g' \(Gelu, opset 20 of ai.onnx\): approximate='cubic'"):
        tw.onnx.load(m)


def test_a_shape_error_names_the_node() -> None:
    m = model([node("MatMul", ["x", "w"], ["y"], name="proj")], [("x", F, [2, 3])], [("y", F, None)], {"w": np.ones((4, 5), F)})
    with pytest.raises(OnnxError, match=r"node 'proj' \(MatMul, opset 20 of ai.onnx\): matmul"):
        tw.onnx.load(m)


def test_a_branch_is_taken_at_run_time() -> None:
    then = graph([node("Add", ["x", "x"], ["t"])], [], [("t", F, [3])])
    other = graph([node("Neg", ["x"], ["e"])], [], [("e", F, [3])])
    m = model([node("If", ["c"], ["y"], then_branch=then, else_branch=other)], [("x", F, [3]), ("c", np.bool_, [])],
              [("y", F, [3])])  # fmt: skip
    exe = tw.compile(tw.onnx.load(m))
    x = RNG.normal(size=3).astype(F)
    np.testing.assert_array_equal(exe(x, np.bool_(True)), x + x)
    np.testing.assert_array_equal(exe(x, np.bool_(False)), -x)


def test_branches_of_different_shapes_are_chosen_between_stages() -> None:
    then = graph([node("Concat", ["x", "x"], ["t"], axis=0)], [], [("t", F, [6])])
    other = graph([node("Neg", ["x"], ["e"])], [], [("e", F, [3])])
    nodes = [node("ReduceSum", ["x"], ["s"], keepdims=0), node("Greater", ["s", "zero"], ["c"]),
             node("If", ["c"], ["y"], then_branch=then, else_branch=other)]  # fmt: skip
    exe = tw.compile(tw.onnx.Model(model(nodes, [("x", F, [3])], [("y", F, None)], {"zero": F(0)})))
    x = np.array([1, 2, 3], F)
    np.testing.assert_array_equal(exe(x), np.concatenate([x, x]))
    np.testing.assert_array_equal(exe(-x), x)


def test_the_registry_names_real_ops_and_versions() -> None:
    for domain, name in registered():
        if not domain and name != "SimplifiedLayerNormalization":  # ONNX Runtime's, which it writes into this domain
            assert onnx.defs.has(name, domain), f"{name} is no op of ai.onnx"


def test_old_broadcasting_lines_up_with_an_axis() -> None:
    m = model([node("Add", ["x", "b"], ["y"], broadcast=1, axis=1)], [("x", F, [2, 3, 4])], [("y", F, None)],
              {"b": np.arange(3, dtype=F)}, opset=6)  # fmt: skip
    x = RNG.normal(size=(2, 3, 4)).astype(F)
    np.testing.assert_allclose(tw.compile(tw.onnx.load(m))(x), x + np.arange(3, dtype=F)[:, None], rtol=1e-6)


def test_a_size_that_an_op_must_know_is_fixed_in_stages() -> None:
    """Reflecting padding reads positions that depend on the size; the rest of the model stays symbolic."""
    m = model([node("Pad", ["x", "p"], ["y"], mode="reflect")], [("x", F, ["N", "L"])], [("y", F, None)],
              {"p": np.array([0, 2, 0, 1])})  # fmt: skip
    with pytest.raises(OnnxError, match=r"sizes=\{'L'"):
        tw.onnx.load(m)
    assert [str(d) for d in tw.onnx.load(m, sizes={"L": 5}).outputs[0].shape] == ["N", "8"]
    exe = tw.compile(tw.onnx.Model(m))
    for shape in ((2, 5), (3, 5), (2, 4)):
        x = RNG.normal(size=shape).astype(F)
        np.testing.assert_array_equal(exe(x), np.pad(x, ((0, 0), (2, 1)), mode="reflect"))


def test_sizes_that_an_exporter_wrote_into_a_symbolic_model() -> None:
    """The declared size is a name, and a Reshape wants 5: it fits when the name is 5, and says so when it is not."""
    m = model([node("Reshape", ["x", "s"], ["y"], name="fold")], [("x", F, ["N", "L"])], [("y", F, None)],
              {"s": np.array([0, 5, 2])})  # fmt: skip
    with pytest.raises(OnnxError, match=r"(?s)sizes=\{'L'.*'fold' \(Reshape"):
        tw.onnx.load(m)
    exe = tw.compile(tw.onnx.Model(m))
    x = RNG.normal(size=(3, 10)).astype(F)
    np.testing.assert_array_equal(exe(x), x.reshape(3, 5, 2))
    with pytest.raises(OnnxError, match="'fold'"):
        exe(RNG.normal(size=(3, 7)).astype(F))
