"""The trace that is being recorded: labels, parameters read, state written, fresh numbers; and errors that say where.

A trace is active on one thread, between `with Trace(...)` and its end. Functions of Tensors work only inside one.
"""

from __future__ import annotations

import functools
import linecache
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..ir.dims import Dim
from ..ir.errors import TensorwrightError, TraceError
from ..ir.graph import Label, Location, Node
from ..ir.op import make
from ..ir.types import TensorType

if TYPE_CHECKING:
    from .parameter import Owner, Parameter

_ROOT: Final = __name__.rpartition(".frontend.")[0]
# Parts of the package that hold models written in the DSL: their lines are the user's lines.
_USER: Final = tuple(f"{_ROOT}.{part}" for part in ("benchmarks", "examples", "tests"))
E = TypeVar("E", bound=TensorwrightError)


@functools.cache
def _is_internal(module: str) -> bool:
    return (module == _ROOT or module.startswith(_ROOT + ".")) and not module.startswith(_USER)


def user_location() -> Location | None:
    """The innermost line on the call stack that is not this package's own; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    place = frame.f_code, frame.f_lineno
    known = _local.stack[-1].places if _local.stack else {}
    found = known.get(place)
    if found is None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        found = known[place] = Location(file, line, linecache.getline(file, line, frame.f_globals).strip())
    return found


def error(kind: type[E], message: str, **operands: object) -> E:
    """An exception of `kind` whose message also lists the operands and names the user's line and the module."""
    lines = [message]
    lines += [f"  {name}: {describe(value)}" for name, value in operands.items()]
    here = user_location()
    if here is not None:
        lines.append(f"  at {here}")
    trace = _local.stack[-1] if _local.stack else None
    if trace is not None and trace.scopes:
        lines.append(f"  in module {trace.path or trace.name}")
    return kind("\n".join(lines))


def describe(value: object) -> str:
    """A value for an error message: type and shape of tensors and arrays, the text of everything else."""
    kind = getattr(value, "type", None)
    if isinstance(kind, TensorType):
        return str(kind)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


@contextmanager
def whole_attention(whole: bool = True) -> Iterator[None]:
    """Within the block, traces write attention as one op: for targets that have a kernel for it."""
    before, _local.whole_attention = _local.whole_attention, whole
    try:
        yield
    finally:
        _local.whole_attention = before


class Trace:
    """One recording. `training` is the mode that modules follow unless they were told otherwise."""

    def __init__(self, name: str = "main", *, training: bool = False, stateful: bool = False) -> None:
        self.name = name
        self.training = training
        self.stateful = stateful  # whether the tracer can hand state (running statistics, random key) back
        self.labels: dict[Node, Label] = {}
        self.inputs: dict[str, Node] = {}
        self.parameters: dict[str, Parameter] = {}  # what was read, by input name
        self.roles: dict[str, str] = {}
        self.updates: dict[str, Node] = {}  # new values of parameters (buffers), by input name
        self.scopes: list[tuple[str, object]] = []  # (path, module) of the module calls going on
        self.paths: dict[int, str] = {}  # id(module) -> path from the traced module
        self.observers: list[Any] = []  # called as observer(event, module, path, value) around module calls
        self.key: Node | None = None  # of random draws
        self.no_key = ""  # why there is none at this place
        self.drew_random = False  # whether the key was asked for
        self.class_numbers: dict[Node, tuple[Dim, int | None]] = {}  # see note_class_numbers
        self.places: dict[tuple[CodeType, int], Location] = {}  # lines that nodes were made at
        self.whole_attention = _local.whole_attention
        self._names: dict[int, str] = {}  # id(parameter) -> input name
        self._values: dict[int, Node] = {}  # id(parameter) -> its current value
        self._alive: list[object] = []  # keeps what is known by id from being freed and its id from being reused
        self._marks = 0
        self._streams = 0

    def __enter__(self) -> Trace:
        _local.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _local.stack.pop()

    # -- inputs -------------------------------------------------------------------------------------------------------
    def input(self, name: str, type: TensorType, role: str) -> Node:
        """A new input of the graph; the name gets a number appended if it is taken."""
        chosen, n = name, 1
        while chosen in self.inputs:
            n += 1
            chosen = f"{name}_{n}"
        node = make("input", name=chosen, role=role, dtype=type.dtype, shape=type.shape)
        self.inputs[chosen] = node
        self.roles[chosen] = role
        self.labels.setdefault(node, Label(chosen, None))
        return node

    def declare(self, name: str, parameter: Parameter) -> None:
        """Gives a parameter its input name, to be used if the parameter is read."""
        self._names.setdefault(id(parameter), name)
        self._alive.append(parameter)

    def declare_module(self, prefix: str, module: Owner) -> None:
        """Names the parameters and submodules of a Module by their paths after a prefix."""
        modules, parameters = module.named_parts(prefix)
        for path, part in modules:
            self.module_path(part, path)
        for path, p in sorted(parameters, key=lambda found: found[1].is_buffer):  # buffers come last
            self.declare(path, p)

    def declared(self) -> list[str]:
        """Input names of parameters in the order of declaration."""
        return list(self._names.values())

    def module_path(self, module: object, path: str) -> None:
        self.paths.setdefault(id(module), path)
        self._alive.append(module)

    def read(self, parameter: Parameter) -> Node:
        """The current value of a parameter; its first reading makes it an input of the graph."""
        found = self._values.get(id(parameter))
        if found is not None:
            return found
        return self.add_parameter(parameter, "state" if self.stateful else "parameter")

    def name_of(self, parameter: Parameter) -> str:
        """The input name of a parameter that was declared or read."""
        return self._names[id(parameter)]

    def add_parameter(self, parameter: Parameter, role: str) -> Node:
        """Makes a parameter an input of the graph with the given role."""
        self._alive.append(parameter)
        node = self.input(self._names.get(id(parameter), "parameter"), parameter.type, role)
        name = str(node.attrs["name"])
        self._names[id(parameter)] = name
        self.parameters[name] = parameter
        self._values[id(parameter)] = node
        return node

    def update(self, parameter: Parameter, value: Node) -> None:
        """Records a new value for a buffer. Raises TraceError where the tracer could not hand it back."""
        if not self.stateful:
            raise error(
                TraceError,
                f"{self._names.get(id(parameter), 'a buffer')} would change here, and this trace returns no state; trace in "
                "inference mode (module.eval()), or train with tw.Trainer or frontend.training.training_step",
            )
        self.read(parameter)
        self._values[id(parameter)] = value
        self.updates[self._names[id(parameter)]] = value

    @contextmanager
    def bind(self, values: Sequence[tuple[Parameter, Node]]) -> Iterator[None]:
        """Within the block, reading these parameters gives these values instead."""
        before = {id(p): self._values.get(id(p)) for p, _ in values}
        for p, node in values:
            self._values[id(p)] = node
        try:
            yield
        finally:
            for key, old in before.items():
                if old is None:
                    self._values.pop(key, None)
                else:
                    self._values[key] = old

    def note_class_numbers(self, target: Node, classes: Dim, ignored: int | None = None) -> None:
        """Says that a value holds class numbers in [0, classes), `ignored` aside: who feeds it can check before the step."""
        self.class_numbers[target] = (classes, ignored)

    # -- nodes --------------------------------------------------------------------------------------------------------
    def label(self, node: Node) -> None:
        """Remembers the user's line and the module path for a node made now (the first place that made it wins)."""
        if node not in self.labels:
            self.labels[node] = Label(self.path or None, user_location())

    @property
    def path(self) -> str:
        """The path of the module being called; empty outside modules and in the traced module itself."""
        return self.scopes[-1][0] if self.scopes else ""

    def fresh_mark(self) -> int:
        self._marks += 1
        return self._marks - 1

    def fresh_stream(self) -> int:
        """A number of its own for a random draw, so that two draws from one key differ."""
        self._streams += 1
        return self._streams - 1

    def random_key(self) -> Node:
        """The key of this step's random draws. Raises TraceError where the tracer has none to give."""
        if self.no_key:
            raise error(TraceError, f"a random draw {self.no_key}")
        if self.key is None:
            raise error(
                TraceError,
                "a random draw without a key: this trace carries no random state; pass key= (a u64 scalar Tensor), trace in "
                "inference mode (module.eval()), or train with tw.Trainer or frontend.training.training_step",
            )
        self.drew_random = True
        return self.key


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[Trace] = []
        self.whole_attention = False


_local = _Local()


def active() -> Trace | None:
    """The trace being recorded on this thread, if any."""
    return _local.stack[-1] if _local.stack else None


def current(what: str = "this function") -> Trace:
    """The trace being recorded. Raises TraceError outside one, with what to do instead."""
    if not _local.stack:
        raise error(
            TraceError,
            f"{what} was called outside a trace: it records a graph and computes nothing itself. Compile the function that "
            "calls it with tw.compile(fn, tw.spec(...)) and call the result with arrays, or use numpy here",
        )
    return _local.stack[-1]
