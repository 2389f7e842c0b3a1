"""The vocabulary: types, graphs, op records, the text form, the verifier and the numpy interpreter.

Importing any part of this package registers the ops, and imports nothing but numpy, ml_dtypes and the standard library.
"""

from __future__ import annotations

from . import ops as _ops  # noqa: F401  registers the op records
from .build import constant, full, fused, get, input_node, outputs
from .contraction import Affine, Axis, Contraction, affine
from .cost import Cost, graph_cost, node_cost
from .dims import Dim, DimExpr, Shape, parse_dim, symbol
from .dtypes import DType, as_dtype
from .errors import TensorwrightError
from .graph import Graph, Label, Literal, Location, Node, postorder
from .graphs import bind_sizes, inline, rebuild, specialize
from .interp import evaluate, run
from .op import REGISTRY, REQUIRED, NotDifferentiable, Op, Sample, Trait, lookup, make, register
from .text import parse_graph, print_graph
from .types import TensorType, TupleType, Type, tensor
from .verify import LEVELS, verify
from .view import to_dot, to_networkx, to_svg

__all__ = [
    "LEVELS",
    "REGISTRY",
    "REQUIRED",
    "Affine",
    "Axis",
    "Contraction",
    "Cost",
    "DType",
    "Dim",
    "DimExpr",
    "Graph",
    "Label",
    "Literal",
    "Location",
    "Node",
    "NotDifferentiable",
    "Op",
    "Sample",
    "Shape",
    "TensorType",
    "TensorwrightError",
    "Trait",
    "TupleType",
    "Type",
    "affine",
    "as_dtype",
    "bind_sizes",
    "constant",
    "evaluate",
    "full",
    "fused",
    "get",
    "graph_cost",
    "inline",
    "input_node",
    "lookup",
    "make",
    "node_cost",
    "outputs",
    "parse_dim",
    "parse_graph",
    "postorder",
    "print_graph",
    "rebuild",
    "register",
    "run",
    "specialize",
    "symbol",
    "tensor",
    "to_dot",
    "to_networkx",
    "to_svg",
    "verify",
]
