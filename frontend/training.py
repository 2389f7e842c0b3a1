"""One training step as one graph: forward, backward, clipping, optimiser, state in and state out.

    step = training_step(net, losses.cross_entropy, optim.Adam(1e-3), spec(64, 1, 28, 28), spec(64, dtype="i64"))

    inputs of step.graph    state (role 'state')                          learning_rate   batch: x..., target, sample_weight
    outputs                 new state (as many, same names, same order)   loss            metrics... penalty finite predictions...

Each new-state output is an alias of the input in the same place: the caller donates the buffer. What the caller does,
once per batch:  state[:], loss = program(*state, learning_rate, x, target).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ..ir.dtypes import as_dtype, f32
from ..ir.errors import AttributeValueError, ShapeError, TraceError
from ..ir.graph import Graph, Node
from ..ir.types import TensorType
from . import tree
from .accumulation import MicroBatches
from .context import Trace, error
from .core import Value, as_tensor, cast, wrap
from .elementwise import isfinite, logical_and, where
from .gradients import parameter_gradients
from .metrics import Metric, metric
from .module import Module
from .optim.average import EMA, as_ema
from .optim.base import Optimizer
from .optim.clipping import clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from .optim.groups import frozen_paths
from .parameter import Parameter
from .reductions import mean, sum
from .regularizers import Regularizers, choose, penalty
from .tensor import Tensor
from .tracing import Traced, collect_outputs, declare_parameters, finish, make_inputs, order_parameters, tensor_structure

Array = np.ndarray[Any, Any]
Loss = Callable[..., Value]
PRECISIONS: Final = ("f32", "bf16", "tf32")


@dataclass(frozen=True)
class TracedStep:
    """The graph of a training step, and what belongs to it.

    graph       inputs: `state`, then `learning_rate` (f32 scalar), then `batch`; outputs: the first `updated` states, `results`
    state       initial arrays by input name, in input order: trainable parameters (by path), optimiser state
                ('optimizer.m.fc.weight'), averaged weights ('ema.weights.fc.weight'), running statistics, 'rng' (u64) if
                random numbers are drawn, and last what is only read (frozen parameters, masks: 'mask.fc.weight')
    updated     how many of the states have a new value among the outputs; output i is an alias of input i
    batch       names of the batch inputs: the model's arguments, the target's leaves, 'sample_weight' if asked for
    results     names of the outputs after the states: 'loss', each metric's name, 'penalty' with regularizers, 'finite'
                (bool) with guard, 'prediction...' if asked for
    parameters  state name -> the model's Parameter or Buffer
    structure   how the predictions are put together again
    averages    parameter's path -> name of the state that holds its moving average; empty without ema
    precision   'f32', 'bf16' or 'tf32': what the passes may compute in; states are f32 either way
    """

    graph: Graph
    state: Mapping[str, Array]
    updated: int
    batch: tuple[str, ...]
    results: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    structure: tree.Structure
    averages: Mapping[str, str] = field(default_factory=dict)
    precision: str = "f32"

    def initial_state(self) -> dict[str, Array]:
        """Fresh copies of the state arrays, which a caller may donate."""
        return {name: array.copy() for name, array in self.state.items()}

    def store(self, state: Mapping[str, Array], average: bool = False) -> None:
        """Copies trained parameters and buffers back into the model; with `average`, the moving averages of parameters."""
        for name, p in self.parameters.items():
            chosen = self.averages.get(name, name) if average else name
            if chosen in state:
                p.data = state[chosen]


def training_step(
    module: Module,
    loss: Loss,
    optimizer: Optimizer,
    *specs: Any,
    metrics: Sequence[str | Metric] = (),
    regularizers: Regularizers | None = None,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    clip_global_norm: float | None = None,
    ema: float | EMA | None = None,
    sample_weight: bool = False,
    guard: bool = False,
    accumulate: int = 1,
    precision: str = "f32",
    seed: int = 0,
    predictions: bool = False,
    name: str | None = None,
) -> TracedStep:
    """Traces one step. `specs` are the model's arguments and, last, the target: `loss(prediction, target)` is a scalar.

    metrics           names or functions (prediction, target) -> scalar; computed before the update
    regularizers      a function parameter -> scalar, or such functions by pattern of parameter paths; what is minimised is
                      the loss plus their sum, and the results 'loss' and 'penalty' are the two terms
    clip_value        gradients are cut to [-clip_value, clip_value], then
    clip_norm         each parameter's gradient is scaled down to at most this norm, then
    clip_global_norm  all together are
    ema               keeps a moving average of the weights: a decay, or an `optim.EMA`
    sample_weight     one more batch input, a weight per example (f32): the loss is called with reduction='none', averaged
                      within each example, and then as sum(weight * loss) / sum(weight), 0 if all weights are 0
    guard             where loss, penalty or the global norm (if it is clipped) is not finite, no state changes, and the
                      result 'finite' is false
    accumulate        cuts the batch into this many equal parts, one after another in a loop inside the step: gradients,
                      losses and metrics are averaged over them, running statistics and random draws go from part to part,
                      and only one part's activations are in memory
    precision         'bf16' or 'tf32' lets the passes compute in these where that is safe; parameters and states stay f32
    seed              where the random draws (dropout) start
    predictions       whether the model's results are outputs too

    Raises TraceError, ShapeError, DTypeError as `trace`; TraceError for a model without trainable parameters, or a loss
    without `reduction` where weights need one; AttributeValueError for options outside their domain and for patterns that
    fit no parameter.
    """
    if len(specs) < 2:
        raise error(TraceError, "a training step needs specs for the model's arguments and, last, for the target")
    if precision not in PRECISIONS:
        raise AttributeValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    known = {path: p for path, p in module.named_parameters() if p.requires_grad}
    frozen = frozen_paths(optimizer, known)
    trainable = {path: p for path, p in known.items() if path not in frozen}
    if not trainable:
        why = "they are all frozen by the optimiser's patterns" if known else "a step would change nothing"
        raise error(TraceError, f"{type(module).__name__} has no trainable parameter: {why}")
    measured = [metric(m) for m in metrics]
    average = as_ema(ema)
    chosen = choose(regularizers, list(trainable)) if regularizers is not None else {}
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise AttributeValueError(f"accumulate is a number of parts, at least 1, not {accumulate!r}")
    if sample_weight:
        _check_reduction(loss)
    with Trace(name or f"{type(module).__name__}_training_step", training=True, stateful=True) as t:
        declare_parameters(t, module)
        initial: dict[str, Array] = {}
        for p in trainable.values():
            node = t.add_parameter(p, "state")
            initial[str(node.attrs["name"])] = p.data
        arrays = {path: p.data for path, p in trainable.items()}
        rule = _States(t, initial, "optimizer", optimizer.init(arrays))
        averaged = _States(t, initial, "ema", average.init(arrays)) if average is not None else None
        key = first_key(seed)
        t.key = _state(t, "rng", key)
        rate = t.input("learning_rate", TensorType(f32, ()), "data")
        arguments, target, batch = _batch(t, module, specs)
        weight: Tensor | None = None
        if sample_weight:
            weight = _weights(t, batch)
            batch = (*batch, str(weight.node.attrs["name"]))

        part = _Part(module, loss, measured, arguments, target, weight)
        if accumulate == 1:
            value, found, grads = parameter_gradients(part, trainable)
            scores, prediction = found
            next_key = (wrap(t.key) + np.uint64(1)).node if t.drew_random else None
        else:
            value, scores, prediction, grads, next_key = _accumulated(t, accumulate, part, trainable, predictions)
        finite = isfinite(value)
        extra: Tensor | None = None
        if chosen:
            extra, _, more = parameter_gradients(lambda: (penalty(chosen, trainable), None), {p: trainable[p] for p in chosen})
            grads = {path: g + more[path] if path in more else g for path, g in grads.items()}
            finite = isfinite(value + extra)
        if clip_value is not None:
            grads = clip_by_value(grads, clip_value)
        if clip_norm is not None:
            grads = clip_by_norm(grads, clip_norm)
        if clip_global_norm is not None:
            length = global_norm(grads)
            finite = logical_and(finite, isfinite(length))
            grads = clip_by_global_norm(grads, clip_global_norm, length)
        current = {path: wrap(p.node) for path, p in trainable.items()}
        new, new_state = optimizer.update(current, grads, rule.values(), wrap(rate))
        masks = _masks(t, initial, trainable)
        new = {**new, **_masked(new, masks)}
        changed: dict[str, Value] = {t.name_of(p): new[path] for path, p in trainable.items()}
        changed |= rule.changed(new_state, f"{type(optimizer).__name__}.update")
        if average is not None and averaged is not None:
            moved = average.update(new, averaged.values())
            moved["weights"] = {**moved["weights"], **_masked(moved["weights"], masks)}
            changed |= averaged.changed(moved, "EMA.update")
        changed |= {n: wrap(t.updates[n]) for n in _in_order(t, t.updates)}
        random_name = str(t.key.attrs["name"])
        if next_key is not None:
            changed[random_name] = wrap(next_key)
            initial[random_name] = key
        else:
            del t.inputs[random_name]
        if guard:
            changed = {n: where(finite, v, wrap(t.inputs[n])) for n, v in changed.items()}
        results: dict[str, Value] = {"loss": value, **dict(zip((n for n, _ in measured), scores, strict=True))}
        if extra is not None:
            results["penalty"] = extra
        if guard:
            results["finite"] = finite
        outputs: list[Node] = []
        names: tuple[str, ...] = ()
        form = tree.flatten(prediction)[1]
        if predictions:
            outputs, form, names = collect_outputs(prediction, "prediction")
        graph = _assemble(t, changed, results, outputs, names, str(rate.attrs["name"]), batch)
    for n, p in t.parameters.items():
        initial.setdefault(n, p.data)
    order = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] == "state"]
    weights = averaged.names("weights") if averaged is not None else {}
    return TracedStep(
        graph,
        {n: np.array(initial[n]) for n in order},
        len(changed),
        batch,
        (*results, *names),
        dict(t.parameters),
        form,
        {t.name_of(p): weights[path] for path, p in trainable.items()} if weights else {},
        precision,
    )


class _States:
    """A tree of state arrays as inputs of the graph, under one prefix."""

    def __init__(self, t: Trace, initial: dict[str, Array], prefix: str, state: Any) -> None:
        self.state = state
        leaves, self.structure = tree.flatten(state)
        self.nodes = [_state(t, path, leaf) for path, leaf in zip(tree.paths(self.structure, prefix), leaves, strict=True)]
        initial |= {str(n.attrs["name"]): np.asarray(leaf) for n, leaf in zip(self.nodes, leaves, strict=True)}

    def values(self) -> Any:
        """The tree, of Tensors."""
        return tree.unflatten(self.structure, map(wrap, self.nodes))

    def changed(self, new: Any, what: str) -> dict[str, Value]:
        """New values by input name. Raises TraceError for a tree of another form."""
        leaves, structure = tree.flatten(new)
        if structure != self.structure:
            raise error(TraceError, f"{what} returned a state of another form than init")
        return {str(n.attrs["name"]): as_tensor(v) for n, v in zip(self.nodes, leaves, strict=True)}

    def names(self, part: str) -> dict[str, str]:
        """Input names by the keys of one part of the state, a dict."""
        named = tree.unflatten(self.structure, [str(n.attrs["name"]) for n in self.nodes])
        return dict(named[part])


def _masks(t: Trace, initial: dict[str, Array], trainable: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """The masks of parameters that have one, by path: states that a step reads, and a caller may change between steps."""
    found: dict[str, Tensor] = {}
    for path, p in trainable.items():
        if p.mask is not None:
            node = _state(t, f"mask.{path}", p.mask)
            initial[str(node.attrs["name"])] = p.mask
            found[path] = wrap(node)
    return found


def _masked(values: Mapping[str, Value], masks: Mapping[str, Tensor]) -> dict[str, Value]:
    """The values that have a mask, zero where it says so."""
    return {path: where(mask, values[path], 0.0) for path, mask in masks.items()}


def _scalar(value: Any, what: str = "the loss") -> Tensor:
    found = as_tensor(value, what=what)
    if found.shape != ():
        raise error(ShapeError, f"{what} of a training step is a scalar; use reduction='mean' or 'sum'", value=found)
    return found


def _check_reduction(loss: Loss) -> None:
    """Raises TraceError for a loss that cannot be asked for a value per example."""
    try:
        given = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return  # no signature to be had: the call will tell
    if not any(p.name == "reduction" or p.kind is p.VAR_KEYWORD for p in given):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise error(
            TraceError,
            f"sample weights need a value per example, and the loss {name} takes no reduction='none'; add that keyword",
        )


@dataclass(frozen=True)
class _Part:
    """What is computed for a batch, or for one of `parts` equal parts of it: (loss, (metrics, prediction)).

    The loss is a part's share, so that the sum over all parts is that of the whole batch.
    """

    module: Module
    loss: Loss
    metrics: Sequence[tuple[str, Metric]]
    arguments: Sequence[Any]
    target: Any
    weight: Tensor | None  # of each example
    total: Tensor | None = None  # of all weights, where a part does not see them all
    parts: int = 1

    def __call__(self) -> tuple[Tensor, tuple[list[Tensor], Any]]:
        prediction = self.module(*self.arguments)
        if self.weight is None:
            value = _scalar(self.loss(prediction, self.target))
            value = value / self.parts if self.parts > 1 else value
        else:
            total = total_weight(self.weight) if self.total is None else self.total
            value = weighted_sum(self.loss, prediction, self.target, self.weight)
            value = value / cast(total, value.dtype)
        scores = [_scalar(fn(prediction, self.target), f"the metric {name}") for name, fn in self.metrics]
        return value, ([s / self.parts for s in scores] if self.parts > 1 else scores, prediction)


def _accumulated(
    t: Trace, parts: int, whole: _Part, trainable: Mapping[str, Parameter], predictions: bool
) -> tuple[Tensor, list[Tensor], Any, dict[str, Tensor], Node | None]:
    """(loss, metrics, prediction, gradients, next random key) of a batch that is taken in parts."""
    loop = MicroBatches(t, parts, dict(whole.module.named_buffers()))
    weight = None if whole.weight is None else loop.split(whole.weight)
    total = None if whole.weight is None else loop.fixed(total_weight(whole.weight))
    arguments, target = [loop.split(a) for a in whole.arguments], loop.split(whole.target)
    part = replace(whole, arguments=arguments, target=target, weight=weight, total=total, parts=parts)
    form: list[Any] = []

    def body() -> tuple[list[Tensor], list[Tensor]]:
        value, (scores, prediction), grads = parameter_gradients(part, trainable)
        leaves, structure = tree.flatten(prediction)
        form.append(structure)
        return [value, *scores, *grads.values()], [as_tensor(v) for v in leaves] if predictions else []

    (value, *sums), stacks, key = loop.run(body)
    scores, grads = sums[: len(whole.metrics)], dict(zip(trainable, sums[len(whole.metrics) :], strict=True))
    prediction = tree.unflatten(form[0], stacks if predictions else range(form[0].leaves))
    return value, scores, prediction, grads, key


def weighted(loss: Loss, prediction: Any, target: Any, weight: Tensor) -> Tensor:
    """sum(weight * l) / sum(weight), as `weighted_sum`; 0 if all weights are 0."""
    value = weighted_sum(loss, prediction, target, weight)
    return value / cast(total_weight(weight), value.dtype)


def weighted_sum(loss: Loss, prediction: Any, target: Any, weight: Tensor) -> Tensor:
    """sum(weight * l), l being the mean of the loss over what belongs to an example.

    Raises ShapeError for a loss that, with reduction='none', has no axis of examples.
    """
    values = as_tensor(loss(prediction, target, reduction="none"), what="the loss")
    if values.shape[:1] != weight.shape:
        message = "with sample weights the loss, called with reduction='none', gives a value per example"
        raise error(ShapeError, message, loss=values, weight=weight)
    each = mean(values, tuple(range(1, values.ndim))) if values.ndim > 1 else values
    return sum(each * cast(weight, each.dtype))


def total_weight(weight: Tensor) -> Tensor:
    """sum(weight), or 1 where that is 0, to divide by."""
    total = sum(weight)
    return where(total == 0, 1.0, total)


def _weights(t: Trace, batch: Sequence[str]) -> Tensor:
    first = t.inputs[batch[0]].tensor
    if not first.shape:
        raise error(ShapeError, "sample weights need a batch whose first axis counts examples", batch=wrap(t.inputs[batch[0]]))
    return wrap(t.input("sample_weight", TensorType(f32, first.shape[:1]), "data"))


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


def _in_order(t: Trace, names: Iterable[str]) -> list[str]:
    """Names of parameters and buffers in the order in which the modules declare them, however they were read."""
    order = {name: k for k, name in enumerate(t.declared())}
    return sorted(names, key=lambda n: order.get(n, len(order)))


def _assemble(
    t: Trace,
    changed: Mapping[str, Value],
    results: Mapping[str, Value],
    predictions: Sequence[Node],
    names: Sequence[str],
    rate: str,
    batch: Sequence[str],
) -> Graph:
    """The graph with its inputs and outputs in the order that TracedStep promises."""
    for n, v in changed.items():
        want = t.inputs[n].type
        if v.type != want:
            raise error(ShapeError, f"the new value of state {n!r} is {v.type}, the old one {want}", new=v)
    unchanged = _in_order(t, [n for n in t.inputs if n not in changed and n not in batch and n != rate])
    order = [*changed, *unchanged, rate, *batch]
    t.inputs = {n: t.inputs[n] for n in order}
    outputs = [*(v.node for v in changed.values()), *(v.node for v in results.values()), *predictions]
    aliases = tuple((i, i) for i in range(len(changed)))
    return finish(t, outputs, (*changed, *results, *names), aliases)


def evaluation_step(
    module: Module,
    loss: Loss,
    *specs: Any,
    metrics: Sequence[str | Metric] = (),
    sample_weight: bool = False,
    predictions: bool = False,
    name: str | None = None,
) -> Traced:
    """A graph in inference mode with outputs 'loss' and each metric; its inputs are the batch, then the parameters.

    `sample_weight` is as for `training_step`. With `predictions` the model's results are outputs too; the outputs are then the
    pair (those by name, the model's results).
    """
    measured = [metric(m) for m in metrics]
    if sample_weight:
        _check_reduction(loss)
    with Trace(name or f"{type(module).__name__}_evaluation_step") as t:
        declare_parameters(t, module)
        arguments, target, batch = _batch(t, module, specs)
        weight: Tensor | None = None
        if sample_weight:
            weight = _weights(t, batch)
            batch = (*batch, str(weight.node.attrs["name"]))
        prediction = module(*arguments)
        value = loss(prediction, target) if weight is None else weighted(loss, prediction, target, weight)
        results = {"loss": value, **{n: fn(prediction, target) for n, fn in measured}}
        outputs, structure, names = collect_outputs((results, prediction) if predictions else results)
        order_parameters(t, batch)
        graph = finish(t, outputs, names)
        argument_structure = tensor_structure((*arguments, target))
    return Traced(graph, batch, dict(t.parameters), argument_structure, structure)
