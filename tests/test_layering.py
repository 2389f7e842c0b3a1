"""The layering table of docs/architecture.md, enforced on the source: who may import whom, and what third-party code where."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "frontend", "passes", "codegen", "runtime", "training", "compression", "cuda")
ALLOWED = {
    "ir": {"ir"},
    "frontend": {"frontend", "ir"},
    "passes": {"passes", "ir"},
    "codegen": {"codegen", "ir"},
    "runtime": {"runtime", "ir"},
    "training": {"training", "driver", "settings", "frontend", "passes", "codegen", "runtime", "ir"},
}
ALLOWED["compression"] = ALLOWED["training"] | {"compression"}
ALLOWED["cuda"] = ALLOWED["training"] - {"training", "frontend"} | {"cuda", "compiler", "stages", "__version__"}
THIRD_PARTY = {
    "ir": {"numpy", "ml_dtypes", "networkx"},
    "frontend": {"numpy", "sklearn", "ml_dtypes", "onnx"},
    "passes": {"numpy"},
    "codegen": {"numpy", "llvmlite"},
    "runtime": {"numpy", "llvmlite", "threadpoolctl", "safetensors", "rich", "pycuda"},
    "compression": {"numpy", "matplotlib"},
    "cuda": {"numpy", "rich"},
    "training": {"numpy", "safetensors", "rich", "matplotlib", "tensorboardX", "mlflow", "optuna"},
}
LLVMLITE_HOMES = ("codegen/llvm/", "codegen/cuda/compile.py", "runtime/native.py")
SOURCES = sorted(p.relative_to(ROOT) for f in FOLDERS for p in (ROOT / f).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether it is ours) of everything a file imports; relative names are resolved."""
    found: list[tuple[str, bool]] = []
    package = list(path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, False) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.append((node.module or "", False))
            else:
                base = package[: len(package) - node.level + 1]
                full = ".".join(base + ([node.module] if node.module else []))
                # `from .. import x` names modules of that package; `from ..x import y` names x.
                found += [(f"{full}.{a.name}".strip("."), True) for a in node.names] if not node.module else [(full, True)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_folder_imports_only_what_the_table_allows(path: Path) -> None:
    folder = path.parts[0]
    for name, ours in imports(path):
        top = name.split(".")[0]
        assert top != "tensorwright", f"{path}: inside the package imports are relative, not {name}"
        if ours:
            assert top in ALLOWED[folder], f"{path} imports {name}: {folder}/ may import only {sorted(ALLOWED[folder])}"
        elif top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY[folder], f"{path} imports {name}: {folder}/ may use only {sorted(THIRD_PARTY[folder])}"
            if top == "llvmlite":
                assert str(path).startswith(LLVMLITE_HOMES), f"{path}: llvmlite belongs in {LLVMLITE_HOMES} only"


def test_the_check_sees_a_forbidden_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "bad.py").write_text("from ..codegen import generate\nimport llvmlite\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(Path("passes/bad.py")) == [("codegen", True), ("llvmlite", False)]
    with pytest.raises(AssertionError, match="may import only"):
        test_a_folder_imports_only_what_the_table_allows(Path("passes/bad.py"))


def test_nothing_is_longer_than_a_reader_bears() -> None:
    long = {str(p): n for p in ROOT.rglob("*.py") if "venv" not in str(p) and (n := p.read_text().count("\n")) > 800}
    assert not long, f"files over 800 lines are two files: {long}"
