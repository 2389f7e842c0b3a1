"""Exported CUDA programs: a folder of PTX per SM with a manifest, which loads and runs without compiling.

    manifest.json        format, name, kernels, arguments, launch plans, the files with sizes and checksums, its own checksum
    model-HASH.tw        graph and weights (runtime/artifact.py)
    main.sm_80-HASH.ptx, prepare.sm_80-HASH.ptx, ...      the text that a driver takes, for each SM and each set of sizes
    main.sm_80-HASH.bin  constants, and the loop IR that errors name lines of

Files are named by their contents and written first; the manifest is put in place by one rename, last. So a folder holds the old
export or the new one, whenever its writer is stopped. PTX is code: load folders from where you would install programs from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from ..ir.cuda_program import CudaProgram
from ..ir.errors import ArtifactError, CompileError, InputError
from ..ir.graphs import specialize
from ..ir.target import CUDA_ROWS, Target, row
from ..runtime import artifact
from ..runtime.compiled import Compiled, Text
from ..runtime.container import DamagedError, pack, unpack, write_atomically
from ..runtime.cuda.devices import open_device
from ..runtime.cuda.stored import decode_program, encode_program
from .compiling import EMULATOR, CudaCompiler, _estimate, resolve, text_of

if TYPE_CHECKING:
    from ..runtime.cuda.device import Device
    from ..runtime.cuda.executable import CudaExecutable

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
MAGIC: Final = b"TWCUDA01"
_KIND: Final = "tensorwright CUDA export"
_STAGES: Final = ("loops", "ptx", "sass")  # a folder holds no LLVM IR
_MOST: Final = 1 << 28  # bytes of a manifest that are read


def export(compiler: CudaCompiler, exe: CudaExecutable, folder: Path, sms: Sequence[int]) -> None:
    """See `CudaExecutable.export`."""
    rows = {t.sm: t for t in CUDA_ROWS.values()}
    wrong = [sm for sm in sms if sm not in rows]
    if wrong or not sms:
        raise InputError(f"sms={tuple(sms)}: expected some of {tuple(rows)}")
    met = exe.met
    if not met:
        raise InputError(
            f"{exe.graph.name} is compiled per size and has not met one: call it, or exe.specialise({exe.symbols[0]}=...), first"
        )
    old = _files_of(folder)
    files: dict[str, bytes] = {}
    programs: list[dict[str, Any]] = []
    for sm in dict.fromkeys(sms):
        for sizes, here in met:
            same = rows[sm] == compiler.target
            made = here if same else replace(compiler, target=rows[sm])(sizes)
            programs.append({"sm": sm, "sizes": sizes, **_program_files(made, sm, files)})
    with TemporaryDirectory(prefix="tensorwright-export-") as place:
        model = Path(place) / "model.tw"
        exe.save(model)
        name = _keep(files, "model", ".tw", model.read_bytes())
    from .. import __version__

    manifest: dict[str, Any] = {
        "kind": _KIND,
        "format": FORMAT,
        "tensorwright": __version__,
        "name": exe.graph.name,
        "model": name,
        "inputs": [[n, str(t)] for n, t in exe.arguments],
        "outputs": list(exe.output_names),
        "programs": programs,
        "files": {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()},
    }
    manifest["checksum"] = _checksum(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    for n, data in files.items():
        write_atomically(folder / n, data)
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for n in old - files.keys():
        with contextlib.suppress(OSError):  # of the old export; what stays is named by nothing
            (folder / n).unlink()


def _keep(files: dict[str, bytes], stem: str, suffix: str, data: bytes) -> str:
    name = f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    files[name] = data
    return name


def _program_files(made: Compiled, sm: int, files: dict[str, bytes]) -> dict[str, Any]:
    """The manifest's part on a program and the one that prepares its weights."""
    done: dict[str, Any] = {"prepare_key": made.prepare_key}
    for which, program in (("run", made.run), ("prepare", made.prepare)):
        if program is None:
            done[which] = None
            continue
        assert isinstance(program, CudaProgram)
        parts: dict[str, bytes] = {}
        meta = encode_program(program, "", parts)
        stem = f"{program.name}.sm_{sm}"
        ptx = _keep(files, stem, ".ptx", parts.pop("/ptx"))
        for k, kernel in enumerate(meta["kernels"]):
            parts[f"/source{k}"] = kernel.pop("source").encode()
        rest = _keep(files, stem, ".bin", pack(MAGIC, {}, parts))
        done[which] = {"ptx": ptx, "rest": rest, "program": meta}
    return done


def _checksum(manifest: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files_of(folder: Path) -> set[str]:
    """The files of an export that is in a folder. Raises InputError where something else is."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; an export is a folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["kind"] == _KIND:
            return {str(n) for n in manifest["files"] if Path(n).name == n}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no manifest of ours: it must be empty, but for what an export left that was stopped
    others = [p.name for p in folder.iterdir() if p.suffix not in (".ptx", ".bin", ".tw", ".tmp")]
    if others:
        raise InputError(f"{folder} holds {sorted(others)[:3]}, which no export wrote; name a folder that is new or empty")
    return set()


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Loaded:
    """Gives an Executable the programs of a folder in place of a compiler."""

    folder: Path
    graph: Any
    programs: tuple[tuple[Mapping[str, int], Compiled], ...]

    def __call__(self, sizes: Mapping[str, int]) -> Compiled:
        for there, compiled in self.programs:
            if dict(there) == dict(sizes):
                return compiled
        known = "; ".join(", ".join(f"{n}={v}" for n, v in there.items()) for there, _ in self.programs)
        asked = ", ".join(f"{n}={v}" for n, v in sizes.items())
        raise CompileError(f"{self.folder} was exported for {known}, not for {asked}: export it after a call with these sizes")


def load_folder(folder: Path, target: str | Target | None = None) -> CudaExecutable:
    """The Executable of an exported folder, on a GPU (the default), on the emulator, or for one of its SMs.

    Raises ArtifactError for a folder that is damaged, incomplete or of a newer version; CompileError where it has no code for
    the device; RuntimeUnavailableError for 'cuda' without one; InputError for another target.
    """
    from ..runtime.cuda.executable import CudaExecutable

    manifest = _manifest(folder)
    sms = sorted({_of(folder, p, "sm", int) for p in _of(folder, manifest, "programs", list)})
    sm, device = _device(folder, sms, target)
    model = artifact.loads(_read(folder, manifest, _of(folder, manifest, "model", str)), str(folder))
    programs = []
    for p in manifest["programs"]:
        if p["sm"] == sm:
            sizes = _of(folder, p, "sizes", dict)
            if not all(type(v) is int and v > 0 for v in sizes.values()):
                raise ArtifactError(f"{folder} has no sound {MANIFEST}: sizes {sizes!r:.80}")
            programs.append((sizes, _compiled(folder, manifest, p, model.graph, sizes)))
    return CudaExecutable(
        *(model.graph, _Loaded(folder, model.graph, tuple(programs)), model.parameters),
        device=device,
        estimate=_estimate,
        save=lambda exe, path: artifact.save(path, exe.graph, exe.parameters, model.remarks),
    )


def _device(folder: Path, sms: Sequence[int], target: str | Target | None) -> tuple[int, Callable[[], Device]]:
    """The SM to take of those in the folder, and what opens its device."""
    name = target.name if isinstance(target, Target) else target or "cuda"
    there = ", ".join(f"sm_{sm}" for sm in sms)
    if name in CUDA_ROWS:
        if row(name).sm not in sms:
            raise CompileError(f"{folder} holds code for {there}, not for {name}: export it with sms=({row(name).sm},)")
        return row(name).sm, resolve(name)[1]
    if name not in ("cuda", EMULATOR):
        raise InputError(f"{folder} holds CUDA programs: target is 'cuda', {EMULATOR!r} or one of {there}, not {name!r}")
    device = open_device(name)
    fits = [sm for sm in sms if sm <= device.sm]
    if not fits:
        raise CompileError(f"{folder} holds code for {there}; {device.name} is an sm_{device.sm}: export it with a lesser SM")
    return max(fits), lambda: device


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MOST:
            raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes: it is no manifest")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no export: it has no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / MANIFEST} is cut off or was changed: {error}; export the model again") from error
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        raise ArtifactError(f"{folder / MANIFEST} is not that of an export of Tensorwright")
    if found.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} has format {found.get('format')!r}, written by Tensorwright {found.get('tensorwright')}; this one reads "
            f"format {FORMAT}: update Tensorwright, or export the model again"
        )
    if found.get("checksum") != _checksum(found):
        raise ArtifactError(f"the checksum of {folder / MANIFEST} does not match: it was changed; export the model again")
    return found


def _of(folder: Path, entry: Any, key: str, kind: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ArtifactError(f"{folder} has no sound {MANIFEST}: {key} is {value!r:.80}")
    return value


def _read(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """A file of the folder, as the manifest describes it."""
    about = _of(folder, _of(folder, manifest, "files", dict), name, dict)
    if Path(name).name != name:
        raise ArtifactError(f"{folder}: {name!r} is not a file of the folder")
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{folder} lacks {name}: it was not copied whole; export the model again") from None
    if len(data) != about.get("bytes") or hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise ArtifactError(f"{folder / name} is cut off or was changed: its checksum does not match; export the model again")
    return data


def _compiled(folder: Path, manifest: Mapping[str, Any], entry: Any, graph: Any, sizes: Mapping[str, int]) -> Compiled:
    run = _program(folder, manifest, _of(folder, entry, "run", dict))
    prepare = None if entry.get("prepare") is None else _program(folder, manifest, _of(folder, entry, "prepare", dict))
    texts: dict[str, Text] = {"graph": lambda: str(specialize(graph, sizes))}
    for stage in _STAGES:
        texts[stage] = functools.partial(text_of, stage, run, prepare)
    pair: tuple[Any, Any] = (run, prepare)
    _fits(folder, graph, run, sizes)
    return Compiled(
        run=pair[0], prepare=pair[1], prepare_key=_of(folder, entry, "prepare_key", str), texts=texts, from_cache=True
    )


def _program(folder: Path, manifest: Mapping[str, Any], entry: Any) -> CudaProgram:
    name = _of(folder, entry, "ptx", str)
    meta = _of(folder, entry, "program", dict)
    try:
        _, rest = unpack(MAGIC, _read(folder, manifest, _of(folder, entry, "rest", str)))
        parts: dict[str, bytes | memoryview] = {**rest, "/ptx": _read(folder, manifest, name)}
        kernels = [{**k, "source": bytes(parts[f"/source{n}"]).decode()} for n, k in enumerate(meta["kernels"])]
        return decode_program({**meta, "kernels": kernels}, "", parts)
    except (DamagedError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder}: its program {name} cannot be read: {error}; export the model again") from error


def _fits(folder: Path, graph: Any, run: CudaProgram, sizes: Mapping[str, int]) -> None:
    """Raises ArtifactError where a program's arguments are not those of the graph."""
    types = {str(i.attrs["name"]): i.tensor for i in graph.inputs}
    for a in run.inputs:
        known = types.get(a.name)
        if a.role == "prepared":
            continue
        if known is None or known.with_sizes(sizes).static_shape != a.type.static_shape or known.dtype is not a.type.dtype:
            raise ArtifactError(f"{folder}: its program takes {a.name}: {a.type}, the graph has {known}")
    if len(run.outputs) != len(graph.outputs):
        raise ArtifactError(f"{folder}: its program has {len(run.outputs)} outputs, the graph {len(graph.outputs)}")


__all__ = ["export", "load_folder"]
