"""Models of the transformers library with random weights, exported by PyTorch.

Weights are scaled layer by layer in one run, so that every convolution and matrix product gives a standard deviation of 1, and
batch norms keep the statistics that they meet: as they are initialised, activations of a MobileNetV2 vanish.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import nn

Array = np.ndarray[Any, Any]


class _First(nn.Module):
    """A model of transformers as a function of tensors: the first of its outputs."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Any) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def _bert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(vocab_size=8000)  # a smaller table; all else is BERT-base
    return transformers.BertModel(config, add_pooling_layer=False), _tokens()


def _resnet() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config), _image()


def _mobilenet() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config()), _image()


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    return transformers.ViTForImageClassification(config), _image()


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))}


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(128)[None] + 1000, "attention_mask": torch.ones(1, 128, dtype=torch.int64)}


MODELS: Final[dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]] = {
    "bert_base": _bert, "resnet18": _resnet, "mobilenet_v2": _mobilenet, "vit_tiny": _vit,
}  # fmt: skip


def export(name: str, path: Path) -> None:
    """Writes a model as ONNX."""
    torch.manual_seed(0)
    write(*MODELS[name](), path)


def write(model: nn.Module, inputs: dict[str, Any], path: Path) -> None:
    """A model of transformers as ONNX, its weights scaled before."""
    calibrate(model, inputs)
    whole = _First(model.eval(), tuple(inputs))
    options: dict[str, Any] = {"opset_version": 18, "dynamo": True, "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(whole, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=["output"], **options)


def calibrate(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Scales the weights of products to results of deviation 1, and sets the statistics of batch norms, in one run."""

    def scale(layer: Any, given: Any, result: Any) -> Any:
        deviation = result.std()
        layer.weight.data /= deviation
        if layer.bias is not None:
            layer.bias.data.zero_()
        return layer._conv_forward(given[0], layer.weight, layer.bias) if isinstance(layer, nn.Conv2d) else result / deviation

    hooks = []
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            hooks.append(m.register_forward_hook(scale))
        elif isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0  # the statistics of this one run
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    with torch.no_grad():
        model(**inputs)
    for h in hooks:
        h.remove()
