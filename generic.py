"""dynamic='generic': an Executable's programs for all sizes from one compilation, made when the model is compiled.

trace -> passes with the sizes left open -> prepare and run -> codegen.generic -> for each set of sizes: places in the arena
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from .codegen.footprint import Footprint
from .codegen.generate import generate
from .codegen.generic import GenericProgram, check_forms, generate_generic, generic_panel
from .ir.errors import CompileError, InputError, ParseError, ShapeError
from .ir.graph import Graph, Node
from .ir.graphs import substitute_sizes
from .ir.lowering import Map
from .ir.op import Trait
from .ir.program import Program
from .ir.target import Target
from .passes import pipeline
from .passes.contract import Context
from .passes.fuse import Fuse
from .passes.manager import Hooks, run_pipeline
from .passes.prepare import split
from .runtime.cache import DiskCache, Key
from .runtime.compiled import Compiled, PassRecord, Text
from .runtime.native import release_compiler
from .settings import Flags

_CODE: Final = ("loops", "llvm", "asm")
_OF_SIZES: Final = frozenset({"slices", "winograd", "depthwise", "sink"})  # passes that are about given sizes


@dataclass(frozen=True, eq=False)
class _Made:
    """What is the same for all sizes."""

    program: GenericProgram
    prepare: Program | None
    prepare_key: str
    texts: Mapping[str, Text]
    passes: tuple[PassRecord, ...]
    doubtful: tuple[Node, ...]
    from_cache: bool = False


@dataclass(eq=False)
class GenericCompiler:
    """What an Executable calls for its sizes. `make` compiles; after that, a call puts sizes in and compiles nothing."""

    graph: Graph
    target: Target
    count: int
    bound: bool
    now: Flags
    cache: DiskCache | None = None
    key: Key | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _made: _Made | None = None

    def make(self) -> _Made:
        """Compiles, or takes from the cache, once. Raises CompileError that lists the nodes which a program for every size
        does not carry."""
        with self._lock:
            if self._made is None:
                self._made = None if self.now.validate or self.now.dump else self._found()
                if self._made is None:
                    self._made = self._compiled()
                    release_compiler()
                    self._stored(self._made)
            return self._made

    def _found(self) -> _Made | None:
        """What the cache has: code in one entry, and what depends on sizes in another."""
        if self.cache is None or self.key is None:
            return None
        text, entry = self.cache.kept(_about(self.key)), self.cache.get(self.key)
        if text is None or entry is None:
            return None
        try:
            program = GenericProgram.restored(entry.run, json.loads(text))
        except (KeyError, TypeError, ValueError, ParseError):
            return None
        again = functools.cache(lambda: self._compiled().texts)
        texts: dict[str, Text] = {"graph": str(self.graph)}
        texts |= {
            stage: functools.partial(_regenerated, again, stage) for stage in _stages(entry.passes, entry.prepare is not None)
        }
        return _Made(program, entry.prepare, entry.prepare_key, texts, entry.passes, _doubtful(self.graph), from_cache=True)

    def _stored(self, made: _Made) -> None:
        if self.cache is None or self.key is None:
            return
        entry = Compiled(run=made.program.base, prepare=made.prepare, prepare_key=made.prepare_key, passes=made.passes)
        if self.cache.put(self.key, entry):
            self.cache.keep(_about(self.key), json.dumps(made.program.described()).encode())

    def __call__(self, sizes: Mapping[str, int]) -> Compiled:
        """The program for these sizes. Raises InputError where an op of the model refuses them."""
        made = self.make()
        start = time.perf_counter()
        for node in made.doubtful:
            try:
                types = [i.tensor.with_sizes(sizes) for i in node.inputs]
                node.op.infer(types, {k: substitute_sizes(v, sizes) for k, v in node.attrs.items()})
            except ShapeError as error:
                given = ", ".join(f"{k} = {v}" for k, v in sorted(sizes.items()))
                raise InputError(f"{self.graph.name} does not allow {given}: {error}") from None
        run = made.program.at(sizes)
        return Compiled(
            run=run,
            prepare=made.prepare,
            prepare_key=made.prepare_key,
            texts=made.texts,
            passes=made.passes,
            seconds=time.perf_counter() - start,
            from_cache=made.from_cache,
        )

    def _compiled(self) -> _Made:
        check_forms(self.graph)
        ctx = Context(target=self.target, preferred_panel=generic_panel, memory_model=Footprint(self.target, self.count))
        passes = tuple(p for p in pipeline.inference(self.target, "f32", False) if p.name not in _OF_SIZES)
        passes = tuple(replace(p, borders=False) if isinstance(p, Fuse) else p for p in passes)
        check = self.now.verify or self.now.validate
        final = run_pipeline(self.graph, passes, ctx, Hooks(verify=check))
        first, run = split(final) if self.bound else (None, final)
        program = generate_generic(run, self.target, name="main", verify=check)
        prepare = None
        if first is not None:
            if any(o.tensor.symbols for o in first.outputs):
                raise CompileError(f"{self.graph.name}: what weights alone determine has sizes that only a call knows")
            prepare = generate(first, self.target, name="prepare", threads=self.count, checked=self.now.checked, verify=check)
        texts: dict[str, Text] = {"graph": str(self.graph)}
        records = tuple(PassRecord(r.name, r.kind, r.nodes_before, r.nodes_after, r.ms, r.changed) for r in ctx.results)
        for stage, r in zip(_stages(records, False), ctx.results, strict=False):
            texts[stage] = functools.partial(str, r.after)
        if first is not None:
            texts["prepare"] = functools.partial(str, first)
        texts |= {stage: functools.partial(program.texts.__getitem__, stage) for stage in _CODE}
        key = "" if first is None else first.fingerprint()
        return _Made(program, prepare, key, texts, records, _doubtful(self.graph))


def _doubtful(graph: Graph) -> tuple[Node, ...]:
    """The nodes of which it depends on sizes whether they are allowed, one for each op, attributes and types of operands."""
    found: dict[tuple[object, ...], Node] = {}
    for node in graph.nodes():
        if not node.inputs or node.op.has(Trait.STRUCTURAL) or not any(i.tensor.symbols for i in node.inputs):
            continue
        form = node.op.lower(node)
        if not (isinstance(form, Map) and form.elementwise):
            found.setdefault((node.op.name, tuple(node.attrs.items()), tuple(i.type for i in node.inputs)), node)
    return tuple(found.values())


def _stages(passes: Sequence[PassRecord], prepare: bool) -> list[str]:
    """The names of texts after the graph's: a pass that comes again gets a number."""
    names: list[str] = []
    for p in passes:
        count = sum(n.split(".")[0] == p.name for n in names)
        names.append(p.name if not count else f"{p.name}.{count + 1}")
    return [*names, *(["prepare"] if prepare else []), *_CODE]


def _regenerated(again: Callable[[], Mapping[str, Text]], stage: str) -> str:
    text = again()[stage]
    return text if isinstance(text, str) else text()


def _about(key: Key) -> str:
    return f"sizes of {key.digest()}"


__all__ = ["GenericCompiler"]
