"""What the examples share: where their data lie, their command line, and whether they reached their figure."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def data_folder(given: Path | None = None) -> Path:
    """The folder given, else $TENSORWRIGHT_DATA, else ~/.cache/tensorwright/data."""
    default = os.environ.get("TENSORWRIGHT_DATA") or "~/.cache/tensorwright/data"
    return (given or Path(default)).expanduser()


def need(path: Path) -> Path:
    """The path, if it is there; else the command that fetches it."""
    if not path.exists():
        sys.exit(f"error: there is no {path}; fetch it: python examples/fetch.py (see its first lines), or give --data FOLDER")
    return path


def mnist(data: Path) -> tuple[Any, Any, Any, Any]:
    """x_train, y_train, x_test, y_test: images (n, 28, 28) f32 from 0 to 1, labels (n,) i64."""
    with np.load(need(data / "mnist.npz")) as file:
        x_train, y_train, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    scale = np.float32(1 / 255)
    return x_train * scale, y_train.astype(np.int64), x_test * scale, y_test.astype(np.int64)


def run(
    main: Callable[..., Mapping[str, Any]],
    *,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> None:
    """Calls main with options from the command line, prints its figures and writes them to --json FILE.

    main(data, **numbers) returns figures by name; each of its arguments becomes an option. With all numbers as they stand in
    the file, the figures must keep the bounds, or the exit status is 1.
    """
    doc = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that examples/fetch.py filled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    defaults = {k: p.default for k, p in inspect.signature(main).parameters.items() if k != "data"}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    given = vars(parser.parse_args())
    data, file = data_folder(given.pop("data")), given.pop("json")

    started = time.perf_counter()
    figures = dict(main(data, **given))
    figures["seconds"] = time.perf_counter() - started

    print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items() if np.isscalar(v)))
    missed = [f"{k} {figures[k]:.4f}, at least {v} expected" for k, v in (at_least or {}).items() if not figures[k] >= v]
    missed += [f"{k} {figures[k]:.4f}, at most {v} expected" for k, v in (at_most or {}).items() if not figures[k] <= v]
    full = all(given[k] == v for k, v in defaults.items() if not isinstance(v, str))  # texts only say where to write
    if file is not None:
        bounds = {"at_least": dict(at_least or {}), "at_most": dict(at_most or {})}
        result = {"example": Path(sys.argv[0]).stem, "options": given, "full": full, "figures": figures, **bounds}
        file.write_text(json.dumps(result, indent=2, default=float) + "\n")
    if full and missed:
        sys.exit(f"not reached: {'; '.join(missed)}")
