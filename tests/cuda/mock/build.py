"""Builds what `tests/cuda/test_pycuda.py` needs into a folder: the mock libcuda.so.1 and pycuda linked against it.

    python -m tests.cuda.mock.build FOLDER [--cuda-root TOOLKIT] [--driver-only]

The mock needs a C compiler. pycuda comes as source from the package index (Boost is bundled; minutes of one core) and needs a
C++ compiler and CUDA's headers, which come from the index too unless a toolkit is named; no GPU, no driver, no nvcc. Then
`PYCUDA_MOCK=FOLDER pytest tests/cuda/test_pycuda.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

PYCUDA: Final = "pycuda==2026.1"
HEADERS: Final = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-profiler-api==13.0.*")
HERE: Final = Path(__file__).resolve().parent


def driver(folder: Path) -> Path:
    """The mock driver, as libcuda.so.1 and under the name that a linker looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler: install gcc, or set CC")
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(HERE / "driver.c")], check=True)
    shutil.copy(library, folder / "libcuda.so")
    return library


def pycuda(folder: Path, cuda_root: str) -> None:
    """pycuda from source, installed into FOLDER/site. `cuda_root`: a toolkit; empty: headers from the package index."""
    pip = [sys.executable, "-m", "pip"]
    if not cuda_root:
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(folder / "headers"), *HEADERS], check=True)
        cuda_root = str(folder / "headers" / "nvidia" / "cu13")
    site = folder / "site"
    subprocess.run(
        [*pip, "install", "-q", "--target", str(site), "pytools", "mako", "platformdirs", "setuptools", "wheel"], check=True
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    get = [*pip, "download", "-q", PYCUDA, "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    subprocess.run(get, check=True, env=environment)
    archive = next(folder.glob("pycuda-*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    source = next(p for p in folder.glob("pycuda-*") if p.is_dir())
    configure = [
        sys.executable,
        "configure.py",
        f"--cuda-root={cuda_root}",
        "--no-cuda-enable-curand",
        f"--cudadrv-lib-dir={folder.resolve()}",
    ]
    subprocess.run(configure, check=True, cwd=source, env=environment)
    install = [*pip, "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(install, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda-root", default="")
    parser.add_argument("--driver-only", action="store_true")
    args = parser.parse_args()
    print(driver(args.folder))
    if not args.driver_only:
        pycuda(args.folder.resolve(), args.cuda_root)


if __name__ == "__main__":
    main()
