"""The standard's own cases. By default a fixed fortieth of the node cases and one of every op; all of them with

TENSORWRIGHT_ONNX_BACKEND=all pytest tests/onnx/test_backend.py        (or python tests/onnx/backend.py, with a report)
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import backend

ALL = os.environ.get("TENSORWRIGHT_ONNX_BACKEND") == "all"
PARTS = 4
pytestmark = pytest.mark.unvalidated("thousands of graphs; passes are validated on graphs of their own")


def chosen(kind: str) -> list[backend.Case]:
    """The cases to run: all, or those whose name hashes to 0 modulo 40, and the first of each op."""
    found: list[backend.Case] = []
    seen: set[str] = set()
    for case in backend.cases(kind):
        if backend.excluded(case.name):
            continue
        first = case.op not in seen
        seen.add(case.op)
        if ALL or first or zlib.crc32(case.name.encode()) % 40 == 0:
            found.append(case)
    return found


def check(cases: list[backend.Case]) -> None:
    failed = [o for o in map(backend.run, cases) if o.reason]
    assert not failed, "\n".join(f"{o.case.name}: {o.reason[:300]}" for o in failed)


@pytest.mark.parametrize("part", range(PARTS))
def test_node_cases(part: int) -> None:
    cases = chosen("node")
    assert len(cases) > 200
    check(cases[part::PARTS])


@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator"])
def test_other_cases(kind: str) -> None:
    check(chosen(kind))


@pytest.mark.skipif(
    not ALL, reason="nine image models of constant weights take a minute: TENSORWRIGHT_ONNX_BACKEND=all runs them"
)
def test_real_models() -> None:
    check(list(backend.cases("real")))


def test_every_exclusion_has_a_reason_and_excludes_something() -> None:
    names = [c.name for kind in backend.KINDS for c in backend.cases(kind)]
    for pattern, reason in backend.exclusions():
        assert reason and any(pattern.fullmatch(n) for n in names), pattern.pattern


def test_a_wrong_result_is_noticed() -> None:
    case = next(c for c in backend.cases("node") if c.name == "test_add")
    inputs, (expected,) = next(case.data())
    wrong = backend.Case(
        case.name, case.kind, case.test.__class__(**{**vars_of(case.test), "data_sets": [(inputs, [expected + 1])]})
    )
    assert "Not equal to tolerance" in backend.run(wrong).reason


def vars_of(test: object) -> dict[str, object]:
    return {name: getattr(test, name) for name in test.__dataclass_fields__ if name != "__test__"}  # type: ignore[attr-defined]
