"""Runs the standard's own backend cases through import, compilation and execution; as a script, prints what passes.

    python tests/onnx/backend.py [--kind node] [--match PATTERN] [--failures] [--list] [--quiet]

A case passes when every output has the expected dtype and shape, and its numbers agree within the case's own tolerance
(onnx.backend.test.runner, rtol 1e-3 and atol 1e-7 unless the case says otherwise; `noise` is added to that). Every program that
runs is compiled: there is no other way to run one; `nodes` counts the ONNX nodes of a case and `programs` what they were
compiled to.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("node", "simple", "real", "pytorch-converted", "pytorch-operator")
EXCLUSIONS = Path(__file__).with_name("backend_exclusions.txt")


@dataclass(frozen=True)
class Case:
    """One case: its model, and pairs of inputs and expected outputs (loaded when asked for)."""

    name: str
    kind: str
    test: Any

    @property
    def model(self) -> Any:
        """The ModelProto."""
        import onnx

        if self.test.model is not None:
            return self.test.model
        return onnx.load(str(self._folder() / "model.onnx") if self.test.model_dir else _light(self.test))

    def _folder(self) -> Path:
        return Path(self.test.model_dir)

    @property
    def op(self) -> str:
        """The op that the case is about."""
        nodes = self.model.graph.node
        return nodes[0].op_type if len(nodes) == 1 else self.name.split("_")[1] + "*"

    def data(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """Pairs of inputs and expected outputs."""
        if self.test.data_sets is not None:
            for inputs, outputs in self.test.data_sets:
                yield [_array(x) for x in inputs], [_array(x) for x in outputs]
            return
        model = self.model
        if not self.test.model_dir:
            yield _light_data(self.test, model)
            return
        for folder in sorted(self._folder().glob("test_data_set*")):
            inputs = _values(folder, "input", model.graph.input)
            yield inputs, _values(folder, "output", model.graph.output)


def _array(value: Any) -> Any:
    import onnx
    from onnx import numpy_helper

    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _light(test: Any) -> str:
    import onnx

    return str(Path(onnx.__file__).parent.parent / test.url)


def _light_data(test: Any, model: Any) -> tuple[list[Any], list[Any]]:
    """As onnx's own runner does it: the numbers 0, 1, ... modulo something as input, and the output stored beside the model."""
    import onnx
    from onnx import numpy_helper

    inits = {i.name for i in model.graph.initializer}
    inputs = []
    for i in model.graph.input:
        if i.name not in inits:
            shape = [d.dim_value for d in i.type.tensor_type.shape.dim]
            size = int(np.prod(shape))
            inputs.append((np.arange(size).reshape(shape) / size).astype(np.float32))
    out = onnx.TensorProto()
    out.ParseFromString(Path(_light(test).replace(".onnx", "_output_0.pb")).read_bytes())
    return inputs, [numpy_helper.to_array(out)]


def _values(folder: Path, what: str, infos: Sequence[Any]) -> list[Any]:
    import onnx
    from onnx import numpy_helper

    found = []
    for k in range(len(list(folder.glob(f"{what}_*.pb")))):
        raw = (folder / f"{what}_{k}.pb").read_bytes()
        if not infos[k].type.HasField("tensor_type"):
            found.append(None)
            continue
        t = onnx.TensorProto()
        t.ParseFromString(raw)
        found.append(numpy_helper.to_array(t))
    return found


@functools.cache
def cases(kind: str) -> tuple[Case, ...]:
    """All cases of a kind, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cases of overflow compute their expectation with numpy
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind=kind)
    return tuple(sorted((Case(t.name, kind, t) for t in found), key=lambda c: c.name))


Patterns = tuple[tuple[re.Pattern[str], str], ...]


def _patterns(path: Path) -> Patterns:
    """(pattern of names, reason) from a data file: a line each, `pattern: reason`."""
    found = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.partition(":")
            found.append((re.compile(pattern.strip()), reason.strip()))
    return tuple(found)


@functools.cache
def exclusions() -> Patterns:
    """Cases that are not run, with the reason."""
    return _patterns(EXCLUSIONS)


def excluded(name: str) -> str:
    """Why a case is excluded; empty if it is not."""
    return next((reason for pattern, reason in exclusions() if pattern.fullmatch(name)), "")


@dataclass(frozen=True)
class Outcome:
    """What became of one case. `reason` is empty where it passed."""

    case: Case
    reason: str
    nodes: int = 0
    programs: int = 0
    seconds: float = 0.0


def noise(expected: Any) -> float:
    """One unit in the last place of the largest |expected|, of f32 and f64 outputs: where terms of that size cancel, the
    standard's own numbers are off by as much (an inverse DFT of arange gives 2e-7 for 0, beside values of 90)."""
    if expected.dtype not in (np.float32, np.float64):
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)])
    return float(np.spacing(finite.max())) if finite.size else 0.0


def run(case: Case) -> Outcome:
    """Imports, compiles, runs and compares one case. Errors of ours and wrong results are outcomes; others are raised."""
    import tensorwright as tw
    from onnx.backend.test.runner import Runner

    start = time.perf_counter()
    model = case.model
    programs = 0
    try:
        exe = tw.compile(tw.onnx.Model(model), cache=False)
        for inputs, expected in case.data():
            given = [np.asarray(x) if x is not None else x for x in inputs]
            result = exe(*given)
            outputs = list(result) if isinstance(result, tuple) else [result]
            rtol = max(case.test.rtol, 1e-3)
            assert len(outputs) == len(expected), f"{len(outputs)} outputs, expected {len(expected)}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for want, got in zip(map(np.asarray, expected), outputs, strict=True):
                    Runner.assert_similar_outputs([want], [got], rtol, max(case.test.atol, noise(want)))
        programs = len(exe.programs()) if hasattr(exe, "programs") else 1
        reason = ""
    except (tw.TensorwrightError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".strip()
    except Exception as error:  # a defect of ours: named as one in the report
        reason = f"DEFECT {type(error).__name__}: {error}"
    return Outcome(case, reason, len(model.graph.node), programs, time.perf_counter() - start)


def short(reason: str) -> str:
    """A reason without names and numbers, for grouping."""
    text = re.sub(r"\s+", " ", reason)
    text = re.sub(r"node '[^']*' ", "", text)
    text = re.sub(r"<[^>]*>: ", "", text)
    return text[:150]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: node")
    parser.add_argument("--match", default="", help="regular expression that the names contain")
    parser.add_argument("--failures", action="store_true", help="print every failing case with its reason")
    parser.add_argument("--passes", action="store_true", help="print the names of passing cases")
    parser.add_argument("--out", help="write name, op and reason of every failing case here")
    args = parser.parse_args(argv)
    os.environ.setdefault("TENSORWRIGHT_CACHE", "off")
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    skipped: collections.Counter[str] = collections.Counter()
    for kind in args.kind or ["node"]:
        for case in cases(kind):
            if not re.search(args.match, case.name):
                continue
            if reason := excluded(case.name):
                skipped[reason] += 1
                continue
            outcomes.append(run(case))
    passed = [o for o in outcomes if not o.reason]
    by_op: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for o in outcomes:
        by_op[o.case.op][0] += not o.reason
        by_op[o.case.op][1] += 1
    print("passed of all, by op (only ops with failures):")
    for name, (good, total) in sorted(by_op.items()):
        if good != total:
            print(f"  {name}: {good} of {total}")
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for o in outcomes:
        if o.reason:
            groups[short(o.reason)].append(o)
    print("failures by reason:")
    for reason, group in sorted(groups.items(), key=lambda g: -len(g[1])):
        print(f"  {len(group):4} {reason}   e.g. {group[0].case.name}")
    if args.failures:
        for o in outcomes:
            if o.reason:
                print(f"--- {o.case.name} ({o.case.op})\n{o.reason}")
    if args.passes:
        print("\n".join(o.case.name for o in passed))
    if args.out:
        Path(args.out).write_text("".join(f"{o.case.op}\t{o.case.name}\t{short(o.reason)}\n" for o in outcomes if o.reason))
    print("excluded:", sum(skipped.values()), dict(skipped))
    staged = sum(o.programs > 1 for o in passed)
    print(
        f"{len(passed)} of {len(outcomes)} cases pass; their {sum(o.nodes for o in passed)} nodes all ran as compiled programs "
        f"({sum(o.programs for o in passed)}; {staged} cases in stages); {time.perf_counter() - start:.0f} s"
    )
    return 0 if len(passed) == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
