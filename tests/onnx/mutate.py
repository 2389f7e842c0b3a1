"""A seeded mutator of ONNX files: bytes flipped, cut, repeated; and fields of the protobuf changed, dropped, exchanged.

    python tests/onnx/mutate.py [--count 5000] [--seed 0]

Each mutant is imported, compiled and run on random inputs in a child process, under limits of time and memory; anything but a
result or an error of ours is reported: a crash, more than 5 s, more than 1 GB. Models of large arrays are compiled, not
run; one that is made to loop for ever is stopped, which is no defect.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import backend

SECONDS = 5
MEMORY = 1 << 30
LARGE = 32 << 20  # bytes of one array of a model that is not run
PATIENCE = 60  # seconds that a child may take where it gets little of the processor
NUMBERS = (0, 1, -1, 2, 7, 63, 255, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63), -(1 << 40), 1000003)


@functools.cache
def seeds() -> list[bytes]:
    """Models to start from: a case of every op, and larger ones with bodies, functions and weights."""
    found: dict[str, bytes] = {}
    for case in backend.cases("node"):
        if case.op not in found and not backend.excluded(case.name):
            found[case.op] = case.model.SerializeToString()
    for case in backend.cases("pytorch-converted")[:12]:
        found[case.name] = case.model.SerializeToString()
    return [m for m in found.values() if len(m) < 200_000]


def mutant(rng: random.Random, models: list[bytes]) -> bytes:
    """One mutated model: one to four changes."""
    data = rng.choice(models)
    if rng.random() < 0.4:
        return _bytes(rng, data)
    import onnx

    proto = onnx.ModelProto()
    proto.ParseFromString(data)
    for _ in range(rng.randint(1, 4)):
        _field(rng, proto)
    data = bytes(proto.SerializeToString())
    return _bytes(rng, data) if rng.random() < 0.1 else data


def _bytes(rng: random.Random, data: bytes) -> bytes:
    b = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not b:
            break
        at = rng.randrange(len(b))
        kind = rng.randrange(5)
        if kind == 0:
            b[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            b[at] = rng.randrange(256)
        elif kind == 2:
            del b[at:]
        elif kind == 3:
            del b[at : at + rng.randint(1, 16)]
        else:
            b[at:at] = b[at : at + rng.randint(1, 32)]
    return bytes(b)


def _messages(proto: Any) -> list[Any]:
    found, stack = [], [proto]
    while stack:
        m = stack.pop()
        found.append(m)
        for field, value in m.ListFields():
            if field.message_type is not None:
                stack += [value] if hasattr(value, "ListFields") else list(value)
    return found


def _field(rng: random.Random, proto: Any) -> None:
    m = rng.choice(_messages(proto))
    fields = m.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    repeated = not isinstance(value, (int, float, str, bytes)) and not hasattr(value, "ListFields")
    kind = rng.randrange(6)
    if repeated and kind < 4:
        if kind == 0 and len(value):
            del value[rng.randrange(len(value))]
        elif kind == 1 and len(value):
            value.append(value[rng.randrange(len(value))])
        elif kind == 2 and len(value) and isinstance(value[0], int):
            value[rng.randrange(len(value))] = _in_range(rng, field)
        elif kind == 3 and len(value) > 1 and isinstance(value[0], (int, str)):
            a, b = rng.randrange(len(value)), rng.randrange(len(value))
            value[a], value[b] = value[b], value[a]
        return
    if kind == 4 or repeated:
        m.ClearField(field.name)
    elif isinstance(value, str):
        names = [v for x in _messages(proto) for _, v in x.ListFields() if isinstance(v, str)]
        setattr(m, field.name, rng.choice([*names, "", "x" * 300, "Loop", "\u2603"]))
    elif isinstance(value, bytes):
        setattr(m, field.name, value[: rng.randrange(len(value) + 1)] + bytes(rng.randrange(4)))
    elif isinstance(value, int):
        setattr(m, field.name, _in_range(rng, field))
    elif isinstance(value, float):
        setattr(m, field.name, rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf")]))


def _in_range(rng: random.Random, field: Any) -> int:
    n = rng.choice(NUMBERS) if rng.random() < 0.6 else rng.randrange(30)
    if field.enum_type is not None:
        return int(rng.choice(field.enum_type.values).number)
    if field.cpp_type in (field.CPPTYPE_INT32,):
        return max(min(n, (1 << 31) - 1), -(1 << 31))
    if field.cpp_type in (field.CPPTYPE_UINT64,):
        return abs(n) & ((1 << 64) - 1)
    return n


def outcome(data: bytes) -> str:
    """'graph', the name of our error, or what should not be: 'DEFECT ...'."""
    import tensorwright as tw

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        tw.onnx.load(data)
        return "graph"
    except tw.TensorwrightError as error:
        return type(error).__name__
    except TimeoutError:
        return f"DEFECT: longer than {SECONDS} s"
    except BaseException as error:
        return f"DEFECT {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def extremes(*ops: str) -> Iterator[bytes]:
    """Every integer attribute of a case of each op (or of these), and of the elements of lists the first and the last, made very
    large."""
    import onnx

    for data in seeds():
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
        nodes = [m for m in _messages(proto) if isinstance(m, onnx.NodeProto)]
        fields = [a for m in nodes if not ops or m.op_type in ops for a in m.attribute]
        for a in fields:
            for n in (100_000_000, 1 << 40, -(1 << 40), (1 << 63) - 1):
                if a.type == onnx.AttributeProto.INT:
                    old, a.i = a.i, n
                    yield proto.SerializeToString()
                    a.i = old
                for at in {0, len(a.ints) - 1} if a.ints else ():
                    old, a.ints[at] = a.ints[at], n
                    yield proto.SerializeToString()
                    a.ints[at] = old


def mutants(count: int, seed: int) -> Iterator[bytes]:
    models, rng = seeds(), random.Random(seed)
    for _ in range(count):
        yield mutant(rng, models)


# --- in a child process ---------------------------------------------------------------------------------------------


def _argument(v: Any, rng: np.random.Generator) -> Any:
    """A random array for an input; sizes that have a name are 2."""
    from tensorwright.frontend.onnx.types import dtype_of

    dtype = dtype_of(v.dtype, v.name).numpy
    shape = [d if isinstance(d, int) else 2 for d in (v.shape if v.shape is not None else (2,))]
    if any(d < 0 for d in shape) or int(np.prod([float(max(d, 1)) for d in shape])) * dtype.itemsize > LARGE:
        return None
    return rng.integers(0, 4, shape).astype(dtype)


def _large(graph: Any) -> bool:
    sizes = [t.size * t.dtype.itemsize for n in graph.nodes() for t in getattr(n.type, "items", (n.type,))]
    return any(isinstance(s, int) and s > LARGE for s in sizes)


def executed(data: bytes) -> str:
    """Imports, compiles and runs: 'ran', 'compiled' (too large to run), or the name of our error; other errors are raised."""
    import tensorwright as tw

    stage = "import"
    try:
        model = tw.onnx.Model(data)
        fixed = not model.unshaped()
        first = model.stage({}) if fixed else None
        stage = "compile"
        exe = tw.compile(model, cache=False)
        infos = {v.name: v for v in model.description.graph.inputs}
        stage = "run"
        given = [_argument(infos[n], np.random.default_rng(0)) for n in model.inputs]
        if any(g is None for g in given) or (first is not None and _large(first.graph)):
            return "compiled"
        exe(*given)
        return "ran"
    except tw.TensorwrightError as error:
        return f"{type(error).__name__} at {stage}"


def _read(stream: IO[bytes]) -> bytes | None:
    head = stream.read(4)
    return stream.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def serve() -> None:
    """Answers each model on stdin with what became of it."""
    import tensorwright as tw

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tw.compile(tw.trace(lambda x: tw.relu(x) + 1.0, tw.spec(3)), cache=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * MEMORY  # what is mapped is not all used
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _write(answers, b"ready")
    while (data := _read(sys.stdin.buffer)) is not None:
        try:
            found = executed(data)
        except BaseException as error:
            found = f"DEFECT {type(error).__name__}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > MEMORY and not found.startswith("DEFECT"):
            found = f"DEFECT: {peak >> 20} MiB ({found})"
        _write(answers, found.encode())


class Child:
    """A process that answers models; started again after a crash, and after one that took too long or too much memory."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        # as a user has it: checking results in f64 takes memory and time of its own
        environment = {**os.environ, "TENSORWRIGHT_CACHE": "off", "TENSORWRIGHT_VALIDATE": "0", "TENSORWRIGHT_VERIFY": "0"}
        p = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        assert p.stdout is not None
        if _read(p.stdout) != b"ready":
            raise RuntimeError(f"the child process does not start: {' '.join(map(str, p.args))}")
        return p

    def ask(self, data: bytes) -> str:
        """What became of a model."""
        p = self.process = self.process or self._start()
        assert p.stdin is not None and p.stdout is not None
        start, used = time.monotonic(), _processor(p.pid)
        try:
            _write(p.stdin, data)
            while not select.select([p.stdout], [], [], 0.2)[0]:
                past = time.monotonic() - start
                if past > PATIENCE or (past > SECONDS and _processor(p.pid) - used > SECONDS):
                    self.stop()
                    return "endless" if _loops(data) else f"DEFECT: longer than {SECONDS} s"
            answer = _read(p.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = p.wait()
            self.stop()
            return f"DEFECT: the process died with {code}"
        if answer.startswith(b"DEFECT"):
            self.stop()
        return answer.decode(errors="replace")

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


def _processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _loops(data: bytes) -> bool:
    """Whether the model itself says that it loops."""
    import onnx

    proto = onnx.ModelProto()
    proto.ParseFromString(data)
    return any(getattr(m, "op_type", "") == "Loop" for m in _messages(proto))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder for mutants that show a defect")
    parser.add_argument("--import-only", action="store_true", help="in this process, without compiling")
    parser.add_argument("--extremes", action="store_true", help="large numbers in every attribute, instead of random changes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    counts: Counter[str] = Counter()
    worst = 0.0
    child = Child()
    for k, data in enumerate(extremes() if args.extremes else mutants(args.count, args.seed)):
        start = time.perf_counter()
        found = outcome(data) if args.import_only else child.ask(data)
        worst = max(worst, time.perf_counter() - start)
        if found.startswith("DEFECT"):
            print(k, found[:300], flush=True)
            if args.keep:
                (Path(args.keep) / f"mutant_{args.seed}_{k}.onnx").write_bytes(data)
        counts[found[:60]] += 1
    child.stop()
    print(dict(counts.most_common()), f"slowest {worst:.2f} s")
    return any(c.startswith("DEFECT") for c in counts)


if __name__ == "__main__":
    sys.exit(main())
