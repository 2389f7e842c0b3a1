"""The ops of the graph machinery: what they refuse, and the helpers that make them."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.ir import Graph, Literal, constant, full, fused, get, input_node, make, outputs, symbol, tensor
from tensorwright.ir.dtypes import f32
from tensorwright.ir.errors import AttributeValueError, DTypeError, ShapeError, TensorwrightError
from tensorwright.ir.lowering import Structural
from tensorwright.ir.op import REGISTRY, NotDifferentiable, Trait

T = tensor("f32", (2, 3))
X, P = input_node("x", T), input_node("p0", T)
BODY = Graph((P,), (make("exp", P), make("sum", P, axes=(1,))))


@pytest.mark.parametrize(
    ("attrs", "error", "message"),
    [
        ({"name": "", "dtype": f32, "shape": ()}, AttributeValueError, "non-empty string"),
        ({"name": 3, "dtype": f32, "shape": ()}, AttributeValueError, "non-empty string, not 3"),
        ({"name": "x", "role": "weight", "dtype": f32, "shape": ()}, AttributeValueError, "the roles are data, parameter"),
        ({"name": "x", "dtype": "f32", "shape": ()}, DTypeError, "must be a DType"),
        ({"name": "x", "dtype": f32, "shape": [2]}, ShapeError, "is a tuple"),
        ({"name": "x", "dtype": f32, "shape": (-2,)}, ShapeError, "negative"),
    ],
)
def test_inputs(attrs, error, message):
    with pytest.raises(error, match=message):
        make("input", **attrs)


def test_constants():
    assert constant(1.5, "f32").type == tensor("f32", ()) and constant([1, 2]).type == tensor("i64", (2,))
    literal = Literal(np.ones(3, np.float32))
    assert constant(literal) is constant(np.ones(3), "f32")
    with pytest.raises(AttributeValueError, match="has its dtype already"):
        constant(literal, "f64")
    with pytest.raises(AttributeValueError, match="a Literal, not float"):
        make("constant", value=1.0)
    with pytest.raises(DTypeError):
        constant("text")
    n = symbol("N")
    assert full(0.0, tensor("f32", (n, 2))).shape == (n, 2) and full(0.0, tensor("f32", ())).op.name == "constant"


def test_parts_of_tuples():
    both = fused(BODY, [X], "rows")
    assert [str(o.type) for o in outputs(both)] == ["f32[2, 3]", "f32[2]"] and outputs(X) == (X,)
    for index in (2, -1, True, 0.0, "0"):
        with pytest.raises(AttributeValueError, match="of a node with 2 outputs"):
            make("get", both, index=index)
    with pytest.raises(ShapeError, match="has one output"):
        get(X, 0)
    single = fused(Graph((P,), (make("exp", P),)), [X], "map")
    assert single.type == T


@pytest.mark.parametrize(
    ("body", "operands", "kind", "message"),
    [
        (BODY, [X], "magic", "the kinds are map, rows, reduce, window, contraction"),
        (BODY, [X, X], "rows", "2 operands for a body with 1 inputs"),
        (BODY, [input_node("y", tensor("f32", (3, 2)))], "rows", r"operand 0 is f32\[3, 2\], the body takes f32\[2, 3\]"),
        (Graph((P,), ()), [X], "map", "no outputs"),
        ("body", [X], "map", "a Graph, not str"),
    ],
)
def test_fused(body, operands, kind, message):
    with pytest.raises(TensorwrightError, match=message):
        fused(body, operands, kind)


def test_records():
    for name in ("input", "constant", "get", "fused"):
        op = REGISTRY[name]
        assert op.has(Trait.STRUCTURAL) and isinstance(op.lower(X), Structural)
        assert isinstance(op.grad, NotDifferentiable) or op.grad(X, (None,)) == ()
