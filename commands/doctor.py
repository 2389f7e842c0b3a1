"""`tensorwright doctor`: what this machine has, and what is set."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import Any, Final

from .. import __version__
from ..compiler import cache_of, compiler_digest
from ..driver import measured_peak
from ..ir.errors import RuntimeUnavailableError
from ..ir.target import ROWS
from ..runtime import host, openmp, threads
from ..runtime.cuda import devices as cuda_devices
from ..runtime.native import llvm_version
from ..settings import describe, flags

_PACKAGES: Final = ("numpy", "ml_dtypes", "llvmlite", "cmeel-libomp", "safetensors", "scikit-learn", "torch", "onnxruntime")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it."""
    found = report(peaks=not args.no_peaks)
    for section, rows in found.items():
        print(section)
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    return found


def report(peaks: bool = True) -> dict[str, dict[str, Any]]:
    """Section -> name -> value; what is missing says so and what to do."""
    target = host.host()
    sizes = host.caches()
    machine = {
        "processor": f"{_model_name()} (LLVM: {host.cpu_name()})",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "target row": target.name,
        "L1, L2, L3": ", ".join(f"{sizes[k] // 1024:,} KiB" if k in sizes else "unknown" for k in ("l1", "l2", "l3")),
    }
    rows = {}
    for name in ROWS:
        lacking = host.missing_features(name)
        rows[name] = "runs here" if not lacking else f"can be compiled for, not run: lacks {', '.join(lacking)}"
    limit = threads.quota()
    parallel = {
        "cores": f"{os.cpu_count()} in the machine, {threads.affinity()} by affinity, "
        + ("no CPU quota" if limit is None else f"CPU quota {limit:g}"),
        "threads used": threads.resolve(flags().threads),
    }
    try:
        omp = openmp.runtime()
        parallel["OpenMP"] = omp.path + (
            " (loaded by us)" if omp.ours else " (loaded already by another library: used, not ours)"
        )
    except RuntimeUnavailableError as error:
        parallel["OpenMP"] = f"MISSING: {error}"
    cache = cache_of(flags())
    if cache is None:
        storage: dict[str, Any] = {"cache": "off (TENSORWRIGHT_CACHE=off)"}
    else:
        entries = cache.entries()
        size = sum(s for _, s, _ in entries)
        storage = {
            "cache": f"{cache.folder}: {len(entries)} programs, {size / 1e6:.1f} MB of at most {cache.max_bytes / 1e6:.0f} MB"
        }
    versions = {"tensorwright": f"{__version__} (compiler {compiler_digest()[:12]})", "llvm": llvm_version()}
    versions |= {p: _version(p) for p in _PACKAGES}
    found: dict[str, dict[str, Any]] = {
        "machine": machine,
        "targets": rows,
        "threads": parallel,
        "cache": storage,
        "versions": versions,
        "flags": {
            variable: f"{'(unset)' if value in ('', 'None') else value}: {meaning}" for _, variable, value, meaning in describe()
        },
        "CUDA": cuda_devices.report(),
    }
    if peaks:
        found["measured peaks"] = _peaks(threads.resolve(flags().threads))
    return found


def _peaks(most: int) -> dict[str, str]:
    if importlib.util.find_spec("..benchmarks.peak", __package__) is None:
        return {"f32": "benchmarks are not installed"}
    found = {}
    for name in host.runnable_rows():
        target = host.resolve(name)
        for count in sorted({1, most}):
            found[f"{name}, {count} thread{'s' * (count > 1)}"] = f"{measured_peak(target, count):.0f} GFLOP/s f32"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no such file on this system: the platform module knows a name
    return platform.processor() or platform.machine() or sys.platform
