"""One graph, for any sizes, to programs: passes, the split into prepare and run, code for both.

A program is looked up in the disk cache by its traced graph before any pass runs, so that a hit costs reading a file.
Passes, code generator and LLVM's optimiser are imported only where there is something to compile.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .ir.collector import no_collection
from .ir.errors import TensorwrightError
from .ir.graph import Graph
from .ir.graphs import specialize
from .ir.memory import Rematerialisation
from .ir.target import Target
from .runtime import host, threads
from .runtime.cache import DiskCache, Key, default_folder, source_digest, source_stamp
from .runtime.compiled import Compiled, Text
from .runtime.native import llvm_version, release_compiler
from .settings import Flags, flags
from .stages import CODE_STAGES, code_text, dump_code, dump_folder, record_of, regenerated, stage_names, stage_texts

if TYPE_CHECKING:
    from .codegen.llvm import Workers

_ROOT: Final = Path(__file__).resolve().parent
SOURCES: Final = ("ir", "passes", "codegen", "cuda", "compiler.py", "generic.py")  # what decides the code
WORTH_WORKERS: Final = 300  # nodes of a graph from which on LLVM works in processes of its own
_WINOGRAD: Final = "winograd"  # the pass, and the choice to do without it
PRECISIONS: Final = ("f32", "bf16", "tf32")


def cache_of(now: Flags) -> DiskCache | None:
    """The disk cache under these flags; None where it is off."""
    if now.cache.lower() == "off":
        return None
    return DiskCache(Path(now.cache) if now.cache else default_folder(), now.cache_bytes)


@functools.cache
def compiler_digest() -> str:
    """A hash of the source that decides what code a graph becomes, and numpy's version, which folds constants."""
    cache = cache_of(flags())
    read = functools.partial(source_digest, _ROOT, SOURCES)  # takes 5 ms; to look at dates takes 1
    digest = read() if cache is None else cache.source(source_stamp(_ROOT, SOURCES), read)
    return f"{digest} numpy {np.__version__}"


@dataclass(frozen=True)
class Options:
    """What a caller asks for besides the graph: bytes of memory (0: any number), the precision of contractions, and seconds for
    measuring (0: none)."""

    memory_budget: int = 0
    precision: str = PRECISIONS[0]
    tune: float = 0.0


@dataclass(frozen=True, eq=False)
class Compiler:
    """Compiles one graph for any sizes; what an Executable calls."""

    graph: Graph
    purpose: str
    target: Target
    count: int
    bound: bool
    now: Flags
    asked: Options = Options()

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
        texts: dict[str, Text] = {n: functools.partial(regenerated, again, n) for n in (*names, *CODE_STAGES)}
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
        large = sum(1 for n in graph.nodes() if n.inputs) >= WORTH_WORKERS
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
        texts |= {stage: functools.partial(code_text, stage, program, prepare) for stage in CODE_STAGES}
        dump_code(folder, texts, CODE_STAGES, len(ctx.results))
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
