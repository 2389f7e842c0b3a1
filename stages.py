"""What a compilation leaves to read: the text of each stage, and files of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .ir.graph import Graph
from .ir.program import Program
from .runtime.compiled import PassRecord, Text
from .settings import Flags

if TYPE_CHECKING:
    from .passes.contract import PassResult

CODE_STAGES: Final = ("loops", "llvm", "asm")


def dump_folder(now: Flags, graph: Graph, sizes: Mapping[str, int]) -> Path | None:
    """Where the texts of a compilation go, made now; None where nobody asked for them."""
    if not now.dump:
        return None
    name = re.sub(r"\W+", "_", "_".join([graph.name, *(f"{n}{size}" for n, size in sorted(sizes.items()))]))
    folder = Path(now.dump) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_texts(graph: Graph, results: Sequence[PassResult], prepare: Graph | None) -> dict[str, Text]:
    """The texts of the traced graph, of what each pass made of it, and of the prepare graph."""
    texts: dict[str, Text] = {"graph": functools.partial(str, graph)}
    texts |= {n: functools.partial(str, r.after) for n, r in zip(stage_names([r.name for r in results]), results, strict=True)}
    return texts if prepare is None else texts | {"prepare": functools.partial(str, prepare)}


def dump_code(folder: Path | None, texts: Mapping[str, Text], stages: Sequence[str], passes: int) -> None:
    """Writes the texts after those of the passes, which were written as they were made; nothing where nobody asked."""
    if folder is None:
        return
    for k, stage in enumerate((*(["prepare"] if "prepare" in texts else []), *stages), start=passes + 1):
        text = texts[stage]
        (folder / f"{k:03}_{stage}.txt").write_text(text if isinstance(text, str) else text(), encoding="utf-8")


def regenerated(again: Callable[[], Mapping[str, Text]], stage: str) -> str:
    text = again()[stage]
    return text if isinstance(text, str) else text()


def record_of(result: PassResult) -> PassRecord:
    return PassRecord(result.name, result.kind, result.nodes_before, result.nodes_after, result.ms, result.changed)


def stage_names(passes: Sequence[str]) -> list[str]:
    """A name per pass; the second of a name gets '.2'."""
    seen: dict[str, int] = {}
    names = []
    for p in passes:
        seen[p] = seen.get(p, 0) + 1
        names.append(p if seen[p] == 1 else f"{p}.{seen[p]}")
    return names


def code_text(stage: str, run: Program, prepare: Program | None) -> str:
    if prepare is None:
        return run.texts[stage]
    mark = "; " if stage == "llvm" else "# "
    return f"{mark}---- prepare: once per set of weights\n{prepare.texts[stage]}\n{mark}---- run\n{run.texts[stage]}"
