"""`tensorwright compile`, `run` and `inspect`: a model from a file, compiled."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..driver import compile as compile_model
from ..ir import ops as _records  # noqa: F401 (registers the op records)
from ..ir.errors import InputError, ParseError, TensorwrightError, TraceError
from ..ir.graph import Graph
from ..ir.graphs import bind_sizes
from ..ir.text import parse_graph
from ..ir.types import TensorType
from ..runtime import artifact
from ..runtime.buffers import Array
from ..runtime.compiled import Compiled
from ..runtime.executable import Executable

_UNREADABLE: Final = (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile)  # what np.load raises on other files
_CHECK: Final = 1e-4  # greatest relative error of --check: f32 sums over a few thousand terms stay well below


def compile_command(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles, prints what was done, saves if asked; the figures."""
    exe, sizes = executable(args, validate=args.validate or None, dump=args.dump)
    compiled = exe.specialise(**_all_sizes(exe, sizes)) if exe.symbols else exe.compiled
    figures = describe(exe, compiled)
    show(exe, compiled)
    if args.output:
        exe.save(args.output)
        print(f"saved to {args.output}")
    return figures


def run_command(args: argparse.Namespace) -> dict[str, Any]:
    """Runs on given or random arrays; prints time and outputs, and profile or check if asked."""
    exe, sizes = executable(args)
    inputs = arguments(exe, args.input, sizes, args.seed)
    result = exe(*inputs)
    if exe.symbols:
        sizes = _met(exe, inputs, sizes)
    outputs = _flat(result)
    times = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        exe(*inputs)
        times.append(time.perf_counter() - start)
    median = float(np.median(times)) * 1e3
    figures: dict[str, Any] = {**describe(exe, exe.compiled), "milliseconds": median}
    print(f"{exe!r}\n{median:.4f} ms a call (median of {args.repeat})")
    for name, y in zip(exe.output_names, outputs, strict=False):
        print(f"  {name}: {y.dtype}{list(y.shape)} {_summary(y)}")
    if args.profile:
        profile = exe.profile(*inputs)
        profile.print()
        figures["profile"] = profile.to_dict()
    if args.check:
        figures["max_rel_error"] = error = check(exe, inputs, sizes, outputs)
        print(f"against the numpy interpreter in f64: relative error {error:.2e}")
        if not error <= _CHECK:
            raise InputError(f"the outputs differ from the interpreter's by {error:.2e} relative; at most {_CHECK} is expected")
    if args.compare:
        from .onnx import compare

        figures["compare"] = compare(args.model, exe, inputs, outputs, args.layers)
    if args.output:
        with open(args.output, "wb") as file:  # a path would get .npz appended
            np.savez(file, **dict(zip(exe.output_names, outputs, strict=False)))  # type: ignore[arg-type]
        print(f"outputs written to {args.output}")
    return figures


def inspect_command(args: argparse.Namespace) -> None:
    """Prints one stage, or the list of them (for a CUDA target with estimates of its kernels); or the need of memory."""
    cuda = (args.target or "").startswith("cuda")
    if args.model.endswith(".onnx") and args.stage is None and not args.memory and not cuda:
        from .onnx import summary

        summary(args.model, _sizes(args.size))
        return
    exe, sizes = executable(args)
    if exe.symbols:
        exe.specialise(**_all_sizes(exe, sizes))
    if args.memory:
        _print_memory(exe)
    elif args.stage is None and cuda:
        exe.profile(estimate=True).print()
        print(f"stages: {', '.join(exe.stages)}")
    elif args.stage is None:
        print("\n".join(exe.stages))
    else:
        text = exe.text(args.stage)
        sys.stdout.write(text if text.endswith("\n") else text + "\n")


# ---------------------------------------------------------------------------------------------------- models from files


def executable(args: argparse.Namespace, **more: Any) -> tuple[Executable, dict[str, int]]:
    """The Executable of the model that the command line names, and the sizes given for its symbolic dimensions."""
    sizes = _sizes(args.size)
    exe = _executable(args, more)
    unknown = sorted(sizes.keys() - set(exe.symbols))
    if unknown:
        there = f"its symbolic sizes are {', '.join(exe.symbols)}" if exe.symbols else "all its sizes are numbers"
        raise InputError(f"--size {unknown[0]}={sizes[unknown[0]]}: {exe.graph.name} has no such size; {there}")
    return exe, sizes


def _executable(args: argparse.Namespace, more: Mapping[str, Any]) -> Executable:
    asked = {"target": args.target, "memory_budget": args.memory_budget, "precision": args.precision, "tune": args.tune, **more}
    options = {k: v for k, v in asked.items() if v is not None}
    path, _, name = args.model.partition(":") if re.search(r"\.py(:|$)", args.model) else (args.model, "", "")
    if not Path(path).is_file():
        raise InputError(f"there is no file {path!r}; MODEL is FILE.py:NAME, FILE.tw, FILE.onnx, or a file with a graph's text")
    if path.endswith(".py"):
        fn, defaults = _from_python(Path(path), name)
        given = [parse_spec(s) for s in args.spec] or defaults
        if isinstance(fn, Graph):
            return compile_model(fn, parameters=_weights(fn, args.weights), **options)
        with _their_code(Path(path), "tracing the model"):
            exe = compile_model(fn, *given, **options)
        if args.weights:
            exe.set_parameters(_read_arrays(args.weights))
        return exe
    if args.spec:
        raise InputError("--spec belongs to a Python model; a graph, a .tw and an .onnx file have their types in them")
    if path.endswith(".tw"):
        found = artifact.load(path)
        weights = _weights(found.graph, args.weights) if args.weights else found.parameters
        return compile_model(found.graph, parameters=weights, **options)
    if path.endswith(".onnx"):
        from .onnx import compiled_model

        return compiled_model(path, _weights_given(args.weights), options)
    graph = read_graph(path)
    return compile_model(graph, parameters=_weights(graph, args.weights), **options)


def read_graph(path: str) -> Graph:
    """The graph whose text a file (or '-', standard input) holds. Raises ParseError, OSError."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ParseError(f"{path} is not text: {error}") from error
    try:
        return parse_graph(text)
    except ParseError as error:
        raise ParseError(f"{path}: {error}") from error


def _from_python(path: Path, name: str) -> tuple[Callable[..., Any] | Graph, list[Any]]:
    """The model called `name` in a Python file, and the file's `specs` (empty if it has none)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes find their own module
    sys.path.insert(0, str(path.parent))
    with _their_code(path, "loading it"):
        spec.loader.exec_module(module)
    names = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == path.stem]
    if not name:
        name = "model" if hasattr(module, "model") else ""
    if not hasattr(module, name or " "):
        raise InputError(
            f"{path} has no {name or 'model'!r}; name what to compile as {path}:NAME, one of {', '.join(names[:12])}"
        )
    found = getattr(module, name)
    if isinstance(found, type) or _takes_nothing(found):
        with _their_code(path, f"calling {name}()"):
            found = found()
    if not callable(found) and not isinstance(found, Graph):
        raise TraceError(f"{path}:{name} is a {type(found).__name__}; expected a Module, a function of Tensors or a Graph")
    specs = getattr(module, "specs", ())
    if not isinstance(specs, (list, tuple)):
        raise InputError(f"{path}: specs is a {type(specs).__name__}; expected a list with one tw.spec(...) per argument")
    return found, list(specs)


@contextlib.contextmanager
def _their_code(path: Path, doing: str) -> Iterator[None]:
    """What the user's file raises becomes a TraceError that names the line in it; errors of ours go through as they are."""
    try:
        yield
    except (TensorwrightError, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise TraceError(f"{error.filename}:{error.lineno}: not valid Python: {error.msg}: {text}") from error
    except (Exception, SystemExit) as error:
        theirs = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
        if not theirs and not doing.startswith("calling"):
            raise  # it happened in our code and is none of theirs
        where = f"{path}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else str(path)
        raise TraceError(f"{where}\n  raised {type(error).__name__}: {error}, while {doing}") from error


def _takes_nothing(value: Any) -> bool:
    import inspect

    if not inspect.isfunction(value):
        return False
    return all(p.default is not p.empty for p in inspect.signature(value).parameters.values())


def parse_spec(text: str) -> Any:
    """The Spec for '1,784', 'N,3' or '8,16:i64'. Raises InputError for anything else."""
    from ..frontend.specs import spec

    shape, _, dtype = text.partition(":")
    dims: list[str | int] = []
    for part in filter(None, (p.strip() for p in shape.strip("()[] ").split(","))):
        dims.append(int(part) if re.fullmatch(r"-?[0-9]+", part) else part)
    try:
        return spec(*dims, dtype=dtype or "f32") if dims else spec((), dtype=dtype or "f32")
    except ValueError as error:
        raise InputError(f"--spec {text!r}: {error}; expected sizes and a dtype, such as 1,784 or 8,16:i64") from error


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not name.isidentifier() or not re.fullmatch(r"[0-9]+", size) or int(size) < 1:
            raise InputError(f"--size {text!r}: expected a name and a number of at least 1, such as N=8")
        sizes[name] = int(size)
    return sizes


def _all_sizes(exe: Executable, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """The sizes, if there is one for every symbolic dimension. Raises InputError."""
    missing = [s for s in exe.symbols if s not in sizes]
    if missing:
        raise InputError(f"{exe.graph.name} has symbolic sizes; give them: {' '.join(f'--size {m}=8' for m in missing)}")
    return sizes


def _met(exe: Executable, inputs: Sequence[Array], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that the inputs have. Raises InputError if other ones were asked for."""
    shapes = {n: i.tensor.shape for n, i in ((str(i.attrs["name"]), i) for i in exe.graph.inputs)}
    found = bind_sizes(exe.graph, shapes | {n: x.shape for (n, _), x in zip(exe.arguments, inputs, strict=True)})
    for name, size in sizes.items():
        if found[name] != size:
            raise InputError(f"--size {name}={size}, but the arrays given with --input make it {found[name]}")
    return found


# ---------------------------------------------------------------------------------------------------- arrays


def _weights(graph: Graph, path: str | None) -> dict[str, Array] | None:
    """Values for a graph's parameters and state: from a file, or random ones that keep activations of order one."""
    wanted = {str(i.attrs["name"]): i.tensor for i in graph.inputs if i.attrs["role"] in ("parameter", "state")}
    if path:
        given = _read_arrays(path)
        missing = sorted(wanted.keys() - given.keys())
        if missing:
            raise InputError(f"{path} lacks the weights {missing[:5]}")
        return {n: given[n] for n in wanted}
    rng = np.random.default_rng(0)
    return {n: random_array(rng, t, weight=True) for n, t in wanted.items()} or None


def _weights_given(path: str | None) -> dict[str, Array] | None:
    return _read_arrays(path) if path else None


def _read_arrays(path: str) -> dict[str, Array]:
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise InputError(f"{path}: expected .safetensors, or .npz with arrays by name; this holds one array without a name")
        with found:
            return {n: found[n] for n in found.files}
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: expected .safetensors, or .npz with arrays by name: {_why(error)}") from error


def arguments(exe: Executable, files: Sequence[str], sizes: Mapping[str, int], seed: int) -> list[Array]:
    """The call's arguments: from .npy files, or random. Raises InputError for a wrong number of files."""
    if files:
        if len(files) != len(exe.arguments):
            raise InputError(f"the model takes {len(exe.arguments)} inputs, --input was given {len(files)} times")
        return [read_array(f) for f in files]
    _all_sizes(exe, sizes)
    rng = np.random.default_rng(seed)
    return [random_array(rng, t.with_sizes(sizes)) for _, t in exe.arguments]


def _why(error: Exception) -> str:
    # numpy takes what it does not know for a pickle, and then tells how to load that unsafely
    return "it is no such file, or it holds Python objects" if "pickle" in str(error) else str(error)


def read_array(path: str) -> Array:
    """The array of a .npy file. Raises InputError for other files."""
    try:
        found = np.load(path, allow_pickle=False)
    except _UNREADABLE as error:
        raise InputError(f"{path}: expected one array as numpy.save writes it (.npy): {_why(error)}") from error
    if not isinstance(found, np.ndarray):
        names = ", ".join(found.files[:8])
        found.close()
        raise InputError(f"{path}: expected one array as numpy.save writes it (.npy), got an archive of arrays: {names}")
    return found


def random_array(rng: np.random.Generator, type: TensorType, weight: bool = False) -> Array:
    """Standard normal floats (weights: divided by the root of their fan-in), small non-negative integers, coin flips."""
    shape = type.static_shape
    if type.dtype.is_float:
        scale = 1.0
        if weight and len(shape) > 1:
            fan = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
            scale = 1 / np.sqrt(max(fan, 1))
        return (rng.standard_normal(shape) * scale).astype(type.dtype.numpy)
    if type.dtype.kind == "bool":
        return rng.random(shape) < 0.5
    return rng.integers(0, 8, shape).astype(type.dtype.numpy)


def check(exe: Executable, inputs: Sequence[Array], sizes: Mapping[str, int], outputs: Sequence[Array]) -> float:
    """The greatest max|y - ref| / max|ref| over the outputs, against the interpreter of the traced graph in f64."""
    from ..ir.dtypes import f64
    from ..ir.graphs import specialize
    from ..ir.interp import run

    graph = specialize(exe.graph, dict(sizes))
    values = {**exe.parameters, **dict(zip((n for n, _ in exe.arguments), inputs, strict=True))}
    expected = dict(zip(graph.output_names, run(graph, values, dtype=f64), strict=True))
    worst = 0.0
    for name, y in zip(exe.output_names, outputs, strict=True):
        reference = np.asarray(expected[name], np.float64)
        if reference.size == 0:
            continue
        scale = float(np.max(np.abs(reference))) or 1.0
        error = float(np.max(np.abs(np.asarray(y, np.float64) - reference))) / scale
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


def _flat(result: Any) -> list[Array]:
    from ..frontend import tree

    return list(tree.flatten(result)[0])


def _summary(y: Array) -> str:
    if y.size == 0:
        return "(empty)"
    values = np.asarray(y, np.float64)
    return f"min {values.min():.6g}, mean {values.mean():.6g}, max {values.max():.6g}"


# ---------------------------------------------------------------------------------------------------- what was compiled


def describe(exe: Executable, compiled: Compiled) -> dict[str, Any]:
    """The figures of a compile, for JSON."""
    run = compiled.run
    return {
        "name": exe.graph.name,
        "target": run.target.name,
        "threads": exe.threads,
        "compile_seconds": compiled.seconds,
        "from_cache": compiled.from_cache,
        "passes": [asdict(p) for p in compiled.passes],
        "kernels": [asdict(k) for k in run.kernels],
        "flops": sum(k.flops for k in run.kernels),
        "object_bytes": len(run.object_code),
        "memory": exe.memory.as_dict(),
        "peak_bytes": exe.peak_bytes,
    }


def console() -> Any:
    """A rich Console; wide enough for our tables where the output is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=150)


def passes_table(compiled: Compiled) -> Any:
    """A rich Table: what each pass did to the number of nodes, and how long it took."""
    from rich.table import Table

    table = Table(
        title="passes" + (" (as recorded when the cached program was made)" if compiled.from_cache else ""), title_justify="left"
    )
    for column in ("pass", "kind", "nodes before", "after", "ms"):
        table.add_column(column, justify="left" if column in ("pass", "kind") else "right")
    for p in compiled.passes:
        after = str(p.nodes_after) if p.changed else "unchanged"
        table.add_row(p.name, p.kind, str(p.nodes_before), after, f"{p.milliseconds:.1f}")
    return table


def show(exe: Executable, compiled: Compiled) -> None:
    """Prints passes, kernels and memory."""
    from rich.table import Table

    output = console()
    output.print(passes_table(compiled))
    run = compiled.run
    table = Table(title=f"{len(run.kernels)} kernels", title_justify="left")
    for column in ("kernel", "MFLOP", "MB", "parallel", "stands for", "note"):
        table.add_column(column, justify="right" if column in ("MFLOP", "MB") else "left")
    for k in run.kernels:
        nodes = " ".join(k.nodes[:6]) + (f" (+{len(k.nodes) - 6})" if len(k.nodes) > 6 else "")
        table.add_row(k.name, f"{k.flops / 1e6:.3f}", f"{k.bytes / 1e6:.3f}", "yes" if k.parallel else "", nodes, k.note)
    output.print(table)
    source = "from the cache" if compiled.from_cache else "compiled"
    print(f"{source} in {compiled.seconds:.3f} s for {run.target.name}: {len(run.object_code):,} bytes of code")
    _print_memory(exe)


def _print_memory(exe: Executable) -> None:
    print(exe.memory)
    if exe.remat is not None:
        print(exe.remat)
