"""The workloads that benchmarks and tests run: MLP, LeNet, a colour CNN, ResNets, MobileNetV2, BERT, BiLSTM, a transformer;
GPT-2 is in `gpt2.py`, single operations in `single_ops.py`.

Attribute names follow the PyTorch definitions that they are compared with, so that weights are copied by name
(`from_torch_state`). `INFERENCE` and `TRAINING` name each workload with its argument types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorwright as tw
from tensorwright import nn
from tensorwright.benchmarks import single_ops
from tensorwright.benchmarks.gpt2 import GPT2Step
from tensorwright.frontend.specs import Spec

Tensor = Any


class MLP(nn.Module):
    """784-128-10 with softmax (without for training)."""

    def __init__(self, softmax: bool = True) -> None:
        self.a, self.b = nn.Linear(784, 128), nn.Linear(128, 10)
        self.softmax = softmax

    def __call__(self, x: Tensor) -> Tensor:
        y = self.b(tw.relu(self.a(x)))
        return tw.softmax(y, -1) if self.softmax else y


class LeNet(nn.Module):
    """Two 5x5 convolutions with pooling, two linear layers: 1x28x28 -> 10."""

    def __init__(self) -> None:
        self.c1, self.c2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.f1, self.f2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def __call__(self, x: Tensor) -> Tensor:
        x = tw.relu(tw.max_pool2d(self.c1(x), 2))
        x = tw.relu(tw.max_pool2d(self.c2(x), 2))
        return self.f2(tw.relu(self.f1(x.flatten(1))))


class Cifar(nn.Module):
    """The colour CNN: three 3x3 convolutions, two linear layers: 3x32x32 -> 10."""

    def __init__(self) -> None:
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.f1, self.f2 = nn.Linear(1024, 64), nn.Linear(64, 10)

    def __call__(self, x: Tensor) -> Tensor:
        x = tw.max_pool2d(tw.relu(self.c1(x)), 2)
        x = tw.max_pool2d(tw.relu(self.c2(x)), 2)
        x = tw.relu(self.c3(x)).flatten(1)
        return self.f2(tw.relu(self.f1(x)))


class DemoCNN(nn.Module):
    """The CNN of `tensorwright demo`: 1x8x8 digits -> 10."""

    def __init__(self, width: int = 16) -> None:
        self.c1, self.c2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.f1, self.f2 = nn.Linear(2 * width * 16, 64), nn.Linear(64, 10)

    def __call__(self, x: Tensor) -> Tensor:
        x = tw.relu(self.c1(x))
        x = tw.max_pool2d(tw.relu(self.c2(x)), 2)
        return self.f2(tw.relu(self.f1(x.flatten(1))))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and perhaps an activation. 'Same' padding for odd kernels."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        shape = self.conv.weight.shape
        self.conv.weight.data = nn.init.kaiming_normal(shape, mode="fan_in" if groups == 1 else "fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(out)
        self.bn.running_mean.data = nn.init.normal((out,), 0.0, 0.1)
        self.bn.running_var.data = nn.init.uniform((out,), 0.8, 1.2)
        self.act = act

    def __call__(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if self.act is None else self.act(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut."""

    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        self.a = ConvNorm(channels, middle, 1, act=tw.relu)
        self.b = ConvNorm(middle, middle, 3, stride, act=tw.relu)
        self.c = ConvNorm(middle, out, 1)
        self.d = ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def __call__(self, x: Tensor) -> Tensor:
        return tw.relu(self.c(self.b(self.a(x))) + (x if self.d is None else self.d(x)))


class ResNet50(nn.Module):
    """He et al. 2015, stride in the 3x3. `blocks` and `width` make smaller ones of the same build."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        self.stem = ConvNorm(3, width, 7, 2, act=tw.relu)
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            middle = width << stage
            for i in range(count):
                layers.append(Bottleneck(channels, middle, 4 * middle, 2 if i == 0 and stage > 0 else 1))
                channels = 4 * middle
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def __call__(self, x: Tensor) -> Tensor:
        x = tw.max_pool2d(self.stem(x), 3, 2, 1)
        return self.fc(tw.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        self.a = ConvNorm(channels, out, 3, stride, act=tw.relu)
        self.b = ConvNorm(out, out, 3)
        self.d = ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def __call__(self, x: Tensor) -> Tensor:
        return tw.relu(self.b(self.a(x)) + (x if self.d is None else self.d(x)))


class ResNet18(nn.Module):
    """The variant for 32x32 images: a 3x3 stem and no pooling after it."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512), classes: int = 10) -> None:
        self.stem = ConvNorm(3, widths[0], 3, act=tw.relu)
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, out in enumerate(widths):
            layers += [BasicBlock(channels, out, 2 if stage else 1), BasicBlock(out, out, 1)]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        hidden = channels * expand
        self.e = ConvNorm(channels, hidden, 1, act=tw.relu6) if expand != 1 else None
        self.d = ConvNorm(hidden, hidden, 3, stride, groups=hidden, act=tw.relu6)
        self.p = ConvNorm(hidden, out, 1)
        self.residual = stride == 1 and channels == out

    def __call__(self, x: Tensor) -> Tensor:
        y = self.p(self.d(x if self.e is None else self.e(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018. `settings` rows are (expansion, channels, blocks, stride)."""

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]] = (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ),
        head: int = 1280,
        classes: int = 1000,
    ) -> None:  # fmt: skip
        self.stem = ConvNorm(3, 32, 3, 2, act=tw.relu6)
        layers: list[nn.Module] = []
        channels = 32
        for expand, out, count, stride in settings:
            for i in range(count):
                layers.append(InvertedResidual(channels, out, stride if i == 0 else 1, expand))
                channels = out
        self.layers = nn.Sequential(*layers)
        self.head = ConvNorm(channels, head, 1, act=tw.relu6)
        self.fc = nn.Linear(head, classes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc(tw.adaptive_avg_pool2d(self.head(self.layers(self.stem(x))), 1).flatten(1))


class EncoderLayer(nn.Module):
    """Attention and a gelu network, layer norm after each residual."""

    def __init__(self, width: int, heads: int, inner: int, causal: bool = False) -> None:
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.f1, self.f2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.n1, self.n2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def split(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        return x.reshape(batch, time, self.heads, width // self.heads).transpose(0, 2, 1, 3)

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = tw.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = self.n1(x + self.o(a.transpose(0, 2, 1, 3).reshape(*x.shape)))
        return self.n2(x + self.f2(tw.gelu(self.f1(x))))


class BERT(nn.Module):
    """The encoder of Devlin et al. 2018, base size, for one segment."""

    def __init__(
        self,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        inner: int = 3072,
        vocabulary: int = 30522,
        positions: int = 512,
    ) -> None:
        self.emb, self.pos, self.typ = nn.Embedding(vocabulary, width), nn.Embedding(positions, width), nn.Embedding(2, width)
        for e in (self.emb, self.pos, self.typ):
            e.weight.data = nn.init.normal(e.weight.shape, 0.0, 0.02)
        self.n = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([EncoderLayer(width, heads, inner) for _ in range(layers)])

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.n(self.emb(ids) + self.pos.weight[: ids.shape[1]] + self.typ.weight[0])
        for layer in self.layers:
            x = layer(x)
        return x


class TinyTransformer(nn.Module):
    """A causal language model over 1,000 tokens: 4 layers, width 256, sequence 128."""

    def __init__(
        self, layers: int = 4, width: int = 256, heads: int = 8, inner: int = 1024, vocabulary: int = 1000, length: int = 128
    ) -> None:
        self.emb = nn.Embedding(vocabulary, width)
        self.pos = nn.Parameter(nn.init.normal((length, width), 0.0, 0.02))
        self.layers = nn.ModuleList([EncoderLayer(width, heads, inner, causal=True) for _ in range(layers)])
        self.f = nn.Linear(width, vocabulary)

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.f(x)


class BiLSTM(nn.Module):
    """Two bidirectional LSTM layers of 128 over 13 features, and a class for each step."""

    def __init__(self, softmax: bool = True) -> None:
        self.l1 = nn.LSTM(13, 128, bidirectional=True, batch_first=True)
        self.l2 = nn.LSTM(256, 128, bidirectional=True, batch_first=True)
        self.f, self.softmax = nn.Linear(256, 30), softmax

    def __call__(self, x: Tensor) -> Tensor:
        y = self.f(self.l2(self.l1(x)[0])[0])
        return tw.softmax(y, -1) if self.softmax else y


@dataclass(frozen=True)
class Workload:
    """A model with the types of its arguments and, for training, of its target. `classes` bounds integer arguments."""

    make: Callable[[], nn.Module]
    arguments: tuple[Spec, ...]
    target: Spec | None = None
    classes: int = 10

    def inputs(self, seed: int = 1) -> list[np.ndarray[Any, Any]]:
        """Random arguments (and target): normal floats, or integers below `classes`."""
        rng = np.random.default_rng(seed)
        return [self._draw(rng, s) for s in (*self.arguments, *([self.target] if self.target else []))]

    def _draw(self, rng: np.random.Generator, s: Spec) -> np.ndarray[Any, Any]:
        shape = s.type.static_shape
        if s.dtype.is_integer:
            return rng.integers(0, self.classes, shape).astype(s.dtype.numpy)
        return rng.standard_normal(shape).astype(s.dtype.numpy)


def _ids(*shape: int) -> Spec:
    return tw.spec(*shape, dtype="i64")


INFERENCE: dict[str, Workload] = {
    "mlp_b1": Workload(MLP, (tw.spec(1, 784),)),
    "mlp_b64": Workload(MLP, (tw.spec(64, 784),)),
    "lenet_b1": Workload(LeNet, (tw.spec(1, 1, 28, 28),)),
    "lenet_b64": Workload(LeNet, (tw.spec(64, 1, 28, 28),)),
    "cifar_b1": Workload(Cifar, (tw.spec(1, 3, 32, 32),)),
    "cifar_b64": Workload(Cifar, (tw.spec(64, 3, 32, 32),)),
    "resnet50_b1": Workload(ResNet50, (tw.spec(1, 3, 224, 224),)),
    "resnet50_b8": Workload(ResNet50, (tw.spec(8, 3, 224, 224),)),
    "mobilenetv2_b1": Workload(MobileNetV2, (tw.spec(1, 3, 224, 224),)),
    "bert_b1": Workload(BERT, (_ids(1, 128),), classes=30522),
    "gpt2dec_b1": Workload(GPT2Step, (_ids(1, 1), tw.spec(12, 2, 1, 12, 255, 64)), classes=50257),
    "bilstm_b1": Workload(BiLSTM, (tw.spec(1, 100, 13),)),
    "bilstm_b32": Workload(BiLSTM, (tw.spec(32, 100, 13),)),
    "op_gemm1024": Workload(single_ops.MatMul, (tw.spec(1024, 1024), tw.spec(1024, 1024))),
    "op_conv3x3_64_56": Workload(single_ops.Convolution, (tw.spec(1, 64, 56, 56),)),
    "op_softmax4096x1024": Workload(single_ops.Softmax, (tw.spec(4096, 1024),)),
    "op_layernorm4096x1024": Workload(single_ops.LayerNorm, (tw.spec(4096, 1024),)),
    "op_gelu16M": Workload(single_ops.Gelu, (tw.spec(1 << 24),)),
    "op_attention12x512x64": Workload(single_ops.Attention, (tw.spec(1, 12, 512, 64),) * 3),
    "op_gemv4096": Workload(single_ops.MatVec, (tw.spec(1, 4096),)),
}
TRAINING: dict[str, Workload] = {
    "mlp_b64": Workload(lambda: MLP(False), (tw.spec(64, 784),), _ids(64)),
    "demo_b64": Workload(DemoCNN, (tw.spec(64, 1, 8, 8),), _ids(64)),
    "cifar_b64": Workload(Cifar, (tw.spec(64, 3, 32, 32),), _ids(64)),
    "resnet18_b32": Workload(ResNet18, (tw.spec(32, 3, 32, 32),), _ids(32)),
    "bilstm_b32": Workload(lambda: BiLSTM(False), (tw.spec(32, 100, 13),), _ids(32, 100), classes=30),
    "transformer_b8": Workload(TinyTransformer, (_ids(8, 128),), _ids(8, 128), classes=1000),
}


def from_torch_state(module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Loads a PyTorch state dict of the same names into a module; batch counters, which we do not keep, are left out."""
    arrays = {k: np.asarray(v.detach().cpu().numpy()) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    module.load_state_dict(arrays)
    return module
