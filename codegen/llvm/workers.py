"""Processes that run LLVM beside this one.

llvmlite's calls take one lock, so threads cannot share the work; and what LLVM took stays in a process that goes away. A worker
starts while the passes run, and is worth it for programs of some size alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from ...ir.errors import CompileError
from ...ir.target import Target
from .compile import object_code
from .machine import ANSWER, HEAD
from .pieces import pieces

_SELF: Final = str(Path(__file__).with_name("machine.py"))
# What the worker is started with: this process' own search path, and no code but that of machine.py and what it imports.
_START: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("tensorwright_llvm_worker", sys.argv[2])
worker = module_from_spec(spec)
spec.loader.exec_module(worker)
worker.serve()
"""


class _Worker:
    """One process. Requests are answered in turn."""

    def __init__(self) -> None:
        path = json.dumps([os.path.abspath(p) for p in sys.path])
        words = [sys.executable, "-I", "-S", "-c", _START, path, _SELF]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._turn = threading.Lock()

    def ask(self, text: str, target: Target) -> bytes:
        """Object code. Raises CompileError for text that LLVM refuses, OSError if the process is not there any more."""
        words = [w.encode() for w in (target.triple, target.cpu, target.features, text)]
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None
        with self._turn:
            sink.write(HEAD.pack(*map(len, words)))
            for w in words:
                sink.write(w)
            sink.flush()
            head = source.read(ANSWER.size)
            if len(head) != ANSWER.size:
                raise OSError(f"the compile worker ended with status {self._process.poll()}")
            done, size = ANSWER.unpack(head)
            answer = source.read(size)
        if len(answer) != size:
            raise OSError(f"the compile worker ended with status {self._process.poll()}")
        if not done:
            raise CompileError(f"LLVM refused the generated text (a bug in the emitter): {answer.decode(errors='replace')}")
        return answer

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # it is gone: nothing is left to be written
        self._process.kill()
        self._process.wait()


class Workers:
    """As many processes as there are cores to spare, for as long as the block lasts; none where they cannot be started."""

    def __init__(self, count: int) -> None:
        self._workers: list[_Worker] = []
        self._next = 0
        if not sys.executable:
            return  # an embedded interpreter: LLVM runs in this process
        try:
            for _ in range(count):
                self._workers.append(_Worker())
        except OSError:
            self.close()

    def __bool__(self) -> bool:
        return bool(self._workers)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for w in self._workers:
            w.close()
        self._workers = []

    def begin(self, text: str, entry: str, target: Target, most: int) -> Callable[[], list[bytes]]:
        """The objects of a module, cut into as many as `most` pieces; what is returned waits for them."""
        texts = pieces(text, entry, min(most, max(1, len(self._workers))))
        found: list[bytes | BaseException] = [b""] * len(texts)

        def work(k: int, worker: _Worker | None) -> None:
            try:
                found[k] = _made(texts[k], target, worker)
            except BaseException as error:  # raised where the result is waited for
                found[k] = error

        threads = []
        for k in range(len(texts)):
            worker = self._workers[self._next % len(self._workers)] if self._workers else None
            self._next += 1
            threads.append(threading.Thread(target=work, args=(k, worker), name="tensorwright-llvm", daemon=True))
            threads[-1].start()

        def wait() -> list[bytes]:
            for t in threads:
                t.join()
            done: list[bytes] = []
            for x in found:
                if isinstance(x, BaseException):
                    raise x
                done.append(x)
            return done

        return wait


def _made(text: str, target: Target, worker: _Worker | None) -> bytes:
    if worker is not None:
        try:
            return worker.ask(text, target)
        except OSError:
            pass  # killed, for its memory perhaps: the same code is made here
    return object_code(text, target)
