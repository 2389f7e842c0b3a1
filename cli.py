"""The command line, `tensorwright`: parses, calls the command, and turns errors into one clear message and an exit code.

Exit codes: 0 done; 1 an error of ours or of a file; 2 a command line that makes no sense; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .ir.errors import TensorwrightError
from .settings import config

Command = Callable[[argparse.Namespace], Any]

_MODEL_HELP = """\
MODEL is one of
  FILE.py:NAME   a Module, a function of Tensors, or a function without arguments that returns one of these;
                 give the arguments' types with --spec, or let FILE.py define `specs`
  FILE.tw        a saved model
  FILE.onnx      an ONNX model (needs the extra [onnx])
  FILE           the text of a graph (as `inspect --stage graph` prints it)"""

METRICS = ("accuracy", "agreement", "cosine")

_SPEC_HELP = "type of one argument: 1,784 or N,3,224,224 (N: any size) or 8,16:i64; once per argument, in order"


_TARGET_HELP = (
    "host (default), x86-64-v2, x86-64-v3, x86-64-v4 or aarch64-neon; cuda, cuda-sm_75, cuda-sm_80, cuda-sm_90 or cuda-emulator"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    changes = {k: v for k in ("threads", "cache", "checked", "winograd") if (v := getattr(args, k, None)) is not None}
    try:
        destination = getattr(args, "json", None)
        for path in (destination, getattr(args, "output", None)):
            _check_destination(path)
        # with '-', standard output is for the JSON alone
        with config(**changes), contextlib.redirect_stdout(sys.stderr if destination == "-" else sys.stdout):
            result = args.run(args)
        if destination is not None:
            _write_json(destination, result)
        return 0
    except TensorwrightError as error:
        _complain(f"{type(error).__name__}: {error}", getattr(error, "__notes__", ()))
    except BrokenPipeError:
        # the reader of our output has gone (a pager, head): not an error, and nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except MemoryError as error:
        _complain(f"not enough memory: {error}; give smaller sizes")
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    return 1


def _check_destination(path: str | None) -> None:
    """Raises OSError where a file cannot be written: better known before the work than after it."""
    if path is None or path == "-":
        return
    found, folder = Path(path), Path(path).absolute().parent
    if found.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file here, it is a folder", path)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"cannot write {path}: there is no folder", str(folder))
    if not os.access(found if found.exists() else folder, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write", path)


def _complain(message: str, notes: Sequence[str] = ()) -> None:
    print(f"tensorwright: {message}", file=sys.stderr)
    for note in notes:
        print(f"  {note}", file=sys.stderr)


def _write_json(destination: str, result: Any) -> None:
    text = json.dumps(result, indent=1, default=str) + "\n"
    if destination == "-":
        sys.stdout.write(text)
    else:
        Path(destination).write_text(text, encoding="utf-8")


def _lazily(place: str) -> Command:
    """A command 'module:function' of another file, imported when it runs: `--help` stays instant."""
    module, name = place.split(":")

    def run(args: argparse.Namespace) -> Any:
        from importlib import import_module

        command: Command = getattr(import_module(f".{module}", __package__), name)
        return command(args)

    return run


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="tensorwright",
        description="A deep-learning compiler: a Python model becomes one native program. Start with `tensorwright demo`.",
    )
    parser.add_argument("--version", action="version", version=f"tensorwright {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, help: str, place: str, *, description: str = "", figures: bool = True, into: Any = commands) -> Any:
        sub = into.add_parser(
            name, help=help, description=description or help, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=_lazily(place))
        if figures:
            sub.add_argument("--json", metavar="FILE", help="also write the figures as JSON ('-': to standard output)")
        return sub

    def compiling(sub: Any, model: bool = True) -> None:
        if model:
            sub.add_argument("model", metavar="MODEL", help="FILE.py:NAME, FILE.tw, FILE.onnx, or a graph's text")
            sub.add_argument("--spec", action="append", metavar="SHAPE", default=[], help=_SPEC_HELP)
            sub.add_argument("--size", action="append", metavar="N=8", default=[], help="size of a symbolic dimension")
            sub.add_argument(
                "--weights",
                metavar="FILE",
                help="weights by input name: .safetensors or .npz (else those of the Python model, or random ones)",
            )
        sub.add_argument("--target", metavar="ROW", help=_TARGET_HELP)
        sub.add_argument("--threads", type=_count, metavar="N", help="most threads to use (default: all this process may use)")
        sub.add_argument("--no-cache", dest="cache", action="store_const", const="off", help="compile anew, store nothing")
        if model:
            sub.add_argument(
                "--memory-budget", type=_count, metavar="BYTES", help="most bytes a call may need; recompute what does not fit"
            )
            sub.add_argument("--precision", choices=("f32", "bf16"), help="of matrix products and convolutions (default f32)")
            sub.add_argument("--tune", type=float, metavar="SECONDS", help="measure the best candidates for about that long")
        sub.add_argument(
            "--no-winograd",
            dest="winograd",
            action="store_false",
            default=None,
            help="convolutions as direct sums: slower, more exact",
        )
        sub.add_argument("--checked", action="store_true", default=None, help="check every load and store (slow)")

    def report(sub: Any) -> None:
        sub.add_argument("--report", "--html", metavar="FILE", help="write the report: .html (with plots) or .json")

    demo = add("demo", "train a small CNN on real handwritten digits, compiled, and show every stage", "demo:command")
    demo.add_argument("--seeds", type=_count, default=5, metavar="N", help="how many trainings, with seeds 0 to N-1 (default 5)")
    demo.add_argument("--epochs", type=_count, default=15, metavar="N", help="passes over the training data (default 15)")
    demo.add_argument("--dump", metavar="DIR", default="tensorwright-demo", help="folder for the numbered text of every stage")
    compiling(demo, model=False)

    compile_ = add(
        "compile",
        "compile a model; say what was done, or save it as a .tw file",
        "commands.model:compile_command",
        description="Compiles a model and prints passes, kernels, memory and time.\n\n" + _MODEL_HELP,
    )
    compiling(compile_)
    compile_.add_argument("-o", "--output", metavar="FILE.tw", help="save the model: graph and weights, to be loaded anywhere")
    compile_.add_argument("--validate", action="store_true", help="check every pass against the interpreter (slow)")
    compile_.add_argument("--dump", metavar="DIR", help="folder for the numbered text of every stage")

    run = add(
        "run",
        "run a model on arrays (random ones if none are given), profile or check it",
        "commands.model:run_command",
        description="Compiles a model and runs it.\n\n" + _MODEL_HELP,
    )
    compiling(run)
    run.add_argument("--input", action="append", metavar="FILE.npy", default=[], help="an argument; once per argument, in order")
    run.add_argument("--output", metavar="FILE.npz", help="write the outputs here")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random inputs and weights (default 0)")
    run.add_argument("--repeat", type=_count, default=20, metavar="N", help="timed runs (default 20)")
    run.add_argument("--profile", action="store_true", help="time of each kernel, against the measured peak")
    run.add_argument("--compare", choices=("onnxruntime",), help="run an ONNX model there too; print the difference per output")
    run.add_argument("--layers", action="store_true", help="with --compare: find the first node whose result differs")
    run.add_argument("--check", action="store_true", help="compare with the numpy interpreter in f64; fail above 1e-4 relative")

    inspect = add(
        "inspect",
        "print the text of any stage: graph, a pass, loops, llvm, asm; estimates of CUDA kernels",
        "commands.model:inspect_command",
        figures=False,
        description="Prints a model as it stands after a stage.\n\n" + _MODEL_HELP,
    )
    compiling(inspect)
    inspect.add_argument("--memory", action="store_true", help="what a call needs of memory, and what is recomputed to fit")
    inspect.add_argument(
        "--stage",
        metavar="STAGE",
        help="graph, a pass by name, loops, llvm or asm (CUDA: ptx, sass); without it, the list of stages, and for a CUDA target "
        "estimates of its kernels",
    )

    opt = add(
        "opt",
        "graph text in, named passes, graph text out",
        "commands.passes:opt_command",
        figures=False,
        description="Runs passes over the text of a graph and prints the result.\n\n"
        "Example: tensorwright opt net.txt --passes decompose,simplify,fuse --validate",
    )
    opt.add_argument("graph", metavar="FILE", nargs="?", help="the text of a graph; '-' is standard input")
    opt.add_argument(
        "--passes", metavar="A,B,...", help="passes by name, in order; or the name of a pipeline: inference, training"
    )
    opt.add_argument("--list", action="store_true", help="list the passes with what they do, and the pipelines")
    opt.add_argument("-o", "--output", metavar="FILE", help="write here instead of to standard output")
    opt.add_argument("--target", metavar="ROW", help="target row that passes may ask (default: this machine)")
    opt.add_argument("--validate", action="store_true", help="check each pass against the interpreter")
    opt.add_argument("--fuel", type=_natural, metavar="N", help="apply only the first N rewrites")

    reduce = add(
        "reduce",
        "shrink a graph on which passes go wrong to a small one that still does",
        "commands.passes:reduce_command",
        figures=False,
        description="Finds a small graph on which the passes still fail: validation, verification or an "
        "exception. Prints it, and the command that replays it.",
    )
    reduce.add_argument("graph", metavar="FILE", help="the text of a graph; '-' is standard input")
    reduce.add_argument("--passes", metavar="A,B,...", default="inference", help="passes by name, in order, or a pipeline")
    reduce.add_argument("-o", "--output", metavar="FILE", help="write the small graph here")
    reduce.add_argument("--target", metavar="ROW", help="target row that passes may ask (default: this machine)")

    quantize = add(
        "quantize",
        "a model and typical inputs in, the model in 8-bit integers and a report out",
        "commands.quantize:quantize_command",
        description="Quantises a model layer by layer, after calibration on typical inputs.\n\n" + _MODEL_HELP,
    )
    compiling(quantize)
    quantize.add_argument(
        "--calibration", action="append", metavar="FILE.npy", default=[], help="typical inputs; once per argument, in order"
    )
    quantize.add_argument("--batch", type=_count, default=32, metavar="N", help="inputs in a batch of calibration (default 32)")
    quantize.add_argument("-o", "--output", metavar="FILE", help="write the model: .onnx (QDQ form) or .tw")
    report(quantize)
    quantize.add_argument(
        "--weights-as",
        dest="kind",
        choices=("int8", "int4", "codebook4", "codebook8", "bfloat16", "float16", "none"),
        help="default int8; the kinds but int8 are of weights alone, for products that wait for them, as in decoding a token",
    )
    quantize.add_argument(
        "--group", type=_count, default=32, metavar="N", help="inputs that share a scale with int4 and codebook4 (default 32)"
    )
    quantize.add_argument(
        "--activations",
        choices=("uint8", "int8", "dynamic", "none"),
        help="over ranges of calibration, or (dynamic) of each run (default uint8)",
    )
    quantize.add_argument("--only", choices=("weights", "activations"), help="quantise these alone")
    quantize.add_argument("--method", choices=("minmax", "percentile", "mse", "entropy"), default="minmax", help="default minmax")
    quantize.add_argument("--percentile", type=float, default=99.99, metavar="P", help="with --method percentile (default 99.99)")
    quantize.add_argument("--per-tensor", action="store_true", help="one scale for a layer's weights, not one per channel")
    quantize.add_argument("--bias-correction", action="store_true", help="put what rounding does to means into biases")
    quantize.add_argument("--equalize", action="store_true", help="even out channels between layers first")
    quantize.add_argument(
        "--smooth",
        default="auto",
        metavar="S",
        help="scale large channels of what layers read against weights: auto (default), none, or a strength from 0 to 1",
    )
    quantize.add_argument(
        "--products", action="store_true", help="products of two activations too: attention's scores, and weights times values"
    )
    quantize.add_argument("--keep", action="append", metavar="NAME", default=[], help="a layer (or pattern) that stays float")
    quantize.add_argument("--measure", action="store_true", help="keep layers in floats that measure no faster in integers")

    prune = add(
        "prune",
        "a model in, the model with fewer weights and a report of its layers out",
        "commands.prune:prune_command",
        description="Makes zeros of the weights that count least, or takes whole channels out.\n\n" + _MODEL_HELP,
    )
    compiling(prune)
    prune.add_argument(
        "--ratio",
        action="append",
        metavar="[NAME=]R",
        default=[],
        help="the share of weights (or channels) that goes, between 0 and 1; NAME=R, repeatable: of layers of a name or pattern",
    )
    prune.add_argument(
        "--pattern",
        metavar="P",
        default="unstructured",
        help="unstructured (default), N:M such as 2:4, 'block 1x16' (inputs by outputs), channels, heads, layers",
    )
    prune.add_argument(
        "--criterion",
        choices=("magnitude", "normalised", "taylor", "random"),
        default="magnitude",
        help="default magnitude; taylor weighs by gradients: give --calibration and --labels",
    )
    prune.add_argument(
        "--scope",
        choices=("layer", "global", "sensitivity"),
        default="layer",
        help="the same share of each (default), all compete, or more of the layers whose loss the metric bears (--calibration)",
    )
    prune.add_argument(
        "--calibration",
        action="append",
        metavar="FILE.npy",
        default=[],
        help="inputs for --scope sensitivity and --criterion taylor; once per argument, in order",
    )
    prune.add_argument("--labels", metavar="FILE.npy", help="targets, for the metric and the loss")
    prune.add_argument("--batch", type=_count, default=32, metavar="N", help="inputs in a batch of the data (default 32)")
    prune.add_argument("--metric", choices=METRICS, help="for --scope sensitivity; as of `compress`")
    prune.add_argument(
        "--loss", choices=("cross_entropy", "mse"), default="cross_entropy", help="for --criterion taylor (default cross_entropy)"
    )
    prune.add_argument(
        "--layer", action="append", metavar="NAME", default=[], help="a layer (or pattern) to prune (default: all)"
    )
    prune.add_argument("--exclude", action="append", metavar="NAME", default=[], help="a layer (or pattern) that stays whole")
    kernels = prune.add_mutually_exclusive_group()
    kernels.add_argument("--dense", action="store_true", help="no sparse kernels, whatever they measure")
    kernels.add_argument("--sparse", action="store_true", help="sparse kernels wherever there are any, whatever they measure")
    prune.add_argument("--seed", type=_natural, default=0, metavar="N", help="for --criterion random (default 0)")
    prune.add_argument("-o", "--output", metavar="FILE", help="write the model: .onnx (with zeros in it, or smaller) or .tw")
    report(prune)

    compress = add(
        "compress",
        "a model and typical inputs in, the model with the best kind of each layer and a report out",
        "commands.compress:compress_command",
        description="Chooses for each layer floats, bf16, integers or sparse weights, by measured time and a measured metric.\n\n"
        + _MODEL_HELP,
    )
    compiling(compress)
    compress.add_argument(
        "--calibration", action="append", metavar="FILE.npy", default=[], help="typical inputs; once per argument, in order"
    )
    compress.add_argument("--labels", metavar="FILE.npy", help="targets, for the metric")
    compress.add_argument(
        "--metric",
        choices=METRICS,
        help="default: accuracy with labels, else agreement with the original's classes, or cosine with its results",
    )
    compress.add_argument("--max-drop", type=float, default=0.01, metavar="D", help="how much of it may go (default 0.01)")
    compress.add_argument("--objective", choices=("latency", "size"), default="latency", help="default latency")
    compress.add_argument(
        "--kinds", metavar="A,B", help="bf16, int8, 'int8 weights', 'int4 weights', sparse, pruned (default: all)"
    )
    compress.add_argument(
        "--patterns", metavar="A,B", help="of zeros that sparse tries: 'block 1x16' (default), unstructured, ..."
    )
    compress.add_argument("--sparsities", metavar="A,B", help="shares of zeros that sparse tries (default 0.5,0.75,0.9)")
    compress.add_argument(
        "--validation",
        action="append",
        metavar="SHARE|FILE.npy",
        default=[],
        help="judge the result on this share of the data's batches, held out of the search, or on other inputs",
    )
    compress.add_argument("--validation-labels", metavar="FILE.npy", help="targets of the files of --validation")
    compress.add_argument("--keep", action="append", metavar="NAME", default=[], help="a layer (or pattern) that stays float")
    compress.add_argument("--batch", type=_count, default=32, metavar="N", help="inputs in a batch of the data (default 32)")
    compress.add_argument("--timed-batch", type=_count, metavar="N", help="the batch that is timed (default: that of the data)")
    compress.add_argument(
        "--method", choices=("minmax", "percentile", "mse", "entropy"), default="mse", help="ranges of integers (default mse)"
    )
    compress.add_argument("-o", "--output", metavar="FILE", help="write the model: .onnx or .tw")
    report(compress)

    bench = commands.add_parser("bench", help="measure kernels, models, training steps and compile times, beside the peers")
    kinds = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    kernels = add(
        "kernels",
        "contractions one by one, as fractions of the measured peak",
        "commands.bench:kernels_command",
        into=kinds,
    )
    kernels.add_argument("--target", metavar="ROW", help="target row to generate for (default: this machine)")
    kernels.add_argument("--threads", type=_count, metavar="N", help="most threads to use")
    kernels.add_argument("--precision", choices=("f32", "int8"), help="int8: layers of bytes, u8 by i8 to u8 (default f32)")
    kernels.add_argument("--rowwise", action="store_true", help="softmax, layer norm and gelu against peers instead")
    kernels.add_argument("--quick", action="store_true", help="fewer repetitions")
    for name, said, names in (
        ("inference", "models and single operations against whichever peers are installed", "resnet50, op, ..., or one: mlp_b1"),
        ("int8", "networks of 8-bit integers against ONNX Runtime, OpenVINO and our f32", "resnet50, bert, mlp, ..."),
        ("training", "whole training steps against whichever peers are installed", "mlp_b64, cifar_b64, bilstm_b32, ..."),
        ("compile", "compile times beside the peers', cold and from the cache; by number of nodes", "resnet50_b1, nodes, ..."),
        ("onnx", "ONNX models of packages (examples/fetch_onnx.py) and light models against ONNX Runtime", "silero, light, ..."),
    ):
        kind = add(name, said, f"commands.bench:{name}_command", into=kinds)
        kind.add_argument("--models", metavar="A,B", help=f"{names} (default: all)")
        kind.add_argument("--peers", metavar="A,B", help="numpy, torch, jax, ... (default: what is installed)")
        kind.add_argument("--threads", type=_count, metavar="N", help="threads of every contestant (default: all)")
        kind.add_argument("--quick", action="store_true", help="fewer repetitions")
        if name in ("inference", "compile", "onnx"):
            kind.add_argument("--markdown", metavar="FILE", help="write the tables here")
        if name == "int8":
            kind.add_argument("--folder", metavar="DIR", help="keep the quantised models here, and take those that are there")
        if name == "inference":
            kind.add_argument("--precision", choices=("f32", "bf16"), help="bf16: ours and the peers that compute in it")
            kind.add_argument("--chart", metavar="FILE", help="draw the ratios: .png or .svg (needs matplotlib)")

    sparse = add("sparse", "sparse kernels and pruned models beside dense ones", "commands.bench:sparse_command", into=kinds)
    sparse.add_argument("--models", metavar="A,B", help="parts of layer names: gemm, 1x1, 64-256, ... (default: all)")
    sparse.add_argument("--threads", type=_count, metavar="N", help="threads of both (default: all)")
    sparse.add_argument("--quick", action="store_true", help="fewer repetitions")

    doctor = add(
        "doctor",
        "what this machine has: ISA, caches, threads, OpenMP, versions, flags, measured peaks",
        "commands.doctor:command",
    )
    doctor.add_argument("--no-peaks", action="store_true", help="do not measure peaks (saves a second)")
    return parser


def _natural(text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    return _natural(text, 1)


if __name__ == "__main__":
    sys.exit(main())
