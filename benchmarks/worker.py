"""The process of one contestant of the inference benchmark: `python -m tensorwright.benchmarks.worker --worker PEER NAME ...`.

What it says when it is ready: the time to import the peer's package, and the memory after that; the time to compile (from the
model in the peer's hands to an executable); the time of the first call.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from tensorwright.benchmarks.peers import ASIDE, COMPILE_ONLY, PEERS, Entry, Task
from tensorwright.benchmarks.serving import memory, serve


def main(words: list[str]) -> None:
    _, contestant, name, folder, precision, count = words
    task = Task(name, Path(folder), int(count), precision)
    peer = {**PEERS, **ASIDE, **COMPILE_ONLY}[contestant]
    entries: list[Entry] = []

    def make() -> tuple[Any, dict[str, Any]]:
        start = time.perf_counter()
        for module in peer.imports:
            importlib.import_module(module)
        facts: dict[str, Any] = {"import": time.perf_counter() - start, "import_rss": memory("VmRSS")}
        build = peer.enter(task)
        start = time.perf_counter()
        entry = build()
        facts["build"] = time.perf_counter() - start
        entries.append(entry)
        return entry.run, facts | entry.facts

    def arrays(found: Any) -> Any:
        return entries[0].results(found)

    serve(make, str(task.folder / f"{contestant}.npz"), task.threads, arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
