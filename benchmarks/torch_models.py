"""The workloads of `models.py` as PyTorch modules with the same attribute names: weights are copied by name, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

relu = partial(F.relu, inplace=True)  # where nothing else reads its operand: the way that is fast
relu6 = partial(F.relu6, inplace=True)


class MLP(nn.Module):
    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.softmax = nn.Linear(784, 128), nn.Linear(128, 10), softmax

    def forward(self, x: Any) -> Any:
        y = self.b(F.relu(self.a(x)))
        return torch.softmax(y, -1) if self.softmax else y


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.f1, self.f2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Any) -> Any:
        x = F.relu(F.max_pool2d(self.c1(x), 2))
        x = F.relu(F.max_pool2d(self.c2(x), 2))
        return self.f2(F.relu(self.f1(x.flatten(1))))


class Cifar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.f1, self.f2 = nn.Linear(1024, 64), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(F.relu(self.c3(x)).flatten(1))))


class DemoCNN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.f1, self.f2 = nn.Linear(32 * width, 64), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(out), act

    def forward(self, x: Any) -> Any:
        y = self.bn(self.conv(x))
        return y if self.act is None else self.act(y)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(channels, middle, 1, act=relu), ConvNorm(middle, middle, 3, stride, act=relu)
        self.c = ConvNorm(middle, out, 1)
        self.d = ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def forward(self, x: Any) -> Any:
        return F.relu(self.c(self.b(self.a(x))) + (x if self.d is None else self.d(x)))


class ResNet50(nn.Module):
    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem, channels = ConvNorm(3, width, 7, 2, act=relu), width
        layers: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            for i in range(count):
                layers.append(Bottleneck(channels, width << stage, 4 * (width << stage), 2 if i == 0 and stage else 1))
                channels = 4 * (width << stage)
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward(self, x: Any) -> Any:
        x = self.layers(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(channels, out, 3, stride, act=relu), ConvNorm(out, out, 3)
        self.d = ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def forward(self, x: Any) -> Any:
        return F.relu(self.b(self.a(x)) + (x if self.d is None else self.d(x)))


class ResNet18(nn.Module):
    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512), classes: int = 10) -> None:
        super().__init__()
        self.stem, channels = ConvNorm(3, widths[0], 3, act=relu), widths[0]
        layers: list[nn.Module] = []
        for stage, out in enumerate(widths):
            layers += [BasicBlock(channels, out, 2 if stage else 1), BasicBlock(out, out, 1)]
            channels = out
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        self.e = ConvNorm(channels, hidden, 1, act=relu6) if expand != 1 else None
        self.d, self.p = ConvNorm(hidden, hidden, 3, stride, hidden, relu6), ConvNorm(hidden, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Any) -> Any:
        y = self.p(self.d(x if self.e is None else self.e(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    def __init__(self, settings: Sequence[tuple[int, int, int, int]], head: int, classes: int) -> None:
        super().__init__()
        self.stem, channels = ConvNorm(3, 32, 3, 2, act=relu6), 32
        layers: list[nn.Module] = []
        for expand, out, count, stride in settings:
            for i in range(count):
                layers.append(InvertedResidual(channels, out, stride if i == 0 else 1, expand))
                channels = out
        self.layers, self.head = nn.Sequential(*layers), ConvNorm(channels, head, 1, act=relu6)
        self.fc = nn.Linear(head, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(F.adaptive_avg_pool2d(self.head(self.layers(self.stem(x))), 1).flatten(1))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.f1, self.f2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.n1, self.n2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Any) -> Any:
        batch, time, width = x.shape
        q, k, v = (f(x).view(batch, time, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = self.n1(x + self.o(a.transpose(1, 2).reshape(batch, time, width)))
        return self.n2(x + self.f2(F.gelu(self.f1(x))))


class BERT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, inner: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.emb, self.pos, self.typ = nn.Embedding(vocabulary, width), nn.Embedding(positions, width), nn.Embedding(2, width)
        self.n = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([EncoderLayer(width, heads, inner) for _ in range(layers)])

    def forward(self, ids: Any) -> Any:
        x = self.n(self.emb(ids) + self.pos.weight[: ids.shape[1]] + self.typ.weight[0])
        for layer in self.layers:
            x = layer(x)
        return x


class TinyTransformer(nn.Module):
    def __init__(
        self, layers: int = 4, width: int = 256, heads: int = 8, inner: int = 1024, vocabulary: int = 1000, length: int = 128
    ) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList([EncoderLayer(width, heads, inner, causal=True) for _ in range(layers)])
        self.f = nn.Linear(width, vocabulary)

    def forward(self, ids: Any) -> Any:
        x = self.emb(ids) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.f(x)


class BiLSTM(nn.Module):
    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.l1 = nn.LSTM(13, 128, bidirectional=True, batch_first=True)
        self.l2 = nn.LSTM(256, 128, bidirectional=True, batch_first=True)
        self.f, self.softmax = nn.Linear(256, 30), softmax

    def forward(self, x: Any) -> Any:
        y = self.f(self.l2(self.l1(x)[0])[0])
        return torch.softmax(y, -1) if self.softmax else y


class GPT2Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.f1, self.f2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any, keys: Any, values: Any) -> Any:
        batch, time, width = x.shape
        parts = self.qkv(self.n1(x)).split(width, -1)
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in parts)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        a = F.scaled_dot_product_attention(q, keys, values)
        x = x + self.o(a.transpose(1, 2).reshape(batch, time, width))
        return x + self.f2(F.gelu(self.f1(self.n2(x)), approximate="tanh")), keys, values


class GPT2Step(nn.Module):
    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, positions: int = 1024
    ) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.layers, self.n = nn.ModuleList([GPT2Layer(width, heads) for _ in range(layers)]), nn.LayerNorm(width)

    def forward(self, ids: Any, past: Any) -> Any:
        x = self.emb(ids) + self.pos.weight[past.shape[4]]
        new = []
        for i, layer in enumerate(self.layers):
            x, keys, values = layer(x, past[i, 0], past[i, 1])
            new.append(torch.stack([keys, values]))
        return F.linear(self.n(x), self.emb.weight), torch.stack(new)


class Single(nn.Module):
    """One operation; its layer, if it has one, is called `name`."""

    def __init__(self, function: Callable[..., Any], name: str = "") -> None:
        super().__init__()
        self.name = name or "function"
        setattr(self, self.name, function)

    def forward(self, *x: Any) -> Any:
        return getattr(self, self.name)(*x)


MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
INFERENCE: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "cifar": Cifar,
    "resnet50": ResNet50,
    "mobilenetv2": partial(MobileNetV2, MOBILENET, 1280, 1000),
    "bert": partial(BERT, 12, 768, 12, 3072, 30522, 512),
    "gpt2dec": GPT2Step,
    "bilstm": BiLSTM,
    "op_gemm1024": lambda: Single(torch.matmul),
    "op_conv3x3_64_56": lambda: Single(nn.Conv2d(64, 64, 3, padding=1), "conv"),
    "op_softmax4096x1024": lambda: Single(partial(torch.softmax, dim=-1)),
    "op_layernorm4096x1024": lambda: Single(nn.LayerNorm(1024), "n"),
    "op_gelu16M": lambda: Single(F.gelu),
    "op_attention12x512x64": lambda: Single(F.scaled_dot_product_attention),
    "op_gemv4096": lambda: Single(nn.Linear(4096, 4096, bias=False), "f"),
}
TRAINING: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(MLP, softmax=False),
    "demo": DemoCNN,
    "cifar": Cifar,
    "resnet18": ResNet18,
    "bilstm": partial(BiLSTM, softmax=False),
    "transformer": TinyTransformer,
}


def inference(name: str, weights: Mapping[str, Any], fold: bool = True) -> nn.Module:
    """The module of an inference workload ('resnet50_b8', 'op_gelu16M') with these weights, batch norm folded, in eval mode."""
    make = INFERENCE.get(name) or INFERENCE[name.rpartition("_")[0]]
    module = load(make(), weights).eval()
    for part in module.modules() if fold else ():
        if isinstance(part, ConvNorm):
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
    return module


def load(module: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """The module with these weights (arrays by name). Raises RuntimeError where names differ."""
    state = {k: torch.from_numpy(v.copy()) for k, v in weights.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or [m for m in missing if not m.endswith("num_batches_tracked")]:
        name = type(module).__name__
        raise RuntimeError(f"{name}: the torch model's weights have other names: {missing[:3]}, {unexpected[:3]}")
    return module
