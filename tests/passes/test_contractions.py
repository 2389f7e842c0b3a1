"""Contract form, layout, folding of scales and shifts, packing, and the split into prepare and run graph."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.ir.build import full, input_node
from tensorwright.ir.contraction import Axis, Contraction, affine
from tensorwright.ir.graph import Graph, postorder
from tensorwright.ir.graphs import inline
from tensorwright.ir.interp import run
from tensorwright.ir.lowering import Contract
from tensorwright.ir.op import make
from tensorwright.ir.types import tensor
from tensorwright.passes.contract import Context
from tensorwright.passes.contract_form import ContractForm, reshaped
from tensorwright.passes.decompose import Decompose
from tensorwright.passes.facts import Facts
from tensorwright.passes.fold_affine import FoldAffine
from tensorwright.passes.fuse import Fuse
from tensorwright.passes.layout import TO_NCHW, TO_NHWC, Layout, perm_of
from tensorwright.passes.oracle import draw, exact_difference
from tensorwright.passes.pack_weights import PackWeights, pack
from tensorwright.passes.pipeline import inference
from tensorwright.passes.prepare import split
from tensorwright.passes.simplify import Simplify
from tensorwright.passes.validate import validate_split


def t(*shape, dtype="f32"):
    return tensor(dtype, shape)


def bc(x, shape):
    return make("broadcast_to", x, shape=shape)


def names(graph):
    return [n.op.name for n in graph.nodes() if n.inputs]


def specs(graph):
    return [n.attrs["spec"] for n in graph.nodes() if n.op.name == "contract"]


# Contract form


def test_transposes_of_operands_and_result_become_index_maps(checked):
    x, w = input_node("x", t(8, 3)), input_node("w", t(5, 8))
    y = make("matmul", make("transpose", x, perm=(1, 0)), make("transpose", w, perm=(1, 0)))
    after = checked(Graph((x, w), (make("transpose", y, perm=(1, 0)),)), ContractForm())
    assert names(after) == ["contract"]
    (spec,) = specs(after)
    assert spec.axis(spec.c[-1].terms[0][0]).kind == "n", "vectors run along n: the operands changed places"


def test_a_product_used_twice_keeps_its_order(checked):
    x, w = input_node("x", t(3, 8)), input_node("w", t(8, 5))
    y = make("matmul", x, w)
    after = checked(Graph((x, w), (make("transpose", y, perm=(1, 0)), y)), ContractForm())
    assert sorted(names(after)) == ["contract", "transpose"]


def test_batched_matmul_with_one_matrix_has_no_batch_axis(checked):
    x, w = input_node("x", t(2, 3, 8)), input_node("w", t(8, 5))
    after = checked(Graph((x, w), (make("matmul", x, w),)), ContractForm())
    assert not specs(after)[0].of_kind("batch") and len(specs(after)[0].of_kind("m")) == 2


def test_attention_scores_need_no_transpose(checked):
    q, k = input_node("q", t(2, 6, 12)), input_node("k", t(2, 6, 12))

    def heads(x):
        return make("transpose", make("reshape", x, shape=(2, 6, 3, 4)), perm=(0, 2, 1, 3))

    scores = make("matmul", heads(q), make("transpose", heads(k), perm=(0, 1, 3, 2)))
    after = checked(Graph((q, k), (scores,)), Simplify(), ContractForm())
    assert sorted(names(after)) == ["contract", "reshape", "reshape"]


def test_heads_of_a_joint_projection_are_read_in_place(checked):
    """Queries and keys are slices of one tensor, reshaped to heads: both contractions read it as it is."""
    x = input_node("x", t(2, 6, 24))

    def heads(start):
        part = make("slice", x, starts=(0, 0, start), stops=(2, 6, start + 12), steps=(1, 1, 1))
        return make("transpose", make("reshape", part, shape=(2, 6, 3, 4)), perm=(0, 2, 1, 3))

    scores = make("matmul", heads(0), make("transpose", heads(12), perm=(0, 1, 3, 2)))
    after = checked(Graph((x,), (scores,)), Simplify(), ContractForm())
    assert names(after) == ["contract"] and after.outputs[0].inputs == (x, x)


@pytest.mark.parametrize(
    "operand",
    [
        lambda x: make("slice", x, starts=(1, 0), stops=(4, 8), steps=(1, 2)),
        lambda x: make("slice", x, starts=(0, 2), stops=(3, 6), steps=(1, 1)),
        lambda x: make("reverse", make("slice", x, starts=(0, 0), stops=(3, 4), steps=(1, 1)), axes=(1,)),
        lambda x: make("broadcast_to", make("slice", x, starts=(0, 0), stops=(1, 4), steps=(1, 1)), shape=(3, 4)),
        lambda x: make("broadcast_to", make("slice", x, starts=(0, 0), stops=(3, 1), steps=(1, 1)), shape=(3, 4)),
    ],
)
def test_movements_of_an_operand(operand, checked):
    x, w = input_node("x", t(4, 8)), input_node("w", t(4, 5))
    y = make("matmul", operand(x), w)
    checked(
        Graph(
            (x, w),
            (
                y,
                make(
                    "transpose",
                    make("matmul", make("transpose", w, perm=(1, 0)), make("transpose", operand(x), perm=(1, 0))),
                    perm=(1, 0),
                ),
            ),
        ),
        ContractForm(),
    )


def test_flattening_channels_last_needs_no_transpose(checked):
    """A convolution's result, channels last, enters a linear layer that counts its inputs channels first."""
    x, w = input_node("x", t(2, 3, 3, 4)), input_node("w", t(36, 5), "parameter")
    flat = make("reshape", make("transpose", x, perm=(0, 3, 1, 2)), shape=(2, 36))
    y = make("matmul", flat, w)
    after = checked(Graph((x, w), (y,)), ContractForm())
    assert names(after) == ["contract"]
    back = make(
        "transpose", make("reshape", make("matmul", y, make("transpose", w, perm=(1, 0))), shape=(2, 4, 3, 3)), perm=(0, 2, 3, 1)
    )
    plain = input_node("w", t(36, 5))
    both = Graph((x, plain), tuple(make("exp", n) for n in inline(Graph((x, w), (y, back)), (x, plain))))
    assert "transpose" not in names(checked(both, ContractForm()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((6, 4), (2, 3, 4)),
        ((2, 3, 4), (6, 4)),
        ((24,), (2, 3, 4)),
        ((4, 6), (4, 2, 3)),
        ((6, 1), (6,)),
        ((4,), (1, 4, 1)),
        ((6, 4), (4, 6)),
    ],
)
def test_an_operand_under_another_shape(old, new):
    import itertools

    axes = tuple(Axis(f"a{d}", n, "k") for d, n in enumerate(old))
    index = tuple(affine(x.name) for x in axes)
    spec = Contraction(axes, index, index, ())
    after = reshaped(spec, "a", old, new)
    if (old, new) == ((6, 4), (4, 6)):
        assert after is None
        return
    values = np.arange(np.prod(old))
    for at in itertools.product(*(range(x.extent) for x in after.axes)):
        where = dict(zip((x.name for x in after.axes), at, strict=True))

        def element(array, maps, where=where):
            return array[tuple(m.constant + sum(c * where[n] for n, c in m.terms) for m in maps)]

        assert element(values.reshape(new), after.a) == element(values.reshape(old), after.b)


# Layout


def conv_bn_relu(x, w, residual=None, **attrs):
    y = make("conv2d", x, w, **attrs)
    c = y.shape[1]
    gamma, mean = (input_node(f"{k}{c}", t(c), "parameter") for k in ("gamma", "mean"))

    def channel(v):
        return bc(make("reshape", v, shape=(c, 1, 1)), y.shape)

    y = make("mul", make("sub", y, channel(mean)), channel(gamma))
    y = y if residual is None else make("add", y, residual)
    return make("maximum", y, full(0.0, y.tensor)), [gamma, mean]


def resnet_block():
    x = input_node("x", t(2, 3, 8, 8))
    w1, w2 = input_node("w1", t(4, 3, 3, 3), "parameter"), input_node("w2", t(4, 4, 3, 3), "parameter")
    stem, p1 = conv_bn_relu(x, w1, padding=((1, 1), (1, 1)))
    pooled = make("max_pool2d", stem, kernel=(2, 2), stride=(2, 2))
    y, p2 = conv_bn_relu(pooled, w2, residual=pooled, padding=((1, 1), (1, 1)))
    out = make("mean", y, axes=(2, 3), keepdims=False)
    params = list(dict.fromkeys([*p1, *p2]))
    return Graph((x, w1, w2, *params), (out,))


def test_only_the_transpose_of_the_input_is_left(checked):
    after = checked(resnet_block(), Simplify(), Layout(), Decompose(), Simplify())
    facts = Facts()
    moving = [n for n in after.nodes() if n.inputs and n.op.name == "transpose" and perm_of(n, facts)]
    assert len(moving) == 1 and moving[0].attrs["perm"] == TO_NHWC
    layouts = {n.attrs["layout"] for n in after.nodes() if "layout" in n.attrs}
    assert layouts == {"NHWC"}


def test_the_signature_stays(checked):
    x, w = input_node("x", t(2, 3, 6, 6)), input_node("w", t(4, 3, 1, 1))
    graph = Graph((x, w), (make("conv2d", x, w), make("tanh", make("conv2d", x, w))))
    after = checked(graph, Layout())
    assert [o.type for o in after.outputs] == [o.type for o in graph.outputs] and after.inputs == graph.inputs
    assert Layout().run(after, Context()) is after


def grouped_block(order=(0, 2, 1, 3, 4)):
    """A convolution in 3 groups of 4 channels, scaled, rectified, its channels shuffled, added to itself, convolved again."""
    x, w = input_node("x", t(2, 6, 5, 4)), input_node("w", t(12, 2, 1, 1), "parameter")
    y, (gamma, mean) = conv_bn_relu(x, w, groups=3)
    apart = make("transpose", make("reshape", y, shape=(2, 3, 4, 5, 4)), perm=order)
    y = make("add", make("reshape", apart, shape=(2, 12, 5, 4)), y)
    w2 = input_node("w2", t(12, 1, 3, 3), "parameter")
    y = make("conv2d", y, w2, groups=12, padding=((1, 1), (1, 1)))
    return Graph((x, w, gamma, mean, w2), (make("sum", y, axes=(2, 3)),))


def test_a_shuffle_of_channels_stays_in_channels_last(checked):
    after = checked(grouped_block(), Simplify(), Layout(), Simplify())
    perms = [n.attrs["perm"] for n in after.nodes() if n.op.name == "transpose" and perm_of(n, Facts())]
    assert perms == [TO_NHWC, (0, 1, 2, 4, 3)]


def test_what_moves_more_than_channels_is_no_shuffle(checked):
    after = checked(grouped_block((0, 1, 2, 4, 3)), Simplify(), Layout(), Simplify())
    assert sum(n.op.name == "transpose" and perm_of(n, Facts()) is not None for n in after.nodes()) > 2


def test_work_on_a_product_in_groups_joins_it(checked):
    passes = (Simplify(), Layout(), Decompose(), Simplify(), ContractForm(), Simplify())
    after = checked(grouped_block(), *passes)
    facts = Facts()
    relu = [n for n in after.nodes() if n.inputs and facts.form(n) == "max"]
    assert [n.shape for n in relu] == [(2, 5, 4, 3, 4)]  # groups and columns of one are dimensions of their own
    (region, *_) = (n for n in checked(grouped_block(), *passes, Fuse()).nodes() if n.attrs.get("kind") == "contraction")
    assert [n.op.name for n in region.attrs["body"].nodes() if facts.elementwise(n) and n.inputs] == ["sub", "mul", "maximum"]


def test_a_graph_without_images_is_left_alone():
    x = input_node("x", t(2, 3))
    graph = Graph((x,), (make("transpose", make("exp", x), perm=(1, 0)),))
    assert Layout().run(graph, Context()) is graph


def test_permutations_are_inverse():
    assert tuple(TO_NHWC[p] for p in TO_NCHW) == (0, 1, 2, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_convolution(groups, checked):
    x, w = input_node("x", t(2, 4, 7, 6)), input_node("w", t(6, 4 // groups, 3, 3))
    attrs = {"padding": ((1, 1), (1, 0)), "stride": (2, 1), "groups": groups}
    y = make("conv2d", x, w, **attrs)
    total = make("sum", make("mul", y, y), axes=(0, 1, 2, 3), keepdims=False)
    g = make("gradient", total, x, w)
    parts = (make("get", g, index=0), make("get", g, index=1))
    after = checked(Graph((x, w), parts), *inference())
    assert "conv2d" not in " ".join(names(after))


# Scales and shifts


def test_batch_norm_folds_into_the_convolution(checked):
    after = checked(resnet_block(), *inference()[:-2])
    for n in after.nodes():
        if n.op.name == "contract":
            (user,) = [u for u in after.nodes() if n in u.inputs]
            assert user.op.name == "add", "what follows is the shift"
    run_graph = split(after)[1]
    assert not any(n.op.name in ("sub", "mul") and len(n.shape) == 4 for n in run_graph.nodes())


@pytest.mark.parametrize("form", ["scale", "shift and scale", "divide", "scalar", "twice", "shift twice"])
def test_forms_that_fold(form, checked):
    x, w = input_node("x", t(5, 3)), input_node("w", t(3, 4), "parameter")
    s, b = input_node("s", t(4), "parameter"), input_node("b", t(4), "parameter")
    y = make("matmul", x, w)
    S, B = bc(s, y.shape), bc(b, y.shape)
    out = {
        "scale": lambda: make("mul", y, S),
        "shift and scale": lambda: make("mul", make("sub", y, B), S),
        "divide": lambda: make("div", make("add", y, B), S),
        "scalar": lambda: make("mul", y, full(0.3, y.tensor)),
        "twice": lambda: make("mul", make("add", make("mul", y, S), B), S),
        "shift twice": lambda: make("sub", make("add", y, B), make("exp", S)),
    }[form]()
    after = checked(Graph((x, w, s, b), (out,)), Simplify(), ContractForm(), FoldAffine())
    (core,) = [n for n in after.nodes() if n.op.name == "contract"]
    above = [n for n in after.nodes() if core in n.inputs]
    assert not above or (above[0].op.name == "add" and after.outputs == (above[0],))


@pytest.mark.parametrize("form", ["along m", "data", "data weights", "used twice", "per element"])
def test_forms_that_must_not_fold(form, checked):
    roles = {"data weights": "data"}
    x, w = input_node("x", t(4, 3)), input_node("w", t(3, 4), roles.get(form, "parameter"))
    s = input_node("s", t(4), "data" if form == "data" else "parameter")
    y = make("matmul", x, w)
    scale = bc(make("reshape", s, shape=(4, 1)), y.shape) if form == "along m" else bc(s, y.shape)
    if form == "per element":
        scale = input_node("e", t(4, 4), "parameter")
        s = scale
    out = make("mul", y, scale)
    outputs = (out, y) if form == "used twice" else (out,)
    before = ContractForm().run(Graph((x, w, s), outputs), Context())
    assert FoldAffine().run(before, Context()) is before


def test_updated_weights_are_no_weights(checked):
    x, w, s = input_node("x", t(5, 3)), input_node("w", t(3, 4), "state"), input_node("s", t(4), "state")
    y = make("matmul", x, w)
    graph = Graph((x, w, s), (make("mul", y, bc(s, y.shape)), make("exp", w), make("exp", s)), aliases=((1, 1), (2, 2)))
    before = ContractForm().run(graph, Context())
    assert FoldAffine().run(before, Context()) is before
    assert split(before)[0] is None


# Packing


@pytest.mark.parametrize("panel", [4, 8, 16])
@pytest.mark.parametrize("shape", [(5, 7), (16, 3), (1, 1)])
def test_packed_product(shape, panel, checked, context):
    k, n = shape
    x, w = input_node("x", t(6, k)), input_node("w", t(k, n), "parameter")
    after = checked(Graph((x, w), (make("matmul", x, w),)), ContractForm(), PackWeights(), ctx=context(panel))
    (spec,) = specs(after)
    assert spec.panel == panel and spec.b_shape == (k, n)
    prepare, run_graph = split(after)
    validate_split(after, prepare, run_graph)
    assert [i.attrs["role"] for i in run_graph.inputs] == ["data", "prepared"]
    assert prepare.outputs[0].shape == (-(-n // panel), k, panel)


@pytest.mark.parametrize("groups", [1, 2])
def test_packed_convolution(groups, checked):
    x, w = input_node("x", t(2, 4, 6, 6)), input_node("w", t(6, 4 // groups, 3, 3), "parameter")
    y = make("conv2d", x, w, groups=groups, padding=((1, 1), (1, 1)))
    after = checked(Graph((x, w), (y,)), *inference())
    (spec,) = [
        n.op.lower(n).spec
        for r in after.nodes()
        for n in ([r] if r.op.name == "contract" else r.attrs["body"].nodes() if "body" in r.attrs else [])
        if n.inputs and isinstance(n.op.lower(n), Contract)
    ]
    assert spec.panel == 8 and len(spec.of_kind("batch")) == (groups > 1)
    validate_split(after, *split(after))


def test_panels_hold_columns_k_after_k():
    x, w = input_node("x", t(2, 3)), input_node("w", t(3, 5), "parameter")
    graph = ContractForm().run(Graph((x, w), (make("matmul", x, w),)), Context())
    packed = pack(w, specs(graph)[0], 4)
    values = np.arange(15, dtype="f4").reshape(3, 5)
    (panels,) = run(Graph((w,), (packed,)), [values])
    assert panels.shape == (2, 3, 4)
    for column in range(8):
        expected = values[:, column] if column < 5 else np.zeros(3)
        assert (panels[column // 4, :, column % 4] == expected).all()


def test_an_axis_of_one_is_not_moved():
    x, w = input_node("x", t(1, 4, 6, 6)), input_node("w", t(8, 4, 1, 1), "parameter")
    graph = Graph((x, w), (make("conv2d", x, w),))
    graph = ContractForm().run(Layout().run(graph, Context()), Context())
    packed = pack(w, specs(graph)[0], 4)
    assert [n.op.name for n in postorder([packed]) if n.inputs].count("transpose") == 1


@pytest.mark.parametrize(("columns", "moves"), [(4, 0), (12, 1)], ids=["one panel", "three panels"])
def test_rows_that_lie_in_order_are_packed_in_one_movement_or_none(columns, moves):
    """B as [k, n] is its own panel if that holds every column; else one transpose makes the panels."""
    x, w = input_node("x", t(2, 6)), input_node("w", t(6, columns), "parameter")
    graph = ContractForm().run(Graph((x, w), (make("matmul", x, w),)), Context())
    packed = pack(w, specs(graph)[0], 4)
    assert [n.op.name for n in postorder([packed]) if n.inputs].count("transpose") == moves
    values = np.arange(6 * columns, dtype=np.float32).reshape(6, columns)
    (panels,) = run(Graph((w,), (packed,)), [values])
    np.testing.assert_array_equal(panels, values.reshape(6, columns // 4, 4).swapaxes(0, 1))


def test_nothing_is_packed_without_a_target():
    x, w = input_node("x", t(2, 3)), input_node("w", t(3, 5), "parameter")
    graph = ContractForm().run(Graph((x, w), (make("matmul", x, w),)), Context())
    assert PackWeights().run(graph, Context(preferred_panel=lambda s, t, d: 8)) is graph
    assert PackWeights().run(graph, Context(target=None)) is graph


# The split


def test_what_weights_alone_determine_is_prepared(checked):
    x, w, b = input_node("x", t(4, 3)), input_node("w", t(3, 3), "parameter"), input_node("b", t(3), "parameter")
    scale = make("exp", b)
    y = make("add", make("mul", x, bc(scale, x.shape)), make("matmul", x, make("tanh", w)))
    y = make("add", y, bc(b, y.shape))
    graph = Graph((x, w, b), (y,), labels={})
    prepare, run_graph = split(graph)
    validate_split(graph, prepare, run_graph)
    assert [o.shape for o in prepare.outputs] == [(3,), (3, 3)], "the vector, not its broadcast"
    assert [i.attrs["name"] for i in run_graph.inputs] == ["x", "b", "b.prepared", "w.prepared"]
    assert prepare.output_names == ("b.prepared", "w.prepared")
    assert [i.attrs["name"] for i in prepare.inputs] == ["w", "b"]


def test_reshapes_and_broadcasts_alone_are_not_prepared():
    x, b = input_node("x", t(2, 3, 4, 4)), input_node("b", t(3), "parameter")
    y = make("add", x, bc(make("reshape", b, shape=(3, 1, 1)), x.shape))
    graph = Graph((x, b), (y,))
    prepare, run_graph = split(graph)
    assert prepare is None and run_graph is graph


def test_constants_are_prepared_if_they_are_work():
    x = input_node("x", t(4, 6))
    position = make("iota", shape=(4, 6), axis=1, dtype=t(dtype="f32").dtype)
    cheap = Graph((x,), (make("add", x, make("neg", position)),))
    assert split(cheap)[0] is None
    dear = Graph((x,), (make("add", x, make("sin", position)),))
    prepare, run_graph = split(dear)
    assert prepare.inputs == () and run_graph.inputs[1].attrs["name"] == "constant.prepared"
    validate_split(dear, prepare, run_graph)


def test_random_numbers_are_never_prepared():
    key = input_node("key", tensor("u64", ()), "state")
    x = input_node("x", t(4))
    graph = Graph((x, key), (make("add", x, make("random_uniform", key, shape=(4,), stream=0)),))
    assert split(graph)[0] is None


def test_an_output_of_weights_alone():
    x, w = input_node("x", t(4)), input_node("w", t(4), "parameter")
    graph = Graph((x, w), (make("exp", x), make("exp", w), w), output_names=("a", "b", "c"))
    prepare, run_graph = split(graph)
    validate_split(graph, prepare, run_graph)
    assert run_graph.output_names == ("a", "b", "c")


def test_aliases_follow_their_inputs():
    w, x, s = input_node("w", t(4), "parameter"), input_node("x", t(4)), input_node("s", t(4), "state")
    graph = Graph((w, x, s), (make("add", s, make("mul", x, make("exp", w))),), aliases=((0, 2),))
    prepare, run_graph = split(graph)
    assert prepare is not None
    assert run_graph.inputs[run_graph.aliases[0][1]] is s


def test_labels_survive(checked):
    from tensorwright.ir.graph import Label, Location

    x, w = input_node("x", t(4, 3)), input_node("w", t(3, 3), "parameter")
    y = make("matmul", x, make("tanh", w))
    z = make("maximum", y, full(0.0, y.tensor))
    graph = Graph((x, w), (z,), labels={y: Label("fc", Location("m.py", 5)), z: Label(None, Location("m.py", 6))})
    after = checked(graph, *inference())
    assert {str(label.location) for label in after.labels.values()} >= {"m.py:6"}
    _, run_graph = split(after)
    assert any(label.location for label in run_graph.labels.values())


def test_values_of_the_whole_pipeline(checked):
    graph = resnet_block()
    after = checked(graph, *inference())
    arrays = draw(graph, "normal", 0)
    assert exact_difference(
        [np.round(v, 3) for v in run(graph, arrays)], [np.round(v, 3) for v in run(after, arrays)]
    ) is None or np.allclose(run(graph, arrays)[0], run(after, arrays)[0], rtol=1e-4, atol=1e-5)
    assert all(
        n.op.name in ("fused", "get", "max_pool2d", "reshape", "contract", "transpose", "pad")
        for n in postorder(after.outputs)
        if n.inputs
    )
