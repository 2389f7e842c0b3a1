"""The driver: from a Python function, a Module or a Graph to an Executable. Here the folders meet.

    trace -> (sizes put in) -> passes -> split into prepare and run -> code for both -> Executable

A program is looked up in the disk cache by its traced graph before any pass runs, so that a hit costs reading a file.
Passes, code generator and LLVM's optimiser are imported only where there is something to compile.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from .ir.collector import no_collection
from .ir.errors import CompileError, InputError, TensorwrightError
from .ir.graph import Graph
from .ir.graphs import specialize
from .ir.memory import Rematerialisation
from .ir.program import CALL_PATH, DIGEST, PLACEMENT, Program
from .ir.target import Target
from .runtime import artifact, host, placement, threads
from .runtime.cache import DiskCache, Key, default_folder, source_digest, source_stamp
from .runtime.compiled import Compiled, PassRecord, Text
from .runtime.executable import Executable
from .runtime.native import llvm_version, release_compiler
from .runtime.prepared import PreparedStore
from .settings import Flags, flags

if TYPE_CHECKING:
    from .codegen.llvm import Workers
    from .frontend.onnx.model import Model
    from .frontend.parameter import Parameter
    from .generic import GenericCompiler
    from .passes.contract import PassResult
    from .staged import StagedExecutable

_ROOT: Final = Path(__file__).resolve().parent
_WORTH_WORKERS: Final = 300  # nodes of a graph from which on LLVM works in processes of its own
_COMPILER: Final = ("ir", "passes", "codegen", "cuda", "driver.py", "generic.py")
_CODE_STAGES: Final = ("loops", "llvm", "asm")
_WINOGRAD: Final = "winograd"  # the pass, and the choice to do without it
PRECISIONS: Final = ("f32", "bf16", "tf32")
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
    options = _Options(memory_budget or 0, precision or PRECISIONS[0], float(tune or 0))
    every: GenericCompiler | None = None
    one = _Compiler(graph, purpose, chosen, count, bool(parameters), now, options)
    compiler: Callable[[Mapping[str, int]], Compiled] = one
    if dynamic not in (None, *DYNAMIC):
        raise InputError(f"dynamic is one of {', '.join(map(repr, DYNAMIC))}, got {dynamic!r}")
    if dynamic == "generic" and any(i.tensor.symbols for i in graph.inputs):
        if purpose != "inference" or options != _Options():
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


# ------------------------------------------------------------------------------------------------ graph -> Compiled


def cache_of(now: Flags) -> DiskCache | None:
    """The disk cache under these flags; None where it is off."""
    if now.cache.lower() == "off":
        return None
    return DiskCache(Path(now.cache) if now.cache else default_folder(), now.cache_bytes)


@functools.cache
def compiler_digest() -> str:
    """A hash of the source that decides what code a graph becomes, and numpy's version, which folds constants."""
    cache = cache_of(flags())
    read = functools.partial(source_digest, _ROOT, _COMPILER)  # takes 5 ms; to look at dates takes 1
    digest = read() if cache is None else cache.source(source_stamp(_ROOT, _COMPILER), read)
    return f"{digest} numpy {np.__version__}"


@dataclass(frozen=True)
class _Options:
    """What a caller asks for besides the graph: bytes of memory (0: any number), the precision of contractions, and seconds for
    measuring (0: none)."""

    memory_budget: int = 0
    precision: str = PRECISIONS[0]
    tune: float = 0.0


@dataclass(frozen=True, eq=False)
class _Compiler:
    """Compiles one graph for any sizes; what an Executable calls."""

    graph: Graph
    purpose: str
    target: Target
    count: int
    bound: bool
    now: Flags
    asked: _Options = _Options()

    def key(self, sizes: Mapping[str, int]) -> Key:
        """All that decides the code for these sizes."""
        options: list[tuple[str, str | int | bool | None]] = [
            ("purpose", self.purpose),
            ("threads", self.count),
            ("bound", self.bound),
            ("memory budget", self.asked.memory_budget),
            ("precision", self.asked.precision),
            ("tuned", self.asked.tune > 0),
        ]
        options += self.now.code_flags()
        return Key(
            graph=self.graph.fingerprint(),
            target=self.target,
            flags=(*options, *((f"size {n}", size) for n, size in sorted(sizes.items()))),
            compiler=compiler_digest(),
            llvm=llvm_version(),
        )

    def __call__(self, sizes: Mapping[str, int]) -> Compiled:
        """The program for these sizes, from the cache or made now."""
        start = time.perf_counter()
        cache = cache_of(self.now)
        look = cache is not None and not self.now.validate and not self.now.dump
        key = self.key(sizes) if cache is not None else None
        found = cache.get(key) if look and cache is not None and key is not None else None
        if found is None:
            found = self._make(sizes)
            release_compiler()
            if cache is not None and key is not None:
                cache.put(key, found)
            return replace(found, seconds=time.perf_counter() - start)
        tuned = found.tuned
        again = functools.cache(lambda: self._make(sizes, tuned).texts)
        names = ["graph", *stage_names([p.name for p in found.passes]), *(["prepare"] if found.prepare else [])]
        texts: dict[str, Text] = {n: functools.partial(regenerated, again, n) for n in (*names, *_CODE_STAGES)}
        texts["graph"] = lambda: str(specialize(self.graph, sizes))
        return replace(found, texts=texts, seconds=time.perf_counter() - start)

    def _make(self, sizes: Mapping[str, int], tuned: Mapping[str, int] | None = None) -> Compiled:
        with no_collection():
            if self.asked.tune and tuned is None:
                return self._searched(sizes)
            return self._compiled(sizes, tuned or {})

    def _searched(self, sizes: Mapping[str, int]) -> Compiled:
        """The program by the best choices that were measured in the time that was asked for."""
        from .tuning import GAIN, measure

        end = time.perf_counter() + self.asked.tune
        first = self._compiled(sizes, {}, self.asked.tune)
        if time.perf_counter() > end or not any(p.name == _WINOGRAD and p.changed for p in first.passes):
            return first
        other = self._compiled(sizes, {_WINOGRAD: 0}, end - time.perf_counter())
        faster = measure(other.run, self.count) < GAIN * measure(first.run, self.count)
        return other if faster else first

    def _search(self, run: Graph, seconds: float) -> dict[str, int]:
        from .tuning import tune

        cache = cache_of(self.now)
        about = f"{self.target} {self.count} {compiler_digest()} {llvm_version()}"

        def recall(key: str) -> int | None:
            text = None if cache is None else cache.kept(f"plan of {key} {about}")
            return int(text) if text is not None and text.isdigit() and len(text) < 4 else None

        def record(key: str, rank: int) -> None:
            if cache is not None:
                cache.keep(f"plan of {key} {about}", b"%d" % rank)

        return dict(tune(run, self.target, self.count, seconds, recall, record))

    def _compiled(self, sizes: Mapping[str, int], tuned: Mapping[str, int], search: float = 0.0) -> Compiled:
        from .codegen.llvm import Workers

        graph = specialize(self.graph, sizes)
        folder = dump_folder(self.now, self.graph, sizes)
        check: Callable[..., None] | None = None
        if self.now.validate:
            from .passes.validate import Validator

            check = Validator()
        large = sum(1 for n in graph.nodes() if n.inputs) >= _WORTH_WORKERS
        runs_here = large and not host.missing_features(self.target.name)
        with _fork_ready(self.count if runs_here else 1), Workers(2 if large and not search else 0) as workers:
            return self._lowered(graph, tuned, search, check, folder, workers)

    def _lowered(
        self,
        graph: Graph,
        tuned: Mapping[str, int],
        search: float,
        check: Callable[..., None] | None,
        folder: Path | None,
        workers: Workers,
    ) -> Compiled:
        from .codegen.contraction import preferred_panel
        from .codegen.footprint import Footprint
        from .codegen.generate import begin
        from .passes import pipeline
        from .passes.contract import Context
        from .passes.manager import Hooks, run_pipeline
        from .passes.prepare import split

        model = Footprint(self.target, self.count)
        ctx = Context(target=self.target, preferred_panel=preferred_panel, memory_model=model)
        winograd = self.now.winograd if tuned.get(_WINOGRAD, 1) else False
        passes = getattr(pipeline, self.purpose)(self.target, self.asked.precision, winograd)
        if self.asked.memory_budget:
            passes = pipeline.unsliced(passes)
        check_all = self.now.verify or self.now.validate
        hooks = Hooks(dump=folder, verify=check_all, validate=check)
        final = run_pipeline(graph, passes, ctx, hooks)
        first, run = split(final) if self.bound else (None, final)
        if self.now.validate:
            from .passes.validate import validate_split

            validate_split(final, first, run)
        number = len(ctx.results)
        run = run_pipeline(run, pipeline.within(self.asked.memory_budget), ctx, replace(hooks, number=number))
        options: dict[str, Any] = {"threads": self.count, "checked": self.now.checked, "verify": check_all}
        remat = ctx.notes.get("rematerialise")
        # LLVM makes the prepare program's machine code while the run program's loops are written
        options["workers"] = workers if workers else None
        preparing = None if first is None else begin(first, self.target, name="prepare", brief=True, **options)
        if search:
            tuned = {**tuned, **self._search(run, search)}
        program = begin(run, self.target, name="main", choices=tuned, most=2, **options)()
        prepare = None if preparing is None else preparing()
        texts = stage_texts(graph, ctx.results, first)
        texts |= {stage: functools.partial(_code_text, stage, program, prepare) for stage in _CODE_STAGES}
        dump_code(folder, texts, _CODE_STAGES, len(ctx.results))
        return Compiled(
            run=program,
            prepare=prepare,
            prepare_key="" if first is None else first.fingerprint(),
            texts=texts,
            passes=tuple(record_of(r) for r in ctx.results),
            remat=remat if isinstance(remat, Rematerialisation) else None,
            tuned=tuned,
        )


@contextmanager
def _fork_ready(count: int) -> Iterator[None]:
    """Beside the block, in a thread, finds what parallel regions of so many threads call: OpenMP's runtime, and the code that
    places workers."""

    def find() -> None:
        with suppress(TensorwrightError):  # whoever runs the program meets the same, and says so
            threads.context(count)

    other = threading.Thread(target=find, name="tensorwright-fork") if count > 1 else None
    if other is not None:
        other.start()
    try:
        yield
    finally:
        if other is not None:
            other.join()


def dump_folder(now: Flags, graph: Graph, sizes: Mapping[str, int]) -> Path | None:
    """Where the texts of a compilation go, made now; None where nobody asked for them."""
    if not now.dump:
        return None
    name = re.sub(r"\W+", "_", "_".join([graph.name, *(f"{n}{size}" for n, size in sorted(sizes.items()))]))
    folder = Path(now.dump) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_texts(graph: Graph, results: Sequence[PassResult], prepare: Graph | None) -> dict[str, Text]:
    """The texts of the traced graph, of what each pass made of it, and of the prepare graph."""
    texts: dict[str, Text] = {"graph": functools.partial(str, graph)}
    texts |= {n: functools.partial(str, r.after) for n, r in zip(stage_names([r.name for r in results]), results, strict=True)}
    return texts if prepare is None else texts | {"prepare": functools.partial(str, prepare)}


def dump_code(folder: Path | None, texts: Mapping[str, Text], stages: Sequence[str], passes: int) -> None:
    """Writes the texts after those of the passes, which were written as they were made; nothing where nobody asked."""
    if folder is None:
        return
    for k, stage in enumerate((*(["prepare"] if "prepare" in texts else []), *stages), start=passes + 1):
        text = texts[stage]
        (folder / f"{k:03}_{stage}.txt").write_text(text if isinstance(text, str) else text(), encoding="utf-8")


def regenerated(again: Callable[[], Mapping[str, Text]], stage: str) -> str:
    text = again()[stage]
    return text if isinstance(text, str) else text()


def record_of(result: PassResult) -> PassRecord:
    return PassRecord(result.name, result.kind, result.nodes_before, result.nodes_after, result.ms, result.changed)


def stage_names(passes: Sequence[str]) -> list[str]:
    """A name per pass; the second of a name gets '.2'."""
    seen: dict[str, int] = {}
    names = []
    for p in passes:
        seen[p] = seen.get(p, 0) + 1
        names.append(p if seen[p] == 1 else f"{p}.{seen[p]}")
    return names


def _code_text(stage: str, run: Program, prepare: Program | None) -> str:
    if prepare is None:
        return run.texts[stage]
    mark = "; " if stage == "llvm" else "# "
    return f"{mark}---- prepare: once per set of weights\n{prepare.texts[stage]}\n{mark}---- run\n{run.texts[stage]}"
