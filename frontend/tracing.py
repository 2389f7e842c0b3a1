"""From Python to a Graph: run a function once on symbolic Tensors and keep what it did."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import AttributeValueError, TraceError
from ..ir.graph import Graph, Node, postorder
from . import tree
from .context import Trace, error
from .core import Value, as_tensor, is_weak, wrap
from .parameter import Owner, Parameter
from .specs import Spec, as_spec, spec

__all__ = ["Spec", "Traced", "spec", "trace", "trace_model"]


@dataclass(frozen=True)
class Traced:
    """A graph with what belongs to it in Python.

    graph       inputs in this order: the arguments' leaves, then the parameters that were read
    arguments   names of the graph's inputs that are the arguments' leaves, in order
    parameters  input name -> the Parameter (or Buffer) whose current array is to be passed
    structure   how the graph's outputs are put together again: `tree.unflatten(structure, outputs)`
    """

    graph: Graph
    arguments: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    argument_structure: tree.Structure
    structure: tree.Structure

    def values(self) -> dict[str, np.ndarray[Any, Any]]:
        """The parameters' arrays by input name, as they are now."""
        return {name: p.data for name, p in self.parameters.items()}


def trace(fn: Callable[..., Any], *specs: Any, name: str | None = None) -> Graph:
    """The Graph of a function of Tensors, or of a Module, for arguments like `specs`.

    A spec is a Spec, an example array (its shape and dtype count), a nested dict, list or tuple of such, or a Python
    number, string or None, which is passed to the function as it is. Arrays that the function holds become constants;
    parameters of Modules become inputs of role 'parameter', named by their path. Results may be nested too.

    Raises TraceError when the function does what cannot be recorded, ShapeError and DTypeError for operands that do not
    fit; each names the line.
    """
    return trace_model(fn, *specs, name=name).graph


def trace_model(fn: Callable[..., Any], *specs: Any, name: str | None = None, training: bool = False) -> Traced:
    """Like `trace`, and says which inputs are arguments and which are parameters. Modules are in inference mode.

    With `training`, modules are in training mode; a state change (running statistics, random draws without a key) is
    still an error, because nothing would carry it: `training.training_step` does.
    """
    if not callable(fn):
        raise error(TraceError, f"trace takes a function or a Module, not {type(fn).__name__}")
    if isinstance(fn, type) and issubclass(fn, Owner):
        raise error(TraceError, f"trace takes a Module, and {fn.__name__} is its class; make one first: {fn.__name__}(...)")
    with Trace(name or function_name(fn), training=training) as recording:
        declare_parameters(recording, fn)
        arguments, argument_structure = make_inputs(recording, fn, specs)
        names = tuple(recording.inputs)
        result = fn(*arguments)
        outputs, structure, output_names = collect_outputs(result)
        order_parameters(recording, names)
        graph = finish(recording, outputs, output_names)
    return Traced(graph, names, dict(recording.parameters), argument_structure, structure)


def order_parameters(recording: Trace, arguments: Sequence[str]) -> None:
    """Puts the inputs in order: the arguments, then the parameters as the Modules declare them, not as they were read."""
    order = {name: i for i, name in enumerate(recording.declared())}
    read = sorted((n for n in recording.inputs if n not in arguments), key=lambda n: order.get(n, len(order)))
    recording.inputs = {n: recording.inputs[n] for n in (*arguments, *read)}
    recording.parameters = {n: recording.parameters[n] for n in read if n in recording.parameters}


def function_name(fn: object) -> str:
    """A name for the graph: the function's or class's, reduced to an identifier; 'main' for a lambda."""
    text = getattr(fn, "__name__", type(fn).__name__)
    return text if text.isidentifier() else "main"


def modules_of(fn: object) -> Iterator[tuple[str, Owner]]:
    """The Modules that a callable reaches directly: itself, what it is a method of, its closure, globals it names."""
    if isinstance(fn, Owner):
        yield "", fn
        return
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, Owner):
        yield "", owner
    inner = inspect.unwrap(fn) if callable(fn) else fn
    inner = getattr(inner, "__func__", inner)
    if isinstance(fn, functools.partial):
        yield from modules_of(fn.func)
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    cells = getattr(inner, "__closure__", None) or ()
    held: dict[str, object] = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    scope = getattr(inner, "__globals__", {})
    held |= {n: scope[n] for n in code.co_names if n in scope}
    for name, value in held.items():
        if isinstance(value, Owner):
            yield name, value


def declare_parameters(recording: Trace, fn: object) -> None:
    """Names every parameter that the callable's Modules hold: by path in a Module, with the variable in front otherwise."""
    for prefix, module in modules_of(fn):
        recording.declare_module(prefix, module)


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Names for positional arguments, from the signature."""
    target = fn.written_call() if isinstance(fn, Owner) else fn
    try:
        given = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        given = []
    names: list[str] = []
    for p in given:
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
        elif p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}{i}" for i in range(count - len(names))]
    return names + [f"x{i}" for i in range(len(names), count)]


def make_inputs(recording: Trace, fn: Callable[..., Any], specs: Sequence[Any]) -> tuple[list[Any], tree.Structure]:
    """Inputs of role 'data' for the specs. Returns the arguments to call with, and the structure of the Tensor leaves."""
    made: list[Any] = []
    for name, given in zip(argument_names(fn, len(specs)), specs, strict=False):
        made.append(_argument(recording, name, given))
    shape = next((s for s in specs if isinstance(s, (tuple, list)) and s and all(isinstance(d, int) for d in s)), None)
    if shape is not None and not any(isinstance(v, Value) for a in made for v in tree.flatten(a)[0]):
        raise error(
            TraceError, f"no argument is a Tensor: {shape!r} is passed to the function as it is; tw.spec{tuple(shape)} is a spec"
        )
    return made, tensor_structure(made)


def tensor_structure(arguments: Sequence[Any]) -> tree.Structure:
    """How arguments are nested, counting Tensors as leaves and everything else as None."""
    return tree.flatten(tuple(tree.map_leaves(lambda v: v if isinstance(v, Value) else None, a) for a in arguments))[1]


def _argument(recording: Trace, name: str, given: Any) -> Any:
    leaves, structure = tree.flatten(given)
    made: list[Any] = []
    for path, leaf in zip(tree.paths(structure, name), leaves, strict=True):
        s = as_spec(leaf)
        if s is not None:
            made.append(wrap(recording.input(s.name or path, s.type, "data")))
        elif is_weak(leaf) or isinstance(leaf, (str, Owner)):
            made.append(leaf)
            if isinstance(leaf, Owner):
                recording.declare_module(path, leaf)
        else:
            message = f"argument {path!r} is a {type(leaf).__name__}; expected tw.spec(...), an example array, or a number"
            raise error(TraceError, message)
    return tree.unflatten(structure, made)


def collect_outputs(result: Any, prefix: str = "y") -> tuple[list[Node], tree.Structure, tuple[str, ...]]:
    """Nodes, structure and names of what a traced function returned. Raises TraceError when there is no Tensor in it."""
    leaves, structure = tree.flatten(result)
    if not leaves:
        raise error(TraceError, "the traced function returned no Tensor; return what is to be computed", returned=result)
    for leaf in leaves:
        if not isinstance(leaf, (Value, np.ndarray, np.generic)) and not is_weak(leaf):
            message = f"the traced function returned a {type(leaf).__name__}; expected Tensors in dicts, lists and tuples"
            raise error(TraceError, message)
    nodes = [as_tensor(leaf, what="a result").node for leaf in leaves]
    if structure.kind == "leaf":
        return nodes, structure, (prefix,)
    if structure.kind is dict:
        return nodes, structure, tuple(p.removeprefix(".") for p in tree.paths(structure))
    return nodes, structure, tuple(prefix + p.replace(".", "_") for p in tree.paths(structure))


def finish(recording: Trace, outputs: Sequence[Node], names: Sequence[str], aliases: Sequence[tuple[int, int]] = ()) -> Graph:
    """The Graph of a recording. Raises TraceError if an output uses a Tensor of another trace."""
    known = set(recording.inputs.values())
    needed = list(postorder(outputs))
    for node in needed:
        if node.op.name == "input" and node not in known:
            kept_back = f"the result uses {node.attrs['name']!r}, a Tensor of another trace that was kept in a variable"
            raise error(TraceError, f"{kept_back}; pass it as an argument")
    if len(set(names)) != len(names):
        raise error(AttributeValueError, f"two outputs have one name: {list(names)}")
    kept = set(needed) | known
    labels = {n: label for n, label in recording.labels.items() if n in kept}
    return Graph(tuple(recording.inputs.values()), tuple(outputs), tuple(names), recording.name, tuple(aliases), labels)
