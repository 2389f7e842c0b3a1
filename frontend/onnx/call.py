"""What the function of an op gets: one node with its inputs resolved, its attributes, and ways to ask for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import numpy as np

from ...ir.dims import Dim, DimExpr, symbol, symbols
from ...ir.dtypes import DType
from ...ir.errors import OnnxError
from ..core import as_tensor
from .description import Array, GraphDef, NodeDef, Stored
from .types import dtype_of
from .values import Value

if TYPE_CHECKING:
    from ..tensor import Tensor
    from .importer import Importer

T = TypeVar("T", int, float, str)
SIZE: Final = "size "  # before the name of a symbolic size, in the key of what must be known


class Pending(Exception):  # noqa: N818 (no error: what it lacks is reported where it should have come from)
    """A body reads a value that is not there."""


class Unsupported(OnnxError):  # noqa: N818 (as NeedsValue: the import goes on)
    """This node asks for something that is not supported; the importer goes on and lists all such nodes at once."""


class NeedsValue(Exception):  # noqa: N818 (not an error: the import goes on once the value is there)
    """The node needs the numbers of a value that only a run can give."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        super().__init__(key)
        self.key = key
        self.tensor = tensor


class Call:
    """One node being imported.

    inputs   Values by position; None where an optional input is not given
    opset    version of the node's domain
    outputs  how many outputs the node names; `wants(i)` says whether output i is used
    Every attribute must be read by the op's function: one that is not is reported as unsupported.
    """

    def __init__(self, importer: Importer, node: NodeDef, opset: int, inputs: Sequence[Value | None], scope: str) -> None:
        self.importer = importer
        self.node = node
        self.opset = opset
        self.inputs = tuple(inputs)
        self.outputs = len(node.outputs)
        self.scope = scope
        self.read: set[str] = set()

    # -- inputs --------------------------------------------------------------------------------------------------------
    def has(self, i: int) -> bool:
        """Whether input i is given."""
        return i < len(self.inputs) and self.inputs[i] is not None

    def wants(self, i: int) -> bool:
        """Whether output i is named."""
        return i < self.outputs and bool(self.node.outputs[i])

    def value(self, i: int) -> Value:
        """Input i. Raises OnnxError where it is missing."""
        found = self.inputs[i] if i < len(self.inputs) else None
        if found is None:
            self.fail(f"input {i} is missing")
        return found

    def tensor(self, i: int) -> Tensor:
        """Input i as a Tensor. Raises OnnxError where it is missing."""
        return self.value(i).tensor

    def optional(self, i: int) -> Tensor | None:
        """Input i as a Tensor, None where it is not given."""
        return self.tensor(i) if self.has(i) else None

    def tensors(self) -> list[Tensor]:
        """All inputs as Tensors."""
        return [self.tensor(i) for i in range(len(self.inputs))]

    def array(self, i: int) -> Array:
        """The numbers of input i. Where only a run knows them, the model is compiled in stages (NeedsValue)."""
        v = self.value(i)
        found = self.importer.constant(v)
        if found is not None:
            return found
        return self.importer.need(v.key or f"{self.scope}{self.node.name}/{i}", v.tensor)

    def known(self, i: int) -> Array | None:
        """The numbers of input i where the import knows them, else None."""
        return self.importer.constant(self.value(i)) if self.has(i) else None

    def need(self, tensor: Tensor, tag: str) -> Array:
        """The numbers of a Tensor that the op made, such as how many elements it will give. `tag` tells it from others."""
        found = self.importer.evaluate(tensor)
        return found if found is not None else self.importer.need(f"{self.scope}{self.node.outputs[0]}#{tag}", tensor)

    def dims(self, i: int) -> tuple[Dim, ...]:
        """Input i, a vector, as sizes: ints and dimension expressions."""
        v = self.value(i)
        found = v.known if v.is_sizes else self.array(i)
        assert found is not None
        if found.dtype.kind not in "iuO":
            self.fail(f"input {i} holds sizes and has dtype {found.dtype}")
        return tuple(d if isinstance(d, DimExpr) else int(d) for d in found.ravel())

    def fixed(self, d: Dim) -> int:
        """A size as a number, where an op cannot do with a symbol. The model is then compiled for each such size, in stages."""
        for name in sorted(symbols(d)):
            self.importer.need(SIZE + name, as_tensor(symbol(name)))
        assert isinstance(d, int)  # a size that is known by now is no symbol any more
        return d

    def ints(self, i: int) -> tuple[int, ...]:
        """Input i as ints; symbolic sizes among them become fixed."""
        return tuple(map(self.fixed, self.dims(i)))

    def scalar(self, i: int, default: float | None = None) -> Any:
        """Input i as one Python number; the default where it is not given."""
        if not self.has(i) and default is not None:
            return default
        found = self.array(i)
        if found.size != 1:
            self.fail(f"input {i} is one number, not an array of shape {found.shape}")
        return found.reshape(()).item()

    # -- attributes ----------------------------------------------------------------------------------------------------
    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute as the file has it; the default where it is not given."""
        self.read.add(name)
        return self.node.attributes.get(name, default)

    def _typed(self, name: str, default: T | None, kind: type[T]) -> T:
        found = self.attribute(name)
        if found is None:
            if default is None:
                self.fail(f"the attribute {name!r} is missing")
            return default
        if kind is float and isinstance(found, int):
            found = float(found)
        if not isinstance(found, kind):
            self.fail(f"the attribute {name!r} is {_short(found)}; expected {kind.__name__}")
        return found

    def integer(self, name: str, default: int | None = None) -> int:
        """An int attribute; raises OnnxError where it is missing and has no default."""
        return self._typed(name, default, int)

    def flag(self, name: str, default: bool = False) -> bool:
        """An int attribute that is 0 or 1."""
        return bool(self._typed(name, int(default), int))

    def number(self, name: str, default: float | None = None) -> float:
        """A float attribute."""
        return self._typed(name, default, float)

    def text(self, name: str, default: str | None = None) -> str:
        """A string attribute."""
        return self._typed(name, default, str)

    def choice(self, name: str, default: str, *others: str) -> str:
        """A string attribute that is one of a few. Another one is unsupported."""
        found = self.text(name, default)
        if found not in (default, *others):
            self.unsupported(f"{name}={found!r}; supported are {', '.join(map(repr, (default, *others)))}")
        return found

    def int_list(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of ints; None where it is not given."""
        return self._list(name, int)

    def float_list(self, name: str) -> tuple[float, ...] | None:
        """An attribute that is a list of floats; None where it is not given."""
        return self._list(name, float)

    def string_list(self, name: str) -> tuple[str, ...] | None:
        """An attribute that is a list of strings; None where it is not given."""
        return self._list(name, str)

    def _list(self, name: str, kind: type) -> Any:
        found = self.attribute(name)
        if found is not None and not (isinstance(found, tuple) and all(isinstance(v, kind) for v in found)):
            self.fail(f"the attribute {name!r} is {_short(found)}; expected a list of {kind.__name__}")
        return found

    def dtype(self, name: str, default: DType | None = None) -> DType | None:
        """An attribute that names an element type."""
        found = self._typed(name, 0, int)
        return default if found == 0 else dtype_of(found, f"{self.where}: {name}")

    def stored(self, name: str) -> Array | None:
        """An attribute that is an array."""
        found = self.attribute(name)
        if found is not None and not isinstance(found, Stored):
            self.fail(f"the attribute {name!r} is {_short(found)}; expected an array")
        return None if found is None else found.load()

    def graph(self, name: str) -> GraphDef:
        """An attribute that is a body."""
        found = self.attribute(name)
        if not isinstance(found, GraphDef):
            self.fail(f"the attribute {name!r} is {_short(found)}; expected a graph")
        return found

    def ignore(self, *names: str) -> None:
        """Attributes that change nothing here (say why where you call this)."""
        self.read.update(names)

    # -- bodies and results --------------------------------------------------------------------------------------------
    def run(self, body: GraphDef, inputs: Sequence[Value], tag: str) -> list[Value]:
        """The outputs of a body for these inputs, imported here and now; names around it are visible."""
        return self.importer.run_body(self, body, inputs, tag)

    def as_value(self, result: Any) -> Value:
        """A Tensor, an array or sizes as a Value."""
        return self.importer.as_value(result)

    def bounded(self, value: int, what: str, most: int = 1 << 14) -> int:
        """A number of an attribute that makes as many nodes or numbers. Raises Unsupported for one that no model needs."""
        if value > most:
            self.unsupported(f"{value} {what}; {most} are the most")
        return value

    # -- errors --------------------------------------------------------------------------------------------------------
    @property
    def where(self) -> str:
        """The node for an error message: name, op, opset."""
        domain = self.node.domain or "ai.onnx"
        name = f"{self.scope}{self.node.name}"
        return f"node {name!r} ({self.node.op}, opset {self.opset} of {domain})"

    def fail(self, message: str) -> NoReturn:
        """Raises OnnxError: the model is wrong."""
        raise OnnxError(f"{self.where}: {message}")

    def unsupported(self, message: str) -> NoReturn:
        """Raises Unsupported: the model is right, and we lack something."""
        raise Unsupported(f"{self.where}: {message}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "..."


def array_of(values: Sequence[Dim]) -> Array:
    """Sizes as a vector: int64, or object where one is symbolic."""
    if all(isinstance(v, int) for v in values):
        return np.array(values, np.int64)
    made = np.empty(len(values), object)
    made[:] = list(values)
    return made
