"""The command line: most commands in this process (fast), and one whole run through the installed entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorwright import cli

MODEL = """
import tensorwright as tw
from tensorwright import nn

class Net(nn.Module):
    def __init__(self):
        self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 4)
    def __call__(self, x):
        return tw.softmax(self.b(tw.relu(self.a(x))), -1)

def add(x, y):
    return x + y

def broken(x):
    return x @ x

def raises(x):
    return x.shape[7]

def builder():
    raise ValueError("cannot build")

specs = [tw.spec("N", 20)]
model = Net()
"""
GRAPH = """graph @g(%x: f32[2, 3] data, %w: f32[3, 4] parameter) -> (y: f32[2, 4]) {
  %0 = matmul(%x, %w) : f32[2, 4]
  %1 = neg(%0) : f32[2, 4]
  %2 = neg(%1) : f32[2, 4]
  return %2
}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORWRIGHT_CACHE", str(tmp_path / "cache"))
    Path("m.py").write_text(MODEL)
    Path("g.txt").write_text(GRAPH)
    yield
    sys.modules.pop("m", None)


def test_help_of_every_command_says_what_it_does(capsys):
    names = ["demo", "compile", "run", "inspect", "opt", "reduce", "bench kernels", "bench inference", "doctor"]
    for name in names:
        with pytest.raises(SystemExit) as stop:
            cli.main([*name.split(), "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and len(text.splitlines()) > 6, name
        assert "usage: tensorwright " + name in text
        if name not in ("inspect", "opt", "reduce"):
            assert "--json" in text, name
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(n.split(" ", maxsplit=1)[0] in text for n in names)


def test_compile_saves_what_run_loads(capsys):
    assert cli.main(["compile", "m.py:Net", "--size", "N=8", "-o", "net.tw", "--json", "c.json"]) == 0
    figures = json.loads(Path("c.json").read_text())
    assert figures["memory"]["inputs"] == 8 * 20 * 4 and figures["kernels"] and figures["passes"]
    assert "saved to net.tw" in capsys.readouterr().out
    np.save("x.npy", np.ones((3, 20), np.float32))
    assert cli.main(["run", "net.tw", "--input", "x.npy", "--output", "y.npz", "--repeat", "2", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["milliseconds"] > 0, "standard output must hold the JSON alone"
    assert np.load("y.npz")["y"].sum(1) == pytest.approx(np.ones(3), abs=1e-5)


def test_run_checks_and_profiles(capsys):
    assert cli.main(["run", "m.py", "--size", "N=4", "--check", "--profile", "--repeat", "2", "--json", "r.json"]) == 0
    figures = json.loads(Path("r.json").read_text())
    assert figures["max_rel_error"] < 1e-5
    assert figures["profile"]["kernels"][0]["milliseconds"] >= 0
    assert "relative error" in capsys.readouterr().out


def test_inspect_lists_stages_and_its_graph_text_is_a_model_again(capsys):
    assert cli.main(["inspect", "m.py:add", "--spec", "3,4", "--spec", "3,4"]) == 0
    stages = capsys.readouterr().out.split()
    assert stages[0] == "graph" and stages[-1] == "asm"
    assert cli.main(["inspect", "m.py:add", "--spec", "3,4", "--spec", "3,4", "--stage", "graph"]) == 0
    Path("add.txt").write_text(capsys.readouterr().out)
    assert cli.main(["run", "add.txt", "--check", "--repeat", "1"]) == 0


def test_run_takes_its_sizes_from_the_arrays_and_writes_to_the_file_that_is_named(capsys):
    np.save("x.npy", np.ones((3, 20), np.float32))
    assert cli.main(["run", "m.py", "--input", "x.npy", "--check", "--repeat", "1", "--output", "y.dat"]) == 0
    assert "relative error" in capsys.readouterr().out
    with np.load("y.dat") as found:
        assert found["y"].shape == (3, 4)
    assert not Path("y.dat.npz").exists()


def test_opt_applies_passes_and_fuel_limits_them(capsys):
    assert cli.main(["opt", "g.txt", "--passes", "simplify", "--validate"]) == 0
    assert "neg" not in capsys.readouterr().out
    assert cli.main(["opt", "g.txt", "--passes", "simplify", "--fuel", "0", "-o", "out.txt"]) == 0
    assert Path("out.txt").read_text().count("neg(") == 2
    assert cli.main(["opt", "--list"]) == 0
    assert "simplify" in capsys.readouterr().out


def test_reduce_of_a_graph_on_which_nothing_is_wrong(capsys):
    assert cli.main(["reduce", "g.txt", "--passes", "simplify"]) == 1
    assert "do nothing wrong" in capsys.readouterr().err


def test_reduce_shrinks_to_the_guilty_nodes(capsys, monkeypatch):
    from tensorwright.passes import simplify

    original = simplify.Simplify.run

    def wrong(self, graph, ctx):
        graph = original(self, graph, ctx)
        if not any(n.op.name == "tanh" for n in graph.nodes()):
            return graph
        return graph.map_nodes(lambda n, i: n.replace(i) if n.op.name != "tanh" else i[0])

    monkeypatch.setattr(simplify.Simplify, "run", wrong)
    lines = [f"  %{k + 1} = {'tanh' if k == 7 else 'sin'}(%{k}) : f32[3]" for k in range(12)]
    body = "\n".join(["  %0 = sin(%x) : f32[3]", *lines])
    Path("bad.txt").write_text(f"graph @bad(%x: f32[3] data) -> (y: f32[3]) {{\n{body}\n  return %12\n}}\n")
    assert cli.main(["reduce", "bad.txt", "--passes", "simplify", "-o", "small.txt"]) == 0
    small = Path("small.txt").read_text()
    assert "tanh" in small and small.count(" = ") <= 3
    assert "1 of 13 nodes" in capsys.readouterr().err


def test_doctor_reports_the_machine(capsys):
    assert cli.main(["doctor", "--no-peaks", "--json", "d.json"]) == 0
    out = capsys.readouterr().out
    for word in ("target row", "OpenMP", "TENSORWRIGHT_THREADS", "cache", "llvmlite", "runs here"):
        assert word in out
    assert json.loads(Path("d.json").read_text())["threads"]["threads used"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.txt"], "there is no file 'none.txt'"),
        (["compile", "m.py:nothing"], "m.py has no 'nothing'"),
        (["compile", "m.py:broken"], "m.py:"),
        (["compile", "m.py:add"], "add: missing a required argument: 'y'"),
        (["compile", "m.py:add", "--spec", "3,x y"], r"--spec '3,x y'"),
        (["run", "m.py"], "give them: --size N=8"),
        (["run", "m.py", "--size", "N"], "--size 'N'"),
        (["compile", "m.py", "--target", "z80"], "unknown target 'z80'"),
        (["run", "cut.txt"], r"cut\.txt: line \d+, column \d+"),
        (["run", "cut.tw"], r"cut\.tw is not a sound \.tw file"),
        (["run", "binary.txt"], "binary.txt is not text"),
        (["opt", "g.txt", "--passes", "simplfy"], "did you mean: simplify"),
        (["opt", "g.txt"], "opt needs FILE and --passes"),
        (["opt", "none.txt", "--passes", "simplify"], "No such file"),
        (["bench", "inference", "--models", "gpt9"], "unknown workload 'gpt9'"),
        (["compile", "syntax.py:f"], r"syntax\.py:1: not valid Python: .*def f\(x\)"),
        (["compile", "stops.py"], r"stops\.py:2: sys\.exit\(3\)\n  raised SystemExit: 3, while loading it"),
        (["compile", "specs.py:f"], "specs is a int; expected a list with one tw.spec"),
        (["compile", "m.py:raises"], r"m\.py:\d+: return x\.shape\[7\]\n  raised IndexError: .* while tracing"),
        (["compile", "m.py:builder"], r"m\.py:\d+: raise ValueError.*\n  raised ValueError: cannot build, while calling builder"),
        (["compile", "m.py", "--size", "N=99999999999999999999"], r"would take .* bytes; an array has at most 2\*\*56"),
        (["run", "m.py", "--size", "N=100000000000"], "not enough memory: .*; give smaller sizes"),
        (["compile", "m.py"], "give them: --size N=8"),
        (["compile", "m.py", "--size", "M=8"], "--size M=8: Net has no such size; its symbolic sizes are N"),
        (["run", "g.txt", "--size", "N=8"], "all its sizes are numbers"),
        (["run", "m.py", "--input", "x.npy", "--size", "N=9"], "--size N=9, but the arrays given with --input make it 3"),
        (["run", "m.py", "--input", "cut.npy"], r"cut\.npy: expected one array as numpy.save writes it"),
        (["run", "m.py", "--input", "objects.npy"], r"objects\.npy: .*: it is no such file, or it holds Python objects"),
        (["run", "m.py", "--input", "w.npz"], "got an archive of arrays: q"),
        (["run", "m.py", "--input", "folder"], "Is a directory: folder"),
        (["compile", "m.py", "--spec", "8,20", "--weights", "cut.npy"], r"cut\.npy: expected \.safetensors, or \.npz"),
        (["compile", "m.py", "--spec", "8,20", "--weights", "x.npy"], "one array without a name"),
        (["compile", "g.txt", "-o", "folder"], "cannot write a file here, it is a folder: folder"),
        (["run", "g.txt", "--json", "none/x.json"], "cannot write none/x.json: there is no folder"),
        (["compile", "g.txt", "--dump", "x.npy"], "Not a directory: x.npy"),
        (["demo", "--target", "aarch64-neon"], "cannot run aarch64-neon"),
    ],
)
def test_errors_are_one_message_without_a_traceback(capsys, arguments, message):
    import re

    Path("cut.txt").write_text(GRAPH[:90])
    Path("cut.tw").write_bytes(b"TWMODEL1 and no more")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("syntax.py").write_text("def f(x)\n    return x\n")
    Path("stops.py").write_text("import sys\nsys.exit(3)\n")
    Path("specs.py").write_text("specs = 5\ndef f(x):\n    return x\n")
    Path("folder").mkdir()
    np.save("x.npy", np.zeros((3, 20), np.float32))
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:150])
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.savez("w.npz", q=np.zeros(3, np.float32))
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("tensorwright: ") and "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["run"], ["run", "m.py", "--threads", "0"], ["opt", "--fuel", "-1"]])
def test_a_command_line_that_makes_no_sense_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_installed_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "tensorwright.cli", "run", "g.txt", "--repeat", "1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0 and "ms a call" in done.stdout, done.stderr
