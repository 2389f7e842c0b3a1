"""What an installed Tensorwright consists of: its version, its typing marker, its modules, and how fast it is imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    homes = ("ir", "frontend", "passes", "codegen", "runtime", "training", "compression", "commands", "cuda", "benchmarks")
    found = {"tensorwright"} | {
        ".".join(("tensorwright", *p.parent.relative_to(ROOT).parts))
        for home in homes
        for p in (ROOT / home).rglob("__init__.py")
    }
    assert listed == found


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "-q", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert all(n.startswith("tensorwright/") and (n.endswith(".py") or n.endswith("py.typed")) for n in names), names
    folders = {n.split("/")[1] for n in names if n.count("/") > 1}
    assert folders == {
        "ir",
        "frontend",
        "passes",
        "codegen",
        "runtime",
        "compression",
        "commands",
        "cuda",
        "training",
        "benchmarks",
    }
    assert {"tensorwright/py.typed", "tensorwright/cli.py", "tensorwright/driver.py", "tensorwright/ir/ops/unary.py"} <= set(
        names
    )


def test_import_does_not_load_the_heavy_modules() -> None:
    code = (
        "import sys, tensorwright; print([m for m in ('llvmlite', 'networkx', 'sklearn', 'torch', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import tensorwright as tw

    for name in tw._WHERE:
        assert getattr(tw, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tw.nonsense
