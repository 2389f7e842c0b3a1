"""IREE: ONNX -> its importer -> its compiler for this CPU -> a module in its local-task runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import Entry, Task


def enter(task: Task) -> Callable[[], Entry]:
    import iree.runtime as rt

    path, inputs = task.onnx, task.inputs()
    tools, text, code = Path(sys.executable).parent, task.folder / "iree.mlir", task.folder / "iree.vmfb"

    def build() -> Entry:
        _tool(tools / "iree-import-onnx", path, "-o", text, "--opset-version=17")
        flags = (
            "--iree-hal-target-device=local",
            "--iree-hal-local-target-device-backends=llvm-cpu",
            "--iree-llvmcpu-target-cpu=host",
            "--iree-opt-level=O3",
            "--iree-llvmcpu-stack-allocation-limit=262144",
        )
        _tool(tools / "iree-compile", text, *flags, "-o", code)
        rt.flags.parse_flags(f"--task_topology_group_count={task.threads}")
        config = rt.Config("local-task")
        module = rt.VmModule.mmap(config.vm_instance, str(code))
        hal = rt.create_hal_module(config.vm_instance, config.device)
        context = rt.SystemContext(vm_modules=[hal, module], config=config)
        found = next(m for name, m in context.modules.items() if name != "hal")
        names = [n for n in found.vm_module.function_names if not n.startswith("__") and not n.endswith("$async")]
        function = found[names[0]]
        arguments = [rt.asdevicearray(config.device, x) for x in inputs]
        return Entry(lambda: function(*arguments), _arrays)

    return build


def _tool(*words: Any) -> None:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0].name} failed: {done.stderr[-200:]}")


def _arrays(result: Any) -> list[Any]:
    return [r.to_host() for r in (result if isinstance(result, (tuple, list)) else (result,))]
