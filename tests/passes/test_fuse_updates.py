"""The update of a parameter and of all states beside it is one kernel: each tensor is read and written once."""

from __future__ import annotations

from typing import Any

import pytest
import tensorwright as tw
from tensorwright import losses, nn, optim
from tensorwright.frontend import training_step
from tensorwright.ir.build import constant, input_node
from tensorwright.ir.graph import Graph, Node, postorder
from tensorwright.ir.op import make
from tensorwright.ir.types import tensor
from tensorwright.passes import pipeline
from tensorwright.passes.contract import Context
from tensorwright.passes.fuse import Fuse
from tensorwright.passes.manager import run_pipeline

OPTIMIZERS = [
    optim.SGD(0.1, momentum=0.9, nesterov=True),
    optim.Adam(amsgrad=True),
    optim.AdamW(),
    optim.RMSprop(centered=True, momentum=0.9),
    optim.AdaGrad(),
    optim.Adadelta(),
    optim.Lion(weight_decay=0.1),
]


def regions(graph: Graph) -> list[Node]:
    return [n for n in postorder(graph.outputs) if n.op.name == "fused"]


@pytest.mark.parametrize("options", [{}, {"guard": True}, {"guard": True, "ema": 0.99, "clip_global_norm": 1.0}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_one_kernel_updates_a_parameter_and_its_states(optimizer: Any, options: dict[str, Any]) -> None:
    net = nn.Linear(24, 40, bias=False, seed=1)
    step = training_step(net, losses.mse, optimizer, tw.spec(8, 24), tw.spec(8, 40), **options)
    done = run_pipeline(step.graph, pipeline.training(), Context())
    large = [k for k, o in enumerate(done.outputs) if o.type == tensor("f32", (40, 24))]
    assert len(large) == len(optimizer.slots()) + 1 + ("ema" in options)
    makers = {done.outputs[k].inputs[0] if done.outputs[k].op.name == "get" else done.outputs[k] for k in large}
    (kernel,) = makers
    assert kernel.attrs["kind"] == "map"
    assert len(kernel.attrs["body"].outputs) == len(large)  # and it stores nothing else
    read = [i for i in kernel.inputs if i.shape == (40, 24)]
    assert len(read) == len(large) + 1  # the old values, and the gradient


def fuse(outputs: list[Node], inputs: list[Node]) -> Graph:
    return Fuse().run(Graph(tuple(inputs), tuple(outputs)), Context())


def test_siblings_that_share_a_tensor_join_only_where_results_leave_them() -> None:
    x, y, z = (input_node(n, tensor("f32", (64, 64))) for n in "xyz")
    two = make("broadcast_to", constant(2.0, "f32"), shape=(64, 64))
    a, b = make("exp", make("mul", x, y)), make("sin", make("mul", x, z))
    (joined,) = regions(fuse([a, b], [x, y, z]))
    assert len(joined.attrs["body"].outputs) == 2
    # what else leaves is read by a matrix product: then it would have to live from the first of the two on
    inner = make("mul", x, two)
    product = make("sum", make("exp", inner), axes=(0,), keepdims=False)
    apart = regions(fuse([a, product], [x, y]))
    assert sorted(r.attrs["kind"] for r in apart) == ["map", "reduce"]
    # nothing shared, or another shape
    assert len(regions(fuse([make("exp", make("mul", x, x)), make("sin", make("mul", z, z))], [x, z]))) == 2


def test_siblings_do_not_join_in_a_circle() -> None:
    x, y = (input_node(n, tensor("f32", (256, 256))) for n in "xy")  # too long for a row
    a = make("exp", make("mul", x, y))
    total = make("sum", a, axes=(0, 1), keepdims=False)
    b = make("mul", make("mul", x, x), make("broadcast_to", total, shape=(256, 256)))  # waits for the sum of the other
    done = fuse([a, b], [x, y])
    makers = {o.inputs[0] if o.op.name == "get" else o for o in done.outputs}
    assert len(makers) == 2
