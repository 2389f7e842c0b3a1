"""Compression: quantisation and pruning, and what they say of each layer.

`tw.quantize`, `tw.prune` and `tw.compress` are the ways in; here is what goes with them.
"""

from .compress import Compressed
from .gradients import gradients_of
from .gradual import GradualPruning, PolynomialDecay
from .pruning import Pruned, PrunedLayer
from .report import LayerReport, Report
from .report_compress import CompressReport
from .sparsify import sparsify
from .timing import milliseconds

__all__ = [
    "CompressReport",
    "Compressed",
    "GradualPruning",
    "LayerReport",
    "PolynomialDecay",
    "Pruned",
    "PrunedLayer",
    "Report",
    "gradients_of",
    "milliseconds",
    "sparsify",
]
