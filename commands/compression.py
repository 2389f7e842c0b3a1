"""What `tensorwright quantize`, `prune` and `compress` share: the model, its data, errors that name options, files."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..compression.masks import pattern_of
from ..compression.shrinking import STRUCTURES
from ..driver import compile as compile_model
from ..ir.errors import AttributeValueError, InputError
from ..ir.graph import Graph
from ..ir.graphs import specialize
from ..runtime.buffers import Array
from .model import executable, read_array

MODELS = (".onnx", ".tw")
REPORTS = (".html", ".htm", ".json")


class Saved(Protocol):
    """A report."""

    def save(self, path: str) -> None: ...


def checked_files(args: argparse.Namespace) -> None:
    """Raises InputError for names of files that say no format: better known before the work than after it."""
    if args.output and not args.output.endswith(MODELS):
        raise InputError(f"-o {args.output}: the model is written as .onnx or .tw")
    if args.report and not args.report.endswith(REPORTS):
        raise InputError(f"--report {args.report}: the report is written as .html or .json")


def model_of(args: argparse.Namespace) -> Graph:
    """The graph of the model that the command line names, with its weights."""
    exe, sizes = executable(args)
    found = specialize(exe.graph, sizes) if sizes else exe.graph
    return Graph(found.inputs, found.outputs, found.output_names, found.name, (), found.labels, exe.parameters)


def check_pattern(option: str, pattern: str) -> None:
    """Raises InputError, naming the option, for a pattern of zeros that does not exist."""
    if pattern in STRUCTURES and option == "--pattern":
        return
    try:
        pattern_of(pattern)
    except InputError as error:
        raise InputError(f"{option} {pattern}: {error}") from None


def data_of(files: Sequence[str], size: int, option: str = "--calibration") -> list[tuple[Array, ...]]:
    """The arrays of files (one for each argument), cut along their first dimension into batches."""
    arrays = [read_array(f) for f in files]
    if not arrays:
        return []
    counts = {a.shape[0] if a.ndim else 0 for a in arrays}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"{option}: the files hold {[a.shape for a in arrays]}; one or more inputs each, as many in all")
    (count,) = counts
    return [tuple(a[k : k + size] for a in arrays) for k in range(0, count - count % size or count, size)]


def batch_of(graph: Graph, size: int) -> int:
    """How many inputs a batch holds: as many as the graph takes, or `size` where it takes any number."""
    first = next((i.shape[0] for i in graph.inputs if i.attrs["role"] == "data" and i.shape), None)
    return first if isinstance(first, int) else size


def share_of(text: str) -> float | None:
    """A share between 0 and 1, both excluded; None for any other text."""
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share < 1 else None


@contextlib.contextmanager
def options_named(options: Mapping[str, str]) -> Iterator[None]:
    """An error that begins with the name of a function's argument begins with the command line's option for it instead."""
    try:
        yield
    except (InputError, AttributeValueError) as error:
        word = re.match(r"\w+", str(error))
        if word is None or word[0] not in options:
            raise
        raise InputError(f"{options[word[0]]}: {error}") from None


def write(args: argparse.Namespace, graph: Graph | None, report: Saved) -> None:
    """Writes the model and the report where they are asked for, and says so."""
    wanted: list[tuple[str | None, Callable[[str], object]]] = [(args.report, report.save)]
    if graph is not None:
        wanted.insert(0, (args.output, lambda path: write_model(graph, path)))
    for path, save in wanted:
        if path:
            save(path)
            print(f"wrote {path}")


def write_model(graph: Graph, path: str) -> None:
    """Writes a graph with its weights as .tw or .onnx."""
    if Path(path).suffix == ".tw":
        compile_model(graph).save(path)
        return
    from ..frontend.onnx import save

    save(graph, path)
