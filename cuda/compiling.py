"""Compiling for CUDA targets: the same passes, less those for processors, and programs of PTX on a device.

target="cuda-sm_80"      code for that SM; runs on the machine's GPU where it has one
target="cuda"            code for the machine's GPU
target="cuda-emulator"   code for sm_80 on the PTX interpreter: slow, checked, needs no GPU
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..compiler import cache_of, compiler_digest
from ..ir.collector import no_collection
from ..ir.cuda_program import CudaProgram
from ..ir.errors import CompileError, InputError
from ..ir.graph import Graph
from ..ir.graphs import specialize
from ..ir.target import CUDA_ROWS, Target, row
from ..runtime.cache import Key
from ..runtime.compiled import Compiled, Text
from ..runtime.executable import Executable
from ..settings import Flags
from ..stages import dump_code, dump_folder, record_of, regenerated, stage_names, stage_texts

if TYPE_CHECKING:
    from ..runtime.cuda.device import Device
    from ..runtime.cuda.executable import CudaExecutable
    from .estimate import Estimate

EMULATOR: Final = "cuda-emulator"
STAGES: Final = ("loops", "llvm", "ptx", "sass")


def build_cuda(
    graph: Graph,
    parameters: Mapping[str, Any],
    target: str | Target,
    purpose: str,
    now: Flags,
    precision: str,
    *,
    flatten: Callable[[Sequence[Any]], Sequence[Any]] | None,
    unflatten: Callable[[Sequence[Any]], Any] | None,
    shares: Executable | None,
    refuse: Sequence[str] = (),
) -> Executable:
    """The Executable of a graph for a CUDA target, by the pipeline for `purpose` and `precision` ('f32', 'bf16' or 'tf32').

    Its texts can be read without a device; only a call opens one. `refuse` are options that CUDA targets do not have.
    Raises InputError for these, CompileError for the target or the graph, RuntimeUnavailableError for 'cuda' without a GPU.
    """
    from ..runtime.cuda.executable import CudaExecutable

    if refuse:
        raise InputError(f"a CUDA target takes no {', '.join(refuse)}: leave it out, or compile for a processor")
    names = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] in ("parameter", "state")]
    missing = sorted(set(names) - parameters.keys())
    if parameters and missing:
        raise CompileError(f"{graph.name}: no value for the parameters {missing[:5]}; give all of them, or none")
    chosen, device = resolve(target)
    compiler = CudaCompiler(graph, purpose, chosen, bool(parameters), now, precision)
    return CudaExecutable(
        *(graph, compiler, parameters),
        device=device,
        estimate=_estimate,
        export=functools.partial(_export, compiler),
        save=_save,
        flatten=flatten,
        unflatten=unflatten,
        shares=shares,
    )


def _estimate(program: CudaProgram, name: str) -> Estimate:
    from .estimate import estimate

    return estimate(program, name)


def _export(compiler: CudaCompiler, exe: CudaExecutable, folder: Path, sms: Sequence[int]) -> None:
    from .export import export

    export(compiler, exe, folder, sms)


def _save(exe: Executable, path: str | Path) -> None:
    from .. import __version__
    from ..runtime import artifact

    artifact.save(path, exe.graph, exe.parameters, {"tensorwright": __version__})


def resolve(target: str | Target) -> tuple[Target, Callable[[], Device]]:
    """The row that code is made for, and what opens the device that runs it.

    Raises CompileError for an unknown name, or a device older than any row; RuntimeUnavailableError for 'cuda' without a GPU.
    """
    name = target.name if isinstance(target, Target) else target
    if name == EMULATOR:
        return row("cuda-sm_80"), functools.partial(_opened, name)
    if name != "cuda":
        chosen = target if isinstance(target, Target) else row(name)
        return chosen, functools.partial(_opened, name)
    device = _opened(name)
    rows = [t for t in CUDA_ROWS.values() if t.sm <= device.sm]
    if not rows:
        oldest = min(CUDA_ROWS.values(), key=lambda t: t.sm)
        raise CompileError(f"{device.name} is an sm_{device.sm}; code is generated for sm_{oldest.sm} and newer")
    return max(rows, key=lambda t: t.sm), lambda: device


def _opened(name: str) -> Device:
    from ..runtime.cuda.devices import open_device

    return open_device(name)


@dataclass(frozen=True, eq=False)
class CudaCompiler:
    """Compiles one graph for any sizes; what an Executable calls."""

    graph: Graph
    purpose: str
    target: Target
    bound: bool
    now: Flags
    precision: str

    def __call__(self, sizes: Mapping[str, int]) -> Compiled:
        """The program for these sizes, from the cache or made now."""
        start = time.perf_counter()
        cache = cache_of(self.now)
        key = None if cache is None else self.key(sizes)
        look = cache is not None and not self.now.validate and not self.now.dump
        found = cache.get(key) if look and cache is not None and key is not None else None
        if found is None:
            with no_collection():
                found = self._compiled(sizes)
            if cache is not None and key is not None:
                cache.put(key, found)
            return replace(found, seconds=time.perf_counter() - start)
        again = functools.cache(lambda: self._compiled(sizes).texts)
        names = [*stage_names([p.name for p in found.passes]), *(["prepare"] if found.prepare else []), "llvm"]
        texts: dict[str, Text] = {"graph": lambda: str(specialize(self.graph, sizes))}
        texts |= {n: functools.partial(regenerated, again, n) for n in names}
        programs: tuple[Any, Any] = (found.run, found.prepare)
        texts |= {n: functools.partial(text_of, n, *programs) for n in STAGES if n != "llvm"}
        order = [n for n in (*texts, *STAGES) if n not in STAGES] + list(STAGES)
        return replace(found, texts={n: texts[n] for n in order}, seconds=time.perf_counter() - start)

    def key(self, sizes: Mapping[str, int]) -> Key:
        """All that decides the PTX for these sizes."""
        from ..runtime.native import llvm_version

        options: list[tuple[str, str | int | bool | None]] = [
            ("purpose", self.purpose), ("bound", self.bound), ("precision", self.precision),
        ]  # fmt: skip
        options += self.now.code_flags()
        options += [(f"size {n}", size) for n, size in sorted(sizes.items())]
        return Key(self.graph.fingerprint(), self.target, tuple(options), compiler_digest(), llvm_version())

    def _compiled(self, sizes: Mapping[str, int]) -> Compiled:
        from ..codegen.cuda.generate import generate
        from ..passes import pipeline
        from ..passes.contract import Context
        from ..passes.manager import Hooks, run_pipeline
        from ..passes.prepare import split

        graph = specialize(self.graph, sizes)
        folder = dump_folder(self.now, self.graph, sizes)
        check: Callable[..., None] | None = None
        if self.now.validate:
            from ..passes.validate import Validator

            check = Validator()
        verify = self.now.verify or self.now.validate
        ctx = Context(target=self.target)
        passes = pipeline.cuda(getattr(pipeline, self.purpose)(self.target, self.precision, False))
        final = run_pipeline(graph, passes, ctx, Hooks(dump=folder, verify=verify, validate=check))
        first, run = split(final) if self.bound else (None, final)
        if self.now.validate:
            from ..passes.validate import validate_split

            validate_split(final, first, run)
        made = functools.partial(generate, target=self.target, verify=verify, loops=self.now.cuda_loops)
        program = made(run, name="main")
        prepare = None if first is None else made(first, name="prepare")
        texts = stage_texts(graph, ctx.results, first)
        texts |= {stage: functools.partial(text_of, stage, program, prepare) for stage in STAGES}
        dump_code(folder, texts, STAGES[:-1], len(ctx.results))  # SASS needs tools that may not be there
        key = "" if first is None else first.fingerprint()
        records = tuple(record_of(r) for r in ctx.results)
        # what an Executable asks of a Program, a CudaProgram has as well; CudaBinding runs it
        pair: tuple[Any, Any] = (program, prepare)
        return Compiled(run=pair[0], prepare=pair[1], prepare_key=key, texts=texts, passes=records)


def text_of(stage: str, run: CudaProgram, prepare: CudaProgram | None) -> str:
    """The text of a program at one of STAGES. SASS raises RuntimeUnavailableError where NVIDIA's tools are missing."""

    def one(program: CudaProgram) -> str:
        if stage != "sass":
            return program.texts[stage]
        from ..runtime.cuda.tools import sass

        return sass(program.ptx, program.target.sm) if program.kernels else ""

    if prepare is None:
        return one(run)
    mark = {"loops": "# ", "llvm": "; "}.get(stage, "// ")
    return f"{mark}---- prepare: once per set of weights\n{one(prepare)}\n{mark}---- run\n{one(run)}"


__all__ = ["CudaCompiler", "build_cuda", "resolve", "text_of"]
