"""A model of a file: what it takes and gives, and the Graph it becomes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.collector import no_collection
from ...ir.errors import OnnxError
from ...ir.graph import Graph
from .call import SIZE
from .description import Array, ModelDef
from .importer import Imported, Importer
from .reader import read

if TYPE_CHECKING:
    import onnx

Source = "str | os.PathLike[str] | bytes | onnx.ModelProto"


class Model:
    """An ONNX model, read and checked. `tw.compile(Model(path))` compiles any; `graph()` gives the Graph of most.

    A model whose shapes depend on numbers that only a run knows (a Reshape to a shape that is an argument, NonZero) has no one
    Graph: compiled, it runs in stages, the first of which computes those numbers.

    shapes  shapes of inputs by name, in the place of the declared ones: ints, names, or both
    sizes   numbers for named dimensions
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes | onnx.ModelProto,
        *,
        shapes: Mapping[str, Sequence[int | str]] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.description: ModelDef = read(source)
        self.shapes = dict(shapes or {})
        self.sizes = dict(sizes or {})

    @property
    def name(self) -> str:
        """The file's name."""
        return self.description.source

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arguments: inputs without a value in the file."""
        graph = self.description.graph
        return tuple(v.name for v in graph.inputs if v.name not in graph.initializers)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(v.name for v in self.description.graph.outputs)

    def stage(self, known: Mapping[str, Array], shapes: Mapping[str, Sequence[int | str]] | None = None) -> Imported:
        """The graph, or the one that computes what must be known next. `known` holds numbers of earlier stages by key."""
        with no_collection():
            return Importer(self.description, known=known, shapes={**self.shapes, **(shapes or {})}, sizes=self.sizes).run()

    def unshaped(self) -> tuple[str, ...]:
        """The arguments whose number of dimensions the file does not tell."""
        given = self.description.graph
        names = [v.name for v in given.inputs if v.kind == "tensor" and v.shape is None and v.name not in given.initializers]
        return tuple(n for n in names if n not in self.shapes)

    def every_value(self) -> Graph:
        """The Graph with all values that nodes give as outputs, in order: to find where results differ."""
        found = Importer(self.description, shapes=self.shapes, sizes=self.sizes, every=True).run()
        if found.needs:
            raise OnnxError(f"{self.name}: runs in stages; its values cannot all be had in one run")
        return found.graph

    def graph(self, values: Mapping[str, Any] | None = None) -> Graph:
        """The Graph; weights come with it (`Graph.weights`).

        `values` are numbers of inputs that decide shapes, by name. Raises OnnxError for what is not supported (all nodes are
        listed), and where shapes depend on numbers that are not given.
        """
        known = {k: np.asarray(v) for k, v in (values or {}).items()}
        unknown = sorted(known.keys() - set(self.inputs))
        if unknown:
            raise OnnxError(f"{self.name} has no inputs {unknown}; it has {list(self.inputs)}")
        found = self.stage(known)
        if found.needs:
            inputs = [k for k in found.needs if k in self.inputs]
            sizes = [k.removeprefix(SIZE) for k in found.needs if k.startswith(SIZE)]
            others = [k for k in found.needs if k not in self.inputs and not k.startswith(SIZE)]
            said: list[str] = []
            if inputs:
                said.append(f"of the inputs {inputs}: load(..., values={{{inputs[0]!r}: ...}})")
            if sizes:
                said.append(f"of the sizes {sizes}: load(..., sizes={{{sizes[0]!r}: ...}})")
            if others:
                said.append(f"of {others[:5]}, which only a run can give")
            raise OnnxError(
                f"{self.name}: shapes depend on the numbers {' and '.join(said)}. tw.compile(tw.onnx.Model(...)) compiles such a "
                "model in stages" + "".join(f"\n  {r}" for r in found.reasons[:5])
            )
        return found.graph


def load(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    sizes: Mapping[str, int] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Graph:
    """The Graph of an ONNX model: a path, bytes, or a ModelProto. Names of inputs and outputs are kept.

    Weights become inputs of role 'parameter', and their values come with the graph: `tw.compile(graph)` binds them. Named
    dimensions stay symbolic unless `sizes` gives them numbers; `shapes` replaces declared shapes of inputs; `values` are
    numbers of inputs that decide shapes.

    Raises OnnxError for a damaged model, and for one with nodes that are not supported, all of them listed.
    """
    return Model(source, shapes=shapes, sizes=sizes).graph(values)
