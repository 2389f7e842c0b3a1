"""grad, value_and_grad, vjp and jvp: derivatives of a traced function, as nodes that the gradient pass expands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..ir.errors import DTypeError, GradientError, ShapeError
from ..ir.graph import Node
from . import tree
from .context import current, error
from .core import Value, apply, apply_tuple, as_tensor, wrap
from .movement import zeros
from .parameter import Owner, Parameter
from .reductions import sum
from .tensor import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def value_and_grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns (fn(...), gradients): the derivative of fn's scalar result by the arguments `argnums`.

    A differentiated argument is a float Tensor, a nested dict, list or tuple of such, or a Module: then the gradients are
    a dict by parameter path. The gradients have the form of the argument; for a tuple `argnums` there is one for each.
    With `has_aux`, fn returns (value, anything else) and the result is ((value, anything else), gradients).

    Works inside a trace, also nested. Raises ShapeError when the value is no scalar, DTypeError for arguments that are not
    floats, GradientError (from the gradient pass) where an op on the way has no gradient.
    """
    several = not isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        recording = current("grad")
        arguments = list(args)
        marks: list[Tensor] = []
        bindings: list[tuple[Parameter, Node]] = []
        structures: list[tree.Structure] = []
        for n in numbers:
            if not -len(args) <= n < len(args):
                raise error(
                    GradientError, f"grad by argument {n}, but the function was called with {len(args)} positional arguments"
                )
            arg = arguments[n]
            if isinstance(arg, Owner):
                leaves: list[Any] = [p for _, p in arg.named_parameters() if p.requires_grad]
                names = [name for name, p in arg.named_parameters() if p.requires_grad]
                structure = tree.flatten(dict.fromkeys(names, 0))[1]
            else:
                leaves, structure = tree.flatten(arg)
            marked = [_mark(recording.fresh_mark(), leaf, n) for leaf in leaves]
            bindings += [(p, m.node) for p, m in zip(leaves, marked, strict=True) if isinstance(p, Parameter)]
            if not isinstance(arg, Owner):
                arguments[n] = tree.unflatten(structure, marked)
            marks += marked
            structures.append(structure)
        if not marks:
            raise error(
                GradientError, "there is nothing to differentiate by: the argument holds no Tensor or trainable parameter"
            )
        with recording.bind(bindings):
            result = fn(*arguments, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise error(GradientError, "with has_aux, the function returns a pair (value, anything else)")
        y = as_tensor(result[0] if has_aux else result, what="the value to differentiate")
        gradients = iter(gradient(y, marks))
        trees = tuple(tree.unflatten(s, [next(gradients) for _ in range(s.leaves)]) for s in structures)
        return (result if has_aux else y), (trees if several else trees[0])

    return wrapper


def grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns the gradients alone, or (gradients, anything else) with `has_aux`. See `value_and_grad`."""
    both = value_and_grad(fn, argnums, has_aux)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return wrapper


def _mark(number: int, leaf: Any, argument: int) -> Tensor:
    t = as_tensor(leaf, what=f"argument {argument} of a differentiated function")
    if not t.dtype.is_float:
        message = (
            f"grad by argument {argument}, which has dtype {t.dtype}; only floats have gradients: choose others with argnums"
        )
        raise error(DTypeError, message, argument=t)
    return apply("mark", t, id=number)


def parameter_gradients(
    fn: Callable[[], tuple[Any, Any]], parameters: Mapping[str, Parameter]
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """(value, aux, gradients by path) of fn() -> (scalar, aux) by these parameters, at their current values.

    Raises DTypeError, with the path, for a parameter that is no float; else as `value_and_grad`.
    """
    recording = current("grad")
    for path, p in parameters.items():
        if not p.dtype.is_float:
            raise error(DTypeError, f"parameter {path!r} is {p.type}; only floats are trained: set requires_grad=False on it")
    marks = [apply("mark", wrap(p.node), id=recording.fresh_mark()) for p in parameters.values()]
    with recording.bind([(p, m.node) for p, m in zip(parameters.values(), marks, strict=True)]):
        result, aux = fn()
    y = as_tensor(result, what="the value to differentiate")
    return y, aux, dict(zip(parameters, gradient(y, marks), strict=True))


def vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """(y, pullback): y = fn(*primals), and pullback(cotangents like y) -> the cotangents of the primals, J^T c.

    Primals and results are Tensors or nested containers of such; all must be floats. Works inside a trace, also nested; a
    pullback may be called several times. Raises DTypeError, ShapeError.
    """
    flat = [tree.flatten(p) for p in primals]
    recording = current("vjp")
    marks = [[_mark(recording.fresh_mark(), leaf, k) for leaf in leaves] for k, (leaves, _) in enumerate(flat)]
    y = fn(*(tree.unflatten(s, m) for m, (_, s) in zip(marks, flat, strict=True)))
    outputs, structure = tree.flatten(y)

    def pullback(cotangents: Any) -> tuple[Any, ...]:
        # A cotangent is a variable of its own: where it was computed from the primals, that is no part of this derivative.
        seeds = [apply("mark", as_tensor(c), id=recording.fresh_mark()) for c in tree.flatten(cotangents)[0]]
        found = iter(gradient(_inner(outputs, seeds, "a cotangent"), [*(m for group in marks for m in group), *seeds]))
        return tuple(tree.unflatten(s, [next(found) for _ in leaves]) for leaves, s in flat)

    return tree.unflatten(structure, outputs), pullback


def jvp(fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """(y, J t): fn(*primals), and its directional derivative along tangents (like primals), of the form of y.

    J t is the derivative of <J^T u, t> by u: linear in u, so that two reverse walks give one forward one, and what only
    J^T needs is dead code. Raises as `vjp`.
    """
    recording = current("jvp")
    y, pullback = vjp(fn, *primals)
    outputs, structure = tree.flatten(y)
    seeds = [apply("mark", zeros(t.shape, t.dtype), id=recording.fresh_mark()) for t in map(as_tensor, outputs)]
    back = tree.flatten(list(pullback(tree.unflatten(structure, seeds))))[0]
    along = _inner(back, tree.flatten(list(tangents))[0], "a tangent")
    return y, tree.unflatten(structure, gradient(along, seeds))


def _inner(values: Sequence[Any], others: Sequence[Any], what: str) -> Tensor:
    """The sum of products of Tensors with constants or Tensors of the same shapes."""
    if len(values) != len(others):
        raise error(ShapeError, f"{what} is needed for each of {len(values)} Tensors, and {len(others)} are given")
    total: Tensor | None = None
    for v, c in zip(map(as_tensor, values), others, strict=True):
        if not v.dtype.is_float:
            raise error(DTypeError, f"only floats have derivatives, and {what} is given for {v.dtype}", value=v)
        t = as_tensor(c, v.dtype, what)
        if t.shape != v.shape:
            raise error(ShapeError, f"{what} has the shape of its value", value=v, given=t)
        part = sum(v * t)
        total = part if total is None else total + part
    if total is None:
        raise error(GradientError, "there is nothing to differentiate: no Tensor is among the arguments or results")
    return total


def gradient(y: Value, marks: Sequence[Value]) -> list[Tensor]:
    """The derivatives of a scalar by marked values. Raises ShapeError when y is no scalar, DTypeError when no float."""
    if not y.dtype.is_float:
        raise error(DTypeError, f"only a float can be differentiated, and the function returned {y.dtype}", value=y)
    if y.shape != ():
        raise error(ShapeError, "only a scalar can be differentiated; take .sum() or .mean() of the result", value=y)
    node = apply_tuple("gradient", [y, *marks], {})
    return [apply("get", Parts(node), index=i) for i in range(len(marks))]


class Parts(Value):
    """The node with several outputs, for `get` to take one."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def node(self) -> Node:
        return self._node


def functional_call(module: Callable[..., Any], parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """module(*args) with Tensors in place of its own parameters and buffers, by path; others stay.

    Raises GradientError for a path that the module does not have, ShapeError for a value that does not fit.
    """
    if not isinstance(module, Owner):
        raise error(GradientError, f"functional_call takes a Module, not {type(module).__name__}")
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    bindings: list[tuple[Parameter, Node]] = []
    for path, value in parameters.items():
        if path not in own:
            raise error(
                GradientError, f"functional_call: {type(module).__name__} has no parameter {path!r}; it has {', '.join(own)}"
            )
        t = as_tensor(value, what=f"parameter {path}")
        if t.type != own[path].type:
            raise error(ShapeError, f"functional_call: parameter {path!r} is {own[path].type}", given=t)
        bindings.append((own[path], wrap(t.node).node))
    with current("functional_call").bind(bindings):
        return module(*args, **kwargs)
