"""LLVM text to machine code by llvmlite alone: in this process, or in one of its own that `serve`s (see workers.py).

This file imports nothing of the package: a worker that imported it all would start later than its first piece of work comes.
"""

from __future__ import annotations

import signal
import struct
import sys
import threading
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm

HEAD = struct.Struct("<4I")  # of a request: bytes of triple, cpu, features, text
ANSWER = struct.Struct("<BQ")  # whether there is code, bytes of code or of the reason

_ready = threading.Event()
_lock = threading.Lock()


def _initialize() -> None:
    with _lock:
        if not _ready.is_set():
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            _ready.set()


@lru_cache(maxsize=16)
def machine(triple: str, cpu: str, features: str) -> Any:
    """llvmlite's TargetMachine. Raises RuntimeError if this LLVM was built without the architecture."""
    _initialize()
    found = llvm.Target.from_triple(triple)
    return found.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small")


# The emitter's text is in SSA form with common subexpressions shared, registers promoted and loops rotated: of LLVM's
# pipelines, inlining and local simplification are all that changes its machine code. The full O1 gave the same loops
# at eight times the cost of these passes; contraction, vectorising and unrolling must not happen here.
_PASSES = ("always_inliner", "instruction_combine", "simplify_cfg", "global_dead_code_eliminate")


def optimised(text: str, machine: Any) -> Any:
    """The parsed module after LLVM's own passes. Raises RuntimeError for text that LLVM refuses."""
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1)))
    return module


def object_code(text: str, triple: str, cpu: str, features: str) -> bytes:
    """The object file of a module. Raises RuntimeError for text that LLVM refuses."""
    found = machine(triple, cpu, features)
    return bytes(found.emit_object(optimised(text, found)))


def serve() -> None:
    """Answers requests from stdin on stdout until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is the parent's business
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _initialize()
    while len(head := source.read(HEAD.size)) == HEAD.size:
        words = [source.read(n).decode() for n in HEAD.unpack(head)]
        try:
            done, answer = True, object_code(words[3], *words[:3])
        except RuntimeError as error:
            done, answer = False, str(error).encode()
        sink.write(ANSWER.pack(done, len(answer)) + answer)
        sink.flush()
