"""Exported folders: loaded without compiling, the same results, and what is said of damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright import nn
from tensorwright.cuda import compiling, export
from tensorwright.ir.errors import ArtifactError, CompileError, InputError, RuntimeUnavailableError
from tensorwright.runtime.container import DamagedError
from tensorwright.runtime.cuda import devices, stored
from tensorwright.runtime.cuda.executable import CudaExecutable

pytestmark = pytest.mark.unvalidated("the passes are those of other tests: this is about files")
R = np.random.default_rng(0)


class Net(nn.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 3)

    def __call__(self, x: Any) -> Any:
        return tw.softmax(self.second(tw.tanh(self.first(x))), axis=-1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CudaExecutable, Path]:
    exe = tw.compile(Net(), tw.spec("N", 7), target="cuda-emulator")
    assert isinstance(exe, CudaExecutable)
    for n in (5, 2):
        exe.specialise(N=n)
    folder = tmp_path_factory.mktemp("export") / "net"
    exe.export(folder)
    return exe, folder


def test_a_folder_runs_without_compiling(made: tuple[CudaExecutable, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    exe, folder = made

    def no(*args: Any, **options: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiling.CudaCompiler, "__call__", no)
    loaded = tw.load(folder, target="cuda-emulator")
    for n in (2, 5):
        x = R.standard_normal((n, 7)).astype("f4")
        np.testing.assert_array_equal(loaded(x), exe(x))
    assert loaded.text("ptx") == exe.text("ptx")
    assert loaded.text("loops") == exe.text("loops")
    assert [k.name for k in loaded.profile(estimate=True).kernels] == [k.name for k in exe.profile(estimate=True).kernels]
    with pytest.raises(CompileError, match=r"was exported for N=5; N=2, not for N=3"):
        loaded(np.zeros((3, 7), "f4"))
    new = {n: v + np.float32(0.5) for n, v in exe.parameters.items()}
    loaded.set_parameters(new)
    assert not (loaded(x) == exe(x)).all()
    assert isinstance(loaded, CudaExecutable)
    with pytest.raises(InputError, match="copy that"):
        loaded.export(folder)


def test_the_manifest_says_what_is_there(made: tuple[CudaExecutable, Path]) -> None:
    _, folder = made
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert [(p["sm"], p["sizes"]["N"]) for p in manifest["programs"]] == [(s, n) for s in (75, 80, 90) for n in (5, 2)]
    run = manifest["programs"][0]["run"]
    assert {"kernels", "plan", "inputs", "outputs", "arena_bytes", "aliases"} <= run["program"].keys()
    text = (folder / run["ptx"]).read_text()
    assert ".target sm_75" in text
    assert all(k["name"] in text for k in run["program"]["kernels"])


def test_which_code_is_taken(made: tuple[CudaExecutable, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exe, folder = made
    assert ".target sm_75" in tw.load(folder, target="cuda-sm_75").specialise(N=5).run.texts["ptx"]
    assert ".target sm_80" in tw.load(folder, target="cuda-emulator").specialise(N=5).run.texts["ptx"]  # it is an sm_80
    only = tmp_path / "only"
    exe.export(only, sms=[90])
    with pytest.raises(
        CompileError, match=r"holds code for sm_90; PTX emulator \(numpy\) is an sm_80: export it with a lesser SM"
    ):
        tw.load(only, target="cuda-emulator")
    with pytest.raises(CompileError, match=r"holds code for sm_90, not for cuda-sm_80: export it with sms=\(80,\)"):
        tw.load(only, target="cuda-sm_80")
    with pytest.raises(InputError, match="holds CUDA programs"):
        tw.load(only, target="host")
    with pytest.raises(InputError, match=r"sms=\(70,\): expected some of \(75, 80, 90\)"):
        exe.export(only, sms=[70])
    monkeypatch.setattr(devices, "missing", lambda: [devices.NO_DRIVER])
    with pytest.raises(RuntimeUnavailableError, match="no NVIDIA driver"):
        tw.load(folder)


def test_an_export_replaces_one_and_nothing_else(made: tuple[CudaExecutable, Path], tmp_path: Path) -> None:
    exe, folder = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    exe.export(copy, sms=[80])
    assert not list(copy.glob("*sm_75*"))
    assert tw.load(copy, target="cuda-emulator").graph.name == exe.graph.name
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt.*which no export wrote"):
        exe.export(other)
    with pytest.raises(InputError, match="is a file"):
        exe.export(other / "thesis.txt")
    fresh = tw.compile(Net(), tw.spec("N", 7), target="cuda-sm_80")
    assert isinstance(fresh, CudaExecutable)
    with pytest.raises(InputError, match="has not met one"):
        fresh.export(tmp_path / "none")


def test_an_export_that_is_stopped_leaves_the_old_one(
    made: tuple[CudaExecutable, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exe, folder = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    changed = {n: v + np.float32(1) for n, v in exe.parameters.items()}
    fresh = tw.compile(Net(), tw.spec(5, 7), target="cuda-emulator")
    assert isinstance(fresh, CudaExecutable)
    fresh.set_parameters(changed)
    real = os.replace

    def stopped(source: Any, to: Any) -> None:
        if Path(to).name == "manifest.json":
            raise KeyboardInterrupt
        real(source, to)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        fresh.export(copy, sms=[80])
    monkeypatch.undo()
    x = R.standard_normal((5, 7)).astype("f4")
    np.testing.assert_array_equal(tw.load(copy, target="cuda-emulator")(x), exe(x))
    fresh.export(copy, sms=[80])
    np.testing.assert_array_equal(tw.load(copy, target="cuda-emulator")(x), fresh(x))


def changed(key: str, value: Any) -> Callable[[Path], None]:
    """Rewrites the manifest with one entry changed and its checksum right."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[key] = value(manifest[key]) if callable(value) else value
        manifest["checksum"] = export._checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[:-7])

    return change


def edited(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"arena_bytes": ', '"arena_bytes": 1', 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "has no manifest.json": lambda f: (f / "manifest.json").unlink(),
    "manifest.json is cut off or was changed": cut("manifest.json"),
    "checksum of .*manifest.json does not match": edited,
    "has format 2, written by Tensorwright .*update Tensorwright": changed("format", 2),
    "is not that of an export": changed("kind", "something else"),
    r"\.ptx is cut off or was changed": cut("main.sm_80*.ptx"),
    r"\.bin is cut off or was changed": cut("main.sm_80*.bin"),
    r"\.tw is cut off or was changed": cut("*.tw"),
    r"lacks main\.sm_80": lambda f: [p.unlink() for p in f.glob("main.sm_80*.ptx")],
    "programs is 3": changed("programs", 3),
    "model is None": changed("model", None),
    "no kernel other": changed("programs", lambda ps: [_with(p, lambda m: m["kernels"][0].update(name="other")) for p in ps]),
    "lies outside slot": changed(
        "programs", lambda ps: [_with(p, lambda m: m.update(arena_bytes=1, outputs=_small(m))) for p in ps]
    ),
    "expected the fields of CudaKernel": changed(
        "programs", lambda ps: [_with(p, lambda m: m["kernels"][0].pop("grid")) for p in ps]
    ),
    "expected a node of a plan": changed(
        "programs", lambda ps: [_with(p, lambda m: m.update(plan=[{"is": "Jump"}])) for p in ps]
    ),
    "expected int": changed("programs", lambda ps: [_with(p, lambda m: m.update(arena_bytes="1")) for p in ps]),
}


def _with(entry: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    change(entry["run"]["program"])
    return entry


def _small(meta: dict[str, Any]) -> list[Any]:
    return [{**o, "type": [o["type"][0], [1]]} for o in meta["outputs"]]


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_found(says: str, made: tuple[CudaExecutable, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[1], copy)
    DAMAGE[says](copy)
    with pytest.raises(ArtifactError, match=says):
        tw.load(copy, target="cuda-emulator")


def test_every_program_of_a_plan_reads_back() -> None:
    """Loops with moving pointers, branches and `while`: the same program after JSON."""

    def cell(h: Any, x: Any) -> tuple[Any, Any]:
        h = tw.tanh(h + x)
        return h, h

    def model(h: Any, xs: Any) -> Any:
        y = tw.scan(cell, h, xs)[0]
        return tw.cond(tw.sum(y) > 0.0, lambda: y * 2.0, lambda: y - 1.0)

    run: Any = tw.compile(model, tw.spec(5), tw.spec(7, 5), target="cuda-sm_80").compiled.run
    parts: dict[str, bytes] = {}
    meta = json.loads(json.dumps(stored.encode_program(run, "run", parts)))
    back = stored.decode_program(meta, "run", parts)
    for name in ("plan", "kernels", "inputs", "outputs", "aliases", "arena_bytes", "infos", "target", "ptx", "use"):
        assert getattr(back, name) == getattr(run, name)
    with pytest.raises(DamagedError):
        stored.decode_program({**meta, "plan": meta["plan"][0]}, "run", parts)
