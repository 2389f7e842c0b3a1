"""ONNX models in and out: `tw.onnx.load` gives a Graph, `tw.onnx.Model` what runs in stages, `tw.onnx.save` writes a file."""

from .exporter import save
from .model import Model, load

__all__ = ["Model", "load", "save"]
