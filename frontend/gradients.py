"""grad and value_and_grad: a gradient of a traced function, as a node that the gradient pass expands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..ir.errors import DTypeError, GradientError, ShapeError
from ..ir.graph import Node
from . import tree
from .context import current, error
from .core import Value, apply, apply_tuple, as_tensor, wrap
from .parameter import Owner, Parameter
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


def gradient(y: Value, marks: Sequence[Value]) -> list[Tensor]:
    """The derivatives of a scalar by marked values. Raises ShapeError when y is no scalar, DTypeError when no float."""
    if not y.dtype.is_float:
        raise error(DTypeError, f"only a float can be differentiated, and the function returned {y.dtype}", value=y)
    if y.shape != ():
        raise error(ShapeError, "only a scalar can be differentiated; take .sum() or .mean() of the result", value=y)
    node = apply_tuple("gradient", [y, *marks], {})
    return [apply("get", _Parts(node), index=i) for i in range(len(marks))]


class _Parts(Value):
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
