"""The contestants of the inference benchmark: one file each for what it takes to run a model in ONNX Runtime, torch, JAX ...

A file has one function, `enter(task)`: it makes the model ready in the peer's own way and returns `build`, which compiles
it (this is timed) and returns an `Entry`. `PEERS` names the contestants; one that is not installed is skipped in words.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
COMPILERS = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Task:
    """One workload as files in a folder (see `prepare.py`), for a number of threads and a precision ('f32', 'bf16', 'int8')."""

    name: str
    folder: Path
    threads: int
    precision: str = "f32"

    def inputs(self) -> list[Array]:
        """The arguments of the model, in order."""
        return _in_order(self.folder / "inputs.npz")

    def weights(self, *, folded: bool = False) -> dict[str, Array]:
        """Weights by name; `folded`: batch norms are part of the convolutions before them."""
        path = self.folder / "folded.npz"
        return dict(np.load(path if folded and path.exists() else self.folder / "weights.npz"))

    @property
    def onnx(self) -> Path:
        """The model as ONNX, opset 17, batch norm folded, weights as constants; in int8 with QDQ nodes. Raises RuntimeError where
        there is none."""
        path = self.folder / ("int8.onnx" if self.precision == "int8" else "model.onnx")
        if not path.exists():
            raise RuntimeError("there is no ONNX file of this model: PyTorch exports it, and is not installed")
        return path

    @property
    def single(self) -> bool:
        """Whether this is one operation: then contestants write into memory that is there already, where they can."""
        return self.name.startswith("op_")

    def like_outputs(self) -> list[Array]:
        """New arrays for the results of the model."""
        return [np.empty(shape, np.float32) for shape in self.about()["outputs"]]

    def about(self) -> dict[str, Any]:
        """Shapes of the outputs, arithmetic and bytes of the workload."""
        found: dict[str, Any] = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        return found


def _in_order(path: Path) -> list[Array]:
    with np.load(path) as found:
        return [found[k] for k in sorted(found, key=lambda k: int(k.lstrip("inout")))]


def as_arrays(result: Any) -> Sequence[Any]:
    """A result, or a tuple or list of them, as a sequence of arrays."""
    return [np.asarray(r) for r in (result if isinstance(result, (tuple, list)) else (result,))]


@dataclass(frozen=True)
class Entry:
    """What is timed, how its result becomes arrays, what there is to say about it, and what must stay alive (memory that a
    library was given the address of)."""

    run: Callable[[], Any]
    results: Callable[[Any], Sequence[Any]] = as_arrays
    facts: dict[str, Any] = field(default_factory=dict)
    kept: Any = None


@dataclass(frozen=True)
class Peer:
    """A contestant.

    place        the file of this package with its `enter`
    imports      what must be imported (and so installed); the first is timed as 'import'
    tools        programs of which one must be there
    precisions   those it has an entry for
    distribution names of the installed packages that it needs, for the size on disk
    environment  of its process, by the number of threads
    takes        "" or why it does not take part in a workload
    """

    place: str
    imports: tuple[str, ...]
    tools: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("f32",)
    distributions: tuple[str, ...] = ()
    environment: Callable[[int], Mapping[str, str]] = lambda threads: {}
    takes: Callable[[str], str] = lambda name: ""

    def missing(self) -> str:
        """ "" if it can run here, else why not, with what to do about it."""
        for module in self.imports:
            if not _there(module):
                return f"{module} is not installed (pip install 'tensorwright[bench]')"
        if self.tools and not any(map(shutil.which, self.tools)):
            return f"it needs a C++ compiler ({' or '.join(self.tools)}), and there is none"
        return ""

    def enter(self, task: Task) -> Callable[[], Entry]:
        """The file's `enter`."""
        module = importlib.import_module(f"{__package__}.{self.place}")
        build: Callable[[], Entry] = module.enter(task)
        return build


def _jax_environment(threads: int) -> dict[str, str]:
    flags = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def _inductor_environment(threads: int) -> dict[str, str]:
    # its pool of compile processes keeps a core busy between rounds, and every other contestant pays for it
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def _images(name: str) -> str:
    layouts = ("lenet", "cifar", "resnet50", "mobilenetv2", "op_conv")
    return "" if name.startswith(layouts) else "it is for images"


def _plain(name: str) -> str:
    if name.startswith(("mlp", "op_")) and name != "op_gelu16M":
        return ""
    return (
        "numpy has no erf" if name == "op_gelu16M" else "a plain numpy program makes sense for the MLP and single operations only"
    )


def _no_recurrence(name: str) -> str:
    return "its ONNX frontend has no LSTM" if name.startswith("bilstm") else ""


OURS = "tensorwright"
OWN = ("tensorwright", "llvmlite", "cmeel-libomp", "numpy")
PEERS: dict[str, Peer] = {
    OURS: Peer("ours", ("tensorwright.driver",), precisions=("f32", "bf16", "int8"), distributions=OWN),
    "onnxruntime": Peer(
        "onnxruntime", ("onnxruntime",), precisions=("f32", "int8"), distributions=("onnxruntime", "numpy")
    ),
    "openvino": Peer("openvino", ("openvino",), precisions=("f32", "int8"), distributions=("openvino", "numpy")),
    "openvino_bf16": Peer("openvino", ("openvino",), precisions=("bf16",), distributions=("openvino", "numpy")),
    "torch": Peer("torch", ("torch",), distributions=("torch", "numpy")),
    "torch_channels_last": Peer("torch_channels_last", ("torch",), distributions=("torch", "numpy"), takes=_images),
    "torch_bf16": Peer("torch", ("torch",), precisions=("bf16",), distributions=("torch", "numpy")),
    "torch_compile": Peer(
        "torch_compile", ("torch",), COMPILERS, distributions=("torch", "numpy"), environment=_inductor_environment
    ),
    "jax": Peer("jax", ("jax",), distributions=("jax", "jaxlib", "scipy", "ml_dtypes", "numpy"), environment=_jax_environment),
    "tvm": Peer("tvm", ("tvm", "onnx"), distributions=("apache-tvm", "apache-tvm-ffi", "numpy"), takes=_no_recurrence),
    "numpy": Peer("numpy", ("numpy",), distributions=("numpy",), takes=_plain),
}  # fmt: skip
# ours without Winograd's method, beside which integers are measured
DIRECT = "tensorwright_direct"
ASIDE: dict[str, Peer] = {DIRECT: Peer("ours_direct", ("tensorwright.driver",), distributions=OWN)}
# compiles ahead of time into a file: it takes part where compile times are compared
COMPILE_ONLY: dict[str, Peer] = {
    "iree": Peer("iree", ("iree.runtime", "iree.compiler"), distributions=("iree-base-compiler", "iree-base-runtime", "numpy")),
}


def _there(module: str) -> bool:
    """Whether a module, perhaps one inside a package, can be imported; its packages are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False
