"""What a package takes on disk."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def installed_bytes(distributions: Iterable[str]) -> int:
    """Bytes of the files of installed packages, by their own lists; compiled bytecode is left out, an absent package is 0.

    A package installed from its sources in place lists none of them: then those that would be packaged are counted.
    """
    total = 0
    for name in distributions:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        paths = {Path(str(f.locate())) for f in files if not str(f).endswith(".pyc")}
        if name == "tensorwright" and not any(p.suffix == ".py" and p.name == "driver.py" for p in paths):
            root = Path(__file__).resolve().parents[1]
            hidden = (".git", "tests", "docs", "examples")
            paths = {p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in hidden}
        total += sum(p.stat().st_size for p in paths if p.is_file())
    return total
