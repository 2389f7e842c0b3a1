"""Ops of com.microsoft: one node each, against ONNX Runtime; and by formula in numpy."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

onnx = pytest.importorskip("onnx", reason="the onnx extra")
sys.path.insert(0, str(Path(__file__).parent))
import tensorwright as tw  # noqa: E402
from onnx_graphs import F, model, node  # noqa: E402
from tensorwright.ir.errors import OnnxError  # noqa: E402

RNG = np.random.default_rng(5)
I32 = np.int32
Arrays = dict[str, Any]


def r(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(F)


def ids(high: int, *shape: int) -> Any:
    return RNG.integers(0, high, shape).astype(I32)


def u8(*shape: int) -> Any:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def made(
    op: str, given: Arrays, outputs: int = 1, weights: Arrays | None = None, domain: str = "com.microsoft", **attrs: Any
) -> Any:
    """A model of one node. Inputs are named in their order; a name that starts with '-' stands for none."""
    names = ["" if k.startswith("-") else k for k in given]
    fixed = weights or {}
    inputs = [(k, v.dtype, v.shape) for k, v in given.items() if k not in fixed and not k.startswith("-")]
    results = [f"y{k}" for k in range(outputs)]
    one = node(op, names, results, domain=domain, **attrs)
    kinds: dict[str, Any] = {
        "EmbedLayerNormalization": {"y1": I32},
        "QLinearWhere": {"y0": np.uint8},
        "QLinearReduceMean": {"y0": np.uint8},
    }.get(op, {})
    return model([one], inputs, [(y, kinds.get(y, F), None) for y in results], fixed, domains={"com.microsoft": 1})


def ours(m: Any, given: Arrays) -> list[Any]:
    exe = tw.compile(tw.onnx.Model(m))
    wanted = [i.name for i in m.graph.input]
    result = exe(*(given[k] for k in wanted))
    return list(result) if isinstance(result, tuple) else [result]


def peer(m: Any, given: Arrays) -> list[Any]:
    ort = pytest.importorskip("onnxruntime", reason="the bench extra")
    ort.set_default_logger_severity(4)
    session = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: np.asarray(given[i.name]) for i in m.graph.input})  # type: ignore[no-any-return]


def norm_inputs() -> Arrays:
    return {"x": r(2, 5, 12), "skip": r(2, 5, 12), "gamma": r(12)}


def embedding() -> Arrays:
    tables = {"word": r(20, 8), "place": r(9, 8), "part": r(2, 8), "gamma": r(8), "beta": r(8)}
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], I32)
    return {"ids": ids(20, 2, 4), "segments": ids(2, 2, 4), **tables, "mask": mask}


def packed(n: int, k: int, block: int, bits: int, zero: bool) -> Arrays:
    count = -(-k // block)
    found: Arrays = {"a": r(3, k), "b": u8(n, count, block * bits // 8), "s": np.abs(r(n, count)) + F(0.1)}
    return found | ({"z": u8(n, -(-count * bits // 8))} if zero else {})


def attention(batch: int, length: int, width: int, heads: int) -> Arrays:
    return {"x": r(batch, length, width), "w": r(width, 3 * width) * F(0.3), "b": r(3 * width)}


def apart(batch: int, rows: int, columns: int, width: int) -> Arrays:
    return {"q": r(batch, rows, width), "k": r(batch, columns, width), "v": r(batch, columns, width)}


RAW = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], I32)
CASES: dict[str, tuple[str, Arrays, dict[str, Any]]] = {
    "conv_relu": ("FusedConv", {"x": r(2, 3, 8, 8), "w": r(4, 3, 3, 3)}, {"activation": "Relu", "pads": [1] * 4}),
    "conv_sum": ("FusedConv", {"x": r(1, 4, 6, 6), "w": r(4, 2, 3, 3), "b": r(4), "z": r(1, 4, 3, 3)},
                 {"activation": "Relu", "strides": [2, 2], "pads": [1] * 4, "group": 2}),
    "conv_leaky": ("FusedConv", {"x": r(1, 3, 6, 6), "w": r(4, 3, 1, 1), "b": r(4)},
                   {"activation": "LeakyRelu", "activation_params": [0.2]}),
    "conv_clip": ("FusedConv", {"x": r(1, 3, 6, 6), "w": r(4, 3, 3, 3)},
                  {"activation": "Clip", "activation_params": [-0.5, 1.5]}),
    "conv_hard": ("FusedConv", {"x": r(1, 3, 6, 6), "w": r(4, 3, 3, 3)},
                  {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}),
    "conv_1d": ("FusedConv", {"x": r(1, 3, 9), "w": r(4, 3, 3), "b": r(4)}, {"activation": "Tanh"}),
    "gemm": ("FusedGemm", {"a": r(5, 4), "b": r(3, 5), "c": r(3)},
             {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "Relu"}),
    "gemm_leaky": ("FusedGemm", {"a": r(4, 5), "b": r(5, 3)}, {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    "matmul": ("FusedMatMul", {"a": r(2, 5, 3), "b": r(2, 4, 5)}, {"transA": 1, "transB": 1, "alpha": 0.25}),
    "matmul_batch": ("FusedMatMul", {"a": r(5, 2, 3, 4), "b": r(2, 3, 4, 6)}, {"transBatchA": 1}),
    "matmul_batch_both": ("FusedMatMul", {"a": r(4, 2, 5), "b": r(4, 2, 6)}, {"transBatchA": 1, "transA": 1, "transBatchB": 1}),
    "matmul_act": ("TransposeMatMul", {"a": r(2, 3), "b": r(2, 3)}, {"transA": 1}),
    "gelu": ("Gelu", {"x": r(3, 7) * 3}, {}),
    "bias_gelu": ("BiasGelu", {"x": r(3, 7), "b": r(7)}, {}),
    "fast_gelu": ("FastGelu", {"x": r(3, 7)}, {}),
    "fast_gelu_bias": ("FastGelu", {"x": r(3, 7), "b": r(7)}, {}),
    "quick_gelu": ("QuickGelu", {"x": r(3, 7)}, {"alpha": 1.5}),
    "skip": ("SkipLayerNormalization", norm_inputs(), {"epsilon": 1e-5}),
    "skip_sum": ("SkipLayerNormalization", {**norm_inputs(), "beta": r(12), "bias": r(12)}, {"outputs": 4}),
    "skip_one": ("SkipLayerNormalization", {**norm_inputs(), "skip": r(5, 12)}, {}),
    "skip_rms": ("SkipSimplifiedLayerNormalization", {**norm_inputs(), "bias": r(12)}, {"outputs": 4, "epsilon": 1e-6}),
    "rms": ("SimplifiedLayerNormalization", {"x": r(2, 5, 12), "g": r(12)}, {"domain": "", "epsilon": 1e-6, "axis": -1}),
    "embed": ("EmbedLayerNormalization", embedding(), {"outputs": 3, "epsilon": 1e-5}),
    "embed_words": ("EmbedLayerNormalization", {"ids": ids(20, 2, 4), "-": 0, "word": r(20, 8), "place": r(9, 8), "-2": 0,
                                               "gamma": r(8), "beta": r(8)}, {"outputs": 2}),
    "bits4": ("MatMulNBits", packed(6, 48, 16, 4, False), {"N": 6, "K": 48, "bits": 4, "block_size": 16}),
    "bits4_zero": ("MatMulNBits", packed(6, 70, 32, 4, True), {"N": 6, "K": 70, "bits": 4, "block_size": 32}),
    "bits8_zero": ("MatMulNBits", packed(5, 40, 16, 8, True), {"N": 5, "K": 40, "bits": 8, "block_size": 16}),
    "bits2": ("MatMulNBits", packed(4, 64, 32, 2, True), {"N": 4, "K": 64, "bits": 2, "block_size": 32}),
    "attention": ("Attention", attention(2, 5, 12, 3), {"num_heads": 3}),
    "attention_causal": ("Attention", attention(2, 5, 12, 3), {"num_heads": 3, "unidirectional": 1, "scale": 0.3}),
    "attention_raw_mask": ("Attention", {**attention(2, 5, 12, 3), "m": RAW}, {"num_heads": 3}),
    "attention_causal_mask": ("Attention", {**attention(2, 5, 12, 3), "m": RAW}, {"num_heads": 3, "unidirectional": 1}),
    "attention_lengths": ("Attention", {**attention(2, 5, 12, 3), "m": np.array([3, 5], I32)}, {"num_heads": 3}),
    "attention_starts": ("Attention", {**attention(2, 5, 12, 3), "m": np.array([4, 5, 1, 2], I32)}, {"num_heads": 3}),
    "attention_3d_mask": ("Attention", {**attention(2, 5, 12, 3), "m": ids(2, 2, 5, 5)}, {"num_heads": 3}),
    "attention_past": ("Attention", {**attention(2, 2, 12, 3), "-": 0, "p": r(2, 2, 3, 4, 4)},
                       {"num_heads": 3, "unidirectional": 1, "outputs": 2}),
    "attention_bias": ("Attention", {**attention(2, 5, 12, 3), "-": 0, "-2": 0, "a": r(1, 3, 5, 5)}, {"num_heads": 3}),
    "attention_sizes": ("Attention", {"x": r(2, 5, 8), "w": r(8, 12 + 12 + 6), "b": r(30)},
                        {"num_heads": 3, "qkv_hidden_sizes": [12, 12, 6]}),
    "attention_int8": ("QAttention", {"x": u8(2, 5, 12), "w": u8(12, 36), "b": r(36), "xs": F(0.02), "ws": r(36) * F(0.01),
                                      "m": RAW, "xz": np.uint8(128), "wz": u8(36)}, {"num_heads": 3}),
    "where_int8": ("QLinearWhere", {"c": r(3, 4) > 0, "x": u8(3, 4), "xs": F(0.02), "xz": np.uint8(9), "y": u8(4),
                                    "ys": F(0.03), "yz": np.uint8(50), "zs": F(0.025), "zz": np.uint8(30)}, {}),
    "heads": ("MultiHeadAttention", apart(2, 3, 5, 12), {"num_heads": 3}),
    "heads_bias_mask": ("MultiHeadAttention", {**apart(2, 3, 5, 12), "b": r(36), "m": RAW}, {"num_heads": 3}),
    "heads_added": ("MultiHeadAttention", {**apart(2, 3, 5, 12), "-": 0, "-2": 0, "a": r(2, 1, 3, 5)}, {"num_heads": 3}),
    "heads_past": ("MultiHeadAttention",
                   {**apart(2, 2, 2, 12), "-": 0, "-2": 0, "-3": 0, "pk": r(2, 3, 4, 4), "pv": r(2, 3, 4, 4)},
                   {"num_heads": 3, "outputs": 3, "unidirectional": 1}),
    "heads_cross": ("MultiHeadAttention", {"q": r(2, 3, 12), "k": r(2, 3, 5, 4), "v": r(2, 3, 5, 4)}, {"num_heads": 3}),
    "rotary": ("RotaryEmbedding", {"x": r(2, 5, 12), "p": ids(9, 2, 5).astype(np.int64), "c": r(9, 2), "s": r(9, 2)}, {}),
    "rotary_pairs": ("RotaryEmbedding", {"x": r(2, 3, 5, 4), "p": np.array([2]), "c": r(9, 2), "s": r(9, 2)}, {"interleaved": 1}),
    "rotary_part": ("RotaryEmbedding", {"x": r(2, 5, 24), "p": np.array([0]), "c": r(9, 2), "s": r(9, 2)},
                    {"num_heads": 3, "rotary_embedding_dim": 4}),
}  # fmt: skip


def weights_of(op: str, given: Arrays) -> Arrays:
    """What ONNX Runtime wants to know beforehand."""
    names = {"MatMulNBits": "b s z", "QAttention": "w ws wz", "QLinearWhere": "xs xz ys yz zs zz"}.get(op, "").split()
    return {k: given[k] for k in names if k in given}


@pytest.mark.parametrize("name", CASES)
def test_as_onnxruntime(name: str) -> None:
    op, given, attrs = CASES[name]
    m = made(op, given, weights=weights_of(op, given), **attrs)
    found, expected = ours(m, given), peer(m, given)
    assert len(found) == len(expected)
    for k, (got, want) in enumerate(zip(found, expected, strict=True)):
        if k in (1, 2) and op.startswith("Skip"):
            continue  # statistics for training: ONNX Runtime leaves them unset
        assert got.dtype == want.dtype and got.shape == want.shape
        # sums of up to 70 products of numbers of about 1 (MatMulNBits: of about 100), in an order of its own
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * max(1.0, float(np.abs(want).max())))


def test_by_formula() -> None:
    x, bias = r(4, 6), r(6)
    (y,) = ours(made("BiasGelu", {"x": x, "b": bias}), {"x": x, "b": bias})
    t = (x + bias).astype(np.float64)
    np.testing.assert_allclose(y, t * (1 + erf(t / math.sqrt(2))) / 2, rtol=1e-5, atol=1e-6)
    (y,) = ours(made("BiasSplitGelu", {"x": x[None], "b": bias}), {"x": x[None], "b": bias})
    np.testing.assert_allclose(y[0], t[:, :3] * t[:, 3:] * (1 + erf(t[:, 3:] / math.sqrt(2))) / 2, rtol=1e-5, atol=1e-6)


def test_means_of_integers_by_formula() -> None:
    given = {"x": u8(3, 4, 5), "xs": F(0.02), "xz": np.uint8(9), "ys": F(0.01), "yz": np.uint8(30)}
    (y,) = ours(made("QLinearReduceMean", given, axes=[0, 2], keepdims=1), given)
    want = np.round(((given["x"].astype(F) - 9) * F(0.02)).mean((0, 2), keepdims=True) / F(0.01)) + 30
    np.testing.assert_array_equal(y, np.clip(want, 0, 255).astype(np.uint8))


def test_weights_of_four_bits_by_formula() -> None:
    given = packed(6, 70, 32, 4, True)
    (y,) = ours(made("MatMulNBits", given, weights=weights_of("MatMulNBits", given), N=6, K=70, bits=4, block_size=32), given)
    low_first = [(given[k] >> np.uint8(shift)) & 15 for k in ("b", "z") for shift in (0, 4)]
    numbers = np.stack(low_first[:2], -1).reshape(6, 3, 32).astype(F)
    zeros = np.stack(low_first[2:], -1).reshape(6, 4)[:, :3, None].astype(F)
    weight = ((numbers - zeros) * given["s"][:, :, None]).reshape(6, 96)[:, :70]
    np.testing.assert_allclose(y, given["a"] @ weight.T, rtol=1e-4, atol=1e-4)


def test_attention_by_formula() -> None:
    given = {**attention(2, 5, 12, 3), "m": np.array([3, 5], I32)}
    (y,) = ours(made("Attention", given, num_heads=3), given)
    q, k, v = (given["x"] @ given["w"] + given["b"]).reshape(2, 5, 3, 3, 4).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(2, 3) / 2 + np.where(np.arange(5) < given["m"][:, None], 0, -10000.0)[:, None, None, :]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = (p / p.sum(-1, keepdims=True)) @ v
    np.testing.assert_allclose(y, want.swapaxes(1, 2).reshape(2, 5, 12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "given", "attrs", "match"),
    [
        ("FusedConv", {"x": r(1, 1, 3, 3), "w": r(1, 1, 1, 1)}, {"activation": "Mish"}, "activation='Mish'"),
        ("MatMulNBits", packed(6, 48, 16, 4, False), {"N": 6, "K": 48, "bits": 3, "block_size": 16}, "bits=3"),
        ("Attention", attention(2, 5, 12, 3), {"num_heads": 0}, "num_heads=0"),
        ("Attention", {**attention(2, 5, 12, 3), "m": ids(2, 8)}, {"num_heads": 3}, "a mask of shape"),
        ("Attention", attention(2, 5, 12, 3), {"num_heads": 3, "do_rotary": 1}, "do_rotary"),
    ],
)  # fmt: skip
def test_what_is_refused(op: str, given: Arrays, attrs: dict[str, Any], match: str) -> None:
    with pytest.raises(OnnxError, match=match):
        tw.onnx.load(made(op, given, **attrs))
