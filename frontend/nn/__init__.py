"""Layers, containers and initialisers. Layers take PyTorch's argument names; parameters are `weight` and `bias`."""

from ..module import Module, StateError
from ..parameter import Buffer, Parameter
from ..summary import Summary
from . import init
from .containers import ModuleList, Sequential
from .layers import BatchNorm1d, BatchNorm2d, Conv2d, Embedding, GroupNorm, LayerNorm, Linear, RMSNorm
from .simple import (
    ELU,
    GELU,
    SELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    Dropout,
    Flatten,
    Hardswish,
    Identity,
    LeakyReLU,
    LogSoftmax,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .transformer import MultiheadAttention, TransformerEncoderLayer

__all__ = [
    "ELU", "GELU", "SELU", "AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d", "Buffer", "Conv2d", "Dropout",
    "Embedding", "Flatten", "GroupNorm", "Hardswish", "Identity", "LayerNorm", "LeakyReLU", "Linear", "LogSoftmax", "MaxPool2d",
    "Module", "ModuleList", "MultiheadAttention", "Parameter", "RMSNorm", "ReLU", "ReLU6", "Sequential", "SiLU", "Sigmoid",
    "Softmax", "Softplus", "StateError", "Summary", "Tanh", "TransformerEncoderLayer", "init",
]  # fmt: skip
