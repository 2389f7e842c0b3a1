"""Compiling for CUDA targets: the same passes, less those for processors, and programs of PTX on a device.

target="cuda-sm_80"      code for that SM; runs on the machine's GPU where it has one
target="cuda"            code for the machine's GPU
target="cuda-emulator"   code for sm_80 on the PTX interpreter: slow, checked, needs no GPU
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .ir.collector import no_collection
from .ir.cuda_program import CudaProgram
from .ir.errors import CompileError, InputError
from .ir.graph import Graph
from .ir.graphs import specialize
from .ir.target import CUDA_ROWS, Target, row
from .runtime.compiled import Compiled, Text
from .runtime.executable import Executable
from .settings import Flags

if TYPE_CHECKING:
    from .runtime.cuda.device import Device

EMULATOR: Final = "cuda-emulator"
STAGES: Final = ("loops", "llvm", "ptx")


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
    """The Executable of a graph for a CUDA target, by the pipeline for `purpose` and `precision` ('f32' or 'bf16').

    Its texts can be read without a device; only a call opens one. `refuse` are options that CUDA targets do not have.
    Raises InputError for these, CompileError for the target or the graph, RuntimeUnavailableError for 'cuda' without a GPU.
    """
    from .runtime.cuda.executable import CudaExecutable

    if refuse:
        raise InputError(f"a CUDA target takes no {', '.join(refuse)}: leave it out, or compile for a processor")
    names = [str(i.attrs["name"]) for i in graph.inputs if i.attrs["role"] in ("parameter", "state")]
    missing = sorted(set(names) - parameters.keys())
    if parameters and missing:
        raise CompileError(f"{graph.name}: no value for the parameters {missing[:5]}; give all of them, or none")
    chosen, device = resolve(target)
    compiler = _Compiler(graph, purpose, chosen, bool(parameters), now, precision)
    return CudaExecutable(graph, compiler, parameters, device=device, flatten=flatten, unflatten=unflatten, shares=shares)


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
    from .runtime.cuda.devices import open_device

    return open_device(name)


@dataclass(frozen=True, eq=False)
class _Compiler:
    """Compiles one graph for any sizes; what an Executable calls."""

    graph: Graph
    purpose: str
    target: Target
    bound: bool
    now: Flags
    precision: str

    def __call__(self, sizes: Mapping[str, int]) -> Compiled:
        start = time.perf_counter()
        with no_collection():
            found = self._compiled(sizes)
        return Compiled(
            run=found.run, prepare=found.prepare, prepare_key=found.prepare_key, texts=found.texts, passes=found.passes,
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _compiled(self, sizes: Mapping[str, int]) -> Compiled:
        from .codegen.cuda.generate import generate
        from .driver import record_of, stage_names
        from .passes import pipeline
        from .passes.contract import Context
        from .passes.manager import Hooks, run_pipeline
        from .passes.prepare import split

        graph = specialize(self.graph, sizes)
        check: Callable[..., None] | None = None
        if self.now.validate:
            from .passes.validate import Validator

            check = Validator()
        verify = self.now.verify or self.now.validate
        ctx = Context(target=self.target)
        passes = pipeline.cuda(getattr(pipeline, self.purpose)(self.target, self.precision, False))
        final = run_pipeline(graph, passes, ctx, Hooks(verify=verify, validate=check))
        first, run = split(final) if self.bound else (None, final)
        program = generate(run, self.target, name="main", verify=verify)
        prepare = None if first is None else generate(first, self.target, name="prepare", verify=verify)
        texts: dict[str, Text] = {"graph": functools.partial(str, graph)}
        for stage, result in zip(stage_names([r.name for r in ctx.results]), ctx.results, strict=True):
            texts[stage] = functools.partial(str, result.after)
        if first is not None:
            texts["prepare"] = functools.partial(str, first)
        for stage in STAGES:
            texts[stage] = functools.partial(_text, stage, program, prepare)
        key = "" if first is None else first.fingerprint()
        records = tuple(record_of(r) for r in ctx.results)
        # what an Executable asks of a Program, a CudaProgram has as well; CudaBinding runs it
        pair: tuple[Any, Any] = (program, prepare)
        return Compiled(run=pair[0], prepare=pair[1], prepare_key=key, texts=texts, passes=records)


def _text(stage: str, run: CudaProgram, prepare: CudaProgram | None) -> str:
    if prepare is None:
        return run.texts[stage]
    mark = {"loops": "# ", "llvm": "; ", "ptx": "// "}[stage]
    return f"{mark}---- prepare: once per set of weights\n{prepare.texts[stage]}\n{mark}---- run\n{run.texts[stage]}"


__all__ = ["build_cuda"]
