"""One-instruction mutants of five kernels, and how many of them the interpreter kills: `python -m tests.cuda.mutants`.

A mutant differs from nvcc's PTX (nvcc/kernels.ptx) in one instruction: it is dropped, does something similar, has another
constant, other operands, or another guard. It is killed if running it with all checks on gives a fault, PTX that is refused, or
a wrong result. Some mutants are equivalent to the original (a dropped barrier between two barriers): none can kill those.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tensorwright.ir.errors import DeviceError, LaunchError, PtxError
from tensorwright.runtime.cuda.ptx_parse import parse_ptx
from tensorwright.runtime.cuda.state import Options

from .ptx_support import Out, run

PTX = (Path(__file__).parent / "nvcc" / "kernels.ptx").read_text()
SIMILAR = {
    "add": ["sub"], "sub": ["add"], "mul": ["add"], "shl": ["shr"], "shr": ["shl"], "and": ["or", "xor"], "or": ["and", "xor"],
    "xor": ["or", "and"], "max": ["min"], "min": ["max"],
    "lt": ["le", "gt"], "le": ["lt"], "ge": ["gt", "lt"], "gt": ["ge"],
    "eq": ["ne"], "ne": ["eq"], "bfly": ["down"], "lo": ["hi"],
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A kernel on small ragged data: `go` runs it from PTX and says whether the result is right."""

    name: str
    go: Callable[[str], bool]


CHECKS = [True]


def _options() -> Options:
    return Options(budget=30_000, check=CHECKS[0])


def _close(got: Any, wanted: Any, limit: float) -> bool:
    with np.errstate(all="ignore"):
        return bool((np.abs(got - wanted) <= limit).all())


def _subjects() -> list[Subject]:
    r = np.random.default_rng(7)
    x, y = r.standard_normal((2, 150), np.float32)
    a, b = r.standard_normal((18, 21), np.float32), r.standard_normal((21, 19), np.float32)
    all_rows = [r.standard_normal((2, n), np.float32) * 3 for n in (300, 50)]
    bytes_ = r.integers(0, 256, 700).astype(np.uint8)
    p, q = (r.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((32, 96), (16, 96)))

    def saxpy(ptx: str) -> bool:
        right = True
        for n in (150, 70):
            got, _ = run(ptx, "saxpy", (2,), (50,), [n, 2.5, x[:n], y[:n]], options=_options())
            right = right and _close(got[1], np.float64(2.5) * x[:n] + y[:n], 1e-5) and bool((got[0] == x[:n]).all())
        return right

    def sgemm(ptx: str) -> bool:
        args = [a, b, Out((18, 19)), 18, 19, 21]
        got, _ = run(ptx, "sgemm", (2, 2), (16, 16), args, options=_options(), extents=True)
        return _close(got[2], a.astype("f8") @ b, 1e-4)

    def softmax(ptx: str) -> bool:
        right = True
        for rows in all_rows:
            n = rows.shape[1]
            got, _ = run(ptx, "softmax", (2,), (160,), [rows, Out((2, n)), n], shared=20, options=_options(), extents=True)
            e = np.exp(rows.astype("f8") - rows.max(1, keepdims=True))
            right = right and _close(got[1], e / e.sum(1, keepdims=True), 1e-5)
        return right

    def histogram(ptx: str) -> bool:
        right = True
        for data in (bytes_, bytes_[:100]):
            args = [data, len(data), np.zeros(257, np.uint32), np.full(50, -1, np.int32)]
            got, _ = run(ptx, "histogram", (2,), (64,), args, options=_options())
            places = sorted(got[2][got[2] >= 0]) == np.flatnonzero(data == 255).tolist()
            counts = np.bincount(data, minlength=256)
            right = right and places and bool((got[1][:256] == counts).all()) and bool((got[0] == data).all())
        return right

    def gemm(ptx: str) -> bool:
        args = [p.view(np.uint16), q.view(np.uint16), Out((32, 16)), 32, 16, 96]
        got, _ = run(ptx, "gemm_bf16", (2, 2), (32,), args, options=_options(), extents=True)
        return _close(got[2], p.astype("f8") @ q.astype("f8").T, 1e-3)

    return [Subject(f.__name__, f) for f in (saxpy, sgemm, softmax, histogram)] + [Subject("gemm_bf16", gemm)]


@functools.cache
def alone(kernel: str) -> str:
    """The module with one of its kernels only."""
    head, *kernels = re.split(r"(?=\.visible \.entry )", PTX.split(".file\t")[0])
    return head + next(k for k in kernels if k.startswith(f".visible .entry {kernel}("))


def mutate(kernel: str, rng: random.Random) -> tuple[str, str]:
    """(PTX of a mutant, what was done to it)."""
    text = alone(kernel)
    lines = text.splitlines()
    places = sorted({i.line - 1 for i in parse_ptx(text).kernels[kernel].code})
    registers: dict[str, list[str]] = {}
    while True:
        at = rng.choice(places)
        old = lines[at]
        new, how = _mutated(old, rng, registers, lines, places)
        if new is not None and new.split() != old.split():
            lines = [*lines[:at], new, *lines[at + 1 :]]
            return "\n".join(lines), f"line {at + 1}: {how}: {' '.join(old.split())} -> {' '.join(new.split()) or '(nothing)'}"


def _mutated(
    old: str, rng: random.Random, registers: dict[str, list[str]], lines: list[str], places: list[int]
) -> tuple[str | None, str]:
    if not registers:
        for k in places:
            for r in re.findall(r"%(?:r|f|rd|p)\d+\b", lines[k]):
                registers.setdefault(re.sub(r"\d", "", r), []).append(r)
    m = re.match(r"(\s*(?:@!?%p\d+\s+)?)([\w.:]+)(\s*)(.*);", old)
    if m is None:
        return None, ""
    before, opcode, space, operands = m.groups()
    kind = rng.choice(["drop", "opcode", "constant", "register", "swap", "guard"])
    if kind == "drop":
        return "", kind
    if kind == "opcode":
        parts = opcode.split(".")
        choices = [(k, s) for k, p in enumerate(parts) for s in SIMILAR.get(p, [])]
        if not choices:
            return None, ""
        k, s = rng.choice(choices)
        return f"{before}{'.'.join([*parts[:k], s, *parts[k + 1 :]])}{space}{operands};", kind
    if kind == "constant":
        found = [c for c in re.finditer(r"(?<![\w%$])\d+(?!\w)", operands) if "$" not in operands]
        if not found:
            return None, ""
        c = rng.choice(found)
        value = int(c[0]) + rng.choice([1, -1, 4]) if int(c[0]) else rng.choice([1, 4])
        return f"{before}{opcode}{space}{operands[: c.start()]}{value}{operands[c.end() :]};", kind
    if kind == "register":
        found = list(re.finditer(r"%(?:r|f|rd|p)\d+\b", operands))
        if not found:
            return None, ""
        c = rng.choice(found)
        other = rng.choice(sorted(set(registers[re.sub(r"\d", "", c[0])])))
        return f"{before}{opcode}{space}{operands[: c.start()]}{other}{operands[c.end() :]};", kind
    if kind == "swap":
        items = operands.split(", ")
        if (
            len(items) < 3
            or "{" in operands
            or opcode.split(".")[0] in ("add", "mul", "and", "or", "xor", "min", "max", "mad", "fma")
        ):
            return None, ""
        items[-1], items[-2] = items[-2], items[-1]
        return f"{before}{opcode}{space}{', '.join(items)};", kind
    if "@!" in before:
        return old.replace("@!", "@"), kind
    return (old.replace("@", "@!") if "@" in before else None), kind


def judge(subject: Subject, ptx: str) -> str:
    """How a mutant dies: the kind of its fault, `refused`, `wrong result`; empty where it survives."""
    try:
        return "" if subject.go(ptx) else "wrong result"
    except PtxError:
        return "refused"
    except LaunchError as error:
        return getattr(error, "kind", "launch")
    except DeviceError:
        return "unwritten result"


def campaign(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how `count` mutants died, those that survived). The same seed gives the same mutants."""
    rng = random.Random(seed)
    subjects = _subjects()
    deaths: Counter[str] = Counter()
    alive = []
    for k in range(count):
        subject = subjects[k % len(subjects)]
        ptx, what = mutate(subject.name, rng)
        found = judge(subject, ptx)
        deaths[found or "survived"] += 1
        if not found:
            alive.append(f"{subject.name} {what}")
    return deaths, alive


def main() -> None:
    """Prints the table of deaths and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-checks", action="store_true", help="by results and crashes alone")
    args = parser.parse_args()
    CHECKS[0] = not args.no_checks
    deaths, alive = campaign(args.count, args.seed)
    for how, n in deaths.most_common():
        print(f"{n:4}  {how}")
    print(f"killed {args.count - len(alive)} of {args.count}: {100 * (1 - len(alive) / args.count):.1f}%")
    print(*alive, sep="\n")


if __name__ == "__main__":
    main()
