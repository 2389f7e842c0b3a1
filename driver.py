"""The driver: from a Python function, a Module or a Graph to an Executable. Here the folders meet.

    trace -> (sizes put in) -> passes -> split into prepare and run -> code for both -> Executable

What happens between a graph and its programs is compiler.py's.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from .compiler import PRECISIONS, Compiler, Options, cache_of, compiler_digest
from .ir.collector import no_collection
from .ir.errors import CompileError, InputError
from .ir.graph import Graph
from .ir.program import CALL_PATH, DIGEST, PLACEMENT
from .ir.target import Target
from .runtime import artifact, host, placement, threads
from .runtime.compiled import Compiled
from .runtime.executable import Executable
from .runtime.native import llvm_version, release_compiler
from .runtime.prepared import PreparedStore
from .settings import Flags, flags

if TYPE_CHECKING:
    from .frontend.onnx.model import Model
    from .frontend.parameter import Parameter
    from .generic import GenericCompiler
    from .staged import StagedExecutable

DYNAMIC: Final = ("specialise", "generic")
_KEPT: Final = 256 * 1024 * 1024  # bytes of memory for other sizes that a program for every size keeps


@overload
def compile(
    fn: Model,
    *,
    target: str | Target | None = None,
    threads: int | None = None,
    validate: bool | None = None,
    cache: bool | None = None,
    dump: str | Path | None = None,
    memory_budget: int | None = None,
    precision: str | None = None,
    winograd: bool | None = None,
    tune: float | None = None,
    dynamic: str | None = None,
) -> Executable | StagedExecutable: ...
@overload
def compile(
    fn: Callable[..., Any] | Graph,
    *specs: Any,
    parameters: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    threads: int | None = None,
    validate: bool | None = None,
    cache: bool | None = None,
    dump: str | Path | None = None,
    name: str | None = None,
    memory_budget: int | None = None,
    precision: str | None = None,
    winograd: bool | None = None,
    tune: float | None = None,
    dynamic: str | None = None,
    release_weights: bool = False,
) -> Executable: ...
def compile(
    fn: Callable[..., Any] | Graph | Model,
    *specs: Any,
    parameters: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    threads: int | None = None,
    validate: bool | None = None,
    cache: bool | None = None,
    dump: str | Path | None = None,
    name: str | None = None,
    memory_budget: int | None = None,
    precision: str | None = None,
    winograd: bool | None = None,
    tune: float | None = None,
    dynamic: str | None = None,
    release_weights: bool = False,
) -> Executable | StagedExecutable:
    """An Executable of a function of Tensors or a Module, for arguments like `specs`; or of a Graph.

    fn          a function, a Module (its weights are bound), a Graph, or a tw.onnx.Model (then there are no specs)
    specs       tw.spec(...), example arrays, or nested containers of such; tw.spec("N", 3) leaves N open: one program
                is compiled for each size that comes
    parameters  weights of a Graph by input name (default: those that came with it); other inputs are arguments of the call
    target      'host', or a target row; code for a row that this machine lacks can be read, not run
    threads     most threads one call may use (default: TENSORWRIGHT_THREADS, else what the machine allows)
    validate    check every pass against the interpreter (default: TENSORWRIGHT_VALIDATE)
    cache       look in the disk cache and store there (default: yes, unless TENSORWRIGHT_CACHE=off)
    dump        a folder for the text of every stage, numbered
    memory_budget  the most bytes one call may need, arguments and weights included: what does not fit is computed again
                instead of kept, with the same bits (`exe.remat` says what, `exe.memory` what the call needs)
    precision   'f32', or 'bf16': matrix products and convolutions of bf16 numbers, added up in f32; or 'tf32': of f32 numbers
                rounded to 10 bits of fraction, which tensor cores take (cuda-sm_80 and newer; elsewhere only the numbers differ)
    winograd    whether 3x3 convolutions may be computed by Winograd's method, which is faster and errs more: up to 1e-5 of the
                largest result of a layer (default: TENSORWRIGHT_WINOGRAD, else yes)
    tune        about how many seconds to spend on measuring what the cost models rank best, where the cache has no result of
                that yet. Sums may be cut otherwise then, so that last bits differ from those without tune=, but not from run
                to run or by the number of threads
    dynamic     what happens to named sizes: 'specialise' (the default) compiles for each size that comes, when it comes;
                'generic' compiles one program now that serves every size, and nothing later. It is slower than one made for
                its sizes, and not for training, loops, sorts, bf16 products or memory budgets: CompileError names such nodes
    release_weights  whether the large weights of the function's Modules go to a file without a name in the cache's folder (the
                system's for such files where the cache is off), so that memory holds the prepared ones alone. They can be read,
                written to and trained as before, and are read from the disk then. Arrays that others hold too stay where they are

    Raises TraceError, ShapeError, DTypeError for the model, CompileError for the target, ValidationError for a pass.
    """
    with no_collection():
        return _compile(
            fn,
            *specs,
            parameters=parameters,
            target=target,
            threads=threads,
            validate=validate,
            cache=cache,
            dump=dump,
            name=name,
            memory_budget=memory_budget,
            precision=precision,
            winograd=winograd,
            tune=tune,
            dynamic=dynamic,
            release_weights=release_weights,
        )


def _compile(
    fn: Any,
    *specs: Any,
    parameters: Mapping[str, Any] | None,
    target: str | Target | None,
    threads: int | None,
    validate: bool | None,
    cache: bool | None,
    dump: str | Path | None,
    name: str | None,
    memory_budget: int | None,
    precision: str | None,
    winograd: bool | None,
    tune: float | None,
    dynamic: str | None,
    release_weights: bool,
) -> Executable | StagedExecutable:
    now = flags()
    changes: dict[str, Any] = {"threads": threads, "validate": validate, "dump": None if dump is None else str(dump)}
    changes["winograd"] = winograd
    now = replace(now, **{k: v for k, v in changes.items() if v is not None})
    if cache is False:
        now = replace(now, cache="off")
    flatten = unflatten = kept = None
    if release_weights and isinstance(fn, Graph):
        raise InputError("release_weights= is for the weights of Modules; a Graph has none: map a file instead (tw.load does)")
    if isinstance(fn, Graph):
        if specs:
            raise InputError("a Graph has its input types in it: compile(graph) takes no specs")
        graph, bound = fn, dict(fn.weights if parameters is None else parameters)
    else:
        from .frontend import tree
        from .frontend.tracing import modules_of, trace_model

        imported = sys.modules.get(f"{__package__}.frontend.onnx.model")  # nobody can have a Model who did not import it
        if imported is not None and isinstance(fn, imported.Model):
            if specs or parameters is not None or release_weights:
                raise InputError(
                    "an ONNX model has its input types and weights in it: compile(model) takes neither, nor release_weights="
                )
            from .staged import staged

            options: dict[str, Any] = {"target": target, "now": now, "memory_budget": memory_budget, "precision": precision}
            options |= {"tune": tune, "dynamic": dynamic}
            return staged(fn, lambda g: build(g, g.weights, **options))
        if parameters is not None:
            raise InputError("parameters= belongs to a Graph; a Module brings its own weights")
        _check_signature(fn, specs)
        kept = _store(now, now.target if target is None else target)
        if kept is not None and not release_weights:  # while the model is traced
            kept.read_ahead(p.data for _, m in modules_of(fn) for _, p in m.named_parts("")[1])
        with tracing_for(target, now):
            traced = trace_model(fn, *specs, name=name)
        graph = traced.graph
        released = _release(traced.parameters, now) if release_weights else {}
        bound = traced.values() | released
        structure, arguments = traced.structure, traced.argument_structure
        if structure.kind not in ("leaf", tuple) or any(c.kind != "leaf" for c in structure.children):
            unflatten = functools.partial(tree.unflatten, structure)
        if any(c.kind != "leaf" for c in arguments.children):
            flatten = functools.partial(_flatten, graph.name, arguments)
    return build(
        graph,
        bound,
        target=target,
        now=now,
        flatten=flatten,
        unflatten=unflatten,
        memory_budget=memory_budget,
        precision=precision,
        tune=tune,
        dynamic=dynamic,
        kept=kept,
    )


def _release(parameters: Mapping[str, Parameter], now: Flags) -> dict[str, np.ndarray[Any, Any]]:
    """Moves large weights to a file: for each, what a program reads in its place. See `runtime/parked.py`."""
    from .runtime.parked import LARGE, Park

    chosen = {n: p for n, p in parameters.items() if p.data.nbytes >= LARGE and p.movable()}
    if not chosen:
        return {}
    cache = cache_of(now)
    fixed: dict[str, np.ndarray[Any, Any]] = {}
    with Park([p.data.nbytes for p in chosen.values()], Path(tempfile.gettempdir()) if cache is None else cache.folder) as park:
        for k, (name, p) in enumerate(chosen.items()):
            writable, fixed[name] = park.put(k, p.data)
            p.move(writable)  # the array goes before the next is written
    release_compiler()
    return fixed


def _check_signature(fn: Callable[..., Any], specs: Sequence[Any]) -> None:
    """Raises InputError where the function does not take that many arguments."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # a callable without a signature to be had, or no callable at all: tracing says what is wrong
    try:
        signature.bind(*specs)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise InputError(f"{name}: {error}; it takes {signature} and was given {len(specs)} specs") from None


def _flatten(name: str, expected: Any, inputs: Sequence[Any]) -> list[Any]:
    """The arrays in nested arguments. Raises InputError if they are nested otherwise than the specs were."""
    from .frontend import tree

    leaves, structure = tree.flatten(tuple(inputs))
    # an argument that was a Python value when traced is no input: it is not looked at again
    kept = [c.kind is not None for c in expected.children]
    if len(inputs) == len(kept) and not all(kept):
        leaves, structure = tree.flatten(tuple(x if keep else None for x, keep in zip(inputs, kept, strict=True)))
    if structure != expected:
        raise InputError(f"{name}: arguments are nested as {structure}, but were traced as {expected}")
    return leaves


def build(
    graph: Graph,
    parameters: Mapping[str, Any],
    *,
    purpose: str = "inference",
    target: str | Target | None = None,
    now: Flags | None = None,
    flatten: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
    unflatten: Callable[[Sequence[Any]], Any] | None = None,
    shares: Executable | None = None,
    memory_budget: int | None = None,
    precision: str | None = None,
    tune: float | None = None,
    dynamic: str | None = None,
    kept: PreparedStore | None = None,
) -> Executable:
    """The Executable of a graph by the pipeline for `purpose` ('inference' or 'training'), under the flags `now`.

    `shares` is another Executable whose weights and state (by name) it works on. `memory_budget`, `precision`,
    `tune` and `dynamic` are as for `compile`. `kept` is where prepared weights are looked for (default: in the cache).
    """
    if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 1):
        raise InputError(f"memory_budget is a number of bytes of at least 1, got {memory_budget!r}")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision is one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if tune is not None and (isinstance(tune, bool) or not isinstance(tune, int | float) or not 0 < tune < math.inf):
        raise InputError(f"tune is a number of seconds above 0, got {tune!r}")
    now = flags() if now is None else now
    asked = now.target if target is None else target
    if _is_cuda(asked):
        from .cuda.compiling import build_cuda

        plain = {"memory_budget": memory_budget, "tune": tune, "dynamic": dynamic}
        refuse = [f"{k}={v!r}" for k, v in plain.items() if v not in (None, DYNAMIC[0])]
        rest: dict[str, Any] = {"flatten": flatten, "unflatten": unflatten, "shares": shares, "refuse": refuse}
        return build_cuda(graph, parameters, asked, purpose, now, precision or PRECISIONS[0], **rest)
    chosen = host.resolve(now.target if target is None else target)
    count = threads.resolve(now.threads)
    for_inputs = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] in ("parameter", "state")]
    missing = sorted(set(for_inputs) - parameters.keys())
    if parameters and missing:
        raise CompileError(f"{graph.name}: no value for the parameters {missing[:5]}; give all of them, or none")
    reason = ""
    if lacking := host.missing_features(chosen.name):
        reason = (
            f"this executable is code for {chosen.name}, which this machine cannot run (it lacks {', '.join(lacking)}); "
            f"targets that run here: {', '.join(host.runnable_rows())}"
        )
    if tune and (reason or memory_budget):
        raise InputError("tune= measures on this machine, without a memory budget: " + (reason or "drop one of the two"))
    options = Options(memory_budget or 0, precision or PRECISIONS[0], float(tune or 0))
    every: GenericCompiler | None = None
    one = Compiler(graph, purpose, chosen, count, bool(parameters), now, options)
    compiler: Callable[[Mapping[str, int]], Compiled] = one
    if dynamic not in (None, *DYNAMIC):
        raise InputError(f"dynamic is one of {', '.join(map(repr, DYNAMIC))}, got {dynamic!r}")
    if dynamic == "generic" and any(i.tensor.symbols for i in graph.inputs):
        if purpose != "inference" or options != Options():
            raise InputError("dynamic='generic' is for inference in f32, without memory_budget= and tune=")
        from .generic import GenericCompiler

        key = one.key({})
        key = replace(key, flags=(*key.flags, ("dynamic", dynamic)))
        compiler = every = GenericCompiler(graph, chosen, count, bool(parameters), now, cache_of(now), key)
        every.make()
    if not reason:
        placement.offer(functools.partial(_kept, PLACEMENT, _placement, chosen, now))
    return Executable(
        graph,
        compiler,
        parameters,
        threads=count,
        peak=functools.partial(measured_peak, chosen),
        save=functools.partial(_save, dynamic or DYNAMIC[0]),
        flatten=flatten,
        unflatten=unflatten,
        not_runnable=reason,
        shares=shares,
        call_path=functools.partial(_kept, CALL_PATH, _call_path, chosen, now),
        keep_bytes=_KEPT if every is not None else 0,
        kept=kept or _store(now, chosen),
    )


@contextmanager
def tracing_for(target: str | Target | None, now: Flags) -> Iterator[None]:
    """Within the block, models are traced to ops that the target has kernels for."""
    from .frontend.context import whole_attention

    with whole_attention(_is_cuda(now.target if target is None else target)):
        yield


def _is_cuda(target: str | Target) -> bool:
    return target.is_cuda if isinstance(target, Target) else target.startswith("cuda")


def _store(now: Flags, target: str | Target) -> PreparedStore | None:
    """Where prepared weights are kept under these flags; None where they are not, or this machine cannot run the code."""
    cache = cache_of(now)
    if cache is None or _is_cuda(target) or host.missing_features((chosen := host.resolve(target)).name):
        return None
    return PreparedStore(cache, functools.partial(_kept, DIGEST, _digest, chosen, now), threads.resolve(now.threads))


def _kept(name: str, make: Callable[[Target], bytes], target: Target, now: Flags) -> tuple[bytes, str]:
    """Object code that is the same for all programs, and its function's name, from the cache or made now."""
    key = f"{name} {target} {compiler_digest()} {llvm_version()}"
    cache = cache_of(now)
    code = None if cache is None else cache.kept(key)
    if code is None:
        code = make(target)
        if cache is not None:
            cache.keep(key, code)
    return code, name


def _call_path(target: Target) -> bytes:
    from .codegen.llvm.callpath import call_path

    return call_path(target)


def _digest(target: Target) -> bytes:
    from .codegen.llvm.digest import digest

    return digest(target)


def _placement(target: Target) -> bytes:
    from .codegen.llvm.placement import placement

    return placement(target)


def load(
    path: str | Path,
    *,
    target: str | Target | None = None,
    threads: int | None = None,
    cache: bool | None = None,
    dynamic: str | None = None,
) -> Executable:
    """The Executable of a model that `exe.save` wrote, compiled for this machine or taken from its cache; or of a folder that
    `exe.export` of a CUDA target wrote, which needs no compiling: `target` is then 'cuda' (default), 'cuda-emulator' or an SM.

    `dynamic` is as for `compile`, and as it was when the file was written unless it is given.
    Raises ArtifactError for a file that is damaged or contradicts itself, CompileError, OSError.
    """
    if Path(path).is_dir():
        from .cuda.export import load_folder

        return load_folder(Path(path), target)
    found = artifact.load(path)
    asked = found.remarks.get("dynamic") if dynamic is None else dynamic
    how = asked if asked in DYNAMIC or dynamic is not None else None  # a remark is anyone's text
    return compile(found.graph, parameters=found.parameters, target=target, threads=threads, cache=cache, dynamic=how)


def _save(dynamic: str, exe: Executable, path: str | Path) -> None:
    from . import __version__

    artifact.save(path, exe.graph, exe.parameters, {"tensorwright": __version__, "dynamic": dynamic})


def measured_peak(target: Target, count: int) -> float:
    """GFLOP/s of f32 multiply-adds that `count` cores reach, by a measurement that is made once (a third of a second)."""
    from .benchmarks.peak import peak

    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        return peak(target) * count * 1e-9
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)  # measuring raises it
