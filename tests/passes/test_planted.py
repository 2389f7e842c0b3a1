"""Planted bugs: each is caught by validation, which names the guilty pass and rewrite and writes a repro that fails again.

A bug is planted by replacing a rule, a helper or a record for the length of one test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.ir import differentiate
from tensorwright.ir.build import constant, full, get, input_node
from tensorwright.ir.dtypes import bf16, f32, u8
from tensorwright.ir.errors import ValidationError
from tensorwright.ir.graph import Graph, Label, Location
from tensorwright.ir.lowering import Decompose as Decomposition
from tensorwright.ir.op import lookup, make
from tensorwright.ir.target import Target, row, with_bf16, with_vnni
from tensorwright.ir.types import tensor
from tensorwright.passes import (
    algebra,
    bytes_by_four,
    coded_weights,
    contract_form,
    control,
    depthwise,
    fold_affine,
    hoist,
    integers,
    layout,
    movement,
    pack_weights,
    prepare,
    regions,
    rounded_products,
    simplify,
    sink,
    strength,
    weight_order,
    widen,
)
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import Hooks, run_pipeline
from tensorwright.passes.pipeline import PASSES, cuda, inference, training
from tensorwright.passes.rewrite import Miss, rule
from tensorwright.passes.validate import Validator, validate_split


def t(*shape, dtype="f32"):
    return tensor(dtype, shape)


def bc(x, shape):
    return make("broadcast_to", x, shape=shape)


def total(y):
    return make("sum", y, axes=tuple(range(len(y.shape))), keepdims=False)


class Plant:
    """Replaces things for one test."""

    def __init__(self, monkeypatch, request):
        self.monkeypatch, self.request = monkeypatch, request

    def rule(self, fn):
        """Puts a rule of the same name in place of one of simplify's (or adds it, first)."""
        new = rule(fn)
        old = [r for r in simplify.RULES if r.name != new.name]
        self.monkeypatch.setattr(simplify, "RULES", (new, *old))

    def function(self, module, name, new):
        self.monkeypatch.setattr(module, name, new)

    def record(self, name, **changes):
        op = lookup(name)
        for field, value in changes.items():
            old = getattr(op, field)
            object.__setattr__(op, field, value)
            self.request.addfinalizer(lambda field=field, old=old: object.__setattr__(op, field, old))


@pytest.fixture(name="plant")
def plant_fixture(monkeypatch, request):
    return Plant(monkeypatch, request)


@dataclass(frozen=True)
class Bug:
    """A planted bug, a graph that meets it among other work, and who must be named."""

    plant: Callable[[Plant], None]
    graph: Callable[[], Graph]
    guilty_pass: str
    guilty_rule: str
    passes: Callable[[], tuple] = inference
    target: Target | None = None  # where another than the fixture's is needed

    def surroundings(self, context):
        ctx = context()
        ctx.target = self.target or ctx.target
        return ctx


# --- graphs -----------------------------------------------------------------------------------------------------------


def around(make_node, *shapes, roles=()):
    """A graph in which the interesting node stands among others, with source locations on every line."""
    roles = (*roles, *("data",) * (len(shapes) - len(roles)))
    inputs = tuple(input_node(f"x{k}", t(*s), r) for k, (s, r) in enumerate(zip(shapes, roles, strict=True)))
    busy = make("tanh", make("mul", inputs[0], make("sin", inputs[0])))
    node = make_node(*inputs)
    other = make("exp", make("neg", make("abs", busy)))
    labels = {node: Label(None, Location("model.py", 12, "y = layer(x)"))}
    return Graph(inputs, (make("sigmoid", make("add", node, full(0.25, node.tensor))), other), labels=labels)


def signed_zero():
    x, y = input_node("x", t(3, 4)), input_node("y", t(3, 4))
    return Graph((x, y), (make("abs", y), make("neg", make("add", make("minimum", x, y), full(0.0, x.tensor)))))


def conv_block(size=6):
    x, w = input_node("x", t(2, 3, size, size)), input_node("w", t(4, 3, 3, 3), "parameter")
    y = make("conv2d", x, w, padding=((1, 1), (1, 1)))
    s, b = input_node("s", t(4), "parameter"), input_node("b", t(4), "parameter")

    def channel(v):
        return bc(make("reshape", v, shape=(4, 1, 1)), y.shape)

    y = make("mul", make("sub", y, channel(b)), channel(s))
    y = make("maximum", y, full(0.0, y.tensor))
    out = make("sum", make("max_pool2d", y, kernel=(2, 2), stride=(2, 2)), axes=(1, 2), keepdims=False)
    return Graph((x, w, s, b), (out,), labels={y: Label(None, Location("model.py", 12))})


def linear(role="parameter"):
    def build(x, w, s, b):
        y = make("matmul", x, make("transpose", w, perm=(1, 0)))
        return make("mul", make("add", y, bc(b, y.shape)), bc(s, y.shape))

    return around(build, (4, 3), (5, 3), (5,), (5,), roles=("data", role, role, role))


def gradient_of(fn, *shapes):
    inputs = tuple(input_node(f"x{k}", t(*s)) for k, s in enumerate(shapes))
    marks = [make("mark", i, id=k) for k, i in enumerate(inputs)]
    y = fn(*marks)
    g = make("gradient", total(make("mul", y, make("cos", y))), *marks)
    labels = {y: Label(None, Location("model.py", 12))}
    return Graph(inputs, tuple(get(g, k) for k in range(len(marks))), labels=labels)


def mlp(x, w):
    return make("tanh", make("matmul", make("tanh", make("matmul", x, w)), make("transpose", w, perm=(1, 0))))


def update():
    p, g, m = (input_node(k, t(8), "state") for k in "pgm")
    new_m = make("add", make("mul", m, full(0.9, m.tensor)), g)
    return Graph((p, g, m), (new_m, make("sub", p, make("mul", new_m, full(1e-2, p.tensor)))))


# --- bugs -------------------------------------------------------------------------------------------------------------


def plus_zero(plant):
    @plant.rule
    def add_zero(node, facts):
        """x + 0.0 -> x: wrong for -0.0."""
        hit = facts.form(node) == "add" and facts.value(node.inputs[1]) == 0
        return node.inputs[0] if hit else Miss("no", node)


def times_zero(plant):
    @plant.rule
    def times_zero(node, facts):
        """x * 0 -> 0: wrong for NaN and Inf."""
        hit = facts.form(node) == "mul" and facts.value(node.inputs[1]) == 0
        return node.inputs[1] if hit else Miss("no", node)


def reversed_difference(plant):
    @plant.rule
    def add_negated(node, facts):
        """x + (-y) -> y - x: wrong sign."""
        if facts.form(node) == "add" and facts.form(node.inputs[1]) == "neg":
            return make("sub", node.inputs[1].inputs[0], node.inputs[0])
        return Miss("no", node)


def sine_is_idempotent(plant):
    @plant.rule
    def idempotent(node, facts):
        """sin(sin(x)) -> sin(x): it is not."""
        hit = facts.form(node) == "sin" and node.inputs[0].op is node.op
        return node.inputs[0] if hit else Miss("no", node)


def swapped_branches(plant):
    @plant.rule
    def select_known(node, facts):
        """where(true, x, y) -> y."""
        known = facts.value(node.inputs[0]) if facts.form(node) == "select" else None
        return Miss("no", node) if known is None else node.inputs[2 if known else 1]


def every_type_holds_every_other(plant):
    plant.function(algebra, "_holds", lambda narrow, wide: True)


def folding_is_off(plant):
    right = algebra.evaluate
    plant.function(algebra, "evaluate", lambda node, arrays: right(node, arrays) + np.float32(1e-3))


def composed_the_wrong_way(plant):
    right = movement.compose
    plant.function(
        movement, "compose", lambda outer, inner: right(inner, outer) if len(outer) == len(inner) else right(outer, inner)
    )


def slice_forgets_its_start(plant):
    right = movement._slice

    def slice_(x, index, shape):
        return right(x, tuple(replace(i, constant=0) for i in index), shape)

    plant.function(movement, "_slice", slice_)


def cube_is_square(plant):
    @rule
    def small_power(node, facts):
        """x ** 3 -> x * x."""
        hit = facts.form(node) == "pow" and facts.value(node.inputs[1]) == 3
        return make("mul", node.inputs[0], node.inputs[0]) if hit else Miss("no", node)

    plant.function(strength, "small_power", small_power)


def mean_of_one_fewer(plant):
    right = lookup("mean").lower

    def lower(node):
        build = right(node).build
        return Decomposition(lambda n: make("mul", build(n), full(1.01, n.tensor)))

    plant.record("mean", lower=lower)


def reduced_axes_are_not_moved(plant):
    @rule
    def reduce_transposed(node, facts):
        """sum(T(x), axes) -> sum(x, axes) with the axes of T(x)."""
        perm = layout.perm_of(node.inputs[0], facts) if node.inputs and node.attrs.get("axes") else None
        if perm is None or node.attrs["keepdims"]:
            return Miss("no", node)
        new = node.replace((node.inputs[0].inputs[0],))
        return new if new.type == node.type else Miss("no", node)

    plant.function(layout, "reduce_transposed", reduce_transposed)


def pooling_keeps_its_kernel(plant):
    right = lookup("max_pool2d").to_layout

    def to_layout(node, wanted):
        new = right(node, wanted)
        return new if new is node else right(node.replace(kernel=(2, 1), padding=((0, 0), (0, 0))), wanted)

    plant.record("max_pool2d", to_layout=to_layout)


def index_map_forgets_the_start(plant):
    right = contract_form.moved

    def moved(index, read):
        return right(index, replace(read, index=tuple(replace(i, constant=0) for i in read.index)))

    plant.function(contract_form, "moved", moved)


def operands_swapped_one_map_reversed(plant):
    right = contract_form.swapped

    def swapped(spec):
        new = right(spec)
        return replace(new, a=new.a[::-1])

    plant.function(contract_form, "swapped", swapped)


def shift_is_not_scaled(plant):
    right = fold_affine.combine
    plant.function(fold_affine, "combine", lambda op, a, b: a if op == "mul" else right(op, a, b))


def padding_is_forgotten(plant):
    right = depthwise._unpadded
    plant.function(depthwise, "_unpadded", lambda x, facts: (right(x, facts)[0], (0,) * len(x.shape), 0.0))


def minus_is_plus(plant):
    right = fold_affine._shifted

    def shifted(u, fixed, facts):
        found = right(u, fixed, facts)
        if found is None or found[1] is None or facts.form(u) != "sub":
            return found
        return found[0], replace(found[1], node=make("neg", found[1].node))

    plant.function(fold_affine, "_shifted", shifted)


def panels_padded_in_front(plant):
    def matrix(b, spec):
        x = right(b, spec)
        return x if x is None else make("reverse", x, axes=(0,))

    right = pack_weights.matrix
    plant.function(pack_weights, "matrix", matrix)


def weights_upside_down(plant):
    def matrix(b, spec):
        x = right(b, spec)
        return x if x is None else make("reverse", x, axes=(0,))

    right = weight_order.matrix
    plant.function(weight_order, "matrix", matrix)


def outputs_in_another_order(plant):
    right = regions._Builder._set

    def set_(self, old, new):
        if new.op.name == "get":
            last = len(new.inputs[0].type.items) - 1
            new = get(new.inputs[0], last - new.attrs["index"])
        right(self, old, new)

    plant.function(regions._Builder, "_set", set_)


def operands_in_another_order(plant):
    right = regions._Builder._operands
    emit = regions.fused

    def fused(body, operands, kind):
        same = [k for k in range(1, len(operands)) if operands[k].type == operands[0].type]
        if same:
            operands = list(operands)
            operands[0], operands[same[0]] = operands[same[0]], operands[0]
        return emit(body, operands, kind)

    assert right is not None
    plant.function(regions, "fused", fused)


def slope_of_tanh(plant):
    plant.record("tanh", grad=lambda node, dy: (make("mul", dy[0], make("sub", full(1.0, node.tensor), node)),))


def product_forgets_a_factor(plant):
    plant.record("mul", grad=lambda node, dy: (make("mul", dy[0], node.inputs[1]), None))


def matmul_forgets_to_transpose(plant):
    right = lookup("matmul").grad

    def grad(node, dy):
        da, db = right(node, dy)
        return da, (make("transpose", db, perm=(1, 0)) if db.shape[0] == db.shape[1] else db)

    plant.record("matmul", grad=grad)


def cotangents_overwrite(plant):
    plant.function(differentiate, "_total", lambda parts: parts[-1] if parts else None)


def looped(make_step, *, results):
    """A scan over (h0, xs, w) among other work; `make_step(h, x, w)` gives a body's outputs."""

    def node(h0, xs, w):
        p = [input_node(f"p{k}", t(3)) for k in range(3)]
        scan = [
            make("scan", h0, xs, w, body=Graph(tuple(p), outputs), length=4, carries=1, sequences=1) for outputs in make_step(*p)
        ]
        total = get(scan[0], results[0])
        for s, k in zip(scan[1:], results[1:], strict=True):
            total = make("add", total, get(s, k))
        return total

    return around(node, (3,), (4, 3), (3,))


def two_loops():
    def steps(h, x, w):
        return ((make("sin", make("add", h, x)), make("mul", h, w)), (make("cos", make("add", h, x)), make("mul", x, h)))

    return looped(steps, results=(0, 0))


def loops_merge_whatever_their_updates(plant):
    plant.function(control, "_alike", lambda node, low: (node.inputs, low.body.inputs, low.length))


def steady_loop():
    return looped(lambda h, x, w: ((make("sin", make("mul", make("exp", w), make("add", make("cos", h), x))),),), results=(0,))


def carries_are_invariant(plant):
    plant.function(hoist, "invariants", lambda node, body: frozenset((body.inputs[0], body.inputs[2])))


def projected_loop():
    """A recurrent layer: x @ wx + b for all steps, then a loop that adds h @ wh."""

    def layer(x, wx, b, wh):
        gates = tw.matmul(x, wx) + b
        return tw.scan(lambda h, g: (tw.tanh(g + h @ wh), None), tw.zeros((8, 5)), gates)[0]

    return tw.trace(layer, tw.spec(3, 8, 4), tw.spec(4, 5), tw.spec(5), tw.spec(5, 5))


def a_sunk_projection_loses_its_bias(plant):
    right = sink._projection
    plant.function(sink, "_projection", lambda *arguments: (right(*arguments)[0], None))


def half(fn):
    """A function of 16-bit floats."""
    x, y = input_node("x", t(3, 4, dtype="f16")), input_node("y", t(3, 4, dtype="f16"))
    return Graph((x, y), (fn(x, y), make("neg", y)))


def half_computed_in_bf16(plant):
    plant.function(widen, "f32", bf16)


def sums_rounded_to_bf16(plant):
    right = lookup("contract_f32").reference

    def reference(arrays, attrs):
        return right(arrays, attrs).astype(bf16.numpy).astype(np.float32)

    plant.record("contract_f32", reference=reference)


def rounded_product():
    def rounded(x):
        return make("cast", make("cast", x, dtype=bf16), dtype=f32)

    return around(lambda x, w: make("matmul", rounded(x), rounded(w)), (4, 4), (4, 4))


def rounded_operands_exchanged(plant):
    right = rounded_products.evened

    def evened(spec, a, b):
        spec, a, b = right(spec, a, b)
        return spec, b, a

    plant.function(rounded_products, "evened", evened)


def tf32_with_seven_bits(plant):
    right = lookup("round_tf32").reference
    plant.record("contract_tf32", reference=lambda arrays, attrs: lookup("contract").reference(
        [right([x.astype(bf16.numpy).astype(x.dtype)], {}) for x in arrays], attrs
    ))  # fmt: skip


def bytes_product():
    """Bytes that are both signed, of an odd number of steps."""
    x, y = input_node("x", t(3, 7, dtype="i8")), input_node("y", t(7, 5, dtype="i8"))
    return Graph((x, y), (make("neg", make("matmul", x, y)), make("abs", x)))


def column_sums_negated(plant):
    right = bytes_by_four.sums
    plant.function(bytes_by_four, "sums", lambda b, spec: make("neg", right(b, spec)))


def dequantised_product():
    x, w = input_node("x", t(4, 8)), input_node("w", t(8, 3, dtype="i8"), "parameter")
    scale, zero = constant(np.float32(0.25)), constant(np.uint8(3))
    x = make("dequantize", make("quantize", x, scale, zero, axis=None, dtype=u8), scale, zero, axis=None)
    w = make("dequantize", w, scale, constant(np.int8(0)), axis=None)
    return Graph((x.inputs[0].inputs[0], w.inputs[0]), (make("matmul", x, w),))


def blocks_of_weights():
    x, q = input_node("x", t(2, 16)), input_node("q", t(16, 3, dtype="i8"), "parameter")
    s = input_node("s", t(2, 3), "parameter")
    w = make("dequantize_blocks", q, s, axis=0, block=8)
    return Graph((x, q, s), (make("matmul", make("exp", x), w),))


def scales_of_other_columns(plant):
    right = coded_weights._scale_panels
    plant.function(coded_weights, "_scale_panels", lambda scale, n: right(make("reverse", scale, axes=(0,)), n))


def zero_point_is_added(plant):
    right = integers.thin_sums
    plant.function(integers, "thin_sums", lambda b, spec: make("neg", right(b, spec)))


BUGS = {
    "x + 0.0 -> x": Bug(plus_zero, signed_zero, "simplify", "add_zero"),
    "x * 0 -> 0": Bug(
        times_zero, lambda: around(lambda x: make("mul", make("exp", x), full(0.0, x.tensor)), (3, 4)), "simplify", "times_zero"
    ),
    "x + (-y) -> y - x": Bug(
        reversed_difference, lambda: around(lambda x, y: make("add", x, make("neg", y)), (3,), (3,)), "simplify", "add_negated"
    ),
    "sin is idempotent": Bug(
        sine_is_idempotent, lambda: around(lambda x: make("sin", make("sin", make("exp", x))), (3,)), "simplify", "idempotent"
    ),
    "branches swapped": Bug(
        swapped_branches,
        lambda: around(lambda x, y: make("where", full(True, t(3, dtype="bool")), make("exp", x), y), (3,), (3,)),
        "simplify",
        "select_known",
    ),
    "narrowing casts dropped": Bug(
        every_type_holds_every_other,
        lambda: around(lambda x: make("cast", make("cast", make("exp", x), dtype=t(dtype="i32").dtype), dtype=x.dtype), (3,)),
        "simplify",
        "cast_of_cast",
    ),
    "constants folded wrongly": Bug(
        folding_is_off,
        lambda: around(lambda x: make("mul", x, bc(make("exp", constant(0.7, "f32")), x.shape)), (3,)),
        "simplify",
        "fold_constants",
    ),
    "movements composed backwards": Bug(
        composed_the_wrong_way,
        lambda: around(lambda x: make("transpose", make("transpose", make("exp", x), perm=(1, 2, 0)), perm=(0, 2, 1)), (3, 3, 3)),
        "simplify",
        "movement_of_movement",
    ),
    "slice of slice forgets the start": Bug(
        slice_forgets_its_start,
        lambda: around(
            lambda x: make(
                "slice", make("slice", make("exp", x), starts=(2,), stops=(8,), steps=(1,)), starts=(1,), stops=(4,), steps=(1,)
            ),
            (8,),
        ),
        "simplify",
        "movement_of_movement",
    ),
    "x ** 3 -> x * x": Bug(
        cube_is_square, lambda: around(lambda x: make("pow", x, full(3.0, x.tensor)), (3,)), "strength", "small_power"
    ),
    "mean is off by a hundredth": Bug(
        mean_of_one_fewer,
        lambda: around(lambda x: make("mean", make("exp", x), axes=(1,), keepdims=True), (3, 4)),
        "decompose",
        "build",
    ),
    "axes stay when a transpose moves": Bug(reduced_axes_are_not_moved, lambda: conv_block(8), "layout", "reduce_transposed"),
    "pooling in another layout": Bug(
        pooling_keeps_its_kernel,
        lambda: around(
            lambda x: make("max_pool2d", make("transpose", make("exp", x), perm=(0, 3, 1, 2)), kernel=(2, 2), stride=(2, 2)),
            (1, 4, 4, 2),
        ),
        "layout",
        "channels_last",
    ),
    "index map forgets the start": Bug(
        index_map_forgets_the_start,
        lambda: around(
            lambda x, w: make("matmul", make("slice", make("exp", x), starts=(1, 0), stops=(4, 3), steps=(1, 1)), w),
            (5, 3),
            (3, 4),
        ),
        "contract_form",
        "move_a",
    ),
    "operands swapped, one map reversed": Bug(
        operands_swapped_one_map_reversed,
        lambda: around(lambda x, w: make("transpose", make("matmul", x, w), perm=(1, 0)), (4, 4), (4, 4)),
        "contract_form",
        "vectors_along_n",
    ),
    "padding of a depthwise convolution is forgotten": Bug(
        padding_is_forgotten,
        lambda: around(
            lambda x, w: make("conv2d", x, w, padding=((1, 1), (1, 1)), groups=3, layout="NHWC"), (1, 4, 4, 3), (3, 1, 3, 3)
        ),
        "depthwise",
        "to_depthwise",
    ),
    "shift is not scaled": Bug(shift_is_not_scaled, linear, "fold_affine", "fold_scale"),
    "scales of other columns": Bug(scales_of_other_columns, blocks_of_weights, "coded_weights", "coded_product"),
    "zero point is added": Bug(zero_point_is_added, dequantised_product, "integers", "product"),
    "minus taken for plus": Bug(minus_is_plus, conv_block, "fold_affine", "fold_scale"),
    "panels upside down": Bug(panels_padded_in_front, linear, "pack_weights", "pack_operand"),
    "weights of a GPU upside down": Bug(
        weights_upside_down, conv_block, "weight_order", "order_weights", lambda: cuda(inference())
    ),
    "outputs of a region exchanged": Bug(outputs_in_another_order, update, "fuse", "fuse_map", training),
    "operands of a region exchanged": Bug(
        operands_in_another_order, lambda: around(lambda x, y: make("sub", make("exp", x), y), (3,), (3,)), "fuse", "fuse_map"
    ),
    "slope of tanh": Bug(slope_of_tanh, lambda: gradient_of(mlp, (3, 4), (4, 2)), "gradient", "gradient of tanh"),
    "product rule with one term": Bug(
        product_forgets_a_factor,
        lambda: gradient_of(lambda x, y: make("mul", make("exp", x), y), (3,), (3,)),
        "gradient",
        "gradient of mul",
    ),
    "matmul forgets to transpose": Bug(
        matmul_forgets_to_transpose, lambda: gradient_of(mlp, (3, 4), (4, 4)), "gradient", "gradient of matmul"
    ),
    "loops with other updates merge": Bug(loops_merge_whatever_their_updates, two_loops, "control", "merge_loops"),
    "a projection inside the loop has no bias": Bug(a_sunk_projection_loses_its_bias, projected_loop, "sink", "sink_projection"),
    "what a carry determines leaves the loop": Bug(carries_are_invariant, steady_loop, "hoist", "invariant_motion"),
    "computed in bf16 on the way": Bug(
        half_computed_in_bf16, lambda: half(lambda x, y: make("mul", make("exp", x), y)), "widen", "widen"
    ),
    "sums of products rounded to bf16": Bug(
        sums_rounded_to_bf16,
        linear,
        "mixed_precision",
        "mixed_precision",
        lambda: inference(None, "bf16"),
        with_bf16(row("x86-64-v4")),
    ),
    "rounded operands exchanged": Bug(
        rounded_operands_exchanged, rounded_product, "rounded_products", "rounded_products", target=with_bf16(row("x86-64-v4"))
    ),
    "products of tf32 as bf16": Bug(
        tf32_with_seven_bits, linear, "tensor_float", "tensor_float", lambda: inference(None, "tf32"), row("cuda-sm_80")
    ),
    "columns are summed with the wrong sign": Bug(
        column_sums_negated, bytes_product, "bytes_by_four", "by_four", target=with_vnni(row("x86-64-v4"))
    ),
    "cotangents overwrite each other": Bug(cotangents_overwrite, lambda: gradient_of(mlp, (3, 4), (4, 2)), "gradient", ""),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, plant, tmp_path, context):
    bug = BUGS[name]
    graph = bug.graph()
    run_pipeline(
        graph, bug.passes(), bug.surroundings(context), Hooks(validate=Validator(folder=tmp_path))
    )  # without the bug: fine
    assert not list(tmp_path.iterdir())
    bug.plant(plant)
    with pytest.raises(ValidationError) as e:
        run_pipeline(graph, bug.passes(), bug.surroundings(context), Hooks(validate=Validator(folder=tmp_path)))
    error, text = e.value, str(e.value)
    assert error.pass_name == bug.guilty_pass, text
    assert error.rule == bug.guilty_rule, text
    assert f"pass {bug.guilty_pass}" in text and (not bug.guilty_rule or f"guilty rewrite: {bug.guilty_rule}" in text)
    assert f"tensorwright opt --passes {bug.guilty_pass} --validate {error.repro}" in text
    assert "in pass" in error.__notes__[0]
    small = Graph.parse(error.repro.read_text())
    assert sum(1 for n in small.nodes() if n.inputs) <= 10
    assert len(small.nodes()) <= max(len(graph.nodes()), 10)
    p = PASSES[bug.guilty_pass]()  # as the command makes it
    with pytest.raises(ValidationError):  # the repro fails again, from its text
        after = p.apply(small, ctx := bug.surroundings(context))
        Validator(folder=tmp_path)(p, small, after, ctx)


def test_the_location_is_named(plant, tmp_path, context):
    reversed_difference(plant)
    x, y = input_node("x", t(3)), input_node("y", t(3))
    z = make("add", x, make("neg", y))
    graph = Graph((x, y), (z,), labels={z: Label("z", Location("model.py", 12, "z = x + -y"))})
    with pytest.raises(ValidationError, match=r"model\.py:12: z = x \+ -y"):
        run_pipeline(graph, inference(), context(), Hooks(validate=Validator(folder=tmp_path)))


def test_a_planted_split_is_caught(plant):
    x, a, b = input_node("x", t(3)), input_node("a", t(3), "parameter"), input_node("b", t(3), "parameter")
    graph = Graph((x, a, b), (make("add", make("mul", x, make("exp", a)), make("tanh", b)),))
    validate_split(graph, *prepare.split(graph))
    prepared, run_graph = prepare.split(graph)
    crossed = replace(prepared, outputs=prepared.outputs[::-1])
    with pytest.raises(ValidationError, match="split into prepare and run graph changed output 0"):
        validate_split(graph, crossed, run_graph)


def test_every_pass_has_a_planted_bug():
    elsewhere = {"crop", "drop_marks", "rematerialise", "slices", "winograd"}  # below, or in files of their own
    assert {b.guilty_pass for b in BUGS.values()} | elsewhere == set(PASSES)
    assert len(BUGS) >= 15


def test_dropping_more_than_marks_is_caught(plant, tmp_path):
    from tensorwright.passes import drop_marks
    from tensorwright.passes.drop_marks import DropMarks

    @rule
    def drop_mark(node, facts):
        """neg(x) -> x: no mark."""
        return node.inputs[0] if facts.form(node) == "neg" else Miss("no", node)

    plant.function(drop_marks, "drop_mark", drop_mark)
    x = input_node("x", t(3))
    graph = Graph((x,), (make("exp", make("neg", make("stop_gradient", x))),))
    with pytest.raises(ValidationError, match="guilty rewrite: drop_mark"):
        run_pipeline(graph, (DropMarks(),), Context(), Hooks(validate=Validator(folder=tmp_path)))
