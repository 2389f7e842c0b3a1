"""`tw.quantize` and `tw.quantize_aware`: a model in floats and typical inputs become a graph of integers, and a report."""

from __future__ import annotations

from typing import Any, Final

from ..ir.errors import InputError
from ..ir.graph import Graph
from .aware import QuantAware
from .equalize import equalized
from .plan import CODEBOOKS, HALVES, Keep, Options, Plan
from .ranges import METHODS
from .report import Report
from .smooth import smoothed
from .source import as_batches, source_of
from .timing import Measure

WEIGHTS: Final = ("int8", "int4", *HALVES, *CODEBOOKS)
ACTIVATIONS: Final = ("uint8", "int8", "dynamic")


def quantize(
    model: Any,
    calibration: Any,
    *specs: Any,
    weights: str | None = "int8",
    activations: str | None = "uint8",
    per_channel: bool = True,
    method: str = "minmax",
    percentile: float = 99.99,
    bias_correction: bool = False,
    equalize: bool = False,
    smooth: float | str | None = "auto",
    keep: Keep = (),
    group: int = 32,
    products: bool = False,
    measure: Measure | None = None,
    report: Report | None = None,
) -> Graph:
    """A Graph of quantize and dequantize nodes with integer weights (`Graph.weights`), which compiles to integer arithmetic.

    model        a Module, a function of Tensors, a Graph with weights, or a tw.onnx.Model
    calibration  an iterable of batches of typical inputs: arrays, or tuples of one array for each argument (more are ignored,
                 so that batches of (inputs, labels) will do)
    specs        types of the arguments, as for tw.compile (default: those of the batches, in batches of any size)
    weights      'int8' (symmetric, a scale for each output channel unless per_channel=False); with activations=None also 'int4'
                 (a scale for each `group` inputs of a matrix product; other layers take 8 bits), 'codebook4' and 'codebook8'
                 (places in a table of 16 or 256 centroids, the former with a scale for each `group` inputs), 'bfloat16' and
                 'float16'; or None
    activations  'uint8' or 'int8' over ranges seen in calibration, 'dynamic' (int8 over the range of each run), or None
    method       'minmax', 'percentile' (all but 100 - `percentile` percent), 'mse' or 'entropy'
    bias_correction  what quantised weights change in a layer's mean result is put into its bias (Nagel et al. 2019)
    equalize     scales of channels are evened out between consecutive layers first (Nagel et al. 2019)
    smooth       channels of what layers read after norms and activations are scaled, weights against it: few large ones, as
                 transformers have them, no longer take the bits of others (Xiao et al. 2023). A number from 0 to 1 says how far;
                 'auto' lets each layer have what suits it, where calibration data show that it needs any
    keep         layers that stay float: names, patterns of names ('head*'), or a function of the name
    group        inputs that share a scale with 'int4' and 'codebook4', a multiple of 8
    products     whether products of two activations become integers too: attention's scores, and its weights times its values
    measure      a function that gives the milliseconds of a Graph: a layer stays float where it is not faster in integers
    report       a Report to fill in: per layer the choice and its reason

    Norms are folded into layers first. Layers are contractions of data with weights (convolutions, matrix products) outside
    loops; everything between two of them that moves or compares stays in bytes, and sums, pools and the like run in floats
    between bytes. Results differ from the floats' by rounding to 8 bits.

    Raises InputError for empty calibration, numbers that are not finite in it or in weights, and options that do not exist.
    """
    options = Options(weights, activations, per_channel, method, percentile, bias_correction, group, products)
    plan = _plan(model, calibration, specs, options, (equalize, smooth), keep, measure, report)
    return plan.graph(plan.source.values)


def quantize_aware(
    model: Any,
    calibration: Any,
    *specs: Any,
    activations: str = "uint8",
    per_channel: bool = True,
    method: str = "minmax",
    percentile: float = 99.99,
    equalize: bool = False,
    smooth: float | str | None = "auto",
    keep: Keep = (),
    report: Report | None = None,
) -> QuantAware:
    """A Module that computes what the quantised model will, to be trained by tw.Trainer; `quantized()` then gives the Graph.

    Arguments are those of `quantize`; weights become int8. Norms are folded into layers, and ranges stay as calibrated. Rounding
    lets gradients through as if it were not there (straight-through estimators: Bengio et al. 2013, Jacob et al. 2018), values
    beyond a range let none through. The model is traced as for inference, without dropout.
    """
    options = Options("int8", activations, per_channel, method, percentile)
    if activations not in ("uint8", "int8"):
        raise InputError(f"activations of a model to be trained is 'uint8' or 'int8', got {activations!r}")
    return QuantAware(_plan(model, calibration, specs, options, (equalize, smooth), keep, None, report))


def _plan(
    model: Any,
    calibration: Any,
    specs: Any,
    options: Options,
    even: tuple[bool, float | str | None],
    keep: Keep,
    measure: Measure | None,
    report: Report | None,
) -> Plan:
    _check(options, measure)
    equalize, smooth = even
    if smooth not in (None, "auto") and not (isinstance(smooth, int | float) and 0 <= smooth <= 1):
        raise InputError(f"smooth is a number from 0 to 1, 'auto' or None, got {smooth!r}")
    batches = as_batches(calibration) if options.calibrated or calibration is not None else []
    if smooth == "auto" and not (batches and options.weights == "int8" and options.activations is not None):
        smooth = None
    if (options.bias_correction or smooth is not None) and not batches:
        raise InputError("bias_correction and smooth need calibration data: they measure what layers read")
    source = source_of(model, specs, batches)
    report = Report() if report is None else report
    report.model = source.graph.name
    report.settings = {
        "weights": options.weights, "activations": options.activations, "per_channel": options.per_channel,
        "method": options.method, "bias_correction": options.bias_correction, "equalize": equalize, "smooth": smooth,
        "batches": len(batches),
    }  # fmt: skip
    report.layers, report.notes = [], []
    if equalize:
        source, notes = equalized(source)
        report.notes += notes
    if smooth is not None:
        source, notes = smoothed(source, batches, None if smooth == "auto" else float(smooth), options.activations != "uint8")
        report.notes += notes
    return Plan(source, options, report, batches).make(keep, measure)


def _check(o: Options, measure: object) -> None:
    if o.weights not in (None, *WEIGHTS):
        raise InputError(f"weights is one of {', '.join(map(repr, WEIGHTS))}, or None, got {o.weights!r}")
    if o.activations not in (None, *ACTIVATIONS):
        raise InputError(f"activations is one of {', '.join(map(repr, ACTIVATIONS))}, or None, got {o.activations!r}")
    if o.weights not in (None, "int8") and o.activations is not None:
        raise InputError(f"weights={o.weights!r} are for products that wait for their weights: give activations=None")
    if type(o.group) is not int or o.group < 8 or o.group % 8:
        raise InputError(f"group is how many inputs share a scale, a multiple of 8, got {o.group!r}")
    if o.weights is None and o.activations is None:
        raise InputError("nothing to quantise: both weights and activations are None")
    if o.method not in METHODS:
        raise InputError(f"method is one of {', '.join(map(repr, METHODS))}, got {o.method!r}")
    if not isinstance(o.percentile, int | float) or not 50 < o.percentile <= 100:
        raise InputError(f"percentile is above 50 and at most 100, got {o.percentile!r}")
    if o.products and not o.calibrated:
        raise InputError("products of two activations become integers over ranges that were seen: activations='uint8' or 'int8'")
    if measure is not None and not callable(measure):
        raise InputError(f"measure is a function of a Graph that gives milliseconds, got {measure!r}")
