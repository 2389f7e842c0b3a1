"""What a CUDA program should take of a device, without one: registers, occupancy, memory accesses, a roofline's time.

All of it is estimated, and nothing of it measured: counts come from the loop IR (codegen/cuda/accesses.py), registers from ptxas
where it is installed, else from the values that the PTX keeps at once. A kernel's time is what its arithmetic takes at the peak
of the multiprocessors that its blocks can fill, or what its bytes, each once, take at the bandwidth of memory, whichever is
longer. It leaves out latency, launches, and whatever keeps a kernel from the peak: real kernels take longer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..codegen.cuda.accesses import Counts, count
from ..codegen.cuda.machine import limits, sm_of
from ..codegen.loop_parse import parse_kernel
from ..ir.cuda_program import Branch, CudaKernel, CudaProgram, Loop, Node, Step, While
from ..runtime.cuda import tools


@dataclass(frozen=True)
class Reference:
    """A device of an SM: peak operations per second by arithmetic (a multiply-add counts two), bytes per second of its memory,
    and where NVIDIA says so. Tensor cores dense, without structured sparsity."""

    name: str
    peaks: dict[str, float]
    bandwidth: float
    source: str


_T: Final = 1e12
REFERENCES: Final[dict[int, Reference]] = {
    75: Reference(
        "T4",
        {"f32": 8.1 * _T, "f64": 8.1 / 32 * _T, "f16": 65 * _T, "i8": 130 * _T},
        320e9,
        "NVIDIA Turing GPU Architecture (WP-09183), and the T4 datasheet; f64 is a 32nd of f32",
    ),
    80: Reference(
        "A100 SXM4 40 GB",
        {"f32": 19.5 * _T, "f64": 9.7 * _T, "tf32": 156 * _T, "bf16": 312 * _T, "f16": 312 * _T, "i8": 624 * _T},
        1555e9,
        "NVIDIA A100 Tensor Core GPU Architecture, table of A100's data",
    ),
    90: Reference(
        "H100 SXM5 80 GB",
        {"f32": 66.9 * _T, "f64": 33.5 * _T, "tf32": 494.7 * _T, "bf16": 989.4 * _T, "f16": 989.4 * _T, "i8": 1978.9 * _T},
        3352e9,
        "NVIDIA H100 Tensor Core GPU Architecture, table of H100's data",
    ),
}


@dataclass(frozen=True)
class KernelEstimate:
    """One kernel. `launches` per run; figures of one launch. Ratios are None where there is nothing to divide.

    occupancy            threads resident over the most that can be, and what limits them (`limited_by`)
    waves                blocks over those that the reference device has resident at once: below 1, some of it stands idle
    bank_conflicts       cycles over the least that its accesses to shared memory take: 1 is none
    sectors_per_request  of 32 bytes, for an access of a warp to global memory
    sector_use           bytes asked for over bytes of these sectors: above 1 where lanes ask for the same ones
    scattered            requests whose addresses depend on data: counted as a sector for each lane
    exact                every warp and pass was looked at, and nothing depended on data
    microseconds         the roofline's time, set by `bound`: memory, or an arithmetic
    """

    name: str
    launches: int
    grid: tuple[int, int, int]
    threads: int
    registers: int
    shared: int
    occupancy: float
    limited_by: str
    waves: float
    bank_conflicts: float | None
    sectors_per_request: float | None
    sector_use: float | None
    scattered: float
    exact: bool
    flops: float
    bytes: float
    microseconds: float
    bound: str
    note: str


@dataclass(frozen=True)
class Estimate:
    """Estimates of a program's kernels in the order of the plan. Nothing in it was measured. `print()` shows it."""

    name: str
    target: str
    reference: Reference
    registers_from: str
    kernels: tuple[KernelEstimate, ...]

    @property
    def microseconds(self) -> float:
        """The sum over all launches of a run; a loop that depends on data counts once, a branch on both sides."""
        return sum(k.launches * k.microseconds for k in self.kernels)

    @property
    def launches(self) -> int:
        return sum(k.launches for k in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        return {"estimated": True, "microseconds": self.microseconds, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> Any:
        """A rich Table; its title and caption say that these are estimates, and of what."""
        from rich.table import Table

        r = self.reference
        found = Table(
            title=f"ESTIMATES for {self.name} on {self.target}: {self.microseconds:.4g} us in {self.launches} launches by the "
            f"roofline of NVIDIA's {r.name}; nothing was measured",
            caption=f"registers: {self.registers_from}; accesses: from the index expressions of the loop IR, ~ where warps or "
            f"passes were sampled or an address depends on data; peaks: {r.source}: f32 {r.peaks['f32'] / 1e12:g} TFLOP/s, "
            f"{r.bandwidth / 1e9:g} GB/s. A device takes longer",
            title_justify="left",
            caption_justify="left",
        )
        columns = (
            *(
                "kernel",
                "launches",
                "grid x threads",
                "regs",
                "shared",
                "occupancy",
                "by",
                "waves",
                "bank conflicts",
                "sectors/request",
            ),
            *("sector use", "us", "bound by"),
        )
        for c in columns:
            found.add_column(c, justify="left" if c in ("kernel", "by", "bound by") else "right", overflow="fold")
        for k in self.kernels:
            about = "" if k.exact else "~"
            found.add_row(
                k.name,
                str(k.launches),
                f"{'x'.join(str(n) for n in k.grid)} x {k.threads}",
                str(k.registers),
                f"{k.shared:,}" if k.shared else "-",
                f"{k.occupancy:.0%}",
                k.limited_by,
                f"{k.waves:.2g}" if k.waves < 100 else f"{k.waves:.0f}",
                "-" if k.bank_conflicts is None else f"{about}{k.bank_conflicts:.2f}x",
                "-" if k.sectors_per_request is None else f"{about}{k.sectors_per_request:.1f}",
                "-" if k.sector_use is None else f"{about}{k.sector_use:.0%}",
                f"{k.microseconds:.3g}",
                k.bound,
            )
        return found

    def print(self) -> None:
        """Shows the table in the terminal."""
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=180)).print(self.table())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=180, file=io.StringIO())
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO


def estimate(program: CudaProgram, name: str = "") -> Estimate:
    """The estimates of a program for its target's SM; `name` is the model's. Raises CompileError for a target that has no row."""
    sm = program.target.sm
    registers, source = _registers(program)
    times: dict[str, int] = {}
    notes: dict[str, str] = {}
    _add(program.plan, 1, times, program, notes)
    kernels = [
        _kernel(program, k, times[k.name], registers.get(k.name, 0), notes.get(k.name, ""))
        for k in program.kernels
        if k.name in times
    ]
    order = {name: n for n, name in enumerate(times)}
    kernels.sort(key=lambda k: order[k.name])
    return Estimate(name or program.name, program.target.name, REFERENCES[sm], source, tuple(kernels))


def _registers(program: CudaProgram) -> tuple[dict[str, int], str]:
    """The registers of a thread of each kernel, and whose word that is."""
    if not program.kernels:
        return {}, "no kernels"
    if tools.find("ptxas") is not None:
        made = tools.assemble(program.ptx, program.target.sm)
        if made.registers:
            return made.registers, "by ptxas"
    from ..runtime.cuda.liveness import live_values

    return live_values(program.ptx), "values alive at once in the PTX (no ptxas is installed, which may need some more or fewer)"


def _add(nodes: Sequence[Node], times: int, found: dict[str, int], program: CudaProgram, notes: dict[str, str]) -> None:
    """How often each kernel is launched; recursion is as deep as loops are nested."""
    for n in nodes:
        match n:
            case Step():
                found[n.kernel] = found.get(n.kernel, 0) + times
                if 0 <= n.info < len(program.infos):
                    notes.setdefault(n.kernel, program.infos[n.info].note)
            case Loop():
                _add(n.nodes, times * n.count, found, program, notes)
            case Branch():
                _add((*n.then, *n.orelse), times, found, program, notes)
            case While():
                _add((*n.test, *n.nodes, *n.test), times, found, program, notes)


def _kernel(program: CudaProgram, k: CudaKernel, launches: int, registers: int, note: str) -> KernelEstimate:
    c: Counts = count(parse_kernel(k.source))
    threads, blocks = k.block[0] * k.block[1] * k.block[2], k.grid[0] * k.grid[1] * k.grid[2]
    sm, reference = sm_of(program.target), REFERENCES[program.target.sm]
    resident, occupancy, limited = limits(program.target, threads, registers, k.shared + k.dynamic_shared)
    share = min(1.0, blocks / sm.multiprocessors)
    peaks = reference.peaks
    arithmetic = {kind: n / (peaks.get(kind, peaks["f32"]) * share) for kind, n in c.flops.items()}
    nbytes = sum(min(float(p.nbytes), c.touched.get(p.name, 0.0)) for p in k.parameters)
    seconds = {"memory": nbytes / reference.bandwidth, **arithmetic}
    bound = max(seconds, key=lambda x: seconds[x])
    return KernelEstimate(
        name=k.name,
        launches=launches,
        grid=k.grid,
        threads=threads,
        registers=registers,
        shared=k.shared + k.dynamic_shared,
        occupancy=occupancy,
        limited_by=limited,
        waves=blocks / (max(resident, 1) * sm.multiprocessors),
        bank_conflicts=c.shared_cycles / c.shared_phases if c.shared_phases else None,
        sectors_per_request=c.sectors / c.requests if c.requests else None,
        sector_use=c.bytes / (32 * c.sectors) if c.sectors else None,
        scattered=c.scattered,
        exact=c.exact,
        flops=sum(c.flops.values()),
        bytes=nbytes,
        microseconds=seconds[bound] * 1e6,
        bound=bound if bound == "memory" else f"{bound} arithmetic",
        note=note,
    )


__all__ = ["REFERENCES", "Estimate", "KernelEstimate", "Reference", "estimate"]
