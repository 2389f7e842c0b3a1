"""NVIDIA's assembler and disassembler where they are installed: registers and spills of kernels, and their machine code (SASS).

Neither is needed to compile or run: a driver assembles PTX itself. They are looked for in the wheels `nvidia-cuda-nvcc` and
`nvidia-cuda-nvdisasm`, in CUDA_HOME and CUDA_PATH, on PATH, and in /usr/local/cuda.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from ...ir.errors import CompileError, RuntimeUnavailableError

WHEELS: Final = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
_KERNEL: Final = re.compile(r"Compiling entry function '([\w$]+)'")
_FRAME: Final = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED: Final = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Assembled:
    """What ptxas says of a module: registers, stack bytes of each kernel, what is wrong (spills and warnings too); the code."""

    registers: dict[str, int]
    stack: dict[str, int]
    wrong: list[str]
    cubin: bytes = b""


@functools.cache
def find(name: str) -> Path | None:
    """The program `ptxas` or `nvdisasm`; None where it is not installed."""
    try:
        found = [f for f in distribution(WHEELS[name]).files or () if f.name == name]
        if found:
            return Path(str(found[0].locate()))
    except PackageNotFoundError:
        pass  # looked for elsewhere
    homes = [os.environ.get(v, "") for v in ("CUDA_HOME", "CUDA_PATH")]
    for folder in [*(Path(h) / "bin" for h in homes if h), None, Path("/usr/local/cuda/bin")]:
        program = shutil.which(name, path=None if folder is None else str(folder))
        if program is not None:
            return Path(program)
    return None


def require(name: str) -> Path:
    """`find`. Raises RuntimeUnavailableError, saying what to install."""
    found = find(name)
    if found is None:
        raise RuntimeUnavailableError(
            f"{name} is not installed: pip install {WHEELS[name]}, or set CUDA_HOME to a CUDA toolkit that has bin/{name}"
        )
    return found


def assemble(ptx: str, sm: int) -> Assembled:
    """Runs `ptxas -v --warn-on-spills -Werror` on a module's text. Raises RuntimeUnavailableError without ptxas."""
    program = require("ptxas")
    with tempfile.TemporaryDirectory(prefix="tensorwright-ptxas-") as folder:
        source, to = Path(folder) / "module.ptx", Path(folder) / "module.cubin"
        source.write_text(ptx, encoding="utf-8")
        options = ["-v", "--warn-on-spills", "-Werror", f"-arch=sm_{sm}", str(source), "-o", str(to)]
        done = subprocess.run([str(program), *options], capture_output=True, text=True, check=False)
        cubin = to.read_bytes() if to.exists() else b""
    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    wrong: list[str] = []
    kernel = ""
    for line in (done.stderr + done.stdout).splitlines():
        if m := _KERNEL.search(line):
            kernel = m[1]
        elif m := _FRAME.search(line):
            stack[kernel] = int(m[1])
            if int(m[2]) or int(m[3]):
                wrong.append(f"{kernel} spills {m[2]} and loads {m[3]} bytes")
        elif m := _USED.search(line):
            registers[kernel] = int(m[1])
        elif "rror" in line or "arning" in line:
            wrong.append(line.strip())
    if done.returncode and not wrong:
        wrong.append(f"ptxas exits with {done.returncode}")
    return Assembled(registers, stack, wrong, cubin)


def sass(ptx: str, sm: int) -> str:
    """The machine code of a module as text. Raises RuntimeUnavailableError where a tool is missing, CompileError where ptxas
    refuses the module."""
    program = require("nvdisasm")
    made = assemble(ptx, sm)
    if not made.cubin:
        raise CompileError(f"ptxas refuses the module for sm_{sm}: {'; '.join(made.wrong[:3])}")
    with tempfile.TemporaryDirectory(prefix="tensorwright-sass-") as folder:
        cubin = Path(folder) / "module.cubin"
        cubin.write_bytes(made.cubin)
        done = subprocess.run([str(program), "-c", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"nvdisasm exits with {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout


__all__ = ["Assembled", "assemble", "find", "require", "sass"]
