"""ptxas of the wheel nvidia-cuda-nvcc (the `test` extra): what it says of a module."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

WHEEL = "nvidia-cuda-nvcc"
_KERNEL = re.compile(r"Compiling entry function '([\w$]+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Assembled:
    """Registers, stack bytes and spilled bytes of each kernel, and what is wrong."""

    registers: dict[str, int]
    stack: dict[str, int]
    wrong: list[str]


@cache
def ptxas() -> Path:
    """The binary in the installed wheel. It is never skipped: without the wheel the test fails."""
    found = [f for f in distribution(WHEEL).files or () if f.name == "ptxas"]
    assert found, f"{WHEEL} is installed, but has no ptxas in it"
    return Path(str(found[0].locate()))


def assemble(ptx: str, sm: int) -> Assembled:
    """Runs `ptxas -v --warn-on-spills -Werror` on a module's text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "module.ptx"
        source.write_text(ptx, encoding="utf-8")
        options = ["-v", "--warn-on-spills", "-Werror", f"-arch=sm_{sm}", str(source), "-o", str(Path(folder) / "module.cubin")]
        done = subprocess.run([str(ptxas()), *options], capture_output=True, text=True, check=False)
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
    return Assembled(registers, stack, wrong)
