"""The command line's part for ONNX files: compile one, say what is in it, compare it with ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..driver import compile as compile_model
from ..frontend.onnx.model import Model
from ..frontend.onnx.reader import require_onnx
from ..ir.cost import graph_cost
from ..ir.errors import InputError, OnnxError, RuntimeUnavailableError
from ..ir.graph import Graph
from ..ir.graphs import graph_symbols, specialize
from ..runtime.buffers import Array
from ..runtime.executable import Executable

_DIFFERS: Final = 1e-3  # relative difference from which --layers calls a node different


def compiled_model(path: str, weights: Mapping[str, Array] | None, options: Mapping[str, Any]) -> Executable:
    """The Executable of an ONNX file, with other weights where some are given."""
    graph = Model(path).graph()
    return compile_model(graph, parameters={**graph.weights, **(weights or {})}, **options)


def summary(path: str, sizes: Mapping[str, int]) -> None:
    """Prints what a model takes, gives and holds, what it costs, what fuses, and what is not supported."""
    model = Model(path)
    d = model.description
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(d.opsets.items()))
    print(f"{model.name}: IR {d.ir_version}, {opsets}" + (f", made by {d.producer}" if d.producer else ""))
    counts = Counter(n.qualified for n in d.graph.nodes)
    print(f"{len(d.graph.nodes)} nodes: {', '.join(f'{n} {count}' for n, count in counts.most_common())}")
    if d.functions:
        print(f"{len(d.functions)} functions: {', '.join(f.name for f in d.functions.values())}")
    stored = d.graph.initializers.values()
    nbytes = sum(s.size * s.dtype.itemsize for s in stored)
    print(f"{len(stored)} arrays: {sum(s.size for s in stored):,} numbers, {nbytes:,} bytes")
    try:
        graph = model.graph()
    except OnnxError as error:
        print(f"not compiled: {error}")
        return
    for n in graph.inputs:
        if n.attrs["role"] == "data":
            print(f"takes {n.attrs['name']}: {n.type}")
    for name, node in zip(graph.output_names, graph.outputs, strict=True):
        print(f"gives {name}: {node.type}")
    missing = sorted(graph_symbols(graph) - sizes.keys())
    if missing:
        flags = " ".join(f"--size {m}=1" for m in missing)
        print(f"symbolic sizes: {', '.join(missing)}; for cost and kernels give them: {flags}")
        return
    _costs(specialize(graph, sizes))


def _costs(graph: Graph) -> None:
    from .model import show

    cost = graph_cost(graph)
    print(f"{cost.flops / 1e6:,.3f} MFLOP; {cost.bytes / 1e6:,.3f} MB moved if nothing were fused")
    exe = compile_model(graph)
    kernels = exe.compiled.run.kernels
    print(f"compiled: {len(kernels)} kernels, {sum(k.bytes for k in kernels) / 1e6:,.3f} MB moved")
    show(exe, exe.compiled)


def compare(path: str, exe: Executable, inputs: Sequence[Array], outputs: Sequence[Array], layers: bool) -> dict[str, Any]:
    """Prints how far each output is from ONNX Runtime's; with `layers`, the first node whose result differs.

    Raises InputError for what is no ONNX file, RuntimeUnavailableError where onnxruntime is not installed.
    """
    if not path.endswith(".onnx"):
        raise InputError("--compare onnxruntime belongs to an ONNX file")
    given = dict(zip((n for n, _ in exe.arguments), inputs, strict=True))
    theirs = _peer(path, given, exe.output_names)
    figures: dict[str, Any] = {}
    print("against ONNX Runtime:")
    for name, ours in zip(exe.output_names, outputs, strict=True):
        figures[name] = difference(ours, theirs[name])
        print(f"  {name}: {figures[name]:.2e} of the largest")
    if layers:
        figures["first_different"] = _first_different(path, given)
    return figures


def _peer(path: str, given: Mapping[str, Array], wanted: Sequence[str], every: bool = False) -> dict[str, Array]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeUnavailableError("--compare onnxruntime: onnxruntime is not installed; pip install onnxruntime") from error
    onnx = require_onnx()
    source: Any = path
    if every:
        proto = onnx.load(path)
        known = {o.name for o in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in known)
        source = proto.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if every:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return dict(zip(wanted, session.run(list(wanted), {n: given[n] for n in names if n in given}), strict=True))


def difference(ours: Any, theirs: Any) -> float:
    """max|ours - theirs| / max|theirs|; infinite where shapes or the places of NaN differ."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or np.any(np.isnan(a) != np.isnan(b)):
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if np.any(a[~finite & ~np.isnan(a)] != b[~finite & ~np.isnan(b)]):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.max(np.abs(a[finite] - b[finite])) / (np.max(np.abs(b[finite])) or 1.0))


def _first_different(path: str, given: Mapping[str, Array]) -> str:
    """The first node, in the file's order, whose result is not ONNX Runtime's; every value is an output of both."""
    model = Model(path)
    graph = model.every_value()
    ours = dict(zip(graph.output_names, _all_outputs(graph, given), strict=True))
    theirs = _peer(path, given, graph.output_names, every=True)
    for node in model.description.graph.nodes:
        for name in node.outputs:
            if name in ours and (far := difference(ours[name], theirs[name])) > _DIFFERS:
                print(f"  the first node that differs: {node.name} ({node.qualified}), output {name}: {far:.2e} of the largest")
                return node.name
    print(f"  no node differs by more than {_DIFFERS}")
    return ""


def _all_outputs(graph: Graph, given: Mapping[str, Array]) -> list[Array]:
    result = compile_model(graph)(*(given[str(i.attrs["name"])] for i in graph.inputs if i.attrs["role"] == "data"))
    return list(result) if isinstance(result, tuple) else [result]
