"""Finds the device a target names, and says what is missing where there is none. Nothing of CUDA is loaded before that."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from typing import Final

from ...ir.errors import InputError, RuntimeUnavailableError
from . import tools
from .device import Device
from .emulator import Emulator

DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NO_PYCUDA: Final = "pycuda not installed"
NO_DRIVER: Final = f"no NVIDIA driver ({DRIVER})"
NO_DEVICE: Final = "no CUDA device"
_ADVICE: Final = {
    NO_PYCUDA: "pip install 'tensorwright[cuda]' (it is built from source and needs a C++ compiler and the CUDA headers)",
    NO_DRIVER: "install NVIDIA's driver for the GPU",
    NO_DEVICE: "the driver finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
}


def driver() -> ctypes.CDLL:
    """The driver's library. Raises OSError where there is none."""
    return ctypes.CDLL(DRIVER)


def _devices() -> tuple[int, str]:
    """How many devices the driver has, and its version; (-1, reason) without a driver."""
    try:
        library = driver()
    except OSError as error:
        return -1, str(error)
    status = library.cuInit(0)
    count, version = ctypes.c_int(), ctypes.c_int()
    if status == 0:
        status = library.cuDeviceGetCount(ctypes.byref(count))
    library.cuDriverGetVersion(ctypes.byref(version))
    found = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return (count.value, found) if status == 0 else (0, f"{found}, cuInit gives error {status}")


def missing() -> list[str]:
    """Which of the three things a GPU needs are not there, in the order they are needed: package, driver, device."""
    found = [NO_PYCUDA] if importlib.util.find_spec("pycuda") is None else []
    count, _ = _devices()
    if count < 0:
        found.append(NO_DRIVER)
    elif not count:
        found.append(NO_DEVICE)
    return found


def explain(lacking: list[str]) -> str:
    """What is missing and what to do about it."""
    what = "; ".join(f"{m}: {_ADVICE[m]}" for m in lacking)
    return f"no CUDA device can be used. {what}. target='cuda-emulator' runs the same kernels without a GPU, slowly"


def report() -> dict[str, str]:
    """For `tensorwright doctor`: package, driver, devices, and whether target='cuda' can run."""
    count, version = _devices()
    rows = {
        "pycuda": NO_PYCUDA if importlib.util.find_spec("pycuda") is None else "installed",
        "driver": NO_DRIVER if count < 0 else version,
        "devices": (NO_DEVICE if count < 1 else str(count)) if count >= 0 else "not looked for: no driver",
    }
    lacking = missing()
    rows["target='cuda'"] = "runs here" if not lacking else "; ".join(f"{m}: {_ADVICE[m]}" for m in lacking)
    for tool, what in (("ptxas", "registers of estimates are counted from PTX"), ("nvdisasm", "there is no exe.text('sass')")):
        place = tools.find(tool)
        rows[tool] = f"not installed, so {what}: pip install {tools.WHEELS[tool]}" if place is None else str(place)
    rows["target='cuda-emulator'"] = "runs here (numpy, for checks; slow)"
    return rows


def require() -> None:
    """Raises RuntimeUnavailableError, saying what is missing, unless a GPU can be used."""
    lacking = missing()
    if lacking:
        raise RuntimeUnavailableError(explain(lacking))


@functools.cache
def _gpu(number: int) -> Device:
    from .pycuda_device import PycudaDevice

    return PycudaDevice(number)


def open_device(target: str, number: int = 0) -> Device:
    """The device for a target: a new emulator for `cuda-emulator`, else GPU `number`, one object for the process.

    Raises RuntimeUnavailableError where there is none, or where it is older than the target's SM (`cuda-sm_90`).
    """
    if target == "cuda-emulator":
        return Emulator()
    if target != "cuda" and not target.startswith("cuda-sm_"):
        raise InputError(f"{target!r} is no CUDA target; there are 'cuda', 'cuda-sm_75' (80, 90), 'cuda-emulator'")
    require()
    found = _gpu(number)
    wanted = int(target.removeprefix("cuda-sm_")) if target != "cuda" else 0
    if found.sm < wanted:
        raise RuntimeUnavailableError(f"{target} needs compute capability {wanted / 10}; {found.name} has {found.sm / 10}")
    return found
