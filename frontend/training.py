"""One training step as one graph: forward, backward, clipping, optimiser, state in and state out.

    step = training_step(net, losses.cross_entropy, optim.Adam(1e-3), spec(64, 1, 28, 28), spec(64, dtype="i64"))

    inputs of step.graph    state (role 'state')                          learning_rate   batch: x..., target
    outputs                 new state (as many, same names, same order)   loss            metrics...   predictions...

Each new-state output is an alias of the input in the same place: the caller donates the buffer. What the caller does,
once per batch:  state[:], loss = program(*state, learning_rate, x, target).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.dtypes import as_dtype, f32
from ..ir.errors import ShapeError, TraceError
from ..ir.graph import Graph, Node
from ..ir.types import TensorType
from . import tree
from .context import Trace, error
from .core import Value, as_tensor, wrap
from .gradients import value_and_grad
from .metrics import Metric, metric
from .module import Module
from .optim import Optimizer, clip_by_global_norm
from .parameter import Parameter
from .tracing import Traced, collect_outputs, declare_parameters, finish, make_inputs, order_parameters, tensor_structure

Array = np.ndarray[Any, Any]
Loss = Callable[[Any, Any], Value]


@dataclass(frozen=True)
class TracedStep:
    """The graph of a training step, and what belongs to it.

    graph       inputs: `state`, then `learning_rate` (f32 scalar), then `batch`; outputs: the first `updated` states, `results`
    state       initial arrays by input name, in input order: trainable parameters (by path), optimiser state
                ('optimizer.m.fc.weight'), running statistics, 'rng' (u64) if random numbers are drawn, and last what is only
                read (frozen parameters)
    updated     how many of the states have a new value among the outputs; output i is an alias of input i
    batch       names of the batch inputs: the model's arguments, then the target's leaves
    results     names of the outputs after the states: 'loss', each metric's name, then 'prediction...' if asked for
    parameters  state name -> the model's Parameter or Buffer
    structure   how the predictions are put together again
    """

    graph: Graph
    state: Mapping[str, Array]
    updated: int
    batch: tuple[str, ...]
    results: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    structure: tree.Structure

    def initial_state(self) -> dict[str, Array]:
        """Fresh copies of the state arrays, which a caller may donate."""
        return {name: array.copy() for name, array in self.state.items()}

    def store(self, state: Mapping[str, Array]) -> None:
        """Copies trained parameters and buffers back into the model."""
        for name, p in self.parameters.items():
            if name in state:
                p.data = state[name]


def training_step(
    module: Module,
    loss: Loss,
    optimizer: Optimizer,
    *specs: Any,
    metrics: Sequence[str | Metric] = (),
    clip_norm: float | None = None,
    seed: int = 0,
    predictions: bool = False,
    name: str | None = None,
) -> TracedStep:
    """Traces one step. `specs` are the model's arguments and, last, the target: `loss(prediction, target)` is a scalar.

    metrics      names or functions (prediction, target) -> scalar; computed before the update
    clip_norm    the greatest global norm of the gradients
    seed         where the random draws (dropout) start
    predictions  whether the model's results are outputs too

    Raises TraceError, ShapeError, DTypeError as `trace`; TraceError for a model without trainable parameters.
    """
    if len(specs) < 2:
        raise error(TraceError, "a training step needs specs for the model's arguments and, last, for the target")
    trainable = {path: p for path, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise error(TraceError, f"{type(module).__name__} has no trainable parameter")
    measured = [metric(m) for m in metrics]
    with Trace(name or f"{type(module).__name__}_training_step", training=True, stateful=True) as t:
        declare_parameters(t, module)
        initial: dict[str, Array] = {}
        for p in trainable.values():
            node = t.add_parameter(p, "state")
            initial[str(node.attrs["name"])] = p.data
        before = optimizer.init({path: p.data for path, p in trainable.items()})
        leaves, structure = tree.flatten(before)
        opt_nodes = [_state(t, path, leaf) for path, leaf in zip(tree.paths(structure, "optimizer"), leaves, strict=True)]
        initial |= {str(n.attrs["name"]): np.asarray(leaf) for n, leaf in zip(opt_nodes, leaves, strict=True)}
        key = first_key(seed)
        t.key = _state(t, "rng", key)
        rate = t.input("learning_rate", TensorType(f32, ()), "data")
        arguments, target, batch = _batch(t, module, specs)

        def objective(m: Module) -> tuple[Value, Any]:
            prediction = m(*arguments)
            return loss(prediction, target), prediction

        (value, prediction), grads = value_and_grad(objective, has_aux=True)(module)
        value = as_tensor(value, what="the loss")
        if value.shape != ():
            raise error(ShapeError, "the loss of a training step is a scalar; use reduction='mean' or 'sum'", loss=value)
        if clip_norm is not None:
            grads = clip_by_global_norm(grads, clip_norm)
        current = {path: wrap(p.node) for path, p in trainable.items()}
        opt_state = tree.unflatten(structure, map(wrap, opt_nodes))
        new, new_state = optimizer.update(current, grads, opt_state, wrap(rate))
        new_leaves, new_structure = tree.flatten(new_state)
        if new_structure != structure:
            raise error(TraceError, f"{type(optimizer).__name__}.update returned a state of another form than init")
        changed: dict[str, Value] = {t.name_of(p): new[path] for path, p in trainable.items()}
        changed |= {str(n.attrs["name"]): v for n, v in zip(opt_nodes, new_leaves, strict=True)}
        changed |= {n: wrap(v) for n, v in t.updates.items()}
        if t.drew_random:
            changed["rng"] = wrap(t.key) + np.uint64(1)
            initial["rng"] = key
        results = {"loss": value, **{n: as_tensor(fn(prediction, target)) for n, fn in measured}}
        outputs, prediction_structure, names = collect_outputs(prediction, "prediction")
        if not predictions:
            outputs, names = [], ()
        graph = _assemble(t, changed, results, outputs, names, batch)
    for n, p in t.parameters.items():
        initial.setdefault(n, p.data)
    order = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] == "state"]
    return TracedStep(
        graph,
        {n: np.array(initial[n]) for n in order},
        len(changed),
        batch,
        (*results, *names),
        dict(t.parameters),
        prediction_structure,
    )


def first_key(seed: int) -> Array:
    """The key of the first step. Keys count up from step to step, so seeds are spread out first: 3 and 4 share no draws."""
    return np.asarray(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def _state(t: Trace, name: str, value: Any) -> Node:
    array = np.asarray(value)
    return t.input(name, TensorType(as_dtype(array.dtype), array.shape), "state")


def _batch(t: Trace, module: Module, specs: Sequence[Any]) -> tuple[list[Any], Any, tuple[str, ...]]:
    known = set(t.inputs)
    arguments, _ = make_inputs(t, module, specs[:-1])
    target = make_inputs(t, _named_target, specs[-1:])[0][0]
    return arguments, target, tuple(n for n in t.inputs if n not in known)


def _named_target(target: Any) -> None:
    """Only its signature is used: the target's inputs are called 'target'."""


def _assemble(
    t: Trace,
    changed: Mapping[str, Value],
    results: Mapping[str, Value],
    predictions: Sequence[Node],
    names: Sequence[str],
    batch: Sequence[str],
) -> Graph:
    """The graph with its inputs and outputs in the order that TracedStep promises."""
    for n, v in changed.items():
        want = t.inputs[n].type
        if v.type != want:
            raise error(ShapeError, f"the new value of state {n!r} is {v.type}, the old one {want}", new=v)
    if not t.drew_random:
        del t.inputs["rng"]
    unchanged = [n for n in t.inputs if n not in changed and n not in batch and n != "learning_rate"]
    order = [*changed, *unchanged, "learning_rate", *batch]
    t.inputs = {n: t.inputs[n] for n in order}
    outputs = [*(v.node for v in changed.values()), *(v.node for v in results.values()), *predictions]
    aliases = tuple((i, i) for i in range(len(changed)))
    return finish(t, outputs, (*changed, *results, *names), aliases)


def evaluation_step(
    module: Module, loss: Loss, *specs: Any, metrics: Sequence[str | Metric] = (), name: str | None = None
) -> Traced:
    """A graph in inference mode with outputs 'loss' and each metric; its inputs are the batch, then the parameters."""
    measured = [metric(m) for m in metrics]
    with Trace(name or f"{type(module).__name__}_evaluation_step") as t:
        declare_parameters(t, module)
        arguments, target, batch = _batch(t, module, specs)
        prediction = module(*arguments)
        results = {"loss": loss(prediction, target), **{n: fn(prediction, target) for n, fn in measured}}
        outputs, structure, names = collect_outputs(results)
        order_parameters(t, batch)
        graph = finish(t, outputs, names)
        argument_structure = tensor_structure((*arguments, target))
    return Traced(graph, batch, dict(t.parameters), argument_structure, structure)
