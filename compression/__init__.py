"""Compression: quantisation and pruning, and what they say of each layer.

`tw.quantize` and `tw.prune` are the ways in; here is what goes with them.
"""

from .gradients import gradients_of
from .gradual import GradualPruning, PolynomialDecay
from .pruning import Pruned, PrunedLayer
from .report import LayerReport, Report
from .sparsify import sparsify
from .timing import milliseconds

__all__ = [
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
