"""A seeded mutator of ONNX files: bytes flipped, cut, repeated; and fields of the protobuf changed, dropped, exchanged.

    python tests/onnx/mutate.py [--count 5000] [--seed 0]

Each mutant is imported in this process under limits of time and memory; anything but a Graph or an error of ours is reported.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import backend

SECONDS = 5
NUMBERS = (0, 1, -1, 2, 7, 63, 255, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63), -(1 << 40), 1000003)


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


def mutants(count: int, seed: int) -> Iterator[bytes]:
    models, rng = seeds(), random.Random(seed)
    for _ in range(count):
        yield mutant(rng, models)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder for mutants that show a defect")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    worst = 0.0
    for k, data in enumerate(mutants(args.count, args.seed)):
        start = time.perf_counter()
        found = outcome(data)
        worst = max(worst, time.perf_counter() - start)
        if found.startswith("DEFECT"):
            print(k, found[:300])
            if args.keep:
                (Path(args.keep) / f"mutant_{args.seed}_{k}.onnx").write_bytes(data)
        counts[found[:60]] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(dict(counts), f"slowest {worst:.2f} s, peak {peak:.0f} MiB")
    return any(c.startswith("DEFECT") for c in counts)


if __name__ == "__main__":
    sys.exit(main())
